"""What one architecture's description may say; the families beside this file are filled-in forms.

A description holds facts only: names, settings, how tensors are rearranged on their way from a
Hugging Face checkpoint into GGUF, and what later steps (folding, allocation) may do with them.
GGUF names are written without ``.weight``; ``{bid}`` is the layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType

Config = Mapping[str, Any]
Shape = tuple[int, ...]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Key:
    """One metadata value taken from the configuration.

    Parameters
    ----------
    name : GGUF key; ``{arch}`` is the architecture's GGUF name
    type : its GGUF type
    source : configuration keys, the first that is set counts; or a function of the configuration
        whose None means that the key is not written
    required : refuse a configuration without it
    """

    name: str
    type: GGUFValueType
    source: tuple[str, ...] | Callable[[Config], Any]
    required: bool = False


@dataclass(frozen=True)
class Arrangement:
    """Reorder the elements of one checkpoint tensor without changing their type.

    Parameters
    ----------
    apply : (array, config) to array; views are welcome, values are not touched
    shape : (shape, config) to the shape of the result
    """

    apply: Callable[[Array, Config], Array]
    shape: Callable[[Shape, Config], Shape] = lambda shape, config: shape


@dataclass(frozen=True)
class Output:
    """One GGUF tensor made from one checkpoint tensor, or from a stack of them.

    Parameters
    ----------
    name : checkpoint name to look up in gguf's name map, a template over the groups of the rule's
        pattern; None looks up the tensor's own name
    arrange : reordering of the elements
    offset : added to every element, in float32
    stack_size : configuration key of the number of tensors that are stacked along a new first
        axis, ordered by the pattern's group ``index``
    """

    name: str | None = None
    arrange: Arrangement | None = None
    offset: float = 0.0
    stack_size: str | None = None


@dataclass(frozen=True)
class Rule:
    """What becomes of the checkpoint tensors whose whole name matches `pattern`."""

    pattern: str
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class Generated:
    """A float32 tensor made from the configuration; None of `values` means that there is none."""

    name: str
    values: Callable[[Config], Array | None]


@dataclass(frozen=True)
class InputGroup:
    """Matrices that multiply the same activations, so share one imatrix and one Hessian.

    `source` is the norm that makes these activations; None if no norm stands directly before.
    """

    source: str | None
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Fold:
    """A diagonal scale that may move from the rows of `source` into the columns of `consumers`.

    Parameters
    ----------
    kind : ``norm``: norm weights (and bias) into the following matrices; ``value``: rows of the
        value projection into columns of the output projection, one scale per channel of a
        key/value head, shared by its query heads; ``up``: rows of the up projection into columns
        of the down projection
    source, consumers : GGUF names. A fold with a tensor that the file does not have does not apply:
        so with the head of a model whose output is tied to its embedding
    rows : which rows of `source`: all of them, the value part of a fused query/key/value matrix,
        or the second half of a fused gate/up matrix
    refused : why the fold would change the function; None if it is legal
    """

    kind: Literal["norm", "value", "up"]
    source: str
    consumers: tuple[str, ...]
    rows: Literal["all", "value", "second half"] = "all"
    refused: str | None = None


@dataclass(frozen=True)
class Architecture:
    """One family of checkpoints and the GGUF architecture that runs it.

    Parameters
    ----------
    model_arch : gguf's architecture; its name map translates tensor names
    classes : ``architectures`` entries of config.json
    keys : metadata taken from the configuration
    required : GGUF tensors that every model of the family has, without ``.weight``
    required_if : configuration flag to full GGUF names (with suffix) that it asks for
    input_groups, folds : see there
    rules : tensors that need more than a new name; the first match counts
    skipped : patterns of checkpoint tensors that the GGUF does not hold
    generated : tensors made from the configuration
    unquantized : matrices that stay in float (small and sensitive, or not a matrix product)
    aliases : other configuration keys of the same meaning, old to new
    defaults : what transformers assumes for an absent key; a function of the configuration also
        replaces null
    assumed : configuration keys whose value llama.cpp takes for granted, with the values that mean
        what it computes, or a function of the configuration to these
    rope_theta, rope_theta_sliding, partial_rotary_factor : transformers' defaults
    rope_types : kinds of position scaling that reach the GGUF
    vocabularies : kinds of vocabulary, tried in this order, see ``converters.vocab``
    adds_space_prefix : ``tokenizer.ggml.add_space_prefix``; ``config`` copies
        tokenizer_config.json's add_prefix_space, None writes nothing
    needs_output : llama.cpp wants an output matrix even where it is tied to the embedding
    by_vocab_size : metadata of the vocabularies of that size, over what tokenizer files say
    """

    model_arch: gguf.MODEL_ARCH
    classes: tuple[str, ...]
    keys: tuple[Key, ...]
    required: tuple[str, ...]
    input_groups: tuple[InputGroup, ...]
    folds: tuple[Fold, ...]
    rules: tuple[Rule, ...] = ()
    required_if: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    generated: tuple[Generated, ...] = ()
    unquantized: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, tuple[Any, ...] | Callable[[Config], tuple[Any, ...]]] = field(
        default_factory=dict
    )
    rope_theta: float = 10000.0
    rope_theta_sliding: float | None = None
    partial_rotary_factor: float | None = None
    rope_types: tuple[str, ...] = ("default", "linear", "yarn", "dynamic")
    vocabularies: tuple[str, ...] = ("bpe",)
    adds_space_prefix: bool | Literal["config"] | None = None
    needs_output: bool = False
    by_vocab_size: Mapping[int, Mapping[str, tuple[GGUFValueType, Any]]] = field(
        default_factory=dict
    )

    @property
    def name(self) -> str:
        """The architecture's name in GGUF metadata."""
        return str(gguf.MODEL_ARCH_NAMES[self.model_arch])

    @property
    def quantizable(self) -> tuple[str, ...]:
        """GGUF names of the matrices that may be quantized."""
        consumers = [name for group in self.input_groups for name in group.consumers]
        return ("token_embd", *(name for name in consumers if name not in self.unquantized))


