"""The log-likelihood of every ending, as llama-perplexity's hellaswag computes it.

What all endings of an item begin with, the context above all, is decoded once: its tokens stand in
one llama.cpp sequence for each ending, and the endings follow in the same batch. Models whose
layers keep a state (Mamba, RWKV) cannot share tokens: there each ending has the prefix to itself.

Batches are llama-perplexity's to the token, even the last of each ending, which foretells nothing:
in a batch of another shape llama.cpp's sums differ in the last bit, its 8-bit activations then by a
step, and endings of SmolLM2-135M in Q4_1 by up to 0.08 nats a token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.gguf_file import open_gguf
from cpu_kernels.divergence import log_sum_exp
from edgeq.errors import EvaluationError
from edgeq.runtime.model import Model, Tokens
from edgeq.tasks.items import Item, Task

Progress = Callable[[int, int], None]
N_CTX, N_SEQ = 512, 4  # of one batch, as llama-perplexity has it; more where an item needs more


@dataclass(frozen=True, eq=False)
class Question:
    """The tokens of an item.

    Attributes
    ----------
    where : file and line, for messages
    prefix : what all endings share, at least one token
    endings : what remains of each ending, at least one token
    answer : index of the right ending
    """

    where: str
    prefix: Tokens
    endings: tuple[Tokens, ...]
    answer: int

    def n_tokens(self, *, shares: bool) -> int:
        """Return how many are decoded, with the prefix once or for each ending."""
        n_prefixes = 1 if shares else len(self.endings)
        return n_prefixes * len(self.prefix) + sum(len(ending) for ending in self.endings)

    @property
    def n_positions(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.prefix) + max(len(ending) for ending in self.endings)


@dataclass(frozen=True, eq=False)
class ItemScore:
    """What a model makes of one item.

    Attributes
    ----------
    log_likelihoods : (n_endings,) float64, Σ ln p of the tokens of each ending that are not shared
    n_tokens : (n_endings,) int64, how many these are
    answer : index of the ending of the highest log-likelihood a token, the first of equals; of a
        single ending the tokens that greedy decoding gives, up to the first that differs from it
    is_right : whether that is the right answer
    """

    log_likelihoods: npt.NDArray[np.float64]
    n_tokens: npt.NDArray[np.int64]
    answer: tuple[int, ...]
    is_right: bool


def encode(model: Model, item: Item, where: str) -> Question:
    """Tokenize an item with the vocabulary of `model`.

    Raises
    ------
    EvaluationError
        The endings share no token to begin with.
    """
    whole = [model.tokenize(item.context + ending) for ending in item.endings]
    others = whole[1:] or [model.tokenize(item.context)]
    n_shared = min(len(tokens) for tokens in whole) - 1  # each ending keeps one
    for other in others:
        n = min(n_shared, len(other))
        differing = np.flatnonzero(whole[0][:n] != other[:n])
        n_shared = int(differing[0]) if len(differing) else n
    if n_shared < 1:
        raise EvaluationError(
            f"{where}: context and endings share no token, expected at least one. Give a longer "
            "context."
        )
    endings = tuple(tokens[n_shared:] for tokens in whole)
    return Question(where, whole[0][:n_shared], endings, item.answer)


def score_tasks(
    path: Path | str,
    tasks: Sequence[Task],
    *,
    n_threads: int | None = None,
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> list[list[ItemScore]]:
    """Ask a GGUF file the items of several tasks that have endings; one list of scores a task.

    Parameters
    ----------
    n_threads : default all CPUs
    adapter : a LoRA adapter that the file runs with
    progress : called with (items done, items in all)

    Raises
    ------
    EvaluationError
        An item does not fit the model, or logits are not finite.
    RuntimeLibraryError
        llama.cpp refused the file.
    """
    with Model(path, vocab_only=True) as model:
        asked = [
            [encode(model, i, task.where(i)) for i in task.items if isinstance(i, Item)]
            for task in tasks
        ]
        shares = model.shares_tokens
    everything = [question for questions in asked for question in questions]
    if not everything:
        return [[] for _ in tasks]
    n_seq = max([N_SEQ, *(len(question.endings) for question in everything)])
    n_largest = max(question.n_tokens(shares=shares) for question in everything)
    n_ctx = max(N_CTX, -(-n_largest // n_seq))
    done = 0

    def count(n: int, _total: int) -> None:
        if progress is not None:
            progress(done + n, len(everything))

    scores = []
    with Model(path, n_ctx=n_ctx, n_seq=n_seq, n_threads=n_threads, adapter=adapter) as model:
        _check_positions(model, everything)
        for questions in asked:
            scores.append(score(model, questions, count))
            done += len(questions)
    return scores


def _check_positions(model: Model, questions: Sequence[Question]) -> None:
    if "position_embd.weight" not in open_gguf(model.path).tensors:
        return  # any position can be computed
    for question in questions:
        if question.n_positions > model.n_ctx_train:  # llama.cpp would end the process
            raise EvaluationError(
                f"{question.where}: {question.n_positions} tokens; {model.path} was trained on at "
                f"most {model.n_ctx_train}. Leave the item out."
            )


def score(
    model: Model, questions: Sequence[Question], progress: Progress | None = None
) -> list[ItemScore]:
    """Ask a loaded model; its sequences share one buffer (``kv_unified``).

    Raises
    ------
    EvaluationError
        An item needs more tokens or sequences than the model was loaded with, or logits are not
        finite.
    """
    scores: list[ItemScore] = []
    for group in _groups(model, questions):
        scores += _score_batch(model, group)
        if progress is not None:
            progress(len(scores), len(questions))
    return scores


def _groups(model: Model, questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Yield as many questions at a time as one batch holds."""
    n_room = model.n_ctx * model.n_seq
    n_seq = max([N_SEQ, *(len(question.endings) for question in questions)])
    group: list[Question] = []
    n_tokens = n_sequences = 0
    for question in questions:
        n, k = question.n_tokens(shares=model.shares_tokens), len(question.endings)
        if n > n_room or k > model.n_seq:
            raise EvaluationError(
                f"{question.where}: does not fit; got {n} tokens in {k} endings, expected at most "
                f"{n_room} in {model.n_seq}. Load the model with a larger context."
            )
        if group and (n_tokens + n > n_room or n_sequences + k > min(n_seq, model.n_seq)):
            yield group
            group, n_tokens, n_sequences = [], 0, 0
        group.append(question)
        n_tokens, n_sequences = n_tokens + n, n_sequences + k
    if group:
        yield group


