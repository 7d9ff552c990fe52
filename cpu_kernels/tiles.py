"""Weights rearranged for this CPU: tiles of 16 rows, read as one stream.

A row of GGUF blocks suits one row's dot product. A matrix product wants 16 rows in the 16 lanes of
a vector: 64 bytes are then 16 rows times the codes of four columns, and neither the codes nor the
sums are ever moved between lanes. So a tensor is rearranged once, when it is loaded, at (nearly)
the same bits per weight::

    tile    = records from left to right
    record  = lines of 64 bytes in the order in which a product reads them: super-scales,
              -offsets, sub-scales and -offsets of some groups together, and vectors of codes
    vector of codes, plane of p bits: byte 4 r + j, field f (bits p f and up)
            = row r, column 4 (8/p v + f) + j of vector v

Memory is fastest where it is read strictly forward: with the scales of a record behind its codes
the same products reached 80 % instead of 97 % of the bandwidth.

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
HALF_LINE = 32  # records and their parts begin at multiples of it
_IQ1_UNIT = 8  # points of IQ1 are multiples of 1/8
_TILES_AT_ONCE = 16  # rearranged at a time: bounds the memory

_T = GGMLQuantizationType
_E8M0 = (_T.MXFP4,)
_Q8_1 = (_T.Q4_1, _T.Q5_1)
TRITS = 5  # in a byte
_TRIT_VALUES = (1, 3, 9, 27, 84)
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
    sub_scales, sub_offsets : whether there are any
    joined : whether two groups share a byte, the numbers being below 16
    offsets : whether a block has a super-offset
    scale : how a super-scale is stored: "half", "float" or "e8m0"
    factor : times which a super-scale is meant
    inputs : how llama.cpp quantizes what this type is multiplied by: Q8_0, Q8_1 or Q8_K
    spread : whether a vector's fields belong to different groups, see ``where``
    trits : whether a byte holds five codes below 3, see ``trit_byte``; columns 20 v + 4 f + j
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
    spread: bool = False
    trits: bool = False
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

    def where(self, plane: int, four: int) -> tuple[int, int]:
        """Return vector and field of the bits of four columns in a plane.

        Spread, the fields of a vector belong to as many groups: a group's codes then lie at the
        same bits everywhere, and their sum can be shifted instead of them.
        """
        if self.trits:
            return divmod(four, TRITS)
        fields, per_group = 8 // self.planes[plane], self.group // 4
        if not self.spread:
            return divmod(four, fields)
        span, within = divmod(four, fields * per_group)
        field, step = divmod(within, per_group)
        return span * per_group + step, field

    @functools.cached_property
    def places(self) -> dict[tuple[str, int, int], int]:
        """Where everything begins, in bytes.

        ("codes", plane, vector): 64 bytes; ("super", block, 0), ("offset", block, 0): one of 16
        rows each; ("scale", group, 0): 16 bytes, two groups in one where joined; ("low", group, 0):
        sub-offsets of a group and the next, row by row.
        """
        parts = dict(self._parts())
        beside = sum(size for key, size in parts.items() if key[0] != "codes")
        places: dict[tuple[str, int, int], int] = {}
        end, line, line_end = 0, 0, 0
        for key, size in parts.items():
            if key[0] == "codes":
                places[key], end = end, end + LINE
                continue
            if line_end - line < size:
                line, line_end = end, end + min(LINE, -(-beside // HALF_LINE) * HALF_LINE)
                end = line_end
            places[key], line, beside = line, line + size, beside - size
        return places

    def _parts(self) -> Iterator[tuple[tuple[str, int, int], int]]:
        """Yield all parts of a record with their bytes, in the order in which they are read."""
        per_block = self.block // self.group
        for block in range(self.n_blocks):
            yield ("super", block, 0), self.scale_bytes
            if self.offsets:
                yield ("offset", block, 0), self.scale_bytes
            for group in range(block * per_block, (block + 1) * per_block):
                if self.sub_scales:
                    yield ("scale", group - group % 2 * self.joined, 0), ROWS
                if self.sub_offsets:
                    yield ("low", group - group % 2, 0), ROWS if self.joined else 2 * ROWS
                for four in range(group * self.group // 4, (group + 1) * self.group // 4):
                    for plane in range(len(self.planes)):
                        yield ("codes", plane, self.where(plane, four)[0]), LINE

    @functools.cached_property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        parts = dict(self._parts())
        used = max(start + parts[key] for key, start in self.places.items())
        return -(-used // HALF_LINE) * HALF_LINE

    @property
    def bpw(self) -> float:
        """Bits a weight."""
        return 8 * self.record_bytes / (ROWS * self.columns)


def trit_tables() -> tuple[list[int], list[int]]:
    """Return what a byte of five trits holds: four of them as fields of two bits, and the fifth.

    A byte is t0 + 3 t1 + 9 t2 + 27 t3 + 84 t4. 84 instead of 81: its highest six bits alone then
    tell the fifth, in a table of 64.
    """
    low = [value % 84 for value in range(256)]
    four = [sum(one // 3**i % 3 << 2 * i for i in range(4)) for one in low]
    return four, [4 * value // 84 for value in range(64)]


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
    return min(repeated, key=lambda one: (one.bpw, one.record_bytes % LINE))


def _of_format(form: BlockFormat, isa: Isa) -> Layout:
    levels = tuple(int(level) for level in form.levels)
    is_affine = levels == tuple(range(levels[0], levels[0] + len(levels)))
    expanded = not is_affine and not isa.has_shuffle
    bits = 8 if expanded else max(2, (len(levels) - 1).bit_length())
    has_subs = form.sub_scale_range is not None
    is_float = isinstance(form.super_scale, Absent)  # NVFP4: its sub-scales are floats
    half = "half" if isa.has_half else "float"
    sub_offsets = form.sub_offset_range is not None
    in_place = isa.dot == "vnni" and is_affine and levels[0] == 0 and len(_PLANES[bits]) == 1
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
        spread=in_place and has_subs,
        trits=isa.looks_up_256 and len(levels) == 3,
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
    streams : whether many tokens are multiplied by tables over tokens (``streams``)
    """

    layout: Layout
    n_out: int
    n_in: int
    data: Bytes
    streams: bool = False

    @property
    def n_tiles(self) -> int:
        """Tiles of 16 rows."""
        return len(self.data)

    @property
    def n_records(self) -> int:
        """Records of a tile."""
        return int(self.data.shape[1]) // self.layout.record_bytes


