"""Is a file what its metadata says? ``edgeq verify``: against the float source, tensor by tensor.

What can be derived again without calibration has to be the same bytes. Everything else has to be a
rounding of the source's weights, folded where the recipe folds, as ``edgeq.differing.screen`` has
it: tensors that stand out from the others of their type differ. That is evidence, no proof.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from converters.gguf_file import GgufFile, open_gguf
from edgeq import allocation
from edgeq.console import Steps, markdown_table
from edgeq.differing.screen import TensorScreen, judge, measure_tensor
from edgeq.errors import EvaluationError
from edgeq.layer_rounding import Importances
from edgeq.opening import Reference, SourceChoice, open_reference
from edgeq.pipeline import given_imatrix, importances_of
from edgeq.quantization import quantize_tensor
from edgeq.quantizers import make_quantizer
from edgeq.runtime.encoders import FloatArray
from edgeq.seals import Seal, check_seal
from edgeq.transforms import FoldSite, TensorScales, apply, fold_sites, tensor_scales
from edgeq.workdir import WorkDirectory

_MOST_TYPICAL = 4.0  # error over rounding's, median over tensors; as the screen's _ANOTHER_MODEL
_AS_NEAR = 1.1  # times the median: a tensor whose errors in all are those of the others
IDENTICAL, CONSISTENT, DIFFERS, UNKNOWN = "identical", "consistent", "differs", "not shown"


@dataclass(frozen=True)
class Verdict:
    """One tensor: ``identical``, ``consistent``, ``differs`` or ``not shown``, and why."""

    name: str
    qtype: str
    verdict: str
    why: str


@dataclass(frozen=True)
class Verification:
    """The result of ``edgeq verify``.

    Attributes
    ----------
    seed : of the sample
    n_tensors : of the file, in all
    lines : what holds beside the tensors
    problems : what does not
    limits : what this cannot show
    """

    path: Path
    source: Path
    seed: int
    n_tensors: int
    tensors: tuple[Verdict, ...]
    signed_by: str | None
    lines: tuple[str, ...]
    problems: tuple[str, ...]
    limits: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether nothing contradicts what the file says."""
        return not self.differences

    @property
    def differences(self) -> tuple[str, ...]:
        """A line for everything that contradicts it."""
        tensors = (f"{t.name}: {t.why}" for t in self.tensors if t.verdict == DIFFERS)
        return (*self.problems, *tensors)

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "path": str(self.path),
            "source": str(self.source),
            "holds": self.holds,
            "differences": list(self.differences),
            "seed": self.seed,
            "n_tensors": self.n_tensors,
            "signed_by": self.signed_by,
            "facts": list(self.lines),
            "limits": list(self.limits),
            "tensors": [vars(tensor) for tensor in self.tensors],
        }

    def as_text(self) -> str:
        """Return what a terminal shows."""
        rows = [[t.name, t.qtype, t.verdict, t.why] for t in self.tensors]
        return "\n".join(
            [
                markdown_table(["tensor", "type", "verdict", "why"], rows),
                "",
                f"{len(self.tensors)} of {self.n_tensors} tensors, --seed {self.seed}",
                *self.lines,
                *(f"not shown: {line}" for line in self.limits),
                *(f"not shown: {t.name}: {t.why}" for t in self.tensors if t.verdict == UNKNOWN),
                *(f"DIFFERS: {line}" for line in self.differences),
            ]
        )


@dataclass(frozen=True, eq=False)
class _Claim:
    """What the metadata says."""

    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    method: Mapping[str, Any]

    @classmethod
    def of(cls, file: GgufFile) -> "_Claim":
        found = {}
        for key in ("source", "recipe", "method"):
            try:
                found[key] = json.loads(file.value(f"edgeq.{key}", ""))
                found[key].keys()
            except (TypeError, ValueError, AttributeError) as error:
                raise EvaluationError(
                    f"{file.path}: edgeq.{key} is missing or broken: edgeq did not write this "
                    "file. Use edgeq diff --screen for files of others."
                ) from error
        try:
            claim = cls(**found)
            claim.source["sha256"], claim.folds, claim.is_exact, claim.preset
        except (KeyError, TypeError) as error:
            raise EvaluationError(
                f"{file.path}: edgeq.*: {error} is missing. Another version of edgeq wrote it."
            ) from error
        return claim

    @property
    def folds(self) -> bool:
        return bool(self.method["transforms"])

    @property
    def is_tuned(self) -> bool:
        return bool(self.method["tune_steps"])

    @property
    def is_exact(self) -> bool:
        """Whether the bytes depend on nothing but the weights and an imatrix."""
        return str(self.method["quantizer"]) == "rtn" and not self.folds and not self.is_tuned

    @property
    def uses_imatrix(self) -> bool:
        return bool(self.recipe["use_imatrix"])

    @property
    def preset(self) -> str | None:
        """llama.cpp's mix that gave the types; None: a plan or an allocator did."""
        limits = self.recipe["target"].values()
        is_free = self.recipe["plan"] is not None or any(v is not None for v in limits)
        return None if is_free else str(self.recipe["preset"])


