"""The command line: flags become a recipe, a pipeline function runs it, its result is shown.

Exit codes: 0 done, 1 the user can mend it (one line on stderr), 2 usage. Anything else is a bug and
keeps its traceback. Heavy modules are imported inside the commands: ``edgeq --help`` is instant.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgeq.console import Steps
from edgeq.errors import EdgeqError
from edgeq.recipe import (
    AUTO_TEXT,
    DEFAULT_COSTS,
    DEFAULT_PRESET,
    Recipe,
    Target,
    TextChoice,
)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class _Bytes(click.ParamType[int]):
    """A size: ``2G`` (10^9, as llama-gguf-split), ``1.5GiB`` or plain bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?(?:iB)?)B?", str(value))
        if match is None or match[2] not in _UNITS:
            self.fail(f"{value!r} is not a size; write it like 2G, 500M or 1.5GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class _Sizes(click.ParamType[tuple[int, ...]]):
    """One size, or several with commas between."""

    name = "size,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(_Bytes().convert(one, param, ctx) for one in str(value).split(","))


class _Counts(click.ParamType[tuple[int, ...]]):
    """One whole number, or several with commas between."""

    name = "n,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", str(value)):
            self.fail(f"{value!r} is no list of numbers from 1; write it like 1,2", param, ctx)
        return tuple(int(one) for one in str(value).split(","))


Command = Callable[..., Any]
_PATH = click.Path(path_type=Path)


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


