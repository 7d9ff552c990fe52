"""Everything that a user can get wrong ends in one line, exit code 1, and no file."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFValueType

from converters.gguf_header import Field
from tests import tiny_gguf
from tests.command_line import done, files_under, refused

ROUND = ("--type", "Q4_0", "--no-imatrix", "--no-prove")
SHORT = ("--ctx", 64, "--chunks", 6, "--eval-chunks", 3)


@pytest.fixture
def place(tmp_path):
    """An empty directory for outputs, apart from the inputs."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def nothing_written(place, *arguments):
    """Return the line of a command that has to leave `place` as it is."""
    before = files_under(place)
    line = refused(*arguments)
    assert files_under(place) == before
    return line


# ------------------------------------------------------------------------------------ checkpoints


def missing_shard(directory):
    (directory / "model-00002-of-00004.safetensors").unlink()
    return "model-00002-of-00004.safetensors"


def extra_shard(directory):
    first = directory / "model-00001-of-00004.safetensors"
    shutil.copy(first, directory / "model-00005-of-00004.safetensors")
    return "model-00005-of-00004.safetensors"


def truncated_shard(directory):
    shard = directory / "model-00003-of-00004.safetensors"
    os.truncate(shard, shard.stat().st_size - 7)
    return f"{shard}: "


def edit_header(shard, edit):
    content = shard.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def header_that_lies(directory):
    def double(header):
        entry = next(value for key, value in header.items() if key != "__metadata__")
        entry["shape"][0] *= 2

    shard = directory / "model-00001-of-00004.safetensors"
    edit_header(shard, double)
    return f"{shard}: "


def header_size_that_lies(directory):
    shard = directory / "model-00001-of-00004.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(struct.pack("<Q", 2**60) + content[8:])
    return f"{shard}: "


def nan_weight(directory):
    name = "model.layers.1.mlp.up_proj.weight"
    index = json.loads((directory / "model.safetensors.index.json").read_text("utf-8"))
    shard = directory / index["weight_map"][name]
    with shard.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        begin = json.loads(file.read(size))[name]["data_offsets"][0]
        file.seek(8 + size + begin + 2 * 5)
        file.write(struct.pack("<H", 0x7FC0))
    return f"{name}: 1 weights are not finite (the first is nan)"


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def unknown_architecture(directory):
    edit_config(directory, architectures=["MambaForCausalLM"])
    return "no conversion for MambaForCausalLM; known: "


def missing_tokenizer(directory):
    (directory / "tokenizer.model").unlink()
    return "no tokenizer; llama takes tokenizer.model or tokenizer.json"


def vocabulary_too_small(directory):
    edit_config(directory, vocab_size=300)
    return "496 tokens, but config.json's vocab_size is 300"


def vocabulary_too_large(directory):
    edit_config(directory, vocab_size=640)
    return "the embedding has 512 rows, but the vocabulary 640 tokens"


def no_weights(directory):
    for path in directory.glob("model*"):
        path.unlink()
    return "safetensors"


def pickled_weights(directory):
    no_weights(directory)
    (directory / "pytorch_model.bin").write_bytes(b"PK")
    return "--allow-pickle"


CHECKPOINTS = (
    missing_shard,
    extra_shard,
    truncated_shard,
    header_that_lies,
    header_size_that_lies,
    nan_weight,
    unknown_architecture,
    missing_tokenizer,
    vocabulary_too_small,
    vocabulary_too_large,
    no_weights,
    pickled_weights,
)


