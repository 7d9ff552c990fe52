"""What packed rows of a reference tell of the divergence: an estimate and a rigorous bound.

Write the divergence as Σ f(p, q), f = p·ln(p/q) − p + q >= 0 (Σp = Σq = 1). All q are
known. f is convex in p with its minimum 0 at p = q, so a p known to an interval bounds f by the
ends of the interval, and by 0 below if q lies inside. For the tail T with mass m, s and Q = Σ_T q:

* below: Σ_T f >= m·ln(m/Q) − m + Q (log-sum inequality), and >= s + min − m + Q,
* above: Σ_T f <= s + max − m + Q,

where min and max are those of Σ_T p·(−ln q) over all p with Σ_T p = m and 0 <= p <= e^cut: the
mass filled at its limit e^cut into the largest q, or into the smallest. They are taken from a
histogram of ln q, each bin at its unfavourable edge. Float32 rounding of what is stored is covered
by widening: ln p by PAD, and everything by ROUNDING · (1 + Σ p·|ln(p/q)|).

The estimate takes f at the centre of each interval less p·step²/24, the mean that rounding adds
when ln(p/q) does not depend on where in its interval ln p lies; and for the tail N_SAMPLES of its
tokens, drawn in proportion to p when the row was packed (systematic sampling), with which
m · mean ln(p/q) − m + Q is an unbiased estimate of Σ_T f. Estimates below 0 are given as 0.
"""

import math

import numba
import numpy as np

from cpu_kernels._numba import kernel
from cpu_kernels.divergence import Doubles, Floats, Ints, log_sum_exp
from cpu_kernels.reference_rows import (
    BINS_PER_NAT,
    HEAD,
    HEAD_LEVEL,
    Bytes,
    Longs,
    PackedRows,
    offsets,
)

PAD = 2e-6  # nats, float32 rounding of a stored ln p and of a normalization
ROUNDING = 2e-6
_Q_BINS = 64 * BINS_PER_NAT  # ln q from 0 down to -64; the last bin has all below


@kernel()
def _bin(log_q: float) -> int:
    place = -log_q * BINS_PER_NAT
    return 0 if place < 0.0 else (int(place) if place < _Q_BINS else _Q_BINS)


@kernel()
def _f(log_p: float, log_q: float) -> float:
    return math.exp(log_p) * (log_p - log_q - 1.0) + math.exp(log_q)


@kernel()
def _filled(counts: Longs, mass: float, limit: float, lowest: float, smallest: bool) -> float:
    """Return max (`smallest`) or min of Σ p·(−ln q) from the histogram of the tail's ln q."""
    left = mass
    total = 0.0
    n = counts.shape[0]
    for step in range(n):
        place = n - 1 - step if smallest else step
        if counts[place] == 0:
            continue
        part = min(left, counts[place] * limit)
        edge = (place + 1) / BINS_PER_NAT if smallest else place / BINS_PER_NAT
        if smallest and place == n - 1:
            edge = -lowest
        total += part * edge
        left -= part
        if left <= 0.0:
            break
    return total


@kernel()
def _sampled(
    samples: Ints, log_p: Floats, logits: Floats, log_sum: float, mass: float, q: float
) -> float:
    """Return the unbiased estimate of Σ f over the tail."""
    total = 0.0
    n = 0
    for j in range(samples.shape[0]):
        if samples[j] >= 0:
            total += np.float64(log_p[j]) - (np.float64(logits[samples[j]]) - log_sum)
            n += 1
    return (mass * (total / n) if n > 0 else 0.0) - mass + q


@kernel()
def _tail(counts: Longs, mass: float, entropy: float, q: float, cut: float, lowest: float):  # type: ignore[no-untyped-def]
    """Return the lower and the upper bound of Σ f over the tail."""
    limit = math.exp(cut + PAD)
    below = 0.0
    if mass > 0.0 and q > 0.0:
        below = mass * math.log(mass / q) - mass + q
    rest = entropy - mass + q
    above = rest + _filled(counts, mass, limit, lowest, True)
    least = rest + _filled(counts, mass, limit, lowest, False)
    return max(below, least, 0.0), max(above, below, 0.0)


@kernel()
def _gap(stream: Bytes, at: int) -> tuple[np.int64, int]:
    """Return the gap at `at` and where its level is; a gap of -1 where the bytes end before."""
    first = np.int64(stream[at])
    size = 1 if first < 224 else (2 if first < 255 else 4)
    if at + size >= stream.shape[0]:
        return np.int64(-1), at
    if size == 1:
        return first, at + 1
    if size == 2:
        return 224 + ((first - 224) << 8) + np.int64(stream[at + 1]), at + 2
    low = np.int64(stream[at + 1]) | (np.int64(stream[at + 2]) << 8)
    return low | (np.int64(stream[at + 3]) << 16), at + 4


