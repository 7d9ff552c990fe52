"""The product of every type: time of a weight, share of the memory's speed, ratio to ggml."""

import functools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.output import replacing
from cpu_kernels.bandwidth import Reader
from cpu_kernels.block_formats import FORMATS
from cpu_kernels.isa import chosen
from cpu_kernels.lattice_formats import LATTICES
from cpu_kernels.products import Product
from cpu_kernels.tiles import Tiles, aligned_bytes, rearrange
from edgeq.benchmarks.sampling import samples_of
from edgeq.console import Steps, markdown_table
from edgeq.errors import EvaluationError
from edgeq.results import BENCH_SCHEMA
from edgeq.runtime.encoders import encode
from edgeq.runtime.products import RuntimeProduct

_T = GGMLQuantizationType
TYPES = (*FORMATS, *LATTICES)
_N_IN = 4096
_ROWS_ENCODED = 64  # repeated to the size that is wanted: the time does not depend on the numbers
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
            "schema": BENCH_SCHEMA,
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
    return reader.n_bytes / statistics.median(samples_of([reader.run], repetitions)[0]) / 1e9


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
        mine, other = samples_of([ours.run, theirs.run], repetitions)
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


def write_speeds(found: TypesBench, path: Path) -> None:
    """Write ``speeds.json``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found.as_json(), indent=1) + "\n", "utf-8")
