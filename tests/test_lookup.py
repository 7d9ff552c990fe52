"""Products by lookup: the other family's results to the last bit, on every CPU; which is chosen."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels import choice, lookup, lookup_tiles, products, sherry, tiles
from cpu_kernels import isa as isas
from cpu_kernels.block_formats import FORMATS
from cpu_kernels.inputs import KINDS, InputLayout
from cpu_kernels.isa import chosen
from cpu_kernels.lookup_tiles import PANEL, TALL, lookup_layout_of, rearrange_for_lookup
from cpu_kernels.products import Product
from cpu_kernels.threads import Program, available_cpus
from cpu_kernels.tiles import rearrange
from tests.command_line import refused
from tests.test_products import arm_assembly, assert_close, expected, guarded, inputs_of

T = GGMLQuantizationType
TYPES = (T.Q4_0, T.Q2_K, T.TQ1_0, T.TQ2_0)
EVERY = pytest.mark.parametrize("qtype", TYPES, ids=lambda qtype: qtype.name)


def packed_of(qtype, n_out, n_in, seed=0):
    """Any codes, any scales."""
    random, form = np.random.default_rng(seed), FORMATS[qtype]
    row_bytes = n_in // form.block_size * form.type_size
    fields, codes = form.unpack(np.zeros((n_out, row_bytes), np.uint8))
    scales = random.normal(size=fields.super_scale.shape).astype(np.float32)
    fields = replace(fields, super_scale=form.snap_super_scale(scales))
    if form.has_offset:
        subs = random.integers(0, 16, (2, *fields.sub_scale.shape)).astype(np.float32)
        offsets = form.snap_super_offset(random.normal(size=scales.shape).astype(np.float32))
        fields = replace(fields, sub_scale=subs[0], sub_offset=subs[1], super_offset=offsets)
    return form.pack(fields, random.integers(0, len(form.levels), codes.shape).astype(np.uint8))


def both(qtype, packed):
    """The same weight for either family."""
    layout = lookup_layout_of(qtype, chosen())
    return rearrange(qtype, packed, chosen()), rearrange_for_lookup(layout, packed)


@EVERY
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 256), (37, 768), (PANEL * TALL + 70, 256)])
@pytest.mark.parametrize("n", [1, chosen().max_columns + 1])
def test_lookups_are_products_to_the_last_bit(qtype, n_out, n_in, n):
    dot, found = both(qtype, packed_of(qtype, n_out, n_in))
    values = inputs_of(n, n_in)
    np.testing.assert_array_equal(Product(found, n)(values), Product(dot, n)(values))


@EVERY
def test_a_lookup_is_the_product_of_the_decoded_weight(qtype):
    packed, values = packed_of(qtype, 70, 512), inputs_of(1, 512)
    _, found = both(qtype, packed)
    assert_close(Product(found)(values), expected(packed, qtype, values, found.layout.inputs))


@pytest.mark.parametrize(
    ("qtype", "code"), [(T.Q4_0, 0), (T.Q4_0, 15), (T.Q2_K, 3), (T.TQ1_0, 2), (T.TQ2_0, 0)]
)
def test_the_largest_sums_fit_16_bits(qtype, code):
    packed = packed_of(qtype, 5, 512)
    fields, codes = FORMATS[qtype].unpack(packed)
    dot, found = both(qtype, FORMATS[qtype].pack(fields, np.full_like(codes, code)))
    for sign in (1, -1):
        values = np.full((1, 512), sign, np.float32)
        wanted = Product(dot)(values)
        assert np.abs(wanted).max() > 0
        np.testing.assert_array_equal(Product(found)(values), wanted)


@pytest.mark.parametrize("planes", [2, 4])
def test_sums_of_signs_are_the_same_tables(planes):
    """LUT-GEMM's binary codes (arXiv:2206.09557): ±1 a plane, a table half of which is the other's.

    Of a uniform code they say twice what T-MAC's bits do, and the activations' sum less.
    """
    random = np.random.default_rng(planes)
    inputs, codes = random.integers(-127, 128, 256), random.integers(0, 2**planes, (40, 256))
    of_bits = inputs.reshape(-1, 4) @ lookup_tiles.sums_of("bits")[:, :16]
    of_signs = inputs.reshape(-1, 4) @ (2 * lookup_tiles.sums_of("bits")[:, :16] - 1)
    np.testing.assert_array_equal(of_signs, 2 * of_bits - inputs.reshape(-1, 4).sum(1)[:, None])
    np.testing.assert_array_equal(of_signs, -of_signs[:, ::-1])

    layout = replace(lookup_layout_of(T.Q2_K, chosen()), planes=planes, span=256)
    indices = lookup_tiles._indices(layout, codes.astype(np.uint8))
    found = np.take_along_axis(of_signs[None, None], indices[..., None], 3)[..., 0].sum(axis=2)
    twice = found @ (1 << np.arange(planes)[::-1]) + (2**planes - 1) * inputs.sum()
    np.testing.assert_array_equal(twice, 2 * (codes @ inputs))


@pytest.mark.skipif(available_cpus() < 2, reason="one CPU")
@pytest.mark.parametrize("n_out", [16, 3 * PANEL * TALL + 1])
def test_the_number_of_threads_changes_nothing(n_out):
    _, found = both(T.TQ1_0, packed_of(T.TQ1_0, n_out, 256))
    values = inputs_of(3, 256)
    np.testing.assert_array_equal(Product(found, 3, 2)(values), Product(found, 3, 1)(values))


def test_results_are_added_where_that_is_asked_for():
    _, found = both(T.Q4_0, packed_of(T.Q4_0, 100, 64))
    values = inputs_of(1, 64)
    product = Product(found)
    once = product(values)
    quantizing, _ = product._program._operations
    where = InputLayout(64, 1, KINDS.index("Q8_0"))
    base = product._buffers[0].ctypes.data
    adding = products.operations(found, base, where, product.outputs, 1, chosen(), adds=True)
    Program([quantizing, *adding], 1).run()
    np.testing.assert_array_equal(product.outputs[:, :100], 2 * once)
    assert not product.outputs[:, 100:].any()


@settings(max_examples=25, deadline=None)
@given(
    qtype=st.sampled_from(TYPES),
    n_out=st.integers(1, 200),
    blocks=st.integers(1, 5),
    n=st.sampled_from([1, chosen().max_columns]),
)
def test_nothing_is_read_beyond_the_ends(qtype, n_out, blocks, n):
    """Weights and inputs end at a page that ends the process when it is touched."""
    keep = []
    n_in = blocks * FORMATS[qtype].block_size
    packed, values = packed_of(qtype, n_out, n_in), inputs_of(n, n_in)
    dot, plain = both(qtype, packed)
    assert dot.n_out == plain.n_out
    with pytest.MonkeyPatch.context() as patch:
        for module in (products, lookup_tiles):
            patch.setattr(
                module,
                "aligned_bytes",
                lambda size: guarded(-(-size // 64) * 64, keep).view(np.int8),
            )
        _, found = both(qtype, packed)
        product = Product(found, n)
        np.testing.assert_array_equal(product(values), Product(dot, n)(values))
    assert not product.outputs[:, n_out:].any()


OTHER = """
import numpy as np, sys
from gguf import GGMLQuantizationType as T
from cpu_kernels import sherry
from cpu_kernels.isa import chosen
from cpu_kernels.lookup_tiles import LookupLayout, lookup_layout_of, rearrange_for_lookup
from cpu_kernels.products import Product
from cpu_kernels.tiles import rearrange
values = np.load(f"{sys.argv[1]}/inputs.npy")
for name in ("Q4_0", "Q2_K", "TQ2_0"):
    packed = np.load(f"{sys.argv[1]}/{name}.npy")
    wanted = Product(rearrange(T[name], packed, chosen()), len(values))(values)
    weight = rearrange_for_lookup(lookup_layout_of(T[name], chosen()), packed)
    np.testing.assert_array_equal(Product(weight, len(values))(values), wanted)
