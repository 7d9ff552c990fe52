"""Quantize layer by layer: second moments, folds, rounding; the second walk over the model.

Every layer is an artefact of the work directory. It holds the packed tensors of the layer, the
folds' multipliers, and facts about each tensor for the report. Where layers are calibrated through
the quantized layers before them, a layer's fingerprint contains those of the layers before.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from safetensors import safe_open

from converters.errors import ConversionError
from converters.gguf_file import GgufFile, TensorSource, tensor_bytes
from edgeq.allocation import Plan, PlanEntry
from edgeq.calibration.moments import Moments, MomentsSource
from edgeq.console import Progress
from edgeq.grids import KEPT, lies_on_grid, reason
from edgeq.opening import Reference
from edgeq.quantizers import Inputs, Quantizer, Rounded, importances_of
from edgeq.runtime.encoders import FloatArray, Packed, decode, encode, validate
from edgeq.transforms import (
    FoldSite,
    QuantizerLoss,
    TensorScales,
    apply,
    fold_hessian,
    fold_importances,
    fold_sites,
    search_scales,
    tensor_scales,
    unfold,
)
from edgeq.workdir import WorkDirectory, file_name, file_sha256, save_arrays

_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_JUDGED_ROWS = 128  # of a matrix: folds are searched on these
Importances = Mapping[str, FloatArray]


@dataclass(frozen=True, eq=False)
class Rules:
    """How tensors are rounded.

    Attributes
    ----------
    quantizer : chooses the codes
    transforms : methods of ``edgeq.transforms.search_scales`` to try; empty: fold nothing
    asymmetric : 0 to 1, how far weights are moved to make up for the layers before
    allow_requantize : accept weights that are quantized already
    n_threads : default: every CPU of this process
    keeps_grids : round what lies on the grid of its type to nearest, and fold nothing into it
    """

    quantizer: Quantizer
    transforms: tuple[str, ...] = ()
    asymmetric: float = 0.0
    allow_requantize: bool = False
    n_threads: int | None = None
    keeps_grids: bool = False


@dataclass(frozen=True, eq=False)
class Quantized:
    """All layers, quantized.

    Attributes
    ----------
    paths : tensor name to the safetensors file with its packed rows; what is not there is kept as
        the reference has it
    facts : tensor name to what is told about it
    folds : what was folded, or why not, by site
    """

    paths: dict[str, Path]
    facts: dict[str, dict[str, float | str]]
    folds: dict[str, dict[str, float | str]]

    def load(self, name: str) -> Packed:
        """Return a tensor's packed rows, in its shape."""
        with safe_open(self.paths[name], framework="numpy") as part:
            packed: Packed = part.get_tensor(name)
        return packed

    @property
    def kept(self) -> dict[str, str]:
        """Tensor name to why it was left on the grid that it lies on."""
        return {name: str(fact[KEPT]) for name, fact in self.facts.items() if KEPT in fact}

    def explained(self, plan: Plan) -> Plan:
        """Return the plan with the reasons that only rounding could give."""
        entries = (
            replace(entry, reason=f"{entry.reason}; {self.kept[entry.name]}")
            if entry.name in self.kept
            else entry
            for entry in plan.entries
        )
        return replace(plan, entries=tuple(entries))

    def sources(self, plan: Plan, file: GgufFile) -> list[TensorSource]:
        """Return every tensor of the output, in the plan's order."""

        def source(entry: PlanEntry) -> TensorSource:
            def load() -> Packed:
                return (
                    self.load(entry.name)
                    if entry.name in self.paths
                    else file.read_bytes(entry.name)
                )

            return TensorSource(entry.name, entry.qtype, entry.shape, load)

        return [source(entry) for entry in plan.entries]


def quantize_layers(
    rules: Rules,
    reference: Reference,
    plan: Plan,
    importances: Importances | None,
    moments: MomentsSource | None,
    made_by: Mapping[str, Any],
    directory: str,
    work: WorkDirectory,
    progress: Progress,
) -> Quantized:
    """Quantize everything that the plan gives another type.

    Parameters
    ----------
    importances : tensor name to (n_mat, n_in) float32 mean squared inputs
    moments : second moments, layer by layer; None: the quantizer needs none
    made_by : all that the result depends on beside the layer's types, for its fingerprint
    directory : of the work directory, where the layers are kept

    Raises
    ------
    ConversionError, CalibrationError, RecipeError
        A tensor cannot be quantized; the message names it.
    """
    layers = layers_of(plan, reference.file)
    sites = fold_sites(reference.file) if rules.transforms else []
    found = Quantized({}, {}, {})
    before: list[str] = []
    for done, (layer, entries) in enumerate(layers.items(), start=1):
        number = int(layer.removeprefix("blk.")) if layer.startswith("blk.") else None
        task = _Layer(rules, reference.file, entries, importances)

        def make(out: Path, number: int | None = number, task: "_Layer" = task) -> None:
            seen = {} if moments is None or number is None else moments.of_layer(number)
            task.run(out, seen, [site for site in sites if site.layer == number is not None])

        path = work.artefact(
            f"{directory}/{file_name(layer)}.safetensors",
            {
                **made_by,
                "types": {entry.name: entry.qtype.name for entry in entries},
                "before": before if number is not None else [],
            },
            make,
        )
        if number is not None and moments is not None:
            before = [file_sha256(path)] if moments.is_sequential else []
            moments.advance(number, lambda path=path: _effective(path, reference.file, plan))  # type: ignore[misc]
        _collect(path, found)
        progress(done, len(layers))
    return found