@pytest.mark.parametrize("damage", CHECKPOINTS, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint(damage, checkpoint, place):
    expected = damage(checkpoint)
    for command in ("export", "convert"):
        line = nothing_written(place, command, checkpoint, place / "out.gguf")
        assert expected in line


def test_a_checkpoint_of_float16_that_lost_a_layer_is_named(checkpoint, place):
    shard = checkpoint / "model-00002-of-00004.safetensors"
    edit_header(shard, lambda header: header.pop(next(n for n in header if n.startswith("model"))))
    assert "model-00002-of-00004" in nothing_written(place, "convert", checkpoint, place / "o.gguf")


# ------------------------------------------------------------------------------------- GGUF files


def patched(place, content, offset, value, form):
    changed = bytearray(content)
    struct.pack_into(form, changed, offset, value)
    path = place.parent / "damaged.gguf"
    path.write_bytes(changed)
    return path


@pytest.mark.parametrize(
    ("offset", "value", "form", "message"),
    [
        (0, 0x12345678, "<I", "not a GGUF file"),
        (4, 99, "<I", "unknown version; got 99"),
        (4, 3, ">I", "big-endian"),
        (8, 2**62, "<Q", "tensors"),
        (16, 2**62, "<Q", "metadata"),
    ],
)
def test_a_gguf_header_that_lies(offset, value, form, message, tiny, place):
    path = patched(place, tiny.read_bytes(), offset, value, form)
    assert message in nothing_written(place, "export", path, place / "out.gguf", *ROUND)
    assert message in nothing_written(place, "inspect", path)


@pytest.mark.parametrize("kept", [3, 20, 3000, -1])
def test_a_truncated_gguf(kept, tiny, place):
    path = place.parent / "damaged.gguf"
    path.write_bytes(tiny.read_bytes()[:kept])
    assert "damaged.gguf: " in nothing_written(place, "export", path, place / "o.gguf", *ROUND)
    assert "damaged.gguf: " in nothing_written(place, "inspect", path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "blk.0.attn_norm.weight"])
def test_a_gguf_with_weights_that_are_no_numbers(name, value, texts, place):
    weights = tiny_gguf.values(name, (96, 64) if "ffn" in name else (64,))
    weights.reshape(-1)[37] = value
    path = tiny_gguf.write(place.parent / "damaged.gguf", "llama", replace={name: weights})
    where = [0, 37] if "ffn" in name else [37]
    expected = f"{path}: {name}: the weight at {where} is NaN or infinite"
    out = place / "out.gguf"
    for flags in (ROUND, ("--text", texts[0], *SHORT)):
        assert expected in nothing_written(place, "export", path, out, *flags)
    assert expected in nothing_written(place, "calibrate", path, "-o", out, "--text", texts[0])


def test_names_in_a_gguf_do_not_lead_out_of_the_work_directory(place):
    name = "../../evil.weight"
    weights = np.ones((64, 256), np.float32)
    path = tiny_gguf.write(place.parent / "evil.gguf", "llama", replace={name: weights})
    (place / "deep").mkdir()
    done("export", path, place / "deep" / "out.gguf", *ROUND)
    assert all(file.startswith("deep") for file in files_under(place))
    work = files_under(place / "deep" / "out.edgeq" / "layers")
    assert "..%2F..%2Fevil.weight.safetensors" in work


def test_metadata_neither_breaks_json_nor_controls_the_terminal(tmp_path):
    strings, floats = GGUFValueType.STRING, GGUFValueType.FLOAT32
    extra = {
        "general.name": Field("bad \udcff \x1b[31mred\nline", strings),
        "x.infinite": Field(float("inf"), floats),
        "x.list": Field([float("nan"), 1.0], GGUFValueType.ARRAY, floats),
    }
    path = tiny_gguf.write(tmp_path / "odd.gguf", "llama", extra=extra)
    metadata = done("inspect", path, "--metadata", "--json").json()["metadata"]
    assert metadata["x.infinite"] == "inf"
    assert metadata["x.list"] == ["nan", 1.0]
    shown = done("inspect", path, "--metadata").out
    assert "general.name = bad \\udcff \\x1b[31mred\\nline\n" in shown


def test_a_quantized_source_has_to_be_allowed(tiny, place):
    small, out = place.parent / "small.gguf", place / "out.gguf"
    done("export", tiny, small, "--type", "Q8_0", "--no-imatrix", "--no-prove")
    line = nothing_written(place, "export", small, out, *ROUND)
    assert "is quantized already (Q8_0), expected F32, F16 or BF16" in line
    assert "--allow-requantize" in line
    done("export", small, out, *ROUND, "--allow-requantize")
    assert out.exists()


