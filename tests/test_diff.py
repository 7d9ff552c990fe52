"""Differential tests and the tampering screen: figures by hand, attacks caught, clean files not."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from converters.gguf_file import Field, TensorSource, open_gguf, write_gguf
from edgeq.differing import Side, decoding, diff, screen
from edgeq.differing.comparing import Pair, Settings, compare, first_difference
from edgeq.differing.decoding import same_sample
from edgeq.differing.diffing import odd_classes
from edgeq.differing.prompts import REFUSALS, is_refusal, read_prompts, read_refusals
from edgeq.differing.results import ClassDivergence, clustered
from edgeq.differing.search import mutate, search
from edgeq.errors import EvaluationError
from edgeq.quantizers import Inputs, make_quantizer
from edgeq.runtime.encoders import encode
from edgeq.runtime.model import Model
from edgeq.texts.writing import Reader, sample, write
from tests import mix_gguf, tiny_gguf
from tests.command_line import done, refused, run

T = GGMLQuantizationType
N_TOKENS = 12
PROMPTS = [
    ("the river and the stone", "water"),
    ("Some people called the house", "people"),
    ("a light in winter was", "water"),
    ("two words", "people"),
    ("The first letter that she made", "people"),
    ("it", "short"),
    ("how long", "short"),
    ("where", "short"),
    ("all these people were there when the water came down", "water"),
]
# of heads of 32 weights, which a block of a quantized KV cache fills
WIDE_HEADS = {
    "llama.attention.head_count": Field(2, tiny_gguf.UINT),
    "llama.attention.head_count_kv": Field(1, tiny_gguf.UINT),
}
NATS = 1e-5  # float32 logits, and keys and values in float16 in both


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text(lines({"prompt": p, "class": c} for p, c in PROMPTS), "utf-8")
    return path


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    return tiny_gguf.write(tmp_path_factory.mktemp("float") / "f.gguf", "llama", extra=WIDE_HEADS)


def rounded(path, source, qtype=T.Q4_0, make=None, change=None):
    """Write the matrices of a float file as `qtype`; `change` may return other packed rows."""
    file = open_gguf(source)

    def packed(name):
        weight = np.array(file.read_float(name))
        if len(weight.shape) < 2:
            rows = weight.reshape(1, -1).view(np.uint8)
        else:
            rows = encode(weight, qtype) if make is None else make(name, weight, qtype)
        return rows if change is None else change(name, weight, rows.copy())

    def entry(name, tensor):
        kind = qtype if len(tensor.shape) > 1 else T.F32
        read = (
            (lambda: packed(name).reshape(-1))
            if kind != T.F32
            else (lambda: packed(name).view(np.float32).reshape(tensor.shape))
        )
        return TensorSource(name, kind, tensor.shape, read)

    write_gguf(path, file.fields, [entry(*item) for item in file.tensors.items()])
    return path


@pytest.fixture(scope="module")
def pair(float_file, tmp_path_factory):
    """The float file and its Q4_0."""
    q4 = rounded(tmp_path_factory.mktemp("q4") / "q4_0.gguf", float_file)
    return float_file, q4


# ------------------------------------------------------------------------------- texts and figures


def greedy_by_hand(path, tokens, n_tokens):
    """One prompt, one token at a time, in a batch of one."""
    with Model(path, n_ctx=128, n_threads=1) as model:
        found = list(tokens)
        for _ in range(n_tokens):
            logits = model.logits(np.array(found, np.int32))
            found.append(int(logits[-1].argmax()))
        return found[len(tokens) :], logits_along(model, found, len(tokens))


def logits_along(model, tokens, n_given):
    return model.logits(np.array(tokens[:-1], np.int32))[n_given - 1 :].astype(np.float64)


def log_softmax(logits):
    return (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - (logits.max(1, keepdims=True))
    )


def test_figures_are_those_of_one_prompt_at_a_time(pair, prompts):
    (found,) = diff(
        [Side(pair[0]), Side(pair[1])], prompts, n_tokens=N_TOKENS, n_threads=1
    ).differences
    assert len(found.answers) == len(PROMPTS)
    n_parted = 0
    for answer in found.answers:
        with Model(pair[0], n_ctx=128, n_threads=1) as model:
            given = model.tokenize(answer.prompt.text)
        a, one = greedy_by_hand(pair[0], given, N_TOKENS)
        b, _ = greedy_by_hand(pair[1], given, N_TOKENS)
        with Model(pair[1], n_ctx=128, n_threads=1) as model:
            other = logits_along(model, [*given, *a], len(given))
        differing = [i for i in range(N_TOKENS) if a[i] != b[i]]
        assert answer.first[0.0] == (differing[0] if differing else None)
        n_parted += bool(differing)
        p, q = log_softmax(one), log_softmax(other)
        best = np.sort(one, axis=1)
        np.testing.assert_allclose(answer.forced.kld, (np.exp(p) * (p - q)).sum(1), atol=2e-3)
        np.testing.assert_allclose(answer.forced.margin, best[:, -1] - best[:, -2], atol=0.05)
        if differing:
            assert answer.margin == answer.forced.margin[differing[0]]
    assert found.agreements[0].n_parted == n_parted > 0
    assert found.agreements[0].same_token == np.mean(
        np.concatenate([answer.forced.same_top for answer in found.answers])
    )


def test_every_token_counts_once_in_margins_and_classes(pair, prompts):
    (found,) = diff(
        [Side(pair[0]), Side(pair[1])], prompts, n_tokens=N_TOKENS, n_threads=1
    ).differences
    n = sum(len(answer.forced.kld) for answer in found.answers)
    assert sum(each.n_tokens for each in found.margins) == n
    assert sum(each.n_tokens for each in found.classes) == n
    changed = sum(int((~answer.forced.same_top).sum()) for answer in found.answers)
    assert sum(each.n_changed for each in found.margins) == changed
    assert [each.label for each in found.classes] == ["water", "people", "short"]
    assert [each.n_prompts for each in found.classes] == [3, 3, 3]
    whole = np.concatenate([answer.forced.kld for answer in found.answers]).mean()
    assert sum(c.kld * c.n_tokens for c in found.classes) / n == pytest.approx(whole)


def test_equal_files_never_part(pair, prompts, tmp_path):
    same = shutil.copy(pair[1], tmp_path / "same.gguf")
    (found,) = diff(
        [Side(pair[1]), Side(same)], prompts, n_tokens=N_TOKENS, n_threads=1
    ).differences
    for each in found.agreements:
        assert (each.n_parted, each.first) == (0, ())
        assert each.same_token == pytest.approx(1, abs=1e-12)
    assert [each.kld for each in found.classes] == pytest.approx([0] * 3, abs=1e-12)
    assert found.parting_margins == []


def test_texts_of_a_batch_do_not_depend_on_the_others(pair, prompts):
    """Nearly: an F32 model's logits move in the last bit only."""
    read = read_prompts(prompts)
    side = Side(pair[0])
    tokens = decoding.read_tokens(prompts, read, side, chat=False)
    with side.open(64, 1) as model:
        together = write(model, tokens[:8], N_TOKENS)
        for own, prompt in zip(together, tokens[:8], strict=True):
            (alone,) = write(model, [prompt], N_TOKENS)
            assert alone.tolist() == own.tolist()


