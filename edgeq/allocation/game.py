"""The game that a policy plays: one tensor after the other gets its type from a budget.

RAMP's text is not public beyond its abstract: off-policy Soft Actor-Critic, eleven features,
quality-prioritised reward with asymmetric penalties and budget cliffs. The constants, the features
and the shaping are ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeq.allocation.costs import Choice, Costs
from edgeq.allocation.features import Doubles
from edgeq.allocation.knapsack import pareto_curve

FloatArray = npt.NDArray[np.float32]
LIMIT = 20.0  # of a standardised feature
BITS = 3.0  # an action of ±1 is so many bits a weight above or below the budget's mean


@dataclass(frozen=True)
class Reward:
    """What the agent is paid; our choice.

    Attributes
    ----------
    quality : for a loss as large as a tensor's mean loss with the same bits everywhere
    over, under : taken for each percent above the budget, and below 98 % of it
    cliff : taken once above 100.5 %
    """

    quality: float = 1.0
    over: float = 2.0
    under: float = 0.5
    cliff: float = 10.0

    def of_bytes(self, share: float) -> float:
        """Return what the bytes are worth, `share` of the budget."""
        penalty = (
            self.over * max(0.0, share - 1) / 0.01 + self.under * max(0.0, 0.98 - share) / 0.01
        )
        return -penalty - (self.cliff if share > 1.005 else 0.0)


class Game:
    """The rules, without any learning: states, and what an action means.

    Parameters
    ----------
    size_bytes : of the whole file
    table : features of every tensor, (n_tensors, 10)
    """

    def __init__(self, costs: Costs, size_bytes: int, table: Doubles) -> None:
        self.costs = costs
        self.table = table
        self.weights = np.array([tensor.n_weights for tensor in costs.tensors], np.float64)
        self.budget = float(size_bytes - costs.fixed_bytes)
        self.mean_bits = 8 * self.budget / self.weights.sum()
        self.ladders = [tensor.ladder for tensor in costs.tensors]
        self.price = _price(costs, size_bytes)
        self.left_after = self.weights[::-1].cumsum()[::-1]

    def state(self, number: int, spent: float) -> FloatArray:
        """Return the 11 features of a tensor after `spent` bytes."""
        bits_left = 8 * (self.budget - spent) / float(self.left_after[number])
        left = math.log(max(bits_left, 0.1) / self.mean_bits)
        state = np.array([*self.table[number], 4 * left], np.float32)
        return np.clip(state, -LIMIT, LIMIT, out=state)

    def index(self, number: int, action: float) -> int:
        """Return the candidate on the tensor's Pareto ladder that an action chooses."""
        bits = self.mean_bits + BITS * action
        candidates, n = self.costs.tensors[number].candidates, self.weights[number]
        return min(self.ladders[number], key=lambda i: abs(8 * candidates[i].size_bytes / n - bits))

    def action(self, number: int, index: int) -> float:
        """Return the action that chooses a candidate."""
        bits = 8 * self.costs.tensors[number].candidates[index].size_bytes / self.weights[number]
        return float(np.clip((bits - self.mean_bits) / BITS, -0.98, 0.98))

    def play(self, policy: Callable[[FloatArray], float]) -> Choice:
        """Return what a policy chooses."""
        choice: list[int] = []
        spent = 0.0
        for number, tensor in enumerate(self.costs.tensors):
            index = self.index(number, policy(self.state(number, spent)))
            spent += tensor.candidates[index].size_bytes
            choice.append(index)
        return tuple(choice)


def _price(costs: Costs, size_bytes: int) -> float:
    """Return what a byte is worth at this size: the slope of the curve of losses over bytes."""
    before: tuple[int, float] | None = None
    slope = 0.0
    for size, loss, _ in pareto_curve(costs):
        if before is not None and size > before[0]:
            slope = (before[1] - loss) / (size - before[0])
        if size >= size_bytes:
            break
        before = (size, loss)
    return slope