# ------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no text"),
        (b" \n", "has no text"),
        (b"Too short.", "tokens, expected at least 64"),
        (b"\xff\xfe" * 500, "is not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_useless_text(content, message, tiny, texts, place):
    text, out = place.parent / "t.txt", place / "out.gguf"
    if content is not None:
        text.write_bytes(content)
    expected = f"{text}: "
    quantize = ("export", tiny, out, "--quantizer", "rtn", "--type", "Q4_0", *SHORT)
    for arguments in (
        (*quantize, "--text", text, "--eval-text", texts[0]),
        (*quantize, "--text", texts[0], "--eval-text", text),
        ("calibrate", tiny, "-o", out, "--text", text, "--ctx", 64),
        ("evaluate", tiny, "--reference", tiny, "--text", text, "--ctx", 64, "--work", out),
    ):
        line = nothing_written(place, *arguments)
        assert expected in line
        assert message in line


def test_a_text_too_short_to_hold_a_part_out(tiny, texts, place):
    text = place.parent / "t.txt"
    text.write_text("One line that has nothing to be split from.\n", "utf-8")
    command = ("export", tiny, place / "o.gguf", "--text", text, *SHORT)
    line = nothing_written(place, *command)
    assert f"{text}: the text has 1 separate passages, too few for calibration, tuning, " in line
    assert "Give more text, or own text for evaluation." in line
    line = nothing_written(place, *command, "--eval-text", texts[0])
    assert f"{text}: " in line
    assert "too few for calibration, tuning. Give more text." in line


def test_conversations_need_a_chat_template(tiny, place):
    text = place.parent / "t.jsonl"
    text.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n', "utf-8")
    line = nothing_written(place, "calibrate", tiny, "-o", place / "i.gguf", "--text", text)
    assert "chat template" in line


# ---------------------------------------------------------------------------------- what was asked


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--type", "Q4_KM"), "unknown preset 'Q4_KM'; known: F32, F16"),
        (("--type", "Q4_KM"), "Did you mean 'Q4_K_M'?"),
        (
            ("--quantizer", "rtm"),
            "unknown quantizer 'rtm'; known: auto, gptq, learned, rtn. Did you mean 'rtn'?",
        ),
        (("--quantizer", "gptq:ordr=natural"), "unknown setting 'ordr'; known: order, search, "),
        (("--quantizer", "gptq:order=random"), "unknown order 'random'; known: "),
        (("--quantizer", "gptq:sweeps=many"), "sweeps is 'many', expected a value like 0."),
        (("--quantizer", "gptq:sweeps=-1"), "sweeps=-1"),
        (("--quantizer", "gptq:refit=maybe"), "refit is 'maybe', expected true or false."),
        (("--quantizer", "gptq:shrinkage=2"), "shrinkage=2.0"),
        (("--quantizer", "rtn:order=natural"), "rtn has no settings. Give rtn alone"),
        (("--fisher-groups", 0), "--fisher-groups: got 0, expected 1 or more."),
        (("--asymmetric", 1.5), "--asymmetric: got 1.5, expected 0 to 1"),
        (("--asymmetric", "nan"), "--asymmetric: got nan, expected 0 to 1"),
        (("--asymmetric", 0.5, "--no-sequential"), "it needs --sequential. Give one."),
        (("--imatrix", "i.gguf", "--no-imatrix"), "--imatrix and --no-imatrix contradict"),
        (("--text", "auto", "--text", "a.txt"), "--text: auto stands alone"),
        (("--ctx", 8), "--ctx: 8 tokens are too few"),
        (("--chunks", 0), "--chunks: got 0, expected 1 or more"),
        (("--eval-chunks", -1), "--eval-chunks: got -1"),
        (("--seed", -1), "--seed: got -1, expected 0 or more"),
        (("--ctx", 4096), "at most 256"),
        (("--imatrix", "no.gguf"), "no.gguf: "),
        (("--plan", "no.json"), "no.json: no readable plan"),
        (("--no-imatrix", "--no-prove", "--split-max-size", "1K"), "more than a part"),
    ],
)
def test_flags_that_cannot_be_met(flags, message, tiny, place, monkeypatch):
    monkeypatch.chdir(place)
    out = place / "out.gguf"
    line = refused("export", tiny, out, *flags)
    assert message in line
    assert not out.exists()
    assert not [name for name in files_under(place) if name.endswith(".tmp")]


