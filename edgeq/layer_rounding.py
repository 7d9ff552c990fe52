"""One layer being quantized: its folds, then its tensors, each a task that can run anywhere."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from converters.errors import ConversionError
from converters.gguf_file import GgufFile, tensor_bytes
from converters.gguf_header import FLOATS
from edgeq.allocation import PlanEntry
from edgeq.calibration.moments import Moments
from edgeq.execution import Executor, Shared, in_order
from edgeq.grids import KEPT, lies_on_grid, reason
from edgeq.quantizers import Inputs, Matrices, Quantizer, Rounded, importances_of
from edgeq.runtime.encoders import FloatArray, Packed, decode, encode, validate
from edgeq.transforms import (
    FoldedHessian,
    FoldSite,
    QuantizerLoss,
    TensorScales,
    apply,
    fold_hessian,
    fold_importances,
    fold_outputs,
    search_scales,
    tensor_scales,
    unfold,
)
from edgeq.workdir import save_arrays

JUDGED_ROWS = 128  # of a matrix: folds are searched, and cheap losses estimated, on these
Importances = Mapping[str, FloatArray]
Facts = dict[str, float | str]
_Number = TypeVar("_Number", bound=np.generic)


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
class RoundedTensor:
    """What became of one tensor.

    Attributes
    ----------
    packed : rows in the tensor's shape
    facts : for the report
    shift : (n_out,) float32, the mean error of its products, which its bias takes; None: no bias
    """

    packed: Packed
    facts: Facts = field(default_factory=dict)
    shift: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class LayerRounding:
    """One layer to be quantized; it can be pickled, and names its weights in the file.

    Attributes
    ----------
    file : the reference, or the part of it that the layer needs
    qtypes : tensor name to the type that it gets
    inputs : tensor name to (n_mat, n_in) float32 mean squared inputs, if they are known
    kept : tensor name to why it stays on the grid that it lies on
    """

    rules: Rules
    file: GgufFile
    qtypes: Mapping[str, GGMLQuantizationType]
    inputs: Mapping[str, FloatArray | None]
    kept: Mapping[str, str]

    @classmethod
    def of(
        cls,
        rules: Rules,
        file: GgufFile,
        entries: Sequence[PlanEntry],
        importances: Importances | None,
    ) -> "LayerRounding":
        """Return the layer of some entries of a plan."""
        return cls(
            rules,
            file,
            {entry.name: entry.qtype for entry in entries},
            {entry.name: importances_of(entry.name, entry.shape, importances) for entry in entries},
            {
                entry.name: reason(entry.qtype)
                for entry in entries
                if rules.keeps_grids
                and lies_on_grid(file, entry.name, entry.qtype, n_threads=rules.n_threads)
            },
        )

    def run(
        self,
        out: Path,
        moments: Mapping[str, Moments],
        sites: Sequence[FoldSite],
        executor: Executor,
    ) -> None:
        """Write the layer's packed tensors, multipliers and facts as safetensors."""

        def with_only(names: Sequence[str]) -> LayerRounding:
            there = [name for name in names if name in self.file.tensors]
            return replace(self, file=executor.portable(self.file, there))

        with executor.sharing(moments) as shared:
            fold_tasks = [
                _FoldTask(
                    with_only(site.consumers),
                    site,
                    {name: shared[name] for name in site.consumers if name in shared},
                )
                for site in sites
            ]
            found = in_order(executor, _fold, fold_tasks)
            chosen = {s: one for s, (one, _) in zip(sites, found, strict=True) if one is not None}
            scales = tensor_scales(self.file, chosen)
            tensor_tasks = [
                _TensorTask(
                    with_only([name, _bias_of(name)]), name, shared.get(name), scales.get(name)
                )
                for name in self.qtypes
            ]
            rounded = dict(zip(self.qtypes, in_order(executor, _round, tensor_tasks), strict=True))
        arrays: dict[str, npt.NDArray[Any]] = {n: one.packed for n, one in rounded.items()}
        shifts = {
            _bias_of(name): one.shift for name, one in rounded.items() if one.shift is not None
        }
        for name in scales.keys() - self.qtypes.keys() - shifts.keys():
            arrays[name] = self._scaled(name, scales[name])
        for name, shift in shifts.items():
            arrays[name], arrays[f"effective/{name}"] = self._shifted(name, shift, scales.get(name))
        for name, one in scales.items():
            arrays[f"row/{name}"], arrays[f"column/{name}"] = one.row, one.column
        about = {
            "facts": {name: one.facts for name, one in rounded.items()},
            "folds": {site.name: told for site, (_, told) in zip(sites, found, strict=True)},
        }
        save_arrays(arrays, out, {"about": json.dumps(about)})  # two keys would stand in any order

    def fold(
        self, site: FoldSite, moments: Mapping[str, Moments]
    ) -> tuple[FloatArray | None, Facts]:
        """Return the scales of one fold, (n,) float32, and what the report tells of the search.

        Parameters
        ----------
        moments : of the site's consumers, as far as they are known
        """
        names = [name for name in site.consumers if name in self.qtypes and name in moments]
        refused = site.refused
        if not names or len(names) < len([n for n in site.consumers if n in self.qtypes]):
            refused = refused or "no second moments of what it would fold into"
        kept = [name for name in (site.source, *site.consumers) if name in self.kept]
        if kept:
            refused = refused or f"{kept[0]} {self.kept[kept[0]]}"
        if refused is not None:
            return None, {"method": "none", "reason": refused}
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
            {name: self._weight(name, JUDGED_ROWS) for name in names},
            loss=loss,
            importances=importances,
            hessians=hessians,
            rounding=loss.round,
            methods=self.rules.transforms,
        )
        return choice.scales, {
            "method": choice.method,
            "strength": choice.strength,
            "loss_before": choice.loss_before,
            "loss_after": choice.loss_after,
        }

    def round(
        self, name: str, moments: Moments | None, scales: TensorScales | None
    ) -> RoundedTensor:
        """Return one tensor, folded and rounded.

        Raises
        ------
        ConversionError, CalibrationError
            It cannot be quantized; the message names it.
        """
        rules, qtype = self.rules, self.qtypes[name]
        shape = self.file.tensors[name].shape
        if name in self.kept:
            nearest = encode(self._weight(name), qtype, n_threads=rules.n_threads, name=name)
            packed = _checked(name, qtype, Rounded(nearest), shape)
            return RoundedTensor(packed, {KEPT: self.kept[name]})
        importances = self.inputs[name]
        mean = None
        if moments is not None and rules.quantizer.uses_hessian and self._has_float_bias(name):
            moments, mean = moments.centred(), moments.mean
        hessian: Matrices | None = None if moments is None else moments.hessian
        cross: Matrices | None = None if moments is None else moments.cross
        outputs = None if moments is None else moments.outputs
        weight = self._weight(name)
        if moments is not None and scales is not None:
            fold = fold_hessian if len(shape) == 2 else FoldedHessian
            hessian = fold(moments.hessian, scales)
            cross = None if moments.cross is None else fold(moments.cross, scales)
        if scales is not None:
            weight = apply(weight, scales)
            outputs = None if outputs is None else fold_outputs(outputs, scales)
            importances = None if importances is None else fold_importances(importances, scales)
            mean = None if mean is None else mean / scales.column
        if rules.asymmetric > 0 and hessian is not None and cross is not None:
            weight = corrected(weight, hessian, cross, rules.asymmetric)
        rounded = rules.quantizer.quantize(
            name, weight, qtype, Inputs(importances, hessian, outputs), n_threads=rules.n_threads
        )
        shift = None
        if mean is not None:
            error = decode(rounded.packed, qtype).reshape(len(mean), -1, shape[-1])
            error -= weight.reshape(error.shape)
            shift = np.einsum("gri,gi->gr", error, mean).ravel()
        return RoundedTensor(_checked(name, qtype, rounded, shape), dict(rounded.facts), shift)

    def _weight(self, name: str, n_rows: int | None = None) -> FloatArray:
        return read_weight(
            self.file,
            name,
            allow_requantize=self.rules.allow_requantize,
            n_threads=self.rules.n_threads,
            n_rows=n_rows,
        )

    def _has_float_bias(self, name: str) -> bool:
        info = self.file.tensors.get(_bias_of(name))
        return info is not None and info.qtype == GGMLQuantizationType.F32

    def _shifted(
        self, name: str, shift: FloatArray, scales: TensorScales | None
    ) -> tuple[Packed, FloatArray]:
        """Return a bias less the mean error of its products, as the file has it and unfolded."""
        bias = self._weight(name)
        moved = (bias if scales is None else apply(bias, scales)) - shift
        return moved.view(np.uint8), moved if scales is None else unfold(moved, scales)

    def _scaled(self, name: str, scales: TensorScales) -> npt.NDArray[Any]:
        """Return a tensor that keeps its type, folded."""
        info = self.file.tensors[name]
        folded = apply(self._weight(name), scales)
        rows = encode(np.atleast_2d(folded), info.qtype, n_threads=self.rules.n_threads, name=name)
        return rows.reshape(*info.shape[:-1], -1)


