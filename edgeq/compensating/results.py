"""What ``edgeq compensate`` returns: the adapter, its ranks, and the file with and without it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.results import Measured


@dataclass(frozen=True)
class Spending:
    """What the adapter does for one weight.

    Attributes
    ----------
    size_bytes : of its factors, float16
    before, after : ½ tr(E H Eᵀ) over ½ tr(W H Wᵀ), without and with the correction, predicted on
        calibration text
    as_types : the same if these bytes were spent on a larger type: a quarter of the loss a bit
    """

    rank: int
    size_bytes: int
    before: float
    after: float
    as_types: float


@dataclass(frozen=True)
class Compensated:
    """An adapter that was written, and what it is worth.

    Attributes
    ----------
    path, size_bytes : of the adapter
    tensors : weight name to what it got
    n_weights : quantized weights that could get something
    predicted, as_types : the sum of the weights' relative losses over that without the adapter,
        and what the same bytes would leave as larger types of the same weights
    measured : the file with the adapter, then alone
    """

    path: Path
    size_bytes: int
    tensors: Mapping[str, Spending]
    n_weights: int
    predicted: float
    as_types: float
    measured: Measured

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            **self.measured.as_json(),
            "adapter": {
                "path": str(self.path),
                "size_bytes": self.size_bytes,
                "predicted": self.predicted,
                "as_types": self.as_types,
                "tensors": {name: vars(one) for name, one in self.tensors.items()},
            },
        }

    def as_text(self) -> str:
        """Return what a terminal shows."""
        ranks = [one.rank for one in self.tensors.values()]
        about = (
            f"{self.path}: {self.size_bytes:,} bytes, ranks {min(ranks)} to {max(ranks)} (median "
            f"{statistics.median(ranks):g}) in {len(ranks)} of {self.n_weights} weights"
        )
        return f"{about}\n\n{self.measured.as_text()}"


def verdict(predicted: float, as_types: float, total: int) -> str:
    """Return what to expect, and of what else."""
    return (
        f"Predicted loss of the outputs: ×{predicted:.3f} with the adapter, ×{as_types:.3f} with "
        "its bytes in larger types of the same weights, if a bit takes three quarters. Only "
        f"measuring tells: edgeq export --size {total} makes a file of the same bytes."
    )


def left_out_note(names: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence on weights that get nothing, if there are any."""
    if not names:
        return ()
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"Left out: {shown}. llama.cpp applies no adapter to them, calibration did not reach them, "
        "or they have no error.",
    )


def summed(spent: Mapping[str, Spending], before: float) -> tuple[float, float]:
    """Return the losses with the adapter, and with its bytes as types, over that without."""
    rest = before - sum(one.before for one in spent.values())
    with_it = rest + sum(one.after for one in spent.values())
    as_types = rest + sum(one.as_types for one in spent.values())
    return with_it / before, as_types / before
