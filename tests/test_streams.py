"""Ternary products with tables over tokens: dot products' results to the last bit, on every CPU."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cpu_kernels import choice, products, streams, tiles
from cpu_kernels import isa as isas
from cpu_kernels.block_formats import FORMATS
from cpu_kernels.inputs import AS_IS, KINDS, InputLayout
from cpu_kernels.isa import chosen
from cpu_kernels.products import Product
from cpu_kernels.streams import PANEL, TOKENS
from cpu_kernels.threads import Program, address_of, available_cpus
from cpu_kernels.tiles import ROWS, layout_of, rearrange
from edgeq.decoding.building import Builder
from tests.test_lookup import packed_of
from tests.test_products import arm_assembly, assert_close, expected, guarded, inputs_of

T = GGMLQuantizationType
TYPES = (T.TQ1_0, T.TQ2_0)


def without_trits():
    """This CPU's instructions, but for those that open bytes of five trits."""
    return replace(chosen(), looks_up_256=False)


def both(packed, n, isa=None, qtype=T.TQ1_0, n_threads=1):
    """Products of n tokens, by dot and by tables over tokens."""
    weight = rearrange(qtype, packed, isa or chosen())
    return [Product(one, n, n_threads) for one in (weight, replace(weight, streams=True))]


@settings(max_examples=25, deadline=None)
@given(
    qtype=st.sampled_from(TYPES),
    n_out=st.integers(1, 200),
    blocks=st.integers(1, 5),
    n=st.sampled_from([TOKENS - 1, TOKENS, TOKENS + 1, 2 * TOKENS, 3 * TOKENS + 5]),
    packs_trits=st.booleans(),
)
@example(qtype=T.TQ2_0, n_out=2 * PANEL * ROWS + 5, blocks=1, n=TOKENS, packs_trits=True)
def test_many_tokens_are_dot_products_to_the_last_bit(qtype, n_out, blocks, n, packs_trits):
    isa = chosen() if packs_trits else without_trits()
    packed, values = packed_of(qtype, n_out, 256 * blocks, n_out + n), inputs_of(n, 256 * blocks)
    dot, found = both(packed, n, isa, qtype)
    np.testing.assert_array_equal(found(values), dot(values))


@pytest.mark.parametrize(
    ("n", "wanted"), [(TOKENS - 1, [False, False]), (TOKENS, [True]), (TOKENS + 1, [True, False])]
)
def test_whole_vectors_of_tokens_are_streamed_and_the_rest_is_not(n, wanted):
    kind = streams.StreamType(layout_of(T.TQ1_0, chosen()), chosen(), chosen().max_columns)
    code = address_of(streams.stream, kind)
    _, product = both(packed_of(T.TQ1_0, 20, 256), n)
    multiplying = product._program._operations[1::2]  # after quantizing
    assert [one.code == code for one in multiplying] == wanted


def test_a_product_is_that_of_the_decoded_weight():
    packed, values = packed_of(T.TQ2_0, 70, 512), inputs_of(TOKENS, 512)
    _, found = both(packed, TOKENS, qtype=T.TQ2_0)
    assert_close(found(values), expected(packed, T.TQ2_0, values, "Q8_K"))


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_fit_16_bits(code, sign):
    fields, codes = FORMATS[T.TQ1_0].unpack(packed_of(T.TQ1_0, 5, 512))
    packed = FORMATS[T.TQ1_0].pack(fields, np.full_like(codes, code))
    values = np.full((TOKENS, 512), sign, np.float32)
    dot, found = both(packed, TOKENS)
    wanted = dot(values)
    assert np.abs(wanted).max() > 0
    np.testing.assert_array_equal(found(values), wanted)


@pytest.mark.skipif(available_cpus() < 2, reason="one CPU")
@pytest.mark.parametrize("n_out", [16, PANEL * ROWS + 33])
def test_the_number_of_threads_changes_nothing(n_out):
    packed, values = packed_of(T.TQ1_0, n_out, 256), inputs_of(3 * TOKENS + 1, 256)
    dot, _ = both(packed, len(values))
    _, found = both(packed, len(values), n_threads=2)
    np.testing.assert_array_equal(found(values), dot(values))


def test_results_are_added_where_that_is_asked_for():
    n = TOKENS + chosen().max_columns
    packed, values = packed_of(T.TQ1_0, 100, 256), inputs_of(n, 256)
    _, product = both(packed, n)
    once = product(values)
    quantizing = product._program._operations[0]
    where = InputLayout(256, chosen().max_columns, KINDS.index("Q8_K"))
    adding = products.operations(
        product.tiles,
        product._buffers[0].ctypes.data,
        where,
        product.outputs,
        n // chosen().max_columns,
        chosen(),
        adds=True,
    )
    assert len(adding) == 2
    assert [one.meets for one in adding] == [False, True]
    Program([quantizing, *adding], 1).run()
    np.testing.assert_array_equal(product.outputs[:, :100], 2 * once)


