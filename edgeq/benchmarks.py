"""Speed on this CPU: products by type, and whole files, our kernels beside llama.cpp.

Whatever is compared is timed in turn, again and again, so that a drift of the machine hits all
alike; ratios are those of medians. Weights are larger than the caches, as a model's are.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.gguf_file import open_gguf
from converters.output import replacing
from cpu_kernels.bandwidth import Reader
from cpu_kernels.block_formats import FORMATS
from cpu_kernels.isa import chosen
from cpu_kernels.lattice_formats import LATTICES
from cpu_kernels.products import Product, aligned_bytes
from cpu_kernels.tiles import Tiles, rearrange
from edgeq.console import Steps, markdown_table
from edgeq.decoder import Decoder
from edgeq.errors import EvaluationError
from edgeq.evaluation.speed import Rate, decode_seconds, prefill_seconds, rate_of
from edgeq.runtime.encoders import encode
from edgeq.runtime.model import Model
from edgeq.runtime.products import RuntimeProduct

SCHEMA = 1
_T = GGMLQuantizationType
TYPES = (*FORMATS, *LATTICES)
_N_IN = 4096
_ROWS_ENCODED = 64  # repeated to the size that is wanted: the time does not depend on the numbers
_PAUSE = 0.004  # seconds in which ggml's threads stop waiting for work at full speed
_REPEATS = 4  # products of a sample where threads must be started
_READ_BYTES = 1 << 28


@dataclass(frozen=True)
class TypeSpeed:
    """The product of one type with n tokens.

    Attributes
    ----------
    type : ggml's name
    n, threads : tokens of a product, threads
    ns_per_weight : of our kernel, a token
    gb_per_s : of our rearranged weights; 10⁹ bytes
    share_of_bandwidth : of what as many threads read from memory at most; for one token
    ggml_ns_per_weight, ggml_gb_per_s : of ggml, weights as the file has them
    ratio_to_ggml : how many times as fast our kernel is
    ratio_low, ratio_high : quartiles of the ratio over the repetitions
    bpw, file_bpw : bits of a weight as rearranged and in the file
    """

    type: str
    n: int
    threads: int
    ns_per_weight: float
    gb_per_s: float
    share_of_bandwidth: float | None
    ggml_ns_per_weight: float
    ggml_gb_per_s: float
    ratio_to_ggml: float
    ratio_low: float
    ratio_high: float
    bpw: float
    file_bpw: float


@dataclass(frozen=True)
class TypesBench:
    """All types, measured.

    Attributes
    ----------
    isa : name of the instruction set
    bandwidth : GB/s read from memory, by number of threads
    types : rows
    """

    isa: str
    bandwidth: dict[int, float]
    types: tuple[TypeSpeed, ...]

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; ``speeds.json`` is made of them."""
        return {
            "schema": SCHEMA,
            "isa": self.isa,
            "bandwidth_gb_per_s": {str(n): value for n, value in self.bandwidth.items()},
            "types": [asdict(row) for row in self.types],
        }

    def as_text(self) -> str:
        """Return what a terminal shows."""
        header = ["type", "tokens", "threads", "ns/weight", "GB/s", "of memory", "ggml ns/weight"]
        rows = [
            [
                row.type,
                str(row.n),
                str(row.threads),
                f"{row.ns_per_weight:.4f}",
                f"{row.gb_per_s:.1f}",
                "–" if row.share_of_bandwidth is None else f"{100 * row.share_of_bandwidth:.0f} %",
                f"{row.ggml_ns_per_weight:.4f}",
                f"{row.ratio_to_ggml:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})",
            ]
            for row in self.types
        ]
        table = markdown_table([*header, "times ggml (quartiles)"], rows)
        read = ", ".join(f"{value:.1f} GB/s on {n}" for n, value in self.bandwidth.items())
        return f"{table}\n\nInstructions: {self.isa}. Memory: {read} threads."


def bench_types(
    names: Sequence[str],
    threads: Sequence[int],
    *,
    tokens: Sequence[int] = (1,),
    mebibytes: int = 96,
    repetitions: int = 9,
    steps: Steps,
) -> TypesBench:
    """Time the products of types.

    Parameters
    ----------
    names : of ggml's types; empty: all
    threads : numbers of threads
    tokens : numbers of tokens of a product
    mebibytes : of a weight; more than the last cache has
    repetitions : samples of each

    Raises
    ------
    EvaluationError
        An unknown type, or a count below 1.
    RuntimeLibraryError
        llama.cpp cannot be loaded.
    """
    types = [_type(name) for name in names] or list(TYPES)
    if min(*threads, *tokens, mebibytes, repetitions) < 1:
        raise EvaluationError("bench: threads, tokens, size and repetitions are at least 1 each.")
    with steps.step("memory"):
        bandwidth = {n: _bandwidth(n, repetitions) for n in dict.fromkeys(threads)}
    rows = []
    combinations = [(q, n, t) for q in types for n in tokens for t in threads]
    with steps.step("bench types") as progress:
        for i, (qtype, n, n_threads) in enumerate(combinations):
            rows.append(_bench_type(qtype, n, n_threads, mebibytes, repetitions, bandwidth))
            if progress is not None:
                progress(i + 1, len(combinations))
    return TypesBench(chosen().name, bandwidth, tuple(rows))


