"""Every command through the console script's entry point, end to end on tiny models."""

import json

import numpy as np
import pytest

from converters.gguf_file import open_gguf
from converters.imatrix_file import read_imatrix
from edgeq.quantizers.rtn import RoundToNearest
from edgeq.runtime.model import Model
from tests.command_line import done, files_under, refused, run

RTN = ("--quantizer", "rtn")  # what a command does around the rounding
SHORT = (*RTN, "--ctx", 64, "--chunks", 6, "--eval-chunks", 3)
TOKENS = np.arange(3, 35)
BASE_ERROR = 1e-3  # nats; llama.cpp's format rounds log-probabilities to 16 bits


def loads(path):
    """Whether llama.cpp runs the file and says something finite."""
    with Model(path, n_ctx=64, n_threads=1) as model:
        return bool(np.isfinite(model.logits(TOKENS)).all())


def same_tensors(a, b):
    one, other = open_gguf(a), open_gguf(b)
    assert {n: t.qtype for n, t in one.tensors.items()} == {
        n: t.qtype for n, t in other.tensors.items()
    }
    return all(np.array_equal(one.read_bytes(n), other.read_bytes(n)) for n in one.tensors)


@pytest.fixture(scope="module")
def exported(tiny, texts, tmp_path_factory):
    """One whole export that several tests look at: (path, its --json)."""
    out = tmp_path_factory.mktemp("exported") / "out.gguf"
    run_ = done("export", tiny, out, "--type", "Q4_0", "--text", texts[0], *SHORT, "--json")
    return out, run_.json()


# ---------------------------------------------------------------------------------------- export


def test_a_checkpoint_becomes_the_file_that_llama_cpp_would_write(
    built_checkpoint, texts, tmp_path
):
    out = tmp_path / "out.gguf"
    shown = done("export", built_checkpoint, out, "--text", texts[0], *SHORT, "--baseline").out
    assert loads(out)
    assert same_tensors(out, tmp_path / "out.edgeq" / "baseline.gguf")
    file = open_gguf(out)
    assert file.value("general.file_type") == 15
    assert {t.qtype.name for t in file.tensors.values()} == {"Q4_K", "Q6_K", "F32"}
    for part in ("| edgeq rtn Q4_K_M ", "| llama-quantize Q4_K_M ", "| float reference "):
        assert part in shown
    assert "edgeq rtn Q4_K_M − llama-quantize Q4_K_M: KL divergence +0.000000" in shown


def test_a_float_gguf_is_used_as_it_is(exported, tiny):
    out, report = exported
    assert loads(out)
    assert not (out.parent / "out.edgeq" / "reference.gguf").exists()
    assert [file["label"] for file in report["files"]] == ["edgeq rtn Q4_0", "float reference"]
    assert [file["path"] for file in report["files"]] == [str(out), str(tiny)]
    judged = report["files"][0]["evaluation"]
    assert judged["n_chunks"] == 3
    assert 0 < judged["summary"]["kld"]["value"] < 2
    assert report["files"][0]["speed"]["decode"]["median"] > 0
    assert any("do not divide" in note for note in report["notes"])


def test_the_report_is_kept_in_the_work_directory(exported):
    out, report = exported
    assert json.loads((out.parent / "out.edgeq" / "report.json").read_text("utf-8")) == report


def test_the_same_export_gives_the_same_bytes(exported, tiny, texts, tmp_path):
    out = tmp_path / "again.gguf"
    done("export", tiny, out, "--type", "Q4_0", "--text", texts[0], *SHORT)
    assert out.read_bytes() == exported[0].read_bytes()


def test_the_model_writes_its_own_text(tiny, tmp_path):
    out = tmp_path / "out.gguf"
    report = done("export", tiny, out, "--type", "Q4_0", *SHORT, "--json").json()
    assert report["provenance"]["texts"]["calibration"]["names"] == ["auto"]
    assert report["provenance"]["texts"]["calibration"]["n_tokens"] == 6 * 64
    assert report["provenance"]["texts"]["evaluation"]["n_tokens"] == 3 * 64
    assert open_gguf(out).value("quantize.imatrix.dataset") == "auto"


def test_without_an_imatrix_nothing_is_calibrated(tiny, texts, tmp_path):
    out = tmp_path / "out.gguf"
    report = done(
        "export", tiny, out, "--type", "Q4_0", "--no-imatrix", "--eval-text", texts[0], *SHORT,
        "--baseline", "--json",
    ).json()  # fmt: skip
    assert set(report["provenance"]["texts"]) == {"evaluation"}
    assert report["provenance"]["imatrix_sha256"] is None
    assert "calibrate" not in report["seconds"]
    assert same_tensors(out, tmp_path / "out.edgeq" / "baseline.gguf")
    assert not [key for key in open_gguf(out).fields if key.startswith("quantize.")]


