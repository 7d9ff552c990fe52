"""Qwen 3 with experts in every layer."""

import gguf

from converters.architectures.description import (
    EXPERT_FOLDS,
    EXPERT_GROUPS,
    EXPERT_REQUIRED,
    EXPERT_RULES,
    Architecture,
    Key,
)
from converters.architectures.settings import DECODER, EXPERT_COUNTS, U32

ARCHITECTURE = Architecture(
    model_arch=gguf.MODEL_ARCH.QWEN3MOE,
    classes=("Qwen3MoeForCausalLM",),
    keys=(
        *DECODER,
        *EXPERT_COUNTS,
        Key("{arch}.expert_feed_forward_length", U32, ("moe_intermediate_size",), required=True),
    ),
    required=(*EXPERT_REQUIRED, "blk.{bid}.attn_q_norm", "blk.{bid}.attn_k_norm"),
    input_groups=EXPERT_GROUPS,
    folds=EXPERT_FOLDS,
    rules=EXPERT_RULES,
    unquantized=("blk.{bid}.ffn_gate_inp",),
    aliases={"num_experts": "num_local_experts"},
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
    assumed={
        "hidden_act": ("silu",),
        "norm_topk_prob": (True,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    },
    vocabularies=("sentencepiece", "bpe"),
)