def _type(name: str) -> GGMLQuantizationType:
    known = {qtype.name: qtype for qtype in TYPES}
    if name.upper() not in known:
        raise EvaluationError(f"--types: unknown type {name!r}; known: {', '.join(known)}.")
    return known[name.upper()]


def _bandwidth(n_threads: int, repetitions: int) -> float:
    reader = Reader(_READ_BYTES, n_threads)
    return reader.n_bytes / statistics.median(_samples([reader.run], repetitions)[0]) / 1e9


@functools.cache
def _encoded(qtype: GGMLQuantizationType) -> np.ndarray[Any, np.dtype[np.uint8]]:
    weight = np.random.default_rng(0).normal(size=(_ROWS_ENCODED, _N_IN)).astype(np.float32)
    return encode(weight * np.float32(0.02), qtype, np.ones((1, _N_IN), np.float32))


def _bench_type(
    qtype: GGMLQuantizationType,
    n: int,
    n_threads: int,
    mebibytes: int,
    repetitions: int,
    bandwidth: dict[int, float],
) -> TypeSpeed:
    few = _encoded(qtype)
    copies = -(-(mebibytes << 20) // few.nbytes)
    if n > 1:
        copies = max(1, copies // 8)  # arithmetic counts there, not memory
    packed = np.tile(few, (copies, 1))
    tiles = rearrange(qtype, few, chosen())
    data = _repeated(tiles, copies)
    weight = replace(tiles, n_out=len(packed), data=data)
    repeats = _REPEATS if n_threads > 1 and n == 1 else 1
    ours = Product(weight, n, n_threads, repeats=repeats)
    ours.inputs[:] = np.random.default_rng(1).normal(size=ours.inputs.shape)
    with RuntimeProduct(packed, qtype, _N_IN, n, n_threads, repeats=repeats) as theirs:
        theirs(ours.inputs)
        mine, other = _samples([ours.run, theirs.run], repetitions)
    n_weights = len(packed) * _N_IN * repeats
    ratios = sorted(b / a for a, b in zip(mine, other, strict=True))
    quarter = len(ratios) // 4
    seconds, ggml = statistics.median(mine), statistics.median(other)
    speed = data.nbytes * repeats / seconds / 1e9
    block, size = GGML_QUANT_SIZES[qtype]
    return TypeSpeed(
        type=qtype.name,
        n=n,
        threads=n_threads,
        ns_per_weight=1e9 * seconds / n_weights / n,
        gb_per_s=speed,
        share_of_bandwidth=speed / bandwidth[n_threads] if n == 1 else None,
        ggml_ns_per_weight=1e9 * ggml / n_weights / n,
        ggml_gb_per_s=packed.nbytes * repeats / ggml / 1e9,
        ratio_to_ggml=ggml / seconds,
        ratio_low=ratios[quarter],
        ratio_high=ratios[-1 - quarter],
        bpw=tiles.layout.bpw,
        file_bpw=8 * size / block,
    )


def _repeated(tiles: Tiles, copies: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the tiles' data several times, beginning at a multiple of 64 bytes."""
    whole = aligned_bytes(tiles.data.nbytes * copies).view(np.uint8)
    repeated = whole.reshape(copies * len(tiles.data), -1)
    repeated.reshape(copies, *tiles.data.shape)[:] = tiles.data
    return repeated


def _samples(runs: Sequence[Callable[[], None]], repetitions: int) -> list[list[float]]:
    """Return seconds of every run, taken in turn; a first round is not counted."""
    seconds: list[list[float]] = [[] for _ in runs]
    for repetition in range(repetitions + 1):
        for run, spent in zip(runs, seconds, strict=True):
            time.sleep(_PAUSE)
            started = time.perf_counter()
            run()
            if repetition:
                spent.append(time.perf_counter() - started)
    return seconds


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
            "schema": SCHEMA,
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
            time.sleep(_PAUSE)
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


def write_speeds(found: TypesBench, path: Path) -> None:
    """Write ``speeds.json``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found.as_json(), indent=1) + "\n", "utf-8")
