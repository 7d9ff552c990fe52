"""The game as a gymnasium environment, for training."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from edgeq.allocation.costs import Choice
from edgeq.allocation.game import LIMIT, FloatArray, Game, Reward


class AllocationEnv(gymnasium.Env[FloatArray, FloatArray]):
    """The game as a gymnasium environment; an episode decides on every tensor once.

    Each step pays for the tensor's own loss and, at the curve's price, its bytes, so that credit
    need not travel over hundreds of decisions. The end pays for the budget, and for what was
    measured beyond the sum of losses.

    Parameters
    ----------
    unit : regret that counts as 1
    finish : called with the choice at the end; returns ln of the measured over the predicted
        quality, 0 where nothing is measured
    """

    def __init__(
        self, game: Game, unit: float, reward: Reward, finish: Callable[[Choice], float]
    ) -> None:
        self.observation_space = gymnasium.spaces.Box(-LIMIT, LIMIT, (11,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        self._game = game
        self._unit = unit
        self._reward = reward
        self._finish = finish
        self._choice: list[int] = []
        self._spent = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Begin with nothing spent."""
        super().reset(seed=seed)
        self._choice, self._spent = [], 0.0
        return self._game.state(0, 0.0), {}

    def step(self, action: FloatArray) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        """Give the tensor its type and pay for it."""
        game, number = self._game, len(self._choice)
        index = game.index(number, float(action[0]))
        one = game.costs.tensors[number].candidates[index]
        self._choice.append(index)
        self._spent += one.size_bytes
        paid = self._reward.of_tensor(game.regret(number, index) / self._unit)
        is_last = len(self._choice) == len(game.costs.tensors)
        if is_last:
            paid += self._reward.of_bytes(self._spent / game.budget)
            paid -= self._reward.quality * self._finish(tuple(self._choice))
        at = number if is_last else number + 1
        return game.state(at, self._spent), paid, is_last, False, {}
