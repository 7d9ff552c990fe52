"""Ollama's Modelfile: what it says, and that it is whole or not there."""

import dataclasses

import pytest

from converters.gguf_file import open_gguf
from edgeq import modelfile
from edgeq.errors import RecipeError
from edgeq.modelfile import check_modelfile, stop_tokens, write_modelfile
from tests import tiny_gguf
from tests.command_line import done, refused

QUICK = ("--type", "Q4_0", "--no-imatrix", "--no-prove", "--modelfile")


def with_tokens(path, changed):
    """Write a tiny model whose vocabulary has other texts: token to text."""
    vocabulary = tiny_gguf.vocabulary(adds_bos=True)
    field = vocabulary["tokenizer.ggml.tokens"]
    tokens = [changed.get(token, text) for token, text in enumerate(field.value)]
    extra = {"tokenizer.ggml.tokens": dataclasses.replace(field, value=tokens)}
    return tiny_gguf.write(path, "llama", extra=extra)


def test_it_names_the_file_and_stops_at_what_ends_a_text(tiny, tmp_path):
    out = tmp_path / "my model.gguf"
    done("export", tiny, out, *QUICK)
    file = open_gguf(out)
    eos = file.value("tokenizer.ggml.tokens")[file.value("tokenizer.ggml.eos_token_id")]
    assert (tmp_path / "Modelfile").read_text().splitlines() == [
        "# Written by edgeq; ollama create NAME -f Modelfile",
        "FROM ./my model.gguf",
        f'PARAMETER stop "{eos}"',
    ]
    done("export", tiny, tmp_path / "b.gguf", *QUICK)  # over its own, and without it as before
    assert "FROM ./b.gguf\n" in (tmp_path / "Modelfile").read_text()
    plain = tmp_path / "plain"
    plain.mkdir()
    done("export", tiny, plain / "b.gguf", *QUICK[:-1])
    assert (plain / "b.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert not (plain / "Modelfile").exists()


def test_every_end_that_llama_cpp_knows_is_there(tmp_path):
    tokens = {5: "<|im_end|>", 6: "<|eot_id|>"}
    path = with_tokens(tmp_path / "a.gguf", tokens)
    found = stop_tokens(path)
    assert set(tokens.values()) <= set(found)
    assert len(found) == 3
    odd = with_tokens(
        tmp_path / "b.gguf", {open_gguf(path).value("tokenizer.ggml.eos_token_id"): 'a"\n'}
    )
    assert stop_tokens(odd) == []


def test_what_others_wrote_is_kept(tiny, tmp_path):
    path = tmp_path / "Modelfile"
    path.write_text("FROM llama3\n")
    assert "did not write it. Move it, or" in refused("export", tiny, tmp_path / "out.gguf", *QUICK)
    assert path.read_text() == "FROM llama3\n"
    assert not (tmp_path / "out.gguf").exists()
    path.unlink()
    path.mkdir()
    with pytest.raises(RecipeError, match="did not write it"):
        check_modelfile(tmp_path / "out.gguf")


def test_it_is_whole_or_not_there(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    out.write_bytes(tiny.read_bytes())
    write_modelfile(out)
    before = (tmp_path / "Modelfile").read_text()

    def fail(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(modelfile, "stop_tokens", fail)
    with pytest.raises(KeyboardInterrupt):
        write_modelfile(out)
    assert (tmp_path / "Modelfile").read_text() == before
    monkeypatch.setattr(modelfile, "stop_tokens", lambda path: ["\ud800"])  # fails while written
    with pytest.raises(UnicodeEncodeError):
        write_modelfile(out)
    assert (tmp_path / "Modelfile").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "Modelfile"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--split-max-size", "1M"), "--modelfile: Ollama loads one file, not parts. Leave --sp"),
        (("--size", "1M,2M"), "--modelfile: is of one file. Give one --size, or leave it out."),
    ],
)
def test_it_is_of_one_file(flags, message, tiny, tmp_path):
    assert message in refused("export", tiny, tmp_path / "out.gguf", "--modelfile", *flags)
    with pytest.raises(RecipeError, match="expected one that fits on a line"):
        check_modelfile(tmp_path / "a\nFROM b.gguf")
