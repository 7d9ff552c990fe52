"""Is a file what its metadata says? ``edgeq verify``: against the float source, tensor by tensor.

What can be derived again without calibration has to be the same bytes, and so has what is derived
again with it, layer by layer, where that is asked for (``edgeq.verification.layers``). Everything
else has to be a rounding of the source's weights, folded where the recipe folds, as
``edgeq.differing.screen`` has it: tensors that stand out from the others of their type differ.
That is evidence, no proof.
"""

import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.gguf_file import GgufFile, open_gguf
from edgeq import allocation
from edgeq.console import Steps, markdown_table
from edgeq.opening import Reference, SourceChoice, open_reference
from edgeq.pipeline import given_imatrix, importances_of
from edgeq.seals import Seal, check_seal
from edgeq.verification.claims import DIFFERS, UNKNOWN, Claim, Verdict
from edgeq.verification.layers import Again, Derived, derive
from edgeq.verification.tensors import Looker
from edgeq.workdir import WorkDirectory


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


def verify(
    path: Path,
    model: str,
    *,
    n_tensors: int | None,
    seed: int | None,
    plan: Path | None,
    public_key: Path | None,
    again: Again,
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
    public_key : of whoever has to have signed it
    again : what to derive again from the calibration text

    Raises
    ------
    EvaluationError
        The file is not edgeq's, or the text not the recorded one.
    EdgeqError, ConversionError
        The source or a key cannot be read.
    """
    file = open_gguf(path)
    claim = Claim.of(file)
    with steps.step("hash"):
        seal = check_seal(file, public_key)
    with WorkDirectory(source.work) as work:
        reference = open_reference(model, source, work, steps)
        lines, problems = list(seal.lines), list(seal.problems)
        limits: list[str] = []
        derived: Derived | None = None
        is_source = claim.source["sha256"] == reference.sha256
        if is_source:
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
            seed = secrets.randbelow(2**32) if seed is None else seed
            known: Mapping[str, Verdict] = {}
            if again.is_asked and is_source:
                with tempfile.TemporaryDirectory(dir=work.path) as name:
                    derived = derive(
                        file, claim, reference, again, seed, source.n_threads, Path(name), steps
                    )
                weights, known = derived.seen.importances, derived.verdicts
                lines += derived.lines
            else:
                given = given_imatrix(again.imatrix, reference.file)
                weights = importances_of(given, reference.file)
            if claim.uses_imatrix and claim.is_exact and weights is None:
                limits.append("the very bytes: they depend on an importance matrix; --imatrix FILE")
            looker = Looker(file, reference.file, claim, weights, source.n_threads, known)
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
        (*_limits(claim, seal, derived), *limits),
    )


def _limits(claim: Claim, seal: Seal, derived: Derived | None) -> list[str]:
    found = []
    if not claim.is_exact:
        others = "" if derived is None else " of other layers"
        found.append(
            f"that the codes{others} are those of the recipe: any near rounding is consistent"
        )
    if claim.uses_imatrix and derived is None:
        found.append("that the calibration text was the recorded one")
    if seal.signed_by is None:
        found.append("who made it: it is not signed")
    return found


def _compare_types(
    file: GgufFile,
    reference: Reference,
    claim: Claim,
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
