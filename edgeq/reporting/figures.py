"""The figures of the page: what each plots of the reports, in words and as data."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from edgeq.evaluation import Evaluation
from edgeq.evaluation.speed import Rate
from edgeq.reporting.markup import element, number, table
from edgeq.reporting.plots import (
    Axis,
    Bar,
    Mark,
    Series,
    Square,
    bars,
    linear_axis,
    log_axis,
    named_axis,
    plot,
    shape_path,
    squares,
)
from edgeq.reporting.reading import SavedBench, SavedFile, SavedReport

Judged = tuple[str, Evaluation]
"""A file's label and its evaluation."""

KLD_TITLE = "KL divergence, nats a token"
CONFIDENCE_EDGES = (0.0, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 1.0)
_CONFIDENCE_NAMES = ("<1", "1–5", "5–20", "20–50", "50–80", "80–95", "95–99", ">99")
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)
_N_POSITIONS = 16
_MIB = 2**20


@dataclass(frozen=True)
class Figure:
    """A plot with what belongs to it.

    Attributes
    ----------
    legend : the series, where there are several
    caption : how to read it
    data : the same as a table; None: another table of the page has it
    """

    title: str
    svg: Markup
    caption: str
    legend: Markup | None = None
    data: Markup | None = None

    def html(self) -> Markup:
        """Return the figure."""
        details = None
        if self.data is not None:
            details = element("details", element("summary", "As a table"), self.data)
        caption = element("figcaption", self.caption)
        heading = element("h3", self.title)
        return element("figure", heading, self.legend, self.svg, caption, details)


def _legend(names: Sequence[tuple[str, int]]) -> Markup:
    items = []
    for name, style in names:
        path = element("path", d=shape_path(style).format(x=7, y=7), class_="shape")
        sign = element(
            "svg", path, viewBox="0 0 14 14", class_=f"key s{style % 6}", aria_hidden="true"
        )
        items.append(element("li", sign, " ", name))
    return element("ul", *items, class_="legend")


# ------------------------------------------------------------------------------ size and divergence


def pareto(files: Sequence[SavedFile]) -> Figure:
    """Plot size against divergence of files that were judged on one text."""
    kinds: Mapping[str, list[Mark]] = {"edgeq": [], "llama.cpp and others": []}
    for file in files:
        if file.evaluation is None:
            continue
        kld, size = file.evaluation.summary.kld, file.size_bytes / _MIB
        title = f"{file.label}: {size:.1f} MiB, {number(kld.value)} ± {number(kld.error, 2)} nats"
        low, high = kld.value - kld.error, kld.value + kld.error
        mark = Mark(size, kld.value, title, low, high, file.label)
        kinds["edgeq" if file.made_by == "edgeq" else "llama.cpp and others"].append(mark)
    series = [
        Series(name, tuple(marks), style)
        for style, (name, marks) in enumerate(kinds.items())
        if marks
    ]
    marks = [mark for each in series for mark in each.marks]
    front = Series("not beaten by a smaller file", (), 4, _front(marks), is_dashed=True)
    x = linear_axis("MiB", [mark.x for mark in marks])
    y = log_axis(f"{KLD_TITLE} (log)", [v for m in marks for v in (m.y, m.low, m.high) if v])
    label = f"Size in MiB against KL divergence of {len(marks)} files"
    return Figure(
        "Size against divergence",
        plot(label, [front, *series], x, y),
        "Lower left is better. Bars: standard error. The dashed line joins the files that no "
        "smaller one beats.",
        _legend([(each.name, each.style) for each in series]),
    )


def _front(marks: Iterable[Mark]) -> tuple[tuple[float, float], ...]:
    front: list[tuple[float, float]] = []
    for mark in sorted(marks, key=lambda mark: (mark.x, mark.y)):
        if not front or mark.y < front[-1][1]:
            front.append((mark.x, mark.y))
    return tuple(front)


# -------------------------------------------------------------------------------- where it diverges


