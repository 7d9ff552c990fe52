"""The reinforcement-learned allocator: game, training, policies as files."""

import dataclasses
import itertools
import json
import math
import sys
import tempfile

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from safetensors.numpy import save_file

from converters.gguf_file import open_gguf
from edgeq.allocation import Budget, Costs, Problem
from edgeq.allocation.costs import Candidate, TensorCosts
from edgeq.allocation.evolution import uniform
from edgeq.allocation.features import NAMES, features
from edgeq.allocation.game import Game, Reward
from edgeq.allocation.knapsack import Knapsack
from edgeq.allocation.policy import Policy, read_policy
from edgeq.allocation.ramp import Ramp
from edgeq.errors import RecipeError

TYPES = [t for t in GGMLQuantizationType if t.name.startswith("Q")]
BITS = (2, 3, 4, 5, 6, 8)


@pytest.fixture(scope="module")
def problem(tiny):
    """A tiny model's tensors with made-up losses, and a measured loss with terms for pairs."""
    file = open_gguf(tiny)
    rng = np.random.default_rng(0)
    tensors, importances = [], {}
    for name, info in file.tensors.items():
        if len(info.shape) != 2:
            continue
        n = math.prod(info.shape)
        energy = 10 ** rng.normal(0, 1)
        importances[name] = (energy * rng.uniform(0.5, 2, (1, info.shape[1]))).astype(np.float32)
        rows = [Candidate(TYPES[i], n * b // 8, energy * n * 4.0**-b) for i, b in enumerate(BITS)]
        tensors.append(TensorCosts(name, info.shape, tuple(rows)))
    costs = Costs("sha", "weight", "rtn", 1000, 64, tuple(tensors))

    def measure(choice, n_chunks):
        losses = [one.loss for one in costs.chosen(choice)]
        pairs = sum(math.sqrt(a * b) for a, b in itertools.pairwise(losses))
        return sum(losses) + pairs, 0.0

    return Problem(costs, file, importances=importances, measure=measure, seed=1)


@pytest.fixture(scope="module")
def budget(problem):
    costs = problem.costs
    return Budget(
        size_bytes=(costs.size_bytes(costs.smallest) + costs.size_bytes(costs.largest)) // 2
    )


def kld(problem, choice):
    return problem.measure(choice, None)[0]


# ------------------------------------------------------------------------------ features and game


def test_a_tensor_is_eleven_standardised_numbers(problem, budget):
    table = features(problem)
    assert table.shape == (len(problem.costs.tensors), 10)
    assert np.isfinite(table).all()
    np.testing.assert_allclose(table.mean(axis=0), 0, atol=1e-6)
    deviations = table.std(axis=0)
    assert ((abs(deviations - 1) < 1e-6) | (deviations < 1e-6)).all()
    state = Game(problem.costs, budget.size_bytes, table).state(0, 0.0)
    assert state.shape == (11,) == (len(NAMES),)
    assert state[-1] == pytest.approx(0, abs=1e-5)  # nothing is spent: the mean is left


def test_without_importances_the_inputs_say_nothing(problem):
    table = features(dataclasses.replace(problem, importances=None))
    assert not table[:, :3].any()
    assert table[:, 3:].any()


def test_actions_and_types_stand_for_each_other(problem, budget):
    game = Game(problem.costs, budget.size_bytes, features(problem))
    for number, tensor in enumerate(problem.costs.tensors):
        for index in range(len(tensor.candidates)):
            action = game.action(number, index)
            if abs(action) < 0.98:
                assert game.index(number, action) == index


def test_spending_shows_in_the_state(problem, budget):
    game = Game(problem.costs, budget.size_bytes, features(problem))
    assert game.state(3, 0.5 * game.budget)[-1] < game.state(3, 0.0)[-1]


def test_the_budget_has_a_slope_on_both_sides_and_a_cliff_above():
    reward = Reward()
    assert reward.of_bytes(0.99) == 0
    assert reward.of_bytes(1.004) < 0
    assert reward.of_bytes(1.006) < reward.of_bytes(1.005) - reward.cliff
    assert reward.of_bytes(0.98 - 0.01) == pytest.approx(-reward.under)
    assert reward.over > reward.under


def test_the_environment_keeps_gymnasiums_rules(problem, budget):
    checker = pytest.importorskip("gymnasium.utils.env_checker")
    from edgeq.allocation.ramp_environment import AllocationEnv

    game = Game(problem.costs, budget.size_bytes, features(problem))
    ends = []
    env = AllocationEnv(game, 1.0, Reward(), lambda choice: ends.append(choice) or 0.0)
    checker.check_env(env, skip_render_check=True)
    env.reset()
    for _ in problem.costs.tensors:
        *_, ended, _, _ = env.step(np.zeros(1, np.float32))
    assert ended
    assert len(ends[-1]) == len(problem.costs.tensors)


# ------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def trained(problem, budget, tmp_path_factory):
    """A warm start whose policy is kept: (allocation, file)."""
    pytest.importorskip("stable_baselines3")
    path = tmp_path_factory.mktemp("policy") / "policy.safetensors"
    settings = Ramp(episodes=40, measurements=8, save=str(path))
    return settings.allocate(problem, budget), path


def test_a_warm_start_is_never_worse_than_the_knapsack(problem, budget, trained):
    found, _ = trained
    assert problem.costs.size_bytes(found.choice) <= budget.size_bytes
    start = Knapsack().allocate(problem, budget).choice
    assert kld(problem, found.choice) <= kld(problem, start)
    assert found.facts["kld_start"] == kld(problem, start)
    assert found.facts["kld_best"] == kld(problem, found.choice)


def test_what_is_learned_from_nothing_beats_the_same_bits_everywhere(problem, budget, tmp_path):
    """The policy's own choice, which no repair has looked at; untrained it is worse."""
    pytest.importorskip("stable_baselines3")
    game = Game(problem.costs, budget.size_bytes, features(problem))
    same = kld(problem, uniform(problem.costs, budget.size_bytes))
    reached = {}
    for episodes in (0, 100):
        path = tmp_path / f"{episodes}.safetensors"
        found = Ramp(episodes, measurements=6, warm=False, save=str(path)).allocate(problem, budget)
        assert problem.costs.size_bytes(found.choice) <= budget.size_bytes
        assert found.facts["episodes"] == episodes
        own = game.within(read_policy(path))
        assert problem.costs.size_bytes(own) <= budget.size_bytes
        reached[episodes] = kld(problem, own)
        assert reached[episodes] == found.facts["kld_policy"]
    assert reached[100] < 0.9 * same
    assert reached[100] < 0.9 * reached[0]


def test_every_measurement_is_counted(problem, budget):
    pytest.importorskip("stable_baselines3")
    asked = set()

    def measure(choice, n_chunks):
        asked.add((choice, n_chunks))
        return problem.measure(choice, n_chunks)

    noted = dataclasses.replace(problem, measure=measure)
    found = Ramp(episodes=10, measurements=4).allocate(noted, budget)
    assert found.facts["evaluations"] == len(asked)


def test_training_is_the_same_for_a_seed_and_leaves_nothing(
    problem, budget, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings = Ramp(episodes=40, measurements=8, save=str(tmp_path / "again.safetensors"))
    again = settings.allocate(problem, budget)
    assert again.choice == trained[0].choice
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]
    assert (tmp_path / "again.safetensors").read_bytes() == trained[1].read_bytes()


def test_nothing_measured_is_judged_by_the_costs(problem, budget):
    pytest.importorskip("stable_baselines3")
    found = Ramp(episodes=5).allocate(dataclasses.replace(problem, measure=None), budget)
    start = Knapsack().allocate(problem, budget).choice
    assert problem.costs.loss(found.choice) <= problem.costs.loss(start) * (1 + 1e-6)


# ------------------------------------------------------------------------------ policies


def test_a_policy_is_applied_without_the_extra(problem, budget, trained, monkeypatch):
    for name in ("stable_baselines3", "gymnasium", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    found = Ramp(policy=str(trained[1])).allocate(problem, budget)
    assert problem.costs.size_bytes(found.choice) <= budget.size_bytes
    assert found.choice == Ramp(policy=str(trained[1])).allocate(problem, budget).choice
    assert "episodes; nothing was tried" in found.notes[0]


def test_without_the_extra_training_says_what_to_install(problem, budget, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(RecipeError, match=r"pip install 'edgeq\[rl\]'"):
        Ramp(episodes=1).allocate(problem, budget)


def test_a_policy_survives_its_file(tmp_path):
    rng = np.random.default_rng(0)
    layers = tuple(
        (rng.normal(size=shape).astype(np.float32), rng.normal(size=shape[0]).astype(np.float32))
        for shape in ((8, 11), (8, 8), (1, 8))
    )
    policy = Policy(layers, "a model")
    policy.write(tmp_path / "policy.safetensors")
    again = read_policy(tmp_path / "policy.safetensors")
    state = rng.normal(size=11).astype(np.float32)
    assert again(state) == policy(state)
    assert -1 <= again(state) <= 1
    assert again.about == "a model"


def test_a_policy_on_other_features_is_refused(tmp_path):
    path = tmp_path / "policy.safetensors"
    about = {"schema": 1, "features": ["depth"], "trained on": "x"}
    save_file({"0.bias": np.zeros(1, np.float32)}, path, {"edgeq.policy": json.dumps(about)})
    with pytest.raises(RecipeError, match=r"on \['depth'\], expected schema 1 on 11 features"):
        read_policy(path)


@pytest.mark.parametrize("content", [None, b"", b"no safetensors"])
def test_what_is_no_policy_is_refused(tmp_path, content):
    path = tmp_path / "policy.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match="no readable policy"):
        read_policy(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"1.weight": None}, "KeyError"),
        ({"0.weight": np.zeros((8, 10), np.float32)}, "expected 11 numbers in and 1 out"),
        ({"1.weight": np.zeros((2, 8), np.float32)}, "expected 11 numbers in and 1 out"),
        ({"1.bias": np.array([np.nan], np.float32)}, "a weight is not finite"),
        ({"9.weight": np.zeros((1, 1), np.float32)}, "KeyError"),
    ],
)
def test_a_damaged_network_is_refused(tmp_path, changed, message):
    shapes = {"0.weight": (8, 11), "0.bias": (8,), "1.weight": (1, 8), "1.bias": (1,)}
    arrays = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()} | changed
    path = tmp_path / "policy.safetensors"
    about = {"schema": 1, "features": NAMES, "trained on": "x"}
    kept = {key: value for key, value in arrays.items() if value is not None}
    save_file(kept, path, {"edgeq.policy": json.dumps(about)})
    with pytest.raises(RecipeError, match=message):
        read_policy(path)
