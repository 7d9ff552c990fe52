"""Attention over a cache of keys and values: rotation, storing, scores, weighted sums.

Both caches belong to one layer and are made for the loops that read them: sixteen positions of a
key lie side by side, so that their scores come out in the sixteen lanes of a vector; a value's
numbers lie in a row::

    keys     [head][position / 16][head_dim][16]     half floats, or bytes with
             [head][position / 16][head_dim / 32][16] float32 scales
    values   [head][position][head_dim]              half floats, or bytes with
             [head][position][head_dim / 32]         float32 scales

Bytes are Q8_0's (blocks of 32 numbers, scales rounded to half floats). Where the CPU converts no
half floats, float32 stands for them.

References
----------
ggml_rope_ext, ggml_soft_max_ext and the KV cache of src/llama-graph.cpp, llama.cpp 0c1e57098:
queries, keys and probabilities are half floats there and float32 here.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from cpu_kernels._numba import kernel
from cpu_kernels.inputs import exponential, over_root_mean_square, to_half
from cpu_kernels.isa import Isa
from cpu_kernels.simd import (
    F32,
    FLOATS,
    HALF,
    I8,
    I64,
    Vectors,
    as_float32,
    as_int8,
    as_int64,
    float_of,
    source_digest,
)

LANES = 16
_VERSION = source_digest("inputs.py", "attention.py")
_TOGETHER = 4  # vectors of scores or of numbers of a value at once: hides the latency of one


class CacheType(types.Type):
    """What a cache holds; has no value at run time.

    Parameters
    ----------
    isa : of the CPU
    is_bytes : Q8_0 instead of half floats
    """

    def __init__(self, isa: Isa, *, is_bytes: bool) -> None:
        self.isa, self.is_bytes = isa, is_bytes
        super().__init__(f"cache[{_VERSION}, {isa.name}, {'Q8_0' if is_bytes else 'F16'}]")

    @property
    def element(self) -> Any:
        """LLVM's type of a stored number."""
        return I8 if self.is_bytes else HALF if self.isa.has_half else F32

    @property
    def element_bytes(self) -> int:
        """Bytes of a stored number."""
        return 1 if self.is_bytes else 2 if self.isa.has_half else 4


register_model(CacheType)(models.OpaqueModel)


class _Reader:
    """Reads vectors of a cache as floats."""

    def __init__(self, builder: Any, cache: CacheType) -> None:
        self.vectors, self.builder, self.cache = Vectors(builder, cache.isa), builder, cache

    def place(self, base: Any, index: Any, size: int) -> Any:
        """Return the address of an element, as a pointer to bytes."""
        moved = self.builder.mul(index, ir.Constant(I64, size))
        return self.builder.inttoptr(self.builder.add(base, moved), I8.as_pointer())

    def sixteen(self, base: Any, index: Any) -> Any:
        """Return 16 stored numbers from an index on, as floats, without their scale."""
        kind = ir.VectorType(self.cache.element, LANES)
        found = self.vectors.load(self.place(base, index, self.cache.element_bytes), 0, kind, 1)
        if self.cache.is_bytes:
            return self.builder.sitofp(found, FLOATS)
        return self.vectors.half(found) if self.cache.isa.has_half else found

    def number(self, base: Any, index: Any) -> Any:
        """Return a float32 of an array in all lanes."""
        return self.vectors.broadcast(self.vectors.load(self.place(base, index, 4), 0, F32, 4))


