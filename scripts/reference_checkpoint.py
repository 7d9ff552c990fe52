"""The Hugging Face directory of a reference: tensors, ``config.json``, and a rebuilt tokenizer.

What the GGUF lost (the kind of SentencePiece's control pieces, the pre-tokenizer's rules) is known
for the two models that the references are made from, and filled in here.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from converters.gguf_file import GgufFile
from scripts.reference_folds import Float32, Geometry, Tensors

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # llama_token_type in include/llama.h

_HF_NAMES = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    },
}
_COMMON_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def hf_name(architecture: str, name: str) -> str:
    """Return the ``transformers`` name of the GGUF tensor `name`."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{(_COMMON_NAMES | _HF_NAMES[architecture])[part]}.{suffix}"


def _hf_tensor(architecture: str, name: str, tensor: Float32, geometry: Geometry) -> Float32:
    """Return `tensor` as ``transformers`` keeps it.

    llama: GGUF holds the query and key rows of a head as rotary pairs, ``transformers`` as two
    halves. gemma3: ``transformers`` adds 1 to every norm weight.

    References
    ----------
    LlamaModel.permute in conversion/llama.py, Gemma3Model.norm_shift in conversion/gemma.py,
    llama.cpp 0c1e57098.
    """
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return tensor - np.float32(1)
    if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        n_heads = len(tensor) // geometry.head_dim
        pairs = tensor.reshape(n_heads, geometry.head_dim // 2, 2, -1)
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
    return tensor


def write_hf(directory: Path, source: GgufFile, tensors: Tensors, geometry: Geometry) -> None:
    """Write a directory that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    Parameters
    ----------
    source : where vocabulary and hyper-parameters come from
    tensors : by GGUF name
    """
    architecture = source.architecture
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            hf_name(architecture, name): _hf_tensor(architecture, name, tensor, geometry)
            for name, tensor in tensors.items()
        },
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    (directory / "model.safetensors").chmod(0o644)  # safetensors makes it private
    config = _config(source, tensors, geometry)
    _write_json(directory / "config.json", config)
    ids = {k: v for k, v in config.items() if k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "generation_config.json", {"_from_model_config": True, **ids})
    if source.value("tokenizer.ggml.model") == "gpt2":
        _write_bpe(directory, source)
    else:
        _write_sentencepiece(directory, source)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _decimal(value: float) -> float:
    """Return the shortest decimal that is the float32 `value`: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _config(source: GgufFile, tensors: Tensors, geometry: Geometry) -> dict[str, Any]:
    architecture = source.architecture

    def value(key: str) -> Any:
        return source.value(f"{architecture}.{key}")

    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": source.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": source.value("tokenizer.ggml.padding_token_id"),
        "hidden_size": geometry.n_embd,
        "intermediate_size": value("feed_forward_length"),
        "max_position_embeddings": value("context_length"),
        "num_attention_heads": geometry.n_head,
        "num_hidden_layers": geometry.n_layers,
        "num_key_value_heads": geometry.n_head_kv,
        "rms_norm_eps": _decimal(geometry.rms_eps),
        "rope_theta": _decimal(value("rope.freq_base")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
        "use_cache": True,
        "vocab_size": len(tensors["token_embd.weight"]),
    }
    if architecture == "gemma3" or geometry.head_dim * geometry.n_head != geometry.n_embd:
        config["head_dim"] = geometry.head_dim
    if architecture == "llama":
        return config | {"hidden_act": "silu", "mlp_bias": False}
    full = [(i + 1) % 6 == 0 for i in range(geometry.n_layers)]
    return config | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["full_attention" if f else "sliding_attention" for f in full],
        "query_pre_attn_scalar": geometry.head_dim,
        "rope_local_base_freq": 10000.0,
        "sliding_window": value("attention.sliding_window"),
    }


def _tokenizer_config(source: GgufFile, special: dict[int, dict[str, Any]]) -> dict[str, Any]:
    tokens = source.value("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "added_tokens_decoder": {str(i): token for i, token in special.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.value(f"{source.architecture}.context_length"),
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token_id = source.value(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[f"{name}_token"] = tokens[token_id]
    template = source.value("tokenizer.chat_template")
    return config | ({"chat_template": template} if template else {})


def _added_tokens(source: GgufFile) -> dict[int, dict[str, Any]]:
    """Return the control and user-defined tokens by id, as ``tokenizer_config.json`` lists them."""
    pieces = zip(
        source.value("tokenizer.ggml.tokens"),
        source.value("tokenizer.ggml.token_type"),
        strict=True,
    )
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        i: {"content": _piece(text, kind), **flags, "special": kind == CONTROL}
        for i, (text, kind) in enumerate(pieces)
        if kind in (CONTROL, USER_DEFINED)
    }


def _piece(text: str, kind: int) -> str:
    """Undo what conversion does to user-defined pieces: SentencePiece writes a space as '▁'."""
    return text.replace(" ", "▁") if kind == USER_DEFINED else text


def _write_tokenizer(
    directory: Path, added: dict[int, dict[str, Any]], steps: dict[str, Any], model: dict[str, Any]
) -> None:
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in added.items()],
        **steps,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "ignore_merges": False,
            **model,
        },
    }
    _write_json(directory / "tokenizer.json", tokenizer)


def _write_bpe(directory: Path, source: GgufFile) -> None:
    """Write SmolLM2's byte-level BPE: digits stand alone, then GPT-2's split."""
    tokens = source.value("tokenizer.ggml.tokens")
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    split = {**byte_level, "add_prefix_space": False}
    added = _added_tokens(source)
    _write_tokenizer(
        directory,
        added,
        {
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, split]},
            "post_processor": None,
            "decoder": {**byte_level, "add_prefix_space": True},
        },
        {
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [m.split(" ") for m in source.value("tokenizer.ggml.merges")],
        },
    )
    _write_json(
        directory / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
            **_tokenizer_config(source, added),
        },
    )


def _write_sentencepiece(directory: Path, source: GgufFile) -> None:
    """Write Gemma's SentencePiece BPE as ``tokenizer.model`` and as ``tokenizer.json``."""
    kinds = source.value("tokenizer.ggml.token_type")
    pieces = [
        _piece(t, k) for t, k in zip(source.value("tokenizer.ggml.tokens"), kinds, strict=True)
    ]
    scores = source.value("tokenizer.ggml.scores")
    ids = {
        k: source.value(f"tokenizer.ggml.{k}_token_id")
        for k in ("unknown", "bos", "eos", "padding")
    }
    model = _sentencepiece_model(pieces, scores, kinds, ids)
    (directory / "tokenizer.model").write_bytes(model)
    added, space = _added_tokens(source), {"String": " "}
    bos = pieces[ids["bos"]]
    template = [
        {"SpecialToken": {"id": bos, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    _write_tokenizer(
        directory,
        added,
        {
            "normalizer": {"type": "Replace", "pattern": space, "content": "▁"},
            "pre_tokenizer": {
                "type": "Split",
                "pattern": space,
                "behavior": "MergedWithPrevious",
                "invert": False,
            },
            "post_processor": {
                "type": "TemplateProcessing",
                "single": template,
                "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {bos: {"id": bos, "ids": [ids["bos"]], "tokens": [bos]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
        },
        {
            "unk_token": pieces[ids["unknown"]],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(pieces, scores, kinds),
        },
    )
    _write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": source.value("tokenizer.ggml.add_bos_token", True),
            "add_eos_token": source.value("tokenizer.ggml.add_eos_token", False),
            "tokenizer_class": "GemmaTokenizer",
            **_tokenizer_config(source, added),
        },
    )


def _merges(pieces: list[str], scores: list[float], kinds: list[int]) -> list[list[str]]:
    """Return the pairs that BPE may join, first the best.

    SentencePiece joins the pair whose whole has the highest score. Runs of user-defined spaces
    have lost their score; they come first, shortest first, as SentencePiece keeps them whole.
    """
    ranks = {piece: i for i, piece in enumerate(pieces) if kinds[i] in (NORMAL, USER_DEFINED)}
    merges: list[tuple[float, int, int, int, str, str]] = []
    for piece, i in ranks.items():
        rank = -scores[i] if kinds[i] == NORMAL else len(piece) - 1e9
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, i, ranks[left], ranks[right], left, right))
    return [[left, right] for *_, left, right in sorted(merges)]


