"""The command line: flags become a recipe, a pipeline function runs it, its result is shown.

Exit codes: 0 done, 1 the user can mend it (one line on stderr), 2 usage. Anything else is a bug and
keeps its traceback. Heavy modules are imported inside the commands: ``edgeq --help`` is instant.
Here are the commands that make files; those that look at them are in ``cli_measuring``.
"""

import os
import sys
from pathlib import Path
from typing import Any

import click

import edgeq
from edgeq import cli_measuring, cli_service
from edgeq.cli_options import (
    PATH,
    Bytes,
    Sizes,
    allocation,
    common,
    evaluation,
    forecasting,
    show,
    source_choice,
    source_input,
    start,
    text_choice,
    texts,
    workers,
)
from edgeq.errors import EdgeqError
from edgeq.logs import Log
from edgeq.recipe import DEFAULT_PRESET, Recipe, Target
from edgeq.stopping import ending, stoppable


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edgeq")
@click.option("--log-json", metavar="FILE", help="Append a JSON object a line to FILE; -: stderr.")
@click.pass_context
def cli(ctx: click.Context, log_json: str | None) -> None:
    """Export language models to GGUF files that stock llama.cpp runs, calibrated and proven."""
    if log_json is not None:
        ctx.ensure_object(Log).open(log_json, edgeq.__version__)
    is_forced = os.environ.get("EDGEQ_ISA") or os.environ.get("EDGEQ_KERNELS")
    if is_forced and ctx.invoked_subcommand != "doctor":  # which tells of it
        _choose_instructions()


for _command in (
    cli_measuring.evaluate,
    cli_measuring.bench,
    cli_measuring.check,
    cli_measuring.diff,
    cli_measuring.inspect,
    cli_measuring.report,
    cli_service.doctor,
    cli_service.verify,
):
    cli.add_command(_command)


@cli.command()
@click.argument("model")
@click.argument("out", type=PATH)
@click.option(
    "--type", "preset", default=DEFAULT_PRESET, show_default=True, help="llama.cpp file type."
)
@click.option("--plan", type=PATH, help="Follow this plan.json instead of --type.")
@click.option("--size", "sizes", type=Sizes(), help="At most so many bytes: 80MiB or 80MiB,1G.")
@allocation
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
    help="Of auto: about 2, 5 or 15 minutes per 100M parameters on two recent cores.",
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
    "--output-feedback/--no-output-feedback",
    default=None,
    help="Let rows make up for each other's errors, by gradients. Default: of auto, but fast.",
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
@click.option("--imatrix", type=PATH, help="Use this importance matrix; do not calibrate.")
@click.option("--no-imatrix", is_flag=True, help="Round without any calibration.")
@click.option("--split-max-size", "split_max_bytes", type=Bytes(), help="Write parts, like 2G.")
@click.option("--modelfile", is_flag=True, help="Write Ollama's Modelfile beside OUT.")
@click.option("--sign", type=PATH, metavar="KEY", help="Sign OUT: Ed25519 private key, PEM.")
@click.option("--prove/--no-prove", default=True, help="Measure the file against the reference.")
@click.option("--baseline", is_flag=True, help="Measure llama.cpp's own quantizer beside it.")
@texts
@evaluation
@source_input
@workers
@common
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
        output_feedback=options["output_feedback"],
        sequential=options["sequential"],
        asymmetric=options["asymmetric"],
        tune_steps=options["tune_steps"],
        imatrix=options["imatrix"],
        use_imatrix=not options["no_imatrix"],
        texts=text_choice(options),
        work=options["work"],
        n_threads=options["threads"],
        jobs=options["jobs"],
        cluster=options["cluster"],
        cluster_data=options["cluster_data"],
        split_max_bytes=options["split_max_bytes"],
        allow_requantize=options["allow_requantize"],
        allow_pickle=options["allow_pickle"],
        prove=options["prove"],
        baseline=options["baseline"],
        modelfile=options["modelfile"],
        sign=options["sign"],
    )
    steps = start(verbose)
    result = (
        pipeline.export_sizes(recipe, options["sizes"], steps)
        if len(options["sizes"] or ()) > 1
        else pipeline.export(recipe, steps)
    )
    show(as_json, result.as_json(), result.as_text())


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
@click.argument("out", type=PATH)
@click.option(
    "--type",
    "ftype",
    type=click.Choice(["auto", "f32", "f16", "bf16", "q8_0"]),
    default="auto",
    show_default=True,
    help="auto: the checkpoint's own 16-bit type.",
)
@click.option("--split-max-size", "split_max_bytes", type=Bytes(), help="Write parts, like 2G.")
@click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model*.bin (weights_only).")
@click.option("--pre", help="Name of the pre-tokenizer, where it is not recognized.")
@common
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
        steps=start(verbose),
    )
    show(as_json, result.as_json(), result.as_text())


