"""The gate: a planted regression fails, what did not change never does; the plugin says it too."""

import base64
import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from edgeq import gate
from edgeq.criteria import Limits, compare_flips, compare_kld, compare_tps
from edgeq.errors import RecipeError
from edgeq.evaluation import Evaluation, Speed, evaluate
from edgeq.evaluation.speed import Rate
from tests import tiny_gguf
from tests.command_line import done, files_under, refused, run

pytest_plugins = ["pytester"]

N_CHUNKS = 12
FLAGS = ("--ctx", 64, "--chunks", N_CHUNKS, "--no-speed", "--json")
PLAIN = ("--no-imatrix", "--no-prove")
RTN = ("--type", "Q8_0", "--quantizer", "rtn")
REPETITIONS = 9


def speed(samples):
    rates = tuple(float(sample) for sample in samples)
    rate = Rate(float(np.median(rates)), min(rates), max(rates), rates)
    return Speed(Path("file.gguf"), rate, rate, 32, 32, len(rates), 1)


@pytest.fixture
def speeds(monkeypatch):
    """What the gate measures instead of times: (new, old) tokens/s of each repetition."""
    measured = {"files": None, "new": [100.0] * REPETITIONS, "old": [100.0] * REPETITIONS}

    def measure(paths, **_):
        measured["files"] = [str(path) for path in paths]
        return [speed(measured["new"]), speed(measured["old"])]

    monkeypatch.setattr(gate, "measure_speeds", measure)
    return measured


@pytest.fixture(scope="module")
def built(tiny, texts, tmp_path_factory):
    """A baseline with its report, a copy of it, and a file with one tensor at a lower type."""
    place = tmp_path_factory.mktemp("gate")
    old, same, worse = (place / f"{name}.gguf" for name in ("old", "same", "worse"))
    done("export", tiny, old, "--type", "Q8_0", *PLAIN)
    shutil.copy(old, same)
    plan = place / "plan.json"
    done("plan", tiny, "-o", plan, "--type", "Q8_0", "--no-imatrix")
    content = json.loads(plan.read_text("utf-8"))
    content["tensors"]["blk.1.ffn_down.weight"]["type"] = "q4_0"
    plan.write_text(json.dumps(content), "utf-8")
    done("export", tiny, worse, "--plan", plan, *PLAIN)
    report = place / "report.json"
    measured = ("evaluate", old, "--reference", tiny, "--text", texts[1], *FLAGS)
    report.write_text(done(*measured, "--work", place / "work").out, "utf-8")
    return {"old": old, "same": same, "worse": worse, "report": report, "text": texts[1]}


@pytest.fixture
def edited(built, tmp_path):
    """Write the baseline's report with a change."""

    def write(change):
        content = json.loads(built["report"].read_text("utf-8"))
        change(content)
        path = tmp_path / "edited.json"
        path.write_text(json.dumps(content), "utf-8")
        return path

    return write


def baseline_of(built):
    return gate.read_baseline(built["report"]).evaluation


# ------------------------------------------------------------------------------------- the command


def test_a_planted_regression_fails(built, speeds, tmp_path):
    found = tmp_path / "found.json"
    arguments = ("check", built["worse"], "--against", built["report"], "--json", found)
    result = run(*arguments, "--work", tmp_path / "work")
    assert (result.code, result.err) == (1, "")
    kld, flips, tps = result.out.splitlines()
    assert kld.startswith("FAILED kld: ×")
    assert "allowed at most ×1.0500, 95 % interval [×" in kld
    assert flips.startswith(("ok flips: ", "FAILED flips: "))
    assert "allowed at most +1.00 %" in flips
    assert tps.startswith(
        "ok tps: ×1.0000 (100.0 against 100.0 tokens/s decoded), allowed at least"
    )
    assert speeds["files"] == [str(built["worse"]), str(built["old"])]
    values = json.loads(found.read_text("utf-8"))
    assert (values["schema"], values["passed"]) == (1, False)
    by_name = {each["name"]: each for each in values["criteria"]}
    assert list(by_name) == ["kld", "flips", "tps"]
    assert by_name["kld"]["status"] == "failed"
    assert by_name["kld"]["low"] > by_name["kld"]["allowed"] == 1.05
    assert by_name["kld"]["measured"] == pytest.approx(
        by_name["kld"]["figures"]["kld"] / by_name["kld"]["figures"]["baseline_kld"], rel=1e-2
    )
    assert values["file"] == str(built["worse"])
    assert values["baseline"] == str(built["old"])


