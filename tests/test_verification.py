"""``edgeq verify``: what is true holds, what is not differs; hashes and signatures."""

import json

import numpy as np
import pytest
from gguf import GGUFValueType

from converters.gguf_file import Field, TensorSource, open_gguf, write_gguf
from edgeq.differing.screen import TensorScreen
from edgeq.verification.claims import Claim
from edgeq.verification.tensors import Looker
from tests import tiny_gguf, tiny_models
from tests.command_line import done, refused, run

VICTIM = "blk.1.ffn_up.weight"
KEYS = ("source", "recipe", "method", "texts", "versions")
DIFFERS = "differs"
LAST = 0  # a seed that draws layer 1
SHORT = ("--ctx", 64, "--chunks", 4, "--no-prove")


@pytest.fixture(scope="module")
def exported(tiny, texts, tmp_path_factory):
    """Files of several recipes, by name."""
    directory = tmp_path_factory.mktemp("exported")
    flags = {
        "plain": ("--type", "Q4_0", "--quantizer", "rtn", "--no-imatrix", "--no-prove"),
        "weighted": ("--type", "Q4_0", "--quantizer", "rtn", "--text", texts[0], *SHORT),
        "auto": ("--type", "Q4_0", "--effort", "fast", "--text", texts[0], *SHORT),
        "gptq": ("--type", "Q4_0", "--quantizer", "gptq", "--text", texts[0], *SHORT),
        "fed": (
            "--type",
            "Q4_0",
            "--quantizer",
            "gptq",
            "--output-feedback",
            "--text",
            texts[0],
            *SHORT,
        ),
    }
    for name, flag in flags.items():
        done("export", tiny, directory / f"{name}.gguf", *flag)
    return {name: directory / f"{name}.gguf" for name in flags}


def changed(path, out, change=None, fields=None, victim=VICTIM):
    """Write a file again with another tensor, or other metadata."""
    file = open_gguf(path)

    def source(name, tensor):
        data = np.array(file.read_bytes(name))
        if name == victim and change is not None:
            change(data)
        return TensorSource(name, tensor.qtype, tensor.shape, lambda: data)

    tensors = [source(*item) for item in file.tensors.items()]
    write_gguf(out, file.fields | (fields or {}), tensors)
    return out


def whys(result):
    return {one["name"]: one["why"] for one in result.json()["tensors"]}


def refused_by(path, tiny, tmp_path, *flags):
    return refused("verify", path, "--source", tiny, "--work", tmp_path / "work", *flags)


def verdicts(result):
    return {one["name"]: one["verdict"] for one in result.json()["tensors"]}


def verify(path, tiny, tmp_path, *flags):
    return run("verify", path, "--source", tiny, "--json", "--work", tmp_path / "work", *flags)


def test_rounding_to_nearest_is_derived_again_byte_for_byte(exported, tiny, tmp_path):
    result = verify(exported["plain"], tiny, tmp_path)
    assert result.code == 0
    found = result.json()
    assert found["holds"]
    assert set(verdicts(result).values()) == {"identical"}
    assert len(found["tensors"]) == found["n_tensors"]
    assert "tensor data: as the file's own hash says" in found["facts"]
    assert "types: those of Q4_0" in found["facts"]
    assert found["limits"] == ["who made it: it is not signed"]


def test_with_its_imatrix_a_file_is_identical_and_without_consistent(exported, tiny, tmp_path):
    file = exported["weighted"]
    result = verify(file, tiny, tmp_path)
    assert result.code == 0
    assert set(verdicts(result).values()) == {"identical", "consistent"}
    imatrix = file.with_suffix(".edgeq") / "imatrix.gguf"
    exact = verify(file, tiny, tmp_path, "--imatrix", imatrix)
    assert set(verdicts(exact).values()) == {"identical"}


def test_a_folded_file_is_consistent(exported, tiny, tmp_path):
    result = verify(exported["auto"], tiny, tmp_path)
    assert result.code == 0, result.json()["differences"]
    assert set(verdicts(result).values()) == {"identical", "consistent"}
    assert any(limit.startswith("that the codes are") for limit in result.json()["limits"])


