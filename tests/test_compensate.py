"""Low-rank corrections: the optimum, the adapter in llama.cpp, the command and its refusals."""

import itertools
import json

import numpy as np
import pytest
from gguf import GGUFValueType

from converters.gguf_file import open_gguf
from converters.gguf_header import Field
from edgeq.compensating import Pair, write_adapter
from edgeq.compensating.adapter import adapter_fields, applied
from edgeq.compensating.low_rank import choose_ranks, correct
from edgeq.errors import RuntimeLibraryError
from edgeq.runtime.model import Model
from edgeq.tasks import read_task, score_tasks
from tests import tiny_gguf
from tests.command_line import done, files_under, refused, run

TEXT, OTHER = tiny_gguf.text(1, 3000), tiny_gguf.text(2, 900)


def loss(error, hessian):
    return 0.5 * np.trace(error.astype(np.float64) @ hessian @ error.T)


def moments(rng, n):
    x = rng.standard_normal((3 * n, n)) * np.linspace(0.2, 2, n)
    return (2 / len(x) * x.T @ x).astype(np.float32)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_no_other_correction_of_its_rank_leaves_less(shape):
    rng = np.random.RandomState(shape[0])
    weight, error = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    hessian = moments(rng, shape[1])
    found = correct(weight, error, hessian, most=99)
    assert len(found.gains) == min(shape)
    assert found.loss == pytest.approx(loss(error, hessian))
    assert found.energy == pytest.approx(loss(weight, hessian), rel=1e-5)
    for rank in range(1, min(shape) + 1):
        product = found.b[:, :rank] @ found.a[:rank]
        left = loss(error - product, hessian)
        assert left == pytest.approx(found.loss - found.gains[:rank].sum(), abs=1e-4)
        # alternating exact least squares, from many starts, finds nothing better
        for _ in range(5):
            b = rng.standard_normal((shape[0], rank))
            for _ in range(40):
                a = np.linalg.solve(b.T @ b + 1e-12 * np.eye(rank), b.T @ error)
                b = error @ hessian @ a.T @ np.linalg.pinv(a @ hessian @ a.T)
            assert left <= loss(error - b @ a, hessian) + 1e-4


def test_an_error_of_low_rank_is_mended_wholly_and_none_not_at_all():
    rng = np.random.RandomState(0)
    weight = rng.standard_normal((8, 5)).astype(np.float32)
    error = np.outer(rng.standard_normal(8), rng.standard_normal(5)).astype(np.float32)
    found = correct(weight, error, moments(rng, 5), most=5)
    np.testing.assert_allclose(found.b @ found.a, error, atol=1e-6)
    assert found.gains[0] == pytest.approx(found.loss, rel=1e-5)
    assert len(correct(weight, 0 * error, moments(rng, 5), most=5).gains) == 0


def test_ranks_are_the_best_that_fit():
    gains = {"x": np.array([9.0, 4.0, 1.0]), "y": np.array([8.2, 7.5, 0.5]), "z": np.array([0.1])}
    size, first = {"x": 10, "y": 20, "z": 1000}, {"x": 0, "y": 0, "z": 0}
    for budget in (10, 30, 40, 60, 70, 90):  # where the greedy choice ends on an item
        ranks = choose_ranks(gains, first, size, budget)
        assert sum(size[name] * n for name, n in ranks.items()) <= budget
        got = sum(gains[name][:n].sum() for name, n in ranks.items())
        best = max(
            sum(gains[name][:n].sum() for name, n in zip(gains, choice, strict=True))
            for choice in itertools.product(range(4), range(4), range(2))
            if sum(size[name] * n for name, n in zip(gains, choice, strict=True)) <= budget
        )
        assert got == pytest.approx(best), budget
    assert choose_ranks(gains, first, size, 9) == {}
    assert choose_ranks(gains, {**first, "x": 11, "y": 9}, size, 29) == {"x": 1}


# --- in llama.cpp ----------------------------------------------------------------------------


