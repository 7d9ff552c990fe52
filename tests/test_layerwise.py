import ctypes
import json
import shutil
import sys
from collections import defaultdict
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from converters.architectures import description
from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.gguf_file import open_gguf
from edgeq.errors import CalibrationError
from edgeq.runtime.model import Model
from edgeq.runtime.observer import Observer
from tests import tiny_models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
layerwise = pytest.importorskip("edgeq.layerwise")

FAMILIES = [
    "llama3",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3moe",
    "gemma2",
    "gemma3",
    "phi-longrope",
    "gpt2",
    "gptneox",
    "olmo2",
    "smollm3",
    "stablelm",
    "stablelm-head-norms",
    "stablelm-parallel",
]
# beyond the 128 of the long position scalings; below 256 llama.cpp takes longer ones all the same
TOKENS = np.random.RandomState(0).randint(3, 400, 160).astype(np.int32)
ROUNDING = 1e-4  # of a standard deviation; 1e-5 was measured
SAME_FUNCTION_NATS = 1e-5  # 1e-6 with ggml's table of GELU, 1e-12 without


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Return, by name, a tiny checkpoint, its float GGUF and transformers' own model of it."""
    parent = tmp_path_factory.mktemp("layerwise")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other at these sizes

    @cache
    def make(name):
        directory = tiny_models.build(name, parent).directory
        path = parent / f"{name}.gguf"
        convert(open_checkpoint(directory), path, ftype="f32")
        full = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        return SimpleNamespace(
            directory=directory, path=path, reference=open_gguf(path), full=full.eval()
        )

    yield make
    torch.set_num_threads(n_threads)


def forward(model, on_product=None):
    """Return what enters each layer, and what leaves the last."""
    (hidden,) = model.embed(TOKENS[None])
    states = [hidden]
    for layer in range(model.n_layers):
        states.append(model.load(layer).run(states[-1], on_product))
    return states


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_names_are_those_of_the_whole_model(family, name):
    made = family(name)
    model = layerwise.LayerwiseModel.open(made.reference, made.directory)
    shapes = {name: tensor.shape for name, tensor in made.reference.tensors.items()}
    seen = []
    *_, hidden = forward(model, lambda p: seen.append((p.name, p.inputs.shape[1])))
    with torch.no_grad():
        whole = made.full(torch.from_numpy(TOKENS.astype(np.int64))[None]).logits[0].numpy()
    assert np.abs(model.logits(hidden) - whole).max() < ROUNDING * whole.std()
    matrices = [name for layer in range(model.n_layers) for name in model.matrices(layer)]
    assert {name for name, _ in seen} == set(matrices)
    assert all(shapes[name][-1] == n_in for name, n_in in seen)
    ranked = {n for n, shape in shapes.items() if n.startswith("blk.") and len(shape) > 1}
    assert {name for name in ranked if "_norm" not in name} == set(matrices)


def gradients_of_weights(model, hidden, head_gradient):
    """Return Σ gradient · inputsᵀ of every matrix, by (name, matrix)."""
    found = defaultdict(float)

    def add(product):
        found[product.name, product.matrix] += product.gradient.T @ product.inputs

    gradient = head_gradient
    for layer in reversed(range(model.n_layers)):
        gradient = model.load(layer).backward(hidden[layer], gradient, add)
    return found


def whole_gradients(made, seed):
    """Return the gradient of every parameter, and at the last layer's output, by autograd."""
    full = made.full
    full.zero_grad()
    states = []
    last = next(
        module[-1]
        for module in full.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == full.config.num_hidden_layers
    )
    hook = last.register_forward_hook(lambda *call: states.append(call[2]))
    logits = full(torch.from_numpy(TOKENS.astype(np.int64))[None]).logits[0]
    hook.remove()
    states[0].retain_grad()
    log_p = torch.log_softmax(logits, -1)
    generator = torch.Generator().manual_seed(seed)
    total = log_p.detach().exp().cumsum(-1)
    u = torch.rand((len(total), 1), generator=generator) * total[:, -1:]
    drawn = torch.searchsorted(total, u, right=True)
    (-log_p.gather(1, drawn).sum()).backward()
    named = {name: p.grad.numpy().copy() for name, p in full.named_parameters()}
    return named, states[0].grad[0].numpy()


