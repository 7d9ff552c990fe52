"""Texts to calibrate and to judge on: read, mixed, split, sampled from the model, compared.

``prepare`` turns files into parts that have no passage in common; ``sample_parts`` lets the model
write the parts itself. Both give ``Part``s: chunks of tokens and a ``Manifest``, with which
``check_unused`` finds out whether any other text was used before.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeq.errors import CalibrationError
from edgeq.runtime.model import Model
from edgeq.texts.chat_template import ChatTemplate
from edgeq.texts.mixing import chunks_of_sources
from edgeq.texts.parts import Part, check_unused, make_part
from edgeq.texts.passages import Manifest, Overlap, overlap
from edgeq.texts.sampling import sample, sample_parts
from edgeq.texts.sources import Document, Source, read_source
from edgeq.texts.splitting import SHARES, Split, split

__all__ = [
    "SHARES",
    "ChatTemplate",
    "Document",
    "Manifest",
    "Overlap",
    "Part",
    "Source",
    "Split",
    "check_unused",
    "chunks_of_sources",
    "make_part",
    "overlap",
    "prepare",
    "read_source",
    "read_sources",
    "sample",
    "sample_parts",
    "split",
]


def read_sources(model_path: Path | str, arguments: Sequence[str]) -> list[Source]:
    """Read text files; the chat template of the GGUF file renders ``.jsonl`` conversations.

    Raises
    ------
    CalibrationError
        A file cannot be used, or the model has no chat template and one is needed.
    """
    needs_template = any(".jsonl" in argument for argument in arguments)
    template = ChatTemplate.from_gguf(model_path) if needs_template else None
    return [read_source(argument, template) for argument in arguments]


def prepare(
    model: Model,
    sources: Sequence[Source],
    *,
    chunk: int,
    n_chunks: Mapping[str, int | None],
    shares: Mapping[str, float] = SHARES,
    seed: int = 0,
) -> dict[str, Part]:
    """Split sources into parts that have no passage in common, and cut these into chunks.

    Parameters
    ----------
    model : its vocabulary tokenizes
    sources : see ``read_sources``
    chunk : tokens of a chunk
    n_chunks : part to the most chunks that it may have; None or absent: all of its text
    shares : part to its share of the text; a single part gets all of it, unsplit
    seed : of the split

    Raises
    ------
    CalibrationError
        A part gets less than one chunk of a source.
    """
    if len(shares) == 1:
        (name,) = shares
        rows = chunks_of_sources(model, sources, chunk=chunk, n_chunks=n_chunks.get(name))
        return {name: make_part(model, name, rows)}
    dealt = split(sources, shares=shares, seed=seed)
    parts = {}
    for name, mine in dealt.parts.items():
        try:
            rows = chunks_of_sources(model, mine, chunk=chunk, n_chunks=n_chunks.get(name))
        except CalibrationError as error:
            raise CalibrationError(f"the {name} part of {error}") from error
        parts[name] = make_part(model, name, rows, dealt.stock)
    return parts
