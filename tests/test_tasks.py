import dataclasses
import json
import types

import numpy as np
import pytest
import scipy.stats

from edgeq.errors import EvaluationError
from edgeq.runtime.model import Model
from edgeq.tasks import (
    Item,
    ItemScore,
    choose,
    compare,
    mcnemar,
    read_task,
    score,
    score_tasks,
    scoring,
    wilson,
)
from edgeq.tasks.scoring import Question, encode
from tests import tiny_gguf, tiny_pair
from tests.command_line import done, refused, run

NATS = 2e-5  # of a sum over up to 30 tokens: float32 logits, and keys and values in float32

HELLASWAG = """\
Cats: A cat sits by the door. it
2
barks at the moon.
reads a book about rivers.
waits for somebody.
is made of stone.
Rain: The street is wet. the water
0
runs down the hill.
burns very well.
is a kind of wood.
had been sold twice.
"""
CHOICES = [
    ("The light in the house", ["is on.", "has a winter of its own.", "two"], 0),
    ("They made a letter from", ["stone and water", "the small", "green light"], 1),
    ("People know", ["the river", "the stone", "the winter", "the house", "the"], 4),
    ("Some of them were called", ["just now.", "after all of it."], 1),
    ("Use water", ["as little as possible.", "."], 0),
]


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


OWN = lines({"context": c, "endings": e, "label": a} for c, e, a in CHOICES)
ARC = {
    "id": "1",
    "question": {
        "stem": "What is rain?",
        "choices": [{"text": "water", "label": "A"}, {"text": "stone", "label": "B"}],
    },
    "answerKey": "B",
}
HUB_ARC = {
    "question": "What is rain?",
    "choices": {"text": ["water", "stone"], "label": ["1", "2"]},
    "answerKey": "2",
}
PIQA = {"goal": "Open a door", "sol1": "Push it. ", "sol2": "Sing to it."}
LAMBADA = {"text": "The river runs to the sea"}


