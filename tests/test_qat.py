"""Quantization-aware training: what is simulated is what the exported file holds."""

import json

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.gguf_file import open_gguf
from edgeq.errors import CalibrationError, RecipeError
from edgeq.layerwise.origins import Origin
from tests import tiny_models
from tests.command_line import done

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
qat = pytest.importorskip("edgeq.qat")

T = GGMLQuantizationType
TOKENS = torch.tensor(np.random.RandomState(0).randint(3, 400, (2, 24)))


@pytest.fixture
def prepared(tmp_path):
    """Return a function that builds (model, its directory, its GGUF, a plan, an imatrix)."""

    def make(name, preset="Q4_0"):
        directory = tiny_models.build(name, tmp_path).directory
        path, plan = tmp_path / f"{name}.gguf", tmp_path / f"{name}.json"
        convert(open_checkpoint(directory), path, ftype="f32")
        done("plan", path, "-o", plan, "--type", preset)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return model, directory, path, plan

    return make


def trained(model, n_steps=3):
    """Take steps on a loss that has a gradient everywhere, and return its values."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def exported(directory, source, plan, out, *flags):
    """Export what was saved; the tokenizer is the source's."""
    for path in source.iterdir():
        if "safetensors" not in path.name and not (directory / path.name).exists():
            (directory / path.name).write_bytes(path.read_bytes())
    done("export", directory, out, "--plan", plan, "--quantizer", "rtn", "--no-prove", *flags)
    return open_gguf(out)


FAMILIES = ("llama3", "qwen2", "gemma3", "phi-longrope", "gpt2", "mixtral")


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        *((name, "straight-through") for name in FAMILIES),
        ("llama3", "trust"),
        *((name, "lsq") for name in ("llama3", "gpt2", "mixtral")),
    ],
)
def test_the_file_holds_what_was_simulated(name, estimator, prepared, tmp_path):
    """The fine-tuned model's logits are those of a model that is loaded from the exported file."""
    model, directory, path, plan = prepared(name)
    before = model(input_ids=TOKENS).logits.detach()
    qat.simulate(model, path, plan, estimator=estimator)
    assert (model(input_ids=TOKENS).logits - before).abs().max() > 1e-3
    losses = trained(model)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        simulated = model(input_ids=TOKENS).logits
    saved, out = tmp_path / "saved", tmp_path / "out.gguf"
    qat.save(model, saved)
    with torch.no_grad():
        assert (model(input_ids=TOKENS).logits - simulated).abs().max() > 1e-3  # float again
    file = exported(saved, directory, plan, out, "--no-imatrix")
    assert any(info.qtype == T.Q4_0 for info in file.tensors.values())
    layerwise = pytest.importorskip("edgeq.layerwise").LayerwiseModel.open(file, directory)
    states = layerwise.embed(TOKENS.numpy().astype(np.int32))
    for layer in range(layerwise.n_layers):
        loaded = layerwise.load(layer)
        states = [loaded.run(hidden) for hidden in states]
    for hidden, wanted in zip(states, simulated, strict=True):
        np.testing.assert_allclose(layerwise.logits(hidden), wanted, rtol=0, atol=2e-4)


def test_importances_and_mixed_types_are_those_of_the_export(prepared, tmp_path):
    """k-quants with an imatrix, one tensor left float."""
    model, directory, path, plan = prepared("smollm2", "Q8_0")
    told = json.loads(plan.read_text())
    told["tensors"]["blk.0.ffn_up.weight"]["type"] = "F16"
    told["tensors"]["blk.1.ffn_down.weight"]["type"] = "Q4_1"
    plan.write_text(json.dumps(told))
    imatrix = tmp_path / "imatrix.gguf"
    done("calibrate", path, "-o", imatrix, "--text", text_file(tmp_path))
    qat.simulate(model, path, plan, imatrix=imatrix, n_threads=1)
    trained(model, 1)
    layers = model.model.layers
    up, down = layers[0].mlp.up_proj, layers[1].mlp.down_proj
    simulated = down.weight.detach().numpy().copy()
    half = up.weight.detach().numpy().copy()
    qat.save(model, tmp_path / "saved")
    out = tmp_path / "out.gguf"
    file = exported(tmp_path / "saved", directory, plan, out, "--imatrix", imatrix)
    np.testing.assert_array_equal(file.read_float("blk.1.ffn_down.weight"), simulated)
    np.testing.assert_array_equal(file.read_float("blk.0.ffn_up.weight"), half)


