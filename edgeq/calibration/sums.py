"""Sums of outer products over tokens, shared by second moments of inputs and of gradients."""

from typing import TYPE_CHECKING

import numpy as np

from edgeq.runtime.encoders import FloatArray

if TYPE_CHECKING:
    from edgeq.layerwise.concurrent import OnEach

TINY = np.float32(1e-30)
# Of a chunk's typical energy, what one token may bring: the activations of the first token are
# massive and always alike. It must not be left out: all others attend to it, see DECISIONS.md 38.
_MOST_ENERGY = 0.1
_COLUMNS = 256  # of a product, by one thread


def without_outliers(rows: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the weights, (n_rows,), cut where one row would bring too much of the energy."""
    energy = weights * np.einsum("ij,ij->i", rows, rows)
    most = _MOST_ENERGY * len(energy) * np.median(energy)
    if not most > 0:
        return weights
    cut: FloatArray = weights * np.minimum(1, most / np.maximum(energy, TINY))
    return cut.astype(np.float32)


def add_product(total: FloatArray, left: FloatArray, right: FloatArray, on_each: "OnEach") -> None:
    """Add leftᵀ right to `total` in place, some columns at a time.

    The products are torch's, as the model's own: between two libraries' threads, each waiting
    actively for its next work, a layer took four times as long.
    """
    import torch

    sums, rows, columns = (torch.from_numpy(array) for array in (total, left, right))

    def add(first: int) -> None:
        some = slice(first, first + _COLUMNS)
        sums[:, some].addmm_(rows.T, columns[:, some])

    for _ in on_each(add, range(0, total.shape[1], _COLUMNS)):
        pass
