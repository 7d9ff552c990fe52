"""Log-likelihood, Kullback–Leibler divergence and 16-bit log-probabilities of rows of logits.

A row is the logits after one token. Two ways to compare rows:

* ``divergence``: against float32 reference logits, as exact as float32 allows: the divergence is
  summed as Σ (q − p − p·ln(q/p)), whose terms are never negative and of second order in the
  difference, so that 1e-9 nats between nearly equal files can still be told from zero.
* ``divergence_stored``: against the 16-bit log-probabilities of llama-perplexity's base file, with
  the formulas and the float32 and float64 steps of that tool, so that the digits agree.
"""

import math
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from cpu_kernels._numba import kernel

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint16]

HEADER_WORDS = 4  # uint16 words before the codes of a stored row
STORED_RANGE = np.float32(16)  # nats below the top that a base file tells apart
_SERIES_BELOW = np.float32(0.3)  # |ln(q/p)| up to which e^d - 1 - d is summed as a series


@dataclass(frozen=True)
class RowStatistics:
    """What one comparison knows of each row; every array is (n_rows,).

    Attributes
    ----------
    nll : float64, −ln q of the next token, nats
    nll_reference : float64, −ln p of the next token, nats
    kld : float64, Σ p ln(p/q), nats
    delta_p : float32, q − p of the next token
    top : int32, the candidate's most likely token; the lowest of equals
    top_reference : int32, the reference's
    """

    nll: Doubles
    nll_reference: Doubles
    kld: Doubles
    delta_p: Floats
    top: Ints
    top_reference: Ints


