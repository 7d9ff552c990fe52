"""Scales between queries and keys: the function stays, a quantized cache rounds keys better."""

import numpy as np
import pytest

from converters.gguf_file import open_gguf
from converters.gguf_header import Field
from cpu_kernels.divergence import divergence
from edgeq.errors import CalibrationError, RecipeError
from edgeq.runtime.model import Model
from edgeq.transforms import check_preserved, keys, write_key_folded
from edgeq.transforms.keys import KeySite, Side, key_sites, pairs, search_key_scales
from tests import tiny_gguf
from tests.command_line import done, files_under, refused

ROWS = np.random.default_rng(1).integers(3, 260, (2, 40)).astype(np.int32)
# pairs side by side, biases; three heads share keys; pairs of halves, biases; a norm for all heads,
# twice; a norm over all heads; fused, half rotated; a norm for each head; not rotated
FAMILIES = (
    "llama3", "smollm2", "qwen2", "qwen3", "gemma3", "olmo2", "gptneox", "stablelm-head-norms",
    "gpt2",
)  # fmt: skip


def outliers(directory, head_dim, size=12.0):
    """Write a llama whose keys have, in each head, a pair of large channels that queries hardly
    use.
    """
    n_head = 4
    sizes = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    extra = {f"llama.{key}": Field(head_dim, tiny_gguf.UINT) for key in sizes}
    replace = {}
    for layer in range(tiny_gguf.N_LAYERS):
        for name, shape in (
            ("v", (2 * head_dim, tiny_gguf.N_EMBD)),
            ("output", (tiny_gguf.N_EMBD, n_head * head_dim)),
        ):
            full = f"blk.{layer}.attn_{name}.weight"
            replace[full] = tiny_gguf.values(full, shape)
        for name, heads, factor in (("q", n_head, 1 / size), ("k", 2, size)):
            full = f"blk.{layer}.attn_{name}.weight"
            values = tiny_gguf.values(full, (heads * head_dim, tiny_gguf.N_EMBD))
            values.reshape(heads, head_dim, -1)[:, 4:6] *= np.float32(factor)
            replace[full] = values
    return tiny_gguf.write(directory / "outliers.gguf", "llama", extra=extra, replace=replace)


def cache_error(path, cache):
    """Return what a quantized cache costs, nats a token."""
    nobody = np.zeros(ROWS.shape[1], np.int32)
    n_ctx = ROWS.shape[1]
    with Model(path, n_ctx=n_ctx) as exact, Model(path, n_ctx=n_ctx, cache=cache) as rounded:
        errors = [divergence(exact.logits(r), rounded.logits(r), nobody).kld for r in ROWS]
    return float(np.mean(errors))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_is_the_same_with_other_keys(name, converted, tmp_path):
    file, out = converted(name), tmp_path / "scaled.gguf"
    errors = write_key_folded(file, out, ROWS)
    assert len(errors) == file.value(f"{file.architecture}.block_count")
    assert max(errors) < 1
    assert check_preserved(file.path, out, ROWS) < 1e-5
    scaled = open_gguf(out)
    changed = {
        tensor
        for tensor in file.tensors
        if not np.array_equal(scaled.read_float(tensor), file.read_float(tensor))
    }
    stems = {tensor.split(".", 2)[2] for tensor in changed}
    if "blk.0.attn_k_norm.weight" in file.tensors:
        assert stems == {"attn_q_norm.weight", "attn_k_norm.weight"}
    else:
        assert {stem.split(".")[0] for stem in stems} <= {"attn_q", "attn_k", "attn_qkv"}
        assert ("bias" in str(stems)) == any("attn_k.b" in t or "qkv.b" in t for t in file.tensors)


@pytest.mark.parametrize("head_dim", [32, 64])  # a cache turns only the latter
@pytest.mark.parametrize("cache", ["q8_0", "q4_0"])
def test_a_quantized_cache_costs_less_where_keys_have_outliers(head_dim, cache, tmp_path):
    path, out = outliers(tmp_path, head_dim), tmp_path / "scaled.gguf"
    predicted = write_key_folded(open_gguf(path), out, ROWS)
    assert max(predicted) < 0.5
    assert cache_error(out, cache) < 0.7 * cache_error(path, cache)


def test_channels_that_rotate_together_have_one_number():
    assert pairs(8, 8, "adjacent").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert pairs(8, 8, "halves").tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert pairs(8, 4, "adjacent").tolist() == [0, 0, 1, 1, 2, 3, 4, 5]
    assert pairs(8, 4, "halves").tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert pairs(4, 4, "none").tolist() == [0, 1, 2, 3]