@dataclass(frozen=True)
class _Bin:
    place: float
    name: str
    kld: npt.NDArray[np.float64]

    @property
    def mean(self) -> float:
        return float(self.kld.mean())

    @property
    def error(self) -> float:
        n = self.kld.size
        return float(self.kld.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0


def by_confidence(judged: Sequence[Judged]) -> Figure:
    """Plot divergence by how probable the reference finds the token that follows."""

    def bins(found: Evaluation) -> list[_Bin]:
        at = np.digitize(np.exp(-found.nll_reference.clip(0)), CONFIDENCE_EDGES[1:-1])
        kinds = [(i, name, found.kld[at == i]) for i, name in enumerate(_CONFIDENCE_NAMES)]
        return [_Bin(i, f"{name} %", kld) for i, name, kld in kinds if kld.size]

    return _binned(
        "By confidence",
        "KL divergence by the reference's probability of the next token",
        "How probable the reference finds the token that follows, against the mean divergence "
        "there. Bars: standard error.",
        {label: bins(found) for label, found in judged},
        named_axis("reference's probability of the next token, %", _CONFIDENCE_NAMES),
    )


def by_position(judged: Sequence[Judged]) -> Figure:
    """Plot divergence by the number of tokens before."""

    def bins(found: Evaluation) -> list[_Bin]:
        first, n = found.n_ctx // 2, found.kld.shape[1]
        edges = np.unique(np.linspace(0, n, min(n, _N_POSITIONS) + 1).astype(int))
        pairs = [(int(a), int(b)) for a, b in itertools.pairwise(edges)]
        return [
            _Bin(first + (a + b) / 2, f"{first + a} to {first + b}", found.kld[:, a:b].ravel())
            for a, b in pairs
        ]

    all_bins = {label: bins(found) for label, found in judged}
    places = [each.place for found in all_bins.values() for each in found]
    return _binned(
        "By position",
        "KL divergence by position in the context",
        "How many tokens the models have read, against the mean divergence there. The first half "
        "of every chunk is context only. Bars: standard error.",
        all_bins,
        linear_axis("tokens read before", places),
    )


def _binned(
    title: str, label: str, caption: str, found: Mapping[str, Sequence[_Bin]], x: Axis
) -> Figure:
    series = []
    for style, (name, bins) in enumerate(found.items()):
        marks = tuple(
            Mark(
                each.place,
                each.mean,
                f"{name}, {each.name}: {number(each.mean)} ± {number(each.error, 2)} nats, "
                f"{each.kld.size} tokens",
                each.mean - each.error,
                each.mean + each.error,
            )
            for each in bins
        )
        series.append(Series(name, marks, style, tuple((m.x, m.y) for m in marks)))
    ends = [v for s in series for m in s.marks for v in (m.y, m.high or 0.0)]
    names = dict.fromkeys((each.place, each.name) for bins in found.values() for each in bins)
    by_place = {n: {(b.place, b.name): b for b in bins} for n, bins in found.items()}
    rows = [
        [name, *[_cell(bins.get((place, name))) for bins in by_place.values()]]
        for place, name in sorted(names)
    ]
    return Figure(
        title,
        plot(label, series, x, linear_axis(KLD_TITLE, ends, from_zero=True)),
        caption,
        _legend([(each.name, each.style) for each in series]),
        table(f"{label}: mean ± standard error", [x.title, *found], rows),
    )


def _cell(found: _Bin | None) -> str:
    return "–" if found is None else f"{number(found.mean)} ± {number(found.error, 2)}"


def percentiles(judged: Sequence[Judged]) -> Figure:
    """Plot the percentiles of the divergence, the rare large ones spread out."""
    series = []
    for style, (name, found) in enumerate(judged):
        known = [p for p in PERCENTILES if (1 - p / 100) * found.kld.size >= 1 or p <= 50]
        values = np.quantile(found.kld, np.array(known) / 100)
        marks = tuple(
            Mark(
                _nines(p), float(v), f"{name}: {p:g} % of the tokens below {number(float(v))} nats"
            )
            for p, v in zip(known, values, strict=True)
        )
        dense = 100 * (1 - np.geomspace(1, 1 - known[-1] / 100, 60))
        curve = np.quantile(found.kld, dense / 100)
        line = tuple((_nines(p), float(v)) for p, v in zip(dense, curve, strict=True))
        series.append(Series(name, marks, style, line))
    every = [mark for each in series for mark in each.marks]
    last = max(mark.x for mark in every) + 0.08
    ticks = tuple((_nines(p), f"{p:g}") for p in (10, 50, 90, 99, 99.9) if _nines(p) < last)
    x = Axis("percent of the tokens", 0.0, last, ticks)
    label = "Percentiles of the KL divergence"
    rows = [
        [f"{p:g} %", *[_title_value(each, _nines(p)) for each in series]]
        for p in PERCENTILES
        if any(mark.x == _nines(p) for mark in every)
    ]
    return Figure(
        "Percentiles",
        plot(label, series, x, log_axis(f"{KLD_TITLE} (log)", [m.y for m in every], decades=5)),
        "So many tokens diverge less. The scale spreads the few tokens that diverge most, which "
        "users notice first.",
        _legend([(each.name, each.style) for each in series]),
        table(f"{label}, nats", ["tokens below", *[name for name, _ in judged]], rows),
    )


def _nines(percent: float) -> float:
    return -math.log10(1 - percent / 100)


def _title_value(series: Series, x: float) -> str:
    return next((number(mark.y) for mark in series.marks if mark.x == x), "–")


# ------------------------------------------------------------------------------------------- speed


def speeds(files: Sequence[SavedFile], benches: Sequence[SavedBench]) -> list[Figure]:
    """Plot tokens a second, written and read; those of a bench by runtime and threads."""
    groups = [("", [(f.label, f.decode, f.prefill, _style(f)) for f in files])]
    for bench in benches:
        rows = [
            (_run_name(run.backend, run.threads), run.decode, run.prefill, i)
            for i, run in enumerate(bench.runs)
        ]
        groups.append((f", {Path(bench.file).name}", list(rows)))
    figures = []
    for where, rows_of in groups:
        for k, what in ((1, "Decode"), (2, "Prefill")):
            found = [(row[0], row[k], row[3]) for row in rows_of]
            known = [
                Bar(name, rate.median, rate.low, rate.high, _rate_text(rate), style)
                for name, rate, style in found
                if isinstance(rate, Rate)
            ]
            if known:
                label = f"{what}, tokens a second{where}, of {len(known)} rows"
                caption = "Median; the thin line is from the slowest to the fastest repetition."
                figures.append(Figure(f"{what}{where}", bars(label, known), caption))
    return figures


def _style(file: SavedFile) -> int:
    return {"edgeq": 0, "reference": 5}.get(file.made_by, 1)


def _run_name(backend: str, threads: int) -> str:
    return f"{backend}, {threads} thread{'s' if threads != 1 else ''}"


def _rate_text(rate: Rate) -> str:
    digits = 0 if rate.median >= 100 else 1
    median, low, high = (f"{value:,.{digits}f}" for value in (rate.median, rate.low, rate.high))
    return f"{median} t/s ({low}–{high})"


# ----------------------------------------------------------------------------------------- experts


def experts(report: SavedReport, colour: Mapping[float, str]) -> list[Figure]:
    """Plot how many inputs each expert saw in calibration, a figure for each number of experts.

    Parameters
    ----------
    colour : share of an even spread, ascending, to the colour from there on
    """
    by_layer: dict[str, tuple[int, ...]] = {}
    for name, counts in report.experts.items():  # gate, up and down of a layer count the same
        by_layer.setdefault(".".join(name.split(".")[:2]), counts)
    figures = []
    for size in sorted({len(counts) for counts in by_layer.values()}):
        layers = {name: counts for name, counts in by_layer.items() if len(counts) == size}
        rows, cells = [], []
        for name, counts in layers.items():
            fair = max(sum(counts) / size, 1e-9)
            cells.append((name.removeprefix("blk."), _squares(name, counts, fair, colour)))
            ordered = sorted(counts)
            middle, unseen = ordered[size // 2], sum(count == 0 for count in counts)
            figures_of = (ordered[0], middle, ordered[-1], unseen)
            rows.append([name, *[f"{value:,}" for value in figures_of]])
        label = f"Inputs of each of {size} experts in {len(layers)} layers"
        header = ["layer", "least", "median", "most", "never reached"]
        figures.append(
            Figure(
                f"{size} experts",
                squares(label, cells, "expert"),
                "Rows are layers, columns experts; dark: many inputs, light: few, red: none. An "
                "expert that calibration never reached is rounded without importances.",
                None,
                table(f"{label}: tokens that reached them", header, rows),
            )
        )
    return figures


def _squares(
    name: str, counts: Sequence[int], fair: float, colour: Mapping[float, str]
) -> list[Square]:
    found = []
    for i, count in enumerate(counts):
        tone = next(c for least, c in reversed(tuple(colour.items())) if count / fair >= least)
        text = f"{name}, expert {i}: {count:,} inputs, ×{count / fair:.2f} of an even share"
        found.append(Square(tone, text))
    return found
