"""What a candidate of a fold costs: the exported quantizer itself, judged in the unfolded basis."""

from collections.abc import Mapping

import numpy as np
from gguf.constants import GGMLQuantizationType

from edgeq.runtime.encoders import decode, encode
from edgeq.transforms.scales import TensorScales, fold_importances, unfold
from edgeq.transforms.sites import FloatArray

_EMPTY: Mapping[str, FloatArray] = {}


class QuantizerLoss:
    """Σ over tensors of ½ tr(E H Eᵀ), E the error of ggml's rounding after it is unfolded.

    Call it with folded weights and their multipliers; it can be given to ``search_scales`` as loss
    and its ``round`` as rounding.

    Parameters
    ----------
    qtypes : the tensors that are counted, with the types that they are exported as; others are free
    importances : tensor to (n_mat, n_in) mean squared inputs, *before* folding: what the encoder
        gets (divided by column²), and the diagonal of H where no second moments are given
    hessians : tensor to (n_in, n_in) or (n_mat, n_in, n_in) second moments, before folding
    relative : divide each tensor's loss by ½ tr(W H Wᵀ), so that queries, keys and values, or gate
        and up, count by their relative errors. False for moments that are weighted by the
        gradients of the loss already, whose sums compare
    n_threads : default: every CPU of this process
    """

    def __init__(
        self,
        qtypes: Mapping[str, GGMLQuantizationType],
        *,
        importances: Mapping[str, FloatArray] = _EMPTY,
        hessians: Mapping[str, FloatArray] = _EMPTY,
        relative: bool = True,
        n_threads: int | None = None,
    ) -> None:
        self.qtypes = qtypes
        self.importances = importances
        self.hessians = hessians
        self.relative = relative
        self.n_threads = n_threads
        self._norms: dict[str, float] = {}  # a fold does not change them
        # The alternation of ``dual`` rounds what has just been judged.
        self._last: dict[str, tuple[FloatArray, FloatArray, FloatArray]] = {}

    def __call__(
        self, weights: Mapping[str, FloatArray], scales: Mapping[str, TensorScales]
    ) -> float:
        """Return the loss of folded weights; 0 is exact.

        Raises
        ------
        ConversionError, CalibrationError, RecipeError
            ggml cannot encode a weight as its type, see ``edgeq.runtime.encoders.encode``.
        """
        names = [name for name in weights if name in self.qtypes]
        return sum(self._one(name, weights[name], scales[name]) for name in names)

    def round(self, name: str, weight: FloatArray, scales: TensorScales) -> FloatArray:
        """Return a folded weight as it decodes from the file, in its shape."""
        if name in self._last:
            last_weight, last_column, rounded = self._last[name]
            if np.array_equal(last_weight, weight) and np.array_equal(last_column, scales.column):
                return rounded
        importances = self.importances.get(name)
        if importances is not None:
            importances = fold_importances(importances, scales)
        qtype = self.qtypes[name]
        packed = encode(weight, qtype, importances, n_threads=self.n_threads, name=name)
        rounded = decode(packed, qtype, n_threads=self.n_threads).reshape(weight.shape)
        self._last[name] = (weight.copy(), scales.column.copy(), rounded)
        return rounded

    def _one(self, name: str, weight: FloatArray, scales: TensorScales) -> float:
        error = self._energy(name, unfold(self.round(name, weight, scales) - weight, scales))
        if not self.relative:
            return error
        if name not in self._norms:
            self._norms[name] = self._energy(name, unfold(weight, scales))
        return error / self._norms[name] if self._norms[name] > 0 else error

    def _energy(self, name: str, matrix: FloatArray) -> float:
        """Return ½ tr(M H Mᵀ), of experts the sum."""
        if name in self.hessians:
            return 0.5 * float(np.vdot(matrix @ self.hessians[name], matrix))
        if name in self.importances:  # H = 2 diag(importances)
            per_column = np.square(matrix).sum(axis=-2)
            return float(np.vdot(np.atleast_2d(per_column), self.importances[name]))
        return float(np.vdot(matrix, matrix))