def test_what_is_allowed_passes(built, speeds, tmp_path):
    loose = ("--max-kld-increase", "100000%", "--max-flips", "100%", "--work", tmp_path / "work")
    shown = done("check", built["worse"], "--against", built["report"], *loose).out
    assert [line.split(":")[0] for line in shown.splitlines()] == ["ok kld", "ok flips", "ok tps"]


def test_an_unchanged_file_passes_whatever_is_allowed(built, speeds, tmp_path):
    strict = ("--max-kld-increase", "0%", "--max-flips", "0", "--min-tps-ratio", "1")
    work = ("--work", tmp_path / "work")
    values = done("check", built["same"], "--against", built["report"], *strict, *work, "--json")
    assert values.json()["passed"]
    for each in values.json()["criteria"]:
        same = 0.0 if each["name"] == "flips" else 1.0
        assert (each["status"], each["measured"], each["low"], each["high"]) == ("ok", *[same] * 3)


def test_an_export_is_checked_on_the_text_that_it_held_out(tiny, texts, speeds, tmp_path):
    old, new = tmp_path / "old.gguf", tmp_path / "new.gguf"
    short = ("--quantizer", "rtn", "--ctx", 64, "--chunks", 6, "--eval-chunks", 4)
    done("export", tiny, old, "--type", "Q4_0", "--text", texts[0], *short)
    done("export", tiny, new, "--type", "Q4_1", "--text", texts[0], *short)
    shown = done("check", new, "--against", tmp_path / "old.edgeq" / "report.json").out
    assert "ok kld: ×0." in shown
    assert "report.json: 4 chunks; the intervals of fewer than 10 are too narrow" in shown
    whole = ("--text", texts[0])  # of which the export held a part out
    line = refused("check", new, "--against", tmp_path / "old.edgeq" / "report.json", *whole)
    assert line.startswith(f"edgeq: {texts[0]}: is not the text of")


def test_stored_logits_are_a_reference_too(built, tiny, speeds, tmp_path):
    stored, report = tmp_path / "logits.kld", tmp_path / "report.json"
    common = ("evaluate", built["old"], "--reference", tiny, "--text", built["text"], *FLAGS)
    report.write_text(done(*common, "--save-logits", stored, "--work", tmp_path / "w").out, "utf-8")
    work = ("--work", tmp_path / "work")
    done("check", built["same"], "--against", report, *work)
    done("check", built["same"], "--against", report, "--text", built["text"], *work)
    assert run("check", built["worse"], "--against", report, *work).code == 1
    other = ("--against", built["report"], "--reference", stored, *work)
    line = refused("check", built["same"], *other)
    assert "got a reference of kind 'base', expected 'model'" in line
    shorter = tmp_path / "shorter.kld"
    done(*common[:-2], "--save-logits", shorter, "--chunks", 5, "--work", tmp_path / "w")
    line = refused("check", built["same"], "--against", report, "--reference", shorter, *work)
    assert "got 5 chunks of 64 tokens, expected its 12 of 64, token for token" in line
    assert not (tmp_path / "work").exists()


def test_a_compact_store_is_all_that_a_machine_needs(wide, texts, speeds, tmp_path):
    old, new, stored = tmp_path / "old.gguf", tmp_path / "new.gguf", tmp_path / "reference.edgeq"
    done("export", wide, old, "--type", "Q8_0", *PLAIN)
    done("export", wide, new, "--type", "Q4_0", *PLAIN)
    measured = ("evaluate", old, "--reference", wide, "--text", texts[1], "--save-logits", stored)
    (tmp_path / "report.json").write_text(done(*measured, *FLAGS).out, "utf-8")
    away = tmp_path / "away"
    away.mkdir()
    report, found = (Path(shutil.move(path, away)) for path in (tmp_path / "report.json", stored))
    same = shutil.copy(old, away / "same.gguf")
    old.unlink()
    shown = done("check", same, "--against", report, "--reference", found).out
    assert [line.split(":")[0] for line in shown.splitlines()] == [
        "ok kld",
        "ok flips",
        "not checked tps",
    ]
    assert run("check", new, "--against", report, "--reference", found).code == 1
    assert files_under(away) == {"report.json", "reference.edgeq", "same.gguf"}


def test_files_and_references_may_have_moved(built, tiny, speeds, tmp_path):
    moved = shutil.copy(tiny, tmp_path / "moved.gguf")
    report = shutil.copy(built["report"], tmp_path / "report.json")
    given = ("--reference", moved, "--text", built["text"])
    done("check", built["same"], "--against", report, *given)


