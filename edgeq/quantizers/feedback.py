"""Error feedback on any grid that a file can hold: GPTQ with llama.cpp's own scale searches.

Scales come from ggml's importance-weighted search (the encoder's; only the codes are thrown away),
either once, or again for each batch of columns on the weights as the errors before have moved them.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cpu_kernels.block_formats import BlockFormat, Fields
from cpu_kernels.rounding import feed_back
from edgeq.quantizers.factor import Factored
from edgeq.runtime.encoders import FloatArray, Packed, encode

Codes = npt.NDArray[np.uint8]
Columns = npt.NDArray[np.intp]

_BATCH = 256  # columns: one super-block
_TINY = np.float32(1e-30)


@dataclass(eq=False)
class Rounding:
    """A weight on the grid of a format, as far as it has come.

    Attributes
    ----------
    fmt : of the grid
    fields : scales and offsets
    codes : (n_out, n_in) uint8
    values : (n_out, n_in) float32, what fields and codes decode to
    """

    fmt: BlockFormat
    fields: Fields
    codes: Codes
    values: FloatArray

    @classmethod
    def of(cls, fmt: BlockFormat, packed: Packed) -> "Rounding":
        """Return what packed rows hold."""
        fields, codes = fmt.unpack(packed)
        return cls(fmt, fields, codes, fmt.decode(fields, codes))

    @property
    def level_step(self) -> np.float32:
        """Distance of the format's levels if they are even, else 0."""
        return level_step(self.fmt)

    def packed(self) -> Packed:
        """Return the rows as the file holds them."""
        return self.fmt.pack(self.fields, self.codes)

    def copy(self) -> "Rounding":
        """Return one whose arrays may be written."""
        fields = Fields(*(values.copy() for values in vars(self.fields).values()))
        return Rounding(self.fmt, fields, self.codes.copy(), self.values.copy())

    def where(self, rows: npt.NDArray[np.bool_], other: "Rounding") -> "Rounding":
        """Return these rows where `rows`, (n_out, 1), is true, and those of `other` elsewhere."""
        pairs = zip(vars(self.fields).values(), vars(other.fields).values(), strict=True)
        return Rounding(
            self.fmt,
            Fields(*(np.where(rows, ours, theirs) for ours, theirs in pairs)),
            np.where(rows, self.codes, other.codes),
            np.where(rows, self.values, other.values),
        )


def level_step(fmt: BlockFormat) -> np.float32:
    """Return the distance of a format's levels if they are even, else 0."""
    distances = np.diff(fmt.levels)
    return np.float32(distances[0] if np.ptp(distances) == 0 else 0)


def with_ternary_scales(start: Rounding, weight: FloatArray, importances: FloatArray) -> Rounding:
    """Return the scales, and the nearest codes, with the least squared error of each block.

    For any scale, the weights above some size are those whose code is not zero; all are tried.
    ggml takes the largest weight of a ternary block as its scale, which sets most others to zero.

    Parameters
    ----------
    start : of a ternary format, with ggml's scales; nothing else of it is used
    weight : (n_out, n_in) float32
    importances : (n_in,) float32, what squared errors count
    """
    fmt = start.fmt
    sizes = np.abs(weight).reshape(len(weight), -1, fmt.block_size)
    order = np.argsort(-sizes, axis=-1)
    counts = np.take_along_axis(importances.reshape(1, -1, fmt.block_size), order, axis=-1)
    products = np.cumsum(counts * np.take_along_axis(sizes, order, axis=-1), axis=-1)
    masses = np.maximum(np.cumsum(counts, axis=-1), _TINY)
    # with the largest k weights not zero, a scale of products / masses lowers the error by:
    best = np.argmax(np.square(products) / masses, axis=-1)[..., None]
    fitted = np.take_along_axis(products, best, axis=-1) / np.take_along_axis(masses, best, axis=-1)
    fields = replace(start.fields, super_scale=fmt.snap_super_scale(fitted[..., 0]))
    above = sizes > np.abs(fmt.grid(fields)[0])[..., None] / 2
    codes = np.where(above.reshape(weight.shape), np.sign(weight) + 1, 1).astype(np.uint8)
    return Rounding(fmt, fields, codes, fmt.decode(fields, codes))


