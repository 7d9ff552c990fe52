"""Spellings of one model that must give one file, and the facts that later steps rely on."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.architectures import known_architectures
from converters.architectures.settings import settings
from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.gguf_file import open_gguf
from converters.special_tokens import special_tokens
from converters.vocab import read_vocabulary
from tests import tiny_models


def build(name: str, parent: Path) -> tiny_models.Tiny:
    return tiny_models.build(name, parent)


def converted(directory: Path, kind: str = "f32") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return metadata (without what the directory's name gives) and tensors."""
    out = directory.parent / f"{directory.name}.gguf"
    convert(open_checkpoint(directory), out, ftype=kind)
    fields = tiny_models.describe_fields(out)
    named = ("general.name", "general.basename", "general.finetune", "general.size_label")
    return (
        {key: value for key, value in fields.items() if key not in named},
        tiny_models.digest_tensors(out),
    )


def edit_config(directory: Path, **changes: Any) -> dict[str, Any]:
    path = directory / "config.json"
    config: dict[str, Any] = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "REMOVE"}), "utf-8")
    return config


def save(directory: Path, tensors: dict[str, Any]) -> None:
    """Replace the checkpoint's tensors."""
    import torch
    from safetensors.torch import save_file

    for path in directory.glob("model*"):
        path.unlink()
    plain = {
        name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()
    }
    save_file(plain, directory / "model.safetensors")


