"""The regression gate: whether a new file is worse than the one that a report was written for.

The new file is judged on the report's own tokens against the report's own reference, so that both
are compared chunk by chunk: what is hard for one is hard for the other.
"""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from converters.errors import ConversionError
from converters.gguf_file import open_gguf
from converters.output import replacing
from edgeq.console import Steps
from edgeq.criteria import LEVEL, Criterion, Limits, compare_flips, compare_kld, compare_tps
from edgeq.errors import EvaluationError
from edgeq.evaluation import Evaluation, evaluate, measure_speeds
from edgeq.evaluation.chunks import digest
from edgeq.evaluation.store import stored_chunks
from edgeq.opening import SourceChoice, check_output, open_reference
from edgeq.proving import check_not_calibrated_on, read_text, size_of, stored_text
from edgeq.results import REPORT_SCHEMA
from edgeq.runtime.model import Tokens
from edgeq.texts import Part
from edgeq.workdir import WorkDirectory

FEW_CHUNKS = 10  # below, percentile intervals are too narrow
_SAME_REFERENCE = 0.01  # nats; other CPUs differ by less, and its square is what it adds to a KLD
_SPEED_TOKENS = 32
_SPEED_REPETITIONS = 9  # odd, and enough for an interval of the median


@dataclass(frozen=True, eq=False)
class Baseline:
    """What a report says about the file that a new one is held against.

    Attributes
    ----------
    report : the report
    path : where the file was
    size_bytes : of the file then
    evaluation : with the values of every token
    """

    report: Path
    path: Path
    size_bytes: int
    evaluation: Evaluation


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the gate found.

    Attributes
    ----------
    file, baseline : what was compared
    evaluation : of the new file
    criteria : kld, flips, tps
    seconds : wall time of each step
    notes : what must be said about it
    """

    file: Path
    baseline: Baseline
    evaluation: Evaluation
    criteria: tuple[Criterion, ...]
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """The lines of the criteria that failed."""
        return tuple(each.line for each in self.criteria if each.status == "failed")

    @property
    def passed(self) -> bool:
        """Whether no criterion failed."""
        return not self.failures

    def as_text(self) -> str:
        """Return what a terminal shows: a line for each criterion."""
        return "\n".join([*(each.line for each in self.criteria), *self.notes])

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; the evaluation without its tokens."""
        return {
            "schema": REPORT_SCHEMA,
            "passed": self.passed,
            "file": str(self.file),
            "report": str(self.baseline.report),
            "baseline": str(self.baseline.path),
            "level": LEVEL,
            "criteria": [asdict(each) for each in self.criteria],
            "evaluation": self.evaluation.to_json(tokens=False),
            "seconds": {name: round(spent, 3) for name, spent in self.seconds.items()},
            "notes": list(self.notes),
        }

    def as_junit(self) -> bytes:
        """Return JUnit XML, one test case for each criterion."""
        states = [each.status for each in self.criteria]
        suite = ElementTree.Element(
            "testsuite",
            name=_printable(f"edgeq check {self.file}"),
            tests=str(len(states)),
            failures=str(states.count("failed")),
            errors="0",
            skipped=str(states.count("not checked")),
            time=f"{sum(self.seconds.values()):.3f}",
        )
        for each in self.criteria:
            line = _printable(each.line)
            case = ElementTree.SubElement(
                suite, "testcase", classname="edgeq.check", name=each.name
            )
            if each.status == "failed":
                ElementTree.SubElement(case, "failure", message=line).text = line
            elif each.status == "not checked":
                ElementTree.SubElement(case, "skipped", message=line)
            else:
                ElementTree.SubElement(case, "system-out").text = line
        found: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
        return found


