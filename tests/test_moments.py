"""Second moments of the torch model and of llama.cpp, and what weighs their tokens."""

import numpy as np
import pytest

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.gguf_file import open_gguf
from edgeq.calibration import collect, collector, fisher
from edgeq.calibration.fisher import token_weights
from edgeq.calibration.moments import (
    LayerwiseMoments,
    StoredMoments,
    groups_of_layers,
)
from edgeq.calibration.sums import without_outliers
from edgeq.errors import CalibrationError
from edgeq.runtime.model import Model
from edgeq.runtime.observer import Observer
from tests import tiny_gguf, tiny_models

torch = pytest.importorskip("torch")
layerwise = pytest.importorskip("edgeq.layerwise")
pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = np.random.RandomState(0).randint(3, 260, (3, 48)).astype(np.int32)
ROUNDING = 1e-4  # between torch's and ggml's float32 products; 1e-5 was measured
BFLOAT16 = 2e-2  # of squares of the backward products; 5e-3 was measured


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def path(request, tmp_path_factory):
    return tiny_gguf.write(tmp_path_factory.mktemp("moments") / "tiny.gguf", request.param)


@pytest.fixture(scope="module")
def model(path):
    return layerwise.LayerwiseModel.open(open_gguf(path), None)


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def moments(inputs, weights=None, others=None):
    """2/N Σ w y xᵀ of (n, n_in) inputs x; y is x if there are no others."""
    x = inputs.astype(np.float64)
    y = x if others is None else others.astype(np.float64)
    w = np.ones(len(x)) if weights is None else weights
    return 2 / len(x) * (y * w[:, None]).T @ x


def cut(rows, w=None):
    """The weights of one chunk's inputs: none brings over a tenth of its typical energy."""
    w = np.ones(len(rows)) if w is None else w
    energy = w * np.square(rows.astype(np.float64)).sum(axis=1)
    most = 0.1 * len(rows) * np.median(energy)
    return np.where(energy > most, w * most / np.maximum(energy, 1e-300), w) if most > 0 else w


def together(chunks, weights=None):
    """The moments of several chunks, outliers cut in each."""
    weights = [None] * len(chunks) if weights is None else weights
    w = [cut(rows, one) for rows, one in zip(chunks, weights, strict=True)]
    return moments(np.concatenate(chunks), np.concatenate(w))


def test_plain_moments_are_those_of_what_llama_cpp_sees(path, model):
    """Experts are shrunk towards the mean of all."""
    seen = {}

    def keep(product):
        for matrix, rows in product.by_matrix():
            seen.setdefault(product.name, {}).setdefault(matrix, []).append(rows.copy())

    with Model(path, n_ctx=48, n_threads=1, cb_eval=Observer(keep), exact_attention=True) as llama:
        for row in TOKENS:
            llama.logits(row)
    source = LayerwiseMoments(model, TOKENS, sequential=False)
    found = source.of_layer(0) | source.of_layer(1)
    assert found.keys() == seen.keys()
    for name, by_matrix in seen.items():
        everything = together([rows for chunks in by_matrix.values() for rows in chunks])
        n_mat, n_in, _ = found[name].hessian.shape
        assert n_mat == (4 if "_exps" in name else 1)
        assert found[name].cross is None
        for matrix in range(n_mat):
            n = sum(len(rows) for rows in by_matrix[matrix])
            expected = together(by_matrix[matrix])
            if n_mat > 1:
                expected = (n * expected + n_in * everything) / (n + n_in)
            assert distance(found[name].hessian[matrix], expected) < ROUNDING, name


def test_weights_with_the_same_inputs_share_their_moments(model):
    found = LayerwiseMoments(model, TOKENS).of_layer(0)
    q, k, v = (found[f"blk.0.attn_{part}.weight"] for part in "qkv")
    assert q is k
    assert k is v
    assert found["blk.0.attn_output.weight"] is not q


