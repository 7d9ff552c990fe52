"""What lies on the grid of its type already is found, kept without loss, and told."""

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.gguf_file import TensorSource, open_gguf, write_gguf
from edgeq.grids import GRIDS, lies_on_grid
from edgeq.runtime.encoders import decode, encode
from tests.command_line import done

T = GGMLQuantizationType
OFF = "blk.1.ffn_up.weight"  # fine-tuned in float, as some layers of such checkpoints are
KEPT = "blk.0.ffn_down.weight"


def on_grid(values, qtype):
    rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]))
    return decode(encode(rows, qtype), qtype).reshape(values.shape)


def coarse(values, qtype):
    """The same with blocks whose largest weight is a power of two, as 16 bits hold them."""
    blocks = values.reshape(-1, 32 if qtype == T.Q4_0 else 256)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    scaled = blocks * np.exp2(np.round(np.log2(largest))) / largest
    return scaled.astype(np.float32).reshape(values.shape)


def trained_for(qtype, source, path, *, but=(OFF,), stored=T.F32):
    """Write the model whose matrices are what blocks of a type decode to, as QAT leaves them."""
    file = open_gguf(source)

    def tensor(name, info):
        values = file.read_float(name)
        if len(info.shape) < 2:
            return TensorSource(name, info.qtype, info.shape, lambda: file.read_bytes(name))
        if name not in but:
            values = on_grid(values, qtype)
            if stored != T.F32:
                values = on_grid(coarse(values, qtype), qtype)
        rows = encode(np.ascontiguousarray(values), stored)
        return TensorSource(name, stored, info.shape, lambda: rows)

    sources = [tensor(name, info) for name, info in file.tensors.items()]
    return write_gguf(path, file.fields, sources)[0]


@pytest.fixture(scope="module")
def broad(built_checkpoint, tmp_path_factory):
    """A float GGUF whose rows are blocks of 256."""
    out = tmp_path_factory.mktemp("broad") / "broad.gguf"
    convert(open_checkpoint(built_checkpoint), out, ftype="f32")
    return out


@pytest.mark.parametrize(
    ("qtype", "stored"),
    [*((qtype, T.F32) for qtype in GRIDS), (T.Q4_0, T.F16), (T.Q4_0, T.BF16), (T.TQ2_0, T.BF16)],
)
def test_a_grid_is_found_in_the_precision_that_it_is_stored_in(qtype, stored, broad, tmp_path):
    path = trained_for(qtype, broad, tmp_path / "qat.gguf", stored=stored)
    file = open_gguf(path)
    matrices = [name for name, info in file.tensors.items() if len(info.shape) == 2]
    found = {name: {q for q in GRIDS if lies_on_grid(file, name, q)} for name in matrices}
    assert found.pop(OFF) == set()
    assert all(qtype in grids for grids in found.values())
    assert not any(lies_on_grid(file, name, T.Q4_1) for name in matrices)
    assert not any(lies_on_grid(open_gguf(broad), name, q) for name in matrices for q in GRIDS)


def test_one_weight_off_the_grid_is_seen(broad, tmp_path):
    qat = open_gguf(trained_for(T.Q4_0, broad, tmp_path / "qat.gguf"))
    values = qat.read_float(KEPT).copy()
    values[1, 5] *= np.float32(1.001)  # not in a row that is looked at first
    source = TensorSource(KEPT, T.F32, values.shape, lambda: encode(values, T.F32))
    zeros = np.zeros_like(values)
    other = TensorSource("zeros.weight", T.F32, values.shape, lambda: encode(zeros, T.F32))
    file = open_gguf(write_gguf(tmp_path / "one.gguf", qat.fields, [source, other])[0])
    assert lies_on_grid(qat, KEPT, T.Q4_0)
    assert not lies_on_grid(file, KEPT, T.Q4_0)
    assert not lies_on_grid(file, "zeros.weight", T.Q4_0)


@pytest.mark.parametrize(
    ("qtype", "quantizer"),
    [(T.Q4_0, "auto"), (T.Q4_0, "gptq:sweeps=0"), (T.TQ2_0, "gptq:sweeps=0"), (T.Q8_0, "auto")],
)
def test_an_export_keeps_them(qtype, quantizer, broad, texts, tmp_path):
    qat = trained_for(qtype, broad, tmp_path / "qat.gguf")
    out = tmp_path / "out.gguf"
    flags = ["--type", qtype.name, "--quantizer", quantizer, "--effort", "fast", "--transform"]
    flags += ["fold", "--text", texts[0], "--ctx", 64, "--chunks", 8, "--no-prove", "--json"]
    report = done("export", qat, out, *flags).json()
    before, after = open_gguf(qat), open_gguf(out)
    kept = {n for n, t in after.tensors.items() if t.qtype == qtype and n != OFF}
    assert KEPT in kept
    for name in kept:
        np.testing.assert_array_equal(after.read_float(name), before.read_float(name), name)
    assert not np.array_equal(after.read_float(OFF), before.read_float(OFF))
    why = f"lies on the grid of {qtype.name}, kept without loss"
    facts = report["rounding"]["tensors"]
    assert {name for name, fact in facts.items() if fact == {"kept": why}} == kept
    assert "kept" not in facts[OFF]
    assert report["tensors"][KEPT]["reason"].endswith(f"; {why}")
    assert f"{len(kept)} of the tensors: {why}." in report["notes"]
    folds = report["rounding"]["folds"]
    reasons = [fold["reason"] for fold in folds.values() if why in fold.get("reason", "")]
    assert len(reasons) == len(folds)  # every site has a tensor that is kept
    plain = done("export", qat, tmp_path / "rtn.gguf", *flags[:2], "--quantizer", "rtn", *flags[8:])
    assert not any(why in note for note in plain.json()["notes"])


def test_another_type_is_told_what_would_be_kept(broad, tmp_path):
    qat = trained_for(T.Q4_0, broad, tmp_path / "qat.gguf")
    flags = ("--type", "Q6_K", "--no-imatrix", "--no-prove", "--json")
    report = done("export", qat, tmp_path / "out.gguf", *flags).json()
    n = sum(len(t.shape) == 2 for t in open_gguf(qat).tensors.values()) - 1
    told = f"{n} of the tensors lie on the grid of Q4_0 and get another type here: --type Q4_0"
    assert any(note.startswith(told) for note in report["notes"])


def test_tuning_leaves_them_alone(broad, texts, tmp_path):
    pytest.importorskip("torch")
    qat = trained_for(T.Q4_0, broad, tmp_path / "qat.gguf")
    flags = ["--type", "Q4_0", "--quantizer", "gptq:sweeps=0", "--tune", 2, "--text", texts[0]]
    flags += ["--ctx", 64, "--chunks", 4, "--no-prove", "--fisher", 0]
    done("export", qat, tmp_path / "out.gguf", *flags)
    before, after = open_gguf(qat), open_gguf(tmp_path / "out.gguf")
    np.testing.assert_array_equal(after.read_float(KEPT), before.read_float(KEPT))
    norm = "blk.0.attn_norm.weight"
    assert not np.array_equal(after.read_float(norm), before.read_float(norm))
