"""Sherry's weights: what is encoded, how it is kept, how it is multiplied."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cpu_kernels import sherry
from cpu_kernels.block_formats import FORMATS, Fields
from cpu_kernels.isa import chosen
from cpu_kernels.products import Product
from cpu_kernels.tiles import rearrange

# the zero's place counts by eight, the first of the signs is the lowest bit
STATES = np.array(
    [
        np.insert([1 - 2 * (signs >> i & 1) for i in range(3)], place, 0)
        for place in range(4)
        for signs in range(8)
    ]
)
ROUNDING = 1e-3  # of an error: the scale is a half float


def weight_of(n_out=3, n_in=512, seed=0):
    return np.random.default_rng(seed).normal(size=(n_out, n_in)).astype(np.float32)


def error(weight, decoded, importances):
    return (importances * (weight.astype(np.float64) - decoded) ** 2).sum(axis=1)


@settings(max_examples=60, deadline=None)
@given(
    states=arrays.arrays(np.uint8, (2, 128), elements=st.integers(0, 31)),
    scales=arrays.arrays(np.float32, (2, 2), elements=st.floats(0, 65504, width=16)),
)
def test_packing_is_undone(states, scales):
    packed = sherry.pack(states, scales)
    assert packed.shape == (2, 2 * sherry.TYPE_SIZE)
    for found, wanted in zip(sherry.unpack(packed), (states, scales), strict=True):
        np.testing.assert_array_equal(found, wanted)


@settings(max_examples=60, deadline=None)
@given(packed=arrays.arrays(np.uint8, (1, 42)))
def test_any_bytes_are_unpacked_and_packed_again(packed):
    states, scales = sherry.unpack(packed)
    assert states.max() < 32
    if not np.isnan(scales).any():
        np.testing.assert_array_equal(sherry.pack(states, scales), packed)


def test_one_block_has_its_known_bytes():
    weight = np.tile(np.array([0, 1, 1, -1, -1, 0, 1, 1], np.float32), 32)[None]
    packed = sherry.encode(weight)
    # states 0 · 8 + 0b100 and 1 · 8 + 0b001, from the lowest bit on: 00100 10010 …; one is 0x3c00
    bits = np.tile([0, 0, 1, 0, 0, 1, 0, 0, 1, 0], 32)
    wanted = [*np.packbits(bits, bitorder="little"), 0x00, 0x3C]
    np.testing.assert_array_equal(packed[0], wanted)
    np.testing.assert_array_equal(sherry.decode(packed), weight)


def test_every_four_weights_have_one_zero():
    groups = sherry.decode(sherry.encode(weight_of())).reshape(-1, 4)
    assert ((groups == 0).sum(axis=1) == 1).all()
    np.testing.assert_array_equal(sherry._VALUES, STATES)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0.0, 1.0, 4.0]))
def test_states_are_the_best_for_their_scale_and_beat_the_plain_rule(seed, spread):
    random = np.random.default_rng(seed)
    weight, importances = weight_of(2, 256, seed), np.exp(spread * random.normal(size=256))
    importances = importances.astype(np.float32)
    packed = sherry.encode(weight, importances)
    _, scales = sherry.unpack(packed)
    found = error(weight, sherry.decode(packed), importances)

    groups, heed = weight.reshape(2, 64, 1, 4), importances.reshape(64, 1, 4)
    tried = scales[:, :, None, None].astype(np.float64) * STATES
    best = (heed * (groups - tried) ** 2).sum(axis=3).min(axis=2).sum(axis=1)
    np.testing.assert_allclose(found, best, rtol=1e-6)

    size = np.abs(weight).reshape(2, 64, 4)  # Sherry's rule: the smallest is zero, the mean stays
    kept = size > size.min(axis=2, keepdims=True)
    plain = np.sign(weight.reshape(size.shape)) * kept
    plain *= (size * kept).sum(axis=(1, 2), keepdims=True) / 192
    assert (found <= error(weight, plain.reshape(2, 256), importances) * (1 + ROUNDING)).all()


def test_what_the_format_holds_comes_back():
    states = np.random.default_rng(0).integers(0, 32, (4, 192)).astype(np.uint8)
    packed = sherry.pack(states, np.full((4, 3), 0.125, np.float32))
    np.testing.assert_array_equal(sherry.encode(sherry.decode(packed)), packed)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_extreme_weights_stay_finite(size):
    decoded = sherry.decode(sherry.encode(weight_of() * np.float32(size)))
    assert np.isfinite(decoded).all()


def test_columns_that_nothing_uses_do_no_harm():
    weight = weight_of(1, 512)
    found = sherry.decode(sherry.encode(weight, np.repeat([0, 1], 256).astype(np.float32)))
    np.testing.assert_array_equal(found, sherry.decode(sherry.encode(weight)))


@pytest.mark.parametrize("n", [1, chosen().max_columns + 1])
def test_a_product_is_that_of_the_same_ternary_weight(n):
    packed = sherry.encode(weight_of(100, 768))
    _, scales = sherry.unpack(packed)
    form = FORMATS[GGMLQuantizationType.TQ1_0]
    codes = (np.sign(sherry.decode(packed)) + 1).astype(np.uint8)
    nothing, ones = np.zeros_like(scales), np.ones_like(scales)
    ternary = form.pack(Fields(scales, nothing, ones, nothing), codes)
    values = np.random.default_rng(1).normal(size=(n, 768)).astype(np.float32)
    wanted = Product(rearrange(GGMLQuantizationType.TQ1_0, ternary, chosen()), n)(values)
    np.testing.assert_array_equal(Product(sherry.rearrange(packed, chosen()), n)(values), wanted)


def test_it_is_smaller_than_tq1_0():
    weight = sherry.rearrange(sherry.encode(weight_of()), chosen())
    assert weight.layout.bpw == (1.3125 if chosen().has_half else 1.375)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: sherry.encode(np.zeros((2, 100), np.float32)), "rows of blocks of 256"),
        (lambda: sherry.encode(np.full((2, 256), np.nan, np.float32)), "expected finite rows"),
        (
            lambda: sherry.encode(np.zeros((2, 256), np.float32), -np.ones(256, np.float32)),
            "expected 256 finite numbers that are not negative",
        ),
        (lambda: sherry.unpack(np.zeros((2, 41), np.uint8)), "in blocks of 42 bytes"),
        (
            lambda: sherry.rearrange(np.full((1, 42), 0xFF, np.uint8), chosen()),
            "a scale of this SHERRY weight is not finite",
        ),
    ],
)
def test_what_is_no_weight_is_refused(call, what):
    with pytest.raises(ValueError, match=what):
        call()
