"""The transformers quantizer: torch models whose weights are the blocks of an exported file."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

import edgeq
from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.errors import ConversionError
from converters.gguf_file import TensorSource, open_gguf, write_gguf
from edgeq.errors import CalibrationError, EdgeqError, RecipeError
from edgeq.runtime.model import Model
from tests import tiny_gguf, tiny_models
from tests.command_line import done

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
quantizer = pytest.importorskip("edgeq.transformers_quantizer")
EdgeqConfig = quantizer.EdgeqConfig

T = GGMLQuantizationType
TOKENS = np.random.RandomState(0).randint(3, 400, 24)
NATS = 5e-3  # llama.cpp rounds activations to 8 bits, torch does not
FAMILIES = {  # llama2's rows take k-quants
    "llama2": "Q4_K_M",
    "llama3": "Q5_1",
    "smollm2": "Q4_0",
    "qwen2": "Q4_0",
    "gemma3": "Q8_0",
    "mixtral": "Q4_0",
    "gpt2": "Q5_0",
}


def load(directory, **settings):
    given = {"dtype": torch.float32}  # bfloat16 otherwise, as most of these are stored
    if settings:
        given = {"quantization_config": EdgeqConfig(**settings)}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **given)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS[None])).logits[0].numpy()


def weights(model):
    """Return what the model computes with, by plain names, tied ones twice."""
    return {
        f"{path}.{name}": getattr(module, name).detach()
        for path, module in model.named_modules()
        for name in [
            *(name for name, _ in module.named_parameters(recurse=False) if name != "original"),
            *getattr(module, "parametrizations", ()),
        ]
    }


def export(model, out, **settings):
    edgeq.export(model, out, quantizer="rtn", use_imatrix=False, prove=False, **settings)
    return tiny_models.digest_tensors(out)


def with_tokenizer(directory, source):
    for path in source.iterdir():
        if not (directory / path.name).exists() and "safetensors" not in path.name:
            shutil.copy(path, directory)
    return directory


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_those_of_the_exported_file_and_stay_so(name, tmp_path):
    preset = FAMILIES[name]
    directory = tiny_models.build(name, tmp_path).directory
    blocks = export(directory, tmp_path / "direct.gguf", preset=preset)
    model = load(directory, preset=preset)
    assert model.dtype == torch.float32
    # Each parameter is what a plain model has that is filled from the file.
    taken = load(directory, gguf=tmp_path / "direct.gguf")
    simulated, expected = weights(model), weights(taken)
    assert simulated.keys() == expected.keys()
    for key, values in simulated.items():
        assert torch.equal(values, expected[key]), key
    # llama.cpp computes with the file what torch computes with the model.
    with Model(str(tmp_path / "direct.gguf"), n_ctx=64, n_threads=1) as runtime:
        theirs = runtime.logits(TOKENS.astype(np.int32)).copy()
    ours = logits(model)
    assert kl_divergence(ours, theirs) < NATS
    # What is saved loads as the same model, and is exported to the same blocks.
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    assert (
        export(with_tokenizer(saved, directory), tmp_path / "again.gguf", preset=preset) == blocks
    )
    told = json.loads((saved / "config.json").read_text("utf-8"))["quantization_config"]
    assert told == {"quant_method": "edgeq", "preset": preset}
    np.testing.assert_array_equal(logits(load(saved)), ours)


def log_softmax(values):
    wide = values.astype(np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def kl_divergence(ours, theirs):
    p, q = log_softmax(theirs), log_softmax(ours)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.fixture
def tiny(tmp_path):
    return tiny_models.build("smollm2", tmp_path).directory


def planned(directory, path, changes=(), preset="Q4_0"):
    done("plan", directory, "-o", path, "--type", preset)
    told = json.loads(path.read_text("utf-8"))
    for name, qtype in dict(changes).items():
        told["tensors"][name]["type"] = qtype
    path.write_text(json.dumps(told), "utf-8")
    return path


def test_a_plan_is_kept_in_the_saved_model(tiny, tmp_path):
    up, down = "blk.0.ffn_up.weight", "blk.1.ffn_down.weight"
    plan = planned(tiny, tmp_path / "plan.json", {up: "F16", down: "Q8_0"})
    blocks = export(tiny, tmp_path / "direct.gguf", plan=plan)
    model = load(tiny, plan=plan)
    assert model.hf_quantizer.plan.types[down] == T.Q8_0
    file = open_gguf(tmp_path / "direct.gguf")
    assert file.tensors[up].qtype == T.F16
    for name, layer in ((up, model.model.layers[0].mlp.up_proj), (down, layer_1(model))):
        np.testing.assert_array_equal(layer.weight.detach().numpy(), file.read_float(name))
    again = tmp_path / "again.json"
    model.hf_quantizer.plan.write(again)
    plan.unlink()
    model.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(logits(load(tmp_path / "saved")), logits(model))
    saved = with_tokenizer(tmp_path / "saved", tiny)
    assert export(saved, tmp_path / "again.gguf", plan=again) == blocks


def layer_1(model):
    return model.model.layers[1].mlp.down_proj


def test_importances_are_those_of_the_export(tmp_path):
    directory = tiny_models.build("llama2", tmp_path).directory
    (tmp_path / "text.txt").write_text(" ".join(f"a word {n}" for n in range(400)))
    imatrix = tmp_path / "imatrix.gguf"
    done("calibrate", directory, "-o", imatrix, "--text", tmp_path / "text.txt")
    out = tmp_path / "direct.gguf"
    edgeq.export(
        directory, out, preset="Q4_K_M", quantizer="rtn", imatrix=imatrix, prove=False, n_ctx=64
    )
    model, taken = load(directory, preset="q4_k_m", imatrix=imatrix), load(directory, gguf=out)
    expected = weights(taken)
    assert all(torch.equal(values, expected[key]) for key, values in weights(model).items())
    with pytest.raises(CalibrationError, match="needs importances and there are none"):
        load(directory, preset="IQ2_XS")


def test_a_model_in_memory_is_exported_as_its_checkpoint(tiny, tmp_path):
    model, tokenizer = load(tiny, preset="Q5_0"), transformers.AutoTokenizer.from_pretrained(tiny)
    blocks = export(tiny, tmp_path / "direct.gguf", preset="Q5_0")
    assert export(model, tmp_path / "out.gguf", preset="Q5_0", tokenizer=tokenizer) == blocks


def test_a_file_of_another_basis_gives_the_same_function(tiny, tmp_path):
    rotated = tmp_path / "rotated.gguf"
    done("rotate", tiny, rotated)
    expected = logits(load(tiny))
    model = load(tiny, gguf=rotated)
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=2e-3)
    model.save_pretrained(tmp_path / "saved")
    rotated.unlink()  # what is saved needs it no more
    np.testing.assert_array_equal(logits(load(tmp_path / "saved")), logits(model))
    with pytest.raises(ConversionError, match=r"is quantized already \(edgeq\)"):
        export(with_tokenizer(tmp_path / "saved", tiny), tmp_path / "out.gguf")
    assert not model.hf_quantizer.is_trainable


def test_an_output_of_its_own_is_parted_from_the_embedding(tiny, tmp_path):
    plain = tmp_path / "plain.gguf"
    convert(open_checkpoint(tiny), plain, ftype="f32")
    file = open_gguf(plain)
    sources = [
        TensorSource(name, T.F32, info.shape, lambda name=name: file.read_float(name))
        for name, info in file.tensors.items()
    ]
    head = -2 * file.read_float("token_embd.weight")
    untied = tmp_path / "untied.gguf"
    write_gguf(
        untied,
        file.fields,
        [*sources, TensorSource("output.weight", T.F32, head.shape, lambda: head)],
    )
    model = load(tiny, gguf=untied)
    np.testing.assert_allclose(logits(model), -2 * logits(load(tiny)), rtol=0, atol=1e-4)
    model.tie_weights()
    model.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(logits(load(tmp_path / "saved")), logits(model))


def test_dequantized_it_is_a_plain_model_of_the_rounded_weights(tiny, tmp_path):
    model = load(tiny, preset="Q4_0")
    before = logits(model)
    model.dequantize()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    np.testing.assert_array_equal(logits(load(tmp_path / "plain")), before)


@pytest.mark.parametrize("fused", [False, True])
def test_its_float_weights_can_be_trained(fused, tiny, tmp_path):
    """Also by an optimizer that changes them unseen, as ``Trainer``'s own does."""
    model = load(tiny, preset="Q4_0")
    assert model.hf_quantizer.is_qat_trainable
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    losses = []
    for _ in range(3):
        loss = model(input_ids=torch.tensor(TOKENS[None]), labels=torch.tensor(TOKENS[None])).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "saved")
    export(with_tokenizer(tmp_path / "saved", tiny), tmp_path / "out.gguf", preset="Q4_0")
    taken = load(tiny, gguf=tmp_path / "out.gguf")
    np.testing.assert_array_equal(logits(taken), logits(model))


