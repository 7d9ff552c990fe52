"""Layers derived again from the calibration text, to the byte.

The ordinary walk is run once more, up to the last layer that is wanted: the text, the importance
matrix, gradients, second moments and folds. In the layers on the way the file's own codes stand in
for the rounding, so that what a wanted layer sees is what the layers before it really give.
"""

import dataclasses
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from converters.gguf_file import GgufFile, layer_of
from edgeq import pipeline, provenance
from edgeq.allocation import plan_of
from edgeq.console import Steps
from edgeq.errors import EvaluationError, RecipeError
from edgeq.execution import Here
from edgeq.opening import Reference
from edgeq.provenance import Seen
from edgeq.quantization import Quantized
from edgeq.quantizers import QUANTIZERS, Inputs, Quantizer, Rounded, make_quantizer
from edgeq.recipe import AUTO_TEXT, Recipe, Target, TextChoice
from edgeq.roundings import Roundings
from edgeq.runtime.encoders import FloatArray, Packed
from edgeq.verification.claims import DIFFERS, IDENTICAL, Claim, Verdict
from edgeq.workdir import WorkDirectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Again:
    """What to derive again, and from what.

    Attributes
    ----------
    n_layers : so many, drawn; None: one if there are `texts`
    texts : the calibration text as the export was given it; empty: the model wrote it
    imatrix : the importance matrix that the export was given, if it was
    """

    n_layers: int | None = None
    texts: tuple[str, ...] = ()
    imatrix: Path | None = None

    @property
    def is_asked(self) -> bool:
        """Whether anything that needs the text is to be derived again."""
        return bool(self.n_layers or self.texts)


@dataclass(frozen=True)
class Derived:
    """What was derived again.

    Attributes
    ----------
    verdicts : by tensor
    lines : what holds beside the tensors, and how it was found
    """

    seen: Seen
    verdicts: Mapping[str, Verdict]
    lines: tuple[str, ...]


def derive(
    file: GgufFile,
    claim: Claim,
    reference: Reference,
    again: Again,
    seed: int,
    n_threads: int | None,
    directory: Path,
    steps: Steps,
) -> Derived:
    """Derive drawn layers again, and what lies outside of layers.

    Parameters
    ----------
    seed : of the draw
    directory : an empty one, for intermediate results: nothing that is known already is trusted

    Raises
    ------
    EvaluationError
        The text is not the recorded one, or another version of edgeq made the file.
    RecipeError
        The recipe cannot be repeated with what was given.
    """
    recipe = _recipe(claim, again, n_threads, directory / "none.gguf")
    n_layers = 1 if again.n_layers is None else again.n_layers
    layers = () if claim.is_exact else _drawn(file, n_layers, seed)
    changed = {
        n: t.qtype for n, t in file.tensors.items() if t.qtype != reference.file.tensors[n].qtype
    }
    on_the_way = range(max(layers) + 1) if layers and recipe.method.sequential else layers
    if layers:
        logger.warning(
            "layers %s are derived again: second moments of %d of %d layers, and what the export "
            "took to get there",
            ", ".join(map(str, layers)),
            len(on_the_way),
            len(_numbers(file)),
        )
    quantizer = make_quantizer(recipe.method.quantizer)
    with WorkDirectory(directory, is_kept=False) as work:
        seen = _seen(recipe, claim, reference, quantizer, work, steps)

        def roundings(numbers: Iterable[int]) -> Roundings:
            wanted = {
                name: qtype for name, qtype in changed.items() if layer_of(name) in {*numbers, None}
            }
            plan = plan_of(reference.file, recipe.preset, wanted, {})
            return Roundings(
                recipe, reference, plan, seen.importances, seen.weighed_by, work, Here(), steps
            )

        lines = []
        if seen.texts.calibration is not None:
            lines.append(f"calibration text: has the recorded hash, {_text_hash(claim)[:16]}…")
        if not layers:
            return Derived(seen, {}, tuple(lines))
        lines.append(f"layers derived again: {', '.join(map(str, layers))}")
        judge = _Judge(file, reference.file, {*layers, None}, _hint(claim))
        if recipe.method.is_verified:  # the export ships what is nearest if that is as good
            verdicts = judge.verdicts(roundings(layers).nearest(), layers)
            if all(one.verdict == IDENTICAL for one in verdicts.values()):
                return Derived(seen, verdicts, (*lines, "rounding: to nearest, as the recipe may"))
        taken = _Taken(quantizer, file, layers)
        rounding = roundings(on_the_way)
        verdicts = judge.verdicts(rounding.wanted(taken, seen.texts), on_the_way)
        return Derived(seen, verdicts, (*lines, *rounding.notes))