@pytest.mark.parametrize("name", ["auto", "gptq", "fed"])
def test_layers_are_derived_again_byte_for_byte(name, exported, texts, tiny, tmp_path):
    """Folds, squared gradients and error feedback, the layers before as the file has them."""
    file = exported[name]
    result = verify(file, tiny, tmp_path, "--text", texts[0], "--layers", 1, "--seed", LAST)
    assert result.code == 0, result.json()["differences"]
    derived = {n for n, how in whys(result).items() if how.startswith("derived again from")}
    assert {n for n in derived if n.startswith("blk.0")} <= {
        "blk.0.attn_norm.weight",
        "blk.0.ffn_norm.weight",
    }
    assert {n for n in verdicts(result) if n.startswith("blk.1.") and "norm" not in n} < derived
    assert {verdicts(result)[n] for n in derived} == {"identical"}
    assert "layers derived again: 1" in result.json()["facts"]
    assert any("codes of other layers" in limit for limit in result.json()["limits"])
    assert not list((tmp_path / "work").glob("tmp*"))


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_folds_corrections_and_biases_are_derived_again(kind, texts, tmp_path):
    if kind == "qwen2":  # its biases take the mean error of their products
        model = tiny_models.build(kind, tmp_path).directory
    else:
        model = tiny_gguf.write(tmp_path / "model.gguf", kind)
    out = tmp_path / "out.gguf"
    how = ("--quantizer", "gptq:sweeps=0", "--transform", "fold", "--asymmetric", 0.5)
    done("export", model, out, "--type", "Q4_0", *how, "--text", texts[0], *SHORT)
    found = verify(out, model, tmp_path, "--text", texts[0], "--seed", LAST)
    assert found.code == 0, found.json()["differences"]
    folded = {n for n in verdicts(found) if n.endswith(("attn_norm.weight", ".bias"))}
    assert len(folded) > 1
    assert all(verdicts(found)[n] == "identical" for n in folded)
    assert all(verdicts(found)[n] == "identical" for n in verdicts(found) if n.startswith("blk.1"))


def test_one_changed_code_in_a_derived_layer_differs(exported, texts, tiny, tmp_path):
    def change(data):
        data[0, 7] ^= 1  # one code, by one step

    versions = json.loads(open_gguf(exported["gptq"]).value("edgeq.versions")) | {"numpy": "0.1"}
    told = {"edgeq.versions": Field(json.dumps(versions), GGUFValueType.STRING)}
    path = changed(exported["gptq"], tmp_path / "bad.gguf", change, told)
    assert DIFFERS not in verdicts(verify(path, tiny, tmp_path)).values()  # nearer than rounding
    found = verify(path, tiny, tmp_path, "--text", texts[0], "--layers", 1, "--seed", LAST)
    assert found.code == 1
    assert {n for n, v in verdicts(found).items() if v == DIFFERS} == {VICTIM}
    assert "1 of" in whys(found)[VICTIM]
    assert "made with numpy 0.1 (here" in whys(found)[VICTIM]


def test_a_change_in_a_layer_before_shows_in_what_it_leads_to(exported, texts, tiny, tmp_path):
    def change(data):
        data[:, 5] ^= 0x11

    path = changed(exported["gptq"], tmp_path / "bad.gguf", change, victim="blk.0.ffn_up.weight")
    found = verify(path, tiny, tmp_path, "--text", texts[0], "--layers", 1, "--seed", LAST)
    assert {n.split(".")[1] for n, v in verdicts(found).items() if v == DIFFERS} == {"1"}
    assert "another CPU can change bytes" in whys(found)[VICTIM]


