"""The documentation site: its pages name what exists, and it builds where mkdocs is installed."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgeq.cli import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def read(page):
    return (DOCS / page).read_text("utf-8")


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    assert sorted(listed) == PAGES


@pytest.mark.parametrize("page", [page for page in PAGES if ":::" in read(page)])
def test_the_reference_names_what_can_be_imported(page):
    if "edgeq.qat" in read(page):
        pytest.importorskip("torch")
    for name in re.findall(r"^::: (\S+)$", read(page), re.M):
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:length]))
            except ModuleNotFoundError:
                continue
            break
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        assert found.__doc__, name


@pytest.mark.parametrize("page", PAGES)
def test_links_and_included_parts_are_there(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", read(page)):
        assert (DOCS / page).parent.joinpath(target).is_file(), target
    for path, _, name in (
        m.partition(":") for m in re.findall(r'^--8<-- "(.*)"', read(page), re.M)
    ):
        text = (ROOT / path).read_text("utf-8")
        if name:
            assert text.count(f"<!-- --8<-- [start:{name}] -->\n") == 1
            assert text.count(f"\n<!-- --8<-- [end:{name}] -->\n") == 1


def test_the_help_of_every_command_is_shown():
    place = ROOT / "scripts" / "docs_commands.py"
    spec = importlib.util.spec_from_file_location("docs_commands", place)
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    shown = hook.on_page_markdown(read("reference/commands.md"))
    assert re.findall(r"^## edgeq (\w+)$", shown, re.M) == sorted(cli.commands)
    assert hook.PLACE not in shown
    assert "Usage: edgeq export [OPTIONS] MODEL OUT" in shown


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the site is built with: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    python = (tmp_path / "site/reference/python.html").read_text("utf-8")
    assert 'id="edgeq.api.export"' in python
    assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css)"', python)