def test_times_are_really_measured(built):
    outcome = gate.check(built["same"], built["report"])
    tps = outcome.criteria[2]
    assert tps.status in ("ok", "failed")  # whatever this machine is doing
    assert tps.figures["repetitions"] == REPETITIONS
    assert 0 < tps.low <= tps.measured <= tps.high


# --------------------------------------------------------------------------------- what it decides


def test_an_unchanged_file_never_fails_in_50_repetitions(built, tiny):
    base = baseline_of(built)
    strict = Limits(max_kld_increase=0.0, max_flips=0.0)
    again = evaluate(built["same"], base.chunks, tiny, n_ctx=64, n_threads=2)
    for seed in range(50):
        for compare in (compare_kld, compare_flips):
            found = compare(again, base, strict, seed)
            assert found.status == "ok", found.line


def noisy(evaluation, seed, scale=1.0, spread=0.2, n_chunks=32):
    """The evaluation with divergences of independent chunks, `scale` on average."""
    random = np.random.default_rng(seed)
    by_chunk = scale * random.gamma(1 / spread**2, spread**2, (n_chunks, 1))
    return dataclasses.replace(evaluation, kld=np.repeat(by_chunk, 31, axis=1))


def test_noise_is_no_regression_and_a_regression_is_found_in_noise(built):
    base, limits = baseline_of(built), Limits()
    failed = {"same": 0, "as allowed": 0, "worse": 0}
    for seed in range(50):
        old = noisy(base, seed)
        for name, scale in (("same", 1.0), ("as allowed", 1.05), ("worse", 1.4)):
            new = noisy(base, 1000 + seed, scale)
            failed[name] += compare_kld(new, old, limits, seed).status == "failed"
    assert failed["same"] <= 1
    assert failed["as allowed"] <= 4  # 2.5 % are meant to
    assert failed["worse"] >= 48


def test_a_hard_chunk_is_hard_for_both(built):
    """Chunks differ a hundredfold, the files by 10 %: only the pairing shows it."""
    base = baseline_of(built)
    by_chunk = np.repeat(np.geomspace(0.01, 1, N_CHUNKS)[:, None], 31, axis=1)
    old = dataclasses.replace(base, kld=by_chunk)
    found = compare_kld(dataclasses.replace(base, kld=1.1 * by_chunk), old, Limits())
    assert (found.status, found.low) == ("failed", pytest.approx(1.1, rel=1e-4))
    assert compare_kld(old, dataclasses.replace(base, kld=1.1 * by_chunk), Limits()).status == "ok"


def test_a_baseline_that_is_the_reference_has_a_ratio(built):
    base = baseline_of(built)
    exact = dataclasses.replace(base, kld=0 * base.kld)
    assert compare_kld(exact, exact, Limits()).measured == 1
    found = compare_kld(base, exact, Limits())
    assert found.status == "failed"
    assert np.isfinite(found.high)


def test_flips_are_those_from_the_reference(built):
    """Another file with as many flips at other tokens is no worse; one with more is."""
    base = baseline_of(built)
    reference = base.top_reference
    flipped = np.zeros(reference.shape, bool)
    flipped[:, :3] = True
    old = dataclasses.replace(base, top=np.where(flipped, reference + 1, reference))
    elsewhere = dataclasses.replace(base, top=np.where(flipped[:, ::-1], reference + 1, reference))
    found = compare_flips(elsewhere, old, Limits())
    n_flips = 3 * N_CHUNKS
    assert (found.status, found.measured) == ("ok", 0)
    assert (found.figures["lost"], found.figures["found"]) == (n_flips, n_flips)
    assert found.figures["changed"] == pytest.approx(6 / 31)
    more = dataclasses.replace(old, top=np.where(flipped | flipped[:, ::-1], -1, reference))
    found = compare_flips(more, old, Limits())
    assert (found.status, found.measured) == ("failed", pytest.approx(3 / 31))
    assert found.line.startswith("FAILED flips: +9.68 % (19.35 % against 9.68 % of 372 tokens; 36 ")
    assert compare_flips(old, more, Limits()).status == "ok"


