import dataclasses
import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels import rounding as kernels
from cpu_kernels.block_formats import FORMATS
from edgeq.errors import CalibrationError
from edgeq.quantizers import Inputs, gptq
from edgeq.quantizers.descent import _Block, _scales_of, lower_loss
from edgeq.quantizers.factor import ORDERS, error_bound, factor, inverse_factor
from edgeq.quantizers.feedback import (
    Rounding,
    batch_size,
    batched,
    feed_back_and_search,
    feed_back_errors,
    with_ternary_scales,
)
from edgeq.quantizers.gptq import Gptq
from edgeq.runtime.encoders import decode, encode

T = GGMLQuantizationType
EVERY = pytest.mark.parametrize("qtype", FORMATS, ids=lambda qtype: qtype.name)


def second_moments(n_in, seed=0, n_tokens=None):
    rng = np.random.default_rng(seed)
    mixing = np.eye(n_in) + rng.standard_normal((n_in, n_in)) / np.sqrt(n_in)
    tokens = rng.standard_normal((n_tokens or 3 * n_in, n_in)) @ mixing
    tokens *= np.exp(rng.standard_normal(n_in))
    return (2 / len(tokens) * tokens.T @ tokens).astype(np.float32)


def normal(n_out, n_in, seed=0):
    return (0.02 * np.random.default_rng(seed).standard_normal((n_out, n_in))).astype(np.float32)


def factored(hessian, order="natural", shrinkage=0.0, dampening_frac=0.01, **more):
    return factor(
        "w", hessian, order=order, shrinkage=shrinkage, dampening_frac=dampening_frac, **more
    )


def nearest(qtype, weight, importances=None):
    return Rounding.of(FORMATS[qtype], encode(weight, qtype, importances))


def losses(rounding, weight, hessian):
    error = rounding.values.astype(np.float64) - weight
    return 0.5 * np.sum((error @ hessian.astype(np.float64)) * error, axis=1)


def is_decoded(rounding):
    return np.array_equal(rounding.values, rounding.fmt.decode(rounding.fields, rounding.codes))


def uniform(weight, scale):
    """Q8_0 on one scale, wide enough that no weight is clipped."""
    start = nearest(T.Q8_0, weight)
    start.fields.super_scale[:] = scale
    return start


def babai(weight, hessian, scale):
    """Nearest plane for the lattice of columns scale * R e_j, where H = Rᵀ R; last column first."""
    basis = scale * np.linalg.cholesky(hessian).T
    target = np.linalg.cholesky(hessian).T @ weight.T.astype(np.float64)
    coefficients = np.empty(weight.shape, int)
    for j in reversed(range(weight.shape[1])):
        coefficients[:, j] = np.rint(target[j] / basis[j, j])
        target -= np.outer(basis[:, j], coefficients[:, j])
    return coefficients


