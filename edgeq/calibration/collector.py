"""Sums over the inputs of every weight product that an ``Observer`` shows."""

import contextlib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.imatrix import Imatrix
from edgeq.calibration.scratch import zeros_in_file
from edgeq.calibration.statistics import FloatArray, Statistics
from edgeq.errors import CalibrationError
from edgeq.runtime.observer import MIN_ROWS, ProductInput

_MEMORY_FRACTION = 0.8  # of what is free when calibration starts; the runtime needs the rest


@dataclass(eq=False)
class _Sums:
    """Running sums of one weight's inputs."""

    squares: npt.NDArray[np.float64]  # (n_mat, n_in)
    values: npt.NDArray[np.float64]  # (n_mat, n_in)
    counts: npt.NDArray[np.int64]  # (n_mat,)
    is_expert: bool

    @classmethod
    def zeros(cls, product: ProductInput) -> "_Sums":
        shape = (product.n_mat, product.n_in)
        counts = np.zeros(product.n_mat, np.int64)
        return cls(np.zeros(shape), np.zeros(shape), counts, product.expert_ids is not None)

    def imatrix_sums(self) -> FloatArray:
        """Return the sums of squares as llama-imatrix lays them out; see ``Imatrix.sums``."""
        rows = self.squares if self.is_expert else self.squares.reshape(1, -1)
        return rows.astype(np.float32)

    def imatrix_counts(self) -> npt.NDArray[np.int64]:
        return self.counts if self.is_expert else self.counts[:1]

    def means(self) -> FloatArray:
        return (self.values / np.maximum(self.counts, 1)[:, None]).astype(np.float32)


class Collector:
    """Sums up what an ``Observer`` shows; ``statistics`` gives the result.

    Parameters
    ----------
    hessians : collect second moments: of all weights, or of the named ones
    hessian_bytes : most bytes that the second moments may take; default: 80 % of the memory that is
        free now
    directory : where the second moments of stacked weights (experts) lie in files, which do not
        count as memory; None: in memory

    Notes
    -----
    Sums of squares are kept in float64 (llama-imatrix adds in float32, token by token). Second
    moments are products of one batch in float32, added up in float32: the relative error of a sum
    of n batches is about √n × 6e-8. Weights that share an input share one matrix.
    """

    def __init__(
        self,
        *,
        hessians: bool | Collection[str] = False,
        hessian_bytes: int | None = None,
        directory: Path | None = None,
    ) -> None:
        self._wanted = hessians
        self._directory = directory
        if hessian_bytes is None:
            hessian_bytes = int(_MEMORY_FRACTION * free_bytes(unknown=1 << 62))
        self._bytes_left = hessian_bytes
        self._sums: dict[str, _Sums] = {}
        self._hessians: dict[str, FloatArray] = {}
        self._seen_with: dict[str, set[str]] = {}
        self._now: dict[str, tuple[npt.NDArray[np.float64], ...]] = {}  # by first weight
        self._has_moments: set[str] = set()  # first weights whose input of this graph is in them
        self.times: dict[str, int] = {}

    def add(self, product: ProductInput) -> None:
        """Add one product's inputs.

        Raises
        ------
        CalibrationError
            An input is not finite, or the second moments do not fit into memory.
        """
        name, first = product.name, product.same_as
        if name == first:
            self._now[first] = _sums_of(product)
            self._has_moments.discard(first)
        if name not in self._sums:
            self._sums[name] = _Sums.zeros(product)
            self.times[name] = 0
            self._seen_with[name] = set()
        sums = self._sums[name]
        squares, values, counts = self._now[first]
        sums.squares += squares
        sums.values += values
        sums.counts += counts.astype(np.int64)
        self.times[name] += 1
        self._seen_with[name].add(first)
        wanted = self._wanted if isinstance(self._wanted, bool) else name in self._wanted
        if wanted and first not in self._has_moments:
            self._has_moments.add(first)
            self._add_moments(first, product)

    def statistics(
        self, *, datasets: Sequence[str], n_chunks: int, chunk: int, skipped: Mapping[str, str]
    ) -> Statistics:
        """Return the result; the collector cannot be used afterwards.

        Raises
        ------
        CalibrationError
            Nothing was seen, or weights share their input only sometimes, so that they have no
            common second moments.
        """
        if not self._sums:
            raise CalibrationError(
                f"no weight product with {MIN_ROWS} or more tokens was seen in {n_chunks} chunks "
                f"of {chunk} tokens. Give chunks of at least {MIN_ROWS} tokens."
            )
        first_with = {name: self._first_of(name) for name in self._sums}
        for first, hessian in self._hessians.items():
            counts = np.maximum(self._sums[first].counts, 1)
            hessian *= (2.0 / counts).astype(np.float32)[:, None, None]
        most = max(int(sums.counts.max()) for sums in self._sums.values())
        return Statistics(
            imatrix=Imatrix(
                sums={name: sums.imatrix_sums() for name, sums in self._sums.items()},
                counts={name: sums.imatrix_counts() for name, sums in self._sums.items()},
                datasets=tuple(datasets),
                chunk_count=most // chunk,  # llama-imatrix: of the most used expert
                chunk_size=chunk,
            ),
            means={name: sums.means() for name, sums in self._sums.items()},
            hessians=self._hessians,
            first_with=first_with,
            skipped={name: why for name, why in skipped.items() if name not in self._sums},
            n_tokens=n_chunks * chunk,
        )

    def _first_of(self, name: str) -> str:
        (first, *more) = self._seen_with[name]
        if not more and self.times[name] == self.times[first]:
            return first
        if first in self._hessians or name in self._hessians:
            raise CalibrationError(
                f"{name}: shares its input with {first} only in some of its products, so they have "
                "no common second moments. Calibrate without second moments for these two."
            )
        return name

    def _add_moments(self, first: str, product: ProductInput) -> None:
        if first not in self._hessians:
            self._hessians[first] = self._zeros(product)
        for matrix, rows in product.by_matrix():
            self._hessians[first][matrix] += rows.T @ rows  # numpy calls syrk: half of a product

    def _zeros(self, product: ProductInput) -> FloatArray:
        shape = (product.n_mat, product.n_in, product.n_in)
        if self._directory is not None and product.n_mat > 1:
            return zeros_in_file(shape, self._directory)
        size = 4 * math.prod(shape)
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise CalibrationError(
                f"{product.name}: its second moments {shape} take {size / 2**20:.0f} MiB; "
                f"{-self._bytes_left / 2**20:.0f} MiB more than may be used. Collect them for "
                "fewer tensors at a time, or free memory."
            )
        return np.zeros(shape, np.float32)


