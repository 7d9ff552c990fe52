"""What a run reuses, what an interrupted one leaves, and what a file says about its making."""

import json
import shutil

import numpy as np
import pytest

from converters.gguf_file import open_gguf
from edgeq import opening, provenance
from edgeq.quantizers.rtn import RoundToNearest
from edgeq.workdir import WorkDirectory
from tests import tiny_gguf
from tests.command_line import done, files_under, refused, run

RTN = ("--quantizer", "rtn")  # what is made, kept and told does not depend on the rounding
SHORT = (*RTN, "--ctx", 64, "--chunks", 24, "--eval-chunks", 2)
LONG = (*RTN, "--ctx", 256, "--chunks", 36, "--eval-chunks", 2)  # as many words as passages need
LAYERS = [
    "layers/blk.0.safetensors",
    "layers/blk.1.safetensors",
    "layers/output.weight.safetensors",
    "layers/token_embd.weight.safetensors",
]
ALL = ["text.safetensors", "imatrix.gguf", *LAYERS]


@pytest.fixture
def export(works, tiny, texts, tmp_path):
    """Run one export into out.gguf; return (what was made, what was reused)."""

    def export(*flags, model=tiny, text=texts[0], qtype="Q4_0", expect=0):
        arguments = ("--type", qtype, "--text", text, *SHORT, "--no-prove", *flags)
        result = run("export", model, tmp_path / "out.gguf", *arguments)
        assert result.code == expect, result
        return works[-1].made, works[-1].reused

    return export


# ----------------------------------------------------------------------------------------- resume


def test_a_second_run_reuses_everything(export, tmp_path):
    assert export() == (ALL, [])
    content = (tmp_path / "out.gguf").read_bytes()
    assert export() == ([], ALL)
    assert (tmp_path / "out.gguf").read_bytes() == content


def test_the_report_says_what_was_reused(tiny, texts, tmp_path):
    command = ("export", tiny, tmp_path / "o.gguf", "--type", "Q4_0", "--text", texts[0], *SHORT)
    assert not any("Reused" in note for note in done(*command, "--json").json()["notes"])
    notes = done(*command, "--json").json()["notes"]
    assert f"Reused from {tmp_path / 'o.edgeq'}: 7 of 7 intermediate results." in notes


def test_another_type_keeps_text_and_imatrix(export):
    export()
    output = LAYERS[2]  # Q8_0 in both
    assert export(qtype="Q4_1") == ([n for n in LAYERS if n != output], [*ALL[:2], output])


def test_one_changed_line_of_the_plan_changes_one_layer(export, tmp_path):
    export()
    plan = tmp_path / "plan.json"
    content = json.loads((tmp_path / "out.edgeq" / "plan.json").read_text("utf-8"))
    content["tensors"]["blk.1.attn_v.weight"]["type"] = "Q8_0"
    plan.write_text(json.dumps(content), "utf-8")
    made, reused = export("--plan", plan)
    assert made == ["layers/blk.1.safetensors"]
    assert len(reused) == 5
    assert open_gguf(tmp_path / "out.gguf").tensors["blk.1.attn_v.weight"].qtype.name == "Q8_0"


@pytest.mark.parametrize("flags", [{"--chunks": 3}, {"--ctx": 32}])
def test_other_settings_of_the_text_make_what_depends_on_it(flags, export):
    export()
    assert export(*next(iter(flags.items()))) == (ALL, [])


def test_another_text_makes_what_depends_on_it(export, texts, tmp_path):
    export()
    copy = shutil.copy(texts[0], tmp_path / "copy.txt")
    # the same tokens under another name: the imatrix names its text, its numbers are the same
    assert export(text=copy) == (ALL[:2], LAYERS)
    copy.write_text(texts[1].read_text("utf-8"), "utf-8")
    assert export(text=copy) == (ALL, [])


def test_without_an_imatrix_the_layers_are_others(export):
    export()
    made, reused = export("--no-imatrix")
    assert (made, reused) == (LAYERS, [])


