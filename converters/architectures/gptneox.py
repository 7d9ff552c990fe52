"""GPT-NeoX and Pythia: queries, keys and values fused head by head."""

import gguf
from gguf import GGUFValueType

from converters.architectures.description import SEPARATE_QKV, Architecture, Key, Output, Rule
from converters.architectures.gpt2 import BIASES, FUSED_FOLDS, FUSED_GROUPS, FUSED_REQUIRED
from converters.architectures.settings import (
    F32,
    LAYER_NORM_EPSILON,
    SIZES,
    U32,
    rotated,
    theta_unless_default,
)

ARCHITECTURE = Architecture(
    model_arch=gguf.MODEL_ARCH.GPTNEOX,
    classes=("GPTNeoXForCausalLM",),
    keys=(
        *SIZES,
        Key("{arch}.rope.dimension_count", U32, rotated),
        Key("{arch}.rope.freq_base", F32, theta_unless_default),
        Key("{arch}.use_parallel_residual", GGUFValueType.BOOL, ("use_parallel_residual",)),
        Key(LAYER_NORM_EPSILON, F32, ("layer_norm_eps",), required=True),
    ),
    required=FUSED_REQUIRED,
    required_if={"attention_bias": BIASES},
    input_groups=FUSED_GROUPS,
    folds=FUSED_FOLDS,
    rules=(
        Rule(r".*\.attention\.query_key_value\.(weight|bias)", (Output(arrange=SEPARATE_QKV),)),
    ),
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    # ggml's GELU is the tanh approximation: 5e-4 off at most from the exact one
    assumed={
        "hidden_act": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        "attention_bias": (True,),
    },
    partial_rotary_factor=0.25,
    rope_types=("default",),
    needs_output=True,
)
