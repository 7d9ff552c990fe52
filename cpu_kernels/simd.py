"""Vectors of 64 bytes in LLVM's intermediate representation: one set of operations, every CPU.

A kernel that moves packed codes is written once, against ``Vectors``; the instruction set in use
decides what each operation becomes. Plain vector arithmetic is left to LLVM, which splits 64 bytes
into the registers that there are; only what it cannot find by itself is asked for by name: dot
products of bytes (``vpdpbusd``, ``vpmaddubsw``, ``sdot``) and table lookups (``vpshufb``, ``tbl``).
All of them give the same integers.

The small intrinsics at the end let plain numba code read and write memory by address.

Source of the instructions' names: LLVM 20 to 22, IntrinsicsX86.td and IntrinsicsAArch64.td.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from cpu_kernels.isa import Isa

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, HALF = ir.FloatType(), ir.HalfType()
BYTES, WORDS, INTS = ir.VectorType(I8, 64), ir.VectorType(I16, 32), ir.VectorType(I32, 16)
FLOATS = ir.VectorType(F32, 16)
_VNNI_TAKES_BYTES = llvm.llvm_version_info[0] >= 21


def source_digest(*names: str) -> str:
    """Return a digest of this module and others of the package.

    It is part of what a kernel is compiled for: numba's cache sees edits of one file only.
    """
    folder = Path(__file__).parent
    parts = [(folder / name).read_bytes() for name in ("simd.py", *names)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


Value = Any  # llvmlite's values are untyped


class Addresses:
    """Arithmetic with addresses and numbers of 64 bits, for writers of code."""

    def __init__(self, builder: Value) -> None:
        self.builder = builder

    def _times(self, number: Value, factor: int) -> Value:
        return self.builder.mul(number, ir.Constant(I64, factor))

    def _sum(self, number: Value, other: int) -> Value:
        return self.builder.add(number, ir.Constant(I64, other))

    def _pointer(self, base: Value, moved: Value) -> Value:
        return self.builder.inttoptr(self.builder.add(base, moved), I8.as_pointer())


def stack_memory(builder: Value, n_bytes: int, align: int) -> Value:
    """Return the address of memory on a function's stack; what is in it is undefined."""
    with builder.goto_entry_block():  # numba's own function would fill it byte by byte
        memory = builder.alloca(ir.ArrayType(I8, n_bytes))
    memory.align = align
    return builder.ptrtoint(memory, I64)