@intrinsic
def _scores(typing_context, cache, query, keys, scales, head_dim, n_tiles, out):
    """Write the products of a query with n_tiles · 16 keys; all but `cache` are int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, query, keys, scales, head_dim, n_tiles, out = arguments
        reader = _Reader(builder, signature.args[0])
        one, four = ir.Constant(I64, 1), ir.Constant(I64, _TOGETHER)
        whole = builder.mul(builder.sdiv(n_tiles, four), four)
        for first, end, together in ((ir.Constant(I64, 0), whole, _TOGETHER), (whole, n_tiles, 1)):
            step = four if together > 1 else one
            with cgutils.for_range_slice(builder, first, end, step, I64) as (tile, _count):
                _score_tiles(builder, reader, (query, keys, scales, head_dim, out), tile, together)
        return context.get_dummy_value()

    return types.none(cache, *[types.int64] * 6), generate


def _score_tiles(builder: Any, reader: _Reader, given: Any, tile: Any, together: int) -> None:
    query, keys, scales, head_dim, out = given
    vectors = reader.vectors
    thirty_two, lanes = ir.Constant(I64, 32), ir.Constant(I64, LANES)
    sums = [cgutils.alloca_once_value(builder, vectors.zero(FLOATS)) for _ in range(together)]
    for slot in sums:
        builder.store(vectors.zero(FLOATS), slot)
    tiles = [builder.add(tile, ir.Constant(I64, i)) for i in range(together)]
    n_blocks = builder.sdiv(head_dim, thirty_two)
    with cgutils.for_range(builder, head_dim, intp=I64) as loop:
        theirs = reader.number(query, loop.index)
        for number, slot in zip(tiles, sums, strict=True):
            row = builder.add(builder.mul(number, head_dim), loop.index)
            found = reader.sixteen(keys, builder.mul(row, lanes))
            if reader.cache.is_bytes:
                block = builder.sdiv(loop.index, thirty_two)
                block = builder.add(builder.mul(number, n_blocks), block)
                scale = reader.place(scales, builder.mul(block, lanes), 4)
                found = builder.fmul(found, vectors.load(scale, 0, FLOATS, 4))
            builder.store(vectors.fma(builder.load(slot), found, theirs), slot)
    for number, slot in zip(tiles, sums, strict=True):
        place = reader.place(out, builder.mul(number, lanes), 4)
        vectors.store(builder.load(slot), place, 0)


@intrinsic
def _weigh(typing_context, cache, weights, values, scales, head_dim, n_positions, out):
    """Write the sum of values times weights; all but `cache` are int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, weights, values, scales, head_dim, n_positions, out = arguments
        reader = _Reader(builder, signature.args[0])
        wide, narrow = ir.Constant(I64, _TOGETHER * LANES), ir.Constant(I64, LANES)
        whole = builder.mul(builder.sdiv(head_dim, wide), wide)
        given = (weights, values, scales, head_dim, n_positions, out)
        for first, end, together in (
            (ir.Constant(I64, 0), whole, _TOGETHER),
            (whole, head_dim, 1),
        ):
            step = wide if together > 1 else narrow
            with cgutils.for_range_slice(builder, first, end, step, I64) as (column, _count):
                _weigh_columns(builder, reader, given, column, together)
        return context.get_dummy_value()

    return types.none(cache, *[types.int64] * 6), generate


def _weigh_columns(builder: Any, reader: _Reader, given: Any, column: Any, together: int) -> None:
    weights, values, scales, head_dim, n_positions, out = given
    vectors, thirty_two = reader.vectors, ir.Constant(I64, 32)
    sums = [cgutils.alloca_once_value(builder, vectors.zero(FLOATS)) for _ in range(together)]
    for slot in sums:
        builder.store(vectors.zero(FLOATS), slot)
    columns = [builder.add(column, ir.Constant(I64, LANES * i)) for i in range(together)]
    n_blocks = builder.sdiv(head_dim, thirty_two)
    with cgutils.for_range(builder, n_positions, intp=I64) as loop:
        weight = reader.number(weights, loop.index)
        start = builder.mul(loop.index, head_dim)
        for number, slot in zip(columns, sums, strict=True):
            found = reader.sixteen(values, builder.add(start, number))
            if reader.cache.is_bytes:
                block = builder.mul(loop.index, n_blocks)
                block = builder.add(block, builder.sdiv(number, thirty_two))
                found = builder.fmul(found, reader.number(scales, block))
            builder.store(vectors.fma(builder.load(slot), found, weight), slot)
    for number, slot in zip(columns, sums, strict=True):
        vectors.store(builder.load(slot), reader.place(out, number, 4), 0)


