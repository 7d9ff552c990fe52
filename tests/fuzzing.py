"""Damaged files by the thousand: what may be damaged, and what may come of it.

A surface is a whole file and a function that reads it. A case is that file with seeded damage: bits
turned, bytes changed, cut out, doubled or put in, numbers made extreme, JSON values swapped for
others. Reading may succeed or raise one of our errors. Anything else is a finding: another
exception, more than ``MAX_SECONDS``, or more than ``MAX_BYTES`` of memory.
"""

import json
import random
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as T

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.errors import ConversionError
from converters.gguf_file import open_gguf
from converters.imatrix_file import read_imatrix
from edgeq.allocation.costs import Candidate, Costs, TensorCosts, read_costs, write_costs
from edgeq.allocation.features import NAMES
from edgeq.allocation.plan import plan_of, read_plan
from edgeq.allocation.policy import Policy, read_policy
from edgeq.allocation.speeds import read_speeds
from edgeq.errors import EdgeqError
from edgeq.gate import read_baseline
from edgeq.reporting.page import page
from edgeq.reporting.reading import read_reports
from tests import tiny_gguf, tiny_models
from tests.command_line import done

MAX_SECONDS, MAX_BYTES = 10.0, 1 << 28
_NUMBERS = (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
_VALUES = (
    None,
    True,
    -1,
    0,
    1,
    2**70,
    1e308,
    float("nan"),
    "",
    "x" * 1000,
    [],
    {},
    [[]],
    "../../x",
)


@dataclass(frozen=True)
class Surface:
    """One kind of input.

    Attributes
    ----------
    name : of it
    path : the file that is damaged; it is written anew for every case
    read : reads it
    is_json : damaged as JSON values half of the time
    """

    name: str
    path: Path
    read: Callable[[], object]
    is_json: bool = False


@dataclass(frozen=True)
class Finding:
    """A case that ended as none may: surface, seed and what happened."""

    surface: str
    seed: int
    what: str


def surfaces(directory: Path) -> list[Surface]:
    """Write a good file of every kind and return the surfaces."""
    gguf = tiny_gguf.write(directory / "model.gguf", "llama")
    checkpoint = tiny_models.build("smollm2", directory).directory
    imatrix = directory / "imatrix.gguf"
    shutil.copy(Path(__file__).parent / "data" / "golden_imatrix.gguf", imatrix)
    legacy = directory / "imatrix.dat"
    shutil.copy(Path(__file__).parent / "data" / "golden_imatrix.dat", legacy)
    whole = open_gguf(gguf)
    types = {name: tensor.qtype for name, tensor in whole.tensors.items()}
    plan = directory / "plan.json"
    plan_of(whole, "Q4_K_M", types, dict.fromkeys(types, "by hand")).write(plan)
    speeds = directory / "speeds.json"
    row = {"type": "Q4_0", "n": 1, "threads": 1, "ggml_ns_per_weight": 0.1}
    speeds.write_text(json.dumps({"types": [row]}))
    costs, policy = directory / "costs.json", directory / "policy.safetensors"
    candidates = (Candidate(T.Q4_0, 100, 1.0, 0.1, 1e-3), Candidate(T.Q8_0, 200, 0.5))
    tensors = (TensorCosts("blk.0.ffn_up.weight", (256, 256), candidates),)
    write_costs(Costs("0" * 64, "weight", "rtn", 10, 4, tensors, ((1.0, 0.9),)), costs)
    layer = np.ones((1, len(NAMES)), np.float32), np.zeros(1, np.float32)
    Policy((layer,), "a test").write(policy)
    (weights,) = checkpoint.glob("*.safetensors")

    report = _report(gguf, directory)

    def read_report() -> object:
        read_baseline(report)
        return page(*read_reports([report]))

    def read_all() -> object:
        file = open_gguf(gguf)
        return [file.read_float(name) for name in file.tensors]

    def convert_all() -> object:
        out = directory / "converted.gguf"
        convert(open_checkpoint(checkpoint), out, ftype="f16")
        return open_gguf(out)

    return [
        Surface("gguf", gguf, read_all),
        Surface("safetensors", weights, convert_all),
        Surface("config.json", checkpoint / "config.json", convert_all, is_json=True),
        Surface("tokenizer.json", checkpoint / "tokenizer.json", convert_all, is_json=True),
        Surface("imatrix", imatrix, lambda: read_imatrix(imatrix)),
        Surface("imatrix.dat", legacy, lambda: read_imatrix(legacy)),
        Surface("plan.json", plan, lambda: read_plan(plan, whole), is_json=True),
        Surface("costs.json", costs, lambda: read_costs(costs), is_json=True),
        Surface("policy", policy, lambda: read_policy(policy)),
        Surface("report.json", report, read_report, is_json=True),
        Surface("speeds.json", speeds, lambda: read_speeds(speeds), is_json=True),
    ]


def damaged(data: bytes, is_json: bool, seed: int) -> bytes:
    """Return a file with seeded damage."""
    chance = random.Random(seed)
    if is_json and chance.random() < 0.5:
        value = json.loads(data)
        for _ in range(chance.randint(1, 3)):
            value = _other_json(value, chance)
        return json.dumps(value).encode()
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        # headers matter most: half of the damage falls on the first kilobyte
        reach = len(changed) if chance.random() < 0.5 else min(1024, len(changed))
        at = chance.randrange(max(1, reach))
        kind = chance.randrange(6)
        if not changed:
            break
        if kind == 0:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at] = chance.randrange(256)
        elif kind == 2:
            del changed[at : at + chance.choice((1, 4, 64, 4096))]
        elif kind == 3:
            changed[at:at] = changed[at : at + chance.choice((1, 8, 64))]
        elif kind == 4:
            number = struct.pack("<Q", chance.choice(_NUMBERS) & (2**64 - 1))
            size = chance.choice((4, 8))
            changed[at : at + size] = number[:size]
        else:
            del changed[at:]
    return bytes(changed)


