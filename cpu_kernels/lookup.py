"""Products by lookup: one kernel for every kind of table and CPU (weights: ``lookup_tiles``).

For a block of columns, one thread makes the tables of all its groups, then adds up what the
indices of all rows of a panel find in them::

    int16   sum[row]  = start + Σ planes 2**p · Σ groups table[group][index]      exact
    float32 out[row] += (super_scale[row] · activation's scale) · sum[row]

16 bits are enough: a block's sum is at most 8 · 127 · 32 (Q4_0) or 127 · 256, and what overflows on
the way comes back. Q2_K's are sums over 16 columns; those of two such groups, side by side, are
multiplied by their sub-scales and added up in 32 bits. These are the integers and floats of
``products``, in the same order.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from cpu_kernels._numba import kernel
from cpu_kernels.inputs import InputLayout
from cpu_kernels.isa import Isa
from cpu_kernels.lookup_tiles import PANEL, TALL, LookupLayout, LookupTiles, sums_of
from cpu_kernels.simd import (
    F32,
    FLOATS,
    HALF,
    I8,
    I16,
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
from cpu_kernels.threads import address_of
from cpu_kernels.tiles import HALF_LINE, LINE, ROWS

_VERSION = source_digest("inputs.py", "lookup_tiles.py", "lookup.py")


class LookupType(types.Type):
    """What a lookup is compiled for; has no value at run time."""

    def __init__(self, layout: LookupLayout, isa: Isa, n: int) -> None:
        self.layout, self.isa, self.n = layout, isa, n
        super().__init__(f"lookup[{_VERSION}, {isa.name}, {n}, {layout}]")


register_model(LookupType)(models.OpaqueModel)


class _Lookup(Addresses):
    """Writer of the code of tables and of one record's sums."""

    def __init__(self, builder: Any, product: LookupType) -> None:
        super().__init__(builder)
        self.layout, self.n = product.layout, product.n
        self.vectors = Vectors(builder, product.isa)

    def write_tables(self, codes: Any, tables: Any) -> None:
        """Write the tables of a block's groups, n after one another, a line each.

        The last group of three reads two columns behind the block; no index lets them count.
        """
        builder, vectors, n = self.builder, self.vectors, self.n
        signs = [ir.Constant(WORDS, list(row)) for row in sums_of(self.layout.kind).tolist()]
        with cgutils.for_range(builder, ir.Constant(I64, self.layout.n_groups)) as loop:
            for c in range(n):
                total = None
                for j, own in enumerate(signs):
                    column = self._sum(self._times(loop.index, len(signs)), j)
                    four = builder.lshr(column, ir.Constant(I64, 2))
                    place = self._sum(self._times(four, 4 * n), 4 * c)
                    place = builder.add(place, builder.and_(column, ir.Constant(I64, 3)))
                    number = vectors.load(self._pointer(codes, place), 0, I8)
                    part = vectors.broadcast(builder.sext(number, I16), 32)
                    part = builder.mul(part, own)
                    total = part if total is None else builder.add(total, part)
                target = self._pointer(tables, self._times(loop.index, n * LINE))
                vectors.store_table(total, target, c * LINE)

    def add_block(
        self, record: Any, tables: Any, starts: Any, scales: Any, lows: Any, sums: Any
    ) -> None:
        """Add a record's product to the sums, 64 rows for each activation."""
        head = self._sum(record, self.layout.head)
        record, starts, scales, sums = (
            self._pointer(one, ir.Constant(I64, 0)) for one in (record, starts, scales, sums)
        )
        if self.layout.has_subs:
            wholes, lowered = self._pairs_of_spans(head, tables, lows)
        else:
            words = self._words(head, tables)
            wholes, lowered = [self._integers(c, own, starts) for c, own in enumerate(words)], []
        for c, whole in enumerate(wholes):
            self._finish(c, whole, lowered[c] if lowered else None, record, scales, sums)

    def _words(self, vectors: Any, tables: Any) -> list[list[Any]]:
        """Return what a span's indices find, words of 64 rows for each activation."""
        builder, layout, n = self.builder, self.layout, self.n
        zeros = [self.vectors.zero(kind) for kind in self.vectors.part_types()]
        totals = [[cgutils.alloca_once_value(builder, zero) for zero in zeros] for _ in range(n)]
        groups, n_vectors = layout.unit
        n_units = layout.span_groups // groups
        for plane in range(layout.planes):
            for slot in [slot for pair in totals for slot in pair] if plane else []:
                known = builder.load(slot)
                builder.store(builder.add(known, known), slot)
            start = plane * layout.plane_vectors * LINE
            with cgutils.for_range(builder, ir.Constant(I64, n_units)) as loop:
                place = self._sum(self._times(loop.index, n_vectors * LINE), start)
                table = self._times(loop.index, groups * n * LINE)
                self._unit(
                    self._pointer(vectors, place), self._pointer(tables, table), groups, totals
                )
            if layout.rest[0]:
                place = ir.Constant(I64, start + n_units * n_vectors * LINE)
                table = ir.Constant(I64, n_units * groups * n * LINE)
                own = self._pointer(vectors, place), self._pointer(tables, table)
                self._unit(*own, layout.rest[0], totals)
        return [self.vectors.joined([builder.load(slot) for slot in own]) for own in totals]

    def _integers(self, c: int, words: list[Any], starts: Any) -> list[Any]:
        """Return one activation's words as integers, what code 0 stands for included."""
        vectors, found = self.vectors, []
        for total in words:
            if self.layout.zero:
                start = self.builder.trunc(vectors.load(starts, 4 * c, I32, 4), I16)
                total = self.builder.add(total, vectors.broadcast(start, 32))
            parts = [vectors.part(total, i, 2) for i in range(2)]
            found += [self.builder.sext(part, INTS) for part in parts]
        return found

    def _pairs_of_spans(
        self, record: Any, tables: Any, lows: Any
    ) -> tuple[list[list[Any]], list[list[Any]]]:
        """Return a block's integers: times sub-scales, and activations' sums times sub-offsets."""
        builder, vectors, layout, n = self.builder, self.vectors, self.layout, self.n
        wholes, lowered = self._slots(), self._slots()
        codes_bytes = layout.planes * layout.plane_vectors * LINE
        n_pairs = layout.block // layout.span // 2
        with cgutils.for_range(builder, ir.Constant(I64, n_pairs)) as loop:
            subs = builder.add(record, self._times(loop.index, 2 * layout.span_bytes))
            table = builder.add(tables, self._times(loop.index, 2 * layout.span_groups * n * LINE))
            found = [
                self._words(
                    self._sum(subs, 2 * LINE + i * codes_bytes),
                    self._sum(table, i * layout.span_groups * n * LINE),
                )
                for i in range(2)
            ]
            at = self._pointer(subs, ir.Constant(I64, 0))
            theirs = self._pointer(lows, self._times(loop.index, 4 * n))
            for part in range(4):
                scales, offsets = (
                    vectors.pairs_of_nibbles(at, i * LINE + part * ROWS) for i in range(2)
                )
                for c in range(n):
                    first, second = (words[c][part // 2] for words in found)
                    both = vectors.side_by_side(first, second, part % 2)
                    self._add_pairs(wholes[c][part], both, scales)
                    low = vectors.broadcast(vectors.load(theirs, 4 * c, I32, 4))
                    self._add_pairs(lowered[c][part], offsets, low)
        return self._loaded(wholes), self._loaded(lowered)

    def _slots(self) -> list[list[Any]]:
        """Return memory for 64 rows' integers of each activation, zeros."""
        zero = self.vectors.zero(INTS)
        rows = range(TALL // ROWS)
        return [
            [cgutils.alloca_once_value(self.builder, zero) for _ in rows] for _ in range(self.n)
        ]

    def _loaded(self, slots: list[list[Any]]) -> list[list[Any]]:
        return [[self.builder.load(slot) for slot in own] for own in slots]

    def _add_pairs(self, slot: Any, a: Any, b: Any) -> None:
        total = self.vectors.dot_pairs(self.builder.load(slot), a, b)
        self.builder.store(total, slot)

    def _unit(self, record: Any, tables: Any, groups: int, totals: list[list[Any]]) -> None:
        """Look the indices of some vectors up."""
        vectors, builder = self.vectors, self.builder
        vectors.in_order()
        is_bits = self.layout.kind == "bits"
        fields = self._bits(record) if is_bits else self._fives(record, 2 * groups)
        for group in range(groups):
            for c in range(self.n):
                found = vectors.look_up_words(
                    tables, (group * self.n + c) * LINE, fields[2 * group : 2 * group + 2],
                    4 if is_bits else 5,
                )  # fmt: skip
                for slot, one in zip(totals[c], found, strict=True):
                    builder.store(builder.add(builder.load(slot), one), slot)

    def _bits(self, record: Any) -> list[Any]:
        words = self.vectors.load(record, 0, WORDS, HALF_LINE)
        return [self._down(words, shift) for shift in (0, 8, 4, 12)]

    def _fives(self, record: Any, n_fields: int) -> list[Any]:
        """Return fields of five bits, whatever lies above them."""
        vectors = self.vectors
        fields, last = [], None
        for i in range(-(-min(n_fields, 15) // 3)):
            words = vectors.load(record, i * LINE, WORDS, HALF_LINE)
            third = self._selected(words, self._down(words, 11), (1 << i) - 1)
            fields += [self._down(words, i + 1), self._down(words, i + 6), third]
            last = words if last is None else self._selected(words, last, 1 << i)
        return [*fields, last][:n_fields] if n_fields == 16 else fields[:n_fields]

    def _selected(self, words: Any, others: Any, mask: int) -> Any:
        """Return the bits of a mask of some words, and the other bits of others."""
        builder, vectors = self.builder, self.vectors
        kept = builder.and_(words, vectors.constant(WORDS, mask))
        return builder.or_(kept, builder.and_(others, vectors.constant(WORDS, 0xFFFF & ~mask)))

    def _finish(
        self, c: int, wholes: list[Any], lowered: list[Any] | None, record: Any, scales: Any,
        sums: Any,
    ) -> None:  # fmt: skip
        """Add one activation's integers, scaled, to its sums."""
        builder, vectors = self.builder, self.vectors
        theirs = vectors.broadcast(vectors.load(scales, 4 * c, F32, 4))
        for part, whole in enumerate(wholes):
            place = (c * TALL + part * ROWS) * 4
            known = vectors.load(sums, place, FLOATS, LINE)
            factor = builder.fmul(self._scales(record, part), theirs)
            known = vectors.fma(known, factor, vectors.to_float(whole))
            if lowered is not None:
                factor = builder.fmul(self._scales(record, TALL // ROWS + part), theirs)
                known = vectors.fma(known, factor, vectors.to_float(lowered[part]))
            vectors.store(known, sums, place, LINE)

    def _scales(self, record: Any, part: int) -> Any:
        """Return 16 rows' super-scales; behind the 64th of them, super-offsets."""
        place = part * ROWS * self.layout.scale_size
        if self.layout.scale_size == 4:
            return self.vectors.load(record, place, FLOATS, ROWS)
        halves = self.vectors.load(record, place, ir.VectorType(HALF, ROWS), ROWS)
        return self.vectors.half(halves)

    def _down(self, words: Any, shift: int) -> Any:
        return self.builder.lshr(words, self.vectors.constant(WORDS, shift)) if shift else words


@intrinsic
def _scratch(typing_context, product):
    """Return the address of memory for the sums of a panel and the tables, on the stack."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        n_bytes = (PANEL * TALL * 4 + product.layout.n_groups * LINE) * product.n
        return stack_memory(builder, n_bytes, LINE)

    return types.int64(product), generate


@intrinsic
def _write_tables(typing_context, product, codes, tables):
    """Write a block's tables."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _Lookup(builder, product).write_tables(*arguments[1:])
        return context.get_dummy_value()

    return types.none(product, types.int64, types.int64), generate


@intrinsic
def _add_block(typing_context, product, record, tables, starts, scales, lows, sums):
    """Add a record's product to sums; all arguments are addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _Lookup(builder, product).add_block(*arguments[1:])
        return context.get_dummy_value()

    return types.none(product, *[types.int64] * 6), generate


@kernel()
def look_up(product, arguments, thread, n_threads):
    """Multiply one thread's tiles with groups of n activations; see ``lookup_operation``."""
    n_tiles, n_blocks, n, block = arguments[1], arguments[2], arguments[3], arguments[4]
    record_bytes, adds = arguments[5], arguments[6] != 0
    first, end = n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads
    n_panels = (end + PANEL - 1) // PANEL if end > first else 0  # a thread may have no tile
    at = _scratch(product)
    sums, tables = as_float32(at), at + PANEL * TALL * 4 * n
    for panel in range(first // PANEL, n_panels):
        begin = panel * PANEL
        length = min(PANEL, n_tiles - begin)
        low, high = max(first - begin, 0), min(end - begin, length)
        for group in range(arguments[13]):
            moved = group * arguments[14]
            for i in range((high - low) * TALL * n):
                sums[i] = 0
            for b in range(n_blocks):
                _write_tables(product, arguments[7] + moved + b * block * n, tables)
                place = arguments[0] + (begin * n_blocks + b * length) * record_bytes
                for tile in range(low, high):
                    _add_block(
                        product,
                        place + tile * record_bytes,
                        tables,
                        arguments[8] + moved + b * n * 4,
                        arguments[9] + moved + b * n * 4,
                        arguments[16] + moved + b * (block // 32) * n * 4,
                        at + (tile - low) * TALL * n * 4,
                    )
            for c in range(n):
                out = as_float32(arguments[10] + group * arguments[12] + c * arguments[11])
                for row in range((begin + low) * TALL, min((begin + high) * TALL, arguments[15])):
                    tile, i = row // TALL - begin - low, row % TALL
                    total = sums[(tile * n + c) * TALL + i]
                    out[row] = out[row] + total if adds else total


def lookup_operation(
    tiles: LookupTiles,
    base: int,
    where: InputLayout,
    outputs: npt.NDArray[np.float32],
    n_groups: int,
    isa: Isa,
    *,
    adds: bool,
) -> tuple[int, npt.NDArray[np.int64]]:
    """Return code and arguments of an operation; parameters as ``products.operation``'s."""
    layout, row = tiles.layout, outputs.strides[0]
    starts = base + (where.sums(layout.block, layout.zero) if layout.zero else 0)
    lows = base + (where.sums(layout.span, 1) if layout.has_subs else 0)
    arguments = np.array(
        [
            tiles.data.ctypes.data, tiles.n_tiles, tiles.n_in // layout.block, where.n,
            layout.block, layout.record_bytes, adds, base, starts, base + where.scales,
            outputs.ctypes.data, row, where.n * row, n_groups, where.n_bytes, tiles.n_out,
            lows,
        ],
        np.int64,
    )  # fmt: skip
    return address_of(look_up, LookupType(layout, isa, where.n)), arguments
