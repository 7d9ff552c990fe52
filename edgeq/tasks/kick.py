"""A small suite of what compressed models lose first, made from templates; it needs no file.

    factoid       questions about plain facts, answered freely
    reasoning     small puzzles with four answers to choose from
    retrieval     a code hidden among paragraphs, at the beginning, in the middle and at the end
    summary       a short story to be told in a sentence; right if it names who and what
    instructions  what a program can verify: a last word, lower case, a number of bullet points

Perplexity hardly moves where these do; what counts is how many answers stay the float model's.

References
----------
Jaiswal et al., Compressing LLMs: The Truth is Rarely Pure and Never Simple (LLM-KICK),
arXiv:2310.01382: its kinds of tasks, in small and with items of our own.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from edgeq.tasks import facts
from edgeq.tasks.items import Item, OpenItem, Suite, SuitePart

Random = np.random.RandomState
Text = str | int
_PARAGRAPHS = (2, 4, 8)  # of a retrieval, that with the code not counted
_DEPTHS = {"beginning": 0.0, "middle": 0.5, "end": 1.0}
_TRIES = 20  # for a puzzle that is new


def _some(random: Random, values: Sequence[str], n: int) -> list[str]:
    return [values[i] for i in random.permutation(len(values))[:n]]


def _one(random: Random, values: Sequence[str]) -> str:
    return values[random.randint(len(values))]


def _question(question: str, shots: str, chat: bool) -> str:
    return question if chat else f"{shots}Question: {question}\nAnswer:"


# ---- factoid -------------------------------------------------------------------------------------

_SHOTS = (
    "Question: What is the capital of Switzerland?\nAnswer: Bern\n\n"
    "Question: What is 20 plus 11?\nAnswer: 31\n\n"
)


def _facts() -> dict[str, tuple[str, ...]]:
    """Return questions with their accepted answers."""
    found: dict[str, str] = {}
    for country, city in facts.CAPITALS.items():
        found[f"What is the capital of {country}?"] = city
    for element, symbol in facts.SYMBOLS.items():
        found[f"What is the chemical symbol of {element}?"] = symbol
    for book, author in facts.AUTHORS.items():
        found[f"Who wrote {book}?"] = author
    for animal, young in facts.YOUNG.items():
        found[f"What is the young of a {animal} called?"] = young
    for names, kind in ((facts.DAYS, "day"), (facts.MONTHS, "month")):
        for name, following in zip(names, (*names[1:], names[0]), strict=True):
            found[f"Which {kind} comes after {name}?"] = following
    for a, b in ((3, 4), (6, 7), (12, 9), (25, 17), (31, 48), (8, 5), (14, 15), (50, 27)):
        found[f"What is {a} plus {b}?"] = str(a + b)
        found[f"What is {a} times {b}?"] = str(a * b)
        found[f"What is {a + b + 1} minus {a}?"] = str(b + 1)
    other = facts.OTHER_SPELLINGS
    return {
        question: (right, other[right]) if right in other else (right,)
        for question, right in found.items()
    }


def _factoid(random: Random, n_items: int, chat: bool) -> list[OpenItem]:
    known = list(_facts().items())
    return [
        OpenItem(
            _question(known[i][0], _SHOTS, chat),
            known[i][1],
            "contains",
            () if chat else ("\n",),
            32 if chat else 12,
            chat=chat,
        )
        for i in random.permutation(len(known))[:n_items]
    ]


# ---- reasoning -----------------------------------------------------------------------------------


def _puzzle(random: Random, kind: int) -> tuple[str, Text, list[Text]]:
    """Return a question, its answer and three wrong ones."""
    wrong: list[Text]
    a, b, c, d = _some(random, facts.FIRST_NAMES, 4)
    if kind == 0:
        more, least = (("taller", "shortest"), ("older", "youngest"), ("faster", "slowest"))[
            random.randint(3)
        ]
        says = _some(random, [f"{a} is {more} than {b}.", f"{b} is {more} than {c}."], 2)
        return f"{' '.join(says)} Who is the {least} of the three?", c, [a, b, d]
    if kind == 1:
        has, gives, gets = (int(random.randint(*span)) for span in ((12, 30), (2, 9), (2, 9)))
        thing = _one(random, ("apples", "coins", "cards", "stamps"))
        left = has - gives + gets
        wrong = [has + gives + gets, has - gives, left + 1]
        question = f"{a} has {has} {thing}, gives {gives} to {b} and gets {gets} from {c}."
        return f"{question} How many {thing} has {a} now?", left, wrong
    if kind == 2:
        start, step = int(random.randint(1, 20)), int(random.randint(2, 9))
        row = ", ".join(str(start + step * i) for i in range(4))
        following = start + 4 * step
        wrong = [following + 1, following + step, following - 1]
        return f"Which number comes next: {row}?", following, wrong
    if kind == 3:
        today, days = int(random.randint(7)), int(random.randint(2, 6))
        names = [facts.DAYS[(today + days + shift) % 7] for shift in (0, 1, 2, 6)]
        question = f"Today is {facts.DAYS[today]}. Which day is it in {days} days?"
        return question, names[0], list(names[1:])
    if kind == 4:
        own, other = _some(random, list(facts.KINDS), 2)
        odd = _one(random, facts.KINDS[other])
        return f"Which word is not one of {own}?", odd, list(_some(random, facts.KINDS[own], 3))
    facing, turns = int(random.randint(4)), int(random.randint(1, 4))
    turned = facts.DIRECTIONS[(facing + turns) % 4]
    times = ("once", "twice", "three times")[turns - 1]
    question = f"{a} looks {facts.DIRECTIONS[facing]} and turns right {times}."
    others: list[Text] = [name for name in facts.DIRECTIONS if name != turned]
    return f"{question} Where does {a} look now?", turned, others


def _reasoning(random: Random, n_items: int, chat: bool) -> list[Item]:
    del chat  # endings are compared, nothing is written
    found: dict[str, Item] = {}
    for number in range(_TRIES * n_items):
        question, right, wrong = _puzzle(random, number % 6)
        endings = _some(random, [f" {right}", *(f" {each}" for each in wrong)], 4)
        context = f"Question: {question}\nAnswer:"
        if context not in found and len(set(endings)) == 4:
            found[context] = Item(context, tuple(endings), endings.index(f" {right}"), 0)
        if len(found) == n_items:
            break
    return list(found.values())


# ---- retrieval -----------------------------------------------------------------------------------


def _paragraph(random: Random, village: str) -> str:
    year, people = 1100 + random.randint(800), 200 + 10 * random.randint(500)
    trade, sight = _one(random, facts.TRADES), _one(random, facts.SIGHTS)
    return (
        f"The village of {village} was first named in a document of {year}. About {people} people "
        f"live there today, most of them from {trade}. Visitors come to see {sight}, which is open "
        "from spring to autumn."
    )


def _code(name: str, code: int) -> str:
    return f"The caretaker wrote down that the door code of {name} is {code}."


def _retrieval(random: Random, n_items: int, chat: bool) -> list[OpenItem]:
    setups = [(k, depth) for k in _PARAGRAPHS for depth in _DEPTHS]
    items = []
    for number in range(n_items):
        k, depth = setups[number % len(setups)]
        firsts, lasts = (_some(random, names, 2) for names in (facts.FIRST_NAMES, facts.LAST_NAMES))
        name, other = (f"{first} {last}" for first, last in zip(firsts, lasts, strict=True))
        code, wrong = (int(each) for each in 1000 + random.permutation(9000)[:2])
        texts = [_paragraph(random, village) for village in _some(random, facts.VILLAGES, k)]
        place = round(_DEPTHS[depth] * k)
        texts[random.randint(k)] += f" {_code(other, wrong)}"
        texts.insert(place, _code(name, code))
        context = "\n\n".join(texts)
        question = f"What is the door code of {name}?"
        prompt = f"{context}\n\n" + _question(question, "", chat)
        if not chat:  # SmolLM2-135M-Instruct in F32 ends its answer at once without this
            prompt += f" The door code of {name} is"
        group = f"{k} paragraphs, {depth}"
        stop = () if chat else ("\n",)
        items.append(
            OpenItem(prompt, (str(code),), "contains", stop, 24, 0, chat=chat, group=group)
        )
    return items


# ---- summary -------------------------------------------------------------------------------------


def _summary(random: Random, n_items: int, chat: bool) -> list[OpenItem]:
    items = []
    for _ in range(n_items):
        hero, helper = _some(random, facts.FIRST_NAMES, 2)
        thing, day = _one(random, facts.THINGS), _one(random, facts.DAYS)
        lost, found = _some(random, facts.PLACES, 2)
        story = (
            f"On {day}, {hero} noticed that the {thing} was gone. It had been a present from a "
            f"grandmother, and {hero} looked for it all day. First {hero} went back to the {lost}, "
            f"but nobody there had seen it. In the evening {helper} called. {helper} works at the "
            f"{found} and had found the {thing} under a chair. {hero} ran there at once, thanked "
            f"{helper} and invited {helper} to dinner."
        )
        told = "Tell this story in one sentence."
        prompt = f"{told}\n\n{story}" if chat else f"{story}\n\nThe story in one sentence:"
        stop = () if chat else ("\n",)
        items.append(OpenItem(prompt, (hero, thing), "contains_all", stop, 48, chat=chat))
    return items


# ---- instructions --------------------------------------------------------------------------------


def _instructions_about(topic: str, random: Random) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield an instruction of every kind, with the match that verifies it."""
    ending, word = _one(random, facts.LAST_WORDS), _one(random, facts.WANTED_WORDS)
    n_points, n_words = (str(random.randint(*span)) for span in ((2, 5), (6, 13)))
    write = f"Write one sentence about {topic}"
    yield f'{write}. End it with the word "{ending}".', "ends_with", (ending,)
    yield f"{write}. Use lower case letters only.", "lower_case", ()
    yield f"{write}. Use capital letters only.", "upper_case", ()
    yield (
        f'Name {n_points} things about {topic} as a list. Begin each with "- ".',
        "bullets",
        (n_points,),
    )
    yield f'{write}. Use the word "{word}".', "contains", (word,)
    yield f"{write}. Use at most {n_words} words.", "most_words", (n_words,)
    yield f'{write}. Do not use the word "and".', "lacks", ("and",)


def _instructions(random: Random, n_items: int, chat: bool) -> list[OpenItem]:
    def items() -> Iterator[OpenItem]:
        for topic in _some(random, facts.TOPICS, len(facts.TOPICS)):
            for told, match, answers in _instructions_about(topic, random):
                prompt = told if chat else f"Instruction: {told}\nResponse:"
                stop = () if chat else ("\nInstruction:", "\n\n")
                yield OpenItem(prompt, answers, match, stop, 64, chat=chat, group=match)

    return list(islice(items(), n_items))


SUITE = Suite(
    {
        "factoid": SuitePart(_factoid, 120),
        "reasoning": SuitePart(_reasoning, 120),
        "retrieval": SuitePart(_retrieval, 54),
        "summary": SuitePart(_summary, 40),
        "instructions": SuitePart(_instructions, 84),
    }
)