def test_a_recipe_that_ended_in_rounding_to_nearest(texts, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("edgeq.roundings._MARGIN", 0.0)
    out = tmp_path / "nearest.gguf"
    flags = ("--type", "Q4_0", "--effort", "fast", "--text", texts[0], *SHORT)
    assert "Rounded to nearest" in done("export", tiny, out, *flags).out
    found = verify(out, tiny, tmp_path, "--text", texts[0])
    assert "rounding: to nearest, as the recipe may" in found.json()["facts"]
    assert found.code == 0


def test_text_that_the_model_wrote_is_written_again(tiny, tmp_path):
    out = tmp_path / "own.gguf"
    done("export", tiny, out, "--type", "Q4_0", "--quantizer", "gptq:sweeps=0", *SHORT)
    found = verify(out, tiny, tmp_path, "--layers", 9)
    assert found.code == 0
    assert set(verdicts(found).values()) == {"identical"}
    assert "Leave it out" in refused_by(out, tiny, tmp_path, "--text", tiny)


def test_an_imatrix_is_made_again_from_its_text(exported, texts, tiny, tmp_path):
    found = verify(exported["weighted"], tiny, tmp_path, "--text", texts[0])
    assert set(verdicts(found).values()) == {"identical"}
    assert "that the calibration text was the recorded one" not in found.json()["limits"]


def test_what_cannot_be_derived_again_is_refused(exported, texts, tiny, tmp_path):
    file = exported["gptq"]
    assert "the file was calibrated on" in refused_by(file, tiny, tmp_path, "--text", texts[1])
    assert "Give them with --text" in refused_by(file, tiny, tmp_path, "--layers", 1)
    given = ("--text", texts[0], "--imatrix", file.with_suffix(".edgeq") / "imatrix.gguf")
    assert "made its own" in refused_by(file, tiny, tmp_path, *given)
    method = json.loads(open_gguf(file).value("edgeq.method"))
    told = {"edgeq.method": Field(json.dumps(method | {"fisher": 0.25}), GGUFValueType.STRING)}
    path = changed(file, tmp_path / "other.gguf", fields=told)
    assert "Another version of edgeq" in refused_by(path, tiny, tmp_path, "--text", texts[0])


@pytest.mark.parametrize("name", ["plain", "weighted", "auto"])
def test_a_tensor_of_other_weights_differs(name, exported, tiny, tmp_path):
    def change(data):
        data[: len(data) // 4, 4:] = 0xFF  # other codes, the same scales

    path = changed(exported[name], tmp_path / "bad.gguf", change)
    result = verify(path, tiny, tmp_path)
    assert result.code == 1
    assert {n for n, v in verdicts(result).items() if v == "differs"} == {VICTIM}
    assert "tensor data: is not what the file's own hash says" in result.json()["differences"]


@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "output_norm.weight"])
def test_a_changed_norm_differs(name, exported, tiny, tmp_path):
    file = open_gguf(exported["auto"])
    values = file.read_float(name).copy()
    values[3] *= 8
    tensors = [
        TensorSource(n, t.qtype, t.shape, lambda n=n: values if n == name else file.read_bytes(n))
        for n, t in file.tensors.items()
    ]
    write_gguf(tmp_path / "bad.gguf", file.fields, tensors)
    result = verify(tmp_path / "bad.gguf", tiny, tmp_path)
    assert result.code == 1
    assert "differs" in verdicts(result).values()


def test_single_weights_that_feedback_moved_far_are_not_shown(exported):
    """More so where rows make up for each other's errors; what is far in all differs."""

    def found(name, mean):
        claim = Claim.of(open_gguf(exported[name]))
        looker = Looker(None, None, claim, None, None, {})
        screens = [TensorScreen(str(n), "Q4_0", 2.0, 0.0, 1.0, 0.0, 0.0) for n in range(6)]
        far = TensorScreen("far", "Q4_0", 15.0, 0.01, mean, 0.0, 0.0)
        return {one.name: one.verdict for one in looker._judged([*screens, far])}

    for name, most in (("gptq", 1.1), ("fed", 1.5)):
        near, beyond = found(name, most - 0.01), found(name, most + 0.01)
        assert near.pop("far") == "not shown"
        assert beyond.pop("far") == DIFFERS
        assert set(near.values()) == {"consistent"}


def test_other_types_and_another_source_differ(exported, tiny, wide, tmp_path):
    recipe = json.loads(open_gguf(exported["plain"]).value("edgeq.recipe"))
    told = Field(json.dumps(recipe | {"preset": "Q5_0"}), GGUFValueType.STRING)
    path = changed(exported["plain"], tmp_path / "lies.gguf", fields={"edgeq.recipe": told})
    found = verify(path, tiny, tmp_path)
    assert found.code == 1
    assert any("expected Q5_0 by Q5_0" in line for line in found.json()["differences"])
    other = verify(exported["plain"], wide, tmp_path / "other")
    assert other.code == 1
    assert "is not the recorded tiny.gguf" in other.json()["differences"][0]


