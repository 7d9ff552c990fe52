"""The documentation's hook: ``{{ commands }}`` becomes the help of every command."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLACE = "{{ commands }}"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help where it belongs; mkdocs calls this for every page."""
    return markdown.replace(PLACE, commands()) if PLACE in markdown else markdown


def commands() -> str:
    """Return a section for every command."""
    sys.path.insert(0, str(ROOT))
    try:
        import click

        from edgeq.cli import cli
    finally:
        sys.path.remove(str(ROOT))
    with click.Context(cli, info_name="edgeq") as parent:
        sections = []
        for name in sorted(cli.commands):
            command = cli.commands[name]
            with click.Context(command, info_name=name, parent=parent, max_content_width=100) as at:
                at.terminal_width = 100
                sections.append(f"## edgeq {name}\n\n```text\n{command.get_help(at)}\n```\n")
    return "\n".join(sections)