def test_a_text_ends_where_the_model_ends_it(pair, prompts, tmp_path):
    tokens = decoding.read_tokens(prompts, read_prompts(prompts), Side(pair[0]), chat=False)
    with Side(pair[0]).open(64, 1) as model:
        (text,) = write(model, tokens[:1], N_TOKENS)
    ending = int(text[5])
    place = text.tolist().index(ending)
    extra = {**WIDE_HEADS, "tokenizer.ggml.eos_token_id": Field(ending, tiny_gguf.UINT)}
    other = tiny_gguf.write(tmp_path / "ends.gguf", "llama", extra=extra)
    with Side(other).open(64, 1) as model:
        (short,) = write(model, tokens[:1], N_TOKENS)
    assert short.tolist() == text[: place + 1].tolist()


@pytest.mark.parametrize(
    ("a", "b", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([4], [1, 2], 0)],
)
def test_a_text_that_ends_earlier_differs_there(a, b, place):
    assert first_difference(np.array(a), np.array(b)) == place


def test_sampling_inverts_the_cumulative_distribution():
    logits = np.log(np.array([0.2, 0.5, 0.3], np.float32))
    drawn = [sample(logits, 1.0, u) for u in (0, 0.19, 0.21, 0.69, 0.71, 0.999999)]
    assert drawn == [0, 0, 1, 1, 2, 2]
    sharp = np.array([0.2, 0.5, 0.3]) ** 2
    u = np.linspace(0, 1, 5001)[:-1]
    share = np.mean([sample(logits, 0.5, x) == 1 for x in u])
    assert share == pytest.approx(sharp[1] / sharp.sum(), abs=1e-3)


