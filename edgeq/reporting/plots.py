"""Plots as inline SVG: axes with sensible ticks, marks with titles, bars, a grid of shares.

Colours are classes (``s0`` … ``s5``) that the page's style sheet defines for light and dark; every
series has a shape of its own too. Widths are those of a phone; wider screens scale them up.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from edgeq.reporting.markup import element, number

WIDTH, HEIGHT = 440, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 16, 30, 46
N_STYLES = 6
_LEAST_SPAN = 0.04  # of an axis, over its largest value: equal sizes look equal
_LETTER = 6.4  # width of a letter of the names beside marks, as large as a phone has them
_SHAPES = (
    "M{x} {y}m-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "M{x} {y}m-4.2 -4.2h8.4v8.4h-8.4z",
    "M{x} {y}m0 -5.8l5.8 5.8l-5.8 5.8l-5.8 -5.8z",
    "M{x} {y}m0 -5.4l5.4 9.6h-10.8z",
    "M{x} {y}m0 5.4l5.4 -9.6h-10.8z",
    "M{x} {y}m-1.6 -5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
)


@dataclass(frozen=True)
class Mark:
    """One datum.

    Attributes
    ----------
    title : what a pointer over it shows
    low, high : ends of its error bar; None: it has none
    name : written beside it
    """

    x: float
    y: float
    title: str
    low: float | None = None
    high: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Series:
    """Marks of one kind.

    Attributes
    ----------
    style : number of its colour and shape
    line : points that a line joins, beside or through the marks
    is_dashed : of the line
    """

    name: str
    marks: tuple[Mark, ...]
    style: int
    line: tuple[tuple[float, float], ...] = ()
    is_dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """From values to a place on the axis, 0 to 1; what is beyond an end is put there."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False

    def share(self, value: float) -> float:
        """Return where a value is."""
        if self.is_log:
            low, high = math.log(self.low), math.log(self.high)
            place = (math.log(max(value, self.low)) - low) / (high - low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return min(max(place, 0.0), 1.0)


def nice_ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Return about n round numbers from `low` to `high`."""
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten from `low` to `high`, with 2 and 5 between where those are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**d for d in decades for f in factors]
        found = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(found) > 3:
            break
    return found if len(found) > 1 else nice_ticks(low, high, 4)


def linear_axis(title: str, values: Iterable[float], *, from_zero: bool = False) -> Axis:
    """Return an axis that holds the values, with room at its ends."""
    known = [*values, *([0.0] if from_zero else [])]
    low, high = min(known, default=0.0), max(known, default=1.0)
    least = max(_LEAST_SPAN * max(abs(low), abs(high)), 1e-12)
    room = max(0.08 * (high - low), (least - (high - low)) / 2)
    low, high = (low if from_zero and low == 0 else low - room), high + room
    ticks = nice_ticks(low, high)
    return Axis(title, low, high, tuple(zip(ticks, _written(ticks), strict=True)))


def _written(ticks: Sequence[float]) -> list[str]:
    """Write equally spaced numbers with as many digits as tell them apart."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks else 1.0
    if step < 1e-4:
        return [number(tick, 2) for tick in ticks]
    digits = next(n for n in range(7) if abs(step * 10**n - round(step * 10**n)) < 1e-6 * 10**n)
    return [f"{tick:,.{digits}f}" for tick in ticks]


def log_axis(title: str, values: Iterable[float], *, decades: float = 6) -> Axis:
    """Return a logarithmic axis of at most so many decades; values from 0 down are at its foot."""
    positive = [value for value in values if value > 0]
    high = max(positive, default=1.0)
    low = max(min(positive, default=0.1), high * 10.0**-decades)
    low, high = (low / 1.5, high * 1.5) if high > 1.2 * low else (low / 3, high * 3)
    return Axis(title, low, high, tuple((t, number(t, 2)) for t in log_ticks(low, high)), True)


def named_axis(title: str, names: Sequence[str]) -> Axis:
    """Return an axis whose places 0, 1, … have names."""
    return Axis(title, -0.5, len(names) - 0.5, tuple(enumerate(names)))


def plot(label: str, series: Sequence[Series], x: Axis, y: Axis) -> Markup:
    """Return an SVG with the series' lines, error bars and marks."""
    frame = _Frame(x, y)
    parts = [*frame.grid(), *frame.axes()]
    ordered = series[::-1]  # the first is on top
    for each in ordered:
        style = _style(each.style)
        if len(each.line) > 1:
            points = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in each.line)
            dashes = "5 4" if each.is_dashed else None
            kind = f"curve {style}"
            parts.append(element("polyline", points=points, class_=kind, stroke_dasharray=dashes))
    parts += [_mark(frame, mark, each.style) for each in ordered for mark in each.marks]
    parts += _names(frame, [mark for each in series for mark in each.marks])
    return _svg(label, HEIGHT, parts)


