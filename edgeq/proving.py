"""The last step of the walk: files judged against the reference, and timed, through llama.cpp.

Also the text that a file is judged on, and that its calibration has not seen it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converters.gguf_file import open_gguf
from edgeq import allocation, provenance
from edgeq.allocation import Plan
from edgeq.console import Progress, Steps
from edgeq.errors import EvaluationError, RecipeError
from edgeq.evaluation import Evaluation, evaluate, measure_speeds
from edgeq.evaluation.chunks import sequences_at_once
from edgeq.execution import Executor
from edgeq.layer_rounding import Importances
from edgeq.opening import Reference, UsedText
from edgeq.provenance import Seen
from edgeq.recipe import Recipe
from edgeq.results import FileResult, Measured
from edgeq.runtime.model import Model, Tokens
from edgeq.runtime.presets import MixOptions, quantize_with_llama_cpp
from edgeq.texts import Part, check_unused, make_part, prepare, read_sources
from edgeq.workdir import WorkDirectory


def prove(
    recipe: Recipe,
    reference: Reference,
    plan: Plan,
    seen: Seen,
    paths: Sequence[Path],
    work: WorkDirectory,
    executor: Executor,
    steps: Steps,
) -> tuple[FileResult, ...]:
    """Measure the output, and with ``--baseline`` llama.cpp's own file of the same types."""
    types = recipe.allocator if recipe.target.is_set else plan.preset
    files = {f"edgeq {recipe.quantizer} {types}": paths[0]}
    if recipe.baseline:
        with steps.step("baseline"):
            files[f"llama-quantize {types}"] = work.artefact(
                "baseline.gguf",
                {
                    "reference": reference.sha256,
                    "importances": seen.weighed_by,
                    "types": {name: qtype.name for name, qtype in plan.types.items()},
                    "versions": provenance.versions(),
                },
                lambda out: _baseline(recipe, reference, plan, seen.importances, out),
            )
    text = seen.texts.evaluation
    if not recipe.prove or text is None:
        return tuple(_unmeasured(label, path) for label, path in files.items())
    return _measure(files, reference, text, work, executor, steps, recipe.n_threads)


def _baseline(
    recipe: Recipe, reference: Reference, plan: Plan, importances: Importances | None, out: Path
) -> None:
    # overrides count only where the preset quantizes at all
    is_given = recipe.plan is not None or recipe.target.is_set
    options = MixOptions(overrides=allocation.overrides(plan)) if is_given else None
    quantize_with_llama_cpp(
        reference.file.path,
        out,
        "Q8_0" if is_given else plan.preset,
        importances,
        n_threads=recipe.n_threads,
        options=options,
        allow_requantize=recipe.allow_requantize,
    )


def _measure(
    files: dict[str, Path],
    reference: Reference,
    text: UsedText,
    work: WorkDirectory,
    executor: Executor,
    steps: Steps,
    n_threads: int | None,
) -> tuple[FileResult, ...]:
    """Judge files against the reference on a text, and time all of them in one interleaved run."""
    evaluations = {}
    for number, (label, path) in enumerate(files.items()):
        with steps.step("evaluate") as progress:

            def judge(out: Path, path: Path = path, progress: Progress = progress) -> None:
                found = _evaluated(path, text.rows, reference.path, executor, n_threads, progress)
                out.write_text(json.dumps(found.to_json()))

            stored = work.artefact(
                f"evaluation-{number}.json",
                {
                    "file": [str(path), open_gguf(path).sha256()],
                    "reference": [str(reference.path), reference.sha256],
                    "text": text.manifest.sha256,
                    "versions": provenance.versions(),
                },
                judge,
            )
            evaluations[label] = Evaluation.from_json(json.loads(stored.read_text()))
    timed = [*files.values(), reference.path]
    with steps.step("time") as progress:
        speeds = measure_speeds(timed, n_threads=n_threads, as_judged=True, progress=progress)
    rows = [
        FileResult(label, path, *size_of(path), evaluations[label], timing, _maker(label))
        for (label, path), timing in zip(files.items(), speeds, strict=False)
    ]
    path = reference.path
    rows.append(FileResult("float reference", path, *size_of(path), None, speeds[-1], "reference"))
    return tuple(rows)


def _evaluated(
    path: Path,
    rows: Tokens,
    reference: Path,
    executor: Executor,
    n_threads: int | None,
    progress: Progress,
) -> Evaluation:
    """Evaluate as ``evaluate`` does; where there are workers, each takes some of the chunks.

    A worker's chunks are whole batches of llama.cpp's, so that every number is the same.
    """
    n_chunks, n_ctx = rows.shape
    if executor.n_workers == 1 or not executor.has_files:
        return evaluate(path, rows, reference, n_ctx=n_ctx, n_threads=n_threads, progress=progress)
    batch = sequences_at_once(n_ctx)
    step = batch * math.ceil(n_chunks / (batch * executor.n_workers))
    parts = [
        _Evaluating(path, rows[first : first + step], reference, n_threads)
        for first in range(0, n_chunks, step)
    ]
    done = []
    for number, part in executor.each(_evaluate_part, parts):
        done.append((number, part))
        progress(len(done), len(parts))
    return Evaluation.joined([part for _, part in sorted(done, key=lambda one: one[0])])


@dataclass(frozen=True, eq=False)
class _Evaluating:
    """Some chunks of a text, (n_chunks, n_ctx) int32, on which a file is to be judged."""

    path: Path
    rows: Tokens
    reference: Path
    n_threads: int | None


