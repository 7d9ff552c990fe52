import contextlib
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from converters.errors import ConversionError
from converters.imatrix_file import (
    Imatrix,
    check_matches,
    merge_imatrices,
    read_imatrix,
    write_imatrix,
)

DATA = Path(__file__).parent / "data"
GOLDEN_GGUF = DATA / "golden_imatrix.gguf"  # both by llama-imatrix, of the tiny mixtral
GOLDEN_DAT = DATA / "golden_imatrix.dat"
CHUNK = 128
FLOAT32_ROUNDING = 3e-7  # .dat stores means times chunks: three float32 operations


def small(**changes):
    arguments = {
        "sums": {
            "blk.0.a.weight": np.array([[4.0, 9.0]], np.float32),
            "blk.0.b_exps.weight": np.array([[2.0, 6.0], [0.0, 0.0]], np.float32),
        },
        "counts": {"blk.0.a.weight": np.array([3]), "blk.0.b_exps.weight": np.array([2, 0])},
        "datasets": ("text.txt",),
        "chunk_count": 1,
        "chunk_size": 2,
    }
    return Imatrix(**(arguments | changes))


@pytest.mark.parametrize("path", [GOLDEN_GGUF, GOLDEN_DAT], ids=["gguf", "dat"])
def test_files_of_llama_imatrix_come_out_byte_for_byte(path, tmp_path):
    imatrix = read_imatrix(path, legacy_chunk_size=CHUNK)
    write_imatrix(tmp_path / path.name, imatrix)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_gguf_is_written_as_dat_byte_for_byte(tmp_path):
    write_imatrix(tmp_path / "out.dat", read_imatrix(GOLDEN_GGUF))
    assert (tmp_path / "out.dat").read_bytes() == GOLDEN_DAT.read_bytes()


def test_both_formats_give_the_same_weights():
    new, old = read_imatrix(GOLDEN_GGUF), read_imatrix(GOLDEN_DAT, legacy_chunk_size=CHUNK)
    assert new.sums.keys() == old.sums.keys()
    assert (new.chunk_count, new.chunk_size) == (old.chunk_count, old.chunk_size)
    assert new.datasets == old.datasets
    for name in new.sums:
        n_in = new.sums[name].shape[1]
        expected = new.weights(name)
        np.testing.assert_allclose(old.weights(name, n_in), expected, rtol=FLOAT32_ROUNDING)


def test_weights_are_means_and_ones_where_nothing_was_seen():
    imatrix = small()
    np.testing.assert_array_equal(imatrix.weights("blk.0.a.weight"), np.float32([[4 / 3, 3]]))
    np.testing.assert_array_equal(imatrix.weights("blk.0.b_exps.weight"), [[1, 3], [1, 1]])
    np.testing.assert_array_equal(imatrix.weights("blk.0.a.weight", 1), np.float32([[4 / 3], [3]]))


def test_unseen_experts_are_named():
    nothing = small(counts={"blk.0.a.weight": np.array([0]), "e": np.array([1, 0, 0])})
    assert small().unseen() == ["blk.0.b_exps.weight expert 1"]
    assert nothing.unseen() == ["blk.0.a.weight", "e expert 1", "e expert 2"]