def site(n_head, n_head_kv, head_dim, rope, *, is_shared=False):
    queries, made = Side("q", 0, n_head, None), Side("k", 0, n_head_kv, None)
    return KeySite(queries, made, head_dim, pairs(head_dim, head_dim, rope), is_shared)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_no_other_scales_have_a_smaller_error(head_dim, is_shared):
    rng = np.random.default_rng(0)
    where = site(4, 2, head_dim, "halves", is_shared=is_shared)
    q, k = np.exp(rng.standard_normal((4, head_dim))), np.exp(rng.standard_normal((2, head_dim)))
    found = search_key_scales(where, q, k)

    def error(scales):
        k_now = (k / scales**2).reshape(2, 2, -1).mean(axis=1)
        q_now = (q.reshape(2, 2, -1).sum(axis=1) * scales**2).reshape(2, 2, -1).mean(axis=1)
        k_now, q_now = (np.tile(side, 2).reshape(2, -1, where.width) for side in (k_now, q_now))
        return (k_now.sum(axis=2) * q_now.sum(axis=2)).sum()

    least = error(found.scales)
    assert found.error == pytest.approx(least / error(np.ones_like(found.scales)), rel=1e-5)
    assert found.error < 0.95
    for _ in range(20):
        other = np.exp(rng.standard_normal((1 if is_shared else 2, head_dim // 2)) / 20)
        assert error(found.scales * np.tile(other, 2)) > least * (1 - 1e-6)
    assert (found.scales[0] == found.scales[1]).all() == is_shared


def test_channels_that_never_say_anything_keep_their_scale():
    k, q = np.ones((1, 64)), np.ones((1, 64))
    k[0, :4], q[0, 8:10] = 0, 0
    found = search_key_scales(site(1, 1, 64, "adjacent"), q, k)
    np.testing.assert_allclose(found.scales, 1, rtol=1e-6)
    silent = search_key_scales(site(1, 1, 64, "adjacent"), q, np.zeros((1, 64)))
    assert (silent.error, silent.scales.tolist()) == (1.0, np.ones((1, 64)).tolist())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "no layer has attn_q and attn_k"),
        ("deepseek2", "no layer has attn_q and attn_k"),
    ],
)
def test_models_without_such_keys_are_refused(kind, reason, tmp_path):
    path = tiny_gguf.write(tmp_path / "model.gguf", kind)
    text = tmp_path / "text.txt"
    text.write_text(tiny_gguf.text(0, 1500))
    out = tmp_path / "out.gguf"
    told = refused("rotate", path, out, "--kind", "keys", "--text", text, "--ctx", "64")
    assert f"{path}: the keys of {kind} cannot be scaled: {reason}" in told
    assert "out.gguf" not in files_under(tmp_path)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"attention.clamp_kqv": 8.0}, "it clamps queries and keys"),
        ({"attention.head_count_kv": 3}, "4 heads of queries and 3 of keys"),
        ({"attention.key_length": 24}, "has 32 rows, which are not 2 heads of 24"),
    ],
)
def test_what_does_not_fit_is_refused(fields, reason, tmp_path):
    extra = {
        f"llama.{key}": Field(value, tiny_gguf.FLOAT if type(value) is float else tiny_gguf.UINT)
        for key, value in fields.items()
    }
    file = open_gguf(tiny_gguf.write(tmp_path / "model.gguf", "llama", extra=extra))
    with pytest.raises(RecipeError, match=reason):
        key_sites(file, "adjacent")


def test_an_unknown_rotation_is_refused(converted):
    with pytest.raises(RecipeError, match="in a way that is not known"):
        key_sites(converted("llama3"), None)


@pytest.mark.parametrize("wrong", ["halves", "none"])
def test_what_changes_the_function_is_not_written(wrong, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "rope", wrong)
    with pytest.raises(RecipeError, match="with scaled keys, it is"):
        write_key_folded(converted("llama3"), tmp_path / "out.gguf", ROWS)
    assert not list(tmp_path.iterdir())


def test_a_text_that_shows_nothing_is_refused(converted, tmp_path):
    with pytest.raises(CalibrationError, match="Give chunks of at least 16 tokens"):
        write_key_folded(converted("llama3"), tmp_path / "out.gguf", ROWS[:, :8])


def test_queries_and_keys_are_what_the_model_computes(converted):
    file = converted("stablelm-head-norms")
    side = key_sites(file, "halves")[0].keys
    made = keys._made(file, side, 16, np.random.default_rng(0).standard_normal((5, 64)))
    weights = file.read_float("blk.0.attn_k_norm.weight")
    np.testing.assert_allclose((made / weights).mean(axis=2), 0, atol=1e-5)
    np.testing.assert_allclose(np.square(made / weights).mean(axis=2), 1, rtol=1e-5)


def test_a_quantized_file_is_refused(converted, tmp_path):
    small, out = tmp_path / "small.gguf", tmp_path / "scaled.gguf"
    path = converted("qwen3").path
    done(
        "export", path, small, "--type", "Q8_0", "--quantizer", "rtn", "--no-imatrix", "--no-prove"
    )
    with pytest.raises(RecipeError, match="is quantized as Q8_0; scale the float model"):
        write_key_folded(open_gguf(small), out, ROWS)


def test_the_command_takes_keys_together_with_rotations(converted, tmp_path):
    path, out = converted("qwen3").path, tmp_path / "scaled.gguf"
    text = tmp_path / "text.txt"
    text.write_text(tiny_gguf.text(0, 1500))
    kinds = ("--kind", "keys", "--kind", "residual")
    asked = ("rotate", path, out, "--text", text, "--ctx", "64", "--chunks", "4")
    told = done(*asked, *kinds, "--json").json()
    assert (told["key_layers"], told["tensors"]) == (2, len(open_gguf(out).tensors))
    assert 0 < told["key_error"] < 1
    assert check_preserved(path, out, ROWS) < 1e-5
    both = open_gguf(out)
    assert np.all(both.read_float("blk.0.attn_norm.weight") == 1)
    done(*asked, "--kind", "keys")
    norm = "blk.0.attn_k_norm.weight"
    assert open_gguf(out).read_bytes(norm).tobytes() == both.read_bytes(norm).tobytes()
    assert not [name for name in files_under(tmp_path) if name.endswith("keys.gguf")]
    assert "known: residual, values, keys" in refused("rotate", path, out, "--kind", "kyes")
