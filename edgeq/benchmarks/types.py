"""The product of every type: time of a weight, share of the memory's speed, ratio to ggml.

Sherry's weights, no type of ggml's, stand beside ggml's TQ1_0: the smallest ternary type it has.
"""

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
from cpu_kernels import sherry
from cpu_kernels.bandwidth import Reader
from cpu_kernels.block_formats import FORMATS
from cpu_kernels.choice import DOT, LOOKUP, STREAM, family_of
from cpu_kernels.isa import chosen
from cpu_kernels.lattice_formats import LATTICES
from cpu_kernels.lookup_tiles import lookup_layout_of, rearrange_for_lookup
from cpu_kernels.products import Product, Weight
from cpu_kernels.streams import TOKENS, may_stream
from cpu_kernels.tiles import aligned_bytes, rearrange
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
    family : of the kernel that multiplies this type on this machine: dot, lookup or stream
    dot_ns_per_weight, lookup_ns_per_weight, stream_ns_per_weight : of all families; None where
        there is none
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
    family: str
    dot_ns_per_weight: float | None
    lookup_ns_per_weight: float | None
    stream_ns_per_weight: float | None
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

    @property
    def of_families(self) -> tuple[float | None, float | None, float | None]:
        """Nanoseconds a weight with dot, with lookup and with stream."""
        return self.dot_ns_per_weight, self.lookup_ns_per_weight, self.stream_ns_per_weight


