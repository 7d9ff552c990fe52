"""Products of rearranged weights: against independent arithmetic, against ggml, on every CPU."""

import ctypes
import itertools
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llvmlite import binding as llvm
from llvmlite import ir

from cpu_kernels import isa as isas
from cpu_kernels import products, tiles
from cpu_kernels.block_formats import FORMATS
from cpu_kernels.inputs import KINDS, InputLayout
from cpu_kernels.isa import chosen
from cpu_kernels.lattice_formats import LATTICES
from cpu_kernels.products import Product, ProductType
from cpu_kernels.simd import I64
from cpu_kernels.threads import Operation, Program, address_of, available_cpus
from cpu_kernels.tiles import layout_of, rearrange
from edgeq.runtime.encoders import encode
from edgeq.runtime.products import RuntimeProduct, _libraries

T = GGMLQuantizationType
TYPES = (*FORMATS, *LATTICES)
EVERY = pytest.mark.parametrize("qtype", TYPES, ids=lambda qtype: qtype.name)
ROUNDING = 2e-6  # of the largest result: float32 sums in another order
WIDTHS = {32: (32, 96, 608), 64: (64, 192), 256: (256, 768)}


def weight_of(qtype, n_out, n_in, seed=0):
    weight = np.random.default_rng(seed).normal(size=(n_out, n_in)).astype(np.float32)
    return encode(weight * np.float32(0.02), qtype, np.ones((1, n_in), np.float32))


def inputs_of(n, n_in, seed=1):
    values = np.random.default_rng(seed).normal(size=(n, n_in)).astype(np.float32)
    values[0, 5] *= 20  # an outlier
    return values


def expected(packed, qtype, values, kind):
    """The product by gguf's decoder and float64, of activations rounded here."""
    weight = quants.dequantize(packed, qtype).astype(np.float64)
    size = 256 if kind == "Q8_K" else 32
    blocks = values.reshape(len(values), -1, size)
    if kind == "Q8_K":
        first = np.abs(blocks).argmax(axis=2, keepdims=True)
        times = np.float32(-127) / np.take_along_axis(blocks, first, 2)
        codes, scale = np.minimum(127, np.rint(times * blocks)), np.float32(1) / times
    else:
        top = np.abs(blocks).max(axis=2, keepdims=True)
        codes = np.rint(blocks * (np.float32(127) / top))
        scale = (top / np.float32(127)).astype(np.float16).astype(np.float32)
    rounded = (codes * scale).reshape(values.shape).astype(np.float64)
    found = rounded @ weight.T
    if kind == "Q8_1":  # the offset meets scale times sum, rounded to half floats
        fields, _ = FORMATS[qtype].unpack(packed)
        moment = (top[:, :, 0] / np.float32(127) * codes.sum(axis=2)).astype(np.float16)
        off = moment.astype(np.float64) - scale[:, :, 0].astype(np.float64) * codes.sum(axis=2)
        found += off @ fields.super_offset.T.astype(np.float64)
    return found


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING * np.abs(wanted).max())


@EVERY
def test_a_product_is_that_of_the_decoded_weight(qtype):
    for n_in in WIDTHS[GGML_QUANT_SIZES[qtype][0]]:
        packed, values = weight_of(qtype, 37, n_in), inputs_of(1, n_in)
        weight = rearrange(qtype, packed, chosen())
        wanted = expected(packed, qtype, values, weight.layout.inputs)
        assert_close(Product(weight)(values), wanted)


@EVERY
def test_a_product_is_ggmls(qtype):
    packed, values = weight_of(qtype, 64, 512), inputs_of(1, 512)
    with RuntimeProduct(packed, qtype, 512) as theirs:
        assert_close(Product(rearrange(qtype, packed, chosen()))(values), theirs(values))