def _report(gguf: Path, directory: Path) -> Path:
    """Export the model and return the report of it."""
    text, out = directory / "text.txt", directory / "quantized.gguf"
    text.write_text(tiny_gguf.text(1, 3000), "utf-8")
    flags = ("--type", "Q4_0", "--quantizer", "rtn", "--ctx", 64, "--chunks", 4)
    done("export", gguf, out, "--text", text, *flags, "--eval-chunks", 2)
    return out.with_suffix(".edgeq") / "report.json"


def _other_json(value: object, chance: random.Random) -> object:
    """Return JSON with one value, somewhere, replaced, left out or named otherwise."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        copy = dict(value)
        kind = chance.random()
        if kind < 0.15:
            del copy[key]
        elif kind < 0.25:
            copy[f"{key}x"] = copy.pop(key)
        else:
            copy[key] = _other_json(copy[key], chance)
        return copy
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], _other_json(value[at], chance), *value[at + 1 :]]
    return chance.choice(_VALUES)


def run(surface: Surface, good: bytes, seed: int) -> Finding | None:
    """Read one damaged file; return what is wrong with how that ended."""
    surface.path.write_bytes(damaged(good, surface.is_json, seed))
    started = time.perf_counter()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0
    what = ""
    try:
        with np.errstate(all="ignore"):
            surface.read()
    except (ConversionError, EdgeqError) as error:
        if "\n" in str(error) or len(str(error)) > 2000:
            what = f"no single line: {str(error)[:300]!r}"
    except Exception as error:  # noqa: BLE001  findings are whatever else there is
        what = f"{type(error).__name__}: {str(error)[:300]}"
    peak = tracemalloc.get_traced_memory()[1] - before if tracemalloc.is_tracing() else 0
    if not what and time.perf_counter() - started > MAX_SECONDS:
        what = f"{time.perf_counter() - started:.1f} s"
    if not what and peak > MAX_BYTES:
        what = f"{peak:,} bytes of memory"
    return Finding(surface.name, seed, what) if what else None
