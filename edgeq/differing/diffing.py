"""The walk of ``edgeq diff``: prompts, comparisons, search, screen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.console import Steps
from edgeq.differing.comparing import Pair, Settings, check_vocabularies, compare
from edgeq.differing.decoding import Side, read_tokens
from edgeq.differing.prompts import Prompt, read_prompts, read_refusals
from edgeq.differing.results import ClassDivergence, Difference
from edgeq.differing.screen import Screen, screen
from edgeq.differing.search import search
from edgeq.errors import EvaluationError
from edgeq.registry import unknown_name
from edgeq.runtime.model import CACHES, Tokens
from edgeq.texts.chat_template import ChatTemplate
from edgeq.texts.writing import Reader

_CLASS_FACTOR = 4.0  # times the median divergence of the other classes
_CLASS_ERRORS = 3.0  # standard errors that it must be above that
_FEW_CLASSES = 3


@dataclass(frozen=True, eq=False)
class Outcome:
    """What ``diff`` found.

    Attributes
    ----------
    differences : one for each comparison
    screen : of the weights; None: not asked for
    source : the screened file against its float source, on the same prompts
    """

    differences: tuple[Difference, ...]
    screen: Screen | None = None
    source: Difference | None = None

    @property
    def stands_out(self) -> tuple[str, ...]:
        """A line for each tensor, and class of prompts, that the source does not explain."""
        weights = () if self.screen is None else self.screen.lines
        return (*weights, *(() if self.source is None else odd_classes(self.source.classes)))

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        source = None if self.source is None else self.source.as_json()
        return {
            "comparisons": [each.as_json() for each in self.differences],
            "screen": None
            if self.screen is None
            else {**self.screen.as_json(), "stand_out": list(self.stands_out), "source": source},
        }

    def as_text(self) -> str:
        """Return what a terminal shows."""
        parts = [each.as_text() for each in self.differences]
        if self.source is not None:
            parts.append(self.source.as_text())
        if self.screen is not None:
            n = len(self.screen.tensors)
            verdict = f"{len(self.stands_out)} stand out" if self.stands_out else "none stands out"
            parts.append(
                "\n".join(
                    [
                        f"Screen of {self.screen.path} against {self.screen.reference}: {n} "
                        f"tensors, {verdict}",
                        *self.stands_out,
                    ]
                )
            )
        return "\n\n".join(parts)


def odd_classes(classes: Sequence[ClassDivergence]) -> tuple[str, ...]:
    """Return a line for each class whose divergence is surely far above that of the others."""
    lines = []
    for each in classes:
        others = [other.kld for other in classes if other is not each]
        if len(classes) < _FEW_CLASSES or each.error is None:
            continue
        allowed = _CLASS_FACTOR * float(np.median(others))
        if each.kld - _CLASS_ERRORS * each.error > allowed:
            lines.append(
                f"class {each.label}: diverges by {each.kld:.4f} ± {each.error:.4f} nats a token, "
                f"of other classes {np.median(others):.4f}"
            )
    return tuple(lines)


def diff(
    sides: Sequence[Side],
    prompts: Path,
    *,
    n_tokens: int = 64,
    refusals: Path | None = None,
    chat: bool = False,
    n_search: int = 0,
    reference: Path | None = None,
    screened: Path | None = None,
    seed: int = 0,
    n_threads: int | None = None,
    steps: Steps | None = None,
) -> Outcome:
    """Compare the first side with each other one, and screen a file.

    Parameters
    ----------
    sides : the first is A of every comparison
    prompts : file of prompts, see ``read_prompts``
    refusals : file of openings, see ``read_refusals``
    chat : wrap prompts as messages with the first file's chat template
    n_search : mutated prompts that are tried in each comparison
    reference, screened : float source of a file that is screened, and that file

    Raises
    ------
    EvaluationError
        A file of prompts is broken, two files have other tokens, or a KV cache is unknown.
    """
    steps = steps or Steps()
    for side in sides:
        if side.cache not in CACHES:
            raise EvaluationError(
                f"--cache: {unknown_name('type of KV cache', side.cache, list(CACHES))}"
            )
    if len(set(sides)) < len(sides):
        raise EvaluationError(
            f"{sides[0].name}: is compared with itself. Give another file, or --cache q8_0."
        )
    settings = Settings(n_tokens, read_refusals(refusals), seed)
    read = read_prompts(prompts)
    for side in sides[1:]:
        check_vocabularies(sides[0].path, side.path)
    if reference is not None and screened is not None:
        check_vocabularies(reference, screened)
    run = _Run(
        read, read_tokens(prompts, read, sides[0], chat=chat), settings, chat, n_threads, steps
    )
    differences = tuple(run.compare(sides[0], side, n_search) for side in sides[1:])
    if reference is None or screened is None:
        return Outcome(differences)
    with steps.step("screen") as progress:
        weights = screen(screened, reference, progress)
    return Outcome(differences, weights, run.compare(Side(reference), Side(screened), 0))


@dataclass(frozen=True, eq=False)
class _Run:
    prompts: Sequence[Prompt]
    tokens: Sequence[Tokens]
    settings: Settings
    chat: bool
    n_threads: int | None
    steps: Steps

    def compare(self, a: Side, b: Side, n_search: int) -> Difference:
        """Compare two sides, and search for worse prompts."""
        longest = max(len(tokens) for tokens in self.tokens)
        with Pair(a, b, longest, self.settings, self.n_threads) as pair:
            with self.steps.step(f"compare {b.name}") as progress:
                found = compare(pair, self.prompts, self.tokens, progress)
            if not n_search:
                return found
            template = ChatTemplate.from_gguf(a.path) if self.chat else None
            encode = Reader(pair.first, template).tokens
            with self.steps.step(f"search {b.name}") as progress:
                worst = search(pair, found.answers, n_search, encode, progress)
        return replace(found, found=worst)
