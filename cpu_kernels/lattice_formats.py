"""The formats of ggml whose codes stand for points of a lattice: IQ2 and IQ3, bytes and numbers.

Every one of them is::

    weight = super_scale[block] · sub_scale[group] · point[index][i] · sign      eight or four
                                                                                 weights an index

Points have positive coordinates; signs are stored apart, eight weights a byte. Where seven bits
must do, the eighth makes the number of minus signs even (``has_parity``).

``LATTICES`` says where each number lies, as the positions of its bits in a block, bit 0 of byte 0
first. The points themselves are those of the ``gguf`` package.

Source: ggml/src/ggml-common.h (block_iq2_xxs and following, iq2xxs_grid and following) and
ggml/src/ggml-quants.c (dequantize_row_iq2_xxs and following) of llama.cpp 0c1e57098.
"""

from dataclasses import dataclass
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

Indices = npt.NDArray[np.uint16]
_Positions = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Points:
    """What a tensor's blocks hold.

    Attributes
    ----------
    super_scale : (n_rows, n_blocks) float32
    sub_scale : (n_rows, n_groups) float32, odd numbers
    indices : (n_rows, n_in / point size) uint16
    signs : (n_rows, n_in / 8) uint8, bit i for weight i: minus; of an even number where there is
        parity
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
    group_size : weights that share a sub-scale
    unit : a super-scale is this times the half float at the block's start
    has_parity : the number of minus signs of eight weights is even
    """

    qtype: GGMLQuantizationType
    points: Floats
    group_size: int
    unit: float
    has_parity: bool
    _indices: _Positions
    _signs: _Positions
    _scales: _Positions

    block_size = _BLOCK
    max_sub_scale = 31

    @property
    def type_size(self) -> int:
        """Bytes of a block."""
        return int(GGML_QUANT_SIZES[self.qtype][1])

    @property
    def point_size(self) -> int:
        """Weights of a point, 8 or 4."""
        return int(self.points.shape[1])

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
        indices, signs, scales = (np.concatenate(one) for one in zip(*parts, strict=True))
        if self.has_parity:
            signs |= (np.bitwise_count(signs) % 2 << 7).astype(np.uint8)
        return Points(
            (Half(0).read(blocks) * np.float32(self.unit)).reshape(n_rows, -1),
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
        held = (
            np.array_equal(scales, np.clip(np.rint(scales), 0, 15))
            and not np.any(points.indices >= len(self.points))
            and not (self.has_parity and np.any(np.bitwise_count(points.signs) % 2))
        )
        if not held:
            raise ValueError(
                f"points: expected odd sub-scales from 1 to {self.max_sub_scale}, indices below "
                f"{len(self.points)}"
                + (", an even number of signs" if self.has_parity else "")
                + f" for {self.qtype.name}."
            )
        blocks = np.zeros((n_rows * n_blocks, self.type_size), np.uint8)
        fields = (points.indices, points.signs, scales.astype(np.uint8))
        whole = [values.reshape(len(blocks), -1) for values in fields]
        for part, *values in zip(_slices(blocks), *map(_slices, whole), strict=True):
            bits = np.zeros((len(part), 8 * self.type_size), np.uint8)
            for positions, one in zip(self._fields, values, strict=True):
                places = np.arange(positions.shape[1])
                bits[:, positions] = (one[:, :, None] >> places.astype(one.dtype)) & 1
            part[:] = np.packbits(bits, axis=1, bitorder="little")
        Half(0).write(blocks, points.super_scale.reshape(-1, 1) / np.float32(self.unit))
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
    def _fields(self) -> tuple[_Positions, _Positions, _Positions]:
        return self._indices, self._signs, self._scales

    def _read(self, blocks: Bytes) -> tuple[Indices, Bytes, Bytes]:
        bits = np.unpackbits(blocks, axis=1, bitorder="little")
        return (
            _numbers(bits, self._indices).astype(np.uint16),
            _numbers(bits, self._signs).astype(np.uint8),
            _numbers(bits, self._scales).astype(np.uint8),
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
    """
    n8, n4 = range(_BLOCK // 8), range(_BLOCK // 4)

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

    return (
        LatticeFormat(
            _T.IQ2_XXS, _points(_T.IQ2_XXS), 32, 0.125, True,
            _bits([2 + 8 * (i // 4) + i % 4 for i in n8], 8), *packed_signs(6, 8),
        ),
        LatticeFormat(
            _T.IQ2_XS, _points(_T.IQ2_XS), 16, 0.125, True,
            _bits([2 + 2 * i for i in n8], 9), _bits([2 + 2 * i for i in n8], 7, 9),
            _nibbles(66, 16),
        ),
        LatticeFormat(
            _T.IQ2_S, _points(_T.IQ2_S), 16, 0.125, False,
            split(2, 66, 2, n8), _bits([34 + i for i in n8], 8), _nibbles(74, 16),
        ),
        LatticeFormat(
            _T.IQ3_XXS, _points(_T.IQ3_XXS), 32, 0.25, True,
            _bits([2 + i for i in n4], 8), *packed_signs(66, 4),
        ),
        LatticeFormat(
            _T.IQ3_S, _points(_T.IQ3_S), 32, 1.0, False,
            split(2, 66, 1, n4), _bits([74 + i for i in n8], 8), _nibbles(106, 8),
        ),
    )  # fmt: skip


def _points(qtype: GGMLQuantizationType) -> Floats:
    """Return the points of a type, as the gguf package has them."""
    known = getattr(gguf.quants, qtype.name)
    known.init_grid()
    return np.ascontiguousarray(known.grid.reshape(known.grid_shape), np.float32)


LATTICES: dict[GGMLQuantizationType, LatticeFormat] = {known.qtype: known for known in _lattices()}
