"""An example of a plug-in package: every kind of thing that edgeq takes from others, in short."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from converters.architectures import llama
from edgeq.allocation import Allocation, Budget, Problem
from edgeq.allocation.costs import size_alone
from edgeq.quantizers import Inputs, Rounded
from edgeq.runtime.encoders import decode, encode
from edgeq.tasks import Item, OpenItem, Record, Suite, SuitePart, TaskFormat


@dataclass(frozen=True)
class Nudge:
    """Round to nearest twice, the weights and slightly larger ones; keep the better rows.

    Attributes
    ----------
    step : how much larger
    """

    step: float = 0.01
    uses_hessian = False

    def quantize(self, name, weight, qtype, inputs: Inputs, *, n_threads=None) -> Rounded:
        """Return the packed rows of a weight, see ``edgeq.quantizers.Quantizer``."""
        importances = inputs.importances
        packed = encode(weight, qtype, importances, n_threads=n_threads, name=name)
        larger = (weight * np.float32(1 + self.step)).astype(np.float32)
        other = encode(larger, qtype, importances, n_threads=n_threads, name=name)
        is_better = self._errors(other, weight, qtype, importances) < self._errors(
            packed, weight, qtype, importances
        )
        packed[is_better] = other[is_better]
        return Rounded(packed, {"nudged_rows": int(is_better.sum())})

    def _errors(self, packed, weight, qtype, importances):
        rows = weight.reshape(len(packed), -1)
        squares = np.square(decode(packed, qtype) - rows, dtype=np.float64)
        if importances is not None:  # (n_mat, n_in), of the rows of each matrix
            squares *= np.repeat(importances, len(packed) // len(importances), axis=0)
        return squares.sum(axis=1)


class Uniform:
    """Give every tensor the same type, the largest that fits."""

    def allocate(self, problem: Problem, budget: Budget) -> Allocation:
        """Return the choice; see ``edgeq.allocation.Allocator``."""
        costs, size_bytes = problem.costs, size_alone("uniform", problem.costs, budget)
        shared = set.intersection(*({c.qtype for c in t.candidates} for t in costs.tensors))
        choices = {
            qtype: costs.choice({tensor.name: qtype for tensor in costs.tensors})
            for qtype in shared
        }
        fitting = [q for q, choice in choices.items() if costs.size_bytes(choice) <= size_bytes]
        best = max(fitting, key=lambda qtype: costs.size_bytes(choices[qtype]))
        return Allocation(choices[best], {"types": len(shared)}, (f"All {best.name}.",))


ARCHITECTURE = dataclasses.replace(llama.ARCHITECTURE, classes=("ExampleForCausalLM",))


def _yes_no(record: Record) -> Item:
    answer = record.values["yes"]
    if not isinstance(answer, bool):
        raise record.refuse("yes", answer, "true or false")
    question = f"{record.text('passage')}\nQuestion: {record.text('question')}?\nAnswer:"
    return record.item(question, ("no", "yes"), int(answer))


YES_NO = TaskFormat(frozenset({"passage", "question", "yes"}), _yes_no)


def _counting(random, n_items, chat):
    """Return items that need no file; see ``edgeq.tasks.SuitePart``."""
    return [
        OpenItem(f"{n}, {n + 1}, {n + 2},", (f"{n + 3}",), "starts_with", max_tokens=4, chat=chat)
        for n in random.permutation(90)[:n_items].tolist()
    ]


COUNTING = Suite({"up": SuitePart(_counting, 20)})