def test_an_expert_that_saw_nothing_has_the_moments_of_all(tmp_path):
    name = "blk.0.ffn_gate_inp.weight"
    router = tiny_gguf.values(name, (8, tiny_gguf.N_EMBD))
    router[1], router[3], router[6] = -router[0], -router[2], -router[4]
    router[5] = 0  # three others are positive, and three are chosen
    path = tiny_gguf.write(tmp_path / "moe.gguf", "qwen3moe", replace={name: router})
    model = layerwise.LayerwiseModel.open(open_gguf(path), None)
    up = "blk.0.ffn_up_exps.weight"
    seen = {}

    def keep(product):
        if product.name == up:
            seen.setdefault(product.matrix, []).append(product.inputs.copy())

    for hidden in model.embed(TOKENS):
        model.load(0).run(hidden, keep)
    assert set(seen) == set(range(8)) - {5}
    found = LayerwiseMoments(model, TOKENS).of_layer(0)[up].hessian
    everything = together([rows for chunks in seen.values() for rows in chunks])
    assert distance(found[5], everything) < 1e-5
    assert distance(found[4], everything) > 0.01


def test_weights_of_mean_one_weigh_tokens(model):
    name = "blk.1.attn_output.weight"
    squares = np.random.RandomState(1).exponential(5, TOKENS.shape).astype(np.float32)
    squares[:, 0] = 1e6  # does not count in the mean
    hidden = [model.load(0).run(chunk) for chunk in model.embed(TOKENS)]
    inputs = tiny_models.inputs_of(model.load(1), hidden)
    groups = np.stack([squares, squares[::-1]])  # of rows
    for strength in (1.0, 0.25):
        source = LayerwiseMoments(model, TOKENS, weights={name: groups}, strength=strength)
        found = source.of_layer(1)
        assert len(found[name].hessian) == len(groups)
        for hessian, one in zip(found[name].hessian, groups, strict=True):
            w = 1 - strength + strength * one.astype(np.float64) / squares[:, 1:].mean()
            assert distance(hessian, together(inputs[name], list(w))) < 1e-5
        other = "blk.1.attn_q.weight"  # has no weights
        assert distance(found[other].hessian[0], together(inputs[other])) < 1e-5


def test_a_massive_token_takes_part_but_does_not_dominate():
    """All others attend to the first one: left out, its error grew until it was all of it."""
    rows = np.random.RandomState(2).standard_normal((48, 16)).astype(np.float32)
    rows[0] *= 1000
    w = without_outliers(rows, np.ones(48, np.float32))
    energy = w * np.square(rows).sum(axis=1)
    assert energy[0] == pytest.approx(0.1 * 48 * np.median(np.square(rows).sum(axis=1)), rel=1e-4)
    assert (w[1:] == 1).all()
    assert (without_outliers(0 * rows, w) == w).all()


def test_a_layer_sees_what_the_replaced_layers_before_it_give(model):
    """And its distance from what they gave in the float model."""
    file = model.reference
    replaced = {n: file.read_float(n.replace("blk.0", "blk.1")) for n in model.matrices(0)}
    embedded = model.embed(TOKENS)
    before = [model.load(0).run(chunk) for chunk in embedded]
    after = [model.load(0, replaced).run(chunk) for chunk in embedded]
    was, now = (tiny_models.inputs_of(model.load(1), chunks) for chunks in (before, after))
    names = ["blk.1.attn_q.weight", "blk.1.attn_output.weight"]
    for sequential in (True, False):
        source = LayerwiseMoments(model, TOKENS, sequential=sequential, asymmetric=sequential)
        first = source.of_layer(0)
        source.advance(0, lambda: replaced)
        found = source.of_layer(1)
        for name in names:
            expected = (now if sequential else was)[name]
            assert distance(found[name].hessian[0], together(expected)) < 1e-5
            if not sequential:
                assert found[name].cross is None
                continue
            w = np.concatenate([cut(rows) for rows in now[name]])
            inputs, floats = np.concatenate(now[name]), np.concatenate(was[name])
            cross = moments(inputs, w, others=floats - inputs)
            assert distance(found[name].cross[0], cross) < 1e-5
            assert not first[name.replace("blk.1", "blk.0")].cross.any()


