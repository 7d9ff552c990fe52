"""Error feedback from row to row, under second moments of gradients at the outputs."""

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T

from edgeq.errors import CalibrationError
from edgeq.quantizers import Inputs, output_feedback
from edgeq.quantizers.factor import damped
from edgeq.quantizers.gptq import Gptq
from edgeq.runtime.encoders import decode
from tests.command_line import done, refused
from tests.test_rounding import normal, second_moments


def gradients(n_out, n_groups=1):
    """Second moments of gradients that go together."""
    return np.stack([second_moments(n_out // n_groups, seed) for seed in range(7, 7 + n_groups)])


def made(n_out, n_in):
    hessian = second_moments(n_in)
    return normal(n_out, n_in), Inputs(np.diagonal(hessian)[None].copy(), hessian[None])


def loss(error, hessian, outputs):
    """tr(G E H Eᵀ), groups apart."""
    groups = error.reshape(len(outputs), -1, error.shape[1])
    return sum(np.vdot(g @ e @ hessian, e) for g, e in zip(outputs, groups, strict=True))


def rounded(weight, qtype, inputs, outputs, **settings):
    inputs = Inputs(inputs.importances, inputs.hessian, outputs)
    return Gptq(**settings).quantize("w", weight, qtype, inputs).packed


@pytest.mark.parametrize(
    "qtype", [T.Q4_0, T.Q2_K, T.Q4_K, T.IQ4_NL, T.TQ2_0, T.IQ2_XXS, T.IQ3_S], ids=lambda t: t.name
)
@pytest.mark.parametrize("n_groups", [1, 2])
def test_the_loss_seen_from_both_sides_falls(qtype, n_groups):
    weight, inputs = made(160, 512)
    outputs = gradients(160, n_groups)
    losses = {}
    for shrinkage in (0.1, 1.0):
        packed = rounded(weight, qtype, inputs, outputs, output_shrinkage=shrinkage, sweeps=1)
        error = decode(packed, qtype) - weight
        losses[shrinkage] = loss(error, inputs.hessian[0], outputs)
    assert losses[0.1] < 0.9 * losses[1.0]


def test_it_is_the_textbooks_elimination(monkeypatch):
    """One row at a time, each moved by the condition that the loss is least in what is left."""
    monkeypatch.setattr(output_feedback, "ROWS", 1)
    weight, inputs = made(24, 256)
    outputs = gradients(24)
    found = rounded(weight, T.Q3_K, inputs, outputs, output_shrinkage=0.2)
    g = damped(outputs[0], 0.2, 0.01).astype(np.float64)
    order = np.argsort(-np.diagonal(g), kind="stable")
    error = np.zeros(weight.shape)
    for place, row in enumerate(order):
        done_before, left = order[:place], order[place:]
        free = -np.linalg.solve(
            g[np.ix_(left, left)], g[np.ix_(left, done_before)] @ error[done_before]
        )
        moved = (weight[row] + free[0]).astype(np.float32)[None]
        packed = Gptq().quantize("w", moved, T.Q3_K, inputs).packed
        assert np.mean(found[row] == packed[0]) > 0.9  # but for float32's rounding
        error[row] = decode(found[row][None], T.Q3_K)[0] - weight[row]


@pytest.mark.parametrize("outputs", [np.eye(150), np.zeros((150, 150))])
def test_rows_stay_alone_where_gradients_do_not_go_together(outputs):
    weight, inputs = made(150, 256)
    outputs = outputs.astype(np.float32)[None]
    alone = rounded(weight, T.Q4_K, inputs, None)
    assert np.array_equal(rounded(weight, T.Q4_K, inputs, outputs), alone)
    assert np.array_equal(
        rounded(weight, T.Q4_K, inputs, gradients(150), output_shrinkage=1), alone
    )


def test_gradients_that_are_not_finite_are_refused():
    weight, inputs = made(64, 256)
    outputs = gradients(64)
    outputs[0, 3, 4] = np.nan
    with pytest.raises(CalibrationError, match=r"^w: the gradients at its outputs are not finite"):
        rounded(weight, T.Q4_0, inputs, outputs)


SHORT = ("--ctx", 64, "--chunks", 8, "--type", "Q4_0", "--no-prove")


def test_export_feeds_back_where_auto_rounds_or_it_is_asked_for(tiny, texts, works, tmp_path):
    command = ("export", tiny, tmp_path / "out.gguf", *SHORT, "--text", texts[0])
    methods, files = [], []
    for flags in (
        ["--effort", "default"],
        ["--effort", "fast"],
        ["--quantizer", "gptq"],
        ["--quantizer", "gptq", "--output-feedback", "--fisher", 0],
        ["--quantizer", "gptq", "--output-feedback", "--fisher", 0, "--jobs", 2],
    ):
        methods.append(done(*command, *flags, "--json").json()["rounding"]["method"])
        files.append((tmp_path / "out.gguf").read_bytes())
    assert [one["output_feedback"] for one in methods] == [True, False, False, True, True]
    assert files[0] != files[1]
    assert files[3] == files[4] != files[2]
    assert "gradients.gguf" in works[0].made
    assert "gradients.gguf" not in works[1].made


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--fisher-groups", 2], "--fisher-groups"),
        (["--quantizer", "learned"], "the quantizer learned does not feed errors back from row"),
        (["--no-imatrix"], "leave --no-imatrix out"),
        (["--quantizer", "gptq:output_shrinkage=2"], "output_shrinkage=2.0, expected 0 to 1"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, told, tiny, tmp_path):
    command = ("export", tiny, tmp_path / "out.gguf", "--output-feedback", *flags)
    assert told in refused(*command)