@kernel()
def _exp(x: np.float32) -> np.float32:
    """Return e^x for x in [−87, 0.3]; below that e^−87. Relative error below 1e-7.

    A degree 7 polynomial on [−ln2/2, ln2/2] and a shift into the exponent: straight line code
    that LLVM vectorizes. NaN stays NaN.
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    n = np.int32(x * np.float32(1.4426950408889634) - np.float32(0.5))
    f = np.float32(n)
    r = x - f * np.float32(0.693359375)  # ln 2 in two parts; the first has 9 bits, f * it is exact
    r = r + f * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@kernel()
def _exp_as_libm(x: np.float32) -> np.float32:
    """Return e^x rounded like the C library's expf, for x in [−87, 0.3]; below that e^−87.

    Computed in float64 to 1e-11. With ``_exp`` a sum of exponentials is off by up to 1e-7, which
    moves one row in forty to the next float32 and shows in llama-perplexity's last digit.
    """
    wide = np.float64(np.float32(-87.0) if x < np.float32(-87.0) else x)
    n = np.int64(wide * 1.4426950408889634 - 0.5)
    r = wide - np.float64(n) * 0.6931471805599453
    p = 1 / 362880
    p = p * r + 1 / 40320
    p = p * r + 1 / 5040
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return np.float32(p * np.int64((n + np.int64(1023)) << np.int64(52)).view(np.float64))


@kernel(reorder=True)
def _sum_exp(row: Floats, top: np.float32) -> float:
    total = 0.0
    for i in range(row.shape[0]):
        total += np.float64(_exp(row[i] - top))
    return total


@kernel()
def _term(p: np.float32, q: np.float32, d: np.float32) -> np.float32:
    """Return q − p − p·d for d = ln(q/p), without cancellation where d is small."""
    series = np.float32(1 / 5040)
    series = series * d + np.float32(1 / 720)
    series = series * d + np.float32(1 / 120)
    series = series * d + np.float32(1 / 24)
    series = series * d + np.float32(1 / 6)
    series = series * d + np.float32(0.5)
    near = p * d * d * series
    far = q - p - p * d
    return near if abs(d) < _SERIES_BELOW else far


@kernel(reorder=True)
def _divergence_row(
    reference: Floats, candidate: Floats, top_p: np.float32, top_q: np.float32
) -> tuple[float, float, float]:
    """Return both sums of exponentials and the divergence of one row."""
    n = reference.shape[0]
    p = np.empty(n, np.float32)
    q = np.empty(n, np.float32)
    sum_p = 0.0
    sum_q = 0.0
    for i in range(n):
        p[i] = _exp(reference[i] - top_p)
        q[i] = _exp(candidate[i] - top_q)
        sum_p += np.float64(p[i])
        sum_q += np.float64(q[i])
    shift = np.float32(
        (np.float64(top_p) + math.log(sum_p)) - (np.float64(top_q) + math.log(sum_q))
    )
    scale_p = np.float32(1.0 / sum_p)
    scale_q = np.float32(1.0 / sum_q)
    total = 0.0
    for i in range(n):
        difference = (candidate[i] - reference[i]) + shift
        total += np.float64(_term(p[i] * scale_p, q[i] * scale_q, difference))
    return sum_p, sum_q, total


@kernel(parallel=True)
def _divergence(
    reference: Floats,
    candidate: Floats,
    next_tokens: Ints,
    top_reference: Ints,
    top: Ints,
    nll_reference: Doubles,
    nll: Doubles,
    kld: Doubles,
) -> None:
    for row in numba.prange(reference.shape[0]):
        p = reference[row]
        q = candidate[row]
        top_p = p[top_reference[row]]
        top_q = q[top[row]]
        sum_p, sum_q, total = _divergence_row(p, q, top_p, top_q)
        token = next_tokens[row]
        nll_reference[row] = math.log(sum_p) + (np.float64(top_p) - np.float64(p[token]))
        nll[row] = math.log(sum_q) + (np.float64(top_q) - np.float64(q[token]))
        kld[row] = total


def divergence(reference: Floats, candidate: Floats, next_tokens: Ints) -> RowStatistics:
    """Compare rows of logits with those of the reference.

    Parameters
    ----------
    reference, candidate : (n_rows, n_vocab) float32 logits
    next_tokens : (n_rows,) int32, the token that follows in the text

    Notes
    -----
    Σp = Σq = 1, so Σ (q − p − p·ln(q/p)) = Σ p·ln(p/q). The left sum is insensitive, to first
    order, to errors of both normalizations. A row with NaN or infinity gives NaN.
    """
    n_rows = len(reference)
    top_reference = reference.argmax(axis=1).astype(np.int32)
    top = candidate.argmax(axis=1).astype(np.int32)
    nll_reference, nll, kld = np.empty((3, n_rows), np.float64)
    _divergence(reference, candidate, next_tokens, top_reference, top, nll_reference, nll, kld)
    delta_p = (np.exp(-nll) - np.exp(-nll_reference)).astype(np.float32)
    return RowStatistics(nll, nll_reference, kld, delta_p, top, top_reference)


@kernel(parallel=True)
def _log_sum_exp(logits: Floats, top: Ints, out: Doubles) -> None:
    for row in numba.prange(logits.shape[0]):
        highest = logits[row, top[row]]
        out[row] = np.float64(highest) + math.log(_sum_exp(logits[row], highest))


def log_sum_exp(logits: Floats, top: Ints) -> Doubles:
    """Return ln Σ e^logit of each row, (n_rows,) float64, given each row's top token."""
    out = np.empty(len(logits), np.float64)
    _log_sum_exp(logits, top, out)
    return out


# ---- llama-perplexity's 16-bit rows: float32 scale, float32 lowest log-probability, uint16 codes
#      word 0    1      2    3      4 ... 4 + n_vocab
#           scale       lowest      code of each token; ln p = scale * code + lowest
# The row is padded to an even number of codes.


