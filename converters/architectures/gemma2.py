"""Gemma 2: norms before and after, capped logits, every other layer with a sliding window."""

from collections.abc import Callable
from typing import Any

import gguf

from converters.architectures.description import (
    ATTENTION_OUT,
    DENSE_REQUIRED,
    FFN_DOWN,
    GATE_UP,
    QKV,
    UP_FOLD,
    VALUE_FOLD,
    Architecture,
    Config,
    Fold,
    InputGroup,
    Key,
    Output,
    Rule,
)
from converters.architectures.settings import (
    F32,
    HEAD_COUNT_KV,
    HEAD_DIM,
    RMS_EPSILON,
    SIZES,
    U32,
    theta_unless_default,
)

Expected = Callable[[Config], tuple[Any, ...]]

# transformers multiplies by 1 + weight, ggml by the weight
NORM_OFFSET = Rule(r".*norm\.weight", (Output(offset=1.0),))
REQUIRED = (*DENSE_REQUIRED, "blk.{bid}.post_attention_norm", "blk.{bid}.post_ffw_norm")
GROUPS = (
    InputGroup("blk.{bid}.attn_norm", QKV),
    ATTENTION_OUT,
    InputGroup("blk.{bid}.ffn_norm", GATE_UP),
    FFN_DOWN,
    InputGroup("output_norm", ("token_embd",)),
)
FOLDS = (
    Fold("norm", "blk.{bid}.attn_norm", QKV),
    VALUE_FOLD,
    Fold("norm", "blk.{bid}.ffn_norm", GATE_UP),
    UP_FOLD,
    Fold(
        "norm",
        "output_norm",
        ("token_embd",),
        refused="the output matrix is the embedding, which would change with it",
    ),
)


def alternating(period: int) -> Expected:
    """Return what llama.cpp takes for the kinds of layers: each `period`-th looks at everything."""

    def expected(config: Config) -> tuple[Any, ...]:
        layers = range(1, config["num_hidden_layers"] + 1)
        kinds = ["sliding_attention" if layer % period else "full_attention" for layer in layers]
        return (kinds, None)

    return expected


def query_scale(large: int) -> Expected:
    """Return what llama.cpp divides queries by, squared: it knows the 27B by `large` layers."""

    def expected(config: Config) -> tuple[Any, ...]:
        if config["num_hidden_layers"] == large:
            return (config["hidden_size"] // config["num_attention_heads"],)
        return (config["head_dim"],)

    return expected


ARCHITECTURE = Architecture(
    model_arch=gguf.MODEL_ARCH.GEMMA2,
    classes=("Gemma2ForCausalLM",),
    keys=(
        *SIZES,
        HEAD_COUNT_KV,
        *HEAD_DIM,
        RMS_EPSILON,
        Key("{arch}.attn_logit_softcapping", F32, ("attn_logit_softcapping",), required=True),
        Key("{arch}.final_logit_softcapping", F32, ("final_logit_softcapping",), required=True),
        Key("{arch}.attention.sliding_window", U32, ("sliding_window",), required=True),
        Key("{arch}.rope.freq_base", F32, theta_unless_default),
    ),
    required=REQUIRED,
    input_groups=GROUPS,
    folds=FOLDS,
    rules=(NORM_OFFSET,),
    skipped=(r"lm_head\.weight",),
    defaults={
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    assumed={
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
        "layer_types": alternating(2),
        "query_pre_attn_scalar": query_scale(46),
    },
    rope_types=("default",),
    vocabularies=("sentencepiece",),
    adds_space_prefix=False,
)