_running = _options(
    click.option("-v", "--verbose", count=True, help="Say what is done; twice: in detail."),
    click.option("--threads", type=click.IntRange(1), help="Default: every CPU."),
)
_common = _options(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."), _running
)
_input = _options(
    click.option("--allow-requantize", is_flag=True, help="Accept a quantized GGUF as source."),
    click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model*.bin (weights_only)."),
    click.option("--work", type=_PATH, help="Intermediate results. Default: beside the output."),
)
_texts = _options(
    click.option(
        "--text",
        "text",
        multiple=True,
        default=(AUTO_TEXT,),
        show_default=True,
        metavar="FILE",
        help="Calibration text: FILE or FILE@WEIGHT, .jsonl for conversations; repeatable. "
        "auto: the model writes it.",
    ),
    click.option("--ctx", "n_ctx", default=512, show_default=True, help="Tokens of one chunk."),
    click.option("--chunks", type=int, help="Calibrate on at most so many chunks."),
    click.option("--seed", default=0, show_default=True, help="Of sampled text and of the split."),
    click.option("--force", is_flag=True, help="Accept evaluation text that calibration has seen."),
)
_allocation = _options(
    click.option("--bpw", type=float, help="At most so many bits per weight, all tensors counted."),
    click.option("--max-kld", type=float, help="The smallest file of so little KL divergence."),
    click.option("--max-ppl-ratio", type=float, help="The smallest file of this perplexity ratio."),
    click.option("--min-tps", type=float, help="Decode at least so many tokens/s on this CPU."),
    click.option(
        "--allocator",
        default="knapsack",
        show_default=True,
        help="Of types, for a target: NAME[:key=value,...]; see edgeq plugins.",
    ),
    click.option(
        "--costs",
        default=DEFAULT_COSTS,
        show_default=True,
        help="Of types: weight, imatrix, hessian, relative, fisher, measured; or costs-*.json.",
    ),
    click.option(
        "--speeds", type=_PATH, help="Of edgeq bench --types: choose types for --min-tps by them."
    ),
    click.option("--types", metavar="TYPE,...", help="Types that tensors may get, like Q4_K,Q6_K."),
    click.option("--policy", type=_PATH, help="Apply a trained policy: --allocator ramp:policy=."),
)
_evaluation = _options(
    click.option(
        "--eval-text",
        multiple=True,
        metavar="FILE",
        help="Text to judge on. Default: a part of --text that calibration does not see.",
    ),
    click.option("--eval-chunks", default=16, show_default=True, help="Judge on so many chunks."),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edgeq")
def cli() -> None:
    """Export language models to GGUF files that stock llama.cpp runs, calibrated and proven."""


def _start(verbose: int) -> Steps:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for name in ("edgeq", "converters"):
        logging.getLogger(name).setLevel(level)
    return Steps()


def _show(as_json: bool, result: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(result, indent=1) if as_json else text)


def _text_choice(options: dict[str, Any]) -> TextChoice:
    return TextChoice(
        calibration=tuple(options["text"]),
        evaluation=tuple(options.get("eval_text", ())),
        n_ctx=options["n_ctx"],
        chunks=options["chunks"],
        evaluation_chunks=options.get("eval_chunks", 16),
        seed=options["seed"],
        force=options["force"],
    )


@cli.command()
@click.argument("model")
@click.argument("out", type=_PATH)
@click.option(
    "--type", "preset", default=DEFAULT_PRESET, show_default=True, help="llama.cpp file type."
)
@click.option("--plan", type=_PATH, help="Follow this plan.json instead of --type.")
@click.option("--size", "sizes", type=_Sizes(), help="At most so many bytes: 80MiB or 80MiB,1G.")
@_allocation
@click.option(
    "--quantizer",
    default="auto",
    show_default=True,
    help="auto, or NAME[:key=value,...]; see edgeq plugins.",
)
@click.option(
    "--effort",
    type=click.Choice(["fast", "default", "max"]),
    default="default",
    show_default=True,
    help="Of auto: about 4, 9 or 40 minutes per 100M parameters on two cores.",
)
@click.option(
    "--transform",
    type=click.Choice(["auto", "fold", "none"]),
    default="auto",
    show_default=True,
    help="Fold channel scales before rounding; auto: where the quantizer is auto.",
)
@click.option(
    "--fisher",
    type=float,
    help="How far to weigh second moments by squared gradients, 0 to 1 (default 0.5, fast 0).",
)
@click.option(
    "--fisher-groups",
    type=int,
    default=1,
    show_default=True,
    help="Groups of a weight's rows with squared gradients of their own.",
)
@click.option(
    "--sequential/--no-sequential",
    default=True,
    help="Calibrate each layer through the quantized layers before it.",
)
@click.option(
    "--asymmetric",
    type=float,
    default=0.0,
    show_default=True,
    help="Move weights to make up for the layers before, 0 to 1.",
)
@click.option(
    "--tune",
    "tune_steps",
    type=int,
    metavar="STEPS",
    help="Tune scales and norms by KL divergence (default 0, max 96).",
)
@click.option("--imatrix", type=_PATH, help="Use this importance matrix; do not calibrate.")
@click.option("--no-imatrix", is_flag=True, help="Round without any calibration.")
@click.option("--split-max-size", "split_max_bytes", type=_Bytes(), help="Write parts, like 2G.")
@click.option("--modelfile", is_flag=True, help="Write Ollama's Modelfile beside OUT.")
@click.option("--prove/--no-prove", default=True, help="Measure the file against the reference.")
@click.option("--baseline", is_flag=True, help="Measure llama.cpp's own quantizer beside it.")
@_texts
@_evaluation
@_input
@_common
def export(model: str, out: Path, as_json: bool, verbose: int, **options: Any) -> None:
    """Quantize MODEL into OUT and prove it.

    MODEL: a Hugging Face directory or hub id, or a float GGUF file.
    """
    from edgeq import pipeline

    recipe = Recipe(
        model=model,
        out=out,
        preset=options["preset"],
        plan=options["plan"],
        **_target(options, options["sizes"]),
        quantizer=options["quantizer"],
        effort=options["effort"],
        transform=options["transform"],
        fisher=options["fisher"],
        fisher_groups=options["fisher_groups"],
        sequential=options["sequential"],
        asymmetric=options["asymmetric"],
        tune_steps=options["tune_steps"],
        imatrix=options["imatrix"],
        use_imatrix=not options["no_imatrix"],
        texts=_text_choice(options),
        work=options["work"],
        n_threads=options["threads"],
        split_max_bytes=options["split_max_bytes"],
        allow_requantize=options["allow_requantize"],
        allow_pickle=options["allow_pickle"],
        prove=options["prove"],
        baseline=options["baseline"],
        modelfile=options["modelfile"],
    )
    steps = _start(verbose)
    result = (
        pipeline.export_sizes(recipe, options["sizes"], steps)
        if len(options["sizes"] or ()) > 1
        else pipeline.export(recipe, steps)
    )
    _show(as_json, result.as_json(), result.as_text())


def _target(options: dict[str, Any], sizes: tuple[int, ...] | None) -> dict[str, Any]:
    """Return the fields of a recipe that say what the file has to be, and who chooses types."""
    allocator = options["allocator"]
    if options["policy"] is not None:
        allocator = f"ramp:policy={options['policy']}"
    limits = ("bpw", "max_kld", "max_ppl_ratio", "min_tps")
    return {
        "target": Target(
            size_bytes=sizes[0] if sizes else None, **{name: options[name] for name in limits}
        ),
        "allocator": allocator,
        "costs": options["costs"],
        "speeds": options["speeds"],
        "types": options["types"],
    }


@cli.command()
@click.argument("model")
@click.argument("out", type=_PATH)
@click.option(
    "--type",
    "ftype",
    type=click.Choice(["auto", "f32", "f16", "bf16", "q8_0"]),
    default="auto",
    show_default=True,
    help="auto: the checkpoint's own 16-bit type.",
)
@click.option("--split-max-size", "split_max_bytes", type=_Bytes(), help="Write parts, like 2G.")
@click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model*.bin (weights_only).")
@click.option("--pre", help="Name of the pre-tokenizer, where it is not recognized.")
@_common
def convert(model: str, out: Path, as_json: bool, verbose: int, **options: Any) -> None:
    """Convert a checkpoint to a float GGUF.

    MODEL: a Hugging Face directory or hub id. OUT: the GGUF file.
    """
    from edgeq import commands

    result = commands.convert(
        model,
        out,
        ftype=options["ftype"],
        split_max_bytes=options["split_max_bytes"],
        allow_pickle=options["allow_pickle"],
        pre=options["pre"],
        steps=_start(verbose),
    )
    _show(as_json, result.as_json(), result.as_text())


@cli.command()
@click.argument("model")
@click.argument("out", type=_PATH)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    default=("values",),
    show_default=True,
    help="residual (R1), values (R2); repeatable.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the turns.")
