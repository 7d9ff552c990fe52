"""Mixtral: LLaMA's GGUF architecture with experts.

Checkpoints come with one tensor for each expert, or, saved by transformers 5 without its renaming,
with all experts in one.
"""

import gguf

from converters.architectures.description import (
    EXPERT_FOLDS,
    EXPERT_GROUPS,
    EXPERT_REQUIRED,
    EXPERT_RULES,
    PERMUTED_ROPE,
    Architecture,
)
from converters.architectures.settings import (
    DECODER,
    EXPERT_COUNTS,
    ROPE_DIMENSIONS,
    VOCAB_SIZE,
)

ARCHITECTURE = Architecture(
    model_arch=gguf.MODEL_ARCH.LLAMA,
    classes=("MixtralForCausalLM",),
    keys=(*DECODER, VOCAB_SIZE, ROPE_DIMENSIONS, *EXPERT_COUNTS),
    required=EXPERT_REQUIRED,
    input_groups=EXPERT_GROUPS,
    folds=EXPERT_FOLDS,
    rules=(*PERMUTED_ROPE, *EXPERT_RULES),
    unquantized=("blk.{bid}.ffn_gate_inp",),
    aliases={"num_experts": "num_local_experts"},
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    assumed={"hidden_act": ("silu",)},
    rope_theta=1000000.0,
    vocabularies=("sentencepiece", "sentencepiece-json", "bpe"),
    adds_space_prefix="config",
)
