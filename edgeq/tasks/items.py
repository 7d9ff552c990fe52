"""Files of tasks: what is asked, and which ending is right.

The format is told from the content:

    hellaswag  llama-perplexity's text, 6 lines an item: context, index of the right ending, endings
    arc        JSONL of question, choices and answerKey, as published or as on the hub
    piqa       JSONL of goal, sol1 and sol2; "label" in the line, or a line each in NAME-labels.lst
    lambada    JSONL of text, whose last word is to be found
    choice     JSONL of context, endings and label, for tasks of one's own
    open       JSONL of prompt and answer: the model writes, see ``edgeq.tasks.open_items``

ARC and PIQA are asked as lm-evaluation-harness does: a line ``Question: ...``, then ``Answer:``.

Other distributions add formats of JSONL through the entry-point group ``edgeq.tasks`` (an entry
point loads to a ``TaskFormat``, or to a ``Suite`` of items that need no file). The format of most
fields that the first line has is taken.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.errors import EvaluationError, RegistryError
from edgeq.registry import Registry
from edgeq.texts.lines import excerpt, parse_object, read_utf8

MAX_ENDINGS = 64
_HELLASWAG_LINES = 6
_LAST_WORD = re.compile(r"(?P<context>.*\S)(?P<space>\s+)(?P<word>\S+)", re.DOTALL)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes
    ----------
    context : what comes before every ending
    endings : possible answers, with the space that parts them from the context; a single one is
        to be found by greedy decoding
    answer : index of the right ending
    line : where the item begins in its file, from 1
    """

    context: str
    endings: tuple[str, ...]
    answer: int
    line: int


@dataclass(frozen=True)
class OpenItem:
    """A prompt after which the model writes greedily.

    Attributes
    ----------
    prompt : verbatim
    answers : what `match` takes: accepted answers, or the argument of an instruction
    match : how the text is judged, a name of ``edgeq.tasks.matching.MATCHES``
    stop : the text ends before the first of these, white space at its beginning not counted
    max_tokens : that are written
    line : where the item stands in its file, from 1
    chat : wrap the prompt as a user's message, by the file's chat template
    group : what it has in common with others; results are counted by group too
    """

    prompt: str
    answers: tuple[str, ...]
    match: str
    stop: tuple[str, ...] = ()
    max_tokens: int = 32
    line: int = 0
    chat: bool = False
    group: str = ""


@dataclass(frozen=True)
class Task:
    """The items of one file, or of one part of a suite.

    Attributes
    ----------
    source : path of the file, or the part's name
    kind : hellaswag, the name of a format of JSONL, or of a suite
    unit : what ``line`` of an item counts
    """

    source: str
    kind: str
    items: tuple[Item | OpenItem, ...]
    unit: str = "line"

    @property
    def items_sha256(self) -> str:
        """A hash of what is asked, in order."""
        values = [_asked(item) for item in self.items]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def where(self, item: Item | OpenItem) -> str:
        """Return where an item stands, for messages."""
        return f"{self.source}: {self.unit} {item.line}"


def _asked(item: Item | OpenItem) -> list[object]:
    if isinstance(item, Item):
        return [item.context, item.endings, item.answer]
    limits = [item.stop, item.max_tokens, item.chat]
    return [item.prompt, item.match, item.answers, *limits]


def read_task(path: Path | str, n_items: int | None = None) -> Task:
    """Read a file of items.

    Parameters
    ----------
    n_items : choose so many of them as llama-perplexity does; None: all

    Raises
    ------
    EvaluationError
        The file cannot be read, or a line of it is broken.
    """
    path = Path(path)
    text = _read(path)
    items: list[Item | OpenItem]
    if text.lstrip().startswith("{"):
        kind, items = _read_jsonl(path, text)
    else:
        kind, items = "hellaswag", list(_read_hellaswag(path, text))
    if n_items is not None and n_items < len(items):
        items = [items[i] for i in choose(len(items), n_items)]
    return Task(str(path), kind, tuple(items))


def choose(n_items: int, n_chosen: int) -> list[int]:
    """Return the items that ``llama-perplexity --hellaswag-tasks N`` asks, in its order.

    References
    ----------
    llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp, hellaswag_score: std::mt19937 of seed 1,
    and libstdc++'s uniform_int_distribution: Lemire, arXiv:1805.10941, algorithm 5.
    """
    random = np.random.RandomState(1)  # its stream is frozen by numpy
    left = list(range(n_items))
    chosen = []
    for _ in range(min(n_chosen, n_items)):
        n_left = len(left)
        while True:
            product = int(random.randint(0, 1 << 32, dtype=np.uint32)) * n_left
            if product % (1 << 32) >= (1 << 32) % n_left:
                break
        chosen.append(left.pop(product >> 32))
    return chosen


