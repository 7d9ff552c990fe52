"""What ``edgeq export`` does by default: second moments, folds, gptq, and the check against rtn."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.gguf_file import open_gguf
from edgeq import roundings
from edgeq.allocation import allocate
from edgeq.calibration import collect
from edgeq.calibration.moments import StoredMoments
from edgeq.errors import CalibrationError
from edgeq.evaluation import evaluate
from edgeq.execution import Here
from edgeq.layer_rounding import Rules, corrected
from edgeq.opening import Reference
from edgeq.quantization import quantize_layers
from edgeq.quantizers import Rounded
from edgeq.quantizers.rtn import RoundToNearest
from edgeq.runtime.encoders import decode
from edgeq.workdir import WorkDirectory
from tests import tiny_gguf, tiny_models
from tests.command_line import done, refused

torch = pytest.importorskip("torch")
layerwise = pytest.importorskip("edgeq.layerwise")

SHORT = ("--ctx", 64, "--chunks", 24, "--eval-chunks", 2)
Q4_0 = ("--type", "Q4_0", *SHORT)
GPTQ = "gptq:sweeps=2"  # what auto is


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """``--threads`` is torch's too, for the whole process."""
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def exported(tiny, texts, tmp_path_factory):
    """A default export of a GGUF file without any configuration beside it: (path, its --json)."""
    out = tmp_path_factory.mktemp("auto") / "out.gguf"
    return out, done("export", tiny, out, "--text", texts[0], *Q4_0, "--json").json()


@pytest.fixture(scope="module")
def nearest(exported, tiny, tmp_path_factory):
    """The same by round-to-nearest, with the same importance matrix."""
    out = tmp_path_factory.mktemp("nearest") / "out.gguf"
    imatrix = exported[0].with_suffix(".edgeq") / "imatrix.gguf"
    done("export", tiny, out, *Q4_0, "--quantizer", "rtn", "--imatrix", imatrix, "--no-prove")
    return out


@pytest.fixture
def again(exported, tiny, texts, works, tmp_path):
    """Export once more, on a copy of the work directory; return (path, --json, what was made)."""
    work = shutil.copytree(exported[0].with_suffix(".edgeq"), tmp_path / "work")

    def again(*flags):
        out = tmp_path / "again.gguf"
        command = ("export", tiny, out, "--text", texts[0], *Q4_0, "--work", work, "--json")
        report = done(*command, *flags).json()
        return out, report, [name for name in works[-1].made if "evaluation" not in name]

    return again


def packed(path):
    file = open_gguf(path)
    return {name: file.read_bytes(name).tobytes() for name in file.tensors}


def types(path):
    return {name: info.qtype.name for name, info in open_gguf(path).tensors.items()}


# ------------------------------------------------------------------------------ what is shipped


def test_the_default_has_the_bytes_of_rtn_and_a_better_rounding(exported, nearest):
    out, report = exported
    assert types(out) == types(nearest)
    ours, theirs = packed(out), packed(nearest)
    assert {name: len(rows) for name, rows in ours.items()} == {
        name: len(rows) for name, rows in theirs.items()
    }
    rounding = report["rounding"]
    method = {
        "quantizer": GPTQ,
        "fisher": 0.5,
        "fisher_groups": 1,
        "output_feedback": True,
        "sequential": True,
        "transforms": ["balance", "dual"],
        "asymmetric": 0.0,
        "tune_steps": 0,
        "is_verified": True,
    }
    assert rounding["method"] == method
    told = done("inspect", out, "--json").json()["provenance"]
    assert told["edgeq.method"] == method
    assert told["edgeq.recipe"]["quantizer"] == "auto"
    assert rounding["verification"].keys() == {GPTQ, "rtn"}
    assert rounding["verification"][GPTQ] < rounding["verification"]["rtn"]
    (note,) = [note for note in report["notes"] if note.startswith("Rounded")]
    assert note.startswith(f"Rounded by {GPTQ}: on 8 chunks of tuning text ")
    assert report["files"][0]["label"] == "edgeq auto Q4_0"
    assert set(report["provenance"]["texts"]) >= {"calibration", "evaluation"}


