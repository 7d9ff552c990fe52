"""How losses add up: what is planted in made-up measurements is found again, on other choices."""

import json
import math

import numpy as np
import pytest

from edgeq.allocation import Costs, Problem
from edgeq.allocation.costs import Candidate, TensorCosts
from edgeq.allocation.interactions import (
    Interactions,
    fit_interactions,
    pair_terms,
    random_choices,
)
from edgeq.runtime.encoders import encodable_types

ROLES = ("attn_q", "attn_v", "ffn_down")


@pytest.fixture(scope="module")
def costs():
    rng = np.random.default_rng(0)
    tensors = []
    for number in range(10):
        for role in ROLES:
            s = 10 ** rng.normal(-2, 0.7)
            rows = [
                Candidate(qtype, 512 * bits, s * 4.0**-bits)
                for qtype, bits in zip(encodable_types()[4:9], (2, 3, 4, 5, 8), strict=True)
            ]
            tensors.append(TensorCosts(f"blk.{number}.{role}.weight", (64, 64), tuple(rows)))
    return Costs("sha", "measured", "rtn", 100, 10, tuple(tensors))


def problem(costs, joint):
    return Problem(costs, None, measure=lambda choice, n: (joint(choice), 0.0), seed=2)


def test_sums_that_are_right_are_kept(costs):
    found = fit_interactions(problem(costs, costs.loss))
    assert found.model == "additive"
    assert found.held_out["additive"] == pytest.approx(0, abs=1e-9)


def test_a_power_of_the_sum_is_found(costs):
    found = fit_interactions(problem(costs, lambda choice: 3 * costs.loss(choice) ** 1.2))
    assert found.model == "power"
    assert (found.scale, found.power) == pytest.approx((3, 1.2))
    assert found.held_out["power"] < 1e-6 < found.held_out["additive"]


def test_terms_of_neighbours_are_found(costs):
    def joint(choice):
        terms = pair_terms(costs, choice)
        return costs.loss(choice) + 0.5 * terms["attn_v ffn_down"]

    found = fit_interactions(problem(costs, joint), 48)
    assert found.held_out["pairs"] < 0.3 * found.held_out["additive"]


def test_neighbours_are_of_a_layer_or_the_next(costs):
    choice = costs.smallest
    losses = [one.loss for one in costs.chosen(choice)]
    expected = sum(
        math.sqrt(losses[i] * losses[j])
        for i in range(0, 30, 3)
        for j in range(0, 30, 3)
        if 0 < j - i <= 7
    )
    assert pair_terms(costs, choice)["attn_q attn_q"] == pytest.approx(expected)


def test_random_choices_are_spread_and_the_same_for_a_seed(costs):
    asked = problem(costs, costs.loss)
    choices = random_choices(asked, 12)
    assert choices == random_choices(asked, 12)
    sizes = sorted(costs.size_bytes(choice) for choice in choices)
    assert sizes[0] < 0.5 * sizes[-1]
    assert len(set(choices)) == 12


def test_a_fit_survives_its_json(costs):
    found = fit_interactions(problem(costs, lambda choice: 3 * costs.loss(choice) ** 1.2))
    again = Interactions(**json.loads(json.dumps(found.as_json())))
    assert again == found
    assert again.predict(costs, costs.smallest) == found.predict(costs, costs.smallest)
