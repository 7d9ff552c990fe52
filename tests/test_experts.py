"""Second moments of a layer's experts: in files, one matrix at a time, and the bytes stay."""

import errno
import os
import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from converters.gguf_file import open_gguf, write_gguf
from converters.gguf_header import Field
from converters.gguf_writer import TensorSource
from edgeq import layer_rounding
from edgeq.allocation import allocate
from edgeq.calibration import collect
from edgeq.calibration.moments import LayerwiseMoments
from edgeq.calibration.scratch import zeros_in_file
from edgeq.errors import RecipeError
from edgeq.execution import Here, Processes
from edgeq.layer_rounding import Rules, read_weight, thinned
from edgeq.opening import Reference
from edgeq.quantization import quantize_layers
from edgeq.quantizers import Inputs, make_quantizer
from edgeq.runtime.encoders import encode
from edgeq.transforms import FoldedHessian, TensorScales, apply, fold_hessian, unfold
from edgeq.workdir import WorkDirectory
from tests import tiny_gguf
from tests.command_line import refused

T = GGMLQuantizationType
TOKENS = np.random.RandomState(0).randint(3, 260, (3, 48)).astype(np.int32)
WIDE = 512  # inputs of the down projection
MARGIN = 0.25  # of the moments' growth: what else grows with experts, weights and their search


def wide(path, n_experts):
    """A tiny qwen3moe whose experts have far more second moments than weights."""
    extra = {"expert_count": n_experts, "expert_feed_forward_length": WIDE}
    arrays = {}
    for layer in range(tiny_gguf.N_LAYERS):
        shapes = tiny_gguf.experts(f"blk.{layer}.", n_experts, WIDE)
        arrays |= {name: tiny_gguf.values(name, shape) for name, shape in shapes.items()}
    fields = {f"qwen3moe.{key}": Field(value, tiny_gguf.UINT) for key, value in extra.items()}
    return tiny_gguf.write(path, "qwen3moe", replace=arrays, extra=fields)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_gguf.write(tmp_path_factory.mktemp("experts") / "tiny.gguf", "qwen3moe")


@pytest.fixture
def folded():
    """Weight, moments and multipliers of three experts."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((3, 64, 32)).astype(np.float32)
    scales = TensorScales(
        random.uniform(0.5, 2, (3, 16)).astype(np.float32),
        random.uniform(0.5, 2, (3, 32)).astype(np.float32),
    )
    weight = random.standard_normal((3, 16, 32)).astype(np.float32)
    return weight, inputs.transpose(0, 2, 1) @ inputs / 32, scales


def layers(path, work, directory, executor=None, quantizer="gptq:sweeps=1"):
    """The bytes of every layer, rounded and folded with the torch model's moments."""
    layerwise = pytest.importorskip("edgeq.layerwise")
    file = open_gguf(path)
    model = layerwise.LayerwiseModel.open(file, None)
    moments = LayerwiseMoments(model, TOKENS, asymmetric=True, directory=directory)
    plan = allocate(file, "Q4_0", has_imatrix=False)
    rules = Rules(make_quantizer(quantizer), ("balance",), asymmetric=0.3, n_threads=1)
    with WorkDirectory(work) as work_directory:
        arguments = (None, moments, {}, "layers", work_directory, executor or Here())
        found = quantize_layers(rules, Reference(file, ""), plan, *arguments, lambda *_: None)
    assert any(fold["method"] == "balance" for fold in found.folds.values())
    return {path.name: path.read_bytes() for path in set(found.paths.values())}


# ---------------------------------------------------------------------------------- arrays in files


def test_an_array_in_a_file_is_zero_written_to_and_leaves_nothing(tmp_path):
    array = zeros_in_file((3, 5, 7), tmp_path)
    assert array.shape == (3, 5, 7)
    assert array.dtype == np.float32
    assert not array.any()
    array += 1
    assert array.sum() == 105
    assert list(tmp_path.iterdir()) == []