def test_stored_moments_are_the_statistics(path):
    statistics = collect(path, TOKENS, hessians=True, n_threads=1)
    file = open_gguf(path)
    shapes = {name: file.tensors[name].shape for name in statistics.first_with}
    assert len(groups_of_layers(shapes, 1 << 30)) == 1
    groups = groups_of_layers(shapes, 1)  # a layer at a time
    assert [{name.split(".")[1] for name in names} for names in groups] == [{"0"}, {"1"}]
    passes = []

    def passed(names):
        passes.append(names)
        return collect(path, TOKENS, hessians=names, n_threads=1)

    source = StoredMoments(passed, groups)
    seen = set()
    for layer in range(tiny_gguf.N_LAYERS):
        found = source.of_layer(layer)
        assert all(name.startswith(f"blk.{layer}.") for name in found)
        for name, one in found.items():
            assert np.array_equal(one.hessian, statistics.hessian(name))
            assert one.cross is None
        source.advance(layer, lambda: pytest.fail("nobody asks what became of a layer"))
        seen |= found.keys()
    assert seen == set(statistics.first_with)
    assert passes == groups


def whole_gradients(model, modules, chunk, seed):
    """Gradients at the outputs of modules, by autograd through the whole model."""
    outputs = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda *call, name=name: outputs.update({name: call[2]})
        )
        for name in modules
    ]
    logits = model(torch.from_numpy(chunk.astype(np.int64))[None]).logits[0]
    for hook in hooks:
        hook.remove()
    log_p = torch.log_softmax(logits, -1)
    total = log_p.detach().exp().cumsum(-1)
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand((len(chunk), 1), generator=generator)
    drawn = torch.searchsorted(total, u * total[:, -1:], right=True)
    gradients = torch.autograd.grad(-log_p.gather(1, drawn).sum(), list(outputs.values()))
    return {name: each[0].numpy() for name, each in zip(outputs, gradients, strict=True)}


def test_moments_of_outputs_are_in_groups_of_rows_that_divide_them():
    shapes = {576: (1, 576), 1536: (2, 768), 11008: (16, 688), 1031: (1031, 1), 5: (1, 5)}
    assert {n_out: fisher.groups_of_rows(n_out) for n_out in shapes} == shapes


def test_token_weights_are_squared_gradients_of_the_whole_model(tmp_path, monkeypatch):
    made = tiny_models.build("llama3", tmp_path)
    convert(open_checkpoint(made.directory), tmp_path / "m.gguf", ftype="f32")
    model = layerwise.LayerwiseModel.open(open_gguf(tmp_path / "m.gguf"), made.directory)
    names = {
        "model.layers.0.self_attn.k_proj": "blk.0.attn_k.weight",
        "model.layers.0.mlp.up_proj": "blk.0.ffn_up.weight",
        "model.layers.1.self_attn.o_proj": "blk.1.attn_output.weight",
        "model.layers.1.mlp.down_proj": "blk.1.ffn_down.weight",
    }
    steps = []
    found = token_weights(model, TOKENS, seed=5, progress=lambda *step: steps.append(step))
    assert steps == [(done, 4) for done in range(1, 5)]
    assert set(found) == {n for layer in range(2) for n in model.matrices(layer)}
    grouped = token_weights(model, TOKENS, seed=5, n_groups=2)
    for name in names.values():
        assert grouped[name].shape == (2, *TOKENS.shape)
        assert distance(grouped[name].mean(axis=0), found[name][0]) < 1e-5
        assert distance(grouped[name][0], grouped[name][1]) > 0.01
    expected = [
        whole_gradients(made.model, names, row, 5 + chunk) for chunk, row in enumerate(TOKENS)
    ]
    monkeypatch.setattr(fisher, "MOST_ROWS", 64)
    at_outputs = [fisher.OutputMoments(tmp_path) for _ in range(2)]
    again = token_weights(model, TOKENS, seed=5, outputs=at_outputs[0])
    for module, name in names.items():
        assert found[name].shape == (1, *TOKENS.shape)
        sums = 0
        for chunk, gradients in enumerate(expected):
            squares = np.square(gradients[module]).mean(axis=1)
            assert distance(found[name][0, chunk], squares) < BFLOAT16, name
            rows = cut(gradients[module], np.ones(len(squares), np.float32))
            root = gradients[module] * np.sqrt(rows)[:, None]
            sums = sums + root.T @ root
        if "attn_k" in name:  # the file has llama.cpp's order of rotary pairs
            heads = made.model.config.num_key_value_heads
            order = np.arange(len(sums)).reshape(heads, 2, -1).swapaxes(1, 2).ravel()
            sums = sums[np.ix_(order, order)]
        n_groups, size = fisher.groups_of_rows(len(sums))
        assert at_outputs[0].sums[name].shape == (n_groups, size, size)
        for group, moments in enumerate(at_outputs[0].sums[name]):
            mine = slice(group * size, (group + 1) * size)
            assert distance(moments, sums[mine, mine]) < 2 * BFLOAT16, name
    monkeypatch.setattr(fisher, "batch_of_chunks", lambda *_: 2)  # not all chunks at once
    once_more = token_weights(model, TOKENS, seed=5, outputs=at_outputs[1])
    for name in found:
        assert np.array_equal(again[name], found[name])
        assert np.array_equal(once_more[name], found[name])
        assert np.allclose(at_outputs[0].sums[name], at_outputs[1].sums[name], rtol=1e-5)
    other = token_weights(model, TOKENS[:1], seed=6)
    key = "blk.0.attn_k.weight"
    assert not np.allclose(other[key], found[key][:, :1], rtol=0.1)