def layers_of(plan: Plan, file: GgufFile) -> dict[str, list[PlanEntry]]:
    """Group what changes its type by layer: ``blk.N``, or the tensor's name outside of layers."""
    layers: dict[str, list[PlanEntry]] = {}
    for entry in plan.entries:
        if entry.qtype != file.tensors[entry.name].qtype:
            layer = ".".join(entry.name.split(".")[:2])
            layers.setdefault(layer if layer.startswith("blk.") else entry.name, []).append(entry)
    return dict(sorted(layers.items(), key=lambda item: _place(item[0])))


def _place(layer: str) -> tuple[int, int, str]:
    """Sort layers by number, in front of everything else."""
    number = layer.removeprefix("blk.")
    return (0, int(number), "") if number.isdigit() else (1, 0, layer)


def quantize_tensor(
    file: GgufFile,
    name: str,
    qtype: GGMLQuantizationType,
    imatrix: Importances | None,
    quantizer: Quantizer,
    *,
    allow_requantize: bool = False,
    n_threads: int | None = None,
) -> Packed:
    """Return a tensor of `file` as `qtype`: copied if it is of that type, else quantized.

    Parameters
    ----------
    imatrix : tensor name to mean squared inputs, (n_mat, n_in) float32
    allow_requantize : accept a tensor that is quantized already

    Returns
    -------
    (..., row_bytes) uint8 in the tensor's shape

    Raises
    ------
    ConversionError
        The tensor is quantized already, or holds weights that the type cannot.
    CalibrationError
        The importances do not fit, or are missing where the type needs them.
    """
    info = file.tensors[name]
    if info.qtype == qtype:
        return file.read_bytes(name)
    weight = _read(file, name, allow_requantize=allow_requantize, n_threads=n_threads)
    inputs = Inputs(importances_of(name, info.shape, imatrix))
    rounded = quantizer.quantize(name, weight, qtype, inputs, n_threads=n_threads)
    return rounded.packed.reshape(*info.shape[:-1], -1)


def _read(
    file: GgufFile, name: str, *, allow_requantize: bool, n_threads: int | None
) -> FloatArray:
    """Return a tensor as float32 in its shape."""
    info = file.tensors[name]
    if info.qtype not in _FLOATS and not allow_requantize:
        raise ConversionError(
            f"{file.path}: {name} is {info.qtype.name} already, expected F32, F16 or BF16. "
            "Give the float model, or allow a second rounding with --allow-requantize."
        )
    packed = file.read_bytes(name)
    rows = decode(packed.reshape(-1, packed.shape[-1]), info.qtype, n_threads=n_threads)
    return rows.reshape(info.shape)


