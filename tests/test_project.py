"""Promises about the repository as a whole: lazy imports, exported names, versions, documents."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import converters
import cpu_kernels
import edgeq
from edgeq.cli import cli

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
HEAVY = (
    "gguf jinja2 llama_cpp numba numpy rich safetensors sentencepiece tokenizers torch transformers"
)
PROBE = f"""
import sys
sys.argv = ["edgeq", *sys.argv[1:]]
from edgeq.cli import main
try:
    main()
finally:
    print("loaded:", *[name for name in {HEAVY.split()!r} if name in sys.modules])
"""


def edgeq_in_a_new_process(*arguments):
    command = [sys.executable, "-c", PROBE, *arguments]
    environment = os.environ | {"COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["export", "--help"], ["-x"]])
def test_help_is_instant_because_nothing_heavy_is_imported(arguments):
    found = edgeq_in_a_new_process(*arguments)
    assert found.returncode == (2 if arguments == ["-x"] else 0)
    assert found.stdout.splitlines()[-1] == "loaded:"


def modules():
    names = []
    for package in (edgeq, converters, cpu_kernels):
        names.append(package.__name__)
        found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        names += [module.name for module in found]
    return names


def order(name):
    """Constants, classes, functions; each by spelling, as ruff sorts them."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


@pytest.mark.parametrize("name", modules())
def test_exported_names_exist_and_are_sorted(name):
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert exported == sorted(set(exported), key=order)
    assert [name for name in exported if not hasattr(module, name)] == []


def test_packages_export_what_they_import():
    """A name that an ``__init__`` imports from its own package is meant for others."""
    for name in modules():
        module = importlib.import_module(name)
        if not hasattr(module, "__path__") or not hasattr(module, "__all__"):
            continue
        own = {
            key
            for key, value in vars(module).items()
            if not key.startswith("_")
            and str(getattr(value, "__module__", "")).startswith(name + ".")
        }
        assert own <= set(module.__all__), name


def test_one_version_everywhere():
    version = PYPROJECT["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)[0] == version
    assert f'__version__ = "{version}"' in Path(edgeq.__file__).read_text("utf-8")
    shown = CliRunner().invoke(cli, ["--version"], prog_name="edgeq").output
    assert shown == f"edgeq, version {edgeq.__version__}\n"


def test_readme_shows_the_real_help():
    readme = (ROOT / "README.md").read_text("utf-8")
    (block,) = re.findall(r"^```\w*\n\$ edgeq --help\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert block + "loaded:\n" == edgeq_in_a_new_process("--help").stdout


PAGES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "DECISIONS.md", *PAGES])
def test_documents_name_commands_and_options_that_exist(document):
    text = (ROOT / document).read_text("utf-8")
    named = re.findall(r"(?:^|[`$(] ?)edgeq ([a-z]+)((?: +[^\s`|#]+)*)", text, re.MULTILINE)
    for command, rest in named:
        assert command in cli.commands, command
        known = {flag for option in cli.commands[command].params for flag in option.opts}
        known |= {flag for p in cli.commands[command].params for flag in p.secondary_opts}
        asked = re.findall(r"(?<!\S)(--[a-z][a-z-]*)", rest)
        assert set(asked) <= known, (command, set(asked) - known)


def test_documents_name_files_that_exist():
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text("utf-8")
        pattern = (
            r"\b((?:edgeq|converters|cpu_kernels|scripts|tests)/[\w/.-]*[a-zA-Z0-9])\b(?!\*|_\*)"
        )
        missing = [path for path in re.findall(pattern, text) if not (ROOT / path).exists()]
        assert missing == [], document


def test_every_option_of_every_command_is_explained():
    for name, command in cli.commands.items():
        silent = [p.name for p in command.params if p.param_type_name == "option" and not p.help]
        assert silent == [], name
        assert {"as_json", "verbose"} <= {p.name for p in command.params}
