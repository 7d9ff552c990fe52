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
_BISECTIONS = 12
BITS = 3.0  # an action of ±1 is so many bits a weight above or below the budget's mean


@dataclass(frozen=True)
class Reward:
    """What the agent is paid; our choice.

    Attributes
    ----------
    quality : taken for each e-fold of a tensor's cost; see ``of_tensor``
    over, under : taken for each percent above the budget, and below 98 % of it, up to 10 %
    cliff : taken once above 100.5 %
    """

    quality: float = 1.0
    over: float = 0.2
    under: float = 0.05
    cliff: float = 1.0

    def of_tensor(self, regret: float) -> float:
        """Return what a decision is worth, `regret` as ``Game.regret`` has it.

        Losses of the types span five orders of magnitude; their logarithm is what a network fits.
        """
        return -self.quality * math.log1p(regret)

    def of_bytes(self, share: float) -> float:
        """Return what the bytes are worth, `share` of the budget."""
        over, under = (min(max(0.0, part), 0.1) / 0.01 for part in (share - 1, 0.98 - share))
        return -self.over * over - self.under * under - (self.cliff if share > 1.005 else 0.0)


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
        price = _price(costs, size_bytes)
        self._prices = [
            [one.loss + price * one.size_bytes for one in tensor.candidates]
            for tensor in costs.tensors
        ]
        self.left_after = self.weights[::-1].cumsum()[::-1]

    def state(self, number: int, spent: float) -> FloatArray:
        """Return the 11 features of a tensor after `spent` bytes."""
        bits_left = 8 * (self.budget - spent) / float(self.left_after[number])
        left = math.log(max(bits_left, 0.1) / self.mean_bits)
        state = np.array([*self.table[number], 4 * left], np.float32)
        return np.clip(state, -LIMIT, LIMIT, out=state)

    def regret(self, number: int, index: int) -> float:
        """Return loss and price of a candidate above those of the tensor's best; nats."""
        return self._prices[number][index] - min(self._prices[number])

    def index(self, number: int, action: float) -> int:
        """Return the candidate on the tensor's Pareto ladder that an action chooses."""
        bits = self.mean_bits + BITS * action
        candidates, n = self.costs.tensors[number].candidates, self.weights[number]
        return min(self.ladders[number], key=lambda i: abs(8 * candidates[i].size_bytes / n - bits))

    def action(self, number: int, index: int) -> float:
        """Return the action that chooses a candidate."""
        bits = 8 * self.costs.tensors[number].candidates[index].size_bytes / self.weights[number]
        return float(np.clip((bits - self.mean_bits) / BITS, -0.98, 0.98))

    def within(self, policy: Callable[[FloatArray], float]) -> Choice:
        """Return what a policy chooses with all of its actions moved alike until the bytes fit.

        No loss is looked at.
        """
        best, most = self.costs.smallest, -1
        low, high = -2.0, 2.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            choice = self.play(policy, middle)
            size = sum(one.size_bytes for one in self.costs.chosen(choice))
            if size > self.budget:
                high = middle
                continue
            low = middle
            if size > most:
                best, most = choice, size
        return best

    def play(self, policy: Callable[[FloatArray], float], moved: float = 0.0) -> Choice:
        """Return what a policy chooses, `moved` added to every action."""
        choice: list[int] = []
        spent = 0.0
        for number, tensor in enumerate(self.costs.tensors):
            index = self.index(number, policy(self.state(number, spent)) + moved)
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
