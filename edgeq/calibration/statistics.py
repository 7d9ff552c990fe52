"""What calibration finds out about the inputs of a model's weights, and its file."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.imatrix import Imatrix
from converters.output import replacing
from edgeq.errors import CalibrationError

FloatArray = npt.NDArray[np.float32]

_FORMAT = "edgeq statistics 1"


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was seen of the inputs of a model's weights.

    Attributes
    ----------
    imatrix : sums of squares and counts per weight
    means : weight name to (n_mat, n_in) float32, mean inputs; zeros for an expert that saw nothing
    hessians : name of the first weight of a group to (n_mat, n_in, n_in) float32,
        2/N Σ x xᵀ over the N inputs x of that matrix; read from disk on access if loaded
    first_with : weight name to the first weight that always sees the same input (itself included)
    skipped : weight name to the reason why its input was never seen
    n_tokens : tokens that were run
    """

    imatrix: Imatrix
    means: dict[str, FloatArray]
    hessians: Mapping[str, FloatArray]
    first_with: dict[str, str]
    skipped: dict[str, str]
    n_tokens: int

    def hessian(self, name: str) -> FloatArray:
        """Return the second moments of the inputs of weight `name`, (n_mat, n_in, n_in) float32.

        Raises
        ------
        CalibrationError
            They were not collected.
        """
        first = self.first_with.get(name, name)
        if first not in self.hessians:
            raise CalibrationError(
                f"{name}: no second moments among the statistics; {len(self.hessians)} groups have "
                "them. Calibrate again with second moments for this tensor."
            )
        return self.hessians[first]

    def groups(self) -> list[tuple[str, ...]]:
        """Return the weights that share their input, group by group, in the order of the graph."""
        members: dict[str, list[str]] = {}
        for name, first in self.first_with.items():
            members.setdefault(first, []).append(name)
        return [tuple(names) for names in members.values()]

    def unseen(self) -> list[str]:
        """Return what saw no input, by name: "blk.3.ffn_down_exps.weight expert 5"."""
        return self.imatrix.unseen()

    def save(self, path: Path | str) -> None:
        """Write everything to one safetensors file; it appears when it is complete.

        Raises
        ------
        CalibrationError
            The path cannot be written.
        """
        from safetensors.numpy import save_file

        path = Path(path)
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name in self.imatrix.sums:
            arrays[f"sums/{name}"] = self.imatrix.sums[name]
            arrays[f"counts/{name}"] = self.imatrix.counts[name]
            arrays[f"means/{name}"] = self.means[name]
        arrays |= {f"hessians/{name}": self.hessians[name] for name in self.hessians}
        about = {
            "format": _FORMAT,
            "datasets": self.imatrix.datasets,
            "chunk_count": self.imatrix.chunk_count,
            "chunk_size": self.imatrix.chunk_size,
            "first_with": self.first_with,
            "skipped": self.skipped,
            "n_tokens": self.n_tokens,
        }
        with replacing(path, CalibrationError) as temporary:
            save_file(arrays, temporary, metadata={"about": json.dumps(about)})

    @classmethod
    def load(cls, path: Path | str) -> "Statistics":
        """Read what ``save`` wrote; second moments stay on disk until they are used.

        Raises
        ------
        CalibrationError
            The file is missing, damaged, or of another kind.
        """
        from safetensors import SafetensorError, safe_open

        try:
            file: Any = safe_open(path, framework="numpy")
            about = json.loads((file.metadata() or {})["about"])
            if about["format"] != _FORMAT:
                raise KeyError("format")
            arrays: dict[str, dict[str, Any]] = {"sums": {}, "counts": {}, "means": {}}
            hessians = []
            for key in file.keys():
                kind, _, name = key.partition("/")
                if kind == "hessians":
                    hessians.append(name)
                else:
                    arrays[kind][name] = file.get_tensor(key)
            return cls(
                imatrix=Imatrix(
                    arrays["sums"],
                    arrays["counts"],
                    tuple(about["datasets"]),
                    about["chunk_count"],
                    about["chunk_size"],
                ),
                means=arrays["means"],
                hessians=_StoredHessians(file, hessians),
                first_with=about["first_with"],
                skipped=about["skipped"],
                n_tokens=about["n_tokens"],
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{path}: no statistics of this version of edgeq ({error}). "
                "Delete it; it is computed again."
            ) from error


class _StoredHessians(Mapping[str, FloatArray]):
    """Second moments in an open safetensors file, read on access."""

    def __init__(self, file: Any, names: list[str]) -> None:
        self._file = file
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> FloatArray:
        if name not in self._names:
            raise KeyError(name)
        values: FloatArray = self._file.get_tensor(f"hessians/{name}")
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
