"""Output files that are whole or not there."""

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

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
    try:
        with temporary_beside(path) as temporary:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as problem:
        raise error(
            f"{path}: cannot be written ({problem.strerror or problem}). Nothing was kept. "
            "Choose another place or free some space."
        ) from problem


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Make an empty file with a temporary name beside `path`; what is left of it goes at the end.

    It is locked while the block runs. One that nobody has locked was left by a killed process that
    wrote the same `path`, and is removed first.

    Raises
    ------
    OSError
        No such directory, no permission, no space.
    """
    _remove_left(path)
    made = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    with made.open("xb") as file:
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                if not try_lock(file):
                    file.close()  # Windows does not rename an open file
            yield made
        finally:
            with contextlib.suppress(OSError):
                made.unlink()


def is_temporary(name: str, of: str | None = None) -> bool:
    """Whether ``temporary_beside`` gives such names; to files called `of`, if that is given."""
    target = r".+" if of is None else re.escape(of)
    return re.fullmatch(rf"\.{target}\.\d+(-[0-9a-f]{{8}})?\.tmp", name) is not None


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed; False: this system has no such locks.

    Raises
    ------
    OSError
        Somebody else has locked it, or its file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


def _remove_left(path: Path) -> None:
    for other in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if is_temporary(other.name, of=path.name):
            with contextlib.suppress(OSError), other.open("ab") as file:
                if try_lock(file):
                    other.unlink()