@cli.command()
@click.argument("model")
@click.argument("out", type=PATH)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    default=("values",),
    show_default=True,
    help="residual (R1), values (R2), keys (scales for a quantized KV cache); repeatable.",
)
@click.option(
    "--learn",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Steps from random rotations to those that leave the weights smaller rounding errors.",
)
@texts
@source_input
@common
def rotate(
    model: str,
    out: Path,
    kinds: tuple[str, ...],
    learn: int,
    as_json: bool,
    verbose: int,
    **options: Any,
) -> None:
    """Turn the basis of a float model.

    MODEL: a Hugging Face directory or float GGUF. OUT: a GGUF of the same function, in F32. The
    residual stream unties the output matrix from the embedding: the file grows by it.

    Keys read a text. "key error" is what the scales leave of a quantized KV cache's mean squared
    error of q · k, predicted; the values' error is apart from it. "learned error" is what learned
    rotations leave of the random ones' squared rounding error, predicted.
    """
    from edgeq import commands

    result = commands.rotate(
        model,
        out,
        kinds,
        text_choice(options),
        source=source_choice(options, out),
        steps=start(verbose),
        learn_steps=learn,
    )
    show(as_json, result.as_json(), result.as_text())


@cli.command()
@click.argument("file", type=PATH)
@click.option("--reference", required=True, help="The float MODEL that FILE was made from.")
@click.option("-o", "--out", type=PATH, required=True, help="The adapter to write, a GGUF file.")
@click.option("--size", type=Bytes(), help="Of the adapter, at most. Default: 2 % of FILE.")
@click.option("--rank", type=int, help="Give every weight this rank instead.")
@click.option("--prove/--no-prove", default=True, help="Measure FILE with and without it.")
@texts
@evaluation
@source_input
@common
def compensate(file: Path, out: Path, as_json: bool, verbose: int, **options: Any) -> None:
    """Write a LoRA adapter that mends a quantized FILE.

    The low-rank part of its error, weighed with the inputs of calibration text; llama.cpp applies
    it at load (--lora). FILE must not be folded. Where rounding fed errors back, larger types are
    likely worth more than the same bytes of adapter: measure both.
    """
    from edgeq import compensating

    result = compensating.compensate(
        file,
        options["reference"],
        out,
        text_choice(options),
        size_bytes=options["size"],
        rank=options["rank"],
        prove=options["prove"],
        source=source_choice(options, out),
        steps=start(verbose),
    )
    show(as_json, result.as_json(), result.as_text())


@cli.command()
@click.argument("model")
@click.option("-o", "--out", type=PATH, required=True, help="imatrix.gguf, or a legacy *.dat.")
@click.option("--process-output", is_flag=True, help="Collect for output.weight too.")
@texts
@source_input
@common
def calibrate(model: str, out: Path, as_json: bool, verbose: int, **options: Any) -> None:
    """Write the importance matrix of MODEL.

    Runs text through the model; the file is the one that llama-imatrix writes and llama-quantize
    reads.
    """
    from edgeq import commands

    result = commands.calibrate(
        model,
        out,
        text_choice(options),
        process_output=options["process_output"],
        source=source_choice(options, out),
        steps=start(verbose),
    )
    show(as_json, result.as_json(), result.as_text())


