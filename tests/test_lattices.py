"""Types whose codes stand for points of a lattice: bytes, decoding, and the choice of points."""

import dataclasses
import itertools

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cpu_kernels.lattice_formats import LATTICES, Signs
from cpu_kernels.lattice_rounding import _nearest_unit, halves_of
from edgeq.quantizers import Inputs
from edgeq.quantizers.gptq import Gptq
from edgeq.runtime.encoders import decode, encode

T = GGMLQuantizationType
EVERY = pytest.mark.parametrize("qtype", LATTICES, ids=lambda qtype: qtype.name)


def blocks_of(form, data):
    """Return rows of two blocks of any bytes, with finite super-scales."""
    rows = data.draw(arrays(np.uint8, (3, 2 * form.type_size)))
    blocks = rows.reshape(6, -1)
    # exponents of infinity and NaN lose a bit
    if form.qtype == T.IQ1_M:
        blocks[:, -1] &= 0xBF
    else:
        blocks[:, 1] &= 0xBF
    return rows


@EVERY
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_decode_as_ggml_decodes_them_and_are_packed_the_same(qtype, data):
    form = LATTICES[qtype]
    packed = blocks_of(form, data)
    points = form.unpack(packed)
    weight = form.decode(points)
    np.testing.assert_array_equal(weight, decode(packed, qtype))
    np.testing.assert_array_equal(weight, quants.dequantize(packed, qtype))
    np.testing.assert_array_equal(form.pack(points), packed)


@EVERY
def test_what_the_file_cannot_hold_is_refused(qtype):
    form = LATTICES[qtype]
    points = form.unpack(
        encode(np.ones((2, 256), np.float32), qtype, np.ones((1, 256), np.float32))
    )
    changes = {
        "sub_scale": np.full_like(points.sub_scale, 2),
        "indices": np.full_like(points.indices, len(form.points)),
        "super_scale": points.super_scale + np.float32(1e-6),
    }
    if form.sign_rule != Signs.FREE:
        changes["signs"] = np.full_like(points.signs, 1)
    if form.n_parts > 1:
        every_other = np.arange(points.indices.size).reshape(points.indices.shape) % 2
        changes["indices"] = points.indices ^ (2048 * every_other)
    for name, values in changes.items():
        with pytest.raises(ValueError, match="expected"):
            form.pack(dataclasses.replace(points, **{name: values}))
    with pytest.raises(ValueError, match=rf"blocks of {form.type_size} bytes"):
        form.unpack(np.zeros((1, form.type_size + 1), np.uint8))


def cost(values, target, weight):
    return float((weight * np.square(values - target)).sum())


@EVERY
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_nearest_point_is_found_among_all(qtype, seed):
    """Against every point with every allowed change of one sign."""
    form = LATTICES[qtype]
    size, rng = form.point_size, np.random.default_rng(seed)
    s = np.float32(rng.uniform(0.01, 0.1))
    target = (s * form.points.max() * rng.standard_normal(8)).astype(np.float32)
    weight = rng.uniform(0.1, 10, 8).astype(np.float32)
    values, indices = np.empty(8, np.float32), np.empty(8 // size, np.uint16)
    scratch = np.empty((3, len(form.points)), np.float32)
    grid = np.ascontiguousarray(form.points.T)[None]
    rule = int(form.sign_rule)
    halves = halves_of(grid, rule)
    signs = _nearest_unit(target, weight, s, 0, grid, halves, rule, values, indices, scratch)
    minus = np.unpackbits(np.uint8(signs), bitorder="little")
    assert form.sign_rule == Signs.FREE or minus.sum() % 2 == 0
    assert form.sign_rule != Signs.NONE or not minus.any()
    meant = s * form.points[indices].ravel() * np.where(minus, -1, 1)
    np.testing.assert_allclose(values, meant, rtol=1e-6)

    def parts(flips):
        """Return the least cost of the signs of the target, but for those in `flips`."""
        total = 0.0
        for part in range(8 // size):
            at = slice(part * size, (part + 1) * size)
            sign = np.where((target[at] < 0) & (form.sign_rule != Signs.NONE), -1, 1)
            sign = sign * np.where(np.isin(np.arange(8)[at], flips), -1, 1)
            errors = np.square(s * form.points * sign - target[at]) @ weight[at]
            total += float(errors.min())
        return total

    is_odd = form.sign_rule == Signs.EVEN and (target < 0).sum() % 2
    best = min(parts([j]) for j in range(8)) if is_odd else parts([])
    assert cost(values, target, weight) == pytest.approx(best, rel=1e-4)


@pytest.fixture(scope="module")
def correlated():
    """(weight, hessian, importances) of inputs that are not independent."""
    rng = np.random.default_rng(0)
    mixed = np.eye(512) + 0.9 * rng.standard_normal((512, 512)) / 512**0.5
    inputs = rng.standard_normal((2048, 512)) @ mixed * np.exp(rng.normal(0, 0.5, 512))
    hessian = (2 / len(inputs) * inputs.T @ inputs).astype(np.float32)
    weight = rng.standard_normal((24, 512)).astype(np.float32)
    return weight, hessian[None], np.diagonal(hessian)[None].copy()


def loss(packed, qtype, weight, hessian):
    error = decode(packed, qtype) - weight
    return np.einsum("ri,ij,rj->r", error, hessian[0], error)


@EVERY
def test_feedback_and_descent_each_lower_the_loss(qtype, correlated):
    weight, hessian, importances = correlated
    inputs = Inputs(importances, hessian)
    exact = {"shrinkage": 0.0, "dampening_frac": 1e-6}
    nearest = loss(encode(weight, qtype, importances), qtype, weight, hessian)
    found = {}
    for feedback, sweeps in itertools.product((False, True), (0, 1)):
        gptq = Gptq(feedback=feedback, sweeps=sweeps, **exact)
        rounded = gptq.quantize("w", weight, qtype, inputs)
        assert np.array_equal(
            rounded.packed, gptq.quantize("w", weight, qtype, inputs, n_threads=1).packed
        )
        found[feedback, sweeps] = loss(rounded.packed, qtype, weight, hessian)
        assert np.all(found[feedback, sweeps] <= nearest * (1 + 1e-5))
        assert "loss_bound" not in rounded.facts
        ratio = rounded.facts["loss"] / rounded.facts["loss_rtn"]
        assert ratio == pytest.approx(found[feedback, sweeps].sum() / nearest.sum(), rel=1e-3)
    sums = {key: value.sum() / nearest.sum() for key, value in found.items()}
    assert sums[True, 0] < 0.75
    assert sums[False, 1] < 0.75
    assert sums[True, 1] < sums[True, 0]
    # at 1.6 bits the descent finds more from the nearest points than from those of the feedback
    assert sums[True, 1] < sums[False, 1] * (1.05 if qtype in (T.IQ1_S, T.IQ1_M) else 1)


def test_scales_of_zero_and_rows_of_zeros_stay_what_they_are(correlated):
    _, hessian, importances = correlated
    weight = np.zeros((3, 512), np.float32)
    weight[1, 300] = 1.0  # its first block is zero
    for qtype in LATTICES:
        packed = Gptq().quantize("w", weight, qtype, Inputs(importances, hessian)).packed
        assert np.isfinite(decode(packed, qtype)).all()
        assert not decode(packed, qtype)[[0, 2]].any()