def text_file(directory):
    path = directory / "text.txt"
    path.write_text(" ".join(f"a word {n}" for n in range(4000)))
    return path


def test_a_tied_output_stays_the_embedding(prepared, tmp_path):
    model, _, path, plan = prepared("smollm2")
    qat.simulate(model, path, plan)
    head, embedding = model.lm_head, model.model.embed_tokens
    assert head.parametrizations.weight.original is embedding.parametrizations.weight.original
    trained(model, 1)
    assert torch.equal(head.weight, embedding.weight)
    qat.save(model, tmp_path / "saved")
    assert head.weight is embedding.weight


def test_trust_gives_no_gradient_to_what_is_far_from_its_rounded_value(prepared):
    model, _, path, plan = prepared("smollm2")
    gradients = {}
    for estimator in ("straight-through", "trust"):
        simulated = transformers.AutoModelForCausalLM.from_config(model.config)
        simulated.load_state_dict(model.state_dict())
        qat.simulate(simulated, path, plan, estimator=estimator)
        simulated(input_ids=TOKENS, labels=TOKENS).loss.backward()
        weight = simulated.model.layers[0].mlp.up_proj.parametrizations.weight.original
        rounded = simulated.model.layers[0].mlp.up_proj.weight
        gradients[estimator] = weight.grad
    error = (weight - rounded).detach().abs()
    is_far = error > error.square().mean().sqrt()
    assert 0.1 < is_far.float().mean() < 0.9
    assert not gradients["trust"][is_far].any()
    assert torch.equal(gradients["trust"][~is_far], gradients["straight-through"][~is_far])
    assert gradients["straight-through"][is_far].any()


# --------------------------------------------------------------------------------- learned steps


def learned(qtype, weight, share, n_steps=1):
    """Return what rounds a weight whose limits are a share of its groups' largest weights."""
    blocks = qat._Blocks((Origin("w", None, False, 0.0, None),), {"w": qtype}, {}, "lsq", 1)
    blocks.learn_steps(weight)
    (steps,) = blocks.steps
    groups = weight.unflatten(-1, (-1, steps.group_size)).abs()
    with torch.no_grad():  # steps are half floats, as in the file
        steps.limits.copy_((groups.amax(dim=-1) * share / n_steps).half().float() * n_steps)
    return blocks, steps


@pytest.mark.parametrize(("qtype", "n_steps"), [(T.TQ2_0, 1), (T.TQ1_0, 1), (T.Q8_0, 127)])
def test_gradients_are_those_of_lsq(qtype, n_steps):
    """Its own definition, by autograd: s * round(clip(w / s)), rounding passed straight through."""
    generator = np.random.default_rng(0)
    weight = torch.from_numpy(generator.standard_normal((8, 512), np.float32))
    at_rounded = torch.from_numpy(generator.standard_normal((8, 512), np.float32))
    blocks, steps = learned(qtype, weight, 0.6, n_steps)
    w, limits = weight.clone().requires_grad_(), steps.limits.detach().clone().requires_grad_()
    step = (limits / n_steps).repeat_interleave(steps.group_size, dim=-1)
    inner = (w / step).clamp(-n_steps, n_steps)
    expected = step * (inner + (inner.round() - inner).detach())
    expected.backward(at_rounded)
    mine = weight.clone().requires_grad_()
    rounded = blocks(mine)
    np.testing.assert_allclose(rounded.detach(), expected.detach(), rtol=0, atol=1e-6)
    rounded.backward(at_rounded)
    np.testing.assert_allclose(mine.grad, w.grad, rtol=1e-5)
    assert 0.05 < (w.grad == 0).float().mean() < 0.95
    found = steps.limits.grad / steps.gradient_scale
    np.testing.assert_allclose(found, limits.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "IQ4_NL", "Q4_K", "Q6_K"])
