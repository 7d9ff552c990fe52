"""Text that the model writes itself, to calibrate and judge without any data set.

Every sequence is sampled token by token at temperature 1 from the model's own distribution, many
sequences in one batch. It begins with the beginning-of-sequence token or, for a vocabulary that
wants none, with a plain token drawn uniformly, so that sequences differ from the start.

Every sequence has its own random stream and takes one number of it a token, so it does not depend
on the other sequences or on how many run at once, up to the rounding of kernels that differ between
batch sizes.

References
----------
Liu et al., LLM-QAT, arXiv:2305.17888, section 2.1 (data-free calibration; they begin with a random
token too).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.errors import CalibrationError
from edgeq.runtime.model import Model, Tokens
from edgeq.texts.parts import Part, make_part
from edgeq.texts.passages import Hashes, are_in, stock_phrases, windows

BATCH = 64  # sequences at once
ATTEMPTS = 4
_COLUMNS = 256  # of the vocabulary, summed at once when a token is looked up


def sample(
    model_path: Path | str,
    seeds: Sequence[Sequence[int]],
    length: int,
    *,
    batch: int = BATCH,
    temperature: float = 1.0,
    n_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tokens:
    """Let a model write sequences.

    Parameters
    ----------
    model_path : GGUF file
    seeds : of each sequence its numbers, which alone decide it
    length : tokens of a sequence, the first one included
    batch : most sequences at once; each needs memory for `length` keys and values
    temperature : 1 is the model's own distribution
    n_threads : default: every CPU of this process
    progress : called with (tokens done, tokens in all)

    Returns
    -------
    (n_sequences, length) int32

    Raises
    ------
    CalibrationError
        `length` is beyond the model's context, or the model gives no finite probabilities.
    """
    rows = np.empty((len(seeds), length), np.int32)
    n_seq = min(batch, len(seeds))
    with Model(
        model_path, n_ctx=length, n_seq=n_seq, kv_unified=False, n_threads=n_threads
    ) as model:
        if length > model.n_ctx_train:
            raise CalibrationError(
                f"{model_path}: sequences of {length} tokens; the model was trained on at most "
                f"{model.n_ctx_train}. Choose shorter chunks."
            )
        plain = None if model.adds_bos else model.plain_tokens()
        for start in range(0, len(seeds), n_seq):
            group = rows[start : start + n_seq]
            streams = [
                np.random.Generator(np.random.PCG64(list(seed)))
                for seed in seeds[start : start + n_seq]
            ]
            if plain is None:
                group[:, 0] = model.bos
            else:
                group[:, 0] = [plain[stream.integers(len(plain))] for stream in streams]
            numbers = np.stack([stream.random(length) for stream in streams])
            for done in _write(model, group, numbers, temperature):
                if progress is not None:
                    progress(start * length + len(group) * (done + 1), rows.size)
    return rows


def sample_parts(
    model_path: Path | str,
    n_chunks: Mapping[str, int],
    *,
    chunk: int,
    seed: int = 0,
    batch: int = BATCH,
    n_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Part]:
    """Let a model write parts of text that have no passage in common.

    A sequence that repeats a passage of an earlier part is written anew from another seed. Windows
    in three or more sequences are stock phrases of the model, and allowed.

    Parameters
    ----------
    n_chunks : part to its number of chunks; earlier ones are kept where two overlap
    chunk : tokens of a chunk
    seed : (seed, number of the part, number of the sequence) decides a sequence
    batch, n_threads, progress : see ``sample``

    Raises
    ------
    CalibrationError
        See ``sample``; or the model keeps repeating itself.
    """
    places = [(part, i) for part, n in enumerate(n_chunks.values()) for i in range(n)]
    seeds = [[seed, part, i] for part, i in places]
    rows = sample(model_path, seeds, chunk, batch=batch, n_threads=n_threads, progress=progress)
    owner = np.array([part for part, _ in places])
    with Model(model_path, vocab_only=True) as vocabulary:
        for attempt in range(1, ATTEMPTS + 1):
            of_row = [windows(vocabulary.detokenize(row)) for row in rows]
            stock = stock_phrases(of_row)
            again = _repeating(of_row, owner, stock)
            if not again:
                return {
                    name: make_part(vocabulary, name, rows[owner == part], stock)
                    for part, name in enumerate(n_chunks)
                }
            others = [[*seeds[i], attempt] for i in again]
            rows[again] = sample(model_path, others, chunk, batch=batch, n_threads=n_threads)
    raise CalibrationError(
        f"{model_path}: {len(again)} of {len(rows)} sampled sequences still repeat passages of "
        f"other parts after {ATTEMPTS} attempts. Give --text FILE instead."
    )


def _repeating(of_row: Sequence[Hashes], owner: npt.NDArray[np.int64], stock: Hashes) -> list[int]:
    """Return the rows that share a window with a row of an earlier part."""
    again: list[int] = []
    earlier = np.empty(0, np.uint64)
    for part in range(1, int(owner.max()) + 1):
        before = [of_row[i] for i in np.flatnonzero(owner == part - 1).tolist()]
        earlier = np.setdiff1d(np.concatenate([earlier, *before]), stock)
        mine = np.flatnonzero(owner == part).tolist()
        again += [i for i in mine if are_in(of_row[i], earlier).any()]
    return again


def _write(
    model: Model, rows: Tokens, numbers: npt.NDArray[np.float64], temperature: float
) -> Iterator[int]:
    """Fill `rows`, (n, length), after their first column, *written*; yield each position done."""
    n, length = rows.shape
    sequences = np.arange(n, dtype=np.int32)
    wanted = np.ones(n, np.bool_)
    choose = _Chooser(n, model.n_vocab)
    model.clear()
    for at in range(length - 1):
        logits = model.decode(rows[:, at], np.full(n, at, np.int32), sequences, wanted)
        try:
            rows[:, at + 1] = choose(logits, numbers[:, at + 1], temperature)
        except FloatingPointError:
            raise CalibrationError(
                f"{model.path}: its logits are not finite at position {at}. "
                "The model overflows: give its F32 or BF16 weights, or give --text FILE."
            ) from None
        yield at + 1


class _Chooser:
    """Draws one token a row by inverting the distribution function, in reused memory.

    Sums of 256 probabilities are added up in float64 and searched first, then one such group is.
    """

    def __init__(self, n_rows: int, n_vocab: int) -> None:
        n_groups = -(-n_vocab // _COLUMNS)
        self._n_vocab = n_vocab
        self._weights = np.zeros((n_rows, n_groups * _COLUMNS), np.float32)

    def __call__(
        self,
        logits: npt.NDArray[np.float32],
        numbers: npt.NDArray[np.float64],
        temperature: float,
    ) -> Tokens:
        """Return (n_rows,) tokens for (n_rows, n_vocab) logits and numbers in [0, 1)."""
        n = len(logits)
        weights = self._weights[:, : self._n_vocab]
        highest = logits.max(axis=1, keepdims=True)
        if not np.isfinite(highest).all():
            raise FloatingPointError
        np.subtract(logits, highest, out=weights)
        if temperature != 1.0:
            weights /= np.float32(temperature)
        np.exp(weights, out=weights)
        groups = self._weights.reshape(n, -1, _COLUMNS)
        below = np.cumsum(groups.sum(axis=2), axis=1, dtype=np.float64)
        target = numbers * below[:, -1]
        group = (below <= target[:, None]).sum(axis=1)
        rows = np.arange(n)
        chosen = groups[rows, group].astype(np.float64)
        target -= np.where(group > 0, below[rows, group - 1], 0.0)
        inside = np.cumsum(chosen, axis=1)
        at = (inside <= target[:, None]).sum(axis=1)
        last = _COLUMNS - 1 - (chosen[:, ::-1] > 0).argmax(axis=1)  # rounding: never beyond it
        tokens: Tokens = (group * _COLUMNS + np.minimum(at, last)).astype(np.int32)
        return tokens
