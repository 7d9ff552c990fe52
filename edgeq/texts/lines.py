"""Files of text and of JSON lines: read the same way, refused in the same words."""

import json
from pathlib import Path
from typing import Any

from edgeq.errors import EdgeqError, EvaluationError

_SHOWN = 60  # characters of a wrong value in a message


def read_utf8(path: Path, what: str, error: type[EdgeqError]) -> str:
    """Return the text of a file, without a byte order mark.

    Parameters
    ----------
    path : the file
    what : it should be, like "a text file"
    error : to raise

    Raises
    ------
    error
        The file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as problem:
        raise error(
            f"{path}: cannot be read: {problem.strerror}. Give the path of {what}."
        ) from problem
    except UnicodeDecodeError as problem:
        raise error(
            f"{path}: byte {problem.start} is not UTF-8. Convert the file to UTF-8."
        ) from problem


def parse_line(line: str) -> Any:
    """Return the JSON value of a line.

    Raises
    ------
    ValueError
        It is none, is nested too deep, or holds half of a surrogate pair.
    """
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # no half of a surrogate pair
    except RecursionError as error:
        raise ValueError(str(error)) from error
    return value


def parse_object(where: str, line: str) -> dict[str, Any]:
    """Return the JSON object of a line of a file that is judged on.

    Raises
    ------
    EvaluationError
        The line is not JSON, or no object.
    """
    try:
        values = parse_line(line)
    except ValueError as error:
        raise EvaluationError(f"{where}: is not JSON ({error}). Mend the line.") from error
    if not isinstance(values, dict):
        raise EvaluationError(f"{where}: got {excerpt(values)}, expected an object. Mend the line.")
    return values


def excerpt(value: object) -> str:
    """Return a value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