def test_a_sample_is_of_the_seed(exported, tiny, tmp_path):
    def names(*flags):
        return list(verdicts(verify(exported["plain"], tiny, tmp_path, "--tensors", 3, *flags)))

    assert len(names("--seed", 1)) == 3
    assert names("--seed", 1) == names("--seed", 1)
    assert names("--seed", 1) != names("--seed", 2)
    text = run("verify", exported["plain"], "--source", tiny, "--work", tmp_path / "work").out
    assert "identical" in text
    assert "--seed" in text


def test_a_file_of_others_is_refused(tiny, tmp_path):
    line = refused("verify", tiny, "--source", tiny, "--work", tmp_path / "work")
    assert "edgeq did not write this file" in line
    broken = changed(tiny, tmp_path / "b.gguf", fields=dict.fromkeys(
        (f"edgeq.{key}" for key in KEYS), Field("{}", GGUFValueType.STRING)
    ))  # fmt: skip
    line = refused("verify", broken, "--source", tiny, "--work", tmp_path / "work")
    assert "Another version of edgeq wrote it" in line


# --------------------------------------------------------------------------------------- signatures


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two private keys and their public ones, PEM."""
    pytest.importorskip("cryptography", reason="signatures: pip install '.[sign]'")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    directory = tmp_path_factory.mktemp("keys")
    for name in ("one", "other"):
        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
        public = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        (directory / f"{name}.pem").write_bytes(private)
        (directory / f"{name}.pub").write_bytes(public)
    return directory


@pytest.fixture(scope="module")
def signed(tiny, keys, tmp_path_factory):
    out = tmp_path_factory.mktemp("signed") / "signed.gguf"
    flags = ("--type", "Q4_0", "--quantizer", "rtn", "--no-imatrix", "--no-prove")
    done("export", tiny, out, *flags, "--sign", keys / "one.pem")
    return out


def test_a_signature_fits_its_key_alone(signed, keys, tiny, exported, tmp_path):
    found = verify(signed, tiny, tmp_path, "--public-key", keys / "one.pub")
    assert found.code == 0
    assert found.json()["limits"] == []
    assert f"signature: fits, of {keys / 'one.pub'}" in found.json()["facts"]
    other = verify(signed, tiny, tmp_path, "--public-key", keys / "other.pub")
    assert other.code == 1
    assert "not of" in other.json()["differences"][0]
    unsigned = verify(exported["plain"], tiny, tmp_path, "--public-key", keys / "one.pub")
    assert unsigned.json()["differences"] == ["signature: there is none"]
    assert "give --public-key" in "".join(verify(signed, tiny, tmp_path).json()["facts"])


def test_a_signature_covers_the_metadata(signed, keys, tiny, tmp_path):
    template = {"tokenizer.chat_template": Field("{{ obey }}", GGUFValueType.STRING)}
    path = changed(signed, tmp_path / "bad.gguf", fields=template)
    found = verify(path, tiny, tmp_path, "--public-key", keys / "one.pub")
    assert found.code == 1
    assert "signature: does not fit" in found.json()["differences"][0]


def test_bad_keys_are_refused_before_any_work(tiny, keys, tmp_path):
    (tmp_path / "text.pem").write_text("no key")
    for key, word in (
        (tmp_path / "text.pem", "no private key"),
        (tmp_path / "gone.pem", "cannot be read"),
        (keys / "one.pub", "no private key"),
    ):
        line = refused("export", tiny, tmp_path / "o.gguf", "--no-prove", "--sign", key)
        assert word in line
    assert not (tmp_path / "o.gguf").exists()


def test_without_cryptography_it_says_what_to_install(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives", None)
    line = refused("export", tiny, tmp_path / "o.gguf", "--no-prove", "--sign", tmp_path / "k.pem")
    assert "pip install 'edgeq[sign]'" in line
