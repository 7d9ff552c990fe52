"""What a file can be compared with: a model that runs beside it, or stored log-probabilities."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from converters.gguf_file import open_gguf
from cpu_kernels import divergence as kernels
from edgeq.errors import EvaluationError
from edgeq.evaluation import base_logits
from edgeq.evaluation.chunks import Batch, Segment, sequences_at_once
from edgeq.runtime.model import Model, Tokens
from edgeq.runtime.vocabulary import vocabulary_digest

Floats = npt.NDArray[np.float32]
Bound = npt.NDArray[np.float64] | float

REPACKED_BYTES = 1 << 29  # of a file that is copied into memory for faster products, at most


class Reference(Protocol):
    """One side of a comparison; a context manager.

    Attributes
    ----------
    path : the file
    kind : "model", "base" or "compact"
    n_ctx, chunks : what is stored; None where any text can be compared
    """

    path: Path
    kind: str
    n_ctx: int | None
    chunks: Tokens | None

    def check(self, model: Model) -> None:
        """Raise EvaluationError where `model` cannot be compared with this reference."""

    def begin(self, n_ctx: int) -> None:
        """Get ready for chunks of `n_ctx` tokens."""

    def prepare(self, batch: Batch) -> None:
        """Get ready to compare the rows of `batch`."""

    def compare(
        self, segment: Segment, logits: Floats, next_tokens: Tokens
    ) -> tuple[kernels.RowStatistics, Bound]:
        """Compare the rows of a segment of the prepared batch; also return their error bound."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_error: object) -> None: ...


def is_repacked(path: Path) -> bool:
    """Whether a file is judged with its weights rearranged for this CPU, at most REPACKED_BYTES.

    Larger ones are judged where llama.cpp maps them, so that memory does not grow with the file.
    """
    return open_gguf(path).size_bytes <= REPACKED_BYTES


def refuse_vocabulary(path: Path, n_vocab: int, model: Model) -> EvaluationError:
    """Return the error for a reference of another vocabulary than `model`."""
    return EvaluationError(
        f"{path}: has another vocabulary than {model.path}; got {n_vocab} tokens, expected the "
        f"same {model.n_vocab} tokens. Compare files of one model."
    )


class ModelReference(AbstractContextManager["ModelReference", None]):
    """A GGUF file that runs in the same pass: exact, and any text will do."""

    kind = "model"
    n_ctx: int | None = None
    chunks: Tokens | None = None

    def __init__(self, path: Path, n_threads: int | None) -> None:
        self.path = path
        self._n_threads = n_threads
        self._model: Model | None = None
        self._logits: Floats | None = None

    def check(self, model: Model) -> None:
        """Compare the vocabularies."""
        with Model(self.path, vocab_only=True) as own:
            if vocabulary_digest(own) != vocabulary_digest(model):
                raise refuse_vocabulary(self.path, own.n_vocab, model)

    def begin(self, n_ctx: int) -> None:
        """Load the file."""
        n_seq = sequences_at_once(n_ctx)
        self._model = Model(
            self.path,
            n_ctx=n_ctx,
            n_seq=n_seq,
            n_threads=self._n_threads,
            repack=is_repacked(self.path),
        )

    def prepare(self, batch: Batch) -> None:
        """Run the batch."""
        if self._model is None:
            raise EvaluationError(f"{self.path}: begin() was not called")
        self._logits = batch.run(self._model)

    def compare(
        self, segment: Segment, logits: Floats, next_tokens: Tokens
    ) -> tuple[kernels.RowStatistics, Bound]:
        """Compare with the logits of the prepared batch."""
        if self._logits is None:
            raise EvaluationError(f"{self.path}: prepare() was not called")
        return kernels.divergence(self._logits[segment.rows], logits, next_tokens), 0.0

    def __exit__(self, *_error: object) -> None:
        if self._model is not None:
            self._model.close()


class BaseReference(AbstractContextManager["BaseReference", None]):
    """A base file of llama-perplexity."""

    kind = "base"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = base_logits.open_base_file(path)
        self.chunks: Tokens | None = self._file.chunks
        self.n_ctx: int | None = self._file.chunks.shape[1]

    def check(self, model: Model) -> None:
        """Compare the sizes of the vocabularies: the file knows no more."""
        if self._file.n_vocab != model.n_vocab:
            raise refuse_vocabulary(self.path, self._file.n_vocab, model)

    def begin(self, n_ctx: int) -> None:
        """Do nothing."""

    def prepare(self, batch: Batch) -> None:
        """Do nothing."""

    def compare(
        self, segment: Segment, logits: Floats, next_tokens: Tokens
    ) -> tuple[kernels.RowStatistics, Bound]:
        """Compare with the stored rows."""
        first = segment.first_row
        rows = self._file.rows[segment.chunk, first : first + len(logits)]
        return kernels.divergence_stored(np.asarray(rows), logits, next_tokens), 0.0

    def __exit__(self, *_error: object) -> None:
        del self._file
