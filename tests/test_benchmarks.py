"""Speeds by type and by file: what is reported, and what planning makes of it."""

import json

import pytest
from gguf import GGMLQuantizationType

from cpu_kernels import isa
from cpu_kernels.bandwidth import Reader
from cpu_kernels.streams import TOKENS
from edgeq import benchmarks
from edgeq.allocation import speeds
from edgeq.allocation.costs import Candidate, Costs, TensorCosts
from edgeq.console import Steps
from edgeq.errors import EvaluationError, RecipeError
from tests import tiny_gguf
from tests.command_line import done, refused

T = GGMLQuantizationType


@pytest.fixture(scope="module")
def found():
    return benchmarks.bench_types(
        ["q4_0", "IQ2_XXS"], [1], tokens=[1, 3], mebibytes=1, repetitions=2, steps=Steps()
    )


def test_types_are_timed_beside_ggml(found):
    assert [(row.type, row.n, row.threads) for row in found.types] == [
        ("Q4_0", 1, 1), ("Q4_0", 3, 1), ("IQ2_XXS", 1, 1), ("IQ2_XXS", 3, 1)
    ]  # fmt: skip
    for row in found.types:
        assert row.ratio_to_ggml == pytest.approx(row.ggml_ns_per_weight / row.ns_per_weight)
        assert row.ratio_low <= row.ratio_high
        assert row.gb_per_s == pytest.approx(row.bpw / 8 / row.ns_per_weight / row.n)
        assert row.ggml_gb_per_s == pytest.approx(row.file_bpw / 8 / row.ggml_ns_per_weight / row.n)
        assert (row.share_of_bandwidth is None) == (row.n > 1)
    assert found.bandwidth[1] > 0
    assert "IQ2_XXS" in found.as_text()


def test_both_families_are_timed(found):
    for row in found.types:
        ns = dict(zip(("dot", "lookup", "stream"), row.of_families, strict=True))
        assert row.ns_per_weight == ns[row.family]
        assert (ns["lookup"] is None) == (row.type != "Q4_0")
        assert ns["stream"] is None
    alone = benchmarks.bench_types(["sherry"], [1], mebibytes=1, repetitions=2, steps=Steps())
    assert alone.types == ()  # speeds.json is for plans, which it is none for
    (row,) = alone.sherry
    assert (row.type, row.family, row.dot_ns_per_weight) == ("SHERRY", "lookup", None)
    assert row.file_bpw == 1.3125
    assert "SHERRY" in alone.as_text()
    assert alone.as_json()["sherry"][0]["ns_per_weight"] == row.ns_per_weight


def test_tables_over_tokens_are_timed_where_whole_vectors_are():
    tokens = TOKENS - 1, TOKENS
    found = benchmarks.bench_types(
        ["TQ2_0"], [1], tokens=tokens, mebibytes=1, repetitions=1, steps=Steps()
    )
    few, many = found.types
    assert few.stream_ns_per_weight is None
    assert many.stream_ns_per_weight > 0
    assert many.ns_per_weight in many.of_families


def test_all_of_a_memory_is_read():
    reader = Reader(1 << 20, 1)
    reader._memory[:] = 0
    reader._memory[:: 1 << 10] = 1
    reader.run()
    assert reader._sums.view("<i4").sum() == 1 << 10


def test_the_command_writes_speeds_for_plans(tmp_path):
    path = tmp_path / "speeds.json"
    command = ("bench", "--types", "--type", "Q4_0", "--repetitions", 1, "-o", path, "--json")
    shown = done(*command).json()
    assert shown == json.loads(path.read_text())
    row = shown["types"][0]
    assert {"type", "threads", "ns_per_weight", "gb_per_s", "ratio_to_ggml"} <= set(row)
    assert speeds.read_speeds(path) == {T.Q4_0: row["ggml_ns_per_weight"]}


