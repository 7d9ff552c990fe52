import errno
import io
import os
import shutil
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import GGUFValueType as Kind

from converters import ConversionError, open_gguf, write_gguf
from converters.gguf_file import Field, TensorSource

ARCHITECTURE = {"general.architecture": Field("llama", Kind.STRING)}
TENSOR_BYTES = 16 << 20
CONSTANT_BYTES = 4 << 20  # two chunks of 1 MiB and what Python needs


def source(name="w", qtype=Type.F32, shape=(4, 8), load=None):
    return TensorSource(name, qtype, shape, load or (lambda: np.ones(shape, np.float32)))


@pytest.fixture
def out(tmp_path):
    """Where a file lies already, alone in its directory."""
    path = tmp_path / "out.gguf"
    path.write_bytes(b"what was there before")
    return path


def untouched(out):
    return os.listdir(out.parent) == [out.name] and out.read_bytes() == b"what was there before"


# --- what is written -----------------------------------------------------------------------------


def test_the_stock_reader_reads_it(tmp_path):
    fields = {
        "k": Field(0.5, Kind.FLOAT32),
        "general.architecture": Field("llama", Kind.STRING),
        "ids": Field([3, 4], Kind.ARRAY, Kind.UINT16),
    }
    weight = np.arange(32, dtype=np.float32).reshape(4, 8)
    [path] = write_gguf(tmp_path / "f.gguf", fields, [source(load=lambda: weight)])
    reader = GGUFReader(path)
    names = [name for name in reader.fields if not name.startswith("GGUF.")]
    assert names == ["general.architecture", "k", "ids"]
    assert reader.fields["ids"].contents() == [3, 4]
    np.testing.assert_array_equal(reader.tensors[0].data, weight)
    assert os.listdir(tmp_path) == ["f.gguf"]


def test_numbers_of_numpy_and_beyond_int64_are_taken(tmp_path):
    fields = {
        "large": Field([0, 1 << 63], Kind.ARRAY, Kind.UINT64),
        "array": Field(np.arange(3, dtype=np.int16), Kind.ARRAY, Kind.INT32),
        "scalar": Field(np.float32(0.5), Kind.FLOAT32),
        "tuple": Field((True, False), Kind.ARRAY, Kind.BOOL),
        "whole": Field([1, 2.5], Kind.ARRAY, Kind.FLOAT32),
    }
    file = open_gguf(write_gguf(tmp_path / "f.gguf", fields, [])[0])
    values = [file.value(key) for key in fields]
    assert values == [[0, 1 << 63], [0, 1, 2], 0.5, [True, False], [1.0, 2.5]]


def test_an_existing_file_is_replaced_and_modes_follow_the_umask(out):
    before = os.umask(0o027)
    try:
        write_gguf(out, ARCHITECTURE, [source()])
    finally:
        os.umask(before)
    assert open_gguf(out).architecture == "llama"
    assert out.stat().st_mode & 0o777 == 0o640
    assert os.listdir(out.parent) == [out.name]


@pytest.mark.parametrize(
    ("qtype", "array"),
    [
        (Type.F32, np.arange(64, dtype=np.float32).reshape(2, 32)),
        (Type.F16, np.arange(64, dtype=np.float16).reshape(2, 32)),
        (Type.BF16, np.arange(64, dtype=np.uint16).reshape(2, 32)),
        (Type.I32, np.arange(64, dtype=np.int32).reshape(2, 32)),
        (Type.Q8_0, np.arange(68, dtype=np.uint8).reshape(2, 34)),
        (Type.Q8_0, np.arange(68, dtype=np.uint8)),
        (Type.F32, np.arange(256, dtype=np.uint8)),
        (Type.F32, np.arange(64, dtype=np.float32).reshape(32, 2).T),
        (Type.F16, np.arange(256, dtype=np.float16).reshape(4, 64)[::2, ::2]),
    ],
    ids=["f32", "f16", "bf16", "i32", "packed", "flat", "bytes", "transposed", "strided"],
)
def test_native_and_packed_arrays_are_taken(qtype, array, tmp_path):
    write_gguf(tmp_path / "f.gguf", {}, [source("w", qtype, (2, 32), lambda: array)])
    assert open_gguf(tmp_path / "f.gguf").read_bytes("w").tobytes() == array.tobytes()