OLD_SPELLING: dict[str, dict[str, Any]] = {
    "llama2": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        "head_dim": "REMOVE",
    },
    "qwen2": {"rope_theta": 1000000.0, "rope_scaling": None},
    "qwen3": {
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    },
    "qwen3moe": {"num_experts": 6, "num_local_experts": "REMOVE", "mlp_only_layers": []},
    "gemma3": {
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
        "layer_types": "REMOVE",
    },
    "phi-longrope": {
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [1.0 + i for i in range(8)],
        },
    },
    "gptneox": {"rotary_pct": 0.5, "rotary_emb_base": 10000},
    "stablelm-parallel": {"rope_theta": 10000, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("name", OLD_SPELLING)
def test_old_and_new_configurations_give_the_same_file(name: str, tmp_path: Path) -> None:
    directory = build(name, tmp_path).directory
    wanted = converted(directory)
    config = edit_config(directory, rope_parameters="REMOVE", dtype="REMOVE", torch_dtype="float32")
    assert "rope_parameters" in config
    edit_config(directory, **OLD_SPELLING[name])
    assert converted(directory) == wanted


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_fused_and_separate_experts_give_the_same_file(name: str, tmp_path: Path) -> None:
    tiny = build(name, tmp_path)
    names = list(open_checkpoint(tiny.directory).tensors)
    assert any(".experts.0." in name for name in names)
    wanted = converted(tiny.directory, "bf16")
    save(tiny.directory, dict(tiny.model.named_parameters()))
    names = list(open_checkpoint(tiny.directory).tensors)
    assert any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
    assert converted(tiny.directory, "bf16") == wanted


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_gemma3_with_vision_converts(prefix: str, tmp_path: Path) -> None:
    tiny = build("gemma3", tmp_path)
    wanted = converted(tiny.directory, "bf16")
    tensors = dict(tiny.model.named_parameters())
    renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tower = tensors["model.norm.weight"]
    save(tiny.directory, {**renamed, "vision_tower.vision_model.post_layernorm.weight": tower})
    config = json.loads((tiny.directory / "config.json").read_text("utf-8"))
    config.pop("architectures")
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
    (tiny.directory / "config.json").write_text(json.dumps(outer), "utf-8")
    assert converted(tiny.directory, "bf16") == wanted


def test_untied_output_of_a_tied_checkpoint_is_written_where_llama_cpp_wants_it(
    tmp_path: Path,
) -> None:
    tiny = build("olmo2", tmp_path)
    tensors = dict(tiny.model.named_parameters())
    del tensors["lm_head.weight"]
    save(tiny.directory, tensors)
    edit_config(tiny.directory, tie_word_embeddings=True)
    _, written = converted(tiny.directory, "bf16")
    assert written["output.weight"] == written["token_embd.weight"]


def test_forgotten_rope_base_of_the_script_is_written(tmp_path: Path) -> None:
    directory = build("gptneox", tmp_path).directory
    edit_config(directory, rope_parameters={"rope_theta": 25000.0, "partial_rotary_factor": 0.5})
    fields, _ = converted(directory)
    assert fields["gptneox.rope.freq_base"] == ["FLOAT32", None, 25000.0]


def test_q8_0_is_ggufs_encoding_and_odd_rows_become_f16(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from gguf import GGMLQuantizationType, quants

    tiny = build("qwen3moe", tmp_path)
    out = tmp_path / "out.gguf"
    with caplog.at_level(logging.WARNING):
        convert(open_checkpoint(tiny.directory), out, ftype="q8_0")
    model = open_gguf(out)
    embedding = tiny.model.get_input_embeddings().weight.detach().numpy()
    wanted = quants.quantize(embedding, GGMLQuantizationType.Q8_0)
    assert np.array_equal(model.read_bytes("token_embd.weight"), wanted)
    assert model.tensors["blk.0.ffn_down_exps.weight"].qtype.name == "F16"
    assert "blk.0.ffn_down_exps.weight: rows of 48 do not divide" in caplog.text
    assert model.value("general.file_type") == 7


def test_split_output_holds_the_same_tensors(tmp_path: Path) -> None:
    directory = build("llama2", tmp_path).directory
    _, wanted = converted(directory, "bf16")
    parts = convert(
        open_checkpoint(directory), tmp_path / "s.gguf", ftype="bf16", split_max_bytes=1 << 20
    )
    assert len(parts) > 2
    assert tiny_models.digest_tensors(parts[0]) == wanted


@pytest.mark.parametrize("name", tiny_models.names())
def test_facts_name_tensors_that_the_file_has(name: str, tmp_path: Path) -> None:
    tiny = build(name, tmp_path)
    checkpoint = open_checkpoint(tiny.directory)
    architecture = known_architectures()[checkpoint.config["architectures"][0]]
    convert(checkpoint, tmp_path / "out.gguf", ftype="f16")
    model = open_gguf(tmp_path / "out.gguf")
    absent = {"output"} if checkpoint.config.get("tie_word_embeddings") else set()
    if checkpoint.config.get("use_parallel_residual") and name.startswith("stablelm"):
        absent.add("blk.{bid}.ffn_norm")
    grouped = [c for group in architecture.input_groups for c in group.consumers]
    sources = [group.source for group in architecture.input_groups if group.source]
    folded = [n for fold in architecture.folds for n in (fold.source, *fold.consumers)]
    assert len(set(grouped)) == len(grouped), "a matrix multiplies one input"
    for fact in {*grouped, *sources, *folded, *architecture.quantizable, *architecture.unquantized}:
        assert (f"{fact.format(bid=1)}.weight" in model.tensors) == (fact not in absent), fact
    matrices = {
        tensor.name.removesuffix(".weight").replace("blk.1.", "blk.{bid}.")
        for tensor in model.tensors.values()
        if len(tensor.shape) >= 2
        and tensor.name.endswith(".weight")
        and "blk.0." not in tensor.name
    }
    matrices = {name for name in matrices if "norm" not in name and "blk.2" not in name}
    known = {*architecture.quantizable, *architecture.unquantized, "position_embd"}
    assert {name for name in matrices if not name.startswith("blk.") or "{bid}" in name} <= known


# Our defaults for absent keys of config.json, and where transformers keeps them.
CONFIGS = {
    "LlamaForCausalLM": "LlamaConfig",
    "MistralForCausalLM": "MistralConfig",
    "MixtralForCausalLM": "MixtralConfig",
    "SmolLM3ForCausalLM": "SmolLM3Config",
    "Qwen2ForCausalLM": "Qwen2Config",
    "Qwen3ForCausalLM": "Qwen3Config",
    "Qwen3MoeForCausalLM": "Qwen3MoeConfig",
    "Gemma2ForCausalLM": "Gemma2Config",
    "Gemma3ForCausalLM": "Gemma3TextConfig",
    "Phi3ForCausalLM": "Phi3Config",
    "GPT2LMHeadModel": "GPT2Config",
    "GPTNeoXForCausalLM": "GPTNeoXConfig",
    "Olmo2ForCausalLM": "Olmo2Config",
    "StableLmForCausalLM": "StableLmConfig",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_absent_keys_mean_what_transformers_assumes(name: str) -> None:
    import transformers

    config = getattr(transformers, CONFIGS[name])()
    theirs = config.to_dict()
    architecture = known_architectures()[name]
    sizes = {
        key: theirs[key]
        for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
        if key in theirs
    }
    sizes |= {key: theirs[key] for key in ("n_embd", "n_head", "n_layer") if key in theirs}
    permissive = {"norm_topk_prob": True} if name == "Qwen3MoeForCausalLM" else {}
    ours = settings({**sizes, **permissive}, architecture)
    for key in architecture.defaults:
        # Qwen 2 has its biases in the code; the rest are names of our own
        if key in permissive or not hasattr(config, key):
            assert key in (
                *permissive,
                "attention_bias",
                "has_biases",
                "sequential_residual",
                "intermediate_size",
            ), key
        else:
            wanted = getattr(config, key)
            if key == "num_key_value_heads" and not callable(architecture.defaults[key]):
                assert ours[key] == type(config)(**sizes).num_key_value_heads
            elif key == "intermediate_size":
                assert wanted is None or ours[key] == wanted
            else:
                assert ours[key] == wanted, key
    rope = theirs.get("rope_parameters") or {"rope_theta": 10000.0}
    rope = rope.get("full_attention", rope)
    assert ours["rope"]["full"]["rope_theta"] == rope["rope_theta"]
    partial = ours["rope"]["full"].get("partial_rotary_factor")
    assert partial == rope.get("partial_rotary_factor")


# --- vocabulary ----------------------------------------------------------------------------------


def test_smollm_vocabulary_does_not_add_its_bos(tmp_path: Path) -> None:
    tiny_models.CASES["smollm2"].vocabulary(tmp_path)
    architecture = known_architectures()["LlamaForCausalLM"]
    vocabulary = read_vocabulary(tmp_path, {"bos_token_id": 1}, architecture, n_vocab=49152)
    assert len(vocabulary.tokens) == 49152
    assert vocabulary.tokens[-1] == "[PAD49151]"
    assert vocabulary.fields()["tokenizer.ggml.add_bos_token"].value is False


def write_tokenizer_files(directory: Path, settings: dict[str, Any], **parts: Any) -> None:
    tokens = [{"id": i, "content": text} for i, text in enumerate(("<s>", "</s>", "<turn>"))]
    tokenizer = {"model": {}, "added_tokens": tokens, **parts}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def template(*pieces: str) -> dict[str, Any]:
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if piece == "A" else {"SpecialToken": {"id": piece}}
        for piece in pieces
    ]
    return {"type": "TemplateProcessing", "single": single, "pair": []}


def test_special_token_spelled_as_an_object_is_its_text(tmp_path: Path) -> None:
    bos = {"__type": "AddedToken", "content": "<s>", "lstrip": False}
    write_tokenizer_files(tmp_path, {"bos_token": bos}, post_processor=template("<s>", "A"))
    special = special_tokens(tmp_path, {})
    assert special.adds == {"bos": True}
    assert special.ids == {"bos": 0}


def test_end_of_text_in_the_template_makes_the_configured_one_an_end_of_turn(
    tmp_path: Path,
) -> None:
    write_tokenizer_files(tmp_path, {"eos_token": "<turn>"}, post_processor=template("A", "</s>"))
    special = special_tokens(tmp_path, {})
    assert special.ids == {"eos": 1, "eot": 2}
    assert special.adds == {"eos": True}


def test_ids_of_the_configuration_fill_what_tokenizer_files_leave_open(tmp_path: Path) -> None:
    write_tokenizer_files(tmp_path, {"eos_token": "</s>"})
    config = {"eos_token_id": [7, 8], "pad_token_id": -1, "text_config": {"bos_token_id": 0}}
    assert special_tokens(tmp_path, config).ids == {"eos": 1, "bos": 0}
    assert special_tokens(tmp_path, {"bos_token_id": 9}, n_vocab=9).ids == {"eos": 1}


@pytest.mark.parametrize(
    ("files", "settings", "wanted"),
    [
        ({}, {"chat_template": "T"}, {"default": "T"}),
        ({"chat_template.jinja": "F"}, {}, {"default": "F"}),
        ({"chat_template.json": '{"chat_template": "J"}'}, {}, {"default": "J"}),
        (
            {"chat_template.jinja": "F", "additional_chat_templates/tool use.jinja": "U"},
            {},
            {"default": "F", "tool_use": "U"},
        ),
        (
            {},
            {
                "chat_template": [
                    {"name": "default", "template": "T"},
                    {"name": "r", "template": ""},
                ]
            },
            {"default": "T", "r": ""},
        ),
    ],
)
def test_chat_templates_are_found_where_checkpoints_keep_them(
    files: dict[str, str], settings: dict[str, Any], wanted: dict[str, str], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    write_tokenizer_files(tmp_path, settings)
    special = special_tokens(tmp_path, {})
    assert special.templates == wanted
    fields = special.fields()
    assert fields["tokenizer.chat_template"].value == wanted["default"]
    names = fields["tokenizer.chat_templates"].value if len(wanted) > 1 else []
    assert names == sorted(set(wanted) - {"default"})


def test_tokenizer_json_of_a_sentencepiece_model_orders_its_merges(tmp_path: Path) -> None:
    tiny = build("mistral-spm-json", tmp_path)
    convert(open_checkpoint(tiny.directory), tmp_path / "out.gguf")
    model = open_gguf(tmp_path / "out.gguf")
    tokens, scores = model.value("tokenizer.ggml.tokens"), model.value("tokenizer.ggml.scores")
    merges = json.loads((tiny.directory / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    ranks = [scores[tokens.index(text)] for text in made]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == 0


def test_the_same_checkpoint_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    first = build("llama3", tmp_path / "a").directory
    second = build("llama3", tmp_path / "b").directory
    assert converted(first) == converted(second)
    shutil.copy(first / "model.safetensors", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_memory_holds_one_tensor_and_its_mapped_source() -> None:
    script = Path(__file__).parent.parent / "scripts/measure_conversion.py"
    command = [sys.executable, str(script), "--gib", "0.3"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(ran.stdout)
    assert figures["shards"] == 4
    assert figures["peak_mib"] < 2 * figures["largest_tensor_mib"] + 200  # 90 are Python and numpy
