import json
import os
import pickle
import shutil
import struct
import sys
import time
import tracemalloc
import types
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from converters import ConversionError, open_checkpoint, resolve_model
from converters.safetensors_file import DTYPES, read_header

INDEX = "model.safetensors.index.json"
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
N_MUTATIONS = 400
CORPUS_SECONDS = 20  # of CPU; it takes 1


def array(i, shape=(2, 3)):
    return np.arange(i, i + np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.fixture
def single(tmp_path):
    """A checkpoint in one file."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"w": array(0), "v": array(6)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in two files with an index."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": array(0)}, tmp_path / A)
    save_file({"v": array(6), "u": array(12)}, tmp_path / B)
    write_index(tmp_path, {"w": A, "v": B, "u": B})
    return tmp_path


def write_index(directory, weight_map):
    index = {"metadata": {"total_size": 72}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))


def refused(directory, message, **options):
    with pytest.raises(ConversionError, match=message) as caught:
        open_checkpoint(directory, **options)
    assert "\n" not in str(caught.value)


# --- reading -------------------------------------------------------------------------------------


def test_one_file_opens_lazily_and_reads_as_stored(single):
    checkpoint = open_checkpoint(single)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.directory == single
    assert checkpoint.files == (single / "model.safetensors",)
    assert checkpoint.tensors["w"].shape == (2, 3)
    np.testing.assert_array_equal(checkpoint.read("v"), array(6))


def test_float32_is_mapped_without_a_copy_and_let_go_again(single):
    data = open_checkpoint(single).read("w")
    assert not data.flags.writeable
    assert not data.flags.owndata
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(single) in maps.read_text()
        del data
        assert str(single) not in maps.read_text()


def test_shards_are_joined_by_the_index(sharded):
    checkpoint = open_checkpoint(sharded)
    assert set(checkpoint.tensors) == set("wvu")
    assert checkpoint.tensors["u"].path == sharded / B
    np.testing.assert_array_equal(checkpoint.read("u"), array(12))


def test_a_whole_set_of_shards_needs_no_index(sharded):
    (sharded / INDEX).unlink()
    assert set(open_checkpoint(sharded).tensors) == set("wvu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_read_and_widened(dtype, tmp_path):
    numpy_type = DTYPES[dtype]
    stored = np.arange(12).astype(numpy_type).reshape(3, 4)
    if dtype == "BF16":
        stored = (np.arange(12, dtype=np.float32).view(np.uint32) >> 16).astype("<u2").reshape(3, 4)
    header = {"w": {"dtype": dtype, "shape": [3, 4], "data_offsets": [0, stored.nbytes]}}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(safetensors(header, stored.tobytes()))
    checkpoint = open_checkpoint(tmp_path)
    raw, name = checkpoint.raw("w")
    assert name == dtype
    assert raw.dtype == numpy_type
    np.testing.assert_array_equal(raw, stored)
    expected = np.arange(12).astype(bool) if dtype == "BOOL" else np.arange(12)
    widened = checkpoint.read("w")
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened, expected.reshape(3, 4).astype(np.float32))


def test_data_at_odd_bytes_comes_aligned(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    raw = struct.pack("<Q", len(header) + 1) + header + b" " + np.ones(2, "<f4").tobytes()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(raw)
    data = open_checkpoint(tmp_path).read("w")
    assert data.flags.aligned
    assert data.tolist() == [1, 1]


def test_an_unknown_tensor_is_named(single):
    with pytest.raises(ConversionError, match="no tensor 'x' among its 2"):
        open_checkpoint(single).read("x")


def test_empty_tensors_are_read(tmp_path):
    save_file({"e": np.empty((0, 4), np.float32), "w": array(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).read("e").shape == (0, 4)


# --- safetensors headers that lie ----------------------------------------------------------------


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin=0, end=24, shape=(2, 3), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


WHOLE = {"w": entry(0, 24), "v": entry(24, 48)}
DATA = bytes(48)
LIES = {
    "empty": (b"", "truncated or no safetensors file; it has 0 bytes"),
    "length": (safetensors(WHOLE, DATA, 1 << 63), "its header states that it takes 9223372036854"),
    "text": (b"hello, I am a text file" * 9, "truncated or no safetensors file"),
    "not json": (safetensors(b"{not json}", b""), "its header is no JSON object"),
    "an array": (safetensors(b"[1, 2, 3]", b""), "starts with b'.1, 2, 3'"),
    "not utf-8": (safetensors(b'{"\xff": 1}', b""), "its header is no JSON object"),
    "nested": (safetensors(b'{"a":' + b"[" * 100_000, b""), "its header is no JSON object"),
    "long number": (safetensors(b'{"a":' + b"9" * 5000 + b"}", b""), "no JSON object"),
    "twice": (
        safetensors(b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{}}'),
        "'w' is given twice",
    ),
    "entry": (safetensors({"w": 3}), "'w' is 3, expected an object"),
    "no offsets": (safetensors({"w": {"dtype": "F32", "shape": [1]}}), "data_offsets None"),
    "negative": (safetensors({"w": entry(-4, 20)}, DATA), "expected lists of whole numbers"),
    "fraction": (safetensors({"w": entry(0, 24.0)}, DATA), "expected lists of whole numbers"),
    "truth": (safetensors({"w": entry(False, 24)}, DATA), "expected lists of whole numbers"),
    "huge shape": (
        safetensors({"w": entry(0, 24, (1 << 62, 1 << 62))}, DATA),
        "expected lists of whole numbers",
    ),
    "hidden shape": (
        safetensors({"w": entry(0, 0, (0, 1 << 62))}, b""),
        "expected lists of whole numbers",
    ),
    "dimensions": (safetensors({"w": entry(0, 4, (1,) * 100_000)}, DATA), "whole numbers"),
    "size": (safetensors({"w": entry(0, 20)}, DATA), "takes 24 bytes, but its data_offsets"),
    "backwards": (safetensors({"w": entry(24, 0)}, DATA), "takes 24 bytes, but its data_offsets"),
    "overlap": (safetensors({"w": entry(), "v": entry(20, 44)}, DATA), "begins at byte 20 .*lap"),
    "gap": (safetensors({"w": entry(), "v": entry(28, 52)}, bytes(52)), "leave a gap"),
    "late start": (safetensors({"w": entry(4, 28)}, bytes(28)), "begins at byte 4 of the data"),
    "spare data": (safetensors(WHOLE, DATA + b"x"), "take 48 bytes, but the file holds 49"),
    "truncated": (safetensors(WHOLE, DATA[:-1]), "the file is truncated: 'v' ends at byte 48"),
    "no data": (safetensors(WHOLE, b""), "the file is truncated"),
    "float8": (safetensors({"w": entry(0, 6, dtype="F8_E4M3")}, DATA[:6]), "to BF16 first"),
    "complex": (safetensors({"w": entry(0, 48, dtype="C64")}, DATA), "'C64', expected F32"),
    "no type": (safetensors({"w": entry(0, 24, dtype=7)}, DATA), "has the type 7"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lying_header_ends_in_one_line(case, tmp_path):
    raw, message = LIES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ConversionError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 400


def test_a_header_above_100_mb_is_refused_unread(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 100_000_009)  # sparse
    with pytest.raises(ConversionError, match="takes 100000001 bytes, expected at most 100000000"):
        read_header(path)


def test_a_header_cut_anywhere_is_refused(tmp_path):
    whole = safetensors(WHOLE, DATA)
    path = tmp_path / "model.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ConversionError):
            read_header(path)


def mutations(whole: bytes, n: int):
    """Yield `n` damaged copies: flipped bits, lost and doubled bytes, other digits and lengths."""
    for seed in range(n):
        rng = np.random.RandomState(seed)
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = int(rng.randint(len(raw)))
            match seed % 5:
                case 0:
                    raw[at] ^= 1 << int(rng.randint(8))
                case 1:
                    del raw[at : at + int(rng.randint(1, 9))]
                case 2:
                    raw[at:at] = raw[at : at + int(rng.randint(1, 9))]
                case 3:
                    digits = [i for i, byte in enumerate(raw[8:], 8) if 48 <= byte < 58]
                    raw[digits[at % len(digits)]] = 48 + int(rng.randint(10))
                case _:
                    raw[:8] = struct.pack("<Q", [0, 1, 2, 60, 1 << 20, 1 << 63][rng.randint(6)])
        yield bytes(raw)


def test_damaged_files_are_refused_or_read_within_bounds(single):
    n_read, refusals = 0, []
    path = single / "model.safetensors"
    whole = safetensors(WHOLE | {"__metadata__": {"format": "pt"}}, DATA)
    tracemalloc.start()
    start = time.process_time()
    for raw in mutations(whole, N_MUTATIONS):
        path.write_bytes(raw)
        try:
            checkpoint = open_checkpoint(single)
            for name, info in checkpoint.tensors.items():
                assert checkpoint.read(name).shape == info.shape
                assert info.n_bytes <= len(raw)
            n_read += 1
        except ConversionError as error:
            refusals.append(str(error))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
    assert time.process_time() - start < CORPUS_SECONDS
    assert not any("\n" in refusal for refusal in refusals)
    assert n_read > 0
    assert len(refusals) > N_MUTATIONS // 2
    assert len({refusal[-90:] for refusal in refusals}) > 20  # at many of the checks


arrays = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=10).filter(lambda key: key != "__metadata__"),
    st.tuples(
        st.sampled_from(["f4", "f2", "f8", "i8", "u1", "?"]),
        st.lists(st.integers(0, 4), max_size=4),
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(arrays)
def test_what_safetensors_saves_is_read(tmp_path_factory, given_arrays):
    stored = {
        name: np.random.RandomState(3).randint(0, 2, shape).astype(dtype)
        for name, (dtype, shape) in given_arrays.items()
    }
    stored["one"] = np.ones((1, 3), np.float32)
    directory = tmp_path_factory.mktemp("round")
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(save(stored))
    checkpoint = open_checkpoint(directory)
    assert checkpoint.tensors.keys() == stored.keys()
    for name, expected in stored.items():
        raw, _ = checkpoint.raw(name)
        assert raw.dtype == expected.dtype
        np.testing.assert_array_equal(raw, expected)


# --- shards that do not fit together -------------------------------------------------------------


def test_a_missing_shard_is_named(sharded):
    (sharded / B).unlink()
    refused(sharded, f"{B}: no such file")
    (sharded / INDEX).unlink()
    refused(sharded, f"{B}: no such file; a shard is missing")


def test_a_truncated_shard_is_named(sharded):
    os.truncate(sharded / B, (sharded / B).stat().st_size - 5)
    refused(sharded, f"{B}: the file is truncated")


def test_an_extra_shard_is_named(sharded):
    save_file({"x": array(0)}, sharded / "model-00003-of-00003.safetensors")
    refused(sharded, f"model-00003-of-00003.safetensors: not named by {INDEX}")
    (sharded / INDEX).unlink()
    refused(sharded, "it has 3 shards, expected the 2 of model")


def test_a_single_file_beside_shards_is_refused(sharded):
    save_file({"x": array(0)}, sharded / "model.safetensors")
    refused(sharded, f"model.safetensors: not named by {INDEX}")
    (sharded / INDEX).unlink()
    refused(sharded, "lies beside model.safetensors without")


def test_other_formats_beside_the_model_are_left_alone(sharded):
    save_file({"x": array(0)}, sharded / "consolidated.safetensors")
    save_file({"x": array(0)}, sharded / "adapter_model.safetensors")
    assert set(open_checkpoint(sharded).tensors) == set("wvu")


def test_index_and_shards_must_name_the_same_tensors(sharded):
    write_index(sharded, {"w": A, "v": B})
    refused(sharded, f"{B}: holds 'u', which the index places nowhere")
    write_index(sharded, {"w": A, "v": B, "u": B, "t": A})
    refused(sharded, f"{A}: does not hold 't', which the index places in {A}")
    write_index(sharded, {"w": A, "v": B, "u": A})
    refused(sharded, f"{B}: holds 'u', which the index places in {A}")


def test_a_tensor_in_two_shards_is_refused(sharded):
    (sharded / INDEX).unlink()
    save_file({"w": array(0)}, sharded / B)
    refused(sharded, f"{B}: 'w' is also in {A}")


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\\b", "x\0y", 7, None],
)
def test_an_index_may_not_leave_the_directory(file, sharded):
    write_index(sharded, {"w": A, "v": B, "u": file})
    refused(sharded, f"{INDEX}: 'u' lies in .*, expected the name of a file beside it")


def test_links_that_leave_the_directory_are_refused(sharded, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret"
    shutil.move(sharded / B, elsewhere)
    (sharded / B).symlink_to(elsewhere)
    refused(sharded, f"{B}: a link to .*secret, which is outside of the checkpoint")


def test_links_of_the_hub_cache_are_followed(sharded, tmp_path_factory):
    cache = tmp_path_factory.mktemp("models--x--y")
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, cache / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert set(open_checkpoint(snapshot).tensors) == set("wvu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "list, expected a JSON object"),
        ('{"metadata": {}}', "weight_map is None"),
        ('{"weight_map": {}}', "weight_map is {}"),
        ('{"weight_map": ["w"]}', r"weight_map is \['w'\]"),
    ],
)
def test_a_broken_index_is_refused(text, message, sharded):
    (sharded / INDEX).write_text(text)
    refused(sharded, f"{INDEX}: .*{message}")


# --- the directory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'a': 1}", "config.json: cannot be read as JSON"),
        ("[1]", "config.json: .*list, expected a JSON object"),
        ("[" * 100_000, "config.json: cannot be read as JSON"),
    ],
)
def test_a_broken_configuration_is_refused(text, message, single):
    (single / "config.json").write_text(text)
    refused(single, message)


def test_directories_without_a_model_are_refused(single):
    refused(single / "model.safetensors", "not a directory")
    refused(single / "nowhere", "not a directory")
    (single / "config.json").unlink()
    refused(single, "config.json: no such file")
    (single / "config.json").write_text("{}")
    (single / "model.safetensors").unlink()
    refused(single, "it holds no weights .*Give a checkpoint with model.safetensors")
    (single / "m.gguf").write_bytes(b"")
    refused(single, "Give the path of the GGUF file in it")
    save_file({"x": array(0)}, single / "adapter_model.safetensors")
    refused(single, "It is an adapter: merge it")


def test_files_of_unclear_role_are_refused(single):
    (single / "model.safetensors").rename(single / "one.safetensors")
    assert set(open_checkpoint(single).tensors) == set("wv")
    save_file({"x": array(0)}, single / "two.safetensors")
    refused(single, r"it has 2 safetensors files \(one.safetensors, two.safetensors, ...\)")


def test_a_checkpoint_without_tensors_is_refused(single):
    save_file({}, single / "model.safetensors")
    refused(single, "its weight files hold no tensor")


# --- fingerprints --------------------------------------------------------------------------------


def test_the_fingerprint_sees_every_file_that_counts(sharded, tmp_path_factory):
    first = open_checkpoint(sharded).fingerprint()
    copied = tmp_path_factory.mktemp("copy") / "model"
    shutil.copytree(sharded, copied)
    assert open_checkpoint(copied).fingerprint() == first
    (copied / "training.log").write_text("of no interest")
    assert open_checkpoint(copied).fingerprint() == first
    seen = {first}
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer.model", "merges.txt"):
        (copied / name).write_text("a")
        seen.add(open_checkpoint(copied).fingerprint())
        (copied / name).write_text("b")
        seen.add(open_checkpoint(copied).fingerprint())
    (copied / "additional_chat_templates").mkdir()
    (copied / "additional_chat_templates" / "t.jinja").write_text("a")
    seen.add(open_checkpoint(copied).fingerprint())
    raw = bytearray((copied / A).read_bytes())
    raw[-1] ^= 1
    (copied / A).write_bytes(raw)
    seen.add(open_checkpoint(copied).fingerprint())
    assert len(seen) == 11


# --- pickles -------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def pickled(tmp_path, torch):
    """A checkpoint whose weights are one pickle."""
    (tmp_path / "config.json").write_text("{}")
    state = {
        "w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.tensor([1.0, -2.5], dtype=torch.bfloat16),
        "t": torch.arange(6, dtype=torch.float16).reshape(2, 3).T,
        "i": torch.tensor([1, 2]),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    return tmp_path


def test_pickles_are_refused_unless_asked_for(pickled):
    refused(pickled, r"its weights are pickles \(pytorch_model.bin\).*--allow-pickle")
    save_file({"w": array(0)}, pickled / "model.safetensors")
    assert list(open_checkpoint(pickled, allow_pickle=True).tensors) == ["w"]


def test_pickles_that_were_asked_for_are_read(pickled):
    checkpoint = open_checkpoint(pickled, allow_pickle=True)
    np.testing.assert_array_equal(checkpoint.read("w"), array(0))
    assert checkpoint.read("b").tolist() == [1.0, -2.5]
    raw, dtype = checkpoint.raw("b")
    assert (raw.dtype, dtype) == (np.uint16, "BF16")
    np.testing.assert_array_equal(checkpoint.read("t"), array(0).T)
    assert checkpoint.raw("i")[0].dtype == np.int64
    assert checkpoint.tensors["t"].n_bytes == 12
    assert len(checkpoint.fingerprint()) == 64


def test_pickles_in_shards_and_in_the_old_format_are_read(tmp_path, torch):
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.ones(2)}, tmp_path / names[0])
    old = {"_use_new_zipfile_serialization": False}
    torch.save({"b": torch.zeros(2)}, tmp_path / names[1], **old)
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    assert [checkpoint.read(name).tolist() for name in "abab"] == [[1, 1], [0, 0]] * 2
    (tmp_path / names[1]).unlink()
    refused(tmp_path, f"{names[1]}: no such file; a shard is missing", allow_pickle=True)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(pickled, torch):
    trap = str(pickled / "trap")
    torch.save({"w": torch.ones(2), "x": Evil(trap)}, pickled / "pytorch_model.bin")
    refused(pickled, "refused, it holds more than tensors", allow_pickle=True)
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(trap)))
    refused(pickled, "pytorch_model.bin: ", allow_pickle=True)
    assert not os.path.exists(trap)


def test_pickles_of_other_things_are_refused(pickled, torch):
    for state, message in [
        ([torch.ones(2)], "holds list, expected a map of tensors"),
        ({"w": {"v": torch.ones(2)}}, "'w' is dict, expected a tensor"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "'w' is torch.complex64"),
    ]:
        torch.save(state, pickled / "pytorch_model.bin")
        refused(pickled, message, allow_pickle=True)
    for raw in (b"", b"PK\3\4" + bytes(100), b"hello"):
        (pickled / "pytorch_model.bin").write_bytes(raw)
        refused(pickled, "pytorch_model.bin: ", allow_pickle=True)


def test_without_torch_pickles_say_what_to_install(pickled, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(pickled, r"pip install 'edgeq\[torch\]'", allow_pickle=True)


# --- what a user may name ------------------------------------------------------------------------


def test_directories_and_gguf_files_resolve_to_themselves(single):
    (single / "m.gguf").write_bytes(b"")
    assert resolve_model(str(single)) == single
    assert resolve_model(single / "m.gguf") == single / "m.gguf"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "neither a directory nor a .gguf file. Give its directory: "),
        ("notes.md", "neither a directory nor a .gguf file. Give a GGUF file"),
        ("nowhere/at/all", "no such file or directory"),
        ("nowhere.gguf", "no such file or directory"),
    ],
)
def test_paths_to_no_model_are_refused_without_the_hub(name, message, single):
    (single / "notes.md").write_text("")
    with pytest.raises(ConversionError, match=message):
        resolve_model(str(single / name))


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for huggingface_hub that keeps what it was asked and raises or returns."""
    asked = types.SimpleNamespace(calls=[], answer=None)

    class HTTPError(Exception):
        pass

    class HfHubHTTPError(HTTPError, OSError):
        pass

    def snapshot_download(name, **options):
        asked.calls.append((name, options))
        if isinstance(asked.answer, Exception):
            raise asked.answer
        return asked.answer

    package = types.ModuleType("huggingface_hub")
    package.snapshot_download = snapshot_download
    errors = types.ModuleType("huggingface_hub.errors")
    errors.HfHubHTTPError = HfHubHTTPError
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    asked.http_error = HTTPError
    return asked


def test_a_hub_id_is_fetched_without_pickles_and_code(hub, single):
    hub.answer = str(single)
    assert resolve_model("org/model-1.5@v2") == single
    [(name, options)] = hub.calls
    assert (name, options["revision"]) == ("org/model-1.5", "v2")

    def fetched(file):
        wanted = any(fnmatch(file, pattern) for pattern in options["allow_patterns"])
        return wanted and not any(fnmatch(file, pattern) for pattern in options["ignore_patterns"])

    for file in ("config.json", "model.safetensors", INDEX, "tokenizer.json", "tokenizer.model"):
        assert fetched(file)
    for file in (
        "pytorch_model.bin",
        "modeling_x.py",
        "tokenizer.py",
        "chat_template.py",
        "original/model.safetensors",
        "consolidated.safetensors",
        "training_args.bin",
        "onnx/model.onnx",
        "m.gguf",
    ):
        assert not fetched(file)


@pytest.mark.parametrize("kind", [OSError, ValueError, "http"])
def test_a_hub_that_does_not_answer_says_what_to_do(kind, hub):
    hub.answer = (hub.http_error if kind == "http" else kind)("no route\nto host")
    message = r"org/model: no such directory, and the hub does not give it \(no route\)\. Fetch the"
    with pytest.raises(ConversionError, match=message):
        resolve_model("org/model")


def test_without_huggingface_hub_a_hub_id_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConversionError, match=r"pip install 'edgeq\[hub\]'.* give its directory"):
        resolve_model("org/model")
