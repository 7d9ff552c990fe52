"""What scales are made from: the energy and the weights of each channel that a fold scales."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import CalibrationError
from edgeq.transforms.sites import FloatArray, FoldSite

Float64 = npt.NDArray[np.float64]

_BALANCE_STEPS = 30
_NORM_ORDER = 4  # (Σ w^(2·4))^(1/4) stands for the largest w² of a block; squared twice below


class Channels:
    """The consumers' columns of one fold.

    Parameters
    ----------
    weights, importances, hessians : see ``edgeq.transforms.search.search_scales``
    block : columns that share a scale in the exported type

    Attributes
    ----------
    energies : consumer to (site.n_mat, n_columns) float64 mean squared inputs, with mean 1
    rows : consumer to its rows, (site.n_mat, n_rows, n_columns): of experts that share scales all
        rows together

    Raises
    ------
    CalibrationError
        There are no statistics of any given consumer, or they are of another shape, negative or
        not finite; or a weight is not finite.
    """

    def __init__(
        self,
        site: FoldSite,
        weights: Mapping[str, FloatArray],
        importances: Mapping[str, FloatArray],
        hessians: Mapping[str, FloatArray],
        block: int,
    ) -> None:
        self.site = site
        self.block = math.gcd(block, site.n_columns)
        self.energies: dict[str, Float64] = {}
        self.rows: dict[str, FloatArray] = {}
        for name in (name for name in site.consumers if name in weights):
            energy = _energy(name, site, importances, hessians)
            if energy is None:
                continue
            rows = weights[name].reshape(site.n_mat, -1, site.n_columns)
            if not np.isfinite(rows).all():
                raise CalibrationError(
                    f"{name}: a weight is not finite. The model's file is damaged: fetch or "
                    "convert it again."
                )
            self.energies[name], self.rows[name] = energy, rows
        if not self.energies:
            raise CalibrationError(
                f"{site.name}: neither importances nor second moments of the inputs of "
                f"{site.consumers[0]}. Calibrate with this tensor."
            )

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        """Whether a scale's channels ever saw an input, (n,)."""
        mean = np.mean(list(self.energies.values()), axis=0)
        found: npt.NDArray[np.bool_] = self.over_heads(mean, np.max) > 0
        return found

    def log_rms(self) -> Float64:
        """Return ln rms(x) of each scale's channels, (n,); 0 where they never saw an input."""
        mean = np.mean(list(self.energies.values()), axis=0)
        return _centred_log(self.over_heads(mean, np.mean), self.site.n_mat) / 2

    def log_peak(self) -> Float64:
        """Return ln max|W| over the rows of all consumers, (n,); 0 where all of them are zero."""
        peaks = np.max([np.abs(rows).max(axis=1) for rows in self.rows.values()], axis=0)
        return _centred_log(self.over_heads(peaks, np.max), self.site.n_mat)

    def log_mean_share(self) -> Float64:
        """Return ln of the mean over rows of |W| / max|W| of its block, (n,): AWQ's weight scale.

        References
        ----------
        Lin et al., AWQ, arXiv:2306.00978; its code normalizes each group by its largest weight.
        """
        shares: list[Float64] = []
        for rows in self.rows.values():
            blocks = np.abs(rows).reshape(*rows.shape[:2], -1, self.block)
            peaks = np.maximum(blocks.max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
            shares.append((blocks / peaks).mean(axis=1, dtype=np.float64).reshape(len(rows), -1))
        return _centred_log(self.over_heads(np.mean(shares, axis=0), np.mean), self.site.n_mat)

    def log_correction(
        self, folded: Mapping[str, FloatArray], rounded: Mapping[str, FloatArray]
    ) -> Float64:
        """Return ln of the channel factors that bring rounded weights closest to folded ones, (n,).

        s_j = Σ h W Ŵ / Σ h Ŵ² over the rows and consumers, and over the columns that share it.
        """
        products, squares = np.zeros((2, self.site.n))
        for name, energy in self.energies.items():
            shape = self.rows[name].shape
            w, q = (m[name].reshape(shape).astype(np.float64) for m in (folded, rounded))
            weight = energy / max(float((energy * np.square(w).sum(axis=1)).sum()), 1e-300)
            products += self.over_heads(weight * (w * q).sum(axis=1), np.sum)
            squares += self.over_heads(weight * (q * q).sum(axis=1), np.sum)
        usable = (products > 0) & (squares > 0)
        factors = np.divide(products, squares, out=np.ones_like(products), where=usable)
        return np.log(factors)

    def over_heads(self, values: npt.NDArray[np.floating], reduce: Callable[..., Any]) -> Float64:
        """Reduce (n_mat, n_columns) over the columns that share a scale, to (n,) float64."""
        site = self.site
        grouped = values.reshape(site.n_mat, -1, site.group, site.head_dim)
        reduced: Float64 = reduce(grouped.astype(np.float64), axis=2).ravel()
        return reduced


def balanced(channels: Channels) -> Float64:
    """Return ln of the scales that balance every block of the exported type, (n,) float64.

    A block's rounding error is as large as its largest weight for all of its columns, so a row's
    loss is, up to a constant, max_j (W_ij c_j)² · Σ_j h_j / c_j², summed over rows and blocks. Its
    minimum over c has in each block: the part of the rows' peaks that column j makes is the part of
    the loss that it suffers. Found by damped diagonal Newton steps on ln c, with a norm of order 8
    for the largest weight.
    """
    site = channels.site
    logs = np.zeros(site.n)
    squared = {name: np.square(rows) for name, rows in channels.rows.items()}
    for _ in range(_BALANCE_STEPS):
        slope, curvature = np.zeros((2, site.n))
        columns = np.exp(logs).reshape(site.n_mat, -1)[:, site.scale_of_column]
        for name, squares in squared.items():
            first, second = _block_slopes(squares, channels.energies[name], columns, channels.block)
            slope += channels.over_heads(first, np.sum)
            curvature += channels.over_heads(second, np.sum)
        step = np.divide(slope, curvature, out=np.zeros(site.n), where=curvature > 0)
        logs -= np.where(channels.seen, 0.7 * np.clip(step, -1.0, 1.0), 0.0)
    return logs


def _block_slopes(
    squares: FloatArray, energy: Float64, columns: Float64, block: int
) -> tuple[Float64, Float64]:
    """Return slope and curvature by ln c of one consumer's loss, (n_mat, n_columns), relative."""
    n_mat, n_rows, _ = squares.shape
    scaled = (squares * np.square(columns)[:, None].astype(np.float32)).reshape(
        n_mat, n_rows, -1, block
    )
    highest = np.maximum(scaled.max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    powers = np.square(np.square(scaled / highest))  # to the _NORM_ORDER-th power
    sums = np.maximum(powers.sum(axis=-1, keepdims=True), 1)  # less only in blocks of zeros
    norms = highest * sums ** np.float32(1 / _NORM_ORDER)  # about the largest square of the block
    peaks = norms.sum(axis=1, dtype=np.float64)  # (n_mat, n_blocks, 1)
    makes = (powers / sums * norms).sum(axis=1, dtype=np.float64)  # (n_mat, n_blocks, block)
    suffers = (energy / np.square(columns)).reshape(n_mat, -1, block)
    noise = suffers.sum(axis=-1, keepdims=True)
    total = max(float((peaks * noise).sum()), 1e-300)
    suffers = np.where(makes > 0, suffers, 0.0)  # weights of zero have no error
    slope = (makes * noise - suffers * peaks) / total
    curvature = (2 * _NORM_ORDER * makes * noise + 2 * suffers * peaks) / total
    return slope.reshape(n_mat, -1), curvature.reshape(n_mat, -1)


def _energy(
    name: str,
    site: FoldSite,
    importances: Mapping[str, FloatArray],
    hessians: Mapping[str, FloatArray],
) -> Float64 | None:
    """Return a consumer's mean squared inputs, (site.n_mat, n_columns) with mean 1."""
    if name in hessians:
        found = np.diagonal(hessians[name], axis1=-2, axis2=-1)
    elif name in importances:
        found = importances[name]
    else:
        return None
    values = np.atleast_2d(found).astype(np.float64)
    if values.shape[1] != site.n_columns or len(values) % site.n_mat:
        raise CalibrationError(
            f"{name}: statistics of {values.shape[1]} channels and {len(values)} matrices, "
            f"expected {site.n_columns} and {site.n_mat}. They were made from another model."
        )
    if not (np.isfinite(values).all() and values.min() >= 0):
        raise CalibrationError(
            f"{name}: an input channel's mean square is {values.min()} or not finite, expected "
            "finite numbers that are not negative. Calibrate again."
        )
    values = values.reshape(site.n_mat, -1, site.n_columns).mean(axis=1)
    mean = values.mean(axis=1, keepdims=True)
    relative: Float64 = values / np.where(mean > 0, mean, 1.0)
    return relative


def _centred_log(values: Float64, n_mat: int) -> Float64:
    """Return ln of positive values less its mean in each matrix; 0 for the others."""
    positive = (values > 0).reshape(n_mat, -1)
    logs = np.log(values, where=values > 0, out=np.zeros_like(values)).reshape(n_mat, -1)
    mean = logs.sum(axis=1, keepdims=True) / np.maximum(positive.sum(axis=1, keepdims=True), 1)
    return np.where(positive, logs - mean, 0.0).ravel()
