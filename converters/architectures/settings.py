"""config.json in its old and new spellings to one form, and the metadata that most families share.

Two things moved in transformers 5: ``rope_theta``, ``rope_scaling`` and the partial rotary factor
became ``rope_parameters`` (one dictionary, or one for each kind of layer), and configurations are
saved without what equals the default. Both forms occur on the hub and are read here.
"""

from typing import Any

from gguf import GGUFValueType

from converters.architectures.description import Architecture, Config, Key
from converters.errors import ConversionError

_SIZE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_local_experts",
)

U32, F32, STRING = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING


def settings(config: Config, architecture: Architecture) -> dict[str, Any]:
    """Return the configuration of the text model with defaults filled in.

    Adds ``rope``: ``{"full": {...}, "sliding": {...}}``, each with ``rope_type`` and
    ``rope_theta``; ``sliding`` is empty where all layers rotate alike.

    Raises
    ------
    ConversionError
        A setting asks for something that llama.cpp does not compute for this architecture.
    """
    text = config.get("text_config")
    flat = {**config, **text} if isinstance(text, dict) else dict(config)
    for old, new in architecture.aliases.items():
        if flat.get(new) is None and flat.get(old) is not None:
            flat[new] = flat[old]
    for key in _SIZE_KEYS:
        value = flat.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise ConversionError(f"config.json: {key} is {value!r}; expected a positive integer.")
    for key, default in architecture.defaults.items():
        if callable(default):
            if flat.get(key) is None:
                flat[key] = default(_Complete(flat))
        else:
            flat.setdefault(key, default)
    flat["rope"] = _rope(flat, architecture)
    for key, values in architecture.assumed.items():
        allowed = values(_Complete(flat)) if callable(values) else values
        if key in flat and flat[key] not in allowed:
            expected = " or ".join(repr(value) for value in allowed)
            raise ConversionError(
                f"config.json: {key} is {flat[key]!r}; llama.cpp's {architecture.name} computes "
                f"{expected}. This model would run, but not as trained."
            )
    return flat


class _Complete(dict[str, Any]):
    """A configuration whose absent and null entries are refused when they are asked for."""

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ConversionError(f"config.json: {key} is missing; the model cannot be described.")
        return value


def _rope(config: Config, architecture: Architecture) -> dict[str, dict[str, Any]]:
    raw = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise ConversionError(f"config.json: rope_parameters is {raw!r}; expected an object.")
    theta = _first(config, "rope_theta", "rotary_emb_base") or architecture.rope_theta
    partial = _first(config, "partial_rotary_factor", "rotary_pct", "rope_pct")
    if partial is None:
        partial = architecture.partial_rotary_factor
    if "full_attention" in raw or "sliding_attention" in raw:
        full = dict(raw.get("full_attention") or {})
        sliding = dict(raw.get("sliding_attention") or {})
    else:
        full, sliding = dict(raw), {}
        if architecture.rope_theta_sliding is not None:
            local = config.get("rope_local_base_freq")
            sliding["rope_theta"] = architecture.rope_theta_sliding if local is None else local
    full.setdefault("rope_theta", theta)
    full.setdefault("rope_type", full.get("type") or "default")
    if partial is not None:
        full.setdefault("partial_rotary_factor", partial)
    original = config.get("original_max_position_embeddings")
    if original is not None:
        full["original_max_position_embeddings"] = original
    elif full["rope_type"] in ("llama3", "yarn", "longrope"):
        full.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    if full["rope_type"] not in architecture.rope_types:
        raise ConversionError(
            f"config.json: position scaling {full['rope_type']!r} has no place in a GGUF of "
            f"architecture {architecture.name}; expected one of "
            f"{', '.join(architecture.rope_types)}."
        )
    return {"full": full, "sliding": sliding}


