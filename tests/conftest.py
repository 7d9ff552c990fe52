"""What several test files share: tiny models and texts, made once, never changed."""

import dataclasses
import shutil

import pytest

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.gguf_file import open_gguf
from cpu_kernels import choice
from edgeq import pipeline
from edgeq.workdir import WorkDirectory
from tests import tiny_gguf, tiny_models


@pytest.fixture(scope="session")
def built_checkpoint(tmp_path_factory):
    """A LLaMA checkpoint with SentencePiece vocabulary in four shards; rows divide by 256."""
    return tiny_models.build("llama2", tmp_path_factory.mktemp("checkpoint")).directory


@pytest.fixture
def checkpoint(built_checkpoint, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(built_checkpoint, tmp_path / "checkpoint")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A float GGUF whose rows of 64 and 96 weights make K-quants fall back."""
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama")


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """The same with a vocabulary that is large enough for a compact store of logits."""
    vocabulary = tiny_gguf.vocabulary(adds_bos=True)
    tokens = vocabulary["tokenizer.ggml.tokens"].value
    more = [f"never{number}" for number in range(4096 - len(tokens))]
    extra = {
        "tokenizer.ggml.tokens": [*tokens, *more],
        "tokenizer.ggml.token_type": [3, 3] + [1] * 4094,
    }
    fields = {key: dataclasses.replace(vocabulary[key], value=extra[key]) for key in extra}
    return tiny_gguf.write(tmp_path_factory.mktemp("wide") / "wide.gguf", "llama", extra=fields)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Two texts without a passage in common, of about 16 and 8 thousand characters."""
    directory = tmp_path_factory.mktemp("texts")
    paths = directory / "one.txt", directory / "other.txt"
    for seed, (path, n_words) in enumerate(zip(paths, (3000, 1500), strict=True), start=1):
        path.write_text(tiny_gguf.text(seed, n_words), "utf-8")
    return paths


@pytest.fixture
def works(monkeypatch):
    """Every work directory that an export opens from here on."""
    opened = []

    class Spied(WorkDirectory):
        def __init__(self, path):
            super().__init__(path)
            opened.append(self)

    monkeypatch.setattr(pipeline, "WorkDirectory", Spied)
    return opened


@pytest.fixture(scope="module")
def one_thread():
    """One thread of torch: more only wait for each other at these sizes."""
    torch = pytest.importorskip("torch")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def nothing_timed(tmp_path, monkeypatch):
    """Families of kernels are chosen anew, and what is chosen is kept in `tmp_path`."""
    monkeypatch.setattr(choice, "cache_folder", lambda kernel: tmp_path)
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    choice._is_faster.cache_clear()
    yield
    choice._is_faster.cache_clear()


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Return a function that gives the float file of a tiny model."""
    parent = tmp_path_factory.mktemp("converted")

    def make(name):
        path = parent / f"{name}.gguf"
        if not path.exists():
            directory = tiny_models.build(name, parent).directory
            convert(open_checkpoint(directory), path, ftype="f32")
        return open_gguf(path)

    return make