def test_experts_and_scalars_keep_their_shapes(tmp_path):
    experts = np.arange(64, dtype=np.float32).reshape(2, 4, 8)
    tensors = [
        source("e", shape=(2, 4, 8), load=lambda: experts.transpose(0, 1, 2)),
        source("t", shape=(4, 2, 8), load=lambda: experts.transpose(1, 0, 2)),
        source("s", shape=(), load=lambda: np.float32(3).reshape(())),
    ]
    write_gguf(tmp_path / "f.gguf", {}, tensors)
    file = open_gguf(tmp_path / "f.gguf")
    np.testing.assert_array_equal(file.read_float("e"), experts)
    np.testing.assert_array_equal(file.read_float("t"), experts.transpose(1, 0, 2))
    assert file.read_float("s") == 3


def test_alignment_is_taken_from_the_fields_or_the_argument(tmp_path):
    path = tmp_path / "f.gguf"
    tensors = [source("a", shape=(1,)), source("b", shape=(1,))]
    for fields, alignment, expected in [
        ({}, None, None),
        ({}, 32, None),
        ({}, 64, 64),
        ({"general.alignment": Field(128, Kind.UINT32)}, None, 128),
        ({"general.alignment": Field(128, Kind.UINT32)}, 32, 32),
    ]:
        for limit in (None, 128):
            paths = write_gguf(path, fields, tensors, alignment=alignment, split_max_bytes=limit)
            file = open_gguf(paths[0])
            assert file.value("general.alignment") == expected
            assert all(t.offset % (expected or 32) == 0 for t in file.tensors.values())


def test_split_keys_are_made_anew(tmp_path):
    stale = {key: Field(9, Kind.UINT16) for key in ("split.no", "split.count")}
    [path] = write_gguf(tmp_path / "f.gguf", ARCHITECTURE | stale, [source()])
    assert b"split." not in path.read_bytes()