def tile_shape(qtype: GGMLQuantizationType, n_out: int, n_in: int, isa: Isa) -> tuple[int, int]:
    """Return the shape of a weight's tiles, (n_tiles, bytes of one)."""
    layout = layout_of(qtype, isa)
    return -(-n_out // ROWS), -(-n_in // layout.columns) * layout.record_bytes


def rearrange(
    qtype: GGMLQuantizationType, packed: Bytes, isa: Isa, out: Bytes | None = None
) -> Tiles:
    """Rearrange a weight's blocks.

    Parameters
    ----------
    qtype : ggml's type
    packed : (n_out, row_bytes) uint8
    isa : of the CPU that will multiply
    out : where to, (``tile_shape``) zeros that begin at a multiple of 64 bytes; else new memory

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
    n_tiles, n_bytes = tile_shape(qtype, n_out, n_in, isa)
    n_records = n_bytes // layout.record_bytes
    if out is None:
        out = aligned_bytes(n_tiles * n_bytes).view(np.uint8).reshape(n_tiles, n_bytes)
    for first in range(0, n_tiles, _TILES_AT_ONCE):
        rows = packed[first * ROWS : (first + _TILES_AT_ONCE) * ROWS]
        numbers = _numbers(qtype, rows, layout)
        _write(layout, numbers, out[first : first + _TILES_AT_ONCE], n_records)
    return Tiles(layout, n_out, n_in, out)


def aligned_bytes(n_bytes: int) -> npt.NDArray[np.int8]:
    """Return zeros that begin at a multiple of 64 bytes."""
    whole = np.zeros(n_bytes + LINE, np.int8)
    start = -whole.ctypes.data % LINE
    return whole[start : start + n_bytes]


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

    def place(part: str, index: int, values: npt.NDArray[Any]) -> None:
        """Write (n_tiles, n_records, ROWS) numbers."""
        start = layout.places[part, index, 0]
        flat = np.ascontiguousarray(values).view(np.uint8).reshape(n_tiles, n_records, -1)
        records[:, :, start : start + flat.shape[2]] = flat

    def place_codes(plane: int, vectors: npt.NDArray[np.uint8]) -> None:
        """Write (n_tiles, n_records, n_vectors, 4, ROWS) bytes."""
        for v in range(vectors.shape[2]):
            start = layout.places["codes", plane, v]
            records[:, :, start : start + LINE] = (
                vectors[:, :, v].transpose(0, 1, 3, 2).reshape(n_tiles, n_records, LINE)
            )

    codes = by_record(numbers.codes, layout.columns).reshape(n_tiles, n_records, -1, 4, ROWS)
    shift = 0
    for plane, bits in enumerate(() if layout.trits else layout.planes):
        part = (codes >> np.uint8(shift)) & np.uint8((1 << bits) - 1)
        vectors = np.zeros((n_tiles, n_records, codes.shape[2] * bits // 8, 4, ROWS), np.uint8)
        for four in range(codes.shape[2]):
            v, field = layout.where(plane, four)
            vectors[:, :, v] |= part[:, :, four] << np.uint8(bits * field)
        place_codes(plane, vectors)
        shift += bits
    if layout.trits:
        vectors = np.zeros((n_tiles, n_records, -(-codes.shape[2] // TRITS), 4, ROWS), np.uint8)
        for four in range(codes.shape[2]):
            v, field = layout.where(0, four)
            vectors[:, :, v] += codes[:, :, four] * np.uint8(_TRIT_VALUES[field])
        place_codes(0, vectors)
    scales = _stored(layout, by_record(numbers.super_scale, layout.n_blocks))
    offsets = _stored(layout, by_record(numbers.super_offset, layout.n_blocks))
    for block in range(layout.n_blocks):
        place("super", block, scales[:, :, block])
        if layout.offsets:
            place("offset", block, offsets[:, :, block])
    step = 2 if layout.joined else 1
    if layout.sub_scales:
        own = by_record(numbers.sub_scale.view(np.uint8), layout.n_groups)
        for group in range(0, layout.n_groups, step):
            pair = own[:, :, group : group + step]
            place("scale", group, pair[:, :, 0] | pair[:, :, -1] << np.uint8(4) * (step - 1))
    if layout.sub_offsets:
        own = by_record(numbers.sub_offset, layout.n_groups)
        for group in range(0, layout.n_groups, 2):
            low, high = own[:, :, group], own[:, :, group + 1]
            joined = low | high << np.uint8(4)
            place("low", group, joined if layout.joined else np.stack([low, high], axis=-1))


def _stored(layout: Layout, scales: npt.NDArray[np.float32]) -> npt.NDArray[np.generic]:
    """Return super-scales as a record holds them."""
    if layout.scale == "half":
        return scales.astype("<f2")
    if layout.scale == "float":
        return scales
    bits = np.ascontiguousarray(scales).view(np.uint32)
    return ((bits >> 23) & 0xFF).astype(np.uint8)  # powers of two
