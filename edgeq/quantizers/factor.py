"""Second moments made fit for error feedback: shrunk, damped, ordered, factored."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeq.errors import CalibrationError, RecipeError
from edgeq.runtime.encoders import FloatArray

Order = npt.NDArray[np.intp]

_GROWTH = 10.0  # of the damping, each time a factorization fails
_MAX_DAMPENING = 1e3
_ROWS = 256  # copied at a time


@dataclass(frozen=True, eq=False)
class Factored:
    """One matrix of second moments, ready for use.

    Attributes
    ----------
    hessian : (n_in, n_in) float32, shrunk and damped; positive definite
    order : (n_in,) columns in the order of processing
    upper : (n_in, n_in) float32, U with Uᵀ U = H⁻¹ in that order, upper triangular
    dampening_frac : what was added to the diagonal in the end, as a fraction of its mean
    """

    hessian: FloatArray
    order: Order
    upper: FloatArray
    dampening_frac: float


def check_damping(who: str, shrinkage: float, dampening_frac: float) -> None:
    """Refuse settings that ``damped`` cannot take.

    Raises
    ------
    RecipeError
    """
    if not (0 <= shrinkage <= 1 and 0 <= dampening_frac < np.inf):
        raise RecipeError(
            f"{who}: shrinkage={shrinkage}, dampening_frac={dampening_frac}; expected shrinkage "
            "from 0 to 1 and a damping of 0 or more."
        )


def damped(
    hessian: FloatArray, shrinkage: float, dampening_frac: float, rows: Order | None = None
) -> FloatArray:
    """Return (1 − λ) H + λ diag(H) + δ mean(diag(H)) I, or some rows of it, float32.

    Shrinking takes away what the correlations of other text than calibration's would not have.

    Parameters
    ----------
    hessian : (n_in, n_in) float32
    shrinkage : λ, 0 to 1
    dampening_frac : δ

    References
    ----------
    Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004;
    the strength and the target are measured, see DECISIONS.md.
    """
    rows = np.arange(len(hessian)) if rows is None else rows
    out = hessian[rows]
    out *= np.float32(1.0 - shrinkage)
    diagonal = np.diagonal(hessian).astype(np.float64)
    out[np.arange(len(rows)), rows] = diagonal[rows] + dampening_frac * diagonal.mean()
    return out


def factor(
    name: str,
    hessian: FloatArray,
    *,
    order: str,
    shrinkage: float,
    dampening_frac: float,
    regroup: Callable[[Order, FloatArray], Order] | None = None,
) -> Factored:
    """Shrink, damp and factor second moments; the damping grows until the factors exist.

    Parameters
    ----------
    name : of the tensor, for errors
    hessian : (n_in, n_in) float32 with finite entries and a positive trace
    order : a name of ``ORDERS``
    shrinkage : see ``damped``
    dampening_frac : added to the diagonal, as a fraction of its mean
    regroup : what to make of that order and the damped diagonal, such as ``feedback.batched``

    Raises
    ------
    CalibrationError
        No damping makes it positive definite: it is no matrix of second moments.
    """
    while dampening_frac <= _MAX_DAMPENING:
        single = damped(hessian, shrinkage, dampening_frac)
        columns = ORDERS[order](single)
        if regroup is not None:
            columns = regroup(columns, np.diagonal(single))
        del single  # not to be held beside the doubles
        try:
            upper = inverse_factor(hessian, columns, shrinkage, dampening_frac)
        except np.linalg.LinAlgError:
            dampening_frac = max(_GROWTH * dampening_frac, 1e-6)
            continue
        single = damped(hessian, shrinkage, dampening_frac)  # the loss is measured with the same
        return Factored(single, columns, upper, dampening_frac)
    raise CalibrationError(
        f"{name}: the second moments of its inputs are not positive definite even with "
        f"{_MAX_DAMPENING:g} of their mean on the diagonal. Calibrate again."
    )


def inverse_factor(
    hessian: FloatArray, order: Order, shrinkage: float = 0.0, dampening_frac: float = 0.0
) -> FloatArray:
    """Return the upper triangular U with Uᵀ U = H⁻¹, (n, n) float32, H damped, and in an order.

    From H = V Vᵀ with V upper triangular (Cholesky from the last column to the first) it is V⁻¹,
    so H is never inverted. One matrix of doubles is factored and inverted in place: of a wide layer
    these are gigabytes.

    Raises
    ------
    numpy.linalg.LinAlgError
        H is not positive definite.
    """
    from scipy.linalg.lapack import dpotrf, dtrtri

    n = len(order)
    backward = order[::-1]
    memory = np.empty(n * n, np.float64)
    work = memory.reshape((n, n), order="F")
    for first in range(0, n, _ROWS):
        rows = damped(hessian, shrinkage, dampening_frac, backward[first : first + _ROWS])
        work[:, first : first + _ROWS] = rows[:, backward].T
    lower, failed = dpotrf(work, lower=1, clean=1, overwrite_a=1)
    if not failed:
        lower, failed = dtrtri(lower, lower=1, overwrite_c=1)
    if failed or not np.isfinite(np.diagonal(lower)).all():
        raise np.linalg.LinAlgError("not positive definite")
    # rows and columns in the other direction are all entries in the other direction
    upper = memory.view(np.float32)[: n * n]
    for first in range(0, n * n, n * _ROWS):
        upper[first : first + n * _ROWS] = memory[first : first + n * _ROWS].astype(np.float32)
    del work, lower, upper
    memory.resize((n * n + 1) // 2, refcheck=False)  # gives the other half back
    upper = memory.view(np.float32)[: n * n][::-1]
    if not np.isfinite(upper).all():
        raise np.linalg.LinAlgError("overflow")
    return upper.reshape((n, n), order="F")


def error_bound(upper: FloatArray, steps: FloatArray) -> float:
    """Return the most that ½ tr(E H Eᵀ) can be after error feedback where no weight is clipped.

    Babai's nearest plane leaves an error of at most half a step along every orthogonalized column:
    ½ Σ (step/2)² / U_jj², over rows and columns.

    Parameters
    ----------
    upper : (n_in, n_in), see ``Factored``
    steps : (n_out, n_in) float32, greatest distance of neighbouring grid values, in order

    References
    ----------
    Chen et al., The geometry of LLM quantization: GPTQ as Babai's nearest plane algorithm,
    arXiv:2507.18553, the error bound without clipping.
    """
    pivots = np.square(np.diagonal(upper).astype(np.float64))
    return float((np.square(steps, dtype=np.float64) / pivots).sum() / 8)


def _natural(hessian: FloatArray) -> Order:
    return np.arange(len(hessian))


def _activation(hessian: FloatArray) -> Order:
    return np.argsort(-np.diagonal(hessian), kind="stable")


def _back_to_front(hessian: FloatArray) -> Order:
    return np.arange(len(hessian))[::-1]


def _min_pivot(single: FloatArray) -> Order:
    """Choose from the last column to the first what has the least left to compensate.

    A Cholesky factorization, row by row, that takes the least pivot; where rounding leaves none,
    the rest of H is unchanged.
    """
    n = len(single)
    left = np.diagonal(single).astype(np.float64)  # of the Schur complement
    least = np.finfo(np.float64).eps * left
    rows = np.zeros((n, n))
    chosen = np.empty(n, np.intp)
    free = np.ones(n, bool)
    for number in range(n):
        pivot = int(np.argmin(np.where(free, left, np.inf)))
        chosen[number], free[pivot] = pivot, False
        if left[pivot] > least[pivot]:
            row = single[pivot].astype(np.float64) - rows[:number, pivot] @ rows[:number]
            rows[number] = row / np.sqrt(left[pivot])
            left -= np.square(rows[number])
    return chosen[::-1].copy()


ORDERS: dict[str, Callable[[FloatArray], Order]] = {
    "activation": _activation,
    "back-to-front": _back_to_front,
    "min-pivot": _min_pivot,
    "natural": _natural,
}
