"""What an export would take: shapes and rates in, figures out. No timing decides anything here."""

import dataclasses
import json
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType

from converters.gguf_file import open_gguf
from edgeq import pipeline
from edgeq.console import Steps
from edgeq.forecast import (
    SHAPES,
    Forecast,
    Machine,
    Outline,
    Rounding,
    Tensor,
    duration,
    forecast,
    outline_of,
    outline_of_shape,
)
from edgeq.recipe import Recipe, Target, TextChoice
from tests import tiny_gguf
from tests.command_line import done, refused

_T = GGMLQuantizationType
_TYPES = tuple(_T)
MACHINE = Machine(
    n_cpus=4,
    n_busy=2.0,
    torch_flops=5e10,
    torch_fast_flops=2e11,
    numpy_flops=5e10,
    ggml_flops=dict.fromkeys(_TYPES, 5e10),
    encode=dict.fromkeys(_TYPES, 5e-8),
    rounding=dict.fromkeys((_T.Q4_K, _T.Q6_K, _T.Q4_0, _T.Q8_0), Rounding(1e-6, 2e-6)),
    factor=(1e-10, 1e-8),
    element=1e-9,
    exponential=5e-9,
    read_rate=1e9,
    write_rate=5e8,
    hash_rate=1e9,
    import_seconds=5.0,
    base_bytes=500 << 20,
    free_bytes=16 << 30,
)


def layer(number: int, n: int = 512, n_ff: int = 1024, n_experts: int = 0) -> list[Tensor]:
    """Return a layer's tensors; its feed-forward part may be experts."""
    experts = (n_experts,) if n_experts else ()
    suffix = "_exps" if n_experts else ""
    shapes: dict[str, tuple[int, ...]] = {
        **{f"attn_{part}": (n, n) for part in ("q", "k", "v", "output")},
        **{f"ffn_{part}{suffix}": (*experts, n_ff, n) for part in ("gate", "up")},
        f"ffn_down{suffix}": (*experts, n, n_ff),
    }
    return [
        Tensor(f"blk.{number}.{name}.weight", shape, _T.BF16, _T.Q4_K)
        for name, shape in shapes.items()
    ]


def model(n_layers: int, n_experts: int = 0) -> Outline:
    """Return the outline of a model with `n_layers` equal layers."""
    embedding = Tensor("token_embd.weight", (4096, 512), _T.BF16, _T.Q6_K)
    layers = [t for number in range(n_layers) for t in layer(number, n_experts=n_experts)]
    return Outline("made", (embedding, *layers), min(n_experts, 2), 4096)


def recipe(tmp_path: Path, **changes: object) -> Recipe:
    """Return a recipe of a model that nobody opens."""
    plain = Recipe(model="none", out=tmp_path / "out.gguf")
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def found(tmp_path: Path, outline: Outline, **changes: object) -> Forecast:
    """Return the forecast of an outline under a recipe, on the made-up machine."""
    return forecast(outline, recipe(tmp_path, **changes), MACHINE)


@pytest.mark.parametrize(("kind", "preset"), [("llama", "Q4_0"), ("qwen3moe", "Q8_0")])
def test_bytes_are_those_of_the_file(tmp_path: Path, kind: str, preset: str) -> None:
    """The tensors' bytes are exact; of the header, what edgeq adds is a reserve."""
    source = tiny_gguf.write(tmp_path / "tiny.gguf", kind)
    one = Recipe(
        model=str(source),
        out=tmp_path / "out.gguf",
        preset=preset,
        quantizer="rtn",
        use_imatrix=False,
        prove=False,
    )
    outline = outline_of(one)
    pipeline.export(one, Steps(bars=False))
    written = open_gguf(one.out)
    header = min(info.offset for info in written.tensors.values())
    assert outline.output_bytes - outline.header_bytes == written.size_bytes - header
    assert 0 <= outline.header_bytes - header <= 1 << 14
    assert {t.name: t.qtype for t in outline.tensors} == {
        name: info.qtype for name, info in written.tensors.items()
    }


def test_more_layers_take_more_of_everything_but_memory(tmp_path: Path) -> None:
    """Memory is that of the largest layer, whatever their number, but for gradients' states."""
    few, many = (found(tmp_path, model(n), fisher=0.0) for n in (2, 8))
    assert few.output_bytes < many.output_bytes
    assert few.work_bytes < many.work_bytes
    assert few.moments_bytes == many.moments_bytes
    assert few.memory["rounding"] == many.memory["rounding"]
    assert all(few.seconds[step] <= many.seconds[step] for step in few.seconds)
    assert few.total() < many.total()


def test_gradients_keep_states_of_every_layer_up_to_a_quarter_of_memory(tmp_path: Path) -> None:
    few, many = (found(tmp_path, model(n)).memory["gradients"] for n in (2, 8))
    assert few < many
    tight = dataclasses.replace(MACHINE, free_bytes=512 << 20)
    held = forecast(model(8), recipe(tmp_path), tight).memory["gradients"]
    states = 32 * 9 * 512 * 512 * 4  # of all chunks, before and behind eight layers
    assert many - held == pytest.approx(states - (128 << 20), rel=0.1)


def test_moments_at_outputs_lie_in_files_and_take_time(tmp_path: Path) -> None:
    without, fed = (found(tmp_path, model(2), output_feedback=one) for one in (False, True))
    sums = 2 * 4 * (5 * 512**2 + 2 * 1024**2)
    assert sums <= fed.work_bytes - without.work_bytes <= 2 * sums
    for step in ("gradients", "quantize: rounding"):
        assert fed.seconds[step] > without.seconds[step]
    none = found(tmp_path, model(2), output_feedback=True, fisher=0.0)  # also goes back
    assert none.memory["gradients"] == fed.memory["gradients"] > without.memory["gradients"]
    assert none.moments_bytes < fed.moments_bytes