def verify(
    path: Path,
    model: str,
    *,
    n_tensors: int | None,
    seed: int | None,
    plan: Path | None,
    imatrix: Path | None,
    public_key: Path | None,
    source: SourceChoice,
    steps: Steps,
) -> Verification:
    """Compare a file with what its metadata says about it.

    Parameters
    ----------
    model : the float model that it was made from
    n_tensors : so many tensors are looked at, and those that are folded with them; None: all
    seed : of the sample; None: drawn, so that nobody could know it when the file was made
    plan : the ``plan.json`` that it was made with
    imatrix : the importance matrix that it was made with
    public_key : of whoever has to have signed it

    Raises
    ------
    EvaluationError
        The file is not edgeq's.
    EdgeqError, ConversionError
        The source or a key cannot be read.
    """
    file = open_gguf(path)
    claim = _Claim.of(file)
    with steps.step("hash"):
        seal = check_seal(file, public_key)
    with WorkDirectory(source.work) as work:
        reference = open_reference(model, source, work, steps)
        lines, problems, limits = list(seal.lines), list(seal.problems), _limits(claim, seal)
        if claim.source["sha256"] == reference.sha256:
            lines.append(f"source: has the recorded hash, {reference.sha256[:16]}…")
        else:
            problems.append(f"source: {model} is not the recorded {claim.source.get('name')}")
        shapes = {name: tensor.shape for name, tensor in reference.file.tensors.items()}
        if shapes != {name: tensor.shape for name, tensor in file.tensors.items()}:
            problems.append("tensors: the source has others, or of other shapes")
            tensors: tuple[Verdict, ...] = ()
            seed = 0 if seed is None else seed
        else:
            _compare_types(file, reference, claim, plan, lines, problems, limits)
            given = given_imatrix(imatrix, reference.file)
            weights = importances_of(given, reference.file)
            if claim.uses_imatrix and claim.is_exact and weights is None:
                limits.append("the very bytes: they depend on an importance matrix; --imatrix FILE")
            seed = secrets.randbelow(2**32) if seed is None else seed
            looker = _Looker(file, reference.file, claim, weights, source.n_threads)
            with steps.step("verify") as progress:
                names = looker.sample(n_tensors, seed)
                tensors = looker.verdicts(names, progress)
    return Verification(
        path,
        reference.path,
        seed,
        len(file.tensors),
        tensors,
        seal.signed_by,
        tuple(lines),
        tuple(problems),
        tuple(limits),
    )


def _limits(claim: _Claim, seal: Seal) -> list[str]:
    found = []
    if not claim.is_exact:
        found.append("that the codes are those of the recipe: any near rounding is consistent")
    if claim.uses_imatrix:
        found.append("that the calibration text was the recorded one")
    if seal.signed_by is None:
        found.append("who made it: it is not signed")
    return found


def _compare_types(
    file: GgufFile,
    reference: Reference,
    claim: _Claim,
    given: Path | None,
    lines: list[str],
    problems: list[str],
    limits: list[str],
) -> None:
    if given is not None:
        plan, of = allocation.read_plan(given, reference.file), str(given)
    elif claim.preset is not None:
        of = claim.preset
        plan = allocation.allocate(reference.file, of, has_imatrix=claim.uses_imatrix)
    else:
        limits.append("that the types are those of the plan: give it with --plan")
        return
    wrong = [
        f"{name}: is {file.tensors[name].qtype.name}, expected {qtype.name} by {of}"
        for name, qtype in plan.types.items()
        if file.tensors[name].qtype != qtype
    ]
    problems += wrong
    if not wrong:
        lines.append(f"types: those of {of}")