def test_llama_cpp_adds_the_product_of_every_rank(tmp_path):
    """The same logits as with the product in the weights."""
    rng = np.random.RandomState(3)
    base = tiny_gguf.write(tmp_path / "base.gguf", "llama")
    file = open_gguf(base)
    ranks = {
        "blk.0.attn_q.weight": 1,
        "blk.0.ffn_down.weight": 3,
        "blk.1.attn_v.weight": 7,
        "output.weight": 2,
    }
    pairs = {}
    for name, rank in ranks.items():
        n_out, n_in = file.tensors[name].shape
        b, a = rng.standard_normal((n_out, rank)), rng.standard_normal((rank, n_in)) / 8
        pairs[name] = Pair(b.astype(np.float32) / 4, a.astype(np.float32))
    adapter = tmp_path / "adapter.gguf"
    write_adapter(adapter, adapter_fields("llama", {}), pairs)
    written = open_gguf(adapter)
    patched = {
        name: file.read_float(name)
        + written.read_float(f"{name}.lora_b") @ written.read_float(f"{name}.lora_a") / rank
        for name, rank in ranks.items()
    }
    for name, pair in pairs.items():
        np.testing.assert_allclose(
            patched[name] - file.read_float(name), pair.b @ pair.a, atol=2e-3
        )
    other = tiny_gguf.write(tmp_path / "patched.gguf", "llama", replace=patched)
    tokens = np.arange(2, 66, dtype=np.int32)

    def logits(path, adapter=None):
        with Model(path, exact_attention=True, n_threads=1, adapter=adapter) as model:
            return model.logits(tokens).copy()

    got, expected, plain = logits(base, adapter), logits(other), logits(base)
    assert np.abs(expected - plain).max() > 0.5
    # float16 factors make ggml round the inputs of these products to float16
    assert np.abs(got - expected).max() < 0.01 * np.abs(expected - plain).max()
    with pytest.raises(RuntimeLibraryError, match=r"adapter.gguf: llama.cpp cannot apply it"):
        Model(tiny_gguf.write(tmp_path / "mamba.gguf", "mamba"), adapter=adapter)
    with pytest.raises(RuntimeLibraryError, match=r"cannot apply it to .*expect general.type"):
        Model(base, adapter=other)


def test_only_weights_that_llama_cpp_adds_an_adapter_to_get_ranks(tmp_path):
    """Latent attention multiplies its first weights without looking for adapters."""
    expected = {"llama": set(), "deepseek2": {"attn_q_a", "attn_q_b", "attn_kv_a_mqa"}}
    for kind, left_out in expected.items():
        path = tiny_gguf.write(tmp_path / f"{kind}.gguf", kind)
        infos = open_gguf(path).tensors
        shapes = {
            name: info.shape
            for name, info in infos.items()
            if len(info.shape) == 2 and name != "token_embd.weight"
        }
        found = applied(path, kind, shapes, tmp_path, 1)
        assert {name.split(".")[2] for name in shapes.keys() - {*found}} == left_out
    assert files_under(tmp_path) == {"llama.gguf", "deepseek2.gguf"}


# --- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny model, its Q4_0 file, and texts."""
    directory = tmp_path_factory.mktemp("compensate")
    reference = tiny_gguf.write(directory / "reference.gguf", "llama")
    (directory / "text.txt").write_text(TEXT)
    (directory / "other.txt").write_text(OTHER)
    file = directory / "q4.gguf"
    done("export", reference, file, "--type", "Q4_0", "--quantizer", "rtn", "--no-imatrix",
         "--no-prove")  # fmt: skip
    return reference, file


def arguments(pair, out, *more):
    reference, file = pair
    texts = ("--text", file.parent / "text.txt", "--eval-text", file.parent / "other.txt")
    return ("compensate", file, "--reference", reference, "-o", out, *texts, "--ctx", 128, *more)


def test_the_divergence_falls_and_the_size_is_kept(pair, tmp_path):
    out = tmp_path / "adapter.gguf"
    told = done(*arguments(pair, out, "--size", 12000, "--json")).json()
    with_it, alone = told["files"]
    adapter = told["adapter"]
    assert adapter["size_bytes"] == out.stat().st_size <= 12000
    assert with_it["size_bytes"] == alone["size_bytes"] + out.stat().st_size
    kld = [one["evaluation"]["summary"]["kld"]["value"] for one in (with_it, alone)]
    assert kld[0] < 0.8 * kld[1], kld
    assert adapter["predicted"] < 1
    assert "ratio" in told["comparisons"][0]
    written = open_gguf(out)
    assert written.value("general.type") == "adapter"
    assert written.value("adapter.type") == "lora"
    shapes = {name: info.shape for name, info in open_gguf(pair[1]).tensors.items()}
    for name, spent in adapter["tensors"].items():
        n_out, n_in = shapes[name]
        assert written.tensors[f"{name}.lora_a"].shape == (spent["rank"], n_in)
        assert written.tensors[f"{name}.lora_b"].shape == (n_out, spent["rank"])
        assert spent["after"] < spent["before"]
    assert len(written.tensors) == 2 * len(adapter["tensors"])
    assert not any(name.startswith("token_embd") for name in adapter["tensors"])


