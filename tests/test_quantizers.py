import dataclasses

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from edgeq.errors import CalibrationError, RecipeError, RegistryError
from edgeq.quantizers import Inputs, Rounded, make_quantizer
from edgeq.quantizers.gptq import Gptq
from edgeq.quantizers.rtn import RoundToNearest
from edgeq.runtime.encoders import encode
from edgeq.testing import ConformanceError, check_quantizer, quantizer_checks

T = GGMLQuantizationType
WIDE = (T.Q4_0, T.Q4_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.MXFP4, T.NVFP4)
NARROW = (T.Q5_1, T.IQ4_NL)
SPECS = {
    "rtn": (*WIDE, T.TQ2_0, T.IQ4_XS, T.IQ2_XXS),
    "gptq": (*WIDE, T.IQ2_S, T.IQ3_XXS, T.IQ1_S),
    "gptq:search=static,order=activation": NARROW,
    "gptq:search=static,order=natural": NARROW,
    "gptq:search=static,order=back-to-front": NARROW,
    "gptq:search=static,order=min-pivot": NARROW,
    "gptq:feedback=false,reach=2": (T.Q5_K, T.TQ2_0),
    "gptq:sweeps=0": NARROW,
}
CHECKS = [
    pytest.param(check, id=f"{spec}-{name}")
    for spec, qtypes in SPECS.items()
    for name, check in quantizer_checks(make_quantizer(spec), qtypes)
]


@pytest.mark.parametrize("check", CHECKS)
def test_built_in_quantizers_keep_their_promises(check):
    check()


class Broken(RoundToNearest):
    """Round to nearest with a fault."""

    def __init__(self, fault):
        self.fault = fault
        self.calls = 0

    def quantize(self, name, weight, qtype, inputs, *, n_threads=None):
        self.calls += 1
        if self.fault == "writes" and weight.flags.writeable:
            weight[0, 0] += 1
        if self.fault == "worse":
            weight = weight * np.float32(1.1)
        if self.fault == "error":
            weight = np.nan_to_num(weight)
        packed = super().quantize(name, weight, qtype, inputs, n_threads=n_threads).packed.copy()
        if self.fault == "chance":
            packed[0, 2] ^= self.calls & 1
        if self.fault == "threads" and n_threads == 2:
            packed[0, 2] ^= 1
        if self.fault == "nan":
            packed[0, :2] = 0xFF
        if self.fault == "shape":
            packed = packed[:-1]
        if self.fault == "order" and not weight.flags.c_contiguous:
            packed[0, 2] ^= 1
        if self.fault == "experts" and weight.ndim == 3:
            packed = packed[::-1]
        if self.fault == "zeros":
            packed[~weight.any(axis=-1).ravel(), :] = [0x00, 0x14, *[0] * 16] * (
                len(packed[0]) // 18
            )
        return Rounded(packed)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("writes", "inputs_are_not_written.* 1 numbers of an input changed, expected none"),
        ("worse", "objective_is_not_worse_than_rtn.* a loss of"),
        ("chance", "same_input_gives_same_bytes.* 1 of 6 rows differ with"),
        ("threads", "same_input_gives_same_bytes.* 1 of 6 rows differ with 2 threads"),
        ("nan", "rows_are_what_ggml_reads.* bytes that ggml refuses, expected valid ones"),
        ("shape", r"rows_are_what_ggml_reads.* uint8 of shape \(5, 18\), expected .*\(6, 18\)"),
        ("order", "layout_in_memory_does_not_matter.* 1 of 6 rows differ in Fortran order"),
        ("experts", "experts_equal_matrices_one_by_one.* as experts"),
        ("zeros", "degenerate rows .* in a row that rtn keeps at 0"),
        ("error", "got no error, expected an EdgeqError or ConversionError"),
    ],
)
def test_a_faulty_quantizer_is_caught(fault, said):
    with pytest.raises(ConformanceError, match=said) as caught:
        check_quantizer(Broken(fault), [T.Q4_0])
    assert "\n" not in str(caught.value)
    assert "Broken at Q4_0" in str(caught.value)


def test_a_class_is_checked_as_well_as_an_object():
    check_quantizer(RoundToNearest, [T.Q8_0])
    names = [name for name, _ in quantizer_checks(RoundToNearest)]
    assert len(names) == len(set(names)) > 150
    assert "IQ3_S-errors_are_one_line" in names
    assert not any(name.startswith(("F32", "BF16")) for name in names)


