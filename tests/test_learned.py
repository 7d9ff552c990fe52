import dataclasses

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from converters.gguf_file import open_gguf
from cpu_kernels.block_formats import FORMATS
from edgeq.errors import CalibrationError, RecipeError
from edgeq.quantizers import Inputs, make_quantizer
from edgeq.quantizers.factor import damped
from edgeq.quantizers.gptq import Gptq, row_losses
from edgeq.quantizers.learned import Learned
from edgeq.runtime.encoders import decode, encode
from edgeq.testing import quantizer_checks
from tests.command_line import done, refused

T = GGMLQuantizationType
METHODS = ("sign", "adaround", "flexround")
CHECKED = {
    "learned:steps=20": (T.Q4_0, T.Q4_1, T.Q2_K, T.Q4_K, T.IQ4_NL, T.NVFP4, T.TQ2_0),
    "learned:steps=20,start=rtn": (T.Q4_0, T.Q3_K, T.MXFP4, T.IQ4_XS),
    "learned:steps=20,method=adaround,start=rtn": (T.Q5_1, T.Q2_K),
    "learned:steps=20,method=flexround,start=rtn": (T.Q5_0, T.Q4_K),
    "learned:steps=20,slope=straight": (T.Q6_K,),
}
CHECKS = [
    pytest.param(check, id=f"{spec}-{name}")
    for spec, qtypes in CHECKED.items()
    for name, check in quantizer_checks(make_quantizer(spec), qtypes)
]


@pytest.mark.parametrize("check", CHECKS)
def test_learned_keeps_the_promises_of_a_quantizer(check):
    check()


@pytest.fixture(scope="module")
def layer():
    """A weight, and inputs that are strongly correlated as a model's are."""
    rng = np.random.default_rng(0)
    mixing = np.eye(256) + rng.standard_normal((256, 256)) / 16
    tokens = rng.standard_normal((1024, 256)) @ mixing * np.exp(rng.standard_normal(256))
    hessian = (2 / 1024 * tokens.T @ tokens).astype(np.float32)
    weight = (0.02 * rng.standard_normal((32, 256))).astype(np.float32)
    return weight, Inputs(np.square(tokens).mean(axis=0)[None].astype(np.float32), hessian[None])


def losses(packed, qtype, weight, hessian, shrinkage=0.5):
    return row_losses(decode(packed, qtype) - weight, damped(hessian[0], shrinkage, 0.01))


# Of round-to-nearest's loss, what each method may leave of it here in 50 steps.
LIMITS = {
    ("sign", T.Q4_0): 0.70,
    ("sign", T.Q4_K): 0.80,
    ("sign", T.Q2_K): 0.80,
    ("sign", T.IQ4_NL): 0.70,
    ("flexround", T.Q4_0): 0.70,
    ("flexround", T.Q4_K): 0.75,
    ("flexround", T.Q2_K): 0.92,
    ("flexround", T.IQ4_NL): 0.70,
    ("adaround", T.Q4_0): 0.85,
    ("adaround", T.Q4_K): 0.85,
    ("adaround", T.Q2_K): 0.85,
    ("adaround", T.IQ4_NL): 0.85,
}


@pytest.mark.parametrize(("method", "qtype"), LIMITS)
def test_the_loss_falls_below_that_of_rtn_in_every_row_that_changes(layer, method, qtype):
    weight, inputs = layer
    quantizer = Learned(method=method, start="rtn", steps=50, shrinkage=0)
    rounded = quantizer.quantize("w", weight, qtype, inputs)
    nearest = encode(weight, qtype, inputs.importances)
    after = losses(rounded.packed, qtype, weight, inputs.hessian, shrinkage=0)
    before = losses(nearest, qtype, weight, inputs.hessian, shrinkage=0)
    changed = (rounded.packed != nearest).any(axis=1)
    assert after.sum() < LIMITS[method, qtype] * before.sum()
    assert (after[changed] < before[changed]).all()
    assert rounded.facts["rows_better_than_start"] == changed.mean() > 0.5
    assert rounded.facts["loss"] == pytest.approx(after.sum(), rel=1e-4)
    assert rounded.facts["loss_start"] == rounded.facts["loss_rtn"]
    assert rounded.facts["loss_rtn"] == pytest.approx(before.sum(), rel=1e-4)
    fields, codes = FORMATS[qtype].unpack(rounded.packed)
    assert np.array_equal(FORMATS[qtype].pack(fields, codes), rounded.packed)


@pytest.mark.parametrize("method", METHODS)
def test_it_goes_on_from_where_gptq_ends(layer, method):
    weight, inputs = layer
    started = Gptq(sweeps=1).quantize("w", weight, T.Q4_0, inputs)
    rounded = Learned(method=method, steps=30).quantize("w", weight, T.Q4_0, inputs)
    before = losses(started.packed, T.Q4_0, weight, inputs.hessian)
    after = losses(rounded.packed, T.Q4_0, weight, inputs.hessian)
    assert (after <= before).all()
    assert rounded.facts["loss_start"] == pytest.approx(started.facts["loss"], rel=1e-4)
    if method == "sign":
        assert after.sum() < before.sum()