def test_experts_have_moments_each(tmp_path: Path) -> None:
    plain = found(tmp_path, model(2), fisher=0.0)
    experts = found(tmp_path, model(2, n_experts=16), fisher=0.0)
    attention = 4 * 2 * 512**2  # of queries, keys and values together, and of the output
    of_one = 4 * (512**2 + 1024**2)  # gate and up share theirs
    assert plain.moments_bytes == attention + of_one
    assert experts.moments_bytes == attention + 16 * of_one
    more = found(tmp_path, model(2, n_experts=16), fisher=0.0, asymmetric=0.5)
    assert more.moments_bytes == 2 * experts.moments_bytes
    states = 4 * 32 * 512 * 512  # of the float model; the moments of experts lie in files
    assert more.memory["rounding"] - experts.memory["rounding"] == states + attention
    assert "n_in²" in experts.as_text()
    assert "n_in²" not in plain.as_text()


def test_weighted_moments_are_of_each_weight(tmp_path: Path) -> None:
    weighted = found(tmp_path, model(2), fisher=0.5)
    assert weighted.moments_bytes == 4 * (6 * 512**2 + 1024**2)
    grouped = found(tmp_path, model(2), fisher=0.5, fisher_groups=4)
    assert grouped.moments_bytes == 4 * weighted.moments_bytes


def test_workers_share_what_is_tasks(tmp_path: Path) -> None:
    """Machines of a cluster add up; processes here only take the CPUs that were idle."""
    alone, two, eight = (found(tmp_path, model(4), jobs=n) for n in (1, 2, 8))
    assert alone.total(1) > two.total(2) > eight.total(8)
    assert eight.total(8) > sum(share.alone for share in eight.steps.values())
    assert eight.processes == 2.0  # of four CPUs, two are busy
    assert alone.processes == 1.0
    assert "8 machines" in eight.as_text()
    assert "machines" not in alone.as_text()


def test_efforts_take_more_and_more(tmp_path: Path) -> None:
    times = [
        found(tmp_path, model(4), effort=effort).total() for effort in ("fast", "default", "max")
    ]
    assert times == sorted(times)
    nearest = found(tmp_path, model(4), quantizer="rtn")
    assert nearest.total() < times[0]
    assert "moments" not in nearest.steps


def test_a_target_adds_costs(tmp_path: Path) -> None:
    plain = found(tmp_path, model(4))
    target = found(tmp_path, model(4), target=Target(bpw=4.5), types="Q4_K,Q6_K")
    assert {"costs", "swaps"} <= target.steps.keys() - plain.steps.keys()
    assert target.total() > plain.total()


def test_proof_and_text_are_counted(tmp_path: Path) -> None:
    text = TextChoice(calibration=("some.txt",))
    full = found(tmp_path, model(2))
    less = found(tmp_path, model(2), prove=False, texts=text)
    assert full.steps.keys() - less.steps.keys() == {"text", "evaluate"}


def test_published_sizes_are_reached(tmp_path: Path) -> None:
    """Sizes of llama.cpp's Q4_K_M files of these models, as their publishers list them."""
    pytest.importorskip("transformers")
    outline = outline_of_shape("8B", recipe(tmp_path))
    assert outline.n_parameters == 8_030_261_248
    assert outline.output_bytes == pytest.approx(4.92e9, rel=0.002)
    assert outline.n_used == 0


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    directory = tmp_path / "bare"
    directory.mkdir()
    small = {**SHAPES["30B-A3B"], "num_hidden_layers": 2, "num_experts": 8, "vocab_size": 1024}
    (directory / "config.json").write_text(json.dumps(small))
    outline = outline_of(recipe(tmp_path, model=str(directory)))
    shapes = {one.name: one.shape for one in outline.tensors}
    assert shapes["blk.1.ffn_gate_exps.weight"] == (8, 768, 2048)
    assert (outline.n_layers, outline.n_used) == (2, 8)
    assert outline.checkpoint_bytes > 0


def test_what_does_not_fit_is_said_in_one_line(tmp_path: Path) -> None:
    source = tiny_gguf.write(tmp_path / "tiny.gguf", "llama")
    small = outline_of(recipe(tmp_path, model=str(source), target=Target(size_bytes=1000)))
    assert "which has more" in small.types
    assert "fetches nothing" in refused("plan", "--dry-run", "no/such")
    assert "'8b'" in refused("plan", "--dry-run", "--shape", "8b")
    assert "config.json" in refused("plan", "--dry-run", tmp_path)
    assert "-o plan.json" in refused("plan", source)
    assert "writes nothing" in refused("plan", "--dry-run", source, "-o", tmp_path / "plan.json")
    assert "MODEL" in refused("plan", "--dry-run")


def test_the_command_writes_nothing(tmp_path: Path) -> None:
    source = tiny_gguf.write(tmp_path / "tiny.gguf", "llama")
    flags = ("--dry-run", "--type", "Q4_0", "--quantizer", "rtn", "--no-imatrix")
    told = done("plan", source, *flags, "--work", tmp_path / "work", "--json").json()
    assert {"output_bytes", "work_bytes", "peak_bytes", "seconds", "total_seconds"} <= told.keys()
    assert told["types"] == "Q4_0"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(1.0, "1.0 s"), (600, "10 min"), (7200, "2.0 h"), (864000, "10.0 d")],
)
def test_durations_are_for_people(seconds: float, told: str) -> None:
    assert duration(seconds) == told
