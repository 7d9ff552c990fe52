import dataclasses

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cpu_kernels.block_formats import FORMATS, Fields
from cpu_kernels.block_formats_numbers import Absent, Half
from edgeq.runtime.encoders import decode, encode

T = GGMLQuantizationType
EVERY = pytest.mark.parametrize("qtype", FORMATS, ids=lambda qtype: qtype.name)


def weights(n_in=512):
    """Rows of every kind that an encoder treats in its own way, up to what half floats hold."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((8, n_in))
    lonely = np.zeros((1, n_in))
    lonely[0, 77] = -3.0
    edge = np.tile([1.0, -1.0, 0.5, 0.0], (1, n_in // 4))
    kinds = [0.02 * normal, 1e4 * normal, 1e-6 * normal, 1e-12 * normal, np.abs(normal), lonely]
    kinds += [-np.exp(3 * normal), 0 * lonely, np.full((1, n_in), -0.7), edge, normal**9]
    return np.clip(np.concatenate(kinds), -6e4, 6e4).astype(np.float32)


def encodings(qtype):
    weight = weights()
    rng = np.random.default_rng(1)
    importances = np.exp(2 * rng.standard_normal((1, weight.shape[1]))).astype(np.float32)
    return encode(weight, qtype), encode(weight, qtype, importances)


def same(one, other):
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(Fields)
    )


def changed(fields, **values):
    """`fields` with every value of some of them replaced."""
    arrays_ = {name: np.full_like(getattr(fields, name), value) for name, value in values.items()}
    return dataclasses.replace(fields, **arrays_)


@EVERY
def test_what_ggml_encodes_is_read_to_the_last_bit_and_packed_to_the_same_bytes(qtype):
    form = FORMATS[qtype]
    for packed in encodings(qtype):
        before = packed.copy()
        fields, codes = form.unpack(packed)
        np.testing.assert_array_equal(form.pack(fields, codes), packed)
        weight = form.decode(fields, codes)
        np.testing.assert_array_equal(weight, decode(packed, qtype))
        # gguf multiplies in another order
        np.testing.assert_allclose(weight, quants.dequantize(packed, qtype), rtol=3e-7, atol=1e-9)
        scale, offset = form.grid(fields)
        spread = [np.repeat(values, form.group_size, axis=1) for values in (scale, offset)]
        np.testing.assert_array_equal(spread[0] * form.levels[codes] + spread[1], weight)
        np.testing.assert_array_equal(packed, before)
        parts = [
            codes,
            scale,
            offset,
            *(getattr(fields, f.name) for f in dataclasses.fields(Fields)),
        ]
        assert all(part.flags.c_contiguous for part in parts)
        assert {part.dtype.name for part in parts[1:]} == {"float32"}


@EVERY
def test_any_bytes_mean_the_same_before_and_after(qtype):
    form = FORMATS[qtype]
    blocks = np.random.default_rng(2).integers(0, 256, (3000, form.type_size)).astype(np.uint8)
    if qtype == T.TQ2_0:
        blocks[:, :64] &= ~((blocks[:, :64] & 0xAA) >> 1)  # 3 becomes 2
    if qtype == T.NVFP4:  # every scale by every nibble
        blocks = np.repeat(np.arange(256, dtype=np.uint8), form.type_size).reshape(256, -1)
        blocks[:, 4:] = np.tile(np.arange(16, dtype=np.uint8) * 17, 2)
    meant = decode(blocks, qtype)
    weight = form.decode(*form.unpack(blocks))
    np.testing.assert_array_equal(weight, meant)  # NaN where ggml has NaN
    writable = np.isfinite(weight).all(axis=1)
    if qtype == T.NVFP4:
        writable[0xFF] = False
    fields, codes = form.unpack(blocks[writable])
    packed = form.pack(fields, codes)
    np.testing.assert_array_equal(decode(packed, qtype), meant[writable])
    if qtype not in (T.MXFP4, T.NVFP4, T.TQ1_0):
        np.testing.assert_array_equal(packed, blocks[writable])


def stored_values(form, name):
    """Everything that a field may hold, ascending, as float32."""
    field = getattr(form, name)
    if isinstance(field, Absent):
        return np.array([field.value], np.float32)
    if isinstance(field, Half):
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
        return np.unique(halves[np.isfinite(halves)])
    if field.range is not None:
        return np.arange(field.range[0], field.range[1] + 1).astype(np.float32)
    if form.qtype == T.MXFP4:
        return np.ldexp(1.0, np.arange(-128, 125)).astype(np.float32)
    ue4m3 = [np.ldexp(m, -10) for m in range(8)]
    ue4m3 += [np.ldexp(8 + m, e - 11) for e in range(1, 16) for m in range(8)]
    return np.array(ue4m3[:-1], np.float32)


def field_arrays(form, name, n_values):
    choices = stored_values(form, name)
    index = arrays(np.int64, (2, n_values), elements=st.integers(0, len(choices) - 1))
    return index.map(lambda drawn: choices[drawn])


@EVERY
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_fields_and_codes_survive_packing(qtype, data):
    form = FORMATS[qtype]
    n_in = 2 * form.block_size
    codes = data.draw(arrays(np.uint8, (2, n_in), elements=st.integers(0, len(form.levels) - 1)))
    super_scale, super_offset, sub_scale, sub_offset = (
        data.draw(field_arrays(form, name, n_in // size))
        for name, size in (
            ("super_scale", form.block_size),
            ("super_offset", form.block_size),
            ("sub_scale", form.group_size),
            ("sub_offset", form.group_size),
        )
    )
    fields = Fields(super_scale, super_offset, sub_scale, sub_offset)
    packed = form.pack(fields, codes)
    np.testing.assert_array_equal(form.decode(fields, codes), decode(packed, qtype))
    fields_again, codes_again = form.unpack(packed)
    assert same(fields_again, fields)
    np.testing.assert_array_equal(codes_again, codes)


@EVERY
@pytest.mark.parametrize("name", ["super_scale", "super_offset", "sub_scale", "sub_offset"])
def test_snapping_finds_the_nearest_value_that_the_file_holds(qtype, name):
    form = FORMATS[qtype]
    snap = getattr(form, f"snap_{name}")
    choices = stored_values(form, name)
    rng = np.random.default_rng(3)
    near = rng.choice(choices, 200) * (1 + rng.standard_normal(200) / 8)
    wide = rng.standard_normal(200) * np.exp(rng.uniform(-80, 80, 200))
    limits = np.array([0, -0.0, 65519, 65520, -1e9, 3e38, -3e38, 1e-45, 127.5, 31.5, 63.5, 0.5])
    values = np.concatenate([near, wide, limits]).astype(np.float32)
    snapped = snap(values)
    assert snapped.dtype == np.float32
    assert np.isfinite(snapped).all()
    assert np.isin(snapped, choices).all()
    np.testing.assert_array_equal(snap(snapped), snapped)
    np.testing.assert_array_equal(snap(choices), choices)
    exact = choices.astype(np.float64)
    above = np.minimum(np.searchsorted(exact, values), len(exact) - 1)
    distances = [np.abs(values - exact[i]) for i in (above, np.maximum(above - 1, 0))]
    np.testing.assert_array_equal(np.abs(values - snapped.astype(np.float64)), np.min(distances, 0))


def test_what_the_file_cannot_hold_is_refused():
    form = FORMATS[T.Q4_K]
    fields, codes = form.unpack(encode(weights(), T.Q4_K))
    for name, value, expected in (
        ("sub_scale", 64.0, "integers 0 to 63"),
        ("sub_offset", 0.5, "integers 0 to 63"),
        ("super_scale", 0.1, "half floats"),
        ("super_offset", 1e9, "half floats"),
        ("super_scale", np.nan, "half floats"),
    ):
        with pytest.raises(ValueError, match=rf"cannot hold .* of block 0; expected {expected}"):
            form.pack(changed(fields, **{name: value}), codes)
    with pytest.raises(ValueError, match="codes: got 16, expected indices below 16"):
        form.pack(fields, np.full_like(codes, 16))
    with pytest.raises(ValueError, match=r"sub_scale is float32 of shape \(60, 8\), expected"):
        form.decode(dataclasses.replace(fields, sub_scale=fields.sub_scale[:, :8]), codes)
    with pytest.raises(ValueError, match="in blocks of 144 bytes"):
        form.unpack(np.zeros((2, 100), np.uint8))
    nvfp4 = FORMATS[T.NVFP4]
    fields, codes = nvfp4.unpack(encode(weights(), T.NVFP4))
    for name, value in (("sub_scale", -1.0), ("sub_scale", 225.0), ("super_scale", 2.0)):
        with pytest.raises(ValueError, match="cannot hold"):
            nvfp4.pack(changed(fields, **{name: value}), codes)
    with pytest.raises(ValueError, match="codes: got 3, expected indices below 3"):
        FORMATS[T.TQ2_0].unpack(np.full((1, 66), 255, np.uint8))


@EVERY
def test_a_format_says_what_its_fields_are(qtype):
    form = FORMATS[qtype]
    assert (np.diff(form.levels) > 0).all()
    assert form.block_size % form.group_size == 0
    assert form.has_offset == (qtype in (T.Q4_1, T.Q5_1, T.Q2_K, T.Q4_K, T.Q5_K))
    # fmt: off
    ranges = {
        T.Q2_K: ((0, 15), (0, 15)), T.Q4_K: ((0, 63), (0, 63)), T.Q5_K: ((0, 63), (0, 63)),
        T.Q3_K: ((-32, 31), None), T.IQ4_XS: ((-32, 31), None), T.Q6_K: ((-128, 127), None),
    }
    # fmt: on
    assert (form.sub_scale_range, form.sub_offset_range) == ranges.get(qtype, (None, None))