def test_another_model_under_the_same_name_makes_everything(export, tiny, tmp_path):
    model = shutil.copy(tiny, tmp_path / "model.gguf")
    assert export(model=model) == (ALL, [])
    assert export() == ([], ALL)  # the content counts, not the name
    changed = tiny_gguf.values("blk.0.ffn_up.weight", (96, 64)) * 2
    tiny_gguf.write(model, "llama", replace={"blk.0.ffn_up.weight": changed})
    assert export(model=model) == (ALL, [])


def test_a_conversion_is_kept_until_the_checkpoint_changes(export, checkpoint, tmp_path):
    round_only = {"model": checkpoint, "qtype": "Q4_K_M"}
    made, _ = export("--no-imatrix", **round_only)
    assert made[0] == "reference.gguf"
    assert export("--no-imatrix", **round_only) == ([], made)
    path = checkpoint / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"rms_norm_eps": 1e-3}
    path.write_text(json.dumps(config), "utf-8")
    assert export("--no-imatrix", **round_only) == (made, [])
    eps = open_gguf(tmp_path / "out.gguf").value("llama.attention.layer_norm_rms_epsilon")
    assert eps == pytest.approx(1e-3)


@pytest.mark.parametrize("artefact", ALL)
def test_a_damaged_artefact_is_noticed_and_made_again(artefact, export, tmp_path):
    export()
    content = (tmp_path / "out.gguf").read_bytes()
    path = tmp_path / "out.edgeq" / artefact
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert export() == ([artefact], [name for name in ALL if name != artefact])
    assert (tmp_path / "out.gguf").read_bytes() == content


@pytest.mark.parametrize(("interruption", "code"), [(KeyboardInterrupt, 130), (OSError, 1)])
def test_an_interrupted_run_goes_on_where_it_was(
    interruption, code, export, works, tmp_path, monkeypatch
):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"what was there before")

    quantize = RoundToNearest.quantize

    def stop_at_the_second_layer(quantizer, name, *rest, **options):
        if name.startswith("blk.1.ffn"):
            raise interruption
        return quantize(quantizer, name, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RoundToNearest, "quantize", stop_at_the_second_layer)
        assert export(expect=code) == (ALL[:3], [])
    assert out.read_bytes() == b"what was there before"
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "out.edgeq"}
    assert not [name for name in files_under(tmp_path) if name.endswith(".tmp")]
    assert export() == (ALL[3:], ALL[:3])
    resumed = out.read_bytes()
    shutil.rmtree(tmp_path / "out.edgeq")
    assert export() == (ALL, [])
    assert out.read_bytes() == resumed


def test_an_interrupted_write_leaves_the_output_as_it_was(export, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    export()
    content = out.read_bytes()

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("converters.gguf_writer._verify_part", stop)
        export("--no-imatrix", expect=130)
    assert out.read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "out.edgeq"}


def test_a_work_directory_in_use_is_refused(export, tiny, tmp_path):
    export()
    content = (tmp_path / "out.gguf").read_bytes()
    flags = ("--type", "Q8_0", "--no-imatrix", "--no-prove")
    with WorkDirectory(tmp_path / "out.edgeq"):
        line = refused("export", tiny, tmp_path / "out.gguf", *flags)
        assert "out.edgeq: in use by process" in line
        assert (tmp_path / "out.gguf").read_bytes() == content
        done("export", tiny, tmp_path / "out.gguf", *flags, "--work", tmp_path / "other")
    assert (tmp_path / "out.gguf").read_bytes() != content


def test_commands_share_a_work_directory(tiny, texts, works, tmp_path):
    text = ("--text", texts[0], "--ctx", 64, "--chunks", 4)
    done("calibrate", tiny, "-o", tmp_path / "out.imatrix", *text)
    out = tmp_path / "out.gguf"
    done("export", tiny, out, *RTN, "--type", "Q4_0", *text, "--no-prove")
    assert works[-1].reused == ALL[:2]


# ------------------------------------------------------------------------------------- provenance