def _read(path: Path) -> str:
    text = read_utf8(path, "a file of tasks", EvaluationError)
    if not text.strip():
        raise EvaluationError(f"{path}: has no items; it is empty. Give a file of tasks.")
    return text.replace("\r\n", "\n")


def _index(value: object, n_endings: int, where: str) -> int:
    """Return a right answer's index that is a number or its digits."""
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < n_endings:
        raise EvaluationError(
            f"{where}: wrong index of the right ending; got {excerpt(value)}, expected 0 to "
            f"{n_endings - 1}. Mend the line."
        )
    return number


def _read_hellaswag(path: Path, text: str) -> Iterator[Item]:
    lines = text.removesuffix("\n").split("\n")
    for start in range(0, len(lines), _HELLASWAG_LINES):
        context, *rest = lines[start : start + _HELLASWAG_LINES]
        if len(rest) > 0:  # first of all: it is what other text files stumble over
            answer = _index(rest[0], _HELLASWAG_LINES - 2, f"{path}: line {start + 2}")
        if len(rest) < _HELLASWAG_LINES - 1:
            raise EvaluationError(
                f"{path}: line {start + 1}: the last item is cut off; got {len(rest) + 1} lines, "
                f"expected {_HELLASWAG_LINES}: context, index of the right ending, 4 endings. Give "
                "the whole file."
            )
        for number, line in enumerate((context, "-", *rest[1:]), start=start + 1):
            if not line.strip():
                raise EvaluationError(
                    f"{path}: line {number}: is empty, expected a context or an ending. Mend it."
                )
        yield Item(context, tuple(f" {ending}" for ending in rest[1:]), answer, start + 1)


# ---- JSONL ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One line's object; asking it for what is not there is an error with the line's number."""

    where: str
    line: int
    values: Mapping[str, Any]

    def refuse(self, field: str, value: object, expected: str) -> EvaluationError:
        """Return the error for a wrong value of a field."""
        return EvaluationError(
            f"{self.where}: wrong {field!r}; got {excerpt(value)}, expected {expected}. "
            "Mend the line."
        )

    def text(self, field: str) -> str:
        """Return the text of a field, without spaces around it."""
        return self._stripped(field, self.values.get(field))

    def texts(self, field: str, values: object) -> tuple[str, ...]:
        """Return at least two texts."""
        if not isinstance(values, list) or not 2 <= len(values) <= MAX_ENDINGS:
            raise self.refuse(field, values, f"a list of 2 to {MAX_ENDINGS} texts")
        return tuple(self._stripped(field, value) for value in values)

    def _stripped(self, field: str, value: object) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.refuse(field, value, "some text")
        return value.strip()

    def item(self, context: str, endings: tuple[str, ...], answer: int) -> Item:
        """Return an item of this line whose endings follow a space."""
        return Item(context, tuple(f" {ending}" for ending in endings), answer, self.line)


def _choice(record: Record) -> Item:
    endings = record.texts("endings", record.values.get("endings"))
    answer = _index(record.values.get("label"), len(endings), record.where)
    return record.item(record.text("context"), endings, answer)


def _arc(record: Record) -> Item:
    question, choices = record.values.get("question"), record.values.get("choices")
    if isinstance(question, dict):  # as published
        record = Record(record.where, record.line, {**record.values, **question})
        stem, choices = record.text("stem"), question.get("choices")
    else:
        stem = record.text("question")
    if isinstance(choices, dict):  # as on the hub: a list a field
        texts, labels = choices.get("text"), choices.get("label")
    else:
        pairs = choices if isinstance(choices, list) else []
        whole = all(isinstance(pair, dict) for pair in pairs)
        texts, labels = ([p.get(name) if whole else None for p in pairs] for name in _ARC_CHOICE)
    endings = record.texts("choices", texts)
    key = record.values.get("answerKey")
    if not isinstance(labels, list) or len(labels) != len(endings) or None in labels:
        raise record.refuse("choices", labels, f"{len(endings)} labels")
    if key not in labels:
        raise record.refuse("answerKey", key, f"one of {', '.join(map(str, labels))}")
    return record.item(f"Question: {stem}\nAnswer:", endings, labels.index(key))


def _piqa(record: Record) -> Item:
    endings = record.text("sol1"), record.text("sol2")
    answer = _index(record.values.get("label"), 2, record.where)
    return record.item(f"Question: {record.text('goal')}\nAnswer:", endings, answer)


