"""What chosen fold scales amount to: multipliers of rows and columns, tensor by tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf_file import GgufFile
from edgeq.errors import RecipeError
from edgeq.transforms.sites import FloatArray, FoldSite


@dataclass(frozen=True, eq=False)
class TensorScales:
    """Multipliers of one tensor: W' = diag(row) · W · diag(column).

    Attributes
    ----------
    row : (n_out,) float32; of experts (n_mat, n_out); of a norm or bias its own shape
    column : (n_in,) float32; of experts (n_mat, n_in); (..., 1) of a norm or bias, which is a
        matrix of one column here
    """

    row: FloatArray
    column: FloatArray


def tensor_scales(file: GgufFile, scales: Mapping[FoldSite, FloatArray]) -> dict[str, TensorScales]:
    """Return the multipliers of every tensor that the chosen folds change.

    Parameters
    ----------
    scales : fold to its scales, (n,) float32

    Raises
    ------
    RecipeError
        A fold is refused, or its scales are of another size, not finite or not positive.
    """
    shapes = {name: file.tensors[name].shape for site in scales for name in site.tensors}
    return multipliers(shapes, scales)


def multipliers(
    shapes: Mapping[str, tuple[int, ...]], scales: Mapping[FoldSite, FloatArray]
) -> dict[str, TensorScales]:
    """Return the multipliers of tensors of given shapes, see ``tensor_scales``.

    Tensors of the folds that are not among `shapes` are left out.
    """
    out: dict[str, TensorScales] = {}
    for site, s in scales.items():
        check_scales(site, s)
        for name in (n for n in site.tensors if n in shapes):
            now = out[name] if name in out else _ones(shapes[name], name == site.source_bias)
            if name in site.consumers:
                columns = site.columns(s) if len(shapes[name]) == 3 else site.columns(s)[0]
                out[name] = TensorScales(now.row, now.column * columns)
            else:
                out[name] = TensorScales(now.row * site.rows(s).reshape(now.row.shape), now.column)
    return out


def _ones(shape: tuple[int, ...], is_bias: bool) -> TensorScales:
    rows, columns = (shape, 1) if is_bias or len(shape) == 1 else (shape[:-1], shape[-1])
    return TensorScales(np.ones(rows, np.float32), np.ones((*rows[:-1], columns), np.float32))


def check_scales(site: FoldSite, scales: FloatArray) -> None:
    """Refuse scales that would change the function.

    Raises
    ------
    RecipeError
        The fold is refused, or the scales are of another size, not finite or not positive.
    """
    if site.refused is not None:
        raise RecipeError(f"{site.name}: this fold is refused: {site.refused}. Leave it out.")
    if scales.shape != (site.n,) or scales.dtype != np.float32:
        raise RecipeError(
            f"{site.name}: scales of {scales.dtype} and shape {scales.shape}, expected float32 of "
            f"shape ({site.n},). They belong to another fold."
        )
    with np.errstate(all="ignore"):
        good = np.isfinite(scales) & (scales > 0) & np.isfinite(1 / scales) & (1 / scales > 0)
    if not good.all():
        bad = int(np.flatnonzero(~good)[0])
        raise RecipeError(
            f"{site.name}: scale {bad} is {scales[bad]}, expected a positive number whose inverse "
            "is finite. Search the scales again."
        )


def apply(weight: FloatArray, scales: TensorScales) -> FloatArray:
    """Return diag(row) · W · diag(column) as a new float32 array.

    Parameters
    ----------
    weight : (n_out, n_in) or, for experts, (n_mat, n_out, n_in); a norm or bias in its shape
    """
    if weight.ndim == scales.row.ndim:  # a norm or bias
        return weight * scales.row
    return _by_matrix(np.multiply, weight, scales)


def unfold(weight: FloatArray, scales: TensorScales) -> FloatArray:
    """Return what ``apply`` was given, but for float32's rounding."""
    if weight.ndim == scales.row.ndim:  # a norm or bias
        return weight / scales.row
    return _by_matrix(np.divide, weight, scales)


def _by_matrix(operate: np.ufunc, weight: FloatArray, scales: TensorScales) -> FloatArray:
    """Return a weight with its multipliers applied; those of one matrix at a time are in memory."""
    out = np.empty_like(weight)
    for at in np.ndindex(weight.shape[:-2]):
        row, column = scales.row[at], scales.column[at]
        operate(weight[at], row[:, None] * column[None, :], out=out[at])
    return out


def fold_importances(importances: FloatArray, scales: TensorScales) -> FloatArray:
    """Return the mean squared inputs of a folded tensor, (n_mat, n_in): divided by column²."""
    column: FloatArray = np.square(np.atleast_2d(scales.column))
    return importances / column


def fold_hessian(hessian: FloatArray, scales: TensorScales) -> FloatArray:
    """Return the second moments of a folded tensor's inputs: H / (column columnᵀ).

    Parameters
    ----------
    hessian : (n_in, n_in) or (n_mat, n_in, n_in) float32
    """
    return _divided(hessian, scales.column if hessian.ndim == 2 else np.atleast_2d(scales.column))


def fold_outputs(outputs: FloatArray, scales: TensorScales) -> FloatArray:
    """Return the second moments of gradients at a folded tensor's outputs: G / (row rowᵀ).

    Parameters
    ----------
    outputs : (n_groups, n, n) float32, of groups of rows
    """
    return _divided(outputs, scales.row.reshape(len(outputs), -1))


def _divided(hessian: FloatArray, column: FloatArray) -> FloatArray:
    divided: FloatArray = hessian / (column[..., :, None] * column[..., None, :])
    return divided


class FoldedHessian:
    """The same of experts, each matrix made when it is asked for; ``edgeq.quantizers.Matrices``.

    Parameters
    ----------
    hessian : (n_mat, n_in, n_in) float32, before folding
    """

    def __init__(self, hessian: FloatArray, scales: TensorScales) -> None:
        self.shape = hessian.shape
        self._hessian = hessian
        self._columns = np.broadcast_to(np.atleast_2d(scales.column), hessian.shape[:2])

    def __len__(self) -> int:
        return len(self._hessian)

    def __getitem__(self, number: int) -> FloatArray:
        return _divided(self._hessian[number], self._columns[number])

    def __iter__(self) -> Iterator[FloatArray]:
        return map(self.__getitem__, range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return all of them."""
        return np.asarray(np.stack(list(self)), dtype)


def nearest_powers_of_two(scales: FloatArray) -> FloatArray:
    """Round scales to powers of two, which float32 weights and norms take without any error."""
    powers: FloatArray = np.exp2(np.rint(np.log2(scales))).astype(np.float32)
    return powers
