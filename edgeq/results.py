"""What the commands return: typed values with a JSON form and a form for the terminal."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeq.console import markdown_table
from edgeq.evaluation import Evaluation, Speed, compare
from edgeq.evaluation.speed import Rate
from edgeq.tasks import TaskResult, tasks_table

REPORT_SCHEMA = 1
BENCH_SCHEMA = 1  # of the JSON of edgeq bench
FILES_HEADER = (
    "file",
    "bytes",
    "bpw",
    "KL divergence",
    "perplexity",
    "same top",
    "prefill",
    "decode",
)


@dataclass(frozen=True)
class FileResult:
    """One file, measured.

    Attributes
    ----------
    label : how the table calls it
    size_bytes : of the whole file, or of all its parts
    bpw : bits of the whole file per weight
    evaluation : against the reference; None for the reference itself
    speed : tokens/s on this CPU; None if not measured
    made_by : "edgeq", "llama-quantize", "reference"; None: not known, or by others
    """

    label: str
    path: Path
    size_bytes: int
    bpw: float
    evaluation: Evaluation | None
    speed: Speed | None
    made_by: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; the evaluation with its values of every token."""
        return {
            "label": self.label,
            "path": str(self.path),
            "made_by": self.made_by,
            "size_bytes": self.size_bytes,
            "bpw": self.bpw,
            "evaluation": None if self.evaluation is None else self.evaluation.to_json(),
            "speed": None if self.speed is None else _speed_json(self.speed),
        }


def _speed_json(speed: Speed) -> dict[str, Any]:
    values = dataclasses.asdict(speed)
    return {**values, "path": str(speed.path)}


def files_table(files: Sequence[FileResult]) -> str:
    """Return the table of files: bytes, bpw, divergence, perplexity, agreement and speed."""
    rows = []
    for file in files:
        speed = (None, None) if file.speed is None else (file.speed.prefill, file.speed.decode)
        rows.append(file_row(file.label, file.size_bytes, file.bpw, file.evaluation, *speed))
    return markdown_table(FILES_HEADER, rows)


def file_row(
    label: str,
    size_bytes: int,
    bpw: float,
    judged: Evaluation | None,
    prefill: Rate | None,
    decode: Rate | None,
) -> list[str]:
    """Return one file's row under FILES_HEADER; None: not judged, not timed."""
    figures = ["–", "–", "–"]
    if judged is not None:
        summary = judged.summary
        figures = [
            f"{summary.kld.value:.5f} ± {summary.kld.error:.5f}",
            f"{summary.ppl.value:.3f}",
            f"{100 * summary.same_top.value:.2f} %",
        ]
    speed = [
        "–" if rate is None else f"{rate.median:.{digits}f} t/s"
        for rate, digits in ((prefill, 0), (decode, 1))
    ]
    return [label, f"{size_bytes:,}", f"{bpw:.3f}", *figures, *speed]


def comparisons(files: Sequence[FileResult]) -> list[str]:
    """Return a sentence for every later file: its divergence against the first one's, paired."""
    judged = [file for file in files if file.evaluation is not None]
    sentences = []
    for other in judged[1:]:
        first, second = judged[0].evaluation, other.evaluation
        if first is None or second is None or first.n_chunks < 2:
            continue
        found = compare(first, second)
        sentences.append(
            f"{judged[0].label} − {other.label}: KL divergence {found.difference:+.6f}, "
            f"{100 * found.level:.0f} % interval [{found.low:+.6f}, {found.high:+.6f}], ratio "
            f"{found.ratio:.4f}, over {found.n_chunks} chunks."
        )
    return sentences


@dataclass(frozen=True)
class Measured:
    """Files that were judged, and what must be said about it."""

    files: tuple[FileResult, ...]
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()
    tasks: tuple[TaskResult, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "schema": REPORT_SCHEMA,
            "files": [file.as_json() for file in self.files],
            "comparisons": comparisons(self.files),
            "tasks": [task.as_json() for task in self.tasks],
            "seconds": {name: round(spent, 3) for name, spent in self.seconds.items()},
            "notes": list(self.notes),
        }

    def as_text(self) -> str:
        """Return what a terminal shows."""
        details = [_details(file) for file in self.files if file.evaluation or not self.tasks]
        said = "\n".join([*details, *comparisons(self.files), *self.notes])
        asked = tasks_table(self.tasks) if self.tasks else ""
        return "\n\n".join(part for part in (files_table(self.files), said, asked) if part)


def _details(file: FileResult) -> str:
    if file.evaluation is None:
        return f"{file.label}: not judged"
    s = file.evaluation.summary
    at = s.kld_percentiles
    percentiles = ", ".join(f"{key} {at[key]:.5f}" for key in ("max", "99.9", "99", "90", "50"))
    bound = f" (± {s.kld_bound:.2e} by the stored reference)" if s.kld_bound else ""
    return (
        f"{file.label}: {s.n_tokens} tokens; perplexity {s.ppl.value:.4f} ± {s.ppl.error:.4f}, "
        f"reference {s.ppl_reference.value:.4f}; KL divergence percentiles {percentiles}{bound}; "
        f"Δp mean {100 * s.delta_p.value:+.3f} %, RMS {100 * s.delta_p_rms.value:.3f} %; "
        f"{s.flips} flips, {s.flips_to_wrong} to wrong, {s.flips_to_right} to right"
    )


@dataclass(frozen=True)
class Report:
    """What was done and what came of it; ``report.json``.

    Attributes
    ----------
    provenance : source, texts, recipe, versions
    files : measured files, the output first
    seconds : wall time of each step of this run; reused artefacts cost almost nothing
    notes : what the user should know: fallbacks, reused artefacts, forced choices
    rounding : how tensors were rounded: the method, its verification, facts by tensor and fold
    tensors : name to type, shape, bytes and reason, as in ``plan.json``
    experts : weight name to the inputs that each of its experts saw in calibration
    """

    provenance: Mapping[str, Any]
    files: tuple[FileResult, ...]
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()
    rounding: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Any] = field(default_factory=dict)
    experts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``report.json``."""
        return {
            "schema": REPORT_SCHEMA,
            "provenance": dict(self.provenance),
            "files": [file.as_json() for file in self.files],
            "comparisons": comparisons(self.files),
            "seconds": {name: round(spent, 3) for name, spent in self.seconds.items()},
            "notes": list(self.notes),
            "rounding": dict(self.rounding),
            "tensors": dict(self.tensors),
            "experts": dict(self.experts),
        }

    def as_text(self) -> str:
        """Return the report for a terminal."""
        total = sum(self.seconds.values()) or 1.0
        times = ", ".join(
            f"{name} {spent:.1f} s ({100 * spent / total:.0f} %)"
            for name, spent in self.seconds.items()
        )
        lines = [files_table(self.files), "", *comparisons(self.files), *self.notes]
        return "\n".join([*lines, f"Time: {times}"])


@dataclass(frozen=True)
class Written:
    """Files that a command wrote, and figures about them."""

    paths: tuple[Path, ...]
    figures: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "paths": [str(path) for path in self.paths],
            **self.figures,
            "notes": list(self.notes),
        }

    def as_text(self) -> str:
        """Return what a terminal shows."""
        figures = ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in self.figures.items()
        )
        wrote = ", ".join(str(path) for path in self.paths)
        return "\n".join([f"{wrote}: {figures}", *self.notes])