def test_a_system_without_fallocate_gets_zeros(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    array = zeros_in_file((3, 300, 301), tmp_path)  # not a whole number of the pieces written
    assert not array.any()
    array[-1, -1, -1] = 1


def test_a_full_disk_is_told_in_one_line_before_anything_is_written(path, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pytest.importorskip("edgeq.layerwise")
    text, out, work = tmp_path / "t.txt", tmp_path / "out.gguf", tmp_path / "work"
    text.write_text(tiny_gguf.text(1))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    flags = ("--type", "Q4_0", "--quantizer", "gptq", "--fisher", 0, "--ctx", 64, "--chunks", 2)
    told = refused("export", path, out, *flags, "--text", text, "--no-prove", "--work", work)
    assert f"{work}: no temporary file of " in told
    assert "No space left on device" in told
    assert not out.exists()
    assert not list(work.rglob("*.tmp"))


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere: no temporary file of 4 MiB .*--work"):
        zeros_in_file((1, 1024, 1024), tmp_path / "nowhere")


# -------------------------------------------------------------------------------- the same numbers


def test_multipliers_of_a_matrix_at_a_time_are_those_of_all(folded):
    weight, hessian, scales = folded
    both = scales.row[:, :, None] * scales.column[:, None, :]
    np.testing.assert_array_equal(apply(weight, scales), weight * both)
    np.testing.assert_array_equal(unfold(weight, scales), weight / both)
    one_by_one, whole = FoldedHessian(hessian, scales), fold_hessian(hessian, scales)
    assert one_by_one.shape == whole.shape
    assert len(one_by_one) == 3
    np.testing.assert_array_equal(np.asarray(one_by_one), whole)
    np.testing.assert_array_equal(list(one_by_one), whole)
    np.testing.assert_array_equal(one_by_one[-1], whole[-1])
    with pytest.raises(IndexError):
        one_by_one[3]


def test_experts_that_share_scales_have_one_row_of_multipliers(folded):
    _, hessian, scales = folded
    shared = TensorScales(scales.row, scales.column[0])
    np.testing.assert_array_equal(
        np.asarray(FoldedHessian(hessian, shared)), fold_hessian(hessian, shared)
    )


@pytest.mark.parametrize("quantizer", ["gptq", "learned:steps=3"])
def test_a_quantizer_takes_folded_moments_one_by_one(folded, quantizer):
    weight, hessian, scales = folded
    found = [
        make_quantizer(quantizer).quantize("w", weight, T.Q4_0, Inputs(None, moments))
        for moments in (fold_hessian(hessian, scales), FoldedHessian(hessian, scales))
    ]
    np.testing.assert_array_equal(found[0].packed, found[1].packed)
    assert found[0].facts == found[1].facts


@pytest.mark.parametrize("qtype", [T.F32, T.BF16])
def test_thinned_rows_are_those_of_the_whole_weight(qtype, tmp_path):
    weight = np.random.default_rng(0).standard_normal((3, 50, 32)).astype(np.float32)
    packed = encode(weight, qtype).reshape(3, 50, -1)
    write_gguf(tmp_path / "w.gguf", {}, [TensorSource("w", qtype, weight.shape, lambda: packed)])
    file = open_gguf(tmp_path / "w.gguf")

    def read(n_rows=None):
        return read_weight(file, "w", allow_requantize=False, n_threads=1, n_rows=n_rows)

    np.testing.assert_array_equal(read(20), thinned(read(), 20))
    np.testing.assert_array_equal(read(64), read())


def test_layers_are_the_same_bytes_from_files_and_memory_one_by_one_and_all(
    path, tmp_path, monkeypatch
):
    in_files = layers(path, tmp_path / "files", tmp_path)
    assert in_files == layers(path, tmp_path / "memory", None)
    with Processes(2, tmp_path / "shared", 2) as executor:
        assert in_files == layers(path, tmp_path / "workers", tmp_path, executor)
    monkeypatch.setattr(layer_rounding, "FoldedHessian", fold_hessian)
    assert in_files == layers(path, tmp_path / "all", tmp_path)


def test_what_llama_cpp_shows_is_the_same_in_files_and_in_memory(path, tmp_path):
    names = list(open_gguf(path).tensors)
    in_memory, in_files = (
        collect(path, TOKENS, hessians=names, n_threads=1, directory=directory)
        for directory in (None, tmp_path)
    )
    assert in_memory.hessians.keys() == in_files.hessians.keys()
    assert any("_exps" in name for name in in_files.hessians)
    for name, hessian in in_memory.hessians.items():
        np.testing.assert_array_equal(hessian, in_files.hessian(name))


# ------------------------------------------------------------------------------------------ memory


def test_memory_does_not_grow_with_the_moments_of_experts(path, tmp_path, monkeypatch):
    """Memory as Python and numpy allocate it, while a layer is calibrated, folded and rounded.

    The search for folds has copies of some rows of all experts: here of a few.
    """
    layers(path, tmp_path / "first", tmp_path)  # compiles, imports
    monkeypatch.setattr(tiny_gguf, "N_LAYERS", 1)
    monkeypatch.setattr(layer_rounding, "JUDGED_ROWS", 8)
    peaks = {}
    for n_experts in (4, 16):
        model = wide(tmp_path / f"{n_experts}.gguf", n_experts)
        tracemalloc.start()
        try:
            layers(model, tmp_path / f"{n_experts}", tmp_path, quantizer="gptq:sweeps=0")
            peaks[n_experts] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    growth = 2 * 4 * (16 - 4) * (WIDE**2 + tiny_gguf.N_EMBD**2)  # of both kinds of moments
    assert peaks[16] - peaks[4] < MARGIN * growth, peaks
