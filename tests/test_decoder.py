"""The decoder on our kernels against llama.cpp, on the same files."""

import dataclasses
from functools import cache

import numpy as np
import pytest

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from cpu_kernels.threads import available_cpus
from edgeq import pipeline
from edgeq.console import Steps
from edgeq.decoding import Decoder
from edgeq.errors import EvaluationError
from edgeq.recipe import Recipe
from edgeq.runtime.model import Model
from tests import tiny_models

pytest.importorskip("torch")

TOKENS = np.random.RandomState(0).randint(3, 400, 150).astype(np.int32)
# queries, keys and probabilities are half floats in llama.cpp; without quantized activations
# nothing else differs
SAME_FUNCTION_NATS = 2e-5
# rounded activations: a last bit decides a code. llama.cpp with and without its fused attention
# differs by as much
SAME_KERNELS_NATS = 5e-3
_PLAIN = {"rope_theta": 1000000.0}
CASES = {
    "llama2": {},  # linear position scaling
    "llama3": {"attention_bias": False, "mlp_bias": False},  # frequencies by hand
    "smollm2": {},  # tied embedding
    "mistral": {"intermediate_size": 100},  # wide heads; rows that no block divides
    "qwen2": {},  # biases
    "qwen3": {"rope_parameters": _PLAIN},  # normalized heads
    "gemma3": {},  # windows, two bases, two norms, GELU
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return, by name and type, a tiny model's file."""
    parent = tmp_path_factory.mktemp("decoder")

    @cache
    def make(name, file_type="f32"):
        path = parent / f"{name}-{file_type}.gguf"
        if file_type != "f32":
            pipeline.export(
                Recipe(
                    str(make(name)),
                    path,
                    preset=file_type,
                    quantizer="rtn",
                    use_imatrix=False,
                    prove=False,
                ),
                Steps(),
            )
            return path
        with pytest.MonkeyPatch.context() as patch:
            case = tiny_models.CASES[name]
            changed = dataclasses.replace(case, settings={**case.settings, **CASES[name]})
            patch.setitem(tiny_models.CASES, name, changed)
            directory = tiny_models.build(name, parent).directory
        convert(open_checkpoint(directory), path, ftype="f32")
        return path

    return make


def llamas_logits(path, tokens, **settings):
    n = len(tokens)
    with Model(path, n_ctx=256, n_threads=1, **settings) as model:
        wants = np.ones(n, np.bool_)
        found = model.decode(tokens, np.arange(n, dtype=np.int32), np.zeros(n, np.int32), wants)
        return found.copy()


def divergence(one, other):
    """Mean KL divergence, nats."""

    def log_softmax(logits):
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    one, other = log_softmax(one), log_softmax(other)
    return (np.exp(one) * (one - other)).sum(axis=1).mean()


@pytest.mark.parametrize("name", CASES)
def test_float_files_give_llama_cpps_probabilities(model, name):
    path = model(name)
    wanted = llamas_logits(path, TOKENS, exact_attention=True)
    found = Decoder(path, n_ctx=150, n_threads=1).logits(TOKENS)
    assert divergence(wanted, found) < SAME_FUNCTION_NATS


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M"])
def test_quantized_files_give_llama_cpps_probabilities(model, name, file_type):
    path = model(name, file_type)
    wanted = llamas_logits(path, TOKENS)
    found = Decoder(path, n_ctx=150, n_threads=1).logits(TOKENS)
    assert divergence(wanted, found) < SAME_KERNELS_NATS


@pytest.mark.parametrize("name", ["llama2", "gemma3"])
def test_tokens_one_by_one_are_those_of_a_batch(model, name):
    decoder = Decoder(model(name, "Q8_0"), n_ctx=150, n_threads=1)
    together = decoder.logits(TOKENS)
    decoder.clear()
    alone = np.concatenate([decoder.logits(TOKENS[i : i + 1]) for i in range(100)])
    np.testing.assert_array_equal(alone, together[:100])
    decoder.clear()
    np.testing.assert_array_equal(decoder.decode(TOKENS), together[-1])


@pytest.mark.skipif(available_cpus() < 2, reason="one CPU")
def test_threads_change_nothing(model):
    path = model("gemma3", "Q4_K_M")
    one, two = (Decoder(path, n_ctx=128, n_threads=n).logits(TOKENS[:70]) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_the_family_of_kernels_changes_nothing(model, monkeypatch):
    path, found = model("smollm2", "Q4_0"), {}
    for family in ("dot", "lookup"):
        monkeypatch.setenv("EDGEQ_KERNELS", family)
        decoder = Decoder(path, n_ctx=128, n_threads=1)
        found[family] = decoder.weight_bytes, decoder.logits(TOKENS[:70])
    assert found["dot"][0] != found["lookup"][0]  # other tiles
    np.testing.assert_array_equal(found["lookup"][1], found["dot"][1])


def test_a_cache_of_bytes_is_near_that_of_half_floats(model):
    path = model("gemma3", "Q8_0")
    halves, rounded = (
        Decoder(path, n_ctx=150, n_threads=1, cache=cache).logits(TOKENS)
        for cache in ("f16", "q8_0")
    )
    assert 0 < divergence(halves, rounded) < 4 * SAME_KERNELS_NATS  # another rounding on top


def test_greedy_text_is_llama_cpps(model):
    path, n = model("smollm2"), 24
    found = Decoder(path, n_ctx=64, n_threads=1).generate(TOKENS[:8], n)
    tokens = list(TOKENS[:8])
    for _ in range(n):
        logits = llamas_logits(path, np.array(tokens, np.int32), exact_attention=True)
        tokens.append(int(logits[-1].argmax()))
    assert found.tolist() == tokens[8:]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (
            "llama3",
            r"does not know blk\.0\.attn_output\.bias and \d+ other tensors of this llama file",
        ),
        ("qwen3", r"knows no rope\.scaling\.type = yarn"),
        ("mixtral", r"knows no llama\.expert_count = 4"),
        ("gpt2", "does not run gpt2; it runs llama, qwen2, qwen3, gemma3. Use llama.cpp"),
    ],
)
def test_what_it_cannot_compute_is_refused(tmp_path, name, what):
    directory = tiny_models.build(name, tmp_path).directory
    path = tmp_path / "model.gguf"
    convert(open_checkpoint(directory), path, ftype="f32")
    with pytest.raises(EvaluationError, match=what):
        Decoder(path, n_threads=1)


def test_bad_requests_are_refused(model):
    decoder = Decoder(model("llama2"), n_ctx=64, n_threads=1)
    for tokens, what in (
        ([], "got 0 tokens, expected at least one"),
        ([-1], "each from 0 to"),
        ([decoder.n_vocab], "each from 0 to"),
        (np.zeros(65, np.int32), "65 tokens do not fit n_ctx 64. Raise it."),
    ):
        with pytest.raises(EvaluationError, match=what):
            decoder.decode(tokens)
    with pytest.raises(EvaluationError, match="expected at least one token of f16 or q8_0"):
        Decoder(model("llama2"), cache="f8")
    with pytest.raises(EvaluationError, match="got batches of 65, expected 1 to 64"):
        decoder.prepare(65)