@pytest.mark.parametrize("qtype", [T.Q4_0, T.Q4_1, T.Q2_K, T.IQ4_XS], ids=lambda one: one.name)
@pytest.mark.parametrize("n", [3, chosen().max_columns, 2 * chosen().max_columns + 1])
def test_many_activations_at_once_are_the_same_as_one_by_one(qtype, n):
    weight, values = rearrange(qtype, weight_of(qtype, 50, 768), chosen()), inputs_of(n, 768)
    alone = Product(weight)
    np.testing.assert_array_equal(
        Product(weight, n)(values), np.concatenate([alone(row[None]) for row in values])
    )


@pytest.mark.skipif(available_cpus() < 2, reason="one CPU")
@pytest.mark.parametrize("n", [1, 9])
def test_the_number_of_threads_changes_nothing(n):
    weight, values = rearrange(T.Q5_K, weight_of(T.Q5_K, 200, 512), chosen()), inputs_of(n, 512)
    np.testing.assert_array_equal(Product(weight, n, 2)(values), Product(weight, n, 1)(values))


@EVERY
def test_rearranged_weights_keep_their_size(qtype):
    layout = layout_of(qtype, chosen())
    block, size = GGML_QUANT_SIZES[qtype]
    stored = 8 * size / block
    packs_trits = qtype != T.TQ1_0 or chosen().looks_up_256
    if qtype in FORMATS and packs_trits and chosen().has_shuffle:
        assert layout.bpw <= 1.12 * stored  # NVFP4's scales double; the others stay below 1.04
    assert layout.record_bytes % tiles.HALF_LINE == 0


def test_a_byte_of_five_trits_is_told_apart():
    four, fifth = tiles.trit_tables()
    for trits in itertools.product(range(3), repeat=5):
        byte = sum(trit * value for trit, value in zip(trits, tiles._TRIT_VALUES, strict=True))
        assert byte < 256
        assert tuple(four[byte] >> 2 * i & 3 for i in range(4)) == trits[:4]
        assert fifth[byte >> 2] == trits[4]


INPUT_SIZES = {T.Q8_0: (32, 34), T.Q8_1: (32, 36), T.Q8_K: (256, 292)}  # gguf 0.19: Q8_1 as 40


class _Block(ctypes.Structure):
    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


def ggmls_inputs(values, qtype):
    """Activations by ggml's own function, the bytes of the blocks."""
    _, cpu = _libraries()
    cpu.ggml_cpu_init()
    cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_Block)
    address = cpu.ggml_get_type_traits_cpu(int(qtype)).contents.from_float
    convert = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(address)
    block, size = INPUT_SIZES[qtype]
    found = np.zeros(len(values) // block * size, np.uint8)
    convert(values.ctypes.data, found.ctypes.data, len(values))
    return found.reshape(-1, size)


MAGNITUDES = st.sampled_from([0.0, 1e-35, 1e-30, 1e-8, 1e-4, 1.0, 300.0, 1e5])


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**31), magnitudes=st.lists(MAGNITUDES, min_size=2, max_size=2))
@example(seed=3317, magnitudes=[0.0, 300.0])  # a scale next to a tie, codes whose sum is negative
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_rounded_to_ggmls_bytes(kind, seed, magnitudes):
    n_in = 512
    values = np.random.default_rng(seed).normal(size=n_in).astype(np.float32)
    values *= np.repeat(np.array(magnitudes, np.float32), 256)
    qtype = {"Q8_0": T.Q4_0, "Q8_1": T.Q4_1, "Q8_K": T.Q4_K}[kind]
    product = _product(qtype, n_in)
    product(values[None])
    where = InputLayout(n_in, 1, KINDS.index(kind))
    (buffer,) = product._buffers
    codes = buffer[:n_in].reshape(-1, where.scale_columns)
    raw = buffer.view(np.uint8)
    scales = raw[where.scales : where.scales + 4 * len(codes)].view(np.float32)
    theirs = ggmls_inputs(values, T[kind])
    if kind == "Q8_K":
        np.testing.assert_array_equal(scales, theirs[:, :4].copy().view(np.float32)[:, 0])
        np.testing.assert_array_equal(codes, theirs[:, 4:260].view(np.int8))
        return
    halves = theirs[:, :2].copy().view(np.float16)[:, 0].astype(np.float32)
    np.testing.assert_array_equal(scales, halves)
    np.testing.assert_array_equal(codes, theirs[:, -32:].view(np.int8))
    if kind == "Q8_1":
        moments = raw[where.moments : where.moments + 4 * len(codes)].view(np.float32)
        halves = theirs[:, 2:4].copy().view(np.float16)[:, 0].astype(np.float32)
        np.testing.assert_array_equal(moments, halves)