def test_a_batch_of_chunks_fits_into_memory():
    at_once = fisher.batch_of_chunks(25, 512 * 576 * 4)
    assert at_once >= 1
    assert fisher.batch_of_chunks(25, 1 << 60) == 1


def test_gradients_that_do_not_fit_into_memory_are_refused_at_once(model, monkeypatch):
    monkeypatch.setattr(collector, "free_bytes", lambda unknown: 1 << 14)
    message = (
        r"gradients: a chunk of \d+ tokens .* need \d+ MiB, 0 MiB are free\. Give --effort fast"
    )
    with pytest.raises(CalibrationError, match=message):
        token_weights(model, TOKENS, progress=lambda *_: pytest.fail("began"))


@pytest.mark.parametrize("is_weighted", [False, True])
def test_centred_moments_are_those_about_the_weighted_mean(model, is_weighted):
    """Without a mean (experts) they stay what they are."""
    name = "blk.0.attn_q.weight"
    weights = None
    if is_weighted:
        drawn = np.random.default_rng(0).uniform(0.2, 2, (1, *TOKENS.shape)).astype(np.float32)
        weights = {name: drawn}
    found = LayerwiseMoments(model, TOKENS, weights=weights, sequential=False).of_layer(0)
    seen = tiny_models.inputs_of(model.load(0), model.embed(TOKENS))[name]
    given = np.ones(TOKENS.shape) if weights is None else drawn[0] / drawn[..., 1:].mean()
    w = np.concatenate([cut(rows, one) for rows, one in zip(seen, given, strict=True)])
    x = np.concatenate(seen).astype(np.float64)
    mean = w @ x / w.sum()
    assert distance(found[name].mean[0], mean) < ROUNDING
    expected = 2 / len(x) * ((x - mean) * w[:, None]).T @ (x - mean)
    assert distance(found[name].centred().hessian[0], expected) < ROUNDING
    for name in found:
        if "exps" in name:
            assert found[name].centred() is found[name]


def test_nothing_depends_on_the_number_of_threads(path):
    found = []
    for n_threads in (1, 2, 3):
        model = layerwise.LayerwiseModel.open(open_gguf(path), None, n_threads=n_threads)
        weights = token_weights(model, TOKENS)
        source = LayerwiseMoments(model, TOKENS, weights=weights, strength=0.5)
        first = source.of_layer(0)
        source.advance(0, dict)
        second = source.of_layer(1)
        found.append((weights, first, second))
        assert torch.get_num_threads() == n_threads
    torch.set_num_threads(1)
    for weights, *layers in found[1:]:
        for name, squares in found[0][0].items():
            np.testing.assert_array_equal(weights[name], squares)
        for layer, expected in zip(layers, found[0][1:], strict=True):
            for name, one in expected.items():
                np.testing.assert_array_equal(layer[name].hessian, one.hessian)
                if one.mean is not None:
                    np.testing.assert_array_equal(layer[name].mean, one.mean)
