"""Sources as chunks of tokens, as many of each as its weight asks for."""

from collections.abc import Sequence

import numpy as np

from edgeq.errors import CalibrationError
from edgeq.runtime.model import Model, Tokens
from edgeq.texts.sources import Source


def chunks_of_sources(
    model: Model, sources: Sequence[Source], *, chunk: int, n_chunks: int | None = None
) -> Tokens:
    """Tokenize sources and cut them into chunks, as many of each as its weight asks for.

    If no source has a weight, their tokens are put one after the other and cut; of more chunks than
    asked for, those of several sources are taken at even distances, of a single one the first, as
    llama.cpp's tools do. If one has a weight, the others have weight 1; every source then gives its
    first chunks, as many as its weight says and the scarcest source allows. No text comes twice.

    Parameters
    ----------
    model : its vocabulary tokenizes
    sources : at least one
    chunk : tokens of a chunk
    n_chunks : at most so many chunks in all

    Returns
    -------
    (n, chunk) int32, each row beginning with the beginning-of-sequence token if the vocabulary
    wants one, instead of the token that was there

    Raises
    ------
    CalibrationError
        There is less than one chunk, or less than one of a source with a weight.
    """
    streams = [_stream(model, source) for source in sources]
    if all(source.weight is None for source in sources):
        name = " + ".join(source.name for source in sources)
        rows = _cut(name, np.concatenate(streams), chunk)
        if n_chunks is not None and n_chunks < len(rows):
            many = len(sources) > 1
            rows = rows[(np.arange(n_chunks) * len(rows)) // n_chunks] if many else rows[:n_chunks]
    else:
        cut = [_cut(s.name, stream, chunk) for s, stream in zip(sources, streams, strict=True)]
        weights = [1.0 if source.weight is None else source.weight for source in sources]
        take = _take(weights, [len(each) for each in cut], n_chunks)
        rows = np.concatenate([each[:n] for each, n in zip(cut, take, strict=True)])
    rows = rows.astype(np.int32)  # a copy
    if model.adds_bos:
        rows[:, 0] = model.bos
    return rows


def _cut(name: str, stream: Tokens, chunk: int) -> Tokens:
    if len(stream) < chunk or len(stream) == 0:
        raise CalibrationError(
            f"{name}: has {len(stream)} tokens, expected at least {chunk}, one chunk. "
            "Give more text or choose shorter chunks."
        )
    rows: Tokens = stream[: len(stream) // chunk * chunk].reshape(-1, chunk)
    return rows


def _stream(model: Model, source: Source) -> Tokens:
    """Return the tokens of all documents one after the other, as a text file's: BOS comes once."""
    pieces = []
    for number, document in enumerate(source.documents):
        special = document.is_conversation
        tokens = model.tokenize(document.text, add_special=number == 0, parse_special=special)
        if number == 0 and special and len(tokens) > 1 and tokens[0] == tokens[1] == model.bos:
            tokens = tokens[1:]  # the template spelled it too
        pieces.append(tokens)
    return np.concatenate(pieces)


def _take(weights: Sequence[float], available: Sequence[int], n_chunks: int | None) -> list[int]:
    """Return how many chunks each source gives: by weight, at least 1, at most what it has."""
    have = np.array(available)
    share = np.array(weights) / sum(weights)
    total = float((have / share).min())
    if n_chunks is not None:
        total = min(total, n_chunks)
    exact = share * total
    take = np.clip(np.floor(exact + 1e-9).astype(int), 1, have)
    for i in np.argsort(take - exact, kind="stable").tolist():  # largest remainders first
        if take.sum() < int(total + 1e-9) and take[i] < have[i]:
            take[i] += 1
    return [int(n) for n in take]
