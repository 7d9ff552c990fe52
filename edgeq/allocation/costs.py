"""What every type would cost every tensor: bytes, loss and time, and what may be spent.

``costs.json`` holds one tensor a line. Losses add up over tensors; how far their sum is from the
loss of all of them together is ``edgeq.allocation.interactions``' business.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gguf.constants import GGMLQuantizationType

from converters.gguf_file import GgufFile
from edgeq.allocation.plan import write_by_tensor
from edgeq.errors import RecipeError
from edgeq.registry import unknown_name
from edgeq.runtime.encoders import encodable_types

SCHEMA = 1
Choice = tuple[int, ...]
"""Index of a candidate for every tensor of ``Costs.tensors``."""


@dataclass(frozen=True)
class Candidate:
    """One type that a tensor may get.

    Attributes
    ----------
    size_bytes : of the packed tensor in the file, padding included
    loss : what the estimator says that the type costs, >= 0; additive over tensors
    loss_error : its standard error
    seconds : of the tensor's product with one token on this CPU; None: not measured
    """

    qtype: GGMLQuantizationType
    size_bytes: int
    loss: float
    loss_error: float = 0.0
    seconds: float | None = None


@dataclass(frozen=True)
class TensorCosts:
    """The candidates of one tensor, by rising size, of equal sizes the better first; at least one.

    Attributes
    ----------
    shape : (n_out, n_in) or (n_mat, n_out, n_in)
    """

    name: str
    shape: tuple[int, ...]
    candidates: tuple[Candidate, ...]

    @property
    def n_weights(self) -> int:
        """Weights of the tensor."""
        return math.prod(self.shape)

    @property
    def ladder(self) -> list[int]:
        """Indices of the candidates that no other one beats in bytes and in loss, rising."""
        kept: list[int] = []
        for index, one in enumerate(self.candidates):
            if not kept or one.loss < self.candidates[kept[-1]].loss:
                kept.append(index)
        return kept


@dataclass(frozen=True)
class Costs:
    """The costs of one model.

    Attributes
    ----------
    model_sha256 : of the reference
    estimator : where the losses come from
    quantizer : that made what was judged
    fixed_bytes : of the file beside these tensors: header, norms, what keeps its type
    fixed_weights : in those other tensors
    tensors : in the order of the graph
    joint : (sum of losses, measured divergence in nats) of some whole choices, rising
    """

    model_sha256: str
    estimator: str
    quantizer: str
    fixed_bytes: int
    fixed_weights: int
    tensors: tuple[TensorCosts, ...]
    joint: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            for one in tensor.candidates:
                if not (math.isfinite(one.loss) and math.isfinite(one.loss_error)):
                    raise RecipeError(
                        f"costs: {tensor.name} as {one.qtype.name}: the loss is {one.loss}, "
                        "expected a finite number. Measure again, or leave that type out."
                    )
        for pair in self.joint:
            if not all(math.isfinite(value) and value > 0 for value in pair):
                raise RecipeError(
                    f"costs: joint: got {pair}, expected two finite numbers above 0, the sum of "
                    "losses and the divergence. Measure again, or leave it out."
                )

    def size_bytes(self, choice: Choice) -> int:
        """Return the bytes of the whole file."""
        return self.fixed_bytes + sum(one.size_bytes for one in self.chosen(choice))

    def loss(self, choice: Choice) -> float:
        """Return the sum of the losses."""
        return math.fsum(one.loss for one in self.chosen(choice))

    def predicted(self, choice: Choice) -> float:
        """Return the loss of a whole choice: the sum, corrected by what whole choices have shown.

        The ratio of the measured to the sum is interpolated in logarithms; without any it is 1.
        """
        loss = self.loss(choice)
        if not self.joint or loss <= 0:
            return loss
        sums, measured = np.log(np.array(self.joint)).T
        return float(loss * np.exp(np.interp(np.log(loss), sums, measured - sums)))

    def seconds(self, choice: Choice) -> float | None:
        """Return the time of all products for one token; None: not measured."""
        times = [one.seconds for one in self.chosen(choice)]
        return None if None in times else math.fsum(t for t in times if t is not None)

    def chosen(self, choice: Choice) -> list[Candidate]:
        """Return every tensor's chosen candidate."""
        return [t.candidates[i] for t, i in zip(self.tensors, choice, strict=True)]

    def types(self, choice: Choice) -> dict[str, GGMLQuantizationType]:
        """Return tensor name to chosen type."""
        pairs = zip(self.tensors, self.chosen(choice), strict=True)
        return {tensor.name: one.qtype for tensor, one in pairs}

    def choice(self, types: Mapping[str, GGMLQuantizationType]) -> Choice:
        """Return the choice that gives the tensors these types.

        Raises
        ------
        RecipeError
            A type is not among a tensor's candidates.
        """
        found = []
        for tensor in self.tensors:
            known = [one.qtype for one in tensor.candidates]
            wanted = types[tensor.name]
            if wanted not in known:
                raise RecipeError(
                    f"costs: {tensor.name} has no {wanted.name}; known: "
                    f"{', '.join(t.name for t in known)}. Measure the costs with that type."
                )
            found.append(known.index(wanted))
        return tuple(found)

    @property
    def smallest(self) -> Choice:
        """The choice of fewest bytes."""
        return (0,) * len(self.tensors)

    @property
    def largest(self) -> Choice:
        """The choice of most bytes."""
        return tuple(len(tensor.candidates) - 1 for tensor in self.tensors)


