"""Conversion against llama.cpp's own script (golden digests), transformers and the tokenizers."""

import json
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from converters.architectures import architecture_of
from converters.checkpoint import open_checkpoint
from converters.convert import convert
from edgeq.runtime.library import load
from edgeq.runtime.model import Model
from tests import tiny_models

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data/golden_conversions.json").read_text("utf-8")
)
# Metadata that differs from llama.cpp's script on purpose: model to key to why.
DIFFERS = {
    "mistral-spm-json": {"tokenizer.ggml.scores": "the script's equal scores do not order merges"},
}
# Largest logit difference as a part of the logits' spread: ggml sums in another order than torch,
LOGIT_TOLERANCE = 1e-4
# and rounds argument and result of GELU to float16.
GELU_TOLERANCE = 1e-2
GELU = ("gemma2", "gemma3", "gpt2", "gptneox")
KLD_TOLERANCE_NATS = 1e-6


def build(name: str, factory: pytest.TempPathFactory) -> tiny_models.Tiny:
    return tiny_models.build(name, factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=tiny_models.names())
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return request.param, build(request.param, tmp_path_factory)


ORACLE = [name for name in tiny_models.names() if tiny_models.CASES[name].oracle]


@pytest.fixture(scope="module", params=ORACLE)
def scripted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return request.param, build(request.param, tmp_path_factory)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_files_equal_those_of_llama_cpps_script(scripted: Any, kind: str, tmp_path: Path) -> None:
    name, model = scripted
    out = tmp_path / "out.gguf"
    assert convert(open_checkpoint(model.directory), out, ftype=kind) == [out]
    assert tiny_models.digest_tensors(out) == GOLDEN[name]["tensors"][kind]
    fields = tiny_models.describe_fields(out)
    wanted = dict(GOLDEN[name]["fields"])
    file_type = fields.pop("general.file_type")
    wanted.pop("general.file_type", None)
    assert file_type == ["UINT32", None, {"f32": 0, "f16": 1, "bf16": 32}[kind]]
    for key in DIFFERS.get(name, {}):
        assert fields.pop(key, None) != wanted.pop(key, None)
    assert fields == wanted


def test_auto_chooses_as_llama_cpps_script(scripted: Any, tmp_path: Path) -> None:
    name, model = scripted
    convert(open_checkpoint(model.directory), tmp_path / "out.gguf", ftype="auto")
    wanted = GOLDEN[name]["tensors"][GOLDEN[name]["auto"]]
    assert tiny_models.digest_tensors(tmp_path / "out.gguf") == wanted


@pytest.fixture
def exact_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep keys and values in float32: F16 alone moves logits by 1e-2 of their spread."""
    llama = load().llama
    default = llama.llama_context_default_params

    def params() -> Any:
        params = default()
        params.type_k = params.type_v = GGMLQuantizationType.F32
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return params

    monkeypatch.setattr(llama, "llama_context_default_params", params)


@pytest.mark.usefixtures("exact_runtime")
def test_logits_equal_those_of_transformers(tiny: Any, tmp_path: Path) -> None:
    name, model = tiny
    convert(open_checkpoint(model.directory), tmp_path / "out.gguf", ftype="f32")
    with Model(tmp_path / "out.gguf", n_ctx=256) as runtime:
        tokens = np.random.RandomState(5).randint(0, runtime.n_vocab - 16, 200).astype(np.int32)
        ours = np.array(runtime.logits(tokens), np.float64)
    theirs = transformers_logits(model.model, tokens)
    assert theirs.std() > 0.3, "the model says nothing"
    tolerance = GELU_TOLERANCE if name in GELU else LOGIT_TOLERANCE
    assert np.abs(ours - theirs).max() < tolerance * theirs.std()
    if name in GELU:  # with the same rounding only values at its borders differ
        with ggml_gelu(model.model):
            theirs = transformers_logits(model.model, tokens)
        assert np.median(np.abs(ours - theirs)) < LOGIT_TOLERANCE * theirs.std()
    assert kld_nats(theirs, ours).mean() < KLD_TOLERANCE_NATS


def transformers_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        output = model(torch.from_numpy(tokens[None].astype(np.int64)))
    return np.asarray(output.logits[0].double().numpy())


@contextmanager
def ggml_gelu(model: Any) -> Iterator[None]:
    """Round argument and result of GELU, tanh approximation, as ggml's table of it does."""
    import torch

    def gelu(x: Any) -> Any:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()

    found = [
        (module, attribute, getattr(module, attribute))
        for module in list(model.modules())
        for attribute in ("act", "act_fn")
        if hasattr(module, attribute)
    ]
    assert found
    for module, attribute, _ in found:
        delattr(module, attribute)
        object.__setattr__(module, attribute, gelu)
    try:
        yield
    finally:
        for module, attribute, activation in found:
            object.__delattr__(module, attribute)
            setattr(module, attribute, activation)


def kld_nats(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum(-1)


def test_tokens_equal_those_of_the_checkpoints_tokenizer(tiny: Any, tmp_path: Path) -> None:
    _, model = tiny
    convert(open_checkpoint(model.directory), tmp_path / "out.gguf", ftype="f16")
    text = unicodedata.normalize("NFC", tiny_models.CHECK_TEXT)  # llama.cpp does not normalize
    with Model(tmp_path / "out.gguf", vocab_only=True) as runtime:
        ours = runtime.tokenize(text, add_special=True, parse_special=True)
    theirs = tiny_models.reference_tokens(model.directory, text)
    assert ours.tolist() == theirs


def test_every_known_class_has_a_description_of_its_own() -> None:
    architectures = [architecture_of]
    assert architectures