class _Layer:
    """One layer being quantized."""

    def __init__(
        self,
        rules: Rules,
        file: GgufFile,
        entries: Sequence[PlanEntry],
        importances: Importances | None,
    ) -> None:
        self.rules = rules
        self.file = file
        self.qtypes = {entry.name: entry.qtype for entry in entries}
        self.inputs: dict[str, Inputs] = {
            entry.name: Inputs(importances_of(entry.name, entry.shape, importances))
            for entry in entries
        }
        self.shifts: dict[str, FloatArray] = {}  # of biases, in what the folds make of them
        self.facts: dict[str, dict[str, float | str]] = {}
        self.folds: dict[str, dict[str, float | str]] = {}
        self.kept = {
            name: reason(qtype)
            for name, qtype in self.qtypes.items()
            if rules.keeps_grids and lies_on_grid(file, name, qtype, n_threads=rules.n_threads)
        }

    def run(self, out: Path, moments: Mapping[str, Moments], sites: Sequence[FoldSite]) -> None:
        """Write the layer's packed tensors, multipliers and facts."""
        scales = self._fold(moments, sites)
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, qtype in self.qtypes.items():
            arrays[name] = self._quantize(name, qtype, moments.get(name), scales.get(name))
        for name in scales.keys() - self.qtypes.keys() - self.shifts.keys():
            arrays[name] = self._scaled(name, scales[name])
        for name, shift in self.shifts.items():
            arrays[name], arrays[f"effective/{name}"] = self._shifted(name, shift, scales.get(name))
        for name, one in scales.items():
            arrays[f"row/{name}"], arrays[f"column/{name}"] = one.row, one.column
        about = {"facts": self.facts, "folds": self.folds}
        save_arrays(arrays, out, {"about": json.dumps(about)})  # two keys would stand in any order

    def _weight(self, name: str) -> FloatArray:
        allow = self.rules.allow_requantize
        return _read(self.file, name, allow_requantize=allow, n_threads=self.rules.n_threads)

    def _fold(
        self, moments: Mapping[str, Moments], sites: Sequence[FoldSite]
    ) -> dict[str, TensorScales]:
        """Choose the folds of the layer; return what they amount to, tensor by tensor."""
        chosen: dict[FoldSite, FloatArray] = {}
        for site in sites:
            scales = self._search(site, moments)
            if scales is not None:
                chosen[site] = scales
        return tensor_scales(self.file, chosen)

    def _search(self, site: FoldSite, moments: Mapping[str, Moments]) -> FloatArray | None:
        names = [name for name in site.consumers if name in self.qtypes and name in moments]
        refused = site.refused
        if not names or len(names) < len([n for n in site.consumers if n in self.qtypes]):
            refused = refused or "no second moments of what it would fold into"
        kept = [name for name in (site.source, *site.consumers) if name in self.kept]
        if kept:
            refused = refused or f"{kept[0]} {self.kept[kept[0]]}"
        if refused is not None:
            self.folds[site.name] = {"method": "none", "reason": refused}
            return None
        hessians = {
            name: _by_matrix(moments[name].hessian, self.file.tensors[name].shape) for name in names
        }
        importances = {
            name: np.diagonal(h, axis1=1, axis2=2).copy() for name, h in hessians.items()
        }
        loss = QuantizerLoss(
            {name: self.qtypes[name] for name in names},
            importances=importances,
            hessians={name: h[0] if len(h) == 1 else h for name, h in hessians.items()},
            n_threads=self.rules.n_threads,
        )
        choice = search_scales(
            site,
            {name: thinned(self._weight(name), _JUDGED_ROWS) for name in names},
            loss=loss,
            importances=importances,
            hessians=hessians,
            rounding=loss.round,
            methods=self.rules.transforms,
        )
        self.folds[site.name] = {
            "method": choice.method,
            "strength": choice.strength,
            "loss_before": choice.loss_before,
            "loss_after": choice.loss_after,
        }
        return choice.scales

    def _quantize(
        self,
        name: str,
        qtype: GGMLQuantizationType,
        moments: Moments | None,
        scales: TensorScales | None,
    ) -> Packed:
        rules, inputs = self.rules, self.inputs[name]
        weight = self._weight(name)
        shape = weight.shape
        if name in self.kept:
            self.facts[name] = {KEPT: self.kept[name]}
            nearest = encode(weight, qtype, n_threads=rules.n_threads, name=name)
            return _checked(name, qtype, Rounded(nearest), shape)
        importances = inputs.importances
        bias = name.removesuffix("weight") + "bias"
        mean = None
        if moments is not None and rules.quantizer.uses_hessian and self._is_float(bias):
            moments, mean = moments.centred(), moments.mean
        hessian = None if moments is None else moments.hessian
        cross = None if moments is None else moments.cross
        if scales is not None:
            weight = apply(weight, scales)
            importances = None if importances is None else fold_importances(importances, scales)
            hessian = None if hessian is None else fold_hessian(hessian, scales)
            cross = None if cross is None else fold_hessian(cross, scales)
            mean = None if mean is None else mean / scales.column
        if rules.asymmetric > 0 and hessian is not None and cross is not None:
            weight = corrected(weight, hessian, cross, rules.asymmetric)
        rounded = rules.quantizer.quantize(
            name, weight, qtype, Inputs(importances, hessian), n_threads=rules.n_threads
        )
        self.facts[name] = dict(rounded.facts)
        packed = _checked(name, qtype, rounded, shape)
        if mean is not None:
            error = decode(rounded.packed, qtype).reshape(len(mean), -1, shape[-1])
            error -= weight.reshape(error.shape)
            self.shifts[bias] = np.einsum("gri,gi->gr", error, mean).ravel()
        return packed

    def _shifted(
        self, name: str, shift: FloatArray, scales: TensorScales | None
    ) -> tuple[Packed, FloatArray]:
        """Return a bias less the mean error of its products, as the file has it and unfolded."""
        bias = self._weight(name)
        moved = (bias if scales is None else apply(bias, scales)) - shift
        return moved.view(np.uint8), moved if scales is None else unfold(moved, scales)

    def _is_float(self, bias: str) -> bool:
        info = self.file.tensors.get(bias)
        return info is not None and info.qtype == GGMLQuantizationType.F32

    def _scaled(self, name: str, scales: TensorScales) -> npt.NDArray[Any]:
        """Return a tensor that keeps its type, folded."""
        info = self.file.tensors[name]
        folded = apply(self._weight(name), scales)
        rows = encode(np.atleast_2d(folded), info.qtype, n_threads=self.rules.n_threads, name=name)
        return rows.reshape(*info.shape[:-1], -1)