@pytest.fixture
def file(tmp_path):
    def write(content, name="task.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair.write(tmp_path_factory.mktemp("pair"))


def items_of(*choices):
    return [
        Item(context, tuple(f" {ending}" for ending in endings), answer, line)
        for line, (context, endings, answer) in enumerate(choices, start=1)
    ]


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


# ------------------------------------------------------------------------------------- the files


def test_hellaswag_is_read_as_llama_perplexity_reads_it(file):
    task = read_task(file(HELLASWAG, "task.txt"))
    assert task.kind == "hellaswag"
    assert [item.answer for item in task.items] == [2, 0]
    assert [item.line for item in task.items] == [1, 7]
    assert task.items[0].context == "Cats: A cat sits by the door. it"
    assert task.items[0].endings[2] == " waits for somebody."
    windows = "\ufeff" + HELLASWAG.replace("\n", "\r\n").removesuffix("\r\n")
    again = read_task(file(windows, "other.txt"))
    assert again.items == task.items
    assert again.items_sha256 == task.items_sha256
    assert again.items_sha256 != read_task(file(HELLASWAG, "task.txt"), 1).items_sha256


def test_arc_is_read_as_published_and_as_on_the_hub(file):
    for record in (ARC, HUB_ARC):
        task = read_task(file(lines([record])))
        assert task.kind == "arc"
        expected = Item("Question: What is rain?\nAnswer:", (" water", " stone"), 1, 1)
        assert task.items == (expected,)


def test_piqa_takes_labels_from_beside_or_from_the_line(file):
    path = file(lines([PIQA]) + "\n" + lines([PIQA]), "piqa.jsonl")
    file("1\n0\n", "piqa-labels.lst")
    task = read_task(path)
    assert (task.kind, [item.answer for item in task.items]) == ("piqa", [1, 0])
    assert [item.line for item in task.items] == [1, 3]
    assert task.items[0].context == "Question: Open a door\nAnswer:"
    assert task.items[0].endings == (" Push it.", " Sing to it.")
    assert read_task(file(lines([PIQA | {"label": 1}]))).items == task.items[:1]


@pytest.mark.parametrize(
    ("text", "context", "ending"),
    [
        ("The river runs to the sea", "The river runs to the", " sea"),
        ("He said: \n\nno", "He said: \n\n", "no"),
        ("a  b ", "a ", " b"),
    ],
)
def test_lambada_asks_for_the_last_word(text, context, ending, file):
    task = read_task(file(lines([{"text": text}])))
    assert task.kind == "lambada"
    assert task.items == (Item(context, (ending,), 0, 1),)


def test_own_tasks_are_read(file):
    task = read_task(file(OWN))
    assert task.kind == "choice"
    assert list(task.items) == items_of(*CHOICES)
    assert read_task(file(OWN.replace('"label": 0', '"label": "0"'))).items == task.items


def test_so_many_items_are_those_of_llama_perplexity(file):
    # drawn by a C++ program with hellaswag_score's generator and distribution
    assert choose(2000, 8) == [834, 1994, 1440, 1864, 0, 256, 604, 1998]
    assert sorted(choose(50, 99)) == list(range(50))
    task = read_task(file(OWN), 2)
    assert task.items == tuple(items_of(*CHOICES)[i] for i in choose(5, 2))
    assert read_task(file(OWN), 5).items == read_task(file(OWN)).items


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no items; it is empty"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (HELLASWAG + "more\n1\n", "line 13: the last item is cut off; got 2 lines, expected 6"),
        (HELLASWAG.replace("2\n", "4\n"), "line 2: wrong index of the right ending; got '4', exp"),
        ("Some prose.\nMore of it.\n", "line 2: wrong index of the right ending; got 'More of"),
        (HELLASWAG.replace("burns very well.", " "), "line 10: is empty, expected a context or an"),
        (HELLASWAG.replace("Rain: The street is wet. the water", ""), "line 7: is empty"),
        (OWN + "{", "line 6: is not JSON"),
        (OWN + "[1]", r"line 6: got \[1\], expected an object"),
        (OWN + '{"context": "\\ud800"}', "line 6: is not JSON"),
        (OWN + '{"context": "a", "label": 0}', "line 6: wrong 'endings'; got None, expected"),
        (OWN.replace('["just now.", ', "["), "line 4: wrong 'endings'; got .*, expected a list of"),
        (OWN.replace('"just now."', "3"), "line 4: wrong 'endings'; got 3, expected some text"),
        (OWN.replace('"label": 4', '"label": 5'), "line 3: wrong index .*; got 5, expected 0 to 4"),
        (OWN.replace('"label": 4', '"label": true'), "line 3: wrong index .*; got True"),
        (OWN.replace("People know", " "), "line 3: wrong 'context'; got ' ', expected some text"),
        (lines([{"a": 1, "b": 2}]), r"line 1: no known kind .*; got the fields \['a', 'b'\], exp"),
        (lines([ARC | {"answerKey": "C"}]), "line 1: wrong 'answerKey'; got 'C', expected one of"),
        (lines([ARC | {"question": {"stem": "x"}}]), "line 1: wrong 'choices'; got"),
        (lines([ARC | {"question": {"stem": "x", "choices": [1, 2]}}]), "wrong 'choices'"),
        (lines([ARC, HUB_ARC | {"choices": 3}]), "line 2: wrong 'choices'"),
        (lines([HUB_ARC | {"choices": {"text": ["a", "b"]}}]), "got None, expected 2 labels"),
        (lines([PIQA]), "no right answers; got neither a field 'label' nor task-labels.lst beside"),
        (lines([PIQA | {"label": 0}, PIQA]), "line 2: wrong index of the right ending; got None"),
        (lines([LAMBADA, {"text": "One"}]), "line 2: wrong 'text'; got 'One', expected two words"),
    ],
)  # fmt: skip
def test_broken_files_are_refused_by_line(content, message, file):
    path = file(content)
    with pytest.raises(EvaluationError, match=message) as caught:
        read_task(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_wrong_labels_beside_piqa_are_refused(file):
    path = file(lines([PIQA, PIQA]), "piqa.jsonl")
    file("1\n", "piqa-labels.lst")
    with pytest.raises(EvaluationError, match=r"piqa-labels\.lst: got 1 labels, expected 2"):
        read_task(path)
    file("1\n2\n", "piqa-labels.lst")
    with pytest.raises(EvaluationError, match=r"labels\.lst: line 2: wrong index .*got '2'"):
        read_task(path)
    with pytest.raises(EvaluationError, match="cannot be read: No such file"):
        read_task(path.parent / "missing")


# ------------------------------------------------------------------------------------ the scores


def slow(model, question):
    """Run the whole of every ending by itself; return Σ ln p of the tokens after the prefix."""
    sums = []
    for ending in question.endings:
        tokens = np.concatenate([question.prefix, ending])
        log_p = log_softmax(model.logits(tokens))
        rows = np.arange(len(question.prefix) - 1, len(tokens) - 1)
        sums.append(log_p[rows, tokens[rows + 1]].sum())
    return np.array(sums)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "deepseek2", "mamba"])
