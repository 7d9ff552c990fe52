"""Costs, measurements in a loaded model, and what a target makes of them, on tiny models."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from converters.gguf_file import open_gguf
from edgeq import costing, measuring, pipeline, planning
from edgeq.allocation import Budget, Problem, read_plan
from edgeq.allocation.costs import read_costs, write_costs
from edgeq.allocation.knapsack import Knapsack
from edgeq.console import Steps
from edgeq.costing import TYPES, make_costs, parse_types
from edgeq.errors import CalibrationError, RecipeError, RuntimeLibraryError
from edgeq.evaluation import evaluate
from edgeq.execution import Here
from edgeq.measuring import Ground, Measurer
from edgeq.opening import prepare_texts, values_sha256
from edgeq.planning import Planner
from edgeq.recipe import Recipe, Target, TextChoice
from edgeq.roundings import Roundings
from edgeq.runtime.encoders import decode, encode
from edgeq.runtime.patching import PatchableModel
from edgeq.workdir import WorkDirectory
from tests import tiny_gguf
from tests.command_line import done, refused

_T = GGMLQuantizationType
NAME = "blk.1.ffn_down.weight"
SHORT = ("--ctx", 64, "--chunks", 8, "--eval-chunks", 2)


@pytest.fixture(scope="module")
def measurer(tiny, texts, tmp_path_factory):
    """Round-to-nearest on a tiny model, with text; everything that is measured is kept."""
    directory = tmp_path_factory.mktemp("measurer")
    recipe = Recipe(
        str(tiny),
        directory / "out.gguf",
        quantizer="rtn",
        texts=TextChoice((str(texts[0]),), n_ctx=64, chunks=8),
    )
    steps = Steps()
    with WorkDirectory(recipe.work_directory) as work:
        reference = pipeline._open(recipe, work, steps)
        found = prepare_texts(
            recipe.texts, reference, work, steps, calibrates=True, evaluates=False, tuning_chunks=4
        )
        imatrix = pipeline.calibrate(reference, found.calibration, work, steps)
        importances = pipeline.importances_of(imatrix, reference.file)
        ground = Ground(
            reference,
            importances,
            values_sha256(importances),
            "rtn",
            found.calibration,
            found.tuning,
            TYPES,
        )
        with Measurer(ground, work, Here(), steps) as made:
            yield made


# ------------------------------------------------------------------------------ the loaded model


def test_weights_in_memory_are_those_of_the_file(tiny):
    file = open_gguf(tiny)
    names = [name for name, info in file.tensors.items() if len(info.shape) == 2]
    with PatchableModel(tiny, names, n_ctx=64) as model:
        for name in names:
            np.testing.assert_array_equal(model.weight(name), file.read_float(name))


def test_a_weight_that_is_never_read_is_refused(tiny):
    with pytest.raises(RuntimeLibraryError, match=r"never reads nothing\.weight"):
        PatchableModel(tiny, ["nothing.weight"], n_ctx=64)


def test_a_replaced_weight_acts_like_the_file_that_has_it(measurer, tmp_path):
    file = measurer.file
    importances = measurer.ground.importances[NAME]
    weight = file.read_float(NAME)
    values = decode(encode(weight, _T.Q4_0, importances), _T.Q4_0).reshape(weight.shape)
    changed = tiny_gguf.write(tmp_path / "changed.gguf", "llama", replace={NAME: values})
    rows = measurer.ground.tuning.rows
    expected = evaluate(changed, rows, file.path, n_ctx=rows.shape[1]).summary
    found = measurer.joint({NAME: _T.Q4_0})
    assert found.kld == pytest.approx(expected.kld.value, rel=1e-2)  # a base file has 16 bits
    assert found.ppl_ratio == pytest.approx(expected.ppl_ratio.value, rel=1e-3)


def test_what_is_not_replaced_any_more_is_itself_again(measurer):
    nothing = measurer.joint({})
    measurer.joint({NAME: _T.Q4_0, "blk.0.attn_q.weight": _T.Q4_0})
    measurer.work.path.joinpath("measured").rename(measurer.work.path / "forgotten")
    assert measurer.joint({}) == nothing
    assert nothing.kld < 1e-5


def test_a_large_model_is_measured_as_a_file(measurer, monkeypatch):
    types = {NAME: _T.Q4_1, "blk.1.attn_q.weight": _T.Q5_0}
    patched = measurer.joint(types)
    monkeypatch.setattr(measuring, "PATCHABLE", 0)
    monkeypatch.setattr(measurer, "_name_of", lambda *_: "measured/again.json")
    of_file = measurer.joint(types)
    assert of_file != patched  # llama.cpp rounds the inputs of a file's weights to 8 bits
    assert of_file.kld == pytest.approx(patched.kld, rel=0.05)
    assert of_file.ppl_ratio == pytest.approx(patched.ppl_ratio, rel=1e-2)
    assert not list(measurer.work.path.glob("*joint.gguf*"))


def test_moments_of_a_large_model_are_the_same(measurer, monkeypatch):
    whole = measurer.hessians()
    monkeypatch.setattr(measuring, "PATCHABLE", 0)
    monkeypatch.setattr(measuring, "free_bytes", lambda unknown: 0)  # a layer at a time
    found = dict(measurer.moments())
    assert set(found) == set(measurer.names)
    for name, hessian in whole.items():
        np.testing.assert_array_equal(found[name], hessian)


def test_a_measurement_is_made_once(measurer):
    first = measurer.joint({NAME: _T.Q5_0})
    n_made = len(measurer.work.made)
    assert measurer.joint({NAME: _T.Q5_0}) == first
    assert len(measurer.work.made) == n_made


# ------------------------------------------------------------------------------ costs


@pytest.mark.parametrize(
    "estimator", ["weight", "imatrix", "hessian", "relative", "fisher", "measured"]
)
def test_costs_are_of_every_tensor_and_fall_with_the_bytes(measurer, estimator):
    if estimator == "fisher":
        pytest.importorskip("torch")
    costs = make_costs(measurer, estimator)
    assert [t.name for t in costs.tensors] == list(measurer.names)
    assert costs.estimator == estimator
    for tensor in costs.tensors:
        losses = {c.qtype: c.loss for c in tensor.candidates}
        assert losses[_T.Q8_0] < losses[_T.Q5_0] < losses[_T.Q4_0]
        assert all(c.loss_error >= 0 for c in tensor.candidates)


def test_hessian_costs_are_the_error_of_the_outputs(measurer):
    costs = make_costs(measurer, "hessian")
    tensor = next(t for t in costs.tensors if t.name == NAME)
    weight = measurer.file.read_float(NAME)
    hessian = measurer.hessians()[NAME][0]
    importances = measurer.ground.importances[NAME]
    error = decode(encode(weight, _T.Q4_0, importances), _T.Q4_0).reshape(weight.shape) - weight
    expected = 0.5 * np.trace(error @ hessian @ error.T)
    found = next(c.loss for c in tensor.candidates if c.qtype == _T.Q4_0)
    assert found == pytest.approx(expected, rel=1e-4)  # 64 rows: all of them are looked at


def test_relative_costs_are_shares_of_the_outputs(measurer):
    tensors = {t.name: t for t in make_costs(measurer, "relative").tensors}
    plain = {t.name: t for t in make_costs(measurer, "hessian").tensors}
    for name, n_branches in ((NAME, 1), ("output.weight", 2 * tiny_gguf.N_LAYERS)):
        weight, hessian = measurer.file.read_float(name), measurer.hessians()[name][0]
        energy = 0.5 * np.einsum("ij,jk,ik->", weight, hessian, weight)
        ratio = tensors[name].candidates[0].loss / plain[name].candidates[0].loss
        assert ratio == pytest.approx(n_branches / energy, rel=0.2)  # 128 of the output's rows


def test_measured_costs_are_the_swap_at_the_probed_type(measurer):
    costs = make_costs(measurer, "measured")
    tensor = next(t for t in costs.tensors if t.name == NAME)
    probe = costing._probe(tensor.candidates, tensor.n_weights)
    swap = measurer.joint({NAME: probe.qtype}, costing.SWAP_CHUNKS)
    assert probe.loss == pytest.approx(swap.kld)
    assert probe.loss_error == pytest.approx(swap.kld_error)


def test_predictions_go_through_measured_whole_choices(measurer):
    costs = make_costs(measurer, "measured")
    sizes = [costs.size_bytes(choice) for choice in (costs.smallest, costs.largest)]
    assert len(costs.joint) == len(costing._JOINT_SIZES)
    for share in costing._JOINT_SIZES:
        budget = Budget(size_bytes=int(sizes[0] * (sizes[1] / sizes[0]) ** share))
        choice = Knapsack().allocate(Problem(costs, measurer.file), budget).choice
        measured = measurer.joint(costs.types(choice)).kld
        assert costs.predicted(choice) == pytest.approx(measured)
    assert costs.predicted(costs.smallest) == pytest.approx(
        costs.loss(costs.smallest) * costs.joint[-1][1] / costs.joint[-1][0]
    )
    assert dataclasses.replace(costs, joint=()).predicted(choice) == costs.loss(choice)
    planned = Planner(measurer, "measured", "knapsack").plan(Target(size_bytes=budget.size_bytes))
    assert planned.facts["loss"] == pytest.approx(measured)


def test_beyond_what_can_be_measured_gradients_are_used_and_without_torch_relative_errors(
    measurer, monkeypatch
):
    assert costing.choose_estimator(measurer) == "measured"
    monkeypatch.setattr(costing, "MEASURABLE", 0)
    assert make_costs(measurer, "auto").estimator == "fisher"
    fisher = measurer.work.path / "costs-fisher.json"
    fisher.unlink()

    def missing(*_arguments):
        raise CalibrationError("no torch")

    monkeypatch.setattr(costing._Costing, "_guided", missing)
    assert make_costs(measurer, "auto").estimator == "relative"
    notes = Planner(measurer, "auto", "knapsack").plan(Target(size_bytes=10**6)).notes
    assert any(note.endswith("not squared gradients: no torch") for note in notes)


def test_costs_survive_their_file(measurer, tmp_path):
    for estimator in ("hessian", "measured"):
        costs = make_costs(measurer, estimator)
        write_costs(costs, tmp_path / "costs.json")
        assert read_costs(tmp_path / "costs.json") == costs


@pytest.mark.parametrize("pair", [(0.1, 0.0), (-1.0, 0.1), (float("nan"), 0.1)])
def test_whole_choices_that_predict_nothing_are_refused(measurer, pair):
    with pytest.raises(RecipeError, match=r"joint: got .* expected two finite numbers above 0"):
        dataclasses.replace(make_costs(measurer, "weight"), joint=(pair,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no readable costs"),
        ('{"schema": 2}', "schema 2, expected 1"),
        ("[]", "no readable costs"),
    ],
)
def test_damaged_costs_are_refused(tmp_path, content, message):
    path = tmp_path / "costs.json"
    path.write_text(content)
    with pytest.raises(RecipeError, match=message):
        read_costs(path)


def test_costs_that_are_not_finite_are_refused(measurer):
    costs = make_costs(measurer, "weight")
    tensor = costs.tensors[0]
    broken = dataclasses.replace(tensor.candidates[0], loss=float("nan"))
    with pytest.raises(RecipeError, match=r"the loss is nan, expected a finite number"):
        dataclasses.replace(
            costs, tensors=(dataclasses.replace(tensor, candidates=(broken,)), *costs.tensors[1:])
        )


def test_types_are_named_as_ggml_names_them():
    assert parse_types("q4_k, Q6_K,q4_k") == (_T.Q4_K, _T.Q6_K)
    with pytest.raises(RecipeError, match=r"--types: unknown type 'Q4_X'"):
        parse_types("Q4_X")


# ------------------------------------------------------------------------------ targets


def export(tiny, texts, out, *flags):
    command = ("export", tiny, out, "--text", texts[0], *SHORT, "--quantizer", "rtn", "--json")
    return done(*command, *flags).json()


def test_a_size_is_kept_and_used(tiny, texts, tmp_path):
    size = open_gguf(tiny).size_bytes // 4
    report = export(tiny, texts, tmp_path / "out.gguf", "--size", size)
    found = open_gguf(tmp_path / "out.gguf")
    assert size - 40_000 < found.size_bytes <= size
    assert report["provenance"]["plan"]["allocator"] == "knapsack"
    plan = read_plan(tmp_path / "out.edgeq" / "plan.json", open_gguf(tiny))
    assert {n: t.qtype for n, t in found.tensors.items()} == plan.types


def test_slow_types_are_named_as_slow(measurer, monkeypatch):
    """Rows of the tiny model are too short for lattices, so others stand for them."""
    target = Target(size_bytes=measurer.file.size_bytes // 4)
    planned = Planner(measurer, "hessian", "knapsack").plan(target)
    assert not [note for note in planned.notes if "IQ1 to IQ3" in note]
    slow = planned.plan.types[NAME]
    monkeypatch.setattr(planning, "LATTICES", {slow: None})
    planned = Planner(measurer, "hessian", "knapsack").plan(target)
    n_slow = sum(planned.plan.types[name] == slow for name in measurer.names)
    assert [note for note in planned.notes if note.startswith(f"{n_slow} tensors are IQ1 to IQ3")]


def test_several_sizes_share_what_they_can(tiny, texts, tmp_path, works):
    whole = open_gguf(tiny).size_bytes
    sizes = (whole // 4, whole // 3)
    report = export(tiny, texts, tmp_path / "out.gguf", "--size", f"{sizes[0]},{sizes[1]}")
    files = [tmp_path / f"out-{size}.gguf" for size in sizes]
    assert all(open_gguf(f).size_bytes <= s for f, s in zip(files, sizes, strict=True))
    judged = [row for row in report["files"] if row["evaluation"] is not None]
    klds = [row["evaluation"]["summary"]["kld"]["value"] for row in judged]
    assert klds[0] > klds[1]
    assert not {"costs-measured.json", "imatrix.gguf"} & set(works[-1].made)


def test_the_smallest_file_of_a_divergence_is_found(tiny, texts, tmp_path):
    def planned(limit):
        plan = tmp_path / "plan.json"
        command = ("plan", tiny, "-o", plan, "--text", texts[0], *SHORT[:4], "--quantizer", "rtn")
        return done(*command, "--max-kld", limit, "--json", "--work", tmp_path / "work").json()

    loose, tight = planned(0.3), planned(0.05)
    assert loose["bytes"] < tight["bytes"]


def test_a_speed_is_met_or_refused(tiny, texts, tmp_path):
    plan = tmp_path / "plan.json"
    command = ("plan", tiny, "-o", plan, "--text", texts[0], *SHORT[:4], "--quantizer", "rtn")
    done(*command, "--min-tps", 0.001)
    assert "the smallest file" in refused(*command, "--min-tps", 1e12)


def test_speeds_of_types_choose_among_them(tiny, texts, tmp_path):
    """A large type that is fast wins over a small one that is slow; the divergence is the same."""
    plan, speeds = tmp_path / "plan.json", tmp_path / "speeds.json"
    command = ("plan", tiny, "-o", plan, "--text", texts[0], *SHORT[:4], "--quantizer", "rtn")
    rows = [
        {"type": qtype.name, "n": 1, "threads": 1, "ggml_ns_per_weight": spent}
        for qtype, spent in ((_T.Q4_0, 1e9), (_T.Q5_0, 1e9), (_T.Q8_0, 1e-9))
    ]
    speeds.write_text(json.dumps({"types": rows}))
    done(*command, "--types", "Q4_0,Q5_0,Q8_0", "--min-tps", 0.001, "--speeds", speeds)
    types = {entry["type"] for entry in json.loads(plan.read_text())["tensors"].values()}
    assert types <= {"Q8_0", "F32"}
    line = refused(*command, "--types", "Q4_0,Q5_0", "--min-tps", 10, "--speeds", speeds)
    assert "no choice takes 0.1 s a token" in line


@pytest.mark.parametrize(
    "allocator",
    ["closed-form", "heavy-tail", "evolution:generations=2,offspring=3", "preset"],
)
def test_every_allocator_ends_in_a_file(tiny, texts, tmp_path, allocator):
    size = open_gguf(tiny).size_bytes // 4
    report = export(
        tiny, texts, tmp_path / "out.gguf", "--size", size, "--allocator", allocator, "--no-prove"
    )
    assert report["provenance"]["plan"]["allocator"] == allocator
    assert open_gguf(tmp_path / "out.gguf").size_bytes <= size


def test_a_policy_is_kept_and_applied_to_another_model(tiny, texts, tmp_path):
    pytest.importorskip("stable_baselines3")
    policy = tmp_path / "policy.safetensors"
    allocator = f"ramp:episodes=6,measurements=1,save={policy}"
    flags = ("--bpw", 7, "--no-prove")
    export(tiny, texts, tmp_path / "out.gguf", *flags, "--allocator", allocator)
    other = tiny_gguf.write(tmp_path / "other.gguf", "llama", tied=True)
    report = export(other, texts, tmp_path / "again.gguf", *flags, "--policy", policy)
    assert report["provenance"]["plan"]["zero_shot"] == 1


def test_without_calibration_types_are_weighed_by_their_errors_alone(tiny, texts, tmp_path):
    report = export(tiny, texts, tmp_path / "out.gguf", "--bpw", 8, "--no-imatrix")
    assert report["provenance"]["plan"]["costs"] == "weight"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--size", "1000"), "the smallest file of these types has"),
        (("--size", "0"), "--size: got 0, expected more than 0"),
        (("--max-kld", "1e-9"), "cannot be met"),
        (("--bpw", "40", "--types", "Q9_K"), "unknown type 'Q9_K'"),
        (("--bpw", "8", "--allocator", "greedy"), "unknown allocator 'greedy'"),
        (("--bpw", "8", "--allocator", "knapsack:nothing=1"), "unknown setting 'nothing'"),
        (("--bpw", "8", "--costs", "imatrix", "--no-imatrix"), "there is no imatrix"),
        (("--bpw", "8", "--no-imatrix", "--costs", "hessian"), "there is no calibration text"),
        (("--bpw", "8", "--policy", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_what_cannot_be_met_is_one_line(tiny, texts, tmp_path, flags, message):
    out = tmp_path / "out.gguf"
    line = refused("export", tiny, out, "--text", texts[0], *SHORT, "--quantizer", "rtn", *flags)
    assert message in line
    assert not out.exists()


def test_a_plan_and_a_target_contradict_each_other(tiny, tmp_path):
    plan = tmp_path / "plan.json"
    done("plan", tiny, "-o", plan, "--type", "Q4_0", "--no-imatrix")
    out = tmp_path / "out.gguf"
    assert "leave the target out" in refused("export", tiny, out, "--plan", plan, "--bpw", 5)
    assert json.loads(plan.read_text())["preset"] == "Q4_0"


def test_the_file_itself_keeps_the_divergence(tiny, texts, tmp_path):
    report = export(tiny, texts, tmp_path / "out.gguf", "--max-kld", 0.1)
    told = next(note for note in report["notes"] if note.startswith("The file, on tuning text"))
    reached = float(told.split(": ")[1].split(" ")[0])
    assert 0.05 < reached <= 0.1


def test_llama_cpps_mix_is_kept_where_it_is_better(measurer, monkeypatch):
    planner = Planner(measurer, "hessian", "knapsack")
    mixes = planner.mixes
    size = planner.costs.size_bytes(mixes["Q5_K_M"]) + 1
    better = mixes["Q5_K_M"]
    planner.problem = dataclasses.replace(
        planner.problem, measure=lambda choice, n: (0.1 if choice == better else 0.2, 0.0)
    )
    planned = planner.plan(Target(size_bytes=size))
    assert planner.costs.choice(planned.plan.types) == better
    assert "The plan is llama.cpp's Q5_K_M: knapsack was not better" in planned.notes[-1]
    assert planned.facts["size_bytes"] == planner.costs.size_bytes(better)
    assert planned.facts["loss"] == planner.costs.predicted(better)


def test_costs_of_another_model_are_refused(measurer, tmp_path):
    costs = make_costs(measurer, "weight")
    path = tmp_path / "costs.json"
    write_costs(costs, path)
    assert make_costs(measurer, str(path)) == costs
    few = dataclasses.replace(measurer.ground, types=(_T.Q4_0, _T.Q8_0))
    limited = make_costs(SimpleNamespace(ground=few, names=measurer.names), str(path))
    assert {c.qtype for t in limited.tensors for c in t.candidates} == {_T.Q4_0, _T.Q8_0}
    none = dataclasses.replace(measurer.ground, types=(_T.Q2_K,))
    with pytest.raises(RecipeError, match="holds none of the types that"):
        make_costs(SimpleNamespace(ground=none, names=measurer.names), str(path))
    write_costs(dataclasses.replace(costs, model_sha256="0" * 64), path)
    with pytest.raises(RecipeError, match=r"of another model, SHA-256 000000000000"):
        make_costs(measurer, str(path))


def test_the_file_is_that_of_the_plan_that_met_the_divergence(tiny, texts, tmp_path, monkeypatch):
    """Later plans that miss it have written their layers over those of the plan that is kept."""
    plans, shares = [], iter((0.5, 1.2, 1.2, 1.2))

    def judge(self, chosen, text):
        plans.append(self.plan)
        kld = SimpleNamespace(value=next(shares) * 0.1)
        return SimpleNamespace(kld=kld, ppl_ratio=SimpleNamespace(value=1.0))

    monkeypatch.setattr(Roundings, "judge", judge)
    export(tiny, texts, tmp_path / "out.gguf", "--max-kld", 0.1, "--no-prove")
    assert len(plans) == 4
    assert plans[0].types not in (plan.types for plan in plans[1:])
    plans[0].write(tmp_path / "plan.json")
    given = ("--plan", tmp_path / "plan.json", "--imatrix", tmp_path / "out.edgeq/imatrix.gguf")
    export(tiny, texts, tmp_path / "same.gguf", *given, "--no-prove")
    found, same = (open_gguf(tmp_path / name) for name in ("out.gguf", "same.gguf"))
    assert {n: t.qtype for n, t in found.tensors.items()} == plans[0].types
    for name in found.tensors:
        np.testing.assert_array_equal(found.read_bytes(name), same.read_bytes(name))
