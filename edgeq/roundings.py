"""The roundings of one export: the wanted one, and round-to-nearest, which it has to beat."""

import contextlib
import dataclasses
import json
import statistics
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from safetensors import safe_open

from converters.gguf_file import TensorSource, open_gguf, write_gguf
from edgeq import provenance
from edgeq.allocation import Plan
from edgeq.calibration import collect
from edgeq.calibration.collector import free_bytes
from edgeq.calibration.fisher import OutputMoments, TokenWeights, token_weights
from edgeq.calibration.moments import (
    LayerwiseMoments,
    MomentsSource,
    StoredMoments,
    groups_of_layers,
)
from edgeq.calibration.statistics import FloatArray, Statistics
from edgeq.console import Steps
from edgeq.errors import CalibrationError
from edgeq.evaluation import Summary, evaluate, store_reference
from edgeq.execution import Executor
from edgeq.layer_rounding import Importances, Rules
from edgeq.opening import Reference, Texts, UsedText
from edgeq.quantization import Quantized, layers_of, quantize_layers
from edgeq.quantizers import QUANTIZERS, Quantizer, make_quantizer
from edgeq.recipe import Recipe
from edgeq.workdir import WorkDirectory, file_sha256

if TYPE_CHECKING:
    from edgeq.layerwise import LayerwiseModel

_MARGIN = 0.85  # of rtn's divergence; a gain on the calibration's kinds of text is less on others
_MOMENTS_FRACTION = 0.25  # of free memory, for second moments that one pass collects
_OUTPUTS = "outputs/"  # before the names of second moments at outputs, in the file of gradients
_AGREES = 1e-3  # nats: ggml's float16 tables alone make 1e-5, another function 1e-1


