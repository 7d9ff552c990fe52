"""What the gate compares: each criterion's statistic, its bootstrap interval, and what is allowed.

A criterion fails only where the whole interval is on the wrong side of what is allowed; a file that
did not change has the interval [1, 1] or [0, 0].
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from edgeq.errors import RecipeError
from edgeq.evaluation import Evaluation, Speed
from edgeq.evaluation.compare import draws

LEVEL = 0.95
N_RESAMPLES = 10_000
_KLD_FLOOR = 1e-6  # nats; two spellings of one function differ by that much in llama.cpp

Doubles = npt.NDArray[np.float64]
Status = Literal["ok", "failed", "not checked"]


@dataclass(frozen=True)
class Limits:
    """How much worse than its baseline a file may be.

    Attributes
    ----------
    max_kld_increase : of the mean KL divergence from the reference; 0.05 allows 1.05 times as much
    max_flips : so much more of the tokens may have another most likely next token than the
        reference's; 0.01 is one percentage point
    min_tps_ratio : decoded tokens/s over the baseline's at least
    requires_tps : whether it is an error that the baseline's file cannot be timed
    """

    max_kld_increase: float = 0.05
    max_flips: float = 0.01
    min_tps_ratio: float = 0.9
    requires_tps: bool = False

    @classmethod
    def parse(
        cls,
        max_kld_increase: str | None = None,
        max_flips: str | None = None,
        min_tps_ratio: str | None = None,
    ) -> Self:
        """Read ``5%`` or ``0.05``; None is the default.

        Raises
        ------
        RecipeError
            Not a number, negative, or a percentage that lost its sign.
        """
        return cls(
            _share("--max-kld-increase", max_kld_increase, cls.max_kld_increase),
            _share("--max-flips", max_flips, cls.max_flips),
            _ratio("--min-tps-ratio", min_tps_ratio, cls.min_tps_ratio),
            requires_tps=min_tps_ratio is not None,
        )


def _number(text: str) -> float | None:
    number, scale = (text[:-1], 100) if text.endswith("%") else (text, 1)
    try:
        value = float(number) / scale
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _ratio(flag: str, text: str | None, default: float) -> float:
    value = default if text is None else _number(text)
    if value is None or value <= 0:
        raise RecipeError(
            f"{flag}: got {text!r}, expected a number above 0. Write it like 0.9 or 90%."
        )
    return value


def _share(flag: str, text: str | None, default: float) -> float:
    if text is None:
        return default
    value = _number(text)
    if value is None or value < 0 or (value >= 1 and not text.endswith("%")):
        raise RecipeError(
            f"{flag}: got {text!r}, expected a percentage of 0% or more. Write it like 5% or 0.05."
        )
    return value


@dataclass(frozen=True)
class Criterion:
    """One thing that was compared.

    Attributes
    ----------
    name : "kld", "flips" or "tps"
    status : "failed" where the whole interval is beyond what is allowed
    detail : the two sides in words, or why nothing was checked
    measured, allowed : ratios to the baseline (kld, tps), or a difference of shares (flips)
    low, high : bootstrap interval of `measured`; None where nothing was checked, as `measured`
    figures : the two sides in numbers
    """

    name: str
    status: Status
    detail: str
    allowed: float
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The criterion as one line of the terminal."""
        if self.measured is None or self.low is None or self.high is None:
            return f"not checked {self.name}: {self.detail}"
        shown = _points if self.name == "flips" else _times
        bound = "at least" if self.name == "tps" else "at most"
        return (
            f"{'ok' if self.status == 'ok' else 'FAILED'} {self.name}: {shown(self.measured)} "
            f"({self.detail}), allowed {bound} {shown(self.allowed)}, {100 * LEVEL:.0f} % interval "
            f"[{shown(self.low)}, {shown(self.high)}]"
        )


def _points(share: float) -> str:
    return f"{100 * share:+.2f} %"


def _times(ratio: float) -> str:
    return f"×{ratio:.4f}"


