"""A model's sizes, from its metadata; what the decoder does not compute is refused here."""

import math
from dataclasses import dataclass
from typing import Any

from converters.gguf_file import GgufFile
from cpu_kernels.attention import LANES
from edgeq.errors import EvaluationError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
_GEMMA3_27B = 62  # layers: its scores have another scale


@dataclass(frozen=True)
class Shape:
    """A model's sizes and numbers, from its metadata.

    Attributes
    ----------
    architecture : one of ARCHITECTURES
    n_layers, n_embd, n_heads, n_kv_heads, head_dim : as in llama.cpp's hyperparameters
    n_rotated : numbers of a head that are rotated
    epsilon : of the root mean squares
    rope_base, rope_scale : of the rotation; `local_base` of layers with a window
    window, pattern : positions seen by all but every `pattern`-th layer; 0: all
    score_scale : of the products of queries and keys
    """

    architecture: str
    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_rotated: int
    epsilon: float
    rope_base: float
    rope_scale: float
    local_base: float
    window: int
    pattern: int
    score_scale: float

    @property
    def is_gemma(self) -> bool:
        """Whether it scales its embedding, normalizes twice and uses GELU."""
        return self.architecture == "gemma3"

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees a window only."""
        return self.window > 0 and layer % self.pattern < self.pattern - 1


def shape_of(file: GgufFile) -> Shape:
    """Read a model's sizes.

    Raises
    ------
    EvaluationError
        The architecture, or something in it, is none that this decoder computes.
    """
    name = file.architecture
    if name not in ARCHITECTURES:
        raise EvaluationError(
            f"{file.path}: the kernels' decoder does not run {name}; it runs "
            f"{', '.join(ARCHITECTURES)}. Use llama.cpp."
        )

    def value(key: str, default: Any = None) -> Any:
        found = file.value(f"{name}.{key}", default)
        if found is None:
            raise EvaluationError(f"{file.path}: {name}.{key} is missing. The file is damaged.")
        return found

    scaling = value("rope.scaling.type", "none")
    for key, wanted in (("expert_count", 0), ("attn_logit_softcapping", 0.0)):
        if value(key, wanted) != wanted:
            raise EvaluationError(
                f"{file.path}: the kernels' decoder knows no {name}.{key} = {value(key)}. "
                "Use llama.cpp."
            )
    if scaling not in ("none", "linear"):
        raise EvaluationError(
            f"{file.path}: the kernels' decoder knows no rope.scaling.type = {scaling}. "
            "Use llama.cpp."
        )
    n_embd, n_heads = int(value("embedding_length")), int(value("attention.head_count"))
    n_layers = int(value("block_count"))
    head_dim = int(value("attention.key_length", n_embd // n_heads))
    wide = n_embd // n_heads if name == "gemma3" and n_layers == _GEMMA3_27B else head_dim
    shape = Shape(
        architecture=name,
        n_layers=n_layers,
        n_embd=n_embd,
        n_heads=n_heads,
        n_kv_heads=int(value("attention.head_count_kv", n_heads)),
        head_dim=head_dim,
        n_rotated=int(value("rope.dimension_count", head_dim)),
        epsilon=float(value("attention.layer_norm_rms_epsilon")),
        rope_base=float(value("rope.freq_base", 1e6 if name == "gemma3" else 1e4)),
        rope_scale=1 / float(value("rope.scaling.factor", 1.0)) if scaling == "linear" else 1.0,
        local_base=float(value("rope.freq_base_swa", 1e4)),
        window=int(value("attention.sliding_window", 0)) if name == "gemma3" else 0,
        pattern=int(value("attention.sliding_window_pattern", 6)) if name == "gemma3" else 1,
        score_scale=1 / math.sqrt(wide),
    )
    if shape.head_dim % LANES or value("attention.value_length", head_dim) != head_dim:
        raise EvaluationError(
            f"{file.path}: heads of {head_dim} numbers; the kernels' decoder needs a multiple of "
            f"{LANES}, the same for keys and values. Use llama.cpp."
        )
    return shape
