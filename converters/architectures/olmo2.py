"""OLMo 2: norms after attention and feed-forward, and on whole queries and keys."""

import gguf

from converters.architectures.description import (
    ATTENTION_OUT,
    FFN_DOWN,
    GATE_UP,
    HEAD,
    HEAD_FOLD,
    QKV,
    UP_FOLD,
    VALUE_FOLD,
    Architecture,
    InputGroup,
)
from converters.architectures.settings import DECODER

# No norm folds: attention and feed-forward read the residual stream itself.
ARCHITECTURE = Architecture(
    model_arch=gguf.MODEL_ARCH.OLMO2,
    classes=("Olmo2ForCausalLM",),
    keys=DECODER,
    required=(
        "token_embd",
        "output_norm",
        *QKV,
        "blk.{bid}.attn_q_norm",
        "blk.{bid}.attn_k_norm",
        "blk.{bid}.attn_output",
        "blk.{bid}.post_attention_norm",
        *GATE_UP,
        "blk.{bid}.ffn_down",
        "blk.{bid}.post_ffw_norm",
    ),
    input_groups=(
        InputGroup(None, QKV),
        ATTENTION_OUT,
        InputGroup(None, GATE_UP),
        FFN_DOWN,
        HEAD,
    ),
    folds=(VALUE_FOLD, UP_FOLD, HEAD_FOLD),
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": lambda config: config["num_attention_heads"],
    },
    assumed={"hidden_act": ("silu",), "attention_bias": (False,)},
    needs_output=True,
)
