"""Weights rearranged for this CPU: tiles of 16 rows, read as one stream.

A row of GGUF blocks suits one row's dot product. A matrix product wants 16 rows in the 16 lanes of
a vector: 64 bytes are then 16 rows times the codes of four columns, and neither the codes nor the
sums are ever moved between lanes. So a tensor is rearranged once, when it is loaded, at (nearly)
the same bits per weight::

    tile    = records from left to right
    record  = codes of its columns, then sub-scales, sub-offsets, super-scales and -offsets, padded
              to 64 bytes
    vector of codes, plane of p bits: byte 4 r + j, field f (bits p f and up)
            = row r, column 4 (8/p v + f) + j of vector v

A code's bits lie in one or two planes (six bits: four and two). Types whose codes stand for points
of a lattice (IQ1, IQ2, IQ3) are stored as their coordinates: three or four bits instead of the
index, with no search for the point left in the product.

References
----------
T-MAC, arXiv:2407.00088, section 3.2 (bit planes, tiling offline), whose lookup these kernels
replace by integer dot products where the CPU has them.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from cpu_kernels.block_formats import FORMATS, BlockFormat
from cpu_kernels.block_formats_bits import Bytes
from cpu_kernels.block_formats_numbers import Absent
from cpu_kernels.isa import Isa
from cpu_kernels.lattice_formats import LATTICES, LatticeFormat

ROWS = 16  # of a tile
LINE = 64  # bytes of a vector
_IQ1_UNIT = 8  # points of IQ1 are multiples of 1/8
_TILES_AT_ONCE = 16  # rearranged at a time: bounds the memory

_T = GGMLQuantizationType
_E8M0 = (_T.MXFP4,)
_Q8_1 = (_T.Q4_1, _T.Q5_1)
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


@dataclass(frozen=True)
class Layout:
    """Where a type's numbers lie in a record.

    Attributes
    ----------
    qtype : name of ggml's type
    planes : bits of a code in each plane, lowest first
    levels : what codes below 16 stand for; empty: code + zero
    zero : what code 0 stands for, where there are no levels
    block : columns that share a super-scale
    group : columns that share a sub-scale; the block where there is none
    sub_scales, sub_offsets : whether there are any; both in one byte where both are below 16
    joined : whether they are
    offsets : whether a block has a super-offset
    scale : how a super-scale is stored: "half", "float" or "e8m0"
    factor : times which a super-scale is meant
    inputs : how llama.cpp quantizes what this type is multiplied by: Q8_0, Q8_1 or Q8_K
    n_blocks : of a record
    """

    qtype: str
    planes: tuple[int, ...]
    levels: tuple[int, ...]
    zero: int
    block: int
    group: int
    sub_scales: bool
    sub_offsets: bool
    joined: bool
    offsets: bool
    scale: str
    factor: float
    inputs: str
    n_blocks: int = 1

    @property
    def columns(self) -> int:
        """Columns of a record."""
        return self.block * self.n_blocks

    @property
    def n_groups(self) -> int:
        """Groups of a record."""
        return self.columns // self.group

    @property
    def scale_bytes(self) -> int:
        """Bytes of 16 rows' super-scales."""
        return ROWS * {"half": 2, "float": 4, "e8m0": 1}[self.scale]

    def vectors(self) -> Iterator[tuple[int, int]]:
        """Yield plane and number of every vector of codes, in the order in which they are read."""
        for four_columns in range(self.columns // 4):
            for plane, bits in enumerate(self.planes):
                if four_columns % (8 // bits) == 0:
                    yield plane, four_columns // (8 // bits)

    @functools.cached_property
    def code_offsets(self) -> dict[tuple[int, int], int]:
        """Where each vector of codes begins, in bytes."""
        return {vector: LINE * i for i, vector in enumerate(self.vectors())}

    @property
    def sub_scale_offset(self) -> int:
        """Where the sub-scales begin."""
        return LINE * len(self.code_offsets)

    @property
    def sub_offset_offset(self) -> int:
        """Where the sub-offsets begin."""
        return self.sub_scale_offset + ROWS * self.n_groups * self.sub_scales

    @property
    def scale_offset(self) -> int:
        """Where the super-scales begin."""
        return self.sub_offset_offset + ROWS * self.n_groups * (
            self.sub_offsets and not self.joined
        )

    @property
    def offset_offset(self) -> int:
        """Where the super-offsets begin."""
        return self.scale_offset + self.scale_bytes * self.n_blocks

    @property
    def used_bytes(self) -> int:
        """Bytes of a record before padding."""
        return self.offset_offset + self.scale_bytes * self.n_blocks * self.offsets

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return -(-self.used_bytes // LINE) * LINE

    @property
    def bpw(self) -> float:
        """Bits a weight."""
        return 8 * self.record_bytes / (ROWS * self.columns)


@functools.cache
def layout_of(qtype: GGMLQuantizationType, isa: Isa) -> Layout:
    """Return the layout of a type for a CPU.

    Raises
    ------
    ValueError
        The type has no product here.
    """
    if qtype in FORMATS:
        layout = _of_format(FORMATS[qtype], isa)
    elif qtype in LATTICES:
        layout = _of_lattice(LATTICES[qtype], isa)
    else:
        known = ", ".join(one.name for one in (*FORMATS, *LATTICES))
        raise ValueError(f"layout: no product for {qtype.name}; known: {known}.")
    if layout.block == 256:
        return layout
    counts = (1, 2, 4, 8)
    repeated = [replace(layout, n_blocks=n) for n in counts if layout.block * n >= 32]
    return next((one for one in repeated if one.used_bytes == one.record_bytes), repeated[-1])


def _of_format(form: BlockFormat, isa: Isa) -> Layout:
    levels = tuple(int(level) for level in form.levels)
    is_affine = levels == tuple(range(levels[0], levels[0] + len(levels)))
    expanded = not is_affine and not isa.has_shuffle
    bits = 8 if expanded else max(2, (len(levels) - 1).bit_length())
    has_subs = form.sub_scale_range is not None
    is_float = isinstance(form.super_scale, Absent)  # NVFP4: its sub-scales are floats
    half = "half" if isa.has_half else "float"
    sub_offsets = form.sub_offset_range is not None
    return Layout(
        qtype=form.qtype.name,
        planes=_PLANES[bits],
        levels=() if is_affine or expanded else levels,
        zero=-128 if expanded else levels[0] if is_affine else 0,
        block=form.group_size if is_float else form.block_size,
        group=form.group_size,
        sub_scales=has_subs,
        sub_offsets=sub_offsets,
        joined=sub_offsets and form.sub_offset_range == form.sub_scale_range == (0, 15),
        offsets=form.has_offset,
        scale="e8m0" if form.qtype in _E8M0 else half,
        factor=1.0,
        inputs=_inputs(form.qtype, form.block_size),
    )


def _of_lattice(form: LatticeFormat, isa: Isa) -> Layout:
    levels, factor = _coordinates(form)
    return Layout(
        qtype=form.qtype.name,
        planes=_PLANES[(len(levels) - 1).bit_length()] if isa.has_shuffle else (8,),
        levels=levels if isa.has_shuffle else (),
        zero=0 if isa.has_shuffle else -128,
        block=form.block_size,
        group=form.group_size,
        sub_scales=True,
        sub_offsets=False,
        joined=False,
        offsets=False,
        scale="half" if isa.has_half else "float",
        factor=form.unit * factor,
        inputs="Q8_K",
    )


def _inputs(qtype: GGMLQuantizationType, block_size: int) -> str:
    """Return ``vec_dot_type`` of ggml/src/ggml-cpu/ggml-cpu.c, llama.cpp 0c1e57098."""
    if qtype in _Q8_1:
        return "Q8_1"
    return "Q8_K" if block_size == 256 else "Q8_0"


def _coordinates(form: LatticeFormat) -> tuple[tuple[int, ...], float]:
    """Return the whole numbers that coordinates of points are, signs included, and their unit."""
    unit = _IQ1_UNIT if np.any(form.points % 1) else 1
    values = {int(value) for value in np.unique(form.points * unit)}
    return tuple(sorted(values | {-value for value in values})), 1.0 / unit


@dataclass(frozen=True, eq=False)
class Tiles:
    """A weight, rearranged.

    Attributes
    ----------
    layout : where its numbers lie
    n_out, n_in : rows and columns
    data : (n_tiles, n_records · record_bytes) uint8, begins at a multiple of 64 bytes
    """

    layout: Layout
    n_out: int
    n_in: int
    data: Bytes

    @property
    def n_tiles(self) -> int:
        """Tiles of 16 rows."""
        return len(self.data)

    @property
    def n_records(self) -> int:
        """Records of a tile."""
        return int(self.data.shape[1]) // self.layout.record_bytes


def rearrange(qtype: GGMLQuantizationType, packed: Bytes, isa: Isa) -> Tiles:
    """Rearrange a weight's blocks.

    Parameters
    ----------
    qtype : ggml's type
    packed : (n_out, row_bytes) uint8
    isa : of the CPU that will multiply

    Raises
    ------
    ValueError
        The type has no product, the rows are no whole number of blocks, or a scale is not finite.
    """
    layout = layout_of(qtype, isa)
    known = FORMATS[qtype] if qtype in FORMATS else LATTICES[qtype]
    if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] % known.type_size:
        raise ValueError(
            f"rearrange: got {packed.dtype} of shape {packed.shape} as {qtype.name}, expected rows "
            f"of uint8 in blocks of {known.type_size} bytes."
        )
    n_out, n_in = len(packed), packed.shape[1] // known.type_size * known.block_size
    n_tiles, n_records = -(-n_out // ROWS), -(-n_in // layout.columns)
    data = _aligned((n_tiles, n_records * layout.record_bytes))
    for first in range(0, n_tiles, _TILES_AT_ONCE):
        rows = packed[first * ROWS : (first + _TILES_AT_ONCE) * ROWS]
        numbers = _numbers(qtype, rows, layout)
        _write(layout, numbers, data[first : first + _TILES_AT_ONCE], n_records)
    return Tiles(layout, n_out, n_in, data)


def _aligned(shape: tuple[int, int]) -> Bytes:
    """Return zeros that begin at a multiple of 64 bytes."""
    n_bytes = shape[0] * shape[1]
    whole = np.zeros(n_bytes + LINE, np.uint8)
    start = -whole.ctypes.data % LINE
    return whole[start : start + n_bytes].reshape(shape)


@dataclass(frozen=True)
class _Numbers:
    """What a record is made of, by row: codes by column, the rest by group or block."""

    codes: Bytes
    sub_scale: npt.NDArray[np.int8]
    sub_offset: Bytes
    super_scale: npt.NDArray[np.float32]
    super_offset: npt.NDArray[np.float32]


def _numbers(qtype: GGMLQuantizationType, packed: Bytes, layout: Layout) -> _Numbers:
    if qtype in LATTICES:
        numbers = _lattice_numbers(LATTICES[qtype], packed, layout)
    else:
        form = FORMATS[qtype]
        fields, codes = form.unpack(packed)
        if not layout.levels and layout.zero == -128 and len(form.levels) < 256:  # expanded
            codes = (form.levels.astype(np.int16) + 128).astype(np.uint8)[codes]
        of_groups = isinstance(form.super_scale, Absent)
        numbers = _Numbers(
            codes,
            fields.sub_scale.astype(np.int8) if layout.sub_scales else np.zeros(0, np.int8),
            fields.sub_offset.astype(np.uint8) if layout.sub_offsets else np.zeros(0, np.uint8),
            fields.sub_scale if of_groups else fields.super_scale,
            fields.super_offset,
        )
    if not (np.isfinite(numbers.super_scale).all() and np.isfinite(numbers.super_offset).all()):
        raise ValueError(
            f"rearrange: a scale of this {qtype.name} weight is not finite. The file is damaged."
        )
    return numbers


def _lattice_numbers(form: LatticeFormat, packed: Bytes, layout: Layout) -> _Numbers:
    points = form.unpack(packed)
    levels, unit = _coordinates(form)
    signed = form.points[points.indices].reshape(len(packed), -1) / np.float32(unit)
    minus = np.unpackbits(points.signs, axis=1, bitorder="little").view(np.bool_)
    np.negative(signed, out=signed, where=minus)
    if layout.levels:
        codes = np.searchsorted(np.array(levels, np.float32), signed).astype(np.uint8)
    else:
        codes = (signed + 128).astype(np.uint8)
    nothing = np.zeros(0, np.uint8)
    return _Numbers(
        codes,
        points.sub_scale.astype(np.int8),
        nothing,
        points.super_scale / np.float32(form.unit),
        np.zeros_like(points.super_scale),
    )


def _write(layout: Layout, numbers: _Numbers, out: Bytes, n_records: int) -> None:
    """Write some tiles."""
    n_tiles = len(out)
    records = out.reshape(n_tiles, n_records, layout.record_bytes)

    def by_record(values: npt.NDArray[Any], each: int) -> npt.NDArray[Any]:
        """Return (n_tiles, n_records, each, ROWS), padded with zeros."""
        padded = np.zeros((n_tiles * ROWS, n_records * each), values.dtype)
        padded[: len(values), : values.shape[1]] = values
        return padded.reshape(n_tiles, ROWS, n_records, each).transpose(0, 2, 3, 1)

    codes = by_record(numbers.codes, layout.columns)  # (n_tiles, n_records, columns, ROWS)
    shift = 0
    for plane, bits in enumerate(layout.planes):
        part = (codes >> np.uint8(shift)) & np.uint8((1 << bits) - 1)
        fields = part.reshape(n_tiles, n_records, -1, 8 // bits, 4, ROWS)
        vectors = fields[:, :, :, 0].copy()
        for field in range(1, 8 // bits):
            vectors |= fields[:, :, :, field] << np.uint8(bits * field)
        for v in range(vectors.shape[2]):
            start = layout.code_offsets[plane, v]
            records[:, :, start : start + LINE] = (
                vectors[:, :, v].transpose(0, 1, 3, 2).reshape(n_tiles, n_records, LINE)
            )
        shift += bits

    def place(start: int, values: npt.NDArray[np.generic], each: int) -> None:
        flat = np.ascontiguousarray(by_record(values, each)).view(np.uint8)
        flat = flat.reshape(n_tiles, n_records, -1)
        records[:, :, start : start + flat.shape[2]] = flat

    sub_scale = numbers.sub_scale.view(np.uint8)
    if layout.joined:
        sub_scale = sub_scale | numbers.sub_offset << np.uint8(4)
    elif layout.sub_offsets:
        place(layout.sub_offset_offset, numbers.sub_offset, layout.n_groups)
    if layout.sub_scales:
        place(layout.sub_scale_offset, sub_scale, layout.n_groups)
    place(layout.scale_offset, _stored(layout, numbers.super_scale), layout.n_blocks)
    if layout.offsets:
        place(layout.offset_offset, _stored(layout, numbers.super_offset), layout.n_blocks)


def _stored(layout: Layout, scales: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
    """Return super-scales as a record holds them."""
    if layout.scale == "half":
        return scales.astype("<f2")
    if layout.scale == "float":
        return scales
    return ((scales.view(np.uint32) >> 23) & 0xFF).astype(np.uint8)  # powers of two