def test_parts_are_no_larger_than_asked_for(tmp_path):
    tensors = [source(f"t{i}", shape=(8,)) for i in range(7)]
    paths = write_gguf(tmp_path / "model.gguf", ARCHITECTURE, tensors, split_max_bytes=100)
    assert [path.name for path in paths] == [f"model-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path)) == [path.name for path in paths]
    reader = GGUFReader(paths[1])
    split = {key: reader.fields[key] for key in reader.fields if key.startswith("split.")}
    assert {key: field.contents() for key, field in split.items()} == {
        "split.no": 1,
        "split.tensors.count": 7,
        "split.count": 3,
    }
    assert [field.types[0].name for field in split.values()] == ["UINT16", "INT32", "UINT16"]
    assert [tensor.name for tensor in reader.tensors] == ["t3", "t4", "t5"]


def test_one_part_that_holds_all_is_not_numbered(tmp_path):
    paths = write_gguf(tmp_path / "f.gguf", ARCHITECTURE, [source()], split_max_bytes=128)
    assert paths == [tmp_path / "f.gguf"]


def test_a_tensor_larger_than_a_part_is_refused(tmp_path):
    tensors = [source("a", shape=(8,)), source("big", shape=(64, 8))]
    with pytest.raises(ConversionError, match="big: takes 2048 bytes, more than a part of at most"):
        write_gguf(tmp_path / "f.gguf", {}, tensors, split_max_bytes=2047)
    assert os.listdir(tmp_path) == []


def test_progress_adds_up_to_the_data(tmp_path):
    seen = []
    tensors = [source("a", shape=(1000, 2000)), source("b", shape=(3,))]
    write_gguf(tmp_path / "f.gguf", {}, tensors, progress=seen.append)
    assert sum(seen) == 8_000_012
    assert max(seen) == 1 << 20


def test_tensors_stream_one_at_a_time(tmp_path):
    alive = []

    def load():
        assert all(reference() is None for reference in alive)
        array = np.ones(TENSOR_BYTES // 4, np.float32)
        alive.append(weakref.ref(array))
        return array

    tensors = [source(f"t{i}", shape=(TENSOR_BYTES // 4,), load=load) for i in range(4)]
    tracemalloc.start()
    write_gguf(tmp_path / "f.gguf", ARCHITECTURE, tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(alive) == 4
    assert peak < 1.2 * TENSOR_BYTES + CONSTANT_BYTES


def test_a_transposed_tensor_is_not_copied_whole(tmp_path):
    n = 2048
    weight = np.ones((n, n), np.float32).T
    tracemalloc.start()
    write_gguf(tmp_path / "f.gguf", {}, [source("w", shape=(n, n), load=lambda: weight)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < CONSTANT_BYTES


# --- what cannot be written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (Field(-1, Kind.UINT32), "'k' cannot be written; got -1, expected UINT32"),
        (Field(256, Kind.UINT8), "got 256, expected UINT8"),
        (Field(1.5, Kind.INT32), "got 1.5, expected INT32"),
        (Field("x", Kind.FLOAT32), "got 'x', expected FLOAT32"),
        (Field(1e39, Kind.FLOAT32), r"got 1e\+39, expected FLOAT32"),
        (Field(1, Kind.BOOL), "got 1, expected BOOL"),
        (Field(None, Kind.STRING), "got None, expected STRING"),
        (Field("\ud800", Kind.STRING), "expected STRING"),
        (Field([1], Kind.INT32), r"got \[1\], expected INT32"),
        (Field([1, "a"], Kind.ARRAY, Kind.INT32), "expected ARRAY of INT32"),
        (Field([1.5], Kind.ARRAY, Kind.INT32), "expected ARRAY of INT32"),
        (Field([True], Kind.ARRAY, Kind.INT32), "an item is bool"),
        (Field(["1"], Kind.ARRAY, Kind.INT32), "an item is str"),
        (Field("abc", Kind.ARRAY, Kind.STRING), "a text is no array"),
        (Field([[1]], Kind.ARRAY, Kind.ARRAY), "an array needs an item type other than ARRAY"),
        (Field([1], Kind.ARRAY), "an array needs an item type"),
        (Field(7, Kind.ARRAY, Kind.INT32), "got 7, expected ARRAY of INT32"),
    ],
    ids=str,
)
def test_values_that_their_type_cannot_hold_are_refused(field, message, out):
    with pytest.raises(ConversionError, match=message):
        write_gguf(out, ARCHITECTURE | {"k": field}, [source()])
    assert untouched(out)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([source(), source()], "'w': given twice"),
        ([source("n" * 64)], "got 64 bytes, expected UTF-8 of at most 63"),
        ([source("\ud800")], "the name cannot be written"),
        ([source(shape=(1,) * 5)], r"got the shape \(1, 1, 1, 1, 1\), expected at most 4"),
        ([source(shape=(2, 0))], "dimensions of 1 or more"),
        ([source(qtype=Type.Q4_K, shape=(2, 32))], "'w': Q4_K: a row of 32 weights does not"),
    ],
    ids=["twice", "long name", "name", "dimensions", "empty", "blocks"],
)
def test_tensors_that_the_format_cannot_hold_are_refused(tensors, message, out):
    with pytest.raises(ConversionError, match=message):
        write_gguf(out, ARCHITECTURE, tensors)
    assert untouched(out)


@pytest.mark.parametrize("key", ["", "\ud800"], ids=["empty", "surrogate"])
def test_keys_that_the_format_cannot_hold_are_refused(key, out):
    with pytest.raises(ConversionError, match="cannot be written"):
        write_gguf(out, {key: Field(1, Kind.UINT8)}, [])
    assert untouched(out)


@pytest.mark.parametrize("alignment", [0, 48, 1 << 20])
def test_alignments_that_are_none_are_refused(alignment, out):
    with pytest.raises(ConversionError, match="expected a power of two up to 65536"):
        write_gguf(out, ARCHITECTURE, [source()], alignment=alignment)
    assert untouched(out)


@pytest.mark.parametrize(
    "array",
    [
        np.ones((8, 4), np.float32),
        np.ones((4, 8), np.float64),
        np.ones((4, 8), ">f4"),
        np.ones((4, 7), np.float32),
        np.ones(32, np.float32),
        np.ones(127, np.uint8),
        np.ones((8, 16), np.uint8),
    ],
    ids=["transposed", "float64", "big-endian", "short", "flat", "bytes", "packed otherwise"],
)
def test_arrays_that_break_their_promise_are_refused(array, out):
    with pytest.raises(ConversionError, match=r"w: its source gives .* expected .* for F32"):
        write_gguf(out, ARCHITECTURE, [source("a"), source("w", load=lambda: array)])
    assert untouched(out)


def raising(error):
    def load():
        raise error

    return load


@pytest.mark.parametrize("split", [None, 128], ids=["one file", "parts"])
@pytest.mark.parametrize(
    ("raised", "seen", "message"),
    [
        (RuntimeError("numerics"), RuntimeError, "numerics"),
        (KeyboardInterrupt("^C"), KeyboardInterrupt, r"\^C"),
        (ConversionError("blk.0: no"), ConversionError, "blk.0: no"),
        (OSError(errno.EIO, "bad sector"), ConversionError, "w: cannot be read .*bad sector"),
    ],
    ids=["bug", "interrupt", "refusal", "source unreadable"],
)
def test_whatever_a_source_raises_leaves_nothing(raised, seen, message, split, out):
    tensors = [source("a"), source("b"), source("w", load=raising(raised)), source("z")]
    with pytest.raises(seen, match=message):
        write_gguf(out, ARCHITECTURE, tensors, split_max_bytes=split)
    assert untouched(out)


class FullDisk(io.FileIO):
    """A file on a device that has no space left after 1 MiB."""

    def write(self, data):
        if self.tell() + len(data) > 1 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("n_rows", [100, 1000], ids=["at the flush", "in the data"])
def test_a_full_disk_ends_in_one_line_and_leaves_nothing(n_rows, out, monkeypatch):
    def open_full(path, _mode):
        return io.BufferedWriter(FullDisk(path, "w"), 8 << 20)

    monkeypatch.setattr("gguf.gguf_writer.open", open_full, raising=False)
    tensors = [source(f"t{i}", shape=(n_rows, 1000)) for i in range(4)]
    with pytest.raises(ConversionError, match=r"out.gguf: no space left on the device\. Free"):
        write_gguf(out, ARCHITECTURE, tensors)
    assert untouched(out)


def test_a_file_size_limit_ends_in_one_line_and_leaves_nothing(out):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(ConversionError, match=r"out.gguf: cannot be written .*File too large"):
            write_gguf(out, ARCHITECTURE, [source(shape=(2000, 1000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert untouched(out)


def test_a_disk_too_small_is_known_before_the_first_tensor(out, monkeypatch):
    usage = shutil.disk_usage(out.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ConversionError, match="no space left on the device; 4000 bytes needed, 10"):
        write_gguf(out, ARCHITECTURE, [source(shape=(1000,), load=raising(RuntimeError()))])
    assert untouched(out)


@pytest.mark.parametrize("what", ["data", "metadata", "cut"])
def test_what_reads_back_different_is_not_written(what, out, monkeypatch):
    sync = os.fsync

    def damage(handle):
        sync(handle)
        [temporary] = out.parent.glob(".out.gguf.*.tmp")
        raw = temporary.read_bytes()
        damaged = {
            "data": raw[:-1] + b"\x99",
            "metadata": raw.replace(b"llama", b"lLama"),
            "cut": raw[:-8],
        }[what]
        temporary.write_bytes(damaged)

    monkeypatch.setattr(os, "fsync", damage)
    expected = {
        "data": "out.gguf: w reads back different",
        "metadata": "metadata general.architecture reads back different",
        "cut": "the file is truncated",
    }[what]
    with pytest.raises(ConversionError, match=expected):
        write_gguf(out, ARCHITECTURE, [source()])
    assert untouched(out)


def test_a_rename_that_fails_leaves_no_parts(tmp_path, monkeypatch):
    replace, n_calls = os.replace, 0

    def fail_second(before, after):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        replace(before, after)

    monkeypatch.setattr(os, "replace", fail_second)
    tensors = [source(f"t{i}", shape=(8,)) for i in range(3)]
    with pytest.raises(ConversionError, match="cannot be written"):
        write_gguf(tmp_path / "f.gguf", ARCHITECTURE, tensors, split_max_bytes=32)
    assert os.listdir(tmp_path) == []


def test_paths_that_cannot_be_written_are_refused_before_the_first_tensor(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "directory.gguf").mkdir()
    never = source(load=raising(RuntimeError()))
    for path, message in [
        (tmp_path / "nowhere" / "f.gguf", "there is no directory .*nowhere"),
        (tmp_path / "file" / "f.gguf", "there is no directory"),
        (tmp_path / "directory.gguf", "not a file, and will not be replaced"),
        (Path("/dev/null"), "not a file, and will not be replaced"),
        (Path("."), "not a file name"),
        (tmp_path / ("n" * 250 + ".gguf"), "cannot be written .*File name too long"),
    ]:
        with pytest.raises(ConversionError, match=message):
            write_gguf(path, ARCHITECTURE, [never])


def test_a_directory_without_permission_is_refused(tmp_path):
    if os.geteuid() == 0:  # root may write anywhere but into the kernel's own tree
        directory = Path("/sys")
    else:
        directory = tmp_path
        directory.chmod(0o500)
    with pytest.raises(ConversionError, match=r"f.gguf: cannot be written \(.*Give a path that"):
        write_gguf(directory / "f.gguf", ARCHITECTURE, [source(load=raising(RuntimeError()))])
