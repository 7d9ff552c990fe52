"""Two sides put to the same prompts, and how far apart they are."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.gguf_file import open_gguf
from cpu_kernels.divergence import divergence
from edgeq.console import Progress
from edgeq.differing.decoding import Side, along, same_sample
from edgeq.differing.prompts import REFUSALS, Prompt, is_refusal
from edgeq.differing.results import TEMPERATURES, Answer, Difference, Forced
from edgeq.errors import EvaluationError
from edgeq.runtime.model import Model, Tokens
from edgeq.runtime.vocabulary import vocabulary_digest
from edgeq.texts.writing import N_SEQ, Doubles, write

_ROOM = 32  # tokens that a mutated prompt may have more than the longest


@dataclass(frozen=True)
class Settings:
    """How two sides are compared.

    Attributes
    ----------
    n_tokens : that each writes after a prompt, at most
    refusals : openings of a text that refuses to answer
    seed : of the uniform numbers that both sides sample with, and of the search
    """

    n_tokens: int = 64
    refusals: tuple[str, ...] = REFUSALS
    seed: int = 0


class Pair(AbstractContextManager["Pair", None]):
    """Two sides in memory. A context manager.

    Parameters
    ----------
    longest : tokens of the longest prompt

    Raises
    ------
    EvaluationError
        The vocabularies differ, or the texts are longer than what a side was trained on.
    RuntimeLibraryError
        llama.cpp refused a file, or its KV cache.

    Attributes
    ----------
    longest : tokens that a mutated prompt may have
    """

    def __init__(
        self, a: Side, b: Side, longest: int, settings: Settings, n_threads: int | None = None
    ) -> None:
        check_vocabularies(a.path, b.path)
        n_ctx = longest + settings.n_tokens
        most = min(_check_length(side, n_ctx) for side in (a, b))
        self.a, self.b, self.settings = a, b, settings
        self.longest = min(n_ctx + _ROOM, most) - settings.n_tokens
        self.first = a.open(self.longest + settings.n_tokens, n_threads)
        try:
            self.second = b.open(self.first.n_ctx, n_threads)
        except BaseException:
            self.first.close()
            raise

    def close(self) -> None:
        """Free both."""
        self.first.close()
        self.second.close()

    def __exit__(self, *_error: object) -> None:
        self.close()

    def force(self, prompt: Tokens, written: Tokens) -> Forced:
        """Return what both make of a text, token by token."""
        one, other = along(self.first, prompt, written), along(self.second, prompt, written)
        found = divergence(one, other, written)
        highest = np.partition(one, -2, axis=1)[:, -2:]
        return Forced(
            margin=(highest[:, 1] - highest[:, 0]).astype(np.float64),
            same_top=found.top == found.top_reference,
            kld=found.kld,
            same_sample={
                temperature: np.array(
                    [same_sample(x, y, temperature) for x, y in zip(one, other, strict=True)]
                )
                for temperature in TEMPERATURES
                if temperature > 0
            },
        )


def check_vocabularies(a: Path, b: Path) -> None:
    """Refuse files whose tokens have different meanings.

    Raises
    ------
    EvaluationError
    """
    if a == b:
        return
    digests = []
    for path in (a, b):
        with Model(path, vocab_only=True) as model:
            digests.append(vocabulary_digest(model))
    if digests[0] != digests[1]:
        raise EvaluationError(
            f"{b}: has another vocabulary than {a}, expected the same tokens. "
            "Compare files of one model."
        )


def _check_length(side: Side, n_ctx: int) -> int:
    """Return how many tokens a side was trained on, at least `n_ctx`."""
    file = open_gguf(side.path)
    most = int(file.value(f"{file.architecture}.context_length", n_ctx))
    if n_ctx > most:
        raise EvaluationError(
            f"{side.path}: got prompts of {n_ctx} tokens with what is written after them, expected "
            f"at most {most}, as it was trained. Shorten the prompts, or lower --n-tokens."
        )
    return most


def first_difference(a: Tokens, b: Tokens) -> int | None:
    """Return the first place where two texts differ, one ending before the other included."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    if len(differing):
        return int(differing[0])
    return None if len(a) == len(b) else n


def compare(
    pair: Pair,
    prompts: Sequence[Prompt],
    tokens: Sequence[Tokens],
    progress: Progress | None = None,
) -> Difference:
    """Put prompts to both sides.

    Parameters
    ----------
    tokens : of each prompt

    Raises
    ------
    EvaluationError
        Logits are not finite.
    """
    settings = pair.settings
    shape = len(prompts), settings.n_tokens
    rng = np.random.default_rng(settings.seed)
    uniforms = {temperature: rng.random(shape) for temperature in TEMPERATURES}
    answers: list[Answer] = []
    for start in range(0, len(prompts), N_SEQ):
        answers += _answers(pair, prompts, tokens, slice(start, start + N_SEQ), uniforms)
        if progress is not None:
            progress(len(answers), len(prompts))
    return Difference(pair.a, pair.b, settings.n_tokens, tuple(answers))


def _answers(
    pair: Pair,
    prompts: Sequence[Prompt],
    tokens: Sequence[Tokens],
    group: slice,
    uniforms: dict[float, Doubles],
) -> list[Answer]:
    given, n_tokens = tokens[group], pair.settings.n_tokens
    texts = {
        temperature: [
            write(model, given, n_tokens, temperature, draws[group])
            for model in (pair.first, pair.second)
        ]
        for temperature, draws in uniforms.items()
    }
    answers = []
    for i, prompt in enumerate(prompts[group]):
        one, other = texts[0.0][0][i], texts[0.0][1][i]
        shown = pair.first.detokenize(one), pair.first.detokenize(other)
        openings = pair.settings.refusals
        answers.append(
            Answer(
                prompt=prompt,
                first={t: first_difference(a[i], b[i]) for t, (a, b) in texts.items()},
                texts=shown,
                refuses=(is_refusal(shown[0], openings), is_refusal(shown[1], openings)),
                forced=pair.force(given[i], one),
            )
        )
    return answers
