"""A package of others, installed as pip installs it, and used by name from the command line."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType

from converters.architectures import described_architectures
from converters.gguf_file import open_gguf
from edgeq.allocation import ALLOCATORS
from edgeq.errors import RegistryError
from edgeq.quantizers import QUANTIZERS
from edgeq.tasks import TASKS, read_task
from edgeq.testing import check_quantizer
from tests.command_line import refused

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).parent / "plugin_package"
T = GGMLQuantizationType


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory with the installed package; nothing is fetched."""
    source = shutil.copytree(SOURCE, tmp_path_factory.mktemp("source") / "package")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--quiet", "--disable-pip-version-check", "--target"]
    found = subprocess.run([*command, target, source], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return target


def edgeq(*arguments, sites=()):
    """Run the command line in a process of its own that sees the packages in `sites`."""
    paths = os.pathsep.join(map(str, (*sites, ROOT)))
    return subprocess.run(
        [sys.executable, "-m", "edgeq.cli", *map(str, arguments), "--threads", "1"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
        cwd=ROOT,
    )


def done(*arguments, sites):
    found = edgeq(*arguments, sites=sites)
    assert (found.returncode, found.stderr) == (0, ""), found
    return found.stdout


def renamed(site, target, name, entries=None):
    """Copy the installed package as another distribution, with the entry points given."""
    shutil.copytree(site, target)
    info = target / f"{name.replace('-', '_')}-1.0.dist-info"
    (target / "edgeq_example-1.0.dist-info").rename(info)
    metadata = info / "METADATA"
    metadata.write_text(metadata.read_text().replace("edgeq-example", name))
    if entries is not None:
        (info / "entry_points.txt").write_text(entries)
    return target


def test_plugins_lists_it_with_its_origin(site):
    lines = [line.split() for line in done("plugins", sites=[site]).splitlines()]
    theirs = [line for line in lines if line[-1] == "edgeq-example"]
    assert theirs == [
        ["quantizer", "nudge", "edgeq-example"],
        ["allocator", "uniform", "edgeq-example"],
        ["architecture", "llama", "edgeq-example"],
        ["task", "counting", "edgeq-example"],
        ["task", "yes-no", "edgeq-example"],
    ]
    assert ["task", "lambada", "edgeq"] in lines
    assert ["architecture", "llama", "edgeq"] in lines


@pytest.mark.slow
def test_everything_is_used_by_name(site, checkpoint, texts, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"] = ["ExampleForCausalLM"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    out, work = tmp_path / "out.gguf", tmp_path / "work"
    command = ["export", checkpoint, out, "--quantizer", "nudge:step=0.02", "--allocator"]
    command += ["uniform", "--bpw", "9", "--types", "Q4_0,Q8_0", "--costs", "weight", "--work"]
    command += [work, "--text", texts[0], "--ctx", "64", "--chunks", "8", "--no-prove", "--json"]
    report = json.loads(done(*command, sites=[site]))
    file = open_gguf(out)
    assert file.architecture == "llama"
    matrices = {tensor.qtype for tensor in file.tensors.values() if len(tensor.shape) > 1}
    assert matrices == {T.Q8_0}
    assert any(note.endswith("All Q8_0.") for note in report["notes"])
    facts = report["rounding"]["tensors"]["blk.0.ffn_up.weight"]
    assert facts["nudged_rows"] >= 0
    assert report["provenance"]["versions"]["edgeq-example"] == "1.0"
    assert "unknown quantizer 'nudge'; known: auto, gptq, learned, rtn." in edgeq(*command).stderr

    tasks = tmp_path / "tasks.jsonl"
    items = [{"passage": "the fox", "question": "is it a dog", "yes": n > 0} for n in range(2)]
    tasks.write_text("\n".join(map(json.dumps, items)))
    found = json.loads(
        done("evaluate", out, "--tasks", tasks, "--no-speed", "--json", sites=[site])
    )
    (task,) = found["tasks"]
    assert (task["kind"], task["n_items"]) == ("yes-no", 2)
    assert "no known kind of task" in edgeq("evaluate", out, "--tasks", tasks).stderr
    asked = ("evaluate", out, "--tasks", "counting:up", "--task-items", "3", "--no-speed", "--json")
    (task,) = json.loads(done(*asked, sites=[site]))["tasks"]
    assert (task["kind"], task["n_items"], len(task["texts"])) == ("counting", 3, 3)
    tasks.write_text(json.dumps({**items[0], "yes": "no"}))
    with_text = edgeq("evaluate", out, "--tasks", tasks, sites=[site])
    assert with_text.returncode == 1
    assert "line 1: wrong 'yes'; got 'no', expected true or false" in with_text.stderr


def test_a_name_that_two_packages_bring_is_refused(site, tmp_path):
    twin = renamed(site, tmp_path / "twin", "edgeq-twin", "[edgeq.quantizers]\nnudge = a:B\n")
    found = edgeq("plugins", sites=[site, twin])
    told = "'nudge' is brought by both edgeq-example and edgeq-twin. Uninstall one of them."
    assert (found.returncode, found.stderr) == (1, f"edgeq: edgeq.quantizers: {told}\n")


@pytest.fixture
def anew(monkeypatch):
    """What is installed is found anew, as in a new process; return a function that adds a place."""

    def forget():
        described_architectures.cache_clear()
        for registry in (QUANTIZERS, ALLOCATORS, TASKS):
            vars(registry).pop("plugins", None)
        for name in ("edgeq_example", "edgeq_again"):
            sys.modules.pop(name, None)

    forget()
    yield lambda place: monkeypatch.syspath_prepend(str(place))
    forget()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            "[edgeq.architectures]\nmine = edgeq_again:ARCHITECTURE",
            "edgeq.architectures: 'LlamaForCausalLM' is brought by both edgeq and edgeq-twin. Unin",
        ),
        (
            "[edgeq.architectures]\nmine = edgeq_again:GONE",
            "edgeq.architectures: 'mine' of edgeq-twin: edgeq_again:GONE cannot be imported (modu",
        ),
        (
            "[edgeq.architectures]\nmine = edgeq_again:NUMBER",
            "edgeq_again:NUMBER is of type int, expected an Architecture. Ask those who made",
        ),
        (
            "[edgeq.tasks]\npiqa = edgeq_example:YES_NO",
            "edgeq.tasks: 'piqa' is brought by both edgeq and edgeq-twin. Uninstall one of them.",
        ),
        (
            "[edgeq.allocators]\nknapsack = edgeq_example:Uniform",
            "edgeq.allocators: 'knapsack' is brought by both edgeq and edgeq-twin. Uninstall one",
        ),
    ],
)
def test_what_a_broken_package_brings_is_one_line(entries, message, site, tmp_path, anew):
    twin = renamed(site, tmp_path / "twin", "edgeq-twin", entries)
    (twin / "edgeq_again.py").write_text(
        "from converters.architectures.llama import ARCHITECTURE\nNUMBER = 3\n"
    )
    anew(twin)
    assert message in refused("plugins")


@pytest.fixture
def example(site, anew):
    anew(site)
    return importlib.import_module("edgeq_example")


def test_its_quantizer_passes_the_conformance_suite(example):
    check_quantizer(example.Nudge, [T.Q4_0, T.Q4_K])


def test_a_format_of_more_fields_goes_first(example, tmp_path, monkeypatch):
    path = tmp_path / "tasks.jsonl"
    line = {"passage": "a", "question": "b", "yes": True, "text": "c d"}
    path.write_text(json.dumps(line))
    task = read_task(path)
    assert task.kind == "yes-no"
    assert task.items[0].endings == (" no", " yes")
    assert task.items[0].answer == 1
    monkeypatch.setattr(example, "YES_NO", example.Nudge)
    with pytest.raises(RegistryError, match=r"task 'yes-no' of edgeq-example: .* expected a TaskF"):
        read_task(path)