def test_scores_equal_those_of_single_sequences(kind, tmp_path):
    path = tiny_gguf.write(tmp_path / "tiny.gguf", kind)
    exact = {"n_threads": 1, "exact_attention": kind != "mamba"}
    with Model(path, n_ctx=128, **exact) as model:
        questions = [encode(model, item, "here") for item in items_of(*CHOICES)]
        expected = [slow(model, question) for question in questions]
    for n_seq in (5, 16):  # the last two share a batch
        with Model(path, n_ctx=128, n_seq=n_seq, **exact) as model:
            found = score(model, questions)
            assert score(model, []) == []
        for own, sums, question in zip(found, expected, questions, strict=True):
            np.testing.assert_allclose(own.log_likelihoods, sums, atol=NATS)
            lengths = [len(ending) for ending in question.endings]
            assert own.n_tokens.tolist() == lengths
            assert own.answer == (int((sums / lengths).argmax()),)
            assert own.is_right == (own.answer[0] == question.answer)
    assert len({own.answer for own in found}) > 1


def test_a_shared_prefix_changes_nothing(tiny):
    """Endings that hold the context themselves differ by the same, though little is shared."""
    with Model(tiny, n_ctx=256, n_seq=5, n_threads=1, exact_attention=True) as model:
        for item in items_of(*CHOICES):
            shared = encode(model, item, "here")
            own = tuple(np.concatenate([shared.prefix[1:], ending]) for ending in shared.endings)
            apart = Question("here", shared.prefix[:1], own, item.answer)
            more = (len(own) - 1) * (len(shared.prefix) - 1)
            assert apart.n_tokens(shares=True) == shared.n_tokens(shares=True) + more
            sums = [score(model, [question])[0].log_likelihoods for question in (shared, apart)]
            np.testing.assert_allclose(*(each - each[0] for each in sums), atol=5 * NATS)


def test_all_that_endings_begin_with_is_shared_and_not_counted(tiny):
    with Model(tiny, vocab_only=True) as model:
        (item,) = items_of(("They", ["know the", "know the river", "know them"], 0))
        question = encode(model, item, "here")
        # each keeps a token: the first has no more than what the others begin with
        assert model.detokenize(question.prefix) == "They know "
        assert [model.detokenize(ending) for ending in question.endings] == [
            "the", "the river", "them",
        ]  # fmt: skip
        assert question.prefix[0] == model.bos