def test_every_tensor_and_fold_says_what_it_gained(exported, tiny):
    rounding = exported[1]["rounding"]
    matrices = {name for name, kind in types(exported[0]).items() if kind != "F32"}
    assert rounding["tensors"].keys() == matrices
    for name, facts in rounding["tensors"].items():
        if name.startswith("blk."):
            assert 0 < facts["loss"] < facts["loss_rtn"], name
            assert facts["rows_better_than_rtn"] > 0.5
            assert "fallback" not in facts
        else:
            assert facts == {"fallback": "rtn: no second moments of its inputs"}
    assert len(rounding["folds"]) == 4 * tiny_gguf.N_LAYERS
    for name, fold in rounding["folds"].items():
        assert fold["method"] in {"none", "balance", "dual"}, name
        is_used = fold["method"] != "none"
        assert (fold["loss_after"] < fold["loss_before"]) == is_used, name
    norm = "blk.0.attn_norm"
    assert rounding["folds"][f"{norm} -> attn_q, attn_k, attn_v"]["method"] != "none"
    assert packed(exported[0])[f"{norm}.weight"] != packed(tiny)[f"{norm}.weight"]


def test_the_verification_is_about_the_file_that_is_written(exported, nearest, tiny):
    out, report = exported
    work = out.with_suffix(".edgeq")
    with safe_open(work / "text.safetensors", framework="numpy") as parts:
        rows = parts.get_tensor("tuning")
        others = {
            tuple(row) for part in ("calibration", "evaluation") for row in parts.get_tensor(part)
        }
    assert len(rows) == 8
    assert not {tuple(row) for row in rows} & others
    for method, path in ((GPTQ, out), ("rtn", nearest)):
        judged = evaluate(path, rows, tiny, n_ctx=64, n_threads=1)
        expected = report["rounding"]["verification"][method]
        assert judged.summary.kld.value == pytest.approx(expected, rel=1e-6)
    assert not (work / "candidate.gguf").exists()


@pytest.mark.parametrize("klds", [(0.2, 0.1), (0.09, 0.1), (np.nan, 0.1), (np.inf, 0.1)])
def test_what_is_not_better_is_not_shipped(klds, again, nearest, monkeypatch, tmp_path):
    """Also where the candidate's logits are not finite."""
    found = iter(klds)

    def judge(*_, **__):
        kld = SimpleNamespace(value=next(found))
        return SimpleNamespace(summary=SimpleNamespace(kld=kld))

    monkeypatch.setattr(roundings, "evaluate", judge)
    (tmp_path / "work" / "verification.json").unlink()
    out, report, _ = again()
    assert packed(out) == packed(nearest)
    (note,) = [note for note in report["notes"] if note.startswith("Rounded")]
    assert note.startswith(f"Rounded to nearest (rtn): {GPTQ} was not much better, on 8 chunks")
    assert report["rounding"]["folds"] == {}
    assert not any(report["rounding"]["tensors"].values())


def test_without_an_imatrix_the_default_rounds_to_nearest(tiny, tmp_path):
    flags = ("--type", "Q4_0", "--no-imatrix", "--no-prove")
    report = done("export", tiny, tmp_path / "a.gguf", *flags, "--json").json()
    done("export", tiny, tmp_path / "b.gguf", *flags, "--quantizer", "rtn")
    assert packed(tmp_path / "a.gguf") == packed(tmp_path / "b.gguf")
    assert report["rounding"]["method"]["quantizer"] == "rtn"
    assert report["rounding"]["verification"] == {}
    assert set(report["seconds"]) <= {"open", "allocate", "quantize", "write"}


def test_verification_leaves_the_sampled_text_as_it_is(tiny, tmp_path):
    command = ("export", tiny, tmp_path / "out.gguf", "--type", "Q4_0", *SHORT, "--chunks", 6)
    auto = done(*command, "--effort", "fast", "--json").json()["provenance"]["texts"]
    rtn = done(*command, "--quantizer", "rtn", "--json").json()["provenance"]["texts"]
    for part in ("calibration", "evaluation"):
        assert auto[part] == rtn[part]


