"""The formats of ggml whose codes stand for points of a lattice: IQ1, IQ2, IQ3, bytes and numbers.

Every one of them is::

    weight = super_scale[block] · sub_scale[group] · point[index][i] · sign      eight or four
                                                                                 weights an index

Points of IQ2 and IQ3 have positive coordinates; signs are stored apart, eight weights a byte. Where
seven bits must do, the eighth makes the number of minus signs even. Points of IQ1 have signs of
their own, and each is there twice, moved up and down by 1/8; an index's highest bit says which.

``LATTICES`` says where each number lies, as the positions of its bits in a block, bit 0 of byte 0
first. The points themselves are those of the ``gguf`` package.

Source: ggml/src/ggml-common.h (block_iq2_xxs and following, iq2xxs_grid and following) and
ggml/src/ggml-quants.c (dequantize_row_iq2_xxs to dequantize_row_iq1_m) of llama.cpp 0c1e57098.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import gguf.quants
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from cpu_kernels.block_formats_bits import Bytes
from cpu_kernels.block_formats_numbers import Floats, Half

_T = GGMLQuantizationType
_BLOCK = 256
_ROWS_AT_ONCE = 1 << 22  # weights whose bits are taken apart at a time
UNIT = 8  # weights that share a byte of signs
_IQ1_SHIFT = 0.125

Indices = npt.NDArray[np.uint16]
_Positions = npt.NDArray[np.intp]


class Signs(IntEnum):
    """Which signs eight weights may have, beside those of their points."""

    NONE = 0
    FREE = 1
    EVEN = 2  # an even number of minus signs


@dataclass(frozen=True, eq=False)
class Points:
    """What a tensor's blocks hold.

    Attributes
    ----------
    super_scale : (n_rows, n_blocks) float32
    sub_scale : (n_rows, n_groups) float32, odd numbers
    indices : (n_rows, n_in / point size) uint16
    signs : (n_rows, n_in / 8) uint8, bit i for weight i: minus
    """

    super_scale: Floats
    sub_scale: Floats
    indices: Indices
    signs: Bytes


@dataclass(frozen=True, eq=False)
class LatticeFormat:
    """One type: its points, and where each number lies in a block.

    Attributes
    ----------
    qtype : ggml's type
    points : (n_points, point size) float32, ascending by nothing
    n_parts : all points of a group are in the same one of so many equal parts of `points`
    group_size : weights that share a sub-scale
    max_sub_scale : they are the odd numbers up to it
    unit : a super-scale is this times the half float of the block
    sign_rule : which signs there are
    """

    qtype: GGMLQuantizationType
    points: Floats
    group_size: int
    unit: float
    sign_rule: Signs
    _indices: _Positions
    _signs: _Positions
    _scales: _Positions
    _super_scale: _Positions
    n_parts: int = 1

    block_size = _BLOCK

    @property
    def type_size(self) -> int:
        """Bytes of a block."""
        return int(GGML_QUANT_SIZES[self.qtype][1])

    @property
    def point_size(self) -> int:
        """Weights of a point, 8 or 4."""
        return int(self.points.shape[1])

    @property
    def max_sub_scale(self) -> int:
        """The largest of the odd numbers that are sub-scales."""
        return int(2 ** (self._scales.shape[1] + 1) - 1)

    @property
    def _part_size(self) -> int:
        return len(self.points) // self.n_parts

    def unpack(self, packed: Bytes) -> Points:
        """Take rows of blocks apart.

        Parameters
        ----------
        packed : (n_rows, row_bytes) uint8

        Raises
        ------
        ValueError
            The rows are no whole number of blocks.
        """
        if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] % self.type_size:
            raise ValueError(
                f"packed: got {packed.dtype} of shape {packed.shape} as {self.qtype.name}, "
                f"expected rows of uint8 in blocks of {self.type_size} bytes."
            )
        n_rows = len(packed)
        blocks = np.ascontiguousarray(packed).reshape(-1, self.type_size)
        parts = [self._read(part) for part in _slices(blocks)]
        indices, signs, scales, super_scale = (
            np.concatenate(one) for one in zip(*parts, strict=True)
        )
        if self.sign_rule == Signs.EVEN:
            signs |= (np.bitwise_count(signs) % 2 << 7).astype(np.uint8)
        return Points(
            (super_scale.view("<f2") * np.float32(self.unit)).reshape(n_rows, -1),
            (2 * scales + 1).astype(np.float32).reshape(n_rows, -1),
            indices.reshape(n_rows, -1),
            signs.reshape(n_rows, -1),
        )

    def pack(self, points: Points) -> Bytes:
        """Put rows of blocks together, the inverse of ``unpack``.

        Raises
        ------
        ValueError
            The file cannot hold a super-scale, a sub-scale, an index or a byte of signs.
        """
        n_rows, n_blocks = points.super_scale.shape
        scales = (points.sub_scale - 1) / 2
        with np.errstate(over="ignore"):  # refused below
            halves = (points.super_scale / np.float32(self.unit)).astype("<f2")
        n_minus = np.bitwise_count(points.signs)
        parts = points.indices.reshape(*points.sub_scale.shape, -1) // self._part_size
        held = (
            np.array_equal(scales, np.clip(np.rint(scales), 0, self.max_sub_scale // 2))
            and np.array_equal(halves.astype(np.float32) * self.unit, points.super_scale)
            and not np.any(points.indices >= len(self.points))
            and not (self.n_parts > 1 and np.any(parts != parts[..., :1]))
            and not (self.sign_rule == Signs.EVEN and np.any(n_minus % 2))
            and not (self.sign_rule == Signs.NONE and np.any(n_minus))
        )
        if not held:
            raise ValueError(
                f"points: expected super-scales of {self.unit} times half floats, odd sub-scales "
                f"from 1 to {self.max_sub_scale}, indices below {len(self.points)}, signs: "
                f"{self.sign_rule.name.lower()}, for {self.qtype.name}."
            )
        blocks = np.zeros((n_rows * n_blocks, self.type_size), np.uint8)
        fields = (points.indices, points.signs, scales.astype(np.uint8), halves.view("<u2"))
        whole = [values.reshape(len(blocks), -1) for values in fields]
        for part, *values in zip(_slices(blocks), *map(_slices, whole), strict=True):
            bits = np.zeros((len(part), 8 * self.type_size), np.uint8)
            for positions, one in zip(self._fields, values, strict=True):
                places = np.arange(positions.shape[1])
                bits[:, positions] = (one[:, :, None] >> places.astype(one.dtype)) & 1
            part[:] = np.packbits(bits, axis=1, bitorder="little")
        return blocks.reshape(n_rows, n_blocks * self.type_size)

    def decode(self, points: Points) -> Floats:
        """Return the weights, (n_rows, n_in) float32, to the last bit what ggml decodes."""
        weight = self.points[points.indices].reshape(*points.sub_scale.shape, self.group_size)
        blocks = (*points.super_scale.shape, -1)
        scale = points.super_scale[:, :, None] * points.sub_scale.reshape(blocks)
        weight *= scale.reshape(points.sub_scale.shape)[:, :, None]
        out = weight.reshape(len(weight), -1)
        minus = np.unpackbits(points.signs, axis=1, bitorder="little").view(np.bool_)
        np.negative(out, out=out, where=minus)
        return out

    def snap_super_scale(self, values: Floats) -> Floats:
        """Return the nearest super-scales that the file can hold."""
        unit = np.float32(self.unit)
        return Half(0).snap(values / unit) * unit

    @property
    def _fields(self) -> tuple[_Positions, ...]:
        return self._indices, self._signs, self._scales, self._super_scale

    def _read(self, blocks: Bytes) -> tuple[Indices, Bytes, Bytes, Indices]:
        bits = np.unpackbits(blocks, axis=1, bitorder="little")
        return (
            _numbers(bits, self._indices).astype(np.uint16),
            _numbers(bits, self._signs).astype(np.uint8),
            _numbers(bits, self._scales).astype(np.uint8),
            _numbers(bits, self._super_scale).astype("<u2"),
        )


def _slices(blocks: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Cut blocks into parts of a size that their bits fit into memory."""
    step = _ROWS_AT_ONCE // _BLOCK
    return [blocks[first : first + step] for first in range(0, max(len(blocks), 1), step)]


