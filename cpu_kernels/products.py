"""Products of rearranged weights and quantized activations: one kernel for every type and CPU.

The weights of a tile of 16 rows meet up to eight activations at once. For a group of columns::

    int32   sum[row]   = start + Σ code[row, column] · activation[column]       exact
    int32   total[row] += sum[row] · sub_scale[row]                              exact
    float32 out[row]   += (super_scale[row] · activation's scale) · total[row]

These are the integers of ggml's own products; floats are added up in another order. The starts are
minus the zero point times the activations' sum (``inputs``), so that codes are never shifted.

The record of a type (``tiles``) is unrolled here into straight code from its layout, for one number
of activations; numba compiles that once per layout and keeps it on disk.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from cpu_kernels._numba import kernel
from cpu_kernels.inputs import (
    KINDS,
    InputLayout,
    quantize_arguments,
    quantize_at,
    scale_columns,
)
from cpu_kernels.isa import Isa, chosen
from cpu_kernels.lookup import lookup_operation
from cpu_kernels.lookup_tiles import LookupTiles
from cpu_kernels.simd import (
    BYTES,
    F32,
    FLOATS,
    HALF,
    I8,
    I32,
    INTS,
    WORDS,
    Vectors,
    as_float32,
    source_digest,
)
from cpu_kernels.streams import TOKENS, StreamType, stream
from cpu_kernels.threads import Operation, Program, address_of
from cpu_kernels.tiles import (
    HALF_LINE,
    LINE,
    ROWS,
    TRITS,
    Layout,
    Tiles,
    aligned_bytes,
    trit_tables,
)

Floats = npt.NDArray[np.float32]
Weight = Tiles | LookupTiles  # of the two families

_IN_PLACE = 2  # activations for which sums of codes at other bits fit the registers


_VERSION = source_digest("tiles.py", "inputs.py", "products.py")
_TOGETHER = 1 << 18  # bytes of weights that meet all activations before the next are read


class ProductType(types.Type):
    """What a product is compiled for; has no value at run time."""

    def __init__(self, layout: Layout, isa: Isa, n: int, *, adds: bool = False) -> None:
        self.layout, self.isa, self.n, self.adds = layout, isa, n, adds
        super().__init__(f"product[{_VERSION}, {isa.name}, {n}, {adds}, {layout}]")


register_model(ProductType)(models.OpaqueModel)


@intrinsic
def _tile_product(
    typing_context, product, weights, codes, scales, moments, starts, sums, n_records, out, stride
):
    """Multiply one tile with n activations and write the results; all arguments are addresses."""
    integers = [types.int64] * 9

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _Product(builder, signature.args[0]).write(*arguments[1:])
        return context.get_dummy_value()

    return types.none(product, *integers), generate


class _Product:
    """Writer of the code of one tile's product."""

    def __init__(self, builder: Any, product: ProductType) -> None:
        layout, isa = product.layout, product.isa
        self.builder, self.layout, self.isa, self.n = builder, layout, isa, product.n
        self.adds = product.adds
        self.scale_columns = scale_columns(KINDS.index(layout.inputs))
        self.vectors = Vectors(builder, isa)
        # codes that stand for signed bytes: made unsigned for VNNI, which takes nothing else
        self.is_bias = isa.dot == "vnni"
        self.signed = bool(layout.levels) or layout.planes == (8,)
        plain = not layout.levels and layout.planes in ((2,), (4,))
        self.in_place = (
            plain and self.is_bias and self.n <= _IN_PLACE and (layout.spread or layout.group > 16)
        )
        if layout.trits:
            four, fifth = trit_tables()
            parts = [four[i : i + LINE] for i in range(0, 256, LINE)]
            self.four = [ir.Constant(BYTES, part) for part in parts]
            self.fifth = ir.Constant(BYTES, fifth)
        self.table = None
        if layout.levels:
            bias = 128 if self.is_bias else 0
            self.table = self.vectors.table([level + bias for level in layout.levels])

    def write(
        self,
        weights: Any,
        codes: Any,
        scales: Any,
        moments: Any,
        starts: Any,
        sums: Any,
        n_records: Any,
        out: Any,
        stride: Any,
    ) -> None:
        """Write the loop over the records."""
        builder, layout = self.builder, self.layout
        totals = [
            cgutils.alloca_once_value(builder, self.vectors.zero(FLOATS)) for _ in range(self.n)
        ]
        steps = (
            (weights, layout.record_bytes),
            (codes, layout.columns * self.n),
            (scales, max(1, layout.columns // self.scale_columns) * self.n * 4),
            (moments, max(1, layout.columns // 32) * self.n * 4),
            (starts, layout.n_groups * self.n * 4),
            (sums, layout.n_groups * self.n * 2),
        )
        with cgutils.for_range(builder, n_records) as loop:
            at = []
            for base, step in steps:
                moved = builder.mul(loop.index, ir.Constant(base.type, step))
                at.append(builder.inttoptr(builder.add(base, moved), I8.as_pointer()))
            for block in range(layout.n_blocks):
                self._block(block, totals, *at)
        for c, total in enumerate(totals):
            moved = builder.mul(stride, ir.Constant(stride.type, c))
            place = builder.inttoptr(builder.add(out, moved), I8.as_pointer())
            result = builder.load(total)
            if self.adds:
                result = builder.fadd(result, self.vectors.load(place, 0, FLOATS, 4))
            self.vectors.store(result, place, 0)

    def _block(
        self,
        block: int,
        totals: list[Any],
        weights: Any,
        codes: Any,
        scales: Any,
        moments: Any,
        starts: Any,
        sums: Any,
    ) -> None:
        """Write the product of one block of columns."""
        vectors, builder, layout, n = self.vectors, self.builder, self.layout, self.n
        per_block = layout.block // layout.group
        shifted: dict[int, list[Any]] = {}  # sums of codes that lie so many bits too high
        lowered: list[Any] = [vectors.zero(INTS)] * n
        for group in range(block * per_block, (block + 1) * per_block):
            vectors.in_order()
            found = self._group(group, weights, codes, starts)
            if layout.sub_scales:
                scale = self._sub_scale(group, weights)
                for shift, parts in found.items():
                    found[shift] = [builder.mul(one, scale) for one in parts]
            for shift, parts in found.items():
                known = shifted.get(shift)
                shifted[shift] = parts if known is None else list(map(builder.add, known, parts))
            if layout.sub_offsets and group % 2 == 0:
                pairs = self._sub_offsets(group, weights)
                for c in range(n):
                    theirs = vectors.broadcast(vectors.load(sums, (group // 2 * n + c) * 4, I32, 4))
                    lowered[c] = vectors.dot_pairs(lowered[c], pairs, theirs)
        whole = [vectors.zero(INTS)] * n
        for shift, parts in shifted.items():
            back = [builder.ashr(one, vectors.constant(INTS, shift)) for one in parts]
            whole = list(map(builder.add, whole, back))
        own = self._scale(weights, layout.places["super", block, 0])
        lowest = None
        if layout.offsets:
            lowest = self._scale(weights, layout.places["offset", block, 0])
        for c in range(n):
            place = (block * layout.block // self.scale_columns * n + c) * 4
            theirs = vectors.broadcast(vectors.load(scales, place, F32, 4))
            if layout.factor != 1:
                theirs = builder.fmul(theirs, vectors.constant(FLOATS, layout.factor))
            total = builder.load(totals[c])
            factor = builder.fmul(own, theirs)
            total = vectors.fma(total, factor, vectors.to_float(whole[c]))
            if lowest is not None and layout.sub_offsets:
                factor = builder.fmul(lowest, theirs)
                total = vectors.fma(total, factor, vectors.to_float(lowered[c]))
            elif lowest is not None:
                moment = vectors.broadcast(vectors.load(moments, place, F32, 4))
                total = vectors.fma(total, lowest, moment)
            builder.store(total, totals[c])

    def _group(self, group: int, weights: Any, codes: Any, starts: Any) -> dict[int, list[Any]]:
        """Return a group's integer sums, one vector an activation, by how far they are shifted."""
        vectors, layout, n = self.vectors, self.layout, self.n
        found: dict[int, list[Any]] = {}
        if zero_point(layout, self.isa):
            found[0] = [
                vectors.broadcast(vectors.load(starts, (group * n + c) * 4, I32, 4))
                for c in range(n)
            ]
        for four in range(group * layout.group // 4, (group + 1) * layout.group // 4):
            weight, shift = self._codes(four, weights)
            sums = found.setdefault(shift, [vectors.zero(INTS)] * n)
            for c in range(n):
                theirs = vectors.broadcast(vectors.load(codes, (four * n + c) * 4, I32, 4))
                theirs = self.builder.bitcast(theirs, BYTES)
                sums[c] = vectors.dot(sums[c], weight, theirs, signed=self.signed)
        return found

    def _codes(self, four: int, weights: Any) -> tuple[Any, int]:
        """Return the codes of four columns, or what they stand for, and how far they are shifted.

        Where bytes may be large, codes stay at their bits and their sums are shifted instead,
        which is exact.
        """
        vectors, layout = self.vectors, self.layout
        if layout.trits:
            return self._trits(four, weights)
        joined, low = None, 0
        for plane, bits in enumerate(layout.planes):
            v, field = layout.where(plane, four)
            vector = vectors.load(weights, layout.places["codes", plane, v], BYTES, HALF_LINE)
            if self.in_place:
                return vectors.field(vector, bits * field, bits, bits * field), bits * field
            part = vectors.field(vector, bits * field, bits, low)
            joined = part if joined is None else self.builder.or_(joined, part)
            low += bits
        if self.table is not None:
            return vectors.lookup(self.table, joined), 0
        if layout.planes == (8,) and not self.is_bias:
            return self.builder.xor(joined, vectors.constant(BYTES, 0x80)), 0
        return joined, 0

    def _trits(self, four: int, weights: Any) -> tuple[Any, int]:
        """Return the codes of four columns of five trits a byte, and how far they are shifted."""
        vectors = self.vectors
        v, field = self.layout.where(0, four)
        if field == 0:
            vector = vectors.load(weights, self.layout.places["codes", 0, v], BYTES, HALF_LINE)
            last = vectors.lookup_64(self.fifth, vector)
            self.opened = vectors.lookup_256(self.four, vector), last
        if field == TRITS - 1:
            return self.opened[1], 0
        shift = 2 * field if self.n <= _IN_PLACE else 0
        return vectors.field(self.opened[0], 2 * field, 2, shift), shift

    def _sub_scale(self, group: int, weights: Any) -> Any:
        """Return a group's sub-scales."""
        vectors, layout = self.vectors, self.layout
        place = layout.places["scale", group - group % 2 * layout.joined, 0]
        numbers = vectors.load(weights, place, ir.VectorType(I8, ROWS), ROWS)
        wide = vectors.widen(numbers, signed=not layout.joined)
        if not layout.joined:
            return wide
        if group % 2:
            return self.builder.lshr(wide, vectors.constant(INTS, 4))
        return self.builder.and_(wide, vectors.constant(INTS, 15))

    def _sub_offsets(self, group: int, weights: Any) -> Any:
        """Return the sub-offsets of a group and the next, pairs of 16 bits."""
        vectors, layout, builder = self.vectors, self.layout, self.builder
        place = layout.places["low", group, 0]
        if layout.joined:
            return vectors.pairs_of_nibbles(weights, place)
        numbers = vectors.load(weights, place, ir.VectorType(I8, 2 * ROWS), ROWS)
        return builder.bitcast(builder.zext(numbers, WORDS), INTS)

    def _scale(self, weights: Any, offset: int) -> Any:
        """Return 16 rows' super-scales."""
        vectors, layout = self.vectors, self.layout
        if layout.scale == "float":
            return vectors.load(weights, offset, FLOATS, ROWS)
        if layout.scale == "half":
            return vectors.half(vectors.load(weights, offset, ir.VectorType(HALF, ROWS), ROWS))
        numbers = vectors.load(weights, offset, ir.VectorType(I8, ROWS), ROWS)
        return vectors.power_of_two(vectors.widen(numbers, signed=False))


def zero_point(layout: Layout, isa: Isa) -> int:
    """Return by what the sums of the activations are multiplied to begin with; 0: begin with 0."""
    signed = bool(layout.levels) or layout.planes == (8,)
    if signed:
        return -128 if isa.dot == "vnni" else 0
    return layout.zero


@kernel()
def multiply(product, arguments, thread, n_threads):
    """Multiply one thread's tiles with groups of n activations.

    `arguments`: weights, bytes of a tile, n_tiles, n_records; codes, scales, moments, starts, sums;
    out, bytes from one activation's results to the next; number of groups, bytes from one group's
    inputs to the next, bytes from one group's results to the next.
    """
    tile_bytes, n_tiles = arguments[1], arguments[2]
    n_groups = arguments[11]
    first, end = n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads
    together = max(1, _TOGETHER // tile_bytes) if n_groups > 1 else end - first
    for begin in range(first, end, max(1, together)):
        for group in range(n_groups):
            moved = group * arguments[12]
            for tile in range(begin, min(begin + together, end)):
                _tile_product(
                    product,
                    arguments[0] + tile * tile_bytes,
                    arguments[4] + moved,
                    arguments[5] + moved,
                    arguments[6] + moved,
                    arguments[7] + moved,
                    arguments[8] + moved,
                    arguments[3],
                    arguments[9] + group * arguments[13] + tile * 64,
                    arguments[10],
                )


@kernel(reorder=True)
def _dot(a, b, n):
    total = np.float32(0)
    for i in range(n):
        total += a[i] * b[i]
    return total


@kernel()
def multiply_floats(unused, arguments, thread, n_threads):
    """Multiply one thread's rows of float32 weights with n activations.

    `arguments`: weights, n_out, n_in; inputs and outputs with the bytes from one to the next; n,
    whether results are added.
    """
    n_out, n_in = arguments[1], arguments[2]
    for row in range(n_out * thread // n_threads, n_out * (thread + 1) // n_threads):
        weights = as_float32(arguments[0] + 4 * row * n_in)
        for c in range(arguments[7]):
            found = _dot(weights, as_float32(arguments[3] + c * arguments[4]), n_in)
            out = as_float32(arguments[5] + c * arguments[6])
            out[row] = out[row] + found if arguments[8] != 0 else found


class Product:
    """One weight times up to `n` activations at a time, ready to run again and again.

    Parameters
    ----------
    tiles : the weight
    n : activations of a call
    n_threads : at most the CPUs of this process
    repeats : how often a run multiplies; timing more than one hides the start of the threads

    Attributes
    ----------
    inputs : (n, n_in) float32, to be written before a run
    outputs : (n, rows padded to 16) float32, written by a run

    Raises
    ------
    ValueError
        A count is below 1, or there are not so many CPUs.
    """

    def __init__(self, tiles: Weight, n: int = 1, n_threads: int = 1, *, repeats: int = 1) -> None:
        if n < 1:
            raise ValueError(f"product: got {n} activations, expected at least 1.")
        self.tiles, self.n = tiles, n
        self.inputs = np.zeros((n, tiles.n_in), np.float32)
        self.outputs = np.zeros((n, -(-tiles.n_out // ROWS) * ROWS), np.float32)
        self._scratch = np.zeros(256 * n_threads, np.int8)
        self._buffers: list[npt.NDArray[np.int8]] = []
        operations = [one for part in groups_of(n, chosen()) for one in self._operations(*part)]
        self._program = Program(operations * repeats, n_threads)

    def __call__(self, inputs: npt.ArrayLike) -> Floats:
        """Return the product with activations.

        Parameters
        ----------
        inputs : (n, n_in) float32

        Returns
        -------
        (n, n_out) float32, a copy

        Raises
        ------
        ValueError
            The shape is another one.
        """
        given = np.asarray(inputs, np.float32)
        if given.shape != self.inputs.shape:
            raise ValueError(
                f"product: got inputs of shape {given.shape}, expected {self.inputs.shape}."
            )
        self.inputs[:] = given
        self.run()
        return self.outputs[:, : self.tiles.n_out].copy()

    def run(self) -> None:
        """Multiply ``inputs``, into ``outputs``."""
        self._program.run()

    def _operations(self, first: int, n: int, n_groups: int) -> list[Operation]:
        """Return the two operations of some groups of n activations."""
        tiles = self.tiles
        kind = KINDS.index(tiles.layout.inputs)
        where = InputLayout(tiles.n_in, n, kind)
        buffer = aligned_bytes(where.n_bytes * n_groups)
        self._buffers.append(buffer)
        base = buffer.ctypes.data
        quantizing = quantize_arguments(self.inputs[first:], where, base, self._scratch, n_groups)
        return [
            Operation(address_of(quantize_at), quantizing),
            *operations(tiles, base, where, self.outputs[first:], n_groups, chosen()),
        ]


def operations(
    tiles: Weight,
    base: int,
    where: InputLayout,
    outputs: Floats,
    n_groups: int,
    isa: Isa,
    *,
    adds: bool = False,
    meets: bool = True,
) -> list[Operation]:
    """Return the operations that multiply a weight, compiled for its family.

    Parameters
    ----------
    tiles : the weight
    base : address of the quantized activations
    where : their layout
    outputs : (n · n_groups or more, rows padded to 16) float32, written by the operations
    n_groups : of activations
    isa : of the kernel
    adds : whether results are added to the outputs
    meets : see ``Operation``; of the last one
    """
    if isinstance(tiles, LookupTiles):
        found = lookup_operation(tiles, base, where, outputs, n_groups, isa, adds=adds)
        return [Operation(*found, meets)]
    together = TOKENS // where.n  # groups of a vector of tokens
    streamed = n_groups // together * together if tiles.streams else 0
    parts = []
    if streamed:
        code = address_of(stream, StreamType(tiles.layout, isa, where.n))
        arguments = _arguments(tiles, base, where, outputs, streamed, isa)
        is_last = streamed == n_groups
        parts.append(Operation(code, np.append(arguments, adds), meets and is_last))
        if is_last:
            return parts
    code = address_of(multiply, ProductType(tiles.layout, isa, where.n, adds=adds))
    base, outputs = base + streamed * where.n_bytes, outputs[streamed * where.n :]
    arguments = _arguments(tiles, base, where, outputs, n_groups - streamed, isa)
    return [*parts, Operation(code, arguments, meets)]


def _arguments(
    tiles: Tiles, base: int, where: InputLayout, outputs: Floats, n_groups: int, isa: Isa
) -> npt.NDArray[np.int64]:
    """Return the arguments of ``multiply``."""
    layout = tiles.layout
    zero = zero_point(layout, isa)
    starts = base + (where.sums(layout.group, zero) if zero else 0)
    sums = base + (where.sums(layout.group, 1) if layout.sub_offsets else 0)
    row = outputs.strides[0]
    return np.array(
        [
            tiles.data.ctypes.data, tiles.data.shape[1], tiles.n_tiles, tiles.n_records,
            base, base + where.scales, base + where.moments, starts, sums,
            outputs.ctypes.data, row, n_groups, where.n_bytes, where.n * row,
        ],
        np.int64,
    )  # fmt: skip


def groups_of(n: int, isa: Isa) -> list[tuple[int, int, int]]:
    """Return (first activation, activations of a group, number of groups) that make up n."""
    widest = isa.max_columns
    found = [(0, widest, n // widest)] if n >= widest else []
    rest = n % widest
    return [*found, (n - rest, rest, 1)] if rest else found