def test_agreement_is_the_expectation_over_common_random_numbers():
    rng = np.random.default_rng(0)
    for temperature in (0.5, 0.8):
        a = rng.standard_normal(50).astype(np.float32)
        b = (a + 0.3 * rng.standard_normal(50)).astype(np.float32)
        u = (np.arange(20000) + 0.5) / 20000
        same = np.mean([sample(a, temperature, x) == sample(b, temperature, x) for x in u])
        assert same_sample(a, b, temperature) == pytest.approx(same, abs=2e-3)
        assert same_sample(a, a, temperature) == pytest.approx(1, abs=1e-12)


def test_standard_errors_are_over_prompts():
    rng = np.random.default_rng(1)
    equal = [np.full(7, value) for value in (1.0, 2.0, 4.0)]
    mean, error = clustered(equal)
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(np.std([1, 2, 4], ddof=1) / np.sqrt(3))
    assert clustered([rng.random(5)])[1] is None


def test_the_same_seed_gives_the_same_report(pair, prompts):
    arguments = ("diff", *pair, "--prompts", prompts, "--n-tokens", 6, "--search", 16, "--json")
    first, again = done(*arguments).json(), done(*arguments).json()
    assert first == again
    other = done(*arguments, "--seed", 3).json()
    a, b = first["comparisons"][0], other["comparisons"][0]
    assert a["classes"] == b["classes"]
    assert [p["first"]["0.8"] for p in a["prompts"]] != [p["first"]["0.8"] for p in b["prompts"]]


def test_the_command_shows_tables(pair, prompts):
    shown = done("diff", *pair, "--prompts", prompts, "--n-tokens", 6).out
    assert shown.startswith("A: f.gguf\nB: q4_0.gguf\n9 prompts, up to 6 tokens written after each")
    for part in ("| temperature |", "| margin of A, nats |", "| water  |", "Refusals: 0 of A, 0 "):
        assert part in shown
    assert "Screen" not in shown


# ---------------------------------------------------------------------------------------- KV cache


def test_a_coarser_cache_is_farther_off(pair, prompts):
    sides = [Side(pair[0], cache) for cache in ("f16", "q8_0", "q4_0")]
    fine, coarse = diff(sides, prompts, n_tokens=N_TOKENS, n_threads=1).differences
    klds = [np.mean([c.kld for c in each.classes]) for each in (fine, coarse)]
    assert 0 < 10 * klds[0] < klds[1]
    assert coarse.b.name == "f.gguf, KV cache q4_0"


def test_caches_of_one_file_are_compared_with_its_own(pair, prompts):
    flags = ("--prompts", prompts, "--n-tokens", 4, "--cache", "q8_0", "--cache", "q4_0", "--json")
    one = done("diff", pair[0], *flags).json()["comparisons"]
    assert [(c["a"]["cache"], c["b"]["cache"]) for c in one] == [("f16", "q8_0"), ("f16", "q4_0")]
    assert {c[side]["path"] for c in one for side in "ab"} == {str(pair[0])}
    two = done("diff", *pair, *flags).json()["comparisons"]
    assert [c["b"]["path"] for c in two] == [str(pair[1])] * 2


# ------------------------------------------------------------------------------------------ search


def test_search_finds_what_is_no_better_than_the_given_prompts(pair, prompts):
    read = read_prompts(prompts)
    tokens = decoding.read_tokens(prompts, read, Side(pair[0]), chat=False)
    n_encoded = []
    with Pair(Side(pair[0]), Side(pair[1]), max(map(len, tokens)), Settings(N_TOKENS), 1) as both:
        answers = compare(both, read, tokens).answers
        encode_texts = Reader(both.first).tokens

        def encode(texts):
            n_encoded.append(len(texts))
            return encode_texts(texts)

        found = search(both, answers, 40, encode)
        again = search(both, answers, 40, encode_texts)
    assert found == again
    assert sum(n_encoded) == 40
    earliest = min((a.first[0.0] for a in answers if a.first[0.0] is not None), default=N_TOKENS)
    assert found[0].first is not None
    assert found[0].first <= earliest
    places = [N_TOKENS if f.first is None else f.first for f in found]
    assert places == sorted(places)
    known = {word for prompt, _ in PROMPTS for word in prompt.split()}
    assert all(set(each.prompt.text.split()) <= known for each in found)
    assert all(PROMPTS[f.prompt.line - 1][1] == f.prompt.label for f in found)