def test_flags_are_checked_before_anything_is_made(tiny, place, monkeypatch):
    """A wrong name must not cost a calibration first."""
    (place.parent / "i.gguf").write_bytes(b"no imatrix")
    plan = place.parent / "plan.json"
    plan.write_text("{}", "utf-8")
    for flags in (
        ("--type", "Q4"),
        ("--quantizer", "x"),
        ("--imatrix", place.parent / "i.gguf"),
        ("--plan", plan),
    ):
        nothing_written(place, "export", tiny, place / "out.gguf", *flags, "--ctx", 64)


def test_a_type_that_needs_an_imatrix(built_checkpoint, place, monkeypatch):
    monkeypatch.setattr("edgeq.pipeline.prepare_texts", None)  # refused before any text is read
    flags = ("--type", "IQ2_XXS", "--no-imatrix")
    line = refused("export", built_checkpoint, place / "out.gguf", *flags)
    assert "imatrix" in line
    assert not (place / "out.gguf").exists()


def test_an_imatrix_of_another_model(tiny, wide, built_checkpoint, texts, place):
    imatrix, out = place.parent / "other.gguf", place / "out.gguf"
    done("calibrate", built_checkpoint, "-o", imatrix, "--text", texts[0], "--ctx", 64)
    line = nothing_written(place, "export", tiny, out, "--imatrix", imatrix, "--no-prove")
    assert line.startswith(f"edgeq: {imatrix}: ")
    assert "256" in line
    line = nothing_written(place, "export", tiny, out, "--imatrix", wide, "--no-prove")
    assert line.startswith(f"edgeq: {wide}: ")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({"blk.9.attn_q.weight": t["blk.0.attn_q.weight"]}), "has no tensor"),
        (lambda t: t.pop("output.weight"), "are missing, the first is output.weight"),
        (lambda t: t["output.weight"].update(type="Q4_X"), "unknown type 'Q4_X'"),
        (lambda t: t["output.weight"].update(type="Q4_K"), "64"),
        (lambda t: t["output.weight"].update(shape=[1, 2]), "shape [1, 2]"),
        (lambda t: t["output_norm.weight"].update(type="Q8_0"), "only as it is"),
    ],
)
def test_a_plan_for_another_model(edit, message, tiny, place):
    plan = place.parent / "plan.json"
    done("plan", tiny, "-o", plan, "--type", "Q4_0", "--no-imatrix")
    content = json.loads(plan.read_text("utf-8"))
    edit(content["tensors"])
    plan.write_text(json.dumps(content), "utf-8")
    line = nothing_written(place, "export", tiny, place / "o.gguf", "--plan", plan, *ROUND[2:])
    assert line.startswith(f"edgeq: {plan}: ")
    assert message in line