def thinned(weight: FloatArray, n_rows: int) -> FloatArray:
    """Return at most so many rows of each matrix, evenly spread."""
    n_out = weight.shape[-2]
    if n_out <= n_rows:
        return weight
    rows = np.linspace(0, n_out - 1, n_rows).astype(np.intp)
    return np.ascontiguousarray(weight[..., rows, :])


def _by_matrix(hessian: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Return second moments, (n_mat, n_in, n_in), of what has them for groups of its rows."""
    n_mat = 1 if len(shape) == 2 else shape[0]
    means: FloatArray = hessian.reshape(n_mat, -1, *hessian.shape[1:]).mean(axis=1)
    return means


def corrected(
    weight: FloatArray, hessian: FloatArray, cross: FloatArray, strength: float
) -> FloatArray:
    """Return W + α W C H⁻¹: weights that undo a part of what the layers before changed.

    Parameters
    ----------
    weight : (n_out, n_in) or (n_mat, n_out, n_in) float32
    hessian, cross : (n_mat, n_in, n_in), or of groups of rows; see
        ``edgeq.calibration.moments.Moments``
    strength : α, 0 to 1

    References
    ----------
    Li et al., GPTAQ, arXiv:2504.02692; here as a target for any rounding, min ‖Q X̃ − W X‖² =
    min (Q − W*) H (Q − W*)ᵀ.
    """
    matrices = weight.reshape(len(hessian), -1, weight.shape[-1])
    out = matrices.copy()
    for number, matrix in enumerate(matrices):
        moments = hessian[number].astype(np.float64)
        diagonal = np.diagonal(moments)
        if not diagonal.max() > 0:
            continue
        moments[np.diag_indices_from(moments)] += 0.01 * diagonal.mean()
        moved = matrix.astype(np.float64) @ cross[number]
        out[number] += strength * np.linalg.solve(moments, moved.T).T.astype(np.float32)
    return out.reshape(weight.shape)


def _checked(
    name: str, qtype: GGMLQuantizationType, rounded: Rounded, shape: tuple[int, ...]
) -> Packed:
    """Return packed rows in the tensor's shape; refuse what a quantizer must not return."""
    packed = np.ascontiguousarray(rounded.packed)
    wanted = (int(np.prod(shape[:-1])), tensor_bytes(qtype, shape[-1:]))
    if packed.dtype != np.uint8 or packed.shape != wanted:
        raise ConversionError(
            f"{name}: the quantizer returned {packed.dtype} of shape {packed.shape}, expected "
            f"uint8 of shape {wanted}. Report it to the quantizer's developers."
        )
    if not validate(packed, qtype):
        raise ConversionError(
            f"{name}: the quantizer returned {qtype.name} rows that ggml refuses (a scale is not "
            "finite). Report it to the quantizer's developers."
        )
    return packed.reshape(*shape[:-1], -1)


def _effective(path: Path, file: GgufFile, plan: Plan) -> dict[str, FloatArray]:
    """Return what a layer's packed tensors stand for before folding, by name."""
    types = plan.types
    found: dict[str, FloatArray] = {}
    with safe_open(path, framework="numpy") as part:
        keys = set(part.keys())
        for key in keys:
            if key.startswith("effective/"):
                found[key.removeprefix("effective/")] = part.get_tensor(key)
        for name in types.keys() & keys:
            if types[name] == file.tensors[name].qtype:
                continue  # scaled only: the same after unfolding
            packed = part.get_tensor(name)
            rows = decode(np.ascontiguousarray(packed.reshape(-1, packed.shape[-1])), types[name])
            values = rows.reshape(file.tensors[name].shape)
            if f"row/{name}" in keys:
                row, column = part.get_tensor(f"row/{name}"), part.get_tensor(f"column/{name}")
                values = unfold(values, TensorScales(row, column))
            found[name] = values
    return found


def _collect(path: Path, found: Quantized) -> None:
    with safe_open(path, framework="numpy") as part:
        about = json.loads((part.metadata() or {})["about"])
        names = [
            key for key in part.keys() if not key.startswith(("row/", "column/", "effective/"))
        ]
    found.paths.update(dict.fromkeys(names, path))
    found.facts.update(about["facts"])
    found.folds.update(about["folds"])