@cli.command()
@click.argument("model", required=False)
@click.option("-o", "--out", type=PATH, help="The plan.json to write.")
@click.option(
    "--type", "preset", default=DEFAULT_PRESET, show_default=True, help="llama.cpp file type."
)
@click.option("--size", type=Bytes(), help="The file may have so many bytes, like 80MiB.")
@allocation
@click.option(
    "--quantizer", default="auto", show_default=True, help="That will round; costs depend on it."
)
@click.option("--imatrix", type=PATH, help="Use this importance matrix; do not calibrate.")
@click.option("--no-imatrix", is_flag=True, help="Plan for rounding without calibration.")
@click.option("--tensor-type-file", type=PATH, help="Also write the types for llama-quantize.")
@forecasting
@texts
@source_input
@workers
@common
def plan(model: str | None, out: Path | None, as_json: bool, verbose: int, **options: Any) -> None:
    """Write the type of every tensor.

    llama.cpp's own mix for a file type, or the best types for a target (--size, --max-kld, ...).
    export --plan accepts the plan back, edited or not. --dry-run writes and fetches nothing: it
    tells bytes, memory and time of the export, from headers (a config.json is enough) and from
    some seconds of timing this machine as it is now.
    """
    from edgeq import commands

    is_dry = options["dry_run"]
    _check_plan(model, out, options)
    recipe = Recipe(
        model=model or options["shape"],
        out=(out or Path("model.json")).with_suffix(".gguf"),
        preset=options["preset"],
        **_target(options, None if options["size"] is None else (options["size"],)),
        plan=options["given"],
        quantizer=options["quantizer"],
        effort=options["effort"],
        transform=options["transform"],
        fisher=options["fisher"],
        output_feedback=options["output_feedback"],
        tune_steps=options["tune_steps"],
        imatrix=options["imatrix"],
        use_imatrix=not options["no_imatrix"],
        texts=text_choice(options),
        work=options["work"],
        n_threads=options["threads"],
        jobs=options["jobs"],
        cluster=options["cluster"],
        cluster_data=options["cluster_data"],
        allow_requantize=options["allow_requantize"],
        allow_pickle=options["allow_pickle"],
        prove=is_dry and options["prove"],
        baseline=is_dry and options["baseline"],
    )
    steps = start(verbose)
    if out is None:
        from edgeq.forecast import forecast_here

        found = forecast_here(recipe, options["shape"])
        show(as_json, found.as_json(), found.as_text())
        return
    result = commands.write_plan(recipe, out, options["tensor_type_file"], steps)
    show(as_json, result.as_json(), result.as_text())


def _check_plan(model: str | None, out: Path | None, options: dict[str, Any]) -> None:
    """Refuse what contradicts itself: a dry run writes nothing, a plan is of a model."""
    is_dry, shape = options["dry_run"], options["shape"]
    if not is_dry and out is None:
        raise EdgeqError("plan: no file to write. Give -o plan.json, or --dry-run.")
    if not is_dry and (shape or options["given"] or options["baseline"]):
        raise EdgeqError("--shape, --plan, --baseline: are of a dry run. Give --dry-run.")
    if is_dry and (out is not None or options["tensor_type_file"] is not None):
        raise EdgeqError("--dry-run: writes nothing. Leave -o and --tensor-type-file out.")
    if is_dry and options["cluster"] is not None:
        raise EdgeqError("--dry-run: asks no cluster. Give --jobs N for N workers.")
    if (model is None) == (shape is None):
        raise EdgeqError("plan: give MODEL, or a dry run's --shape; one of them.")


@cli.command()
@common
def plugins(as_json: bool, verbose: int, threads: int | None) -> None:
    """List what is installed, and by whom."""
    from edgeq import commands

    start(verbose)
    found = commands.plugins()
    lines = [f"{kind:<14} {p.name:<16} {p.origin}" for kind, ps in found.items() for p in ps]
    show(
        as_json,
        {kind: [vars(p) for p in ps] for kind, ps in found.items()},
        "\n".join(lines),
    )


def _choose_instructions() -> None:
    """Force the kernels' instruction set and family before anything is compiled."""
    from cpu_kernels.choice import wanted
    from cpu_kernels.isa import chosen

    try:
        chosen()
        wanted()
    except ValueError as error:
        raise EdgeqError(str(error)) from error


def main() -> None:
    """Run the command line; the console script."""
    from converters.errors import ConversionError

    log = Log()
    code, line = 0, ""
    try:
        with stoppable():
            cli(standalone_mode=False, obj=log)
    except click.ClickException as error:
        code, line = error.exit_code, error.format_message()
        if not log.owns_stderr:
            error.show()
    except (click.Abort, KeyboardInterrupt) as error:
        code, line = ending(error.__cause__ or error)
    except (EdgeqError, ConversionError) as error:
        code, line = 1, f"edgeq: {error}"
    except SystemExit as error:  # a command that has said all: a check that failed
        code = error.code if isinstance(error.code, int) else 1
        line = "the check failed" if code else ""
    except BaseException as error:
        log.end(1, f"bug: {type(error).__name__}: {error}")
        raise
    is_told = line.startswith("edgeq: ") and not log.owns_stderr
    log.end(code, line.removeprefix("edgeq: "))
    if is_told:
        click.echo(line, err=True)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
