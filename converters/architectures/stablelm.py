"""StableLM: LayerNorm, partial rotation; some with norms on each head or parallel residuals."""

from dataclasses import replace

import gguf
from gguf import GGUFValueType

from converters.architectures.description import (
    DENSE_FOLDS,
    DENSE_GROUPS,
    DENSE_REQUIRED,
    QKV_BIASES,
    Architecture,
    Key,
    Output,
    Rule,
)
from converters.architectures.settings import (
    F32,
    HEAD_COUNT_KV,
    LAYER_NORM_EPSILON,
    SIZES,
    U32,
    rotated,
    theta_unless_default,
)


def _head_norms(part: str, heads: str) -> Rule:
    return Rule(
        rf"(?P<layer>.*\.self_attn\.{part}_layernorm)\.norms\.(?P<index>\d+)\.weight",
        (Output("{layer}.weight", stack_size=heads),),
    )


ARCHITECTURE = Architecture(
    model_arch=gguf.MODEL_ARCH.STABLELM,
    classes=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    keys=(
        *SIZES,
        HEAD_COUNT_KV,
        Key("{arch}.rope.dimension_count", U32, rotated),
        Key("{arch}.rope.freq_base", F32, theta_unless_default),
        Key("{arch}.use_parallel_residual", GGUFValueType.BOOL, ("use_parallel_residual",)),
        Key(LAYER_NORM_EPSILON, F32, ("layer_norm_eps", "norm_eps"), required=True),
    ),
    required=tuple(name for name in DENSE_REQUIRED if name != "blk.{bid}.ffn_norm"),
    required_if={
        "use_qkv_bias": QKV_BIASES,
        "sequential_residual": ("blk.{bid}.ffn_norm.weight", "blk.{bid}.ffn_norm.bias"),
        "qk_layernorm": ("blk.{bid}.attn_q_norm.weight", "blk.{bid}.attn_k_norm.weight"),
    },
    # without ffn_norm (parallel residual) the feed-forward network reads attn_norm
    input_groups=DENSE_GROUPS,
    folds=(
        replace(
            DENSE_FOLDS[0],
            refused="with use_parallel_residual the feed-forward network reads this norm too",
        ),
        *DENSE_FOLDS[1:],
    ),
    rules=(_head_norms("q", "num_attention_heads"), _head_norms("k", "num_key_value_heads")),
    defaults={
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "num_key_value_heads": 32,
        "use_parallel_residual": False,
        "sequential_residual": lambda config: not config["use_parallel_residual"],
    },
    assumed={"hidden_act": ("silu",)},
    partial_rotary_factor=0.25,
    rope_types=("default",),
    needs_output=True,
)
