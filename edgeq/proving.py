"""The last step of the walk: files judged against the reference, and timed, through llama.cpp."""

import json
from collections.abc import Sequence
from pathlib import Path

from converters.gguf_file import open_gguf
from edgeq import allocation, provenance
from edgeq.allocation import Plan
from edgeq.console import Progress, Steps
from edgeq.evaluation import Evaluation, evaluate, measure_speeds
from edgeq.opening import Reference, UsedText
from edgeq.provenance import Seen
from edgeq.quantization import Importances
from edgeq.recipe import Recipe
from edgeq.results import FileResult
from edgeq.runtime.presets import MixOptions, quantize_with_llama_cpp
from edgeq.workdir import WorkDirectory


def prove(
    recipe: Recipe,
    reference: Reference,
    plan: Plan,
    seen: Seen,
    paths: Sequence[Path],
    work: WorkDirectory,
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
    return _measure(files, reference, text, work, steps, recipe.n_threads)


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
    steps: Steps,
    n_threads: int | None,
) -> tuple[FileResult, ...]:
    """Judge files against the reference on a text, and time all of them in one interleaved run."""
    evaluations = {}
    for number, (label, path) in enumerate(files.items()):
        with steps.step("evaluate") as progress:

            def judge(out: Path, path: Path = path, progress: Progress = progress) -> None:
                found = evaluate(
                    path,
                    text.rows,
                    reference.path,
                    n_ctx=text.rows.shape[1],
                    n_threads=n_threads,
                    progress=progress,
                )
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
        speeds = measure_speeds(timed, n_threads=n_threads, progress=progress)
    rows = [
        FileResult(label, path, *size_of(path), evaluations[label], timing)
        for (label, path), timing in zip(files.items(), speeds, strict=False)
    ]
    rows.append(
        FileResult("float reference", reference.path, *size_of(reference.path), None, speeds[-1])
    )
    return tuple(rows)


def size_of(path: Path) -> tuple[int, float]:
    """Return the bytes of a GGUF file, all its parts together, and its bits per weight."""
    file = open_gguf(path)
    return file.size_bytes, 8 * file.size_bytes / file.n_parameters


def _unmeasured(label: str, path: Path) -> FileResult:
    return FileResult(label, path, *size_of(path), None, None)
