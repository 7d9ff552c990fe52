"""Tokens a second through llama.cpp: reading a prompt, and writing one token after the other."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeq.errors import EvaluationError
from edgeq.evaluation.references import is_repacked
from edgeq.runtime.model import Model

_FIRST_TOKEN = 1000  # any tokens do: the time does not depend on them


@dataclass(frozen=True)
class Rate:
    """Tokens a second over the repetitions.

    Attributes
    ----------
    median : tokens a second
    low, high : slowest and fastest repetition
    samples : of every repetition, in the order in which the files took turns
    """

    median: float
    low: float
    high: float
    samples: tuple[float, ...] = ()


@dataclass(frozen=True)
class Speed:
    """How fast one file is on this machine.

    Attributes
    ----------
    path : the file
    prefill : a prompt of `n_prompt` tokens in one call
    decode : `n_gen` tokens one by one after that prompt's first `n_gen` tokens
    n_prompt, n_gen, repetitions, n_threads : how it was measured; threads 0: all CPUs
    """

    path: Path
    prefill: Rate
    decode: Rate
    n_prompt: int
    n_gen: int
    repetitions: int
    n_threads: int


def measure_speeds(
    paths: Sequence[Path | str],
    *,
    n_prompt: int = 512,
    n_gen: int = 32,
    repetitions: int = 5,
    n_threads: int | None = None,
    adapters: Sequence[Path | None] | None = None,
    as_judged: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """Measure files in turn, again and again, so that a drift of the machine hits all alike.

    All files are loaded at once, each with its LoRA adapter where `adapters` has one; a first round
    warms up and is not counted. llama.cpp rearranges weights as it does for everyone; `as_judged`
    leaves large files where they are mapped, as ``evaluate`` does.

    Raises
    ------
    EvaluationError
        A count below 1.
    RuntimeLibraryError
        llama.cpp refused a file.
    """
    if min(n_prompt, n_gen, repetitions) < 1 or n_gen > n_prompt:
        raise EvaluationError(
            f"speed: got {n_prompt} prompt tokens, {n_gen} generated ones and {repetitions} "
            "repetitions; expected at least 1 each, and no more generated than prompt tokens."
        )
    seconds: list[list[tuple[float, float]]] = [[] for _ in paths]
    with ExitStack() as stack:
        models = [
            stack.enter_context(
                Model(
                    path,
                    n_ctx=n_prompt + n_gen,
                    n_threads=n_threads,
                    repack=not as_judged or is_repacked(Path(path)),
                    adapter=adapter,
                )
            )
            for path, adapter in zip(paths, adapters or [None] * len(paths), strict=True)
        ]
        for repetition in range(repetitions + 1):
            for i, model in enumerate(models):
                timed = prefill_seconds(model, n_prompt), decode_seconds(model, n_gen)
                if repetition > 0:
                    seconds[i].append(timed)
                if progress is not None:
                    progress(repetition * len(paths) + i + 1, (repetitions + 1) * len(paths))
    return [
        Speed(
            path=Path(path),
            prefill=rate_of(n_prompt, [pair[0] for pair in pairs]),
            decode=rate_of(n_gen, [pair[1] for pair in pairs]),
            n_prompt=n_prompt,
            n_gen=n_gen,
            repetitions=repetitions,
            n_threads=n_threads or 0,
        )
        for path, pairs in zip(paths, seconds, strict=True)
    ]


def measure_speed(
    path: Path | str,
    *,
    n_prompt: int = 512,
    n_gen: int = 32,
    repetitions: int = 5,
    n_threads: int | None = None,
) -> Speed:
    """Measure one file; see ``measure_speeds``."""
    return measure_speeds(
        [path], n_prompt=n_prompt, n_gen=n_gen, repetitions=repetitions, n_threads=n_threads
    )[0]


def rate_of(n_tokens: int, seconds: Sequence[float]) -> Rate:
    """Return tokens a second of repetitions that took so long."""
    return Rate(
        n_tokens / statistics.median(seconds),
        n_tokens / max(seconds),
        n_tokens / min(seconds),
        tuple(n_tokens / spent for spent in seconds),
    )


def prefill_seconds(model: Model, n_prompt: int) -> float:
    """Return the seconds of a prompt in one call."""
    tokens = (np.arange(n_prompt) + _FIRST_TOKEN).astype(np.int32) % model.n_vocab
    wants = np.zeros(n_prompt, np.bool_)
    wants[-1] = True
    model.clear()
    started = time.perf_counter()
    model.decode(tokens, np.arange(n_prompt, dtype=np.int32), np.zeros(n_prompt, np.int32), wants)
    return time.perf_counter() - started


def decode_seconds(model: Model, n_gen: int) -> float:
    """Return the seconds of tokens one by one, after as many others."""
    # the sequence is shortened to n_gen tokens by starting anew: the same attention for all files
    tokens = (np.arange(2 * n_gen) + _FIRST_TOKEN).astype(np.int32) % model.n_vocab
    positions = np.arange(2 * n_gen, dtype=np.int32)
    zero = np.zeros(n_gen, np.int32)
    model.clear()
    model.decode(tokens[:n_gen], positions[:n_gen], zero, np.arange(n_gen) == n_gen - 1)
    one = np.ones(1, np.bool_)
    started = time.perf_counter()
    for i in range(n_gen, 2 * n_gen):
        model.decode(tokens[i : i + 1], positions[i : i + 1], zero[:1], one)
    return time.perf_counter() - started
