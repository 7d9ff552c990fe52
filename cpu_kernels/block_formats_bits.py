"""How codes of one to eight bits lie in a block's bytes: bit planes, trits, split six-bit fields.

A layout turns the bytes of many blocks into whole numbers and back. ``write`` sets bits that are
still zero, so that several layouts may share a byte. All numbers are uint8.

Source: ggml/src/ggml-quants.c of llama.cpp 0c1e57098, the functions dequantize_row_* and
get_scale_min_k4; the table of which format has which is in ``block_formats``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Layout(Protocol):
    """Where `count` whole numbers lie in a block."""

    @property
    def count(self) -> int:
        """How many numbers a block has."""

    def read(self, blocks: Bytes) -> Bytes:
        """Return (n, count) numbers of (n, type_size) blocks."""

    def write(self, blocks: Bytes, numbers: Bytes) -> None:
        """Set (n, count) `numbers` in (n, type_size) blocks, *written*, whose bits are zero."""


@dataclass(frozen=True)
class Plane:
    """`bits` bits of every number, in runs of `width` bytes.

    The lowest bits of a run's bytes belong to its first `width` numbers, the next higher bits to
    the next `width`, and so on. Two bits, width 4, one run::

        byte       0           1           2           3
        bits 1 0   number 0    number 1    number 2    number 3
        bits 3 2   number 4    number 5    number 6    number 7
        bits 5 4   number 8    ...
        bits 7 6   number 12   ...
    """

    start: int
    n_bytes: int
    width: int
    bits: int

    @property
    def count(self) -> int:
        """How many numbers a block has."""
        return self.n_bytes * 8 // self.bits

    def read(self, blocks: Bytes) -> Bytes:
        """Return (n, count) numbers of `bits` bits."""
        runs = self._runs(blocks)
        per_byte = 8 // self.bits
        mask = np.uint8((1 << self.bits) - 1)
        out = np.empty((len(blocks), runs.shape[1], per_byte, self.width), np.uint8)
        for place in range(per_byte):
            np.bitwise_and(runs >> np.uint8(place * self.bits), mask, out=out[:, :, place])
        return out.reshape(len(blocks), self.count)

    def write(self, blocks: Bytes, numbers: Bytes) -> None:
        """Set (n, count) numbers below ``2**bits``."""
        per_byte = 8 // self.bits
        parts = numbers.reshape(len(blocks), -1, per_byte, self.width)
        runs = parts[:, :, 0].copy()
        for place in range(1, per_byte):
            runs |= parts[:, :, place] << np.uint8(place * self.bits)
        blocks[:, self.start : self.start + self.n_bytes] |= runs.reshape(len(blocks), -1)

    def _runs(self, blocks: Bytes) -> Bytes:
        part = np.ascontiguousarray(blocks[:, self.start : self.start + self.n_bytes])
        return part.reshape(len(blocks), -1, self.width)


@dataclass(frozen=True)
class Planes:
    """Numbers put together from planes, lowest bits first; `flip` is XORed into them.

    ``flip=0x80`` reads a signed byte q as q + 128.
    """

    planes: Sequence[Plane]
    flip: int = 0

    @property
    def count(self) -> int:
        """How many numbers a block has."""
        return self.planes[0].count

    def read(self, blocks: Bytes) -> Bytes:
        """Return (n, count) numbers."""
        numbers = self.planes[0].read(blocks)
        shift = self.planes[0].bits
        for plane in self.planes[1:]:
            high = plane.read(blocks)
            high <<= np.uint8(shift)
            numbers |= high
            shift += plane.bits
        if self.flip:
            numbers ^= np.uint8(self.flip)
        return numbers

    def write(self, blocks: Bytes, numbers: Bytes) -> None:
        """Set (n, count) numbers."""
        if self.flip:
            numbers = numbers ^ np.uint8(self.flip)
        if len(self.planes) == 1:
            self.planes[0].write(blocks, numbers)
            return
        shift = 0
        for plane in self.planes:
            part = numbers >> np.uint8(shift)
            part &= np.uint8((1 << plane.bits) - 1)
            plane.write(blocks, part)
            shift += plane.bits


@dataclass(frozen=True)
class SignedNibbles:
    """Four-bit floats of sign and magnitude, read as their rank among the 15 different values.

    ::

        nibble   15 14 13 12 11 10  9  8  0  1  2  3  4  5  6  7
        rank      0  1  2  3  4  5  6  7  7  8  9 10 11 12 13 14
        value   -12 -8 -6 -4 -3 -2 -1 -0  0  1  2  3  4  6  8 12

    The two zeros are one rank; it is written as nibble 0. ggml's encoder writes no nibble 8.
    """

    nibbles: Plane

    @property
    def count(self) -> int:
        """How many numbers a block has."""
        return self.nibbles.count

    def read(self, blocks: Bytes) -> Bytes:
        """Return (n, count) ranks below 15."""
        return _RANK_OF_NIBBLE[self.nibbles.read(blocks)]

    def write(self, blocks: Bytes, numbers: Bytes) -> None:
        """Set (n, count) ranks below 15."""
        self.nibbles.write(blocks, _NIBBLE_OF_RANK[numbers])


_RANK_OF_NIBBLE = np.array([*range(7, 15), *range(7, -1, -1)], np.uint8)
_NIBBLE_OF_RANK = np.array([*range(15, 8, -1), *range(8)], np.uint8)


@dataclass(frozen=True)
class Trits:
    """Up to five base-3 digits a byte, in runs of `width` bytes; the first digit weighs 81.

    A byte holds ceil(v * 256 / 243) for v = 81 a + 27 b + 9 c + 3 d + e, so that multiplying by
    three brings one digit after the other to the top: a is the integer part of 3 * byte / 256, b
    that of 3 * (3 * byte mod 256) / 256. With `digits` = 4, e is 0. 13 of the 256 bytes stand for
    no v: they are read as ggml reads them, and never written.

    Source: dequantize_row_tq1_0, quantize_row_tq1_0_ref.
    """

    start: int
    n_bytes: int
    width: int
    digits: int = 5

    @property
    def count(self) -> int:
        """How many numbers a block has."""
        return self.n_bytes * self.digits

    def read(self, blocks: Bytes) -> Bytes:
        """Return (n, count) digits below 3."""
        part = np.ascontiguousarray(blocks[:, self.start : self.start + self.n_bytes])
        rest = part.reshape(len(blocks), -1, self.width)
        out = np.empty((len(blocks), rest.shape[1], self.digits, self.width), np.uint8)
        for place in range(self.digits):
            tripled = rest * np.uint16(3)
            out[:, :, place] = tripled >> np.uint16(8)
            rest = tripled.astype(np.uint8)
        return out.reshape(len(blocks), self.count)

    def write(self, blocks: Bytes, numbers: Bytes) -> None:
        """Set (n, count) digits below 3."""
        parts = numbers.reshape(len(blocks), -1, self.digits, self.width)
        value = np.zeros((len(blocks), parts.shape[1], self.width), np.uint16)
        for place in range(5):
            value *= np.uint16(3)
            if place < self.digits:
                value += parts[:, :, place]
        stored = ((value * np.uint16(256) + np.uint16(242)) // np.uint16(243)).astype(np.uint8)
        blocks[:, self.start : self.start + self.n_bytes] |= stored.reshape(len(blocks), -1)


@dataclass(frozen=True)
class HalfBytes:
    """Number j in four bits at `shift` of byte `start` + j; the other four are another layout's."""

    start: int
    count: int
    shift: int

    def read(self, blocks: Bytes) -> Bytes:
        """Return (n, count) numbers below 16."""
        part = blocks[:, self.start : self.start + self.count]
        return (part >> np.uint8(self.shift)) & np.uint8(15)

    def write(self, blocks: Bytes, numbers: Bytes) -> None:
        """Set (n, count) numbers below 16."""
        blocks[:, self.start : self.start + self.count] |= numbers << np.uint8(self.shift)