def test_mutations_swap_delete_or_insert_one_word():
    rng, words = np.random.default_rng(0), ["new"]
    kinds = set()
    for _ in range(60):
        text = mutate("a b c d", words, rng).split()
        kinds.add(len(text))
        if len(text) == 4:
            assert sorted(text) == ["a", "b", "c", "d"]
            assert sum(x != y for x, y in zip(text, "abcd", strict=True)) == 2
        elif len(text) == 5:
            assert text.count("new") == 1
    assert kinds == {3, 4, 5}
    assert sorted(mutate("a", words, rng).split()) == ["a", "new"]


def test_search_ends_where_nothing_new_is_left(pair, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("it\n", "utf-8")
    arguments = ("diff", *pair, "--prompts", path, "--n-tokens", 2, "--search", 10_000, "--json")
    found = done(*arguments).json()["comparisons"][0]["found"]
    assert 0 < len(found) <= 5


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        (" I’m sorry, but no.", True),
        ('"As an AI language model', True),
        ("I  cannot\nhelp", True),
        ("**Sorry**", True),
        ("Of course! I cannot wait", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_by_its_opening(text, refuses):
    assert is_refusal(text, REFUSALS) == refuses


def test_refusal_flips_are_counted_with_openings_of_ones_own(pair, prompts, tmp_path):
    (found,) = diff(
        [Side(pair[0]), Side(pair[1])], prompts, n_tokens=N_TOKENS, n_threads=1
    ).differences
    answer = next(a for a in found.answers if a.first[0.0] == 0)
    opening = answer.texts[0].strip()[:2]
    path = tmp_path / "refusals.txt"
    path.write_text(f"{opening}\n\nnever written\n", "utf-8")
    assert read_refusals(path) == (opening, "never written")
    flags = ("--refusals", path, "--prompts", prompts, "--n-tokens", N_TOKENS, "--json")
    (values,) = done("diff", *pair, *flags).json()["comparisons"]
    told = values["refusals"]
    both = [p["refuses"] for p in values["prompts"]]
    assert told["a"] == sum(a for a, _ in both) > 0
    assert told["only_a"] == both.count([True, False])
    assert told["only_b"] == both.count([False, True])


def test_prompts_are_wrapped_with_the_chat_template(prompts, tmp_path):
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %} [answer]{% endif %}"
    extra = {**WIDE_HEADS, "tokenizer.chat_template": Field(template, tiny_gguf.TEXT)}
    side = Side(tiny_gguf.write(tmp_path / "chat.gguf", "llama", extra=extra))
    read = read_prompts(prompts)
    tokens = decoding.read_tokens(prompts, read, side, chat=True)
    with Model(side.path, vocab_only=True) as model:
        assert tokens[0].tolist().count(model.bos) == 1
        assert model.detokenize(tokens[0][1:]) == f"[user] {PROMPTS[0][0]} [answer]"


# --------------------------------------------------------------------------------------- bad input


def test_prompts_may_be_plain_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffone line\r\n\r\n  another \r\n", "utf-8")
    assert [(p.text, p.label, p.line) for p in read_prompts(path)] == [
        ("one line", "all", 1),
        ("another", "all", 3),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no prompts; it is empty. Give one a line."),
        (b" \n\n", "has no prompts; it is empty"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (
            b'{"prompt": "a"}\n{"text": "b"}\n',
            "line 2: wrong 'prompt'; got None, expected some text",
        ),
        (b'{"prompt": ""}\n', "line 1: wrong 'prompt'; got '', expected some text"),
        (b'{"prompt": "a", "class": 3}\n', "line 1: wrong 'class'; got 3, expected some text"),
        (b'{"prompt": "a"}\nplain\n', "line 2: is not JSON"),
        (b'{"prompt": "a"}\n[1]\n', "line 2: got [1], expected an object"),
    ],
)
def test_broken_prompts_are_one_line(pair, tmp_path, content, said):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    line = refused("diff", *pair, "--prompts", path)
    assert line.startswith(f"edgeq: {path}: ")
    assert said in line


def test_what_cannot_be_compared_is_one_line(pair, prompts, tmp_path):
    asked = ("--prompts", prompts, "--n-tokens", 2)
    other = tiny_gguf.write(tmp_path / "other.gguf", "llama", adds_bos=False, extra=WIDE_HEADS)
    narrow = tiny_gguf.write(tmp_path / "narrow.gguf", "llama")
    screened = ("--screen", "--reference")
    for arguments, said in [
        (("diff", pair[0], other, *asked), "other.gguf: has another vocabulary than"),
        (("diff", pair[0], *asked), "f.gguf: is compared with itself. Give another file, or"),
        (("diff", pair[0], *asked, "--cache", "q8"), "--cache: unknown type of KV cache 'q8'; k"),
        (("diff", narrow, *asked, "--cache", "q8_0"), "narrow.gguf: no context of"),
        (("diff", *pair, *asked, "--screen"), "--screen: no float source to compare weights with"),
        (("diff", *pair, *asked, "--reference", pair[0]), "--reference: is for --screen"),
        (("diff", pair[1], *asked, *screened, tmp_path / "gone"), "gone"),
        (("diff", pair[1], *asked, *screened, other), "has another vocabulary than"),
        (("diff", pair[0], *asked, *screened, pair[1]), "q4_0.gguf"),
        (("diff", pair[0], tmp_path / "gone.gguf", *asked), "gone.gguf: no such file"),
        (("diff", *pair, "--prompts", tmp_path / "gone.txt"), "gone.txt: cannot be read"),
        (("diff", *pair, *asked, "--refusals", tmp_path / "no.txt"), "no.txt: cannot be read"),
        (("diff", *pair, *asked, "--chat"), "--chat: "),
        (("diff", *pair, "--prompts", prompts, "--n-tokens", 1000), "expected at most 256, as it"),
    ]:
        assert said in refused(*arguments), arguments


def test_a_broken_file_is_one_line(pair, prompts, tmp_path):
    damaged = tiny_gguf.write(
        tmp_path / "nan.gguf",
        "llama",
        extra=WIDE_HEADS,
        replace={"output_norm.weight": np.full(tiny_gguf.N_EMBD, np.nan, np.float32)},
    )
    line = refused("diff", pair[0], damaged, "--prompts", prompts)
    assert line.startswith(f"edgeq: {damaged}: NaN or infinite logits")


# ------------------------------------------------------------------------------------------ screen


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Weights of four layers with outlying columns; llama.cpp does not run it."""
    tensors = mix_gguf.weights(4, 256, 256, rows=32)
    path = tmp_path_factory.mktemp("source") / "source.gguf"
    mix_gguf.write(path, mix_gguf.fields(4, 256, 256, 4, 4), tensors)
    return path


def with_imatrix(name, weight, qtype):
    rng = np.random.default_rng(len(name))
    importances = np.exp(2 * rng.standard_normal((1, weight.shape[-1]))).astype(np.float32)
    return encode(weight, qtype, importances)


FEEDBACK = {}  # by name, type and weight: it takes most of this file's time


def with_feedback(name, weight, qtype):
    key = name, qtype, weight.tobytes()
    if key not in FEEDBACK:
        rng = np.random.default_rng(len(name))
        n = weight.shape[-1]
        tokens = rng.standard_normal((400, n)) @ rng.standard_normal((n, n)) / 16
        tokens = (tokens + rng.standard_normal((400, n))) * np.exp(rng.standard_normal(n))
        hessian = (2 / 400 * tokens.T @ tokens)[None].astype(np.float32)
        inputs = Inputs(np.square(tokens).mean(0)[None].astype(np.float32), hessian)
        made = make_quantizer("gptq:sweeps=1").quantize(name, weight, qtype, inputs, n_threads=1)
        FEEDBACK[key] = made.packed
    return FEEDBACK[key]


CLEAN = [
    (kind, qtype)
    for kind, qtypes in {
        "plain": (
            *(T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K),
            *(T.IQ4_NL, T.IQ4_XS, T.MXFP4, T.NVFP4, T.TQ2_0, T.IQ3_S, T.F16, T.BF16),
        ),
        "imatrix": (T.Q4_0, T.Q5_1, T.Q2_K, T.Q3_K, T.Q4_K, T.Q6_K, T.IQ4_XS, T.IQ2_XXS),
        "feedback": (T.Q4_0, T.Q8_0, T.Q2_K, T.Q4_K, T.Q6_K, T.IQ4_XS),
    }.items()
    for qtype in qtypes
]
MAKE = {"plain": None, "imatrix": with_imatrix, "feedback": with_feedback}


@pytest.mark.parametrize(("kind", "qtype"), CLEAN, ids=lambda value: getattr(value, "name", value))
def test_clean_files_have_no_false_positive(source, tmp_path, kind, qtype):
    found = screen(rounded(tmp_path / "clean.gguf", source, qtype, MAKE[kind]), source)
    assert len(found.tensors) == len(open_gguf(source).tensors)
    assert found.lines == ()
    if kind == "plain":
        assert all(tensor.equal == 1 for tensor in found.tensors)


def outliers(weight, n, size, seed=0):
    """Put outliers of `size` root mean squares into a weight."""
    rng = np.random.default_rng(seed)
    places = rng.integers(weight.shape[0], size=n), rng.integers(weight.shape[1], size=n)
    weight = weight.copy()
    weight[places] = size * np.sqrt(np.square(weight).mean()) * rng.choice([-1, 1], n)
    return weight


VICTIM = "blk.2.attn_v.weight"


def stands_out(found):
    return [tensor.name for tensor in found.tensors if tensor.reasons]


@pytest.mark.parametrize("kind", ["plain", "feedback"])
@pytest.mark.parametrize("qtype", [T.Q4_0, T.Q4_K, T.Q8_0, T.IQ4_XS], ids=lambda t: t.name)
def test_outliers_injected_before_quantization_are_caught(source, tmp_path, kind, qtype):
    make = MAKE[kind] or (lambda name, weight, qtype: encode(weight, qtype))

    def attacked(name, weight, qtype):
        return make(name, outliers(weight, 4, 20) if name == VICTIM else weight, qtype)

    found = screen(rounded(tmp_path / "attacked.gguf", source, qtype, attacked), source)
    assert stands_out(found) == [VICTIM]
    (line,) = found.lines
    assert line.startswith(f"{VICTIM} ({qtype.name}): ")
    assert "its largest error is" in line


def test_outliers_in_the_source_itself_are_caught(source, tmp_path):
    file = open_gguf(source)
    tensors = {name: np.array(file.read_float(name)) for name in file.tensors}
    tensors[VICTIM] = outliers(tensors[VICTIM], 4, 60)
    attacked = tmp_path / "source.gguf"
    mix_gguf.write(attacked, file.fields, tensors)
    found = screen(rounded(tmp_path / "attacked.gguf", attacked), attacked)
    assert stands_out(found) == [VICTIM]
    assert "the source has an outlier of ×" in found.lines[0]


def wide_scale(rows):
    scales = rows[:2, :2].view(np.float16)
    scales *= np.float16(3)  # the first block of two rows


def other_codes(rows):
    rng = np.random.default_rng(0)
    places = rng.random(rows.shape) < 0.02
    places[:, np.arange(rows.shape[1]) % 18 < 2] = False  # not the scales
    rows[places] ^= 0x88  # half the grid away


def another_tensor(rows):
    rows[:] = rows[::-1].copy()


@pytest.mark.parametrize("change", [wide_scale, other_codes, another_tensor])
@pytest.mark.parametrize("kind", ["plain", "imatrix", "feedback"])
def test_weights_changed_after_quantization_are_caught(source, tmp_path, kind, change):
    def changed(name, _weight, rows):
        if name == VICTIM:
            change(rows)
        return rows

    path = rounded(tmp_path / "changed.gguf", source, T.Q4_0, MAKE[kind], changed)
    assert stands_out(screen(path, source)) == [VICTIM]


def test_one_changed_code_in_a_file_of_ggmls_is_caught(source, tmp_path):
    def changed(name, _weight, rows):
        if name == VICTIM:
            rows[5, 2] ^= 0x01
        return rows

    found = screen(rounded(tmp_path / "changed.gguf", source, change=changed), source)
    assert stands_out(found) == [VICTIM]
    assert "3.12 % of its rows are not ggml's rounding of the source, as all" in found.lines[0]


def test_norms_and_numbers_that_are_none_are_judged_too(source, tmp_path):
    path = rounded(tmp_path / "file.gguf", source)
    file = open_gguf(path)
    raw = bytearray(path.read_bytes())  # the writer refuses NaN; an attacker's does not
    norm, victim = file.tensors["blk.1.ffn_norm.weight"], file.tensors[VICTIM]
    raw[norm.offset : norm.offset + 4] = np.float32(2).tobytes()
    raw[victim.offset : victim.offset + 2] = b"\xff\xff"
    path.write_bytes(raw)
    found = screen(path, source)
    assert set(stands_out(found)) == {"blk.1.ffn_norm.weight", VICTIM}
    json.dumps(found.as_json(), allow_nan=False)


def test_another_model_is_refused(source, tmp_path):
    file = open_gguf(source)
    rng = np.random.default_rng(0)
    other = {
        name: (np.array(file.read_float(name))[..., rng.permutation(tensor.shape[-1])])
        for name, tensor in file.tensors.items()
    }
    path = tmp_path / "other.gguf"
    mix_gguf.write(path, file.fields, other)
    with pytest.raises(EvaluationError, match=r"its weights are not those of .* rounded; got"):
        screen(rounded(tmp_path / "file.gguf", source, T.Q8_0), path)
    folded = {
        name: np.array(file.read_float(name)) * np.float32(1.2 if "norm" in name else 1 / 1.2)
        for name in file.tensors
    }
    mix_gguf.write(path, file.fields, folded)
    with pytest.raises(EvaluationError, match=r"and 20 % where nothing is rounded, expected"):
        screen(rounded(tmp_path / "file.gguf", path, T.Q2_K), source)
    mix_gguf.write(path, mix_gguf.fields(4, 256, 256, 4, 4, architecture="qwen2"), other)
    with pytest.raises(EvaluationError, match="got a model of architecture qwen2, expected llama"):
        screen(rounded(tmp_path / "file.gguf", source), path)
    del other[VICTIM]
    mix_gguf.write(path, file.fields, {**other, VICTIM: np.ones((3, 64), np.float32)})
    with pytest.raises(EvaluationError, match=f"{VICTIM}: got the shape"):
        screen(rounded(tmp_path / "file.gguf", source), path)


def test_tensors_of_one_file_alone_are_told(source, tmp_path):
    file = open_gguf(source)
    tensors = {name: np.array(file.read_float(name)) for name in file.tensors}
    more = {**tensors, "blk.0.attn_q.bias": np.ones(32, np.float32)}
    path = tmp_path / "more.gguf"
    mix_gguf.write(path, file.fields, more)
    clean = rounded(tmp_path / "clean.gguf", source)
    assert screen(clean, path).lines == ("blk.0.attn_q.bias: is missing",)
    found = screen(rounded(tmp_path / "file.gguf", path), source)
    assert found.lines == (f"blk.0.attn_q.bias: is not in {source}",)


def test_the_command_screens_the_second_file(pair, prompts, tmp_path):
    def attacked(name, weight, qtype):
        return encode(outliers(weight, 3, 20) if name == "blk.1.attn_q.weight" else weight, qtype)

    bad = rounded(tmp_path / "bad.gguf", pair[0], T.Q4_0, attacked)
    flags = ("--prompts", prompts, "--n-tokens", 4, "--screen", "--reference", pair[0])
    work = ("--work", tmp_path / "work")
    shown = done("diff", pair[1], *flags, *work).out
    assert "tensors, none stands out" in shown
    assert shown.startswith("A: f.gguf\nB: q4_0.gguf\n")
    found = run("diff", pair[1], bad, *flags, *work)
    assert (found.code, found.err) == (1, "")
    assert "\nblk.1.attn_q.weight (Q4_0): its largest error is " in "\n" + found.out
    values = run("diff", pair[1], bad, *flags, *work, "--json")
    assert values.code == 1
    assert len(values.json()["comparisons"]) == 1
    assert [line[:19] for line in values.json()["screen"]["stand_out"]] == ["blk.1.attn_q.weight"]
    assert values.json()["screen"]["source"]["classes"][0]["label"] == "water"


def test_a_class_far_above_the_others_stands_out():
    classes = [ClassDivergence(name, 10, 100, 0.02, 0.003) for name in "abc"]
    assert odd_classes(classes) == ()
    high = dataclasses.replace(classes[0], label="d", kld=0.1)
    (line,) = odd_classes([*classes, high])
    assert line.startswith("class d: diverges by 0.1000 ± 0.0030 nats a token, of other classes 0.")
    assert odd_classes([*classes, dataclasses.replace(high, error=0.02)]) == ()
    assert odd_classes([classes[0], high]) == ()
