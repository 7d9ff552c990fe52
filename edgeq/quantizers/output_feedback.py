"""Error feedback from row to row: where gradients at outputs go together, errors make good.

The loss of errors E, (n_out, n_in), is tr(G E H Eᵀ): H of the inputs, G of the loss's gradients at
the outputs. With G = Mᵀ D M, M unit lower triangular in the order of the rows, it is the sum of
e H eᵀ over the rows e of M E, weighted by D. So rows are rounded one after the other, and each is
moved first by what E = M⁻¹ (M E) says about the rows before it; how a moved row is rounded is
error feedback under H as ever.

Source: Tseng et al., YAQA, arXiv:2505.22988, section 4, there for codebooks without scales.
"""

from collections.abc import Callable

import numpy as np

from edgeq.errors import CalibrationError
from edgeq.quantizers.factor import Order, factor
from edgeq.runtime.encoders import FloatArray

ROWS = 16  # rounded together: these do not make up for each other's errors


def feed_back_to_rows(
    name: str,
    weight: FloatArray,
    outputs: FloatArray,
    round_rows: Callable[[Order, FloatArray], FloatArray],
    *,
    shrinkage: float,
    dampening_frac: float,
) -> None:
    """Have all rows rounded, those first at whose outputs the gradients are largest.

    Parameters
    ----------
    name : of the tensor, for errors
    weight : (n_out, n_in) float32
    outputs : (g, n, n) float32, G of g groups of n rows, one after the other; groups are apart
    round_rows : called with the numbers of some rows and what they are moved to, (n_rows, n_in);
        returns what they are rounded to
    shrinkage, dampening_frac : of G, see ``edgeq.quantizers.factor.damped``

    Raises
    ------
    CalibrationError
        G is not finite.
    """
    from scipy.linalg import solve_triangular

    size = len(weight) // len(outputs)
    for group, gradients in enumerate(outputs):
        if not np.isfinite(gradients).all():
            raise CalibrationError(
                f"{name}: the gradients at its outputs are not finite, expected finite numbers. "
                "Give the model's F32 or BF16 weights, another text, or --no-output-feedback."
            )
        mean = np.diagonal(gradients).mean()
        factored = factor(  # where the loss does not see these rows, each is alone
            name,
            gradients / mean if mean > 0 else np.eye(size, dtype=np.float32),
            order="activation",
            shrinkage=shrinkage,
            dampening_frac=dampening_frac,
        )
        upper = factored.upper  # U with Uᵀ U = G⁻¹
        back: FloatArray = (upper.T / np.diagonal(upper)).astype(np.float32)  # M⁻¹
        errors = np.empty((size, weight.shape[1]), np.float32)  # M E
        for first in range(0, size, ROWS):
            block = slice(first, min(first + ROWS, size))
            rows = group * size + factored.order[block]
            moved = weight[rows] + back[block, :first] @ errors[:first]
            left = round_rows(rows, moved) - moved
            errors[block] = solve_triangular(
                back[block, block], left, lower=True, unit_diagonal=True
            )
