"""From per-token values to the figures of a table, as llama-perplexity computes and prints them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

KLD_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
DELTA_P_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error over tokens, both in the unit of the quantity."""

    value: float
    error: float


@dataclass(frozen=True)
class Summary:
    """The figures of one evaluation.

    Attributes
    ----------
    ppl, ppl_reference : perplexity
    ppl_correlation : correlation of the two models' −ln p over tokens, 0 to 1
    ln_ppl_ratio, ppl_ratio, ppl_difference : of the file against the reference
    kld : mean Kullback–Leibler divergence of the file from the reference, nats a token
    kld_percentiles : "max", "99.9", ..., "50" (median), ..., "min" -> nats
    delta_p : mean change of the next token's probability, 0.01 is one percent point
    delta_p_rms : root mean square of that change
    delta_p_percentiles : "max", ..., "min"
    same_top : fraction of tokens whose most likely next token is the reference's
    flips : tokens whose most likely next token changed
    flips_to_wrong, flips_to_right : of those, the ones where the reference's choice was the
        token that follows in the text, and where the file's is
    n_tokens : tokens that were scored
    kld_bound : upper limit of the error of the mean divergence that a compact reference causes,
        nats; 0 where the reference is complete
    """

    ppl: Estimate
    ppl_reference: Estimate
    ppl_correlation: float
    ln_ppl_ratio: Estimate
    ppl_ratio: Estimate
    ppl_difference: Estimate
    kld: Estimate
    kld_percentiles: Mapping[str, float]
    delta_p: Estimate
    delta_p_rms: Estimate
    delta_p_percentiles: Mapping[str, float]
    same_top: Estimate
    flips: int
    flips_to_wrong: int
    flips_to_right: int
    n_tokens: int
    kld_bound: float


def mean(values: npt.NDArray[np.floating]) -> Estimate:
    """Return the mean of `values` and its standard error; the error is 0 up to 10 values."""
    n = values.size
    doubles = values.astype(np.float64).ravel()
    value = float(doubles.sum() / n)
    variance = float((doubles * doubles).sum() / n) - value * value
    return Estimate(value, math.sqrt(variance / (n - 1)) if variance > 0 and n > 10 else 0.0)


def _covariance_of_means(a: Doubles, b: Doubles) -> float:
    n = a.size
    if n < 10:
        return 0.0
    return float(((a * b).sum() / n - (a.sum() / n) * (b.sum() / n)) / (n - 1))


def _difference_error(a: float, b: float, covariance: float) -> float:
    return math.sqrt(max(a * a + b * b - 2.0 * covariance, 0.0))


def percentiles(values: npt.NDArray[np.floating], at: tuple[float, ...]) -> dict[str, float]:
    """Return "max", the percentiles `at` and "min", interpolated in float32.

    References
    ----------
    llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp, kl_divergence: its ``percentile``. The
    median is the middle value or the mean of both.
    """
    ordered = np.sort(values.astype(np.float32).ravel())
    last = len(ordered) - 1
    found = {"max": float(ordered[-1])}
    for percent in at:
        if percent == 50.0:
            pair = ordered[last // 2] + ordered[(last + 1) // 2]
            found["50"] = float(np.float32(0.5) * pair)
            continue
        place = np.float32(percent / 100) * np.float32(last)
        low = int(place)
        part = np.float32(place - np.float32(low))
        high = ordered[min(low + 1, last)]
        found[f"{percent:g}"] = float((np.float32(1) - part) * ordered[low] + part * high)
    found["min"] = float(ordered[0])
    return found


def _root_mean_square(delta_p: Floats) -> Estimate:
    squares = mean(delta_p * delta_p)
    rms = math.sqrt(squares.value)
    return Estimate(rms, 0.5 / rms * squares.error if rms > 0 else 0.0)


def summarize(
    *,
    nll: Doubles,
    nll_reference: Doubles,
    kld: Doubles,
    delta_p: Floats,
    top: npt.NDArray[np.int32],
    top_reference: npt.NDArray[np.int32],
    next_tokens: npt.NDArray[np.int32],
    kld_bound: Doubles | None,
) -> Summary:
    """Return the figures of per-token arrays of one shape; see ``Summary``."""
    log_ppl, log_reference = mean(nll), mean(nll_reference)
    covariance = _covariance_of_means(nll.ravel(), nll_reference.ravel())
    errors = log_ppl.error * log_reference.error
    ppl = math.exp(log_ppl.value)
    ppl_reference = math.exp(log_reference.value)
    ratio = log_ppl.value - log_reference.value
    ratio_error = _difference_error(log_ppl.error, log_reference.error, covariance)
    difference_error = _difference_error(
        ppl * log_ppl.error, ppl_reference * log_reference.error, ppl * ppl_reference * covariance
    )
    same = top == top_reference
    n = same.size
    agreement = int(same.sum()) / n
    return Summary(
        ppl=Estimate(ppl, ppl * log_ppl.error),
        ppl_reference=Estimate(ppl_reference, ppl_reference * log_reference.error),
        ppl_correlation=covariance / errors if errors > 0 else 1.0,
        ln_ppl_ratio=Estimate(ratio, ratio_error),
        ppl_ratio=Estimate(math.exp(ratio), math.exp(ratio) * ratio_error),
        ppl_difference=Estimate(ppl - ppl_reference, difference_error),
        kld=mean(kld),
        kld_percentiles=percentiles(kld, KLD_PERCENTILES),
        delta_p=mean(delta_p),
        delta_p_rms=_root_mean_square(delta_p),
        delta_p_percentiles=percentiles(delta_p, DELTA_P_PERCENTILES),
        same_top=Estimate(agreement, math.sqrt(agreement * (1 - agreement) / max(n - 1, 1))),
        flips=n - int(same.sum()),
        flips_to_wrong=int((~same & (top_reference == next_tokens)).sum()),
        flips_to_right=int((~same & (top == next_tokens)).sum()),
        n_tokens=n,
        kld_bound=0.0 if kld_bound is None else float(kld_bound.mean()),
    )