def test_a_batch_of_the_decoder_is_streamed():
    n = 2 * TOKENS + 3
    packed, values = packed_of(T.TQ2_0, 100, 512), inputs_of(n, 512)
    dot, found = both(packed, n, qtype=T.TQ2_0)
    wanted = dot(values)
    read = SimpleNamespace(weight=lambda name: found.tiles)
    builder = Builder(read, n, np.zeros(256, np.int8), {})
    out = np.zeros_like(dot.outputs)
    builder.prepare(["one"], values, 512, AS_IS, None, None, 0.0)
    builder.multiply("one", values, out)
    Program(builder.operations, 1).run()
    np.testing.assert_array_equal(out[:, :100], wanted)


@settings(max_examples=15, deadline=None)
@given(n_out=st.integers(1, 100), blocks=st.integers(1, 3), packs_trits=st.booleans())
def test_nothing_is_read_beyond_the_ends(n_out, blocks, packs_trits):
    """Weights and inputs end at a page that ends the process when it is touched."""
    keep = []
    isa = chosen() if packs_trits else without_trits()
    packed, values = packed_of(T.TQ1_0, n_out, 256 * blocks), inputs_of(TOKENS, 256 * blocks)
    wanted = both(packed, TOKENS, isa)[0](values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            products, "aligned_bytes", lambda size: guarded(-(-size // 64) * 64, keep).view(np.int8)
        )
        patch.setattr(tiles, "aligned_bytes", lambda size: guarded(size, keep).view(np.int8))
        product = both(packed, TOKENS, isa)[1]
        np.testing.assert_array_equal(product(values), wanted)
    assert not product.outputs[:, -(-n_out // ROWS) * ROWS :].any()


OTHER = """
import numpy as np, sys
from dataclasses import replace
from gguf import GGMLQuantizationType as T
from cpu_kernels.isa import chosen
from cpu_kernels.products import Product
from cpu_kernels.tiles import rearrange
values, packed = (np.load(f"{sys.argv[1]}/{name}.npy") for name in ("inputs", "packed"))
weight = rearrange(T.TQ2_0, packed, chosen())
wanted = Product(weight, len(values))(values)
found = Product(replace(weight, streams=True), len(values))(values)
np.testing.assert_array_equal(found, wanted)
np.save(f"{sys.argv[1]}/{chosen().name}.npy", found)
"""


@pytest.mark.parametrize("name", ["avx_vnni", "avx2", "portable"])
def test_a_lower_instruction_set_gives_the_same(name, tmp_path):
    if name not in {isa.name for isa in isas.supported()} or name == chosen().name:
        pytest.skip(f"{name} is no lower set of this CPU")
    values, packed = inputs_of(TOKENS + 2, 512), packed_of(T.TQ2_0, 100, 512)
    np.save(tmp_path / "inputs.npy", values)
    np.save(tmp_path / "packed.npy", packed)
    run = [sys.executable, "-c", OTHER, str(tmp_path)]
    subprocess.run(run, check=True, env={**os.environ, isas.VARIABLE: name})
    _, wanted = both(packed, len(values), qtype=T.TQ2_0)
    assert_close(np.load(tmp_path / f"{name}.npy"), wanted(values))


def test_arm_code_adds_words():
    """What a phone would run, compiled here: reads and additions, no library."""
    (neon,) = isas._ARM
    kind = streams.StreamType(layout_of(T.TQ2_0, neon), neon, neon.max_columns)
    assembly = arm_assembly(
        neon.cpu, 7, lambda builder, *given: streams._Stream(builder, kind).add_block(*given)
    )
    # four registers of eight tokens; in each of three bodies 80 entries of a table that follow from
    # others, and two rows of four bytes, of which the first vector's have nothing before them
    added = 3 * 80 + 3 * 2 * 4 - 2
    assert len(re.findall(r"\tadd\tv\d+\.8h", assembly)) == 4 * added
    assert "\tbl\t" not in assembly


@pytest.fixture
def timings(nothing_timed, monkeypatch):
    """What is timed; dot wins with one token, and with many of TQ2_0."""
    asked = []

    def gain(qtype, layout, n_threads):
        asked.append((qtype, layout is not None, n_threads))
        return 1.5 if layout is None and qtype == T.TQ1_0 else 1.01

    monkeypatch.setattr(choice, "_gain", gain)
    return asked


def test_streams_are_used_where_they_are_faster(timings, tmp_path):
    for _ in range(2):
        for qtype in (*TYPES, T.Q2_K):
            weight = choice.rearranged(qtype, packed_of(qtype, 20, 256), 1)
            assert weight.streams == (qtype == T.TQ1_0)
        choice._is_faster.cache_clear()  # as in another process
    assert timings == [
        *[(qtype, is_one_token, 1) for qtype in TYPES for is_one_token in (True, False)],
        (T.Q2_K, True, 1),
    ]
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == {
        "TQ1_0": "dot",
        "TQ1_0, many tokens": "stream",
        "TQ2_0": "dot",
        "TQ2_0, many tokens": "dot",
        "Q2_K": "dot",
    }


def test_dot_products_alone_can_be_forced(timings, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "dot")
    assert not choice.rearranged(T.TQ1_0, packed_of(T.TQ1_0, 20, 256), 1).streams
    assert not timings


def test_timing_gives_a_number():
    for qtype in TYPES:
        assert 0 < choice._gain(qtype, None, 1) < 1000
