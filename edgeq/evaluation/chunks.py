"""How a text becomes chunks, batches and scored rows: the rules of llama-perplexity.

The tokens are cut into chunks of n_ctx; each chunk is one fresh sequence whose first token is
replaced by BOS where the vocabulary wants one. The tokens before the middle are context only.
Rows ``n_ctx // 2`` to ``n_ctx - 2`` are scored against the token that follows each.

References
----------
llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp, perplexity and kl_divergence.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeq.errors import EvaluationError
from edgeq.runtime.model import Model, Tokens

BLOCK = 512  # tokens of one decode call: llama.cpp's micro-batch, and the memory of its logits
MIN_CTX = 4


@dataclass(frozen=True)
class Segment:
    """Consecutive scored rows of one chunk within one batch.

    Attributes
    ----------
    chunk : index of the chunk
    first_row : index of the first row among the chunk's scored rows
    rows : where they are in the batch's logits
    """

    chunk: int
    first_row: int
    rows: slice

    @property
    def place(self) -> tuple[int, slice]:
        """Where the rows are in an array of (n_chunks, n_scored)."""
        n_rows = self.rows.stop - self.rows.start
        return self.chunk, slice(self.first_row, self.first_row + n_rows)


@dataclass(frozen=True)
class Batch:
    """One decode call; the arrays are one entry a token.

    Attributes
    ----------
    starts : whether all sequences begin anew
    segments : what is scored
    """

    tokens: Tokens
    positions: Tokens
    sequences: Tokens
    wants_logits: npt.NDArray[np.bool_]
    starts: bool
    segments: tuple[Segment, ...]

    def run(self, model: Model) -> npt.NDArray[np.float32]:
        """Return the logits (n_wanted, n_vocab) of this batch, valid until the next call."""
        if self.starts:
            model.clear()
        return model.decode(self.tokens, self.positions, self.sequences, self.wants_logits)


def n_scored(n_ctx: int) -> int:
    """Return the number of scored rows of one chunk."""
    return n_ctx - 1 - n_ctx // 2


def sequences_at_once(n_ctx: int) -> int:
    """Return how many chunks share a decode call: as many as fill one micro-batch.

    llama-perplexity puts 2048 tokens in a call, which llama.cpp computes in pieces of 512 all the
    same; one piece a call needs a quarter of the memory for logits and is as fast.
    """
    return max(1, BLOCK // n_ctx)


def cut(tokens: Tokens, n_ctx: int, limit: int | None, where: str) -> Tokens:
    """Return the whole chunks of `tokens`, (n_chunks, n_ctx) int32, at most `limit`.

    Raises
    ------
    EvaluationError
        There is not one whole chunk.
    """
    if n_ctx < MIN_CTX:
        raise EvaluationError(f"evaluate: n_ctx is {n_ctx}; the smallest is {MIN_CTX}.")
    if limit is not None and limit < 1:
        raise EvaluationError(f"evaluate: {limit} chunks asked for; the smallest is 1.")
    n_chunks = len(tokens) // n_ctx
    if n_chunks == 0:
        raise EvaluationError(
            f"{where}: too short to evaluate; got {len(tokens)} tokens, expected at least {n_ctx} "
            "(one chunk). Give more text or a smaller context."
        )
    n_chunks = n_chunks if limit is None else min(n_chunks, limit)
    whole: Tokens = np.ascontiguousarray(tokens[: n_chunks * n_ctx], np.int32)
    return whole.reshape(n_chunks, n_ctx)


def digest(chunks: Tokens) -> str:
    """Return the SHA-256 of the chunks' tokens and shape."""
    state = hashlib.sha256(np.array(chunks.shape, "<i8").tobytes())
    state.update(chunks.astype("<i4").tobytes())
    return state.hexdigest()


def next_tokens(chunks: Tokens) -> Tokens:
    """Return the token after each scored row, (n_chunks, n_scored) int32."""
    following: Tokens = np.ascontiguousarray(chunks[:, chunks.shape[1] // 2 + 1 :])
    return following


def batches(chunks: Tokens, bos: int | None) -> Iterator[Batch]:
    """Yield the decode calls that score `chunks`.

    Parameters
    ----------
    chunks : (n_chunks, n_ctx) int32
    bos : the token to put at the start of each chunk, if any
    """
    n_chunks, n_ctx = chunks.shape
    at_once = sequences_at_once(n_ctx)
    first = n_ctx // 2
    for start in range(0, n_chunks, at_once):
        group = chunks[start : start + at_once].copy()
        if bos is not None:
            group[:, 0] = bos
        for block in range(0, n_ctx, BLOCK):
            positions = np.arange(block, min(block + BLOCK, n_ctx), dtype=np.int32)
            wanted = positions >= first
            n_wanted = int(wanted.sum())
            first_row = max(block - first, 0)
            n_rows = min(n_wanted, n_scored(n_ctx) - first_row)
            yield Batch(
                tokens=group[:, positions].ravel(),
                positions=np.tile(positions, len(group)),
                sequences=np.repeat(np.arange(len(group), dtype=np.int32), len(positions)),
                wants_logits=np.tile(wanted, len(group)),
                starts=block == 0,
                segments=tuple(
                    Segment(start + i, first_row, slice(i * n_wanted, i * n_wanted + n_rows))
                    for i in range(len(group))
                    if n_rows > 0
                ),
            )