@intrinsic
def _put(typing_context, cache, base, index, number):
    """Store a float32 as an element of a cache that holds floats."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        if kind.is_bytes:
            return context.get_dummy_value()
        reader = _Reader(builder, kind)
        value = arguments[3]
        if kind.element == HALF:
            value = builder.fptrunc(value, HALF)
        place = reader.place(arguments[1], arguments[2], kind.element_bytes)
        reader.vectors.store(value, place, 0, kind.element_bytes)
        return context.get_dummy_value()

    return types.none(cache, types.int64, types.int64, types.float32), generate


@intrinsic
def _is_bytes(typing_context, cache):
    """Return whether a cache holds bytes, a constant."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(1), int(signature.args[0].is_bytes))

    return types.boolean(cache), generate


@kernel(reorder=True)
def _normalize(row, at, weights, n, epsilon):
    """Divide n numbers by their root mean square and multiply them by weights, in place."""
    scale = over_root_mean_square(row, at, n, epsilon)
    for i in range(n):
        row[at + i] = row[at + i] * scale * weights[i]


@kernel()
def _rotate(row, at, table, position, n_rot, is_interleaved):
    """Rotate the first n_rot numbers of a head, in place; `table`: cosine, sine of each pair."""
    half = n_rot // 2
    for i in range(half):
        cosine = table[(position * half + i) * 2]
        sine = table[(position * half + i) * 2 + 1]
        a = at + 2 * i if is_interleaved else at + i
        b = a + 1 if is_interleaved else a + half
        x, y = row[a], row[b]
        row[a] = x * cosine - y * sine
        row[b] = x * sine + y * cosine