@dataclass(frozen=True, eq=False)
class _FoldTask:
    layer: LayerRounding
    site: FoldSite
    moments: Mapping[str, Shared[Moments]]


@dataclass(frozen=True, eq=False)
class _TensorTask:
    layer: LayerRounding
    name: str
    moments: Shared[Moments] | None
    scales: TensorScales | None


def _fold(task: _FoldTask) -> tuple[FloatArray | None, Facts]:
    return task.layer.fold(task.site, {name: one.get() for name, one in task.moments.items()})


def _round(task: _TensorTask) -> RoundedTensor:
    moments = None if task.moments is None else task.moments.get()
    return task.layer.round(task.name, moments, task.scales)


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def read_weight(
    file: GgufFile,
    name: str,
    *,
    allow_requantize: bool,
    n_threads: int | None,
    n_rows: int | None = None,
) -> FloatArray:
    """Return a tensor as float32 in its shape; of each matrix at most `n_rows`, see ``thinned``."""
    info = file.tensors[name]
    if info.qtype not in FLOATS and not allow_requantize:
        raise ConversionError(
            f"{file.path}: {name} is {info.qtype.name} already, expected F32, F16 or BF16. "
            "Give the float model, or allow a second rounding with --allow-requantize."
        )
    packed = file.read_bytes(name)
    if n_rows is not None:
        packed = thinned(packed, n_rows)
    rows = decode(packed.reshape(-1, packed.shape[-1]), info.qtype, n_threads=n_threads)
    return rows.reshape(*packed.shape[:-1], info.shape[-1])


def thinned(weight: npt.NDArray[_Number], n_rows: int) -> npt.NDArray[_Number]:
    """Return at most so many rows of each matrix, evenly spread."""
    n_out = weight.shape[-2]
    if n_out <= n_rows:
        return weight
    rows = np.linspace(0, n_out - 1, n_rows).astype(np.intp)
    return np.ascontiguousarray(weight[..., rows, :])


def _by_matrix(hessian: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Return second moments, (n_mat, n_in, n_in), of what has them for groups of its rows."""
    n_mat = 1 if len(shape) == 2 else shape[0]
    if len(hessian) == n_mat:
        return hessian
    means: FloatArray = hessian.reshape(n_mat, -1, *hessian.shape[1:]).mean(axis=1)
    return means


def corrected(
    weight: FloatArray, hessian: Matrices, cross: Matrices, strength: float
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
