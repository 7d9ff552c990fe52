"""Conversion against llama.cpp's own script (golden digests), transformers and the tokenizers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny_models

from converters.architectures import architecture_of
from converters.checkpoint import open_checkpoint
from converters.convert import convert
from edgeq.runtime.model import Model

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data/golden_conversions.json").read_text("utf-8")
)
# Metadata that differs from llama.cpp's script on purpose: model to key to why.
DIFFERS: dict[str, dict[str, str]] = {}
# Worst logit difference seen over all models is 6e-6 of the logits' spread: ggml sums dot products
# in another order than torch.
LOGIT_TOLERANCE = 1e-4
KLD_TOLERANCE_NATS = 1e-8


@pytest.fixture(scope="module", params=tiny_models.names())
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield request.param, tiny_models.build(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_files_equal_those_of_llama_cpps_script(tiny: Any, kind: str, tmp_path: Path) -> None:
    name, model = tiny
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


def test_auto_chooses_the_type_that_llama_cpps_script_chooses(tiny: Any, tmp_path: Path) -> None:
    name, model = tiny
    convert(open_checkpoint(model.directory), tmp_path / "out.gguf", ftype="auto")
    wanted = GOLDEN[name]["tensors"][GOLDEN[name]["auto"]]
    assert tiny_models.digest_tensors(tmp_path / "out.gguf") == wanted


def test_logits_equal_those_of_transformers(tiny: Any, tmp_path: Path) -> None:
    import torch

    _, model = tiny
    convert(open_checkpoint(model.directory), tmp_path / "out.gguf", ftype="f32")
    with Model(tmp_path / "out.gguf", n_ctx=256) as runtime:
        tokens = np.random.RandomState(5).randint(0, runtime.n_vocab - 16, 200).astype(np.int32)
        ours = np.array(runtime.logits(tokens), np.float64)
    with torch.no_grad():
        theirs = model.model(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].double()
    theirs = theirs.numpy()
    assert np.abs(ours - theirs).max() < LOGIT_TOLERANCE * theirs.std()
    assert theirs.std() > 0.3, "the model says nothing"
    assert kld_nats(theirs, ours).max() < KLD_TOLERANCE_NATS


def kld_nats(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return (np.exp(p) * (p - q)).sum(-1)


def test_tokens_equal_those_of_the_checkpoints_tokenizer(tiny: Any, tmp_path: Path) -> None:
    name, model = tiny
    convert(open_checkpoint(model.directory), tmp_path / "out.gguf", ftype="f16")
    text = tiny_models.CHECK_TEXT
    with Model(tmp_path / "out.gguf", vocab_only=True) as runtime:
        ours = runtime.tokenize(text, add_special=True, parse_special=True)
    theirs = tiny_models.reference_tokens(model.directory, text)
    assert ours.tolist() == theirs


def test_every_known_class_has_a_description_of_its_own() -> None:
    architectures = [architecture_of]
    assert architectures