def _numbers(file: GgufFile) -> list[int]:
    return sorted({number for name in file.tensors if (number := layer_of(name)) is not None})


def _drawn(file: GgufFile, n: int, seed: int) -> tuple[int, ...]:
    numbers = _numbers(file)
    random = np.random.default_rng([seed, 1])
    return tuple(sorted(random.choice(numbers, min(n, len(numbers)), replace=False).tolist()))


def _recipe(claim: Claim, again: Again, n_threads: int | None, out: Path) -> Recipe:
    """Return the recorded recipe, as far as calibration and rounding go, on what was given."""
    told = claim.recipe
    try:
        texts, target = told["texts"], told["target"]
        recorded, judged_on = tuple(texts["calibration"]), tuple(texts["evaluation"])
        recipe = Recipe(
            model="recorded",
            out=out,
            preset=told["preset"],
            target=Target(
                target["size_bytes"],
                target["bpw"],
                target["max_kld"],
                target["max_ppl_ratio"],
                target["min_tps"],
            ),
            quantizer=told["quantizer"],
            effort=told["effort"],
            fisher=told["fisher"],
            fisher_groups=told["fisher_groups"],
            output_feedback=told["output_feedback"],
            sequential=told["sequential"],
            asymmetric=told["asymmetric"],
            transform=told["transform"],
            tune_steps=told["tune_steps"],
            imatrix=again.imatrix,
            use_imatrix=told["use_imatrix"],
            texts=TextChoice(
                again.texts or recorded,
                judged_on,
                texts["n_ctx"],
                texts["chunks"],
                texts["evaluation_chunks"],
                texts["seed"],
                texts["force"],
            ),
            n_threads=n_threads,
            allow_requantize=told["allow_requantize"],
            prove=told["prove"] and not judged_on,  # then a part of the text is held out
        )
        is_known = json.loads(json.dumps(dataclasses.asdict(recipe.method))) == claim.method
        given = told["imatrix"]
    except (KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"edgeq.recipe: {error}: the recipe cannot be read. Another version of edgeq wrote it."
        ) from error
    if not is_known:
        raise EvaluationError(
            "edgeq.method: is not what the recorded recipe leads to here. Another version of edgeq "
            f"({claim.versions.get('edgeq')}) wrote it: verify with that one."
        )
    if claim.is_tuned:
        raise RecipeError(
            "--layers: the recipe tunes scales afterwards (--tune), which is not repeated. Leave "
            "--layers and --text out."
        )
    if recorded == (AUTO_TEXT,) and again.texts:
        raise RecipeError(
            "--text: the model wrote its text itself, which is repeated. Leave it out."
        )
    if recorded != (AUTO_TEXT,) and not again.texts:
        raise RecipeError(
            f"--layers: the file was calibrated on {', '.join(recorded)}. Give them with --text."
        )
    if given is None and again.imatrix is not None:
        raise RecipeError("--imatrix: the export made its own from its text. Leave it out.")
    if given is not None and again.imatrix is None:
        raise RecipeError(f"--layers: the export was given {given}. Give it with --imatrix.")
    return recipe