def _numbers(bits: Bytes, positions: _Positions) -> npt.NDArray[np.float32]:
    """Return (n, k) whole numbers, the bits of each at ``positions[k]``, lowest first."""
    powers = np.float32(2) ** np.arange(positions.shape[1], dtype=np.float32)
    return bits[:, positions] @ powers


def _bits(first_bytes: list[int], n_bits: int, shift: list[int] | int = 0) -> _Positions:
    """Return the positions of numbers of consecutive bits, each from a byte on, `shift` bits up."""
    starts = 8 * np.asarray(first_bytes) + np.asarray(shift)
    return np.asarray(starts[:, None] + np.arange(n_bits), np.intp)


def _nibbles(first_byte: int, count: int) -> _Positions:
    return _bits(
        [first_byte + i // 2 for i in range(count)], 4, [4 * (i % 2) for i in range(count)]
    )


def _lattices() -> tuple[LatticeFormat, ...]:
    """Return the formats.

    Bytes of a block::

        IQ2_XXS  0 d   8 times, from 2: 4 indices, then 32 bits: 4 × 7 signs, 4 of scale
        IQ2_XS   0 d   2..65 32 times 9 bits of index, 7 of signs   66..73 scales of 16 weights
        IQ2_S    0 d   2..33 bits 7..0 of indices   34..65 signs   66..73 bits 9 8 of indices
                       74..81 scales of 16 weights
        IQ3_XXS  0 d   2..65 indices   8 times, from 66: 4 × 7 signs, 4 of scale
        IQ3_S    0 d   2..65 bits 7..0 of indices   66..73 bit 8   74..105 signs   106..109 scales
        IQ1_S    0 d   2..33 bits 7..0 of indices   8 times, from 34: 4 × bits 10 9 8, 3 of scale,
                       bit 11 of all four indices
        IQ1_M    0..31 bits 7..0 of indices   32..47 bits 11 10 9 8   4 times, from 48: 4 × 3 of
                       scales, 4 of d
    """
    n16, n8, n4 = range(_BLOCK // 16), range(_BLOCK // 8), range(_BLOCK // 4)
    first = _bits([0], 16)
    none = np.empty((len(n8), 0), np.intp)

    def packed_signs(first: int, every: int) -> tuple[_Positions, _Positions]:
        """Signs and scales of 32 bits each: four times seven, and four."""
        signs = _bits([first + every * (i // 4) for i in n8], 7, [7 * (i % 4) for i in n8])
        return signs, _bits([first + every * g for g in range(8)], 4, 28)

    def split(low: int, high: int, n_high: int, count: range) -> _Positions:
        per_byte = 8 // n_high
        top = _bits(
            [high + i // per_byte for i in count], n_high, [n_high * (i % per_byte) for i in count]
        )
        return np.hstack([_bits([low + i for i in count], 8), top])

    groups_of_four = [34 + 2 * (i // 4) for i in n8]
    return (
        LatticeFormat(
            _T.IQ2_XXS, _points(_T.IQ2_XXS), 32, 0.125, Signs.EVEN,
            _bits([2 + 8 * (i // 4) + i % 4 for i in n8], 8), *packed_signs(6, 8), first,
        ),
        LatticeFormat(
            _T.IQ2_XS, _points(_T.IQ2_XS), 16, 0.125, Signs.EVEN,
            _bits([2 + 2 * i for i in n8], 9), _bits([2 + 2 * i for i in n8], 7, 9),
            _nibbles(66, 16), first,
        ),
        LatticeFormat(
            _T.IQ2_S, _points(_T.IQ2_S), 16, 0.125, Signs.FREE,
            split(2, 66, 2, n8), _bits([34 + i for i in n8], 8), _nibbles(74, 16), first,
        ),
        LatticeFormat(
            _T.IQ3_XXS, _points(_T.IQ3_XXS), 32, 0.25, Signs.EVEN,
            _bits([2 + i for i in n4], 8), *packed_signs(66, 4), first,
        ),
        LatticeFormat(
            _T.IQ3_S, _points(_T.IQ3_S), 32, 1.0, Signs.FREE,
            split(2, 66, 1, n4), _bits([74 + i for i in n8], 8), _nibbles(106, 8), first,
        ),
        LatticeFormat(
            _T.IQ1_S, _shifted(_points(_T.IQ1_S)), 32, 1.0, Signs.NONE,
            np.hstack([
                _bits([2 + i for i in n8], 8),
                _bits(groups_of_four, 3, [3 * (i % 4) for i in n8]),
                _bits(groups_of_four, 1, 15),
            ]),
            none, _bits([34 + 2 * g for g in range(8)], 3, 12), first, n_parts=2,
        ),
        LatticeFormat(
            _T.IQ1_M, _shifted(_points(_T.IQ1_M)), 16, 1.0, Signs.NONE,
            np.hstack([_bits(list(n8), 8), _nibbles(32, 32)]),
            none, _bits([48 + 2 * (g // 4) for g in n16], 3, [3 * (g % 4) for g in n16]),
            np.hstack([_bits([48 + 2 * i], 4, 12) for i in range(4)]),
        ),
    )  # fmt: skip


def _points(qtype: GGMLQuantizationType) -> Floats:
    """Return the points of a type, as the gguf package has them."""
    known = getattr(gguf.quants, qtype.name)
    known.init_grid()
    return np.ascontiguousarray(known.grid.reshape(known.grid_shape), np.float32)


def _shifted(points: Floats) -> Floats:
    """Return every point moved up, then every point moved down."""
    return np.concatenate([points + np.float32(_IQ1_SHIFT), points - np.float32(_IQ1_SHIFT)])


LATTICES: dict[GGMLQuantizationType, LatticeFormat] = {known.qtype: known for known in _lattices()}
