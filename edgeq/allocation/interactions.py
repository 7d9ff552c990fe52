"""How far the sum of single losses is from the loss of all together.

Random choices along the whole curve are measured. Two corrections of the sum are fitted to a part
of them and judged on the rest: a power of the sum, and terms for neighbouring tensors. The sum
itself is kept where neither is clearly better.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.allocation.costs import Budget, Choice, Costs, Problem
from edgeq.allocation.knapsack import Knapsack

Doubles = npt.NDArray[np.float64]
_THRESHOLD = 0.9  # of the sum's held-out error, that a correction has to reach
_NOISE = 0.7  # of the natural logarithms of losses: choices near the best, yet different
_REACH = 7  # tensors in the graph's order that count as neighbours: about a layer
_RIDGE = 1e-2


@dataclass(frozen=True)
class Interactions:
    """A fitted correction of the sum S of losses.

    Attributes
    ----------
    model : ``additive``: S; ``power``: a S^p; ``pairs``: S + Σ w_rs Σ √(l_i l_j), i and j
        neighbours of roles r and s
    scale, power : a and p
    pairs : "role role" to w
    held_out : model to its median relative error on choices that it was not fitted to
    n_choices : that were measured
    """

    model: str
    scale: float
    power: float
    pairs: Mapping[str, float]
    held_out: Mapping[str, float]
    n_choices: int

    def predict(self, costs: Costs, choice: Choice) -> float:
        """Return the predicted joint loss of a choice."""
        total = costs.loss(choice)
        if self.model == "power":
            return self.scale * float(total**self.power)
        if self.model == "pairs":
            terms = pair_terms(costs, choice)
            return max(0.0, total + sum(self.pairs.get(k, 0.0) * v for k, v in terms.items()))
        return total

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; ``Interactions(**values)`` is the same again."""
        return asdict(self)


def fit_interactions(
    problem: Problem, n_choices: int = 24, *, n_chunks: int | None = 1
) -> Interactions:
    """Measure random choices and fit.

    Parameters
    ----------
    problem : its `measure` must be there
    n_choices : to measure; every third is held out
    n_chunks : of tuning text for each
    """
    costs, measure = problem.costs, problem.measure
    if measure is None:
        raise ValueError("nothing can be measured")
    choices = random_choices(problem, n_choices)
    joint = np.array([max(measure(choice, n_chunks)[0], 1e-12) for choice in choices])
    fitted_on = np.arange(n_choices) % 3 != 2
    sums = np.array([max(costs.loss(choice), 1e-12) for choice in choices])
    terms = [pair_terms(costs, choice) for choice in choices]
    scale, power = _fit_power(sums[fitted_on], joint[fitted_on])
    pairs = _fit_pairs(
        [one for one, used in zip(terms, fitted_on, strict=True) if used],
        sums[fitted_on],
        joint[fitted_on],
    )
    made = Interactions("additive", scale, power, pairs, {}, n_choices)
    held_out = {
        model: _error(replace(made, model=model), costs, choices, joint, ~fitted_on)
        for model in ("additive", "power", "pairs")
    }
    best = min(held_out, key=lambda one: held_out[one])
    if not held_out[best] < _THRESHOLD * held_out["additive"]:
        best = "additive"
    return replace(made, model=best, held_out=held_out)


def random_choices(problem: Problem, n_choices: int) -> list[Choice]:
    """Return optima of randomly changed losses, at sizes spread over the curve."""
    costs, rng = problem.costs, np.random.default_rng(problem.seed)
    least, most = costs.size_bytes(costs.smallest), costs.size_bytes(costs.largest)
    found = []
    for share in rng.permutation(np.linspace(0.05, 0.75, n_choices)):
        factors = np.exp(rng.normal(0, _NOISE, len(costs.tensors)))
        tensors = tuple(
            replace(t, candidates=tuple(replace(c, loss=factor * c.loss) for c in t.candidates))
            for t, factor in zip(costs.tensors, factors.tolist(), strict=True)
        )
        changed = replace(problem, costs=replace(costs, tensors=tensors))
        size = int(least * (most / least) ** share)
        found.append(Knapsack().allocate(changed, Budget(size_bytes=size)).choice)
    return found


def pair_terms(costs: Costs, choice: Choice) -> dict[str, float]:
    """Return Σ √(l_i l_j) over neighbouring tensors, by their roles."""
    losses = [one.loss for one in costs.chosen(choice)]
    roles = [_role(tensor.name) for tensor in costs.tensors]
    found: dict[str, float] = {}
    for i, first in enumerate(losses):
        for j in range(i + 1, min(i + 1 + _REACH, len(losses))):
            key = " ".join(sorted((roles[i], roles[j])))
            found[key] = found.get(key, 0.0) + math.sqrt(max(first, 0) * max(losses[j], 0))
    return found


def _role(name: str) -> str:
    return re.sub(r"^blk\.\d+\.|\.weight$", "", name)


def _fit_power(sums: Doubles, joint: Doubles) -> tuple[float, float]:
    power, log_scale = np.polyfit(np.log(sums), np.log(joint), 1)
    return math.exp(log_scale), float(power)


def _fit_pairs(
    terms: Sequence[Mapping[str, float]], sums: Doubles, joint: Doubles
) -> dict[str, float]:
    """Return ridge weights of the pair terms for the relative error of the sum."""
    keys = sorted({key for one in terms for key in one})
    design = np.array([[one.get(key, 0.0) for key in keys] for one in terms]) / joint[:, None]
    wanted = (joint - sums) / joint
    gram = design.T @ design
    gram[np.diag_indices_from(gram)] += _RIDGE * max(float(np.trace(gram)) / len(keys), 1e-12)
    weights = np.linalg.solve(gram, design.T @ wanted)
    return dict(zip(keys, weights.tolist(), strict=True))


def _error(
    model: Interactions,
    costs: Costs,
    choices: Sequence[Choice],
    joint: Doubles,
    judged: npt.NDArray[np.bool_],
) -> float:
    errors = [
        abs(model.predict(costs, choice) / float(value) - 1)
        for choice, value, used in zip(choices, joint, judged, strict=True)
        if used
    ]
    return float(np.median(errors))