def _seen(
    recipe: Recipe,
    claim: Claim,
    reference: Reference,
    quantizer: Quantizer,
    work: WorkDirectory,
    steps: Steps,
) -> Seen:
    """Calibrate on the text, if it is the recorded one."""
    text = pipeline.texts_of(recipe, reference, quantizer, work, steps).calibration
    recorded = _text_hash(claim)
    found = "none" if text is None else text.manifest.sha256
    if found != recorded:
        whose = "--text" if not recipe.texts.is_auto else "the text that the model writes here"
        raise EvaluationError(
            f"{whose}: hash {found[:16]}, but the file was calibrated on {recorded[:16]} "
            f"({', '.join(claim.recipe['texts']['calibration'])}). "
            + (
                "On another machine a model can write other text: verify without --layers."
                if recipe.texts.is_auto
                else "Give the very same files, in the same order, with the same weights."
            )
        )
    return pipeline.observe(recipe, reference, quantizer, work, steps)


def _text_hash(claim: Claim) -> str:
    told = claim.texts.get("calibration")
    return str(told.get("sha256")) if isinstance(told, dict) else "none"


def _hint(claim: Claim) -> str:
    """Return why honest bytes may be others here."""
    here = provenance.versions(QUANTIZERS.origin_of(claim.method["quantizer"]))
    others = [
        f"{name} {claim.versions[name]} (here {version})"
        for name, version in here.items()
        if claim.versions.get(name, version) != version
    ]
    if others:
        return f"it was made with {', '.join(others)}, which can change bytes"
    return "the versions are those of here; another CPU can change bytes"


class _Taken:
    """A quantizer that takes the codes of a file, but in some layers."""

    def __init__(self, quantizer: Quantizer, file: GgufFile, layers: Collection[int]) -> None:
        self.uses_hessian = quantizer.uses_hessian
        self._quantizer, self._file, self._layers = quantizer, file, layers

    def quantize(
        self,
        name: str,
        weight: FloatArray,
        qtype: GGMLQuantizationType,
        inputs: Inputs,
        *,
        n_threads: int | None = None,
    ) -> Rounded:
        """Return the packed rows of a weight, see ``edgeq.quantizers.Quantizer``."""
        number = layer_of(name)
        if number is None or number in self._layers:
            return self._quantizer.quantize(name, weight, qtype, inputs, n_threads=n_threads)
        packed = self._file.read_bytes(name)
        return Rounded(packed.reshape(-1, packed.shape[-1]))


@dataclass(frozen=True, eq=False)
class _Judge:
    """Compares a file with what was derived again."""

    file: GgufFile
    source: GgufFile
    rounded: Collection[int | None]  # layers whose codes were derived; None: outside of layers
    hint: str

    def verdicts(self, derived: Quantized, layers: Collection[int]) -> dict[str, Verdict]:
        """Return a verdict on every tensor of some layers that was derived, and outside of them."""
        return {
            name: self._verdict(name, derived)
            for name, tensor in self.file.tensors.items()
            if layer_of(name) in {*layers, None}
            and (layer_of(name) in self.rounded or tensor.qtype == self.source.tensors[name].qtype)
        }

    def _verdict(self, name: str, derived: Quantized) -> Verdict:
        got, qtype = self.file.read_bytes(name), self.file.tensors[name].qtype.name
        is_derived = name in derived.paths
        wanted = derived.load(name) if is_derived else self.source.read_bytes(name)
        wrong = np.flatnonzero(_bytes(wanted) != _bytes(got))
        if not len(wrong):
            how = (
                "derived again from the text, byte for byte" if is_derived else "the source's bytes"
            )
            return Verdict(name, qtype, IDENTICAL, how)
        n_bytes = (
            f"{len(wrong)} of {got.size} bytes are not those of the recipe, the first {wrong[0]}"
        )
        return Verdict(name, qtype, DIFFERS, f"{n_bytes}; {self.hint}")


def _bytes(packed: Packed) -> Packed:
    return np.ascontiguousarray(packed).view(np.uint8).ravel()
