"""The best low-rank correction of a weight's error for given inputs, and how many ranks to buy.

An error E of a weight costs its outputs ½ tr(E H Eᵀ), H the second moments of its inputs. Of all X
of rank r the one that leaves least is the projection of E on the r leading eigenvectors U of
E H Eᵀ: X = U Uᵀ E (Eckart and Young in the norm of H; no inverse of H is needed). Each eigenvector
takes half its eigenvalue from the loss.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_LEAST = 1e-12  # of the largest gain: below it is the arithmetic's noise


@dataclass(frozen=True, eq=False)
class Correction:
    """The leading ranks of one weight's correction, the most useful first.

    Attributes
    ----------
    gains : (n_ranks,) float64, the loss that each takes away, descending
    loss : ½ tr(E H Eᵀ) without any
    energy : ½ tr(W H Wᵀ), of the weight itself
    b : (n_out, n_ranks) float32
    a : (n_ranks, n_in) float32; b[:, :r] @ a[:r] is the best correction of rank r
    """

    gains: Doubles
    loss: float
    energy: float
    b: FloatArray
    a: FloatArray


def correct(weight: FloatArray, error: FloatArray, hessian: FloatArray, most: int) -> Correction:
    """Return at most `most` ranks of the correction of an error.

    Parameters
    ----------
    weight, error : (n_out, n_in) float32; `error` is what the file lacks, W − Ŵ
    hessian : (n_in, n_in) float32, positive definite
    """
    import scipy.linalg

    e, h = error.astype(np.float64), hessian.astype(np.float64)
    n_out, n_in = e.shape
    weighted = e @ h
    loss = 0.5 * float(np.einsum("ij,ij->", weighted, e))
    energy = 0.5 * float(np.einsum("ij,ij->", weight @ hessian, weight, dtype=np.float64))
    least = min(n_out, n_in)
    top = (least - min(most, least), least - 1)
    if n_out <= n_in:
        values, u = scipy.linalg.eigh(weighted @ e.T, subset_by_index=top)
    else:  # the same eigenvalues in the smaller space, H = L Lᵀ: u = E L v / |E L v|
        root = scipy.linalg.cholesky(h, lower=True)
        values, v = scipy.linalg.eigh(root.T @ (e.T @ e) @ root, subset_by_index=top)
        u = e @ (root @ v)
    values, u = values[::-1], u[:, ::-1]
    kept = values > _LEAST * max(values[0], np.finfo(np.float64).tiny)
    values, u = values[kept], u[:, kept]
    u = u / np.linalg.norm(u, axis=0)
    a = u.T @ e
    balance = np.sqrt(np.linalg.norm(a, axis=1))  # equal norms: float16 holds both alike
    return Correction(
        0.5 * values,
        loss,
        energy,
        (u * balance).astype(np.float32),
        (a / balance[:, None]).astype(np.float32),
    )


def choose_ranks(
    gains: Mapping[str, Doubles],
    first_bytes: Mapping[str, int],
    rank_bytes: Mapping[str, int],
    size_bytes: int,
) -> dict[str, int]:
    """Buy ranks by what they gain a byte, as long as they fit; what gets none is left out.

    Parameters
    ----------
    gains : tensor name to (n_ranks,) what each further rank gains, descending
    first_bytes : tensor name to what its first rank takes beside `rank_bytes`
    rank_bytes : tensor name to what a rank takes
    size_bytes : all together at most
    """
    ranks: dict[str, int] = {}
    left = size_bytes
    waiting: list[tuple[float, str]] = []

    def price(name: str) -> int:
        return rank_bytes[name] + (0 if name in ranks else first_bytes[name])

    def offer(name: str) -> None:
        have = ranks.get(name, 0)
        if have < len(gains[name]):
            heapq.heappush(waiting, (-float(gains[name][have]) / price(name), name))

    for name in gains:
        offer(name)
    while waiting:
        _, name = heapq.heappop(waiting)
        if price(name) > left:
            continue
        left -= price(name)
        ranks[name] = ranks.get(name, 0) + 1
        offer(name)
    return ranks
