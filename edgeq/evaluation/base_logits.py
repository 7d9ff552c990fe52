"""llama-perplexity's base file: the reference's log-probabilities in 16 bits a token.

::

    offset 0   8 bytes "_logits_"
           8   uint32 n_ctx
          12   int32 n_vocab
          16   int32 n_chunks
          20   int32 tokens[n_chunks * n_ctx]
               n_chunks * n_scored rows of uint16, see cpu_kernels.divergence

All little-endian. ``llama-perplexity --kl-divergence`` accepts what is written here, and files
that it wrote with ``--kl-divergence-base`` are read.

References
----------
llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp, perplexity and kl_divergence.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from cpu_kernels import divergence as kernels
from edgeq.errors import EvaluationError
from edgeq.evaluation.chunks import MIN_CTX, Segment, n_scored
from edgeq.runtime.model import Tokens

MAGIC = b"_logits_"
_HEADER = struct.Struct("<8sIii")


@dataclass(frozen=True)
class BaseFile:
    """An opened base file.

    Attributes
    ----------
    path : where it is
    n_vocab : tokens of the vocabulary
    chunks : (n_chunks, n_ctx) int32
    rows : (n_chunks, n_scored, words) uint16, memory-mapped
    """

    path: Path
    n_vocab: int
    chunks: Tokens
    rows: npt.NDArray[np.uint16]


def is_base_file(path: Path) -> bool:
    """Whether `path` starts like a base file."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_base_file(path: Path) -> BaseFile:
    """Read the header and map the rows.

    Raises
    ------
    EvaluationError
        The header contradicts itself or the file's size, or a token is outside the vocabulary.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(MAGIC):
            raise EvaluationError(
                f"{path}: not a base file of llama-perplexity; it starts with {head[:8]!r}, "
                f"expected {MAGIC!r}."
            )
        _, n_ctx, n_vocab, n_chunks = _HEADER.unpack(head)
        if n_ctx < MIN_CTX or n_vocab < 1 or n_chunks < 1:
            raise EvaluationError(
                f"{path}: damaged header; got n_ctx {n_ctx}, n_vocab {n_vocab}, {n_chunks} "
                "chunks. Write it again."
            )
        shape = (n_chunks, n_scored(n_ctx), kernels.stored_words(n_vocab))
        expected = base_file_bytes(n_vocab, n_chunks, n_ctx)
        if size != expected:
            raise EvaluationError(
                f"{path}: truncated or damaged; got {size} bytes, expected {expected} for "
                f"{n_chunks} chunks of {n_ctx} tokens and a vocabulary of {n_vocab}. Write it "
                "again."
            )
        chunks = np.fromfile(file, "<i4", n_chunks * n_ctx).reshape(n_chunks, n_ctx)
    if chunks.min() < 0 or chunks.max() >= n_vocab:
        raise EvaluationError(
            f"{path}: damaged; its tokens are {chunks.min()} to {chunks.max()}, expected 0 to "
            f"{n_vocab - 1}. Write it again."
        )
    offset = _HEADER.size + chunks.nbytes
    rows = np.memmap(path, "<u2", "r", offset, shape)
    return BaseFile(path, n_vocab, chunks.astype(np.int32), rows)


def base_file_bytes(n_vocab: int, n_chunks: int, n_ctx: int) -> int:
    """Return the size of a base file."""
    row_bytes = 2 * kernels.stored_words(n_vocab)
    return _HEADER.size + n_chunks * (4 * n_ctx + n_scored(n_ctx) * row_bytes)


class BaseWriter:
    """Writes the file; the segments come in the order of the text."""

    def __init__(self, file: BinaryIO, n_vocab: int, chunks: Tokens) -> None:
        n_chunks, n_ctx = chunks.shape
        self._file = file
        file.write(_HEADER.pack(MAGIC, n_ctx, n_vocab, n_chunks))
        file.write(chunks.astype("<i4").tobytes())

    def write(
        self, segment: Segment, logits: npt.NDArray[np.float32], following: Tokens
    ) -> npt.NDArray[np.float64]:
        """Write the rows of one segment and return −ln p of the following tokens, nats."""
        rows, nll, _ = kernels.store(logits, following)
        self._file.write(rows.astype("<u2", copy=False).tobytes())
        return nll