@dataclass(frozen=True, eq=False)
class _Looker:
    """Looks at tensors of a file and of its source."""

    file: GgufFile
    source: GgufFile
    claim: _Claim
    importances: Importances | None
    n_threads: int | None

    def sample(self, n: int | None, seed: int) -> list[str]:
        names = list(self.file.tensors)
        if n is None or n >= len(names):
            return names
        chosen = set(np.random.default_rng(seed).choice(names, n, replace=False).tolist())
        if self.claim.folds:  # a fold is only seen in all of its tensors
            chosen |= {
                t for site in self._sites() if chosen & {*site.tensors} for t in site.tensors
            }
        return [name for name in names if name in chosen]

    def _sites(self) -> list[FoldSite]:
        return [site for site in fold_sites(self.source) if site.refused is None]

    def verdicts(self, names: Sequence[str], progress: Any) -> tuple[Verdict, ...]:
        scales = self._scales(names) if self.claim.folds else {}
        exact: dict[str, Verdict] = {}
        screened: list[TensorScreen] = []
        for done, name in enumerate(names, start=1):
            verdict = self._derived(name, scales)
            if verdict is None:
                screened.append(self._screen(name, scales))
            else:
                exact[name] = verdict
            progress(done, len(names))
        for each in self._judged(screened):
            exact[each.name] = each
        return tuple(exact[name] for name in names)

    def _derived(self, name: str, scales: Mapping[str, TensorScales]) -> Verdict | None:
        """Return the verdict on a tensor whose bytes can be derived again; None: they cannot."""
        tensor, original = self.file.tensors[name], self.source.tensors[name]
        kept = tensor.qtype == original.qtype
        needs = self.claim.uses_imatrix and self.importances is None
        if not kept and (not self.claim.is_exact or (needs and len(tensor.shape) > 1)):
            return None
        if kept and name in scales:
            return self._folded(name, scales[name])
        quantizer = make_quantizer("rtn")
        wanted = quantize_tensor(
            self.source, name, tensor.qtype, self.importances, quantizer, n_threads=self.n_threads
        )
        got = self.file.read_bytes(name)
        wrong = np.flatnonzero(
            (wanted.reshape(len(wanted), -1) != got.reshape(len(got), -1)).any(1)
        )
        if not len(wrong):
            how = "the source's bytes" if kept else "derived again, byte for byte"
            return Verdict(name, tensor.qtype.name, IDENTICAL, how)
        if kept and self.claim.is_tuned:
            return Verdict(name, tensor.qtype.name, UNKNOWN, "the recipe tunes it")
        if kept and name.endswith(".bias") and not self.claim.is_exact:
            return None  # it takes the mean error of its products
        why = f"{len(wrong)} of {len(got)} rows are others, the first {int(wrong[0])}"
        return Verdict(name, tensor.qtype.name, DIFFERS, why)

    def _folded(self, name: str, scales: TensorScales) -> Verdict | None:
        """Return the verdict on a norm; of other folded floats None."""
        tensor = self.file.tensors[name]
        if len(tensor.shape) != 1 or name.endswith(".bias"):
            return None
        is_one = bool((scales.row == 1).all())
        if is_one and np.array_equal(self.file.read_bytes(name), self.source.read_bytes(name)):
            return Verdict(name, tensor.qtype.name, IDENTICAL, "the source's bytes")
        if self.claim.is_tuned:
            return Verdict(name, tensor.qtype.name, UNKNOWN, "the recipe tunes it")
        off = np.abs(self.file.read_float(name) - apply(self.source.read_float(name), scales))
        bad = ~(off <= 1e-2 * np.abs(self.file.read_float(name)))  # where the source is 0, or NaN
        if bad.any():
            why = f"{int(bad.sum())} of its {bad.size} values are no fold of the source's"
            return Verdict(name, tensor.qtype.name, DIFFERS, why)
        return Verdict(name, tensor.qtype.name, CONSISTENT, "folded into what reads it")

    def _screen(self, name: str, scales: Mapping[str, TensorScales]) -> TensorScreen:
        weight: FloatArray = self.source.read_float(name)
        if name in scales:
            weight = apply(weight, scales[name])
        found = measure_tensor(self.file.tensors[name], weight, self.file.read_bytes(name))
        return replace(found, peak=0.0)  # the source's own outliers are none of the file

    def _judged(self, screened: Sequence[TensorScreen]) -> list[Verdict]:
        means = [each.mean for each in screened if each.mean > 0]
        typical = float(np.median(means)) if means else 0.0
        if not typical <= _MOST_TYPICAL:
            why = f"errors of ×{typical:.3g} of rounding's: other weights than the source's"
            return [Verdict(each.name, each.qtype, DIFFERS, why) for each in screened]
        found = []
        for each in judge(screened):
            why, verdict = "; ".join(each.reasons), DIFFERS
            if not each.reasons:
                why = f"errors ×{each.mean:.2f} of rounding's, the largest {each.worst:.1f} steps"
                verdict = CONSISTENT
            elif not self.claim.is_exact and 0 < each.mean <= _AS_NEAR * typical:
                verdict = UNKNOWN
                why = (
                    f"as near the source as others in all, ×{each.mean:.2f} of rounding's; single "
                    f"weights are not, which error feedback does, or somebody did: {why}"
                )
            found.append(Verdict(each.name, each.qtype, verdict, why))
        return found

    # A fold's scales are not in the file. A norm shows them; at other sites they are fitted, one
    # number a channel, to the rows that make it or the columns that read it, whichever show it
    # better (what a fold makes small may be rounded to zeros): the other side then has to agree.

    def _scales(self, names: Sequence[str]) -> dict[str, TensorScales]:
        wanted = set(names)
        sites = [site for site in self._sites() if wanted & {*site.tensors}]
        found = {site: self._fitted(site, {}) for site in sites if site.kind == "norm"}
        by_norms = tensor_scales(self.source, found)
        found |= {site: self._fitted(site, by_norms) for site in sites if site.kind != "norm"}
        return tensor_scales(self.source, found)

    def _fitted(self, site: FoldSite, by_norms: Mapping[str, TensorScales]) -> FloatArray:
        if site.kind == "norm" and not self.claim.is_tuned:
            with np.errstate(all="ignore"):
                scales = self.source.read_float(site.source) / self.file.read_float(site.source)
            return _positive(scales)
        index = np.arange(site.n).reshape(site.n_mat, -1)[:, site.scale_of_column]
        reading = _Fit(site.n)
        for name in site.consumers:
            shape = (site.n_mat, -1, site.n_columns)
            ours, theirs = (one.read_float(name).reshape(shape) for one in (self.file, self.source))
            reading.add(index, ours, theirs, "mri,mri->mi")
        scales, unexplained = reading.result()
        if site.kind != "norm":
            theirs = self.source.read_float(site.source)
            if site.source in by_norms:
                theirs = apply(theirs, by_norms[site.source])
            ours = self.file.read_float(site.source)
            last = slice(site.first_row, site.first_row + site.n // site.n_mat)
            ours, theirs = (
                one.reshape(site.n_mat, site.n_rows, -1)[:, last] for one in (ours, theirs)
            )
            making = _Fit(site.n)
            making.add(np.arange(site.n).reshape(site.n_mat, -1), ours, theirs, "mri,mri->mr")
            inverse, also = making.result()
            with np.errstate(all="ignore"):
                scales = np.where(also < unexplained, 1 / inverse, scales)
        return _positive(scales)


class _Fit:
    """One factor a channel, by least squares, from weights before to weights after."""

    def __init__(self, n: int) -> None:
        self._both, self._before, self._after = np.zeros((3, n))

    def add(self, index: Any, after: FloatArray, before: FloatArray, sums: str) -> None:
        for total, one, other in (
            (self._both, after, before),
            (self._before, before, before),
            (self._after, after, after),
        ):
            np.add.at(total, index, np.einsum(sums, one, other, dtype=np.float64))

    def result(self) -> tuple[Any, Any]:
        """Return the factors and the share of the energy that each leaves unexplained, (n,)."""
        with np.errstate(all="ignore"):
            left = 1 - np.square(self._both) / (self._before * self._after)
            return self._both / self._before, np.nan_to_num(left, nan=np.inf)


def _positive(scales: Any) -> FloatArray:
    """Return scales that can be applied; where there is none, 1."""
    good = np.isfinite(scales) & (scales > 1e-6) & (scales < 1e6)
    return np.where(good, scales, 1).astype(np.float32)