class Roundings:
    """Makes roundings and compares them.

    Attributes
    ----------
    notes : sentences for the report
    verification : mean KL divergences on the tuning text, by method; empty: not compared
    """

    def __init__(
        self,
        recipe: Recipe,
        reference: Reference,
        plan: Plan,
        importances: Importances | None,
        weighed_by: str | None,
        work: WorkDirectory,
        executor: Executor,
        steps: Steps,
    ) -> None:
        self.recipe = recipe
        self.reference = reference
        self.plan = plan
        self.importances = importances
        self.weighed_by = weighed_by
        self.work = work
        self.executor = executor
        self.steps = steps
        self.notes: list[str] = []
        self.verification: dict[str, float] = {}
        self._model: LayerwiseModel | None = None

    def best(self, quantizer: Quantizer, texts: Texts) -> Quantized:
        """Quantize as the recipe says; if that is to be verified, return what is better.

        Raises
        ------
        EdgeqError, ConversionError
            A tensor cannot be quantized; without ``auto`` also: there are no second moments, or no
            gradients to tune with.
        """
        method = self.recipe.method
        teacher = self._teacher(texts)
        wanted = self.wanted(quantizer, texts)
        found = {method.quantizer: wanted}
        if teacher is not None and texts.calibration is not None and texts.tuning is not None:
            tuned = self._tuned(teacher, wanted, texts.calibration, texts.tuning)
            found[f"{method.quantizer}, tuned"] = tuned
        if not method.is_verified or texts.tuning is None:
            return list(found.values())[-1]
        found["rtn"] = self.nearest()
        return self._better(found, texts.tuning)

    def wanted(self, quantizer: Quantizer, texts: Texts) -> Quantized:
        """Quantize as the recipe says, scales not tuned and nothing verified."""
        method = self.recipe.method
        moments = None
        if texts.calibration is not None and (quantizer.uses_hessian or method.transforms):
            moments = self._moments(texts.calibration)
        transforms = method.transforms if moments is not None else ()
        rules = self._rules(quantizer, transforms, method.asymmetric)
        shapes = dataclasses.replace(method, tune_steps=0, is_verified=False)  # both come after
        about: dict[str, Any] = {
            "method": dataclasses.asdict(shapes),
            "source": type(moments).__name__,
            "keeps_grids": rules.keeps_grids,
        }
        if moments is not None and texts.calibration is not None:
            about["text"] = texts.calibration.manifest.sha256
            about["seed"] = self.recipe.texts.seed  # of the gradients
        return self._quantize("quantize", rules, moments, method.quantizer, about, "layers")

    def nearest(self) -> Quantized:
        """Round to nearest, which what is wanted has to beat."""
        rules = self._rules(make_quantizer("rtn"))
        about = {"keeps_grids": rules.keeps_grids}
        return self._quantize("verify", rules, None, "rtn", about, "layers-rtn")

    def _rules(
        self, quantizer: Quantizer, transforms: tuple[str, ...] = (), asymmetric: float = 0.0
    ) -> Rules:
        return Rules(
            quantizer,
            transforms,
            asymmetric,
            self.recipe.allow_requantize,
            self.recipe.n_threads,
            # rtn is llama.cpp's own, importances and all
            keeps_grids=self.recipe.method.quantizer != "rtn",
        )

    def judge(self, chosen: Quantized, text: UsedText) -> Summary:
        """Return what the file would do on a text."""
        with self.steps.step("verify"):
            return self._judged({"chosen": chosen}, text)["chosen"]

    def as_json(self, chosen: Quantized) -> dict[str, Any]:
        """Return what the report tells about the rounding that was shipped."""
        return {
            "method": dataclasses.asdict(self.recipe.method),
            "verification": self.verification,
            "tensors": chosen.facts,
            "folds": chosen.folds,
        }

    def _quantize(
        self,
        step: str,
        rules: Rules,
        moments: MomentsSource | None,
        quantizer: str,
        about: dict[str, Any],
        directory: str,
    ) -> Quantized:
        with self.steps.step(step) as progress:
            made_by = {
                **about,
                "reference": self.reference.sha256,
                "importances": self.weighed_by,
                "quantizer": quantizer,
                "versions": provenance.versions(QUANTIZERS.origin_of(quantizer)),
            }
            return quantize_layers(
                rules,
                self.reference,
                self.plan,
                self.importances,
                moments,
                made_by,
                directory,
                self.work,
                self.executor,
                progress,
            )

    # --- second moments --------------------------------------------------------------------------

    def _moments(self, text: UsedText) -> MomentsSource | None:
        """Return the moments of the torch model if it is the same function, else llama.cpp's."""
        method = self.recipe.method
        try:
            model = self._torch_model(text)
        except CalibrationError as error:
            self.notes.append(f"Second moments of the float model alone, from llama.cpp: {error}")
            return self._stored(text)
        weights, outputs = None, None
        if method.fisher > 0 or method.output_feedback:
            weights, outputs = self._gradients(model, text)
        with self.steps.step("moments"):
            return LayerwiseMoments(
                model,
                text.rows,
                weights=weights if method.fisher > 0 else None,
                strength=method.fisher,
                sequential=method.sequential,
                asymmetric=method.asymmetric > 0,
                outputs=outputs,
                directory=self.work.path,
            )

    def _torch_model(self, text: UsedText) -> "LayerwiseModel":
        """Return the float model in torch, if it computes what llama.cpp computes.

        Raises
        ------
        CalibrationError
            There is no torch, transformers does not know the model, or it is another function.
        """
        if self._model is not None:
            return self._model
        with self.steps.step("moments"):
            from edgeq.layerwise import LayerwiseModel, check_agrees

            reference = self.reference
            model = LayerwiseModel.open(
                reference.file, reference.checkpoint, n_threads=self.recipe.n_threads
            )
            divergence = check_agrees(model, reference.path, text.rows[0])
            if not divergence < _AGREES:
                raise CalibrationError(
                    f"{reference.path}: torch's logits are {divergence:.2g} nats from llama.cpp's, "
                    f"expected less than {_AGREES:g}; the torch model is another function."
                )
            self._model = model
            return model

    def _gradients(
        self, model: "LayerwiseModel", text: UsedText
    ) -> tuple[TokenWeights, Mapping[str, FloatArray]]:
        """Return token weights, and the second moments at outputs if they are asked for."""
        seed, method = self.recipe.texts.seed, self.recipe.method
        with self.steps.step("gradients") as progress:

            def make(out: Path) -> None:
                outputs = OutputMoments(self.work.path) if method.output_feedback else None
                found = token_weights(
                    model,
                    text.rows,
                    seed=seed,
                    n_groups=method.fisher_groups,
                    outputs=outputs,
                    progress=progress,
                )
                if outputs is not None:
                    found |= {_OUTPUTS + name: sums for name, sums in outputs.sums.items()}
                write_gguf(out, {}, [_source(name, array) for name, array in found.items()])

            path = self.work.artefact(
                "gradients.gguf",
                {
                    "reference": self.reference.sha256,
                    "text": text.manifest.sha256,
                    "seed": seed,
                    "groups": method.fisher_groups,
                    "outputs": method.output_feedback,
                    "versions": provenance.versions(),
                },
                make,
            )
        file = open_gguf(path)
        arrays = {name: file.read_float(name) for name in file.tensors}
        outputs = {n.removeprefix(_OUTPUTS): a for n, a in arrays.items() if n.startswith(_OUTPUTS)}
        return {n: a for n, a in arrays.items() if not n.startswith(_OUTPUTS)}, outputs

    def _stored(self, text: UsedText) -> MomentsSource | None:
        """Return llama.cpp's moments, of some layers at a time where memory is short."""
        layers = layers_of(self.plan, self.reference.file)
        shapes = {
            entry.name: entry.shape
            for key, entries in layers.items()
            if key.startswith("blk.")
            for entry in entries
        }
        groups = groups_of_layers(shapes, int(_MOMENTS_FRACTION * free_bytes(unknown=1 << 32)))

        def passed(names: Collection[str]) -> Statistics:
            with self.steps.step("moments") as progress:
                return collect(
                    self.reference.path,
                    text.rows,
                    hessians=names,
                    n_threads=self.recipe.n_threads,
                    progress=progress,
                    directory=self.work.path,
                )

        found = StoredMoments(passed, groups)
        try:
            for key in list(layers)[:1]:
                if key.startswith("blk."):
                    found.of_layer(int(key.removeprefix("blk.")))
        except CalibrationError as error:
            if not self.recipe.method.is_verified:
                raise
            self.notes.append(f"Rounded to nearest: {error}")
            return None
        return found

    # --- tuning ----------------------------------------------------------------------------------

    def _teacher(self, texts: Texts) -> "LayerwiseModel | None":
        """Return the float model to tune by; None where that is not asked for, or cannot be."""
        method, text, tuning = self.recipe.method, texts.calibration, texts.tuning
        if not method.tune_steps or text is None or tuning is None:
            return None
        try:
            model = self._torch_model(text)
        except CalibrationError as error:
            if not method.is_verified:
                raise
            self.notes.append(f"Scales are not tuned: {error}")
            return None
        from edgeq.tuning import check_memory

        check_memory(model, text.rows, tuning.rows)
        return model

    def _tuned(
        self, teacher: "LayerwiseModel", wanted: Quantized, text: UsedText, tuning: UsedText
    ) -> Quantized:
        """Return the same codes with tuned scales and norms."""
        method, reference = self.recipe.method, self.reference
        from edgeq.layerwise import LayerwiseModel, chosen_device, memory_of
        from edgeq.tuning import tune

        device = chosen_device()
        made_by = {
            "device": str(device),
            "wanted": _digests(wanted),
            "reference": reference.sha256,
            "steps": method.tune_steps,
            "seed": self.recipe.texts.seed,
            "text": text.manifest.sha256,
            "tuning": tuning.manifest.sha256,
            "versions": provenance.versions(),
        }
        with (
            self.steps.step("tune") as progress,
            self._candidate(wanted) as candidate,
            memory_of(device, "--tune"),
        ):
            if device.type != "cpu":  # second moments and gradients stay the CPU's, to the byte
                teacher = LayerwiseModel.open(reference.file, reference.checkpoint, device=device)
            path = self.work.artefact(
                "tune/tuned.safetensors",
                made_by,
                lambda out: tune(
                    teacher,
                    LayerwiseModel.open(open_gguf(candidate), reference.checkpoint, device=device),
                    text.rows,
                    tuning.rows,
                    out,
                    steps=method.tune_steps,
                    seed=self.recipe.texts.seed,
                    made_by=made_by,
                    work=self.work,
                    progress=progress,
                    frozen=frozenset(wanted.kept),
                ),
            )
        with safe_open(path, framework="numpy") as part:
            paths = {**wanted.paths, **dict.fromkeys(part.keys(), path)}
        return dataclasses.replace(wanted, paths=paths)

    # --- verification ----------------------------------------------------------------------------

    def _better(self, found: Mapping[str, Quantized], text: UsedText) -> Quantized:
        """Return what is closest to the reference on the tuning text, rtn unless it is far off."""

        def klds() -> dict[str, float]:
            judged = self._judged(found, text)
            return {label: _finite(summary.kld.value) for label, summary in judged.items()}

        with self.steps.step("verify"):
            path = self.work.artefact(
                "verification.json",
                {
                    "candidates": {label: _digests(one) for label, one in found.items()},
                    "reference": self.reference.sha256,
                    "text": text.manifest.sha256,
                    "versions": provenance.versions(),
                },
                lambda out: out.write_text(json.dumps(klds())),
            )
            self.verification = json.loads(path.read_text())
        kld_rtn = self.verification["rtn"]
        name = min(found.keys() - {"rtn"}, key=lambda label: self.verification[label])
        told = [f"{label} {kld:.5f} nats" for label, kld in self.verification.items()]
        compared = f"on {len(text.rows)} chunks of tuning text {', '.join(told)}"
        ratio = self.verification[name] / max(kld_rtn, 1e-30)
        if ratio < _MARGIN:
            losses = [
                float(fact["loss"]) / float(fact["loss_rtn"])
                for fact in found[name].facts.values()
                if fact.get("loss_rtn")
            ]
            median = f", layer loss ×{statistics.median(losses):.2f}" if losses else ""
            self.notes.append(f"Rounded by {name}: {compared} (×{ratio:.2f}){median}.")
            return found[name]
        self.notes.append(f"Rounded to nearest (rtn): {name} was not much better, {compared}.")
        return found["rtn"]

    @contextlib.contextmanager
    def _candidate(self, rounding: Quantized) -> Iterator[Path]:
        """Give the file that a rounding would make, for as long as the block runs."""
        candidate, file = self.work.path / "candidate.gguf", self.reference.file
        try:
            yield write_gguf(candidate, file.fields, rounding.sources(self.plan, file))[0]
        finally:
            candidate.unlink(missing_ok=True)

    def _judged(self, roundings: Mapping[str, Quantized], text: UsedText) -> dict[str, Summary]:
        """Return what the file that each rounding would make does on a text."""
        n_ctx, n_threads = text.rows.shape[1], self.recipe.n_threads
        stored = self.work.path / "tuning.kld"
        found = {}
        try:
            store_reference(
                self.reference.path,
                text.rows,
                stored,
                kind="base",
                n_ctx=n_ctx,
                n_threads=n_threads,
            )
            for name, rounding in roundings.items():
                with self._candidate(rounding) as path:
                    judged = evaluate(path, text.rows, stored, n_ctx=n_ctx, n_threads=n_threads)
                found[name] = judged.summary
        finally:
            stored.unlink(missing_ok=True)
        return found


def _finite(value: float) -> float:
    return value if np.isfinite(value) else float(np.finfo(np.float32).max)


def _digests(rounding: Quantized) -> dict[str, str]:
    paths: set[Path] = set(rounding.paths.values())
    return {path.name: file_sha256(path) for path in sorted(paths)}


def _source(name: str, array: FloatArray) -> TensorSource:
    return TensorSource(name, GGMLQuantizationType.F32, array.shape, lambda: array)