# ------------------------------------------------------------------------------------------ reuse


def test_a_second_run_makes_nothing_anew(again, exported):
    out, report, made = again()
    assert made == []
    assert packed(out) == packed(exported[0])
    assert report["rounding"] == exported[1]["rounding"]


def test_one_changed_layer_changes_what_comes_after_it(again, exported, tmp_path):
    content = json.loads((exported[0].with_suffix(".edgeq") / "plan.json").read_text("utf-8"))
    expected = {
        "blk.1.attn_v.weight": ["layers/blk.1", "layers-rtn/blk.1"],
        "blk.0.attn_v.weight": ["layers/blk.0", "layers/blk.1", "layers-rtn/blk.0"],
    }
    for name, layers in expected.items():
        edited = json.loads(json.dumps(content))
        edited["tensors"][name]["type"] = "Q8_0"
        (tmp_path / "plan.json").write_text(json.dumps(edited), "utf-8")
        shutil.rmtree(tmp_path / "work")
        shutil.copytree(exported[0].with_suffix(".edgeq"), tmp_path / "work")
        out, _, made = again("--plan", tmp_path / "plan.json")
        assert [layer.removesuffix(".safetensors") for layer in made if "layers" in layer] == layers
        assert types(out)[name] == "Q8_0"
        before, after = packed(exported[0]), packed(out)
        changed = {name.split(".")[1] for name in before if before[name] != after[name]}
        assert changed == {layer[-1] for layer in layers}


def test_a_layer_made_after_kept_ones_is_the_same(again, exported, tmp_path):
    """What comes through a kept layer is what came through it when it was made."""
    (tmp_path / "work" / "layers" / "blk.1.safetensors").unlink()
    out, _, made = again()
    assert made == ["layers/blk.1.safetensors"]
    assert packed(out) == packed(exported[0])


# -------------------------------------------------------------------------------------- fallbacks


def no_configuration(monkeypatch):
    def refuse(*_, **__):
        raise CalibrationError("model.gguf: transformers cannot describe it.")

    monkeypatch.setattr(layerwise.LayerwiseModel, "open", refuse)
    return "transformers cannot describe it."


def another_function(monkeypatch):
    monkeypatch.setattr(layerwise, "check_agrees", lambda *_: 0.5)
    return "torch's logits are 0.5 nats from llama.cpp's, expected less than 0.001"


