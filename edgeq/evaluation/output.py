"""Output files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edgeq.errors import EvaluationError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` for writing and rename it over `path` at the end.

    On any exception, an interrupt included, what was written is removed and an existing `path`
    stays as it was.

    Raises
    ------
    EvaluationError
        The file cannot be written (no such directory, no permission, no space).
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise EvaluationError(
            f"{path}: cannot be written: {error.strerror or error}. Nothing was kept; choose "
            "another place or free some space."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
