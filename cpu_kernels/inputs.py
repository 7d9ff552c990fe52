"""What weights are multiplied by: activations, quantized to eight bits exactly as llama.cpp does.

ggml multiplies quantized weights with quantized activations: blocks of 32 (Q8_0, Q8_1) or of 256
(Q8_K) signed bytes with a scale. Codes and scales here are ggml's to the last bit, so that what is
measured here holds there. Beside them lie their sums over groups, times what zero points need::

    codes    [columns / 4][n][4] int8        n activations side by side
    scales   [columns / 32 or 256][n] float32, rounded to half floats but for Q8_K
    moments  [columns / 32][n] float32: Q8_1's scale times sum, as half floats
    sums     for every (group, multiple) of SUMS: [columns / group][n] int32

References
----------
quantize_row_q8_0 and quantize_row_q8_1 of ggml/src/ggml-cpu/arch/x86/quants.c, and
quantize_row_q8_K_ref of ggml/src/ggml-quants.c, llama.cpp 0c1e57098.
"""

from dataclasses import dataclass

import numpy as np

from cpu_kernels._numba import kernel
from cpu_kernels.simd import as_float32, as_int8, as_int32, bits_of, float_of

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
        return 256 if self.kind == _Q8_K else 32

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
            start += self.padded // known[0] * self.n * 4
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


@kernel()
def _round_32(values, first, codes, at, is_q8_1):
    """Quantize 32 activations; return scale and moment."""
    highest = np.int32(0)
    for j in range(32):
        highest = max(highest, bits_of(values[first + j]) & 0x7FFFFFFF)
    top = float_of(highest)
    scale = top / np.float32(127)
    times = np.float32(127) / top if top > np.float32(4e-37) else np.float32(0)  # else infinite
    total = np.int32(0)
    for j in range(32):
        code = np.int32(np.rint(values[first + j] * times))
        total += code
        codes[at + j] = code
    moment = to_half(scale * np.float32(total)) if is_q8_1 else np.float32(0)
    return to_half(scale), moment


@kernel()
def _round_256(values, first, codes, at):
    """Quantize 256 activations; return the scale."""
    highest = np.int32(0)
    for j in range(256):
        highest = max(highest, bits_of(values[first + j]) & 0x7FFFFFFF)
    if highest == 0:
        for j in range(256):
            codes[at + j] = 0
        return np.float32(0)
    top = float_of(highest)
    for j in range(256):
        if bits_of(values[first + j]) & 0x7FFFFFFF == highest:
            top = values[first + j]
            break
    times = np.float32(-127) / top
    for j in range(256):
        codes[at + j] = min(np.int32(127), np.int32(np.rint(values[first + j] * times)))
    return np.float32(1) / times


@kernel()
def _sum_groups(codes, at, width, block, c, n, sums):
    """Write the sums of a block of `width` columns, in the order of SUMS."""
    per_block = width // 16
    of_16, of_32, of_256 = sums[0], sums[4], sums[8]
    whole = np.int32(0)
    for g in range(0, per_block, 2):
        low, high = np.int32(0), np.int32(0)
        for j in range(16):
            low += codes[at + 16 * g + j]
        for j in range(16):
            high += codes[at + 16 * g + 16 + j]
        i = (block * per_block + g) * n + c
        for half in range(2):
            total = high if half else low
            place = i + half * n
            of_16[place] = total
            sums[1][place] = -4 * total
            sums[2][place] = -32 * total
            sums[3][place] = -128 * total
        i = (block * per_block + g) // 2 * n + c
        total = low + high
        of_32[i] = total
        sums[5][i] = -8 * total
        sums[6][i] = -16 * total
        sums[7][i] = -128 * total
        whole += total
    if width == 256:
        of_256[block * n + c] = -whole