def _permute_heads(heads: tuple[str, ...]) -> Arrangement:
    def apply(array: Array, config: Config) -> Array:
        n_head = next(config[key] for key in heads if config.get(key) is not None)
        halves = array.reshape(n_head, 2, array.shape[0] // n_head // 2, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)

    return Arrangement(apply)


def _interleave(array: Array, config: Config) -> Array:
    n_head = config["num_attention_heads"]
    parts = array.reshape(n_head, 3, -1, *array.shape[1:])  # (n_head, 3, head_dim, n_in)
    return parts.swapaxes(0, 1).reshape(array.shape)


def _half(which: int) -> Arrangement:
    def apply(array: Array, config: Config) -> Array:
        n_out = array.shape[-2] // 2
        return array[..., which * n_out : (which + 1) * n_out, :]

    def shape(shape: Shape, config: Config) -> Shape:
        return (*shape[:-2], shape[-2] // 2, shape[-1])

    return Arrangement(apply, shape)


# transformers rotates channel i with i + head_dim/2, ggml's "norm" rotation i with i + 1:
# the rows of each head are interleaved (llama.cpp conversion/llama.py, LlamaModel.permute).
PERMUTE_QUERY = _permute_heads(("num_attention_heads",))
PERMUTE_KEY = _permute_heads(("num_key_value_heads", "num_attention_heads"))
# (in, out) of transformers' Conv1D to (out, in)
TRANSPOSE = Arrangement(lambda array, config: array.T, lambda shape, config: shape[::-1])
# per head q, k, v to all q, all k, all v (llama.cpp conversion/gptneox.py)
SEPARATE_QKV = Arrangement(_interleave)
FIRST_HALF = _half(0)
SECOND_HALF = _half(1)

PERMUTED_ROPE = (
    Rule(r".*q_proj\.(weight|bias)", (Output(arrange=PERMUTE_QUERY),)),
    Rule(r".*k_proj\.(weight|bias)", (Output(arrange=PERMUTE_KEY),)),
)

# gate and up projections of all experts in one tensor, as transformers 5 holds them
EXPERT_RULES = (
    Rule(
        r"(?P<layer>.*)\.mlp\.experts\.gate_up_proj(\.weight)?",
        (
            Output("{layer}.mlp.experts.gate_proj.weight", FIRST_HALF),
            Output("{layer}.mlp.experts.up_proj.weight", SECOND_HALF),
        ),
    ),
    Rule(
        r"(?P<layer>.*)\.mlp\.experts\.down_proj(\.weight)?",
        (Output("{layer}.mlp.experts.down_proj.weight"),),
    ),
    Rule(
        r"(?P<layer>.*\.experts)\.(?P<index>\d+)\.(?P<part>\w+)\.weight",
        (Output("{layer}.{part}.weight", stack_size="num_local_experts"),),
    ),
)

# Pieces that several families share.
QKV = ("blk.{bid}.attn_q", "blk.{bid}.attn_k", "blk.{bid}.attn_v")
GATE_UP = ("blk.{bid}.ffn_gate", "blk.{bid}.ffn_up")
EXPERTS = ("blk.{bid}.ffn_gate_inp", "blk.{bid}.ffn_gate_exps", "blk.{bid}.ffn_up_exps")
ATTENTION_OUT = InputGroup(None, ("blk.{bid}.attn_output",))
FFN_DOWN = InputGroup(None, ("blk.{bid}.ffn_down",))
HEAD = InputGroup("output_norm", ("output",))
HEAD_FOLD = Fold("norm", "output_norm", ("output",))
VALUE_FOLD = Fold("value", "blk.{bid}.attn_v", ("blk.{bid}.attn_output",))
UP_FOLD = Fold("up", "blk.{bid}.ffn_up", ("blk.{bid}.ffn_down",))

QKV_BIASES = tuple(f"{name}.bias" for name in QKV)

DENSE_GROUPS = (
    InputGroup("blk.{bid}.attn_norm", QKV),
    ATTENTION_OUT,
    InputGroup("blk.{bid}.ffn_norm", GATE_UP),
    FFN_DOWN,
    HEAD,
)
DENSE_FOLDS = (
    Fold("norm", "blk.{bid}.attn_norm", QKV),
    VALUE_FOLD,
    Fold("norm", "blk.{bid}.ffn_norm", GATE_UP),
    UP_FOLD,
    HEAD_FOLD,
)
DENSE_REQUIRED = (
    "token_embd",
    "output_norm",
    "blk.{bid}.attn_norm",
    *QKV,
    "blk.{bid}.attn_output",
    "blk.{bid}.ffn_norm",
    *GATE_UP,
    "blk.{bid}.ffn_down",
)

EXPERT_GROUPS = (
    InputGroup("blk.{bid}.attn_norm", QKV),
    ATTENTION_OUT,
    InputGroup("blk.{bid}.ffn_norm", EXPERTS),
    InputGroup(None, ("blk.{bid}.ffn_down_exps",)),
    HEAD,
)
EXPERT_FOLDS = (
    Fold("norm", "blk.{bid}.attn_norm", QKV),
    VALUE_FOLD,
    Fold("norm", "blk.{bid}.ffn_norm", EXPERTS),
    Fold("up", "blk.{bid}.ffn_up_exps", ("blk.{bid}.ffn_down_exps",)),
    HEAD_FOLD,
)
EXPERT_REQUIRED = (
    "token_embd",
    "output_norm",
    "blk.{bid}.attn_norm",
    *QKV,
    "blk.{bid}.attn_output",
    "blk.{bid}.ffn_norm",
    *EXPERTS,
    "blk.{bid}.ffn_down_exps",
)


def rope_frequencies(config: Config) -> Array | None:
    """Return the frequency divisors of llama 3's position scaling, (head_dim/2,) float32.

    None if the model scales otherwise or not at all. Computed in float32 for the frequency and in
    float64 from there on, as llama.cpp's script does, so that the bytes are equal.

    References
    ----------
    llama.cpp conversion/llama.py, LlamaModel.generate_extra_tensors; transformers
    modeling_rope_utils.py, _compute_llama3_parameters.
    """
    rope = config["rope"]["full"]
    if rope["rope_type"] != "llama3":
        return None
    n_rot = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    exponents = np.arange(0, n_rot, 2, dtype=np.float32) / np.float32(n_rot)
    frequencies = np.float32(1) / np.float32(rope["rope_theta"]) ** exponents
    factor = rope.get("factor", 8.0)
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    n_ctx = rope["original_max_position_embeddings"]
    wavelengths = np.float32(2 * np.pi) / frequencies
    smooth = (np.float32(n_ctx) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)
    scaled = np.where(wavelengths > n_ctx / low, np.float32(factor), blended)
    return np.where(wavelengths < n_ctx / high, np.float32(1), scaled).astype(np.float32)