def compare_kld(new: Evaluation, base: Evaluation, limits: Limits, seed: int = 0) -> Criterion:
    """Compare the mean KL divergences from the reference, as a ratio, by a bootstrap over chunks.

    Both means are raised by a millionth of a nat, so that a baseline that is its own reference has
    a ratio too.
    """
    mine, other = new.kld.mean(axis=1), base.kld.mean(axis=1)

    def ratio(chosen: npt.NDArray[np.int64]) -> Doubles:
        raised = [
            np.maximum(each[chosen].mean(axis=-1), 0.0) + _KLD_FLOOR for each in (mine, other)
        ]
        quotient: Doubles = raised[0] / raised[1]
        return quotient

    return _compared(
        "kld",
        ratio,
        len(mine),
        1 + limits.max_kld_increase,
        seed,
        detail=f"{mine.mean():.6f} against {other.mean():.6f} nats a token",
        figures={"kld": float(mine.mean()), "baseline_kld": float(other.mean())},
    )


def compare_flips(new: Evaluation, base: Evaluation, limits: Limits, seed: int = 0) -> Criterion:
    """Compare how often the most likely next token is not the reference's.

    A flip is a token whose most likely successor the quantization changed. Measured is the share
    of flips of the new file less that of the baseline (1 − same top each), paired token by token:
    tokens where only the baseline agreed with the reference, less those where only the new file
    does, over all. How many tokens the two files differ in is told and not judged: another
    rounding, even a better one, changes many.
    """
    mine, other = new.top != new.top_reference, base.top != base.top_reference
    by_chunk = mine.mean(axis=1) - other.mean(axis=1)

    def difference(chosen: npt.NDArray[np.int64]) -> Doubles:
        means: Doubles = by_chunk[chosen].mean(axis=-1)
        return means

    lost, found = int((mine & ~other).sum()), int((other & ~mine).sum())
    changed = float((new.top != base.top).mean())
    return _compared(
        "flips",
        difference,
        len(by_chunk),
        limits.max_flips,
        seed,
        detail=f"{100 * mine.mean():.2f} % against {100 * other.mean():.2f} % of {mine.size} "
        f"tokens; {lost} lost and {found} found the reference's choice",
        figures={
            "flips": float(mine.mean()),
            "baseline_flips": float(other.mean()),
            "lost": lost,
            "found": found,
            "changed": changed,
            "n_tokens": mine.size,
        },
    )


def compare_tps(new: Speed, base: Speed, limits: Limits, seed: int = 0) -> Criterion:
    """Compare decoded tokens/s: the median of the ratios of neighbouring repetitions."""
    ratios = np.array(new.decode.samples) / np.array(base.decode.samples)

    def median(chosen: npt.NDArray[np.int64]) -> Doubles:
        medians: Doubles = np.median(ratios[chosen], axis=-1)
        return medians

    return _compared(
        "tps",
        median,
        len(ratios),
        limits.min_tps_ratio,
        seed,
        detail=f"{new.decode.median:.1f} against {base.decode.median:.1f} tokens/s decoded",
        figures={
            "tps": new.decode.median,
            "baseline_tps": base.decode.median,
            "repetitions": len(ratios),
        },
    )


def _compared(
    name: str,
    statistic: Callable[[npt.NDArray[np.int64]], Doubles],
    n_units: int,
    allowed: float,
    seed: int,
    *,
    detail: str,
    figures: Mapping[str, Any],
) -> Criterion:
    """Judge a statistic of drawn units (..., n_units) by its percentile interval."""
    measured = float(statistic(np.arange(n_units)))
    resampled = np.concatenate([statistic(drawn) for drawn in draws(n_units, N_RESAMPLES, seed)])
    low, high = (float(q) for q in np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    failed = high < allowed if name == "tps" else low > allowed
    status: Status = "failed" if failed else "ok"
    return Criterion(name, status, detail, allowed, measured, low, high, figures)