def _sentencepiece_model(
    pieces: list[str], scores: list[float], kinds: list[int], ids: dict[str, int]
) -> bytes:
    """Return a serialized ``ModelProto`` of model type BPE.

    Written by hand: the generated classes need the protobuf package, which nothing else needs.

    References
    ----------
    sentencepiece/src/sentencepiece_model.proto: field numbers and enumerations.
    """
    spm_kinds = {NORMAL: 1, CONTROL: 4, USER_DEFINED: 4, BYTE: 6}
    model = bytearray()
    for i, (piece, score, kind) in enumerate(zip(pieces, scores, kinds, strict=True)):
        spm_kind = spm_kinds[kind]
        if i in ids.values():
            spm_kind = 2 if i == ids["unknown"] else 3
        body = _text(1, piece) + b"\x15" + struct.pack("<f", score) + _number(3, spm_kind)
        model += _message(1, body)
    trainer = _number(3, 2) + _number(4, len(pieces)) + _number(25, 1) + _number(35, 1)
    for field, name in ((40, "unknown"), (41, "bos"), (42, "eos"), (43, "padding")):
        trainer += _number(field, ids[name])
    for field, name in ((45, "unknown"), (46, "bos"), (47, "eos"), (48, "padding")):
        trainer += _text(field, pieces[ids[name]])
    normalizer = _text(1, "identity") + _number(3, 0) + _number(4, 0) + _number(5, 1)
    return bytes(model + _message(2, trainer) + _message(3, normalizer))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode("utf-8"))
