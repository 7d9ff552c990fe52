"""Coordinate descent on codes and scales under the full Hessian, batch by batch of columns."""

from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType

from cpu_kernels.block_formats import BlockFormat, Fields
from cpu_kernels.rounding import descend, refit
from edgeq.quantizers.feedback import Rounding, batch_size
from edgeq.runtime.encoders import FloatArray

_T = GGMLQuantizationType


@dataclass(frozen=True)
class _Scales:
    """What the kernel may change of a format's scales, and in what steps.

    Attributes
    ----------
    is_whole : whole-number scales below a super-block's; else the block's own floats
    bounds : least and greatest scale, least and greatest offset; equal where there is none
    mantissa, lowest : bits and least exponent of the floats
    """

    is_whole: bool
    bounds: tuple[float, float, float, float]
    mantissa: int
    lowest: int


def _scales_of(fmt: BlockFormat) -> _Scales:
    if fmt.sub_scale_range is not None:
        return _Scales(True, (*fmt.sub_scale_range, *(fmt.sub_offset_range or (0, 0))), -1, 0)
    if fmt.qtype == _T.NVFP4:  # UE4M3, halved as its levels are doubled
        return _Scales(False, (2.0**-10, 224.0, 0.0, 0.0), 3, -7)
    if fmt.qtype == _T.MXFP4:  # E8M0, halved too; not below what float32 has a reciprocal of
        return _Scales(False, (2.0**-126, 2.0**124, 0.0, 0.0), 0, -126)
    offset = (-65504.0, 65504.0) if fmt.has_offset else (0.0, 0.0)
    return _Scales(False, (-65504.0, 65504.0, *offset), 10, -14)


def lower_loss(
    rounding: Rounding, weight: FloatArray, hessian: FloatArray, *, reach: int, refits: bool
) -> None:
    """Visit every column once and lower ½ tr(E H Eᵀ); `rounding` is changed in place.

    In each batch of columns: for each group of weights the scales around its own are tried, each
    with the codes that suit it; then, for super-blocks, the scale and offset by least squares with
    the codes as they are. A row takes a step only where its loss falls.

    Parameters
    ----------
    weight : (n_out, n_in) float32
    hessian : (n_in, n_in) float32, positive definite
    reach : scales tried to both sides; 0: codes only
    refits : also refit super-blocks

    References
    ----------
    Guo et al., decoupleQ, arXiv:2404.12759; the descent is cyclic, Gauss-Seidel.
    """
    fmt = rounding.fmt
    size = batch_size(fmt, weight.shape[1])
    inverse_diagonal = np.reciprocal(np.diagonal(hessian))
    error = rounding.values - weight
    for first in range(0, weight.shape[1], size):
        columns = slice(first, first + size)
        block = _Block(rounding, columns)
        block.gradient = np.matmul(error, hessian[:, columns])
        block.hessian = np.ascontiguousarray(hessian[columns, columns])
        block.descend(inverse_diagonal[columns], reach)
        if refits and block.scales.is_whole and size == fmt.block_size:
            block.refit()
        block.store()
        error[:, columns] = rounding.values[:, columns] - weight[:, columns]


class _Block:
    """Some columns of a rounding, cut out contiguously for the kernels."""

    gradient: FloatArray
    hessian: FloatArray

    def __init__(self, rounding: Rounding, columns: slice) -> None:
        self.rounding, self.columns = rounding, columns
        fmt, fields = rounding.fmt, rounding.fields
        self.scales = _scales_of(fmt)
        self.groups = slice(columns.start // fmt.group_size, columns.stop // fmt.group_size)
        self.blocks = slice(columns.start // fmt.block_size, columns.stop // fmt.block_size)
        self.values = np.ascontiguousarray(rounding.values[:, columns])
        self.codes = np.ascontiguousarray(rounding.codes[:, columns])
        per_block = fmt.block_size // fmt.group_size
        super_scale = np.repeat(fields.super_scale[:, self.blocks], per_block, axis=1)
        super_offset = np.repeat(fields.super_offset[:, self.blocks], per_block, axis=1)
        sub_scale = np.ascontiguousarray(fields.sub_scale[:, self.groups])
        sub_offset = np.ascontiguousarray(fields.sub_offset[:, self.groups])
        ones = np.ones_like(sub_scale)
        if self.scales.is_whole:
            self.unit_scale, self.unit_offset = super_scale, super_offset
            self.scale, self.offset = sub_scale, sub_offset
        else:  # one of the two levels of scales is 1 everywhere
            self.unit_scale, self.unit_offset = ones, ones
            self.scale, self.offset = super_scale * sub_scale, super_offset * sub_offset

    def descend(self, inverse_diagonal: FloatArray, reach: int) -> None:
        fmt, scales = self.rounding.fmt, self.scales
        descend(
            self.gradient,
            self.hessian,
            inverse_diagonal,
            fmt.levels,
            self.rounding.level_step,
            fmt.group_size,
            self.unit_scale,
            self.unit_offset,
            self.scale,
            self.offset,
            np.array(scales.bounds, np.float32),
            scales.mantissa,
            scales.lowest,
            self.codes,
            self.values,
            reach,
            2,
        )

    def refit(self) -> None:
        """Move the super-block's scale and offset to their least squares, row by row."""
        fmt, fields = self.rounding.fmt, self.rounding.fields
        steps = np.empty((len(self.codes), 7), np.float32)
        refit(
            self.gradient,
            self.hessian,
            fmt.levels,
            fmt.group_size,
            self.scale,
            self.offset,
            self.codes,
            steps,
        )
        scale, offset = fields.super_scale[:, self.blocks], fields.super_offset[:, self.blocks]
        new_scale = fmt.snap_super_scale(scale + steps[:, :1])
        new_offset = fmt.snap_super_offset(offset + steps[:, 1:2])
        x, y = (new_scale - scale)[:, 0], (new_offset - offset)[:, 0]
        a, b, p, q, r = steps[:, 2:].T
        falls = (a * x + b * y + 0.5 * (p * x * x + 2 * q * x * y + r * y * y) < 0)[:, None]
        fields.super_scale[:, self.blocks] = np.where(falls, new_scale, scale)
        fields.super_offset[:, self.blocks] = np.where(falls, new_offset, offset)

    def store(self) -> None:
        """Write the block back, its values exactly as the file will decode."""
        rounding, fmt, fields = self.rounding, self.rounding.fmt, self.rounding.fields
        if self.scales.is_whole or fmt.qtype == _T.NVFP4:
            fields.sub_scale[:, self.groups] = self.scale
            fields.sub_offset[:, self.groups] = self.offset
        else:
            fields.super_scale[:, self.blocks] = self.scale
            fields.super_offset[:, self.blocks] = self.offset
        rounding.codes[:, self.columns] = self.codes
        part = Fields(
            *(
                np.ascontiguousarray(
                    values[:, self.blocks if name.startswith("super") else self.groups]
                )
                for name, values in vars(fields).items()
            )
        )
        rounding.values[:, self.columns] = fmt.decode(part, self.codes)
