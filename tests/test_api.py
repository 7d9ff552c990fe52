"""edgeq from Python: the same as the commands, typed, silent, and imported on demand."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import edgeq
from converters.errors import ConversionError
from converters.gguf_file import open_gguf
from edgeq import gate, proving
from edgeq import in_memory as saving
from edgeq.allocation import read_plan
from edgeq.cli import cli
from edgeq.errors import EdgeqError, EvaluationError, RecipeError
from edgeq.gate import Outcome
from edgeq.recipe import Recipe, Target, TextChoice
from edgeq.results import Measured, Report, Written
from tests import tiny_models
from tests.command_line import _quick, done

RENAMED = {  # of the command's options: parameters that Python names otherwise
    "sizes": "size_bytes",
    "size": "size_bytes",
    "no_imatrix": "use_imatrix",
    "text": "texts",
    "eval_text": "eval_texts",
    "threads": "n_threads",
    "junit": "junit_out",
}
DRY = {"dry_run", "shape", "given", "prove", "baseline"}  # edgeq.forecast does that
SHOWN = {"as_json", "verbose", "policy"}  # how results are shown; policy is allocator="ramp:..."


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch):
    for module in (proving, gate):
        monkeypatch.setattr(module, "measure_speeds", _quick)


@pytest.fixture
def silent(capfd):
    """Nothing of what a test calls may print, in Python or below."""
    yield
    assert capfd.readouterr() == ("", "")


def defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize(("given", "wanted"), [(None, "4"), ("26", "26")])
def test_threads_of_blas_do_not_spin_unless_the_user_says_so(given, wanted):
    name = "OPENBLAS_THREAD_TIMEOUT"
    environment = {key: value for key, value in os.environ.items() if key != name}
    environment |= {name: given} if given else {}
    code = f"import edgeq, os, sys; print(os.environ['{name}'], 'numpy' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == [wanted, "False"]


def test_importing_edgeq_is_instant_and_its_functions_are_there():
    script = (
        "import sys, edgeq\n"
        "heavy = {'numba', 'numpy', 'torch', 'llama_cpp', 'gguf', 'click'} & {*sys.modules}\n"
        "print(sorted(heavy), 'edgeq.api' in sys.modules, 'export' in dir(edgeq))\n"
        "from edgeq import plan\n"
        "print(plan.__module__, 'torch' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.split("\n")[:2] == ["[] False True", "edgeq.api False"], found.stderr
    with pytest.raises(AttributeError, match="module 'edgeq' has no attribute 'exports'"):
        edgeq.exports  # noqa: B018


@pytest.mark.parametrize("name", ["export", "plan", "evaluate", "check"])
def test_every_option_of_a_command_is_a_parameter(name):
    parameters = inspect.signature(getattr(edgeq, name)).parameters
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    options = {RENAMED.get(p.name, p.name) for p in cli.commands[name].params}
    if name == "check":
        options |= {"json_out"}
    if name == "plan":
        options -= DRY
    if name == "evaluate":
        options = {option.removeprefix("eval_") for option in options}
    assert options - SHOWN <= set(parameters)


def test_the_readme_calls_what_there_is():
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    section = readme.partition("\n## From Python\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    called = set()
    for call in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("edgeq."):
            name = call.func.attr
            called.add(name)
            given = {keyword.arg for keyword in call.keywords}
            assert given <= set(inspect.signature(getattr(edgeq, name)).parameters), name
    assert called == set(edgeq.__all__) - {"__version__"}


def test_defaults_are_the_recipes():
    texts = TextChoice()
    given = defaults(edgeq.export)
    assert given.pop("texts") == texts.calibration[0]
    assert given.pop("eval_texts") == texts.evaluation
    assert given.pop("eval_chunks") == texts.evaluation_chunks
    known = {
        field.name: field.default
        for kind in (Recipe, Target, TextChoice)
        for field in vars(kind)["__dataclass_fields__"].values()
    }
    assert given.pop("tokenizer") is None
    assert given == {key: known[key] for key in given}
    assert (
        defaults(edgeq.plan).items() <= {**defaults(edgeq.export), "tensor_type_file": None}.items()
    )


@pytest.mark.usefixtures("silent")
def test_a_file_is_exported_as_by_the_command_line(tiny, texts, tmp_path):
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    found = edgeq.export(
        tiny, one, preset="Q4_0", quantizer="rtn", texts=texts[0], chunks=4, eval_chunks=2,
        n_ctx=64, n_threads=1,
    )  # fmt: skip
    assert isinstance(found, Report)
    assert found.files[0].path == one
    assert found.files[0].evaluation.summary.kld.value > 0
    with mock.patch.object(sys, "stderr", sys.__stderr__):
        done("export", tiny, other, "--type", "Q4_0", "--quantizer", "rtn", "--text", texts[0],
             "--chunks", 4, "--eval-chunks", 2, "--ctx", 64)  # fmt: skip
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.usefixtures("silent")
def test_a_plan_is_written_and_followed(tiny, tmp_path):
    out, types = tmp_path / "plan.json", tmp_path / "types.txt"
    found = edgeq.plan(
        str(tiny), str(out), preset="Q8_0", use_imatrix=False, tensor_type_file=types
    )
    assert isinstance(found, Written)
    assert found.paths == (out, types)
    assert read_plan(out, open_gguf(tiny)).preset == "Q8_0"
    report = edgeq.export(
        tiny, tmp_path / "out.gguf", plan=out, use_imatrix=False, prove=False, n_threads=1
    )
    assert report.provenance["plan"]["preset"] == "Q8_0"


@pytest.mark.usefixtures("silent")
def test_files_are_measured_and_held_against_a_report(tiny, texts, tmp_path):
    out, report = tmp_path / "out.gguf", tmp_path / "report.json"
    edgeq.export(tiny, out, preset="Q4_0", use_imatrix=False, prove=False, n_threads=1)
    measured = edgeq.evaluate(out, tiny, texts=[texts[1]], n_ctx=64, chunks=4, n_threads=1)
    assert isinstance(measured, Measured)
    assert [file.path for file in measured.files] == [out]
    report.write_text(json.dumps(measured.as_json()))
    outcome = edgeq.check(out, report, max_kld_increase=0.1, n_threads=1, junit_out=tmp_path / "j")
    assert isinstance(outcome, Outcome)
    assert outcome.passed
    assert outcome.criteria[0].allowed == pytest.approx(1.1)
    assert (tmp_path / "j").is_file()
    with pytest.raises(RecipeError, match=r"--max-flips: got '5', expected a percentage"):
        edgeq.check(out, report, max_flips=5)


@pytest.mark.usefixtures("silent")
def test_what_the_caller_can_mend_is_an_exception(tiny, tmp_path):
    out = tmp_path / "out.gguf"
    with pytest.raises(ConversionError, match="no such file"):
        edgeq.export(tmp_path / "gone.gguf", out)
    with pytest.raises(EdgeqError, match="Did you mean 'Q4_0'"):
        edgeq.export(tiny, out, preset="Q4_00")
    with pytest.raises(EvaluationError, match="no reference, expected the float model"):
        edgeq.evaluate([tiny])
    with pytest.raises(EvaluationError, match="no files, expected one or several"):
        edgeq.evaluate([], tiny)
    with pytest.raises(EvaluationError, match="--task-items: no tasks"):
        edgeq.evaluate(tiny, tiny, texts="t.txt", task_items=3)
    with pytest.raises(RecipeError, match="got a tokenizer beside a path"):
        edgeq.export(tiny, out, tokenizer=object())
    with pytest.raises(RecipeError, match="model: got int, expected a path, a hub id or a trans"):
        edgeq.export(3, out)
    assert not out.exists()


# ------------------------------------------------------------------------------ models in memory


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    directory = tiny_models.build("qwen2", tmp_path_factory.mktemp("memory")).directory
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return model, transformers.AutoTokenizer.from_pretrained(directory), directory


def exported(out, model, tokenizer=None):
    return edgeq.export(
        model, out, tokenizer=tokenizer, preset="Q8_0", use_imatrix=False, prove=False, n_threads=1
    )


@pytest.mark.usefixtures("silent")
def test_a_model_in_memory_is_exported_as_its_checkpoint(in_memory, tmp_path, monkeypatch, capfd):
    model, tokenizer, directory = in_memory
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(saving.tempfile, "tempdir", str(place))
    report = exported(tmp_path / "one.gguf", model, tokenizer)
    saved = tmp_path / directory.name
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    capfd.readouterr()  # its progress bars
    exported(tmp_path / "other.gguf", saved)
    assert list(place.iterdir()) == []
    assert tiny_models.digest_tensors(tmp_path / "one.gguf") == tiny_models.digest_tensors(
        tmp_path / "other.gguf"
    )
    one, other = (
        {k: v for k, v in tiny_models.describe_fields(tmp_path / name).items() if "edgeq" not in k}
        for name in ("one.gguf", "other.gguf")
    )
    assert one == other
    name = f"{directory.name}, Qwen2ForCausalLM in memory"
    assert report.provenance["recipe"]["model"] == name
    first = (tmp_path / "one.gguf").read_bytes()
    exported(tmp_path / "one.gguf", model, tokenizer)
    assert (tmp_path / "one.gguf").read_bytes() == first  # no temporary name in it


def test_a_model_in_memory_needs_its_tokenizer_and_plain_weights(in_memory, tmp_path):
    model, tokenizer, _ = in_memory
    with pytest.raises(RecipeError, match="Qwen2ForCausalLM: got no tokenizer, expected the mod"):
        exported(tmp_path / "out.gguf", model)
    with (
        mock.patch.object(model, "save_pretrained", side_effect=OSError("No space left")),
        pytest.raises(ConversionError, match=r"cannot be saved \(No space left\)"),
    ):
        exported(tmp_path / "out.gguf", model, tokenizer)
    torch = pytest.importorskip("torch")
    import transformers

    simulated = transformers.AutoModelForCausalLM.from_config(model.config)
    linear = simulated.model.layers[0].mlp.up_proj
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", torch.nn.Identity())
    with pytest.raises(RecipeError, match=r"simulated, expected plain ones. Write it with edgeq"):
        exported(tmp_path / "out.gguf", simulated, tokenizer)
    assert not (tmp_path / "out.gguf").exists()