@kernel()
def _row(  # type: ignore[no-untyped-def]
    stream: Bytes,
    heads: Floats,
    cut: float,
    mass: float,
    entropy: float,
    samples: Ints,
    sample_log_p: Floats,
    logits: Floats,
    log_sum: float,
):
    """Return estimate and error bound of one row; a negative bound says that it is damaged."""
    step = (HEAD - cut) / HEAD_LEVEL if cut < HEAD else 0.0
    counts = np.zeros(_Q_BINS + 1, np.int64)
    n_vocab = logits.shape[0]
    estimate = 0.0
    low = 0.0
    high = 0.0
    weight = 0.0
    tail_q = 0.0
    lowest = 0.0
    at = 0
    head = 0
    token = 0
    while True:
        stop = n_vocab  # the next kept token, or the end
        if at < stream.shape[0]:
            gap, at = _gap(stream, at)
            stop = token + gap
            if gap < 0 or stop >= n_vocab:
                return 0.0, -1.0
        for i in range(token, stop):
            log_q = np.float64(logits[i]) - log_sum
            tail_q += math.exp(log_q)
            lowest = min(lowest, log_q)
            counts[_bin(log_q)] += 1
        if stop == n_vocab:
            break
        level = stream[at]
        at += 1
        token = stop + 1
        log_q = np.float64(logits[stop]) - log_sum
        if level == HEAD_LEVEL:
            if head >= heads.shape[0]:
                return 0.0, -1.0
            log_p = np.float64(heads[head])
            head += 1
            half = PAD
        else:
            log_p = cut + (np.float64(level) + 0.5) * step
            half = 0.5 * step + PAD
        p = math.exp(log_p)
        ratio = log_p - log_q
        here = _f(log_p, log_q)
        if level != HEAD_LEVEL:
            here -= p * step * step / 24.0
        ends = _f(log_p - half, log_q), _f(log_p + half, log_q)
        estimate += here
        high += max(ends[0], ends[1])
        if abs(ratio) > half:
            low += min(ends[0], ends[1])
        weight += p * abs(ratio)
    below, above = _tail(counts, mass, entropy, tail_q, cut, lowest)
    estimate += _sampled(samples, sample_log_p, logits, log_sum, mass, tail_q)
    estimate = max(estimate, 0.0)
    bound = max(high + above - estimate, estimate - low - below)
    return estimate, bound + ROUNDING * (1.0 + weight + above)


@kernel(parallel=True)
def _rows(
    stream: Bytes,
    heads: Floats,
    byte_offsets: Longs,
    head_offsets: Longs,
    cut: float,
    tail_mass: Floats,
    tail_entropy: Floats,
    samples: Ints,
    sample_log_p: Floats,
    logits: Floats,
    log_sums: Doubles,
    estimates: Doubles,
    bounds: Doubles,
) -> None:
    for row in numba.prange(logits.shape[0]):
        estimates[row], bounds[row] = _row(
            stream[byte_offsets[row] : byte_offsets[row + 1]],
            heads[head_offsets[row] : head_offsets[row + 1]],
            cut,
            np.float64(tail_mass[row]),
            np.float64(tail_entropy[row]),
            samples[row],
            sample_log_p[row],
            logits[row],
            log_sums[row],
        )


def divergence_bounds(
    packed: PackedRows, logits: Floats, top: Ints
) -> tuple[Doubles, Doubles, Doubles]:
    """Return the divergence from packed rows, its error bound, and the normalizations of `logits`.

    Parameters
    ----------
    logits : (n_rows, n_vocab) float32, the candidate's
    top : (n_rows,) int32, its top tokens

    Returns
    -------
    kld : (n_rows,) float64, nats
    bound : (n_rows,) float64; |true divergence − kld| <= bound. Negative for a damaged row.
    log_sums : (n_rows,) float64
    """
    log_sums = log_sum_exp(logits, top)
    estimates, bounds = np.empty((2, len(logits)), np.float64)
    _rows(
        packed.stream,
        packed.heads,
        offsets(packed.n_bytes),
        offsets(packed.n_heads),
        float(packed.cut),
        packed.tail_mass,
        packed.tail_entropy,
        packed.samples,
        packed.sample_log_p,
        logits,
        log_sums,
        estimates,
        bounds,
    )
    return estimates, bounds, log_sums