@pytest.mark.parametrize(
    ("new", "status"),
    [
        ([100] * 9, "ok"),
        ([95, 96, 94, 95, 97, 93, 95, 96, 94], "ok"),
        ([80, 81, 79, 80, 82, 78, 80, 81, 79], "failed"),
        ([80, 80, 80, 80, 80, 100, 100, 100, 100], "ok"),  # as often as not within what is allowed
        ([120] * 9, "ok"),
    ],
)
def test_only_a_file_that_is_surely_slower_fails(new, status):
    found = compare_tps(speed(new), speed([100] * 9), Limits())
    assert (found.status, found.measured) == (status, pytest.approx(np.median(new) / 100))


# -------------------------------------------------------------------------------- when time is not


def test_a_baseline_that_is_gone_is_not_timed_and_that_is_said(built, edited, tmp_path):
    report = edited(lambda content: content["files"][0].update(path="gone.gguf"))
    arguments = ("check", built["same"], "--against", report, "--work", tmp_path / "work")
    junit = tmp_path / "junit.xml"
    shown = done(*arguments, "--junit", junit).out
    assert f"not checked tps: gone.gguf, the file of {report}, is not there\n" in shown
    (case,) = ElementTree.parse(junit).getroot().iterfind("testcase[skipped]")
    assert case.get("name") == "tps"
    line = refused(*arguments, "--min-tps-ratio", "0.5")
    assert line.startswith("edgeq: --min-tps-ratio: cannot be checked: gone.gguf, the file of")


def test_an_overwritten_baseline_is_not_timed(built, edited, tmp_path):
    work = ("--work", tmp_path / "work")
    shown = done("check", built["old"], "--against", built["report"], *work).out
    assert "is the new file itself" in shown
    other = edited(lambda content: content["files"][0].update(path=str(built["worse"])))
    shown = done("check", built["same"], "--against", other, *work).out
    assert f"not checked tps: {built['worse']} is not the file of {other} any more; got" in shown
    text = edited(lambda content: content["files"][0].update(path=str(built["text"])))
    assert "not checked tps: " in done("check", built["same"], "--against", text, *work).out


# ------------------------------------------------------------------------------------------- JUnit


def test_junit_has_a_case_for_each_criterion(built, speeds, tmp_path):
    speeds["new"] = [50.0] * REPETITIONS
    odd = shutil.copy(built["worse"], tmp_path / "a<b>&\x01.gguf")
    junit = tmp_path / "junit.xml"
    work = ("--work", tmp_path / "work")
    result = run("check", odd, "--against", built["report"], "--junit", junit, *work)
    assert result.code == 1
    suite = ElementTree.parse(junit).getroot()
    assert suite.tag == "testsuite"
    assert suite.get("name") == f"edgeq check {tmp_path}/a<b>&?.gguf"
    cases = list(suite.iterfind("testcase"))
    assert [case.get("name") for case in cases] == ["kld", "flips", "tps"]
    assert {case.get("classname") for case in cases} == {"edgeq.check"}
    failed = {case.get("name"): case.find("failure") for case in cases}
    lines = result.out.splitlines()
    assert failed["kld"].get("message") == lines[0]
    assert failed["tps"].get("message") == lines[2]
    n_failed = sum(failure is not None for failure in failed.values())
    assert (suite.get("tests"), suite.get("failures")) == ("3", str(n_failed))


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("--max-kld-increase", "five", "'five', expected a percentage of 0% or more"),
        ("--max-kld-increase", "5", "'5', expected a percentage"),
        ("--max-kld-increase", "-5%", "'-5%', expected a percentage"),
        ("--max-flips", "nan", "'nan', expected a percentage"),
        ("--max-flips", "%", "'%', expected a percentage"),
        ("--min-tps-ratio", "0", "'0', expected a number above 0"),
        ("--min-tps-ratio", "inf", "'inf', expected a number above 0"),
    ],
)
def test_limits_that_are_no_numbers_are_refused(flag, text, expected):
    line = refused("check", "new.gguf", "--against", "report.json", f"{flag}={text}")
    assert line.startswith(f"edgeq: {flag}: got {expected}")
    assert "Write it like" in line


def test_percentages_and_fractions_are_the_same():
    assert Limits.parse() == Limits(0.05, 0.01, 0.9)
    assert Limits.parse("5%", "0.01", "90%") == Limits(0.05, 0.01, 0.9, requires_tps=True)
    assert Limits.parse("150%", "0", "1.1") == Limits(1.5, 0.0, 1.1, requires_tps=True)
    with pytest.raises(RecipeError, match="--max-flips: got '1', expected a percentage"):
        Limits.parse(None, "1")