def test_merging_halves_gives_the_whole():
    whole = read_imatrix(GOLDEN_GGUF)
    part = Imatrix(
        {name: (sums * np.float32(0.25)) for name, sums in whole.sums.items()},
        {name: counts // 2 for name, counts in whole.counts.items()},
        ("a",),
        1,
        CHUNK,
    )
    rest = Imatrix(
        {name: (sums * np.float32(0.75)) for name, sums in whole.sums.items()},
        {name: counts - counts // 2 for name, counts in whole.counts.items()},
        ("b",),
        1,
        CHUNK,
    )
    merged = merge_imatrices([part, rest])
    assert merged.datasets == ("a", "b")
    assert merged.chunk_count == whole.chunk_count
    for name in whole.sums:
        np.testing.assert_allclose(merged.sums[name], whole.sums[name], rtol=1e-6)
        np.testing.assert_array_equal(merged.counts[name], whole.counts[name])


def test_merging_spreads_a_single_count_over_experts():
    old = small(
        sums={"blk.0.b_exps.weight": np.array([[1.0, 1.0, 2.0, 2.0]], np.float32)},
        counts={"blk.0.b_exps.weight": np.array([4])},
    )
    merged = merge_imatrices([small(), old])
    np.testing.assert_array_equal(merged.sums["blk.0.b_exps.weight"], [[3, 7], [2, 2]])
    np.testing.assert_array_equal(merged.counts["blk.0.b_exps.weight"], [6, 4])


def test_merging_other_sizes_is_refused():
    other = small(sums={"blk.0.a.weight": np.zeros((1, 5), np.float32)})
    with pytest.raises(ConversionError, match=r"blk.0.a.weight: 5 values .* 2 in another"):
        merge_imatrices([small(), other])
    with pytest.raises(ConversionError, match="at least one"):
        merge_imatrices([])


FITTING = {"blk.0.a.weight": (2, 1), "blk.0.b_exps.weight": (2, 2), "token_embd.weight": (2, 1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blk.0.a.weight": (3, 1)}, r"has 2 values, expected 3 \(3 columns × 1 matrices\)"),
        ({"blk.0.b_exps.weight": (2, 3)}, "has 4 values, expected 6"),
        ({"blk.1.a.weight": (2, 1)}, "no entry for blk.1.a.weight, but for 1 other layers"),
    ],
)
def test_an_imatrix_of_another_model_is_refused(changes, message):
    check_matches(small(), FITTING, "i.gguf")
    with pytest.raises(ConversionError, match=f"i.gguf: .*{message}.*another model"):
        check_matches(small(), FITTING | changes, "i.gguf")


def test_an_imatrix_with_more_layers_is_refused():
    tensors = {"blk.0.a.weight": (2, 1)}
    with pytest.raises(ConversionError, match=r"blk.0.b_exps.weight is no tensor of the model"):
        check_matches(small(), tensors, "i.gguf")


def entry(name=b"t.weight", n_chunks=1, values=(1.0, 2.0), n_values=None, n_name=None):
    return (
        struct.pack("<i", len(name) if n_name is None else n_name)
        + name
        + struct.pack("<ii", n_chunks, len(values) if n_values is None else n_values)
        + np.array(values, "<f4").tobytes()
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated or no importance matrix"),
        (b"\x01\x00", "is truncated"),
        (struct.pack("<i", 0) + entry(), "0 entries"),
        (struct.pack("<i", -5) + entry(), "-5 entries"),
        (struct.pack("<i", 2**31 - 1) + entry(), "2147483647 entries"),
        (struct.pack("<i", 1) + entry(n_name=2**31 - 1), "takes 2147483647 bytes"),
        (struct.pack("<i", 1) + entry(n_name=-1), "takes -1 bytes"),
        (struct.pack("<i", 1) + entry(n_values=2**30), "takes 4294967296 bytes"),
        (struct.pack("<i", 1) + entry(values=(), n_values=-3) + b"....", "has -3 values"),
        (struct.pack("<i", 1) + entry(values=(), n_values=0) + b"....", "has 0 values"),
        (struct.pack("<i", 1) + entry(name=b""), "expected a name"),
        (struct.pack("<i", 1) + entry(name=b"\xff\xfe"), "not UTF-8"),
        (struct.pack("<i", 2) + entry() + entry(), "t.weight comes twice"),
        (struct.pack("<i", 1) + entry(values=(1.0, np.nan)), "value 1 is nan"),
        (struct.pack("<i", 1) + entry(values=(np.inf, 1.0)), "value 0 is inf"),
        (struct.pack("<i", 1) + entry(values=(1.0, -2.0)), "value 1 is -256.0"),
        (struct.pack("<i", 1) + entry() + b"\x01", "the number of chunks"),
        (struct.pack("<i", 1) + entry() + struct.pack("<ii", 1, 99), "takes 99 bytes"),
        (b"hello, I am a text and no importance matrix", "entries in"),
    ],
)
def test_damaged_dat_files_are_refused(content, message, tmp_path):
    path = tmp_path / "bad.dat"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=f"bad.dat: .*{re.escape(message)}"):
        read_imatrix(path, legacy_chunk_size=CHUNK)


