"""What a model writes after the prompts of open items, greedily, and how it is judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.gguf_file import open_gguf
from edgeq.errors import CalibrationError, EvaluationError
from edgeq.runtime.model import Model, Tokens
from edgeq.tasks.items import OpenItem, Task
from edgeq.tasks.matching import MATCHES
from edgeq.tasks.scoring import Progress
from edgeq.texts.chat_template import ChatTemplate
from edgeq.texts.writing import N_SEQ, Reader, write


@dataclass(frozen=True, eq=False)
class OpenScore:
    """What a model wrote for one item.

    Attributes
    ----------
    prompt : the tokens it was given
    text : what it wrote, up to the first stop, without spaces around it
    tokens : of that text
    answer : what two models give alike where they give the same answer, see ``Verdict``
    is_right : whether the text answers
    """

    prompt: Tokens
    text: str
    tokens: Tokens
    answer: str
    is_right: bool


def write_answers(
    path: Path | str,
    tasks: Sequence[Task],
    *,
    n_threads: int | None = None,
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> list[list[OpenScore]]:
    """Let a GGUF file write after the prompts of several tasks' open items; one list a task.

    Parameters
    ----------
    n_threads : default all CPUs
    adapter : a LoRA adapter that the file runs with
    progress : called with (items done, items in all)

    Raises
    ------
    EvaluationError
        A prompt has no tokens or does not fit the model, a chat template is missing, or logits are
        not finite.
    RuntimeLibraryError
        llama.cpp refused the file.
    """
    asked = [[item for item in task.items if isinstance(item, OpenItem)] for task in tasks]
    items = [item for own in asked for item in own]
    if not items:
        return [[] for _ in tasks]
    prompts = prompts_of(path, tasks)
    lengths = [len(own) + item.max_tokens for own, item in zip(prompts, items, strict=True)]
    scores: list[OpenScore] = []
    with Model(
        path,
        n_ctx=max(lengths),
        n_seq=min(N_SEQ, len(items)),
        kv_unified=False,
        n_threads=n_threads,
        adapter=adapter,
    ) as model:
        for start in range(0, len(items), N_SEQ):
            group = slice(start, start + N_SEQ)
            scores += _write_group(model, items[group], prompts[group])
            if progress is not None:
                progress(len(scores), len(items))
    left = iter(scores)
    return [[next(left) for _ in own] for own in asked]


def prompts_of(path: Path | str, tasks: Sequence[Task]) -> list[Tokens]:
    """Return the tokens of every open item's prompt, in the vocabulary of a file.

    Raises
    ------
    EvaluationError
        A prompt has no tokens or does not fit the model, or a chat template is missing.
    """
    asked = [
        (item, task.where(item))
        for task in tasks
        for item in task.items
        if isinstance(item, OpenItem)
    ]
    if not asked:
        return []
    file = open_gguf(Path(path))
    trained = file.value(f"{file.architecture}.context_length")
    with Model(path, vocab_only=True) as model:
        found = dict(zip(_plain(asked), Reader(model).tokens(_plain(asked)), strict=True))
        chats = [pair for pair in asked if pair[0].chat]
        wrapped = {}
        if chats:
            texts = [item.prompt for item, _ in chats]
            try:
                template = ChatTemplate.from_gguf(path)
                wrapped = dict(zip(texts, Reader(model, template).tokens(texts), strict=True))
            except CalibrationError as error:
                raise EvaluationError(f"{chats[0][1]}: asks as a chat: {error}") from error
    prompts = []
    for item, where in asked:
        tokens = (wrapped if item.chat else found)[item.prompt]
        n = len(tokens) + item.max_tokens
        if not len(tokens):
            raise EvaluationError(f"{where}: the prompt has no tokens. Mend it.")
        if trained is not None and n > int(trained):
            raise EvaluationError(
                f"{where}: got a prompt of {len(tokens)} tokens and {item.max_tokens} to write; "
                f"{path} was trained on at most {trained}. Shorten it, or leave it out."
            )
        prompts.append(tokens)
    return prompts


def _plain(asked: Sequence[tuple[OpenItem, str]]) -> list[str]:
    return [item.prompt for item, _ in asked if not item.chat]


def _write_group(
    model: Model, items: Sequence[OpenItem], prompts: Sequence[Tokens]
) -> list[OpenScore]:
    def has_ended(i: int, tokens: Tokens) -> bool:
        text = model.detokenize(tokens).lstrip() if items[i].stop else ""
        return len(tokens) >= items[i].max_tokens or any(stop in text for stop in items[i].stop)

    n_tokens = max(item.max_tokens for item in items)
    written = write(model, prompts, n_tokens, has_ended=has_ended)
    scores = []
    for item, prompt, tokens in zip(items, prompts, written, strict=True):
        text = model.detokenize(tokens[: item.max_tokens]).lstrip()
        for stop in item.stop:
            text = text.split(stop)[0]
        text = text.strip()
        verdict = MATCHES[item.match].judge(text, item.answers)
        own = model.tokenize(text, add_special=False)
        scores.append(OpenScore(prompt, text, own, verdict.answer, verdict.is_right))
    return scores
