"""What commands share: kinds of values, groups of options, how they start and what they print."""

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgeq.console import Steps
from edgeq.logs import Log
from edgeq.recipe import AUTO_TEXT, DEFAULT_COSTS, TextChoice

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Bytes(click.ParamType[int]):
    """A size: ``2G`` (10^9, as llama-gguf-split), ``1.5GiB`` or plain bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?(?:iB)?)B?", str(value))
        if match is None or match[2] not in _UNITS:
            self.fail(f"{value!r} is not a size; write it like 2G, 500M or 1.5GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class Sizes(click.ParamType[tuple[int, ...]]):
    """One size, or several with commas between."""

    name = "size,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return all of them."""
        if isinstance(value, tuple):
            return value
        return tuple(Bytes().convert(one, param, ctx) for one in str(value).split(","))


class Counts(click.ParamType[tuple[int, ...]]):
    """One whole number, or several with commas between."""

    name = "n,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return all of them."""
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", str(value)):
            self.fail(f"{value!r} is no list of numbers from 1; write it like 1,2", param, ctx)
        return tuple(int(one) for one in str(value).split(","))


Command = Callable[..., Any]
PATH = click.Path(path_type=Path)


def options_of(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return several options as one decorator."""

    def apply(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


running = options_of(
    click.option("-v", "--verbose", count=True, help="Say what is done; twice: in detail."),
    click.option("--threads", type=click.IntRange(1), help="Default: every CPU."),
)
common = options_of(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."), running
)
source_input = options_of(
    click.option("--allow-requantize", is_flag=True, help="Accept a quantized GGUF as source."),
    click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model*.bin (weights_only)."),
    click.option("--work", type=PATH, help="Intermediate results. Default: beside the output."),
)
workers = options_of(
    click.option("--jobs", default=1, show_default=True, help="Processes that share the work."),
    click.option("--cluster", metavar="URL", help="Let a dask scheduler's workers do the work."),
    click.option(
        "--cluster-data",
        type=click.Choice(["files", "arrays"]),
        default="files",
        show_default=True,
        help="Workers read files that they share with this machine, or are sent arrays.",
    ),
)
texts = options_of(
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
allocation = options_of(
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
        "--speeds", type=PATH, help="Of edgeq bench --types: choose types for --min-tps by them."
    ),
    click.option("--types", metavar="TYPE,...", help="Types that tensors may get, like Q4_K,Q6_K."),
    click.option("--policy", type=PATH, help="Apply a trained policy: --allocator ramp:policy=."),
)
forecasting = options_of(
    click.option(
        "--dry-run", is_flag=True, help="Say what the export would take; only headers are read."
    ),
    click.option("--shape", metavar="NAME", help="Dry run of 1B, 8B, 70B, 405B or 30B-A3B."),
    click.option("--effort", default="default", show_default=True, help="See export."),
    click.option("--transform", default="auto", show_default=True, help="See export."),
    click.option("--fisher", type=float, help="See export."),
    click.option("--output-feedback/--no-output-feedback", default=None, help="See export."),
    click.option("--tune", "tune_steps", type=int, metavar="STEPS", help="See export."),
    click.option("--plan", "given", type=PATH, help="Dry run of the types of a plan.json."),
    click.option("--prove/--no-prove", default=True, help="Count the proof in a dry run."),
    click.option("--baseline", is_flag=True, help="Count llama.cpp's own file in a dry run."),
)
evaluation = options_of(
    click.option(
        "--eval-text",
        multiple=True,
        metavar="FILE",
        help="Text to judge on. Default: a part of --text that calibration does not see.",
    ),
    click.option("--eval-chunks", default=16, show_default=True, help="Judge on so many chunks."),
)


def start(verbose: int) -> Steps:
    """Set up logging and return the steps that a command will take."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    context = click.get_current_context(silent=True)
    log = None if context is None else context.find_object(Log)
    if log is not None and log.is_open:  # its handler takes what is not shown, too
        for handler in logging.getLogger().handlers:
            handler.setLevel(level)
        level = min(level, logging.INFO)
    for name in ("edgeq", "converters"):
        logging.getLogger(name).setLevel(level)
    return Steps(bars=False if log is not None and log.owns_stderr else None)


def show(as_json: bool, result: dict[str, Any], text: str) -> None:
    """Print a result."""
    click.echo(json.dumps(result, indent=1) if as_json else text)


def text_choice(options: dict[str, Any]) -> TextChoice:
    """Return what calibrates and what judges."""
    return TextChoice(
        calibration=tuple(options["text"]),
        evaluation=tuple(options.get("eval_text", ())),
        n_ctx=options["n_ctx"],
        chunks=options["chunks"],
        evaluation_chunks=options.get("eval_chunks", 16),
        seed=options["seed"],
        force=options["force"],
    )


def source_choice(options: dict[str, Any], out: Path) -> Any:
    """Return how a model is opened, and where intermediate results lie."""
    from edgeq.opening import SourceChoice

    return SourceChoice(
        work=options["work"] or out.parent / f"{out.stem}.edgeq",
        allow_requantize=options["allow_requantize"],
        allow_pickle=options["allow_pickle"],
        n_threads=options["threads"],
    )
