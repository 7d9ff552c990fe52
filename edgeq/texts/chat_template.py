"""Conversations as text: a model's chat template, rendered where it can do no harm.

A chat template is a program that came with a downloaded file. jinja2's immutable sandbox keeps it
from reaching Python's internals, but not from looping or filling the memory, so it runs in a child
process with limits. This file is that child's script too: it imports nothing of edgeq when run.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_TEMPLATE_CHARS = 1 << 18  # the longest template of a known model takes about 2^14
MAX_MEMORY_BYTES = 1 << 30
TIMEOUT_S = 60.0

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it may spell.

    Attributes
    ----------
    source : the jinja2 program
    bos_token, eos_token : their texts; empty if the vocabulary has none
    where : the file that it came from, for messages
    """

    source: str
    bos_token: str
    eos_token: str
    where: str

    @classmethod
    def from_gguf(cls, path: Path | str, name: str | None = None) -> "ChatTemplate":
        """Read the template of a GGUF file.

        Parameters
        ----------
        name : of one of several that some files have; None: the default one

        Raises
        ------
        CalibrationError
            The file has none, or one of absurd size.
        """
        from converters.gguf_file import open_gguf
        from edgeq.errors import CalibrationError

        file = open_gguf(path)
        source = file.value(f"tokenizer.chat_template{f'.{name}' if name else ''}")
        if not isinstance(source, str) or not 0 < len(source) <= MAX_TEMPLATE_CHARS:
            size = len(source) if isinstance(source, str) else 0
            raise CalibrationError(
                f"{path}: its chat template has {size} characters, expected 1 to "
                f"{MAX_TEMPLATE_CHARS}. Render the conversations yourself and give plain text."
            )
        tokens = file.value("tokenizer.ggml.tokens", [])

        def spelled(key: str) -> str:
            number = file.value(f"tokenizer.ggml.{key}_token_id")
            is_known = isinstance(number, int) and 0 <= number < len(tokens)
            return str(tokens[number]) if is_known else ""

        return cls(source, spelled("bos"), spelled("eos"), str(path))

    def render(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        opens_answer: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> list[str]:
        """Return each conversation as the text that the model was trained on.

        Parameters
        ----------
        conversations : of messages with "role" and "content"
        opens_answer : end with what the model's answer follows
        timeout_s : most seconds for all of them

        Raises
        ------
        CalibrationError
            The template refuses a conversation, breaks its limits, or is no valid program.
        """
        from edgeq.errors import CalibrationError

        task = {
            "source": self.source,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "conversations": [list(messages) for messages in conversations],
            "opens_answer": opens_answer,
        }
        command = [sys.executable, "-I", __file__]
        try:
            done = subprocess.run(
                command, input=json.dumps(task).encode(), capture_output=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            raise CalibrationError(
                f"{self.where}: its chat template did not render {len(conversations)} "
                f"conversations within {timeout_s:g} s. "
                "Give fewer, or render them yourself and give plain text."
            ) from None
        try:
            answer = json.loads(done.stdout)
            texts: list[str] = answer["texts"]
        except (ValueError, KeyError):
            reason = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise CalibrationError(
                f"{self.where}: its chat template failed: "
                f"{(reason or [f'exit status {done.returncode}'])[-1][:500]}. "
                "Check the order of the roles, or render the conversations yourself."
            ) from None
        return texts


def _limit_this_process() -> None:
    """Cap this process's memory and time where the system can."""
    try:
        import resource
    except ImportError:  # not POSIX: the parent's timeout remains
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(TIMEOUT_S), int(TIMEOUT_S)))


def _render_all(task: dict[str, Any]) -> list[str]:
    """Render in this process; the names that a template may use are those of transformers.

    References
    ----------
    transformers 5.23: utils/chat_template_utils.py, _compile_jinja_template and
    render_jinja_template (the environment that templates are written for).
    """
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **_ignored: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime(2025, 1, 1).strftime(form)
    template = environment.from_string(task["source"])
    return [
        template.render(
            messages=messages,
            bos_token=task["bos_token"],
            eos_token=task["eos_token"],
            add_generation_prompt=task["opens_answer"],
        )
        for messages in task["conversations"]
    ]


if __name__ == "__main__":
    _limit_this_process()
    sys.stdout.write(json.dumps({"texts": _render_all(json.load(sys.stdin))}))