packed = np.load(f"{sys.argv[1]}/SHERRY.npy")
found = Product(sherry.rearrange(packed, chosen()), len(values))(values)
np.save(f"{sys.argv[1]}/{chosen().name}.npy", found)
"""


@pytest.mark.parametrize("name", ["avx2", "portable"])
def test_a_lower_instruction_set_gives_the_same(name, tmp_path):
    if name not in {isa.name for isa in isas.supported()} or name == chosen().name:
        pytest.skip(f"{name} is no lower set of this CPU")
    values = inputs_of(2, 512)
    np.save(tmp_path / "inputs.npy", values)
    for qtype in TYPES:
        np.save(tmp_path / f"{qtype.name}.npy", packed_of(qtype, 100, 512))
    packed = sherry.encode(np.random.default_rng(0).normal(size=(100, 512)).astype(np.float32))
    np.save(tmp_path / "SHERRY.npy", packed)
    run = [sys.executable, "-c", OTHER, str(tmp_path)]
    subprocess.run(run, check=True, env={**os.environ, isas.VARIABLE: name})
    wanted = Product(sherry.rearrange(packed, chosen()), 2)(values)
    assert_close(np.load(tmp_path / f"{name}.npy"), wanted)


@pytest.mark.parametrize(
    ("qtype", "groups"), [(T.TQ2_0, 2 * 2), (T.Q2_K, 2 * 2 * 2), (None, 8 * 2)]
)
def test_arm_code_looks_bytes_up(qtype, groups):
    """What a phone would run, compiled here: its own instructions, no emulated ones."""
    (neon,) = isas._ARM
    if qtype:
        layout = lookup_layout_of(qtype, neon)
        assert layout.kind == "bits"
    else:
        layout = sherry.rearrange(np.zeros((1, sherry.TYPE_SIZE), np.uint8), neon).layout
    kind_of = lookup.LookupType(layout, neon, 1)
    assembly = arm_assembly(
        neon.cpu, 6, lambda builder, *given: lookup._Lookup(builder, kind_of).add_block(*given)
    )
    # four registers of places, low and high bytes, for every group of a unit, plane and span; twice
    # where tables of 32 are two
    assert assembly.count("\ttbl\t") == 4 * 2 * groups
    assert "\tbl\t" not in assembly  # calls no library


@pytest.mark.parametrize(
    ("packed", "what"),
    [
        (np.zeros((2, 19), np.uint8), "expected rows of uint8 in blocks of 18 bytes"),
        (np.full((2, 18), 0x7E, np.uint8), "a scale of this Q4_0 weight is not finite"),
    ],
)
def test_weights_that_cannot_be_multiplied_are_refused(packed, what):
    with pytest.raises(ValueError, match=what):
        rearrange_for_lookup(lookup_layout_of(T.Q4_0, chosen()), packed)


@pytest.fixture
def timings(nothing_timed, monkeypatch):
    """What is timed, with results that are told."""
    gains, asked = {T.Q4_0: 0.5, T.Q2_K: 0.9, T.TQ1_0: 1.5, T.TQ2_0: 1.01}, []

    def gain(qtype, layout, n_threads):
        asked.append((qtype, n_threads))
        return gains[qtype]

    monkeypatch.setattr(choice, "_gain", gain)
    return asked


def test_the_faster_family_is_timed_once_and_kept(timings, tmp_path):
    wanted = {T.Q4_0: "dot", T.Q2_K: "dot", T.TQ1_0: "lookup", T.TQ2_0: "dot", T.Q6_K: "dot"}
    for _ in range(2):
        assert {qtype: choice.family_of(qtype, 1) for qtype in wanted} == wanted
        choice._is_faster.cache_clear()  # as in another process
    assert timings == [(qtype, 1) for qtype in TYPES]
    choice.family_of(T.Q4_0, 2)
    assert timings[4:] == [(T.Q4_0, 2)]
    one, other = sorted(tmp_path.iterdir(), key=lambda path: -path.stat().st_size)
    del wanted[T.Q6_K]
    assert json.loads(one.read_text()) == {qtype.name: name for qtype, name in wanted.items()}
    assert json.loads(other.read_text()) == {"Q4_0": "dot"}


@pytest.mark.parametrize("text", ["", "[", "[1]", '{"TQ1_0": "faster"}', '{"TQ1_0": [1]}'])
def test_a_damaged_choice_is_timed_again(timings, text):
    path = choice._path(1)
    path.write_text(text)
    assert choice.family_of(T.TQ1_0, 1) == "lookup"
    assert len(timings) == 1
    assert json.loads(path.read_text())["TQ1_0"] == "lookup"


def test_a_folder_that_cannot_be_written_costs_only_time(timings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(choice, "cache_folder", lambda kernel: tmp_path / "file")
    assert choice.family_of(T.TQ1_0, 1) == "lookup"


def test_a_family_can_be_forced(timings, monkeypatch):
    packed, values = packed_of(T.Q4_0, 40, 64), inputs_of(1, 64)
    found = {}
    for family, kind in (("dot", tiles.Tiles), ("lookup", lookup_tiles.LookupTiles)):
        monkeypatch.setenv(choice.VARIABLE, family)
        weight = choice.rearranged(T.Q4_0, packed, 1)
        assert isinstance(weight, kind)
        assert weight.data.shape == choice.shape_of(T.Q4_0, 40, 64, 1)
        found[family] = Product(weight)(values)
    assert choice.family_of(T.Q6_K, 1) == "dot"  # which has no other
    assert not timings
    np.testing.assert_array_equal(found["lookup"], found["dot"])


def test_timing_gives_a_number():
    for qtype in TYPES:
        assert 0 < choice._gain(qtype, lookup_layout_of(qtype, chosen()), 1) < 100


def test_a_forced_family_that_is_none_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "fast")
    message = refused("inspect", tmp_path / "any.gguf")
    assert "EDGEQ_KERNELS: got 'fast', expected dot, lookup or auto. Unset it." in message