def test_the_how_to_page_runs(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.rename("model")
    page = Path(__file__).parents[1] / "docs" / "how-to" / "transformers.md"
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S):
        exec(block, names)
    assert capsys.readouterr().out == "Q4_0\n"
    np.testing.assert_array_equal(logits(names["model"]), logits(names["again"]))


def test_fallbacks_are_told(tiny, caplog):
    model = load(tiny, preset="Q4_K_M")
    assert "blocks of 256" in caplog.text
    assert "tensors have another type than Q4_K_M gives them" in caplog.text
    assert any(entry.is_fallback for entry in model.hf_quantizer.plan.entries)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "got nothing, expected one of preset, plan and gguf"),
        ({"preset": "Q4_0", "gguf": "m.gguf"}, "got preset and gguf, expected one of"),
        ({"preset": "Q4_KM"}, "unknown preset 'Q4_KM'.*Did you mean"),
        ({"plan": "missing.json"}, "missing.json: no readable plan"),
        ({"gguf": "m.gguf", "imatrix": "i.gguf"}, "got an imatrix beside gguf"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        EdgeqConfig(**settings)


def test_a_configuration_survives_as_a_dictionary(tiny, tmp_path):
    plan = planned(tiny, tmp_path / "plan.json")
    for settings in ({"preset": "q4_k"}, {"plan": plan}, {"gguf": "m.gguf"}):
        told = EdgeqConfig(**settings).to_dict()
        assert EdgeqConfig.from_dict(json.loads(json.dumps(told))).to_dict() == told
    assert EdgeqConfig(preset="q4_k").to_dict() == {"quant_method": "edgeq", "preset": "Q4_K_M"}


def test_what_is_of_another_model_is_refused(tiny, tmp_path):
    other = tiny_models.build("qwen2", tmp_path).directory
    plan, file = planned(other, tmp_path / "plan.json"), tmp_path / "other.gguf"
    with pytest.raises(RecipeError, match=r"EdgeqConfig\.plan: .*Tiny-smollm2"):
        load(tiny, plan=plan)
    export(other, file, preset="Q4_0")
    with pytest.raises(CalibrationError, match="is of architecture qwen2, but LlamaForCausalLM"):
        load(tiny, gguf=file)
    shapes = tiny_gguf.write(tmp_path / "llama.gguf", "llama")
    with pytest.raises(CalibrationError, match="of the torch model wants"):
        load(tiny, gguf=shapes)
    bad = planned(tiny, tmp_path / "bad.json", {"blk.0.ffn_up.weight": "Q4_K"})
    with pytest.raises(RecipeError, match="96 columns do not divide into Q4_K blocks of 256"):
        load(tiny, plan=bad)


def test_an_architecture_that_is_not_converted_is_refused(tmp_path):
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    with pytest.raises(CalibrationError, match="OPTForCausalLM: no architecture that edgeq"):
        load(tmp_path / "opt", preset="Q4_0")


def test_weights_that_are_not_in_memory_are_refused():
    for device_map in ("meta", {"": "disk"}, {"model": "cpu", "lm_head": "disk"}):
        with pytest.raises(CalibrationError, match=r"device_map: got .*, expected every weight"):
            quantizer.EdgeqQuantizer(EdgeqConfig("Q4_0")).validate_environment(
                device_map=device_map
            )


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_library_is_named(missing):
    code = f"import sys; sys.modules[{missing!r}] = None\nimport edgeq.transformers_quantizer"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (
        f"{missing} is not installed. Install it with: pip install 'edgeq[torch]'" in found.stderr
    )


def test_half_precision_afterwards_is_refused(tiny):
    model = load(tiny, preset="Q4_0").to(torch.bfloat16)
    with pytest.raises(EdgeqError, match=r"simulated weights are torch\.bfloat16, expected"):
        logits(model)
