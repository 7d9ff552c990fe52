"""Items after whose prompt the model writes, and the suite that needs no file."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGUFValueType

from converters.gguf_header import Field
from edgeq import reporting
from edgeq.errors import EvaluationError
from edgeq.runtime.model import Model
from edgeq.tasks import (
    MATCHES,
    Item,
    OpenItem,
    OpenScore,
    Task,
    compare,
    facts,
    overlap,
    read_task,
    read_tasks,
    write_answers,
)
from edgeq.tasks.kick import SUITE
from edgeq.tasks.matching import normalized
from tests import tiny_gguf, tiny_pair
from tests.command_line import done, refused

LONG = {"llama.context_length": Field(8192, GGUFValueType.UINT32)}
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [answer]"
PROMPTS = ["The light in the house", "They made", "Many people know that the river", "Two", "He"]


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


def templated(template):
    return {"tokenizer.chat_template": Field(template, GGUFValueType.STRING)}


@pytest.fixture
def file(tmp_path):
    def write(content, name="open.jsonl"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else lines(content), "utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny_pair.write(tmp_path_factory.mktemp("pair"))


def task_of(*items):
    return Task("here", "open", items)


# ------------------------------------------------------------------------------------- the files


def test_open_items_are_read_verbatim(file):
    given = {"prompt": " Q: a?\nA:\n", "answer": "b"}
    more = {"match": "contains", "stop": "\n", "max_tokens": 5, "chat": True, "group": "x", "id": 3}
    listed = {"answer": ["b", "c"], "stop": ["\n", "."]}
    nothing = {"prompt": "Shout.", "match": "upper_case"}
    task = read_task(file([given, given | more, given | listed, nothing]))
    assert task.kind == "open"
    assert task.items == (
        OpenItem(" Q: a?\nA:\n", ("b",), "exact", (), 32, 1),
        OpenItem(" Q: a?\nA:\n", ("b",), "contains", ("\n",), 5, 2, chat=True, group="x"),
        OpenItem(" Q: a?\nA:\n", ("b", "c"), "exact", ("\n", "."), 32, 3),
        OpenItem("Shout.", (), "upper_case", (), 32, 4),
    )
    one, same, other = (
        read_task(file([given | change])).items_sha256
        for change in ({}, {"group": "x"}, {"max_tokens": 31})
    )
    assert one == same != other


GOOD = {"prompt": "Say", "answer": "b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "wrong 'prompt'; got ' ', expected some text. Mend the line."),
        ({"prompt": 3}, "wrong 'prompt'; got 3, expected some text"),
        ({"answer": None}, r"wrong 'answer'; got None, expected some text, or a list of texts \(m"),
        ({"answer": []}, r"wrong 'answer'; got \[\], expected some text"),
        ({"answer": ""}, "wrong 'answer'; got '', expected some text, or a list of texts, none"),
        ({"answer": ["a", 4]}, r"wrong 'answer'; got \['a', 4\], expected some text, or a list"),
        ({"answer": 4}, "wrong 'answer'; got 4, expected some text"),
        ({"answer": "The!"}, "got 'The!', expected words beside articles and punctuation"),
        ({"answer": ["a"] * 65}, "expected some text, or a list of at most 64"),
        ({"match": "exakt"}, "unknown match 'exakt'; known: exact, .*Did you mean 'exact'. Mend"),
        ({"match": ["exact"]}, r"wrong 'match'; got \['exact'\], expected one of exact, "),
        ({"match": "last_number"}, "got 'b', expected numbers like '42'"),
        ({"match": "bullets"}, "got 'b', expected a count like '3'"),
        ({"match": "bullets", "answer": "0"}, "got '0', expected a count like '3'"),
        ({"match": "lower_case"}, "got 'b', expected none: this match takes no answer"),
        ({"match": "ends_with", "answer": " "}, r"got ' ', expected some text \(match 'ends_with'"),
        ({"max_tokens": 0}, "wrong 'max_tokens'; got 0, expected 1 to 4096"),
        ({"max_tokens": True}, "wrong 'max_tokens'; got True, expected a number from 1 to 4096"),
        ({"stop": [""]}, r"wrong 'stop'; got \[''\], expected some text, or a list of texts"),
        ({"stop": 1}, "wrong 'stop'; got 1, expected some text"),
        ({"chat": "yes"}, "wrong 'chat'; got 'yes', expected true or false"),
        ({"group": 1}, "wrong 'group'; got 1, expected some text"),
    ],
)  # fmt: skip
def test_broken_items_are_refused_by_line(change, message, file):
    path = file([GOOD, GOOD | change])
    with pytest.raises(EvaluationError, match=message) as caught:
        read_task(path)
    assert str(caught.value).startswith(f"{path}: line 2: ")
    assert "\n" not in str(caught.value)


def test_a_missing_prompt_is_no_known_kind(file):
    with pytest.raises(EvaluationError, match=r"line 1: no known kind of task.* prompt"):
        read_task(file([{"answer": "b"}]))
    with pytest.raises(EvaluationError, match="line 2: wrong 'prompt'; got None"):
        read_task(file([GOOD, {"answer": "b"}]))


# -------------------------------------------------------------------------------------- judgement


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Eiffel-Tower, a\ttower!", "eiffeltower tower"),
        ("“Größe” — an ANSWER…", "größe answer"),
        ("theatre another", "theatre another"),
        ("$5", "5"),
        ("", ""),
    ],
)
def test_words_are_compared_as_squad_has_it(text, words):
    assert normalized(text) == words


@pytest.mark.parametrize(
    ("match", "text", "answers", "is_right"),
    [
        ("exact", " The Paris. ", ["paris"], True),
        ("exact", "Paris is", ["Paris"], False),
        ("exact", "Rome", ["Paris", "Rome"], True),
        ("first_line", "\nParis\nLyon", ["Paris"], True),
        ("first_line", "Lyon\nParis", ["Paris"], False),
        ("first_line", "", ["Paris"], False),
        ("starts_with", "Paris, of course", ["Paris"], True),
        ("starts_with", "Parisian", ["Paris"], False),
        ("contains", "It is New  Delhi!", ["New Delhi"], True),
        ("contains", "1234567", ["3456"], False),
        ("contains_all", "Anna found her ring.", ["Anna", "ring"], True),
        ("contains_all", "Anna found it.", ["Anna", "ring"], False),
        ("last_number", "3 + 4 is 1,007.50.", ["1007.5"], True),
        ("last_number", "7, no: 8", ["7"], False),
        ("last_number", "seven", ["7"], False),
        ("ends_with", 'So he went "Home."', ["home"], True),
        ("ends_with", "at chromehome", ["home"], False),
        ("ends_with", "home at last", ["home"], False),
        ("lacks", "It rains.", ["and"], True),
        ("lacks", "Rain and sand", ["and"], False),
        ("lacks", "", ["and"], False),
        ("lower_case", "all of it, 3 times", [], True),
        ("lower_case", "All", [], False),
        ("lower_case", "123", [], False),
        ("upper_case", "IT RAINS", [], True),
        ("bullets", "- one\n* two\nthree", ["2"], True),
        ("bullets", "-one\n**two**\n", ["2"], False),
        ("most_words", "one two", ["2"], True),
        ("most_words", "one two three", ["2"], False),
        ("most_words", " ", ["2"], False),
    ],
)
def test_texts_are_judged(match, text, answers, is_right):
    assert MATCHES[match].judge(text, answers).is_right == is_right


def test_the_same_answer_is_more_than_the_same_text():
    judge = MATCHES["contains"].judge
    assert judge("It is Paris.", ["Paris"]).answer == judge("paris, sure", ["Paris"]).answer
    assert judge("It is Rome.", ["Paris"]).answer != judge("Lyon", ["Paris"]).answer
    number = MATCHES["last_number"].judge
    assert number("so 1,200", ["7"]).answer == number("1200.0", ["7"]).answer == "1200"


# ---------------------------------------------------------------------------------------- writing


def greedy(model, prompt, n_tokens):
    tokens = prompt
    for _ in range(n_tokens):
        tokens = np.append(tokens, model.logits(tokens)[-1].argmax()).astype(np.int32)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_texts_are_those_of_greedy_decoding_up_to_the_stop(kind, tmp_path):
    path = tiny_gguf.write(tmp_path / "tiny.gguf", kind)
    with Model(path, n_ctx=128, n_threads=1) as model:
        tokens = {prompt: model.tokenize(prompt) for prompt in PROMPTS}
        texts = {p: model.detokenize(greedy(model, own, 12)) for p, own in tokens.items()}
    items = [OpenItem(prompt, ("never",), "contains", ("never",), 12) for prompt in PROMPTS]
    for prompt, text in texts.items():
        for stop in (text[6:8], text[3:5]):
            before = text.lstrip().split(stop)[0].strip()
            items.append(OpenItem(prompt, (before,), "exact", (stop, "never"), 12))
    seen = []
    (found,) = write_answers(
        path, [task_of(*items)], n_threads=1, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(8, 15), (15, 15)]
    for item, own in zip(items, found, strict=True):
        assert own.prompt.tolist() == tokens[item.prompt].tolist()
        assert own.text == texts[item.prompt].lstrip().split(item.stop[0])[0].strip()
        assert own.is_right == (item.answers != ("never",))
    assert len({own.text for own in found}) > 5


def test_max_tokens_is_each_items_own(tiny):
    items = [OpenItem(PROMPTS[0], ("x",), "exact", (), n) for n in (2, 9)]
    ((short, long),) = write_answers(tiny, [task_of(*items)], n_threads=1)
    with Model(tiny, n_ctx=64, n_threads=1) as model:
        written = greedy(model, short.prompt, 9)
        assert short.text == model.detokenize(written[:2]).strip()
        assert long.text == model.detokenize(written).strip()


def test_prompts_that_do_not_fit_are_refused(tiny, file):
    task = read_task(file([GOOD, GOOD | {"prompt": "stone " * 300}]))
    expected = r"line 2: got a prompt of \d+ tokens and 32 to write; .* trained on at most 256"
    with pytest.raises(EvaluationError, match=expected):
        write_answers(tiny, [task], n_threads=1)
    fits = read_task(file([GOOD | {"max_tokens": 250}]))
    assert len(write_answers(tiny, [fits], n_threads=1)[0]) == 1


def test_chats_need_a_template_and_get_it(tiny, tmp_path):
    items = OpenItem("Hi there", ("x",), "exact", chat=True), OpenItem("Hi", ("x",), "exact")
    with pytest.raises(EvaluationError, match=r"here: line 0: asks as a chat: .*template has 0 ch"):
        write_answers(tiny, [task_of(*items)], n_threads=1)
    path = tiny_gguf.write(tmp_path / "chat.gguf", "llama", extra=templated(TEMPLATE))
    ((chat, plain),) = write_answers(path, [task_of(*items)], n_threads=1)
    with Model(path, vocab_only=True) as model:
        assert model.detokenize(chat.prompt[1:]).strip() == "[user] Hi there [answer]"
        assert model.detokenize(plain.prompt[1:]).strip() == "Hi"


def test_broken_files_are_refused(tmp_path):
    bad = np.full((265, tiny_gguf.N_EMBD), np.nan, np.float32)
    broken = tiny_gguf.write(tmp_path / "broken.gguf", "llama", replace={"output.weight": bad})
    with pytest.raises(EvaluationError, match=r"broken\.gguf: NaN or infinite logits"):
        write_answers(broken, [task_of(OpenItem("a", ("x",), "exact"))], n_threads=1)


# ------------------------------------------------------------------------------------- agreement


def slow_overlap(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else best
    return 2 * table[-1, -1] / (len(a) + len(b))


def test_overlap_is_the_f1_of_the_longest_common_subsequence():
    rng = np.random.default_rng(0)
    for n, m in [(1, 1), (5, 9), (30, 12), (40, 40)]:
        a, b = rng.integers(4, size=n), rng.integers(4, size=m)
        assert overlap(a, b) == pytest.approx(slow_overlap(a, b))
    one, none = np.arange(3), np.arange(0)
    assert [overlap(one, one), overlap(none, none), overlap(one, none)] == [1, 1, 0]
    assert overlap(np.array([1, 2, 3, 4]), np.array([1, 9, 3])) == pytest.approx(4 / 7)


def test_texts_are_compared_beside_answers():
    def scores(*texts):
        return [
            OpenScore(
                np.arange(1), text, np.array([ord(c) for c in text]), text[:1], text[0] == "a"
            )
            for text in texts
        ]

    found = compare(scores("ab", "ac", "x", "ad"), scores("ab", "ab", "ab", "y"))
    assert (found.to_wrong, found.to_right, found.changed) == (1, 1, 2)
    assert found.texts.same.value == 0.25
    assert found.texts.overlap == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert found.texts.overlap_error == pytest.approx(np.std([1, 0.5, 0, 0], ddof=1) / 2)
    single = compare(scores("ab"), scores("ab"))
    assert (single.texts.overlap, single.texts.overlap_error) == (1.0, None)


# ---------------------------------------------------------------------------------------- suites


def test_a_suite_is_made_of_its_seed_alone():
    whole = {task.source: task for task in read_tasks(["kick"])}
    assert list(whole) == [f"kick:{part}" for part in SUITE.parts]
    some = read_tasks(["kick:summary,factoid"])
    assert [task.source for task in some] == ["kick:summary", "kick:factoid"]
    assert [task.items for task in some] == [whole[task.source].items for task in some]
    for task in read_tasks(["kick:seed=1"]):
        part = task.source.partition(",")[0]
        assert task.source == f"{part},seed=1"
        assert task.items_sha256 != whole[part].items_sha256
    for task in read_tasks(["kick"], 7):
        assert len(task.items) == 7
        assert task.kind == "kick"
        assert task.where(task.items[6]) == f"{task.source}: item 7"
    (most,) = read_tasks(["kick:factoid"], 10**4)
    assert 150 < len(most.items) == len({item.prompt for item in most.items})


def test_a_chat_has_no_examples_before_the_question():
    (plain,), (chat,) = (read_tasks([f"kick:factoid{more}"], 3) for more in ("", ",chat=true"))
    assert chat.source == "kick:factoid,chat=true"
    for item, own in zip(plain.items, chat.items, strict=True):
        assert item.prompt.endswith(f"\n\nQuestion: {own.prompt}\nAnswer:")
        assert (item.chat, own.chat, own.answers) == (False, True, item.answers)


def test_a_file_wins_over_a_suite_by_its_directory(file, tmp_path, monkeypatch):
    file([GOOD], "kick")
    monkeypatch.chdir(tmp_path)
    (task,) = read_tasks(["./kick"])
    assert (task.kind, task.source) == ("open", "kick")
    assert len(read_tasks(["kick"])) == 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kick:factoids", "unknown part 'factoids'; known: .*Did you mean 'factoid'"),
        ("kick:", None),
        ("kick:summary,seed=x", "seed is 'x', expected 0 to 4294967295"),
        ("kick:seed=4294967296", "seed is '4294967296', expected"),
        ("kick:chat=1", "chat is '1', expected true or false"),
        ("kick:seeds=1", "unknown setting 'seeds'; known: chat, seed. Did you mean 'seed'"),
        ("kik", "kik: cannot be read: No such file"),
    ],
)
def test_wrong_names_are_refused(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if message is None:
        assert len(read_tasks([spec])) == 5
        return
    with pytest.raises(EvaluationError, match=message):
        read_tasks([spec])


@pytest.mark.parametrize("chat", [False, True])
def test_every_open_item_can_be_right_and_wrong(chat):
    for task in read_tasks([f"kick:chat={str(chat).lower()}"]):
        for item in task.items:
            if not isinstance(item, OpenItem):
                continue
            judge = MATCHES[item.match].judge
            right = " ".join(item.answers) or {"lower_case": "a", "upper_case": "A"}[item.match]
            if item.match == "bullets":
                right = "- x\n" * int(item.answers[0])
            right = "rain" if item.match in ("lacks", "most_words") else right
            assert judge(right, item.answers).is_right, item
            assert not judge("", item.answers).is_right, item
            assert item.chat is chat


def test_a_hidden_code_stands_once_where_it_should():
    (task,) = read_tasks(["kick:retrieval"])
    assert len({item.group for item in task.items}) == 9
    for item in task.items:
        texts = item.prompt.split("\n\n")[:-1]
        k, depth = re.fullmatch(r"(\d) paragraphs, (\w+)", item.group).groups()
        place = {"beginning": 0, "middle": int(k) // 2, "end": int(k)}[depth]
        assert [item.answers[0] in text for text in texts].index(True) == place
        assert item.prompt.count(item.answers[0]) == 1
        assert len(texts) == int(k) + 1
        assert item.prompt.count("door code") == 4  # the decoy's, the question's, the answer's


def solved(question):
    """Solve a puzzle of the suite in another way than it was made."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    names = re.findall(r"(\w+) is \w+ than (\w+)", question)
    if names:
        (least,) = {b for _, b in names} - {a for a, _ in names}
        return least
    if "gives" in question:
        return str(numbers[0] - numbers[1] + numbers[2])
    if "number" in question:
        return str(2 * numbers[-1] - numbers[-2])
    if "Today" in question:
        days = list(facts.DAYS) * 2
        return days[days.index(re.search(r"is (\w+)\.", question)[1]) + numbers[0]]
    if "turns" in question:
        turned = re.search(r"looks (\w+)", question)[1]
        times = {"once": 1, "twice": 2, "three times": 3}
        for _ in range(next(n for words, n in times.items() if words in question)):
            turned = {"north": "east", "east": "south", "south": "west", "west": "north"}[turned]
        return turned
    return None