def _lambada(record: Record) -> Item:
    match = _LAST_WORD.fullmatch(record.text("text"))
    if match is None:
        raise record.refuse("text", record.values["text"], "two words or more")
    space = match["space"]
    own = " " if space.endswith(" ") else ""  # of the word: tokens hold a space before, not behind
    context = match["context"] + space.removesuffix(" ")
    return Item(context, (own + match["word"],), 0, record.line)


_ARC_CHOICE = ("text", "label")


@dataclass(frozen=True)
class TaskFormat:
    """One kind of JSONL.

    Attributes
    ----------
    fields : what an object of it has, by which it is told
    read : makes an item of one line; raises what ``Record.refuse`` returns
    """

    fields: frozenset[str]
    read: Callable[[Record], Item | OpenItem]


CHOICE = TaskFormat(frozenset({"context", "endings"}), _choice)
ARC = TaskFormat(frozenset({"question", "answerKey"}), _arc)
PIQA = TaskFormat(frozenset({"goal", "sol1", "sol2"}), _piqa)
LAMBADA = TaskFormat(frozenset({"text"}), _lambada)


@dataclass(frozen=True)
class SuitePart:
    """Items made by a program.

    Attributes
    ----------
    make : called with a seeded stream of random numbers, how many items are wanted and whether
        prompts become messages of a chat; returns so many different items, fewer if there are no
        more
    n_items : that are asked by default
    """

    make: Callable[[np.random.RandomState, int, bool], Sequence[Item | OpenItem]]
    n_items: int


@dataclass(frozen=True)
class Suite:
    """Items that need no file, in parts that can be asked alone."""

    parts: Mapping[str, SuitePart]


TASKS = Registry(
    "edgeq.tasks",
    {name: f"edgeq.tasks.items:{name.upper()}" for name in ("arc", "choice", "lambada", "piqa")}
    | {"kick": "edgeq.tasks.kick:SUITE", "open": "edgeq.tasks.open_items:OPEN"},
)


def known_tasks() -> dict[str, TaskFormat | Suite]:
    """Return everything that edgeq and other distributions bring, by name.

    Raises
    ------
    RegistryError
        An entry point cannot be imported, or loads to something else.
    """
    found = {name: TASKS.get(name) for name in TASKS.names()}
    for name, one in found.items():
        if not isinstance(one, TaskFormat | Suite):
            plugin = TASKS.plugins[name]
            raise RegistryError(
                f"task {name!r} of {plugin.origin}: {plugin.target} is of type "
                f"{type(one).__name__}, expected a TaskFormat or a Suite. Ask those who made it."
            )
    return found


def _formats() -> dict[str, TaskFormat]:
    """Return every format by name, those of more fields first."""
    found = {name: one for name, one in known_tasks().items() if isinstance(one, TaskFormat)}
    return dict(sorted(found.items(), key=lambda pair: (-len(pair[1].fields), pair[0] != "choice")))


def _read_jsonl(path: Path, text: str) -> tuple[str, list[Item | OpenItem]]:
    records = list(_records(path, text))
    first, formats = records[0], _formats()
    kinds = [kind for kind, one in formats.items() if one.fields <= first.values.keys()]
    if not kinds:
        known = "; ".join(", ".join(sorted(one.fields)) for one in formats.values())
        raise EvaluationError(
            f"{first.where}: no known kind of task; got the fields "
            f"{excerpt(sorted(first.values))}, expected {known}."
        )
    kind = kinds[0]
    if kind == "piqa" and "label" not in first.values:
        records = _with_labels(path, records)
    return kind, [formats[kind].read(record) for record in records]


def _records(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        yield Record(where, number, parse_object(where, line))


def _with_labels(path: Path, records: list[Record]) -> list[Record]:
    """Put the labels of PIQA's second file into the records."""
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    if not labels_path.is_file():
        raise EvaluationError(
            f"{path}: no right answers; got neither a field 'label' nor {labels_path.name} beside "
            "it, expected one of them. Fetch it too."
        )
    labels = _read(labels_path).split()
    if len(labels) != len(records):
        raise EvaluationError(
            f"{labels_path}: got {len(labels)} labels, expected {len(records)}, one for each item "
            f"of {path.name}. Give the files of one set."
        )
    found = []
    for number, (record, label) in enumerate(zip(records, labels, strict=True), start=1):
        answer = _index(label, 2, f"{labels_path}: line {number}")
        found.append(Record(record.where, record.line, {**record.values, "label": answer}))
    return found
