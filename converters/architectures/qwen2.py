"""Qwen 1.5, 2 and 2.5, dense."""

import gguf

from converters.architectures.description import (
    DENSE_FOLDS,
    DENSE_GROUPS,
    DENSE_REQUIRED,
    QKV_BIASES,
    Architecture,
)
from converters.architectures.settings import DECODER

ARCHITECTURE = Architecture(
    model_arch=gguf.MODEL_ARCH.QWEN2,
    classes=("Qwen2ForCausalLM",),
    keys=DECODER,
    required=DENSE_REQUIRED,
    required_if={"attention_bias": QKV_BIASES},
    input_groups=DENSE_GROUPS,
    folds=DENSE_FOLDS,
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "attention_bias": True,
    },
    assumed={"hidden_act": ("silu",)},
    vocabularies=("sentencepiece", "bpe"),
)