def test_a_file_is_timed_in_both_runtimes(tiny):
    command = ("bench", tiny, "--prompt", 8, "--gen", 4, "--repetitions", 2, "--batches", "2,3")
    shown = done(*command, "--json").json()
    assert [run["backend"] for run in shown["runs"]] == ["llama.cpp", "kernels"]
    assert shown["weight_bytes"] > 0
    assert shown["load_s"] > 0
    for run in shown["runs"]:
        assert set(run["batches"]) == {"2", "3"}
        for rate in (run["prefill"], run["decode"], *run["batches"].values()):
            assert 0 < rate["low"] <= rate["median"] <= rate["high"]
    assert "batches of 3" in done(*command).out


def test_bad_requests_are_refused(tiny):
    assert "unknown type 'Q4'; known: Q4_0" in refused("bench", "--types", "--type", "Q4")
    assert "no more written than prompt tokens" in refused("bench", tiny, "--prompt", 8)
    with pytest.raises(EvaluationError, match="at least 1 each"):
        benchmarks.bench_types(["Q4_0"], [1], mebibytes=0, steps=Steps())


def test_a_forced_instruction_set_that_is_none_is_one_line(tiny, monkeypatch):
    monkeypatch.setenv("EDGEQ_ISA", "avx1024")
    isa.chosen.cache_clear()
    try:
        assert "EDGEQ_ISA: this CPU cannot run 'avx1024'; it can: " in refused("inspect", tiny)
    finally:
        isa.chosen.cache_clear()


def test_what_the_decoder_does_not_run_is_timed_in_llama_cpp_alone(tmp_path):
    path = tiny_gguf.write(tmp_path / "experts.gguf", "qwen3moe")
    assert "does not run qwen3moe" in refused("bench", path, "--prompt", 8, "--gen", 4)
    command = ("bench", path, "--prompt", 8, "--gen", 4, "--repetitions", 1, "--backend", "llama")
    shown = done(*command, "--json").json()
    assert [run["backend"] for run in shown["runs"]] == ["llama.cpp"]
    assert shown["weight_bytes"] is None


def costs_of(*names):
    tensors = tuple(
        TensorCosts(name, (256, 256), (Candidate(T.Q4_0, 100, 1.0), Candidate(T.Q8_0, 200, 0.5)))
        for name in names
    )
    return Costs("0" * 64, "weight", "rtn", 10, 4, tensors)


def test_costs_get_the_seconds_of_their_types():
    costs = costs_of("token_embd.weight", "blk.0.ffn_up.weight")
    timed = speeds.timed(costs, {T.Q4_0: 2.0, T.F16: 9.0}, has_output=True)
    looked_up, product = timed.tensors
    assert [one.seconds for one in looked_up.candidates] == [0]
    assert [(one.qtype, one.seconds) for one in product.candidates] == [(T.Q4_0, 2e-9 * 256 * 256)]
    tied = speeds.timed(costs, {T.Q4_0: 2.0}, has_output=False)
    assert tied.tensors[0].candidates[0].seconds == pytest.approx(2e-9 * 256 * 256)
    with pytest.raises(
        RecipeError, match=r"none of token_embd\.weight's types was timed: Q4_0, Q8"
    ):
        speeds.timed(costs, {T.F16: 1.0}, has_output=True)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[", "no table of speeds"),
        ("{}", "no table of speeds"),
        ('{"types": [{"type": "Q9", "threads": 1}]}', "no table of speeds .'Q9'"),
        (
            '{"types": [{"type": "Q4_0", "threads": 1, "n": 1, "ggml_ns_per_weight": NaN}]}',
            "Q4_0 takes nan ns",
        ),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path, text, what):
    path = tmp_path / "speeds.json"
    with pytest.raises(RecipeError, match="No such file"):
        speeds.read_speeds(path)
    path.write_text(text)
    with pytest.raises(RecipeError, match=what):
        speeds.read_speeds(path)
