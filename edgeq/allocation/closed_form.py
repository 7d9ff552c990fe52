"""Reverse water-filling: every tensor's bits in closed form, snapped to types."""

import math
from dataclasses import dataclass

import numpy as np

from edgeq.allocation.costs import Allocation, Budget, Costs, Problem, size_alone
from edgeq.allocation.knapsack import fitted


@dataclass(frozen=True)
class ClosedForm:
    """Bits such that every weight costs the same loss, were there a type for any number of bits.

    The loss of tensor l with R bits a weight is taken for n_l c_l 4^−R, c_l fitted to its
    candidates. Then R_l = R + ½ log₂(c_l / G), G the geometric mean of all c_l over the weights.

    References
    ----------
    BAQ, arXiv:2506.05664: bit allocation by equal loss; here per tensor, as GGUF has it.
    """

    def allocate(self, problem: Problem, budget: Budget) -> Allocation:
        """Return the choice; its facts hold ``gain_bound``, see ``gain_bound``.

        Raises
        ------
        RecipeError
            The budget is a loss or a time, or below the smallest file.
        """
        costs = problem.costs
        size_bytes = size_alone("closed-form", costs, budget)
        c, n = _coefficients(costs)
        mean = 8 * (size_bytes - costs.fixed_bytes) / n.sum()
        bits = mean + 0.5 * (np.log2(c) - np.average(np.log2(c), weights=n))
        choice = tuple(
            int(np.argmin([abs(8 * one.size_bytes / t.n_weights - r) for one in t.candidates]))
            for t, r in zip(costs.tensors, bits, strict=True)
        )
        bound = gain_bound(costs)
        note = (
            f"Were types continuous, allocation could lower the loss to {bound:.3f} × that of "
            "the same bits everywhere."
        )
        return Allocation(fitted(costs, choice, size_bytes), {"gain_bound": bound}, (note,))


def gain_bound(costs: Costs) -> float:
    """Return the geometric over the arithmetic mean of c_l: the least ratio to uniform bits."""
    c, n = _coefficients(costs)
    return math.exp(float(np.average(np.log(c), weights=n))) / float(np.average(c, weights=n))


def _coefficients(costs: Costs) -> tuple[np.ndarray, np.ndarray]:
    """Return c_l, geometric means over the candidates, and the weights n_l of every tensor."""
    c = []
    for tensor in costs.tensors:
        logs = [
            math.log(max(one.loss, 1e-30) / tensor.n_weights)
            + 16 * math.log(2) * one.size_bytes / tensor.n_weights
            for one in tensor.candidates
        ]
        c.append(math.exp(sum(logs) / len(logs)))
    return np.array(c), np.array([tensor.n_weights for tensor in costs.tensors], np.float64)