def test_a_spec_sets_the_fields_of_a_quantizer():
    made = make_quantizer("gptq:order=natural,feedback=False,shrinkage=0.5,sweeps=3")
    assert made == Gptq(order="natural", feedback=False, shrinkage=0.5, sweeps=3)
    assert make_quantizer("gptq") == Gptq()
    assert isinstance(make_quantizer("rtn"), RoundToNearest)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gptq:ordr=natural", "unknown setting 'ordr'; known: .* Did you mean 'order'"),
        ("gptq:order", "order"),
        ("gptq:order=sorted", "gptq: unknown order 'sorted'; known: activation, back-to-front"),
        ("gptq:search=grid", "gptq: unknown search 'grid'; known: static, batch"),
        ("gptq:sweeps=two", "gptq:sweeps=two: sweeps is 'two', expected a value like 0"),
        ("gptq:sweeps=-1", "sweeps=-1, reach=1; expected 0 or more"),
        ("gptq:reach=-2", "reach=-2; expected 0 or more"),
        ("gptq:feedback=maybe", "feedback is 'maybe', expected true or false"),
        ("gptq:shrinkage=1.5", "shrinkage=1.5"),
        ("gptq:shrinkage=nan", "shrinkage=nan"),
        ("gptq:dampening_frac=inf", "dampening_frac=inf"),
        ("rtn:order=natural", "rtn has no settings"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(spec, said):
    with pytest.raises(RecipeError, match=said) as caught:
        make_quantizer(spec)
    assert "\n" not in str(caught.value)


def test_an_unknown_quantizer_is_answered_with_the_nearest():
    with pytest.raises(RegistryError, match=r"unknown quantizer 'gtpq'; known: .*'gptq'"):
        make_quantizer("gtpq:order=natural")


def ordinary(n_in=64, n_out=8, n_mat=1):
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((n_mat, 200, n_in)) * np.exp(rng.standard_normal(n_in))
    hessian = (2 / 200 * tokens.transpose(0, 2, 1) @ tokens).astype(np.float32)
    weight = (0.02 * rng.standard_normal((n_mat, n_out, n_in))).astype(np.float32)
    importances = np.square(tokens).mean(axis=1).astype(np.float32)
    return (weight if n_mat > 1 else weight[0]), Inputs(importances, hessian)


def test_second_moments_that_are_not_finite_or_of_another_model_are_refused():
    weight, inputs = ordinary()
    infinite = inputs.hessian.copy()
    infinite[0, 3, 4] = np.nan
    thrice = np.concatenate([inputs.hessian] * 3)  # 8 rows are not 3 groups
    for hessian, said in (
        (thrice, r"of shape \(3, 64, 64\), expected \(1, 64, 64\)"),
        (infinite, "^blk.0.attn_q.weight: its second moments are not finite, expected"),
        (inputs.hessian[:, :32, :32], r"of shape \(1, 32, 32\), expected \(1, 64, 64\)"),
    ):
        given = dataclasses.replace(inputs, hessian=hessian)
        with pytest.raises(CalibrationError, match=said) as caught:
            Gptq().quantize("blk.0.attn_q.weight", weight, T.Q4_0, given)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_rounded_with_feedback_is_rtn_and_the_facts_say_why():
    weight, inputs = ordinary(256)
    rtn = RoundToNearest().quantize("w", weight, T.Q1_0, inputs).packed
    found = Gptq().quantize("w", weight, T.Q1_0, inputs)
    assert np.array_equal(found.packed, rtn)
    assert found.facts == {"fallback": "rtn: Q1_0 is no grid that is known here"}
    known = Gptq().quantize("w", weight, T.Q4_K, dataclasses.replace(inputs, hessian=None))
    assert np.array_equal(known.packed, encode(weight, T.Q4_K, inputs.importances))
    assert known.facts == {"fallback": "rtn: no second moments of its inputs"}


def test_groups_of_rows_are_rounded_with_second_moments_of_their_own():
    weight, inputs = ordinary(n_out=12)
    other = inputs.hessian[:, ::-1, ::-1]
    grouped = np.concatenate([inputs.hessian, other, inputs.hessian])
    found = Gptq().quantize("w", weight, T.Q4_0, dataclasses.replace(inputs, hessian=grouped))
    for rows, hessian in ((slice(0, 4), inputs.hessian), (slice(4, 8), other)):
        alone = dataclasses.replace(inputs, hessian=np.ascontiguousarray(hessian))
        part = Gptq().quantize("w", weight[rows], T.Q4_0, alone)
        assert np.array_equal(found.packed[rows], part.packed)


def test_an_expert_that_no_token_reached_is_rtn_and_the_facts_say_so():
    weight, inputs = ordinary(n_mat=3)
    hessian = inputs.hessian.copy()
    hessian[1] = 0
    found = Gptq().quantize("w", weight, T.Q4_0, dataclasses.replace(inputs, hessian=hessian))
    rtn = encode(weight, T.Q4_0, inputs.importances)
    same = (found.packed == rtn).all(axis=1).reshape(3, 8).all(axis=1)
    assert same.tolist() == [False, True, False]
    assert found.facts["fallback"].startswith("rtn: 1 of its matrices saw no input")
    assert found.facts["rows_better_than_rtn"] == 1


@pytest.mark.parametrize("strength", [1e-30, 1e-12, 1e12, 1e30])
def test_the_unit_of_the_second_moments_does_not_matter_much(strength):
    weight, inputs = ordinary()
    found = Gptq().quantize("w", weight, T.Q4_0, inputs).facts
    moved = Inputs(inputs.importances, inputs.hessian * np.float32(strength))
    facts = Gptq().quantize("w", weight, T.Q4_0, moved).facts
    gain, moved_gain = (f["loss"] / f["loss_rtn"] for f in (found, facts))
    assert moved_gain == pytest.approx(gain, rel=0.05)
