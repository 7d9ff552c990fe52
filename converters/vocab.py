"""Tokenizer files of a checkpoint to ``tokenizer.*`` metadata.

Three kinds of vocabulary, tried in the order that the architecture lists:

``sentencepiece``
    tokenizer.model; ``sentencepiece-added`` also takes the added tokens of tokenizer.json
``sentencepiece-json``
    tokenizer.json of a SentencePiece model without its tokenizer.model: BPE with byte fallback
``bpe``
    tokenizer.json of a byte-level BPE

References
----------
llama.cpp 0c1e57098: conversion/base.py (get_vocab_base, _create_vocab_sentencepiece,
_set_vocab_llama_hf), conversion/phi.py (Phi3MiniModel.set_vocab), gguf-py/gguf/vocab.py
(LlamaHfVocab).
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from converters.architectures.description import Architecture
from converters.errors import ConversionError
from converters.gguf_file import Field
from converters.json_file import read_json
from converters.pre_tokenizers import ADDS_BOS, pre_tokenizer_name
from converters.special_tokens import special_tokens

_ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "\u2581"  # SentencePiece's visible space
# tokens that control even where their tokenizer does not mark them
_CONTROL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)


@dataclass
class Vocabulary:
    """The tokens of a GGUF and everything that is said about them."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    adds_space_prefix: bool | None = None
    extra: dict[str, Field] = field(default_factory=dict)

    def fields(self) -> dict[str, Field]:
        """Return the metadata."""
        array, text = GGUFValueType.ARRAY, GGUFValueType.STRING
        fields = {
            "tokenizer.ggml.model": Field(self.model, text),
            "tokenizer.ggml.pre": Field(self.pre, text),
            "tokenizer.ggml.tokens": Field(self.tokens, array, text),
            "tokenizer.ggml.token_type": Field(self.types, array, GGUFValueType.INT32),
        }
        if self.scores is not None:
            fields["tokenizer.ggml.scores"] = Field(self.scores, array, GGUFValueType.FLOAT32)
        if self.merges:
            fields["tokenizer.ggml.merges"] = Field(self.merges, array, text)
        if self.adds_space_prefix is not None:
            fields["tokenizer.ggml.add_space_prefix"] = Field(
                self.adds_space_prefix, GGUFValueType.BOOL
            )
        return fields | self.extra


def read_vocabulary(
    directory: Path,
    config: Mapping[str, Any],
    architecture: Architecture,
    *,
    n_vocab: int | None,
    pre: str | None = None,
) -> Vocabulary:
    """Read the vocabulary of a checkpoint.

    Parameters
    ----------
    directory : of the checkpoint
    config : config.json as it is
    architecture : decides which kinds of vocabulary are tried
    n_vocab : tokens that the model has; the vocabulary is padded to it
    pre : name of llama.cpp's pre-tokenizer, instead of the one that is found

    Raises
    ------
    ConversionError
        No tokenizer of a supported kind, an unknown pre-tokenizer, or more tokens than the model
        has.
    """
    readers: dict[str, Callable[[Path, int | None, str | None], Vocabulary | None]] = {
        "sentencepiece": _sentencepiece,
        "sentencepiece-added": _sentencepiece_added,
        "sentencepiece-json": _sentencepiece_json,
        "bpe": _byte_pairs,
    }
    try:
        found = (readers[kind](directory, n_vocab, pre) for kind in architecture.vocabularies)
        vocabulary = next((one for one in found if one is not None), None)
        limit = None if vocabulary is None or vocabulary.model == "gpt2" else len(vocabulary.tokens)
        special = special_tokens(directory, config, limit)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{directory}: the tokenizer files are not as their libraries write them: "
            f"{type(error).__name__} {error}. Download them again."
        ) from error
    if vocabulary is None:
        wanted = {
            "bpe": "tokenizer.json of a byte-level BPE",
            "sentencepiece-json": "tokenizer.json of a BPE with byte fallback",
        }
        kinds = [wanted.get(kind, "tokenizer.model") for kind in architecture.vocabularies]
        raise ConversionError(
            f"{directory}: no tokenizer; {architecture.name} takes {' or '.join(kinds)}. "
            "Copy the tokenizer files of the model into the directory."
        )
    _add_space_prefix(vocabulary, directory, architecture)
    if vocabulary.pre in ADDS_BOS:
        special.adds.setdefault("bos", False)
    vocabulary.extra = special.fields()
    extra = architecture.by_vocab_size.get(n_vocab or len(vocabulary.tokens), {})
    vocabulary.extra |= {key: Field(value, kind) for key, (kind, value) in extra.items()}
    return vocabulary


