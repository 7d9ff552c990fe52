"""Products of ternary weights with many tokens: tables whose entries are vectors over tokens.

A byte of four trits, two bits each, says what four columns of a row add to a product. For 32 tokens
at once, a table holds that for all 81 such bytes, one word a token. A byte of weights then costs
one read and one addition of words that lie side by side, where dot products multiply them all::

    table[byte][token] = Σ (trit − 1) · activation[column, token]     int16, exact
    sum[row][token]   += table[code byte of the row][token]           int16, exact
    out[row][token]   += (super_scale[row] · activation's scale) · sum

16 bits are enough for a block of 256 columns: 127 · 256. The four or five tables of a vector of
codes, some 26 KiB, are made, used for all rows of a panel, and made anew for the next vector.
Weights and quantized activations are those of ``products`` (a byte of five trits is opened, and the
fifth ones of four bytes are a byte of their own), and so are integers and floats, to the last bit.

References
----------
Vec-LUT, arXiv:2512.06443: tables over tokens, made and used one after the other.
"""

import itertools
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from cpu_kernels._numba import kernel
from cpu_kernels.isa import Isa
from cpu_kernels.simd import (
    BYTES,
    F32,
    FLOATS,
    HALF,
    I8,
    I32,
    I64,
    INTS,
    WORDS,
    Addresses,
    Vectors,
    as_float32,
    source_digest,
    stack_memory,
)
from cpu_kernels.tiles import HALF_LINE, LINE, ROWS, TRITS, Layout, trit_tables

TOKENS = 32  # words of a vector of 64 bytes
PANEL = 64  # tiles whose sums stay in the second cache
_ENTRIES = 0b10_10_10_10 + 1  # of a table; those in use lie in lines of their own
_TABLE_BYTES = _ENTRIES * LINE
_UP = 6  # bits: an entry is a line
_VERSION = source_digest("tiles.py", "streams.py")


def may_stream(layout: Layout) -> bool:
    """Return whether a type is multiplied by such tables: the ternary ones."""
    return layout.zero == -1 and (layout.trits or layout.planes == (2,))


class StreamType(types.Type):
    """What a product is compiled for: a layout, instructions, tokens side by side in a group."""

    def __init__(self, layout: Layout, isa: Isa, n: int) -> None:
        self.layout, self.isa, self.n = layout, isa, n
        super().__init__(f"stream[{_VERSION}, {isa.name}, {n}, {layout}]")


register_model(StreamType)(models.OpaqueModel)


