"""A tampering screen: tensors of a file that its float source and its type do not explain.

The unit of error is what ggml's own rounding of the *source* to the same type leaves, group by
group of 32 weights: its root mean square times √12, a step of a uniform grid. The file's own steps
would not do: an outlier put in before quantization widens them, and then explains itself.

A tensor stands out from the others of its type, not from a fixed limit: an importance matrix
leaves errors of up to 7 steps (Q6_K: 22), error feedback moves weights by up to 6 on purpose, but
in every tensor alike. Four figures are compared so, and a fifth where ggml's own bytes are in all
other tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from converters.gguf_file import GgufFile, TensorInfo, open_gguf
from converters.gguf_header import FLOATS
from edgeq.console import Progress
from edgeq.errors import EvaluationError
from edgeq.runtime.encoders import FloatArray, decode, encode, needs_importances

GROUP = 32
FAR = 3.0  # steps
FEW = 4  # tensors of a type, without itself, that a tensor can be compared with
_CHUNK_WEIGHTS = 1 << 22  # of a tensor, looked at in one go
_LEAST_STEP = 1e-3  # of the median step: groups of zeros have none
_FLOAT_STEP = 2.0**-8  # of a weight: what a conversion through BF16 leaves
_HUGE = 1e30  # for JSON, which has no infinity
_ANOTHER_MODEL = 4.0  # typical error over rounding's; error feedback has below 2


@dataclass(frozen=True)
class Limit:
    """When a figure stands out: above `floor` and `factor` times the median of the others."""

    floor: float
    factor: float
    meaning: str


LIMITS = {
    "worst": Limit(5.0, 4.0, "its largest error is {value:.3g} steps, of others {other:.3g}"),
    "far": Limit(
        1e-3, 10.0, "{percent:.3g} % of it are more than 3 steps off, of others {other:.2g} %"
    ),
    "mean": Limit(2.5, 2.0, "its errors are ×{value:.3g} of rounding's, of others ×{other:.3g}"),
    "peak": Limit(
        20.0, 4.0, "the source has an outlier of ×{value:.3g} its surroundings, others {other:.3g}"
    ),
}
_N_SPREADS = 6.0  # robust standard deviations of the others' logarithms


@dataclass(frozen=True)
class TensorScreen:
    """The errors of one tensor.

    Attributes
    ----------
    worst : largest |error|, steps
    far : share of weights that are more than FAR steps off
    mean : root mean square of the error over that of ggml's rounding; of float tensors 0
    peak : largest weight of a group of the source over the larger of the medians of its row's and
        its columns' groups; of float tensors 0
    equal : share of rows that are ggml's rounding of the source, byte for byte
    reasons : why it stands out; empty: it does not
    """

    name: str
    qtype: str
    worst: float
    far: float
    mean: float
    peak: float
    equal: float
    reasons: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What it is compared with: tensors of its type; biases apart, as feedback moves them."""
        return f"{self.qtype} bias" if self.name.endswith(".bias") else self.qtype


@dataclass(frozen=True, eq=False)
class Screen:
    """A file against its float source.

    Attributes
    ----------
    missing : tensors that only one of the files has, with a word on it
    """

    path: Path
    reference: Path
    tensors: tuple[TensorScreen, ...]
    missing: tuple[str, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """A line for each tensor that stands out."""
        return (
            *(f"{t.name} ({t.qtype}): {'; '.join(t.reasons)}" for t in self.tensors if t.reasons),
            *self.missing,
        )

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "path": str(self.path),
            "reference": str(self.reference),
            "stand_out": list(self.lines),
            "tensors": [vars(tensor) for tensor in self.tensors],
        }


def screen(path: Path, reference: Path, progress: Progress | None = None) -> Screen:
    """Compare every tensor of a file with the float source.

    Raises
    ------
    EvaluationError
        The source is of another architecture or shape, or most tensors are not its rounded weights:
        another model, or the same function in other weights (folded, rotated).
    ConversionError
        A file cannot be read, or a tensor's type not decoded.
    """
    file, source = open_gguf(path), open_gguf(reference)
    if file.architecture != source.architecture:
        raise EvaluationError(
            f"{reference}: got a model of architecture {source.architecture}, expected "
            f"{file.architecture} as {path}. Give the float file that it was made from."
        )
    shared = [name for name in file.tensors if name in source.tensors]
    found = []
    for number, name in enumerate(shared, start=1):
        found.append(_screened(file, source, name))
        if progress is not None:
            progress(number, len(shared))
    _check_source(path, reference, found)
    missing = [f"{name}: is not in {reference}" for name in file.tensors if name not in shared]
    missing += [f"{name}: is missing" for name in source.tensors if name not in file.tensors]
    return Screen(path, reference, tuple(judge(found)), tuple(missing))


