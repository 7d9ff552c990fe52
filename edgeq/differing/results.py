"""What a comparison of two sides gives: figures, as JSON and as tables."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.console import markdown_table
from edgeq.differing.decoding import Side
from edgeq.differing.prompts import Prompt, labels
from edgeq.texts.writing import Doubles

TEMPERATURES = (0.0, 0.5, 0.8)
MARGINS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, math.inf)  # nats
_SHOWN = 60  # characters of a prompt in a table


@dataclass(frozen=True, eq=False)
class Forced:
    """What both sides make of A's text; every array has one entry for each of its tokens.

    Attributes
    ----------
    margin : float64, gap between the two best logits of A, nats
    same_top : bool, whether the most likely token is the same
    kld : float64, divergence of B from A, nats
    same_sample : temperature → float64, how likely a common random number gives the same token
    """

    margin: Doubles
    same_top: npt.NDArray[np.bool_]
    kld: Doubles
    same_sample: Mapping[float, Doubles]


@dataclass(frozen=True, eq=False)
class Answer:
    """One prompt, put to both sides.

    Attributes
    ----------
    first : temperature → first token that differs, from 0; None: the texts are the same
    texts : what A and B write at temperature 0
    refuses : whether these texts begin like a refusal
    """

    prompt: Prompt
    first: Mapping[float, int | None]
    texts: tuple[str, str]
    refuses: tuple[bool, bool]
    forced: Forced

    @property
    def margin(self) -> float | None:
        """A's margin where the greedy texts part, nats; None: they do not."""
        place = self.first[0.0]
        inside = place is not None and place < len(self.forced.margin)
        return float(self.forced.margin[place]) if inside else None


@dataclass(frozen=True)
class MarginBin:
    """Tokens of A's texts whose margin is at least `low` and below `high`, nats."""

    low: float
    high: float
    n_tokens: int
    n_changed: int


@dataclass(frozen=True)
class Agreement:
    """Both sides with the same random numbers at one temperature.

    Attributes
    ----------
    n_parted : prompts whose texts differ
    first : quantiles 0, 10, 50, 90 and 100 % of the first token that differs; empty: none does
    same_token, error : share of tokens that agree along A's greedy text, and its standard error
        over prompts; None for a single prompt
    """

    temperature: float
    n_parted: int
    first: tuple[float, ...]
    same_token: float
    error: float | None


@dataclass(frozen=True)
class ClassDivergence:
    """Mean KL divergence of B from A on the prompts of one class.

    Attributes
    ----------
    kld : nats a token
    error : its standard error over prompts; None for a single prompt
    """

    label: str
    n_prompts: int
    n_tokens: int
    kld: float
    error: float | None


@dataclass(frozen=True)
class Found:
    """A prompt that the search found; `line` is that of the prompt it was made from."""

    prompt: Prompt
    first: int | None
    kld: float
    texts: tuple[str, str]


def clustered(values: Sequence[Doubles]) -> tuple[float, float | None]:
    """Return the mean over all values, and its standard error over their groups."""
    sizes = np.array([len(each) for each in values])
    mean = float(np.concatenate(values).mean())
    if len(values) < 2:
        return mean, None
    residuals = np.array([each.sum() for each in values]) - mean * sizes
    n = len(values)
    return mean, float(np.sqrt((residuals**2).sum() * n / (n - 1)) / sizes.sum())


