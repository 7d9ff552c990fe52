"""What weights are multiplied by: activations, quantized to eight bits exactly as llama.cpp does.

ggml multiplies quantized weights with quantized activations: blocks of 32 (Q8_0, Q8_1) or of 256
(Q8_K) signed bytes with a scale. Codes and scales here are ggml's to the last bit, so that what is
measured here holds there. Beside them lie their sums over groups, times what zero points need::

    codes    [columns / 4][n][4] int8        n activations side by side
    scales   [columns / 32 or 256][n] float32, rounded to half floats but for Q8_K
    moments  [columns / 32][n] float32: Q8_1's scale times sum, as half floats
    sums     for every (group, multiple) of SUMS: [columns / group][n] int32; where the multiple
             is 1, for sub-offsets, [columns / 2 group][n][2] int16

References
----------
quantize_row_q8_0 and quantize_row_q8_1 of ggml/src/ggml-cpu/arch/x86/quants.c, and
quantize_row_q8_K_ref of ggml/src/ggml-quants.c, llama.cpp 0c1e57098.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from cpu_kernels._numba import kernel
from cpu_kernels.isa import chosen
from cpu_kernels.simd import (
    F32,
    FLOATS,
    I8,
    I64,
    INTS,
    Vectors,
    as_float32,
    as_int8,
    as_int16,
    as_int32,
    bits_of,
    float_of,
)

KINDS = ("Q8_0", "Q8_1", "Q8_K")
BLOCK = 256  # columns are padded to so many
# columns of a group, and what their sum is multiplied by: minus the zero points that there are
SUMS = (
    (16, 1), (16, -4), (16, -32), (16, -128),
    (32, 1), (32, -8), (32, -16), (32, -128),
    (256, -1),
)  # fmt: skip
_Q8_K = 2
AS_IS, NORMALIZED, SILU, GELU = range(4)  # how activations come about


def scale_columns(kind: int) -> int:
    """Return the columns that share a scale, by index into KINDS."""
    return 256 if kind == _Q8_K else 32


@dataclass(frozen=True)
class InputLayout:
    """Where the parts of quantized activations lie, in bytes from the start.

    Attributes
    ----------
    n_in : columns
    n : activations side by side
    kind : index into KINDS
    """

    n_in: int
    n: int
    kind: int

    @property
    def padded(self) -> int:
        """Columns, up to a whole number of blocks of 256."""
        return -(-self.n_in // BLOCK) * BLOCK

    @property
    def scale_columns(self) -> int:
        """Columns that share a scale."""
        return scale_columns(self.kind)

    @property
    def scales(self) -> int:
        """Where the scales begin."""
        return self.padded * self.n

    @property
    def moments(self) -> int:
        """Where the moments begin."""
        return self.scales + self.padded // 32 * self.n * 4

    def sums(self, group: int, multiple: int) -> int:
        """Where the sums over groups, times a multiple, begin."""
        start = self.moments + self.padded // 32 * self.n * 4
        for known in SUMS:
            if known == (group, multiple):
                return start
            start += self.padded // known[0] * self.n * (2 if known[1] == 1 else 4)
        raise ValueError(f"sums: no sums of {group} columns times {multiple}; known: {SUMS}.")

    @property
    def n_bytes(self) -> int:
        """Bytes of all."""
        group, multiple = SUMS[-1]
        return self.sums(group, multiple) + self.padded // group * self.n * 4


@kernel()
def exponential(x):
    """Return e to the power of a float32, to 2e-7 of it; vectorized where it is called.

    A Taylor polynomial of degree 6 of 2**f for f in ±1/2, times a power of two made of its bits.
    """
    t = min(max(x * np.float32(1.44269504), np.float32(-126)), np.float32(127))
    whole = np.rint(t)
    f = (t - whole) * np.float32(0.69314718)
    p = np.float32(1 / 720)
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1)
    p = p * f + np.float32(1)
    return p * float_of((np.int32(whole) + np.int32(127)) << np.int32(23))


@kernel()
def to_half(value):
    """Return the nearest half float, ties to even, as float32."""
    size = abs(value)
    if size >= np.float32(65520):
        return np.float32(np.inf) * np.sign(value)
    if size < np.float32(6.103515625e-05):  # subnormal: multiples of 2**-24
        rounded = (size + np.float32(0.75)) - np.float32(0.75)
    else:
        bits = bits_of(size)
        odd = (bits >> 13) & 1
        rounded = float_of(((bits + 0xFFF + odd) >> 13) << 13)
    return -rounded if value < 0 else rounded


@intrinsic
def _round_32(typing_context, values, codes):
    """Quantize 32 activations; return the largest one's bits above the 32 of the codes' sum."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = Vectors(builder, chosen())
        values, codes = (builder.inttoptr(one, I8.as_pointer()) for one in arguments)
        halves = [vectors.load(values, 64 * i, FLOATS, 4) for i in range(2)]
        mask = vectors.constant(INTS, 0x7FFFFFFF)
        sizes = [builder.and_(builder.bitcast(half, INTS), mask) for half in halves]
        larger = builder.icmp_signed(">", *sizes)
        top = vectors.reduce("smax", builder.select(larger, *sizes))
        real = builder.bitcast(top, F32)
        # below, 127 / top is infinite; the scale is then 0 as a half float
        is_some = builder.fcmp_ordered(">", real, ir.Constant(F32, 4e-37))
        times = builder.fdiv(ir.Constant(F32, 127.0), real)
        times = vectors.broadcast(builder.select(is_some, times, ir.Constant(F32, 0.0)))
        found = [vectors.to_integer(builder.fmul(half, times)) for half in halves]
        for i, one in enumerate(found):
            vectors.store(builder.trunc(one, ir.VectorType(I8, 16)), codes, 16 * i, 1)
        total = builder.zext(vectors.reduce("add", builder.add(*found)), I64)  # takes none of top
        return builder.or_(builder.shl(builder.zext(top, I64), ir.Constant(I64, 32)), total)

    return types.int64(types.int64, types.int64), generate