def test_a_rank_for_all_and_the_table(pair, tmp_path):
    out = tmp_path / "adapter.gguf"
    shown = done(*arguments(pair, out, "--rank", 2)).out
    assert "ranks 2 to 2 (median 2) in 15 of 15 weights" in shown
    assert "q4.gguf + adapter" in shown
    assert "with its bytes in larger types" in shown
    ranks = {info.shape[0] for name, info in open_gguf(out).tensors.items() if "lora_a" in name}
    assert ranks == {2}
    bare = done(*arguments(pair, tmp_path / "again.gguf", "--rank", 2, "--no-prove", "--json"))
    assert [file["evaluation"] for file in bare.json()["files"]] == [None, None]
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()


def folded_by_hand(path):
    """The same function as the reference: channels scaled behind norms and before weights."""
    scales = np.geomspace(0.6, 1.7, tiny_gguf.N_EMBD).astype(np.float32)
    replace = {}
    for layer in range(tiny_gguf.N_LAYERS):
        shapes = tiny_gguf.llama_layer(f"blk.{layer}.")
        for kind, readers in (("attn", "qkv"), ("ffn", ("ffn_gate", "ffn_up"))):
            norm = f"blk.{layer}.{kind}_norm.weight"
            replace[norm] = tiny_gguf.values(norm, shapes[norm]) / scales
            for reader in readers:
                name = f"blk.{layer}.{'attn_' if kind == 'attn' else ''}{reader}.weight"
                replace[name] = tiny_gguf.values(name, shapes[name]) * scales
    return tiny_gguf.write(path, "llama", replace=replace)


def test_what_cannot_be_compensated_is_one_line_and_no_file(pair, tmp_path):
    reference, file = pair
    out = tmp_path / "adapter.gguf"
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    random = np.random.RandomState(9)
    shapes = {name: info.shape for name, info in open_gguf(reference).tensors.items()}
    other = tiny_gguf.write(
        tmp_path / "other.gguf",
        "llama",
        replace={
            name: random.standard_normal(shape).astype(np.float32) / 8
            for name, shape in shapes.items()
            if len(shape) == 2
        },
    )
    method = Field(json.dumps({"transforms": ["norm"]}), GGUFValueType.STRING)
    told = tiny_gguf.write(tmp_path / "told.gguf", "llama", extra={"edgeq.method": method})
    rounded = tmp_path / "rounded.gguf"
    done("export", folded_by_hand(tmp_path / "folded.gguf"), rounded, "--type", "Q4_0",
         "--quantizer", "rtn", "--no-imatrix", "--no-prove")  # fmt: skip
    before = files_under(tmp_path)
    refusals = {
        "weights are not those of": arguments((other, file), out),
        "is quantized already": arguments((file, file), out),
        "was exported with folds": arguments((reference, told), out),
        "an export that folds": arguments((reference, rounded), out),
        "no quantized matrix": arguments((reference, reference), out),
        "contradict each other": arguments(pair, out, "--size", 9000, "--rank", 2),
        "--rank: got 0": arguments(pair, out, "--rank", 0),
        "no rank of any weight fits into 900 bytes": arguments(pair, out, "--size", 900),
        "there is no directory": arguments(pair, tmp_path / "no" / "adapter.gguf"),
        "would overwrite": arguments(pair, file),
        "no such file": arguments((reference, tmp_path / "none.gguf"), out),
        "empty.txt": (*arguments(pair, out)[:6], "--text", empty, "--ctx", 128),
    }
    for expected, words in refusals.items():
        assert expected in refused(*words), expected
        left = {name for name in files_under(tmp_path) if not name.startswith("adapter.edgeq")}
        assert left == before, expected
    assert run("compensate", file, "-o", out).code == 2


