"""Rows of log-probabilities in a few percent of their size.

A row keeps its likely tokens and sums up the rest, its *tail*:

* tokens with ln p >= HEAD, and the top one in any case: ln p as float32,
* tokens with cut <= ln p < HEAD: ln p to within half a step, one byte,
* the tail, below the cut: its mass m = Σ p, s = Σ p·ln p, and N_SAMPLES of its tokens, drawn in
  proportion to p (systematic sampling), with their ln p.

The cut is common to all rows of a block, the lowest that its bytes allow: for one number of kept
tokens that leaves the least mass in the tails, and puts bytes where distributions are flat.

Bytes of a row, in order of token number: the gap to the token before (1, 2 or 4 bytes), then the
level; level 255 means that the row's next float32 has ln p::

    gap   0 .. 223      1 byte
          224 .. 8159   224 + high byte of (gap - 224), low byte
          others        255, 3 bytes little-endian
"""

import math
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from cpu_kernels._numba import kernel
from cpu_kernels.divergence import log_sum_exp

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

MAX_VOCAB = 1 << 24
HEAD = -5.5  # ln p from which ln p is kept as float32
BINS_PER_NAT = 8
N_BINS = 24 * BINS_PER_NAT  # cuts from ln p = 0 down to -24
HEAD_LEVEL = 255
N_SAMPLES = 16  # tokens drawn from each tail
_GOLDEN = 0.6180339887498949  # its multiples mod 1 spread the starts of the rows' samplings


@dataclass(frozen=True)
class PackedRows:
    """Rows of one block.

    Attributes
    ----------
    cut : ln p below which tokens are in the tail, float32
    stream : bytes of all rows, uint8
    heads : float32 ln p of all rows
    n_bytes, n_heads : (n_rows,) int32, each row's part of the two
    tail_mass, tail_entropy : (n_rows,) float32, m and s
    samples : (n_rows, N_SAMPLES) int32 tokens of the tail; -1 where there is no tail
    sample_log_p : (n_rows, N_SAMPLES) float32, their ln p
    nll : (n_rows,) float32, −ln p of the next token
    top : (n_rows,) int32
    """

    cut: np.float32
    stream: Bytes
    heads: Floats
    n_bytes: Ints
    n_heads: Ints
    tail_mass: Floats
    tail_entropy: Floats
    samples: Ints
    sample_log_p: Floats
    nll: Floats
    top: Ints


@kernel()
def _clamped(x: float, highest: int) -> int:
    """Return the integer part of `x`, within 0 to `highest`."""
    return 0 if x < 0.0 else (int(x) if x < highest else highest)


@kernel(parallel=True)
def _histogram(logits: Floats, log_sums: Doubles, counts: Longs) -> None:
    for row in numba.prange(logits.shape[0]):
        for i in range(logits.shape[1]):
            depth = log_sums[row] - np.float64(logits[row, i])
            counts[row, _clamped(depth * BINS_PER_NAT, N_BINS)] += 1


@kernel()
def _gap_bytes(gap: int) -> int:
    return 1 if gap < 224 else (2 if gap < 8160 else 4)


@kernel(parallel=True)
def _measure(
    logits: Floats, log_sums: Doubles, top: Ints, cut: float, n_bytes: Ints, n_heads: Ints
) -> None:
    for row in numba.prange(logits.shape[0]):
        last = -1
        size = 0
        heads = 0
        for i in range(logits.shape[1]):
            log_p = np.float64(logits[row, i]) - log_sums[row]
            if log_p >= cut or i == top[row]:
                size += _gap_bytes(i - last - 1) + 1
                last = i
                if log_p >= HEAD or i == top[row]:
                    heads += 1
        n_bytes[row] = size
        n_heads[row] = heads


@kernel()
def _put_gap(stream: Bytes, at: int, gap: int) -> int:
    if gap < 224:
        stream[at] = np.uint8(gap)
        return at + 1
    if gap < 8160:
        rest = gap - 224
        stream[at] = np.uint8(224 + (rest >> 8))
        stream[at + 1] = np.uint8(rest & 255)
        return at + 2
    stream[at] = np.uint8(255)
    stream[at + 1] = np.uint8(gap & 255)
    stream[at + 2] = np.uint8((gap >> 8) & 255)
    stream[at + 3] = np.uint8((gap >> 16) & 255)
    return at + 4