def no_torch(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("edgeq.layerwise")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    return "torch is not installed"


@pytest.mark.parametrize("prevent", [no_configuration, another_function, no_torch])
def test_without_a_torch_model_llama_cpps_moments_serve(
    prevent, exported, nearest, again, monkeypatch
):
    with monkeypatch.context() as patch:
        reason = prevent(patch)
        out, report, made = again("--effort", "fast")
    first, second, *_ = report["notes"]
    assert first.startswith("Second moments of the float model alone, from llama.cpp: ")
    assert reason in first
    assert second.startswith("Rounded by gptq:sweeps=1: ")
    assert "layers/blk.0.safetensors" in made
    assert not [name for name in made if name in ("gradients.gguf", "imatrix.gguf")]
    assert types(out) == types(nearest)
    facts = report["rounding"]["tensors"]
    assert all(facts[n]["loss"] < facts[n]["loss_rtn"] for n in facts if n.startswith("blk."))


def test_without_any_second_moments_the_default_rounds_to_nearest(again, nearest, monkeypatch):
    def refuse(*_, **__):
        raise CalibrationError("blk.0.attn_q.weight: its second moments need more memory.")

    no_configuration(monkeypatch)
    monkeypatch.setattr(roundings, "collect", refuse)
    out, report, _ = again()
    assert packed(out) == packed(nearest)
    assert "Rounded to nearest: blk.0.attn_q.weight: its second moments" in report["notes"][1]


def test_a_quantizer_that_was_asked_for_does_not_fall_back(tiny, texts, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise CalibrationError("blk.0.attn_q.weight: its second moments need more memory.")

    no_configuration(monkeypatch)
    monkeypatch.setattr(roundings, "collect", refuse)
    out = tmp_path / "out.gguf"
    line = refused("export", tiny, out, "--text", texts[0], *Q4_0, "--quantizer", "gptq")
    assert line == "edgeq: blk.0.attn_q.weight: its second moments need more memory.\n"
    assert not out.exists()


# ------------------------------------------------------------------------------------- settings


def test_settings_of_gptq_without_all_else(exported, tiny, texts, tmp_path):
    out = tmp_path / "out.gguf"
    flags = ("--transform", "none", "--fisher", 0, "--no-sequential", "--no-prove")
    command = ("export", tiny, out, "--text", texts[0], *Q4_0, *flags, "--json", "--quantizer")
    report = done(*command, "gptq:order=min-pivot,sweeps=0").json()
    rounding = report["rounding"]
    assert (rounding["verification"], rounding["folds"]) == ({}, {})
    assert not [note for note in report["notes"] if note.startswith("Rounded")]
    made = {path.name for path in (tmp_path / "out.edgeq").iterdir()}
    assert not made & {"gradients.gguf", "layers-rtn", "verification.json"}
    assert packed(out)["blk.0.attn_norm.weight"] == packed(tiny)["blk.0.attn_norm.weight"]
    losses = {n: f["loss"] for n, f in rounding["tensors"].items() if n.startswith("blk.")}
    again = done(*command, "gptq:order=natural,sweeps=0").json()
    assert any(again["rounding"]["tensors"][name]["loss"] != losses[name] for name in losses)


def test_another_seed_of_the_gradients_makes_other_layers(tiny, texts, works, tmp_path):
    command = ("export", tiny, tmp_path / "out.gguf", "--text", texts[0], *Q4_0, "--no-prove")
    for seed in (0, 1):
        done(*command, "--quantizer", "gptq:sweeps=0", "--seed", seed)
    layers = [f"layers/blk.{layer}.safetensors" for layer in range(tiny_gguf.N_LAYERS)]
    assert [name for name in works[-1].made if name in ("gradients.gguf", *layers)] == [
        "gradients.gguf",
        *layers,
    ]


def test_text_of_second_moments_is_calibration_text(tiny, texts, tmp_path):
    """Also where a given imatrix was made of another text."""
    imatrix, out = tmp_path / "imatrix.gguf", tmp_path / "out.gguf"
    done("calibrate", tiny, "-o", imatrix, "--text", texts[1], "--ctx", 256, "--chunks", 4)
    flags = ("--type", "Q4_0", "--ctx", 256, "--imatrix", imatrix, "--fisher", 0)
    command = ("export", tiny, out, *flags, "--quantizer", "gptq:sweeps=0", "--no-prove")
    done(*command, "--text", texts[0])
    judged = ("--reference", tiny, "--ctx", 256, "--no-speed")
    for text in texts:
        line = refused("evaluate", out, *judged, "--text", text)
        assert "with the out.gguf calibration text" in line


def test_asymmetric_moves_only_what_has_layers_before_it(exported, again):
    out, report, _ = again("--asymmetric", 0.25)
    assert report["rounding"]["method"]["asymmetric"] == 0.25
    plain, moved = packed(exported[0]), packed(out)
    changed = {name.split(".")[1] for name in plain if plain[name] != moved[name]}
    assert changed == {"1"}
    verified = report["rounding"]["verification"]
    assert verified[GPTQ] < verified["rtn"]


def test_a_mixture_of_experts_with_few_tokens_each(texts, tmp_path):
    checkpoint = tiny_models.build("mixtral", tmp_path).directory
    out = tmp_path / "out.gguf"
    flags = ("--type", "Q4_0", "--ctx", 32, "--chunks", 2, "--eval-chunks", 2)
    command = ("export", checkpoint, out, "--text", texts[0], *flags, "--transform", "fold")
    report = done(*command, "--quantizer", "gptq", "--asymmetric", 0.5, "--json").json()
    facts = report["rounding"]["tensors"]
    experts = [name for name in facts if "_exps" in name]
    assert len(experts) == 6
    for name in experts:
        assert facts[name]["loss"] < facts[name]["loss_rtn"], name
    assert not [note for note in report["notes"] if "llama.cpp" in note]
    assert np.isfinite(report["files"][0]["evaluation"]["summary"]["kld"]["value"])


def test_folds_keep_the_function(tiny, texts, tmp_path):
    """Of Q8_0, whose own error is small, the products with the norms are what they were."""
    out = tmp_path / "out.gguf"
    command = ("export", tiny, out, "--text", texts[0], "--type", "Q8_0", *SHORT, "--json")
    plain = done(*command, "--quantizer", "rtn").json()
    report = done(*command, "--quantizer", "rtn", "--transform", "fold").json()
    folds = report["rounding"]["folds"]
    assert {name.split(".", 2)[2] for name, fold in folds.items() if fold["method"] != "none"} >= {
        "attn_norm -> attn_q, attn_k, attn_v",
        "attn_v -> attn_output",
        "ffn_norm -> ffn_gate, ffn_up",
        "ffn_up -> ffn_down",
    }
    klds = [r["files"][0]["evaluation"]["summary"]["kld"]["value"] for r in (report, plain)]
    assert klds[0] < 1.1 * klds[1] < 0.01
    before, after = open_gguf(tiny), open_gguf(out)
    for layer in range(tiny_gguf.N_LAYERS):
        norm, q = f"blk.{layer}.attn_norm.weight", f"blk.{layer}.attn_q.weight"
        assert not np.allclose(before.read_float(norm), after.read_float(norm), rtol=1e-3)
        expected = before.read_float(q) * before.read_float(norm)
        error = after.read_float(q) * after.read_float(norm) - expected
        assert np.abs(error).max() < 0.02 * np.abs(expected).max()


def test_what_a_folded_layer_stands_for_is_the_float_layer(tiny, tmp_path):
    """As the layers after it are calibrated through it."""
    file, stands_for = open_gguf(tiny), {}

    class Recording(StoredMoments):
        def advance(self, number, replaced):
            stands_for[number] = replaced()

    tokens = np.random.RandomState(0).randint(3, 260, (4, 64)).astype(np.int32)
    moments = Recording(
        lambda names: collect(tiny, tokens, hessians=names, n_threads=1), [list(file.tensors)]
    )
    plan = allocate(file, "Q8_0", has_imatrix=False)
    rules = Rules(RoundToNearest(), ("balance",), n_threads=1)
    with WorkDirectory(tmp_path / "work") as work:
        arguments = (None, moments, {}, "layers", work, Here(), lambda *_: None)
        found = quantize_layers(rules, Reference(file, ""), plan, *arguments)
    assert {fold["method"] for fold in found.folds.values()} == {"balance"}
    matrices = {name for name in plan.types if plan.types[name].name == "Q8_0"}
    inside = {name for layer in stands_for.values() for name in layer}
    assert inside == {name for name in matrices if name.startswith("blk.")}
    for layer in stands_for.values():
        for name, values in layer.items():
            weight = file.read_float(name)
            assert np.linalg.norm(values - weight) < 0.01 * np.linalg.norm(weight), name
            packed = found.load(name)
            folded = decode(packed.reshape(-1, packed.shape[-1]), plan.types[name])
            assert np.linalg.norm(folded - weight) > 0.02 * np.linalg.norm(weight), name


# ---------------------------------------------------------------------------- what is not accepted


def shorter(rows):
    return rows[:, :-1]


def not_bytes(rows):
    return rows.astype(np.int32)


def nan_scales(rows):
    changed = rows.copy()
    changed[0, :2] = (0x00, 0x7E)  # the float16 scale of a Q4_0 block
    return changed


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shorter, "returned uint8 of shape (64, 35), expected uint8 of shape (64, 36)."),
        (not_bytes, "returned int32 of shape (64, 36), expected uint8 of shape (64, 36)."),
        (nan_scales, "returned Q4_0 rows that ggml refuses (a scale is not finite)."),
    ],
)
def test_rows_that_a_quantizer_must_not_return(damage, message, tiny, tmp_path, monkeypatch):
    quantize = RoundToNearest.quantize

    def damaged(*arguments, **options):
        return Rounded(damage(quantize(*arguments, **options).packed))

    monkeypatch.setattr(RoundToNearest, "quantize", damaged)
    out = tmp_path / "out.gguf"
    line = refused("export", tiny, out, "--type", "Q4_0", "--no-imatrix", "--no-prove")
    assert line.startswith(f"edgeq: blk.0.attn_q.weight: the quantizer {message}")
    assert not out.exists()