def test_text_that_the_file_was_calibrated_on_does_not_judge_it(pair, tmp_path):
    reference, _ = pair
    text = pair[1].parent / "text.txt"
    file = tmp_path / "calibrated.gguf"
    done("export", reference, file, "--type", "Q4_0", "--quantizer", "rtn", "--ctx", 128,
         "--no-prove", "--text", text)  # fmt: skip
    words = ("compensate", file, "--reference", reference, "-o", tmp_path / "a.gguf", "--ctx", 128,
             "--size", "64K")  # fmt: skip
    other = pair[1].parent / "other.txt"
    line = refused(*words, "--text", other, "--eval-text", text)
    assert "calibrat" in line
    assert not (tmp_path / "a.gguf").exists()
    told = done(*words, "--text", other, "--eval-text", text, "--force", "--json").json()
    assert any("Judged on calibration text" in note for note in told["notes"])


def test_a_failing_proof_leaves_no_adapter(pair, tmp_path, monkeypatch):
    def fail(*_args, **_settings):
        raise RuntimeLibraryError("llama.cpp: refused")

    monkeypatch.setattr("edgeq.proving.evaluate", fail)
    out = tmp_path / "adapter.gguf"
    assert "refused" in refused(*arguments(pair, out))
    assert not out.exists()


@pytest.fixture(scope="module")
def adapted(pair, tmp_path_factory):
    """An adapter of the pair's file, and what the command measured."""
    out = tmp_path_factory.mktemp("adapted") / "adapter.gguf"
    return out, done(*arguments(pair, out, "--size", 12000, "--json")).json()


def judging(pair, *flags):
    reference, file = pair
    return ("evaluate", file, "--reference", reference, "--text", file.parent / "other.txt",
            "--ctx", 128, "--no-speed", "--work", file.parent / "judging", *flags)  # fmt: skip


def test_evaluate_runs_files_with_an_adapter(pair, adapted):
    adapter, made = adapted
    alone, with_it = (
        done(*judging(pair, "--json", *flags)).json()["files"][0]
        for flags in ((), ("--lora", adapter))
    )
    assert alone["label"] == pair[1].name
    assert with_it["label"] == f"{pair[1].name} + adapter"
    assert with_it["size_bytes"] == alone["size_bytes"] + adapter.stat().st_size
    divergence = [one["evaluation"]["summary"]["kld"]["value"] for one in (alone, with_it)]
    assert divergence[1] < divergence[0]
    assert [one["label"] for one in made["files"]] == [with_it["label"], alone["label"]]


def test_tasks_are_answered_with_an_adapter(pair, adapted, tmp_path):
    items = [
        {"context": f"{word} and", "endings": [" one thing", " another thing"], "label": 0}
        for word in ("this", "that", "those", "these")
    ]
    tasks = tmp_path / "own.jsonl"
    tasks.write_text("".join(json.dumps(item) + "\n" for item in items))
    task = read_task(tasks)

    def scores(adapter):
        return [one.log_likelihoods.tolist() for one in score_tasks(
            pair[1], [task], n_threads=1, adapter=adapter)[0]]  # fmt: skip

    assert scores(adapted[0]) != scores(None)
    result = done("evaluate", pair[1], "--tasks", tasks, "--lora", adapted[0], "--no-speed")
    assert f"{pair[1].name} + adapter" in result.out


def test_an_adapter_of_another_base_is_refused(pair, adapted, tmp_path):
    reference, file = pair
    adapter = adapted[0]
    rebased = tmp_path / "rebased.gguf"
    done("export", reference, rebased, "--type", "Q5_0", "--quantizer", "rtn", "--no-imatrix",
         "--no-prove")  # fmt: skip
    mamba = tiny_gguf.write(tmp_path / "mamba.gguf", "mamba")
    broken = tmp_path / "broken.gguf"
    extra = {"edgeq.base": Field("[1]", GGUFValueType.STRING)}
    write_adapter(broken, adapter_fields("llama", extra), {})
    words = judging(pair, "--lora")
    refusals = {
        f"was made for another base, {file.name}": (words[0], rebased, *words[2:], adapter),
        "is for models of llama, got": (words[0], mamba, *words[2:], adapter),
        "adapter.type is None, expected 'lora'": (*words, file),
        "edgeq.base is damaged": (*words, broken),
        "no such file": (*words, tmp_path / "none.gguf"),
    }
    before = files_under(tmp_path)
    for expected, line in refusals.items():
        assert expected in refused(*line), expected
    assert files_under(tmp_path) == before


def test_an_adapter_is_not_judged_on_its_calibration_text(pair, adapted):
    text = pair[1].parent / "text.txt"
    words = judging(pair, "--lora", adapted[0])
    at = words.index("--text") + 1
    assert "calibrat" in refused(*words[:at], text, *words[at + 1 :])
