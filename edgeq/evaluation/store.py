"""Reference logits on disk: written once, compared with many files."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from converters.gguf_file import open_gguf
from converters.output import replacing
from edgeq.errors import EvaluationError
from edgeq.evaluation import base_logits
from edgeq.evaluation import chunks as chunking
from edgeq.evaluation.compact_logits import (
    MAX_FRACTION,
    CompactReference,
    CompactWriter,
    is_compact_file,
)
from edgeq.evaluation.references import (
    BaseReference,
    ModelReference,
    Reference,
    is_repacked,
)
from edgeq.evaluation.statistics import Estimate, mean
from edgeq.runtime.model import Model, Tokens

Progress = Callable[[int, int], None]
DEFAULT_CTX = 512


@dataclass(frozen=True)
class StoredReference:
    """What ``store_reference`` wrote.

    Attributes
    ----------
    path : the file
    kind : "base" or "compact"
    size_bytes : of the file
    base_bytes : size of llama-perplexity's base file of the same rows
    n_chunks, n_ctx : what was scored
    ppl : the reference's perplexity
    """

    path: Path
    kind: str
    size_bytes: int
    base_bytes: int
    n_chunks: int
    n_ctx: int
    ppl: Estimate


def open_reference(path: Path, n_threads: int | None) -> Reference:
    """Open a reference of any kind, told apart by how the file starts.

    Raises
    ------
    EvaluationError
        No such file, or a damaged one.
    """
    if not path.is_file():
        raise EvaluationError(
            f"{path}: no such file. Give a GGUF file or a stored reference to compare with."
        )
    if base_logits.is_base_file(path):
        return BaseReference(path)
    if is_compact_file(path):
        return CompactReference(path)
    return ModelReference(path, n_threads)


def open_model(path: Path, n_ctx: int, n_threads: int | None, adapter: Path | None = None) -> Model:
    """Load a file with room for the sequences of one batch of chunks of `n_ctx` tokens."""
    n_seq = chunking.sequences_at_once(n_ctx)
    model = Model(
        path,
        n_ctx=n_ctx,
        n_seq=n_seq,
        n_threads=n_threads,
        repack=is_repacked(path),
        adapter=adapter,
    )
    n_ctx_train = model.n_ctx_train
    if n_ctx > n_ctx_train and "position_embd.weight" in open_gguf(path).tensors:
        model.close()  # there is no row for the position: llama.cpp would end the process
        raise EvaluationError(
            f"{path}: chunks of {n_ctx} tokens; the model was trained on at most {n_ctx_train}. "
            "Choose shorter chunks."
        )
    return model


def chunks_of(model: Model, text: str | Tokens, n_ctx: int, limit: int | None) -> Tokens:
    """Return the chunks of a text or of its tokens, (n_chunks, n_ctx) int32.

    Raises
    ------
    EvaluationError
        Too short for one chunk, or a token outside the vocabulary.
    """
    tokens = model.tokenize(text) if isinstance(text, str) else np.asarray(text, np.int32)
    found = chunking.cut(tokens.ravel(), n_ctx, limit, "text")
    if found.min() < 0 or found.max() >= model.n_vocab:
        raise EvaluationError(
            f"text: its tokens are {found.min()} to {found.max()}, expected 0 to "
            f"{model.n_vocab - 1}. Tokenize it with {model.path}."
        )
    return found


def store_reference(
    model_path: Path | str,
    text: str | Tokens,
    out: Path | str,
    *,
    kind: Literal["compact", "base"] = "compact",
    n_ctx: int = DEFAULT_CTX,
    chunks: int | None = None,
    max_fraction: float = MAX_FRACTION,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> StoredReference:
    """Run a reference model once and store what ``evaluate`` compares with.

    Parameters
    ----------
    model_path : the reference, a GGUF file
    text : text or its tokens
    out : file to write; it appears whole or not at all
    kind : "base", which llama-perplexity reads, or "compact"
    n_ctx, chunks, n_threads, progress : as for ``evaluate``
    max_fraction : bytes of a compact file as a fraction of a base file

    Raises
    ------
    EvaluationError
        Text too short, logits that are not finite, no place to write.
    """
    path = Path(out)
    with open_model(Path(model_path), n_ctx, n_threads) as model:
        cut = chunks_of(model, text, n_ctx, chunks)
        following = chunking.next_tokens(cut)
        nll = np.empty(following.shape, np.float64)
        with replacing(path, EvaluationError) as temporary, temporary.open("wb") as file:
            writer = (
                CompactWriter(file, model, cut, max_fraction)
                if kind == "compact"
                else base_logits.BaseWriter(file, model.n_vocab, cut)
            )
            for batch in chunking.batches(cut, model.bos if model.adds_bos else None):
                logits = batch.run(model)
                for segment in batch.segments:
                    found = writer.write(segment, logits[segment.rows], following[segment.place])
                    if not np.isfinite(found).all():
                        raise EvaluationError(
                            f"{model_path}: NaN or infinite logits in chunk {segment.chunk}. The "
                            "file is broken; convert it again."
                        )
                    nll[segment.place] = found
                if progress is not None and segment.place[1].stop == chunking.n_scored(n_ctx):
                    progress(segment.chunk + 1, len(cut))
        return StoredReference(
            path=path,
            kind=kind,
            size_bytes=path.stat().st_size,
            base_bytes=base_logits.base_file_bytes(model.n_vocab, *cut.shape),
            n_chunks=len(cut),
            n_ctx=n_ctx,
            ppl=_perplexity(nll),
        )


def _perplexity(nll: npt.NDArray[np.float64]) -> Estimate:
    log_ppl = mean(nll)
    ppl = math.exp(log_ppl.value)
    return Estimate(ppl, ppl * log_ppl.error)


def stored_chunks(path: Path) -> Tokens | None:
    """Return the chunks that a stored reference was made of, (n_chunks, n_ctx); None: it is none.

    Raises
    ------
    EvaluationError
        It is one, but damaged.
    """
    if not (base_logits.is_base_file(path) or is_compact_file(path)):
        return None
    with open_reference(path, None) as reference:
        return reference.chunks
