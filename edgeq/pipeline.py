"""The walk from a checkpoint to a proven GGUF file; the only place that knows the order of steps.

``export`` reads like the table in CONTRIBUTING.md. Every artefact is made through the work
directory, which reuses what still fits.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from converters.gguf_file import GgufFile, tensor_bytes, write_gguf
from converters.imatrix_file import Imatrix, check_matches, read_imatrix, write_imatrix
from edgeq import allocation, grids, provenance
from edgeq.allocation import Plan, Planned, make_allocator
from edgeq.calibration import collect
from edgeq.cluster import Cluster
from edgeq.console import Steps
from edgeq.costing import default_types, parse_types
from edgeq.errors import RecipeError
from edgeq.execution import Executor, Here, Processes
from edgeq.layer_rounding import Importances
from edgeq.measuring import Ground, Measurer
from edgeq.modelfile import check_modelfile, write_modelfile
from edgeq.opening import (
    AUTO_CHUNKS,
    Reference,
    SourceChoice,
    Texts,
    UsedText,
    check_output,
    counting,
    open_reference,
    prepare_texts,
    values_sha256,
)
from edgeq.planning import Planner
from edgeq.provenance import Seen
from edgeq.proving import prove
from edgeq.quantization import Quantized
from edgeq.quantizers import Quantizer, make_quantizer
from edgeq.recipe import Recipe
from edgeq.results import FileResult, Measured, Report
from edgeq.roundings import Roundings
from edgeq.runtime.presets import find_preset
from edgeq.seals import read_private_key, sealed
from edgeq.workdir import WorkDirectory, replacing

_DIVERGENCE_TRIES = 4
_CLOSE_ENOUGH = 0.85  # of the divergence that was asked for
_AIM = 0.95


def export(recipe: Recipe, steps: Steps) -> Report:
    """Run the whole walk.

    Raises
    ------
    EdgeqError, ConversionError
        Whatever the user can mend; an existing output is then untouched.
    """
    quantizer = make_quantizer(recipe.method.quantizer)
    if recipe.plan is None:
        find_preset(recipe.preset)
    with WorkDirectory(recipe.work_directory) as work, _executor(recipe, work) as executor:
        reference = _open(recipe, work, steps)
        _check_given(recipe, reference)
        seen = observe(recipe, reference, quantizer, work, steps)
        told = provenance.check_judging_text(recipe, reference, seen.texts, seen.imatrix)
        planned, rounding, layers = _quantized(
            recipe, reference, quantizer, seen, work, executor, steps
        )
        plan = layers.explained(planned.plan)
        made_by = provenance.describe(recipe, reference, seen.texts, planned, seen.weighed_by)
        name = str(recipe.imatrix or "imatrix.gguf")
        fields = provenance.fields(reference, plan, seen.imatrix, name, seen.texts, made_by)
        paths = _write(recipe, reference, plan, layers, fields, steps)
        if recipe.modelfile:
            write_modelfile(recipe.out)
        files = prove(recipe, reference, plan, seen, paths, work, executor, steps)
        notes = grids.notes(reference.file, plan, layers.facts)
        notes += provenance.notes(plan, seen.imatrix, seen.texts, work)
        told = (*told, *planned.notes, *rounding.notes, *notes)
        experts = {} if seen.imatrix is None else seen.imatrix.expert_counts
        about = rounding.as_json(layers), plan.as_json()["tensors"], experts
        report = Report(made_by, files, steps.seconds, told, *about)
        with replacing(work.path / "report.json") as temporary:
            temporary.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    return report


def _quantized(
    recipe: Recipe,
    reference: Reference,
    quantizer: Quantizer,
    seen: Seen,
    work: WorkDirectory,
    executor: Executor,
    steps: Steps,
) -> tuple[Planned, Roundings, Quantized]:
    """Plan and quantize; where a divergence is asked for, until the file itself has it.

    A plan is searched with weights rounded to nearest and exact inputs. The file is usually closer
    to the float model: the limit that the plan is searched with is moved by what it reached.
    """
    target, strictness = recipe.target, 1.0
    best: Planned | None = None
    for _ in range(_DIVERGENCE_TRIES):
        one = dataclasses.replace(recipe, target=target.scaled(strictness))
        planned = _plan(one, reference, seen, work, executor, steps)
        rounding = _rounding(recipe, reference, planned, seen, work, executor, steps)
        layers = rounding.best(quantizer, seen.texts)
        if not target.is_divergence or seen.texts.tuning is None:
            return planned, rounding, layers
        found = rounding.judge(layers, seen.texts.tuning)
        kld, ratio = found.kld.value, found.ppl_ratio.value
        share = target.share_of_divergence(kld, ratio)
        if share <= 1 and (best is None or planned.plan.size_bytes < best.plan.size_bytes):
            note = f"The file, on tuning text: {kld:.5f} nats, perplexity ratio {ratio:.4f}."
            best = dataclasses.replace(planned, notes=(*planned.notes, note))
        if _CLOSE_ENOUGH <= share <= 1:
            break
        strictness *= _AIM / max(share, 1e-3)
    if best is None:
        raise RecipeError(
            f"--max-kld, --max-ppl-ratio: the files of {_DIVERGENCE_TRIES} plans missed it, the "
            f"last {share:.2f} times. Ask for a little more, or give --size."
        )
    if best.plan is not planned.plan:  # later tries have written their layers over its own
        best.plan.write(work.path / "plan.json")
        rounding = _rounding(recipe, reference, best, seen, work, executor, steps)
        layers = rounding.best(quantizer, seen.texts)
    return best, rounding, layers


def _rounding(
    recipe: Recipe,
    reference: Reference,
    planned: Planned,
    seen: Seen,
    work: WorkDirectory,
    executor: Executor,
    steps: Steps,
) -> Roundings:
    return Roundings(
        recipe, reference, planned.plan, seen.importances, seen.weighed_by, work, executor, steps
    )


def _executor(recipe: Recipe, work: WorkDirectory) -> Executor:
    """Return where the recipe lets tasks run."""
    shared = work.path / "shared"
    if recipe.cluster is not None:
        return Cluster(recipe.cluster, shared, recipe.cluster_data)
    if recipe.jobs > 1:
        return Processes(recipe.jobs, shared, recipe.n_threads)
    return Here()


def export_sizes(recipe: Recipe, sizes: Sequence[int], steps: Steps) -> Measured:
    """Write a file for every size, ``NAME-BYTES.gguf``; what they share is made once.

    Raises
    ------
    EdgeqError, ConversionError
        As ``export``; files of smaller sizes are then there already.
    """
    if recipe.modelfile:
        raise RecipeError("--modelfile: is of one file. Give one --size, or leave it out.")
    rows: list[FileResult] = []
    notes: list[str] = []
    for size in sorted(sizes):
        one = dataclasses.replace(
            recipe,
            out=recipe.out.with_stem(f"{recipe.out.stem}-{size}"),
            target=dataclasses.replace(recipe.target, size_bytes=size),
            work=recipe.work_directory,
        )
        report = export(one, steps)
        rows = [row for row in rows if row.evaluation is not None or not recipe.prove]
        rows += [dataclasses.replace(row, label=f"{row.label}, {size:,}") for row in report.files]
        notes += report.notes
    return Measured(tuple(rows), steps.seconds, tuple(dict.fromkeys(notes)))


def plan(recipe: Recipe, steps: Steps) -> Planned:
    """Run the walk up to the plan.

    Raises
    ------
    EdgeqError, ConversionError
        Whatever the user can mend.
    """
    quantizer = make_quantizer(recipe.method.quantizer)
    with WorkDirectory(recipe.work_directory) as work, _executor(recipe, work) as executor:
        reference = _open(recipe, work, steps)
        if not recipe.target.is_set:
            has_imatrix = recipe.use_imatrix
            return Planned(_planned(recipe, reference, has_imatrix=has_imatrix))
        seen = observe(recipe, reference, quantizer, work, steps)
        return _plan(recipe, reference, seen, work, executor, steps)


def observe(
    recipe: Recipe, reference: Reference, quantizer: Quantizer, work: WorkDirectory, steps: Steps
) -> Seen:
    """Prepare the texts, and calibrate."""
    texts = texts_of(recipe, reference, quantizer, work, steps)
    imatrix = _imatrix(recipe, reference, texts, work, steps)
    importances = importances_of(imatrix, reference.file)
    weighed_by = None if importances is None else values_sha256(importances)
    return Seen(texts, imatrix, importances, weighed_by)


def _open(recipe: Recipe, work: WorkDirectory, steps: Steps) -> Reference:
    source = SourceChoice(work.path, recipe.allow_requantize, recipe.allow_pickle, recipe.n_threads)
    return open_reference(recipe.model, source, work, steps)


def _check_given(recipe: Recipe, reference: Reference) -> None:
    """Refuse at once, not after a calibration, what was given and does not fit the model."""
    read = (*reference.file.paths, recipe.imatrix, recipe.plan, *recipe.texts.files)
    check_output(recipe.out, read)
    if recipe.sign is not None:
        read_private_key(recipe.sign)
    if recipe.modelfile:
        check_modelfile(recipe.out)
    method = recipe.method
    quantizer = make_quantizer(method.quantizer)
    if method.output_feedback and not getattr(quantizer, "uses_outputs", False):
        raise RecipeError(
            f"--output-feedback: the quantizer {method.quantizer} does not feed errors back from "
            "row to row. Give --quantizer gptq, or leave it out."
        )
    if method.tune_steps and os.environ.get("EDGEQ_DEVICE"):
        from edgeq.layerwise import chosen_device

        chosen_device()
    imatrix = given_imatrix(recipe.imatrix, reference.file)
    if recipe.target.is_set:  # the types are not known yet
        make_allocator(recipe.allocator)
        _candidate_types(recipe)
        return
    plan = _planned(recipe, reference, has_imatrix=recipe.use_imatrix)
    if imatrix is not None or not recipe.use_imatrix:
        _check_importances(plan, reference, imatrix)


def texts_of(
    recipe: Recipe,
    reference: Reference,
    quantizer: Quantizer,
    work: WorkDirectory,
    steps: Steps,
) -> Texts:
    """Return the texts that a recipe needs."""
    method, allocates = recipe.method, recipe.target.is_set
    uses_tuning = method.is_verified or method.tune_steps > 0 or allocates
    uses_moments = (
        quantizer.uses_hessian or bool(method.transforms or method.tune_steps) or allocates
    )
    choice = recipe.texts
    if uses_moments and choice.chunks is None:
        n_chunks = recipe.budget.chunks
        if choice.is_auto:  # its text has to be written first
            n_chunks = min(n_chunks, AUTO_CHUNKS)
        choice = dataclasses.replace(choice, chunks=n_chunks)
    return prepare_texts(
        choice,
        reference,
        work,
        steps,
        calibrates=recipe.use_imatrix and (recipe.imatrix is None or uses_moments),
        evaluates=recipe.prove,
        tuning_chunks=recipe.budget.tuning_chunks if uses_tuning else 0,
        n_threads=recipe.n_threads,
    )


def _imatrix(
    recipe: Recipe, reference: Reference, texts: Texts, work: WorkDirectory, steps: Steps
) -> Imatrix | None:
    """Return the importance matrix that was given, or calibrate; None without one."""
    if texts.calibration is None or recipe.imatrix is not None:
        return given_imatrix(recipe.imatrix, reference.file)
    return calibrate(reference, texts.calibration, work, steps, n_threads=recipe.n_threads)


def given_imatrix(path: Path | None, file: GgufFile) -> Imatrix | None:
    """Read an imatrix and check that it is of the model; None: there is none."""
    if path is None:
        return None
    given = read_imatrix(path)
    check_matches(given, matrix_sizes(file), str(path))
    return given


def calibrate(
    reference: Reference,
    text: UsedText,
    work: WorkDirectory,
    steps: Steps,
    *,
    process_output: bool = False,
    n_threads: int | None = None,
) -> Imatrix:
    """Run the text through the reference and sum up the inputs of its weights."""
    with steps.step("calibrate") as progress:

        def observe(out: Path) -> None:
            found = collect(
                reference.path,
                text.rows,
                datasets=text.names,
                output_tensor=process_output,
                n_threads=n_threads,
                progress=progress,
            )
            write_imatrix(out, dataclasses.replace(found.imatrix, sketch=text.sketch))

        path = work.artefact(
            "imatrix.gguf",
            {
                "reference": reference.sha256,
                "text": text.manifest.sha256,
                "datasets": text.names,
                "process_output": process_output,
                "versions": provenance.versions(),
            },
            observe,
        )
        return read_imatrix(path)


def matrix_sizes(file: GgufFile) -> dict[str, tuple[int, int]]:
    """Return weight name to (n_in, n_mat) of every matrix of a model."""
    return {
        name: (tensor.shape[-1], 1 if len(tensor.shape) == 2 else tensor.shape[0])
        for name, tensor in file.tensors.items()
        if len(tensor.shape) in (2, 3)
    }


def importances_of(imatrix: Imatrix | None, file: GgufFile) -> Importances | None:
    """Return the mean squared inputs as llama-quantize computes them, (n_mat, n_in) a tensor."""
    if imatrix is None:
        return None
    return {
        name: imatrix.weights(name, file.tensors[name].shape[-1])
        for name in imatrix.sums
        if name in file.tensors
    }


def _plan(
    recipe: Recipe,
    reference: Reference,
    seen: Seen,
    work: WorkDirectory,
    executor: Executor,
    steps: Steps,
) -> Planned:
    """Read the plan that was given, or let the preset or an allocator decide; ``plan.json``."""
    if recipe.target.is_set:
        ground = Ground(
            reference,
            seen.importances,
            seen.weighed_by,
            recipe.costs_quantizer,
            seen.texts.calibration,
            seen.texts.tuning,
            _candidate_types(recipe),
            recipe.texts.seed,
            recipe.n_threads,
        )
        with Measurer(ground, work, executor, steps) as measurer:
            planner = Planner(measurer, recipe.costs, recipe.allocator, recipe.speeds)
            found = planner.plan(recipe.target)
    else:
        with steps.step("allocate"):
            has_imatrix = seen.imatrix is not None
            found = Planned(_planned(recipe, reference, has_imatrix=has_imatrix))
    _check_importances(found.plan, reference, seen.imatrix)
    found.plan.write(work.path / "plan.json")
    return found


def _candidate_types(recipe: Recipe) -> tuple[GGMLQuantizationType, ...]:
    if recipe.types is not None:
        return parse_types(recipe.types)
    return default_types(make_quantizer(recipe.method.quantizer))


def _planned(recipe: Recipe, reference: Reference, *, has_imatrix: bool) -> Plan:
    if recipe.plan is not None:
        return allocation.read_plan(recipe.plan, reference.file)
    return allocation.allocate(reference.file, recipe.preset, has_imatrix=has_imatrix)


def _check_importances(plan: Plan, reference: Reference, imatrix: Imatrix | None) -> None:
    known = imatrix.sums if imatrix is not None else {}
    plan.check_importances(reference.file, lambda name: name in known)


def _write(
    recipe: Recipe,
    reference: Reference,
    plan: Plan,
    layers: Quantized,
    fields: dict[str, Any],
    steps: Steps,
) -> list[Path]:
    with steps.step("write") as progress:
        sources = layers.sources(plan, reference.file)
        fields = sealed(fields, sources, recipe.sign)
        total = sum(tensor_bytes(entry.qtype, entry.shape) for entry in plan.entries)
        return write_gguf(
            recipe.out,
            fields,
            sources,
            split_max_bytes=recipe.split_max_bytes,
            progress=counting(progress, total),
        )