def test_puzzles_have_the_right_answer():
    (task,) = read_tasks(["kick:reasoning"], 300)
    assert len(task.items) == len({item.context for item in task.items}) == 300
    n_solved = 0
    for item in task.items:
        assert isinstance(item, Item)
        assert len(set(item.endings)) == 4
        right = item.endings[item.answer].strip()
        expected = solved(item.context)
        if expected is None:
            kind = re.search(r"one of (\w+)", item.context)[1]
            words = [ending.strip() in facts.KINDS[kind] for ending in item.endings]
            assert words == [i != item.answer for i in range(4)]
        else:
            assert right == expected, item
            n_solved += 1
    assert n_solved > 200


# ------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def long_pair(tmp_path_factory):
    """A model and a changed one, with room for the suite's prompts."""
    place = tmp_path_factory.mktemp("long")
    extra = LONG | templated(TEMPLATE)
    changed = {"output.weight": tiny_gguf.values("other", (265, tiny_gguf.N_EMBD))}
    return SimpleNamespace(
        reference=tiny_gguf.write(place / "reference.gguf", "llama", extra=extra),
        same=tiny_gguf.write(place / "same.gguf", "llama", extra=extra),
        other=tiny_gguf.write(place / "other.gguf", "llama", extra=extra, replace=changed),
        chatty=tiny_gguf.write(
            place / "chatty.gguf", "llama", extra=LONG | templated("!" + TEMPLATE)
        ),
    )