def textbook_gptq(weight, hessian, order, scale, offset, levels):
    """Column by column with the inverse Hessian itself, shrunk after each; float64."""
    left = weight.astype(np.float64)
    inverse = np.linalg.inv(hessian)
    codes = np.empty(weight.shape, np.uint8)
    for j in order:
        grid = scale[:, j, None] * levels + offset[:, j, None]
        codes[:, j] = np.argmin(np.abs(left[:, j, None] - grid), axis=1)
        error = (left[:, j] - np.take_along_axis(grid, codes[:, j, None], 1)[:, 0]) / inverse[j, j]
        left -= np.outer(error, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def test_back_to_front_is_babais_nearest_plane():
    weight, scale = normal(12, 288), np.float32(2**-7)
    known = factored(second_moments(288), "back-to-front")
    start = uniform(weight, scale)
    found = feed_back_errors(start, weight, known)
    expected = babai(weight, known.hessian.astype(np.float64), float(scale))
    assert np.array_equal(found.fmt.levels[found.codes], expected)
    rounded = np.rint(weight / scale)
    assert np.mean(expected != rounded) > 0.1  # it is not rounding to nearest


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("qtype", [T.Q4_0, T.Q4_K, T.IQ4_NL], ids=lambda t: t.name)
def test_error_feedback_is_textbook_gptq(qtype, order):
    weight = normal(8, 512)
    known = factored(second_moments(512), order)
    start = nearest(qtype, weight)
    found = feed_back_errors(start, weight, known)
    scale, offset = (np.repeat(a, found.fmt.group_size, 1) for a in found.fmt.grid(start.fields))
    hessian = known.hessian.astype(np.float64)
    codes = textbook_gptq(weight, hessian, known.order, scale, offset, found.fmt.levels)
    # float32 decides a few near ties otherwise, and the columns after such a one differ
    same_rows = (found.codes == codes).all(axis=1)
    assert same_rows.mean() >= 0.5
    assert np.mean(found.codes == codes) > 0.95
    assert is_decoded(found)


@pytest.mark.parametrize("order", ORDERS)
def test_bound_holds_where_nothing_is_clipped(order):
    weight = normal(16, 160)
    known = factored(second_moments(160), order)
    found = feed_back_errors(uniform(weight, np.float32(2**-7)), weight, known)
    assert found.codes.min() > 0
    assert found.codes.max() < 255
    bound = error_bound(known.upper, np.full(weight.shape, 2**-7, np.float32))
    reached = losses(found, weight, known.hessian).sum()
    assert 0.2 * bound < reached < 0.5 * bound  # about a third: errors are uniform in a step


def test_reported_loss_is_below_the_reported_bound():
    weight, hessian = normal(16, 160), second_moments(160)[None]
    for search in ("static", "batch"):
        facts = Gptq(search=search).quantize("w", weight, T.Q8_0, Inputs(None, hessian)).facts
        assert facts["loss"] < facts["loss_bound"]
        assert facts["loss"] < facts["loss_rtn"]


def test_min_pivot_lowers_the_bound():
    steps = np.ones((1, 96), np.float32)
    for seed in range(5):
        hessian = second_moments(96, seed)
        natural = error_bound(factored(hessian, "natural").upper, steps)
        assert error_bound(factored(hessian, "min-pivot").upper, steps) <= natural


def test_factor_is_that_of_the_inverse_in_every_order():
    for order in ORDERS:
        known = factored(second_moments(64), order)
        assert sorted(known.order) == list(range(64))
        hessian = known.hessian.astype(np.float64)[np.ix_(known.order, known.order)]
        assert np.allclose(known.upper.T @ known.upper @ hessian, np.eye(64), atol=1e-3)
        assert not np.tril(known.upper, -1).any()


def test_min_pivot_takes_the_least_schur_complement_from_the_last_column_on():
    hessian = second_moments(24).astype(np.float64)
    chosen = []
    for _ in range(24):
        free = [j for j in range(24) if j not in chosen]
        inside = hessian[np.ix_(chosen, chosen)]
        cross = hessian[np.ix_(free, chosen)]
        left = np.diagonal(hessian)[free] - np.sum(
            cross * np.linalg.solve(inside, cross.T).T if chosen else 0.0 * cross, axis=1
        )
        chosen.append(free[int(np.argmin(left))])
    assert ORDERS["min-pivot"](hessian).tolist() == chosen[::-1]


@pytest.mark.parametrize("order", ORDERS)
def test_damping_grows_until_the_factor_exists(order):
    hessian = second_moments(48)
    hessian[3, 5] = hessian[5, 3] = 2 * np.sqrt(hessian[3, 3] * hessian[5, 5])
    known = factored(hessian, order, dampening_frac=1e-4)
    assert known.dampening_frac > 1e-4
    assert sorted(known.order) == list(range(48))
    np.linalg.cholesky(known.hessian.astype(np.float64))
    ones = np.ones((48, 48), np.float32)
    assert factored(ones, order, dampening_frac=0.0).dampening_frac > 0
    assert np.isfinite(factored(ones, order, dampening_frac=0.0).upper).all()
    facts = Gptq(order=order, dampening_frac=0.0, shrinkage=0.0)
    found = facts.quantize("w", normal(3, 32), T.Q4_0, Inputs(None, ones[None, :32, :32])).facts
    assert found["dampening_frac"] > 0
    with pytest.raises(CalibrationError, match=r"^w: the second moments .* not positive definite"):
        factored(-np.eye(8, dtype=np.float32) + 1e-9, order)


def test_batches_are_whole_blocks_of_the_row():
    for n_in in (576, 640, 1536, 768):
        for fmt in FORMATS.values():
            if n_in % fmt.block_size == 0:
                size = batch_size(fmt, n_in)
                assert n_in % size == size % fmt.block_size == 0
                assert 128 <= size <= 256
    assert batch_size(FORMATS[T.Q4_0], 37 * 32) == 32


def test_batched_order_keeps_batches_together_the_most_important_first():
    rng = np.random.default_rng(0)
    order, importances = rng.permutation(96), np.exp(rng.standard_normal(96)).astype(np.float32)
    importances[32:64] += 10
    found = batched(order, importances, 32)
    assert sorted(found) == list(range(96))
    numbers = found.reshape(3, 32) // 32
    assert (numbers == numbers[:, :1]).all()
    assert numbers[0, 0] == 1
    rank = np.argsort(order)
    assert (np.diff(rank[found].reshape(3, 32), axis=1) > 0).all()


def kinds(n_in):
    """Rows of every kind that may upset a search of scales."""
    rows = 0.02 * np.random.default_rng(3).standard_normal((9, n_in))
    rows[0] = 0
    rows[1] = 0.3
    rows[2] *= 1e-5  # half-float scales with few bits
    rows[3] *= 1e-9  # and with none
    rows[4, ::7] = 5.0
    rows[5] = -np.abs(rows[5])
    rows[6, : n_in // 2] = 0
    rows[7] *= 1e4
    rows[8, 1:] = 0
    return rows.astype(np.float32)


@EVERY
def test_descent_never_raises_the_loss_and_decodes_to_what_it_optimized(qtype):
    fmt = FORMATS[qtype]
    n_in = 2 * max(fmt.block_size, 64)
    weight = kinds(n_in)
    known = factored(second_moments(n_in), "activation", shrinkage=0.3)
    fed = feed_back_errors(nearest(qtype, weight), weight, known)
    for rounding in (nearest(qtype, weight), fed):
        before = losses(rounding, weight, known.hessian)
        for reach in (0, 1, 3):
            lower_loss(rounding, weight, known.hessian, reach=reach, refits=reach > 0)
            after = losses(rounding, weight, known.hessian)
            assert (after <= before * (1 + 1e-5) + 1e-30).all()
            assert is_decoded(rounding)
            again = Rounding.of(fmt, rounding.packed())
            assert np.array_equal(again.values, rounding.values)
            before = after
        assert (
            after[4:8].sum()
            < 0.97 * losses(nearest(qtype, weight), weight, known.hessian)[4:8].sum()
        )


@EVERY
def test_feedback_with_scales_searched_by_batch_packs_what_it_says(qtype):
    fmt = FORMATS[qtype]
    n_in = 2 * max(fmt.block_size, 128)
    weight, hessian = kinds(n_in), second_moments(n_in)
    size = batch_size(fmt, n_in)
    known = factored(hessian, "activation", regroup=lambda o, i: batched(o, i, size))
    importances = np.ascontiguousarray(np.diagonal(known.hessian))
    found = feed_back_and_search(nearest(qtype, weight), weight, known, importances)
    assert is_decoded(found)
    assert np.array_equal(Rounding.of(fmt, found.packed()).values, found.values)


@settings(max_examples=25, deadline=None)
@given(
    qtype=st.sampled_from(list(FORMATS)),
    seed=st.integers(0, 1000),
    n_tokens=st.integers(1, 400),
    shrinkage=st.sampled_from([0.0, 0.3]),
    magnitude=st.integers(-12, 6),
    strength=st.integers(-12, 12),
)
def test_descent_never_raises_any_loss(qtype, seed, n_tokens, shrinkage, magnitude, strength):
    n_in = max(FORMATS[qtype].block_size, 64)
    weight = normal(3, n_in, seed) * np.float32(2.0**magnitude)
    hessian = second_moments(n_in, seed, n_tokens) * np.float32(10.0**strength)
    known = factored(hessian, "natural", shrinkage)
    rounding = nearest(qtype, weight)
    before = losses(rounding, weight, known.hessian)
    lower_loss(rounding, weight, known.hessian, reach=1, refits=True)
    assert (losses(rounding, weight, known.hessian) <= before * (1 + 1e-5)).all()
    assert is_decoded(rounding)


@pytest.mark.parametrize(
    "qtype", [t for t in FORMATS if FORMATS[t].sub_scale_range], ids=lambda t: t.name
)
def test_refit_changes_the_loss_by_what_it_says(qtype):
    weight, hessian = normal(6, 256), second_moments(256)
    rounding = nearest(qtype, weight)
    rounding.fields.super_scale[:] *= np.float32(1.0625)  # something to mend; a half float still
    rounding.fields.super_scale[:] = rounding.fmt.snap_super_scale(rounding.fields.super_scale)
    rounding.values = rounding.fmt.decode(rounding.fields, rounding.codes)
    before, old = losses(rounding, weight, hessian), dataclasses.replace(rounding.fields)
    old_scale, old_offset = old.super_scale.copy(), old.super_offset.copy()
    block = _Block(rounding, slice(0, 256))
    block.gradient = (rounding.values - weight) @ hessian
    block.hessian = hessian
    steps = np.empty((6, 7), np.float32)
    grid = (rounding.fmt.levels, rounding.fmt.group_size, block.scale, block.offset, block.codes)
    kernels.refit(block.gradient, hessian, *grid, steps)
    block.refit()
    block.store()
    x = (rounding.fields.super_scale - old_scale)[:, 0].astype(np.float64)
    y = (rounding.fields.super_offset - old_offset)[:, 0].astype(np.float64)
    a, b, p, q, r = steps[:, 2:].T.astype(np.float64)
    predicted = a * x + b * y + 0.5 * (p * x * x + 2 * q * x * y + r * y * y)
    assert x.any()
    assert (predicted < 0).sum() >= 4
    change = losses(rounding, weight, hessian) - before
    assert np.allclose(change, predicted, rtol=1e-3, atol=1e-4 * before.max())
    assert np.allclose(a + p * steps[:, 0] + q * steps[:, 1], 0, atol=1e-3 * np.abs(a).max())
    if rounding.fmt.has_offset:
        assert y.any()
        assert (rounding.fields.super_offset <= 0).all()


@pytest.mark.parametrize("qtype", [T.MXFP4, T.NVFP4], ids=lambda t: t.name)
def test_descent_tries_the_scales_beside(qtype):
    fmt = FORMATS[qtype]
    n_in, hessian = 64, np.eye(64, dtype=np.float32)
    for level, wanted in ((2.0, 1.0), (6.0, 3.0), (12.0, 12.0)):
        weight = np.full((1, n_in), level, np.float32)
        weight[0, 1::2] = wanted
        exact = nearest(qtype, weight)
        for places in (-1, 1):
            rounding = nearest(qtype, weight)
            fields = rounding.fields
            scales = fields.super_scale if qtype == T.MXFP4 else fields.sub_scale
            stored = fmt.super_scale if qtype == T.MXFP4 else fmt.sub_scale
            table = stored.table[: stored.n_snapped]
            scales[:] = table[np.searchsorted(table, scales) + places]
            rounding.values = fmt.decode(fields, rounding.codes)
            before = losses(rounding, weight, hessian)
            lower_loss(rounding, weight, hessian, reach=1, refits=False)
            after = losses(rounding, weight, hessian)
            assert after[0] <= losses(exact, weight, hessian)[0] + 1e-6
            assert after[0] < before[0]
            assert is_decoded(rounding)


def test_four_over_six_is_found_where_it_is_better():
    weight = np.full((1, 64), 3.0, np.float32)  # ¾ of the greatest: no level for six, one for four
    weight[0, ::16] = 4.0
    hessian = np.eye(64, dtype=np.float32)
    rounding = nearest(T.NVFP4, weight)
    rounding.fields.sub_scale[:] = rounding.fmt.snap_sub_scale(np.full((1, 4), 4 / 12))
    codes = np.abs(weight[..., None] - rounding.fmt.levels * rounding.fields.sub_scale[0, 0])
    rounding.codes[:] = np.argmin(codes, axis=2)
    rounding.values = rounding.fmt.decode(rounding.fields, rounding.codes)
    assert losses(rounding, weight, hessian)[0] > 1
    lower_loss(rounding, weight, hessian, reach=1, refits=False)
    assert losses(rounding, weight, hessian)[0] == 0
    assert (rounding.fields.sub_scale == 0.5).all()


@EVERY
def test_scales_in_the_kernels_are_those_of_the_file(qtype):
    """Every neighbour that the kernels may try can be packed, down to the least scales."""
    fmt, scales = FORMATS[qtype], _scales_of(FORMATS[qtype])
    least, greatest = scales.bounds[:2]
    if scales.is_whole:
        assert (least, greatest) == fmt.sub_scale_range
        assert scales.bounds[2:] == (fmt.sub_offset_range or (0, 0))
        return
    stored = fmt.sub_scale if qtype == T.NVFP4 else fmt.super_scale
    tried = np.float32([least, greatest]) if least > 0 else np.float32([2**-24, 65504])
    assert np.array_equal(stored.snap(tried), tried)
    numbers = np.float32(2.0) ** np.arange(-30, 14, 0.37, dtype=np.float32)
    snapped = [kernels._snap(x, scales.mantissa, scales.lowest) for x in numbers]
    inside = [(s, x) for s, x in zip(snapped, numbers, strict=True) if least <= s <= greatest]
    for s, x in inside:
        assert stored.snap(np.float32([s]))[0] == s
        assert abs(s - x) <= abs(stored.snap(np.float32([x]))[0] - x)
    if scales.mantissa < 10:
        table = stored.table[: stored.n_snapped]
        table = table[(table >= least) & (table <= greatest)]
        up = [kernels._neighbour(x, 1, scales.mantissa, scales.lowest) for x in table[:-1]]
        down = [kernels._neighbour(x, -1, scales.mantissa, scales.lowest) for x in table[1:]]
        assert up == table[1:].tolist()
        assert down == table[:-1].tolist()


def test_nearest_level_survives_any_number():
    even, uneven = FORMATS[T.Q4_0].levels, FORMATS[T.MXFP4].levels
    for nearest_level in (kernels._nearest, kernels._nearest.py_func):
        with np.errstate(over="ignore"):
            for levels, step in ((even, 1.0), (uneven, 0.0)):
                for x in (-np.inf, -3e38, -1e19, 1e19, 3e38, np.inf):
                    found = nearest_level(np.float32(x), levels, np.float32(step))
                    assert found == (0 if x < 0 else len(levels) - 1)
                found = nearest_level(np.float32(np.nan), levels, np.float32(step))
                assert 0 <= found < len(levels)
    for fmt in (FORMATS[T.IQ4_NL], FORMATS[T.Q5_0], FORMATS[T.TQ2_0]):
        step = np.float32(fmt.levels[1] - fmt.levels[0] if fmt.qtype != T.IQ4_NL else 0)
        for x in np.linspace(-140, 140, 1001, dtype=np.float32):
            distance = np.abs(fmt.levels - x)
            assert distance[kernels._nearest(x, fmt.levels, step)] == distance.min()


def test_a_group_without_scale_takes_the_level_near_zero():
    weight = np.zeros((1, 64), np.float32)
    for fmt in FORMATS.values():
        if fmt.block_size <= 64:
            start = nearest(fmt.qtype, weight)
            found = feed_back_errors(start, weight, factored(second_moments(64)))
            assert not found.values.any()


@pytest.mark.parametrize("qtype", [T.Q4_1, T.NVFP4, T.Q2_K], ids=lambda t: t.name)
def test_kernels_equal_their_python_bodies(qtype, monkeypatch):
    fmt = FORMATS[qtype]
    n_in = max(fmt.block_size, 32)
    weight, known = normal(2, n_in), factored(second_moments(n_in))
    results = []
    for compiled in (True, False):
        if not compiled:
            for name in dir(kernels):
                function = getattr(kernels, name)
                if hasattr(function, "py_func"):
                    monkeypatch.setattr(kernels, name, function.py_func)
            for module in ("feedback.feed_back", "descent.descend", "descent.refit"):
                python = getattr(kernels, module.rpartition(".")[2])
                monkeypatch.setattr(f"edgeq.quantizers.{module}", python)
        rounding = feed_back_errors(nearest(qtype, weight), weight, known)
        codes = rounding.codes.copy()
        lower_loss(rounding, weight, known.hessian, reach=1, refits=True)
        results.append((codes, rounding.codes, rounding.values))
    for one, other in zip(*results, strict=True):
        assert np.mean(one != other) < 0.03  # sums in another order decide a tie otherwise


def test_inverse_factor_refuses_what_is_not_positive_definite():
    with pytest.raises(np.linalg.LinAlgError):
        inverse_factor(np.diag(np.float32([1, -1])), np.arange(2))


@pytest.mark.parametrize(
    ("qtype", "settings"),
    [(T.Q4_K, {}), (T.NVFP4, {"search": "batch"}), (T.IQ3_S, {"sweeps": 0})],
    ids=lambda one: getattr(one, "name", ""),
)
def test_rows_of_a_large_matrix_get_the_bytes_that_they_get_together(qtype, settings, monkeypatch):
    weight = normal(2 * 60, 512).reshape(2, 60, 512)
    hessian = np.stack([second_moments(512, seed) for seed in range(2)])
    inputs = Inputs(np.diagonal(hessian, axis1=1, axis2=2).copy(), hessian)
    together = Gptq(**settings).quantize("w", weight, qtype, inputs)
    monkeypatch.setattr(gptq, "SLICE", 25 * 512)  # three slices of 20 rows
    apart = Gptq(**settings).quantize("w", weight, qtype, inputs)
    assert np.array_equal(apart.packed, together.packed)
    assert apart.facts == pytest.approx(together.facts)


def test_memory_does_not_grow_with_the_rows_of_a_matrix(monkeypatch):
    monkeypatch.setattr(gptq, "SLICE", 64 * 256)
    inputs = Inputs(None, second_moments(256)[None])

    def peak(n_out):
        weight = normal(n_out, 256)
        tracemalloc.start()
        packed = Gptq().quantize("w", weight, T.Q4_0, inputs).packed
        found = tracemalloc.get_traced_memory()[1] - packed.nbytes
        tracemalloc.stop()
        return found

    peak(64)  # compiles
    assert peak(1024) < 1.1 * peak(256)


@pytest.mark.parametrize("qtype", [T.TQ1_0, T.TQ2_0])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_ternary_scales_are_least_squares(qtype, seed):
    """Against a fine search of one block's scale; ggml's own are its largest weight."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(4, (3, 512)).astype(np.float32)
    weight[1, :256] = 0
    importances = rng.uniform(0.1, 10, 512).astype(np.float32)
    start = Rounding.of(FORMATS[qtype], encode(weight, qtype))
    found = with_ternary_scales(start, weight, importances)
    np.testing.assert_array_equal(decode(found.packed(), qtype), found.values)

    def errors(values):
        return (importances * np.square(values - weight)).reshape(3, 2, 256).sum(axis=2)

    largest = np.abs(weight).reshape(3, 2, 256).max(axis=2)
    best = np.full((3, 2), np.inf)
    for part in np.linspace(0.02, 1, 300):
        scale = np.repeat(part * largest, 256, axis=1)
        codes = np.clip(np.rint(weight / np.maximum(scale, 1e-30)), -1, 1)
        best = np.minimum(best, errors(scale * codes))
    assert (errors(found.values) <= 1.02 * best + 1e-6).all()
    assert (errors(found.values) <= errors(start.values)).all()
    assert not found.values[1, :256].any()
