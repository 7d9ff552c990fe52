"""The real command line, run in this process: what it prints and how it ends."""

import contextlib
import functools
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from edgeq import cli, evaluation, planning, proving

# Tiny graphs gain nothing from threads, and nothing here depends on a time.
_quick = functools.partial(evaluation.measure_speeds, n_prompt=16, n_gen=2, repetitions=1)


@dataclass(frozen=True)
class Run:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Return stdout as JSON; NaN and Infinity are none."""

        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


def run(*arguments: object, threads: int = 1) -> Run:
    """Run ``edgeq ARGUMENTS`` through the console script's entry point."""
    words = ["edgeq", *map(str, arguments), "--threads", str(threads)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", words))
        for module in (planning, proving):
            stack.enter_context(mock.patch.object(module, "measure_speeds", _quick))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Run(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Run:
    """Run a command that has to succeed and has nothing to say on stderr."""
    result = run(*arguments)
    assert (result.code, result.err) == (0, ""), result
    return result


def refused(*arguments: object) -> str:
    """Run a command that has to end in one line for the user; return the line."""
    result = run(*arguments)
    assert result.code == 1, result
    assert result.out == ""
    assert result.err.startswith("edgeq: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    return result.err


def files_under(directory: Path) -> set[str]:
    """Return every file and directory below, hidden ones too."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}
