"""From a target to a plan: what may be spent, and what it buys."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpu_kernels.lattice_formats import LATTICES
from edgeq.allocation import (
    Allocation,
    Budget,
    Planned,
    Problem,
    make_allocator,
    plan_of,
)
from edgeq.allocation.knapsack import Knapsack
from edgeq.allocation.preset import known_mixes, largest_mix
from edgeq.allocation.speeds import read_speeds, timed
from edgeq.costing import make_costs
from edgeq.errors import RecipeError
from edgeq.evaluation import measure_speeds
from edgeq.measuring import Joint, Measurer
from edgeq.recipe import DEFAULT_PRESET, Target

_SIZE_STEP = 0.005  # a size is found to half a percent
_FILES = 6  # written and timed for a speed


class Planner:
    """Plans for targets. Costs and measurements are made once and serve every target."""

    def __init__(
        self, measurer: Measurer, estimator: str, allocator: str, speeds: Path | None = None
    ) -> None:
        self.measurer = measurer
        self.allocator_name = allocator
        self.allocator = make_allocator(allocator)
        self.costs = make_costs(measurer, estimator)
        self.is_timed = speeds is not None
        if speeds is not None:
            has_output = "output.weight" in measurer.file.tensors
            self.costs = timed(self.costs, read_speeds(speeds), has_output=has_output)
        ground = measurer.ground
        self.mixes = known_mixes(
            measurer.file, self.costs, has_imatrix=ground.importances is not None
        )
        self.problem = Problem(
            self.costs,
            measurer.file,
            importances=ground.importances,
            measure=self._measure if ground.tuning is not None else None,
            seed=ground.seed,
        )

    def plan(self, target: Target) -> Planned:
        """Return the plan for a target.

        Raises
        ------
        RecipeError
            It cannot be met; the message names the nearest that can.
        """
        if target.min_tps is not None and self.is_timed and not target.is_divergence:
            return self._planned(self._fast(target))
        size = self._size(target)
        with self.measurer.steps.step("allocate"):
            found = self.allocator.allocate(self.problem, Budget(size_bytes=size))
            return self._planned(self._not_worse(found, size))

    def _not_worse(self, found: Allocation, size: int) -> Allocation:
        """Return llama.cpp's own mix where it is closer to the float model; both are measured."""
        costs, measure = self.costs, self.problem.measure
        name = largest_mix(self.mixes, costs, size)
        if measure is None or name is None:
            return found
        mix = self.mixes[name]
        kld, kld_mix = measure(found.choice, None)[0], measure(mix, None)[0]
        facts = {**found.facts, "kld_tuning": kld, "kld_tuning_preset": kld_mix}
        compared = (
            f"rounded to nearest, on tuning text {kld:.5f} nats, llama.cpp's {name} of "
            f"{costs.size_bytes(mix):,} bytes {kld_mix:.5f}"
        )
        if kld <= kld_mix:
            return Allocation(found.choice, facts, (*found.notes, f"The plan: {compared}."))
        note = f"The plan is llama.cpp's {name}: {self.allocator_name} was not better; {compared}."
        return Allocation(mix, facts, (*found.notes, note))

    def _measure(self, choice: tuple[int, ...], n_chunks: int | None) -> tuple[float, float]:
        found = self.measurer.joint(self.costs.types(choice), n_chunks)
        return found.kld, found.kld_error

    # --- how many bytes --------------------------------------------------------------------------

    def _size(self, target: Target) -> int:
        """Return the bytes of the whole file that a target allows, or needs."""
        costs = self.costs
        allowed = costs.size_bytes(costs.largest)
        if target.size_bytes is not None:
            allowed = min(allowed, target.size_bytes)
        if target.bpw is not None:
            n_weights = costs.fixed_weights + sum(t.n_weights for t in costs.tensors)
            allowed = min(allowed, int(target.bpw * n_weights / 8))
        if target.min_tps is not None:
            allowed = min(allowed, self._size_of_speed(target.min_tps))
        return self._size_of_divergence(target, allowed) if target.is_divergence else allowed

    def _size_of_divergence(self, target: Target, allowed: int) -> int:
        """Return the bytes of the smallest file that is so close to the float model."""

        def is_close(size: int) -> bool:
            found = self._joint(size)
            return (target.max_kld is None or found.kld <= target.max_kld) and (
                target.max_ppl_ratio is None or found.ppl_ratio <= target.max_ppl_ratio
            )

        with self.measurer.steps.step("search size"):
            size = _smallest(self.costs.size_bytes(self.costs.smallest), allowed, is_close)
        if size is None:
            reached = self._joint(allowed)
            raise RecipeError(
                f"--max-kld, --max-ppl-ratio: cannot be met; {allowed:,} bytes reach a KL "
                f"divergence of {reached.kld:.5f} nats and a perplexity ratio of "
                f"{reached.ppl_ratio:.4f}. Ask for these, allow more bytes, or larger --types."
            )
        return size

    def _size_of_speed(self, min_tps: float) -> int:
        """Return the bytes of the largest file that decodes so fast on this CPU."""
        least, most = (self.costs.size_bytes(c) for c in (self.costs.smallest, self.costs.largest))
        speeds: dict[int, float] = {}

        def is_too_slow(size: int) -> bool:
            if size not in speeds:
                speeds[size] = self._tokens_per_second(size)
            return speeds[size] < min_tps

        with self.measurer.steps.step("search speed"):
            too_slow = _smallest(least, most, is_too_slow)
        if too_slow == least:
            raise RecipeError(
                f"--min-tps: got {min_tps:g}; the smallest file, of {least:,} bytes, decodes "
                f"{speeds[least]:.1f} tokens/s here. Ask for no more, or allow smaller --types."
            )
        return most if too_slow is None else max(least, int(too_slow / (1 + _SIZE_STEP)))

    def _fast(self, target: Target) -> Allocation:
        """Return the best choice that decodes so fast, by the times of types, proven by real files.

        A token takes longer than its products; by how much, the last file says.
        """
        min_tps, size = float(target.min_tps or 0), self._size(replace(target, min_tps=None))
        beside = 1.0
        with self.measurer.steps.step("search speed"):
            for _ in range(_FILES):
                seconds = 1 / min_tps / beside
                found = self.allocator.allocate(self.problem, Budget(size, seconds=seconds))
                reached = self._decode_rate(self.costs.types(found.choice))
                if reached >= min_tps:
                    facts = {**found.facts, "tps": reached}
                    return Allocation(found.choice, facts, found.notes)
                beside *= min_tps / reached * (1 + _SIZE_STEP)
        raise RecipeError(
            f"--min-tps: got {min_tps:g}; the last of {_FILES} files decodes {reached:.1f} "
            "tokens/s here. Ask for a little less, or allow faster --types."
        )

    def _types_of(self, size: int) -> dict[str, Any]:
        found = Knapsack().allocate(self.problem, Budget(size_bytes=size))
        return self.costs.types(found.choice)

    def _joint(self, size: int) -> Joint:
        return self.measurer.joint(self._types_of(size))

    def _tokens_per_second(self, size: int) -> float:
        return self._decode_rate(self._types_of(size))

    def _decode_rate(self, types: dict[str, Any]) -> float:
        path = self.measurer.write_nearest(types)
        try:
            speeds = measure_speeds([path], n_threads=self.measurer.ground.n_threads)
            return speeds[0].decode.median
        finally:
            path.unlink(missing_ok=True)

    # --- the plan --------------------------------------------------------------------------------

    def _planned(self, found: Allocation) -> Planned:
        costs, file = self.costs, self.measurer.file
        size, loss = costs.size_bytes(found.choice), costs.predicted(found.choice)
        reasons = {
            tensor.name: f"{self.allocator_name}: {costs.estimator} loss {one.loss:.3g}"
            for tensor, one in zip(costs.tensors, costs.chosen(found.choice), strict=True)
        }
        sizes = {name: costs.size_bytes(mix) for name, mix in self.mixes.items()}
        nearest = min(sizes, key=lambda name: abs(sizes[name] - size), default=DEFAULT_PRESET)
        facts = {
            **found.facts,
            "allocator": self.allocator_name,
            "costs": costs.estimator,
            "size_bytes": size,
            "loss": loss,
        }
        types = costs.types(found.choice)
        note = (
            f"Types by {self.allocator_name} on {costs.estimator} costs: at most {size:,} bytes, "
            f"predicted loss {loss:.4g}."
        )
        notes = [note, *self.measurer.notes, *found.notes]
        n_slow = sum(qtype in LATTICES for qtype in types.values())
        if n_slow:
            notes.append(
                f"{n_slow} tensors are IQ1 to IQ3, which llama.cpp decodes at about half the speed "
                "of k-quants on a CPU. --types leaves them out, --min-tps sets a limit."
            )
        return Planned(plan_of(file, nearest, types, reasons), facts, tuple(notes))


def _smallest(least: int, most: int, is_enough: Callable[[int], bool]) -> int | None:
    """Return the smallest of the sizes that are enough, to half a percent; None: none is."""
    if is_enough(least):
        return least
    if not is_enough(most):
        return None
    while most > least * (1 + _SIZE_STEP):
        middle = math.isqrt(least * most)
        if is_enough(middle):
            most = middle
        else:
            least = middle
    return most
