"""Structured logs, ``--log-json``: one JSON object a line, for machines that run edgeq.

Whatever ``edgeq`` and ``converters`` log from INFO up is a line, -v or not, and so are Python's
warnings. A record says what it is with ``extra``: the keys of ``FIELDS``, and no others. The step
of a line is the innermost one that has begun and not ended.
"""

import contextlib
import datetime
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from edgeq.errors import RecipeError

FIELDS = ("event", "step", "state", "artefact", "path", "seconds", "exit_code", "version")
_SOURCES = ("edgeq", "converters", "py.warnings")


class JsonLines(logging.Handler):
    """Writes records to `stream`, and each at once."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(logging.INFO)
        self.stream = stream
        self._steps: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        told = {key: getattr(record, key) for key in FIELDS if hasattr(record, key)}
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": "message",
            **({"step": self._steps[-1]} if self._steps else {}),
            **told,
            "message": record.getMessage(),
        }
        if told.get("event") == "step":
            if told["state"] == "begun":
                self._steps.append(told["step"])
            elif told["step"] in self._steps:
                self._steps.remove(told["step"])
        try:
            self.stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.stream.flush()
        except (OSError, ValueError):  # a full device or closed pipe must not end the run
            self.handleError(record)


class Log:
    """The log of one run of the command line. Without a target it writes nothing.

    Attributes
    ----------
    owns_stderr : whether stderr has JSON lines and nothing else
    """

    def __init__(self) -> None:
        self.owns_stderr = False
        self._handler: JsonLines | None = None
        self._file: TextIO | None = None
        self._started = time.perf_counter()
        self._levels: dict[str, int] = {}

    @property
    def is_open(self) -> bool:
        """Whether lines are written."""
        return self._handler is not None

    def open(self, target: str, version: str) -> None:
        """Begin to write.

        Parameters
        ----------
        target : a file, which is appended to; ``-`` is stderr

        Raises
        ------
        RecipeError
            The file cannot be written, or holds something else than JSON lines.
        """
        stream = sys.stderr if target == "-" else self._append(Path(target))
        self.owns_stderr = target == "-"
        self._handler = JsonLines(stream)
        logging.captureWarnings(True)
        for name in _SOURCES:
            source = logging.getLogger(name)
            self._levels[name] = source.level
            source.addHandler(self._handler)
            source.setLevel(logging.INFO)
            source.propagate = not self.owns_stderr
        extra = {"event": "begin", "version": version}
        logging.getLogger("edgeq.cli").info("edgeq %s", version, extra=extra)

    def _append(self, path: Path) -> TextIO:
        try:
            with contextlib.suppress(FileNotFoundError), path.open("rb") as known:
                if known.read(1) not in (b"", b"{"):
                    raise RecipeError(
                        f"--log-json {path}: holds something else than JSON lines. Give another "
                        "file, or remove it."
                    )
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RecipeError(
                f"--log-json {path}: cannot be written ({error.strerror or error}). Give another "
                "file."
            ) from error
        return self._file

    def end(self, exit_code: int, message: str = "") -> None:
        """Write how the run ended, and no more after that."""
        if self._handler is None:
            return
        extra = {
            "event": "end",
            "exit_code": exit_code,
            "seconds": round(time.perf_counter() - self._started, 3),
        }
        level = logging.ERROR if exit_code else logging.INFO
        logging.getLogger("edgeq.cli").log(level, "%s", message or "done", extra=extra)
        for name in _SOURCES:
            source = logging.getLogger(name)
            source.removeHandler(self._handler)
            source.setLevel(self._levels[name])
            source.propagate = True
        logging.captureWarnings(False)
        if self._file is not None:
            self._file.close()
        self._handler = self._file = None
