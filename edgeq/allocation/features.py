"""What a policy knows about a tensor: eleven numbers that mean the same in every model.

Ten are standardised over the model's tensors, so that a policy may be applied to a model that it
never saw; the last one, what is left of the budget, changes while decisions are made.
"""

import math

import numpy as np
import numpy.typing as npt

from edgeq.allocation.costs import Problem

Doubles = npt.NDArray[np.float64]
NAMES = (
    "input outliers",  # ln of the largest over the median mean square of the input channels
    "input kurtosis",  # ln of the mean of squares over the square of the mean, of the same
    "input energy",  # ln of their mean
    "weight kurtosis",  # ln E[w^4] / E[w^2]^2
    "weight spread",  # ln of the root mean square over the mean absolute weight
    "rounding error",  # ln of the squared error of 4-bit rounding over the squares, both weighted
    "writes the residual",  # 1: its output is added to the hidden state
    "depth",  # place in the graph, 0 to 1
    "shape",  # ln of n_out over n_in
    "share",  # ln of the share of the weights
    "budget left",  # ln of the bits left a weight left over the budget's mean
)
_BLOCK = 32
_RESIDUAL = ("attn_output", "ffn_down")
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
            float(any(part in tensor.name for part in _RESIDUAL)),
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
    inputs = (problem.importances or {}).get(name)
    energy = np.ones(some.shape[1]) if inputs is None else np.asarray(inputs, np.float64).mean(0)
    blocks = some.reshape(len(some), -1, math.gcd(_BLOCK, some.shape[1]))
    scale = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True), math.sqrt(_TINY)) / 7
    wrong = np.square(np.rint(blocks / scale) * scale - blocks).reshape(some.shape)
    error = max(float((wrong @ energy).sum()), _TINY) / max(float((squares @ energy).sum()), _TINY)
    mean = max(float(squares.mean()), _TINY)
    absolute = max(float(np.abs(some).mean()), math.sqrt(_TINY))
    kurtosis = float(np.square(squares).mean()) / mean**2
    return [math.log(max(kurtosis, 1)), math.log(math.sqrt(mean) / absolute), math.log(error)]
