import ctypes
import functools

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import ConversionError
from edgeq.errors import CalibrationError, RecipeError
from edgeq.runtime.encoders import (
    check_row,
    decode,
    encodable_types,
    encode,
    needs_importances,
    type_names,
    validate,
)
from edgeq.runtime.library import load

T = GGMLQuantizationType
FLOATS = (T.F32, T.F16, T.BF16)
GRIDS = [t for t in encodable_types() if t.name.startswith("IQ")]

# Weighted mean squared error over mean square of a seeded normal matrix; measured, plus 3 %.
# fmt: off
BUDGETS = {
    T.F32: 0.0, T.F16: 4.4e-8, T.BF16: 2.8e-6, T.Q8_0: 2.9e-5, T.Q6_K: 2.72e-4, T.Q5_K: 1.1e-3,
    T.Q5_0: 1.5e-3, T.Q5_1: 9.8e-4, T.Q4_K: 4.3e-3, T.Q4_0: 6.1e-3, T.Q4_1: 4.1e-3,
    T.IQ4_NL: 5.0e-3, T.IQ4_XS: 5.1e-3, T.MXFP4: 1.32e-2, T.NVFP4: 1.09e-2, T.Q3_K: 1.87e-2,
    T.IQ3_S: 1.46e-2, T.IQ3_XXS: 2.38e-2, T.Q2_K: 5.8e-2, T.IQ2_S: 5.4e-2, T.IQ2_XS: 7.1e-2,
    T.IQ2_XXS: 9.3e-2, T.IQ1_M: 0.156, T.IQ1_S: 0.198, T.TQ1_0: 0.65, T.TQ2_0: 0.65, T.Q1_0: 0.38,
}
# fmt: on


def matrix(n_out=24, n_in=512, seed=0):
    rng = np.random.RandomState(seed)
    return (0.02 * rng.standard_normal((n_out, n_in))).astype(np.float32)


def importances(n_in=512, n_mat=1, seed=1):
    return np.exp(np.random.RandomState(seed).standard_normal((n_mat, n_in))).astype(np.float32)


@functools.cache
def ggml():
    """A handle of its own, so that nothing here leans on what the encoders declare."""
    library = ctypes.CDLL(load().ggml._name)
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *[int64] * 3, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return library


