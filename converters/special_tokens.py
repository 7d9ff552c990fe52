"""Special tokens, which of them are added by themselves, and the chat template.

The rules are those of llama.cpp's script: the post-processor of tokenizer.json says what is added,
tokenizer_config.json names the tokens, and config.json's ids fill the gaps. One difference is on
purpose: a token that tokenizer_config.json spells as an object (``{"content": "<s>", ...}``) is
the same as its text, while the script then misses that the post-processor adds it.

References
----------
gguf-py/gguf/vocab.py, SpecialVocab, and gguf_writer.py, add_chat_template, of llama.cpp 0c1e57098.
"""

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from converters.errors import ConversionError
from converters.gguf_file import Field
from converters.json_file import read_json

_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# the GGUF spells some kinds out
_ID_KEYS = {
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}
_NAMED = string.ascii_letters + string.digits


@dataclass
class SpecialTokens:
    """What tokenizer files say about special tokens.

    Attributes
    ----------
    ids : kind (``bos``, ``eos``, ``eot``, ...) to token id
    adds : kind to whether the tokenizer adds it to every text
    templates : name to chat template; the usual one is ``default``
    """

    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)

    def fields(self) -> dict[str, Field]:
        """Return the metadata."""
        boolean, text = GGUFValueType.BOOL, GGUFValueType.STRING
        fields = {
            _ID_KEYS.get(kind, f"tokenizer.ggml.{kind}_token_id"): Field(
                token, GGUFValueType.UINT32
            )
            for kind, token in self.ids.items()
            if kind != "cls"  # the GGUF has no key for it
        }
        for kind in ("bos", "eos", "sep"):
            if kind in self.adds:
                fields[f"tokenizer.ggml.add_{kind}_token"] = Field(self.adds[kind], boolean)
        named = [name for name in self.templates if name != "default"]
        for name in named:
            fields[f"tokenizer.chat_template.{name}"] = Field(self.templates[name], text)
        if named:
            fields["tokenizer.chat_templates"] = Field(sorted(named), GGUFValueType.ARRAY, text)
        if "default" in self.templates:
            fields["tokenizer.chat_template"] = Field(self.templates["default"], text)
        return fields


def special_tokens(
    directory: Path, config: Mapping[str, Any], n_vocab: int | None = None
) -> SpecialTokens:
    """Read the special tokens of a checkpoint.

    Parameters
    ----------
    directory : of the checkpoint
    config : config.json as it is
    n_vocab : ids from here on are ignored; None takes all
    """
    tokenizer = read_json(directory / "tokenizer.json") or {}
    settings = read_json(directory / "tokenizer_config.json") or {}
    texts = {kind: _text(settings.get(f"{kind}_token")) for kind in _KINDS}
    texts["bos"] = texts["bos"] or texts["cls"]
    texts["eos"] = texts["eos"] or texts["sep"]
    found = SpecialTokens(templates=_templates(directory, settings))
    processor = tokenizer.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "ByteLevel":
            found.adds.setdefault("bos", False)
            found.adds.setdefault("eos", False)
        elif step.get("type") == "RobertaProcessing":
            found.adds.update(bos=True, eos=True, sep=True)
            texts["cls"] = texts["cls"] or step.get("cls", [texts["bos"]])[0]
            texts["sep"] = texts["sep"] or step.get("sep", [texts["eos"]])[0]
        elif step.get("type") == "TemplateProcessing":
            _read_template(step, texts, found.adds)
    ids: dict[str, int] = {}
    for token in tokenizer.get("added_tokens") or []:
        ids.setdefault(token["content"], token["id"])
    for kind, text in texts.items():
        if isinstance(settings.get(f"add_{kind}_token"), bool):
            found.adds.setdefault(kind, settings[f"add_{kind}_token"])
        _set_id(found.ids, kind, ids.get(text or ""), n_vocab)
    inner = config.get("text_config")
    for kind in texts:
        token = config.get(f"{kind}_token_id")
        if token is None and isinstance(inner, dict):
            token = inner.get(f"{kind}_token_id")
        _set_id(found.ids, kind, token, n_vocab)
    return found


def _text(entry: Any) -> str | None:
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) and entry else None


def _set_id(ids: dict[str, int], kind: str, token: Any, n_vocab: int | None) -> None:
    if not isinstance(token, int) or isinstance(token, bool) or kind in ids:
        return
    if token < 0:
        if kind == "pad":  # -1 is how some configurations say "none"
            return
        raise ConversionError(f"config.json: {kind}_token_id is {token}; expected 0 or more.")
    if n_vocab is None or token < n_vocab:
        ids[kind] = token


def _special(piece: Mapping[str, Any]) -> str | None:
    return (piece.get("SpecialToken") or {}).get("id")


def _read_template(
    step: Mapping[str, Any], texts: dict[str, str | None], adds: dict[str, bool]
) -> None:
    """Read what a template around one text adds, and the separator of its pair template."""
    single, pair = step.get("single") or [], step.get("pair") or []
    first = last = None
    if len(single) > 1:
        first, last = _special(single[0]), _special(single[-1])
        if first:
            if first not in (texts["bos"], texts["cls"]):
                texts["bos"] = texts["bos"] or first
                texts["cls"] = texts["cls"] or first
            adds["bos"] = first in (texts["bos"], texts["cls"])
        if last:
            if last != texts["eos"]:  # the configured one ends a turn, this one the text
                texts["eot" if "eot" not in texts else "eom"] = texts["eos"]
                texts["eos"] = last
            adds["eos"] = True
    if first and pair and _special(pair[0]) == first:
        pair = pair[1:]
    if last and pair and _special(pair[-1]) == last:
        pair = pair[:-1]
    sequences = [(piece.get("Sequence") or {}).get("id") for piece in pair]
    if len(pair) > 2 and sequences[0] == "A" and sequences[-1] == "B":
        separators = (texts["sep"], texts["eos"])
        between = [_special(piece) for piece in pair[1:-1]]
        adds["sep"] = bool(between[0] and between[0] in separators and not last)
        if len(between) == 2 and between[1] and between[1] in separators:
            adds["sep"] = True
        if adds["sep"] and not texts["sep"]:
            texts["sep"] = texts["eos"]


def _templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    value = settings.get("chat_template")
    main = directory / "chat_template.jinja"
    if value is None and main.is_file():
        others = sorted((directory / "additional_chat_templates").glob("*.jinja"))
        return {
            "default": main.read_text("utf-8"),
            **{_plain(path.stem): path.read_text("utf-8") for path in others},
        }
    if value is None:
        value = (read_json(directory / "chat_template.json") or {}).get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {
            _plain(entry["name"]): entry["template"]
            for entry in value
            if entry.get("name") and entry.get("template") is not None
        }
    return {}


def _plain(name: str) -> str:
    return "".join(char if char in _NAMED else "_" for char in name)
