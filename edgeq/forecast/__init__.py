"""What an export would take, without doing it: bytes, memory, and time step by step.

``forecast`` is a function of shapes, a recipe and a machine's rates. Shapes come from headers alone
(``outline_of``) or from a model's name (``outline_of_shape``), rates from a few seconds of the
same products, encoders and sweeps on this machine (``measure_machine``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGMLQuantizationType

from edgeq.console import markdown_table
from edgeq.forecast.amounts import Amounts, Share
from edgeq.forecast.machine import Machine, Rounding, measure_machine
from edgeq.forecast.memory import disk_bytes, peak_bytes
from edgeq.forecast.outline import Outline, Tensor, outline_of, outline_of_shape
from edgeq.forecast.shapes import SHAPES
from edgeq.forecast.targets import costs_types, target_steps
from edgeq.quantizers import make_quantizer
from edgeq.recipe import Recipe

__all__ = [
    "SHAPES",
    "Amounts",
    "Forecast",
    "Machine",
    "Outline",
    "Rounding",
    "Share",
    "Tensor",
    "costs_types",
    "disk_bytes",
    "duration",
    "forecast",
    "forecast_here",
    "machine_for",
    "measure_machine",
    "outline_of",
    "outline_of_shape",
    "peak_bytes",
    "target_steps",
]

_PARTS = ("moments of layers", "folds", "rounding")  # of the report's step quantize


@dataclass(frozen=True)
class Forecast:
    """What one export would take.

    Attributes
    ----------
    outline : the model and its types
    output_bytes : of the file; its header, where there is no vocabulary to read, is estimated
    work_bytes : of the work directory, at most
    memory : part of the walk to its anonymous memory
    largest_bytes : of the largest layer's weights in float32
    moments_bytes : of the largest layer's second moments
    steps : by the names of the report
    n_jobs : workers
    processes : how much faster `n_jobs` processes of this machine do what they share
    """

    outline: Outline
    output_bytes: int
    work_bytes: int
    memory: Mapping[str, int]
    largest_bytes: int
    moments_bytes: int
    steps: Mapping[str, Share]
    n_jobs: int
    processes: float

    @property
    def peak_bytes(self) -> int:
        """Anonymous memory at most."""
        return max(self.memory.values())

    @property
    def seconds(self) -> dict[str, float]:
        """Step to its time in one process that has all CPUs."""
        return {name: share.seconds(1.0) for name, share in self.steps.items()}

    def total(self, speedup: float = 1.0) -> float:
        """Return the time of all steps where shared tasks are so much faster."""
        return sum(share.seconds(speedup) for share in self.steps.values())

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "model": self.outline.name,
            "parameters": self.outline.n_parameters,
            "types": self.outline.types,
            "output_bytes": self.output_bytes,
            "bpw": 8 * self.output_bytes / self.outline.n_parameters,
            "work_bytes": self.work_bytes,
            "peak_bytes": self.peak_bytes,
            "memory": dict(self.memory),
            "largest_layer_bytes": self.largest_bytes,
            "moments_bytes": self.moments_bytes,
            "seconds": self.seconds,
            "total_seconds": self.total(),
            "jobs": self.n_jobs,
            "total_seconds_processes": self.total(self.processes),
            "total_seconds_machines": self.total(self.n_jobs),
        }

    def as_text(self) -> str:
        """Return what a terminal shows."""
        outline = self.outline
        lines = [
            f"{outline.name}: {outline.n_parameters:,} weights, {outline.types}",
            f"output     {self.output_bytes:,} bytes, "
            f"{8 * self.output_bytes / outline.n_parameters:.3f} bits per weight",
            f"work       {self.work_bytes:,} bytes of disk",
            f"memory     {self.peak_bytes:,} bytes, in {max(self.memory, key=self._held)}; the "
            f"largest layer in float32 {self.largest_bytes:,}, its moments {self.moments_bytes:,}",
        ]
        if outline.n_used:
            lines.append("           moments: n_in² × 4 bytes for each expert of a layer, in files")
        header, speedups = ["step", "1 process"], [1.0]
        if self.n_jobs > 1:
            header += [f"{self.n_jobs} processes here", f"{self.n_jobs} machines like this"]
            speedups += [self.processes, float(self.n_jobs)]
        rows = [
            [name, *(duration(share.seconds(speedup)) for speedup in speedups)]
            for name, share in self.steps.items()
        ]
        rows.append(["all", *(duration(self.total(speedup)) for speedup in speedups)])
        return "\n".join([*lines, "", markdown_table(header, rows)])

    def _held(self, part: str) -> int:
        return self.memory[part]


def forecast(outline: Outline, recipe: Recipe, machine: Machine) -> Forecast:
    """Return what an export of a model would take on a machine.

    Parameters
    ----------
    outline : shapes and types of the model
    recipe : of the export; its ``jobs`` are the workers
    machine : rates for all types of the outline, and of the costs if there is a target
    """
    amounts = Amounts(outline, recipe, machine)
    layers = list(amounts.layers.values())
    pieces = amounts.layer_moments(), amounts.folds(), amounts.rounded()
    steps = {
        "open": amounts.opened(),
        "text": amounts.text(),
        "calibrate": amounts.calibrated(),
        **target_steps(amounts),
        "moments": amounts.agreed(),
        "gradients": amounts.gradients(),
        **dict(zip((f"quantize: {part}" for part in _PARTS), pieces, strict=True)),
        "tune": amounts.tuned(),
        "verify": amounts.verified(),
        "write": amounts.written(),
        "evaluate": amounts.evaluated(),
    }
    return Forecast(
        outline,
        outline.output_bytes,
        disk_bytes(amounts),
        peak_bytes(amounts),
        4 * max(amounts.weights(tensors) for tensors in layers),
        max(amounts.moments_bytes(ts) for ts in layers) if amounts.uses_moments else 0,
        {name: share for name, share in steps.items() if share.alone or share.shared},
        recipe.jobs,
        min(float(recipe.jobs), machine.n_cpus / machine.n_busy),
    )


def forecast_here(recipe: Recipe, shape: str | None = None) -> Forecast:
    """Read headers, time this machine for some seconds, and forecast.

    Parameters
    ----------
    shape : a name of ``SHAPES`` in place of the recipe's model

    Raises
    ------
    EdgeqError, ConversionError
        The headers cannot be read, or the recipe does not fit the model.
    """
    outline = outline_of(recipe) if shape is None else outline_of_shape(shape, recipe)
    return forecast(outline, recipe, machine_for([outline], recipe))


def machine_for(outlines: Sequence[Outline], recipe: Recipe) -> Machine:
    """Return this machine's rates for the types of some outlines.

    Raises
    ------
    RecipeError
        There is no directory to time the disk in.
    """
    directory = recipe.work_directory
    while not directory.is_dir() and directory != directory.parent:
        directory = directory.parent
    types: dict[GGMLQuantizationType, None] = {}
    for outline in outlines:
        for one in outline.tensors:
            if one.is_matrix:
                types |= {one.source: None, one.qtype: None}
    if recipe.target.is_set:
        types |= dict.fromkeys(costs_types(recipe))
    method = recipe.method
    feeds_back = make_quantizer(method.quantizer).uses_hessian
    moments = feeds_back or bool(method.transforms or method.tune_steps)
    return measure_machine(
        types,
        directory,
        uses_torch=recipe.use_imatrix and (moments or recipe.target.is_set),
        feeds_back=feeds_back,
        n_threads=recipe.n_threads,
    )


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} d"