def test_endings_without_a_token_in_common_are_refused(tmp_path):
    path = tiny_gguf.write(tmp_path / "plain.gguf", "llama", adds_bos=False)
    with Model(path, vocab_only=True) as model:
        item = Item("", ("a b", "c d"), 0, 1)
        with pytest.raises(EvaluationError, match="here: context and endings share no token"):
            encode(model, item, "here")


def test_a_last_word_is_right_if_greedy_decoding_gives_it(tiny):
    with Model(tiny, n_ctx=64, n_seq=4, n_threads=1) as model:
        prefix = model.tokenize("The river runs to the")
        tokens = prefix
        for _ in range(4):
            tokens = np.append(tokens, model.logits(tokens)[-1].argmax()).astype(np.int32)
        greedy = tokens[len(prefix) :]
        wrong = greedy.copy()
        wrong[2] = (wrong[2] + 1) % model.n_vocab
        found = score(model, [Question("here", prefix, (end,), 0) for end in (greedy, wrong)])
    assert [own.is_right for own in found] == [True, False]
    assert [own.answer for own in found] == [tuple(greedy.tolist()), tuple(greedy[:3].tolist())]


def test_right_answers_equal_those_of_llama_perplexity(tiny, file):
    words = tiny_gguf.text(11, 24 * 60).split()
    pieces = iter([" ".join(words[i : i + 4]) for i in range(0, 20 * 60, 4)])
    groups = zip(*[pieces] * 5, strict=True)
    text = "".join("\n".join([c, f"{i % 4}", *ends, ""]) for i, (c, *ends) in enumerate(groups))
    (found,) = score_tasks(tiny, [read_task(file(text), 40)], n_threads=1)
    # llama-perplexity --hellaswag --hellaswag-tasks 40 on these files; best and second ending of
    # every item are 0.01 nats a token apart or more
    expected = "0100000010011000010100000010001000001010"
    assert "".join(str(int(own.is_right)) for own in found) == expected


def test_a_file_of_last_words_is_asked(tiny, file):
    task = read_task(file(lines([LAMBADA, {"text": "Many people know"}])))
    (found,) = score_tasks(tiny, [task], n_threads=1)
    with Model(tiny, n_ctx=64, n_threads=1) as model:
        for item, own in zip(task.items, found, strict=True):
            question = encode(model, item, "here")
            assert model.detokenize(question.endings[0]) == item.endings[0]
            assert own.log_likelihoods == pytest.approx(slow(model, question), abs=1e-2)
            assert own.answer[0] == model.logits(question.prefix)[-1].argmax()


def test_several_tasks_are_asked_in_one_go(tiny, file):
    seen = []
    tasks = [read_task(file(OWN)), read_task(file(HELLASWAG, "task.txt"))]
    found = score_tasks(tiny, tasks, n_threads=1, progress=lambda *counts: seen.append(counts))
    assert [len(scores) for scores in found] == [5, 2]
    assert [counts[1] for counts in seen] == [7] * len(seen)
    assert [counts[0] for counts in seen][-1] == 7
    assert seen == sorted(seen)
    again = [score_tasks(tiny, [task], n_threads=1)[0] for task in tasks]
    assert [[own.answer for own in scores] for scores in again] == [
        [own.answer for own in scores] for scores in found
    ]


def test_items_larger_than_the_context_are_refused_or_get_one(tiny, file, monkeypatch):
    endings = ["stone " * 300, "river " * 300]
    path = file(lines([{"context": "They", "endings": endings, "label": 0}]))
    task = read_task(path)
    (found,) = score_tasks(tiny, [task], n_threads=1)
    assert found[0].n_tokens.sum() > scoring.N_CTX * scoring.N_SEQ
    with Model(tiny, n_ctx=64, n_seq=2, n_threads=1) as model:
        question = encode(model, task.items[0], "there")
        with pytest.raises(EvaluationError, match=r"there: does not fit; got \d+ tokens in 2 end"):
            score(model, [question])
        three = items_of(CHOICES[0])
        with pytest.raises(EvaluationError, match="tokens in 3 endings, expected at most 128 in 2"):
            score(model, [encode(model, three[0], "there")])
    learned = types.SimpleNamespace(tensors={"position_embd.weight": None})
    monkeypatch.setattr(scoring, "open_gguf", lambda _path: learned)
    with pytest.raises(EvaluationError, match=r"line 1: \d+ tokens; .* trained on at most 256"):
        score_tasks(tiny, [task], n_threads=1)


