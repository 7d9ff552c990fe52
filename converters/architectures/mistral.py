"""Mistral: LLaMA's GGUF architecture under a class of its own."""

from dataclasses import replace

from converters.architectures.llama import ARCHITECTURE as LLAMA
from converters.architectures.settings import DERIVED_HEADS

ARCHITECTURE = replace(
    LLAMA,
    classes=("MistralForCausalLM",),
    defaults={
        **DERIVED_HEADS,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
    },
    required_if={},
)