def test_corrected_weights_undo_what_changed_inputs_do():
    random = np.random.RandomState(0)
    inputs = random.standard_normal((400, 24)).astype(np.float32)
    changed = (inputs + 0.3 * random.standard_normal(inputs.shape)).astype(np.float32)
    weight = random.standard_normal((2, 8, 24)).astype(np.float32)

    def moments(left):
        sums = 2 / len(inputs) * left.T @ changed
        return np.stack([sums, np.zeros_like(sums)])  # the second matrix saw nothing

    def error(matrix):
        return np.linalg.norm(changed @ matrix.T - inputs @ weight[0].T)

    hessian, cross = moments(changed), moments(inputs - changed)
    found = [corrected(weight, hessian, cross, alpha) for alpha in (0.0, 0.5, 1.0)]
    assert np.array_equal(found[0], weight)
    assert all(np.array_equal(each[1], weight[1]) for each in found)
    errors = [error(each[0]) for each in found]
    assert errors[0] > 1.05 * errors[1] > 1.05 * errors[2]
    best, *_ = np.linalg.lstsq(changed, inputs @ weight[0].T, rcond=None)
    assert errors[2] < 1.01 * error(best.T)  # but for the dampening


@pytest.mark.parametrize("folds", ["none", "fold"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "stablelm"])
def test_biases_make_the_mean_error_of_their_products_good(name, folds, texts, tmp_path):
    """On the calibration text itself; layer 0, whose inputs are the float model's."""
    directory = tiny_models.build(name, tmp_path).directory
    path, out, work = tmp_path / "float.gguf", tmp_path / "out.gguf", tmp_path / "work"
    convert(open_checkpoint(directory), path, ftype="f32")
    flags = ("--quantizer", "gptq:sweeps=1", "--fisher", 0, "--transform", folds, "--work", work)
    done("export", path, out, "--type", "Q4_0", "--text", texts[0], *SHORT, "--no-prove", *flags)
    before, after = open_gguf(path), open_gguf(out)
    with safe_open(work / "text.safetensors", framework="numpy") as file:
        rows = file.get_tensor("calibration")
    models = {g: layerwise.LayerwiseModel.open(g, directory) for g in (before, after)}
    hidden = models[before].embed(rows)  # calibration saw the float embedding
    products = {}
    for gguf, model in models.items():
        inputs = tiny_models.inputs_of(model.load(0), hidden)
        weight = next(n for n in ("attn_q", "attn_qkv") if f"blk.0.{n}.bias" in gguf.tensors)
        rows_of_q = slice(before.tensors["token_embd.weight"].shape[1])  # of v, folds scale rows
        mean = np.concatenate(inputs[f"blk.0.{weight}.weight"]).mean(axis=0)
        products[gguf] = {
            source: (mean @ gguf.read_float(f"blk.0.{weight}.weight").T)[rows_of_q]
            + source.read_float(f"blk.0.{weight}.bias")[rows_of_q]
            for source in (before, after)
        }
    wanted = products[before][before]
    error = np.abs(products[after][after] - wanted).max()
    assert error < 0.2 * np.abs(products[after][before] - wanted).max()
    for bias in (n for n in before.tensors if n.endswith("ffn_down.bias")):
        assert not np.array_equal(before.read_float(bias), after.read_float(bias))