def _evaluate_part(task: _Evaluating) -> Evaluation:
    n_ctx = task.rows.shape[1]
    return evaluate(task.path, task.rows, task.reference, n_ctx=n_ctx, n_threads=task.n_threads)


def measure_files(
    files: Sequence[tuple[Path, Path | None]],
    judge: Path | None,
    rows: Tokens | None,
    notes: tuple[str, ...] = (),
    *,
    n_ctx: int | None,
    chunks: int | None = None,
    speed: bool = True,
    n_threads: int | None,
    steps: Steps,
) -> Measured:
    """Judge files that anybody made, and time all of them in one interleaved run.

    Parameters
    ----------
    files : each with the LoRA adapter that it runs with, or None
    judge : float model or its stored logits; None: nothing is judged
    rows : (n_chunks, n_ctx) tokens; None: those of the stored logits
    notes : sentences for the report
    n_ctx, chunks : see ``edgeq.evaluation.evaluate``
    """
    names = [(path.name, adapter) for path, adapter in files]
    results = []
    for path, adapter in files:
        label = path.name if names.count((path.name, adapter)) == 1 else str(path)
        label += " + adapter" if adapter else ""
        n_bytes, bpw = size_of(path)
        total = n_bytes + (adapter.stat().st_size if adapter else 0)
        found = None
        if judge is not None:
            with steps.step(f"evaluate {label}") as progress:
                found = evaluate(
                    path,
                    rows,
                    judge,
                    n_ctx=n_ctx,
                    chunks=chunks,
                    n_threads=n_threads,
                    adapter=adapter,
                    progress=progress,
                )
        made = open_gguf(adapter or path).fields
        maker = "edgeq" if {"edgeq.recipe", "edgeq.base"} & made.keys() else None
        results.append(FileResult(label, path, total, bpw * total / n_bytes, found, None, maker))
    if speed:
        paths, adapters = zip(*files, strict=True)
        with steps.step("time") as progress:
            speeds = measure_speeds(
                paths, n_threads=n_threads, adapters=adapters, progress=progress
            )
        results = [replace(one, speed=each) for one, each in zip(results, speeds, strict=True)]
    return Measured(tuple(results), steps.seconds, notes)


def _maker(label: str) -> str:
    return label.split()[0]


def size_of(path: Path) -> tuple[int, float]:
    """Return the bytes of a GGUF file, all its parts together, and its bits per weight."""
    file = open_gguf(path)
    return file.size_bytes, 8 * file.size_bytes / file.n_parameters


def _unmeasured(label: str, path: Path) -> FileResult:
    return FileResult(label, path, *size_of(path), None, None, _maker(label))


def read_text(path: Path, texts: tuple[str, ...], n_ctx: int, limit: int | None) -> Part:
    """Read text files to judge on, as tokens of the model at `path`, at most `limit` chunks."""
    with Model(path, vocab_only=True) as model:
        sources = read_sources(path, texts)
        parts = prepare(
            model,
            sources,
            chunk=n_ctx,
            n_chunks={"evaluation": limit},
            shares={"evaluation": 1.0},
        )
    return parts["evaluation"]


def stored_text(path: Path, rows: Tokens, where: Path) -> Part:
    """Return chunks of tokens that `where` keeps as text for the model at `path`.

    Raises
    ------
    EvaluationError
        A token is outside the model's vocabulary.
    """
    with Model(path, vocab_only=True) as model:
        if rows.min() < 0 or rows.max() >= model.n_vocab:  # llama.cpp would end the process
            raise EvaluationError(
                f"{where}: has another vocabulary than {path}; got tokens {rows.min()} to "
                f"{rows.max()}, expected 0 to {model.n_vocab - 1}. Compare files of one model."
            )
        return make_part(model, "evaluation", rows)


def check_adapter(adapter: Path, files: Sequence[Path]) -> None:
    """Refuse what is no LoRA adapter, or one of another base, before anything is loaded.

    Adapters of ``edgeq compensate`` record their base's hash. Of others the architecture is
    compared, and llama.cpp refuses other shapes.

    Raises
    ------
    RecipeError
        A file cannot have it.
    ConversionError
        It is no GGUF file.
    """
    header = open_gguf(adapter)
    kind = header.value("adapter.type")
    if kind != "lora":
        raise RecipeError(
            f"{adapter}: adapter.type is {kind!r}, expected 'lora'. Give a LoRA adapter in GGUF."
        )
    try:
        base = dict(json.loads(str(header.value("edgeq.base", "{}"))))
    except (ValueError, TypeError):
        raise RecipeError(
            f"{adapter}: edgeq.base is damaged, expected the name and hash of a file. Make the "
            "adapter again."
        ) from None
    for path in files:
        file = open_gguf(path)
        if header.architecture != file.architecture:
            raise RecipeError(
                f"{adapter}: is for models of {header.architecture}, got {path} of "
                f"{file.architecture}. Give an adapter of this file."
            )
        if base and base.get("sha256") != file.sha256():
            raise RecipeError(
                f"{adapter}: was made for another base, {base.get('name')} of SHA-256 "
                f"{str(base.get('sha256'))[:12]}…, got {path}. Give the file that it was made for."
            )


def check_not_calibrated_on(
    files: Sequence[Path], part: Part, where: str, *, force: bool
) -> tuple[str, ...]:
    """Refuse text that a file says it was calibrated on; with `force`, return what to report."""
    notes = []
    for path in files:
        manifest = provenance.calibration_manifest(open_gguf(path))
        if manifest is not None:
            note = check_unused(manifest, part, where, error=EvaluationError, force=force)
            notes += [] if note is None else [f"Judged on calibration text: {note}."]
    return tuple(notes)