def _add_space_prefix(vocabulary: Vocabulary, directory: Path, architecture: Architecture) -> None:
    if architecture.adds_space_prefix == "config":
        settings = read_json(directory / "tokenizer_config.json") or {}
        if settings.get("add_prefix_space") is not None:
            vocabulary.adds_space_prefix = bool(settings["add_prefix_space"])
    elif vocabulary.model == "llama":
        vocabulary.adds_space_prefix = architecture.adds_space_prefix


def _mismatch(path: Path, n_tokens: int, n_vocab: int) -> ConversionError:
    return ConversionError(
        f"{path}: {n_tokens} tokens, but config.json's vocab_size is {n_vocab}. The tokenizer "
        "belongs to another model, or config.json was not saved after tokens were added."
    )


def _sentencepiece(directory: Path, n_vocab: int | None, pre: str | None) -> Vocabulary | None:
    vocabulary = _pieces(directory / "tokenizer.model", n_vocab)
    if vocabulary is None:
        return None
    for token, text, is_special in _added_tokens(directory):
        if token >= len(vocabulary.tokens):  # such as Gemma 3's image token in a text model
            continue
        if is_special or _CONTROL.fullmatch(text):
            _set(vocabulary, token, text, TokenType.CONTROL)
        else:
            _set(vocabulary, token, text.replace(_SPACE, " "), TokenType.USER_DEFINED)
    return vocabulary


def _sentencepiece_added(
    directory: Path, n_vocab: int | None, pre: str | None
) -> Vocabulary | None:
    if (read_json(directory / "tokenizer_config.json") or {}).get(
        "tokenizer_class"
    ) == "GPT2Tokenizer":
        return None  # Phi 4
    vocabulary = _pieces(directory / "tokenizer.model", n_vocab)
    if vocabulary is None:
        return None
    added = (read_json(directory / "tokenizer.json") or {}).get("added_tokens") or []
    listed = [(int(item["id"]), item["content"], bool(item.get("special"))) for item in added]
    for token, text, is_special in [*_added_tokens(directory), *listed]:
        if token >= len(vocabulary.tokens):
            raise _mismatch(directory / "tokenizer.json", token + 1, len(vocabulary.tokens))
        kind = TokenType.CONTROL if is_special else TokenType.USER_DEFINED
        _set(vocabulary, token, text, kind)
    return vocabulary


def _pieces(path: Path, n_vocab: int | None) -> Vocabulary | None:
    """Return the pieces of a SentencePiece model, padded to `n_vocab`; None without the file."""
    if not path.is_file():
        return None
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.LoadFromFile(str(path))
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"{path}: not a SentencePiece model: {error}") from error
    n_pieces = model.vocab_size()
    n_vocab = n_pieces if n_vocab is None else n_vocab
    if n_pieces > n_vocab:
        raise _mismatch(path, n_pieces, n_vocab)
    kinds = (
        (model.IsUnknown, TokenType.UNKNOWN),
        (model.IsControl, TokenType.CONTROL),
        (model.IsUnused, TokenType.UNUSED),
        (model.IsByte, TokenType.BYTE),
    )
    types = [
        next((int(kind) for test, kind in kinds if test(token)), int(TokenType.NORMAL))
        for token in range(n_pieces)
    ]
    padding = range(n_pieces, n_vocab)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=[model.IdToPiece(token) for token in range(n_pieces)]
        + [f"[PAD{token}]" for token in padding],
        types=types + [int(TokenType.UNUSED)] * len(padding),
        scores=[model.GetScore(token) for token in range(n_pieces)]
        + [_PADDING_SCORE] * len(padding),
    )


def _added_tokens(directory: Path) -> list[tuple[int, str, bool]]:
    """Return (id, text, special) of added_tokens.json and tokenizer_config.json, in this order."""
    added = read_json(directory / "added_tokens.json") or {}
    settings = read_json(directory / "tokenizer_config.json") or {}
    decoder = settings.get("added_tokens_decoder") or {}
    return [(int(token), text, False) for text, token in added.items()] + [
        (int(token), entry["content"], bool(entry.get("special")))
        for token, entry in decoder.items()
    ]


def _set(vocabulary: Vocabulary, token: int, text: str, kind: TokenType) -> None:
    vocabulary.tokens[token] = text
    vocabulary.types[token] = int(kind)
    if vocabulary.scores is not None:
        vocabulary.scores[token] = _ADDED_SCORE


def _open_tokenizer(path: Path) -> tuple[dict[str, Any], Any] | None:
    specification = read_json(path)
    if specification is None:
        return None
    if not isinstance(specification.get("model"), dict):
        raise ConversionError(f"{path}: no 'model' in it; expected the tokenizers library's file.")
    import tokenizers

    with _refusals_of_the_library(path):
        return specification, tokenizers.Tokenizer.from_file(str(path))


