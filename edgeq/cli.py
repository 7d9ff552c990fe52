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

from edgeq import cli_measuring
from edgeq.cli_options import (
    PATH,
    Bytes,
    Sizes,
    allocation,
    common,
    evaluation,
    show,
    source_choice,
    source_input,
    start,
    text_choice,
    texts,
    workers,
)
from edgeq.errors import EdgeqError
from edgeq.recipe import DEFAULT_PRESET, Recipe, Target


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edgeq")
def cli() -> None:
    """Export language models to GGUF files that stock llama.cpp runs, calibrated and proven."""


for _command in (
    cli_measuring.evaluate,
    cli_measuring.bench,
    cli_measuring.check,
    cli_measuring.diff,
    cli_measuring.inspect,
    cli_measuring.report,
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
@click.option("--imatrix", type=PATH, help="Use this importance matrix; do not calibrate.")
@click.option("--no-imatrix", is_flag=True, help="Round without any calibration.")
@click.option("--split-max-size", "split_max_bytes", type=Bytes(), help="Write parts, like 2G.")
@click.option("--modelfile", is_flag=True, help="Write Ollama's Modelfile beside OUT.")
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
    help="residual (R1), values (R2); repeatable.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the turns.")
@source_input
@common
def rotate(
    model: str, out: Path, kinds: tuple[str, ...], seed: int, as_json: bool, verbose: int,
    **options: Any,
) -> None:  # fmt: skip
    """Turn the basis of a float model.

    MODEL: a Hugging Face directory or float GGUF. OUT: a GGUF of the same function, in F32. The
    residual stream unties the output matrix from the embedding: the file grows by it.
    """
    from edgeq import commands

    source = source_choice(options, out)
    result = commands.rotate(model, out, kinds, seed=seed, source=source, steps=start(verbose))
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
@click.argument("model")
@click.option("-o", "--out", type=PATH, required=True, help="The plan.json to write.")
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
@texts
@source_input
@workers
@common
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
        texts=text_choice(options),
        work=options["work"],
        n_threads=options["threads"],
        jobs=options["jobs"],
        cluster=options["cluster"],
        cluster_data=options["cluster_data"],
        allow_requantize=options["allow_requantize"],
        allow_pickle=options["allow_pickle"],
        prove=False,
    )
    result = commands.write_plan(recipe, out, options["tensor_type_file"], start(verbose))
    show(as_json, result.as_json(), result.as_text())


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
