"""Statistics of right and wrong answers, of one model and of two on the same items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeq.errors import EvaluationError
from edgeq.runtime.model import Tokens
from edgeq.tasks.answering import OpenScore
from edgeq.tasks.scoring import ItemScore

Score = ItemScore | OpenScore
_Z = 1.959963984540054  # of a normal distribution, 95 % within


@dataclass(frozen=True)
class Share:
    """A share of items and its 95 % interval, 0 to 1."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TextAgreement:
    """How near two models' texts are.

    Attributes
    ----------
    same : share of items after which both write the same text
    overlap, overlap_error : mean over the items of the F1 of their texts' longest common
        subsequence of tokens, 0 to 1, and its standard error; None of a single one
    """

    same: Share
    overlap: float
    overlap_error: float | None


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
    texts : agreement of the written texts; None: nothing was written
    """

    reference: Share
    to_wrong: int
    to_right: int
    changed: int
    agreement: Share
    p_value: float
    texts: TextAgreement | None = None


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


def overlap(one: Tokens, other: Tokens) -> float:
    """Return the F1 of the longest common subsequence of two texts' tokens; 1 for two empty ones.

    References
    ----------
    Lin, ROUGE, ACL 2004 workshop, section 3: ROUGE-L, of tokens of the model in place of words, so
    that every language and white space count.
    """
    if not len(one) or not len(other):
        return float(len(one) == len(other))
    longest = np.zeros(len(other) + 1, np.int64)  # of what was read of `one`, by what of `other`
    for token in one:
        longer = np.where(other == token, longest[:-1] + 1, longest[1:])
        longest[1:] = np.maximum.accumulate(longer)
    return 2 * float(longest[-1]) / (len(one) + len(other))


def _texts(pairs: Sequence[tuple[Score, Score]]) -> TextAgreement | None:
    texts = [
        (one, other)
        for one, other in pairs
        if isinstance(one, OpenScore) and isinstance(other, OpenScore)
    ]
    if not texts:
        return None
    overlaps = np.array([overlap(one.tokens, other.tokens) for one, other in texts])
    n = len(texts)
    error = float(overlaps.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    same = wilson(sum(one.text == other.text for one, other in texts), n)
    return TextAgreement(same, float(overlaps.mean()), error)


def accuracy(scores: Sequence[Score]) -> Share:
    """Return the share of right answers."""
    return wilson(sum(score.is_right for score in scores), len(scores))


def compare(scores: Sequence[Score], reference: Sequence[Score]) -> Comparison:
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
        texts=_texts(pairs),
    )
