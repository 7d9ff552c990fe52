"""The commands that look at an installation and at where a file comes from."""

import sys
from pathlib import Path
from typing import Any

import click

from edgeq.cli_options import PATH, common, show, source_choice, source_input, start
from edgeq.errors import EdgeqError


@click.command()
@click.option("--work", type=PATH, default=".", help="Where intermediate results would go.")
@common
def doctor(work: Path, as_json: bool, verbose: int, **_options: Any) -> None:
    """Say what is installed and what of it works.

    Exit code 1 if something is missing that edgeq cannot do without; extras may be.
    """
    from edgeq.doctor import examine

    start(verbose)
    found = examine(work)
    show(as_json, found.as_json(), found.as_text())
    if found.problems:
        more = f" ({len(found.problems) - 1} more above)" if found.problems[1:] else ""
        raise EdgeqError(f"doctor: {found.problems[0]}{more}")


@click.command()
@click.argument("file", type=PATH)
@click.option("--source", required=True, help="The float MODEL that it was made from.")
@click.option("--tensors", type=click.IntRange(1), metavar="N", help="A sample. Default: all.")
@click.option("--seed", type=click.IntRange(0), help="Of the sample. Default: drawn, and told.")
@click.option("--plan", type=PATH, help="The plan.json that it was made with.")
@click.option("--imatrix", type=PATH, help="The importance matrix that it was made with.")
@click.option("--text", multiple=True, metavar="FILE", help="The calibration text, as for export.")
@click.option(
    "--layers",
    type=click.IntRange(0),
    metavar="N",
    help="Derive so many layers again, drawn by the seed; takes about what the export took for the "
    "layers up to the last of them. Default: 1 with --text.",
)
@click.option("--public-key", type=PATH, metavar="PEM", help="Of whoever has to have signed it.")
@source_input
@common
def verify(file: Path, as_json: bool, verbose: int, **options: Any) -> None:
    """Say whether FILE is what its metadata says.

    Of every tensor: identical, derived again byte for byte; consistent, a rounding of the source as
    the recipe has it; or differs, with exit code 1.
    """
    from edgeq import verification
    from edgeq.verification.layers import Again

    found = verification.verify(
        file,
        options["source"],
        n_tensors=options["tensors"],
        seed=options["seed"],
        plan=options["plan"],
        public_key=options["public_key"],
        again=Again(options["layers"], options["text"], options["imatrix"]),
        source=source_choice(options, file),
        steps=start(verbose),
    )
    show(as_json, found.as_json(), found.as_text())
    if not found.holds:
        sys.exit(1)
