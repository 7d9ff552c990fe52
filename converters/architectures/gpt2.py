"""GPT-2: learned positions, matrices stored (in, out), output tied to the embedding."""

import gguf

from converters.architectures.description import (
    ATTENTION_OUT,
    FFN_DOWN,
    HEAD,
    HEAD_FOLD,
    TRANSPOSE,
    Architecture,
    Fold,
    InputGroup,
    Key,
    Output,
    Rule,
)
from converters.architectures.settings import F32, LAYER_NORM_EPSILON, SIZES

FUSED_GROUPS = (
    InputGroup("blk.{bid}.attn_norm", ("blk.{bid}.attn_qkv",)),
    ATTENTION_OUT,
    InputGroup("blk.{bid}.ffn_norm", ("blk.{bid}.ffn_up",)),
    FFN_DOWN,
    HEAD,
)
FUSED_FOLDS = (
    Fold("norm", "blk.{bid}.attn_norm", ("blk.{bid}.attn_qkv",)),
    Fold("value", "blk.{bid}.attn_qkv", ("blk.{bid}.attn_output",), rows="value"),
    Fold("norm", "blk.{bid}.ffn_norm", ("blk.{bid}.ffn_up",)),
    Fold(
        "up",
        "blk.{bid}.ffn_up",
        ("blk.{bid}.ffn_down",),
        refused="GELU stands between them, and a scale does not pass through it",
    ),
    HEAD_FOLD,
)
FUSED_REQUIRED = (
    "token_embd",
    "output_norm",
    "blk.{bid}.attn_norm",
    "blk.{bid}.attn_qkv",
    "blk.{bid}.attn_output",
    "blk.{bid}.ffn_norm",
    "blk.{bid}.ffn_up",
    "blk.{bid}.ffn_down",
)
# llama.cpp loads the biases of every layer
BIASES = (
    "output_norm.bias",
    *(f"{name}.bias" for name in FUSED_REQUIRED if name.startswith("blk.")),
)

ARCHITECTURE = Architecture(
    model_arch=gguf.MODEL_ARCH.GPT2,
    classes=("GPT2LMHeadModel",),
    keys=(*SIZES, Key(LAYER_NORM_EPSILON, F32, ("layer_norm_epsilon",), required=True)),
    required=(*FUSED_REQUIRED, "position_embd"),
    required_if={"has_biases": BIASES},
    input_groups=FUSED_GROUPS,
    folds=FUSED_FOLDS,
    rules=(Rule(r".*\.(c_attn|c_proj|c_fc)\.weight", (Output(arrange=TRANSPOSE),)),),
    skipped=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
    aliases={
        "n_layer": "num_hidden_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_ctx": "max_position_embeddings",
        "n_inner": "intermediate_size",
    },
    defaults={
        "max_position_embeddings": 1024,
        "layer_norm_epsilon": 1e-5,
        "intermediate_size": lambda config: 4 * config["hidden_size"],
        "tie_word_embeddings": True,
        "has_biases": True,
    },
    assumed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
)
