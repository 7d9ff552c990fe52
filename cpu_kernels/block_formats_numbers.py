"""What a block stores as a number: half floats, powers of two, 8-bit floats, small integers.

Each kind knows where it lies in a block, its values as float32, and which values the file can hold
(``snap``). ggml's letters: d and dmin are halves, e is E8M0, the scales of NVFP4 are UE4M3.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cpu_kernels.block_formats_bits import Bytes, Layout

Floats = npt.NDArray[np.float32]

_HALF_MAX = np.float32(65504.0)


class Stored(Protocol):
    """A kind of number that a block stores `count` times."""

    @property
    def count(self) -> int:
        """How many numbers a block has."""

    @property
    def range(self) -> tuple[int, int] | None:
        """Lowest and highest value of an integer field; None where it is none."""

    def read(self, blocks: Bytes) -> Floats:
        """Return (n, count) values of (n, type_size) blocks."""

    def write(self, blocks: Bytes, values: Floats) -> None:
        """Set (n, count) values in (n, type_size) blocks, *written*, whose bits are zero.

        Raises
        ------
        ValueError
            The file cannot hold a value.
        """

    def snap(self, values: Floats) -> Floats:
        """Return the nearest values that the file can hold, all finite; float32, same shape."""


@dataclass(frozen=True)
class Absent:
    """A number that the format does not store: always `value`."""

    value: float
    count: int = 1

    @property
    def range(self) -> tuple[int, int] | None:
        """None: no integer field."""
        return None

    def read(self, blocks: Bytes) -> Floats:
        """Return (n, count) times the value."""
        return np.full((len(blocks), self.count), self.value, np.float32)

    def write(self, blocks: Bytes, values: Floats) -> None:
        """Write nothing."""
        _require(values == np.float32(self.value), values, f"{self.value} everywhere")

    def snap(self, values: Floats) -> Floats:
        """Return the value in the shape of `values`."""
        return np.full(np.shape(values), self.value, np.float32)


@dataclass(frozen=True)
class Half:
    """One IEEE half float, little-endian; the value is its negative if `negated`."""

    start: int
    negated: bool = False
    count: int = 1

    @property
    def range(self) -> tuple[int, int] | None:
        """None: no integer field."""
        return None

    def read(self, blocks: Bytes) -> Floats:
        """Return (n, 1) values; exact."""
        part = np.ascontiguousarray(blocks[:, self.start : self.start + 2])
        values = part.view("<f2").astype(np.float32)
        return -values if self.negated else values

    def write(self, blocks: Bytes, values: Floats) -> None:
        """Set (n, 1) values."""
        with np.errstate(over="ignore"):  # refused in the next line
            halves = (-values if self.negated else values).astype("<f2")
        _require(np.abs(halves.astype(np.float32)) == np.abs(values), values, "half floats")
        blocks[:, self.start : self.start + 2] = halves.view(np.uint8)

    def snap(self, values: Floats) -> Floats:
        """Return the nearest half floats, ties to even, at most 65504 in absolute value."""
        return np.clip(values, -_HALF_MAX, _HALF_MAX).astype(np.float16).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Minifloats:
    """Bytes that stand for floats of a table.

    Attributes
    ----------
    start, count : the bytes
    table : (256,) float32, what ggml reads each byte as; ascending over the first `n_written`
    n_written : bytes from this one on are read, and not written
    n_snapped : ``snap`` gives none from this one on
    """

    start: int
    count: int
    table: Floats
    n_written: int
    n_snapped: int

    @property
    def range(self) -> tuple[int, int] | None:
        """None: no integer field."""
        return None

    def read(self, blocks: Bytes) -> Floats:
        """Return (n, count) values."""
        return self.table[blocks[:, self.start : self.start + self.count]]

    def write(self, blocks: Bytes, values: Floats) -> None:
        """Set (n, count) values."""
        written = self.table[: self.n_written]
        codes = np.minimum(np.searchsorted(written, values), self.n_written - 1)
        _require(written[codes] == values, values, "values of this 8-bit float")
        blocks[:, self.start : self.start + self.count] = codes

    def snap(self, values: Floats) -> Floats:
        """Return the nearest values of the table; a tie goes to the lower one."""
        choices = self.table[: self.n_snapped].astype(np.float64)
        between = (choices[1:] + choices[:-1]) / 2
        return self.table[np.searchsorted(between, np.asarray(values, np.float64))]


@dataclass(frozen=True)
class Integers:
    """Whole numbers from `lowest` up, stored as their distance from it."""

    layout: Layout
    lowest: int
    highest: int

    @property
    def count(self) -> int:
        """How many numbers a block has."""
        return self.layout.count

    @property
    def range(self) -> tuple[int, int] | None:
        """Lowest and highest value."""
        return self.lowest, self.highest

    def read(self, blocks: Bytes) -> Floats:
        """Return (n, count) values."""
        return self.layout.read(blocks).astype(np.float32) + np.float32(self.lowest)

    def write(self, blocks: Bytes, values: Floats) -> None:
        """Set (n, count) values."""
        _require(self.snap(values) == values, values, f"integers {self.lowest} to {self.highest}")
        self.layout.write(blocks, (values - np.float32(self.lowest)).astype(np.uint8))

    def snap(self, values: Floats) -> Floats:
        """Return the nearest whole numbers in range, ties to even."""
        return np.clip(np.rint(np.asarray(values, np.float32)), self.lowest, self.highest)


def e8m0(start: int) -> Minifloats:
    """Return the scale of MXFP4: byte e is 2^(e − 128), half of what E8M0 means.

    ggml halves it because its levels are the doubled values of E2M1. ``snap`` stops at 2^124, the
    highest that ggml's encoder writes: at 2^125 the level 12 overflows float32.

    Source: ggml/src/ggml-impl.h, ggml_e8m0_to_fp32_half.
    """
    table = np.ldexp(np.float64(1), np.arange(256) - 128).astype(np.float32)
    return Minifloats(start, 1, table, n_written=256, n_snapped=253)


def ue4m3(start: int, count: int) -> Minifloats:
    """Return scales of NVFP4: no sign, 4 bits of exponent (bias 7), 3 of mantissa, halved.

    The sign bit is ignored, the NaN 0x7F is read as 0. Bytes above 0x7E are read as ggml's C reads
    them but never written; 0xFF alone gives a value, 240, that has no other byte.

    Source: ggml/src/ggml-impl.h, ggml_ue4m3_to_fp32.
    """
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 8)
    table = np.where(exponent == 0, np.ldexp(mantissa / 1.0, -10), normal)
    table[0x7F] = 0
    return Minifloats(start, count, table.astype(np.float32), n_written=0x7F, n_snapped=0x7F)


def _require(holds: npt.NDArray[np.bool_], values: Floats, expected: str) -> None:
    if not holds.all():
        where = tuple(int(index) for index in np.argwhere(~holds)[0])
        raise ValueError(
            f"fields: the file cannot hold {values[where]} of block {where[0]}; expected "
            f"{expected}. Use the format's snap functions first."
        )
