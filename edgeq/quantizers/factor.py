"""Second moments made fit for error feedback: shrunk, damped, ordered, factored."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeq.errors import CalibrationError
from edgeq.runtime.encoders import FloatArray

DoubleArray = npt.NDArray[np.float64]
Order = npt.NDArray[np.intp]

_GROWTH = 10.0  # of the damping, each time a factorization fails
_MAX_DAMPENING = 1e3


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


def shrink(hessian: FloatArray, shrinkage: float) -> DoubleArray:
    """Return (1 − λ) H + λ diag(H): the correlations of text that calibration did not contain.

    Parameters
    ----------
    hessian : (n_in, n_in)
    shrinkage : λ, 0 to 1

    References
    ----------
    Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004;
    the strength and the target are measured, see DECISIONS.md.
    """
    shrunk = (1.0 - shrinkage) * hessian.astype(np.float64)
    diagonal = np.diagonal(hessian)
    np.fill_diagonal(shrunk, diagonal)
    return shrunk


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
    shrinkage : see ``shrink``
    dampening_frac : added to the diagonal, as a fraction of its mean
    regroup : what to make of that order and the damped diagonal, such as ``feedback.batched``

    Raises
    ------
    CalibrationError
        No damping makes it positive definite: it is no matrix of second moments.
    """
    shrunk = shrink(np.ascontiguousarray(hessian), shrinkage)
    mean = float(np.diagonal(shrunk).mean())
    while dampening_frac <= _MAX_DAMPENING:
        damped = shrunk.copy()
        damped[np.diag_indices_from(damped)] += dampening_frac * mean
        single = damped.astype(np.float32)  # what the loss is measured with is what is factored
        damped = single.astype(np.float64)
        columns = ORDERS[order](damped)
        if regroup is not None:
            columns = regroup(columns, np.diagonal(single))
        try:
            upper = inverse_factor(damped[np.ix_(columns, columns)])
        except np.linalg.LinAlgError:
            dampening_frac = max(_GROWTH * dampening_frac, 1e-6)
            continue
        return Factored(single, columns, upper, dampening_frac)
    raise CalibrationError(
        f"{name}: the second moments of its inputs are not positive definite even with "
        f"{_MAX_DAMPENING:g} of their mean on the diagonal. Calibrate again."
    )


def inverse_factor(hessian: DoubleArray) -> FloatArray:
    """Return the upper triangular U with Uᵀ U = H⁻¹, (n, n) float32.

    From H = V Vᵀ with V upper triangular (Cholesky from the last column to the first) it is V⁻¹,
    so H is never inverted.

    Raises
    ------
    numpy.linalg.LinAlgError
        H is not positive definite.
    """
    from scipy.linalg import cholesky, solve_triangular

    lower = cholesky(hessian[::-1, ::-1], lower=True, check_finite=False)
    backward = lower[::-1, ::-1]
    inverse = solve_triangular(backward, np.eye(len(hessian)), check_finite=False)
    if not np.isfinite(inverse).all():
        raise np.linalg.LinAlgError("overflow")
    return np.ascontiguousarray(inverse, np.float32)


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


def _natural(hessian: DoubleArray) -> Order:
    return np.arange(len(hessian))


def _activation(hessian: DoubleArray) -> Order:
    return np.argsort(-np.diagonal(hessian), kind="stable")


def _back_to_front(hessian: DoubleArray) -> Order:
    return np.arange(len(hessian))[::-1]


def _min_pivot(hessian: DoubleArray) -> Order:
    """Choose from the last column to the first what has the least left to compensate.

    A Cholesky factorization, row by row, that takes the least pivot; where rounding leaves none,
    the rest of H is unchanged.
    """
    n = len(hessian)
    left = np.diagonal(hessian).copy()  # of the Schur complement
    least = np.finfo(np.float64).eps * left
    rows = np.zeros((n, n))
    chosen = np.empty(n, np.intp)
    free = np.ones(n, bool)
    for number in range(n):
        pivot = int(np.argmin(np.where(free, left, np.inf)))
        chosen[number], free[pivot] = pivot, False
        if left[pivot] > least[pivot]:
            row = hessian[pivot] - rows[:number, pivot] @ rows[:number]
            rows[number] = row / np.sqrt(left[pivot])
            left -= np.square(rows[number])
    return chosen[::-1].copy()


ORDERS: dict[str, Callable[[DoubleArray], Order]] = {
    "activation": _activation,
    "back-to-front": _back_to_front,
    "min-pivot": _min_pivot,
    "natural": _natural,
}
