"""Tasks by what the command line names: a file of items, or a suite that needs none.

``NAME`` asks every part of a suite, ``NAME:PART,PART`` some; ``NAME:seed=1`` makes other items and
``NAME:chat=true`` puts open ones as messages of a chat. A part's items depend on its name and the
seed alone. A suite's name wins over a file of that name, which is then ``./NAME``.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike, fspath

import numpy as np

from edgeq.errors import EvaluationError
from edgeq.registry import unknown_name
from edgeq.tasks.items import Suite, Task, known_tasks, read_task

_MOST_SEEDS = 1 << 32


def read_tasks(named: Sequence[str | PathLike[str]], n_items: int | None = None) -> list[Task]:
    """Return the tasks that files and suites give.

    Parameters
    ----------
    named : paths of files, and names of suites
    n_items : of each file and each part of a suite, at most; None: all, or the part's own number

    Raises
    ------
    EvaluationError
        A file is broken, or a suite has no such part or setting.
    """
    suites = {name: one for name, one in known_tasks().items() if isinstance(one, Suite)}
    tasks: list[Task] = []
    for each in named:
        spec = fspath(each)
        name = spec.partition(":")[0]
        if name in suites:
            tasks += _of_suite(spec, suites[name], n_items)
        else:
            tasks.append(read_task(spec, n_items))
    return tasks


def _of_suite(spec: str, suite: Suite, n_items: int | None) -> list[Task]:
    name, _, words = spec.partition(":")
    parts, seed, chat = list[str](), 0, False
    for word in words.split(",") if words else []:
        key, equals, value = word.partition("=")
        if not equals:
            if key not in suite.parts:
                raise _refused(spec, unknown_name("part", key, list(suite.parts)))
            parts.append(key)
        elif key == "seed":
            if not value.isdecimal() or int(value) >= _MOST_SEEDS:
                raise _refused(spec, f"seed is {value!r}, expected 0 to {_MOST_SEEDS - 1}.")
            seed = int(value)
        elif key == "chat":
            if value not in ("true", "false"):
                raise _refused(spec, f"chat is {value!r}, expected true or false.")
            chat = value == "true"
        else:
            raise _refused(spec, unknown_name("setting", key, ["chat", "seed"]))
    tasks = []
    for part in dict.fromkeys(parts or suite.parts):
        made = suite.parts[part]
        random = np.random.RandomState([seed, zlib.crc32(part.encode())])
        items = made.make(random, n_items or made.n_items, chat)
        numbered = tuple(replace(item, line=line) for line, item in enumerate(items, start=1))
        settings = f",seed={seed}" * (seed > 0) + ",chat=true" * chat
        tasks.append(Task(f"{name}:{part}{settings}", name, numbered, "item"))
    return tasks


def _refused(spec: str, message: str) -> EvaluationError:
    return EvaluationError(f"--tasks {spec}: {message}")
