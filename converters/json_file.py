"""JSON objects of a checkpoint directory."""

import json
from pathlib import Path
from typing import Any

from converters.errors import ConversionError


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None where there is no such file.

    Raises
    ------
    ConversionError
        The file cannot be read or holds something else.
    """
    try:
        with path.open(encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: got a {type(value).__name__}, expected a JSON object.")
    return value
