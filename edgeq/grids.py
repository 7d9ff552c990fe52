"""Tensors that lie on the grid of a type already, as quantization-aware training leaves them.

Rounding to nearest, without importances, gives such a tensor back; nothing else can be better.
"""

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.gguf_file import GgufFile
from converters.gguf_header import FLOATS
from edgeq.allocation import Plan
from edgeq.runtime.encoders import Packed, decode, encode

GRIDS = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0, GGMLQuantizationType.TQ2_0)
KEPT = "kept"  # key of a tensor's facts
_SAMPLED_ROWS = 8


def lies_on_grid(
    file: GgufFile, name: str, qtype: GGMLQuantizationType, *, n_threads: int | None = None
) -> bool:
    """Return whether a float tensor is what the blocks of a type decode to, in its own precision.

    A few rows are looked at first, then all. False for a type that is none of ``GRIDS``.
    """
    info = file.tensors[name]
    if qtype not in GRIDS or info.qtype not in FLOATS or len(info.shape) < 2:
        return False
    if info.shape[-1] % GGML_QUANT_SIZES[qtype][0]:
        return False
    rows = file.read_bytes(name)
    rows = rows.reshape(-1, rows.shape[-1])
    step = math.ceil(len(rows) / _SAMPLED_ROWS)
    return all(
        _is_reproduced(np.ascontiguousarray(some), name, info.qtype, qtype, n_threads)
        for some in (rows[::step], rows)
    ) and bool(rows.any())


def _is_reproduced(
    rows: Packed,
    name: str,
    stored: GGMLQuantizationType,
    qtype: GGMLQuantizationType,
    n_threads: int | None,
) -> bool:
    values = decode(rows, stored, n_threads=n_threads)
    nearest = decode(encode(values, qtype, n_threads=n_threads, name=name), qtype)
    if stored != GGMLQuantizationType.F32:  # products of codes and scales were rounded once more
        nearest = decode(encode(nearest, stored, name=name), stored)
    return bool(np.array_equal(nearest, values))


def reason(qtype: GGMLQuantizationType) -> str:
    """Return why a tensor on the grid of its type is left alone."""
    return f"lies on the grid of {qtype.name}, kept without loss"


def notes(file: GgufFile, plan: Plan, facts: Mapping[str, Mapping[str, float | str]]) -> list[str]:
    """Return what the user should know: what was kept, and what another type would keep.

    Parameters
    ----------
    facts : tensor name to what is told about its rounding
    """
    kept = Counter(str(fact[KEPT]) for fact in facts.values() if KEPT in fact)
    told = [f"{n} of the tensors: {what}." for what, n in kept.items()]
    missed: Counter[str] = Counter()
    for entry in plan.entries:
        if entry.qtype not in (*GRIDS, file.tensors[entry.name].qtype):
            missed.update(q.name for q in GRIDS if lies_on_grid(file, entry.name, q))
    told += [
        f"{n} of the tensors lie on the grid of {name} and get another type here: --type {name} "
        "keeps them without loss."
        for name, n in missed.items()
    ]
    return told
