"""Rotations that are learned: by the error that rounding to nearest would leave, on the weights.

A block of weights that shares a scale is rounded in steps that go with its largest weight, so the
mean squared error of a type is about the sum of the blocks' squared maxima, whatever its bits. A
maximum has hardly a gradient; a p-norm of the block stands for it. Each step turns the rotation
along its tangent by the Cayley transform, which keeps it orthogonal; one that does not lower the
loss is halved. No text is needed, and nothing is drawn.

Source: Liu et al., SpinQuant, arXiv:2405.16406, section 3.2, the Cayley transform (there on the
network's loss; here on the weights' own); Li et al., arXiv:2002.01113, equation 4.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Rotation = npt.NDArray[np.float64]

_BLOCK = 32  # weights that share a scale, in most types
_SLAB = 1 << 17  # weights that are looked at together
_P = 8  # of the norm that stands for a block's maximum
_FIRST_STEP = 0.05  # radians: the largest angle of the first turn
_SMALLEST_STEP = 1e-4


@dataclass(frozen=True)
class Turned:
    """What a rotation turns.

    Attributes
    ----------
    read : gives matrices, (n_mat, n_rows, n_columns) float32
    by_rows : the rotation's transpose stands before them; False: the rotation behind them
    """

    read: Callable[[], FloatArray]
    by_rows: bool


def learn_rotation(
    start: Rotation, turned: Sequence[Turned], n_steps: int
) -> tuple[Rotation, float]:
    """Return an orthogonal matrix that leaves smaller rounding errors than `start`.

    Parameters
    ----------
    start : (n, n) float64, orthogonal
    turned : read once in every step
    n_steps : gradients at most

    Returns
    -------
    rotation : (n, n) float64
    ratio : of the loss to that of `start`

    Notes
    -----
    The loss is the mean over `turned` of the sum over blocks of the squared p-norm, relative to
    the matrices' squared Frobenius norm, which no rotation changes.
    """
    rotation, angle = start, _FIRST_STEP
    loss, gradient = _loss(rotation, turned)
    first = loss
    for _ in range(n_steps):
        tangent = gradient @ rotation.T
        tangent -= tangent.T
        largest = float(np.linalg.norm(tangent, 2))
        if angle < _SMALLEST_STEP or largest == 0:
            break
        candidate = _turn(rotation, tangent * (angle / largest))
        after, its_gradient = _loss(candidate, turned)
        if after < loss:
            rotation, loss, gradient, angle = candidate, after, its_gradient, angle * 1.5
        else:
            angle /= 2
    left, _, right = np.linalg.svd(rotation)  # rounding errors of many turns
    return left @ right, loss / first


def _turn(rotation: Rotation, skew: Rotation) -> Rotation:
    """Return the Cayley transform of -`skew` times a rotation, (n, n)."""
    eye = np.eye(len(rotation))
    return np.asarray(np.linalg.solve(eye + skew / 2, (eye - skew / 2) @ rotation), np.float64)


def _loss(rotation: Rotation, turned: Sequence[Turned]) -> tuple[float, Rotation]:
    """Return the loss, and its gradient by the rotation, (n, n) float64."""
    total, gradient = 0.0, np.zeros_like(rotation)
    single = rotation.astype(np.float32)
    for one in turned:
        weights = one.read()
        scale = 1 / max(float(np.vdot(weights, weights)), 1e-30) / len(turned)
        for slab in _slabs(weights, one.by_rows):
            left, right = (single.T, slab) if one.by_rows else (slab, single)
            loss, slope = _block_maxima(left @ right)
            total += loss * scale
            gradient += (slab @ slope.T if one.by_rows else slab.T @ slope) * np.float64(scale)
    return total, gradient


def _slabs(weights: FloatArray, by_rows: bool) -> Iterator[FloatArray]:
    """Yield parts that stay in a cache: columns in whole blocks, or rows, of every matrix."""
    n = max(_SLAB // weights.shape[1 if by_rows else 2] // _BLOCK, 1) * _BLOCK
    for matrix in weights:
        for first in range(0, matrix.shape[1 if by_rows else 0], n):
            yield matrix[:, first : first + n] if by_rows else matrix[first : first + n]


def _block_maxima(weights: FloatArray) -> tuple[float, FloatArray]:
    """Return the sum of the blocks' squared p-norms, and its slopes, of the weights' shape."""
    n = weights.shape[-1]
    blocks = weights.reshape(-1, np.gcd(n, _BLOCK))
    largest = np.maximum(np.abs(blocks).max(axis=1, keepdims=True), 1e-30)
    relative = blocks / largest
    cubed = np.square(relative) * relative
    sums = np.square(np.square(np.square(relative))).sum(axis=1, keepdims=True)
    norms = sums ** np.float32(2 / _P)  # squared, relative to the largest
    slope = (2 * largest) * (norms / sums) * (cubed * cubed * relative)
    return float((norms * np.square(largest)).sum(dtype=np.float64)), slope.reshape(weights.shape)
