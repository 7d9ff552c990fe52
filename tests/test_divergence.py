import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels import divergence as kernels
from cpu_kernels.reference_bounds import divergence_bounds
from cpu_kernels.reference_rows import pack

EXP_TOLERANCE = 1e-7  # of e^x; the kernel's polynomial, measured 8.3e-8
KLD_TOLERANCE = 2e-6  # relative; float32 logits and exponentials, measured 6e-7
LIMIT = 0.03  # of a base file's bytes
ROW_BYTES = 6 * 4 + 16 * 8


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def exact_kld(reference, candidate):
    log_p, log_q = log_softmax(reference), log_softmax(candidate)
    p, q = np.exp(log_p), np.exp(log_q)
    return (p * (log_p - log_q) - p + q).sum(axis=1)


def rows(seed, n_rows, n_vocab, scale, noise):
    random = np.random.default_rng(seed)
    reference = (random.standard_normal((n_rows, n_vocab)) * scale).astype(np.float32)
    change = random.standard_normal((n_rows, n_vocab)) * noise
    following = random.integers(0, n_vocab, n_rows).astype(np.int32)
    return reference, (reference + change).astype(np.float32), following


def check_bound(reference, candidate, following, max_bytes):
    """The stored rows' divergence is within its bound of the true one; returns the errors."""
    packed = pack(reference, following, max_bytes)
    assert packed is not None
    assert packed.stream.nbytes + packed.heads.nbytes <= max_bytes
    top = candidate.argmax(axis=1).astype(np.int32)
    kld, bound, _ = divergence_bounds(packed, candidate, top)
    error = np.abs(kld - exact_kld(reference, candidate))
    assert (error <= bound).all(), (error, bound)
    return error, bound


@pytest.mark.parametrize("exp", [kernels._exp, kernels._exp.py_func])
def test_exp_is_within_its_tolerance(exp):
    for x in [0.0, -1e-7, -0.3, -0.35, -1.0, -2.5, -16.0, -50.0, -86.9, 1e-6]:
        x = np.float32(x)
        assert exp(x) == pytest.approx(math.exp(x), rel=EXP_TOLERANCE)
    assert 0 < exp(np.float32(-1e6)) < 1e-37


def test_exp_as_libm_rounds_like_float64():
    random = np.random.default_rng(0)
    x = (-20 * random.random(20_000)).astype(np.float32)
    found = np.array([kernels._exp_as_libm(value) for value in x], np.float32)
    expected = np.exp(x.astype(np.float64)).astype(np.float32)
    assert np.count_nonzero(found != expected) <= 2  # where both neighbours are half a step away


@pytest.mark.parametrize("noise", [2.0, 0.1, 1e-3, 1e-5])
@pytest.mark.parametrize("n_vocab", [2, 265, 5000])
def test_divergence_equals_float64(n_vocab, noise):
    reference, candidate, following = rows(1, 20, n_vocab, 4.0, noise)
    found = kernels.divergence(reference, candidate, following)
    np.testing.assert_allclose(
        found.kld, exact_kld(reference, candidate), rtol=KLD_TOLERANCE, atol=1e-14
    )
    at = np.arange(20), following
    np.testing.assert_allclose(found.nll, -log_softmax(candidate)[at], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        found.nll_reference, -log_softmax(reference)[at], rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        found.delta_p, np.exp(-found.nll) - np.exp(-found.nll_reference), atol=1e-7
    )
    np.testing.assert_array_equal(found.top, candidate.argmax(axis=1))
    np.testing.assert_array_equal(found.top_reference, reference.argmax(axis=1))


def test_equal_rows_have_divergence_zero():
    reference, _, following = rows(2, 5, 1000, 6.0, 0.0)
    assert (kernels.divergence(reference, reference.copy(), following).kld == 0).all()


def test_a_constant_added_to_all_logits_changes_nothing():
    reference, candidate, following = rows(3, 5, 1000, 3.0, 0.2)
    plain = kernels.divergence(reference, candidate, following).kld
    shifted = kernels.divergence(reference, candidate + np.float32(8), following).kld
    np.testing.assert_allclose(shifted, plain, rtol=1e-5)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 30.0), st.floats(0.0, 30.0))
@settings(max_examples=50, deadline=None)
def test_divergence_is_finite_and_never_negative(seed, scale, noise):
    found = kernels.divergence(*rows(seed, 3, 300, scale, noise))
    assert (found.kld >= 0).all()
    assert np.isfinite(found.kld).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_logits_that_are_not_finite_give_nan(bad, side):
    pair = list(rows(4, 3, 100, 2.0, 0.1))
    pair[side] = pair[side].copy()
    pair[side][1, 17] = bad
    assert np.isnan(kernels.divergence(*pair).kld).tolist() == [False, True, False]


