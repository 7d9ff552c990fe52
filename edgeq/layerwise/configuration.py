"""The torch model's configuration, from config.json or from the GGUF file itself.

transformers reads the sizes out of a GGUF but not, for instance, position scaling. What it leaves
out is added here for the families that it knows; whether the result computes what llama.cpp
computes is for ``check_agrees`` to say.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from gguf.constants import GGMLQuantizationType, GGUFValueType
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from converters.errors import ConversionError
from converters.gguf_file import Field, GgufFile, TensorSource, write_gguf
from edgeq.errors import CalibrationError

_ROPE_FREE = ("gpt2",)


def read_configuration(reference: GgufFile, checkpoint: Path | None) -> Any:
    """Return transformers' configuration of the text model.

    Parameters
    ----------
    reference : the float GGUF file
    checkpoint : directory with config.json; None: describe the model from the file's metadata

    Raises
    ------
    CalibrationError
        transformers does not know the model.
    """
    try:
        if checkpoint is not None:
            config = transformers.AutoConfig.from_pretrained(
                checkpoint, local_files_only=True, trust_remote_code=False
            )
        else:
            config = transformers.AutoConfig.for_model(**_from_metadata(reference))
    except (CalibrationError, ConversionError):
        raise
    except Exception as error:
        where = reference.path if checkpoint is None else f"{checkpoint}/config.json"
        raise CalibrationError(
            f"{where}: transformers {transformers.__version__} cannot describe this model "
            f"({' '.join(str(error).split())[:200]}). "
            + (
                "Give the checkpoint's directory instead of the GGUF."
                if checkpoint is None
                else "Install a newer transformers, or choose a quantizer without gradients."
            )
        ) from error
    return config.get_text_config()


def _from_metadata(reference: GgufFile) -> dict[str, Any]:
    config = _read_by_transformers(reference)
    architecture = reference.architecture
    metadata = {
        key.removeprefix(f"{architecture}."): field.value
        for key, field in reference.fields.items()
        if key.startswith(f"{architecture}.")
    }
    tensors = reference.tensors
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    config.pop("_model_name_or_path", None)
    config["architectures"] = None
    if "attention.key_length" in metadata:
        config["head_dim"] = metadata["attention.key_length"]
    for key, tensor in (
        ("attention_bias", "blk.0.attn_q.bias"),
        ("mlp_bias", "blk.0.ffn_up.bias"),
        ("qk_layernorm", "blk.0.attn_q_norm.weight"),
    ):
        config[key] = tensor in tensors
    if architecture not in _ROPE_FREE:
        config["rope_parameters"] = _rope(config, metadata)
        config.pop("rope_theta", None)
    adapt = _FAMILIES.get(architecture)
    if adapt is not None:
        adapt(config, metadata, reference)
    return config


def _read_by_transformers(reference: GgufFile) -> dict[str, Any]:
    """Return what transformers reads out of the metadata, the vocabulary aside.

    It reads token by token: for 262,000 of them that took 20 s, and nothing here needs them.
    """
    fields = {k: v for k, v in reference.fields.items() if not k.startswith("tokenizer.ggml.")}
    fields |= {k: v for k, v in reference.fields.items() if k.endswith("_token_id")}
    some = Field(["", ""], GGUFValueType.ARRAY, GGUFValueType.STRING)  # it warns if there are none
    fields["tokenizer.ggml.tokens"] = some
    f32, nothing = GGMLQuantizationType.F32, np.zeros(1, np.float32)
    names = [TensorSource(name, f32, (1,), lambda: nothing) for name in reference.tensors]
    with tempfile.TemporaryDirectory() as directory:
        (path,) = write_gguf(Path(directory) / "header.gguf", fields, names)
        config: dict[str, Any] = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    return config


def _rope(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_parameters of one kind of layer."""
    rope: dict[str, Any] = {
        "rope_type": metadata.get("rope.scaling.type", "default"),
        "rope_theta": metadata.get("rope.freq_base", 10000.0),
    }
    if rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    if rope["rope_type"] == "default":
        return rope
    for key, name in (
        ("rope.scaling.factor", "factor"),
        ("rope.scaling.original_context_length", "original_max_position_embeddings"),
        ("rope.scaling.yarn_attn_factor", "attention_factor"),
        ("rope.scaling.yarn_beta_fast", "beta_fast"),
        ("rope.scaling.yarn_beta_slow", "beta_slow"),
    ):
        if key in metadata:
            rope[name] = metadata[key]
    return rope


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _llama(config: dict[str, Any], metadata: Mapping[str, Any], reference: GgufFile) -> None:
    n_experts = metadata.get("expert_count", 0)
    if n_experts:
        config["model_type"] = "mixtral"
        config["num_local_experts"] = n_experts
        config["num_experts_per_tok"] = metadata["expert_used_count"]
        config["sliding_window"] = None
    else:
        config["model_type"] = "llama"


