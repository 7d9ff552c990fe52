"""What chosen fold scales amount to: multipliers of rows and columns, tensor by tensor."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

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
    return weight * (scales.row[..., :, None] * scales.column[..., None, :])


def unfold(weight: FloatArray, scales: TensorScales) -> FloatArray:
    """Return what ``apply`` was given, but for float32's rounding."""
    if weight.ndim == scales.row.ndim:  # a norm or bias
        return weight / scales.row
    return weight / (scales.row[..., :, None] * scales.column[..., None, :])


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
    column = scales.column if hessian.ndim == 2 else np.atleast_2d(scales.column)
    return hessian / (column[..., :, None] * column[..., None, :])


def nearest_powers_of_two(scales: FloatArray) -> FloatArray:
    """Round scales to powers of two, which float32 weights and norms take without any error."""
    powers: FloatArray = np.exp2(np.rint(np.log2(scales))).astype(np.float32)
    return powers