@_input
@_common
def rotate(
    model: str, out: Path, kinds: tuple[str, ...], seed: int, as_json: bool, verbose: int,
    **options: Any,
) -> None:  # fmt: skip
    """Turn the basis of a float model.

    MODEL: a Hugging Face directory or float GGUF. OUT: a GGUF of the same function, in F32. The
    residual stream unties the output matrix from the embedding: the file grows by it.
    """
    from edgeq import commands

    source = _source_choice(options, out)
    result = commands.rotate(model, out, kinds, seed=seed, source=source, steps=_start(verbose))
    _show(as_json, result.as_json(), result.as_text())


@cli.command()
@click.argument("model")
@click.option("-o", "--out", type=_PATH, required=True, help="imatrix.gguf, or a legacy *.dat.")
@click.option("--process-output", is_flag=True, help="Collect for output.weight too.")
@_texts
@_input
@_common
def calibrate(model: str, out: Path, as_json: bool, verbose: int, **options: Any) -> None:
    """Write the importance matrix of MODEL.

    Runs text through the model; the file is the one that llama-imatrix writes and llama-quantize
    reads.
    """
    from edgeq import commands

    result = commands.calibrate(
        model,
        out,
        _text_choice(options),
        process_output=options["process_output"],
        source=_source_choice(options, out),
        steps=_start(verbose),
    )
    _show(as_json, result.as_json(), result.as_text())


def _source_choice(options: dict[str, Any], out: Path) -> Any:
    from edgeq.opening import SourceChoice

    return SourceChoice(
        work=options["work"] or out.parent / f"{out.stem}.edgeq",
        allow_requantize=options["allow_requantize"],
        allow_pickle=options["allow_pickle"],
        n_threads=options["threads"],
    )


