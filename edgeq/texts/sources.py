"""Text files: plain text, or JSONL conversations rendered with the model's chat template.

``FILE@2.0`` gives a file a weight in the mix.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.errors import CalibrationError
from edgeq.texts.chat_template import ChatTemplate, Message
from edgeq.texts.lines import parse_line, read_utf8

_WEIGHT = re.compile(r"(?P<path>.+)@(?P<weight>\d+(\.\d+)?)", re.S)


@dataclass(frozen=True)
class Document:
    """A piece of text; the tokenizer reads special tokens in it if it is a conversation."""

    text: str
    is_conversation: bool = False


@dataclass(frozen=True)
class Source:
    """One file's text.

    Attributes
    ----------
    name : the path as given
    weight : relative number of tokens in the mix; None: as many as there are
    documents : a plain file is one document, a conversation is one
    """

    name: str
    weight: float | None
    documents: tuple[Document, ...]


def read_source(argument: str, template: ChatTemplate | None = None) -> Source:
    """Read ``FILE`` or ``FILE@WEIGHT``.

    Parameters
    ----------
    argument : a file whose very name ends in ``@2.0`` is that file
    template : renders conversations (``.jsonl``); needed for these only

    Raises
    ------
    CalibrationError
        The file is missing, empty, not UTF-8, or not made of conversations.
    """
    path, weight = Path(argument), None
    match = _WEIGHT.fullmatch(argument)
    if match and not path.exists():
        path, weight = Path(match["path"]), float(match["weight"])
        if weight == 0:
            raise CalibrationError(f"{argument}: the weight is 0; leave the file out instead.")
    text = read_utf8(path, "a text file", CalibrationError)
    if path.suffix == ".jsonl":
        if template is None:
            raise CalibrationError(f"{path}: conversations need a chat template. Give plain text.")
        texts = template.render(_conversations(path, text))
        documents = tuple(Document(each, is_conversation=True) for each in texts)
    else:  # llama.cpp's tools drop one newline at the end of a file as well
        documents = (Document(text.replace("\r\n", "\n").removesuffix("\n")),)
    if not any(document.text.strip() for document in documents):
        raise CalibrationError(f"{path}: has no text; got {len(text)} characters of nothing.")
    return Source(str(path), weight, documents)


def _conversations(path: Path, text: str) -> list[list[Message]]:
    found: list[list[Message]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parse_line(line)
        except ValueError as error:
            raise CalibrationError(
                f"{path}: line {number} is not JSON ({error}). One conversation a line is expected."
            ) from error
        messages: Any = value.get("messages") if isinstance(value, dict) else value
        if not _is_conversation(messages):
            raise CalibrationError(
                f"{path}: line {number} is no conversation; got {line[:60]!r}, expected "
                '{"messages": [{"role": "user", "content": "..."}, ...]} or the list alone.'
            )
        found.append(messages)
    return found


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        )
    )