class _Frame:
    """Where things are in a plot."""

    def __init__(self, x: Axis, y: Axis) -> None:
        self.x_axis, self.y_axis = x, y
        self.left, self.right = _LEFT, WIDTH - _RIGHT
        self.top, self.bottom = _TOP, HEIGHT - _BOTTOM

    def x(self, value: float) -> float:
        return self.left + self.x_axis.share(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.y_axis.share(value) * (self.bottom - self.top)

    def grid(self) -> list[Markup]:
        return [
            element("path", d=f"M{self.left} {self.y(at):.1f}H{self.right}", class_="grid")
            for at, _ in self.y_axis.ticks
        ]

    def axes(self) -> list[Markup]:
        ends = f"M{self.left} {self.top}V{self.bottom}H{self.right}"
        parts = [element("path", d=ends, class_="axis")]
        for at, text in self.x_axis.ticks:
            place = f"{self.x(at):.1f}"
            parts.append(element("path", d=f"M{place} {self.bottom}v4", class_="axis"))
            parts.append(_text(place, self.bottom + 16, text, "middle"))
        for at, text in self.y_axis.ticks:
            parts.append(_text(self.left - 6, f"{self.y(at) + 4:.1f}", text, "end"))
        middle = (self.left + self.right) / 2
        parts.append(_text(middle, HEIGHT - 8, self.x_axis.title, "middle", "title"))
        parts.append(_text(2, 14, self.y_axis.title, "start", "title"))
        return parts


def _mark(frame: _Frame, mark: Mark, style: int) -> Markup:
    x, y = f"{frame.x(mark.x):.1f}", f"{frame.y(mark.y):.1f}"
    bar = None
    if mark.low is not None and mark.high is not None:
        ends = f"M{x} {frame.y(mark.low):.1f}V{frame.y(mark.high):.1f}"
        bar = element("path", d=ends, class_="error")
    shape = element("path", d=shape_path(style).format(x=x, y=y), class_="shape")
    title = element("title", mark.title)
    return element("g", title, bar, shape, class_=f"mark {_style(style)}")


def shape_path(style: int) -> str:
    """Return the path of a series' mark, with ``{x}`` and ``{y}`` for its place."""
    return _SHAPES[(style + style // N_STYLES) % len(_SHAPES)]


def _style(style: int) -> str:
    return f"s{style % N_STYLES}"


def _names(frame: _Frame, marks: Sequence[Mark]) -> list[Markup]:
    """Write names where they hide neither marks nor each other; the others have their titles."""
    taken = [
        (frame.x(m.x) - 6, frame.y(m.y) - 6, frame.x(m.x) + 6, frame.y(m.y) + 6) for m in marks
    ]
    parts = []
    for mark in marks:
        if not mark.name:
            continue
        text = mark.name if len(mark.name) <= 30 else mark.name[:29] + "…"
        x, y, width = frame.x(mark.x), frame.y(mark.y), _LETTER * len(text)
        for anchor, at, down in (
            ("start", x + 9, 4),
            ("end", x - 9, 4),
            ("middle", x, -10),
            ("middle", x, 18),
            ("end", x - 4, 18),
            ("start", x + 4, -10),
            ("start", x + 4, 18),
            ("end", x - 4, -10),
        ):
            left = at - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = (left, y + down - 10, left + width, y + down + 2)
            inside = box[0] >= frame.left and box[2] <= WIDTH and frame.top <= box[1]
            if (
                inside
                and box[3] <= frame.bottom
                and not any(_overlap(box, other) for other in taken)
            ):
                taken.append(box)
                parts.append(_text(f"{at:.1f}", f"{y + down:.1f}", text, anchor, "name"))
                break
    return parts


_Box = tuple[float, float, float, float]


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@dataclass(frozen=True)
class Bar:
    """A quantity and the range over repetitions."""

    name: str
    value: float
    low: float
    high: float
    text: str
    style: int


def bars(label: str, rows: Sequence[Bar]) -> Markup:
    """Return an SVG of horizontal bars from zero, each under its name."""
    longest = max((row.high for row in rows), default=0.0) or 1.0
    height_of_row, thick = 38, 12
    parts = []
    for i, row in enumerate(rows):
        top, room = i * height_of_row, WIDTH - 8
        name = row.name if len(row.name) <= 36 else row.name[:35] + "…"
        width, low, high = (f"{v / longest * room:.1f}" for v in (row.value, row.low, row.high))
        middle = top + 18 + thick / 2
        parts.append(
            element(
                "g",
                element("title", f"{row.name}: {row.text}"),
                _text(0, top + 13, name, "start", "name"),
                _text(WIDTH, top + 13, row.text, "end"),
                element("rect", x=0, y=top + 18, width=width, height=thick, class_="shape"),
                element("path", d=f"M{low} {middle}H{high}", class_="range"),
                class_=f"mark {_style(row.style)}",
            )
        )
    return _svg(label, max(len(rows), 1) * height_of_row, parts)


@dataclass(frozen=True)
class Square:
    """One cell of a grid: a colour and what it says."""

    colour: str
    title: str


def squares(label: str, rows: Sequence[tuple[str, Sequence[Square]]], x: str) -> Markup:
    """Return an SVG of named rows of coloured cells; `x` is what the columns are."""
    columns = max((len(cells) for _, cells in rows), default=1)
    left, high = 40, 14
    wide = (WIDTH - left) / columns
    parts = [_text(left, 12, x, "start", "title")]
    for i, (name, cells) in enumerate(rows):
        top = 20 + i * high
        parts.append(_text(left - 6, top + 11, name, "end"))
        parts += [
            element(
                "rect",
                element("title", cell.title),
                x=f"{left + k * wide:.2f}",
                y=top,
                width=f"{max(wide - 0.5, 0.5):.2f}",
                height=high - 1,
                fill=cell.colour,
                class_="mark",
            )
            for k, cell in enumerate(cells)
        ]
    return _svg(label, 24 + len(rows) * high, parts)


def _text(x: object, y: object, text: str, anchor: str, kind: str | None = None) -> Markup:
    return element("text", text, x=x, y=y, text_anchor=anchor, class_=kind)


def _svg(label: str, height: int, parts: Sequence[Markup]) -> Markup:
    view = f"0 0 {WIDTH} {height}"
    return element("svg", *parts, viewBox=view, role="img", aria_label=label)