QUERY = ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight")
EXPECTED = {  # GGUF name, parameter, rearrangement of the parameter's gradient
    "llama3": [
        (*QUERY, description.PERMUTE_QUERY),
        ("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight", description.PERMUTE_KEY),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", None),
    ],
    "mixtral": [
        (*QUERY, description.PERMUTE_QUERY),
        ("blk.0.ffn_gate_inp.weight", "model.layers.0.mlp.gate.weight", None),
        (
            "blk.0.ffn_gate_exps.weight",
            "model.layers.0.mlp.experts.gate_up_proj",
            description.FIRST_HALF,
        ),
        (
            "blk.0.ffn_up_exps.weight",
            "model.layers.0.mlp.experts.gate_up_proj",
            description.SECOND_HALF,
        ),
        ("blk.1.ffn_down_exps.weight", "model.layers.1.mlp.experts.down_proj", None),
    ],
    "gpt2": [
        ("blk.0.attn_qkv.weight", "transformer.h.0.attn.c_attn.weight", description.TRANSPOSE),
        ("blk.1.ffn_down.weight", "transformer.h.1.mlp.c_proj.weight", description.TRANSPOSE),
    ],
    "gptneox": [
        (
            "blk.0.attn_qkv.weight",
            "gpt_neox.layers.0.attention.query_key_value.weight",
            description.SEPARATE_QKV,
        )
    ],
    "phi-longrope": [
        ("blk.0.attn_qkv.weight", "model.layers.0.self_attn.qkv_proj.weight", None),
        ("blk.0.ffn_up.weight", "model.layers.0.mlp.gate_up_proj.weight", None),
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_gradients_are_those_of_the_whole_model(family, name):
    made = family(name)
    model = layerwise.LayerwiseModel.open(made.reference, made.directory)
    hidden = forward(model)
    at_output = model.head_gradient(hidden[-1], 7)
    found = gradients_of_weights(model, hidden, at_output)
    named, expected_at_output = whole_gradients(made, 7)
    scale = expected_at_output.std()
    assert np.abs(at_output - expected_at_output).max() < 10 * ROUNDING * scale
    for tensor, parameter, arrange in EXPECTED[name]:
        gradient = named[parameter]
        if arrange is not None:
            gradient = arrange.apply(gradient, made.full.config.to_dict())
        matrices = gradient if gradient.ndim == 3 else gradient[None]
        for number, expected in enumerate(matrices):
            error = np.abs(found[tensor, number] - expected).max()
            assert error < 10 * ROUNDING * expected.std(), tensor


def test_bfloat16_products_change_gradients_little(family):
    made = family("llama3")
    model = layerwise.LayerwiseModel.open(made.reference, made.directory)
    hidden = forward(model)
    at_output = model.head_gradient(hidden[-1], 7)
    layer = model.load(1)
    exact = layer.backward(hidden[1], at_output)
    rough = layer.backward(hidden[1], at_output, compute_dtype=torch.bfloat16)
    assert 1e-5 < np.linalg.norm(rough - exact) / np.linalg.norm(exact) < 2e-2


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"architecture": "aarch64", "bf16": True}, torch.bfloat16),
        (None, torch.float32),
    ],
)
def test_bfloat16_is_used_where_the_cpu_multiplies_it(monkeypatch, capabilities, dtype):
    if capabilities is None:  # an older torch
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert layerwise.fast_dtype() is dtype


@pytest.mark.parametrize("name", ["llama3", "mixtral", "gpt2"])
def test_inputs_are_those_that_llama_cpp_sees(family, name):
    made = family(name)
    seen = {}
    observer = Observer(
        lambda p: seen.update({(p.name, m): rows.copy() for m, rows in p.by_matrix()}),
        output_tensor=True,
    )
    with Model(made.path, n_ctx=len(TOKENS), cb_eval=observer, exact_attention=True) as llama:
        llama.logits(TOKENS)
    model = layerwise.LayerwiseModel.open(made.reference, made.directory)
    products = []
    *_, hidden = forward(model, products.append)
    model.logits(hidden, products.append)
    assert {(p.name, p.matrix) for p in products} == set(seen)
    for product in products:
        order = np.argsort(product.positions)
        error = np.abs(product.inputs[order] - seen[product.name, product.matrix])
        assert error.max() < 5e-3 * product.inputs.std(), product.name


def test_experts_know_their_tokens_and_shared_inputs(family):
    made = family("qwen3moe")
    model = layerwise.LayerwiseModel.open(made.reference, made.directory)
    (hidden,) = model.embed(TOKENS[None])
    products = []
    model.load(0).run(hidden, products.append)
    named = {(p.name, p.matrix): p for p in products}
    router = named["blk.0.ffn_gate_inp.weight", 0]
    used = [p for p in products if p.name == "blk.0.ffn_down_exps.weight"]
    assert sum(len(p.positions) for p in used) == 2 * len(TOKENS)
    for down in used:
        up = named["blk.0.ffn_up_exps.weight", down.matrix]
        assert np.array_equal(up.inputs, router.inputs[up.positions])
        assert np.array_equal(up.positions, down.positions)
        assert up.same_as == "blk.0.ffn_gate_exps.weight"
    shared = {p.name: p.same_as for p in products}
    assert shared["blk.0.attn_v.weight"] == "blk.0.attn_q.weight"
    assert shared["blk.0.attn_output.weight"] == "blk.0.attn_output.weight"