_PRODUCTS = {}


def _product(qtype, n_in):
    if qtype not in _PRODUCTS:
        _PRODUCTS[qtype] = Product(rearrange(qtype, weight_of(qtype, 16, n_in), chosen()))
    return _PRODUCTS[qtype]


def guarded(n_bytes, keep):
    """Bytes that end where a page begins that must not be touched."""
    pages = -(-n_bytes // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    keep.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    last = ctypes.c_void_p(start + (pages - 1) * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(last, mmap.PAGESIZE, 0) == 0
    end = (pages - 1) * mmap.PAGESIZE
    return np.frombuffer(memory, np.uint8)[end - n_bytes : end]


@settings(max_examples=25, deadline=None)
@given(
    qtype=st.sampled_from([T.Q4_0, T.MXFP4, T.Q3_K, T.IQ2_XS, T.TQ2_0]),
    n_out=st.integers(1, 70),
    blocks=st.integers(1, 5),
    n=st.sampled_from([1, 8]),
)
def test_nothing_is_read_or_written_beyond_the_ends(monkeypatch_module, qtype, n_out, blocks, n):
    """Weights, inputs and results end at a page that ends the process when it is touched."""
    keep = []
    n_in = blocks * GGML_QUANT_SIZES[qtype][0]
    with monkeypatch_module.context() as patch:
        patch.setattr(
            products, "aligned_bytes", lambda size: guarded(-(-size // 64) * 64, keep).view(np.int8)
        )
        patch.setattr(tiles, "aligned_bytes", lambda size: guarded(size, keep).view(np.int8))
        weight = rearrange(qtype, weight_of(qtype, n_out, n_in), chosen())
        product = Product(weight, n)
        assert np.isfinite(product(inputs_of(n, n_in))).all()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


OTHER = """
import numpy as np, sys
from gguf import GGMLQuantizationType as T
from cpu_kernels.isa import chosen
from cpu_kernels.products import Product
from cpu_kernels.tiles import rearrange
found = {}
for name in sys.argv[2:]:
    packed = np.load(f"{sys.argv[1]}/{name}.npy")
    values = np.load(f"{sys.argv[1]}/inputs.npy")
    product = Product(rearrange(T[name], packed, chosen()), len(values))
    found[name] = product(values)
np.savez(f"{sys.argv[1]}/{chosen().name}.npz", **found)
"""
ELSEWHERE = ("Q4_0", "Q8_0", "Q5_1", "Q2_K", "Q6_K", "IQ4_XS", "MXFP4", "IQ3_XXS")


@pytest.mark.parametrize("name", ["avx2", "portable"])
def test_a_lower_instruction_set_gives_the_same(name, tmp_path):
    if name not in {isa.name for isa in isas.supported()} or name == chosen().name:
        pytest.skip(f"{name} is no lower set of this CPU")
    values = inputs_of(2, 512)
    np.save(tmp_path / "inputs.npy", values)
    wanted = {}
    for one in ELSEWHERE:
        packed = weight_of(T[one], 33, 512)
        np.save(tmp_path / f"{one}.npy", packed)
        wanted[one] = Product(rearrange(T[one], packed, chosen()), 2)(values)
    run = [sys.executable, "-c", OTHER, str(tmp_path), *ELSEWHERE]
    subprocess.run(run, check=True, env={**os.environ, isas.VARIABLE: name})
    found = np.load(tmp_path / f"{name}.npz")
    for one in ELSEWHERE:
        assert_close(found[one], wanted[one])


def test_an_instruction_set_that_the_cpu_lacks_is_refused():
    run = subprocess.run(
        [sys.executable, "-c", "from cpu_kernels.isa import chosen; chosen()"],
        env={**os.environ, isas.VARIABLE: "avx1024"},
        capture_output=True,
        text=True,
    )
    assert run.returncode
    assert "EDGEQ_ISA: this CPU cannot run 'avx1024'; it can: " in run.stderr


def arm_assembly(cpu, n_arguments, write):
    """Return what LLVM makes of a function for a phone; `write` is given builder and arguments."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    kind = ir.FunctionType(ir.VoidType(), [I64] * n_arguments)
    function = ir.Function(module, kind, "written")
    builder = ir.IRBuilder(function.append_basic_block())
    write(builder, *function.args)
    builder.ret_void()
    target = llvm.Target.from_triple(module.triple)
    machine = target.create_target_machine(cpu=cpu, opt=3)
    return machine.emit_assembly(llvm.parse_assembly(str(module)))


@pytest.mark.parametrize("qtype", [T.Q4_K, T.IQ4_XS], ids=lambda one: one.name)
def test_arm_code_looks_up_and_multiplies_bytes(qtype):
    """What a phone would run, compiled here: its own instructions, no emulated ones."""
    (neon,) = isas._ARM
    kind = ProductType(layout_of(qtype, neon), neon, 1)
    assembly = arm_assembly(
        neon.cpu, 9, lambda builder, *given: products._Product(builder, kind).write(*given)
    )
    n_dots = layout_of(qtype, neon).columns // 4 * 4  # four registers of 16 bytes a vector
    assert assembly.count("\tsdot\t") == n_dots
    assert ("\ttbl\t" in assembly) == (qtype == T.IQ4_XS)
    assert "\tbl\t" not in assembly  # calls no library


@pytest.mark.parametrize(
    ("packed", "qtype", "what"),
    [
        (np.zeros((2, 18), np.int8), T.Q4_0, "got int8 of shape"),
        (np.zeros((2, 19), np.uint8), T.Q4_0, "expected rows of uint8 in blocks of 18 bytes"),
        (np.zeros(18, np.uint8), T.Q4_0, "rows of uint8"),
        (np.zeros((2, 18), np.uint8), T.F16, "no product for F16; known: Q4_0"),
        (np.full((2, 144), 0x7E, np.uint8), T.Q4_K, "a scale of this Q4_K weight is not finite"),
    ],
)
def test_weights_that_cannot_be_multiplied_are_refused(packed, qtype, what):
    with pytest.raises(ValueError, match=what):
        rearrange(qtype, packed, chosen())


def test_products_that_cannot_be_are_refused():
    weight = rearrange(T.Q8_0, weight_of(T.Q8_0, 16, 32), chosen())
    with pytest.raises(ValueError, match="got 0 activations, expected at least 1"):
        Product(weight, 0)
    with pytest.raises(ValueError, match=f"expected 1 to {available_cpus()}, the CPUs"):
        Product(weight, 1, available_cpus() + 1)
    with pytest.raises(ValueError, match=r"got inputs of shape \(1, 31\), expected \(1, 32\)"):
        Product(weight)(np.zeros((1, 31), np.float32))


def test_a_read_only_weight_is_multiplied():
    packed = weight_of(T.Q4_0, 16, 64)
    packed.flags.writeable = False
    values = inputs_of(1, 64)
    product = Product(rearrange(T.Q4_0, packed, chosen()))
    assert_close(product(values), expected(packed, T.Q4_0, values, "Q8_0"))


def test_threads_run_every_operation_in_order():
    """Two operations that write the same rows: the second sees the first everywhere."""
    weight = rearrange(T.Q8_0, weight_of(T.Q8_0, 640, 64), chosen())
    values = inputs_of(1, 64)
    once = Product(weight)(values)
    product = Product(weight, 1, min(2, available_cpus()))
    first, second = product._program._operations
    adding = address_of(products.multiply, ProductType(weight.layout, chosen(), 1, adds=True))
    twice = Program(
        [first, second, Operation(adding, second.arguments)], product._program.n_threads
    )
    product.inputs[:] = values
    for _ in range(50):
        twice.run()
        np.testing.assert_array_equal(product.outputs[:, :640], 2 * once)