def batch_size(fmt: BlockFormat, n_in: int) -> int:
    """Return how many columns are worked on at a time: whole blocks that divide the row."""
    n_blocks = n_in // fmt.block_size
    most = max(1, _BATCH // fmt.block_size)
    return fmt.block_size * next(n for n in range(most, 0, -1) if n_blocks % n == 0)


def feed_back_errors(start: Rounding, weight: FloatArray, factored: Factored) -> Rounding:
    """Round all columns in the order of `factored`, on the scales that `start` has.

    Parameters
    ----------
    start : its codes are not used
    weight : (n_out, n_in) float32

    References
    ----------
    Frantar et al., GPTQ, arXiv:2210.17323, Algorithm 1, with lazy batch updates.
    """
    fmt, order = start.fmt, factored.order
    scale, offset = fmt.grid(start.fields)
    codes, values = np.empty_like(start.codes), np.empty_like(start.values)
    left = np.ascontiguousarray(weight[:, order])
    n_in = weight.shape[1]
    for first in range(0, n_in, _BATCH):
        batch = slice(first, min(first + _BATCH, n_in))
        _feed_back_batch(fmt, left, factored, batch, scale, offset, codes, values)
    return replace(start, codes=codes, values=values)


def feed_back_and_search(
    start: Rounding,
    weight: FloatArray,
    factored: Factored,
    importances: FloatArray,
    *,
    n_threads: int | None = None,
) -> Rounding:
    """Round batch by batch, each on scales searched anew for its compensated weights.

    Parameters
    ----------
    start : of the same format; nothing else of it is used
    factored : in an order of ``batched``
    importances : (n_in,) float32, what the search weighs squared errors with
    """
    fmt, order = start.fmt, factored.order
    size = batch_size(fmt, weight.shape[1])
    left = np.ascontiguousarray(weight[:, order])
    fields = Fields(*(np.empty_like(values) for values in vars(start.fields).values()))
    scale, offset = np.empty_like(fields.sub_scale), np.empty_like(fields.sub_offset)
    codes, values = np.empty_like(start.codes), np.empty_like(start.values)
    for first in range(0, weight.shape[1], size):
        batch = slice(first, first + size)
        natural = np.argsort(order[batch])
        start_column = int(order[batch].min())
        found = encode(
            np.ascontiguousarray(left[:, batch][:, natural]),
            fmt.qtype,
            np.ascontiguousarray(importances[None, start_column : start_column + size]),
            n_threads=n_threads,
        )
        searched = fmt.unpack(found)[0]
        set_columns(fmt, fields, searched, start_column, size)
        groups = slice(start_column // fmt.group_size, (start_column + size) // fmt.group_size)
        scale[:, groups], offset[:, groups] = fmt.grid(searched)
        _feed_back_batch(fmt, left, factored, batch, scale, offset, codes, values)
    return Rounding(fmt, fields, codes, values)


def batched(factored_order: Columns, importances: FloatArray, size: int) -> Columns:
    """Return columns by batches: the most important batch first, in it the given order."""
    rank = np.empty_like(factored_order)
    rank[factored_order] = np.arange(len(factored_order))
    batches = np.argsort(-importances.reshape(-1, size).sum(axis=1), kind="stable")
    inside = [batch * size + np.argsort(rank[batch * size :][:size]) for batch in batches]
    return np.concatenate(inside)


def set_columns(fmt: BlockFormat, fields: Fields, part: Fields, first: int, size: int) -> None:
    """Write the fields of `size` columns from `first` on into those of the whole row."""
    for name, values in vars(part).items():
        each = fmt.block_size if name.startswith("super") else fmt.group_size
        getattr(fields, name)[:, first // each : (first + size) // each] = values


def _feed_back_batch(
    fmt: BlockFormat,
    left: FloatArray,
    factored: Factored,
    batch: slice,
    scale: FloatArray,
    offset: FloatArray,
    codes: Codes,
    values: FloatArray,
) -> None:
    """Round one batch of `left`, (n_out, n_in) in processing order; push its errors on."""
    columns, upper = factored.order[batch], factored.upper
    now = np.ascontiguousarray(left[:, batch])
    batch_codes, batch_values = np.empty(now.shape, np.uint8), np.empty_like(now)
    feed_back(
        now,
        np.ascontiguousarray(upper[batch, batch]),
        np.asarray(columns // fmt.group_size, np.int64),
        scale,
        offset,
        fmt.levels,
        level_step(fmt),
        batch_codes,
        batch_values,
    )
    codes[:, columns], values[:, columns] = batch_codes, batch_values
    left[:, batch.stop :] -= now @ upper[batch, batch.stop :]
