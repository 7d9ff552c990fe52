"""Which type every tensor gets: the plan, its file, and the allocators that make one."""

from edgeq.allocation.costs import Allocation, Allocator, Budget, Costs, Problem
from edgeq.allocation.plan import (
    Plan,
    PlanEntry,
    Planned,
    overrides,
    plan_of,
    read_plan,
    write_tensor_type_file,
)
from edgeq.allocation.preset import allocate
from edgeq.registry import Registry

__all__ = [
    "ALLOCATORS",
    "Allocation",
    "Allocator",
    "Budget",
    "Costs",
    "Plan",
    "PlanEntry",
    "Planned",
    "Problem",
    "allocate",
    "make_allocator",
    "overrides",
    "plan_of",
    "read_plan",
    "write_tensor_type_file",
]

ALLOCATORS = Registry(
    "edgeq.allocators",
    {
        "preset": "edgeq.allocation.preset:LargestPreset",
        "knapsack": "edgeq.allocation.knapsack:Knapsack",
        "closed-form": "edgeq.allocation.closed_form:ClosedForm",
        "heavy-tail": "edgeq.allocation.heavy_tail:HeavyTail",
        "evolution": "edgeq.allocation.evolution:Evolution",
        "ramp": "edgeq.allocation.ramp:Ramp",
    },
)


def make_allocator(spec: str) -> Allocator:
    """Return the allocator that ``NAME`` or ``NAME:key=value,...`` names.

    Raises
    ------
    RegistryError
        The name is unknown.
    RecipeError
        It has no such setting, or the value is none of its type or range.
    """
    made: Allocator = ALLOCATORS.make("--allocator", spec)
    return made
