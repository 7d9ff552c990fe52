"""edgeq as a service: doctor, logs for machines, environment variables, signals in mid-run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from edgeq import doctor
from edgeq.variables import VARIABLES, set_variables, unknown_variables
from tests.command_line import done, files_under, refused, run

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------- doctor


def broken(tmp_path, **modules):
    """Return an environment in which modules of these names run this code when imported."""
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code, "utf-8")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def edgeq(*arguments, env=None, cwd=ROOT):
    command = [sys.executable, "-m", "edgeq.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)


def test_the_doctor_finds_this_environment_well(tmp_path):
    found = done("doctor", "--json", "--work", tmp_path / "not" / "there").json()
    assert found["works"]
    assert found["problems"] == []
    names = {one["name"]: one for one in found["dependencies"]}
    assert names["llama-cpp-python"]["installed"] == "0.3.36"
    assert names["numba"]["extra"] == ""
    assert names["torch"]["extra"] == "torch"
    assert "pytest" not in names
    assert found["kernels"]["in_use"] == found["kernels"]["available"][0]
    assert found["runtime"]["features"]
    assert 0 < found["machine"]["cpus"] <= found["machine"]["cpus_of_machine"]
    assert found["machine"]["free_memory_bytes"] > 0
    assert found["machine"]["disks"]["work"]["free_bytes"] > 0


def test_the_doctor_survives_what_is_missing_or_ends_the_process(tmp_path):
    env = broken(
        tmp_path,
        torch="raise ImportError('libtorch.so: no such file')",
        numba="raise ImportError('needs another numpy')",
        llama_cpp="import os, signal; os.kill(os.getpid(), signal.SIGILL)",
    )
    env |= {"EDGEQ_ISE": "avx2", "EDGEQ_ISA": "avx2"}
    ended = edgeq("doctor", env=env)
    assert ended.returncode == 1
    assert ended.stderr.startswith("edgeq: doctor: llama-cpp-python 0.3.36: cannot be imported")
    assert ended.stderr.count("\n") == 1
    assert "SIGILL" in ended.stderr
    told = ended.stdout
    assert "numba 0." in told
    assert "needs another numpy" in told
    assert "libtorch.so" in told
    assert "unknown environment variable 'EDGEQ_ISE'" in told
    assert "Did you mean 'EDGEQ_ISA'?" in told
    assert "The core works." not in told


def test_the_doctor_compares_versions(monkeypatch):
    real = doctor._version

    def version(name):
        return {"numba": "0.59.1", "click": None}.get(name, real(name))

    tried = {"modules": {}, "instructions": {"problem": "x"}, "runtime": {"problem": "x"}}
    monkeypatch.setattr(doctor, "_version", version)
    monkeypatch.setattr(doctor, "_probe", lambda name, *_: tried.get(name, {"gpus": []}))
    line = refused_with_report("doctor")
    assert (
        line == "edgeq: doctor: click: is not installed. pip install 'click>=8.1' (2 more above)\n"
    )


def refused_with_report(*arguments):
    result = run(*arguments)
    assert result.code == 1
    assert result.out
    return result.err


@pytest.mark.parametrize(
    ("version", "asked", "does"),
    [
        ("2.13.0+cpu", ">=2.4", True),
        ("5.23.0", "<6,>=5", True),
        ("6.0", "<6,>=5", False),
        ("0.3.36", "==0.3.36", True),
        ("0.3.4", "==0.3.36", False),
        ("8.1.0", "==8.1", True),
        ("2.0rc1", ">=2.0", True),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_number_by_number(version, asked, does):
    assert doctor.fits(version, asked) == does


# ---------------------------------------------------------------------------------------- variables


def test_every_variable_of_the_source_is_documented():
    used = set()
    for folder in ("edgeq", "cpu_kernels", "converters", "scripts"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                text = path.read_text("utf-8", "replace")
                used |= set(re.findall(r"EDGEQ_[A-Z][A-Z_]*[A-Z]", text))
    page = (ROOT / "docs/service.md").read_text("utf-8")
    assert used == set(VARIABLES)
    assert set(re.findall(r"^\| `(EDGEQ_\w+)`", page, re.M)) == set(VARIABLES)


def test_unknown_variables_are_told_with_the_nearest_name():
    environment = {"EDGEQ_ISAS": "avx2", "EDGEQ_ISA": "avx2", "HOME": "/"}
    assert set_variables(environment) == {"EDGEQ_ISA": "avx2", "EDGEQ_ISAS": "avx2"}
    (message,) = unknown_variables(environment).values()
    assert message.endswith("Did you mean 'EDGEQ_ISA'?")


# --------------------------------------------------------------------------------------------- logs


def lines_of(text):
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert {"level", "logger", "event", "message"} <= set(line)
    assert [line["event"] for line in lines][:: len(lines) - 1] == ["begin", "end"]
    return lines


def test_a_log_tells_steps_artefacts_and_the_end(tiny, texts, tmp_path):
    log = tmp_path / "log.jsonl"
    arguments = ("export", tiny, tmp_path / "o.gguf", "--type", "Q4_0", "--quantizer", "rtn")
    arguments += ("--text", texts[0], "--ctx", 64, "--chunks", 2, "--no-prove")
    done("--log-json", log, *arguments)
    first = lines_of(log.read_text("utf-8"))
    steps = [line for line in first if line["event"] == "step"]
    begun = {line["step"] for line in steps if line["state"] == "begun"}
    ended = {line["step"]: line["seconds"] for line in steps if line["state"] == "done"}
    assert begun == set(ended) >= {"open", "calibrate", "write"}
    made = {line["artefact"]: line for line in first if line["event"] == "artefact"}
    assert made["imatrix.gguf"]["state"] == "made"
    assert made["imatrix.gguf"]["step"] == "calibrate"
    assert first[-1]["exit_code"] == 0
    done("--log-json", log, *arguments)
    again = lines_of("".join(log.read_text("utf-8").splitlines(True)[len(first) :]))
    assert {line["state"] for line in again if line["event"] == "artefact"} == {"reused"}


def test_a_log_on_stderr_has_nothing_beside_it(tmp_path):
    result = run("--log-json", "-", "inspect", tmp_path / "gone.gguf")
    assert result.code == 1
    *_, end = lines_of(result.err)
    assert end["level"] == "error"
    assert end["exit_code"] == 1
    assert end["message"].startswith(f"{tmp_path / 'gone.gguf'}: ")
    usage = run("--log-json", "-", "inspect", tmp_path, "--nonsense")
    assert lines_of(usage.err)[-1]["exit_code"] == usage.code == 2


def test_a_log_tells_warnings(tmp_path):
    script = (
        "import sys, warnings, logging; sys.argv = ['edgeq', '--log-json', '-', 'plugins']\n"
        "from edgeq import cli, commands\n"
        "def warn():\n"
        "    warnings.warn('old thing'); logging.getLogger('converters').warning('odd')\n"
        "    return {}\n"
        "commands.plugins = warn\n"
        "cli.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = lines_of(ended.stderr)
    told = [(line["logger"], line["message"]) for line in lines if line["level"] == "warning"]
    assert told[1] == ("converters", "odd")
    assert told[0][0] == "py.warnings"
    assert "old thing" in told[0][1]


def test_a_log_does_not_grow_into_another_file(tiny, tmp_path):
    before = tiny.read_bytes()
    assert "holds something else than JSON lines" in refused("--log-json", tiny, "plugins")
    assert tiny.read_bytes() == before
    line = refused("--log-json", tmp_path / "no" / "log", "plugins")
    assert "cannot be written" in line


# ------------------------------------------------------------------------------------------ signals


def started(*arguments, after):
    """Start edgeq, and return it when the file `after` is there."""
    command = [sys.executable, "-m", "edgeq.cli", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell's background job, such as these tests may be, has it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not after.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


@pytest.mark.parametrize(
    ("number", "code", "word", "jobs"),
    [(signal.SIGTERM, 143, "terminated", 1), (signal.SIGINT, 130, "interrupted", 2)],
)
def test_a_stopped_export_goes_on_and_makes_the_same_file(
    number, code, word, jobs, tiny, texts, tmp_path
):
    def export(out):
        flags = ("--type", "Q4_0", "--quantizer", "gptq", "--fisher", 0, "--ctx", 64)
        flags += ("--chunks", 16, "--text", texts[0], "--no-prove", "--threads", 1)
        return ("export", tiny, out, *flags, "--work", tmp_path / "work", "--jobs", jobs)

    out = tmp_path / "out.gguf"
    process = started(*export(out), after=tmp_path / "work" / "imatrix.gguf.made.json")
    process.send_signal(number)
    said, error = process.communicate(timeout=60)
    assert (process.returncode, said) == (code, "")
    wanted = f"Run the same command again to go on: what is done in {tmp_path / 'work'} is reused."
    assert error.strip() == f"edgeq: {word}. {wanted}"
    assert not out.exists()
    assert not [name for name in files_under(tmp_path) if name.endswith(".tmp")]
    with pytest.raises(ProcessLookupError):  # of its session nobody is left
        os.killpg(process.pid, 0)
    resumed = done(*export(out)[:-2], "--json").json()
    assert any(note.startswith("Reused from") for note in resumed["notes"])
    whole = tmp_path / "whole.gguf"
    done(*export(whole)[:-4], "--work", tmp_path / "other")
    assert out.read_bytes() == whole.read_bytes()


def test_a_signal_inside_a_callback_of_c_is_raised_after_it():
    script = (
        "import ctypes, os, signal, time\n"
        "from edgeq.stopping import Stopped, called_from_c, stoppable\n"
        "@called_from_c\n"
        "def call(): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.05)\n"
        "kept = ctypes.CFUNCTYPE(None)(call)\n"
        "try:\n"
        "    with stoppable():\n"
        "        kept(); time.sleep(5); print('went on')\n"
        "except Stopped as error: print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("SIGTERM\n", "")


# ------------------------------------------------------------------------------------- supply chain


def test_the_bill_of_materials_is_of_this_environment_and_the_same_twice():
    command = [sys.executable, ROOT / "scripts/sbom"]
    once, again = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert (once.stdout, once.stderr) == (again.stdout, "")
    bill = json.loads(once.stdout)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    parts = {part["name"].lower(): part for part in bill["components"]}
    numpy = parts["numpy"]
    assert numpy["purl"] == numpy["bom-ref"] == f"pkg:pypi/numpy@{metadata.version('numpy')}"
    assert re.fullmatch(r"[0-9a-f]{64}", numpy["properties"][0]["value"])
    assert "licenses" in numpy
    edges = {edge["ref"]: edge["dependsOn"] for edge in bill["dependencies"]}
    (own,) = (ref for ref in edges if ref.startswith("pkg:pypi/edgeq@"))
    assert numpy["purl"] in edges[own]
    assert {name for names in edges.values() for name in names} <= set(edges)


def test_the_lock_has_a_hash_of_every_pin():
    def canonical(name):
        return re.sub("[-_.]+", "-", name).lower()

    pinned = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "scripts/constraints.txt").read_text(), re.M)
    locked = re.findall(
        r"^([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}$",
        (ROOT / "scripts/constraints-hashes.txt").read_text(),
        re.M,
    )
    wanted = {canonical(name): version for name, version in pinned}
    assert {canonical(n): v.partition("+")[0] for n, v in locked} == wanted