def _check_source(path: Path, reference: Path, found: Sequence[TensorScreen]) -> None:
    """Refuse a source whose weights most tensors do not have: nothing would stand out."""
    rounded = [each.mean for each in found if each.mean > 0]
    kept = [each.worst for each in found if each.mean == 0 and not each.name.endswith(".bias")]
    errors = float(np.median(rounded)) if rounded else 0.0
    steps = float(np.median(kept)) if kept else 0.0
    if errors > _ANOTHER_MODEL or steps > LIMITS["worst"].floor:
        raise EvaluationError(
            f"{path}: its weights are not those of {reference} rounded; got errors of typically "
            f"×{errors:.3g} of rounding's, and {100 * _FLOAT_STEP * steps:.2g} % where nothing is "
            f"rounded, expected below ×{_ANOTHER_MODEL:g} and 2 %. Give the float file that it was "
            "made from; of an export that folds or tunes, export with --transform none."
        )


def _screened(file: GgufFile, source: GgufFile, name: str) -> TensorScreen:
    tensor, original = file.tensors[name], source.tensors[name]
    if tensor.shape != original.shape:
        raise EvaluationError(
            f"{source.path}: {name}: got the shape {original.shape}, expected {tensor.shape} as in "
            f"{file.path}. Give the float file that it was made from."
        )
    if original.qtype not in FLOATS:
        raise EvaluationError(
            f"{source.path}: {name}: got {original.qtype.name}, expected a float type. Give the "
            "float file that it was made from."
        )
    return measure_tensor(tensor, source.read_float(name), file.read_bytes(name))


def measure_tensor(
    tensor: TensorInfo, weight: FloatArray, packed: npt.NDArray[np.uint8]
) -> TensorScreen:
    """Return the errors of a tensor's packed data as a rounding of a weight of its shape."""
    weight = weight.reshape(-1, tensor.shape[-1])
    packed = packed.reshape(len(weight), -1)
    if tensor.qtype in FLOATS:
        return _float_tensor(tensor, weight, decode(packed, tensor.qtype))
    return measure(tensor.name, weight, packed, tensor.qtype)


def _float_tensor(tensor: TensorInfo, weight: FloatArray, values: FloatArray) -> TensorScreen:
    kind = tensor.qtype
    nearest = decode(encode(np.ascontiguousarray(weight), kind, name=tensor.name), kind)
    size = np.abs(weight)
    typical = float(np.sqrt(np.square(weight, dtype=np.float64).mean()))
    least = np.maximum(_FLOAT_STEP * np.maximum(size, _LEAST_STEP * typical), 1e-30)
    with np.errstate(all="ignore"):
        steps = np.abs(values - weight) / least
    return TensorScreen(
        tensor.name,
        tensor.qtype.name,
        worst=_finite(steps),
        far=float((~(steps <= FAR)).mean()),
        mean=0.0,
        peak=0.0,
        equal=float((values == nearest).all(axis=1).mean()),
    )


def measure(
    name: str, weight: FloatArray, packed: npt.NDArray[np.uint8], qtype: GGMLQuantizationType
) -> TensorScreen:
    """Return the errors of packed rows, (n_rows, row_bytes), as roundings of a weight.

    Raises
    ------
    ConversionError
        ggml cannot decode the type.
    """
    pieces = [
        _Piece.of(weight[rows], packed[rows], qtype, name)
        for rows in _chunks(len(weight), weight.shape[1])
    ]
    tops = np.concatenate([piece.tops for piece in pieces])
    medians = np.median(tops, axis=1, keepdims=True), np.median(tops, axis=0, keepdims=True)
    energy = sum(piece.energy for piece in pieces)
    return TensorScreen(
        name,
        qtype.name,
        worst=max(piece.worst for piece in pieces),
        far=sum(piece.n_far for piece in pieces) / weight.size,
        mean=_finite(np.sqrt(energy / sum(piece.rounding for piece in pieces))),
        peak=float((tops / np.maximum(np.maximum(*medians), 1e-30)).max()),
        equal=sum(piece.n_equal for piece in pieces) / len(weight),
    )


