"""The one exception that file reading and writing raises for what a user can mend.

Message: where: what is wrong; got X, expected Y. What to do.
"""

from pathlib import Path
from typing import NoReturn

DAMAGED = "The file is damaged or incomplete: fetch or convert it again."


class ConversionError(Exception):
    """A checkpoint, tokenizer or GGUF file that cannot be read, or an output that cannot be."""


def fail(path: Path, what: str, hint: str = DAMAGED) -> NoReturn:
    """Raise ``ConversionError`` about `path`: what is wrong, and what to do (a whole sentence)."""
    raise ConversionError(f"{path}: {what}. {hint}")


def shown(value: object) -> str:
    """Return `value` for a message: a hostile file must neither fill the screen nor control it."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def named(name: str) -> str:
    """Return a tensor's name for a message: as it is, or as ``shown`` where it is hostile."""
    return name if name.isprintable() and len(name) <= 80 else shown(name)
