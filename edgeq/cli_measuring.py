"""The commands that look at files: measure, compare, judge and show them."""

import sys
from pathlib import Path
from typing import Any

import click

from edgeq.cli_options import (
    PATH,
    Counts,
    common,
    running,
    show,
    source_choice,
    source_input,
    start,
)


@click.command()
@click.argument("files", nargs=-1, required=True, type=PATH, metavar="FILE...")
@click.option("--reference", help="Float MODEL, or a stored file of its logits.")
@click.option("--text", "eval_text", multiple=True, metavar="FILE", help="Text to judge on.")
@click.option(
    "--tasks",
    multiple=True,
    metavar="FILE|SUITE",
    help="Questions: HellaSwag as text; ARC, PIQA, LAMBADA, your own as JSONL; or kick, a suite "
    "that needs no file, and kick:PART,... of it; repeatable.",
)
@click.option("--task-items", type=click.IntRange(1), help="Ask so many items of each.")
@click.option("--ctx", "n_ctx", type=int, help="Tokens of one chunk. Default: 512.")
@click.option("--chunks", "eval_chunks", type=int, help="Judge on at most so many chunks.")
@click.option("--force", is_flag=True, help="Accept text that calibration has seen.")
@click.option(
    "--save-logits",
    type=PATH,
    help="Store the reference's logits: *.kld (llama.cpp's format), else compact.",
)
@click.option("--lora", type=PATH, help="Run every FILE with this LoRA adapter.")
@click.option("--speed/--no-speed", default=True, help="Measure tokens/s too.")
@source_input
@common
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
        raise click.UsageError("--task-items: no tasks. Give --tasks, one or several.")
    result = commands.evaluate(
        files,
        options["reference"],
        tuple(options["eval_text"]),
        n_ctx=options["n_ctx"],
        chunks=options["eval_chunks"],
        force=options["force"],
        save_logits=options["save_logits"],
        speed=options["speed"],
        source=source_choice(options, files[0]),
        steps=start(verbose),
        tasks=options["tasks"],
        task_items=options["task_items"],
        lora=options["lora"],
    )
    show(as_json, result.as_json(), result.as_text())


@click.command()
@click.argument("file", type=PATH, required=False)
@click.option("--types", "all_types", is_flag=True, help="Time products by type, not a file.")
@click.option("--type", "types", multiple=True, metavar="NAME", help="These types alone.")
@click.option("-o", "--out", type=PATH, help="With --types: write speeds.json, for plan --speeds.")
@click.option(
    "--backend",
    type=click.Choice(["both", "llama", "kernels"]),
    default="both",
    show_default=True,
    help="llama.cpp, our kernels' decoder, or both in turn.",
)
@click.option("--threads", type=Counts(), default="1", show_default=True, help="Like 1,2.")
@click.option("--tokens", type=Counts(), help="With --types: tokens of a product. Default: 1.")
@click.option("--batches", type=Counts(), help="Also time batches of so many tokens, like 2,4,8.")
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
    steps, repetitions = start(verbose), options["repetitions"]
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
        show(as_json, types.as_json(), types.as_text())
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
    show(as_json, result.as_json(), result.as_text())


@click.command()
@click.argument("file", type=PATH)
@click.option("--against", type=PATH, required=True, help="The report.json of the baseline.")
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
    type=PATH,
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Write the result as JSON; without FILE, print it.",
)
@click.option("--junit", type=PATH, metavar="FILE", help="Write the result as JUnit XML.")
@source_input
@running
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
        source=source_choice(options, file),
        steps=start(verbose),
    )
    show(prints, outcome.as_json(), outcome.as_text())
    if not outcome.passed:
        sys.exit(1)


@click.command()
@click.argument("file", type=PATH)
@click.argument("other", type=PATH, required=False)
@click.option("--prompts", type=PATH, required=True, help="One a line, or JSONL: prompt, class.")
@click.option("--n-tokens", type=click.IntRange(1), default=64, show_default=True, help="Written.")
@click.option("--cache", multiple=True, metavar="TYPE", help="KV cache: f16, q8_0, q4_0.")
@click.option("--chat", is_flag=True, help="Wrap prompts with the file's chat template.")
@click.option("--refusals", type=PATH, metavar="FILE", help="Openings of refusals, one a line.")
@click.option("--search", type=click.IntRange(1), metavar="N", help="Try N mutated prompts too.")
@click.option("--seed", default=0, show_default=True, help="Of sampling and of the search.")
@click.option("--screen", is_flag=True, help="Look for tampered tensors; needs --reference.")
@click.option("--reference", help="With --screen: the float MODEL that the file was made from.")
@source_input
@common
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
        source=source_choice(options, file),
        steps=start(verbose),
    )
    show(as_json, outcome.as_json(), outcome.as_text())
    if outcome.stands_out:
        sys.exit(1)


@click.command()
@click.argument("file", type=PATH)
@click.option("--against", type=PATH, help="Compare with this GGUF file, tensor by tensor.")
@click.option("--metadata/--no-metadata", default=False, help="Print every metadata field.")
@common
def inspect(file: Path, as_json: bool, verbose: int, **options: Any) -> None:
    """Show what is in a GGUF file.

    Types, bytes, bpw and provenance, or how two files differ.
    """
    from edgeq import inspection

    start(verbose)
    report = inspection.inspect(file, against=options["against"], metadata=options["metadata"])
    show(as_json, report.as_json(), report.as_text())


@click.command()
@click.argument("reports", nargs=-1, required=True, type=PATH, metavar="REPORT...")
@click.option("-o", "--out", type=PATH, help="The page to write; the card is else printed.")
@click.option("--markdown", is_flag=True, help="A model card for the Hugging Face hub instead.")
@common
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
    start(verbose)
    if is_card:
        text, written = reporting.write_card(reports[0], out)
        if written is None:
            show(as_json, {"markdown": text}, text.rstrip("\n"))
            return
    else:
        written = reporting.write_page(reports, out)
    show(as_json, written.as_json(), written.as_text())