@kernel()
def _store_bytes(row, at, base, scales, head_dim, stride, first, scale_first, scale_stride):
    """Store a head in Q8_0: number i at first + i · stride, scales likewise."""
    for block in range(head_dim // 32):
        top = np.float32(0)
        for i in range(32):
            top = max(top, abs(row[at + 32 * block + i]))
        times = np.float32(127) / top if top > np.float32(4e-37) else np.float32(0)
        scales[scale_first + block * scale_stride] = to_half(top / np.float32(127))
        for i in range(32):
            code = np.int32(np.rint(row[at + 32 * block + i] * times))
            base[first + (32 * block + i) * stride] = code


@kernel()
def rotate_and_store(cache, arguments, thread, n_threads):
    """Normalize and rotate queries and keys, and store keys and values.

    `arguments`: queries, keys, values, floats of a row of each; heads of queries, of keys,
    head_dim, n_rot, is_interleaved, table; norm weights of queries and keys or 0, bits of epsilon;
    stored
    keys, their scales, stored values, their scales, positions of the cache; biases of queries,
    keys, values or 0; state: tokens, position of the first.
    """
    state = as_int64(arguments[23])
    n, position = state[0], state[1]
    heads, kv_heads, head_dim = arguments[6], arguments[7], arguments[8]
    n_rot, is_interleaved, table = arguments[9], arguments[10], as_float32(arguments[11])
    epsilon, n_ctx = float_of(arguments[14]), arguments[19]
    n_items = n * (heads + 2 * kv_heads)
    for item in range(n_items * thread // n_threads, n_items * (thread + 1) // n_threads):
        token, head = item // (heads + 2 * kv_heads), item % (heads + 2 * kv_heads)
        part = 0 if head < heads else 1 if head < heads + kv_heads else 2
        if part > 0:
            head = (head - heads) % kv_heads
        row, at = as_float32(arguments[part]), token * arguments[3 + part] + head * head_dim
        bias = arguments[20 + part]
        if bias != 0:
            for i in range(head_dim):
                row[at + i] += as_float32(bias)[head * head_dim + i]
        place = position + token
        if part < 2:
            weights = arguments[12 + part]
            if weights != 0:
                _normalize(row, at, as_float32(weights), head_dim, epsilon)
            _rotate(row, at, table, place, n_rot, is_interleaved)
        if part == 1:
            tiles = n_ctx // LANES
            tile = head * tiles + place // LANES
            first = tile * head_dim * LANES + place % LANES
            if _is_bytes(cache):
                _store_bytes(
                    row, at, as_int8(arguments[15]), as_float32(arguments[16]), head_dim, LANES,
                    first, tile * (head_dim // 32) * LANES + place % LANES, LANES,
                )  # fmt: skip
            for i in range(head_dim):
                _put(cache, arguments[15], first + i * LANES, row[at + i])
        elif part == 2:
            first = (head * n_ctx + place) * head_dim
            if _is_bytes(cache):
                _store_bytes(
                    row, at, as_int8(arguments[17]), as_float32(arguments[18]), head_dim, 1,
                    first, first // 32, 1,
                )  # fmt: skip
            for i in range(head_dim):
                _put(cache, arguments[17], first + i, row[at + i])


@kernel(reorder=True)
def _soften(scores, first, end, scale, cap):
    """Make probabilities of scores in place, but for their sum, which is returned."""
    top = np.float32(-np.inf)
    for i in range(first, end):
        x = scores[i] * scale
        if cap > 0:
            x = np.float32(np.tanh(x / cap)) * cap
        scores[i] = x
        top = max(top, x)
    total = np.float32(0)
    for i in range(first, end):
        x = exponential(scores[i] - top)
        scores[i] = x
        total += x
    return total


@kernel()
def attend(cache, arguments, thread, n_threads):
    """Write what every head of every token attends to.

    `arguments`: queries, floats of a row; out, floats of a row; heads of queries, of keys,
    head_dim; stored keys, their scales, stored values, their scales, positions of the cache;
    bits of the scale of scores and of their cap (0: none); window of positions or 0; scratch,
    floats of a thread's; state: tokens, position of the first.
    """
    state = as_int64(arguments[17])
    n, position = state[0], state[1]
    heads, kv_heads, head_dim = arguments[4], arguments[5], arguments[6]
    n_ctx, window = arguments[11], arguments[14]
    scale, cap = float_of(arguments[12]), float_of(arguments[13])
    scratch = arguments[15] + 4 * thread * arguments[16]
    scores = as_float32(scratch)
    size = _element_bytes(cache)
    for item in range(n * heads * thread // n_threads, n * heads * (thread + 1) // n_threads):
        token, head = item // heads, item % heads
        own = head * kv_heads // heads
        end = position + token + 1
        first = max(0, end - window) if window > 0 else 0
        tile = first // LANES
        n_tiles = (end + LANES - 1) // LANES - tile
        key = own * (n_ctx // LANES) + tile
        _scores(
            cache,
            arguments[0] + 4 * (token * arguments[1] + head * head_dim),
            arguments[7] + key * LANES * head_dim * size,
            arguments[8] + key * LANES * (head_dim // 32) * 4,
            head_dim,
            n_tiles,
            scratch + 4 * LANES * tile,
        )
        total = _soften(scores, first, end, scale, cap)
        for i in range(first, end):
            scores[i] /= total
        value = own * n_ctx + first
        _weigh(
            cache,
            scratch + 4 * first,
            arguments[9] + value * head_dim * size,
            arguments[10] + value * (head_dim // 32) * 4,
            head_dim,
            end - first,
            arguments[2] + 4 * (token * arguments[3] + head * head_dim),
        )


@intrinsic
def _element_bytes(typing_context, cache):
    """Return the bytes of a stored number, a constant."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(I64, signature.args[0].element_bytes)

    return types.int64(cache), generate