class Vectors:
    """Operations on vectors, written at a builder's place.

    Parameters
    ----------
    builder : llvmlite's, inside a function
    isa : what the operations become
    """

    def __init__(self, builder: Any, isa: Isa) -> None:
        self.builder = builder
        self.isa = isa

    # memory ------------------------------------------------------------------------------------
    def load(self, pointer: Value, offset: int, kind: Any, align: int = 1) -> Value:
        """Read a vector or number `offset` bytes behind a pointer to bytes."""
        typed = self._at(pointer, offset, kind)
        return self.builder.load(typed, align=align)

    def store(self, value: Value, pointer: Value, offset: int, align: int = 4) -> None:
        """Write a vector or number `offset` bytes behind a pointer to bytes."""
        self.builder.store(value, self._at(pointer, offset, value.type), align=align)

    def in_order(self) -> None:
        """Keep LLVM from moving reads across this place: memory is read strictly forward."""
        kind = ir.FunctionType(ir.VoidType(), [])
        self.builder.asm(kind, "", "~{memory}", [], True)

    def _at(self, pointer: Value, offset: int, kind: Any) -> Value:
        moved = self.builder.gep(pointer, [ir.Constant(I64, offset)]) if offset else pointer
        return self.builder.bitcast(moved, kind.as_pointer())

    # constants, lanes --------------------------------------------------------------------------
    def zero(self, kind: Any) -> Value:
        """Return zeros."""
        return ir.Constant(kind, None)

    def constant(self, kind: Any, value: float) -> Value:
        """Return one number in all lanes."""
        return ir.Constant(kind, [value] * kind.count)

    def broadcast(self, scalar: Value, count: int = 16) -> Value:
        """Return a number in all lanes."""
        kind = ir.VectorType(scalar.type, count)
        empty = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(empty, scalar, ir.Constant(I32, 0))
        mask = ir.Constant(ir.VectorType(I32, count), [0] * count)
        return self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), mask)

    def table(self, values: Sequence[int]) -> Value:
        """Return up to 16 bytes, repeated in every 16 bytes of a vector."""
        padded = [*values, *[0] * (16 - len(values))]
        return ir.Constant(BYTES, [value & 0xFF for value in padded] * 4)

    # integers ----------------------------------------------------------------------------------
    def field(self, codes: Value, shift: int, bits: int, to: int = 0) -> Value:
        """Return `bits` bits of every byte, from bit `shift` on, moved to bit `to`."""
        if bits == 8:
            return codes
        words = self.builder.bitcast(codes, WORDS)
        if shift > to:
            words = self.builder.lshr(words, self.constant(WORDS, shift - to))
        elif shift < to:
            words = self.builder.shl(words, self.constant(WORDS, to - shift))
        mask = self.constant(BYTES, ((1 << bits) - 1) << to)
        return self.builder.and_(self.builder.bitcast(words, BYTES), mask)

    def widen(self, numbers: Value, *, signed: bool) -> Value:
        """Return 16 bytes as 16 integers of 32 bits."""
        extend = self.builder.sext if signed else self.builder.zext
        return extend(numbers, INTS)

    def pairs_of_nibbles(self, pointer: Value, offset: int) -> Value:
        """Return the halves of 16 bytes in memory as pairs of 16 bits, the lower half first."""
        numbers = self.load(pointer, offset, ir.VectorType(I8, 16), 16)
        wide = self.widen(numbers, signed=False)
        both = self.builder.or_(wide, self.builder.shl(wide, self.constant(INTS, 12)))
        return self.builder.and_(both, self.constant(INTS, 0x000F000F))

    def lookup(self, table: Value, indices: Value) -> Value:
        """Return bytes of a table of 16 (see ``table``) at indices below 16."""
        if self.isa.vector_bytes == 64:
            return self._call("llvm.x86.avx512.pshuf.b.512", BYTES, [table, indices])
        if self.isa.vector_bytes == 32:
            name = "llvm.x86.avx2.pshuf.b"
        elif self.isa.has_shuffle:
            name = "llvm.aarch64.neon.tbl1.v16i8"
        else:
            raise ValueError(f"lookup: {self.isa.name} has no shuffle of bytes.")
        return self._in_parts(name, [table, indices])

    def lookup_256(self, tables: Sequence[Value], indices: Value) -> Value:
        """Return bytes of a table of 256, four vectors, at any indices."""
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        low, high = (self._call(name, BYTES, [tables[i], indices, tables[i + 1]]) for i in (0, 2))
        is_high = self.builder.icmp_signed("<", indices, self.zero(BYTES))
        return self.builder.select(is_high, high, low)

    def lookup_64(self, table: Value, indices: Value) -> Value:
        """Return bytes of a table of 64 at the highest six bits of indices."""
        words = self.builder.bitcast(indices, WORDS)
        words = self.builder.lshr(words, self.constant(WORDS, 2))  # the lowest six bits count
        places = self.builder.bitcast(words, BYTES)
        return self._call("llvm.x86.avx512.permvar.qi.512", BYTES, [table, places])

    def store_table(self, sums: Value, pointer: Value, offset: int) -> None:
        """Write a table of 32 words as ``look_up_words`` reads it: low and high bytes apart."""
        if self.isa.vector_bytes == 64 or not self.isa.has_shuffle:
            self.store(sums, pointer, offset, 64)
            return
        half = ir.VectorType(I8, 32)
        high = self.builder.lshr(sums, self.constant(WORDS, 8))
        self.store(self.builder.trunc(sums, half), pointer, offset, 32)
        self.store(self.builder.trunc(high, half), pointer, offset + 32, 32)

    def look_up_words(
        self, pointer: Value, offset: int, indices: Sequence[Value], bits: int
    ) -> list[Value]:
        """Return parts of the words of a table of 32 at two vectors of indices.

        Words that need no parts are returned as they are. Where bytes are looked up, parts are the
        low bytes of both vectors, those of the second alone, and the high bytes: so they are added
        up, the last as bytes, and ``joined`` in the end. What overflows is of no account.

        Parameters
        ----------
        pointer, offset : of the table, see ``store_table``
        indices : words, whose lowest `bits` bits count
        bits : 5; or 4, where the table's second half is its first
        """
        if self.isa.vector_bytes == 64:
            table = self.load(pointer, offset, WORDS, 64)
            name = "llvm.x86.avx512.permvar.hi.512"
            return [self._call(name, WORDS, [table, one]) for one in indices]
        mask = self.constant(WORDS, (1 << bits) - 1)
        first, second = (self.builder.and_(one, mask) for one in indices)
        if not self.isa.has_shuffle:
            return [self._fetched(pointer, offset, one) for one in (first, second)]
        both = self.builder.or_(first, self.builder.shl(second, self.constant(WORDS, 8)))
        places = self.builder.bitcast(both, BYTES)
        low, high = (self._look_up_32(pointer, offset + at, places, bits) for at in (0, 32))
        low = self.builder.bitcast(low, WORDS)
        return [low, self.builder.lshr(low, self.constant(WORDS, 8)), high]

    def part_types(self) -> list[Any]:
        """Return the types of what ``look_up_words`` returns."""
        in_bytes = self.isa.has_shuffle and self.isa.vector_bytes < 64
        return [WORDS, WORDS, BYTES] if in_bytes else [WORDS, WORDS]

    def joined(self, parts: Sequence[Value]) -> list[Value]:
        """Return sums of parts as sums of words, for both vectors of indices."""
        if len(parts) == 2:
            return list(parts)
        both, second, high = parts
        eight = self.constant(WORDS, 8)
        high = self.builder.bitcast(high, WORDS)
        first = self.builder.sub(both, self.builder.shl(second, eight))
        upper = self.builder.and_(high, self.constant(WORDS, 0xFF00))
        return [
            self.builder.add(first, self.builder.shl(high, eight)),
            self.builder.add(second, upper),
        ]

    def _look_up_32(self, pointer: Value, offset: int, places: Value, bits: int) -> Value:
        """Return bytes of a table of 32; a shuffle gives 0 for a place that is not its own."""
        halves = []
        for first in range(0, 1 << bits, 16):
            line = self.load(pointer, offset + first, ir.VectorType(I8, 16), 16)
            lanes = ir.Constant(ir.VectorType(I32, 64), list(range(16)) * 4)
            table = self.builder.shuffle_vector(line, ir.Constant(line.type, ir.Undefined), lanes)
            own = self.builder.xor(places, self.constant(BYTES, first)) if first else places
            if bits > 4 and self.isa.vector_bytes == 32:  # its highest bit makes it 0
                own = self.builder.add(own, self.constant(BYTES, 0x70))
            halves.append(self.lookup(table, own))
        return halves[0] if bits == 4 else self.builder.or_(*halves)

    def _fetched(self, pointer: Value, offset: int, indices: Value) -> Value:
        """Return words of a table, read one by one."""
        found = ir.Constant(WORDS, ir.Undefined)
        for lane in range(32):
            number = ir.Constant(I32, lane)
            index = self.builder.zext(self.builder.extract_element(indices, number), I64)
            moved = self.builder.gep(pointer, [self.builder.shl(index, ir.Constant(I64, 1))])
            found = self.builder.insert_element(found, self.load(moved, offset, I16, 2), number)
        return found

    def dot(self, total: Value, weights: Value, inputs: Value, *, signed: bool) -> Value:
        """Add to 16 integers the dot products of 16 times four bytes.

        Parameters
        ----------
        total : 16 integers of 32 bits
        weights : 64 bytes; below 64 where they are unsigned, at most ±127 where they are signed.
            With "vnni" they are always unsigned: callers add 128 and take it off the sum
        inputs : 64 signed bytes, at most ±127
        signed : whether the weights are
        """
        if self.isa.dot == "vnni":
            return self._vnni(total, weights, inputs)
        if self.isa.dot == "maddubs":
            if signed:  # |w| times the input with w's sign
                inputs = self._in_parts("llvm.x86.avx2.psign.b", [inputs, weights])
                weights = self._absolute(weights)
            pairs = self._in_parts("llvm.x86.avx2.pmadd.ub.sw", [weights, inputs], WORDS)
            ones = self.constant(WORDS, 1)
            sums = self._in_parts("llvm.x86.avx2.pmadd.wd", [pairs, ones], INTS)
            return self.builder.add(total, sums)
        if self.isa.dot == "sdot":
            return self._in_parts("llvm.aarch64.neon.sdot.v4i32.v16i8", [total, weights, inputs])
        return self._plain_dot(total, weights, inputs, signed=signed)

    def dot_pairs(self, total: Value, a: Value, b: Value) -> Value:
        """Add to 16 integers the dot products of 16 times two signed numbers of 16 bits.

        `a` and `b` are 16 integers that hold the pairs.
        """
        if self.isa.vector_bytes >= 32:
            words = [self.builder.bitcast(one, WORDS) for one in (a, b)]
            if self.isa.vector_bytes == 64:
                name, takes = "llvm.x86.avx512.vpdpwssd.512", [a, b]
                if _VNNI_TAKES_BYTES:
                    takes = words
                return self._call(name, INTS, [total, *takes])
            sums = self._in_parts("llvm.x86.avx2.pmadd.wd", words, INTS)
            return self.builder.add(total, sums)
        sixteen = self.constant(INTS, 16)
        for is_low in (True, False):
            numbers = [self.builder.shl(x, sixteen) if is_low else x for x in (a, b)]
            numbers = [self.builder.ashr(x, sixteen) for x in numbers]
            total = self.builder.add(total, self.builder.mul(*numbers))
        return total

    def _vnni(self, total: Value, weights: Value, inputs: Value) -> Value:
        bits = 8 * self.isa.vector_bytes
        arguments = [total, weights, inputs]
        if not _VNNI_TAKES_BYTES:
            arguments[1:] = [self.builder.bitcast(value, INTS) for value in arguments[1:]]
        name = f"llvm.x86.avx512.vpdpbusd.{bits}"
        if bits == 512:
            return self._call(name, INTS, arguments)
        return self._in_parts(name, arguments)

    def _plain_dot(self, total: Value, weights: Value, inputs: Value, *, signed: bool) -> Value:
        wide = ir.VectorType(I16, 64)
        extend = self.builder.sext if signed else self.builder.zext
        products = self.builder.mul(extend(weights, wide), self.builder.sext(inputs, wide))
        for first in range(4):
            every = ir.Constant(INTS, list(range(first, 64, 4)))
            part = self.builder.shuffle_vector(products, ir.Constant(wide, ir.Undefined), every)
            total = self.builder.add(total, self.builder.sext(part, INTS))
        return total

    def _absolute(self, numbers: Value) -> Value:
        negative = self.builder.icmp_signed("<", numbers, self.zero(BYTES))
        return self.builder.select(negative, self.builder.neg(numbers), numbers)

    # floats ------------------------------------------------------------------------------------
    def to_float(self, integers: Value) -> Value:
        """Return integers as floats."""
        return self.builder.sitofp(integers, FLOATS)

    def to_integer(self, floats: Value) -> Value:
        """Return floats as integers, rounded to the nearest, ties to even."""
        nearest = self._call("llvm.rint.v16f32", FLOATS, [floats])
        return self.builder.fptosi(nearest, INTS)

    def reduce(self, how: str, integers: Value) -> Value:
        """Return the sum ("add") or the largest ("smax") of 16 integers."""
        return self._call(f"llvm.vector.reduce.{how}.v16i32", I32, [integers])

    def half(self, halves: Value) -> Value:
        """Return 16 half floats as floats."""
        return self.builder.fpext(halves, FLOATS)

    def power_of_two(self, exponents: Value) -> Value:
        """Return 2**(e − 127) of 16 integers from 1 to 254; 0 of 0."""
        bits = self.builder.shl(exponents, self.constant(INTS, 23))
        return self.builder.bitcast(bits, FLOATS)

    def fma(self, total: Value, a: Value, b: Value) -> Value:
        """Return total + a · b, rounded once where the CPU can."""
        if self.isa.dot == "plain":
            return self.builder.fadd(total, self.builder.fmul(a, b))
        return self._call("llvm.fma.v16f32", FLOATS, [a, b, total])

    # calls -------------------------------------------------------------------------------------
    def _function(self, name: str, returns: Any, takes: Sequence[Any]) -> Any:
        return cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(returns, takes), name
        )

    def _call(self, name: str, returns: Any, arguments: Sequence[Value]) -> Value:
        function = self._function(name, returns, [value.type for value in arguments])
        return self.builder.call(function, arguments)

    def _in_parts(self, name: str, arguments: Sequence[Value], returns: Any = None) -> Value:
        """Call an instruction of a smaller register on every part of the vectors."""
        returns = returns or arguments[0].type
        n_parts = 64 // self.isa.vector_bytes
        part_type = ir.VectorType(returns.element, returns.count // n_parts)
        cut = [[self.part(value, i, n_parts) for value in arguments] for i in range(n_parts)]
        parts = [self._call(name, part_type, one) for one in cut]
        while len(parts) > 1:
            parts = [self.join(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
        return parts[0]

    def part(self, value: Value, i: int, n_parts: int) -> Value:
        """Return one of so many parts of a vector."""
        count = value.type.count // n_parts
        lanes = ir.Constant(ir.VectorType(I32, count), list(range(i * count, (i + 1) * count)))
        undefined = ir.Constant(value.type, ir.Undefined)
        return self.builder.shuffle_vector(value, undefined, lanes)

    def side_by_side(self, first: Value, second: Value, half: int) -> Value:
        """Return the words of half of two vectors, those of a lane together, as integers."""
        lanes = [lane + 32 * i for lane in range(16 * half, 16 * half + 16) for i in range(2)]
        places = ir.Constant(ir.VectorType(I32, 32), lanes)
        return self.builder.bitcast(self.builder.shuffle_vector(first, second, places), INTS)

    def join(self, low: Value, high: Value) -> Value:
        """Return the lanes of two vectors, one after the other."""
        lanes = list(range(2 * low.type.count))
        return self.builder.shuffle_vector(
            low, high, ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
        )


def _pointer_intrinsic(kind: types.Type) -> Any:
    @intrinsic
    def cast(typing_context: Any, address: types.Integer) -> Any:
        del typing_context

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate  # type: ignore[attr-defined]

    return cast


as_float32 = _pointer_intrinsic(types.float32)
as_int64 = _pointer_intrinsic(types.int64)
as_int32 = _pointer_intrinsic(types.int32)
as_int16 = _pointer_intrinsic(types.int16)
as_int8 = _pointer_intrinsic(types.int8)


@intrinsic
def bits_of(typing_context: Any, number: types.Float) -> Any:
    """Return a float32's bits, int32."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), generate


@intrinsic
def float_of(typing_context: Any, bits: types.Integer) -> Any:
    """Return the float32 of bits."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), generate


@intrinsic
def add_and_fetch(typing_context: Any, address: types.Integer, amount: types.Integer) -> Any:
    """Add to an int64 in memory and return what it was, as one step for all threads."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def fetch(typing_context: Any, address: types.Integer) -> Any:
    """Read an int64 that another thread writes."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Value:
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def call(
    typing_context: Any,
    function: types.Integer,
    arguments: types.Integer,
    thread: types.Integer,
    n_threads: types.Integer,
) -> Any:
    """Call a compiled operation ``f(nothing, arguments, thread, n_threads)`` by its address."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        kind = ir.FunctionType(ir.VoidType(), [I64] * 4)
        pointer = builder.inttoptr(given[0], kind.as_pointer())
        builder.call(pointer, [ir.Constant(I64, 0), *given[1:]])
        return context.get_dummy_value()

    return types.none(*[types.int64] * 4), generate


@intrinsic
def give_way(typing_context: Any) -> Any:
    """Let another thread of this CPU run, where one waits (``sched_yield``)."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        if os.name != "posix":  # waits at full speed
            return ir.Constant(I32, 0)
        kind = ir.FunctionType(I32, [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])

    return types.int32(), generate
