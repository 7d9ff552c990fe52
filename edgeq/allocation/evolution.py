"""Level-switch evolution on the measured divergence: what sums of losses cannot see."""

import bisect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from edgeq.allocation.costs import Allocation, Budget, Choice, Costs, Problem, size_alone
from edgeq.allocation.knapsack import Knapsack, fitted
from edgeq.errors import RecipeError

Measure = Callable[[Choice, int | None], tuple[float, float]]


@dataclass(frozen=True)
class Evolution:
    """(1 + λ) search from the knapsack's choice, bytes kept, offspring judged on growing text.

    Attributes
    ----------
    generations : at most so many
    offspring : of a generation
    switches : tensors that an offspring moves a step up or down, on average
    start : ``knapsack``, or ``uniform``: the same bits everywhere

    References
    ----------
    Sieberling et al., EvoPress, arXiv:2410.14649, algorithm 2: level-switch mutation, multi-step
    selection. Ours: the bytes are made good where it costs the least loss a byte.
    """

    generations: int = 12
    offspring: int = 8
    switches: float = 3.0
    start: str = "knapsack"

    def allocate(self, problem: Problem, budget: Budget) -> Allocation:
        """Return the best choice that was measured.

        Raises
        ------
        RecipeError
            Nothing can be measured, the budget is no size, or below the smallest file.
        """
        if problem.measure is None:
            raise RecipeError(
                "--allocator evolution: there is no text to measure on. Give --text, or knapsack."
            )
        size_bytes = size_alone("evolution", problem.costs, budget)
        if self.start not in ("knapsack", "uniform"):
            raise RecipeError(f"--allocator evolution: start={self.start}; knapsack or uniform.")
        started = time.perf_counter()
        parent = self._first(problem, size_bytes)
        counted = _Counted(problem.measure)
        before = kld = counted(parent, None)
        rng = np.random.default_rng(problem.seed)
        ladders = [tensor.ladder for tensor in problem.costs.tensors]
        for _ in range(self.generations):
            brood = {
                self._child(problem, ladders, parent, size_bytes, rng)
                for _ in range(self.offspring)
            }
            best = _selected(sorted(brood - {parent}), counted)
            if best is not None and (found := counted(best, None)) < kld:
                parent, kld = best, found
        return Allocation(
            parent,
            {
                "kld_start": before,
                "kld": kld,
                "evaluations": float(counted.n),
                "seconds": time.perf_counter() - started,
            },
            (f"Evolution: KL divergence {before:.5f} → {kld:.5f} nats on tuning text.",),
        )

    def _first(self, problem: Problem, size_bytes: int) -> Choice:
        if self.start == "knapsack":
            return Knapsack().allocate(problem, Budget(size_bytes=size_bytes)).choice
        return uniform(problem.costs, size_bytes)

    def _child(
        self,
        problem: Problem,
        ladders: list[list[int]],
        parent: Choice,
        size_bytes: int,
        rng: np.random.Generator,
    ) -> Choice:
        """Move a few tensors a step up or down, and fit the others to the bytes."""
        costs, child = problem.costs, list(parent)
        n = min(1 + rng.poisson(self.switches - 1), len(child))
        moved = set(rng.choice(len(child), n, replace=False).tolist())
        for tensor in moved:
            ladder = ladders[tensor]
            at = bisect.bisect_left(ladder, child[tensor])
            child[tensor] = ladder[int(np.clip(at + rng.choice((-1, 1)), 0, len(ladder) - 1))]
        tensors = tuple(
            replace(t, candidates=(t.candidates[child[i]],)) if i in moved else t
            for i, t in enumerate(costs.tensors)
        )
        start = tuple(0 if i in moved else index for i, index in enumerate(child))
        try:
            found = fitted(replace(costs, tensors=tensors), start, size_bytes)
        except RecipeError:  # the moved ones alone are too large
            return parent
        return tuple(child[i] if i in moved else index for i, index in enumerate(found))


class _Counted:
    """A measure of the mean divergence that counts its calls."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self.n = 0

    def __call__(self, choice: Choice, n_chunks: int | None) -> float:
        self.n += 1
        return self._measure(choice, n_chunks)[0]


def _selected(brood: list[Choice], measure: Callable[[Choice, int | None], float]) -> Choice | None:
    """Return the best: a third of them survives one chunk of text, of those a third two."""
    for n_chunks in (1, 2):
        if len(brood) > 1:
            ranked = sorted(brood, key=lambda one: measure(one, n_chunks))
            brood = ranked[: -(-len(ranked) // 3)]
    return brood[0] if brood else None


def uniform(costs: Costs, size_bytes: int) -> Choice:
    """Return the choice of about the same bits for every tensor, within the bytes."""
    n_weights = sum(tensor.n_weights for tensor in costs.tensors)
    bits = 8 * (size_bytes - costs.fixed_bytes) / n_weights
    choice = []
    for tensor in costs.tensors:
        fits = [
            i
            for i, one in enumerate(tensor.candidates)
            if 8 * one.size_bytes / tensor.n_weights <= bits + 1e-9
        ]
        choice.append(min(fits, key=lambda i: tensor.candidates[i].loss) if fits else 0)
    return fitted(costs, tuple(choice), size_bytes)