@dataclass(frozen=True)
class TypesBench:
    """All types, measured.

    Attributes
    ----------
    isa : name of the instruction set
    bandwidth : GB/s read from memory, by number of threads
    types : rows of ggml's types
    sherry : rows of Sherry's weights, beside ggml's TQ1_0
    """

    isa: str
    bandwidth: dict[int, float]
    types: tuple[TypeSpeed, ...]
    sherry: tuple[TypeSpeed, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; ``speeds.json`` is made of them."""
        return {
            "schema": BENCH_SCHEMA,
            "isa": self.isa,
            "bandwidth_gb_per_s": {str(n): value for n, value in self.bandwidth.items()},
            "types": [asdict(row) for row in self.types],
            "sherry": [asdict(row) for row in self.sherry],
        }

    def as_text(self) -> str:
        """Return what a terminal shows."""
        header = ["type", "tokens", "threads", "family", "dot ns/weight", "lookup ns/weight"]
        header += [
            "stream ns/weight",
            "GB/s",
            "of memory",
            "ggml ns/weight",
            "times ggml (quartiles)",
        ]
        rows = [
            [
                row.type,
                str(row.n),
                str(row.threads),
                row.family,
                *("–" if one is None else f"{one:.4f}" for one in row.of_families),
                f"{row.gb_per_s:.1f}",
                "–" if row.share_of_bandwidth is None else f"{100 * row.share_of_bandwidth:.0f} %",
                f"{row.ggml_ns_per_weight:.4f}",
                f"{row.ratio_to_ggml:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})",
            ]
            for row in (*self.types, *self.sherry)
        ]
        table = markdown_table(header, rows)
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
    names : of ggml's types, or SHERRY; empty: all
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
    known = {**{qtype.name: qtype for qtype in TYPES}, sherry.NAME: _T.TQ1_0}
    types = {name: _type(name, known) for name in map(str.upper, names or known)}
    if min(*threads, *tokens, mebibytes, repetitions) < 1:
        raise EvaluationError("bench: threads, tokens, size and repetitions are at least 1 each.")
    with steps.step("memory"):
        bandwidth = {n: _bandwidth(n, repetitions) for n in dict.fromkeys(threads)}
    rows = []
    combinations = [(name, n, t) for name in types for n in tokens for t in threads]
    with steps.step("bench types") as progress:
        for i, (name, n, n_threads) in enumerate(combinations):
            made = _made(name, types[name], n, n_threads)
            rows.append(_bench_type(name, made, n, n_threads, mebibytes, repetitions, bandwidth))
            if progress is not None:
                progress(i + 1, len(combinations))
    own = tuple(row for row in rows if row.type == sherry.NAME)
    ggmls = tuple(row for row in rows if row.type != sherry.NAME)
    return TypesBench(chosen().name, bandwidth, ggmls, own)


def _type(name: str, known: dict[str, GGMLQuantizationType]) -> GGMLQuantizationType:
    if name not in known:
        raise EvaluationError(f"--types: unknown type {name!r}; known: {', '.join(known)}.")
    return known[name]


def _bandwidth(n_threads: int, repetitions: int) -> float:
    reader = Reader(_READ_BYTES, n_threads)
    return reader.n_bytes / statistics.median(samples_of([reader.run], repetitions)[0]) / 1e9


@dataclass(frozen=True)
class _Made:
    """A few rows of a weight: as ggml has them, and as our families do."""

    qtype: GGMLQuantizationType
    packed: np.ndarray[Any, np.dtype[np.uint8]]
    families: dict[str, Weight]
    family: str
    file_bpw: float


def _made(name: str, qtype: GGMLQuantizationType, n: int, n_threads: int) -> _Made:
    packed = _encoded(qtype)
    if name == sherry.NAME:
        own = sherry.rearrange(sherry.encode(_weight()), chosen())
        bits = 8 * sherry.TYPE_SIZE / sherry.BLOCK_SIZE
        return _Made(qtype, packed, {LOOKUP: own}, LOOKUP, bits)
    tiles = rearrange(qtype, packed, chosen())
    families: dict[str, Weight] = {DOT: tiles}
    layout = lookup_layout_of(qtype, chosen())
    if layout is not None:
        families[LOOKUP] = rearrange_for_lookup(layout, packed)
    if n >= TOKENS and may_stream(tiles.layout):
        families[STREAM] = replace(tiles, streams=True)
    block, size = GGML_QUANT_SIZES[qtype]
    return _Made(qtype, packed, families, family_of(qtype, n_threads, n), 8 * size / block)


def _weight() -> np.ndarray[Any, np.dtype[np.float32]]:
    weight = np.random.default_rng(0).normal(size=(_ROWS_ENCODED, _N_IN)).astype(np.float32)
    return weight * np.float32(0.02)


@functools.cache
def _encoded(qtype: GGMLQuantizationType) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return encode(_weight(), qtype, np.ones((1, _N_IN), np.float32))


def _bench_type(
    name: str,
    made: _Made,
    n: int,
    n_threads: int,
    mebibytes: int,
    repetitions: int,
    bandwidth: dict[int, float],
) -> TypeSpeed:
    copies = -(-(mebibytes << 20) // made.packed.nbytes)
    if n > 1:
        copies = max(1, copies // 8)  # arithmetic counts there, not memory
    packed = np.tile(made.packed, (copies, 1))
    repeats = _REPEATS if n_threads > 1 and n == 1 else 1
    ours = {}
    for family, few in made.families.items():
        weight = replace(few, n_out=len(packed), data=_repeated(few, copies))
        ours[family] = Product(weight, n, n_threads, repeats=repeats)
        ours[family].inputs[:] = np.random.default_rng(1).normal(size=ours[family].inputs.shape)
    weight = ours[made.family].tiles
    with RuntimeProduct(packed, made.qtype, _N_IN, n, n_threads, repeats=repeats) as theirs:
        theirs(ours[made.family].inputs)
        runs = [product.run for product in ours.values()]
        *mine, other = samples_of([*runs, theirs.run], repetitions)
    samples = dict(zip(ours, mine, strict=True))
    n_weights = len(packed) * _N_IN * repeats
    ratios = sorted(b / a for a, b in zip(samples[made.family], other, strict=True))
    quarter = len(ratios) // 4
    found = {family: statistics.median(spent) for family, spent in samples.items()}
    ns = {family: 1e9 * seconds / n_weights / n for family, seconds in found.items()}
    seconds, ggml = found[made.family], statistics.median(other)
    speed = weight.data.nbytes * repeats / seconds / 1e9
    return TypeSpeed(
        type=name,
        n=n,
        threads=n_threads,
        family=made.family,
        dot_ns_per_weight=ns.get(DOT),
        lookup_ns_per_weight=ns.get(LOOKUP),
        stream_ns_per_weight=ns.get(STREAM),
        ns_per_weight=ns[made.family],
        gb_per_s=speed,
        share_of_bandwidth=speed / bandwidth[n_threads] if n == 1 else None,
        ggml_ns_per_weight=1e9 * ggml / n_weights / n,
        ggml_gb_per_s=packed.nbytes * repeats / ggml / 1e9,
        ratio_to_ggml=ggml / seconds,
        ratio_low=ratios[quarter],
        ratio_high=ratios[-1 - quarter],
        bpw=weight.layout.bpw,
        file_bpw=made.file_bpw,
    )


def _repeated(tiles: Weight, copies: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the tiles' data several times, beginning at a multiple of 64 bytes."""
    whole = aligned_bytes(tiles.data.nbytes * copies).view(np.uint8)
    repeated = whole.reshape(copies * len(tiles.data), -1)
    repeated.reshape(copies, *tiles.data.shape)[:] = tiles.data
    return repeated


def write_speeds(found: TypesBench, path: Path) -> None:
    """Write ``speeds.json``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found.as_json(), indent=1) + "\n", "utf-8")