def _finite(values: Any) -> float:
    """Return the largest of values that may be infinite or NaN, as a number."""
    return float(np.nan_to_num(values, nan=_HUGE, posinf=_HUGE).max())


def _chunks(n_rows: int, n_in: int) -> Iterator[slice]:
    step = max(1, _CHUNK_WEIGHTS // n_in)
    for start in range(0, n_rows, step):
        yield slice(start, start + step)


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some rows of a tensor.

    `tops` (n_rows, n_groups) are the largest weights of the source, `rounding` and `energy` the
    sums of squares of ggml's errors and of the file's.
    """

    tops: FloatArray
    worst: float
    n_far: int
    rounding: float
    energy: float
    n_equal: int

    @classmethod
    def of(
        cls,
        weight: FloatArray,
        packed: npt.NDArray[np.uint8],
        qtype: GGMLQuantizationType,
        name: str,
    ) -> "_Piece":
        n_in = weight.shape[1]
        n = GROUP if n_in % GROUP == 0 else n_in
        importances = np.ones((1, n_in), np.float32) if needs_importances(qtype) else None
        weight = np.ascontiguousarray(weight)
        nearest = encode(weight, qtype, importances, name=name)
        shape = len(weight), -1, n
        left = (decode(nearest, qtype) - weight).reshape(shape)
        sizes = np.square(weight.reshape(shape), dtype=np.float64).mean(axis=2)
        steps = np.sqrt(12 * np.square(left, dtype=np.float64).mean(axis=2))
        least = np.maximum(_LEAST_STEP * np.median(steps), _LEAST_STEP * np.sqrt(sizes))
        steps = np.maximum(steps, np.maximum(least, 1e-30))
        with np.errstate(all="ignore"):  # what is not finite stands out
            errors = np.abs(decode(packed, qtype) - weight).reshape(shape).astype(np.float64)
            far = ~(errors <= FAR * steps[..., None])
            energy = float(np.square(errors).sum())
            worst = _finite(errors.max(axis=2) / steps)
        return cls(
            tops=np.abs(weight).reshape(shape).max(axis=2),
            worst=worst,
            n_far=int(far.sum()),
            rounding=float(np.square(steps).sum()) * n / 12,
            energy=energy,
            n_equal=int((nearest == packed).all(axis=1).sum()),
        )


# ---------------------------------------------------------------------------------------- verdict


def judge(tensors: Sequence[TensorScreen]) -> list[TensorScreen]:
    """Give every tensor that stands out from the others its reasons."""
    return [_judged(tensor, tensors) for tensor in tensors]


def _judged(tensor: TensorScreen, tensors: Sequence[TensorScreen]) -> TensorScreen:
    others = [each for each in tensors if each is not tensor and each.kind == tensor.kind]
    reasons = []
    alike = len(others) >= FEW
    is_alone = alike and tensor.equal < 1 and all(each.equal == 1 for each in others)
    n_others = len(others)
    if not alike and tensor.qtype not in {qtype.name for qtype in FLOATS}:
        others = [each for each in tensors if each is not tensor and each.mean > 0]
    for figure, limit in LIMITS.items():
        value = getattr(tensor, figure)
        known = [getattr(each, figure) for each in others]
        typical = float(np.median(known)) if known else 0.0
        if value > max(limit.floor, limit.factor * typical, _spread_limit(known, limit)):
            other = 100 * typical if figure == "far" else typical
            reasons.append(limit.meaning.format(value=value, percent=100 * value, other=other))
    if is_alone:
        reasons.append(
            f"{100 * (1 - tensor.equal):.3g} % of its rows are not ggml's rounding of the source, "
            f"as all {n_others} other tensors of its type are"
        )
    return replace(tensor, reasons=tuple(reasons))


def _spread_limit(known: Sequence[float], limit: Limit) -> float:
    """Return what the spread of the others explains, at most the factor squared."""
    if len(known) < FEW:
        return 0.0
    shift = limit.floor / 10  # figures may be 0
    logs = np.log(np.array(known) + shift)
    spread = 1.4826 * float(np.median(np.abs(logs - np.median(logs))))
    high = float(np.exp(np.median(logs) + _N_SPREADS * spread)) - shift
    return min(high, limit.factor**2 * max(float(np.median(known)), limit.floor / limit.factor))