def raw(weight, qtype, values=None):
    """ggml's encoder called once, on one thread."""
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    out = np.empty((len(weight), weight.shape[1] // block_size * type_size), np.uint8)
    pointer = None if values is None else values.ctypes.data
    ggml().ggml_quantize_chunk(
        int(qtype), weight.ctypes.data, out.ctypes.data, 0, *weight.shape, pointer
    )
    return out


def test_every_type_of_ggml_is_encoded_or_known_not_to_be():
    unknown_to_gguf = {"Q2_0"}
    known = {t.name for t in encodable_types()}
    only_intermediate = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
    spelled = (ggml().ggml_type_name(kind) for kind in range(43))
    names = {name.decode().upper() for name in spelled if name}
    retired = {name for name in names if "REMOVED" in name or "DEPRECATED" in name}
    assert names - retired - only_intermediate - unknown_to_gguf == known


@pytest.mark.parametrize("qtype", encodable_types(), ids=lambda t: t.name)
def test_bytes_equal_one_call_of_ggml_whatever_the_threads(qtype):
    n_out = 300 if qtype not in GRIDS else 24
    weight, values = matrix(n_out), importances()
    expected = raw(weight, qtype, values)
    assert np.array_equal(encode(weight, qtype, values, n_threads=1), expected)
    assert np.array_equal(encode(weight, qtype, values, n_threads=3), expected)
    assert validate(expected, qtype)


def test_chunks_do_not_change_bytes(monkeypatch):
    weight, values = matrix(64), importances()
    for qtype in (T.Q4_K, T.IQ3_XXS, T.IQ4_NL):
        expected = raw(weight, qtype, values)
        for chunk in (1, 3 * 512, 7 * 512):
            monkeypatch.setattr("edgeq.runtime.encoders._CHUNK_WEIGHTS", chunk)
            assert np.array_equal(encode(weight, qtype, values, n_threads=4), expected)


@pytest.mark.parametrize("qtype", [t for t in encodable_types() if t not in FLOATS], ids=str)
def test_every_expert_uses_its_own_importances(qtype):
    weight = matrix(3 * 8).reshape(3, 8, 512)
    values = importances(n_mat=3)
    packed = encode(weight, qtype, values).reshape(3, 8, -1)
    for i in range(3):
        assert np.array_equal(packed[i], raw(weight[i], qtype, values[i]))


@pytest.mark.parametrize("qtype", encodable_types(), ids=lambda t: t.name)
def test_decoding_equals_ggufs_and_keeps_the_error_budget(qtype):
    weight, values = matrix(32), importances()
    packed = encode(weight, qtype, values)
    decoded = decode(packed, qtype, n_threads=2)
    if qtype == T.Q1_0:
        assert set(np.unique(np.abs(decoded) > 0)) == {True}  # gguf 0.19 cannot decode it
    else:
        other = quants.dequantize(packed, qtype) if qtype not in FLOATS[:2] else None
        if other is not None:
            scale = np.abs(other).max()
            # one rounding apart where ggml was compiled to fused multiply-adds
            assert np.abs(decoded - other).max() <= 2e-7 * scale
    error = float((values * (decoded - weight) ** 2).sum() / (values * weight**2).sum())
    assert error <= BUDGETS[qtype]


def test_floats_decode_to_themselves():
    weight = matrix(5, 96)
    assert np.array_equal(decode(encode(weight, T.F32), T.F32), weight)
    half = weight.astype(np.float16)
    assert np.array_equal(encode(weight, T.F16), half.view(np.uint8))
    assert np.array_equal(decode(half.view(np.uint8), T.F16), half.astype(np.float32))


def test_inputs_may_be_read_only_and_strided_and_stay_as_they_are():
    weight, values = matrix(48), importances()
    expected = raw(np.ascontiguousarray(weight[::2]), T.Q4_K, values)
    weight.setflags(write=False)
    values.setflags(write=False)
    before = weight.copy()
    assert np.array_equal(encode(weight[::2], T.Q4_K, values), expected)
    assert np.array_equal(encode(np.asfortranarray(weight)[::2], T.Q4_K, values), expected)
    assert np.array_equal(weight, before)


@pytest.mark.parametrize("qtype", encodable_types(), ids=lambda t: t.name)
def test_zero_weights_and_zero_importances_encode(qtype):
    zeros, values = np.zeros((4, 512), np.float32), importances()
    assert not decode(encode(zeros, qtype, values), qtype).any() or qtype.name.startswith("IQ1")
    packed = encode(matrix(4), qtype, np.zeros_like(values))
    assert np.isfinite(decode(packed, qtype)).all()


@settings(max_examples=60, deadline=None)
@given(
    qtype=st.sampled_from(encodable_types()),
    scale=st.floats(-38, 38),
    importance=st.floats(-38, 38),
    spread=st.floats(0, 20),
    seed=st.integers(0, 2**31),
)
def test_no_magnitude_ends_the_process(qtype, scale, importance, spread, seed):
    rng = np.random.RandomState(seed)
    with np.errstate(over="ignore", under="ignore"):
        exponents = scale + spread * rng.uniform(-1, 1, (2, 256))
        weight = (rng.standard_normal((2, 256)) * 10.0**exponents).astype(np.float32)
        values = (10.0 ** (importance + spread * rng.uniform(-1, 1, (1, 256)))).astype(np.float32)
    try:
        packed = encode(weight, qtype, values)
    except (ConversionError, CalibrationError):
        assert max(np.abs(weight).max(), values.max()) > 1  # refused for a magnitude
    else:
        assert validate(packed, qtype)
        assert np.isfinite(decode(packed, qtype)).all() or qtype == T.NVFP4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("qtype", [T.F32, T.Q8_0, T.IQ1_S])
def test_weights_that_are_not_finite_are_refused_by_place(bad, qtype):
    weight = matrix(300)
    weight[217, 33] = bad
    with pytest.raises(ConversionError, match=r"blk\.0\.attn_q\.weight: .*row 217, column 33 is"):
        encode(weight, qtype, importances(), name="blk.0.attn_q.weight")


def test_weights_too_large_for_the_type_are_refused():
    weight = matrix(2)
    weight[1, 3] = 65520
    with pytest.raises(ConversionError, match=r"row 1, column 3 is 65520, too large for F16"):
        encode(weight, T.F16)
    weight[1, 3] = 3e38
    with pytest.raises(ConversionError, match=r"too large for IQ2_S; expected less than 1e\+09"):
        encode(weight, T.IQ2_S)
    weight[1, 3] = 10
    with pytest.raises(ConversionError, match=r"for IQ2_S with importances of up to 1e\+18; expec"):
        encode(weight, T.IQ2_S, np.full((1, 512), 1e18, np.float32))


def test_importances_are_checked():
    weight = matrix(2)
    with pytest.raises(CalibrationError, match=r"cannot be encoded without importances"):
        encode(weight, T.IQ2_XXS)
    with pytest.raises(CalibrationError, match=r"shape \(1, 256\), expected \(1, 512\)"):
        encode(weight, T.Q4_K, importances(256))
    for bad in (np.nan, np.inf, -1.0):
        values = importances()
        values[0, 9] = bad
        with pytest.raises(CalibrationError, match=f"importance of column 9 is {bad}"):
            encode(weight, T.Q4_K, values)


def test_rows_and_types_that_do_not_fit_are_refused():
    expected = r"^x: 576 columns do not divide into Q4_K blocks of 256\. Choose Q8_0 or Q4_0 or F16"
    with pytest.raises(RecipeError, match=expected):
        check_row("x", 576, T.Q4_K)
    with pytest.raises(RecipeError, match=r"ggml has no encoder for Q8_K\. Choose one of: F32"):
        encode(matrix(), T.Q8_K)
    with pytest.raises(ConversionError, match=r"got float64 of shape \(2, 512\), expected float32"):
        encode(matrix(2).astype(np.float64), T.Q8_0)
    with pytest.raises(ConversionError, match=r"got float32 of shape \(512,\)"):
        encode(matrix(2)[0], T.Q8_0)
    with pytest.raises(ConversionError, match=r"expected rows of uint8 in blocks of 34 bytes"):
        decode(np.zeros((2, 35), np.uint8), T.Q8_0)
    with pytest.raises(ConversionError, match=r"no decoder for I32"):
        decode(np.zeros((2, 8), np.uint8), T.I32)


def test_ggml_agrees_on_which_types_need_importances():
    for qtype in encodable_types():
        assert ggml().ggml_quantize_requires_imatrix(int(qtype)) == needs_importances(qtype)
    assert type_names()["q4_K"] == T.Q4_K


def test_validate_notices_a_broken_scale():
    packed = encode(matrix(2), T.Q8_0).copy()
    packed[0, :2] = (0, 0x7E)  # the float16 scale becomes NaN
    assert not validate(packed, T.Q8_0)
