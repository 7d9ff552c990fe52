"""Output files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from converters.errors import ConversionError


@contextlib.contextmanager
def replacing(path: Path, error: type[Exception] = ConversionError) -> Iterator[Path]:
    """Give a temporary name beside `path`; what was written there is renamed to `path` at the end.

    On any exception, an interrupt included, the temporary file is removed and an existing `path`
    stays as it was.

    Raises
    ------
    error
        The file cannot be written (no such directory, no permission, no space).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as problem:
        raise error(
            f"{path}: cannot be written ({problem.strerror or problem}). Nothing was kept. "
            "Choose another place or free some space."
        ) from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