def _sums_of(product: ProductInput) -> tuple[npt.NDArray[np.float64], ...]:
    """Return sums of squares and sums, (n_mat, n_in), and counts, (n_mat,), of one input."""
    shape = (product.n_mat, product.n_in)
    squares, values, counts = np.zeros(shape), np.zeros(shape), np.zeros(product.n_mat)
    with np.errstate(all="ignore"):  # checked below, with the tensor's name
        for matrix, rows in product.by_matrix():
            squares[matrix] = np.einsum("ij,ij->j", rows, rows)
            values[matrix] = rows.sum(axis=0)
            counts[matrix] = len(rows)
    if not np.isfinite(squares).all():
        matrix, channel = np.argwhere(~np.isfinite(squares))[0].tolist()
        raise CalibrationError(
            f"{product.name}: input channel {channel} of matrix {matrix} is not finite on this "
            "text. The model overflows: give its F32 or BF16 weights, or another text."
        )
    return squares, values, counts


def check_fits(what: str, needed: int, advice: str) -> None:
    """Refuse what needs more memory than can be had now.

    Parameters
    ----------
    what : plural subject of "need": what, and for how much work
    needed : bytes
    advice : the smaller setting

    Raises
    ------
    CalibrationError
    """
    free = free_bytes(unknown=1 << 62)
    if needed > free:
        raise CalibrationError(
            f"{what} need {needed >> 20} MiB, {free >> 20} MiB are free. {advice}"
        )


def free_bytes(*, unknown: int) -> int:
    """Return the memory that can be had now; `unknown` where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # what caches hold can be had
        told = Path("/proc/meminfo").read_text().split("MemAvailable:")[1]
        return int(told.split()[0]) << 10
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return unknown