@pytest.mark.parametrize("name", ["imatrix.gguf", "imatrix.dat"])
def test_a_given_imatrix_replaces_calibration(name, exported, tiny, texts, tmp_path):
    imatrix, out = tmp_path / name, tmp_path / "out.gguf"
    figures = done(
        "calibrate", tiny, "-o", imatrix, "--text", texts[0], "--ctx", 64, "--chunks", 6, "--json"
    ).json()
    assert figures["paths"] == [str(imatrix)]
    assert figures["tokens"] == 6 * 64
    found = read_imatrix(imatrix)
    assert figures["entries"] == len(found.sums)
    assert "output.weight" not in found.sums
    flags = ("--imatrix", imatrix, "--no-prove", "--baseline")
    done("export", tiny, out, *RTN, "--type", "Q4_0", *flags)
    assert same_tensors(out, tmp_path / "out.edgeq" / "baseline.gguf")
    assert open_gguf(out).value("quantize.imatrix.file") == str(imatrix)
    assert open_gguf(out).value("quantize.imatrix.chunks_count") == 6


def test_an_edited_plan_is_followed(tiny, texts, tmp_path):
    plan, types, out = tmp_path / "plan.json", tmp_path / "types.txt", tmp_path / "out.gguf"
    figures = done(
        "plan", tiny, "-o", plan, "--type", "Q4_0", "--tensor-type-file", types, "--json"
    ).json()
    assert figures["paths"] == [str(plan), str(types)]
    assert "^blk\\.1\\.ffn_down\\.weight$=q4_0\n" in types.read_text("utf-8")
    content = json.loads(plan.read_text("utf-8"))
    content["tensors"]["blk.1.ffn_down.weight"]["type"] = "q5_1"
    content["tensors"]["blk.0.attn_q.weight"]["type"] = "F16"
    plan.write_text(json.dumps(content), "utf-8")
    done("export", tiny, out, "--plan", plan, "--text", texts[0], *SHORT, "--baseline")
    tensors = open_gguf(out).tensors
    assert tensors["blk.1.ffn_down.weight"].qtype.name == "Q5_1"
    assert tensors["blk.0.attn_q.weight"].qtype.name == "F16"
    assert tensors["blk.0.ffn_down.weight"].qtype.name == "Q4_0"
    assert same_tensors(out, tmp_path / "out.edgeq" / "baseline.gguf")
    assert loads(out)


def test_a_large_output_is_split(exported, tiny, texts, tmp_path):
    out = tmp_path / "out.gguf"
    whole = ("export", tiny, out, "--type", "Q4_0", "--text", texts[0], *SHORT)
    report = done(*whole, "--split-max-size", "30K", "--json").json()
    parts = sorted(tmp_path.glob("out-*.gguf"))
    assert len(parts) > 2
    assert report["files"][0]["path"] == str(parts[0])
    assert report["files"][0]["size_bytes"] == sum(part.stat().st_size for part in parts)
    assert not out.exists()
    assert same_tensors(parts[0], exported[0])
    assert loads(parts[0])


# --------------------------------------------------------------------------------------- convert


def test_convert_writes_the_checkpoints_own_type(built_checkpoint, tmp_path):
    figures = done("convert", built_checkpoint, tmp_path / "f.gguf", "--json").json()
    assert figures["architecture"] == "llama"
    assert figures["parameters"] == open_gguf(tmp_path / "f.gguf").n_parameters
    assert {t.qtype.name for t in open_gguf(tmp_path / "f.gguf").tensors.values()} == {
        "BF16",
        "F32",
    }
    shown = done("convert", built_checkpoint, tmp_path / "q.gguf", "--type", "q8_0").out
    assert shown.startswith(f"{tmp_path / 'q.gguf'}: architecture llama, tensors 21,")
    assert loads(tmp_path / "f.gguf")
    assert loads(tmp_path / "q.gguf")


def test_convert_takes_no_gguf(tiny, tmp_path):
    line = refused("convert", tiny, tmp_path / "out.gguf")
    assert "is a GGUF file already. Use edgeq export to quantize it, edgeq rotate to" in line
    assert files_under(tmp_path) == set()


# -------------------------------------------------------------------------------------- evaluate


def test_evaluate_compares_files_pair_by_pair(exported, tiny, texts, tmp_path):
    other = tmp_path / "better.gguf"
    done("export", tiny, other, "--type", "Q8_0", "--no-imatrix", "--no-prove")
    common = ("--reference", tiny, "--text", texts[1], "--ctx", 64, "--chunks", 4)
    measured = ("evaluate", exported[0], other, *common, "--work", tmp_path / "work")
    values = done(*measured, "--json").json()
    assert [file["label"] for file in values["files"]] == ["out.gguf", "better.gguf"]
    divergences = [file["evaluation"]["summary"]["kld"]["value"] for file in values["files"]]
    assert divergences[0] > 5 * divergences[1] > 0
    shown = done(*measured).out
    assert "out.gguf − better.gguf: KL divergence +" in shown
    assert "KL divergence percentiles max" in shown