@kernel()
def quantize(values, n_in, n, stride, kind, codes, scales, moments, sums, own, part, parts):
    """Quantize one part of `parts` of n activations.

    Parameters
    ----------
    values : float32, activation c begins at c · stride
    n_in, n, kind : see ``InputLayout``
    codes, scales, moments, sums : written; `sums` is a tuple in the order of SUMS
    own : 256 bytes of scratch of this part, written
    """
    width = 256 if kind == 2 else 32
    n_blocks = n_in // width
    for block in range(n_blocks * part // parts, n_blocks * (part + 1) // parts):
        for c in range(n):
            first = c * stride + block * width
            target, at = (codes, block * width) if n == 1 else (own, 0)
            if kind == 2:
                scales[block * n + c] = _round_256(values, first, target, at)
            else:
                scale, moment = _round_32(values, first, target, at, kind == 1)
                scales[block * n + c] = scale
                moments[block * n + c] = moment
            _sum_groups(target, at, width, block, c, n, sums)
            if n > 1:
                for j in range(0, width, 4):
                    place = ((block * width + j) // 4 * n + c) * 4
                    for i in range(4):
                        codes[place + i] = own[j + i]


@kernel(reorder=True)
def _prepare(values, at, how, first, second, epsilon, n_in, begin, end):
    """Write the values from `begin` to `end` of one activation.

    NORMALIZED: `first` over its root mean square, times the weights `second`. SILU, GELU: that
    function of `first`, times `second`. AS_IS: they are there.
    """
    if how == NORMALIZED:
        squares = np.float32(0)
        for i in range(n_in):
            squares += first[at + i] * first[at + i]
        scale = np.float32(1) / np.sqrt(squares / np.float32(n_in) + epsilon)
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
    squares = np.float32(0)
    for i in range(n_in):
        squares += added[i] * added[i]
    scale = np.float32(1) / np.sqrt(squares / np.float32(n_in) + epsilon)
    for i in range(begin, end):
        rows[i] += added[i] * scale * weights[i]


@kernel()
def quantize_at(unused, arguments, thread, n_threads):
    """Prepare activations and run ``quantize`` on them, one thread's part.

    `arguments`: values, n_in, n, stride, kind; codes, scales, moments, first sums, padded columns,
    scratch (256 bytes a thread), number of groups of n activations, bytes to the next group's;
    then how values come about (see PREPARE), two addresses and the bits of a float that it needs.
    """
    n_in, n, stride, kind = arguments[1], arguments[2], arguments[3], arguments[4]
    padded, scratch = arguments[9], arguments[10]
    of_16, of_32 = padded // 16 * n * 4, padded // 32 * n * 4
    values = as_float32(arguments[0])
    width = 256 if kind == 2 else 32
    n_blocks = n_in // width
    begin, end = (
        n_blocks * thread // n_threads * width,
        n_blocks * (thread + 1) // n_threads * width,
    )
    for group in range(arguments[11]):
        at = group * n * stride
        for c in range(n):
            how, epsilon = arguments[13], float_of(arguments[16])
            first, second = as_float32(arguments[14]), as_float32(arguments[15])
            _prepare(values, at + c * stride, how, first, second, epsilon, n_in, begin, end)
        moved = group * arguments[12]
        start = arguments[8] + moved
        middle = start + 4 * of_16
        sums = (
            as_int32(start),
            as_int32(start + of_16),
            as_int32(start + 2 * of_16),
            as_int32(start + 3 * of_16),
            as_int32(middle),
            as_int32(middle + of_32),
            as_int32(middle + 2 * of_32),
            as_int32(middle + 3 * of_32),
            as_int32(middle + 4 * of_32),
        )
        quantize(
            as_float32(arguments[0] + 4 * at),
            n_in,
            n,
            stride,
            kind,
            as_int8(arguments[5] + moved),
            as_float32(arguments[6] + moved),
            as_float32(arguments[7] + moved),
            sums,
            as_int8(scratch + 256 * thread),
            thread,
            n_threads,
        )
