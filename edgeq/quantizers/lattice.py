"""Error feedback and descent onto the points of a lattice: IQ1, IQ2 and IQ3.

As ``feedback`` and ``descent``, eight columns at a time. Scales start from ggml's
importance-weighted search; the points are chosen anew.
"""

import functools
from dataclasses import dataclass, replace

import numpy as np

from cpu_kernels.lattice_formats import UNIT, LatticeFormat, Points
from cpu_kernels.lattice_rounding import Halves, descend_points, feed_back_points, halves_of
from edgeq.quantizers.factor import Factored
from edgeq.quantizers.feedback import Columns
from edgeq.runtime.encoders import FloatArray, Packed

_BATCH = 256  # columns: one super-block
_PASSES = 2  # over a block's columns, as in ``descent``


@dataclass(eq=False)
class LatticeRounding:
    """A weight on the points of a lattice, as far as it has come.

    Attributes
    ----------
    fmt : of the points
    points : scales, points and signs
    values : (n_out, n_in) float32, what they decode to
    """

    fmt: LatticeFormat
    points: Points
    values: FloatArray

    @classmethod
    def of(cls, fmt: LatticeFormat, packed: Packed) -> "LatticeRounding":
        """Return what packed rows hold."""
        points = fmt.unpack(packed)
        return cls(fmt, points, fmt.decode(points))

    def packed(self) -> Packed:
        """Return the rows as the file holds them."""
        return self.fmt.pack(self.points)

    def copy(self) -> "LatticeRounding":
        """Return one whose arrays may be written."""
        points = Points(*(values.copy() for values in vars(self.points).values()))
        return replace(self, points=points, values=self.values.copy())

    def where(self, rows: np.ndarray, other: "LatticeRounding") -> "LatticeRounding":
        """Return these rows where `rows`, (n_out, 1), is true, and those of `other` elsewhere."""
        pairs = zip(vars(self.points).values(), vars(other.points).values(), strict=True)
        points = Points(*(np.where(rows, ours, theirs) for ours, theirs in pairs))
        return replace(self, points=points, values=np.where(rows, self.values, other.values))


def by_units(order: Columns, importances: FloatArray) -> Columns:
    """Return columns by eights, the most important eight first, each in the file's order.

    Parameters
    ----------
    order : (n_in,) not used: within eight columns there is no order
    importances : (n_in,) what a column counts
    """
    units = np.argsort(-importances.reshape(-1, UNIT).sum(axis=1), kind="stable")
    return (units[:, None] * UNIT + np.arange(UNIT)).ravel()