@cli.command()
@click.argument("model")
@click.option("-o", "--out", type=_PATH, required=True, help="The plan.json to write.")
@click.option(
    "--type", "preset", default=DEFAULT_PRESET, show_default=True, help="llama.cpp file type."
)
@click.option("--size", type=_Bytes(), help="The file may have so many bytes, like 80MiB.")
@_allocation
@click.option(
    "--quantizer", default="auto", show_default=True, help="That will round; costs depend on it."
)
@click.option("--imatrix", type=_PATH, help="Use this importance matrix; do not calibrate.")
@click.option("--no-imatrix", is_flag=True, help="Plan for rounding without calibration.")
@click.option("--tensor-type-file", type=_PATH, help="Also write the types for llama-quantize.")
@_texts
@_input
@_common
def plan(model: str, out: Path, as_json: bool, verbose: int, **options: Any) -> None:
    """Write the type of every tensor.

    llama.cpp's own mix for a file type, or the best types for a target (--size, --max-kld, ...).
    export --plan accepts the plan back, edited or not.
    """
    from edgeq import commands

    recipe = Recipe(
        model=model,
        out=out.with_suffix(".gguf"),
        preset=options["preset"],
        **_target(options, None if options["size"] is None else (options["size"],)),
        quantizer=options["quantizer"],
        imatrix=options["imatrix"],
        use_imatrix=not options["no_imatrix"],
        texts=_text_choice(options),
        work=options["work"],
        n_threads=options["threads"],
        allow_requantize=options["allow_requantize"],
        allow_pickle=options["allow_pickle"],
        prove=False,
    )
    result = commands.write_plan(recipe, out, options["tensor_type_file"], _start(verbose))
    _show(as_json, result.as_json(), result.as_text())


@cli.command()
@click.argument("files", nargs=-1, required=True, type=_PATH, metavar="FILE...")
@click.option("--reference", help="Float MODEL, or a stored file of its logits.")
@click.option("--text", "eval_text", multiple=True, metavar="FILE", help="Text to judge on.")
@click.option(
    "--tasks",
    type=_PATH,
    multiple=True,
    metavar="FILE",
    help="Questions: HellaSwag as text; ARC, PIQA, LAMBADA, your own as JSONL; repeatable.",
)
@click.option("--task-items", type=click.IntRange(1), help="Ask so many items of each file.")
@click.option("--ctx", "n_ctx", type=int, help="Tokens of one chunk. Default: 512.")
@click.option("--chunks", "eval_chunks", type=int, help="Judge on at most so many chunks.")
@click.option("--force", is_flag=True, help="Accept text that calibration has seen.")
@click.option(
    "--save-logits",
    type=_PATH,
    help="Store the reference's logits: *.kld (llama.cpp's format), else compact.",
)
@click.option("--speed/--no-speed", default=True, help="Measure tokens/s too.")
@_input
@_common
def evaluate(files: tuple[Path, ...], as_json: bool, verbose: int, **options: Any) -> None:
    """Measure files against their reference.

    Perplexity, KL divergence and its percentiles, changes of the most likely token, tokens/s;
    answers to --tasks, which need no --text, and no --reference for accuracy alone.
    """
    from edgeq import commands

    alone = options["tasks"] and not (options["eval_text"] or options["save_logits"])
    if options["reference"] is None and not alone:
        raise click.UsageError("Missing option '--reference'. Only --tasks can do without.")
    if options["task_items"] is not None and not options["tasks"]:
        raise click.UsageError("--task-items: no tasks. Give --tasks FILE, one or several.")
    result = commands.evaluate(
        files,
        options["reference"],
        tuple(options["eval_text"]),
        n_ctx=options["n_ctx"],
        chunks=options["eval_chunks"],
        force=options["force"],
        save_logits=options["save_logits"],
        speed=options["speed"],
        source=_source_choice(options, files[0]),
        steps=_start(verbose),
        tasks=options["tasks"],
        task_items=options["task_items"],
    )
    _show(as_json, result.as_json(), result.as_text())


