"""Models of known sizes, by the configurations that were published with them.

Sources: config.json of meta-llama/Llama-3.2-1B, Llama-3.1-8B, Llama-3.1-70B, Llama-3.1-405B and
Qwen/Qwen3-30B-A3B on the Hugging Face hub.
"""

from collections.abc import Mapping
from typing import Any


def _llama(
    n_embd: int, n_layers: int, n_heads: int, n_ff: int, head_dim: int, *, is_tied: bool = False
) -> Mapping[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": n_embd,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "intermediate_size": n_ff,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": is_tied,
        "dtype": "bfloat16",
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "1B": _llama(2048, 16, 32, 8192, 64, is_tied=True),
    "8B": _llama(4096, 32, 32, 14336, 128),
    "70B": _llama(8192, 80, 64, 28672, 128),
    "405B": _llama(16384, 126, 128, 53248, 128),
    "30B-A3B": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
}