@dataclass(frozen=True, eq=False)
class Difference:
    """Two sides on all prompts.

    Attributes
    ----------
    n_tokens : that a text may have
    found : by the search for prompts where they part earliest; the worst first
    """

    a: Side
    b: Side
    n_tokens: int
    answers: tuple[Answer, ...]
    found: tuple[Found, ...] = ()

    @cached_property
    def agreements(self) -> tuple[Agreement, ...]:
        """Agreement at each temperature."""
        agreements = []
        for temperature in TEMPERATURES:
            places = [answer.first[temperature] for answer in self.answers]
            parted = [place for place in places if place is not None]
            forced = [answer.forced for answer in self.answers]
            same = [
                each.same_sample[temperature] if temperature else each.same_top.astype(np.float64)
                for each in forced
            ]
            quantiles = np.quantile(parted, [0, 0.1, 0.5, 0.9, 1]).tolist() if parted else []
            mean, error = clustered(same)
            agreements.append(Agreement(temperature, len(parted), tuple(quantiles), mean, error))
        return tuple(agreements)

    @cached_property
    def margins(self) -> tuple[MarginBin, ...]:
        """How many tokens of each margin have another top."""
        margin = np.concatenate([answer.forced.margin for answer in self.answers])
        changed = ~np.concatenate([answer.forced.same_top for answer in self.answers])
        bins = []
        for low, high in itertools.pairwise(MARGINS):
            inside = (margin >= low) & (margin < high)
            bins.append(MarginBin(low, high, int(inside.sum()), int((inside & changed).sum())))
        return tuple(bins)

    @cached_property
    def classes(self) -> tuple[ClassDivergence, ...]:
        """Divergence by class, in the order of the file."""
        found = []
        for label in labels([answer.prompt for answer in self.answers]):
            values = [each.forced.kld for each in self.answers if each.prompt.label == label]
            mean, error = clustered(values)
            n_tokens = sum(len(each) for each in values)
            found.append(ClassDivergence(label, len(values), n_tokens, mean, error))
        return tuple(found)

    @property
    def refusal_flips(self) -> tuple[int, int]:
        """How many prompts A alone refuses, and B alone."""
        pairs = [answer.refuses for answer in self.answers]
        return pairs.count((True, False)), pairs.count((False, True))

    @property
    def parting_margins(self) -> list[float]:
        """A's margins where greedy texts part, nats, in the order of the prompts."""
        return [answer.margin for answer in self.answers if answer.margin is not None]

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; an open end is None."""
        only_a, only_b = self.refusal_flips
        margins = [asdict(each) for each in self.margins]
        for each in margins:
            each["high"] = each["high"] if math.isfinite(each["high"]) else None
        return {
            "a": {"path": str(self.a.path), "cache": self.a.cache},
            "b": {"path": str(self.b.path), "cache": self.b.cache},
            "n_prompts": len(self.answers),
            "n_tokens": self.n_tokens,
            "agreements": [asdict(each) for each in self.agreements],
            "margins": margins,
            "parting_margins": self.parting_margins,
            "classes": [asdict(each) for each in self.classes],
            "refusals": {
                "a": sum(answer.refuses[0] for answer in self.answers),
                "b": sum(answer.refuses[1] for answer in self.answers),
                "only_a": only_a,
                "only_b": only_b,
            },
            "prompts": [_answer_json(answer) for answer in self.answers],
            "found": [
                {**asdict(each.prompt), "first": each.first, "kld": each.kld, "texts": each.texts}
                for each in self.found
            ],
        }

    def as_text(self) -> str:
        """Return tables for a terminal."""
        n = len(self.answers)
        both = sum(answer.refuses == (True, True) for answer in self.answers)
        only_a, only_b = self.refusal_flips
        parts = [
            f"A: {self.a.name}\nB: {self.b.name}\n"
            f"{n} prompts, up to {self.n_tokens} tokens written after each",
            markdown_table(
                ["temperature", "texts part", "at token (10 %, median, 90 %)", "same token"],
                [_agreement_row(each, n) for each in self.agreements],
            ),
            markdown_table(
                ["margin of A, nats", "tokens", "other top token"],
                [_margin_row(each) for each in self.margins if each.n_tokens],
            ),
            markdown_table(
                ["class", "prompts", "tokens", "KL divergence"],
                [
                    [each.label, str(each.n_prompts), str(each.n_tokens), _with_error(each)]
                    for each in self.classes
                ],
            ),
            f"Refusals: {both + only_a} of A, {both + only_b} of B; {only_a} by A alone, {only_b} "
            "by B alone",
        ]
        if self.parting_margins:
            margins = np.quantile(self.parting_margins, [0.5, 1])
            parts[1] += (
                f"\nMargin of A where greedy texts part: median {margins[0]:.3f}, largest "
                f"{margins[1]:.3f} nats"
            )
        if self.found:
            rows = [
                [_short(f.prompt.text), str(f.prompt.line), _place(f.first), f"{f.kld:.4f}"]
                for f in self.found
            ]
            parts.append(markdown_table(["found prompt", "from line", "part at", "KLD"], rows))
        return "\n\n".join(parts)


def _answer_json(answer: Answer) -> dict[str, Any]:
    return {
        **asdict(answer.prompt),
        "first": {f"{temperature:g}": place for temperature, place in answer.first.items()},
        "margin": answer.margin,
        "kld": float(answer.forced.kld.mean()),
        "texts": answer.texts,
        "refuses": answer.refuses,
    }


def _agreement_row(each: Agreement, n: int) -> list[str]:
    where = ", ".join(f"{place:.0f}" for place in each.first[1:4]) or "–"
    error = "" if each.error is None else f" ± {100 * each.error:.2f}"
    same = f"{100 * each.same_token:.2f}{error} %"
    return [f"{each.temperature:g}", f"{100 * each.n_parted / n:.1f} %", where, same]


def _margin_row(each: MarginBin) -> list[str]:
    top = f"{each.low:g} to {each.high:g}" if math.isfinite(each.high) else f"{each.low:g} or more"
    return [top, str(each.n_tokens), f"{100 * each.n_changed / each.n_tokens:.2f} %"]


def _with_error(each: ClassDivergence) -> str:
    return f"{each.kld:.5f}" + ("" if each.error is None else f" ± {each.error:.5f}")


def _place(place: int | None) -> str:
    return "–" if place is None else str(place)


def _short(text: str) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text)
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
