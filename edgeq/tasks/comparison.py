"""Statistics of right and wrong answers, of one model and of two on the same items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgeq.errors import EvaluationError
from edgeq.tasks.scoring import ItemScore

_Z = 1.959963984540054  # of a normal distribution, 95 % within


@dataclass(frozen=True)
class Share:
    """A share of items and its 95 % interval, 0 to 1."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A file against its reference on the same items.

    Attributes
    ----------
    reference : share of items that the reference answers right
    to_wrong, to_right : items that only the reference answers right, and that only the file does
    changed : items with another answer than the reference's, right or wrong
    agreement : share of items with the same answer
    p_value : of McNemar's exact test: how likely right answers get lost and won so unevenly, or
        more so, if either were as likely
    """

    reference: Share
    to_wrong: int
    to_right: int
    changed: int
    agreement: Share
    p_value: float


def wilson(n_right: int, n_items: int) -> Share:
    """Return a share with Wilson's score interval.

    References
    ----------
    Wilson, JASA 22 (1927) 209; the interval that llama-perplexity prints.
    """
    value, z = n_right / n_items, _Z * _Z / n_items
    half = math.sqrt(z * (value * (1 - value) + z / 4))
    low, high = ((value + z / 2 + sign * half) / (1 + z) for sign in (-1, 1))
    return Share(value, max(low, 0.0), min(high, 1.0))


def mcnemar(to_wrong: int, to_right: int) -> float:
    """Return the two-sided p value of McNemar's exact test.

    Twice the probability that of n changes at most the smaller number go one way, at even odds.

    References
    ----------
    McNemar, Psychometrika 12 (1947) 153, with the binomial distribution itself.
    """
    n, fewer = to_wrong + to_right, min(to_wrong, to_right)
    ways = total = 1
    for k in range(fewer):
        ways = ways * (n - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / (1 << n))


def accuracy(scores: Sequence[ItemScore]) -> Share:
    """Return the share of right answers."""
    return wilson(sum(score.is_right for score in scores), len(scores))


def compare(scores: Sequence[ItemScore], reference: Sequence[ItemScore]) -> Comparison:
    """Compare a file's scores with its reference's on the same items.

    Raises
    ------
    EvaluationError
        They are not of the same number of items.
    """
    if len(scores) != len(reference):
        raise EvaluationError(
            f"tasks: got {len(scores)} answers and {len(reference)} of the reference, expected the "
            "same items. Ask both the same."
        )
    pairs = list(zip(scores, reference, strict=True))
    to_wrong = sum(other.is_right and not own.is_right for own, other in pairs)
    to_right = sum(own.is_right and not other.is_right for own, other in pairs)
    changed = sum(own.answer != other.answer for own, other in pairs)
    return Comparison(
        reference=accuracy(reference),
        to_wrong=to_wrong,
        to_right=to_right,
        changed=changed,
        agreement=wilson(len(pairs) - changed, len(pairs)),
        p_value=mcnemar(to_wrong, to_right),
    )
