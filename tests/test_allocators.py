"""Allocators on small problems whose best choice is found by trying all of them."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.gguf_file import open_gguf
from edgeq.allocation import Budget, Costs, Problem, make_allocator
from edgeq.allocation.closed_form import ClosedForm, gain_bound
from edgeq.allocation.costs import Candidate, TensorCosts, by_size
from edgeq.allocation.evolution import Evolution, uniform
from edgeq.allocation.heavy_tail import HeavyTail, tail_exponent
from edgeq.allocation.knapsack import Knapsack, fitted, pareto_curve
from edgeq.errors import RecipeError
from tests import tiny_gguf

TYPES = [t for t in GGMLQuantizationType if t.name.startswith(("Q", "IQ"))]
FIXED = 1000


def make(rows, *, shape=(8, 32)):
    """Costs of tensors given as lists of (bytes, loss[, seconds])."""
    tensors = []
    for number, candidates in enumerate(rows):
        made = [
            Candidate(TYPES[i], size, loss, seconds=rest[0] if rest else None)
            for i, (size, loss, *rest) in enumerate(candidates)
        ]
        tensors.append(TensorCosts(f"blk.{number}.weight", shape, by_size(made)))
    return Costs("sha", "weight", "rtn", FIXED, 64, tuple(tensors))


def graded(sensitivities, bits=(2, 3, 4, 5, 6, 8), n_weights=4096):
    """Tensors whose losses fall fourfold with each bit, of different sensitivities."""
    rows = [[(n_weights * b // 8, s * n_weights * 4.0**-b) for b in bits] for s in sensitivities]
    return make(rows, shape=(64, n_weights // 64))


def problem(costs, **more):
    return Problem(costs, None, **more)


def every(costs):
    return itertools.product(*(range(len(t.candidates)) for t in costs.tensors))


candidates = st.tuples(st.integers(1, 40), st.floats(0.001, 10), st.floats(0.1, 5))
tables = st.lists(st.lists(candidates, min_size=1, max_size=4), min_size=1, max_size=4).map(make)


# ------------------------------------------------------------------------------ knapsack


@settings(deadline=None, max_examples=60)
@given(tables, st.floats(0, 1))
def test_the_knapsack_is_the_best_of_all_choices_within_the_bytes(costs, share):
    least, most = costs.size_bytes(costs.smallest), costs.size_bytes(costs.largest)
    size = int(least + share * (most - least))
    found = Knapsack().allocate(problem(costs), Budget(size_bytes=size))
    best = min(costs.loss(c) for c in every(costs) if costs.size_bytes(c) <= size)
    assert costs.size_bytes(found.choice) <= size
    assert costs.loss(found.choice) == pytest.approx(best, rel=2e-6)
    assert found.facts["gap"] <= 2e-6


@settings(deadline=None, max_examples=40)
@given(tables, st.floats(0, 1))
def test_a_time_is_kept_beside_the_bytes(costs, share):
    fastest = sum(min(c.seconds for c in t.candidates) for t in costs.tensors)
    slowest = sum(max(c.seconds for c in t.candidates) for t in costs.tensors)
    seconds = (fastest + share * (slowest - fastest)) * (1 + 1e-5)
    size = costs.size_bytes(costs.largest)
    found = Knapsack().allocate(problem(costs), Budget(size_bytes=size, seconds=seconds))
    best = min(costs.loss(c) for c in every(costs) if costs.seconds(c) <= seconds * (1 - 1e-6))
    assert costs.seconds(found.choice) <= seconds * (1 + 1e-6)
    assert costs.loss(found.choice) <= best * (1 + 1e-5)


@settings(deadline=None, max_examples=40)
@given(tables, st.floats(0, 1))
def test_least_bytes_under_a_loss(costs, share):
    losses = [costs.loss(c) for c in every(costs)]
    loss = (min(losses) + share * (max(losses) - min(losses))) * (1 + 1e-4)
    found = Knapsack().allocate(problem(costs), Budget(loss=loss))
    best = min(costs.size_bytes(c) for c in every(costs) if costs.loss(c) <= loss * (1 - 1e-5))
    assert costs.loss(found.choice) <= loss * (1 + 1e-6)
    assert costs.size_bytes(found.choice) <= best


def test_ten_thousand_tensors_of_twenty_types_are_certified():
    rng = np.random.default_rng(0)
    bits = np.sort(rng.uniform(1.5, 9, (10_000, 20)), axis=1)
    n = 32768 * rng.integers(1, 50, (10_000, 1))
    sizes = (n * bits / 8).astype(int)
    losses = n * 10 ** rng.normal(0, 1, n.shape) * 4**-bits * rng.uniform(0.6, 1.6, bits.shape)
    costs = make(
        [
            list(zip(s, row, strict=True))
            for s, row in zip(sizes.tolist(), losses.tolist(), strict=True)
        ]
    )
    size = (costs.size_bytes(costs.smallest) + costs.size_bytes(costs.largest)) // 3
    found = Knapsack().allocate(problem(costs), Budget(size_bytes=size))
    assert costs.size_bytes(found.choice) <= size
    assert found.facts["gap"] < 1e-4


def test_the_solver_prints_nothing(capfd):
    rng = np.random.default_rng(0)
    for _ in range(40):
        costs = graded(10 ** rng.normal(0, 1, 30))
        size = int(costs.size_bytes(costs.smallest) * rng.uniform(1.1, 2.5))
        Knapsack().allocate(problem(costs), Budget(size_bytes=size))
    assert capfd.readouterr() == ("", "")


@settings(deadline=None, max_examples=60)
@given(tables)
def test_the_curve_is_optimal_at_each_of_its_points(costs):
    points = list(pareto_curve(costs))
    assert points[0][0] == costs.size_bytes(costs.smallest)
    for size, loss, choice in points:
        assert (costs.size_bytes(choice), costs.loss(choice)) == (size, loss)
        best = min(costs.loss(c) for c in every(costs) if costs.size_bytes(c) <= size)
        assert loss == pytest.approx(best, rel=1e-9)
    assert [p[0] for p in points] == sorted(p[0] for p in points)


@settings(deadline=None, max_examples=60)
@given(tables, st.floats(0, 1), st.randoms(use_true_random=False))
def test_a_choice_is_fitted_to_the_bytes(costs, share, random):
    least, most = costs.size_bytes(costs.smallest), costs.size_bytes(costs.largest)
    size = int(least + share * (most - least))
    start = tuple(random.randrange(len(t.candidates)) for t in costs.tensors)
    found = fitted(costs, start, size)
    assert costs.size_bytes(found) <= size
    for number, tensor in enumerate(costs.tensors):  # nothing better fits in any one place
        for index, one in enumerate(tensor.candidates):
            other = (*found[:number], index, *found[number + 1 :])
            better = one.loss < tensor.candidates[found[number]].loss
            assert not (better and costs.size_bytes(other) <= size)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(size_bytes=10), r"got 10 bytes, but the smallest file of these types has"),
        (Budget(loss=1e-12), r"a loss of 1e-12 cannot be reached .* the least is"),
        (Budget(size_bytes=10**6, seconds=1.0), r"the costs hold none for some types"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(budget, message):
    with pytest.raises(RecipeError, match=message):
        Knapsack().allocate(problem(graded([1.0, 2.0])), budget)


def test_a_time_that_cannot_be_met_is_refused():
    costs = make([[(10, 1.0, 2.0), (20, 0.5, 3.0)]])
    with pytest.raises(RecipeError, match=r"no choice takes 1.0 s a token .* 2 s"):
        Knapsack().allocate(problem(costs), Budget(size_bytes=10**6, seconds=1.0))


def test_a_budget_is_bytes_or_a_loss():
    with pytest.raises(RecipeError, match="either bytes or a loss"):
        Budget()


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0.1, 5)), min_size=1, max_size=8))
def test_no_candidate_of_the_pareto_ladder_is_beaten(rows):
    (tensor,) = make([rows]).tensors
    kept = [tensor.candidates[i] for i in tensor.ladder]
    for one in tensor.candidates:
        beaten = any(k.size_bytes <= one.size_bytes and k.loss <= one.loss for k in kept)
        assert beaten
    assert all(a.size_bytes < b.size_bytes and a.loss > b.loss for a, b in itertools.pairwise(kept))


# ------------------------------------------------------------------------------ closed form


def test_closed_form_gives_half_a_bit_for_every_factor_of_two():
    costs = graded([1.0, 16.0])
    size = costs.fixed_bytes + 2 * 4096 * 4 // 8
    found = ClosedForm().allocate(problem(costs), Budget(size_bytes=size))
    bits = [8 * c.size_bytes / 4096 for c in costs.chosen(found.choice)]
    assert bits == [3, 5]


def test_equal_tensors_gain_nothing_from_allocation():
    assert gain_bound(graded([3.0] * 5)) == pytest.approx(1)
    assert gain_bound(graded([1.0, 100.0])) == pytest.approx(10 / 50.5)


@settings(deadline=None, max_examples=30)
@given(tables, st.floats(0, 1))
def test_closed_form_keeps_the_bytes(costs, share):
    least, most = costs.size_bytes(costs.smallest), costs.size_bytes(costs.largest)
    size = int(least + share * (most - least))
    found = ClosedForm().allocate(problem(costs), Budget(size_bytes=size))
    assert costs.size_bytes(found.choice) <= size


# ------------------------------------------------------------------------------ heavy tail


def test_heavy_tails_have_small_exponents():
    rng = np.random.default_rng(0)
    light = rng.standard_normal((128, 256))
    heavy = light * (1 + rng.pareto(1.2, (128, 1)))
    assert tail_exponent(heavy.astype(np.float32)) < tail_exponent(light.astype(np.float32))
    assert math.isinf(tail_exponent(np.zeros((16, 16), np.float32)))


def test_heavy_tail_reads_the_weights_alone(tmp_path):
    name, shape = "blk.0.ffn_up.weight", (96, 64)
    rows = 1 + np.random.default_rng(0).pareto(0.8, (96, 1))
    heavy = (tiny_gguf.values(name, shape) * rows / rows.mean()).astype(np.float32)
    path = tiny_gguf.write(tmp_path / "heavy.gguf", "llama", replace={name: heavy})
    names = [name, "blk.1.ffn_up.weight"]
    costs = graded([1.0, 1.0], n_weights=96 * 64)
    costs = dataclasses.replace(
        costs,
        tensors=tuple(
            dataclasses.replace(t, name=n, shape=shape)
            for t, n in zip(costs.tensors, names, strict=True)
        ),
    )
    size = costs.fixed_bytes + 2 * 96 * 64 * 4 // 8
    found = HeavyTail().allocate(Problem(costs, open_gguf(path)), Budget(size_bytes=size))
    first, second = (c.size_bytes for c in costs.chosen(found.choice))
    assert first > second
    assert costs.size_bytes(found.choice) <= size


# ------------------------------------------------------------------------------ evolution


def planted(costs):
    """A measured loss with terms for neighbours that no sum of losses sees."""
    calls = []

    def measure(choice, n_chunks):
        calls.append((choice, n_chunks))
        losses = [one.loss for one in costs.chosen(choice)]
        pairs = sum(math.sqrt(a * b) for a, b in zip(losses[::2], losses[2::2], strict=False))
        return sum(losses) + 2 * pairs, 0.0

    return measure, calls


@pytest.fixture(scope="module")
def searched():
    costs = graded(10 ** np.random.default_rng(1).normal(0, 1, 24))
    measure, calls = planted(costs)
    size = (costs.size_bytes(costs.smallest) + costs.size_bytes(costs.largest)) // 2
    asked = problem(costs, measure=measure, seed=3)
    return costs, measure, calls, asked, Budget(size_bytes=size)


def test_evolution_sees_what_sums_do_not(searched):
    costs, measure, calls, asked, budget = searched
    start = Knapsack().allocate(asked, budget).choice
    found = Evolution().allocate(asked, budget)
    assert costs.size_bytes(found.choice) <= budget.size_bytes
    assert measure(found.choice, None)[0] < measure(start, None)[0]
    assert found.facts["kld"] == measure(found.choice, None)[0]
    assert found.facts["evaluations"] < len(calls)
    assert {n for _, n in calls} == {None, 1, 2}


def test_evolution_is_the_same_for_a_seed(searched):
    _, _, _, asked, budget = searched
    assert Evolution().allocate(asked, budget).choice == Evolution().allocate(asked, budget).choice


def test_evolution_from_the_same_bits_everywhere(searched):
    costs, measure, _, asked, budget = searched
    found = Evolution(start="uniform").allocate(asked, budget)
    assert measure(found.choice, None)[0] < measure(uniform(costs, budget.size_bytes), None)[0]


def test_evolution_needs_something_to_measure():
    costs = graded([1.0, 2.0])
    with pytest.raises(RecipeError, match="there is no text to measure on"):
        Evolution().allocate(problem(costs), Budget(size_bytes=10**6))


@pytest.mark.parametrize("name", ["closed-form", "evolution", "preset"])
def test_allocators_of_sizes_refuse_other_budgets(name):
    costs = graded([1.0, 2.0])
    asked = problem(costs, measure=lambda choice, n: (0.0, 0.0))
    with pytest.raises(RecipeError, match=rf"--allocator {name}: knows sizes only"):
        make_allocator(name).allocate(asked, Budget(loss=1.0))
