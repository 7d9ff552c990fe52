"""Error feedback and coordinate descent onto the grids and lattices that llama.cpp has.

Public tools feed errors back without importance-weighted scales, or weigh without feedback; this
does both, for k-quants, IQ4, MXFP4 and NVFP4 alike, because it sees a format only as groups of
weights on a grid (``cpu_kernels.block_formats``).
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from cpu_kernels.block_formats import FORMATS
from cpu_kernels.lattice_formats import LATTICES
from edgeq.errors import CalibrationError, RecipeError
from edgeq.quantizers import Inputs, Matrices, Rounded, lattice
from edgeq.quantizers.descent import lower_loss
from edgeq.quantizers.factor import ORDERS, Factored, Order, check_damping, error_bound, factor
from edgeq.quantizers.feedback import (
    Rounding,
    batch_size,
    batched,
    feed_back_and_search,
    feed_back_errors,
    with_ternary_scales,
)
from edgeq.quantizers.lattice import LatticeRounding
from edgeq.quantizers.output_feedback import feed_back_to_rows
from edgeq.registry import unknown_name
from edgeq.runtime.encoders import FloatArray, Packed, decode, encode

AnyRounding = Rounding | LatticeRounding
SEARCHES = ("static", "batch")

SLICE = 1 << 22  # of a matrix, in whole rows, that are worked on at a time: 16 MiB of float32


@dataclass(frozen=True)
class Gptq:
    """GPTQ on the file's own grid.

    Attributes
    ----------
    order : in which columns are rounded: ``activation``, ``natural``, ``back-to-front``,
        ``min-pivot``; the file's order is not touched
    search : ``static`` scales, those of round-to-nearest with the importances (of ternary types
        least squares), or searched again for each ``batch`` of compensated columns
    feedback : False: start the descent from round-to-nearest
    dampening_frac : added to the Hessian's diagonal, as a fraction of its mean
    shrinkage : of the Hessian towards its diagonal, 0 to 1
    sweeps : visits of coordinate descent to every column
    reach : scales that the descent tries to both sides
    refit : least-squares scales and offsets of super-blocks
    output_shrinkage : of second moments of gradients towards their diagonal, 0 to 1; at 1 no row
        makes up for another's errors
    """

    order: str = "activation"
    search: str = "static"
    feedback: bool = True
    dampening_frac: float = 0.01
    shrinkage: float = 0.5
    sweeps: int = 2
    reach: int = 1
    refit: bool = True
    output_shrinkage: float = 0.5

    uses_hessian = True
    uses_outputs = True

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise RecipeError(f"gptq: {unknown_name('order', self.order, list(ORDERS))}")
        if self.search not in SEARCHES:
            raise RecipeError(f"gptq: {unknown_name('search', self.search, list(SEARCHES))}")
        check_damping("gptq", self.shrinkage, self.dampening_frac)
        if not 0 <= self.output_shrinkage <= 1:
            raise RecipeError(f"gptq: output_shrinkage={self.output_shrinkage}, expected 0 to 1.")
        if self.sweeps < 0 or self.reach < 0:
            raise RecipeError(
                f"gptq: sweeps={self.sweeps}, reach={self.reach}; expected 0 or more of both."
            )

    def quantize(
        self,
        name: str,
        weight: FloatArray,
        qtype: GGMLQuantizationType,
        inputs: Inputs,
        *,
        n_threads: int | None = None,
    ) -> Rounded:
        """Return the packed rows of a weight, see ``edgeq.quantizers.Quantizer``.

        What cannot be rounded so (a type of lattice codes, no second moments, an expert that no
        token reached) is rounded to nearest; the facts then say why.

        Raises
        ------
        CalibrationError
            The second moments have another shape, or are not finite.
        """
        # the whole weight, which also checks all of it, even where rows are encoded again as moved
        packed = encode(weight, qtype, inputs.importances, n_threads=n_threads, name=name)
        if inputs.hessian is None:
            return Rounded(packed, {"fallback": "rtn: no second moments of its inputs"})
        check_moments(name, inputs.hessian, weight.shape)
        matrices = weight.reshape(len(inputs.hessian), -1, weight.shape[-1])
        if qtype not in FORMATS and qtype not in LATTICES:
            return Rounded(packed, {"fallback": f"rtn: {qtype.name} is no grid that is known here"})
        rows = packed.reshape(len(matrices), -1, packed.shape[1])
        totals = _Totals()
        hessians = inputs.hessian
        if len(matrices) > 1 or self.output_shrinkage == 1:
            inputs = replace(inputs, outputs=None)
        for matrix, hessian, mine in zip(matrices, hessians, rows, strict=True):
            self._improve(name, qtype, matrix, hessian, inputs, mine, totals, n_threads)
        return Rounded(packed, totals.facts())

    def _improve(
        self,
        name: str,
        qtype: GGMLQuantizationType,
        weight: FloatArray,
        hessian: FloatArray,
        inputs: Inputs,
        packed: Packed,
        totals: "_Totals",
        n_threads: int | None,
    ) -> None:
        """Round one matrix again, in place; as it is if nothing is known about its inputs.

        Some rows are worked on at a time: of a large matrix, a few copies in float32 would be
        gigabytes. They do not depend on each other unless something is known about the outputs.
        """
        if not np.diagonal(hessian).max() > 0 or not np.any(weight):
            totals.unreached += 1
            return
        regroup = None
        if qtype in LATTICES:
            regroup = lattice.by_units
        elif self.search == "batch":
            regroup = partial(batched, size=batch_size(FORMATS[qtype], weight.shape[1]))
        factored = factor(
            name,
            hessian,
            order=self.order,
            shrinkage=self.shrinkage,
            dampening_frac=self.dampening_frac,
            regroup=regroup,
        )
        if inputs.outputs is not None:

            def round_rows(rows: Order, moved: FloatArray) -> FloatArray:
                near = encode(moved, qtype, inputs.importances, n_threads=n_threads, name=name)
                packed[rows] = self._rounded(moved, factored, qtype, near, totals, n_threads)
                return decode(packed[rows], qtype, n_threads=n_threads)

            feed_back_to_rows(
                name,
                weight,
                inputs.outputs,
                round_rows,
                shrinkage=self.output_shrinkage,
                dampening_frac=self.dampening_frac,
            )
            return
        n_slices = math.ceil(weight.size / SLICE)
        n_rows = math.ceil(len(weight) / n_slices)
        for first in range(0, len(weight), n_rows):
            rows = slice(first, first + n_rows)
            some = np.ascontiguousarray(weight[rows])
            packed[rows] = self._rounded(some, factored, qtype, packed[rows], totals, n_threads)

    def _rounded(
        self,
        weight: FloatArray,
        factored: Factored,
        qtype: GGMLQuantizationType,
        packed: Packed,
        totals: "_Totals",
        n_threads: int | None,
    ) -> Packed:
        """Return rows that are nowhere worse than those given, which are rounded to nearest."""
        nearest = _unpacked(qtype, packed)
        importances = np.ascontiguousarray(np.diagonal(factored.hessian))
        rounding = nearest
        if isinstance(nearest, Rounding) and nearest.fmt.is_ternary:
            rounding = with_ternary_scales(nearest, weight, importances)
        if self.feedback:
            rounding = self._feed_back(weight, factored, rounding, importances, n_threads)
        rounding = rounding.copy()
        for _ in range(self.sweeps):
            settings: dict[str, Any] = {"reach": self.reach, "refits": self.refit}
            if isinstance(rounding, LatticeRounding):
                lattice.lower_loss(rounding, weight, factored.hessian, **settings)
            else:
                lower_loss(rounding, weight, factored.hessian, **settings)
        before = row_losses(nearest.values - weight, factored.hessian)
        after = row_losses(rounding.values - weight, factored.hessian)
        better = (after < before)[:, None]  # NaN is not better
        kept = rounding.where(better, nearest)  # type: ignore[arg-type]
        totals.add(kept, factored, before, np.where(better[:, 0], after, before))
        return kept.packed()

    def _feed_back(
        self,
        weight: FloatArray,
        factored: Factored,
        start: AnyRounding,
        importances: FloatArray,
        n_threads: int | None,
    ) -> AnyRounding:
        if isinstance(start, LatticeRounding):
            return lattice.feed_back_errors(start, weight, factored)
        if self.search == "static" or start.fmt.is_ternary:  # ggml searches no ternary scales
            return feed_back_errors(start, weight, factored)
        return feed_back_and_search(start, weight, factored, importances, n_threads=n_threads)


def row_losses(error: FloatArray, hessian: FloatArray) -> FloatArray:
    """Return ½ e H eᵀ of every row e, (n_out,) float32."""
    losses: FloatArray = 0.5 * np.einsum("ij,ij->i", error @ hessian, error)
    return losses


def check_moments(name: str, hessian: Matrices, shape: tuple[int, ...]) -> None:
    """Refuse second moments that do not belong to a weight of this shape, or are not finite.

    Raises
    ------
    CalibrationError
        They are not usable.
    """
    n_mat, n_in = (1 if len(shape) == 2 else shape[0]), shape[-1]
    n = len(hessian)
    if hessian.shape != (n, n_in, n_in) or not n or n % n_mat or n_mat * shape[-2] % n:
        raise CalibrationError(
            f"{name}: second moments of shape {hessian.shape}, expected {(n_mat, n_in, n_in)}. "
            "They belong to another model: calibrate this one."
        )
    if not all(np.isfinite(one).all() for one in hessian):
        raise CalibrationError(
            f"{name}: its second moments are not finite, expected finite numbers. The model "
            "overflows on this text: give its F32 or BF16 weights, or another text."
        )


@dataclass
class _Totals:
    """Sums over the matrices of a tensor, for its facts."""

    loss: float = 0.0
    loss_nearest: float = 0.0
    bound: float = 0.0
    dampening_frac: float = 0.0
    unreached: int = 0
    rows: int = 0
    rows_kept: int = 0

    def add(
        self,
        kept: AnyRounding,
        factored: Factored,
        before: FloatArray,
        after: FloatArray,
    ) -> None:
        self.loss += float(after.sum(dtype=np.float64))
        self.loss_nearest += float(before.sum(dtype=np.float64))
        if isinstance(kept, Rounding):
            self.bound += error_bound(factored.upper, _steps(kept)[:, factored.order])
        self.dampening_frac = max(self.dampening_frac, factored.dampening_frac)
        self.rows += len(before)
        self.rows_kept += int((after < before).sum())

    def facts(self) -> dict[str, float | str]:
        """Return losses ½ tr(E H Eᵀ), the bound of error feedback without clipping, and reasons.

        Where rows make up for each other's errors, E is from where they were moved to.
        """
        found: dict[str, float | str] = {}
        if self.rows:
            found = {
                "loss": self.loss,
                "loss_rtn": self.loss_nearest,
                "dampening_frac": self.dampening_frac,
                "rows_better_than_rtn": self.rows_kept / self.rows,
            }
            if self.bound:  # unknown for lattices
                found["loss_bound"] = self.bound
        if self.unreached:
            found["fallback"] = f"rtn: {self.unreached} of its matrices saw no input, or are zero"
        return found


def _unpacked(qtype: GGMLQuantizationType, packed: Packed) -> AnyRounding:
    if qtype in LATTICES:
        return LatticeRounding.of(LATTICES[qtype], packed)
    return Rounding.of(FORMATS[qtype], packed)


def _steps(rounding: Rounding) -> FloatArray:
    """Return the greatest distance of neighbouring grid values at every weight."""
    fmt = rounding.fmt
    scale = np.abs(fmt.grid(rounding.fields)[0]) * np.diff(fmt.levels).max()
    return np.repeat(scale, fmt.group_size, axis=1)
