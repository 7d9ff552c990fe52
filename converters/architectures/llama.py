"""LLaMA 1 to 3, SmolLM and SmolLM2."""

import gguf
from gguf import GGUFValueType

from converters.architectures.description import (
    DENSE_FOLDS,
    DENSE_GROUPS,
    DENSE_REQUIRED,
    PERMUTED_ROPE,
    Architecture,
    Generated,
    rope_frequencies,
)
from converters.architectures.settings import (
    DECODER,
    DERIVED_HEADS,
    ROPE_DIMENSIONS,
    VOCAB_SIZE,
)

ARCHITECTURE = Architecture(
    model_arch=gguf.MODEL_ARCH.LLAMA,
    classes=("LlamaForCausalLM", "LLaMAForCausalLM"),
    keys=(*DECODER, VOCAB_SIZE, ROPE_DIMENSIONS),
    required=DENSE_REQUIRED,
    required_if={
        "attention_bias": tuple(
            f"blk.{{bid}}.{part}.bias" for part in ("attn_q", "attn_k", "attn_v", "attn_output")
        ),
        "mlp_bias": tuple(
            f"blk.{{bid}}.{part}.bias" for part in ("ffn_gate", "ffn_up", "ffn_down")
        ),
    },
    input_groups=DENSE_GROUPS,
    folds=DENSE_FOLDS,
    rules=PERMUTED_ROPE,
    generated=(Generated("rope_freqs.weight", rope_frequencies),),
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, **DERIVED_HEADS},
    assumed={"hidden_act": ("silu",)},
    rope_types=("default", "linear", "yarn", "dynamic", "llama3"),
    vocabularies=("sentencepiece", "sentencepiece-json", "bpe"),
    adds_space_prefix="config",
    by_vocab_size={
        32016: {"tokenizer.ggml.eot_token_id": (GGUFValueType.UINT32, 32010)},  # CodeLlama
        # SmolLM and Granite: their tokenizers name a BOS token but do not add it
        49152: {"tokenizer.ggml.add_bos_token": (GGUFValueType.BOOL, False)},
    },
)