NOT_NUMBERS = base64.b64encode(zlib.compress(np.full((N_CHUNKS, 31), np.nan).tobytes())).decode()


def first(content):
    return content["files"][0]["evaluation"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(schema=99), "got a report of schema 99, expected 1"),
        (lambda c: c.pop("files"), "is not a report; expected what edgeq evaluate --json or"),
        (lambda c: c.update(files=[]), "no file in it was judged"),
        (lambda c: c["files"][0].update(evaluation=None), "no file in it was judged"),
        (lambda c: first(c).pop("tokens"), "is not a whole report (evaluation: not a complete"),
        (lambda c: first(c)["tokens"].update(kld="@"), "is not a whole report"),
        (lambda c: first(c)["tokens"].update(kld=NOT_NUMBERS), "NaN or infinite values"),
        (lambda c: c["files"][0].update(size_bytes="many"), "is not a whole report"),
        (lambda c: c["files"][0].pop("path"), "is not a whole report"),
        (lambda c: first(c).update(tokens_sha256="0" * 64), "is not the text of"),
        (lambda c: first(c).update(reference="gone.gguf"), "its reference gone.gguf is not there"),
        (lambda c: first(c)["tokens"].pop("chunks"), "does not keep its text; an earlier edgeq"),
    ],
)
def test_a_report_that_does_not_fit_is_refused(built, edited, tmp_path, change, expected):
    report = edited(change)
    before = files_under(tmp_path)
    line = refused("check", built["same"], "--against", report, "--work", tmp_path / "work")
    assert line.startswith(f"edgeq: {report}: ")
    assert expected in line
    assert files_under(tmp_path) - {"work", "work/lock"} == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"no report", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[]", "is not a report")],
)
def test_another_file_is_no_report(built, tmp_path, content, expected):
    report = tmp_path / "report.json"
    report.write_bytes(content)
    assert expected in refused("check", built["same"], "--against", report)


def test_missing_files_are_told_first(built, tmp_path):
    missing = tmp_path / "missing.json"
    line = refused("check", built["same"], "--against", missing)
    assert line.startswith(f"edgeq: {missing}: cannot be read: No such file or directory")
    line = refused("check", tmp_path / "missing.gguf", "--against", built["report"])
    assert "missing.gguf" in line
    assert files_under(tmp_path) == set()


def test_a_report_of_one_chunk_is_refused(built, tiny, tmp_path):
    report = tmp_path / "report.json"
    one = ("--ctx", 64, "--chunks", 1, "--no-speed", "--json", "--work", tmp_path / "work")
    measured = ("evaluate", built["old"], "--reference", tiny, "--text", built["text"], *one)
    report.write_text(done(*measured).out, "utf-8")
    line = refused("check", built["same"], "--against", report)
    assert "got 1 chunk, expected at least 2 to compare" in line


def test_an_old_report_needs_the_text(built, edited, speeds, tmp_path):
    report = edited(lambda content: first(content)["tokens"].pop("chunks"))
    given = ("--text", built["text"], "--work", tmp_path / "work")
    done("check", built["same"], "--against", report, *given)


def test_another_text_is_refused(built, texts, tmp_path):
    work = ("--work", tmp_path / "work")
    line = refused("check", built["same"], "--against", built["report"], "--text", texts[0], *work)
    assert line.startswith(
        f"edgeq: {texts[0]}: is not the text of {built['report']}; got 12 chunks"
    )
    assert "Leave --text out: the report keeps its text." in line


def test_another_reference_is_refused(built, tmp_path):
    rounded = {
        name: np.round(tiny_gguf.values(name, shape) * 4).astype(np.float32) / 4
        for name, shape in {"blk.1.attn_v.weight": (32, tiny_gguf.N_EMBD)}.items()
    }
    other = tiny_gguf.write(tmp_path / "other.gguf", "llama", replace=rounded)
    given = ("--reference", other, "--work", tmp_path / "work")
    line = refused("check", built["same"], "--against", built["report"], *given)
    assert line.startswith(f"edgeq: {other}: is not the reference of {built['report']}; its −ln p")


def test_another_vocabulary_is_refused(built, wide, tmp_path):
    new = tmp_path / "new.gguf"
    done("export", wide, new, "--type", "Q8_0", *PLAIN)
    line = refused("check", new, "--against", built["report"], "--work", tmp_path / "work")
    assert "has another vocabulary than" in line