@contextlib.contextmanager
def _refusals_of_the_library(path: Path) -> Iterator[None]:
    """Say of what file the tokenizers library complains: on reading it, or only at some text."""
    try:
        yield
    except (ConversionError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception, or a panic, which is none
        raise ConversionError(f"{path}: the tokenizers library refuses it: {error}") from error


def _sentencepiece_json(directory: Path, n_vocab: int | None, pre: str | None) -> Vocabulary | None:
    """Read a BPE with byte fallback.

    llama.cpp's script gives every token the score -1000, with which llama.cpp merges from left to
    right. Here a token's score is minus the rank of the first merge that makes it, so that
    llama.cpp merges in the order of the tokenizer.
    """
    path = directory / "tokenizer.json"
    opened = _open_tokenizer(path)
    if opened is None:
        return None
    specification, tokenizer = opened
    model = specification["model"]
    decoder = (specification.get("decoder") or {}).get("type")
    if model.get("type") != "BPE" or not model.get("byte_fallback") or decoder != "Sequence":
        return None
    settings = read_json(directory / "tokenizer_config.json") or {}
    listed = [value for key, value in settings.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = settings.get(key) or []
        listed += extra.values() if isinstance(extra, dict) else extra
    named = {value.get("content") if isinstance(value, dict) else value for value in listed}
    texts = {token: text for text, token in tokenizer.get_vocab(with_added_tokens=True).items()}
    n_base = tokenizer.get_vocab_size(with_added_tokens=False)
    n_vocab = max(texts) + 1 if n_vocab is None else n_vocab
    if max(texts) >= n_vocab:
        raise _mismatch(path, max(texts) + 1, n_vocab)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(_merges(model)):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    scores: list[float] = []
    vocabulary = Vocabulary("llama", "default", [], [], scores=scores)
    for token in range(n_vocab):
        text = texts.get(token, f"[PAD{token}]")
        if token not in texts:
            kind = TokenType.UNUSED
        elif _BYTE.fullmatch(text):
            kind = TokenType.BYTE
        elif text in named:
            kind = TokenType.CONTROL
        else:
            kind = TokenType.NORMAL if token < n_base else TokenType.USER_DEFINED
        vocabulary.tokens.append(text)
        vocabulary.types.append(int(kind))
        scores.append(-float(ranks[text]) if text in ranks else _ADDED_SCORE)
    vocabulary.adds_space_prefix = _prepends_space(specification)
    return vocabulary


def _prepends_space(specification: Mapping[str, Any]) -> bool | None:
    """Return False where a text gets no space in front; None (llama.cpp's yes) otherwise."""
    text = repr(specification.get("normalizer")) + repr(specification.get("pre_tokenizer"))
    prepends = "'Prepend'" in text or "'prepend_scheme': 'first'" in text
    return None if prepends or "'prepend_scheme': 'always'" in text else False


def _merges(model: Mapping[str, Any]) -> list[str]:
    """Return merges as ``left right``; spaces inside a part are written as the letter Ġ."""
    merges = model.get("merges") or []
    if merges and isinstance(merges[0], str):
        return list(merges)
    return [" ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair) for pair in merges]


def _byte_pairs(directory: Path, n_vocab: int | None, pre: str | None) -> Vocabulary | None:
    path = directory / "tokenizer.json"
    opened = _open_tokenizer(path)
    if opened is None:
        return None
    specification, tokenizer = opened
    model = specification["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ConversionError(
            f"{path}: a {model.get('type')} model"
            f"{' with byte fallback' if model.get('byte_fallback') else ''}; expected a byte-level "
            "BPE. Add the tokenizer.model of the checkpoint, or convert with llama.cpp's "
            "convert_hf_to_gguf.py and pass the GGUF."
        )
    texts = {token: text for text, token in tokenizer.get_vocab(with_added_tokens=True).items()}
    n_vocab = len(texts) if n_vocab is None else n_vocab
    if max(texts) >= n_vocab:
        raise _mismatch(path, max(texts) + 1, n_vocab)
    with _refusals_of_the_library(path):
        name = pre or pre_tokenizer_name(path, specification, tokenizer)
    vocabulary = Vocabulary("gpt2", name, [], [], merges=_merges(model))
    added = tokenizer.get_added_tokens_decoder()
    for token in range(n_vocab):
        text = texts.get(token, f"[PAD{token}]")
        kind = TokenType.NORMAL if token in texts else TokenType.UNUSED
        if token in added:
            if not added[token].normalized:  # llama.cpp looks for the text as it comes out
                with _refusals_of_the_library(path):
                    ids = tokenizer.encode(text, add_special_tokens=False).ids
                    text = tokenizer.decode(ids, skip_special_tokens=False)
            if added[token].special or _CONTROL.fullmatch(text):
                kind = TokenType.CONTROL
            else:
                kind, text = TokenType.USER_DEFINED, text.replace(_SPACE, " ")
        vocabulary.tokens.append(text)
        vocabulary.types.append(int(kind))
    return vocabulary
