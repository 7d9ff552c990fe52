"""Which family multiplies a type on this machine: the one that is asked for, or the faster one.

Whether integer products or lookups are faster is a property of the machine. It is timed once for a
type, for some 0.1 s, and kept beside numba's compiled kernels, apart for every CPU, instruction
set, version and number of threads: for one token, on weights that no cache near the CPU holds, and
for many tokens of ternary types, where lookups are ``streams``.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from gguf.constants import GGMLQuantizationType

from cpu_kernels._numba import cache_folder
from cpu_kernels.block_formats import FORMATS, Fields
from cpu_kernels.block_formats_bits import Bytes
from cpu_kernels.isa import chosen
from cpu_kernels.lookup_tiles import (
    LookupLayout,
    LookupTiles,
    lookup_layout_of,
    lookup_shape,
    rearrange_for_lookup,
)
from cpu_kernels.products import Product, Weight, multiply
from cpu_kernels.simd import source_digest
from cpu_kernels.streams import TOKENS, may_stream
from cpu_kernels.tiles import Tiles, aligned_bytes, layout_of, rearrange, tile_shape

VARIABLE = "EDGEQ_KERNELS"
DOT, LOOKUP, AUTO = "dot", "lookup", "auto"
STREAM = "stream"  # dot, with tables over tokens where there are many
# Lookups must be faster by more than the noise: prompts are slower with them
_MARGIN = 1.05
_TIMED_BYTES = 32 << 20
_TIMED_COLUMNS = 4096
_TIMED_ROWS = 2048  # of many tokens, whose time does not depend on the memory
_SAMPLES = 9
_VERSION = source_digest(
    "tiles.py", "inputs.py", "products.py", "lookup_tiles.py", "lookup.py", "streams.py"
)


def wanted() -> str:
    """Return what ``EDGEQ_KERNELS`` asks for: dot, lookup (where there is one) or auto.

    Raises
    ------
    ValueError
        It is none of them.
    """
    found = os.environ.get(VARIABLE) or AUTO
    if found not in (DOT, LOOKUP, AUTO):
        raise ValueError(f"{VARIABLE}: got {found!r}, expected dot, lookup or auto. Unset it.")
    return found


def family_of(qtype: GGMLQuantizationType, n_threads: int, n: int = 1) -> str:
    """Return the family that multiplies a type with n tokens: "dot", "lookup" or "stream".

    What multiplies one token decides how weights are stored; where that is dot, whole vectors of
    tokens may be streamed.

    Raises
    ------
    ValueError
        ``EDGEQ_KERNELS`` is no family.
    """
    wish, layout = wanted(), lookup_layout_of(qtype, chosen())
    if wish == DOT or layout is None:
        return DOT
    if wish == LOOKUP or _is_faster(qtype, layout, n_threads):
        return LOOKUP
    is_tried = n >= TOKENS and may_stream(layout_of(qtype, chosen()))
    return STREAM if is_tried and _is_faster(qtype, None, n_threads) else DOT


def _lookup(qtype: GGMLQuantizationType, n_threads: int) -> LookupLayout | None:
    return lookup_layout_of(qtype, chosen()) if family_of(qtype, n_threads) == LOOKUP else None


def shape_of(qtype: GGMLQuantizationType, n_out: int, n_in: int, n_threads: int) -> tuple[int, int]:
    """Return the shape of what ``rearranged`` writes, uint8.

    Raises
    ------
    ValueError
        The type has no product.
    """
    layout = _lookup(qtype, n_threads)
    if layout is None:
        return tile_shape(qtype, n_out, n_in, chosen())
    return lookup_shape(layout, n_out, n_in)


def rearranged(
    qtype: GGMLQuantizationType, packed: Bytes, n_threads: int, out: Bytes | None = None
) -> Weight:
    """Rearrange a weight's blocks for the family that multiplies them.

    Parameters
    ----------
    qtype : ggml's type
    packed : (n_out, row_bytes) uint8
    n_threads : that will multiply
    out : where to, (``shape_of``) zeros that begin at a multiple of 64 bytes; else new memory

    Raises
    ------
    ValueError
        The type has no product, the rows are no whole number of blocks, or a scale is not finite.
    """
    layout = _lookup(qtype, n_threads)
    if layout is not None:
        return rearrange_for_lookup(layout, packed, out)
    tiles = rearrange(qtype, packed, chosen(), out)
    return replace(tiles, streams=family_of(qtype, n_threads, TOKENS) == STREAM)


@functools.cache
def _is_faster(qtype: GGMLQuantizationType, layout: LookupLayout | None, n_threads: int) -> bool:
    """Return whether lookups of a layout are faster than dot; without, streams of many tokens."""
    key, family = (qtype.name, LOOKUP) if layout else (f"{qtype.name}, many tokens", STREAM)
    path = _path(n_threads)
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(path.read_text("utf-8")))
    if known.get(key) not in (DOT, family):
        known[key] = family if _gain(qtype, layout, n_threads) > _MARGIN else DOT
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # then it is timed again by the next process
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
            temporary.replace(path)
    return known[key] == family


def _path(n_threads: int) -> Path:
    """Return where the choices of this machine are kept: with numba's compiled kernels."""
    versions = numba.__version__, llvmlite.__version__, _VERSION
    machine = llvm.get_host_cpu_name(), _cpu_model(), chosen().name
    key = hashlib.sha256(repr((machine, versions, n_threads)).encode()).hexdigest()[:16]
    return cache_folder(multiply) / f"families-{key}.json"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line
    return platform.processor()