@pytest.mark.parametrize("path", [GOLDEN_GGUF, GOLDEN_DAT], ids=["gguf", "dat"])
def test_every_truncation_is_refused_or_complete(path, tmp_path):
    content = path.read_bytes()
    whole = read_imatrix(path)
    cut = tmp_path / path.name
    complete = 0
    for size in range(0, len(content), 97):
        cut.write_bytes(content[:size])
        with contextlib.suppress(ConversionError):
            # only the optional trailer of a .dat file may lack
            assert read_imatrix(cut).sums.keys() == whole.sums.keys()
            complete += 1
    assert complete <= 1


@pytest.mark.parametrize("path", [GOLDEN_GGUF, GOLDEN_DAT], ids=["gguf", "dat"])
def test_damaged_bytes_are_refused_or_read(path, tmp_path):
    rng = np.random.RandomState(0)
    content = np.frombuffer(path.read_bytes(), np.uint8)
    headers = 2000  # most of the numbers that decide sizes are at the beginning
    for _ in range(300):
        damaged = content.copy()
        at = rng.randint(rng.choice([headers, len(content)]), size=rng.randint(1, 6))
        damaged[at] = rng.randint(256, size=len(at))
        (tmp_path / path.name).write_bytes(damaged.tobytes())
        with contextlib.suppress(ConversionError):  # anything else fails the test
            imatrix = read_imatrix(tmp_path / path.name)
            assert all(np.isfinite(sums).all() for sums in imatrix.sums.values())


def with_tensors(path, sums, counts, **metadata):
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    for key, value in ({"chunk_count": 1, "chunk_size": 512} | metadata).items():
        if isinstance(value, str):
            writer.add_string(f"imatrix.{key}", value)
        else:
            writer.add_uint32(f"imatrix.{key}", value)
    if sums is not None:
        writer.add_tensor("t.weight.in_sum2", sums)
    if counts is not None:
        writer.add_tensor("t.weight.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ONES = np.ones((2, 3), np.float32)
COUNTS = np.ones((2, 1), np.float32)


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        (ONES, None, "has .in_sum2 alone"),
        (None, COUNTS, "has .counts alone"),
        (ONES, np.ones((4, 1), np.float32), "6 values do not divide into 4 counts"),
        (ONES * np.float32(np.nan), COUNTS, "value 0 is nan"),
        (-ONES, COUNTS, "value 0 is -1.0"),
        (ONES, COUNTS * np.float32(np.inf), "a count is inf"),
        (ONES, COUNTS * np.float32(np.nan), "a count is nan"),
        (ONES, COUNTS * np.float32(1e30), "a count is 1"),
        (ONES, -COUNTS, "a count is -1"),
        (ONES.astype(np.float16), COUNTS, "has type F16, expected F32"),
        (None, None, "not an importance matrix"),
    ],
)
def test_damaged_gguf_files_are_refused(sums, counts, message, tmp_path):
    with_tensors(tmp_path / "bad.gguf", sums, counts)
    with pytest.raises(ConversionError, match=f"bad.gguf.*{re.escape(message)}"):
        read_imatrix(tmp_path / "bad.gguf")


def test_metadata_of_another_type_is_refused(tmp_path):
    with_tensors(tmp_path / "bad.gguf", ONES, COUNTS, chunk_count="many")
    with pytest.raises(ConversionError, match="another type"):
        read_imatrix(tmp_path / "bad.gguf")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConversionError, match=r"nowhere.dat: cannot be read"):
        read_imatrix(tmp_path / "nowhere.dat")


@pytest.mark.parametrize("name", ["out.dat", "out.gguf"])
def test_a_failed_write_leaves_nothing(name, tmp_path):
    with pytest.raises(ConversionError, match="saw no input"):
        write_imatrix(tmp_path / name, small(sums={}, counts={}))
    with pytest.raises(ConversionError):
        write_imatrix(tmp_path / "missing" / name, small())
    assert list(tmp_path.iterdir()) == []


def test_zero_chunks_of_a_dat_file_mean_values_as_they_are(tmp_path):
    path = tmp_path / "zero.dat"
    path.write_bytes(struct.pack("<i", 1) + entry(n_chunks=0, values=(3.0, 5.0)))
    np.testing.assert_array_equal(read_imatrix(path).weights("t.weight"), [[3, 5]])
