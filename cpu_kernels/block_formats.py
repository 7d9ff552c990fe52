"""The formats of ggml in which groups of weights share a scale and an offset, bytes and numbers.

Every one of them is::

    weight = scale · level[code] + offset            a group of weights, one code each
    scale  = super_scale[block] · sub_scale[group]
    offset = super_offset[block] · sub_offset[group]

``FORMATS`` says for each type what the numbers may be and where they lie. A quantizer unpacks
ggml's bytes, changes fields and codes, and packs them: what it gives to ``pack`` is what llama.cpp
will read, to the last bit of float32.

Not here: the formats whose codes stand for points of a lattice (IQ1, IQ2, IQ3) and Q1_0.

Source: ggml/src/ggml-common.h (block_*, kvalues_*) and ggml/src/ggml-quants.c (dequantize_row_*)
of llama.cpp 0c1e57098.
"""

from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from cpu_kernels.block_formats_bits import (
    Bytes,
    HalfBytes,
    Joined,
    Layout,
    Plane,
    Planes,
    SignedNibbles,
    SplitSixBits,
    Trits,
)
from cpu_kernels.block_formats_numbers import (
    Absent,
    Floats,
    Half,
    Integers,
    Stored,
    e8m0,
    ue4m3,
)

_T = GGMLQuantizationType


@dataclass(frozen=True)
class Fields:
    """Everything in a tensor's blocks but the codes; C-contiguous float32.

    Attributes
    ----------
    super_scale : (n_rows, n_blocks), as the file holds it; 1 where it holds none
    super_offset : (n_rows, n_blocks); −dmin for Q2_K, Q4_K and Q5_K, m for Q4_1 and Q5_1, else 0
    sub_scale : (n_rows, n_groups); whole numbers for K-quants and IQ4_XS, UE4M3 for NVFP4, else 1
    sub_offset : (n_rows, n_groups); whole numbers for Q2_K, Q4_K and Q5_K, 1 for Q4_1 and Q5_1,
        else 0
    """

    super_scale: Floats
    super_offset: Floats
    sub_scale: Floats
    sub_offset: Floats