def _qwen3moe(config: dict[str, Any], metadata: Mapping[str, Any], reference: GgufFile) -> None:
    config["moe_intermediate_size"] = metadata["expert_feed_forward_length"]


def _gemma(large: int) -> Any:
    """Return what Gemma needs; `large`: layers of the 27B, whose queries llama.cpp scales apart."""

    def adapt(config: dict[str, Any], metadata: Mapping[str, Any], reference: GgufFile) -> None:
        config["query_pre_attn_scalar"] = (
            config["hidden_size"] // config["num_attention_heads"]
            if config["num_hidden_layers"] == large
            else _head_dim(config)
        )
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if key in metadata:
                config[key] = metadata[key]

    return adapt


def _gemma3(config: dict[str, Any], metadata: Mapping[str, Any], reference: GgufFile) -> None:
    _gemma(62)(config, metadata, reference)
    config["rope_parameters"] = {
        "full_attention": {**config["rope_parameters"]},
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": metadata.get("rope.freq_base_swa", 10000.0),
        },
    }
    if "rope.freq_base" not in metadata:
        config["rope_parameters"]["full_attention"]["rope_theta"] = 1000000.0


def _phi3(config: dict[str, Any], metadata: Mapping[str, Any], reference: GgufFile) -> None:
    config["sliding_window"] = metadata.get("attention.sliding_window") or None
    rope = config["rope_parameters"]
    n_rotated = metadata.get("rope.dimension_count", _head_dim(config))
    rope["partial_rotary_factor"] = n_rotated / _head_dim(config)
    original = metadata.get("rope.scaling.original_context_length")
    if original is not None:
        config["original_max_position_embeddings"] = original
    if "rope_factors_long.weight" in reference.tensors:
        rope["rope_type"] = "longrope"
        for kind in ("long", "short"):
            values = reference.read_float(f"rope_factors_{kind}.weight")
            rope[f"{kind}_factor"] = [float(value) for value in values]
        if "rope.scaling.attn_factor" in metadata:
            rope["attention_factor"] = metadata["rope.scaling.attn_factor"]
        rope["factor"] = config["max_position_embeddings"] / original


def _gpt2(config: dict[str, Any], metadata: Mapping[str, Any], reference: GgufFile) -> None:
    config["n_positions"] = reference.tensors["position_embd.weight"].shape[0]
    config["n_inner"] = metadata["feed_forward_length"]
    config.pop("n_ctx", None)
    config.pop("feed_forward_length", None)


def _stablelm(config: dict[str, Any], metadata: Mapping[str, Any], reference: GgufFile) -> None:
    n_rotated = metadata.get("rope.dimension_count", _head_dim(config))
    config["rope_parameters"]["partial_rotary_factor"] = n_rotated / _head_dim(config)


_FAMILIES = {
    "llama": _llama,
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma(46),
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "stablelm": _stablelm,
}
