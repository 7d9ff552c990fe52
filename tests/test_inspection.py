import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from converters.gguf_file import Field, TensorSource, write_gguf
from edgeq.inspection import inspect
from edgeq.runtime.encoders import encode

F32, Q8_0, Q4_0 = (GGMLQuantizationType[name] for name in ("F32", "Q8_0", "Q4_0"))
TEXT = GGUFValueType.STRING


def weight(seed, shape=(4, 64)):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def write(path, tensors, fields=None, **options):
    """Write arrays; a value is (array, type)."""

    def source(name, array, qtype):
        return TensorSource(name, qtype, array.shape, lambda: encode(array, qtype).reshape(-1))

    metadata = {"general.architecture": Field("llama", TEXT)} | (fields or {})
    sources = [source(name, *value) for name, value in tensors.items()]
    return write_gguf(path, metadata, sources, **options)[0]


def test_types_are_added_up_largest_first(tmp_path):
    tensors = {
        "a": (weight(1), Q4_0),
        "b": (weight(2, (64, 64)), Q8_0),
        "c": (weight(3), Q4_0),
        "d": (weight(4, (1, 32)), F32),
    }
    path = write(tmp_path / "m.gguf", tensors)
    found = inspect(path)
    totals = [(t.qtype, t.n_tensors, t.n_parameters, t.n_bytes) for t in found.types]
    assert totals == [("Q8_0", 1, 4096, 4352), ("Q4_0", 2, 512, 288), ("F32", 1, 32, 128)]
    assert found.n_parameters == 4640
    assert found.size_bytes == path.stat().st_size
    assert found.bpw == pytest.approx(8 * found.size_bytes / 4640)
    assert "| Q4_0 |       2 |        512 |   288 |  4.500 |" in found.as_text()
    assert f"{path}: llama, 4,640 parameters, " in found.as_text()


def test_the_parts_of_a_file_are_one(tmp_path):
    tensors = {name: (weight(1), F32) for name in "abcd"}
    first = write(tmp_path / "m.gguf", tensors, split_max_bytes=2048)
    parts = list(tmp_path.glob("*.gguf"))
    assert len(parts) == 2
    found = inspect(first)
    assert found.size_bytes == sum(part.stat().st_size for part in parts)
    assert found.types[0].n_tensors == 4


def test_every_kind_of_difference_is_named(tmp_path):
    a, b = weight(1), weight(2)
    one = {"same": (a, F32), "data": (a, F32), "type": (a, Q4_0), "shape": (a, F32)}
    other = {"same": (a, F32), "data": (b, F32), "type": (a, F32)}
    path = write(tmp_path / "one.gguf", {**one, "mine": (a, F32)})
    against = write(
        tmp_path / "other.gguf",
        {**other, "shape": (a.reshape(2, 128), F32), "yours": (a, F32)},
    )
    found = inspect(path, against=against)
    differences = {d.name: (d.change, d.relative_error) for d in found.differences}
    assert set(differences) == {"data", "type", "shape", "mine", "yours"}
    assert differences["data"] == ("data", pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b)))
    assert differences["type"][0] == "Q4_0 against F32"
    assert 0.03 < differences["type"][1] < 0.12  # four bits
    assert differences["shape"] == ("(4, 64) against (2, 128)", None)
    assert differences["mine"] == ("only in one.gguf", None)
    assert differences["yours"] == ("only in other.gguf", None)
    text = found.as_text()
    assert "| 5 tensors differ |" in text
    assert "only in other.gguf" in text


def test_an_error_against_zeros_is_absolute(tmp_path):
    a = weight(1)
    path = write(tmp_path / "a.gguf", {"x": (a, F32)})
    zeros = write(tmp_path / "b.gguf", {"x": (a * 0, F32)})
    (difference,) = inspect(path, against=zeros).differences
    assert difference.relative_error == pytest.approx(np.linalg.norm(a))


def test_equal_files_are_said_to_be_equal(tmp_path):
    tensors = {"x": (weight(1), Q8_0)}
    paths = [write(tmp_path / name, tensors) for name in ("a.gguf", "b.gguf")]
    found = inspect(paths[0], against=paths[1])
    assert found.differences == ()
    assert "The tensors of both files are equal, byte for byte." in found.as_text()


def test_provenance_is_read_and_metadata_only_on_request(tmp_path):
    fields = {
        "edgeq.recipe": Field('{"preset": "Q4_0"}', TEXT),
        "edgeq.broken": Field("{no json", TEXT),
        "quantize.imatrix.file": Field("[i].gguf", TEXT),
        "general.name": Field("x", TEXT),
        "list": Field(list(range(9)), GGUFValueType.ARRAY, GGUFValueType.INT32),
        "long": Field("y" * 500, TEXT),
    }
    path = write(tmp_path / "m.gguf", {"x": (weight(1), F32)}, fields)
    found = inspect(path)
    assert found.metadata == {}
    assert found.provenance == {
        "edgeq.recipe": {"preset": "Q4_0"},
        "edgeq.broken": "{no json",
        "quantize.imatrix.file": "[i].gguf",
    }
    text = inspect(path, metadata=True).as_text()
    assert "  list = [0, 1, 2, 3, 4, … 9 in all]\n" in text
    assert "  long = " + "y" * 400 + "… (500 characters)" in text
    assert '  edgeq.recipe = {"preset": "Q4_0"}\n' in text
    assert "edgeq.recipe" not in inspect(path, metadata=True).metadata


def test_names_of_tensors_do_not_control_the_terminal(tmp_path):
    path = write(tmp_path / "a.gguf", {"x\x1b[2J\n": (weight(1), F32)})
    against = write(tmp_path / "b.gguf", {"x": (weight(1), F32)})
    text = inspect(path, against=against).as_text()
    assert "\x1b" not in text
    assert "| x\\x1b[2J\\n " in text


def test_a_file_without_tensors_is_shown(tmp_path):
    path = write(tmp_path / "empty.gguf", {})
    found = inspect(path)
    assert found.types == ()
    assert "llama, 0 parameters" in found.as_text()
