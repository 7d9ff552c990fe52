"""Weights rearranged for lookups: sums of activations are read from tables, not multiplied.

The other family beside ``products``. A few columns of a row, their codes taken together, are an
index; what they add to the product is read from a table that the activations alone make::

    bits    four columns, one bit of each code: 16 sums; a plane of indices for every bit (T-MAC)
    trits   three columns of ternary codes: 27 sums
    sparse  four columns of which one is zero and the others are ±1: 32 sums (Sherry)

Tables have sums of 16 bits, so that nothing is rounded: the integers, and every bit of the results,
are those of ``products``. Tables of one block of columns, some 4 KiB, are made where they are used,
and all rows of a panel are looked up in them before the next block's are made::

    weight   = panels of PANEL tiles of 64 rows
    panel    = for every block of columns: one record of every tile
    record   = 64 super-scales, then vectors of 32 words: word r holds indices of the rows r and
               32 + r; with bits from the highest plane to the lowest
    Q2_K     64 super-scales, 64 super-offsets; then for every two groups of 16 columns a byte a
               row of sub-scales, the first group's in the lower half, one of sub-offsets, and the
               vectors of either group
    bits     vector v: groups 2 v and 2 v + 1 of row r, then the same two of row 32 + r
    others   five vectors: group 0 of row r, of row 32 + r, group 1 …, 16 indices of five bits.
             Word i holds three, from the bits i + 1, i + 6 and i + 11 on; the lowest bits of the
             third, for which that is too high, are its bits 0 to i − 1. Bit i of word i belongs to
             the 16th. Where fewer groups are left, so are words, and there is no 16th

References
----------
T-MAC, arXiv:2407.00088, sections 3.1 and 3.2. Theirs round tables to eight bits; the tables of a
block before all rows are theirs ("LUT-centric data layout").
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from cpu_kernels.block_formats import FORMATS
from cpu_kernels.block_formats_bits import Bytes
from cpu_kernels.isa import Isa
from cpu_kernels.tiles import LINE, aligned_bytes

Indices = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

TALL = 64  # rows of a tile
PANEL = 32  # tiles of a panel
_COLUMNS = {"bits": 4, "trits": 3, "sparse": 4}
_T = GGMLQuantizationType


def sums_of(kind: str) -> npt.NDArray[np.int64]:
    """Return by what an index's columns are multiplied, (columns, 32): −1, 0 or 1."""
    index = np.arange(32)
    if kind == "bits":
        return np.stack([index >> j & 1 for j in range(4)])
    if kind == "trits":
        return np.stack([np.where(index < 27, index // 3**j % 3 - 1, 0) for j in range(3)])
    # the zero's place, then signs of the others from left to right, 1 for minus
    place, rank = index >> 3, np.arange(4)[:, None]
    sign = 1 - 2 * (index >> (rank - (rank > place)) & 1)
    return np.where(rank == place, 0, sign)


@dataclass(frozen=True)
class LookupLayout:
    """How a type is looked up.

    Attributes
    ----------
    qtype : name of the type
    kind : of the tables: bits, trits or sparse
    planes : of indices; one for every bit of a code, else 1
    zero : what code 0 stands for, with bits
    block : columns that share a scale
    inputs : how llama.cpp quantizes what this type is multiplied by
    scale_size : bytes of a scale
    span : columns that share a sub-scale and -offset; the block where there are none
    """

    qtype: str
    kind: str
    planes: int
    zero: int
    block: int
    inputs: str
    scale_size: int
    span: int

    @property
    def has_subs(self) -> bool:
        """Whether there are sub-scales, sub-offsets and super-offsets."""
        return self.span < self.block

    @property
    def head(self) -> int:
        """Bytes of a record before its vectors."""
        return TALL * self.scale_size * (1 + self.has_subs)

    @property
    def columns(self) -> int:
        """Columns of an index."""
        return _COLUMNS[self.kind]

    @property
    def n_groups(self) -> int:
        """Groups of columns of a block."""
        return self.block // self.span * self.span_groups

    @property
    def span_groups(self) -> int:
        """Groups of columns of a span."""
        return -(-self.span // self.columns)

    @property
    def unit(self) -> tuple[int, int]:
        """Groups of columns that lie in common vectors, and these vectors."""
        return (2, 1) if self.kind == "bits" else (8, 5)

    @property
    def rest(self) -> tuple[int, int]:
        """Groups, and vectors, of the last, smaller unit of a plane."""
        groups = self.span_groups % self.unit[0]
        return groups, -(-2 * groups // 3)

    @property
    def plane_vectors(self) -> int:
        """Vectors of a plane of a span."""
        return self.span_groups // self.unit[0] * self.unit[1] + self.rest[1]

    @property
    def span_bytes(self) -> int:
        """Bytes of a span's share of a record."""
        return (self.planes * self.plane_vectors + self.has_subs) * LINE

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return self.head + self.block // self.span * self.span_bytes

    @property
    def bpw(self) -> float:
        """Bits a weight."""
        return 8 * self.record_bytes / (TALL * self.block)


@functools.cache
def lookup_layout_of(qtype: GGMLQuantizationType, isa: Isa) -> LookupLayout | None:
    """Return how a type is looked up; None: it is not."""
    size = 2 if isa.has_half else 4
    if qtype == _T.Q4_0:
        return LookupLayout("Q4_0", "bits", 4, -8, 32, "Q8_0", size, span=32)
    if qtype == _T.Q2_K:
        return LookupLayout("Q2_K", "bits", 2, 0, 256, "Q8_K", size, span=16)
    if qtype not in (_T.TQ1_0, _T.TQ2_0):
        return None
    if isa.vector_bytes == 64:  # looks up words in tables of 32
        return LookupLayout(qtype.name, "trits", 1, 0, 256, "Q8_K", size, span=256)
    return LookupLayout(qtype.name, "bits", 2, -1, 256, "Q8_K", size, span=256)


@dataclass(frozen=True, eq=False)
class LookupTiles:
    """A weight, rearranged for lookups.

    Attributes
    ----------
    layout : how it is looked up
    n_out, n_in : rows and columns
    data : (n_tiles, n_blocks · record_bytes) uint8, as many bytes as panels have
    """

    layout: LookupLayout
    n_out: int
    n_in: int
    data: Bytes

    @property
    def n_tiles(self) -> int:
        """Tiles of 64 rows."""
        return len(self.data)


def lookup_shape(layout: LookupLayout, n_out: int, n_in: int) -> tuple[int, int]:
    """Return the shape of a weight's tiles, (n_tiles, bytes of one)."""
    return -(-n_out // TALL), n_in // layout.block * layout.record_bytes


def rearrange_for_lookup(
    layout: LookupLayout, packed: Bytes, out: Bytes | None = None
) -> LookupTiles:
    """Rearrange the blocks of a ggml type.

    Parameters
    ----------
    layout : of the type
    packed : (n_out, row_bytes) uint8
    out : where to, (``lookup_shape``) bytes that begin at a multiple of 64; else new memory

    Raises
    ------
    ValueError
        The rows are no whole number of blocks, or a scale is not finite.
    """
    form = FORMATS[_T[layout.qtype]]
    form.unpack(packed[:1])  # refuses rows of another shape
    n_in = packed.shape[1] // form.type_size * form.block_size
    out = _memory(layout, len(packed), n_in) if out is None else out
    for panel, rows in _panels(layout, packed, out):
        fields, codes = form.unpack(rows)
        scales = [fields.super_scale, fields.super_offset][: 1 + layout.has_subs]
        subs = [fields.sub_scale, fields.sub_offset] if layout.has_subs else []
        _write(layout, _indices(layout, codes), scales, subs, panel)
    return LookupTiles(layout, len(packed), n_in, out)


def rearrange_indices(layout: LookupLayout, indices: Indices, scales: Floats) -> LookupTiles:
    """Rearrange indices, (n_out, groups) uint8, and scales, (n_out, n_blocks) float32."""
    n_in = scales.shape[1] * layout.block
    out = _memory(layout, len(indices), n_in)
    for (panel, rows), (_, own) in zip(
        _panels(layout, indices, out), _panels(layout, scales, out), strict=True
    ):
        _write(layout, rows[:, None, :], [own], [], panel)
    return LookupTiles(layout, len(indices), n_in, out)


def _memory(layout: LookupLayout, n_out: int, n_in: int) -> Bytes:
    shape = lookup_shape(layout, n_out, n_in)
    return aligned_bytes(shape[0] * shape[1]).view(np.uint8).reshape(shape)


def _panels(
    layout: LookupLayout, rows: npt.NDArray[Any], out: Bytes
) -> Iterator[tuple[Bytes, npt.NDArray[Any]]]:
    """Yield a panel's records, (n_blocks, tiles, record_bytes), and its rows."""
    for first in range(0, len(out), PANEL):
        part = out[first : first + PANEL]
        shape = -1, len(part), layout.record_bytes
        yield part.reshape(shape), rows[first * TALL : (first + PANEL) * TALL]


def _indices(layout: LookupLayout, codes: Bytes) -> Indices:
    """Return the indices of rows, (n, planes, n_blocks · n_groups), the highest bits first."""
    blocks = codes.reshape(len(codes), -1, layout.span)
    room = layout.span_groups * layout.columns - layout.span
    # a code of 1 stands for the trit 0
    blocks = np.pad(blocks, ((0, 0), (0, 0), (0, room)), constant_values=1)
    groups = blocks.reshape(len(codes), 1, -1, layout.columns)
    parts: npt.NDArray[Any] = groups
    place = np.array([1, 3, 9], np.uint8)
    if layout.kind == "bits":
        parts = groups >> np.arange(layout.planes, dtype=np.uint8)[::-1, None, None] & 1
        place = np.array([1, 2, 4, 8], np.uint8)
    found: Indices = parts @ place
    return found


def _write(
    layout: LookupLayout, indices: Indices, scales: list[Floats], subs: list[Floats], panel: Bytes
) -> None:
    """Write one panel: scales and offsets by block, sub-scales and -offsets by span."""
    if not all(np.isfinite(one).all() for one in scales):
        raise ValueError(
            f"rearrange: a scale of this {layout.qtype} weight is not finite. The file is damaged."
        )
    n_blocks, n_tiles, _ = panel.shape

    def by_half(values: npt.NDArray[Any], n_spans: int) -> npt.NDArray[Any]:
        """Return (..., n_spans, each, n_tiles, half, 32) of (rows, ..., n_spans · each)."""
        padded = np.zeros((n_tiles * TALL, *values.shape[1:]), values.dtype)
        padded[: len(values)] = values
        cut = padded.reshape(n_tiles, 2, TALL // 2, *values.shape[1:-1], n_spans, -1)
        return np.moveaxis(cut, (0, 1, 2), (-3, -2, -1))

    size = TALL * layout.scale_size
    for i, own in enumerate(scales):
        stored = by_half(own.astype("<f2" if layout.scale_size == 2 else "<f4"), n_blocks)[:, 0]
        stored = np.ascontiguousarray(stored).view(np.uint8).reshape(n_blocks, n_tiles, -1)
        panel[:, :, i * size : (i + 1) * size] = stored
    n_spans = n_blocks * layout.block // layout.span
    by_plane = by_half(indices, n_spans)  # (planes, n_spans, groups, n_tiles, half, 32)
    words = np.zeros((n_spans, n_tiles, layout.planes, layout.plane_vectors, TALL // 2), "<u2")
    groups, n_vectors = layout.unit
    for plane in range(layout.planes):
        for unit in range(-(-layout.span_groups // groups)):
            own = by_plane[plane][:, unit * groups : (unit + 1) * groups].astype(np.uint16)
            target = words[:, :, plane, unit * n_vectors : (unit + 1) * n_vectors]
            if layout.kind == "bits":
                target[:, :, 0] = own[:, 0, :, 0] | own[:, 1, :, 0] << 4
                target[:, :, 0] |= own[:, 0, :, 1] << 8 | own[:, 1, :, 1] << 12
            else:
                _write_fives(own, target)
    vectors = words.view(np.uint8).reshape(
        n_blocks, -1, n_tiles, layout.planes * layout.plane_vectors * LINE
    )
    if layout.has_subs:
        pairs = [by_half(one.astype(np.uint8), n_spans // 2) for one in subs]
        joined = [one[:, 0] | one[:, 1] << 4 for one in pairs]  # (n_pairs, n_tiles, half, 32)
        both = [one.reshape(n_blocks, -1, n_tiles, LINE) for one in joined]
        vectors = np.concatenate([*both, vectors[:, ::2], vectors[:, 1::2]], axis=3)
    panel[:, :, layout.head :] = vectors.swapaxes(1, 2).reshape(n_blocks, n_tiles, -1)


def _write_fives(own: npt.NDArray[np.uint16], target: npt.NDArray[np.uint16]) -> None:
    """Write a unit's indices of five bits; see the module's head."""
    for field in range(2 * own.shape[1]):
        index = own[:, field // 2, :, field % 2]
        i, place = divmod(field, 3)
        if field == 15:
            for word in range(5):
                target[:, :, word] |= index & 1 << word
        elif place == 2:
            target[:, :, i] |= (index >> i << (11 + i)) | (index & (1 << i) - 1)
        else:
            target[:, :, i] |= index << (i + 1 + 5 * place)
