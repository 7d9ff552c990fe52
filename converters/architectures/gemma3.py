"""Gemma 3, text: the causal language model, and that inside of the models that also see."""

from dataclasses import replace

import gguf

from converters.architectures.description import HEAD, HEAD_FOLD, Key
from converters.architectures.gemma2 import ARCHITECTURE as GEMMA2
from converters.architectures.gemma2 import FOLDS, GROUPS, REQUIRED, alternating, query_scale
from converters.architectures.settings import DECODER, F32, U32

ARCHITECTURE = replace(
    GEMMA2,
    model_arch=gguf.MODEL_ARCH.GEMMA3,
    classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    keys=(
        *DECODER,
        Key(
            "{arch}.rope.freq_base_swa",
            F32,
            lambda config: config["rope"]["sliding"].get("rope_theta"),
        ),
        Key(
            "{arch}.final_logit_softcapping",
            F32,
            lambda config: config.get("final_logit_softcapping") or None,
        ),
        Key("{arch}.attention.sliding_window", U32, ("sliding_window",), required=True),
    ),
    required=(*REQUIRED, "blk.{bid}.attn_q_norm", "blk.{bid}.attn_k_norm"),
    input_groups=(*GROUPS[:-1], HEAD),
    folds=(*FOLDS[:-1], HEAD_FOLD),
    skipped=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "vocab_size": 262208,
    },
    assumed={
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "attention_bias": (False,),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
        "layer_types": alternating(6),
        "sliding_window_pattern": (6,),
        "query_pre_attn_scalar": query_scale(62),
    },
    rope_theta=1000000.0,
    rope_theta_sliding=10000.0,
    rope_types=("default", "linear"),
)
