"""Qwen 3, dense: Qwen 2 without biases, with norms on each head's queries and keys."""

from dataclasses import replace

import gguf

from converters.architectures.qwen2 import ARCHITECTURE as QWEN2

ARCHITECTURE = replace(
    QWEN2,
    model_arch=gguf.MODEL_ARCH.QWEN3,
    classes=("Qwen3ForCausalLM",),
    required=(*QWEN2.required, "blk.{bid}.attn_q_norm", "blk.{bid}.attn_k_norm"),
    required_if={},
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
)
