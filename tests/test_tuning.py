"""Tuning of scales and norms: gradients, exactness of the format, rounds, and what export ships."""

import json
import math
import re

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from safetensors import safe_open

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.gguf_file import open_gguf
from cpu_kernels.block_formats import FORMATS, BlockFormat
from cpu_kernels.lattice_formats import LATTICES
from edgeq import roundings, tuning
from edgeq.calibration import collector
from edgeq.errors import CalibrationError
from edgeq.runtime.encoders import decode, encode
from edgeq.workdir import WorkDirectory
from tests import tiny_models
from tests.command_line import done, refused

pytest.importorskip("torch")
layerwise = pytest.importorskip("edgeq.layerwise")
pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = np.random.RandomState(0).randint(3, 400, (6, 48)).astype(np.int32)
SCALED = sorted(qtype.name for qtype in (*FORMATS, *LATTICES) if tuning.has_scales(qtype))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return, by family and type, the float model and the model of its quantized file."""
    parent = tmp_path_factory.mktemp("tuning")

    def make(name, preset="Q4_1"):
        directory = tiny_models.build(name, parent).directory
        path, out = parent / f"{name}.gguf", parent / f"{name}-{preset}.gguf"
        if not out.exists():
            convert(open_checkpoint(directory), path, ftype="f32")
            plain = ("--quantizer", "rtn", "--no-imatrix", "--no-prove")
            done("export", path, out, "--type", preset, *plain)
        files = open_gguf(path), open_gguf(out)
        return tuple(layerwise.LayerwiseModel.open(file, directory) for file in files)

    return make


def tuned(pair, work, **settings):
    """Tune and return (packed tensors, divergences by round)."""
    teacher, student = pair
    settings = {
        "steps": 16,
        "seed": 0,
        "made_by": {},
        "progress": lambda done, total: None,
    } | settings
    tokens = settings.pop("tokens", TOKENS)
    out = work.path / "tuned.safetensors"
    tuning.tune(teacher, student, tokens, TOKENS, out, work=work, **settings)
    with safe_open(out, framework="numpy") as part:
        klds = json.loads(part.metadata()["klds"])
        return {name: part.get_tensor(name) for name in part.keys()}, klds


@pytest.mark.parametrize("name", ["llama3", "qwen2", "gemma3", "mixtral", "phi-longrope", "gpt2"])
def test_the_gradient_is_that_of_the_divergence(pair, name, monkeypatch):
    """Scales, offsets, norms before and after, biases, fused rows, experts, all at once."""
    for snap in ("snap_super_scale", "snap_super_offset"):  # steps are finer than the file's
        monkeypatch.setattr(BlockFormat, snap, lambda self, values: values)
    teacher, student = pair(name)
    tuner = tuning._Tuner(teacher, student, TOKENS[:2], TOKENS[:2], 1, 0)
    theta = np.zeros(tuner.size, np.float32)
    gradient = tuner._gradient(theta, 0)
    vectors = [name for name, knob in tuner.knobs.items() if not isinstance(knob, tuning.Blocks)]
    for names in (tuner.at, vectors):
        direction = np.zeros_like(theta)
        for one in names:
            direction[tuner.at[one]] = np.sign(gradient[tuner.at[one]])
        expected = float(gradient @ direction)
        far = np.float32(0.01 * tuner._judge(theta) / expected)
        there, back = (tuner._judge(theta + sign * far * direction) for sign in (1, -1))
        assert (there - back) / (2 * float(far)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("qtype", SCALED)
def test_scales_and_offsets_stay_exact_in_the_format(qtype):
    """What torch sees is what the bytes decode to, and zeros change nothing."""
    kind = GGMLQuantizationType[qtype]
    generator = np.random.default_rng(1)
    importances = np.ones((1, 512), np.float32)
    packed = encode(generator.standard_normal((6, 512), np.float32), kind, importances)
    make = tuning.LatticeBlocks if kind in LATTICES else tuning.Blocks
    knob = make(packed, (6, 512), kind)
    assert np.array_equal(knob.packed(np.zeros(knob.size, np.float32)), packed)
    theta = generator.normal(0, 0.1, knob.size).astype(np.float32)
    assert np.array_equal(decode(knob.packed(theta), kind), knob.values(theta))
    assert not np.array_equal(knob.packed(theta), packed)
    # a step of each number alone, as the gradient says: values are linear in scales and offsets
    at_values = generator.standard_normal((6, 512), np.float32)
    gradient = knob.gradient(np.zeros(knob.size, np.float32), at_values)
    theta = np.full(knob.size, 1e-2, np.float32)
    moved = knob.values(theta) - knob.values(-theta)
    expected = float((moved * at_values).sum()) / (2 * np.sinh(1e-2))
    assert float(gradient.sum()) == pytest.approx(
        expected, abs=0.02 * float(np.abs(gradient).sum())
    )


def test_divergence_falls_and_rounds_are_reused(pair, tmp_path):
    both = pair("llama3")
    with WorkDirectory(tmp_path / "work") as work:
        packed, klds = tuned(both, work)
        assert len(klds) == 3
        assert klds[-1] < 0.9 * klds[0]
        (work.path / "tune" / "2.safetensors").unlink()  # as if the last round was interrupted
        made = len(work.made)
        again, klds_again = tuned(both, work)
    assert work.made[made:] == ["tune/2.safetensors"]
    assert klds_again == klds
    assert all(np.array_equal(again[name], packed[name]) for name in packed)


def test_without_a_gain_it_ends_early_and_ships_the_start(pair, tmp_path, monkeypatch):
    teacher, student = pair("llama3")
    monkeypatch.setattr(tuning, "_RATE", -1e-2)  # uphill
    with WorkDirectory(tmp_path / "work") as work:
        packed, klds = tuned((teacher, student), work, steps=80)
    assert len(klds) == 1 + tuning._PATIENCE
    assert klds == sorted(klds)
    for name, rows in packed.items():
        assert np.array_equal(rows, student.reference.read_bytes(name).reshape(rows.shape))


def test_what_does_not_fit_into_memory_is_refused_before_it_starts(
    tiny, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(collector, "free_bytes", lambda unknown: 1 << 16)
    line = refused("export", tiny, tmp_path / "out.gguf", "--text", texts[0], "--ctx", 64,
                   "--chunks", 8, "--tune", 8, "--no-prove")  # fmt: skip
    assert re.search(r"\d+ chunks of 64 tokens .* need \d+ MiB, 0 MiB are free\. Give fewer", line)
    assert not (tmp_path / "out.edgeq" / "layers").exists()


def test_every_epoch_has_every_chunk():
    tuner = object.__new__(tuning._Tuner)
    tuner.tokens, tuner.seed = TOKENS[:5], 3
    taken = [chunk for step in range(5) for chunk in tuner._chunks(step)]
    assert sorted(taken[:5]) == sorted(taken[5:]) == [0, 1, 2, 3, 4]


def test_export_ships_tuned_scales_where_they_are_better(tiny, texts, tmp_path):
    short = ("--ctx", 64, "--chunks", 24, "--eval-chunks", 2, "--type", "Q4_0")
    command = (
        "export",
        tiny,
        tmp_path / "out.gguf",
        "--text",
        texts[0],
        *short,
        "--effort",
        "fast",
    )
    report = done(*command, "--tune", 24, "--json").json()
    verification = report["rounding"]["verification"]
    name = report["rounding"]["method"]["quantizer"]
    assert report["rounding"]["method"]["tune_steps"] == 24
    assert verification.keys() == {name, f"{name}, tuned", "rtn"}
    assert verification[f"{name}, tuned"] < verification[name]
    assert any(note.startswith(f"Rounded by {name}, tuned: ") for note in report["notes"])
    assert not list((tmp_path / "out.edgeq").glob("*.gguf.tmp"))
    assert not (tmp_path / "out.edgeq" / "candidate.gguf").exists()
    shipped = open_gguf(tmp_path / "out.gguf")
    with safe_open(tmp_path / "out.edgeq/tune/tuned.safetensors", framework="numpy") as part:
        assert "output_norm.weight" in part.keys()
        for tensor in part.keys():
            rows = part.get_tensor(tensor)
            assert np.array_equal(shipped.read_bytes(tensor).reshape(rows.shape), rows)


def test_other_steps_keep_the_layers(tiny, texts, tmp_path, works):
    short = ("--ctx", 64, "--chunks", 8, "--eval-chunks", 2, "--type", "Q4_0", "--no-prove")
    command = ("export", tiny, tmp_path / "out.gguf", "--text", texts[0], *short)
    for steps in (0, 8):
        done(*command, "--tune", steps)
    assert "layers/blk.0.safetensors" in works[0].made
    assert {name.split("/")[0] for name in works[1].made} == {"tune", "verification.json"}


def test_a_plain_quantizer_is_tuned_when_asked(tiny, texts, tmp_path):
    """PEQA: round-to-nearest, then the scales."""
    short = ("--ctx", 64, "--chunks", 8, "--eval-chunks", 2, "--type", "Q4_0")
    command = ("export", tiny, tmp_path / "out.gguf", "--text", texts[0], *short)
    done(*command, "--quantizer", "rtn", "--tune", 8)
    with safe_open(tmp_path / "out.edgeq/tune/tuned.safetensors", framework="numpy") as part:
        klds = json.loads(part.metadata()["klds"])
    assert len(klds) == 1 + math.ceil(8 / tuning._ROUND)
    assert klds[1] < klds[0]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--tune", -1), "--tune: got -1 steps, expected 0 or more."),
        (("--tune", 8, "--no-imatrix"), "--tune learns from calibration text: "),
    ],
)
def test_bad_settings_are_refused(tiny, tmp_path, flags, line):
    assert line in refused("export", tiny, tmp_path / "out.gguf", *flags)


def test_without_gradients_it_says_so(tiny, texts, tmp_path, monkeypatch):
    def missing(self, text):
        raise CalibrationError("no torch")

    monkeypatch.setattr(roundings.Roundings, "_torch_model", missing)
    short = ("--ctx", 64, "--chunks", 8, "--type", "Q4_0", "--text", texts[0], "--tune", 8)
    command = ("export", tiny, tmp_path / "out.gguf", *short)
    assert "no torch" in refused(*command, "--quantizer", "rtn", "--no-prove")
    report = done(*command, "--effort", "fast", "--eval-chunks", 2, "--json").json()
    assert "Scales are not tuned: no torch" in report["notes"]
