"""RAMP: types chosen by a policy that Soft Actor-Critic has trained, or brought from elsewhere.

What it can do that an exact solver cannot: see measured losses that are no sums, and carry over to
a model on which nothing is measured. What it cannot: be better than the knapsack on sums.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.allocation.costs import Allocation, Budget, Choice, Problem, size_alone
from edgeq.allocation.evolution import uniform
from edgeq.allocation.features import features
from edgeq.allocation.game import Game, Reward
from edgeq.allocation.knapsack import Knapsack, fitted
from edgeq.allocation.policy import Policy, read_policy
from edgeq.errors import RecipeError

_FINALISTS = 3  # of each kind; measured on all of the text at the end
_NET = [64, 64]
_UPDATE_EVERY = 16  # steps
_UPDATES = 4
_CLONING_STEPS = 500
_LOOKS = 10  # at the policy during training


@dataclass(frozen=True)
class Ramp:
    """Soft Actor-Critic over the tensors in graph order, or a policy without training.

    Attributes
    ----------
    episodes : of training; each decides on every tensor
    measurements : episodes of the second half whose choice is measured in the model
    warm : start from the knapsack's choice: its games are replayed, the actor imitates it
    policy : file of a policy to apply as it is; empty: train
    save : file to keep the trained policy in; empty: nowhere

    References
    ----------
    RAMP, arXiv:2603.17891 (abstract), for the method; Haarnoja et al., Soft Actor-Critic,
    arXiv:1812.05905, as stable-baselines3 has it.
    """

    episodes: int = 200
    measurements: int = 24
    warm: bool = True
    policy: str = ""
    save: str = ""

    def allocate(self, problem: Problem, budget: Budget) -> Allocation:
        """Return the best choice that was seen, by the best judge that there is.

        That is the measured divergence, else the sum of losses. A warm start is among what is
        judged, so that training never makes it worse.

        Raises
        ------
        RecipeError
            The budget is no size or below the smallest file, the policy is none for this version,
            or stable-baselines3 is not installed.
        """
        size_bytes = size_alone("ramp", problem.costs, budget)
        if self.policy:
            policy = read_policy(Path(self.policy))
            game = Game(problem.costs, size_bytes, features(problem))
            choice = fitted(problem.costs, game.within(policy), size_bytes)
            note = (
                f"Types by the policy {self.policy}, trained on {policy.about}; nothing was tried."
            )
            return Allocation(choice, {"zero_shot": 1.0}, (note,))
        return _Training(self, problem, size_bytes).run()


class _Training:
    """One training."""

    def __init__(self, settings: Ramp, problem: Problem, size_bytes: int) -> None:
        self.settings = settings
        self.problem = problem
        self.costs = problem.costs
        self.size_bytes = size_bytes
        self.seen: set[Choice] = set()
        self.measured: dict[Choice, float] = {}  # on a part of the text
        self.judged: dict[Choice, float] = {}  # on all of it
        self.measure = problem.measure if settings.measurements else None
        self.n_episodes = 0
        self.game = Game(self.costs, size_bytes, features(problem))
        self.start = uniform(self.costs, size_bytes)

    def run(self) -> Allocation:
        """Train, and return the best of what was seen."""
        started = time.perf_counter()
        known = self.start
        if self.settings.warm:
            known = Knapsack().allocate(self.problem, Budget(size_bytes=self.size_bytes)).choice
        policies = {self.game.within(one): one for one in self._train(known)}
        cheapest = sorted(policies, key=self.costs.loss)[:_FINALISTS]
        own = min(cheapest, key=self._judge)
        if self.settings.save:
            policies[own].write(Path(self.settings.save))
        self.seen |= {known, own, fitted(self.costs, own, self.size_bytes)}
        finalists = [known, *sorted(self.seen, key=self.costs.loss)[:_FINALISTS]]
        finalists += sorted(self.measured, key=lambda one: self.measured[one])[:_FINALISTS]
        best = min(dict.fromkeys(finalists), key=self._judge)
        judged = {"start": known, "policy": own, "best": best}
        unit = "loss" if self.measure is None else "kld"
        return Allocation(
            best,
            {
                **{f"{unit}_{name}": self._judge(one) for name, one in judged.items()},
                "evaluations": float(len(self.measured) + len(self.judged)),
                "episodes": float(self.n_episodes),
                "seconds": time.perf_counter() - started,
            },
        )

    def _train(self, known: Choice) -> Iterator[Policy]:
        """Yield the actor before training, when it imitates a warm start, and during it."""
        try:
            import torch
            from stable_baselines3 import SAC
            from stable_baselines3.common.logger import Logger

            from edgeq.allocation.ramp_environment import AllocationEnv
        except ImportError as error:
            raise RecipeError(
                f"--allocator ramp: {error.name} is not installed. Install it with: "
                "pip install 'edgeq[rl]'"
            ) from error
        unit = max(self.costs.loss(self.start), 1e-30) / len(self.costs.tensors)
        env = AllocationEnv(self.game, unit, Reward(), self._finish)
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the networks are tiny, and sums keep their order
        try:
            model = SAC(
                "MlpPolicy",
                env,
                learning_rate=1e-3,
                buffer_size=100_000,
                learning_starts=0 if self.settings.warm else 5 * len(self.costs.tensors),
                batch_size=256,
                gamma=0.9,
                train_freq=_UPDATE_EVERY,
                gradient_steps=_UPDATES,
                ent_coef=0.02,
                policy_kwargs={"net_arch": _NET},
                seed=self.problem.seed,
                device="cpu",
            )
            model.set_logger(Logger(None, []))  # its own one makes a directory in /tmp every time
            about = f"{self.problem.file.path.name}, {{}} episodes"
            if self.settings.warm:
                self._imitate(model, env, known)
            yield _policy_of(model, about.format(0))
            for part in np.array_split(np.arange(self.settings.episodes), _LOOKS):
                if len(part):
                    model.learn(len(part) * len(self.costs.tensors), reset_num_timesteps=False)
                    yield _policy_of(model, about.format(self.n_episodes))
        finally:
            torch.set_num_threads(n_threads)

    def _imitate(self, model: Any, env: Any, choice: Choice) -> None:
        """Play the choice into the replay buffer, and fit the actor's mean to it."""
        import torch

        game = self.game
        states, actions = [], []
        state, _ = env.reset()
        for number, index in enumerate(choice):
            action = np.array([game.action(number, index)], np.float32)
            states.append(state)
            actions.append(action)
            following, paid, is_last, _, _ = env.step(action)
            model.replay_buffer.add(
                state[None],
                following[None],
                action[None],
                np.array([paid]),
                np.array([is_last]),
                [{}],
            )
            state = following
        actor = model.policy.actor
        inputs, wanted = torch.tensor(np.array(states)), torch.tensor(np.array(actions))
        optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
        for _ in range(_CLONING_STEPS):
            mean = torch.tanh(actor.mu(actor.latent_pi(inputs)))
            loss = torch.square(mean - wanted).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _finish(self, choice: Choice) -> float:
        """Remember an episode's choice; return ln of its measured over its predicted quality."""
        self.n_episodes += 1
        fit = fitted(self.costs, choice, self.size_bytes)
        self.seen.add(fit)
        measure, settings = self.measure, self.settings
        half = settings.episodes // 2
        every = max(1, (settings.episodes - half) // max(1, settings.measurements))
        if measure is None or self.n_episodes <= half or (self.n_episodes - half) % every:
            return 0.0
        if len(self.measured) >= settings.measurements:
            return 0.0
        if not self.measured:
            self.measured[self.start] = measure(self.start, 2)[0]
        kld = self.measured[fit] = measure(fit, 2)[0]
        predicted = self.costs.loss(fit) / max(self.costs.loss(self.start), 1e-30)
        reached = kld / max(self.measured[self.start], 1e-30)
        return math.log(max(reached, 1e-6) / max(predicted, 1e-6))

    def _judge(self, choice: Choice) -> float:
        """Return the measured divergence, or the sum of losses where nothing is measured."""
        if self.measure is None:
            return self.costs.loss(choice)
        if choice not in self.judged:
            self.judged[choice] = self.measure(choice, None)[0]
        return self.judged[choice]


def _policy_of(model: Any, about: str) -> Policy:
    """Return the mean of an actor of stable-baselines3."""
    actor = model.policy.actor
    linear = [part for part in actor.latent_pi if hasattr(part, "weight")] + [actor.mu]
    return Policy(
        tuple(
            (part.weight.detach().numpy().copy(), part.bias.detach().numpy().copy())
            for part in linear
        ),
        about,
    )
