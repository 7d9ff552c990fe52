"""Layers on another device: all of them is there, and what comes out is numpy's."""

from types import SimpleNamespace

import numpy as np
import pytest

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.gguf_file import open_gguf
from edgeq import tuning
from edgeq.errors import CalibrationError, RecipeError
from tests import tiny_models
from tests.command_line import done, refused

torch = pytest.importorskip("torch")
layerwise = pytest.importorskip("edgeq.layerwise")
other_device = pytest.importorskip("tests.other_device").other_device
pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = np.random.RandomState(0).randint(3, 400, (2, 160)).astype(np.int32)
ROUNDING = 1e-3  # of a tensor's norm; 1e-4 was measured: another order of attention's products
SHORT = ("--ctx", 64, "--chunks", 4, "--type", "Q4_0", "--quantizer", "rtn", "--no-prove")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return, by name, a tiny checkpoint, its float GGUF and its Q4_1."""
    parent = tmp_path_factory.mktemp("device")

    def make(name):
        directory = tiny_models.build(name, parent).directory
        path, out = parent / f"{name}.gguf", parent / f"{name}-Q4_1.gguf"
        convert(open_checkpoint(directory), path, ftype="f32")
        done("export", path, out, "--type", "Q4_1", "--no-imatrix", *SHORT[6:])
        return SimpleNamespace(directory=directory, float=open_gguf(path), packed=open_gguf(out))

    return make


def near(one, other):
    assert np.linalg.norm(one - other) <= ROUNDING * np.linalg.norm(other)


def all_that_comes_out(model):
    """Return every array that a pass forwards and back gives away."""
    found = []

    def on_product(product):
        found.extend([product.inputs, product.positions, product.matrix])
        if product.gradient is not None:
            found.append(product.gradient)

    def on_vector(name, gradient):
        found.append(gradient)

    states, layers = model.embed(TOKENS[:1]), []
    for number in range(model.n_layers):
        layers.append(model.load(number))
        found += [states[-1], layers[-1].run(states[-1])]
        states.append(layers[-1].run(states[-1], on_product))
    found.append(model.logits(states[-1], on_product))
    gradient = model.head_gradient(states[-1], 7, on_product)
    for layer in reversed(layers):
        gradient = layer.backward(states[layer.number], gradient, on_product, on_vector)
        found.append(gradient)
    return [np.asarray(one, np.float64) for one in found]


@pytest.mark.parametrize(
    "name", ["llama3", "mixtral", "qwen3moe", "gemma3", "phi-longrope", "gpt2", "stablelm-parallel"]
)
def test_everything_is_computed_on_the_device(name, files):
    """An operation of two devices raises; what comes out is numpy's, and the CPU's numbers."""
    made = files(name)
    here = layerwise.LayerwiseModel.open(made.float, made.directory)
    expected = all_that_comes_out(here)
    with other_device() as device:
        there = layerwise.LayerwiseModel.open(made.float, made.directory, device=device)
        assert (there.device.type, here.device.type) == (device, "cpu")
        held = [*there._shell._model.state_dict().values(), *there._shell._model.buffers()]
        layer = there.load(0)._module
        held += [*layer.parameters(), *layer.buffers()]
        assert {one.device.type for one in held} <= {device, "meta"}  # meta: layers not loaded
        found = all_that_comes_out(there)
    for one, other in zip(found, expected, strict=True):
        near(one, other)


@pytest.mark.parametrize("name", ["llama3", "mixtral"])
def test_tuning_has_the_same_gradient_on_the_device(name, files):
    made = files(name)

    def opened(device):
        return [
            layerwise.LayerwiseModel.open(file, made.directory, device=device)
            for file in (made.float, made.packed)
        ]

    def measured(device):
        tuner = tuning._Tuner(*opened(device), TOKENS, TOKENS, 1, 0)
        theta = np.random.default_rng(2).normal(0, 0.01, tuner.size).astype(np.float32)
        return tuner._gradient(theta, 0), tuner._judge(theta)

    gradient, kld = measured("cpu")
    with other_device() as device:
        found = measured(device)
    near(found[0], gradient)
    assert found[1] == pytest.approx(kld, rel=1e-4)


def test_an_export_tunes_on_the_device_and_anew_on_another(
    tiny, texts, tmp_path, works, monkeypatch
):
    command = ("export", tiny, tmp_path / "out.gguf", *SHORT, "--text", texts[0], "--tune", 2)
    with other_device() as device:
        monkeypatch.setenv("EDGEQ_DEVICE", device)
        done(*command)
    monkeypatch.setenv("EDGEQ_DEVICE", "cpu")
    done(*command)
    done(*command)
    made = [[name for name in work.made if name.startswith("tune/")] for work in works]
    assert made[0] == made[1] != []
    assert made[2] == []


def test_the_device_is_the_gpu_that_torch_sees_or_what_is_asked_for(monkeypatch):
    monkeypatch.delenv("EDGEQ_DEVICE", raising=False)
    for sees, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda sees=sees: sees)
        assert str(layerwise.chosen_device()) == expected
    monkeypatch.setenv("EDGEQ_DEVICE", "cpu")
    assert str(layerwise.chosen_device()) == "cpu"
    for wanted in ("cuda:99", "meta", "gpu", "lazy"):
        monkeypatch.setenv("EDGEQ_DEVICE", wanted)
        message = rf"EDGEQ_DEVICE: torch .* cannot compute on '{wanted}' \(.*\); expected cpu, or"
        with pytest.raises(RecipeError, match=message) as caught:
            layerwise.chosen_device()
        assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_refused_before_anything_is_calibrated(
    tiny, texts, tmp_path, monkeypatch
):
    monkeypatch.setenv("EDGEQ_DEVICE", "meta")
    command = ("export", tiny, tmp_path / "out.gguf", *SHORT, "--text", texts[0])
    assert "EDGEQ_DEVICE: torch" in refused(*command, "--tune", 2)
    assert not list(tmp_path.rglob("imatrix*"))
    done(*command)  # nothing else looks at it


def test_the_memory_of_a_device_is_asked_of_it(monkeypatch):
    device = torch.device("cuda")
    for name, value in (("memory_reserved", 5), ("memory_allocated", 3), ("mem_get_info", (7, 9))):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert layerwise.free_bytes_on(device) == 9
    assert layerwise.free_bytes_on(torch.device("mps")) == 1 << 32
    with (
        pytest.raises(
            CalibrationError, match=r"--tune: does not fit .* of cuda\. Set EDGEQ_DEVICE"
        ),
        layerwise.memory_of(device, "--tune"),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
