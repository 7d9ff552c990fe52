"""Whole files: tokens a second of prompts, of single tokens and of small batches."""

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.gguf_file import open_gguf
from edgeq.benchmarks.sampling import PAUSE
from edgeq.console import Steps, markdown_table
from edgeq.decoding import Decoder
from edgeq.errors import EvaluationError
from edgeq.evaluation.speed import Rate, decode_seconds, prefill_seconds, rate_of
from edgeq.results import BENCH_SCHEMA
from edgeq.runtime.model import Model


@dataclass(frozen=True)
class FileSpeed:
    """One file through one runtime.

    Attributes
    ----------
    backend : llama.cpp or kernels
    threads : of it
    prefill, decode : tokens a second
    batches : tokens a second of batches of so many tokens, as a speculative decoder verifies
    """

    backend: str
    threads: int
    prefill: Rate
    decode: Rate
    batches: dict[int, Rate]


@dataclass(frozen=True)
class FileBench:
    """One file, measured.

    Attributes
    ----------
    path : the file
    n_prompt, n_gen : tokens read together, and written one by one
    weight_bytes : of the rearranged weights that a token reads; None where our kernels did not run
    load_s : our decoder took to read, rearrange and compile, the last with numba's cache
    rows : by threads and backend
    """

    path: Path
    n_prompt: int
    n_gen: int
    weight_bytes: int | None
    load_s: float | None
    rows: tuple[FileSpeed, ...]

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "schema": BENCH_SCHEMA,
            "file": str(self.path),
            "n_prompt": self.n_prompt,
            "n_gen": self.n_gen,
            "weight_bytes": self.weight_bytes,
            "load_s": self.load_s,
            "runs": [asdict(row) for row in self.rows],
        }

    def as_text(self) -> str:
        """Return what a terminal shows."""
        sizes = sorted({n for row in self.rows for n in row.batches})
        header = ["backend", "threads", f"prefill of {self.n_prompt}", "decode", "GB/s"]
        header += [f"batches of {n}" for n in sizes]
        rows = []
        for row in self.rows:
            read = "–"
            if self.weight_bytes is not None and row.backend == "kernels":
                read = f"{self.weight_bytes * row.decode.median / 1e9:.1f}"
            rates = [_shown(row.batches[n]) if n in row.batches else "–" for n in sizes]
            shown = [_shown(row.prefill), _shown(row.decode), read]
            rows.append([row.backend, str(row.threads), *shown, *rates])
        table = markdown_table(header, rows)
        text = f"{self.path}: tokens/s, median (slowest–fastest)\n\n{table}"
        if self.weight_bytes is None or self.load_s is None:
            return text
        return (
            f"{text}\n\nThe kernels read {self.weight_bytes:,} bytes of weights a token; "
            f"rearranging and compiling took {self.load_s:.1f} s."
        )


def _shown(rate: Rate) -> str:
    return f"{rate.median:.1f} ({rate.low:.1f}–{rate.high:.1f})"


def bench_file(
    path: Path,
    backends: Sequence[str],
    threads: Sequence[int],
    *,
    n_prompt: int = 512,
    n_gen: int = 32,
    batches: Sequence[int] = (),
    repetitions: int = 5,
    steps: Steps,
) -> FileBench:
    """Time a file in llama.cpp and in our decoder, in turn.

    Parameters
    ----------
    path : GGUF file
    backends : ``llama``, ``kernels``
    threads : numbers of threads
    n_prompt, n_gen : tokens of a prompt, and written one by one after `n_gen` others
    batches : also time batches of so many tokens
    repetitions : samples of each

    Raises
    ------
    EvaluationError
        Our decoder does not run this model, or a count is below 1.
    RuntimeLibraryError
        llama.cpp refused the file.
    """
    if min(n_prompt, n_gen, repetitions, *threads, *batches) < 1 or n_gen > n_prompt:
        raise EvaluationError(
            f"bench: got {n_prompt} prompt tokens, {n_gen} written ones, {repetitions} repetitions "
            "and the batches; expected at least 1 each, and no more written than prompt tokens."
        )
    open_gguf(path)
    rows: list[FileSpeed] = []
    weight_bytes = load_s = None
    for n_threads in threads:
        with steps.step(f"bench {n_threads} threads"):
            runners: list[_Llama | _Kernels] = []
            if "llama" in backends:
                runners.append(_Llama(path, n_prompt + n_gen, n_threads))
            if "kernels" in backends:
                started = time.perf_counter()
                decoder = Decoder(path, n_ctx=n_prompt + n_gen, n_threads=n_threads)
                weight_bytes = decoder.weight_bytes
                for n in batches:
                    decoder.prepare(n)
                load_s = load_s or time.perf_counter() - started
                runners.append(_Kernels(decoder))
            try:
                rows += _bench_runners(runners, n_threads, n_prompt, n_gen, batches, repetitions)
            finally:
                for runner in runners:
                    runner.close()
    return FileBench(path, n_prompt, n_gen, weight_bytes, load_s, tuple(rows))


class _Llama:
    """llama.cpp with one file."""

    name = "llama.cpp"

    def __init__(self, path: Path, n_ctx: int, n_threads: int) -> None:
        self._model = Model(path, n_ctx=n_ctx, n_threads=n_threads)

    def prefill(self, n: int) -> float:
        """Return the seconds of n tokens at once."""
        return prefill_seconds(self._model, n)

    def decode(self, n: int) -> float:
        """Return the seconds of n tokens one by one, after n others."""
        return decode_seconds(self._model, n)

    def close(self) -> None:
        """Free it."""
        self._model.close()


class _Kernels:
    """Our decoder with one file."""

    name = "kernels"

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def prefill(self, n: int) -> float:
        """Return the seconds of n tokens at once."""
        tokens = np.arange(n) % self._decoder.n_vocab
        self._decoder.clear()
        started = time.perf_counter()
        self._decoder.decode(tokens)
        return time.perf_counter() - started

    def decode(self, n: int) -> float:
        """Return the seconds of n tokens one by one, after n others."""
        self.prefill(n)
        started = time.perf_counter()
        for token in range(n):
            self._decoder.decode([token])
        return time.perf_counter() - started

    def close(self) -> None:
        """Nothing: it goes with its last reference."""


def _bench_runners(
    runners: Sequence[_Llama | _Kernels],
    n_threads: int,
    n_prompt: int,
    n_gen: int,
    batches: Sequence[int],
    repetitions: int,
) -> list[FileSpeed]:
    tasks = [(n_prompt, "prefill"), (n_gen, "decode"), *((n, "prefill") for n in batches)]
    runs = [functools.partial(getattr(r, kind), n) for r in runners for n, kind in tasks]
    # in turn by task: both runtimes do the same thing one after the other
    order = [r * len(tasks) + k for k in range(len(tasks)) for r in range(len(runners))]
    seconds: list[list[float]] = [[] for _ in runs]
    for repetition in range(repetitions + 1):
        for i in order:
            time.sleep(PAUSE)
            spent = runs[i]()
            if repetition:
                seconds[i].append(spent)
    rows = []
    for r, runner in enumerate(runners):
        own = seconds[r * len(tasks) : (r + 1) * len(tasks)]
        rates = [rate_of(n, spent) for (n, _), spent in zip(tasks, own, strict=True)]
        of_batches = dict(zip(batches, rates[2:], strict=True))
        rows.append(FileSpeed(runner.name, n_threads, rates[0], rates[1], of_batches))
    return rows