@kernel()
def _draw(weights: Doubles, total: float, start: float, drawn: Ints) -> None:
    """Write the tokens at equally spaced places of the running sum of `weights`, or -1."""
    drawn[:] = -1
    j = 0
    running = 0.0
    for i in range(weights.shape[0]):
        running += weights[i]
        while j < drawn.shape[0] and running > (j + start) * total / drawn.shape[0]:
            drawn[j] = i
            j += 1


@kernel(parallel=True)
def _pack(
    logits: Floats,
    log_sums: Doubles,
    top: Ints,
    cut: float,
    byte_offsets: Longs,
    head_offsets: Longs,
    stream: Bytes,
    heads: Floats,
    tail_mass: Floats,
    tail_entropy: Floats,
    samples: Ints,
    sample_log_p: Floats,
) -> None:
    per_nat = HEAD_LEVEL / (HEAD - cut) if cut < HEAD else 0.0
    for row in numba.prange(logits.shape[0]):
        at = byte_offsets[row]
        head = head_offsets[row]
        last = -1
        mass = 0.0
        entropy = 0.0
        tail = np.zeros(logits.shape[1], np.float64)
        for i in range(logits.shape[1]):
            log_p = np.float64(logits[row, i]) - log_sums[row]
            if log_p >= cut or i == top[row]:
                at = _put_gap(stream, at, i - last - 1)
                last = i
                if log_p >= HEAD or i == top[row]:
                    stream[at] = np.uint8(HEAD_LEVEL)
                    heads[head] = np.float32(log_p)
                    head += 1
                else:
                    level = _clamped((log_p - cut) * per_nat, HEAD_LEVEL - 1)
                    stream[at] = np.uint8(level)
                at += 1
            else:
                p = math.exp(log_p)
                tail[i] = p
                mass += p
                entropy += p * log_p
        tail_mass[row] = np.float32(mass)
        tail_entropy[row] = np.float32(entropy)
        _draw(tail, mass, (row * _GOLDEN) % 1.0, samples[row])
        for j in range(N_SAMPLES):
            if samples[row, j] >= 0:
                sample_log_p[row, j] = np.float64(logits[row, samples[row, j]]) - log_sums[row]


def pack(logits: Floats, next_tokens: Ints, max_bytes: int) -> PackedRows | None:
    """Pack rows of logits into at most `max_bytes` of stream and heads.

    Parameters
    ----------
    logits : (n_rows, n_vocab) float32, finite; n_vocab below ``MAX_VOCAB``
    next_tokens : (n_rows,) int32

    Returns
    -------
    None where even the top tokens alone are larger than that.
    """
    n_rows = len(logits)
    top = logits.argmax(axis=1).astype(np.int32)
    log_sums = log_sum_exp(logits, top)
    counts = np.zeros((n_rows, N_BINS + 1), np.int64)
    _histogram(logits, log_sums, counts)
    kept = counts.sum(axis=0).cumsum()  # tokens with ln p above -(bin + 1) / BINS_PER_NAT
    n_bytes, n_heads = np.empty((2, n_rows), np.int32)
    depth = int(np.searchsorted(2 * kept[:N_BINS], max_bytes, side="right"))
    while True:
        cut = -depth / BINS_PER_NAT
        _measure(logits, log_sums, top, cut, n_bytes, n_heads)
        if int(n_bytes.sum()) + 4 * int(n_heads.sum()) <= max_bytes:
            break
        if depth == 0:
            return None
        depth -= 1
    stream = np.empty(int(n_bytes.sum()), np.uint8)
    heads = np.empty(int(n_heads.sum()), np.float32)
    tail_mass, tail_entropy = np.empty((2, n_rows), np.float32)
    samples = np.empty((n_rows, N_SAMPLES), np.int32)
    sample_log_p = np.zeros((n_rows, N_SAMPLES), np.float32)
    _pack(
        logits,
        log_sums,
        top,
        cut,
        offsets(n_bytes),
        offsets(n_heads),
        stream,
        heads,
        tail_mass,
        tail_entropy,
        samples,
        sample_log_p,
    )
    nll = log_sums - logits[np.arange(n_rows), next_tokens]
    return PackedRows(
        np.float32(cut),
        stream,
        heads,
        n_bytes,
        n_heads,
        tail_mass,
        tail_entropy,
        samples,
        sample_log_p,
        nll.astype(np.float32),
        top,
    )


def offsets(lengths: Ints) -> Longs:
    """Return where each of consecutive pieces starts, and the end, (n + 1,) int64."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