def test_evaluate_lets_files_write_and_shows_it_in_a_report(pair, file, tmp_path):
    reference, candidate = pair
    items = [GOOD | {"prompt": prompt, "max_tokens": 6, "group": prompt[:1]} for prompt in PROMPTS]
    own = file(items)
    asked = ("evaluate", candidate, "--reference", reference, "--tasks", own, "--no-speed")
    work = ("--work", tmp_path / "work")
    shown = done(*asked, *work).out
    header, _, row = shown[shown.index("| task") :].splitlines()
    assert [name.strip() for name in header.split("|")[-3:-1]] == ["same text", "overlap"]
    out = done(*asked, *work, "--json")
    (task,) = out.json()["tasks"]
    tasks = [read_task(own)]
    (found,) = write_answers(candidate, tasks, n_threads=1)
    (expected,) = write_answers(reference, tasks, n_threads=1)
    assert task["texts"] == [score.text for score in found]
    assert task["reference"]["texts"] == [score.text for score in expected]
    assert "answers" not in task
    texts = compare(found, expected).texts
    assert task["comparison"]["texts"]["same"]["value"] == texts.same.value < 1
    assert task["comparison"]["texts"]["overlap"] == texts.overlap < 1
    assert f"{100 * texts.same.value:.2f} %" in row
    assert f"{texts.overlap:.3f}" in row
    assert {name: counts["n_items"] for name, counts in task["groups"].items()} == {
        "T": 3, "M": 1, "H": 1,
    }  # fmt: skip
    saved = file(out.out, "measured.json")
    written = reporting.write_page([saved], tmp_path / "page.html")
    page = written.paths[0].read_text("utf-8")
    assert "same text" in page
    assert f"{100 * texts.same.value:.2f} %" in page