def _score_batch(model: Model, group: Sequence[Question]) -> list[ItemScore]:
    batch = _lay_out(group, shares=model.shares_tokens)
    model.clear()
    logits = model.decode(*batch.arrays)  # a view, which holds until the next call
    top = logits.argmax(axis=1).astype(np.int32)
    log_sums = log_sum_exp(logits, top)
    scores = []
    for question, rows in zip(group, batch.rows, strict=True):
        pairs = list(zip(rows, question.endings, strict=True))
        sums = np.array([(logits[row, ending] - log_sums[row]).sum() for row, ending in pairs])
        if not np.isfinite(sums).all():
            raise EvaluationError(
                f"{model.path}: NaN or infinite logits at {question.where}. The file is broken; "
                "convert it again."
            )
        n_tokens = np.array([len(ending) for ending in question.endings])
        if len(sums) > 1:
            answer = int((sums / n_tokens).argmax())
            scores.append(ItemScore(sums, n_tokens, (answer,), answer == question.answer))
        else:
            greedy, wanted = top[rows[0]].tolist(), question.endings[0].tolist()
            same = [a == b for a, b in zip(greedy, wanted, strict=True)]
            n = len(same) if all(same) else same.index(False) + 1
            scores.append(ItemScore(sums, n_tokens, tuple(greedy[:n]), all(same)))
    return scores


@dataclass(frozen=True, eq=False)
class _Batch:
    """The arguments of ``Model.decode``, and where the rows of its logits belong.

    `rows` are those that foretell the tokens of each ending of each question.
    """

    arrays: tuple[Tokens, Tokens, Tokens, npt.NDArray[np.bool_], Tokens]
    rows: list[list[npt.NDArray[np.int64]]]


def _lay_out(group: Sequence[Question], *, shares: bool) -> _Batch:
    pieces: list[tuple[Tokens, Tokens, Tokens, npt.NDArray[np.bool_], Tokens]] = []
    rows = []
    n_rows = sequence = 0

    def add(tokens: Tokens, first: int, wanted: slice, n: int) -> npt.NDArray[np.int64]:
        nonlocal n_rows
        places = np.arange(len(tokens), dtype=np.int32)
        wants = np.zeros(len(tokens), np.bool_)
        wants[wanted] = True
        own, count = np.full_like(places, sequence), np.full_like(places, n)
        pieces.append((tokens, places + np.int32(first), own, wants, count))
        n_rows += int(wants.sum())
        return np.arange(n_rows - int(wants.sum()), n_rows)

    for question in group:
        prefix, found = question.prefix, []
        last = len(prefix) - 1
        if shares:
            before = add(prefix, 0, slice(last, None), len(question.endings))
        for ending in question.endings:
            if shares:
                own = add(ending, len(prefix), slice(-1), 1)
                found.append(np.concatenate([before, own]))
            else:
                found.append(add(np.concatenate([prefix, ending]), 0, slice(last, -1), 1))
            sequence += 1
        rows.append(found)
    tokens, positions, sequences, wanted, n_sequences = zip(*pieces, strict=True)
    join = np.concatenate
    return _Batch(
        (join(tokens), join(positions), join(sequences), join(wanted), join(n_sequences)), rows
    )