def test_text_that_the_new_file_was_calibrated_on_is_refused(built, tiny, speeds, tmp_path):
    new, report = tmp_path / "new.gguf", tmp_path / "report.json"
    long = ("--ctx", 256, "--chunks", 10, "--work", tmp_path / "work")  # passages have 13 words
    done("export", tiny, new, *RTN, "--text", built["text"], *long[:2], "--no-prove")
    measured = ("evaluate", built["old"], "--reference", tiny, "--text", built["text"], *long)
    report.write_text(done(*measured, "--no-speed", "--json").out, "utf-8")
    arguments = ("check", new, "--against", report, *long[4:])
    line = refused(*arguments)
    assert line.startswith(f"edgeq: {report}: ")
    assert "insist with --force" in line
    assert "Judged on calibration text" in run(*arguments, "--force").out


def test_nothing_that_is_read_is_overwritten(built, tmp_path):
    for flag in ("--json", "--junit"):
        for read in (built["same"], built["report"], built["text"]):
            line = refused(
                "check", built["same"], "--against", built["report"], "--text", built["text"],
                f"{flag}={read}",
            )  # fmt: skip
            assert "the output would overwrite" in line
        line = refused(
            "check", built["same"], "--against", built["report"], f"{flag}={tmp_path}/no/out"
        )
        assert "there is no directory" in line


def test_json_without_a_file_takes_no_model_for_it(built):
    result = run("check", "--against", built["report"], "--json", built["same"])
    assert result.code == 2
    assert "Missing argument 'FILE'" in result.err


# ---------------------------------------------------------------------------------- saved tokens


def test_reports_keep_the_text(built):
    base = baseline_of(built)
    assert base.chunks.shape == (N_CHUNKS, 64)
    again = Evaluation.from_json(json.loads(json.dumps(base.to_json())))
    np.testing.assert_array_equal(again.chunks, base.chunks)
    values = base.to_json()
    del values["tokens"]["chunks"]
    assert Evaluation.from_json(values).chunks is None
    assert "chunks" not in Evaluation.from_json(values).to_json()["tokens"]


# ----------------------------------------------------------------------------------- pytest plugin


SUITE = """
    def test_the_file_has_not_regressed(edgeq_check):
        assert edgeq_check.passed, edgeq_check.failures
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """Run somebody's suite, which has one test of the gate."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # installed or not: loaded once
    pytester.makepyfile(SUITE)

    def run_(*arguments):
        words = map(str, ("-p", "edgeq.pytest_plugin", "-rs", *arguments))
        return pytester.runpytest_inprocess(*words)

    return run_


def test_the_plugin_lets_a_good_file_pass(suite, built, speeds):
    result = suite("--edgeq-baseline", built["report"], "--edgeq-model", built["same"])
    result.assert_outcomes(passed=1)


def test_the_plugin_fails_for_a_worse_file(suite, built, speeds):
    given = ("--edgeq-baseline", built["report"], "--edgeq-model", built["worse"])
    result = suite(*given)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*AssertionError: ('FAILED kld: ×*"])
    limits = ("--edgeq-max-kld-increase", "100000%", "--edgeq-max-flips", "100%")
    suite(*given, *limits).assert_outcomes(passed=1)


def test_the_plugin_skips_where_nothing_is_given(suite):
    result = suite()
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*edgeq: give --edgeq-baseline REPORT and --edgeq-model FILE"])


def test_the_plugin_says_in_one_line_what_does_not_fit(suite, built, tmp_path):
    result = suite("--edgeq-model", built["same"])
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["edgeq: give --edgeq-baseline REPORT too"])
    result = suite("--edgeq-model", built["same"], "--edgeq-baseline", tmp_path / "missing.json")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["edgeq: *missing.json: cannot be read: No such file*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_the_plugin_costs_nothing_until_it_is_used(tmp_path):
    (tmp_path / "test_other.py").write_text("def test_other():\n    pass\n", "utf-8")
    heavy = ("numpy", "numba", "gguf", "llama_cpp", "click", "edgeq.gate", "edgeq.evaluation")
    probe = (
        "import sys, pytest; code = pytest.main(['-q', '-p', 'edgeq.pytest_plugin', '.']); "
        f"print('loaded:', *[name for name in {heavy} if name in sys.modules]); sys.exit(code)"
    )
    found = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines()[-1] == "loaded:"


def test_pytest_finds_the_plugin_where_edgeq_is_installed():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    (target,) = project["project"]["entry-points"]["pytest11"].values()
    assert hasattr(importlib.import_module(target), "edgeq_check")
