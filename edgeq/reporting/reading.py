"""What the report shows, read from JSON files and checked: nothing later can fail on them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.errors import EvaluationError
from edgeq.evaluation import Evaluation
from edgeq.evaluation.speed import Rate
from edgeq.results import BENCH_SCHEMA, REPORT_SCHEMA

_EXPECTED = "expected what edgeq export, evaluate --json or bench FILE --json wrote"
_DAMAGED = (LookupError, TypeError, ValueError, AttributeError, OverflowError)
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True, eq=False)
class SavedFile:
    """One file of a report.

    Attributes
    ----------
    label : how tables call it
    path : where it was
    made_by : "edgeq", "llama-quantize", "reference" or ""
    evaluation : against the reference; None: not judged
    prefill, decode : None: not timed
    """

    label: str
    path: str
    made_by: str
    size_bytes: int
    bpw: float
    evaluation: Evaluation | None
    prefill: Rate | None
    decode: Rate | None


@dataclass(frozen=True)
class SavedTensor:
    """One tensor of the plan and how it was rounded.

    Attributes
    ----------
    loss, loss_rtn : of its rounding, and what round-to-nearest would have; None: not measured
    note : why it was rounded in another way than asked
    """

    name: str
    qtype: str
    shape: tuple[int, ...]
    size_bytes: int
    reason: str
    loss: float | None
    loss_rtn: float | None
    note: str

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.size_bytes / math.prod(self.shape)

    @property
    def layer(self) -> int | None:
        """The number of its layer; None: it is in none."""
        match = _LAYER.fullmatch(self.name)
        return int(match[1]) if match else None

    @property
    def role(self) -> str:
        """Its name within a layer, without ``.weight``."""
        match = _LAYER.fullmatch(self.name)
        return (match[2] if match else self.name).removesuffix(".weight")


@dataclass(frozen=True)
class SavedTask:
    """One task asked to one file: table cells that are known already."""

    name: str
    label: str
    n_items: int
    accuracy: tuple[float, float, float]
    reference: tuple[float, float, float] | None
    to_wrong: int
    to_right: int
    agreement: float
    p_value: float
    same_text: float | None


@dataclass(frozen=True, eq=False)
class SavedReport:
    """One report.

    Attributes
    ----------
    provenance : as ``edgeq.provenance.describe`` wrote it; empty for ``evaluate``
    experts : weight name to the inputs that each expert saw
    """

    path: Path
    files: tuple[SavedFile, ...]
    tensors: tuple[SavedTensor, ...]
    experts: Mapping[str, tuple[int, ...]]
    tasks: tuple[SavedTask, ...]
    comparisons: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    provenance: Mapping[str, Any]

    def told(self, *keys: str) -> Any:
        """Return a value of the provenance; None where it is not there."""
        value: Any = self.provenance
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def output(self) -> SavedFile:
        """The file that the report is about: the first."""
        return self.files[0]

    @property
    def model(self) -> str:
        """What the source is called."""
        name = self.told("model", "name") or self.told("source", "name")
        return str(name or Path(self.output.path).stem)


@dataclass(frozen=True)
class SavedRun:
    """A row of ``edgeq bench FILE --json``."""

    backend: str
    threads: int
    prefill: Rate
    decode: Rate


@dataclass(frozen=True)
class SavedBench:
    """What ``edgeq bench FILE --json`` printed."""

    path: Path
    file: str
    runs: tuple[SavedRun, ...]


def read_reports(paths: Sequence[Path]) -> tuple[list[SavedReport], list[SavedBench]]:
    """Read reports of ``export`` and ``evaluate --json``, and speeds of ``bench --json``.

    Raises
    ------
    EvaluationError
        A file is missing, none of these, of another schema or damaged; or there is no report.
    """
    reports, benches = [], []
    for path in paths:
        values = _json(path)
        is_bench = isinstance(values.get("runs"), list)
        if not is_bench and not isinstance(values.get("files"), list):
            raise EvaluationError(f"{path}: is not a report; {_EXPECTED}.")
        schema = BENCH_SCHEMA if is_bench else REPORT_SCHEMA
        if values.get("schema") != schema:
            raise EvaluationError(
                f"{path}: got a report of schema {values.get('schema')!r:.40}, expected {schema}. "
                "Make it again with this edgeq."
            )
        try:
            if is_bench:
                benches.append(_bench(path, values))
            else:
                reports.append(_report(path, values))
        except (EvaluationError, *_DAMAGED) as error:
            raise EvaluationError(
                f"{path}: is not a whole report ({error}); {_EXPECTED}."
            ) from error
    if not reports:
        raise EvaluationError(f"{paths[0]}: holds speeds alone; {_EXPECTED}, a report among them.")
    return reports, benches


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be read: {error.strerror}. Give a report.json."
        ) from error
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: is not JSON ({error}); {_EXPECTED}.") from error
    if not isinstance(values, dict):
        raise EvaluationError(f"{path}: is not a report; {_EXPECTED}.")
    return values


def _report(path: Path, values: Mapping[str, Any]) -> SavedReport:
    files = tuple(_file(each) for each in values["files"])
    if not files:
        raise ValueError("no file in it")
    facts = _mapping(_mapping(values.get("rounding", {})).get("tensors", {}))
    experts = _mapping(values.get("experts", {}))
    return SavedReport(
        path=path,
        files=files,
        tensors=tuple(
            _tensor(name, each, _mapping(facts.get(name, {})))
            for name, each in _mapping(values.get("tensors", {})).items()
        ),
        experts={name: tuple(map(_count, counts)) for name, counts in experts.items() if counts},
        tasks=tuple(_task(each) for each in values.get("tasks", ())),
        comparisons=tuple(map(str, values.get("comparisons", ()))),
        notes=tuple(map(str, values.get("notes", ()))),
        seconds={k: _number(v) for k, v in _mapping(values.get("seconds", {})).items()},
        provenance=_mapping(values.get("provenance", {})),
    )


def _file(values: Mapping[str, Any]) -> SavedFile:
    label = str(values["label"])
    speed = values.get("speed")
    return SavedFile(
        label=label,
        path=str(values["path"]),
        made_by=str(values.get("made_by") or _maker(label)),
        size_bytes=_count(values["size_bytes"]),
        bpw=_number(values["bpw"]),
        evaluation=_evaluation(values.get("evaluation")),
        prefill=None if speed is None else _rate(speed["prefill"]),
        decode=None if speed is None else _rate(speed["decode"]),
    )


def _maker(label: str) -> str:
    """Return who made a file, by how export labels it: early reports do not say it."""
    known = {"edgeq": "edgeq", "llama-quantize": "llama-quantize", "float": "reference"}
    return known.get(label.split(" ")[0], "")


def _evaluation(values: Mapping[str, Any] | None) -> Evaluation | None:
    if values is None:
        return None
    found = Evaluation.from_json(values)
    arrays = (found.kld, found.nll, found.nll_reference, found.delta_p)
    if found.kld.size == 0 or not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("an evaluation without tokens, or with NaN or infinite values")
    with np.errstate(over="ignore", invalid="ignore"):
        summary = found.summary  # kept by the evaluation
    for each in (summary.kld, summary.ppl, summary.ppl_reference):
        if not (math.isfinite(each.value) and math.isfinite(each.error)):
            raise ValueError("an evaluation whose means are not finite")
    return found


def _tensor(name: str, values: Mapping[str, Any], facts: Mapping[str, Any]) -> SavedTensor:
    shape = tuple(map(_count, values["shape"]))
    if not shape or 0 in shape:
        raise ValueError(f"{name}: shape {list(shape)}")
    loss, loss_rtn = facts.get("loss"), facts.get("loss_rtn")
    return SavedTensor(
        name=name,
        qtype=str(values["type"]),
        shape=shape,
        size_bytes=_count(values["bytes"]),
        reason=str(values["reason"]),
        loss=None if loss is None else _number(loss),
        loss_rtn=None if loss_rtn is None else _number(loss_rtn),
        note=str(facts.get("kept") or facts.get("fallback", "")),
    )


def _task(values: Mapping[str, Any]) -> SavedTask:
    reference, against = values.get("reference"), values.get("comparison")
    known = None if reference is None or against is None else against
    texts = None if known is None else known.get("texts")  # None: nothing was written
    return SavedTask(
        name=Path(str(values["task"])).name,
        label=str(values["file"]),
        n_items=_count(values["n_items"]),
        accuracy=_share(values["accuracy"]),
        reference=None if reference is None else _share(reference["accuracy"]),
        to_wrong=0 if known is None else _count(known["to_wrong"]),
        to_right=0 if known is None else _count(known["to_right"]),
        agreement=1.0 if known is None else _share(known["agreement"])[0],
        p_value=1.0 if known is None else _number(known["p_value"]),
        same_text=None if texts is None else _share(texts["same"])[0],
    )


def _bench(path: Path, values: Mapping[str, Any]) -> SavedBench:
    runs = tuple(
        SavedRun(
            str(run["backend"]),
            _count(run["threads"]),
            _rate(run["prefill"]),
            _rate(run["decode"]),
        )
        for run in values["runs"]
    )
    return SavedBench(path, str(values["file"]), runs)


def _rate(values: Mapping[str, Any]) -> Rate:
    median, low, high = (_number(values[key]) for key in ("median", "low", "high"))
    if not 0 <= low <= median <= high:
        raise ValueError(f"got speeds from {low} to {high} of median {median}")
    return Rate(median, low, high)


def _share(values: Mapping[str, Any]) -> tuple[float, float, float]:
    return _number(values["value"]), _number(values["low"]), _number(values["high"])


def _mapping(values: Any) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise TypeError(f"got {values!r:.40}, expected an object")
    return values


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"got {value!r:.40}, expected a number")
    return float(value)


def _count(value: Any) -> int:
    number = _number(value)
    if number < 0 or number != int(number):
        raise ValueError(f"got {value!r:.40}, expected a whole number from 0")
    return int(number)
