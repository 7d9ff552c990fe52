"""What the commands beside ``export`` do: single steps of the walk, and looking at files."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from converters.architectures import described_architectures
from converters.checkpoint import open_checkpoint
from converters.convert import convert as convert_checkpoint
from converters.errors import ConversionError
from converters.gguf_file import open_gguf
from converters.hub import resolve_model
from converters.imatrix_file import write_imatrix
from edgeq import allocation, pipeline
from edgeq.console import Steps
from edgeq.differing import Outcome, Side
from edgeq.differing import diff as diff_files
from edgeq.errors import EvaluationError, RecipeError
from edgeq.evaluation import store_reference
from edgeq.evaluation.chunks import MIN_CTX
from edgeq.evaluation.store import stored_chunks
from edgeq.opening import (
    Reference,
    SourceChoice,
    UsedText,
    check_output,
    counting,
    open_reference,
    prepare_texts,
)
from edgeq.proving import (
    check_adapter,
    check_not_calibrated_on,
    measure_files,
    read_text,
    stored_text,
)
from edgeq.quantizers import QUANTIZERS
from edgeq.recipe import Recipe, TextChoice
from edgeq.registry import Plugin, unknown_name
from edgeq.results import Measured, Written
from edgeq.tasks import TASKS, Task, ask, read_tasks
from edgeq.transforms import ROTATIONS, write_key_folded, write_rotated
from edgeq.workdir import WorkDirectory


def convert(
    model: str,
    out: Path,
    *,
    ftype: str,
    split_max_bytes: int | None,
    allow_pickle: bool,
    pre: str | None,
    steps: Steps,
) -> Written:
    """Convert a checkpoint into a float or Q8_0 GGUF file.

    Raises
    ------
    ConversionError
        The model cannot be read or converted, or is a GGUF file already.
    """
    check_output(out, ())
    with steps.step("convert") as progress:
        path = resolve_model(model)
        if not path.is_dir():
            raise ConversionError(
                f"{path}: is a GGUF file already. Use edgeq export to quantize it, edgeq rotate to "
                "change its basis."
            )
        checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
        n_bytes = sum(tensor.n_bytes for tensor in checkpoint.tensors.values())
        paths = convert_checkpoint(
            checkpoint,
            out,
            ftype=ftype,
            pre=pre,
            split_max_bytes=split_max_bytes,
            progress=counting(progress, n_bytes),
        )
    return _written(paths, steps.seconds["convert"])


def rotate(
    model: str,
    out: Path,
    kinds: Sequence[str],
    texts: TextChoice,
    *,
    source: SourceChoice,
    steps: Steps,
    learn_steps: int = 0,
) -> Written:
    """Write a model in another basis, as F32.

    Parameters
    ----------
    kinds : of ``edgeq.transforms.ROTATIONS``, or ``keys``
    texts : what shows the keys how large they are; its seed is also that of the rotations
    learn_steps : of the descent from random rotations, see ``edgeq.transforms.write_rotated``

    Raises
    ------
    ConversionError
        The model cannot be read or converted, or the file not written.
    RecipeError
        It is quantized, or its architecture cannot be rotated so.
    CalibrationError
        The text is too short, or no text.
    """
    for kind in kinds:
        if kind not in (*ROTATIONS, "keys"):
            known = unknown_name("rotation", kind, [*ROTATIONS, "keys"])
            raise RecipeError(f"--kind: {known}")
    has_keys, turns = "keys" in kinds, [kind for kind in kinds if kind != "keys"]
    if learn_steps and not turns:
        raise RecipeError("--learn: scales of keys are not learned. Add --kind values or residual.")
    check_output(out, (model, *(texts.files if has_keys else ())))
    facts: dict[str, Any] = {}
    with WorkDirectory(source.work) as work, tempfile.TemporaryDirectory(dir=work.path) as scratch:
        reference = open_reference(model, source, work, steps)
        file = reference.file
        if has_keys:
            rows = _calibration_text(texts, reference, work, steps, source.n_threads).rows
            scaled = Path(scratch) / "keys.gguf" if turns else out
            with steps.step("keys"):
                errors = write_key_folded(file, scaled, rows, n_threads=source.n_threads)
            file = open_gguf(scaled)
            facts = {"key_error": round(float(np.mean(errors)), 4), "key_layers": len(errors)}
        if turns:
            with steps.step("rotate"):
                ratio = write_rotated(file, out, turns, seed=texts.seed, learn_steps=learn_steps)
            if learn_steps:
                facts["learned_error"] = round(ratio, 4)
    return _written((out,), sum(steps.seconds.get(step, 0.0) for step in ("keys", "rotate")), facts)


def _written(
    paths: Sequence[Path], seconds: float, facts: Mapping[str, Any] = MappingProxyType({})
) -> Written:
    file = open_gguf(paths[0])
    figures = {
        "architecture": file.architecture,
        "tensors": len(file.tensors),
        "parameters": file.n_parameters,
        "bytes": file.size_bytes,
        "seconds": round(seconds, 2),
    }
    return Written(tuple(paths), {**figures, **facts})


def calibrate(
    model: str,
    out: Path,
    texts: TextChoice,
    *,
    process_output: bool,
    source: SourceChoice,
    steps: Steps,
) -> Written:
    """Write the importance matrix of a model on a text."""
    check_output(out, (model, *texts.files))
    with WorkDirectory(source.work) as work:
        reference = open_reference(model, source, work, steps)
        text = _calibration_text(texts, reference, work, steps, source.n_threads)
        imatrix = pipeline.calibrate(
            reference,
            text,
            work,
            steps,
            process_output=process_output,
            n_threads=source.n_threads,
        )
    write_imatrix(out, imatrix)
    unseen = imatrix.unseen()
    notes = (f"Never reached: {', '.join(unseen)}",) if unseen else ()
    figures = {
        "entries": len(imatrix.sums),
        "chunks": imatrix.chunk_count,
        "tokens": text.rows.size,
        "seconds": round(steps.seconds["calibrate"], 2),
    }
    return Written((out,), figures, notes)


def _calibration_text(
    texts: TextChoice,
    reference: Reference,
    work: WorkDirectory,
    steps: Steps,
    n_threads: int | None,
) -> UsedText:
    text = prepare_texts(
        texts, reference, work, steps, calibrates=True, evaluates=False, n_threads=n_threads
    ).calibration
    if text is None:
        raise RecipeError("calibrate: no text was prepared. Give --text FILE.")
    return text


def write_plan(recipe: Recipe, out: Path, tensor_type_file: Path | None, steps: Steps) -> Written:
    """Write which type every tensor gets, and optionally the file for stock llama-quantize."""
    for path in (out, tensor_type_file):
        if path is not None:
            check_output(path, (recipe.model, recipe.imatrix, *recipe.texts.files))
    planned = pipeline.plan(recipe, steps)
    plan = planned.plan
    plan.write(out)
    written = [out]
    if tensor_type_file is not None:
        allocation.write_tensor_type_file(plan, tensor_type_file)
        written.append(tensor_type_file)
    fallbacks = [entry for entry in plan.entries if entry.is_fallback]
    notes = tuple(f"{e.name}: {e.reason}; {e.qtype.name} instead" for e in fallbacks)
    figures = {"tensors": len(plan.entries), "bytes": plan.size_bytes, "bpw": round(plan.bpw, 4)}
    return Written(tuple(written), {**figures, **planned.facts}, (*planned.notes, *notes))


def evaluate(
    files: Sequence[Path],
    reference: str | None,
    texts: tuple[str, ...],
    *,
    n_ctx: int | None,
    chunks: int | None,
    force: bool,
    save_logits: Path | None,
    speed: bool,
    source: SourceChoice,
    steps: Steps,
    tasks: Sequence[str | Path] = (),
    task_items: int | None = None,
    lora: Path | None = None,
) -> Measured:
    """Measure files against a reference model, or against its stored logits.

    Parameters
    ----------
    reference : may be None where there are tasks and no texts
    tasks : also ask files these items, of files or suites; a stored reference answers none
    task_items : of each file and each part of a suite at most so many
    lora : an adapter that every file runs with, the reference not

    Raises
    ------
    EvaluationError
        The text does not fit, or a file was calibrated on it and that is not forced; or a file of
        tasks is broken.
    RecipeError
        The adapter is none, or of another base.
    """
    if n_ctx is not None and n_ctx < MIN_CTX:
        raise EvaluationError(f"--ctx: got {n_ctx}, expected {MIN_CTX} or more.")
    if chunks is not None and chunks < 1:
        raise EvaluationError(f"--chunks: got {chunks}, expected 1 or more.")
    if save_logits is not None:
        check_output(save_logits, (reference, *files, *texts))
    asked = read_tasks(tasks, task_items)  # before anything takes time
    if lora is not None:
        check_adapter(lora, files)
    calibrated = [*files, *([] if lora is None else [lora])]
    measure = partial(
        measure_files,
        [(path, lora) for path in files],
        chunks=chunks,
        speed=speed,
        n_threads=source.n_threads,
        steps=steps,
    )
    if reference is None:
        return _with_tasks(measure(None, None, n_ctx=n_ctx), asked, None, lora, source, steps)
    stored = Path(reference)
    if stored.is_file() and (rows := stored_chunks(stored)) is not None:
        if save_logits is not None:
            raise EvaluationError(f"{stored}: holds logits already; leave --save-logits out.")
        if asked:
            raise EvaluationError(
                f"{stored}: holds logits, which answer no tasks; expected a model. Give the float "
                "model, or ask --tasks in a run without --reference."
            )
        part = stored_text(files[0], rows[:chunks], stored)
        names = " + ".join(texts or (reference,))
        notes = check_not_calibrated_on(calibrated, part, names, force=force)
        text = read_text(files[0], texts, rows.shape[1], chunks).rows if texts else None
        return measure(stored, text, notes, n_ctx=n_ctx)
    if not texts and (save_logits is not None or not asked):
        raise EvaluationError("evaluate: no text. Give --text FILE, one or several.")
    with WorkDirectory(source.work) as work:
        opened = open_reference(reference, source, work, steps)
        if not texts:
            measured = measure(None, None, n_ctx=n_ctx)
            return _with_tasks(measured, asked, opened.path, lora, source, steps)
        n_ctx = n_ctx or TextChoice().n_ctx
        part = read_text(opened.path, texts, n_ctx, chunks)
        notes = check_not_calibrated_on(calibrated, part, " + ".join(texts), force=force)
        judge = opened.path
        if save_logits is not None:
            with steps.step("store") as progress:
                store_reference(
                    judge,
                    part.rows,
                    save_logits,
                    kind="base" if save_logits.suffix == ".kld" else "compact",
                    n_ctx=n_ctx,
                    n_threads=source.n_threads,
                    progress=progress,
                )
            judge = save_logits
        measured = measure(judge, part.rows, notes, n_ctx=n_ctx)
        return _with_tasks(measured, asked, opened.path, lora, source, steps)


def _with_tasks(
    measured: Measured,
    tasks: Sequence[Task],
    reference: Path | None,
    lora: Path | None,
    source: SourceChoice,
    steps: Steps,
) -> Measured:
    if not tasks:
        return measured
    files = {file.label: file.path for file in measured.files}
    found = ask(files, tasks, reference, lora, n_threads=source.n_threads, steps=steps)
    return replace(measured, tasks=found)


def diff(
    file: Path,
    other: Path | None,
    prompts: Path,
    *,
    caches: Sequence[str],
    n_tokens: int,
    refusals: Path | None,
    chat: bool,
    n_search: int,
    seed: int,
    screens: bool,
    reference: str | None,
    source: SourceChoice,
    steps: Steps,
) -> Outcome:
    """Compare what two files, or one with several KV caches, write after prompts.

    Parameters
    ----------
    other : None: `file` itself
    caches : KV caches that the other file has; none: f16
    screens : also compare the other file's weights with those of `reference`

    Raises
    ------
    EvaluationError
        There is nothing to compare, or what is given cannot be.
    """
    if screens != (reference is not None):
        raise EvaluationError(
            "--screen: no float source to compare weights with. Give --reference MODEL."
            if screens
            else "--reference: is for --screen, which is not there. Give both or neither."
        )
    second = file if other is None else other
    sides = [Side(second, cache) for cache in dict.fromkeys(caches)]
    if not sides and (other is not None or not screens):
        sides = [Side(second)]
    with WorkDirectory(source.work) as work:
        judge = None if reference is None else open_reference(reference, source, work, steps).path
        return diff_files(
            [Side(file), *sides],
            prompts,
            n_tokens=n_tokens,
            refusals=refusals,
            chat=chat,
            n_search=n_search,
            reference=judge,
            screened=second if screens else None,
            seed=seed,
            n_threads=source.n_threads,
            steps=steps,
        )


def plugins() -> dict[str, list[Plugin]]:
    """Return what is installed, by kind."""
    architectures = {one.architecture.classes: one for one in described_architectures().values()}
    return {
        "quantizer": list(QUANTIZERS.plugins.values()),
        "allocator": list(allocation.ALLOCATORS.plugins.values()),
        "architecture": [
            Plugin(one.architecture.name, ", ".join(classes), one.origin)
            for classes, one in sorted(architectures.items(), key=lambda i: i[1].architecture.name)
        ],
        "task": list(TASKS.plugins.values()),
    }