def feed_back_errors(
    start: LatticeRounding, weight: FloatArray, factored: Factored
) -> LatticeRounding:
    """Round all columns in the order of `factored`, on the scales that `start` has.

    Parameters
    ----------
    start : its points are not used, but for the part of all points that a group's are of
    weight : (n_out, n_in) float32
    factored : in an order of ``by_units``
    """
    fmt, order, upper = start.fmt, factored.order, factored.upper
    per_block = fmt.block_size // fmt.group_size
    scale = np.repeat(start.points.super_scale, per_block, axis=1) * start.points.sub_scale
    metric = _metric(upper)
    units = np.asarray(order[::UNIT] // UNIT, np.int64)
    made = start.copy()
    indices = made.points.indices.reshape(len(weight), len(units), -1)
    left = np.ascontiguousarray(weight[:, order])
    grid, halves = _searched(fmt)
    for first in range(0, len(order), _BATCH):
        batch = slice(first, min(first + _BATCH, len(order)))
        now = np.ascontiguousarray(left[:, batch])
        mine = units[batch.start // UNIT : batch.stop // UNIT]
        chosen = indices[:, mine].reshape(len(now), -1)
        signs = np.empty((len(now), len(mine)), np.uint8)
        feed_back_points(
            now,
            np.ascontiguousarray(upper[batch, batch]),
            metric[batch],
            mine * UNIT // fmt.group_size,
            scale,
            grid,
            halves,
            int(fmt.sign_rule),
            chosen,
            signs,
            np.empty_like(now),
        )
        indices[:, mine] = chosen.reshape(len(now), len(mine), -1)
        made.points.signs[:, mine] = signs
        left[:, batch.stop :] -= now @ upper[batch, batch.stop :]
    return replace(made, values=fmt.decode(made.points))


def _metric(upper: FloatArray) -> FloatArray:
    """Return what a column's squared error counts if the columns behind its eight compensate.

    The diagonal of (U_bᵀ U_b)⁻¹ of each block of eight, in processing order.
    """
    blocks = _diagonal_blocks(upper).astype(np.float64)
    inverses = np.linalg.inv(blocks)
    found: FloatArray = np.square(inverses).sum(axis=2).ravel().astype(np.float32)
    return found


def _diagonal_blocks(matrix: FloatArray) -> FloatArray:
    """Return the blocks of eight on the diagonal, (n_in / 8, 8, 8)."""
    n = len(matrix) // UNIT
    at = np.arange(n)
    blocks: FloatArray = matrix.reshape(n, UNIT, n, UNIT)[at, :, at]
    return blocks


def lower_loss(
    rounding: LatticeRounding, weight: FloatArray, hessian: FloatArray, *, reach: int, refits: bool
) -> None:
    """Visit every column once and lower ½ tr(E H Eᵀ); `rounding` is changed in place.

    Parameters
    ----------
    weight : (n_out, n_in) float32
    hessian : (n_in, n_in) float32, positive definite
    reach : sub-scales tried to both sides
    refits : also refit super-scales
    """
    fmt, points = rounding.fmt, rounding.points
    size, per_block = fmt.block_size, fmt.block_size // fmt.group_size
    grid, halves = _searched(fmt)
    error = rounding.values - weight
    for block in range(weight.shape[1] // size):
        columns = slice(block * size, (block + 1) * size)
        gradient = np.matmul(error, hessian[:, columns])
        part = np.ascontiguousarray(hessian[columns, columns])
        inverses = np.linalg.inv(_diagonal_blocks(part).astype(np.float64)).astype(np.float32)
        own = _cut(points, block, size, per_block, fmt.point_size)
        values = np.ascontiguousarray(rounding.values[:, columns])
        descend_points(
            gradient,
            part,
            inverses,
            grid,
            halves,
            int(fmt.sign_rule),
            fmt.group_size,
            own.super_scale[:, 0].copy(),
            own.sub_scale,
            fmt.max_sub_scale,
            own.indices,
            own.signs,
            values,
            reach,
            _PASSES,
        )
        if refits:
            _refit(fmt, own, values, gradient, part)
        for name, array in vars(own).items():
            whole = getattr(points, name)
            width = array.shape[1]
            whole[:, block * width : (block + 1) * width] = array
        rounding.values[:, columns] = fmt.decode(own)
        error[:, columns] = rounding.values[:, columns] - weight[:, columns]


@functools.cache
def _searched(fmt: LatticeFormat) -> tuple[FloatArray, Halves]:
    """Return the points as the kernels search them, (n_parts, point size, n_points), and halves."""
    parts = fmt.points.reshape(fmt.n_parts, -1, fmt.point_size)
    grid = np.ascontiguousarray(parts.transpose(0, 2, 1))
    return grid, halves_of(grid, int(fmt.sign_rule))


def _cut(points: Points, block: int, size: int, per_block: int, point_size: int) -> Points:
    """Return one super-block of every row."""
    widths = {
        "super_scale": 1,
        "sub_scale": per_block,
        "indices": size // point_size,
        "signs": size // UNIT,
    }
    return Points(
        **{
            name: getattr(points, name)[:, block * width : (block + 1) * width].copy()
            for name, width in widths.items()
        }
    )


def _refit(
    fmt: LatticeFormat, own: Points, values: FloatArray, gradient: FloatArray, hessian: FloatArray
) -> None:
    """Move the super-scale to its least squares, row by row, where the loss falls."""
    scale = own.super_scale
    basis = np.divide(values, scale, out=np.zeros_like(values), where=scale != 0)
    linear = np.einsum("ij,ij->i", gradient, basis)[:, None]
    square = np.einsum("ij,ij->i", basis @ hessian, basis)[:, None]
    step = np.divide(-linear, square, out=np.zeros_like(linear), where=square > 0)
    moved = fmt.snap_super_scale(scale + step) - scale
    falls = moved * (linear + 0.5 * square * moved) < 0
    own.super_scale[:] = np.where(falls, scale + moved, scale)
