"""Ollama's Modelfile beside a GGUF file."""

from pathlib import Path

from converters.gguf_file import open_gguf
from converters.output import replacing
from edgeq.errors import RecipeError
from edgeq.runtime.model import Model

NAME = "Modelfile"
_FIRST_LINE = "# Written by edgeq; ollama create NAME -f Modelfile"


def check_modelfile(out: Path) -> None:
    """Refuse, before any work, to write over a Modelfile that somebody else wrote.

    Parameters
    ----------
    out : the GGUF file that it will be for

    Raises
    ------
    RecipeError
    """
    path = out.parent / NAME
    if out.name != out.name.strip() or not out.name.isprintable():
        raise RecipeError(
            f"--modelfile: got the name {out.name!r}, expected one that fits on a line. Give "
            "another name."
        )
    if path.exists() and not (path.is_file() and _is_ours(path)):
        raise RecipeError(
            f"{path}: is there already, and edgeq did not write it. Move it, or write the output "
            "to another directory."
        )


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_FIRST_LINE)) == _FIRST_LINE.encode()


def write_modelfile(out: Path) -> Path:
    """Write the Modelfile of a GGUF file beside it; an older one of ours is replaced whole.

    It stops at every token that ends a text in llama.cpp. Nothing is said about the prompt: the
    chat template is in the GGUF.

    Raises
    ------
    RecipeError
        It cannot be written.
    """
    path = out.parent / NAME
    lines = [_FIRST_LINE, f"FROM ./{out.name}"]
    lines += [f'PARAMETER stop "{token}"' for token in stop_tokens(out)]
    with replacing(path, RecipeError) as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def stop_tokens(path: Path) -> list[str]:
    """Return the texts of the tokens that end a text, those that a Modelfile can spell."""
    tokens = open_gguf(path).value("tokenizer.ggml.tokens", [])
    with Model(path, vocab_only=True) as model:
        ending = [str(text) for token, text in enumerate(tokens) if model.ends_text(token)]
    return [text for text in ending if text.isprintable() and text.strip() and '"' not in text]