@kernel()
def _round_256(values, first, codes):
    """Quantize 256 activations; return the scale."""
    highest = np.int32(0)
    for j in range(256):
        highest = max(highest, bits_of(values[first + j]) & 0x7FFFFFFF)
    if highest == 0:
        for j in range(256):
            codes[j] = 0
        return np.float32(0)
    top = float_of(highest)
    for j in range(256):
        if bits_of(values[first + j]) & 0x7FFFFFFF == highest:
            top = values[first + j]
            break
    times = np.float32(-127) / top
    for j in range(256):
        codes[j] = min(np.int32(127), np.int32(np.rint(values[first + j] * times)))
    return np.float32(1) / times


@kernel()
def _sum_groups(codes, width, block, c, n, sums):
    """Write the sums of a block of `width` columns, in the order of SUMS."""
    per_block = width // 32
    whole = np.int32(0)
    for g in range(per_block):
        low, high = np.int32(0), np.int32(0)
        for j in range(16):
            low += codes[32 * g + j]
        for j in range(16):
            high += codes[32 * g + 16 + j]
        place = (block * per_block + g) * n + c
        sums[0][2 * place] = low
        sums[0][2 * place + 1] = high
        for half in range(2):
            total = high if half else low
            i = (2 * (block * per_block + g) + half) * n + c
            sums[1][i] = -4 * total
            sums[2][i] = -32 * total
            sums[3][i] = -128 * total
        total = low + high
        if width == 256:
            pair = (block * per_block + g) // 2 * n + c
            sums[4][2 * pair + g % 2] = total
        sums[5][place] = -8 * total
        sums[6][place] = -16 * total
        sums[7][place] = -128 * total
        whole += total
    if width == 256:
        sums[8][block * n + c] = -whole


@kernel(reorder=True)
def over_root_mean_square(values, at, n, epsilon):
    """Return one over the root mean square of n numbers, epsilon added to the mean."""
    squares = np.float32(0)
    for i in range(n):
        squares += values[at + i] * values[at + i]
    return np.float32(1) / np.sqrt(squares / np.float32(n) + epsilon)


@kernel(reorder=True)
def _prepare(values, at, how, first, second, epsilon, n_in, begin, end):
    """Write the values from `begin` to `end` of one activation.

    NORMALIZED: `first` over its root mean square, times the weights `second`. SILU, GELU: that
    function of `first`, times `second`. AS_IS: they are there.
    """
    if how == NORMALIZED:
        scale = over_root_mean_square(first, at, n_in, epsilon)
        for i in range(begin, end):
            values[at + i] = first[at + i] * scale * second[i]
    elif how == SILU:
        for i in range(begin, end):
            x = first[at + i]
            values[at + i] = x / (np.float32(1) + exponential(-x)) * second[at + i]
    elif how == GELU:
        for i in range(begin, end):
            x = first[at + i]
            # tanh(z) = 1 - 2 / (exp(2 z) + 1)
            z = np.float32(0.7978845608) * x * (np.float32(1) + np.float32(0.044715) * x * x)
            y = np.float32(1) - np.float32(2) / (exponential(np.float32(2) * z) + np.float32(1))
            values[at + i] = np.float32(0.5) * x * (np.float32(1) + y) * second[at + i]