def test_models_with_a_state_get_room_for_every_prefix(tmp_path, file):
    path = tiny_gguf.write(tmp_path / "mamba.gguf", "mamba")
    record = {"context": "They know " * 80, "endings": ["a", "b", "c", "d", "e"], "label": 0}
    ((found,),) = score_tasks(path, [read_task(file(lines([record])))], n_threads=1)
    with Model(path, vocab_only=True) as model:
        assert not model.shares_tokens
        assert 5 * len(model.tokenize(record["context"])) > 5 * scoring.N_CTX
    assert len(found.log_likelihoods) == 5


def test_logits_that_are_not_finite_are_refused(tmp_path, file):
    bad = np.full((265, tiny_gguf.N_EMBD), np.nan, np.float32)
    broken = tiny_gguf.write(tmp_path / "broken.gguf", "llama", replace={"output.weight": bad})
    with pytest.raises(EvaluationError, match=r"NaN or infinite logits at .*task\.jsonl: line 1"):
        score_tasks(broken, [read_task(file(OWN))], n_threads=1)


# ------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("to_wrong", [0, 1, 2, 7, 30, 640])
@pytest.mark.parametrize("to_right", [0, 1, 5, 30, 700])
def test_mcnemar_equals_the_exact_binomial_test(to_wrong, to_right):
    n = to_wrong + to_right
    expected = scipy.stats.binomtest(to_wrong, n).pvalue if n else 1.0
    assert mcnemar(to_wrong, to_right) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_changes_one_way_is_a_power_of_two():
    assert [mcnemar(0, n) for n in range(5)] == [1, 1, 0.5, 0.25, 0.125]
    assert mcnemar(10, 0) == 2**-9
    assert mcnemar(2, 3) == 1.0


@pytest.mark.parametrize(("n_right", "n_items"), [(0, 7), (7, 7), (1, 3), (181, 400)])
def test_intervals_are_wilsons(n_right, n_items):
    found = wilson(n_right, n_items)
    expected = scipy.stats.binomtest(n_right, n_items).proportion_ci(method="wilson")
    assert found.value == n_right / n_items
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_flips_are_counted_both_ways():
    def scores(answers, right):
        zeros, ones = np.zeros(2), np.ones(2, np.int64)
        pairs = zip(answers, right, strict=True)
        return [ItemScore(zeros, ones, (answer,), answer == own) for answer, own in pairs]

    right = [0, 1, 2, 3, 0, 1]
    own = scores([0, 0, 1, 3, 1, 1], right)
    reference = scores([0, 1, 0, 0, 1, 2], right)
    found = compare(own, reference)
    assert (found.to_wrong, found.to_right, found.changed) == (1, 2, 4)
    assert found.agreement.value == pytest.approx(2 / 6)
    assert found.reference.value == pytest.approx(2 / 6)
    assert found.p_value == mcnemar(1, 2) == 1.0
    same = compare(own, own)
    assert (same.changed, same.agreement.value, same.p_value) == (0, 1.0, 1.0)
    with pytest.raises(EvaluationError, match="got 6 answers and 5 of the reference"):
        compare(own, reference[:5])


# ------------------------------------------------------------------------------ the command line