def stored_by_formula(logits):
    """llama-perplexity's row, step by step in float32 with numpy."""
    one = np.float32
    highest = logits.max()
    lowest = max(logits.min(), highest - one(16))
    total = np.exp(logits - highest).astype(np.float64).sum()
    log_sum = one(math.log(total))
    scale = (highest - lowest) / one(65535)
    codes = np.zeros(logits.size + logits.size % 2, np.uint16)
    if scale > 0:
        codes[: logits.size] = np.rint((one(1) / scale) * (np.maximum(logits, lowest) - lowest))
    head = np.array([scale, lowest - highest - log_sum], np.float32)
    return head, codes


@pytest.mark.parametrize("n_vocab", [265, 1000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 12.0])
def test_stored_rows_follow_the_formula(n_vocab, scale):
    logits, _, following = rows(5, 4, n_vocab, scale, 0.0)
    stored, nll, top = kernels.store(logits, following)
    assert stored.shape == (4, kernels.stored_words(n_vocab))
    for i in range(4):
        head, codes = stored_by_formula(logits[i])
        np.testing.assert_allclose(stored[i, :4].copy().view(np.float32), head, rtol=1e-6)
        np.testing.assert_array_equal(stored[i, 4:], codes)
    np.testing.assert_allclose(nll, -log_softmax(logits)[np.arange(4), following], atol=1e-5)
    np.testing.assert_array_equal(top, logits.argmax(axis=1))


def test_divergence_from_stored_rows_follows_the_formula():
    reference, candidate, following = rows(6, 8, 900, 4.0, 0.3)
    stored, _, _ = kernels.store(reference, following)
    found = kernels.divergence_stored(stored, candidate, following)
    log_q = log_softmax(candidate)
    for i in range(8):
        scale, lowest = stored[i, :4].copy().view(np.float32)
        log_p = scale * stored[i, 4:].astype(np.float32) + lowest
        kept = log_p > -16
        expected = (np.exp(log_p) * (log_p - log_q[i]))[kept].sum()
        assert found.kld[i] == pytest.approx(expected, abs=3e-6)  # float32 of logits near 20
        assert found.nll_reference[i] == pytest.approx(-log_p[following[i]], abs=1e-6)
        assert found.top_reference[i] == log_p.argmax()


@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 700),
    st.floats(0.0, 12.0),
    st.floats(0.0, 6.0),
    st.floats(0.02, 2.0),
)
@settings(max_examples=150, deadline=None)
def test_compact_rows_keep_their_bound(seed, n_vocab, scale, noise, fraction):
    reference, candidate, following = rows(seed, 4, n_vocab, scale, noise)
    check_bound(reference, candidate, following, 4 * 24 + int(fraction * 4 * 2 * n_vocab))


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 8.0))
@settings(max_examples=30, deadline=None)
def test_compact_rows_keep_their_bound_against_unrelated_files(seed, scale):
    reference, _, following = rows(seed, 3, 400, scale, 0.0)
    other = rows(seed ^ 1, 3, 400, scale, 0.0)[0]
    check_bound(reference, other, following, 3 * 300)
    check_bound(reference, np.ascontiguousarray(reference[:, ::-1]), following, 3 * 300)


@pytest.mark.parametrize(
    ("decay", "mean_error", "mean_bound"),
    [(2.0, 1e-4, 3e-3), (1.2, 0.02, 0.6), (0.0, 0.1, 2.5)],
    ids=["peaked", "long tail", "flat"],
)
def test_compact_rows_of_a_large_vocabulary(decay, mean_error, mean_bound):
    n_rows, n_vocab = 4, 150_000
    random = np.random.default_rng(7)
    ranks = np.arange(1, n_vocab + 1)
    reference = np.stack(
        [random.permutation(-decay * np.log(ranks)) for _ in range(n_rows)]
    ) + random.normal(0, 1, (n_rows, n_vocab))
    candidate = reference + random.normal(0, 0.3, reference.shape)
    reference, candidate = reference.astype(np.float32), candidate.astype(np.float32)
    following = np.zeros(n_rows, np.int32)
    budget = int(LIMIT * 2 * n_vocab * n_rows) - n_rows * ROW_BYTES
    error, bound = check_bound(reference, candidate, following, budget)

    assert error.mean() < mean_error
    assert bound.mean() < mean_bound


def test_rows_that_fit_completely_have_a_small_bound():
    reference, candidate, following = rows(8, 6, 500, 5.0, 0.2)
    error, bound = check_bound(reference, candidate, following, 6 * 4000)
    assert bound.max() < 5e-3
    assert error.mean() < 5e-5


def test_too_few_bytes_for_the_top_tokens_give_none():
    reference, _, following = rows(9, 6, 500, 5.0, 0.0)
    assert pack(reference, following, 6 * 6 - 1) is None
    assert pack(reference, following, 6 * 9) is not None


def test_damaged_streams_are_told_by_a_negative_bound():
    reference, candidate, following = rows(10, 2, 500, 3.0, 0.2)
    packed = pack(reference, following, 1200)
    top = candidate.argmax(axis=1).astype(np.int32)
    packed.stream[:] = 255
    _, bound, _ = divergence_bounds(packed, candidate, top)
    assert (bound < 0).all()
