"""Importance matrices: what they hold, merging, and the check that one belongs to a model.

References
----------
llama.cpp 0c1e57098: tools/imatrix/imatrix.cpp, IMatrixCollector (what is summed, and how matrices
are merged); tools/quantize/quantize.cpp, load_imatrix (what the quantizer makes of it).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.errors import ConversionError

FloatArray = npt.NDArray[np.float32]
CountArray = npt.NDArray[np.int64]

_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, eq=False)
class Imatrix:
    """An importance matrix.

    Attributes
    ----------
    sums : tensor name to (n_counts, n) float32, sums of squares of the inputs. n_counts is 1 or the
        number of experts. A 3-D weight that is no expert tensor (and every tensor of a .dat file)
        has one count and all its matrices' columns in that one row.
    counts : tensor name to (n_counts,) int64, inputs that were summed
    datasets : the texts it was computed on, as told
    chunk_count : chunks of text
    chunk_size : tokens of a chunk
    sketch : hashes of some passages of the text it was computed on; None: nobody told
    """

    sums: dict[str, FloatArray]
    counts: dict[str, CountArray]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    sketch: tuple[int, ...] | None = None

    @property
    def expert_counts(self) -> dict[str, list[int]]:
        """The inputs that each expert saw, by weight; weights without experts are not in it."""
        return {name: counts.tolist() for name, counts in self.counts.items() if len(counts) > 1}

    def weights(self, name: str, n_in: int | None = None) -> FloatArray:
        """Return the mean squares of `name`, the numbers that llama-quantize uses.

        Parameters
        ----------
        name : a tensor that has an entry
        n_in : columns of the tensor; needed where one row holds several matrices

        Returns
        -------
        (n_mat, n_in) float32. An expert that saw nothing weighs all its columns 1.

        References
        ----------
        llama.cpp 0c1e57098: tools/quantize/quantize.cpp, load_imatrix.
        """
        sums, counts = self.sums[name], self.counts[name].astype(np.float32)[:, None]
        ones = np.ones_like(sums)
        means = np.divide(sums, counts, out=ones, where=counts > 0)
        return means if n_in is None else means.reshape(-1, n_in)

    def unseen(self) -> list[str]:
        """Return what saw no input: "NAME expert 5", or the tensor's name if that is all of it."""
        found = []
        for name, counts in sorted(self.counts.items()):
            empty = np.flatnonzero(counts == 0).tolist()
            if len(counts) == 1:
                found += [name] * len(empty)
            else:
                found += [f"{name} expert {expert}" for expert in empty]
        return found


def merge_imatrices(imatrices: Sequence[Imatrix]) -> Imatrix:
    """Add up importance matrices of one model, as ``llama-imatrix --in-file`` does.

    Raises
    ------
    ConversionError
        None is given, or two disagree in the size of a tensor.
    """
    if not imatrices:
        raise ConversionError("no importance matrix to merge. Give at least one.")
    sums: dict[str, npt.NDArray[np.float64]] = {}
    counts: dict[str, CountArray] = {}
    for imatrix in imatrices:
        for name, more in imatrix.sums.items():
            if name not in sums:
                sums[name], counts[name] = more.astype(np.float64), imatrix.counts[name].copy()
                continue
            if more.size != sums[name].size:
                raise ConversionError(
                    f"{name}: {more.size} values in one importance matrix, {sums[name].size} in "
                    "another. Merge importance matrices of the same model only."
                )
            sums[name], counts[name] = _add(
                sums[name], counts[name], more, imatrix.counts[name], name
            )
    chunk_size = imatrices[0].chunk_size
    most = max((int(n.max()) for n in counts.values()), default=0)
    return Imatrix(
        sums={name: values.astype(np.float32) for name, values in sums.items()},
        counts=counts,
        datasets=tuple(dataset for imatrix in imatrices for dataset in imatrix.datasets),
        chunk_count=most // max(chunk_size, 1),
        chunk_size=chunk_size,
    )


def check_matches(imatrix: Imatrix, tensors: Mapping[str, tuple[int, int]], where: str) -> None:
    """Refuse an importance matrix of another model.

    Parameters
    ----------
    imatrix : what was read
    tensors : weight name to (n_in, n_mat), every 2-D and 3-D weight of the model
    where : the importance matrix's path, for messages

    Raises
    ------
    ConversionError
        An entry has another size than the model's tensor, or names a weight that the model lacks;
        or layers of the model have no entry though other layers have one for the same weight.
    """
    advice = "It belongs to another model: calibrate this one, or leave the importance matrix out."
    for name, sums in imatrix.sums.items():
        if name in tensors:
            n_in, n_mat = tensors[name]
            if sums.size != n_in * n_mat:
                raise ConversionError(
                    f"{where}: {name} has {sums.size} values, expected {n_in * n_mat} "
                    f"({n_in} columns × {n_mat} matrices). {advice}"
                )
        elif name.endswith(".weight"):
            raise ConversionError(f"{where}: {name} is no tensor of the model. {advice}")
    entries = _layers_by_kind(imatrix.sums)
    for kind, names in _layers_by_kind(tensors).items():
        missing = sorted(names - entries[kind]) if kind in entries else []
        if missing:
            raise ConversionError(
                f"{where}: no entry for {missing[0]}"
                + (f" and {len(missing) - 1} more of its kind" if len(missing) > 1 else "")
                + f", but for {len(entries[kind])} other layers. {advice}"
            )


def _layers_by_kind(names: Iterable[str]) -> dict[str, set[str]]:
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        kinds[_LAYER.sub(".*.", name)].add(name)
    return dict(kinds)


def _add(
    sums: npt.NDArray[np.float64],
    counts: CountArray,
    more: FloatArray,
    more_counts: CountArray,
    name: str,
) -> tuple[npt.NDArray[np.float64], CountArray]:
    """Add one entry to another; a single count of a .dat file stands for every expert."""
    n_counts = max(len(counts), len(more_counts))
    if any(len(each) not in (1, n_counts) for each in (counts, more_counts)):
        raise ConversionError(
            f"{name}: {len(counts)} experts in one importance matrix, {len(more_counts)} in "
            "another. Merge importance matrices of the same model only."
        )
    shape = (n_counts, -1)
    return (
        sums.reshape(shape) + more.reshape(shape).astype(np.float64),
        np.broadcast_to(counts, n_counts) + np.broadcast_to(more_counts, n_counts),
    )