def test_evaluate_asks_tasks_and_compares_with_the_reference(pair, file, tmp_path):
    reference, candidate = pair
    own, hellaswag = file(OWN), file(HELLASWAG, "task.txt")
    asked = ("evaluate", candidate, "--tasks", own, "--tasks", hellaswag, "--no-speed")
    against = (*asked, "--reference", reference, "--work", tmp_path / "work")
    values = done(*against, "--json").json()
    assert values["files"][0]["evaluation"] is None
    first, second = values["tasks"]
    assert (first["kind"], first["n_items"], second["n_items"]) == ("choice", 5, 2)
    assert first["task"] == str(own)
    assert first["items_sha256"] == read_task(own).items_sha256
    (expected,) = score_tasks(reference, [read_task(own)], n_threads=1)
    (found,) = score_tasks(candidate, [read_task(own)], n_threads=1)
    assert first["answers"].split() == [str(own.answer[0]) for own in found]
    assert first["right"] == "".join(str(int(own.is_right)) for own in found)
    assert first["accuracy"]["value"] == first["right"].count("1") / 5
    assert first["reference"]["right"] == "".join(str(int(own.is_right)) for own in expected)
    comparison = dataclasses.asdict(compare(found, expected))
    assert first["reference"]["accuracy"] == comparison.pop("reference")
    assert first["comparison"] == comparison
    shown = done(*against).out
    table = shown[shown.index("| task") :].splitlines()
    assert len(table) == 4
    assert "task.jsonl" in table[2]
    assert "task.txt" in table[3]
    assert "McNemar's p" in table[0]
    assert "not judged" not in shown


def test_tasks_come_after_what_a_text_gives(pair, texts, file, tmp_path):
    common = ("--text", texts[1], "--ctx", 64, "--chunks", 2, "--no-speed", "--task-items", 3)
    work = ("--reference", pair[0], "--tasks", file(OWN), "--work", tmp_path / "work")
    shown = done("evaluate", *pair, *common, *work).out
    assert shown.index("| file") < shown.index("KL divergence percentiles") < shown.index("| task")
    values = done("evaluate", *pair, *common, *work, "--json").json()
    itself, candidate = values["tasks"]
    assert itself["n_items"] == candidate["n_items"] == 3
    assert itself["comparison"]["changed"] == 0
    assert values["files"][1]["evaluation"]["summary"]["kld"]["value"] > 0


def test_without_a_reference_there_is_accuracy_alone(tiny, file, tmp_path):
    asked = ("evaluate", tiny, "--tasks", file(OWN), "--no-speed")
    (values,) = done(*asked, "--json").json()["tasks"]
    assert values["reference"] is None
    assert values["comparison"] is None
    shown = done(*asked).out
    assert "accuracy (95 %)" in shown
    assert "McNemar" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["task.jsonl"]


def test_tasks_that_cannot_be_asked_are_one_line(pair, texts, file, tmp_path):
    tasks = ("--tasks", file(OWN), "--work", tmp_path / "work", "--no-speed")
    stored = tmp_path / "logits.kld"
    text = ("--text", texts[1], "--ctx", 64, "--chunks", 2)
    judged = ("evaluate", pair[1], "--reference")
    done(*judged, pair[0], *text, "--save-logits", stored, *tasks)
    assert "holds logits, which answer no tasks" in refused(*judged, stored, *tasks)
    other = tiny_gguf.write(tmp_path / "other.gguf", "llama", adds_bos=False)
    assert "has another vocabulary than" in refused(*judged, other, *tasks)
    line = refused(*judged, pair[0], "--save-logits", tmp_path / "more.kld", *tasks)
    assert "evaluate: no text" in line
    line = refused(*judged, pair[0], "--tasks", file("{", "broken.jsonl"))
    assert "broken.jsonl: line 1: is not JSON" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "t", "--text", "x"), "Missing option '--reference'. Only --tasks can do"),
        (("--tasks", "t", "--save-logits", "x"), "Missing option '--reference'"),
        (("--reference", "r", "--task-items", 3), "--task-items: no tasks"),
        (("--tasks", "t", "--task-items", 0), "0 is not in the range x>=1"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message):
    result = run("evaluate", "o.gguf", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
