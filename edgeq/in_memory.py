"""A transformers model in memory becomes a checkpoint in a temporary directory."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from converters.errors import ConversionError
from edgeq.errors import RecipeError


class Savable(Protocol):
    """A transformers model or tokenizer: what writes itself into a directory."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write the files of a checkpoint."""
        ...


@contextlib.contextmanager
def on_disk(
    model: str | os.PathLike[str] | Savable, tokenizer: Savable | None, out: Path
) -> Iterator[tuple[str, str | None]]:
    """Give a model's path, as long as the block runs, and what provenance calls it.

    Parameters
    ----------
    model : a path or hub id, which is returned, and the name is None; or a model in memory
    tokenizer : of a model in memory
    out : the GGUF file that is made of it; names a model that has no name

    Raises
    ------
    RecipeError
        Tokenizer and model do not belong together, or the model is none that can be saved.
    ConversionError
        It cannot be saved.
    """
    if isinstance(model, str | os.PathLike):
        if tokenizer is not None:
            raise RecipeError(
                f"{os.fspath(model)}: got a tokenizer beside a path, expected one only beside a "
                "model in memory. Leave it out; the checkpoint has its own."
            )
        yield os.fspath(model), None
        return
    kind = type(model).__name__
    if not hasattr(model, "save_pretrained"):
        raise RecipeError(
            f"model: got {kind}, expected a path, a hub id or a transformers model. Give one."
        )
    if tokenizer is None:
        raise RecipeError(
            f"{kind}: got no tokenizer, expected the model's own. Give tokenizer=AutoTokenizer."
            "from_pretrained(...)."
        )
    saves_floats = getattr(model, "quantization_method", None) == "edgeq"
    is_simulated = any(".parametrizations." in f".{name}" for name, _ in _parameters(model))
    if is_simulated and not saves_floats:
        raise RecipeError(
            f"{kind}: its weights are simulated, expected plain ones. Write it with edgeq.qat.save "
            "and export that directory."
        )
    origin = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    # the directory's name becomes general.name
    name = re.sub(r"[^\w.-]", "-", Path(origin).name).strip(".") or out.stem
    with tempfile.TemporaryDirectory(prefix="edgeq-") as parent:
        directory = Path(parent) / name
        try:
            with _quiet():
                model.save_pretrained(str(directory))
                tokenizer.save_pretrained(str(directory))
        except OSError as error:
            raise ConversionError(
                f"{directory}: the model cannot be saved ({error}). Make room there, or set TMPDIR."
            ) from error
        yield str(directory), f"{name}, {kind} in memory"


def _parameters(model: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(model, "named_parameters", tuple)()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars off for as long as the block runs."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
