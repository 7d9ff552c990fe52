"""Sherry's ternary weights at 1.25 bits: of every four weights exactly one is zero.

The others are ±1, times a scale for 256 weights: four places of the zero and eight signs are 32
states, five bits for four weights. With the scale 1.3125 bits a weight, where TQ1_0 takes 1.6875.
No GGUF type; it is what models trained for it could be multiplied as (``lookup``)::

    block of 42 bytes, 256 weights
    0..39   64 states of five bits, one after the other from the lowest bit on
    40..41  scale, half float
    state   bits 4 3: place of the zero; bits 2 1 0: signs of the others, the first in bit 0; 1 is
            minus

References
----------
Sherry of AngelSlim (github.com/Tencent/AngelSlim), whose zero is the smallest weight and whose
scale is the mean of the others; here both are found by least squares with importances.
"""

import numpy as np
import numpy.typing as npt

from cpu_kernels.block_formats_bits import Bytes
from cpu_kernels.isa import Isa
from cpu_kernels.lookup_tiles import LookupLayout, LookupTiles, rearrange_indices, sums_of

Floats = npt.NDArray[np.float32]

NAME = "SHERRY"
BLOCK_SIZE = 256
TYPE_SIZE = 42
_GROUPS = BLOCK_SIZE // 4
_LARGEST = 65504  # half float
_ROUNDS = 32  # at most; the error falls in each, and four or five are enough
_VALUES = sums_of("sparse").T.astype(np.float32)  # (32 states, 4)


def encode(weight: Floats, importances: Floats | None = None) -> Bytes:
    """Choose states and scales that lower the weighted squared error until nothing changes.

    For a scale, the best state of four weights is found exactly; for states, the best scale is.

    Parameters
    ----------
    weight : (n_out, n_in) float32, finite
    importances : (n_in,) float32, not negative, such as mean squared activations; without: ones

    Returns
    -------
    (n_out, n_in / 256 · 42) uint8

    Raises
    ------
    ValueError
        The columns do not divide into blocks, a weight is not finite, or importances do not fit.
    """
    if weight.ndim != 2 or weight.shape[1] % BLOCK_SIZE or not np.isfinite(weight).all():
        raise ValueError(
            f"sherry: got weights of shape {weight.shape}, expected finite rows of blocks of "
            f"{BLOCK_SIZE}."
        )
    own = np.ones(weight.shape[1], np.float32) if importances is None else importances
    if own.shape != weight.shape[1:] or not (np.isfinite(own) & (own >= 0)).all():
        raise ValueError(
            f"sherry: got importances of shape {own.shape}, expected {weight.shape[1]} finite "
            "numbers that are not negative."
        )
    size = np.abs(weight).reshape(-1, _GROUPS, 4).astype(np.float64)
    heed = np.broadcast_to(own, weight.shape).reshape(size.shape).astype(np.float64)
    heed = np.where(heed.sum(axis=(1, 2), keepdims=True) > 0, heed, 1.0)
    zero = size.argmin(axis=2)
    scale = _best_scale(size, heed, zero)
    for _ in range(_ROUNDS):
        known, zero = zero, _best_zero(size, heed, scale)
        scale = _best_scale(size, heed, zero)
        if np.array_equal(zero, known):
            break
    scale = scale.astype(np.float16).astype(np.float32)
    zero = _best_zero(size, heed, scale)
    return pack(
        _states(weight.reshape(size.shape), zero).reshape(len(weight), -1),
        scale.reshape(len(weight), -1),
    )


def _best_zero(
    size: npt.NDArray[np.float64], heed: npt.NDArray[np.float64], scale: Floats
) -> npt.NDArray[np.int64]:
    """Return the place whose zero costs least more than a ±1 would."""
    twice = 2 * size - scale[:, None, None]
    found: npt.NDArray[np.int64] = (heed * scale[:, None, None] * twice).argmin(axis=2)
    return found


def _best_scale(
    size: npt.NDArray[np.float64], heed: npt.NDArray[np.float64], zero: npt.NDArray[np.int64]
) -> Floats:
    kept = heed.copy()
    np.put_along_axis(kept, zero[:, :, None], 0, axis=2)
    total = kept.sum(axis=(1, 2))
    mean = np.divide((kept * size).sum(axis=(1, 2)), total, where=total > 0, out=total.copy())
    found: Floats = np.minimum(mean, _LARGEST).astype(np.float32)
    return found


def _states(weight: Floats, zero: npt.NDArray[np.int64]) -> Bytes:
    minus = weight < 0
    rank = np.arange(3)
    others = rank + (rank >= zero[:, :, None])  # places of the three that are not zero
    signs = np.take_along_axis(minus, others, axis=2) @ np.array([1, 2, 4])
    found: Bytes = (zero << 3 | signs).astype(np.uint8)
    return found


def pack(states: Bytes, scales: Floats) -> Bytes:
    """Put rows together, the inverse of ``unpack``.

    Parameters
    ----------
    states : (n_out, n_in / 4) uint8 below 32
    scales : (n_out, n_in / 256) float32 that half floats can hold
    """
    n_out, n_blocks = scales.shape
    bits = np.unpackbits(states[:, :, None], axis=2, count=5, bitorder="little")
    packed = np.empty((n_out, n_blocks, TYPE_SIZE), np.uint8)
    packed[:, :, :40] = np.packbits(bits.reshape(n_out, n_blocks, -1), axis=2, bitorder="little")
    packed[:, :, 40:] = scales.astype("<f2").view(np.uint8).reshape(n_out, n_blocks, 2)
    return packed.reshape(n_out, -1)


def unpack(packed: Bytes) -> tuple[Bytes, Floats]:
    """Take rows apart: states, (n_out, n_in / 4) uint8, and scales, (n_out, n_in / 256) float32.

    Raises
    ------
    ValueError
        The rows are no whole number of blocks.
    """
    if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] % TYPE_SIZE:
        raise ValueError(
            f"sherry: got {packed.dtype} of shape {packed.shape}, expected rows of uint8 in blocks "
            f"of {TYPE_SIZE} bytes."
        )
    blocks = packed.reshape(len(packed), -1, TYPE_SIZE)
    bits = np.unpackbits(blocks[:, :, :40], axis=2, bitorder="little")
    states = np.packbits(bits.reshape(len(packed), -1, 5), axis=2, bitorder="little")[:, :, 0]
    scales = np.ascontiguousarray(blocks[:, :, 40:]).view("<f2")[:, :, 0].astype(np.float32)
    return states, scales


def decode(packed: Bytes) -> Floats:
    """Return the weights, (n_out, n_in) float32."""
    states, scales = unpack(packed)
    blocks = _VALUES[states].reshape(*scales.shape, BLOCK_SIZE)
    return (blocks * scales[:, :, None]).reshape(len(packed), -1)


def rearrange(packed: Bytes, isa: Isa) -> LookupTiles:
    """Rearrange rows for products, see ``lookup``.

    Raises
    ------
    ValueError
        The rows are no whole number of blocks, or a scale is not finite.
    """
    states, scales = unpack(packed)
    size = 2 if isa.has_half else 4
    layout = LookupLayout(NAME, "sparse", 1, 0, BLOCK_SIZE, "Q8_K", size, BLOCK_SIZE)
    return rearrange_indices(layout, states, scales)