@pytest.mark.parametrize("name", ["llama3", "mixtral", "gpt2", "gptneox", "stablelm-head-norms"])
def test_replaced_weights_make_another_layer(family, name):
    made = family(name)
    model = layerwise.LayerwiseModel.open(made.reference, made.directory)
    (hidden,) = model.embed(TOKENS[None])
    other = {
        tensor: made.reference.read_float(tensor.replace("blk.0.", "blk.1."))
        for tensor in model.tensors(0)
    }
    as_other = model.load(0, other).run(hidden)
    assert np.array_equal(as_other, model.load(1).run(hidden))
    assert not np.array_equal(as_other, model.load(0).run(hidden))


def test_replacements_that_do_not_fit_are_refused(family):
    made = family("llama3")
    model = layerwise.LayerwiseModel.open(made.reference, made.directory)
    values = made.reference.read_float("blk.1.attn_q.weight")
    with pytest.raises(CalibrationError, match=r"attn_q.*shape.*expected a tensor of that layer"):
        model.load(0, {"blk.1.attn_q.weight": values})
    with pytest.raises(CalibrationError, match=r"blk.1.attn_q.*expected \(64, 64\)"):
        model.load(1, {"blk.1.attn_q.weight": values[1:]})


@pytest.mark.parametrize(
    "name",
    ["llama3", "mixtral", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi-longrope", "gpt2"],
)
def test_gguf_alone_describes_the_same_function(family, name):
    made = family(name)
    model = layerwise.LayerwiseModel.open(made.reference, None)
    assert layerwise.check_agrees(model, made.path, TOKENS) < SAME_FUNCTION_NATS


def test_disagreement_with_llama_cpp_is_measured(family, tmp_path):
    made = family("llama3")
    (tmp_path / "config.json").write_text((made.directory / "config.json").read_text())
    edit_config(tmp_path, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    model = layerwise.LayerwiseModel.open(made.reference, tmp_path)
    assert layerwise.check_agrees(model, made.path, TOKENS) > 100 * SAME_FUNCTION_NATS


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_unknown_and_unfitting_configurations_are_refused(family, tmp_path):
    with pytest.raises(CalibrationError, match=r"gptneox is not supported.*Give the checkpoint"):
        layerwise.LayerwiseModel.open(family("gptneox").reference, None)
    made = family("llama3")
    for changes, message in (
        ({"model_type": "nobody"}, "config.json: transformers .* cannot describe"),
        ({"intermediate_size": 96}, r"blk.0.ffn_gate.weight is \(160, 64\).* wants \(96, 64\)"),
        ({"attention_bias": False}, "no place for blk.0.attn_k.bias and 7 more"),
        ({"num_hidden_layers": 3}, "blk.2.attn_q.weight is missing"),
        ({"model_type": "qwen2"}, "architecture llama, but .* Qwen2ForCausalLM; expected qwen2"),
    ):
        shutil.copy(made.directory / "config.json", tmp_path / "config.json")
        edit_config(tmp_path, **changes)
        with pytest.raises(CalibrationError, match=message) as caught:
            layerwise.LayerwiseModel.open(made.reference, tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "gemma3", "phi-longrope"])
def test_sizes_are_those_of_the_whole_file_without_its_vocabulary(name, family):
    """transformers reads a vocabulary token by token, which took longer than all else."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from edgeq.layerwise.configuration import _read_by_transformers

    reference = family(name).reference
    whole = load_gguf_checkpoint(str(reference.path), return_tensors=False)["config"]
    found = _read_by_transformers(reference)
    for config in (found, whole):
        config.pop("vocab_size", None)  # ours is the embedding's
    assert found == whole


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP library there")
def test_a_layer_starts_no_threads_inside_of_others(family):
    """numba's pool allows nested teams, which torch's attention would start at each product."""
    openmp = ctypes.CDLL(torch._C.__file__)
    openmp.omp_set_max_active_levels(8)
    layerwise.LayerwiseModel.open(family("llama3").reference, None).load(0)
    assert openmp.omp_get_max_active_levels() == 1