@dataclass(frozen=True)
class Budget:
    """What an allocator may spend: bytes, minimising the loss, or a loss, minimising the bytes.

    Attributes
    ----------
    size_bytes : the whole file may have so many; the loss is then minimised
    loss : the sum of losses may be so large; the bytes are then minimised
    seconds : one token may take so long, beside either
    """

    size_bytes: int | None = None
    loss: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.size_bytes is None) == (self.loss is None):
            raise RecipeError("budget: give either bytes or a loss, not both or none.")


@dataclass(frozen=True)
class Problem:
    """What an allocator decides on.

    Attributes
    ----------
    costs : of every tensor and type
    file : the reference, for allocators that look at weights
    importances : tensor name to (n_mat, n_in) float32 mean squared inputs
    measure : called with a choice and a number of chunks of tuning text, at most (None: all of
        it), returns the mean KL divergence of the model with that choice, nats, and its standard
        error. It takes about a second for 135M parameters and a chunk, and remembers what it
        measured. None: nothing can be measured
    seed : of everything random
    """

    costs: Costs
    file: GgufFile
    importances: Mapping[str, Any] | None = None
    measure: "Callable[[Choice, int | None], tuple[float, float]] | None" = None
    seed: int = 0


@dataclass(frozen=True)
class Allocation:
    """What an allocator decided.

    Attributes
    ----------
    facts : numbers about it for the report, such as a certified gap
    notes : sentences for people
    """

    choice: Choice
    facts: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Allocator(Protocol):
    """Decides which type every tensor gets. A registered allocator is a class.

    Called without arguments it has its default settings; the fields of a dataclass may be set in
    the recipe.
    """

    def allocate(self, problem: Problem, budget: Budget) -> Allocation:
        """Return a choice within the budget.

        Raises
        ------
        RecipeError
            No choice is within the budget; the message names the nearest that is.
        """
        ...


def size_alone(allocator: str, costs: Costs, budget: Budget) -> int:
    """Return the size of a budget, for allocators that know nothing else.

    Raises
    ------
    RecipeError
        The budget is a loss or a time, or below the smallest file.
    """
    if budget.size_bytes is None or budget.seconds is not None:
        raise RecipeError(
            f"--allocator {allocator}: knows sizes only. Give --size or --bpw, or knapsack."
        )
    check_feasible(costs, budget)
    return budget.size_bytes


def check_feasible(costs: Costs, budget: Budget) -> None:
    """Refuse a size below the smallest file.

    Raises
    ------
    RecipeError
    """
    least = costs.size_bytes(costs.smallest)
    if budget.size_bytes is not None and budget.size_bytes < least:
        raise RecipeError(
            f"--size: got {budget.size_bytes:,} bytes, but the smallest file of these types has "
            f"{least:,}. Allow as many, or smaller types with --types."
        )


def write_costs(costs: Costs, path: Path) -> None:
    """Write ``costs.json``; an existing file is replaced whole."""
    keys = ("model_sha256", "estimator", "quantizer", "fixed_bytes", "fixed_weights")
    head = {"schema": SCHEMA, **{key: getattr(costs, key) for key in keys}}
    head["joint"] = [list(pair) for pair in costs.joint]
    write_by_tensor(path, head, {tensor.name: _as_json(tensor) for tensor in costs.tensors})


def _as_json(tensor: TensorCosts) -> dict[str, Any]:
    rows = {
        one.qtype.name: [one.size_bytes, one.loss, one.loss_error, one.seconds]
        for one in tensor.candidates
    }
    return {"shape": list(tensor.shape), "bytes, loss, error, seconds": rows}


def read_costs(path: Path) -> Costs:
    """Read what ``write_costs`` wrote.

    Raises
    ------
    RecipeError
        It is no such file, or holds something that is no cost.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, expected {SCHEMA}")
        return Costs(
            str(content["model_sha256"]),
            str(content["estimator"]),
            str(content["quantizer"]),
            int(content["fixed_bytes"]),
            int(content["fixed_weights"]),
            tuple(_tensor(name, value) for name, value in content["tensors"].items()),
            tuple((float(loss), float(kld)) for loss, kld in content.get("joint", ())),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"{path}: no readable costs ({error!r}). Make them anew with: edgeq plan"
        ) from error


def _tensor(name: str, value: Mapping[str, Any]) -> TensorCosts:
    known = {qtype.name: qtype for qtype in encodable_types()}
    rows = value["bytes, loss, error, seconds"]
    unknown = next((one for one in rows if one not in known), None)
    if unknown is not None or not rows:
        raise ValueError(f"{name}: {unknown_name('type', str(unknown), list(known))}")
    candidates = [
        Candidate(known[key], int(row[0]), float(row[1]), float(row[2]), _number(row[3]))
        for key, row in rows.items()
    ]
    return TensorCosts(name, tuple(map(int, value["shape"])), by_size(candidates))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def by_size(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return candidates by rising size, of equal sizes the better first."""
    return tuple(sorted(candidates, key=lambda one: (one.size_bytes, one.loss)))