@pytest.mark.parametrize("model", ["missing", "missing.gguf", "text.txt", "some where", ""])
def test_a_model_that_is_none(model, place, monkeypatch):
    monkeypatch.chdir(place.parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (place.parent / "text.txt").write_text("no model", "utf-8")
    nothing_written(place, "export", model, place / "out.gguf")


def test_files_that_cannot_be_compared(tiny, wide, texts, place):
    common = ("--text", texts[0], "--ctx", 64, "--chunks", 2, "--work", place / "work")
    line = nothing_written(place, "evaluate", wide, "--reference", tiny, *common)
    assert "vocabulary" in line
    line = nothing_written(place, "evaluate", place / "no.gguf", "--reference", tiny, *common)
    assert "no.gguf: no such file" in line
    line = nothing_written(place, "evaluate", tiny, "--reference", place / "no.kld", *common)
    assert "no.kld: no such file" in line
    line = nothing_written(place, "evaluate", tiny, "--reference", tiny)
    assert "evaluate: no text" in line
    for flags in (("--ctx", 0), ("--ctx", -5), ("--chunks", 0)):
        nothing_written(place, "evaluate", tiny, "--reference", tiny, *common, *flags)


# ---------------------------------------------------------------------------------------- outputs


def test_outputs_that_have_no_place(tiny, built_checkpoint, texts, place):
    away = place / "no" / "where.gguf"
    for arguments in (
        ("export", tiny, away),
        ("convert", built_checkpoint, away),
        ("calibrate", tiny, "-o", away),
        ("plan", tiny, "-o", away, "--type", "Q4_0"),
        ("plan", tiny, "-o", place / "plan.json", "--tensor-type-file", away, "--type", "Q4_0"),
        ("evaluate", tiny, "--reference", tiny, "--text", texts[0], "--save-logits", away),
    ):
        assert "there is no directory" in nothing_written(place, *arguments)
    line = nothing_written(place, "export", tiny, place / "model.bin")
    assert "name it *.gguf" in line
    (place / "is.gguf").mkdir()
    line = refused("export", tiny, place / "is.gguf", *ROUND)
    assert "not a file, and will not be replaced" in line


def test_a_directory_that_cannot_be_written(tiny, texts):
    """/proc takes no files, not even from root."""
    for arguments in (
        ("export", tiny, "/proc/out.gguf", *ROUND),
        ("calibrate", tiny, "-o", "/proc/imatrix.gguf", "--text", texts[0], "--ctx", 64),
        ("plan", tiny, "-o", "/proc/plan.json", "--type", "Q4_0"),
    ):
        assert "cannot be used as work directory" in refused(*arguments)


def test_a_work_directory_that_is_a_file(tiny, place):
    (place.parent / "file").write_text("", "utf-8")
    flags = (*ROUND, "--work", place.parent / "file")
    line = nothing_written(place, "export", tiny, place / "out.gguf", *flags)
    assert "cannot be used as work directory" in line


def test_an_output_that_is_an_input(tiny, texts, place):
    model = shutil.copy(tiny, place / "model.gguf")
    (place / "link.gguf").symlink_to(model)
    text = shutil.copy(texts[0], place / "text.gguf")
    content = model.read_bytes()
    for arguments in (
        ("export", model, model, *ROUND),
        ("export", model, place / "link.gguf", *ROUND),
        ("export", model, text, "--text", text, *SHORT),
        ("calibrate", model, "-o", model, "--text", text),
        ("plan", model, "-o", model),
        ("evaluate", model, "--reference", model, "--text", text, "--save-logits", model),
    ):
        assert "would overwrite" in nothing_written(place, *arguments)
    assert model.read_bytes() == content
    done("export", tiny, place / "parts.gguf", *ROUND, "--split-max-size", "30K")
    first = min(place.glob("parts-*"))
    line = refused("export", first, place / "parts.gguf", *ROUND, "--allow-requantize")
    assert "would overwrite" in line


def limited(n_bytes, *arguments):
    """Run the installed command with files limited to so many bytes; see a full disk's effect."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({n_bytes}, {n_bytes}))\n"
        "from edgeq.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, *map(str, arguments), "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on file sizes")
def test_no_space_for_the_output_or_an_intermediate_result(tiny, place):
    out = place / "out.gguf"
    out.write_bytes(b"what was there before")
    for limit in (30_000, 8_000):  # too little for the output; for a layer
        result = limited(limit, "export", tiny, out, *ROUND)
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.startswith("edgeq: ")
        assert result.stderr.count("\n") == 1
        assert "cannot be written" in result.stderr
        assert out.read_bytes() == b"what was there before"
        assert not [name for name in files_under(place) if name.endswith(".tmp")]


def test_a_full_device_while_text_is_stored(tiny, texts, place, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("edgeq.opening.save_arrays", full)
    line = nothing_written(
        place, "export", tiny, place / "o.gguf", "--type", "Q4_0", "--text", texts[0], *SHORT
    )
    assert "text.safetensors: cannot be written (No space left on device)" in line