def test_the_suite_is_asked_by_name(long_pair, tmp_path):
    common = ("--reference", long_pair.reference, "--work", tmp_path / "work", "--no-speed")
    asked = ("--tasks", "kick", "--task-items", 2, *common, "--json")
    tasks = done("evaluate", long_pair.same, long_pair.other, *asked).json()["tasks"]
    assert [task["task"] for task in tasks[::2]] == [f"kick:{part}" for part in SUITE.parts]
    for same, other in zip(tasks[::2], tasks[1::2], strict=True):
        assert same["n_items"] == other["n_items"] == 2
        assert same["comparison"]["changed"] == 0
        texts = same["comparison"]["texts"]
        if "texts" in same:
            assert texts["same"]["value"] == texts["overlap"] == 1
            assert other["comparison"]["texts"]["overlap"] < 1
        else:
            assert texts is None
    retrieval = next(task for task in tasks if task["task"] == "kick:retrieval")
    assert retrieval["groups"]["2 paragraphs, beginning"] == {
        "n_items": 1, "right": 0, "reference_right": 0, "same": 1,
    }  # fmt: skip


def test_what_cannot_be_asked_is_one_line(long_pair, pair, tmp_path):
    common = ("--no-speed", "--work", tmp_path / "work", "--task-items", 1)
    line = refused("evaluate", pair[1], "--tasks", "kick:retrieval", *common)
    assert re.search(r"kick:retrieval: item 1: got a prompt of \d+ tokens and 24 to write", line)
    line = refused("evaluate", pair[1], "--tasks", "kick:facts", *common)
    assert "--tasks kick:facts: unknown part 'facts'; known: factoid, " in line
    chat = ("--tasks", "kick:factoid,chat=true", "--reference", long_pair.reference, *common)
    assert len(done("evaluate", long_pair.other, *chat).out) > 0
    line = refused("evaluate", long_pair.chatty, *chat)
    assert "its chat template makes other prompts than that of" in line
