r"""Items of JSONL after whose prompt the model writes.

    {"prompt": "Question: What is the capital of France?\nAnswer:", "answer": "Paris",
     "stop": ["\n"], "max_tokens": 16, "match": "contains"}

``answer`` is a text or a list of accepted ones; ``match`` one of ``MATCHES``, by default ``exact``;
``stop`` a text or a list, by default none, looked for behind white space at the beginning;
``max_tokens`` is by default 32; ``chat``: true wraps the prompt by the file's chat template;
``group`` names what items have in common. The prompt is taken verbatim. Other fields have no
meaning.
"""

from edgeq.errors import EvaluationError
from edgeq.registry import unknown_name
from edgeq.tasks.items import MAX_ENDINGS, OpenItem, Record, TaskFormat
from edgeq.tasks.matching import MATCHES, problem

MAX_TOKENS = 4096


def _open(record: Record) -> OpenItem:
    values = record.values
    prompt, match = values.get("prompt"), values.get("match", "exact")
    if not isinstance(prompt, str) or not prompt.strip():
        raise record.refuse("prompt", prompt, "some text")
    if not isinstance(match, str):
        raise record.refuse("match", match, f"one of {', '.join(MATCHES)}")
    if match not in MATCHES:
        named = unknown_name("match", match, list(MATCHES))
        raise EvaluationError(f"{record.where}: {named} Mend the line.")
    answers = _texts(record, "answer")
    expected = problem(MATCHES[match], answers)
    if expected is not None:
        raise record.refuse("answer", values.get("answer"), f"{expected} (match {match!r})")
    n_tokens = values.get("max_tokens", 32)
    if not isinstance(n_tokens, int) or isinstance(n_tokens, bool):
        raise record.refuse("max_tokens", n_tokens, f"a number from 1 to {MAX_TOKENS}")
    if not 1 <= n_tokens <= MAX_TOKENS:
        raise record.refuse("max_tokens", n_tokens, f"1 to {MAX_TOKENS}")
    chat, group = values.get("chat", False), values.get("group", "")
    if not isinstance(chat, bool):
        raise record.refuse("chat", chat, "true or false")
    if not isinstance(group, str):
        raise record.refuse("group", group, "some text")
    stop = _texts(record, "stop")
    return OpenItem(prompt, answers, match, stop, n_tokens, record.line, chat, group)


def _texts(record: Record, field: str) -> tuple[str, ...]:
    """Return the texts of a field that holds none, one or a list."""
    values = record.values.get(field)
    found = [values] if isinstance(values, str) else [] if values is None else values
    if not isinstance(found, list) or len(found) > MAX_ENDINGS:
        raise record.refuse(field, values, f"some text, or a list of at most {MAX_ENDINGS}")
    if not all(isinstance(text, str) and text for text in found):
        raise record.refuse(field, values, "some text, or a list of texts, none of them empty")
    return tuple(found)


OPEN = TaskFormat(frozenset({"prompt"}), _open)