class _Stream(Addresses):
    """Writer of the code of a block of columns."""

    def __init__(self, builder: Any, product: StreamType) -> None:
        super().__init__(builder)
        self.layout, self.n = product.layout, product.n
        self.vectors = Vectors(builder, product.isa)

    def add_block(
        self,
        codes: Any,
        scales: Any,
        step: Any,
        weights: Any,
        tile: Any,
        n_tiles: Any,
        memory: Any,
    ) -> None:
        """Add the products of a block of columns to the sums of some tiles' rows.

        `codes`, `scales`: of the block and the first of the groups, `step` bytes from one to the
        next; `weights`: a record, `tile` bytes from one tile's to the next's; `memory`: of floats,
        words, columns and tables.
        """
        n_fours, each = self.layout.block // 4, TRITS if self.layout.trits else 4
        last = (n_fours - 1) // each
        self.words = self._sum(memory, 2 * PANEL * ROWS * LINE)
        self.columns = self._sum(self.words, PANEL * ROWS * LINE)
        self.tables = self._sum(self.columns, 4 * TRITS * LINE)
        kind = ir.VectorType(F32, self.n)
        theirs = self._of_groups(scales, step, kind, TOKENS // ROWS)

        def add(v: Any, n_fields: int, *, is_first: bool = False, is_last: bool = False) -> None:
            fours = [
                self._columns(codes, step, self._sum(self._times(v, each), f))
                for f in range(n_fields)
            ]
            self._write_tables(fours)
            with cgutils.for_range(self.builder, n_tiles) as loop:
                record = self.builder.add(weights, self.builder.mul(loop.index, tile))
                codes_at = self._codes(record, v, has_fifth=n_fields == TRITS)
                rows = self._times(loop.index, ROWS)
                with cgutils.for_range(self.builder, ir.Constant(I64, ROWS // 2)) as pair:
                    indices = self._indices(codes_at, pair.index, has_fifth=n_fields == TRITS)
                    first = self.builder.add(rows, self._times(pair.index, 2))
                    words = self._pointer(self.words, self._times(first, LINE))
                    for row in range(2):
                        total = self.vectors.zero(WORDS)
                        if not is_first:
                            total = self.vectors.load(words, row * LINE, WORDS, LINE)
                        for j, index in enumerate(indices[row]):
                            found = self._pointer(self.tables, index)
                            found = self.vectors.load(found, j * _TABLE_BYTES, WORDS, LINE)
                            total = self.builder.add(total, found)
                        if is_last:
                            own = self._scale(record, self._sum(self._times(pair.index, 2), row))
                            sums = self._pointer(
                                memory, self._times(self._sum(first, row), 2 * LINE)
                            )
                            self._finish(total, own, theirs, sums)
                        else:
                            self.vectors.store(total, words, row * LINE, LINE)

        add(ir.Constant(I64, 0), each, is_first=True)
        with cgutils.for_range(self.builder, ir.Constant(I64, last - 1)) as loop:
            add(self._sum(loop.index, 1), each)
        add(ir.Constant(I64, last), n_fours - last * each, is_last=True)

    def _of_groups(self, place: Any, step: Any, kind: Any, n: int) -> list[Any]:
        """Return what all groups of tokens have at a place, joined to n vectors."""
        parts = []
        for i in range(TOKENS // self.n):
            moved = self.builder.mul(step, ir.Constant(I64, i))
            parts.append(self.vectors.load(self._pointer(place, moved), 0, kind, 4))
        while len(parts) > n:
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [self.vectors.join(low, high) for low, high in pairs]
        return parts

    def _columns(self, codes: Any, step: Any, four: Any) -> list[Any]:
        """Return four columns, words."""
        builder = self.builder
        place = builder.add(codes, self._times(four, 4 * self.n))
        (all_four,) = self._of_groups(place, step, ir.VectorType(I32, self.n), 1)
        found = []
        for j in range(4):
            up, down = (self.vectors.constant(all_four.type, by) for by in (24 - 8 * j, 24))
            found.append(builder.trunc(builder.ashr(builder.shl(all_four, up), down), WORDS))
        return found

    def _write_tables(self, fours: list[list[Any]]) -> None:
        """Write the tables of a vector of codes: of its bytes, then of its bytes' fifth trits."""
        builder, vectors = self.builder, self.vectors
        for i, column in enumerate(itertools.chain.from_iterable(fours)):
            vectors.store(column, self._pointer(self.columns, ir.Constant(I64, i * LINE)), 0, LINE)
        n_tables = ir.Constant(I64, 4 + (len(fours) == TRITS))
        with cgutils.for_range(builder, n_tables) as loop:
            is_fifth = builder.icmp_unsigned("==", loop.index, ir.Constant(I64, 4))
            first = builder.select(is_fifth, ir.Constant(I64, 16), loop.index)
            step = builder.select(is_fifth, ir.Constant(I64, LINE), ir.Constant(I64, 4 * LINE))
            place = builder.add(self.columns, self._times(first, LINE))
            columns = []
            for _ in range(4):
                columns.append(
                    vectors.load(builder.inttoptr(place, I8.as_pointer()), 0, WORDS, LINE)
                )
                place = builder.add(place, step)
            self._write_table(columns, self._times(loop.index, _TABLE_BYTES))

    def _write_table(self, columns: list[Any], place: Any) -> None:
        """Write a table: an entry is one known with a smaller trit, and a column."""
        builder, vectors, table = self.builder, self.vectors, self._pointer(self.tables, place)
        first = vectors.zero(WORDS)
        for one in columns:
            first = builder.sub(first, one)
        known = {0: first}
        for f, one in enumerate(columns):
            smaller = dict(known)
            for _ in range(2):
                smaller = {
                    byte + (1 << 2 * f): builder.add(entry, one) for byte, entry in smaller.items()
                }
                known |= smaller
        for byte, entry in known.items():
            vectors.store(entry, table, byte * LINE, LINE)

    def _codes(self, record: Any, v: Any, *, has_fifth: bool) -> Any:
        """Return where a vector's codes lie as bytes of four trits, and the fifth ones."""
        start = self.layout.places["codes", 0, 0]
        place = self._pointer(record, self._sum(self._times(v, LINE), start))
        if not self.layout.trits:
            return place
        return self._opened(self.vectors.load(place, 0, BYTES, HALF_LINE), has_fifth)

    def _indices(self, codes: Any, pair: Any, *, has_fifth: bool) -> list[list[Any]]:
        """Return where the entries of two rows' bytes lie in their tables, in bytes."""
        builder, vectors = self.builder, self.vectors
        codes = builder.gep(codes, [self._times(pair, 8)])
        mask = ir.Constant(I64, 0xFF << _UP)
        eight = vectors.load(codes, 0, I64, 8)  # fewer reads than bytes
        parts = [builder.shl(eight, ir.Constant(I64, _UP))]
        parts += [builder.lshr(eight, ir.Constant(I64, 8 * i - _UP)) for i in range(1, 8)]
        parts = [builder.and_(one, mask) for one in parts]
        found = [parts[:4], parts[4:]]
        for row, own in enumerate(found if has_fifth else []):
            byte = builder.zext(vectors.load(codes, LINE + 4 * row, I8), I64)
            own.append(builder.shl(byte, ir.Constant(I64, _UP)))
        return found

    def _opened(self, codes: Any, has_fifth: bool) -> Any:
        """Return where fields lie: four trits of every byte, then every row's fifth ones."""
        builder, vectors = self.builder, self.vectors
        place = cgutils.alloca_once(builder, ir.ArrayType(BYTES, 2))
        place = builder.bitcast(place, I8.as_pointer())
        four, fifth = trit_tables()
        parts = [ir.Constant(BYTES, four[i : i + LINE]) for i in range(0, 256, LINE)]
        vectors.store(vectors.lookup_256(parts, codes), place, 0, LINE)
        if has_fifth:  # trits at the bits 0, 8, 16 and 24 go to 0, 2, 4 and 6
            last = builder.bitcast(vectors.lookup_64(ir.Constant(BYTES, fifth), codes), INTS)
            pairs = builder.or_(last, builder.lshr(last, vectors.constant(INTS, 6)))
            index = builder.or_(pairs, builder.lshr(pairs, vectors.constant(INTS, 12)))
            vectors.store(index, place, LINE, LINE)
        return place

    def _scale(self, record: Any, row: Any) -> Any:
        """Return a row's super-scale."""
        size = self.layout.scale_bytes // ROWS
        place = self._sum(self._times(row, size), self.layout.places["super", 0, 0])
        own = self.vectors.load(self._pointer(record, place), 0, HALF if size == 2 else F32, size)
        return self.vectors.broadcast(self.builder.fpext(own, F32) if size == 2 else own)

    def _finish(self, words: Any, own: Any, theirs: list[Any], sums: Any) -> None:
        """Add a row's integers, scaled, to its sums."""
        builder, vectors = self.builder, self.vectors
        for i, scale in enumerate(theirs):
            whole = builder.sext(vectors.part(words, i, len(theirs)), INTS)
            known = vectors.load(sums, i * LINE, FLOATS, LINE)
            known = vectors.fma(known, builder.fmul(own, scale), vectors.to_float(whole))
            vectors.store(known, sums, i * LINE, LINE)


@intrinsic
def _scratch(typing_context, product):
    """Return the address of memory for floats, words, columns and tables, on the stack."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        n_bytes = (3 * PANEL * ROWS + 4 * TRITS) * LINE + TRITS * _TABLE_BYTES
        return stack_memory(builder, n_bytes, LINE)

    return types.int64(product), generate


@intrinsic
def _add_block(typing_context, product, codes, scales, step, weights, tile, n_tiles, memory):
    """Add a block of columns to the sums of some tiles; addresses and numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _Stream(builder, product).add_block(*arguments[1:])
        return context.get_dummy_value()

    return types.none(product, *[types.int64] * 7), generate


@kernel()
def stream(product, arguments, thread, n_threads):
    """Multiply all tiles with vectors of tokens, one thread's part.

    `arguments`: as ``products.multiply``'s, then whether results are added. A thread's part is a
    range of pairs of a vector and a tile, vector by vector.
    """
    tile_bytes, n_tiles, n_blocks = arguments[1], arguments[2], arguments[3]
    row, step, adds = arguments[10], arguments[12], arguments[14] != 0
    n = arguments[13] // row
    groups = TOKENS // n
    n_units = arguments[11] // groups * n_tiles
    memory = _scratch(product)
    sums = as_float32(memory)
    at, end = n_units * thread // n_threads, n_units * (thread + 1) // n_threads
    while at < end:
        vector, begin = at // n_tiles, at % n_tiles
        length = min(PANEL, n_tiles - begin, end - at)
        moved = vector * groups * step
        for i in range(length * ROWS * TOKENS):
            sums[i] = 0
        for b in range(n_blocks):
            _add_block(
                product,
                arguments[4] + moved + b * 256 * n,
                arguments[5] + moved + b * n * 4,
                step,
                arguments[0] + begin * tile_bytes + b * (tile_bytes // n_blocks),
                tile_bytes,
                length,
                memory,
            )
        for tile in range(length):
            for c in range(TOKENS):
                place = (vector * TOKENS + c) * row + (begin + tile) * ROWS * 4
                out = as_float32(arguments[9] + place)
                for i in range(ROWS):
                    total = sums[(tile * ROWS + i) * TOKENS + c]
                    out[i] = out[i] + total if adds else total
        at += length