@kernel()
def add_normalized(unused, arguments, thread, n_threads):
    """Add to each of n rows another one over its root mean square, times weights.

    `arguments`: rows added to, rows added, floats from one to the next of each, weights, floats of
    a row, bits of epsilon, n.
    """
    n_in = arguments[5]
    begin, end = n_in * thread // n_threads, n_in * (thread + 1) // n_threads
    for c in range(arguments[7]):
        rows = as_float32(arguments[0] + 4 * c * arguments[2])
        added = as_float32(arguments[1] + 4 * c * arguments[3])
        epsilon = float_of(arguments[6])
        _add_normalized(rows, added, as_float32(arguments[4]), epsilon, n_in, begin, end)


@kernel(reorder=True)
def _add_normalized(rows, added, weights, epsilon, n_in, begin, end):
    scale = over_root_mean_square(added, 0, n_in, epsilon)
    for i in range(begin, end):
        rows[i] += added[i] * scale * weights[i]


@kernel()
def quantize_at(unused, arguments, thread, n_threads):
    """Prepare activations and quantize them, one thread's part; see ``quantize_arguments``."""
    n_in, n, stride, kind = arguments[1], arguments[2], arguments[3], arguments[4]
    values, own = as_float32(arguments[0]), arguments[8] + 256 * thread
    width = 256 if kind == 2 else 32
    n_blocks = n_in // width
    begin, end = n_blocks * thread // n_threads, n_blocks * (thread + 1) // n_threads
    how, epsilon = arguments[11], float_of(arguments[14])
    first, second = as_float32(arguments[12]), as_float32(arguments[13])
    for group in range(arguments[9]):
        moved = group * arguments[10]
        codes, scales = arguments[5] + moved, as_float32(arguments[6] + moved)
        moments = as_float32(arguments[7] + moved)
        sums = (
            as_int16(arguments[15] + moved),
            as_int32(arguments[16] + moved),
            as_int32(arguments[17] + moved),
            as_int32(arguments[18] + moved),
            as_int16(arguments[19] + moved),
            as_int32(arguments[20] + moved),
            as_int32(arguments[21] + moved),
            as_int32(arguments[22] + moved),
            as_int32(arguments[23] + moved),
        )
        for c in range(n):
            at = (group * n + c) * stride
            # floats that no block holds are the last thread's: weights of floats need them
            stop = n_in if thread == n_threads - 1 else end * width
            _prepare(values, at, how, first, second, epsilon, n_in, begin * width, stop)
            for block in range(begin, end):
                target = codes + block * width if n == 1 else own
                place = at + block * width
                if kind == 2:
                    scales[block * n + c] = _round_256(values, place, as_int8(target))
                else:
                    found = _round_32(arguments[0] + 4 * place, target)
                    scale = float_of(found >> 32) / np.float32(127)
                    scales[block * n + c] = to_half(scale)
                    if kind == 1:
                        total = np.float32(np.int32(found & 0xFFFFFFFF))
                        moments[block * n + c] = to_half(scale * total)
                _sum_groups(as_int8(target), width, block, c, n, sums)
                if n > 1:
                    fours, side = as_int32(own), as_int32(codes)
                    for j in range(width // 4):
                        side[(block * (width // 4) + j) * n + c] = fours[j]


def quantize_arguments(
    values: npt.NDArray[np.float32],
    where: InputLayout,
    base: int,
    scratch: npt.NDArray[np.int8],
    n_groups: int,
    how: int = AS_IS,
    first: int = 0,
    second: int = 0,
    epsilon: float = 0.0,
) -> npt.NDArray[np.int64]:
    """Return the arguments of ``quantize_at``.

    Parameters
    ----------
    values : (n_groups · n, at least n_in) float32; written unless `how` is AS_IS
    where : of one group
    base : address of the groups' codes, one group after the other
    scratch : 256 bytes a thread
    n_groups : of `where.n` activations
    how, first, second, epsilon : how values come about, and addresses and a number for that
    """
    return np.array(
        [
            values.ctypes.data, where.n_in, where.n, values.strides[0] // 4, where.kind,
            base, base + where.scales, base + where.moments, scratch.ctypes.data,
            n_groups, where.n_bytes, how, first, second, float_bits(epsilon),
            *[base + where.sums(*one) for one in SUMS],
        ],
        np.int64,
    )  # fmt: skip


def float_bits(number: float) -> int:
    """Return the bits of a float32, as a program's arguments carry it."""
    return int(np.float32(number).view(np.int32))
