import json
import math

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from converters.gguf_file import open_gguf
from edgeq.allocation import Plan, allocate, overrides, read_plan, write_tensor_type_file
from edgeq.errors import CalibrationError, RecipeError
from edgeq.runtime.presets import MixOptions, choose_types, quantize_with_llama_cpp
from tests import mix_gguf

T = GGMLQuantizationType


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    tensors = mix_gguf.weights(4, 576, 512, tied=True)
    path = tmp_path_factory.mktemp("plan") / "model.gguf"
    return mix_gguf.write(path, mix_gguf.fields(4, 576, 512, 9, 3), tensors, T.BF16)


@pytest.fixture
def edited(file, tmp_path):
    """Return a function that writes a plan with some of its JSON replaced."""

    def edit(change):
        allocate(file, "Q4_K_M", has_imatrix=True).write(tmp_path / "plan.json")
        content = json.loads((tmp_path / "plan.json").read_text())
        change(content)
        (tmp_path / "plan.json").write_text(json.dumps(content))
        return tmp_path / "plan.json"

    return edit


def test_a_preset_plan_counts_every_byte(file, tmp_path):
    plan = allocate(file, "q4_k", has_imatrix=False)
    assert plan.preset == "Q4_K_M"
    assert plan.ftype == 15
    assert list(plan.types) == list(file.tensors)
    quantize_with_llama_cpp(file.path, tmp_path / "out.gguf", "Q4_K_M", None)
    written = open_gguf(tmp_path / "out.gguf")
    assert plan.size_bytes == sum(info.n_bytes for info in written.tensors.values())
    assert plan.n_weights == file.n_parameters
    assert math.isclose(plan.bpw, 8 * plan.size_bytes / plan.n_weights)
    by_name = {entry.name: entry for entry in plan.entries}
    fallback = by_name["blk.0.attn_q.weight"]
    assert (fallback.qtype, fallback.size_bytes) == (T.Q5_0, 2 * 576 // 32 * 22)
    assert fallback.reason == "576 columns do not divide into Q4_K blocks of 256"
    assert by_name["blk.0.attn_norm.weight"].reason == "kept as F32"


def test_a_plan_reads_back_as_it_was_one_tensor_a_line(file, tmp_path):
    plan = allocate(file, "IQ3_M", has_imatrix=True)
    path = tmp_path / "plan.json"
    plan.write(path)
    assert read_plan(path, file) == plan
    lines = path.read_text().splitlines()
    assert len(lines) == len(plan.entries) + 8
    assert lines[5].startswith('  "tensors": {')
    assert '"blk.0.attn_q.weight": {"type": "IQ4_NL", "shape": [2, 576]' in path.read_text()
    assert json.loads(path.read_text())["size_bytes"] == plan.size_bytes


def test_an_edited_type_is_followed_and_counted_anew(file, edited):
    def change(content):
        content["tensors"]["blk.1.ffn_down.weight"] |= {"type": "q2_k", "reason": "I say so"}
        content["size_bytes"] = 7

    plan = read_plan(edited(change), file)
    entry = next(entry for entry in plan.entries if entry.name == "blk.1.ffn_down.weight")
    assert (entry.qtype, entry.size_bytes, entry.reason) == (T.Q2_K, 2 * 2 * 84, "I say so")
    assert plan.size_bytes == sum(entry.size_bytes for entry in plan.entries)


def test_types_alone_are_enough(file, edited):
    def change(content):
        tensors = content["tensors"]
        for name in tensors:
            tensors[name] = {"type": tensors[name]["type"]}
        del content["size_bytes"], content["bpw"]

    assert read_plan(edited(change), file).types == allocate(file, "Q4_K_M", has_imatrix=True).types


def tensor(name, value):
    return lambda content: content["tensors"].__setitem__(name, value)


Q = "blk.0.attn_q.weight"
BAD_PLANS = {
    "schema": (lambda c: c.update(schema=2), r"plan of schema 2, expected 1\. Make it anew"),
    "no schema": (lambda c: c.pop("schema"), r"schema None, expected 1"),
    "no tensors": (lambda c: c.pop("tensors"), r"no plan; it lacks 'preset' or 'tensors'"),
    "list": (lambda c: c.update(tensors=[]), r"no plan; it lacks 'preset' or 'tensors'"),
    "preset": (lambda c: c.update(preset="Q4_KM"), r"unknown preset 'Q4_KM'.*mean 'Q4_K_M'\?"),
    "missing": (
        lambda c: c["tensors"].pop(Q),
        r"1 of the 38 tensors of model\.gguf are missing, the first is blk\.0\.attn_q\.weight",
    ),
    "unknown": (
        tensor("blk.0.attn_w.weight", {"type": "Q8_0"}),
        r"model\.gguf has no tensor 'blk\.0\.attn_w\.weight'\. Did you mean 'blk\.0\.attn_\w",
    ),
    "type": (tensor(Q, {"type": "Q8_O"}), r"attn_q\.weight: unknown type 'Q8_O'.*mean 'Q8_0'\?"),
    "no encoder": (tensor(Q, {"type": "Q8_K"}), r"attn_q\.weight: unknown type 'Q8_K'"),
    "no type": (tensor(Q, {"shape": [2, 576]}), r"attn_q\.weight: got .*, expected \{\"type\""),
    "text": (tensor(Q, "Q8_0"), r"attn_q\.weight: got 'Q8_0', expected \{\"type\""),
    "row": (
        tensor(Q, {"type": "Q4_K"}),
        r"attn_q\.weight: 576 columns do not divide into Q4_K blocks of 256\. Choose Q8_0 or Q4_0",
    ),
    "shape": (tensor(Q, {"type": "Q8_0", "shape": [2, 512]}), r"shape \[2, 512\], but model\.gguf"),
    "norm": (
        tensor("output_norm.weight", {"type": "F16"}),
        r"output_norm\.weight: got F16, expected F32; llama\.cpp runs this tensor only as it is",
    ),
}


@pytest.mark.parametrize("bad", BAD_PLANS)
def test_a_plan_that_cannot_be_followed_is_refused_in_one_line(bad, file, edited):
    change, message = BAD_PLANS[bad]
    path = edited(change)
    with pytest.raises(RecipeError, match=message) as caught:
        read_plan(path, file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no readable plan"),
        ("[1]", r"got a list, expected an object"),
        ('{"schema": 1, "schema": 1}', r"'schema' stands there twice"),
        (b"\xff\xfe", r"no readable plan"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(text, message, file, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=message):
        read_plan(path, file)
    with pytest.raises(RecipeError, match="no readable plan"):
        read_plan(tmp_path / "none.json", file)


def test_a_plan_that_cannot_be_written_leaves_nothing(file, tmp_path):
    plan = allocate(file, "Q8_0", has_imatrix=False)
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(RecipeError, match="cannot be written"):
        plan.write(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_missing_importances_are_found_before_any_work(file):
    plan = allocate(file, "IQ2_XS", has_imatrix=True)
    plan.check_importances(file, lambda _name: True)
    message = r"^blk\.\d\.\w+\.weight: IQ2_XS in IQ2_XS needs importances"
    with pytest.raises(CalibrationError, match=message):
        plan.check_importances(file, lambda name: name == "token_embd.weight")
    allocate(file, "Q4_K_M", has_imatrix=True).check_importances(file, lambda _name: False)


def test_llama_cpp_follows_a_plan_given_as_overrides(file, tmp_path):
    plan = allocate(file, "Q3_K_L", has_imatrix=True)
    types = plan.types | {"blk.2.attn_k.weight": T.Q8_0}
    entries = tuple(
        type(entry)(entry.name, types[entry.name], entry.shape, 0, "") for entry in plan.entries
    )
    plan = Plan(plan.preset, entries)
    for base in ("Q8_0", "Q4_K_M"):
        options = MixOptions(overrides=overrides(plan))
        chosen = choose_types(file.path, base, has_imatrix=True, options=options)
        assert {name: choice.qtype for name, choice in chosen.items()} == plan.types


def test_the_tensor_type_file_names_every_matrix_exactly(file, tmp_path):
    plan = allocate(file, "Q4_K_M", has_imatrix=True)
    write_tensor_type_file(plan, tmp_path / "types.txt")
    lines = (tmp_path / "types.txt").read_text().splitlines()
    assert len(lines) == sum(len(info.shape) > 1 for info in file.tensors.values())
    assert r"^blk\.0\.attn_q\.weight$=q5_0" in lines
    assert np.all([" " not in line for line in lines])
