"""Checkpoints that cannot be converted: one clear line, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.architectures import architecture_of
from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.errors import ConversionError
from converters.vocab import read_vocabulary
from tests import tiny_models


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny_models.build("smollm2", tmp_path).directory


def refusal(directory: Path, **options: Any) -> str:
    """Convert, expect a refusal that leaves nothing behind, and return its message."""
    out = directory.parent / "out" / "out.gguf"
    out.parent.mkdir()
    with pytest.raises(ConversionError) as refused:
        convert(open_checkpoint(directory), out, **options)
    assert list(out.parent.iterdir()) == []
    message = str(refused.value)
    assert "\n" not in message
    return message


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value), "utf-8")


def edit_config(directory: Path, **changes: Any) -> None:
    edit_json(directory / "config.json", lambda config: config.update(changes))


def edit_tensors(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_unknown_architecture_names_the_class_and_the_way_out(directory: Path) -> None:
    edit_config(directory, architectures=["MambaForCausalLM"])
    message = refusal(directory)
    assert "no conversion for MambaForCausalLM; known: GPT2LMHeadModel" in message
    assert "convert_hf_to_gguf.py" in message
    assert "pass the GGUF" in message


@pytest.mark.parametrize("value", [None, [], "LlamaForCausalLM"])
def test_configuration_without_a_class_is_refused(directory: Path, value: Any) -> None:
    edit_config(directory, architectures=value)
    assert f"'architectures' is {value!r}; expected a list" in refusal(directory)


def test_missing_tokenizer_says_which_files_are_wanted(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    message = refusal(directory)
    assert "no tokenizer; llama takes tokenizer.model or tokenizer.json" in message


def test_more_tokens_than_the_configuration_says_are_refused(directory: Path) -> None:
    edit_config(directory, vocab_size=400)
    assert "tokenizer.json: 501 tokens, but config.json's vocab_size is 400" in refusal(directory)


def test_embedding_of_another_size_than_the_vocabulary_is_refused(directory: Path) -> None:
    edit_config(directory, vocab_size=640)
    message = refusal(directory)
    assert "the embedding has 512 rows, but the vocabulary 640 tokens" in message


def test_more_pieces_than_the_configuration_says_are_refused(tmp_path: Path) -> None:
    directory = tiny_models.build("llama2", tmp_path).directory
    edit_config(directory, vocab_size=300)
    assert "tokenizer.model: 496 tokens, but config.json's vocab_size is 300" in refusal(directory)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_weights_that_are_not_finite_name_the_tensor(
    directory: Path, value: float, kind: str
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(directory, lambda tensors: tensors[name].view(-1)[7:9].fill_(value))
    message = refusal(directory, ftype=kind)
    assert message.startswith(f"{name}: 2 weights are not finite (the first is {value})")


def test_weights_too_large_for_f16_are_refused(directory: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(directory, lambda tensors: tensors[name].view(-1)[:1].fill_(1e6))
    message = refusal(directory, ftype="f16")
    assert f"{name}: 999424 does not fit into F16" in message
    convert(open_checkpoint(directory), directory.parent / "fits.gguf", ftype="bf16")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ],
)
def test_missing_tensor_is_named(directory: Path, name: str, target: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(name))
    assert f"the tensor for {target} is missing; config.json says 2 layers" in refusal(directory)


def test_missing_output_of_an_untied_model_is_named(directory: Path) -> None:
    edit_config(directory, tie_word_embeddings=False)
    assert "the tensor for output.weight is missing" in refusal(directory)


def test_missing_bias_that_the_configuration_asks_for_is_named(directory: Path) -> None:
    edit_config(directory, attention_bias=True)
    assert "the tensor for blk.0.attn_q.bias is missing" in refusal(directory)


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.scales", "extra"]
)
def test_surplus_tensor_is_named(directory: Path, name: str) -> None:
    norm = "model.norm.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[norm].clone()}))
    assert f"{name} has no place in a GGUF of architecture llama" in refusal(directory)


def test_missing_expert_is_named(tmp_path: Path) -> None:
    directory = tiny_models.build("mixtral", tmp_path).directory
    name = next(
        name
        for name in open_checkpoint(directory).tensors
        if "layers.1" in name and "s.2.w2" in name
    )
    edit_tensors(directory, lambda tensors: tensors.pop(name))
    message = refusal(directory)
    assert "blk.1.ffn_down_exps.weight is a stack of 4 tensors (num_local_experts)" in message
    assert "missing number 2" in message


def test_experts_of_different_shapes_are_refused(tmp_path: Path) -> None:
    directory = tiny_models.build("mixtral", tmp_path).directory
    name = next(name for name in open_checkpoint(directory).tensors if "experts.3.w1" in name)

    def narrow(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    edit_tensors(directory, narrow)
    assert "shapes differ" in refusal(directory)


def test_quantized_checkpoint_is_refused(directory: Path) -> None:
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "the checkpoint is quantized already (gptq)" in refusal(directory)


def test_integer_weights_are_refused_by_name(directory: Path) -> None:
    import torch

    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"{name}: stored as I8, expected BF16, F16, F32, F64" in refusal(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; llama.cpp's llama computes 'silu'"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "position scaling 'longrope' has no place",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a positive integer"),
        ({"rms_norm_eps": "tiny"}, "layer_norm_rms_epsilon would be 'tiny'; expected a finite"),
        ({"max_position_embeddings": -1}, "context_length would be -1; expected an integer"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]; expected an object"),
        ({"num_attention_heads": 5, "head_dim": 32}, "self_attn.q_proj.weight: shape (96, 96)"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None; expected a positive integer"),
        ({"intermediate_size": None}, "intermediate_size is missing; llama needs it"),
        ({"num_attention_heads": None, "head_dim": None}, "num_attention_heads is missing"),
    ],
)
def test_settings_without_a_place_in_llama_cpp_are_refused(
    directory: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(directory, **changes)
    assert message in refusal(directory)


def test_unknown_type_is_refused(directory: Path) -> None:
    assert "type 'q4_0'; expected auto, f32, f16, bf16, q8_0" in refusal(directory, ftype="q4_0")


def test_unknown_pre_tokenizer_is_refused_unless_it_is_named(directory: Path) -> None:
    def punctuate(tokenizer: dict[str, Any]) -> None:
        tokenizer["pre_tokenizer"]["pretokenizers"][0] = {
            "type": "Punctuation",
            "behavior": "Isolated",
        }

    edit_json(directory / "tokenizer.json", punctuate)
    message = refusal(directory)
    assert "the pre-tokenizer is none that llama.cpp is known to have" in message
    assert "Punctuation" in message
    checkpoint = open_checkpoint(directory)
    architecture = architecture_of(checkpoint)
    vocabulary = read_vocabulary(
        directory, checkpoint.config, architecture, n_vocab=512, pre="falcon"
    )
    assert vocabulary.fields()["tokenizer.ggml.pre"].value == "falcon"


def test_damaged_tokenizers_are_refused(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{", "utf-8")
    architecture = architecture_of(open_checkpoint(directory))

    def message() -> str:
        with pytest.raises(ConversionError) as refused:
            read_vocabulary(directory, {}, architecture, n_vocab=512)
        return str(refused.value)

    assert "tokenizer.json: cannot be read as JSON" in message()
    (directory / "tokenizer.json").write_text("[]", "utf-8")
    assert "got a list, expected a JSON object" in message()
    (directory / "tokenizer.json").write_text("{}", "utf-8")
    assert "no 'model' in it" in message()
    (directory / "tokenizer.json").write_text('{"model": {"type": "Odd"}}', "utf-8")
    assert "the tokenizers library refuses it" in message()
    (directory / "tokenizer.model").write_bytes(b"no model")
    assert "tokenizer.model: not a SentencePiece model" in message()


def test_tokenizer_settings_of_another_shape_are_refused(directory: Path) -> None:
    edit_json(
        directory / "tokenizer.json",
        lambda tokenizer: tokenizer.update(post_processor={"processors": ["TemplateProcessing"]}),
    )
    assert "tokenizer.json: the tokenizers library refuses it" in refusal(directory)


def test_a_tokenizer_that_fails_only_at_some_text_is_refused(tmp_path: Path) -> None:
    directory = tiny_models.build("qwen2", tmp_path).directory

    def forget_a_byte(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"] |= {"unk_token": "", "merges": []}
        del tokenizer["model"]["vocab"]["ð"]  # the first of emoji, in llama.cpp's text for digests

    edit_json(directory / "tokenizer.json", forget_a_byte)
    message = refusal(directory)
    assert "tokenizer.json: the tokenizers library refuses it: Unk token" in message


def test_added_tokens_of_another_shape_are_refused(tmp_path: Path) -> None:
    directory = tiny_models.build("llama2", tmp_path).directory
    settings = {"added_tokens_decoder": {"one": {"text": "<s>"}}}
    edit_json(directory / "tokenizer_config.json", lambda config: config.update(settings))
    assert "the tokenizer files are not as their libraries write them" in refusal(directory)


def test_empty_and_scalar_tensors_are_refused(directory: Path) -> None:
    name = "model.norm.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name][:0].clone()}))
    assert f"{name}: shape (0,) does not fit" in refusal(directory)


def test_unigram_tokenizers_are_refused(directory: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.Unigram([("a", 0.0)], 0, False)).save(str(directory / "tokenizer.json"))
    assert "a Unigram model; expected a byte-level BPE" in refusal(directory)
