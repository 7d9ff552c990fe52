"""What every quantizer has to keep, built in or not: the conformance suite of plug-in authors.

In a test file of one's own::

    @pytest.mark.parametrize("check", [pytest.param(c, id=n) for n, c in quantizer_checks(Mine)])
    def test_quantizer(check):
        check()

The weights are small and seeded; nothing here needs a model, a file or pytest.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.errors import ConversionError
from converters.gguf_header import FLOATS
from edgeq.errors import EdgeqError
from edgeq.quantizers import Inputs, Quantizer, Rounded
from edgeq.runtime.encoders import (
    FloatArray,
    Packed,
    decode,
    encodable_types,
    encode,
    needs_importances,
    validate,
)

__all__ = ["ConformanceError", "check_quantizer", "quantizer_checks"]

_T = GGMLQuantizationType
_NAME = "blk.0.ffn_down.weight"

# Of the objective, over that of round-to-nearest. Sums of float32 are worth 1e-4; ggml's own search
# of scales does not minimize the plain weighted error, so nobody is held to it more closely.
_SLACK_HESSIAN = 1 + 1e-4
_SLACK_IMPORTANCES = 1.05
# Of the greatest error, over that of round-to-nearest: compensating moves weights by some steps.
_MAX_ERROR_GROWTH = 12.0


class ConformanceError(AssertionError):
    """A quantizer does not keep a promise; the message names check, type, got and expected."""


@dataclass(frozen=True, eq=False)
class _Case:
    """A weight with its inputs, and what to call it in a message."""

    title: str
    qtype: GGMLQuantizationType
    weight: FloatArray
    inputs: Inputs


@dataclass(frozen=True)
class _Suite:
    """A quantizer under test at one type; every public method is a check."""

    quantizer: Quantizer
    qtype: GGMLQuantizationType

    def inputs_are_not_written(self) -> None:
        """Weight, importances and second moments are as before."""
        case = _ordinary(self.qtype, self._n_blocks)
        given = _arrays(case)
        before = [array.copy() for array in given]
        self._run(case)
        for array, copy in zip(given, before, strict=True):
            n_changed = int(np.count_nonzero(array != copy))
            self._require(n_changed == 0, case, f"{n_changed} numbers of an input changed", "none")

    def rows_are_what_ggml_reads(self) -> None:
        """Shape and dtype are the type's, ggml accepts the bytes, and they mean the weight."""
        for n_blocks in (1, 2):
            case = _ordinary(self.qtype, n_blocks)
            self._decoded(case)

    def objective_is_not_worse_than_rtn(self) -> None:
        """½ tr(E H Eᵀ), or the importance-weighted squared error, against round-to-nearest."""
        self._not_worse_than_rtn(_ordinary(self.qtype, 2, n_out=16))

    def any_statistics_are_handled(self) -> None:
        """None, zero, singular: a near weight all the same, and not worse than round-to-nearest."""
        for case in _statistics(self.qtype):
            self._not_worse_than_rtn(case)

    def same_input_gives_same_bytes(self) -> None:
        """Twice, and with any number of threads."""
        case = _ordinary(self.qtype, self._n_blocks)
        first = self._run(case, n_threads=1).packed.copy()
        for n_threads in (1, 2):
            again = self._run(case, n_threads=n_threads).packed
            self._same(case, again, first, f"with {n_threads} threads")

    def layout_in_memory_does_not_matter(self) -> None:
        """Read-only, Fortran-ordered and strided arrays give the bytes of contiguous ones."""
        case = _ordinary(self.qtype, self._n_blocks)
        expected = self._run(case).packed.copy()
        for title, change in _LAYOUTS.items():
            weight, importances, hessian = map(change, _arrays(case))
            other = replace(case, weight=weight, inputs=Inputs(importances, hessian))
            self._same(other, self._run(other).packed, expected, title)

    def degenerate_rows_stay_what_they_are(self) -> None:
        """Zero, constant and tiny rows and single outliers are near; zeros stay zeros."""
        for n_blocks in {1, self._n_blocks}:
            case = _degenerate(self.qtype, n_blocks)
            values, nearest = self._decoded(case), _nearest(case)
            kept = ~nearest.any(axis=1)
            worst = float(np.abs(values[kept]).max(initial=0))
            self._require(worst < 1e-6, case, f"{worst:.3g} in a row that rtn keeps at 0", "0")
            for weight, row, near in zip(case.weight, values, nearest, strict=True):
                limit = _limit(weight, near)
                worst = float(np.abs(row - weight).max())
                self._require(
                    worst <= limit,
                    case,
                    f"an error of {worst:.3g} in a row of up to {np.abs(weight).max():.3g}",
                    f"at most {limit:.3g}",
                )

    def experts_equal_matrices_one_by_one(self) -> None:
        """Three dimensions give the bytes of the matrices."""
        parts = [_ordinary(self.qtype, 1, seed=seed) for seed in range(3)]
        weights, importances, hessians = zip(*map(_arrays, parts), strict=True)
        inputs = Inputs(np.concatenate(importances), np.concatenate(hessians))
        experts = replace(parts[0], title="experts", weight=np.stack(weights), inputs=inputs)
        expected = np.concatenate([self._run(part).packed for part in parts])
        self._same(experts, self._run(experts).packed, expected, "as experts")

    def errors_are_one_line(self) -> None:
        """Impossible input raises an EdgeqError or ConversionError that names the tensor."""
        for case in _impossible(self.qtype, self.quantizer.uses_hessian):
            try:
                self._run(case)
            except (EdgeqError, ConversionError) as error:
                message = str(error)
                fits = bool(message) and "\n" not in message and _NAME in message
                self._require(fits, case, f"the message {message!r}", f"one line with {_NAME}")
            except Exception as error:
                raise self._failure(
                    case, f"{type(error).__name__}: {error}", "an EdgeqError or ConversionError"
                ) from error
            else:
                raise self._failure(case, "no error", "an EdgeqError or ConversionError")

    @property
    def _n_blocks(self) -> int:
        """How many blocks a row of the cheaper checks has."""
        return max(1, 128 // int(GGML_QUANT_SIZES[self.qtype][0]))

    def _run(self, case: _Case, *, n_threads: int | None = None) -> Rounded:
        inputs = case.inputs
        if not self.quantizer.uses_hessian:
            inputs = replace(inputs, hessian=None)
        return self.quantizer.quantize(_NAME, case.weight, case.qtype, inputs, n_threads=n_threads)

    def _decoded(self, case: _Case) -> FloatArray:
        """Return what the rounded weight decodes to, (n_out, n_in), once it is known to be sane."""
        packed = self._run(case).packed
        block_size, type_size = GGML_QUANT_SIZES[case.qtype]
        shape = len(case.weight), case.weight.shape[1] // block_size * type_size
        self._require(
            packed.dtype == np.uint8 and packed.shape == shape,
            case,
            f"{packed.dtype} of shape {packed.shape}",
            f"uint8 of shape {shape}",
        )
        self._require(validate(packed, case.qtype), case, "bytes that ggml refuses", "valid ones")
        values = decode(packed, case.qtype)
        self._require(bool(np.isfinite(values).all()), case, "values not finite", "finite ones")
        worst = float(np.abs(values - case.weight).max())
        limit = _limit(case.weight, _nearest(case))
        self._require(worst <= limit, case, f"an error of {worst:.6g}", f"at most {limit:.6g}")
        return values

    def _not_worse_than_rtn(self, case: _Case) -> None:
        errors = self._decoded(case) - case.weight, _nearest(case) - case.weight
        if self.quantizer.uses_hessian and case.inputs.hessian is not None:
            hessian, slack = case.inputs.hessian[0], _SLACK_HESSIAN
            got, limit = (_loss(error, hessian) for error in errors)
        else:
            slack = _SLACK_IMPORTANCES
            got, limit = (_weighted(error, case.inputs.importances) for error in errors)
        limit *= slack
        self._require(got <= limit, case, f"a loss of {got:.6g}", f"at most {limit:.6g}, of rtn")

    def _same(self, case: _Case, got: Packed, expected: Packed, how: str) -> None:
        fits = got.shape == expected.shape and got.dtype == expected.dtype
        self._require(fits, case, f"{got.dtype} of {got.shape} {how}", f"{expected.shape}")
        n_other = int(np.count_nonzero((got != expected).any(axis=1)))
        self._require(n_other == 0, case, f"{n_other} of {len(got)} rows differ {how}", "none")

    def _require(self, holds: bool, case: _Case, got: str, expected: str) -> None:
        if not holds:
            raise self._failure(case, got, expected)

    def _failure(self, case: _Case, got: str, expected: str) -> ConformanceError:
        name = type(self.quantizer).__name__
        return ConformanceError(
            f"{name} at {self.qtype.name}, {case.title}: got {got}, expected {expected}."
        )


def check_quantizer(
    quantizer: Quantizer | type[Quantizer],
    qtypes: Iterable[GGMLQuantizationType] | None = None,
) -> None:
    """Run every check on a quantizer.

    Parameters
    ----------
    quantizer : one, or a class that needs no arguments
    qtypes : default: every quantized type that ggml encodes

    Raises
    ------
    ConformanceError
        A check failed; the first.
    """
    for name, check in quantizer_checks(quantizer, qtypes):
        try:
            check()
        except ConformanceError as error:
            raise ConformanceError(f"{name}: {error}") from error


def quantizer_checks(
    quantizer: Quantizer | type[Quantizer],
    qtypes: Iterable[GGMLQuantizationType] | None = None,
) -> list[tuple[str, Callable[[], None]]]:
    """Return the single checks as (name, callable), for ``pytest.mark.parametrize``.

    Parameters
    ----------
    quantizer, qtypes : see ``check_quantizer``
    """
    made = quantizer() if isinstance(quantizer, type) else quantizer
    if qtypes is None:
        qtypes = [qtype for qtype in encodable_types() if qtype not in FLOATS]
    names = [name for name in vars(_Suite) if not name.startswith("_")]
    checks = [name for name in names if callable(getattr(_Suite, name))]
    return [
        (f"{qtype.name}-{name}", getattr(_Suite(made, qtype), name))
        for qtype in qtypes
        for name in checks
    ]


def _arrays(case: _Case) -> list[FloatArray]:
    """Return weight, importances and second moments, but what is None."""
    given = (case.weight, case.inputs.importances, case.inputs.hessian)
    return [np.asarray(array) for array in given if array is not None]


def _nearest(case: _Case) -> FloatArray:
    """Return what round-to-nearest with the case's importances decodes to."""
    return decode(encode(case.weight, case.qtype, case.inputs.importances), case.qtype)


def _limit(weight: FloatArray, nearest: FloatArray) -> float:
    """Return the greatest error that is still near the weight."""
    worst = float(np.abs(nearest - weight).max())
    return _MAX_ERROR_GROWTH * worst + 1e-3 * float(np.abs(weight).max())


def _loss(error: FloatArray, hessian: FloatArray) -> float:
    doubles = error.astype(np.float64)
    return float(0.5 * np.sum((doubles @ hessian.astype(np.float64)) * doubles))


def _weighted(error: FloatArray, importances: FloatArray | None) -> float:
    weights = 1.0 if importances is None else importances.astype(np.float64)
    return float(np.sum(weights * np.square(error, dtype=np.float64)))


def _ordinary(
    qtype: GGMLQuantizationType, n_blocks: int, *, n_out: int = 6, seed: int = 0
) -> _Case:
    """Return a normal weight whose inputs are correlated, some of them strong."""
    n_in = n_blocks * GGML_QUANT_SIZES[qtype][0]
    rng = np.random.default_rng(seed)
    weight = (0.02 * rng.standard_normal((n_out, n_in))).astype(np.float32)
    known = _known_inputs(n_in, seed)
    inputs = deepcopy(known)  # a test may write them
    return _Case(f"a normal weight of {n_blocks} blocks a row", qtype, weight, inputs)


@functools.cache
def _known_inputs(n_in: int, seed: int) -> Inputs:
    return _inputs_of(_tokens(np.random.default_rng(seed + 100), 4 * n_in, n_in))


def _tokens(rng: np.random.Generator, n_tokens: int, n_in: int) -> FloatArray:
    mixing = np.eye(n_in) + rng.standard_normal((n_in, n_in)) / np.sqrt(n_in)
    strength = np.exp(rng.standard_normal(n_in))
    tokens: FloatArray = (rng.standard_normal((n_tokens, n_in)) @ mixing * strength).astype(
        np.float32
    )
    return tokens


def _inputs_of(tokens: FloatArray) -> Inputs:
    """Return importances and second moments of tokens, (n_tokens, n_in)."""
    doubles = tokens.astype(np.float64)
    hessian = 2 / len(tokens) * doubles.T @ doubles
    importances = np.square(doubles).mean(axis=0)
    return Inputs(importances[None].astype(np.float32), hessian[None].astype(np.float32))


def _degenerate(qtype: GGMLQuantizationType, n_blocks: int) -> _Case:
    """Return rows of zeros, of a constant, of tiny numbers, with one outlier, half of zeros."""
    ordinary = _ordinary(qtype, n_blocks)
    rows = np.zeros((8, ordinary.weight.shape[1]), np.float32)
    rows[1] = 0.5
    rows[2] = -0.25
    rows[3, 7] = -3.0
    rows[4] = 0.01 * np.sign(ordinary.weight[0])
    rows[4, -2] = 4.0
    rows[5] = 1e-30 * np.sign(ordinary.weight[1])
    rows[6] = 1e-41 * np.sign(ordinary.weight[2])  # float32 has fewer bits below 1.2e-38
    rows[7, ::2] = ordinary.weight[3, ::2]
    title = f"degenerate rows of {n_blocks} blocks"
    return replace(ordinary, title=title, weight=rows)


def _statistics(qtype: GGMLQuantizationType) -> Iterator[_Case]:
    """Yield a weight with statistics that give little or nothing to go by."""
    ordinary = _ordinary(qtype, 1)
    full = ordinary.inputs
    n_in = ordinary.weight.shape[1]
    rng = np.random.default_rng(5)
    tokens = _tokens(rng, max(2, n_in // 4), n_in)
    unseen = tokens.copy()
    unseen[:, n_in // 4 : n_in // 2] = 0
    mixing = rng.standard_normal((len(ordinary.weight),) * 2).astype(np.float32)
    outputs = (mixing @ mixing.T)[None]
    zeros = Inputs(np.zeros((1, n_in), np.float32), np.zeros((1, n_in, n_in), np.float32))
    for title, inputs in (
        ("fewer tokens than columns", _inputs_of(tokens)),
        ("one token", _inputs_of(tokens[:1])),
        ("channels that no token reached", _inputs_of(unseen)),
        ("statistics of zeros", zeros),
        ("importances without second moments", Inputs(full.importances, None)),
        ("second moments without importances", Inputs(None, full.hessian)),
        ("gradients at its outputs", replace(full, outputs=outputs)),
        ("no statistics", Inputs()),
    ):
        if inputs.importances is not None or not needs_importances(qtype):
            yield replace(ordinary, title=title, inputs=inputs)


def _impossible(qtype: GGMLQuantizationType, uses_hessian: bool) -> Iterator[_Case]:
    """Yield what has to be refused."""
    ordinary = _ordinary(qtype, 1)
    weight, importances, hessian = _arrays(ordinary)
    damaged = weight.copy()
    damaged[1, 3] = np.nan
    yield replace(ordinary, title="a weight with a NaN", weight=damaged)
    short = Inputs(importances[:, :-1], hessian)
    yield replace(ordinary, title="importances of another size", inputs=short)
    broken = importances.copy()
    broken[0, 5] = np.inf
    yield replace(ordinary, title="infinite importances", inputs=Inputs(broken, hessian))
    ragged = np.ascontiguousarray(weight[:, :-1])
    inputs = Inputs(importances[:, :-1], hessian[:, :-1, :-1])
    yield replace(ordinary, title="a row that is no block", weight=ragged, inputs=inputs)
    if uses_hessian:
        overflown = hessian.copy()
        overflown[0, 2, 2] = np.inf
        infinite = Inputs(importances, overflown)
        yield replace(ordinary, title="infinite second moments", inputs=infinite)
        short = Inputs(importances, hessian[:, :-1, :-1])
        yield replace(ordinary, title="second moments of another size", inputs=short)


def _read_only(array: FloatArray) -> FloatArray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def _strided(array: FloatArray) -> FloatArray:
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, np.float32)
    wide[..., ::2] = array
    every_other: FloatArray = wide[..., ::2]
    return every_other


_LAYOUTS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "read-only": _read_only,
    "in Fortran order": np.asfortranarray,
    "strided": _strided,
}
