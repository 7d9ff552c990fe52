"""The allocators that follow llama.cpp: its own mix for a file type, or the best one that fits."""

from collections.abc import Mapping
from dataclasses import dataclass

from converters.gguf_file import GgufFile, tensor_bytes
from edgeq.allocation.costs import Allocation, Budget, Choice, Costs, Problem, size_alone
from edgeq.allocation.plan import Plan, PlanEntry
from edgeq.errors import RecipeError
from edgeq.runtime.presets import MixOptions, choose_types, find_preset

COMMON = (
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "Q2_K_S",
    "Q2_K",
    "IQ3_XXS",
    "IQ3_XS",
    "Q3_K_S",
    "IQ3_M",
    "Q3_K_M",
    "Q3_K_L",
    "IQ4_XS",
    "Q4_0",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
)


def allocate(
    file: GgufFile, preset: str, *, has_imatrix: bool, options: MixOptions | None = None
) -> Plan:
    """Return the plan that `preset` makes of a GGUF file, tensor by tensor as llama.cpp decides.

    Parameters
    ----------
    preset : llama.cpp file type, such as ``Q4_K_M``
    has_imatrix : some mixes are bolder with an imatrix

    Raises
    ------
    RecipeError
        Unknown preset.
    RuntimeLibraryError
        llama.cpp cannot read the file, or has no type that fits its rows.
    """
    choices = choose_types(file.path, preset, has_imatrix=has_imatrix, options=options)
    entries = tuple(
        PlanEntry(
            name=name,
            qtype=choices[name].qtype,
            shape=info.shape,
            size_bytes=tensor_bytes(choices[name].qtype, info.shape),
            reason=choices[name].reason,
        )
        for name, info in file.tensors.items()
    )
    return Plan(find_preset(preset).name, entries)


@dataclass(frozen=True)
class LargestPreset:
    """llama.cpp's mix of most bytes among those that fit."""

    def allocate(self, problem: Problem, budget: Budget) -> Allocation:
        """Return the choice; see ``edgeq.allocation.Allocator``.

        Raises
        ------
        RecipeError
            The budget is a loss or a time, or no mix fits.
        """
        costs, size_bytes = problem.costs, size_alone("preset", problem.costs, budget)
        mixes = known_mixes(problem.file, costs, has_imatrix=problem.importances is not None)
        best = largest_mix(mixes, costs, size_bytes)
        if best is None:
            name = min(mixes, key=lambda one: costs.size_bytes(mixes[one]), default=None)
            least = f"; the smallest is {name}, {costs.size_bytes(mixes[name]):,}" if name else ""
            raise RecipeError(
                f"--allocator preset: no mix of llama.cpp of these types has {size_bytes:,} bytes "
                f"or less{least}. Allow as many, or let knapsack choose."
            )
        return Allocation(mixes[best], notes=(f"llama.cpp's {best}.",))


def largest_mix(mixes: Mapping[str, Choice], costs: Costs, size_bytes: int) -> str | None:
    """Return the name of the mix of most bytes among those that fit; None: none fits."""
    sizes = {name: costs.size_bytes(choice) for name, choice in mixes.items()}
    fitting = [name for name, size in sizes.items() if size <= size_bytes]
    return max(fitting, key=lambda name: sizes[name], default=None)


def known_mixes(file: GgufFile, costs: Costs, *, has_imatrix: bool) -> dict[str, Choice]:
    """Return llama.cpp's common mixes that use nothing but the candidates of `costs`.

    Its own choice of a type for lack of importances or for the row size is followed.
    """
    known = {t.name: {c.qtype for c in t.candidates} for t in costs.tensors}
    found = {}
    for name in COMMON:
        types = {e.name: e.qtype for e in allocate(file, name, has_imatrix=has_imatrix).entries}
        if all(types[tensor] in candidates for tensor, candidates in known.items()):
            found[name] = costs.choice(types)
    return found