@cli.command()
@click.argument("file", type=_PATH, required=False)
@click.option("--types", "all_types", is_flag=True, help="Time products by type, not a file.")
@click.option("--type", "types", multiple=True, metavar="NAME", help="These types alone.")
@click.option("-o", "--out", type=_PATH, help="With --types: write speeds.json, for plan --speeds.")
@click.option(
    "--backend",
    type=click.Choice(["both", "llama", "kernels"]),
    default="both",
    show_default=True,
    help="llama.cpp, our kernels' decoder, or both in turn.",
)
@click.option("--threads", type=_Counts(), default="1", show_default=True, help="Like 1,2.")
@click.option("--tokens", type=_Counts(), help="With --types: tokens of a product. Default: 1.")
@click.option("--batches", type=_Counts(), help="Also time batches of so many tokens, like 2,4,8.")
@click.option("--prompt", "n_prompt", default=512, show_default=True, help="Tokens read together.")
@click.option("--gen", "n_gen", default=32, show_default=True, help="Tokens written one by one.")
@click.option("--repetitions", default=7, show_default=True, help="Of every measurement.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-v", "--verbose", count=True, help="Say what is done; twice: in detail.")
def bench(file: Path | None, as_json: bool, verbose: int, **options: Any) -> None:
    """Measure speed on this CPU.

    Tokens/s of FILE, or with --types the time of every type's product. llama.cpp and the project's
    own kernels are timed in turn; medians, with their spread.
    """
    from edgeq import benchmarks

    if (file is None) != (options["all_types"] or bool(options["types"])):
        raise click.UsageError("Give a FILE, or --types.")
    steps, repetitions = _start(verbose), options["repetitions"]
    if file is None:
        types = benchmarks.bench_types(
            options["types"],
            options["threads"],
            tokens=options["tokens"] or (1,),
            repetitions=repetitions,
            steps=steps,
        )
        if options["out"] is not None:
            benchmarks.write_speeds(types, options["out"])
        _show(as_json, types.as_json(), types.as_text())
        return
    backend = options["backend"]
    result = benchmarks.bench_file(
        file,
        ("llama", "kernels") if backend == "both" else (backend,),
        options["threads"],
        n_prompt=options["n_prompt"],
        n_gen=options["n_gen"],
        batches=options["batches"] or (),
        repetitions=repetitions,
        steps=steps,
    )
    _show(as_json, result.as_json(), result.as_text())


@cli.command()
@click.argument("file", type=_PATH)
@click.option("--against", type=_PATH, required=True, help="The report.json of the baseline.")
@click.option(
    "--max-kld-increase", metavar="5%", help="Of the KL divergence from the reference. Default: 5%."
)
@click.option("--max-flips", metavar="1%", help="Tokens more with another top. Default: 1%.")
@click.option(
    "--min-tps-ratio", metavar="0.9", help="Of decoded tokens/s. Default: 0.9 where measurable."
)
@click.option("--reference", help="Float MODEL or stored logits. Default: the report's.")
@click.option("--text", multiple=True, metavar="FILE", help="Default: what the report keeps.")
@click.option("--force", is_flag=True, help="Accept text that calibration has seen.")
@click.option(
    "--json",
    "as_json",
    type=_PATH,
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Write the result as JSON; without FILE, print it.",
)
@click.option("--junit", type=_PATH, metavar="FILE", help="Write the result as JUnit XML.")
@_input
@_running
def check(file: Path, against: Path, as_json: Path | None, verbose: int, **options: Any) -> None:
    """Fail if a file is worse than an earlier one.

    Compares FILE with the file of a report that evaluate --json or export wrote, on the same text
    against the same reference. Exit code 1 if a criterion failed beyond doubt.
    """
    from edgeq import gate
    from edgeq.criteria import Limits

    prints = as_json == Path("-")
    outcome = gate.check(
        file,
        against,
        reference=options["reference"],
        texts=tuple(options["text"]),
        limits=Limits.parse(
            options["max_kld_increase"], options["max_flips"], options["min_tps_ratio"]
        ),
        force=options["force"],
        json_out=None if prints else as_json,
        junit_out=options["junit"],
        source=_source_choice(options, file),
        steps=_start(verbose),
    )
    _show(prints, outcome.as_json(), outcome.as_text())
    if not outcome.passed:
        sys.exit(1)