def _first(config: Config, *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def rope(name: str, *, kind: str | None = None) -> Any:
    """Return a `Key` source: entry `name` of the full layers' rope settings.

    With `kind` only where the scaling is of that type.
    """

    def source(config: Config) -> Any:
        full = config["rope"]["full"]
        return full.get(name) if kind is None or full["rope_type"] == kind else None

    return source


def _scaling_type(config: Config) -> str | None:
    full = config["rope"]["full"]
    if full["rope_type"] in ("linear", "yarn") and full.get("factor") is not None:
        return str(full["rope_type"])
    return None


def _scaling_factor(config: Config) -> float | None:
    return config["rope"]["full"]["factor"] if _scaling_type(config) else None


def _yarn_attention(config: Config) -> Any:
    full = config["rope"]["full"]
    if full["rope_type"] != "yarn":
        return None
    return full.get("attention_factor", full.get("attn_factor"))


def head_size(config: Config) -> int:
    """Return the channels of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rotated(config: Config) -> int:
    """Return how many channels of a head are rotated."""
    partial = config["rope"]["full"].get("partial_rotary_factor", 1.0)
    return int(partial * (config["hidden_size"] // config["num_attention_heads"]))


def theta_unless_default(config: Config) -> float | None:
    """Return rope_theta if it is not the 10000 that llama.cpp assumes for an absent key.

    For families whose branch of llama.cpp's script forgets it.
    """
    theta = config["rope"]["full"]["rope_theta"]
    return None if theta == 10000 else theta


SIZES = (
    Key("{arch}.block_count", U32, ("num_hidden_layers", "n_layer"), required=True),
    Key("{arch}.context_length", U32, ("max_position_embeddings", "n_ctx", "n_positions")),
    Key("{arch}.embedding_length", U32, ("hidden_size", "n_embd"), required=True),
    Key("{arch}.feed_forward_length", U32, ("intermediate_size",), required=True),
    Key("{arch}.attention.head_count", U32, ("num_attention_heads", "n_head"), required=True),
)
HEAD_COUNT_KV = Key("{arch}.attention.head_count_kv", U32, ("num_key_value_heads",))
HEAD_DIM = (
    Key("{arch}.attention.key_length", U32, ("head_dim",)),
    Key("{arch}.attention.value_length", U32, ("head_dim",)),
)
RMS_EPSILON = Key("{arch}.attention.layer_norm_rms_epsilon", F32, ("rms_norm_eps",), required=True)
LAYER_NORM_EPSILON = "{arch}.attention.layer_norm_epsilon"
ROPE = (
    Key("{arch}.rope.freq_base", F32, rope("rope_theta")),
    Key("{arch}.rope.scaling.type", STRING, _scaling_type),
    Key("{arch}.rope.scaling.factor", F32, _scaling_factor),
    Key(
        "{arch}.rope.scaling.original_context_length",
        U32,
        rope("original_max_position_embeddings", kind="yarn"),
    ),
    Key("{arch}.rope.scaling.yarn_ext_factor", F32, rope("extrapolation_factor", kind="yarn")),
    Key("{arch}.rope.scaling.yarn_attn_factor", F32, _yarn_attention),
    Key("{arch}.rope.scaling.yarn_beta_fast", F32, rope("beta_fast", kind="yarn")),
    Key("{arch}.rope.scaling.yarn_beta_slow", F32, rope("beta_slow", kind="yarn")),
)
EXPERT_COUNTS = (
    Key("{arch}.expert_count", U32, ("num_local_experts",), required=True),
    Key("{arch}.expert_used_count", U32, ("num_experts_per_tok",), required=True),
)
DECODER = (*SIZES, HEAD_COUNT_KV, *HEAD_DIM, RMS_EPSILON, *ROPE)
ROPE_DIMENSIONS = Key("{arch}.rope.dimension_count", U32, head_size)
VOCAB_SIZE = Key("{arch}.vocab_size", U32, ("vocab_size",))
DERIVED_HEADS = {
    "num_key_value_heads": lambda config: config["num_attention_heads"],
    "head_dim": lambda config: config["hidden_size"] // config["num_attention_heads"],
}