def test_limits_have_the_gradient_of_the_rounding_error(name):
    """Its true derivative, through ggml's encoder; of many weights, so that steps even out."""
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((256, 1024), np.float32))
    blocks, steps = learned(T[name], weight, 0.6)
    limits = steps.limits.detach().clone()

    def error(factor):
        with torch.no_grad():
            steps.limits.copy_(factor * limits)
        return (blocks(weight) - weight).double().square().sum()

    error(1.0).backward()
    found = float((steps.limits.grad * limits).sum()) / steps.gradient_scale
    with torch.no_grad():
        expected = float(error(1.02) - error(0.98)) / 0.04
    assert found == pytest.approx(expected, rel=0.05)


def test_limits_begin_as_lsq_does_and_move_only_where_they_cut():
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 512), np.float32))
    blocks = qat._Blocks((Origin("w", None, False, 0.0, None),), {"w": T.TQ2_0}, {}, "lsq", 1)
    blocks.learn_steps(weight)
    (steps,) = blocks.steps
    mean = weight.unflatten(-1, (-1, 256)).abs().mean(dim=-1)
    assert torch.equal(steps.limits.detach(), 2 * mean)
    with torch.no_grad():
        steps.limits[0] = 100.0
        steps.limits[1] = -1.0
    blocks(weight).sum().backward()
    assert not steps.limits.grad[0].any()
    assert steps.limits.grad[1:].all()
    assert torch.isfinite(steps.limits.grad).all()


def test_ternary_steps_are_learned_and_exported_exactly(prepared, tmp_path):
    """Round to nearest takes a ternary scale from the largest weight, and most become zero."""
    losses, simulated = {}, {}
    for estimator in ("straight-through", "lsq"):
        model, directory, path, plan = prepared("llama2", "TQ2_0")
        float_weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        qat.simulate(model, path, plan, estimator=estimator)
        up = model.model.layers[0].mlp.up_proj
        simulated[estimator] = float((up.weight - float_weight).detach().square().sum())
        begin = [p.detach().clone() for n, p in model.named_parameters() if "limits" in n]
        losses[estimator] = trained(model, 6)
    assert simulated["lsq"] < 0.7 * simulated["straight-through"]
    assert losses["lsq"][-1] < losses["lsq"][0]
    after = [p for n, p in model.named_parameters() if n.endswith(".limits")]
    assert len(begin) == len(after) > 10
    assert all(not torch.equal(one, other) for one, other in zip(begin, after, strict=True))
    wanted = up.weight.detach().numpy().copy()
    qat.save(model, tmp_path / "saved")
    assert not any("limits" in name for name, _ in model.named_parameters())
    file = exported(tmp_path / "saved", directory, plan, tmp_path / "out.gguf", "--no-imatrix")
    assert file.tensors["blk.0.ffn_up.weight"].qtype == T.TQ2_0
    np.testing.assert_array_equal(file.read_float("blk.0.ffn_up.weight"), wanted)


def test_what_does_not_fit_is_refused(prepared, tmp_path):
    model, _, path, plan = prepared("smollm2")
    with pytest.raises(
        RecipeError, match=r"unknown estimator .lqs.; known: straight-through, trust, lsq"
    ):
        qat.simulate(model, path, plan, estimator="lqs")
    told = json.loads(plan.read_text())
    told["tensors"]["blk.1.ffn_up.weight"]["type"] = "MXFP4"
    (tmp_path / "other.json").write_text(json.dumps(told))
    message = r"blk\.1\.ffn_up\.weight: lsq learns .* half floats, MXFP4 has none\. Choose another"
    with pytest.raises(RecipeError, match=message):
        qat.simulate(model, path, tmp_path / "other.json", estimator="lsq")
    assert not qat.simulated_modules(model)
    with pytest.raises(CalibrationError, match="none of its weights is simulated"):
        qat.save(model, tmp_path / "saved")
    with pytest.raises(CalibrationError, match="no architecture that edgeq converts"):
        qat.simulate(model.model, path, plan)
    with pytest.raises(CalibrationError, match=r"expected torch\.float32"):
        qat.simulate(model.to(torch.bfloat16), path, plan)
    other, _, _, _ = prepared("qwen2")
    with pytest.raises(CalibrationError, match=r"different models|no place"):
        qat.simulate(other, path, plan)
    assert not (tmp_path / "saved").exists()