@dataclass(frozen=True)
class SplitSixBits:
    """Eight six-bit numbers of Q4_K and Q5_K: four whole ones, four in two pieces.

    ::

        byte first + j    bits 5..0  number j        bits 7 6  bits 5 4 of number j + 4
        byte shared + j   four bits at `shift`: bits 3..0 of number j + 4         j = 0..3

    Source: get_scale_min_k4.
    """

    first: int
    shared: int
    shift: int
    count: int = 8

    def read(self, blocks: Bytes) -> Bytes:
        """Return (n, 8) numbers below 64."""
        whole = blocks[:, self.first : self.first + 4]
        low = (blocks[:, self.shared : self.shared + 4] >> np.uint8(self.shift)) & np.uint8(15)
        high = (whole >> np.uint8(6)) << np.uint8(4)
        return np.concatenate([whole & np.uint8(63), low | high], axis=1)

    def write(self, blocks: Bytes, numbers: Bytes) -> None:
        """Set (n, 8) numbers below 64."""
        split = numbers[:, 4:]
        high = (split >> np.uint8(4)) << np.uint8(6)
        blocks[:, self.first : self.first + 4] |= numbers[:, :4] | high
        low = (split & np.uint8(15)) << np.uint8(self.shift)
        blocks[:, self.shared : self.shared + 4] |= low


@dataclass(frozen=True)
class Joined:
    """Layouts one after the other."""

    parts: Sequence[Layout]

    @property
    def count(self) -> int:
        """How many numbers a block has."""
        return sum(part.count for part in self.parts)

    def read(self, blocks: Bytes) -> Bytes:
        """Return (n, count) numbers."""
        return np.concatenate([part.read(blocks) for part in self.parts], axis=1)

    def write(self, blocks: Bytes, numbers: Bytes) -> None:
        """Set (n, count) numbers."""
        start = 0
        for part in self.parts:
            part.write(blocks, numbers[:, start : start + part.count])
            start += part.count