def stored_words(n_vocab: int) -> int:
    """Return the number of uint16 words of one stored row."""
    return 2 * ((n_vocab + 1) // 2) + HEADER_WORDS


@kernel(reorder=True)
def _sum_exp_as_libm(row: Floats, top: np.float32) -> float:
    total = 0.0
    for i in range(row.shape[0]):
        total += np.float64(_exp_as_libm(row[i] - top))
    return total


@kernel()
def _code(x: np.float32, lowest: np.float32, per_step: np.float32) -> np.uint16:
    # + 1.5 * 2^23 rounds to the nearest integer, ties to even, as llama-perplexity does
    rounded = per_step * (x - lowest) + np.float32(12582912.0)
    code = np.uint16(np.int32(rounded - np.float32(12582912.0)))
    return code if x > lowest else np.uint16(0)


@kernel(parallel=True)
def _store(
    logits: Floats,
    next_tokens: Ints,
    top: Ints,
    lowest: Floats,
    header: Floats,
    rows: Words,
    nll: Doubles,
) -> None:
    n_vocab = logits.shape[1]
    for row in numba.prange(logits.shape[0]):
        x = logits[row]
        codes = rows[row]
        highest = x[top[row]]
        log_sum = np.float32(math.log(_sum_exp_as_libm(x, highest)))
        scale = (highest - lowest[row]) / np.float32(65535)
        header[row, 0] = scale
        header[row, 1] = lowest[row] - highest - log_sum
        per_step = np.float32(1) / scale if scale > 0 else np.float32(0)
        for i in range(n_vocab):
            codes[HEADER_WORDS + i] = _code(x[i], lowest[row], per_step)
        nll[row] = highest + log_sum - x[next_tokens[row]]


def store(logits: Floats, next_tokens: Ints) -> tuple[Words, Doubles, Ints]:
    """Pack rows of logits as llama-perplexity stores them.

    Returns
    -------
    rows : (n_rows, stored_words(n_vocab)) uint16
    nll : (n_rows,) float64, −ln p of the next token before packing, nats
    top : (n_rows,) int32

    References
    ----------
    llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp, log_softmax with a log_prob argument.
    """
    n_rows, n_vocab = logits.shape
    top = logits.argmax(axis=1).astype(np.int32)
    highest = logits[np.arange(n_rows), top]
    lowest = np.maximum(logits.min(axis=1), highest - STORED_RANGE)
    header = np.empty((n_rows, 2), np.float32)
    rows = np.zeros((n_rows, stored_words(n_vocab)), np.uint16)
    nll = np.empty(n_rows, np.float64)
    _store(logits, next_tokens, top, lowest, header, rows, nll)
    rows[:, :HEADER_WORDS] = header.view(np.uint16)
    return rows, nll, top


@kernel()
def _stored_term(
    code: np.uint16, scale: np.float32, lowest: np.float32, x: np.float32, log_sum: np.float32
) -> np.float32:
    # here and not in the reordered sum: a fused multiply-add would round ln p once less
    log_p = scale * np.float32(code) + lowest
    term = _exp_as_libm(log_p) * (log_p - x + log_sum)
    return term if log_p > np.float32(-16) else np.float32(0)


@kernel(reorder=True)
def _stored_row(
    stored: Words, scale: np.float32, lowest: np.float32, logits: Floats, log_sum: np.float32
) -> float:
    total = 0.0
    for i in range(logits.shape[0]):
        code = stored[HEADER_WORDS + i]
        total += np.float64(_stored_term(code, scale, lowest, logits[i], log_sum))
    return total


@kernel(parallel=True)
def _divergence_stored(
    header: Floats,
    rows: Words,
    logits: Floats,
    next_tokens: Ints,
    top: Ints,
    nll_reference: Floats,
    nll: Floats,
    kld: Doubles,
) -> None:
    for row in numba.prange(logits.shape[0]):
        x = logits[row]
        scale, lowest = header[row, 0], header[row, 1]
        log_sum = np.float32(math.log(_sum_exp_as_libm(x, x[top[row]])))
        log_sum = x[top[row]] + log_sum
        token = next_tokens[row]
        nll[row] = log_sum - x[token]
        nll_reference[row] = -(scale * np.float32(rows[row, HEADER_WORDS + token]) + lowest)
        kld[row] = _stored_row(rows[row], scale, lowest, x, log_sum)


def divergence_stored(rows: Words, logits: Floats, next_tokens: Ints) -> RowStatistics:
    """Compare rows of logits with rows of a base file, as llama-perplexity does.

    Parameters
    ----------
    rows : (n_rows, stored_words(n_vocab)) uint16
    logits : (n_rows, n_vocab) float32
    next_tokens : (n_rows,) int32

    References
    ----------
    llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp, log_softmax with a base_log_prob
    argument. Reference probabilities below e^−16 are left out, as there.
    """
    n_rows, n_vocab = logits.shape
    header = np.ascontiguousarray(rows[:, :HEADER_WORDS]).view(np.float32)
    top_reference = rows[:, HEADER_WORDS : HEADER_WORDS + n_vocab].argmax(axis=1).astype(np.int32)
    top = logits.argmax(axis=1).astype(np.int32)
    nll_reference, nll = np.empty((2, n_rows), np.float32)
    kld = np.empty(n_rows, np.float64)
    _divergence_stored(header, rows, logits, next_tokens, top, nll_reference, nll, kld)
    delta_p = np.exp(-nll) - np.exp(-nll_reference)
    return RowStatistics(
        nll.astype(np.float64),
        nll_reference.astype(np.float64),
        kld,
        delta_p,
        top,
        top_reference,
    )
