"""Quantize layer by layer: second moments, folds, rounding; the second walk over the model.

Every layer is an artefact of the work directory. It holds the packed tensors of the layer, the
folds' multipliers, and facts about each tensor for the report. Where layers are calibrated through
the quantized layers before them, a layer's fingerprint contains those of the layers before.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from safetensors import safe_open

from converters.gguf_file import GgufFile, TensorSource
from edgeq.allocation import Plan, PlanEntry
from edgeq.calibration.moments import MomentsSource
from edgeq.console import Progress
from edgeq.execution import Executor
from edgeq.grids import KEPT
from edgeq.layer_rounding import Importances, LayerRounding, Rules, read_weight
from edgeq.opening import Reference
from edgeq.quantizers import Inputs, Quantizer, importances_of
from edgeq.runtime.encoders import FloatArray, Packed, decode
from edgeq.transforms import TensorScales, fold_sites, unfold
from edgeq.workdir import WorkDirectory, file_name, file_sha256


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
    executor: Executor,
    progress: Progress,
) -> Quantized:
    """Quantize everything that the plan gives another type.

    Parameters
    ----------
    importances : tensor name to (n_mat, n_in) float32 mean squared inputs
    moments : second moments, layer by layer; None: the quantizer needs none
    made_by : all that the result depends on beside the layer's types, for its fingerprint
    directory : of the work directory, where the layers are kept
    executor : runs the folds and the tensors of a layer

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

        def make(
            out: Path, number: int | None = number, entries: list[PlanEntry] = entries
        ) -> None:
            seen = {} if moments is None or number is None else moments.of_layer(number)
            folds = [site for site in sites if site.layer == number is not None]
            one = LayerRounding.of(rules, reference.file, entries, importances)
            one.run(out, seen, folds, executor)

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
    weight = read_weight(file, name, allow_requantize=allow_requantize, n_threads=n_threads)
    inputs = Inputs(importances_of(name, info.shape, imatrix))
    rounded = quantizer.quantize(name, weight, qtype, inputs, n_threads=n_threads)
    return rounded.packed.reshape(*info.shape[:-1], -1)


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