@dataclass(frozen=True, eq=False)
class BlockFormat:
    """One type: its levels, its fields, and where each lies in a block.

    Attributes
    ----------
    qtype : ggml's type
    group_size : weights that share a scale and an offset, consecutive in a row
    levels : (n_levels,) float32, ascending; code c stands for ``levels[c]``
    codes, super_scale, super_offset, sub_scale, sub_offset : where they lie in a block
    """

    qtype: GGMLQuantizationType
    group_size: int
    levels: Floats
    codes: Layout
    super_scale: Stored
    super_offset: Stored
    sub_scale: Stored
    sub_offset: Stored

    @property
    def block_size(self) -> int:
        """Weights of a block."""
        return int(GGML_QUANT_SIZES[self.qtype][0])

    @property
    def type_size(self) -> int:
        """Bytes of a block."""
        return int(GGML_QUANT_SIZES[self.qtype][1])

    @property
    def is_ternary(self) -> bool:
        """Whether a weight is minus its scale, zero, or its scale."""
        return len(self.levels) == 3

    @property
    def has_offset(self) -> bool:
        """Whether a group has an offset."""
        return not isinstance(self.super_offset, Absent)

    @property
    def sub_scale_range(self) -> tuple[int, int] | None:
        """Lowest and highest sub-scale; None where it is no integer field."""
        return self.sub_scale.range

    @property
    def sub_offset_range(self) -> tuple[int, int] | None:
        """Lowest and highest sub-offset; None where it is no integer field."""
        return self.sub_offset.range

    def unpack(self, packed: Bytes) -> tuple[Fields, Bytes]:
        """Take rows of blocks apart.

        Parameters
        ----------
        packed : (n_rows, row_bytes) uint8

        Returns
        -------
        fields : of the rows
        codes : (n_rows, n_in) uint8, indices into ``levels``

        Raises
        ------
        ValueError
            The rows are no whole number of blocks, or a code of TQ2_0 is 3.
        """
        if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] % self.type_size:
            raise ValueError(
                f"packed: got {packed.dtype} of shape {packed.shape} as {self.qtype.name}, "
                f"expected rows of uint8 in blocks of {self.type_size} bytes."
            )
        n_rows = len(packed)
        blocks = np.ascontiguousarray(packed).reshape(-1, self.type_size)
        stored = (self.super_scale, self.super_offset, self.sub_scale, self.sub_offset)
        fields = Fields(*(field.read(blocks).reshape(n_rows, -1) for field in stored))
        codes = self.codes.read(blocks).reshape(n_rows, -1)
        self._check_codes(codes)
        return fields, codes

    def pack(self, fields: Fields, codes: Bytes) -> Bytes:
        """Put rows of blocks together, the inverse of ``unpack``.

        Bytes that ggml's encoders never write may come back as others that mean the same: nibble 8
        (−0) of MXFP4 and NVFP4, signs and NaN of NVFP4's scales, the 13 bytes of TQ1_0 that are no
        five trits, and its fifth trit where it has only four.

        Parameters
        ----------
        fields : whose every value the file can hold
        codes : (n_rows, n_in) uint8 below ``len(levels)``

        Returns
        -------
        (n_rows, row_bytes) uint8

        Raises
        ------
        ValueError
            A shape does not fit, or the file cannot hold a value.
        """
        n_rows, n_blocks = self._check(fields, codes)
        self._check_codes(codes)
        blocks = np.zeros((n_rows * n_blocks, self.type_size), np.uint8)
        self.codes.write(blocks, np.ascontiguousarray(codes).reshape(-1, self.block_size))
        for field, values in (
            (self.super_scale, fields.super_scale),
            (self.super_offset, fields.super_offset),
            (self.sub_scale, fields.sub_scale),
            (self.sub_offset, fields.sub_offset),
        ):
            field.write(blocks, values.reshape(len(blocks), field.count))
        return blocks.reshape(n_rows, n_blocks * self.type_size)

    def grid(self, fields: Fields) -> tuple[Floats, Floats]:
        """Return scale and offset of every group, both (n_rows, n_groups) float32.

        Exact: a half float times eight bits fits float32.
        """
        shape = (*fields.super_scale.shape, -1)
        with np.errstate(invalid="ignore"):  # infinite scales of a broken file
            scale = fields.super_scale[:, :, None] * fields.sub_scale.reshape(shape)
            offset = fields.super_offset[:, :, None] * fields.sub_offset.reshape(shape)
        return scale.reshape(fields.sub_scale.shape), offset.reshape(fields.sub_offset.shape)

    def decode(self, fields: Fields, codes: Bytes) -> Floats:
        """Return the weights, (n_rows, n_in) float32, equal to what ggml decodes to the last bit.

        Parameters
        ----------
        fields : of the rows
        codes : (n_rows, n_in) uint8 below ``len(levels)``

        Raises
        ------
        ValueError
            A shape does not fit.
        """
        self._check(fields, codes)
        scale, offset = self.grid(fields)
        weight = self.levels[codes].reshape(*scale.shape, self.group_size)
        with np.errstate(over="ignore", invalid="ignore"):  # what ggml makes of a broken file
            weight *= scale[:, :, None]
            if self.has_offset:
                weight += offset[:, :, None]
        return weight.reshape(codes.shape)

    def snap_super_scale(self, values: Floats) -> Floats:
        """Return the nearest super-scales that the file can hold; finite for finite values."""
        return self.super_scale.snap(values)

    def snap_super_offset(self, values: Floats) -> Floats:
        """Return the nearest super-offsets that the file can hold; finite for finite values."""
        return self.super_offset.snap(values)

    def snap_sub_scale(self, values: Floats) -> Floats:
        """Return the nearest sub-scales that the file can hold."""
        return self.sub_scale.snap(values)

    def snap_sub_offset(self, values: Floats) -> Floats:
        """Return the nearest sub-offsets that the file can hold."""
        return self.sub_offset.snap(values)

    def _check_codes(self, codes: Bytes) -> None:
        if codes.size and codes.max() >= len(self.levels):
            raise ValueError(
                f"codes: got {codes.max()}, expected indices below {len(self.levels)}, the number "
                f"of levels of {self.qtype.name}. Clip them."
            )

    def _check(self, fields: Fields, codes: Bytes) -> tuple[int, int]:
        """Return the numbers of rows and of blocks of a row."""
        if codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] % self.block_size:
            raise ValueError(
                f"codes: got {codes.dtype} of shape {codes.shape} as {self.qtype.name}, expected "
                f"rows of uint8 in blocks of {self.block_size}."
            )
        n_rows, n_blocks = len(codes), codes.shape[1] // self.block_size
        of_blocks = (n_rows, n_blocks)
        of_groups = (n_rows, codes.shape[1] // self.group_size)
        for name, expected in (
            ("super_scale", of_blocks),
            ("super_offset", of_blocks),
            ("sub_scale", of_groups),
            ("sub_offset", of_groups),
        ):
            values = getattr(fields, name)
            if values.shape != expected or values.dtype != np.float32:
                raise ValueError(
                    f"fields: {name} is {values.dtype} of shape {values.shape}, expected float32 "
                    f"of shape {expected} for {self.qtype.name}."
                )
        return of_blocks


def _format(
    qtype: GGMLQuantizationType,
    levels: range | list[int],
    codes: Layout,
    super_scale: Stored,
    *,
    sub_scale: Stored | None = None,
    super_offset: Stored | None = None,
    sub_offset: Stored | None = None,
) -> BlockFormat:
    """Return a format; without a sub-scale, a block is one group."""
    n_groups = sub_scale.count if sub_scale else 1
    return BlockFormat(
        qtype=qtype,
        group_size=int(GGML_QUANT_SIZES[qtype][0]) // n_groups,
        levels=np.array(levels, np.float32),
        codes=codes,
        super_scale=super_scale,
        super_offset=super_offset or Absent(0.0),
        sub_scale=sub_scale or Absent(1.0),
        sub_offset=sub_offset or Absent(1.0 if super_offset else 0.0, n_groups),
    )


# The non-linear levels of IQ4_NL and IQ4_XS; twice the values of E2M1 without its second zero.
_IQ4_LEVELS = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
_E2M1_LEVELS = [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12]


def _small_formats() -> tuple[BlockFormat, ...]:
    """Return the formats with blocks of 32 weights, and NVFP4 with 64.

    Bytes of a block; nibbles: byte j has code j in its low half and code j + 16 in its high one
    (NVFP4: j + 8, in runs of 8 bytes); fifth bits: bit b of byte j belongs to code 8j + b::

        Q4_0, IQ4_NL   0 d    2..17 nibbles
        Q4_1           0 d    2 m   4..19 nibbles
        Q5_0           0 d    2..5 fifth bits   6..21 nibbles
        Q5_1           0 d    2 m   4..7 fifth bits   8..23 nibbles
        Q8_0           0 d    2..33 signed bytes
        MXFP4          0 e    1..16 nibbles
        NVFP4          0..3 scales of 16 weights each   4..35 nibbles
    """
    from_2 = Planes([Plane(2, 16, width=16, bits=4)])
    from_4 = Planes([Plane(4, 16, width=16, bits=4)])
    q5_0 = Planes([Plane(6, 16, width=16, bits=4), Plane(2, 4, width=1, bits=1)])
    q5_1 = Planes([Plane(8, 16, width=16, bits=4), Plane(4, 4, width=1, bits=1)])
    q8_0 = Planes([Plane(2, 32, width=32, bits=8)], flip=0x80)
    mxfp4 = SignedNibbles(Plane(1, 16, width=16, bits=4))
    nvfp4 = SignedNibbles(Plane(4, 32, width=8, bits=4))
    d, m = Half(0), Half(2)
    return (
        _format(_T.Q4_0, range(-8, 8), from_2, d),
        _format(_T.Q4_1, range(16), from_4, d, super_offset=m),
        _format(_T.Q5_0, range(-16, 16), q5_0, d),
        _format(_T.Q5_1, range(32), q5_1, d, super_offset=m),
        _format(_T.Q8_0, range(-128, 128), q8_0, d),
        _format(_T.IQ4_NL, _IQ4_LEVELS, from_2, d),
        _format(_T.MXFP4, _E2M1_LEVELS, mxfp4, e8m0(0)),
        _format(_T.NVFP4, _E2M1_LEVELS, nvfp4, Absent(1.0), sub_scale=ue4m3(0, 4)),
    )


def _large_formats() -> tuple[BlockFormat, ...]:
    """Return the formats with blocks of 256 weights.

    Bytes of a block; "2 bits / 32" is a plane of two bits of every code in runs of 32 bytes::

        Q2_K     0..15 sub-scales (low half) and sub-offsets (high half) of 16 weights each
                 16..79 codes, 2 bits / 32   80 d   82 dmin
        Q3_K     0..31 bit 2 of the codes, 1 bit / 32   32..95 bits 1 0, 2 bits / 32
                 96..103 bits 3..0 of sub-scale + 32, 4 bits / 8   104..107 bits 5 4, 2 bits / 4
                 108 d
        Q4_K     0 d   2 dmin   4..15 sub-scales and sub-offsets of 32 weights each, six bits:
                     4..7 scales 0..3, 8..11 offsets 0..3, 12..15 low halves of 4..7: see
                     SplitSixBits
                 16..143 codes, 4 bits / 32
        Q5_K     as Q4_K up to 15   16..47 bit 4, 1 bit / 32   48..175 bits 3..0, 4 bits / 32
        Q6_K     0..127 bits 3..0, 4 bits / 64   128..191 bits 5 4, 2 bits / 32
                 192..207 sub-scales of 16 weights each, signed bytes   208 d
        IQ4_XS   0 d   2..3 bits 5 4 of sub-scale + 32, 2 bits / 1   4..7 bits 3..0, 4 bits / 1
                 8..135 codes, 4 bits / 16
        TQ1_0    0..31 five trits / 32   32..47 five trits / 16   48..51 four trits / 4   52 d
        TQ2_0    0..63 codes, 2 bits / 32   64 d

    TQ2_0 has room for a fourth level. ggml never writes it ("should not be 3" in its products), so
    it is none here.
    """
    q2_k = Planes([Plane(16, 64, width=32, bits=2)])
    q3_k = Planes([Plane(32, 64, width=32, bits=2), Plane(0, 32, width=32, bits=1)])
    q3_k_scales = Planes([Plane(96, 8, width=8, bits=4), Plane(104, 4, width=4, bits=2)])
    q4_k = Planes([Plane(16, 128, width=32, bits=4)])
    q5_k = Planes([Plane(48, 128, width=32, bits=4), Plane(16, 32, width=32, bits=1)])
    q6_k = Planes([Plane(0, 128, width=64, bits=4), Plane(128, 64, width=32, bits=2)])
    q6_k_scales = Planes([Plane(192, 16, width=16, bits=8)], flip=0x80)
    iq4_xs = Planes([Plane(8, 128, width=16, bits=4)])
    iq4_xs_scales = Planes([Plane(4, 4, width=1, bits=4), Plane(2, 2, width=1, bits=2)])
    tq1_0 = Joined([Trits(0, 32, width=32), Trits(32, 16, width=16), Trits(48, 4, 4, digits=4)])
    tq2_0 = Planes([Plane(0, 64, width=32, bits=2)])
    six_bits: dict[str, Stored] = {
        "sub_scale": Integers(SplitSixBits(first=4, shared=12, shift=0), 0, 63),
        "sub_offset": Integers(SplitSixBits(first=8, shared=12, shift=4), 0, 63),
        "super_offset": Half(2, negated=True),
    }
    return (
        _format(
            _T.Q2_K,
            range(4),
            q2_k,
            Half(80),
            sub_scale=Integers(HalfBytes(0, 16, shift=0), 0, 15),
            sub_offset=Integers(HalfBytes(0, 16, shift=4), 0, 15),
            super_offset=Half(82, negated=True),
        ),
        _format(_T.Q3_K, range(-4, 4), q3_k, Half(108), sub_scale=Integers(q3_k_scales, -32, 31)),
        _format(_T.Q4_K, range(16), q4_k, Half(0), **six_bits),
        _format(_T.Q5_K, range(32), q5_k, Half(0), **six_bits),
        _format(
            _T.Q6_K, range(-32, 32), q6_k, Half(208), sub_scale=Integers(q6_k_scales, -128, 127)
        ),
        _format(
            _T.IQ4_XS, _IQ4_LEVELS, iq4_xs, Half(0), sub_scale=Integers(iq4_xs_scales, -32, 31)
        ),
        _format(_T.TQ1_0, range(-1, 2), tq1_0, Half(52)),
        _format(_T.TQ2_0, range(-1, 2), tq2_0, Half(64)),
    )


FORMATS: dict[GGMLQuantizationType, BlockFormat] = {
    known.qtype: known for known in (*_small_formats(), *_large_formats())
}