@cli.command()
@click.argument("file", type=_PATH)
@click.argument("other", type=_PATH, required=False)
@click.option("--prompts", type=_PATH, required=True, help="One a line, or JSONL: prompt, class.")
@click.option("--n-tokens", type=click.IntRange(1), default=64, show_default=True, help="Written.")
@click.option("--cache", multiple=True, metavar="TYPE", help="KV cache: f16, q8_0, q4_0.")
@click.option("--chat", is_flag=True, help="Wrap prompts with the file's chat template.")
@click.option("--refusals", type=_PATH, metavar="FILE", help="Openings of refusals, one a line.")
@click.option("--search", type=click.IntRange(1), metavar="N", help="Try N mutated prompts too.")
@click.option("--seed", default=0, show_default=True, help="Of sampling and of the search.")
@click.option("--screen", is_flag=True, help="Look for tampered tensors; needs --reference.")
@click.option("--reference", help="With --screen: the float MODEL that the file was made from.")
@_input
@_common
def diff(file: Path, other: Path | None, as_json: bool, verbose: int, **options: Any) -> None:
    """Compare what two files write.

    Greedy and sampled texts of FILE and OTHER after the same prompts, and their divergence. With
    --cache, OTHER (or FILE itself) has that KV cache. --screen judges the weights of OTHER (or
    FILE); exit code 1 if a tensor stands out.
    """
    from edgeq import commands

    outcome = commands.diff(
        file,
        other,
        options["prompts"],
        caches=options["cache"],
        n_tokens=options["n_tokens"],
        refusals=options["refusals"],
        chat=options["chat"],
        n_search=options["search"] or 0,
        seed=options["seed"],
        screens=options["screen"],
        reference=options["reference"],
        source=_source_choice(options, file),
        steps=_start(verbose),
    )
    _show(as_json, outcome.as_json(), outcome.as_text())
    if outcome.stands_out:
        sys.exit(1)


@cli.command()
@click.argument("file", type=_PATH)
@click.option("--against", type=_PATH, help="Compare with this GGUF file, tensor by tensor.")
@click.option("--metadata/--no-metadata", default=False, help="Print every metadata field.")
@_common
def inspect(file: Path, as_json: bool, verbose: int, **options: Any) -> None:
    """Show what is in a GGUF file.

    Types, bytes, bpw and provenance, or how two files differ.
    """
    from edgeq import inspection

    _start(verbose)
    report = inspection.inspect(file, against=options["against"], metadata=options["metadata"])
    _show(as_json, report.as_json(), report.as_text())


@cli.command()
@_common
def plugins(as_json: bool, verbose: int, threads: int | None) -> None:
    """List what is installed, and by whom."""
    from edgeq import commands

    _start(verbose)
    found = commands.plugins()
    lines = [f"{kind:<14} {p.name:<16} {p.origin}" for kind, ps in found.items() for p in ps]
    _show(
        as_json,
        {kind: [vars(p) for p in ps] for kind, ps in found.items()},
        "\n".join(lines),
    )


@cli.command()
@click.argument("reports", nargs=-1, required=True, type=_PATH, metavar="REPORT...")
@click.option("-o", "--out", type=_PATH, help="The page to write; the card is else printed.")
@click.option("--markdown", is_flag=True, help="A model card for the Hugging Face hub instead.")
@_common
def report(reports: tuple[Path, ...], as_json: bool, verbose: int, **options: Any) -> None:
    """Make a page or a model card of reports.

    REPORT: report.json of export, or what evaluate --json and bench FILE --json printed. The page
    is one HTML file with every plot, which needs no network.
    """
    from edgeq import reporting

    out, is_card = options["out"], options["markdown"]
    if is_card and len(reports) > 1:
        raise click.UsageError("--markdown: a card is of one report. Give one.")
    if out is None and not is_card:
        raise click.UsageError("Missing option '-o': the page to write, like report.html.")
    _start(verbose)
    if is_card:
        text, written = reporting.write_card(reports[0], out)
        if written is None:
            _show(as_json, {"markdown": text}, text.rstrip("\n"))
            return
    else:
        written = reporting.write_page(reports, out)
    _show(as_json, written.as_json(), written.as_text())


def _choose_instructions() -> None:
    """Force the kernels' instruction set before anything is compiled."""
    from cpu_kernels.isa import chosen

    try:
        chosen()
    except ValueError as error:
        raise EdgeqError(str(error)) from error


def main() -> None:
    """Run the command line; the console script."""
    from converters.errors import ConversionError

    try:
        if os.environ.get("EDGEQ_ISA"):
            _choose_instructions()
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("edgeq: interrupted. Run the same command again to go on.", err=True)
        sys.exit(130)
    except (EdgeqError, ConversionError) as error:
        click.echo(f"edgeq: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
