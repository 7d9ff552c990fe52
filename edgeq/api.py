"""edgeq from Python: the commands as functions, with typed results and nothing printed.

``import edgeq`` gives them as ``edgeq.export`` and so on, and imports this module at the first use.
Settings have the names of the command line's options; messages name these options too.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from edgeq import commands, gate, pipeline
from edgeq.console import Steps
from edgeq.criteria import Limits
from edgeq.errors import EvaluationError
from edgeq.gate import Outcome
from edgeq.in_memory import Savable, on_disk
from edgeq.opening import SourceChoice
from edgeq.recipe import AUTO_TEXT, DEFAULT_COSTS, DEFAULT_PRESET, Recipe, Target, TextChoice
from edgeq.results import Measured, Report, Written

__all__ = ["check", "evaluate", "export", "plan"]

File = str | os.PathLike[str]
"""A path; of a text also ``FILE@WEIGHT``, of a model also a hub id."""

for _name in ("edgeq", "converters"):  # warnings go where the program wants them, not to stderr
    logging.getLogger(_name).addHandler(logging.NullHandler())


def export(
    model: File | Savable,
    out: File,
    *,
    tokenizer: Savable | None = None,
    preset: str = DEFAULT_PRESET,
    plan: File | None = None,
    size_bytes: int | None = None,
    bpw: float | None = None,
    max_kld: float | None = None,
    max_ppl_ratio: float | None = None,
    min_tps: float | None = None,
    allocator: str = "knapsack",
    costs: str = DEFAULT_COSTS,
    speeds: File | None = None,
    types: Sequence[str] | None = None,
    quantizer: str = "auto",
    effort: str = "default",
    transform: str = "auto",
    fisher: float | None = None,
    fisher_groups: int = 1,
    output_feedback: bool | None = None,
    sequential: bool = True,
    asymmetric: float = 0.0,
    tune_steps: int | None = None,
    imatrix: File | None = None,
    use_imatrix: bool = True,
    texts: File | Sequence[File] = AUTO_TEXT,
    eval_texts: File | Sequence[File] = (),
    n_ctx: int = 512,
    chunks: int | None = None,
    eval_chunks: int = 16,
    seed: int = 0,
    force: bool = False,
    work: File | None = None,
    n_threads: int | None = None,
    jobs: int = 1,
    cluster: str | None = None,
    cluster_data: str = "files",
    split_max_bytes: int | None = None,
    allow_requantize: bool = False,
    allow_pickle: bool = False,
    prove: bool = True,
    baseline: bool = False,
    modelfile: bool = False,
    sign: File | None = None,
) -> Report:
    """Quantize a model into a GGUF file and prove it: ``edgeq export``.

    Parameters
    ----------
    model : checkpoint's directory, hub id, float GGUF; or a transformers model in memory, which is
        saved to a temporary directory first
    out : the GGUF file to write
    tokenizer : of a model in memory, and only of such a one
    preset : llama.cpp file type, ``--type``
    plan : follow this ``plan.json`` instead
    size_bytes, bpw, max_kld, max_ppl_ratio, min_tps : what the file has to be, instead of `preset`
    allocator, costs, speeds, types : who chooses types for that, by what, and among which
    quantizer, effort, transform, fisher, fisher_groups, output_feedback, sequential, asymmetric,
    tune_steps : how tensors are rounded, see ``edgeq.recipe.Recipe``
    imatrix : use this importance matrix; do not calibrate
    use_imatrix : False rounds without any calibration
    texts : calibration text, ``FILE`` or ``FILE@WEIGHT``; ``auto``: the model writes it
    eval_texts : text to judge on; empty: a part held out of `texts`
    n_ctx, chunks, eval_chunks, seed, force : see ``edgeq.recipe.TextChoice``
    work : directory of intermediate results; default: beside `out`
    n_threads : default: every CPU of this process
    jobs, cluster, cluster_data : who shares the work, see ``edgeq.recipe.Recipe``; with several
        jobs a script needs ``if __name__ == "__main__":``
    split_max_bytes : write parts of at most so many bytes
    allow_requantize, allow_pickle : accept a quantized GGUF, ``pytorch_model*.bin``
    prove : measure the file against the reference
    baseline : measure llama.cpp's own quantizer beside it
    modelfile : write Ollama's ``Modelfile`` beside `out`
    sign : sign the file with this Ed25519 private key, PEM

    Returns
    -------
    What ``report.json`` holds; the file itself first in ``files``.

    Raises
    ------
    EdgeqError, ConversionError
        Whatever the caller can mend; an existing output is then untouched.
    """
    with on_disk(model, tokenizer, Path(out)) as (path, label):
        recipe = Recipe(
            model=path,
            label=label,
            out=Path(out),
            preset=preset,
            plan=_path(plan),
            target=Target(size_bytes, bpw, max_kld, max_ppl_ratio, min_tps),
            allocator=allocator,
            costs=costs,
            speeds=_path(speeds),
            types=None if types is None else ",".join(_strings(types)),
            quantizer=quantizer,
            effort=effort,
            fisher=fisher,
            fisher_groups=fisher_groups,
            output_feedback=output_feedback,
            sequential=sequential,
            asymmetric=asymmetric,
            transform=transform,
            tune_steps=tune_steps,
            imatrix=_path(imatrix),
            use_imatrix=use_imatrix,
            texts=TextChoice(
                _strings(texts), _strings(eval_texts), n_ctx, chunks, eval_chunks, seed, force
            ),
            work=_path(work),
            n_threads=n_threads,
            jobs=jobs,
            cluster=cluster,
            cluster_data=cluster_data,
            split_max_bytes=split_max_bytes,
            allow_requantize=allow_requantize,
            allow_pickle=allow_pickle,
            prove=prove,
            baseline=baseline,
            modelfile=modelfile,
            sign=_path(sign),
        )
        return pipeline.export(recipe, Steps(bars=False))


def plan(
    model: File,
    out: File,
    *,
    preset: str = DEFAULT_PRESET,
    size_bytes: int | None = None,
    bpw: float | None = None,
    max_kld: float | None = None,
    max_ppl_ratio: float | None = None,
    min_tps: float | None = None,
    allocator: str = "knapsack",
    costs: str = DEFAULT_COSTS,
    speeds: File | None = None,
    types: Sequence[str] | None = None,
    quantizer: str = "auto",
    effort: str = "default",
    transform: str = "auto",
    fisher: float | None = None,
    output_feedback: bool | None = None,
    tune_steps: int | None = None,
    imatrix: File | None = None,
    use_imatrix: bool = True,
    texts: File | Sequence[File] = AUTO_TEXT,
    n_ctx: int = 512,
    chunks: int | None = None,
    seed: int = 0,
    force: bool = False,
    work: File | None = None,
    n_threads: int | None = None,
    jobs: int = 1,
    cluster: str | None = None,
    cluster_data: str = "files",
    allow_requantize: bool = False,
    allow_pickle: bool = False,
    tensor_type_file: File | None = None,
) -> Written:
    """Write the type of every tensor into a ``plan.json``: ``edgeq plan``.

    Parameters
    ----------
    model : checkpoint's directory, hub id or float GGUF
    out : the ``plan.json`` to write; ``edgeq.allocation.read_plan`` reads it
    tensor_type_file : also write the types for stock llama-quantize
    preset, size_bytes, and so on : see ``export``

    Returns
    -------
    The files that were written, and figures about them.

    Raises
    ------
    EdgeqError, ConversionError
        Whatever the caller can mend.
    """
    recipe = Recipe(
        model=os.fspath(model),
        out=Path(out).with_suffix(".gguf"),
        preset=preset,
        target=Target(size_bytes, bpw, max_kld, max_ppl_ratio, min_tps),
        allocator=allocator,
        costs=costs,
        speeds=_path(speeds),
        types=None if types is None else ",".join(_strings(types)),
        quantizer=quantizer,
        effort=effort,
        transform=transform,
        fisher=fisher,
        output_feedback=output_feedback,
        tune_steps=tune_steps,
        imatrix=_path(imatrix),
        use_imatrix=use_imatrix,
        texts=TextChoice(_strings(texts), n_ctx=n_ctx, chunks=chunks, seed=seed, force=force),
        work=_path(work),
        n_threads=n_threads,
        jobs=jobs,
        cluster=cluster,
        cluster_data=cluster_data,
        allow_requantize=allow_requantize,
        allow_pickle=allow_pickle,
        prove=False,
    )
    return commands.write_plan(recipe, Path(out), _path(tensor_type_file), Steps(bars=False))


def evaluate(
    files: File | Sequence[File],
    reference: File | None = None,
    *,
    texts: File | Sequence[File] = (),
    tasks: File | Sequence[File] = (),
    task_items: int | None = None,
    n_ctx: int | None = None,
    chunks: int | None = None,
    force: bool = False,
    save_logits: File | None = None,
    lora: File | None = None,
    speed: bool = True,
    work: File | None = None,
    n_threads: int | None = None,
    allow_requantize: bool = False,
    allow_pickle: bool = False,
) -> Measured:
    """Measure GGUF files against the float model they were made from: ``edgeq evaluate``.

    Parameters
    ----------
    files : one or several, which are then compared in pairs with the first
    reference : float model, or a stored file of its logits; None where tasks are all there is
    texts : to judge on
    tasks : files of questions, or names of suites like "kick"; `task_items` of each at most
    n_ctx : tokens of one chunk; default 512, or a stored reference's
    chunks : judge on at most so many
    force : accept text that calibration has seen
    save_logits : store the reference's logits: ``*.kld`` (llama.cpp's format), else compact
    lora : a LoRA adapter that every file runs with
    speed : measure tokens/s too
    work : directory of intermediate results; default: beside the first file
    n_threads, allow_requantize, allow_pickle : see ``export``

    Raises
    ------
    EdgeqError, ConversionError
        Whatever the caller can mend.
    """
    paths = [Path(file) for file in _strings(files)]
    asked = _strings(tasks)
    if not paths:
        raise EvaluationError("evaluate: no files, expected one or several. Name a GGUF file.")
    if reference is None and (not asked or _strings(texts) or save_logits is not None):
        raise EvaluationError(
            "evaluate: no reference, expected the float model or its stored logits. Only tasks can "
            "do without; give one."
        )
    if task_items is not None and not asked:
        raise EvaluationError("--task-items: no tasks. Give files of tasks, one or several.")
    return commands.evaluate(
        paths,
        None if reference is None else os.fspath(reference),
        _strings(texts),
        n_ctx=n_ctx,
        chunks=chunks,
        force=force,
        save_logits=_path(save_logits),
        speed=speed,
        source=_source(paths[0], work, n_threads, allow_requantize, allow_pickle),
        steps=Steps(bars=False),
        tasks=asked,
        task_items=task_items,
        lora=_path(lora),
    )


def check(
    file: File,
    against: File,
    *,
    max_kld_increase: float | None = None,
    max_flips: float | None = None,
    min_tps_ratio: float | None = None,
    reference: File | None = None,
    texts: File | Sequence[File] = (),
    force: bool = False,
    json_out: File | None = None,
    junit_out: File | None = None,
    work: File | None = None,
    n_threads: int | None = None,
    allow_requantize: bool = False,
    allow_pickle: bool = False,
) -> Outcome:
    """Say whether a file is worse than an earlier one: ``edgeq check``.

    A failed criterion is no exception: see ``passed`` and ``failures`` of the outcome.

    Parameters
    ----------
    against : the ``report.json`` of the baseline
    max_kld_increase : share of the KL divergence; default 0.05
    max_flips : share of tokens; default 0.01
    min_tps_ratio : of decoded tokens/s; default 0.9 where that can be measured
    reference : float model or stored logits; default: the report's
    texts : default: what the report keeps
    json_out, junit_out : files to write
    force, work, n_threads, allow_requantize, allow_pickle : see ``evaluate``

    Raises
    ------
    EdgeqError, ConversionError
        Nothing can be compared.
    """
    limits = (max_kld_increase, max_flips, min_tps_ratio)
    return gate.check(
        Path(file),
        Path(against),
        reference=None if reference is None else os.fspath(reference),
        texts=_strings(texts),
        limits=Limits.parse(*(None if limit is None else str(limit) for limit in limits)),
        force=force,
        json_out=_path(json_out),
        junit_out=_path(junit_out),
        source=_source(Path(file), work, n_threads, allow_requantize, allow_pickle),
        steps=Steps(bars=False),
    )


def _path(file: File | None) -> Path | None:
    return None if file is None else Path(file)


def _strings(files: File | Sequence[File]) -> tuple[str, ...]:
    """Return one or several paths as text; a single text is one of them, not its characters."""
    if isinstance(files, str | os.PathLike):
        return (os.fspath(files),)
    return tuple(os.fspath(file) for file in files)


def _source(
    beside: Path,
    work: File | None,
    n_threads: int | None,
    allow_requantize: bool,
    allow_pickle: bool,
) -> SourceChoice:
    default = beside.parent / f"{beside.stem}.edgeq"
    return SourceChoice(_path(work) or default, allow_requantize, allow_pickle, n_threads)
