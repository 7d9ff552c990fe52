"""SmolLM3: LLaMA, but every fourth layer does without positions."""

from dataclasses import replace

import gguf

from converters.architectures.description import Config
from converters.architectures.llama import ARCHITECTURE as LLAMA


def _rotated_layers(config: Config) -> tuple[list[int]]:
    """Return the pattern that llama.cpp's smollm3 has built in."""
    return ([int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])],)


ARCHITECTURE = replace(
    LLAMA,
    model_arch=gguf.MODEL_ARCH.SMOLLM3,
    classes=("SmolLM3ForCausalLM",),
    generated=(),
    defaults={
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
    assumed={
        "hidden_act": ("silu",),
        "no_rope_layers": lambda config: (*_rotated_layers(config), None),
        "no_rope_layer_interval": (4,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
    },
    required_if={},
    rope_theta=2000000.0,
    rope_types=("default", "linear", "yarn", "dynamic"),
    by_vocab_size={},
)