@pytest.fixture(scope="module")
def exported(tiny, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out.gguf"
    return out, done(
        "export", tiny, out, "--type", "Q4_0", "--text", texts[0], *LONG, "--json"
    ).json()


def test_a_file_says_how_it_was_made(exported, tiny, texts):
    out, report = exported
    told = done("inspect", out, "--json").json()["provenance"]
    assert told["edgeq.source"] == {"name": "tiny.gguf", "sha256": open_gguf(tiny).sha256()}
    assert told["edgeq.versions"] == provenance.versions("edgeq")
    assert told["edgeq.versions"]["llama-cpp-python"] == "0.3.36"
    recipe = told["edgeq.recipe"]
    assert (recipe["preset"], recipe["quantizer"], recipe["prove"]) == ("Q4_0", "rtn", True)
    assert recipe["texts"]["calibration"] == [str(texts[0])]
    calibration = told["edgeq.texts"]["calibration"]
    assert calibration["names"] == [str(texts[0])]
    assert calibration["n_tokens"] == 36 * 256
    assert calibration["sha256"] == report["provenance"]["texts"]["calibration"]["sha256"]
    assert told["edgeq.plan"] == report["provenance"]["plan"]
    assert told["edgeq.plan"]["preset"] == "Q4_0"
    assert told["quantize.imatrix.chunks_count"] == 36
    assert told["quantize.imatrix.dataset"] == str(texts[0])
    shown = done("inspect", out).out
    for key in ("edgeq.source", "edgeq.recipe", "edgeq.texts", "edgeq.plan", "edgeq.versions"):
        assert f"  {key} = {{" in shown


def test_the_metadata_of_the_source_stays(exported, tiny):
    source, out = open_gguf(tiny).fields, open_gguf(exported[0]).fields
    assert {key: out[key] for key in source} == source
    added = {key.split(".")[0] for key in out if key not in source}
    assert added == {"edgeq", "quantize", "general"}


def test_nothing_of_an_earlier_making_stays(exported, tmp_path):
    out = tmp_path / "again.gguf"
    flags = ("--type", "Q8_0", "--no-imatrix", "--no-prove", "--allow-requantize")
    done("export", exported[0], out, *flags)
    told = done("inspect", out, "--json").json()["provenance"]
    assert not [key for key in told if key.startswith("quantize.")]
    source = done("inspect", exported[0], "--json").json()["provenance"]
    # but what it was calibrated on once stays known
    assert told["edgeq.calibration.sketch"] == source["edgeq.calibration.sketch"]
    assert told["edgeq.source"]["sha256"] == open_gguf(exported[0]).sha256()
    assert told["edgeq.texts"] == {}


def test_a_file_in_parts_says_the_same(exported, tiny, texts, tmp_path):
    flags = ("--type", "Q4_0", "--text", texts[0], *LONG, "--split-max-size", "30K")
    done("export", tiny, tmp_path / "p.gguf", *flags)
    part = max(tmp_path.glob("p-*.gguf"))  # any part opens the whole
    told = done("inspect", part, "--json").json()["provenance"]
    whole = done("inspect", exported[0], "--json").json()["provenance"]
    assert told["edgeq.calibration.sketch"] == whole["edgeq.calibration.sketch"]
    assert told["edgeq.texts"] == whole["edgeq.texts"]


# ------------------------------------------------------------------ text that was calibrated on


def test_export_does_not_judge_on_its_calibration_text(tiny, texts, tmp_path):
    out = tmp_path / "out.gguf"
    command = ("export", tiny, out, "--type", "Q4_0", "--text", texts[0], *SHORT)
    line = refused(*command, "--eval-text", texts[0])
    assert f"{texts[0]}: shares " in line
    assert "chunks with the calibration text" in line
    assert "Give other text, or insist with --force." in line
    assert not out.exists()
    report = done(*command, "--eval-text", texts[0], "--force", "--json").json()
    (note,) = [note for note in report["notes"] if "calibration" in note]
    assert note.startswith(f"Judged on calibration text: {texts[0]}: shares ")
    assert "Judged on calibration text" in done(*command, "--eval-text", texts[0], "--force").out
    clean = done(*command, "--eval-text", texts[1], "--json").json()
    assert not [note for note in clean["notes"] if "calibration" in note]


def test_the_held_out_part_was_not_calibrated_on(exported):
    report = exported[1]
    texts = report["provenance"]["texts"]
    assert not set(texts["calibration"]["chunks"]) & set(texts["evaluation"]["chunks"])
    assert not [note for note in report["notes"] if "calibration" in note]


def test_an_imatrix_remembers_the_text_it_was_made_of(tiny, texts, tmp_path):
    imatrix, out = tmp_path / "imatrix.gguf", tmp_path / "out.gguf"
    done("calibrate", tiny, "-o", imatrix, "--text", texts[0], "--ctx", "256")
    flags = ("--imatrix", imatrix, "--ctx", "256", "--eval-chunks", "2")
    command = ("export", tiny, out, *RTN, *flags)
    line = refused(*command, "--eval-text", texts[0])
    assert "imatrix.gguf: was calibrated on the evaluation text" in line
    assert not out.exists()
    forced = done(*command, "--eval-text", texts[0], "--force", "--json").json()
    assert any(note.startswith("Judged on calibration text") for note in forced["notes"])
    other = done(*command, "--eval-text", texts[1], "--json").json()
    assert not any("calibration text" in note for note in other["notes"])
    judged = ("--reference", tiny, "--text", texts[0], "--ctx", "256", "--no-speed")
    assert "with the out.gguf calibration text" in refused("evaluate", out, *judged)


def test_evaluate_does_not_judge_a_file_on_its_calibration_text(exported, tiny, texts, tmp_path):
    out = exported[0]
    copied = tmp_path / "renamed.txt"
    copied.write_text("Something else first. " + texts[0].read_text("utf-8"), "utf-8")
    judged = ("--reference", tiny, "--no-speed", "--ctx", 256, "--chunks", 16)
    command = ("evaluate", out, *judged, "--work", tmp_path)
    line = refused(*command, "--text", copied)
    assert f"{copied}: shares " in line
    assert "with the out.gguf calibration text" in line
    measured = done(*command, "--text", copied, "--force", "--json").json()
    (note,) = measured["notes"]
    assert note.startswith(f"Judged on calibration text: {copied}: shares ")
    assert note in done(*command, "--text", copied, "--force").out
    assert done(*command, "--text", texts[1], "--json").json()["notes"] == []


def test_stored_logits_of_calibration_text_are_refused_too(exported, tiny, texts, tmp_path):
    stored = tmp_path / "logits.kld"
    flags = ("--no-speed", "--ctx", 64, "--work", tmp_path / "work")
    done("evaluate", tiny, "--reference", tiny, "--text", texts[0], *flags, "--save-logits", stored)
    line = refused("evaluate", exported[0], "--reference", stored, "--no-speed")
    assert f"{stored}: shares " in line
    forced = done("evaluate", exported[0], "--reference", stored, "--no-speed", "--force", "--json")
    assert forced.json()["notes"][0].startswith("Judged on calibration text: ")


def test_a_file_without_calibration_may_be_judged_on_any_text(tiny, texts, tmp_path):
    out = tmp_path / "out.gguf"
    done("export", tiny, out, "--type", "Q4_0", "--no-imatrix", "--no-prove")
    assert provenance.calibration_manifest(open_gguf(out)) is None
    common = ("--reference", tiny, "--text", texts[0], "--ctx", 64, "--chunks", 2, "--no-speed")
    assert done("evaluate", out, *common, "--json").json()["notes"] == []


def test_the_sketch_is_a_sample_of_the_windows(exported):
    manifest = provenance.calibration_manifest(open_gguf(exported[0]))
    assert manifest is not None
    assert len(manifest.windows) > 0
    assert np.all(manifest.windows % np.uint64(opening.SKETCH_FRACTION) == 0)
