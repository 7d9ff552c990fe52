"""Phi 3, 3.5 (not MoE) and 4: fused query/key/value and gate/up matrices, long position scaling."""

import math
from typing import Any

import gguf
import numpy as np

from converters.architectures.description import (
    ATTENTION_OUT,
    FFN_DOWN,
    HEAD,
    HEAD_FOLD,
    Architecture,
    Config,
    Fold,
    Generated,
    InputGroup,
    Key,
)
from converters.architectures.settings import F32, HEAD_COUNT_KV, RMS_EPSILON, SIZES, U32, rope
from converters.errors import ConversionError


def _rotated(config: Config) -> int:
    partial = config["rope"]["full"].get("partial_rotary_factor", 1.0)
    return int(partial * config["hidden_size"]) // int(config["num_attention_heads"])


def _attention_factor(config: Config) -> float | None:
    """Return by how much the long scaling raises attention; None without it.

    References
    ----------
    llama.cpp conversion/phi.py, Phi3MiniModel.generate_extra_tensors.
    """
    full = config["rope"]["full"]
    if not full.get("long_factor"):
        return None
    original = full["original_max_position_embeddings"]
    scale = config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def _factors(name: str) -> Any:
    def values(config: Config) -> Any:
        full = config["rope"]["full"]
        if not full.get("long_factor"):
            return None
        factors = full.get(name)
        if not isinstance(factors, list) or len(factors) != _rotated(config) // 2:
            raise ConversionError(
                f"config.json: {name} of the position scaling has "
                f"{len(factors) if isinstance(factors, list) else 'no'} entries; expected "
                f"{_rotated(config) // 2}, half of the rotated channels of a head."
            )
        return np.array(factors, np.float32)

    return values


ARCHITECTURE = Architecture(
    model_arch=gguf.MODEL_ARCH.PHI3,
    classes=("Phi3ForCausalLM",),
    keys=(
        *SIZES,
        HEAD_COUNT_KV,
        RMS_EPSILON,
        Key("{arch}.rope.dimension_count", U32, _rotated),
        Key("{arch}.rope.freq_base", F32, rope("rope_theta")),
        Key(
            "{arch}.rope.scaling.original_context_length",
            U32,
            rope("original_max_position_embeddings"),
        ),
        Key("{arch}.rope.scaling.attn_factor", F32, _attention_factor),
        Key("{arch}.attention.sliding_window", U32, lambda config: config["sliding_window"] or 0),
    ),
    required=(
        "token_embd",
        "output_norm",
        "blk.{bid}.attn_norm",
        "blk.{bid}.attn_qkv",
        "blk.{bid}.attn_output",
        "blk.{bid}.ffn_norm",
        "blk.{bid}.ffn_up",
        "blk.{bid}.ffn_down",
    ),
    input_groups=(
        InputGroup("blk.{bid}.attn_norm", ("blk.{bid}.attn_qkv",)),
        ATTENTION_OUT,
        InputGroup("blk.{bid}.ffn_norm", ("blk.{bid}.ffn_up",)),
        FFN_DOWN,
        HEAD,
    ),
    folds=(
        Fold("norm", "blk.{bid}.attn_norm", ("blk.{bid}.attn_qkv",)),
        Fold("value", "blk.{bid}.attn_qkv", ("blk.{bid}.attn_output",), rows="value"),
        Fold("norm", "blk.{bid}.ffn_norm", ("blk.{bid}.ffn_up",)),
        Fold("up", "blk.{bid}.ffn_up", ("blk.{bid}.ffn_down",), rows="second half"),
        HEAD_FOLD,
    ),
    generated=(
        Generated("rope_factors_long.weight", _factors("long_factor")),
        Generated("rope_factors_short.weight", _factors("short_factor")),
    ),
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": lambda config: config["num_attention_heads"],
        "sliding_window": None,
    },
    assumed={"hidden_act": ("silu",)},
    partial_rotary_factor=1.0,
    rope_types=("default", "longrope", "su"),
    vocabularies=("sentencepiece-added", "bpe"),
)
