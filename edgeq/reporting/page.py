"""The page: one HTML file that opens from disk, without scripts and without the network."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from converters.output import replacing
from edgeq.errors import EvaluationError
from edgeq.opening import check_output
from edgeq.reporting import figures
from edgeq.reporting.figures import Figure
from edgeq.reporting.markup import element, joined, number, table
from edgeq.reporting.reading import (
    SavedBench,
    SavedFile,
    SavedReport,
    SavedTask,
    read_reports,
)
from edgeq.reporting.reproducing import command
from edgeq.reporting.style import style_sheet
from edgeq.reporting.tensor_map import tensor_map, tone
from edgeq.results import FILES_HEADER, Written, file_row

_EXPERT_TONES = {-1.0: "#c62828"} | {
    least: tone(place)
    for least, place in ((1e-12, 0.1), (0.25, 0.3), (0.5, 0.45), (0.8, 0.6), (1.25, 0.8), (2.0, 1))
}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(paths: Sequence[Path], out: Path) -> Written:
    """Write the page of one or several reports, whole or not at all.

    Raises
    ------
    EvaluationError
        A report cannot be read, or the page not be written.
    """
    check_output(out, paths)
    reports, benches = read_reports(paths)
    html = page(reports, benches)
    with replacing(out, EvaluationError) as temporary:
        temporary.write_text(html, "utf-8")
    n_files = sum(len(report.files) for report in reports)
    return Written((out,), {"reports": len(reports), "files": n_files, "bytes": len(html.encode())})


def page(reports: Sequence[SavedReport], benches: Sequence[SavedBench] = ()) -> str:
    """Return the whole HTML document."""
    files = distinct_files(reports)
    title = " · ".join(dict.fromkeys(report.model for report in reports))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"{title} – edgeq report"),
        element("style", Markup(style_sheet())),
    )
    sections = [
        _top(title, reports, files),
        _section("How far from the reference", _figures(_divergence(files))),
        *[_map(report, key, many=len(reports) > 1) for key, report in enumerate(reports)],
        _section("Where it diverges", _figures(_places(files))),
        _section("Speed on the machine that measured", _figures(figures.speeds(files, benches))),
        *[_tasks(report.tasks) for report in reports if report.tasks],
        *[_experts(report) for report in reports if report.experts],
        *[_provenance(report) for report in reports],
    ]
    body = element("body", element("main", joined(sections)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def distinct_files(reports: Sequence[SavedReport]) -> list[SavedFile]:
    """Return the files of all reports; a reference that several have stands there once, last."""
    files: list[SavedFile] = []
    references: dict[tuple[str, int], SavedFile] = {}
    for report in reports:
        for file in report.files:
            if file.made_by == "reference":
                references.setdefault((file.path, file.size_bytes), file)
            else:
                files.append(file)
    return list(_relabelled([*files, *references.values()]))


def _relabelled(files: Sequence[SavedFile]) -> Iterator[SavedFile]:
    """Tell files of one label apart: by their names, then by their place in the table."""
    labels = [file.label for file in files]
    if len(set(labels)) < len(labels):
        names = [f"{file.label} ({Path(file.path).name})" for file in files]
        labels = [
            name if labels.count(label) > 1 else label
            for label, name in zip(labels, names, strict=True)
        ]
    for i, (file, label) in enumerate(zip(files, labels, strict=True)):
        unique = label if labels.count(label) == 1 else f"{label} #{i + 1}"
        yield replace(file, label=unique)


def _section(title: str, content: Markup | None) -> Markup | None:
    return None if content is None else element("section", element("h2", title), content)


def _figures(found: Sequence[Figure]) -> Markup | None:
    if not found:
        return None
    return element("div", *[each.html() for each in found], class_="figures")


# ---------------------------------------------------------------------------------------- headline


def _top(title: str, reports: Sequence[SavedReport], files: Sequence[SavedFile]) -> Markup:
    said = [*dict.fromkeys(line for report in reports for line in report.comparisons)]
    if len(_by_text(files)) > 1:
        said.append(
            "These files were judged on different texts or against different references: compare "
            "divergences only within one plot below."
        )
    return element(
        "header",
        element("h1", title),
        element("p", _lead(files), class_="lead"),
        table("Measured through llama.cpp", FILES_HEADER, headline_rows(files), "cards"),
        *[element("p", line, class_="muted") for line in said],
    )


def _lead(files: Sequence[SavedFile]) -> str:
    first = files[0]
    text = f"{first.label}: {first.size_bytes:,} bytes, {first.bpw:.3f} bits a weight"
    if first.evaluation is None:
        return f"{text}. It was not measured against its reference."
    kld = first.evaluation.summary.kld.value
    text += f", {number(kld)} nats a token from its reference"
    for other in files[1:]:
        if other.made_by != "llama-quantize" or not _is_comparable(first, other):
            continue
        theirs = other.evaluation.summary.kld.value if other.evaluation is not None else 0.0
        if theirs > 0:
            text += f": ×{kld / theirs:.3f} of the divergence of {other.label}"
        break
    return f"{text}."


def _is_comparable(a: SavedFile, b: SavedFile) -> bool:
    return b.evaluation is not None and _judge(a) == _judge(b)


def _judge(file: SavedFile) -> tuple[str, str, str]:
    """Return what a file was judged on; only files of one judge are comparable."""
    found = file.evaluation
    return (
        ("", "", "")
        if found is None
        else (found.tokens_sha256, found.reference, found.reference_kind)
    )


def headline_rows(files: Sequence[SavedFile]) -> list[list[str]]:
    """Return the rows of the headline table, under ``FILES_HEADER``."""
    return [
        file_row(f.label, f.size_bytes, f.bpw, f.evaluation, f.prefill, f.decode) for f in files
    ]


# ------------------------------------------------------------------------------------------ figures


def _by_text(files: Sequence[SavedFile]) -> list[list[SavedFile]]:
    found: dict[tuple[str, str, str], list[SavedFile]] = {}
    for file in files:
        if file.evaluation is not None:
            found.setdefault(_judge(file), []).append(file)
    return list(found.values())


def _divergence(files: Sequence[SavedFile]) -> list[Figure]:
    groups = _by_text(files)
    pairs = [(figures.pareto(group), figures.percentiles(_judged(group))) for group in groups]
    return [figure for pair in pairs for figure in pair]


def _places(files: Sequence[SavedFile]) -> list[Figure]:
    groups = [_judged(group) for group in _by_text(files)]
    pairs = [(figures.by_confidence(group), figures.by_position(group)) for group in groups]
    return [figure for pair in pairs for figure in pair]


def _judged(files: Sequence[SavedFile]) -> list[figures.Judged]:
    return [(file.label, file.evaluation) for file in files if file.evaluation is not None]


def _map(report: SavedReport, key: int, *, many: bool) -> Markup | None:
    title = "What every tensor gets" + (f": {report.output.label}" if many else "")
    if not report.tensors:
        return None
    about = "A cell is a weight matrix. Point at it, tap it or go to it by Tab to read why."
    return _section(title, element("div", element("p", about), tensor_map(report.tensors, key)))


def _experts(report: SavedReport) -> Markup | None:
    found = figures.experts(report, _EXPERT_TONES)
    return _section("Experts in calibration", _figures(found))


def _tasks(tasks: Sequence[SavedTask]) -> Markup | None:
    rows = []
    for task in tasks:
        row = [f"{task.name}, {task.label}", f"{task.n_items:,}", _share(task.accuracy)]
        if task.reference is None:
            rows.append([*row, "–", "–", "–", "–", "–"])
            continue
        changed = f"{task.to_wrong} / {task.to_right}"
        agreement, p = f"{100 * task.agreement:.2f} %", number(task.p_value)
        text = "–" if task.same_text is None else f"{100 * task.same_text:.2f} %"
        rows.append([*row, _share(task.reference), changed, agreement, p, text])
    changes = ["to wrong / right", "same answer", "p", "same text"]
    header = ["task", "items", "right", "reference", *changes]
    caption = "Answers, with 95 % intervals; p of McNemar's exact test against the reference"
    return _section("Tasks", table(caption, header, rows))


def _share(share: tuple[float, float, float]) -> str:
    value, low, high = (100 * each for each in share)
    return f"{value:.2f} % ({low:.2f}–{high:.2f})"


# --------------------------------------------------------------------------------------- provenance


def _provenance(report: SavedReport) -> Markup | None:
    parts: list[Markup | None] = [
        element("p", "To make it again:" if report.provenance else "To measure the same again:"),
        element("pre", element("code", command(report))),
        element("dl", *[part for key, value in _facts(report) for part in _pair(key, value)]),
    ]
    if report.notes:
        parts.append(element("h3", "Notes"))
        parts.append(element("ul", *[element("li", note) for note in report.notes]))
    if report.seconds:
        rows = [[name, f"{spent:.1f}"] for name, spent in report.seconds.items()]
        parts.append(
            element(
                "details",
                element("summary", f"Time: {sum(report.seconds.values()):.1f} s"),
                table("Wall time of each step; reused results cost little", ["step", "s"], rows),
            )
        )
    title = f"Provenance of {report.output.label}"
    return _section(title, joined(parts))


def _pair(key: str, value: str) -> tuple[Markup, Markup]:
    return element("dt", key), element("dd", element("code", value))


def _facts(report: SavedReport) -> Iterator[tuple[str, str]]:
    """Yield what was read and with what, as far as the report says it."""
    yield "report", str(report.path)
    for key, keys in (
        ("model", ("source", "name")),
        ("sha256 of the model", ("source", "sha256")),
        ("architecture", ("model", "architecture")),
        ("sha256 of the imatrix", ("imatrix_sha256",)),
    ):
        value = report.told(*keys)
        if value is not None:
            yield key, str(value)
    yield from _texts(report)
    found = report.output.evaluation
    if found is not None:
        yield "reference", found.reference
        chunks = f"{found.n_chunks} chunks of {found.n_ctx} tokens"
        yield "judged on", f"{chunks}, sha256 of the tokens {found.tokens_sha256}"
    for key in ("method", "plan", "versions"):
        value = report.told(key)
        if isinstance(value, dict):
            yield key, ", ".join(f"{name} {each}" for name, each in value.items())


def _texts(report: SavedReport) -> Iterator[tuple[str, str]]:
    texts = report.told("texts")
    for part, about in (texts if isinstance(texts, dict) else {}).items():
        if isinstance(about, dict):
            named = about.get("names")
            names = ", ".join(map(str, named)) if isinstance(named, list) else ""
            n_tokens, sha256 = about.get("n_tokens"), about.get("sha256")
            yield f"{part} text", f"{names}; {n_tokens} tokens, sha256 {sha256}"