@pytest.mark.parametrize(("name", "kind"), [("logits.kld", "base"), ("logits.edgeq", "compact")])
def test_stored_logits_stand_in_for_the_reference(name, kind, wide, texts, tmp_path):
    stored, out = tmp_path / name, tmp_path / "out.gguf"
    done("export", wide, out, "--type", "Q4_0", "--no-imatrix", "--no-prove")
    judge = ("evaluate", out, "--no-speed", "--json", "--reference")
    text = ("--text", texts[1], "--ctx", 64, "--chunks", 2)
    direct = done(*judge, wide, *text).json()["files"][0]["evaluation"]
    first = done(*judge, wide, *text, "--save-logits", stored).json()["files"][0]["evaluation"]
    again = done(*judge, stored).json()["files"][0]["evaluation"]
    with_text = done(*judge, stored, "--text", texts[1]).json()["files"][0]["evaluation"]
    assert first["reference_kind"] == kind
    assert first["summary"] == again["summary"] == with_text["summary"]
    assert first["tokens_sha256"] == direct["tokens_sha256"]
    difference = abs(first["summary"]["kld"]["value"] - direct["summary"]["kld"]["value"])
    assert difference <= (first["summary"]["kld_bound"] or BASE_ERROR)
    line = refused(*judge, stored, "--save-logits", tmp_path / "second.kld")
    assert "holds logits already; leave --save-logits out." in line
    assert not (tmp_path / "second.kld").exists()
    assert "was made of another text" in refused(*judge, stored, "--text", texts[0])


# ------------------------------------------------------------------------------ inspect, plugins


def test_inspect_shows_types_bytes_and_differences(exported, tiny):
    out, report = exported
    values = done("inspect", out, "--json").json()
    assert values["size_bytes"] == out.stat().st_size
    assert values["bpw"] == pytest.approx(report["files"][0]["bpw"])
    assert {total["qtype"] for total in values["types"]} == {"Q4_0", "Q8_0", "F32"}
    assert sum(total["n_parameters"] for total in values["types"]) == values["n_parameters"]
    assert values["differences"] is None
    against = done("inspect", out, "--against", tiny, "--json").json()["differences"]
    errors = {each["name"]: each["relative_error"] for each in against}
    assert against[0]["change"].endswith("against F32")
    assert 0 < errors["output.weight"] < 0.02 < errors["blk.0.ffn_up.weight"] < 0.2
    assert "blk.0.attn_norm.weight" not in errors
    same = done("inspect", tiny, "--against", tiny).out
    assert "The tensors of both files are equal, byte for byte." in same
    assert "tokenizer.ggml.tokens = ['<|end|>'" in done("inspect", tiny, "--metadata").out


def test_plugins_lists_quantizers_and_architectures():
    values = done("plugins", "--json").json()
    rtn = {"name": "rtn", "target": "edgeq.quantizers.rtn:RoundToNearest", "origin": "edgeq"}
    gptq = {"name": "gptq", "target": "edgeq.quantizers.gptq:Gptq", "origin": "edgeq"}
    learned = {"name": "learned", "target": "edgeq.quantizers.learned:Learned", "origin": "edgeq"}
    assert values["quantizer"] == [gptq, learned, rtn]
    assert "llama" in {each["name"] for each in values["architecture"]}
    assert "quantizer      rtn              edgeq\n" in done("plugins").out


def test_verbose_says_what_is_done(tiny, texts, tmp_path, caplog):
    done("plan", tiny, "-o", tmp_path / "plan.json", "--type", "Q4_0", "-v")
    done("export", tiny, tmp_path / "o.gguf", "--type", "Q4_0", "--no-imatrix", "--no-prove")
    with caplog.at_level("INFO", logger="edgeq"):
        done(
            "export", tiny, tmp_path / "o.gguf", "--type", "Q4_0", "--no-imatrix", "--no-prove",
            "-v",
        )  # fmt: skip
    assert "reused" in caplog.text


# ------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exprot",), "No such command 'exprot'"),
        (("export", "model"), "Missing argument 'OUT'"),
        (("export", "model", "o.gguf", "--bits", "4"), "No such option"),
        (("export", "model", "o.gguf", "--split-max-size", "2X"), "'2X' is not a size"),
        (("export", "model", "o.gguf", "--ctx", "many"), "'many' is not a valid integer"),
        (("convert", "model", "o.gguf", "--type", "q4_0"), "'q4_0' is not one of 'auto', 'f32'"),
        (("calibrate", "model"), "Missing option '-o' / '--out'"),
        (("evaluate", "o.gguf"), "Missing option '--reference'"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message):
    result = run(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert message in result.err
    assert "Traceback" not in result.err


def test_an_interrupt_exits_with_130_and_one_line(tiny, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(RoundToNearest, "quantize", interrupt)
    out = tmp_path / "out.gguf"
    result = run("export", tiny, out, "--type", "Q4_0", "--no-imatrix", "--no-prove")
    assert result.code == 130
    assert result.err.strip() == "edgeq: interrupted. Run the same command again to go on."
    assert not out.exists()
    assert not [name for name in files_under(tmp_path) if name.endswith((".tmp", ".safetensors"))]


def test_a_bug_keeps_its_traceback(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(RoundToNearest, "quantize", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("export", tiny, tmp_path / "o.gguf", "--type", "Q4_0", "--no-imatrix", "--no-prove")
