"""Two files against each other: the same tokens, so their difference is far surer than either."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeq.errors import EvaluationError
from edgeq.evaluation.evaluate import Evaluation

_AT_ONCE = 1000  # resamples of one block, bounds the memory


@dataclass(frozen=True)
class Comparison:
    """The difference of two evaluations on the same tokens and reference.

    Attributes
    ----------
    difference : mean divergence of a less that of b, nats a token; negative: a is closer to the
        reference
    low, high : bootstrap interval of the difference, over chunks
    level : its nominal coverage
    standard_error : of the difference, over the resamples
    ratio : mean divergence of a as a multiple of that of b
    n_chunks : resampled units
    """

    difference: float
    low: float
    high: float
    level: float
    standard_error: float
    ratio: float
    n_chunks: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0.0 or self.high < 0.0


def compare(
    a: Evaluation,
    b: Evaluation,
    *,
    seed: int = 0,
    n_resamples: int = 10_000,
    level: float = 0.95,
) -> Comparison:
    """Compare the mean divergences of two files by a paired bootstrap over chunks.

    Tokens of one chunk depend on each other, so whole chunks are drawn: the interval is of the
    percentiles of the mean over n_chunks chunks drawn with replacement. With fewer than about ten
    chunks such an interval is too narrow.

    Raises
    ------
    EvaluationError
        The evaluations are of different tokens or references, or of one chunk only.

    References
    ----------
    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13, percentile interval.
    """
    for what, mine, other in (
        ("tokens", a.tokens_sha256, b.tokens_sha256),
        ("reference", (a.reference, a.reference_kind), (b.reference, b.reference_kind)),
    ):
        if mine != other:
            raise EvaluationError(
                f"compare: {a.model} and {b.model} were evaluated on different {what}; got {mine} "
                f"and {other}. Evaluate both in the same way."
            )
    if a.n_chunks < 2:
        raise EvaluationError(
            f"compare: {a.model}: one chunk cannot be resampled. Evaluate on more text."
        )
    per_chunk = a.kld.mean(axis=1) - b.kld.mean(axis=1)
    means = np.concatenate(
        [per_chunk[drawn].mean(axis=1) for drawn in draws(len(per_chunk), n_resamples, seed)]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    other_mean = float(b.kld.mean())
    return Comparison(
        difference=float(per_chunk.mean()),
        low=float(low),
        high=float(high),
        level=level,
        standard_error=float(means.std(ddof=1)),
        ratio=float(a.kld.mean()) / other_mean if other_mean > 0 else float("inf"),
        n_chunks=a.n_chunks,
    )


def draws(n_units: int, n_resamples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the resamples of a bootstrap, (some, n_units) indices at a time."""
    random = np.random.default_rng(seed)
    for start in range(0, n_resamples, _AT_ONCE):
        count = min(_AT_ONCE, n_resamples - start)
        yield random.integers(0, n_units, (count, n_units))
