"""Types from the weights' spectra alone: heavy tails are where training has put most."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.gguf_file import GgufFile
from edgeq.allocation.costs import Allocation, Budget, Problem, TensorCosts
from edgeq.allocation.knapsack import Knapsack

_TAIL = 0.1  # of the eigenvalues, the largest, at least 10
_LEAST_TAIL = 10
_MOST_LINES = 1024  # rows or columns of a matrix that are looked at
_MOST_EXPERTS = 8


@dataclass(frozen=True)
class HeavyTail:
    """The knapsack on losses (median(α) / α)^γ n Var(W) 4^−bits, α the exponent of the tail.

    Nothing is calibrated. Experts of a layer are one tensor in GGUF: α is the mean of theirs.

    Attributes
    ----------
    gamma : how much the exponents count

    References
    ----------
    AlphaQ after Lu et al., AlphaPruning, arXiv:2410.10912: the Hill estimator of the exponent from
    the largest tenth of the eigenvalues of W Wᵀ.
    """

    gamma: float = 1.0

    def allocate(self, problem: Problem, budget: Budget) -> Allocation:
        """Return the choice; its facts hold the least and the greatest exponent.

        Raises
        ------
        RecipeError
            Nothing is within the budget.
        """
        costs = problem.costs
        spectra = {t.name: spectrum(problem.file, t.name) for t in costs.tensors}
        median = float(np.median([alpha for alpha, _ in spectra.values()]))
        tensors = tuple(self._weighed(t, spectra, median) for t in costs.tensors)
        replaced = dataclasses.replace(costs, tensors=tensors, estimator="heavy-tail")
        found = Knapsack().allocate(dataclasses.replace(problem, costs=replaced), budget)
        alphas = [alpha for alpha, _ in spectra.values()]
        facts = {**found.facts, "least_alpha": min(alphas), "greatest_alpha": max(alphas)}
        return Allocation(found.choice, facts)

    def _weighed(
        self, tensor: TensorCosts, spectra: Mapping[str, tuple[float, float]], median: float
    ) -> TensorCosts:
        alpha, variance = spectra[tensor.name]
        weight = (median / alpha) ** self.gamma * variance * tensor.n_weights
        return dataclasses.replace(
            tensor,
            candidates=tuple(
                dataclasses.replace(
                    one,
                    loss=weight * 4 ** (-8 * one.size_bytes / tensor.n_weights),
                    loss_error=0.0,
                )
                for one in tensor.candidates
            ),
        )


def spectrum(file: GgufFile, name: str) -> tuple[float, float]:
    """Return the tail's exponent α and the variance of a weight; of experts the means."""
    weight = file.read_float(name)
    matrices = weight.reshape(-1, *weight.shape[-2:])
    chosen = np.unique(np.linspace(0, len(matrices) - 1, _MOST_EXPERTS).astype(np.intp))
    alphas = [tail_exponent(matrices[i]) for i in chosen]
    return float(np.mean(alphas)), float(np.mean([np.var(matrices[i]) for i in chosen]))


def tail_exponent(matrix: npt.NDArray[np.float32]) -> float:
    """Return Hill's estimate 1 + k / Σ ln(λ_i / λ_k+1) over the k largest eigenvalues of W Wᵀ.

    Parameters
    ----------
    matrix : (n_out, n_in) float32; of more than 1024 rows or columns some, evenly spread
    """
    for axis in (0, 1):
        n = matrix.shape[axis]
        if n > _MOST_LINES:
            matrix = matrix.take(np.linspace(0, n - 1, _MOST_LINES).astype(np.intp), axis)
    short = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    short = short.astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(short @ short.T)[::-1]
    k = min(max(_LEAST_TAIL, int(_TAIL * len(eigenvalues))), len(eigenvalues) - 1)
    tail = np.maximum(eigenvalues[: k + 1], 1e-30)
    total = float(np.log(tail[:-1] / tail[-1]).sum()) if k > 0 else 0.0
    return 1 + k / total if total > 0 else math.inf
