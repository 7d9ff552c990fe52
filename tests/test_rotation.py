"""Rotations: the function stays, the basis does not, and what cannot be turned is refused."""

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from converters.gguf_file import open_gguf
from edgeq.errors import RecipeError
from edgeq.runtime.encoders import decode, encode
from edgeq.transforms import cayley, check_preserved
from edgeq.transforms import rotation as rotating
from edgeq.transforms.rotation import KINDS, random_rotation, write_rotated
from tests.command_line import done, files_under, refused

TOKENS = np.random.default_rng(1).integers(3, 400, (2, 40)).astype(np.int32)
FAMILIES = ("llama3", "smollm2", "qwen2", "qwen3", "qwen3moe", "mixtral", "phi-longrope")


@pytest.mark.parametrize("n", [1, 2, 3, 5, 24, 64, 96, 576])
def test_a_rotation_is_orthogonal_and_spreads_over_all_channels(n):
    turned = random_rotation(n, np.random.default_rng(0))
    np.testing.assert_allclose(turned @ turned.T, np.eye(n), atol=1e-12)
    odd = n // (n & -n)
    assert np.abs(turned).max() <= np.sqrt(odd / n) + 1e-12
    assert not np.array_equal(turned, random_rotation(n, np.random.default_rng(1))) or n == 1


@pytest.mark.parametrize("kinds", [("residual",), ("values",), KINDS], ids="+".join)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_is_the_same_in_another_basis(name, kinds, converted, tmp_path):
    file, out = converted(name), tmp_path / "rotated.gguf"
    write_rotated(file, out, kinds, seed=3)
    rotated = open_gguf(out)
    assert check_preserved(file.path, out, TOKENS) < 1e-5
    value = next(n for n in file.tensors if "attn_v.weight" in n or "attn_qkv.weight" in n)
    assert np.abs(rotated.read_float(value) - file.read_float(value)).max() > 0.01
    is_tied = "output.weight" not in file.tensors
    assert len(rotated.tensors) == len(file.tensors) + (is_tied and "residual" in kinds)
    if "residual" in kinds:
        assert np.all(rotated.read_float("blk.0.attn_norm.weight") == 1)
        assert np.all(rotated.read_float("output_norm.weight") == 1)
    else:
        assert rotated.read_bytes("token_embd.weight").tobytes() == (
            file.read_bytes("token_embd.weight").tobytes()
        )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3", "post_attention_norm normalizes with weights"),
        ("olmo2", "post_attention_norm normalizes with weights"),
        ("gpt2", "its norms subtract the mean"),
        ("gptneox", "its norms subtract the mean"),
    ],
)
def test_where_the_residual_stream_cannot_be_turned_it_is_refused(
    name, reason, converted, tmp_path
):
    path = converted(name).path
    told = refused("rotate", path, tmp_path / "out.gguf", "--kind", "residual")
    assert told.startswith(f"--rotate: {path}") or f"{path}: " in told
    assert reason in told
    assert "out.gguf" not in files_under(tmp_path)


def test_what_changes_the_function_is_not_written(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(rotating, "random_rotation", lambda n, _: 1.1 * np.eye(n))
    with pytest.raises(RecipeError, match="nats from itself"):
        write_rotated(converted("llama3"), tmp_path / "out.gguf", ("residual",))
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_file_that_export_takes(converted, tmp_path):
    path, out = converted("smollm2").path, tmp_path / "rotated.gguf"
    told = done("rotate", path, out, "--kind", "residual", "--kind", "values", "--json").json()
    assert told["tensors"] == len(open_gguf(out).tensors)
    again = tmp_path / "again.gguf"
    done("rotate", path, again, "--kind", "values", "--kind", "residual")
    assert again.read_bytes() == out.read_bytes()
    done("rotate", path, again, "--kind", "values", "--seed", "1")
    assert again.read_bytes() != out.read_bytes()
    small = tmp_path / "q.gguf"
    done("export", out, small, "--type", "Q8_0", "--quantizer", "rtn", "--no-imatrix", "--no-prove")
    assert small.stat().st_size < out.stat().st_size / 2
    assert "unknown rotation 'spin'" in refused("rotate", path, again, "--kind", "spin")
    assert "is quantized already" in refused("rotate", small, tmp_path / "twice.gguf")


@pytest.mark.parametrize("by_rows", [False, True])
def test_the_slope_of_the_learned_loss_is_that_of_differences(by_rows):
    rng = np.random.default_rng(2)
    shape = (2, 24, 160) if by_rows else (2, 40, 24)
    weights = rng.standard_t(3, shape).astype(np.float32)
    rotation, step = random_rotation(24, rng), rng.standard_normal((24, 24)) * 1e-3
    turned = [cayley.Turned(lambda: weights, by_rows)]
    _, gradient = cayley._loss(rotation, turned)
    up, down = (cayley._loss(rotation + sign * step, turned)[0] for sign in (1, -1))
    assert (up - down) / 2 == pytest.approx(float(np.vdot(gradient, step)), rel=2e-3)


def test_a_learned_rotation_rounds_with_less_error_than_a_random_one():
    rng = np.random.default_rng(3)
    spread = np.exp(rng.standard_normal(32))[:, None]
    reader = ((rng.standard_normal((200, 32)) * spread.T) @ random_rotation(32, rng)).astype("f4")
    start = random_rotation(32, rng)
    found, ratio = cayley.learn_rotation(start, [cayley.Turned(lambda: reader[None], False)], 60)
    np.testing.assert_allclose(found @ found.T, np.eye(32), atol=1e-12)
    again, _ = cayley.learn_rotation(start, [cayley.Turned(lambda: reader[None], False)], 60)
    assert np.array_equal(found, again)

    def error(rotation):
        turned = (reader @ rotation).astype(np.float32)
        rounded = decode(encode(turned, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)
        return float(np.square(rounded.reshape(turned.shape) - turned).sum())

    assert ratio < 0.9
    assert error(found) < 0.95 * error(start)


@pytest.mark.parametrize("name", ["smollm2", "mixtral", "phi-longrope"])
def test_learned_rotations_keep_the_function(name, converted, tmp_path):
    file, out = converted(name), tmp_path / "rotated.gguf"
    assert write_rotated(file, out, KINDS, learn_steps=3) < 1
    assert check_preserved(file.path, out, TOKENS) < 1e-5
    told = done("rotate", file.path, out, "--learn", "3", "--json").json()
    assert told["learned_error"] < 1
    told = refused("rotate", file.path, tmp_path / "no.gguf", "--kind", "keys", "--learn", "3")
    assert "--learn: scales of keys are not learned" in told