def _gain(qtype: GGMLQuantizationType, layout: LookupLayout | None, n_threads: int) -> float:
    """Return dot's best time over the other family's median.

    On an idle machine the two are nearly the same. On a busy one dot is chosen: the wrong choice
    is kept on disk, and the wrong lookup costs more.
    """
    weights = _of_one_token(qtype, layout) if layout else _of_many_tokens(qtype)
    products = [Product(one, 1 if layout else TOKENS, n_threads) for one in weights]
    spent: tuple[list[float], list[float]] = [], []
    for _ in range(_SAMPLES):
        for product, own in zip(products, spent, strict=True):
            started = time.perf_counter()
            product.run()
            own.append(time.perf_counter() - started)
    return min(spent[0]) / statistics.median(spent[1])


def _of_one_token(qtype: GGMLQuantizationType, layout: LookupLayout) -> tuple[Weight, Weight]:
    """Return a large weight for products and for lookups."""
    isa = chosen()
    size = int(8 * _TIMED_BYTES / layout.bpw / _TIMED_COLUMNS), _TIMED_COLUMNS
    return (
        Tiles(layout_of(qtype, isa), *size, _memory(tile_shape(qtype, *size, isa))),
        LookupTiles(layout, *size, _memory(lookup_shape(layout, *size))),
    )


def _of_many_tokens(qtype: GGMLQuantizationType) -> tuple[Weight, Weight]:
    """Return a weight of random trits without and with tables over tokens."""
    form, shape = FORMATS[qtype], (_TIMED_ROWS, _TIMED_COLUMNS // FORMATS[qtype].block_size)
    random = np.random.default_rng(0)
    codes = random.integers(0, 3, (_TIMED_ROWS, _TIMED_COLUMNS), np.uint8)
    nothing, ones = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    tiles = rearrange(qtype, form.pack(Fields(ones, nothing, ones, nothing), codes), chosen())
    return tiles, replace(tiles, streams=True)


def _memory(shape: tuple[int, int]) -> Bytes:
    """Return bytes of memory of its own: pages that were never written would all be one."""
    found = aligned_bytes(math.prod(shape)).view(np.uint8).reshape(shape)
    found[:] = 1
    return found