def test_the_slope_over_both_codes_leads_lower_than_one_straight_through(layer):
    weight, inputs = layer
    found = [
        Learned(start="rtn", steps=50, slope=slope).quantize("w", weight, T.Q4_0, inputs)
        for slope in ("secant", "straight")
    ]
    assert found[0].facts["loss"] < 0.9 * found[1].facts["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_input_gives_the_same_bytes(layer, method):
    weight, inputs = layer
    quantizer = Learned(method=method, steps=10)
    first, second = (quantizer.quantize("w", weight, T.Q4_K, inputs) for _ in range(2))
    assert np.array_equal(first.packed, second.packed)
    assert first.facts == second.facts


def test_many_rows_are_learned_as_few_are(layer, monkeypatch):
    weight, inputs = layer
    quantizer = Learned(steps=10)
    whole = quantizer.quantize("w", weight, T.Q4_K, inputs)
    monkeypatch.setattr("edgeq.quantizers.learning._ROWS", 16)
    parts = quantizer.quantize("w", weight, T.Q4_K, inputs)
    # sums of another matrix product may differ in the last bit
    assert (whole.packed != parts.packed).any(axis=1).mean() < 0.1


@pytest.mark.parametrize("start", ["gptq", "rtn"])
def test_what_cannot_be_learned_stays_as_it_starts_and_says_why(layer, start):
    weight, inputs = layer
    quantizer = Learned(start=start, steps=5)
    lattice = quantizer.quantize("w", weight, T.IQ3_XXS, inputs)
    said = f"{start}: the codes of IQ3_XXS do not stand for single weights"
    assert lattice.facts["fallback"] == said
    expected = {
        "gptq": Gptq(sweeps=1).quantize("w", weight, T.IQ3_XXS, inputs).packed,
        "rtn": encode(weight, T.IQ3_XXS, inputs.importances),
    }
    assert np.array_equal(lattice.packed, expected[start])
    blind = quantizer.quantize("w", weight, T.Q4_0, dataclasses.replace(inputs, hessian=None))
    assert blind.facts == {"fallback": "rtn: no second moments of its inputs"}
    assert np.array_equal(blind.packed, encode(weight, T.Q4_0, inputs.importances))
    moments = np.concatenate([inputs.hessian, np.zeros_like(inputs.hessian)])
    experts = Inputs(np.repeat(inputs.importances, 2, axis=0), moments)
    rounded = quantizer.quantize("w", np.stack([weight, weight]), T.Q4_0, experts)
    assert rounded.facts["fallback"] == "rtn: 1 of its matrices saw no input, or are zero"
    assert rounded.facts["loss"] < rounded.facts["loss_start"]


def test_second_moments_of_another_model_are_refused(layer):
    weight, inputs = layer
    for start in ("gptq", "rtn"):
        with pytest.raises(CalibrationError, match="w: second moments of shape"):
            Learned(start=start).quantize(
                "w", weight[:, :128], T.Q4_0, Inputs(None, inputs.hessian)
            )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("learned:method=adam", "learned: unknown method 'adam'; known: adaround, flexround, sign"),
        ("learned:slope=steep", "learned: unknown slope 'steep'; known: secant, straight"),
        ("learned:start=gtpq", "learned: unknown start 'gtpq'; known: gptq, rtn. Did you mean"),
        ("learned:steps=0", "steps=0, sweeps=1, lr=0.0; expected a step or more"),
        ("learned:steps=many", "steps is 'many', expected a value like 0"),
        ("learned:sweeps=-1", "sweeps=-1"),
        ("learned:lr=2", "lr=2.0; expected"),
        ("learned:lr=nan", "lr=nan"),
        ("learned:shrinkage=1.5", "shrinkage=1.5"),
        ("learned:dampening_frac=inf", "dampening_frac=inf"),
        ("learned:seed=1", "unknown setting 'seed'"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(spec, said):
    with pytest.raises(RecipeError, match=said) as caught:
        make_quantizer(spec)
    assert "\n" not in str(caught.value)


def test_export_with_learned_rounding_is_nearer_than_rtn(tiny, texts, tmp_path):
    command = ("export", tiny, tmp_path / "out.gguf", "--text", texts[0], "--type", "Q4_0")
    flags = ("--ctx", 64, "--chunks", 24, "--eval-chunks", 2, "--transform", "none", "--fisher", 0)
    report = done(*command, *flags, "--quantizer", "learned:steps=20", "--json").json()
    facts = report["rounding"]["tensors"]["blk.0.ffn_up.weight"]
    assert facts["loss"] <= facts["loss_start"] < facts["loss_rtn"]
    assert open_gguf(tmp_path / "out.gguf").tensors["blk.0.ffn_up.weight"].qtype == T.Q4_0
    divergences = [report["files"][0]["evaluation"]["summary"]["kld"]["value"]]
    report = done(*command, *flags, "--quantizer", "rtn", "--json").json()
    divergences.append(report["files"][0]["evaluation"]["summary"]["kld"]["value"])
    assert divergences[0] < divergences[1]
    line = refused(*command, "--quantizer", "learned:method=adam")
    assert line.startswith("edgeq: learned: unknown method 'adam'")