def _printable(text: str) -> str:
    """Replace what XML cannot hold: file names may have anything."""
    return re.sub(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def check(
    file: Path,
    report: Path,
    *,
    reference: str | None = None,
    texts: tuple[str, ...] = (),
    limits: Limits | None = None,
    force: bool = False,
    json_out: Path | None = None,
    junit_out: Path | None = None,
    source: SourceChoice | None = None,
    steps: Steps | None = None,
    seed: int = 0,
) -> Outcome:
    """Hold a file against the first judged file of a report.

    Parameters
    ----------
    reference : default: the report's, where it was
    texts : default: the tokens that the report keeps
    force : accept text that the file was calibrated on
    json_out, junit_out : files to write
    seed : of the bootstrap

    Raises
    ------
    EvaluationError
        The report is none or of another schema, reference or text, or of a single chunk; or the
        limits require a timing that is not possible.
    """
    limits, steps = limits or Limits(), steps or Steps()
    source = source or SourceChoice(file.parent / f"{file.stem}.edgeq")
    for out in (json_out, junit_out):
        if out is not None:
            check_output(out, (file, report, reference, *texts))
    baseline = read_baseline(report)
    open_gguf(file)  # a missing or damaged one is told before anything runs
    untimed = _why_untimed(file, baseline)
    if untimed is not None and limits.requires_tps:
        raise EvaluationError(
            f"--min-tps-ratio: cannot be checked: {untimed}. Put the baseline's file there, or "
            "leave the option out."
        )
    found, notes = _Judging(file, baseline, reference, texts, force, source, steps).run()
    criteria = (
        compare_kld(found, baseline.evaluation, limits, seed),
        compare_flips(found, baseline.evaluation, limits, seed),
        Criterion("tps", "not checked", untimed, limits.min_tps_ratio)
        if untimed is not None
        else _timed(file, baseline, limits, source, steps, seed),
    )
    outcome = Outcome(file, baseline, found, criteria, steps.seconds, notes)
    _write(json_out, (json.dumps(outcome.as_json(), indent=1) + "\n").encode())
    _write(junit_out, outcome.as_junit())
    return outcome


def _timed(
    file: Path,
    baseline: Baseline,
    limits: Limits,
    source: SourceChoice,
    steps: Steps,
    seed: int,
) -> Criterion:
    with steps.step("time") as progress:
        new, old = measure_speeds(
            (file, baseline.path),
            n_prompt=_SPEED_TOKENS,
            n_gen=_SPEED_TOKENS,
            repetitions=_SPEED_REPETITIONS,
            n_threads=source.n_threads,
            progress=progress,
        )
    return compare_tps(new, old, limits, seed)


def _write(path: Path | None, content: bytes) -> None:
    if path is not None:
        with replacing(path, EvaluationError) as temporary:
            temporary.write_bytes(content)


# -------------------------------------------------------------------------------------- baseline


def read_baseline(report: Path) -> Baseline:
    """Read the first judged file of what ``export`` and ``evaluate --json`` write.

    Raises
    ------
    EvaluationError
        The report is missing, none, of another schema, without values of every token, or of one
        chunk only.
    """
    expected = "expected what edgeq evaluate --json or edgeq export wrote"
    try:
        values = json.loads(report.read_bytes())
    except OSError as error:
        raise EvaluationError(
            f"{report}: cannot be read: {error.strerror}. Give the report of the baseline."
        ) from error
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{report}: is not JSON ({error}); {expected}.") from error
    if not isinstance(values, dict) or not isinstance(values.get("files"), list):
        raise EvaluationError(f"{report}: is not a report; {expected}.")
    if values.get("schema") != REPORT_SCHEMA:
        raise EvaluationError(
            f"{report}: got a report of schema {values.get('schema')!r}, expected {REPORT_SCHEMA}. "
            "Evaluate the baseline again."
        )
    judged = [each for each in values["files"] if isinstance(each, dict) and each.get("evaluation")]
    if not judged:
        raise EvaluationError(
            f"{report}: no file in it was judged. Write it with edgeq evaluate --json, or export "
            "without --no-prove."
        )
    try:
        evaluation = Evaluation.from_json(judged[0]["evaluation"])
        path, size_bytes = Path(judged[0]["path"]), int(judged[0]["size_bytes"])
        if not (np.isfinite(evaluation.kld).all() and np.isfinite(evaluation.nll_reference).all()):
            raise EvaluationError("NaN or infinite values; nothing would ever be worse")
    except (EvaluationError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"{report}: is not a whole report ({error}); {expected}.") from error
    if evaluation.n_chunks < 2:
        raise EvaluationError(
            f"{report}: got {evaluation.n_chunks} chunk, expected at least 2 to compare. Evaluate "
            "the baseline on more text."
        )
    return Baseline(report, path, size_bytes, evaluation)


def _why_untimed(file: Path, baseline: Baseline) -> str | None:
    """Return why the baseline's file cannot be timed beside the new one; None: it can."""
    path = baseline.path
    if not path.is_file():
        return f"{path}, the file of {baseline.report}, is not there"
    if path.samefile(file):
        return f"{path}, the file of {baseline.report}, is the new file itself"
    try:
        size_bytes, _ = size_of(path)
    except ConversionError as error:
        return str(error).rstrip(".")
    if size_bytes != baseline.size_bytes:
        return (
            f"{path} is not the file of {baseline.report} any more; got {size_bytes} bytes, "
            f"expected {baseline.size_bytes}"
        )
    return None


# --------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class _Judging:
    """The new file evaluated as the baseline was."""

    file: Path
    baseline: Baseline
    reference: str | None
    texts: tuple[str, ...]
    force: bool
    source: SourceChoice
    steps: Steps

    def run(self) -> tuple[Evaluation, tuple[str, ...]]:
        """Return the evaluation and what must be said about it."""
        before = self.baseline.evaluation
        judge = Path(self.reference or before.reference)
        stored = stored_chunks(judge) if judge.is_file() else None
        with ExitStack() as stack:
            if stored is not None:
                stored = stored[: before.n_chunks]
                self._check_text(stored, str(judge), "Give the reference of the report")
            else:
                work = stack.enter_context(WorkDirectory(self.source.work))
                judge = self._open(judge, work)
            part, where = self._text(judge, stored)
            notes = check_not_calibrated_on((self.file,), part, where, force=self.force)
            with self.steps.step("evaluate") as progress:
                found = evaluate(
                    self.file,
                    part.rows,
                    judge,
                    n_ctx=before.n_ctx,
                    chunks=before.n_chunks,
                    n_threads=self.source.n_threads,
                    progress=progress,
                )
        self._check_reference(found)
        if found.n_chunks < FEW_CHUNKS:
            few = f"{self.baseline.report}: {found.n_chunks} chunks; the intervals of fewer than"
            notes = (*notes, f"{few} {FEW_CHUNKS} are too narrow. Evaluate on more text.")
        return found, notes

    def _open(self, judge: Path, work: WorkDirectory) -> Path:
        if self.reference is None and not judge.exists():
            raise EvaluationError(
                f"{self.baseline.report}: its reference {judge} is not there. Give it with "
                "--reference."
            )
        return open_reference(self.reference or str(judge), self.source, work, self.steps).path

    def _text(self, judge: Path, stored: Tokens | None) -> tuple[Part, str]:
        """Return what to judge on, and how messages call it."""
        before, report = self.baseline.evaluation, self.baseline.report
        if self.texts:
            where = " + ".join(self.texts)
            model = judge if stored is None else self.file
            part = read_text(model, self.texts, before.n_ctx, before.n_chunks)
            if stored is None:  # a stored reference compares it with its own
                self._check_text(part.rows, where, "Leave --text out: the report keeps its text")
            return part, where
        kept = before.chunks if stored is None else stored
        if kept is None:
            raise EvaluationError(
                f"{report}: does not keep its text; an earlier edgeq wrote it. Give the text with "
                "--text, or evaluate the baseline again."
            )
        self._check_text(kept, str(report), "Evaluate the baseline again")
        return stored_text(self.file, kept, report), str(report)

    def _check_text(self, rows: Tokens, where: str, what_to_do: str) -> None:
        before = self.baseline.evaluation
        if digest(rows) != before.tokens_sha256:
            raise EvaluationError(
                f"{where}: is not the text of {self.baseline.report}; got {len(rows)} chunks of "
                f"{rows.shape[1]} tokens, expected its {before.n_chunks} of {before.n_ctx}, token "
                f"for token. {what_to_do}."
            )

    def _check_reference(self, found: Evaluation) -> None:
        """Compare what the two references say, not where they are: files move."""
        before, report = self.baseline.evaluation, self.baseline.report
        if found.reference_kind != before.reference_kind:
            raise EvaluationError(
                f"{found.reference}: got a reference of kind {found.reference_kind!r}, expected "
                f"{before.reference_kind!r} as in {report}. Evaluate the baseline against this one."
            )
        apart = float(np.abs(found.nll_reference - before.nll_reference).mean())
        if apart > _SAME_REFERENCE:
            raise EvaluationError(
                f"{found.reference}: is not the reference of {report}; its −ln p of the text are "
                f"{apart:.4f} nats a token from that one's, expected at most {_SAME_REFERENCE}. "
                "Give the same with --reference, or evaluate the baseline against this one."
            )
