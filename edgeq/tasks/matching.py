"""How a written text is judged: by accepted answers, or by whether it does as it was told.

Words are compared as SQuAD's script compares them: in lower case, without punctuation, articles
and spaces that are too many. Instructions are those of IFEval that a program can verify.

References
----------
Rajpurkar et al., SQuAD, arXiv:1606.05250, section 6.1; Zhou et al., IFEval, arXiv:2311.07911,
table 1; Cobbe et al., GSM8K, arXiv:2110.14168, whose answers are numbers.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BULLET = re.compile(r"\s*[-*•]\s+\S")


def normalized(text: str) -> str:
    """Return the words of a text as they are compared."""
    kept = "".join(
        c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P"
    )
    return " ".join(_ARTICLES.sub(" ", kept).split())


@dataclass(frozen=True)
class Verdict:
    """What a text is worth.

    Attributes
    ----------
    is_right : whether it answers, or does as it was told
    answer : what must be the same in two texts for them to give the same answer
    """

    is_right: bool
    answer: str


@dataclass(frozen=True)
class Match:
    """One way to judge.

    Attributes
    ----------
    takes : what ``answers`` of an item hold: one or several texts of words or characters, a number
        each, a single count, nothing
    judge : called with the text and the answers
    """

    takes: Literal["words", "characters", "numbers", "count", "nothing"]
    judge: Callable[[str, Sequence[str]], Verdict]


def problem(match: Match, answers: Sequence[str]) -> str | None:
    """Return what is expected of `answers` instead; None: they are what `match` takes."""
    if match.takes == "nothing":
        return "none: this match takes no answer" if answers else None
    if match.takes == "count":
        is_count = len(answers) == 1 and answers[0].isdecimal() and int(answers[0]) > 0
        return None if is_count else "a count like '3'"
    if not answers:
        return "some text, or a list of texts"
    if match.takes == "numbers":
        whole = all(_NUMBER.fullmatch(answer.strip()) for answer in answers)
        return None if whole else "numbers like '42'"
    if match.takes == "words":
        return None if all(map(normalized, answers)) else "words beside articles and punctuation"
    return None if all(answer.strip() for answer in answers) else "some text"


def _equals(text: str, answers: Sequence[str]) -> Verdict:
    found = normalized(text)
    return Verdict(found in map(normalized, answers), found)


def _first_line(text: str, answers: Sequence[str]) -> Verdict:
    lines = text.strip().splitlines()
    return _equals(lines[0] if lines else "", answers)


def _holds(found: str, answer: str) -> bool:
    return f" {normalized(answer)} " in f" {found} "


def _contains(text: str, answers: Sequence[str]) -> Verdict:
    found = normalized(text)
    held = [normalized(answer) for answer in answers if _holds(found, answer)]
    return Verdict(bool(held), held[0] if held else found)


def _contains_all(text: str, answers: Sequence[str]) -> Verdict:
    found = normalized(text)
    held = [normalized(answer) for answer in answers if _holds(found, answer)]
    return Verdict(len(held) == len(answers), ", ".join(held))


def _starts_with(text: str, answers: Sequence[str]) -> Verdict:
    found = normalized(text)
    begun = [
        normalized(answer) for answer in answers if f"{found} ".startswith(f"{normalized(answer)} ")
    ]
    return Verdict(bool(begun), begun[0] if begun else found)


def _last_number(text: str, answers: Sequence[str]) -> Verdict:
    numbers = _NUMBER.findall(text)
    if not numbers:
        return Verdict(False, "")
    value = float(numbers[-1].replace(",", ""))
    wanted = {float(answer.strip().replace(",", "")) for answer in answers}
    return Verdict(value in wanted, f"{value:.15g}")


# ---- instructions: done or not -------------------------------------------------------------------


def _done(is_done: bool) -> Verdict:
    return Verdict(is_done, "done" if is_done else "not done")


def _ends_with(text: str, answers: Sequence[str]) -> Verdict:
    bare = text.strip().rstrip(string.punctuation + "”’").lower()
    ends = [answer.strip().rstrip(string.punctuation).lower() for answer in answers]
    return _done(any(re.search(rf"(?<!\w){re.escape(end)}$", bare) for end in ends))


def _lacks(text: str, answers: Sequence[str]) -> Verdict:
    found = normalized(text)
    return _done(bool(found) and not any(_holds(found, answer) for answer in answers))


def _bullets(text: str, answers: Sequence[str]) -> Verdict:
    n = sum(_BULLET.match(line) is not None for line in text.splitlines())
    return _done(n == int(answers[0]))


def _most_words(text: str, answers: Sequence[str]) -> Verdict:
    return _done(0 < len(text.split()) <= int(answers[0]))


MATCHES = {
    "exact": Match("words", _equals),
    "first_line": Match("words", _first_line),
    "starts_with": Match("words", _starts_with),
    "contains": Match("words", _contains),
    "contains_all": Match("words", _contains_all),
    "last_number": Match("numbers", _last_number),
    "ends_with": Match("characters", _ends_with),
    "lacks": Match("words", _lacks),
    "lower_case": Match("nothing", lambda text, _: _done(text.islower())),
    "upper_case": Match("nothing", lambda text, _: _done(text.isupper())),
    "bullets": Match("count", _bullets),
    "most_words": Match("count", _most_words),
}
