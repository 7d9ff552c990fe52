"""What a policy knows about a tensor: eleven numbers that mean the same in every model.

Ten are standardised over the model's tensors, so that a policy may be applied to a model that it
never saw; the last one, what is left of the budget, changes while decisions are made.
"""

import math

import numpy as np
import numpy.typing as npt

from edgeq.allocation.costs import Problem, TensorCosts

Doubles = npt.NDArray[np.float64]
NAMES = (
    "input outliers",  # ln of the largest over the median mean square of the input channels
    "input kurtosis",  # ln of the mean of squares over the square of the mean, of the same
    "input energy",  # ln of their mean
    "weight kurtosis",  # ln E[w^4] / E[w^2]^2
    "weight spread",  # ln of the root mean square over the mean absolute weight
    "loss at 4.5 bits",  # ln of the loss a weight, from the costs
    "loss a bit",  # how fast its ln falls with the bits, between the smallest and largest type
    "depth",  # place in the graph, 0 to 1
    "shape",  # ln of n_out over n_in
    "share",  # ln of the share of the weights
    "budget left",  # ln of the bits left a weight left over the budget's mean
)
_PROBE_BPW = 4.5
_ROWS = 256
_TINY = 1e-30


def features(problem: Problem) -> Doubles:
    """Return the first ten features of every tensor, (n_tensors, 10), standardised."""
    costs = problem.costs
    total = sum(tensor.n_weights for tensor in costs.tensors)
    last = max(len(costs.tensors) - 1, 1)
    rows = [
        [
            *_of_inputs(problem, tensor.name),
            *_of_weights(problem, tensor.name),
            *_of_losses(tensor),
            number / last,
            math.log(tensor.shape[-2] / tensor.shape[-1]),
            math.log(tensor.n_weights / total),
        ]
        for number, tensor in enumerate(costs.tensors)
    ]
    found = np.array(rows)
    standard: Doubles = (found - found.mean(axis=0)) / np.maximum(found.std(axis=0), 1e-6)
    return standard


def _of_inputs(problem: Problem, name: str) -> list[float]:
    known = problem.importances or {}
    if name not in known:
        return [0.0, 0.0, 0.0]
    squares = np.asarray(known[name], np.float64).ravel()
    mean = max(float(squares.mean()), _TINY)
    median = max(float(np.median(squares)), 1e-6 * mean)
    kurtosis = float(np.square(squares).mean()) / mean**2
    return [
        math.log(max(squares.max(), _TINY) / median),
        math.log(max(kurtosis, 1)),
        math.log(mean),
    ]


def _of_weights(problem: Problem, name: str) -> list[float]:
    weight = problem.file.read_float(name)
    rows = weight.reshape(-1, weight.shape[-1])
    chosen = np.unique(np.linspace(0, len(rows) - 1, _ROWS).astype(np.intp))
    some = rows[chosen].astype(np.float64)
    squares = np.square(some)
    mean = max(float(squares.mean()), _TINY)
    absolute = max(float(np.abs(some).mean()), math.sqrt(_TINY))
    kurtosis = float(np.square(squares).mean()) / mean**2
    return [math.log(max(kurtosis, 1)), math.log(math.sqrt(mean) / absolute)]


def _of_losses(tensor: TensorCosts) -> list[float]:
    n = tensor.n_weights
    bits = [8 * one.size_bytes / n for one in tensor.candidates]
    logs = [math.log(max(one.loss / n, _TINY)) for one in tensor.candidates]
    probe = min(range(len(bits)), key=lambda i: abs(bits[i] - _PROBE_BPW))
    slope = (logs[0] - logs[-1]) / (bits[-1] - bits[0]) if bits[-1] > bits[0] else 0.0
    return [logs[probe], slope]
