"""The work directory: artefacts that carry the fingerprint of all that they depend on.

``WorkDirectory.artefact`` is the whole of "resume": an artefact whose recorded inputs equal the
asked ones and whose bytes still have the recorded hash is reused, anything else is made again.
An artefact appears by rename, and its record after it, so an interrupted run leaves either nothing
or something complete.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from converters import output
from edgeq.errors import RecipeError
from edgeq.stopping import remember

logger = logging.getLogger(__name__)

_OF_SAFETENSORS = re.compile(r"\.tmp[0-9A-Za-z]{6}")  # its own temporary files, beside ours

Inputs = Mapping[str, Any]
"""JSON values that an artefact depends on: hashes, settings, versions."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_arrays(
    arrays: Mapping[str, npt.NDArray[np.generic]],
    path: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write named arrays as safetensors.

    Raises
    ------
    OSError
        No space or no permission; safetensors itself raises an exception of its own for them.
    """
    try:
        save_file(dict(arrays), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def file_name(text: str) -> str:
    """Return a file name for any text, such as a tensor's name in a file of unknown origin.

    No separator survives, so that no name leads out of its directory; names stay distinct.
    """
    return urllib.parse.quote(text, safe="")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` if the block ends well.

    Raises
    ------
    RecipeError
        The directory cannot be made or written, or the device is full; nothing is left behind.
    """
    with contextlib.suppress(OSError):  # told when the file itself cannot be written
        path.parent.mkdir(parents=True, exist_ok=True)
    with output.replacing(path, RecipeError) as temporary:
        yield temporary


class WorkDirectory:
    """A directory of artefacts, locked by one process at a time. A context manager.

    Parameters
    ----------
    is_kept : False: it goes with the run, so that an interrupted one does not promise to reuse it

    Raises
    ------
    RecipeError
        The directory cannot be made or is in use by another process.
    """

    def __init__(self, path: Path, *, is_kept: bool = True) -> None:
        self.path = path
        self._is_kept = is_kept
        self.reused: list[str] = []
        self.made: list[str] = []
        self._lock: TextIO | None = None
        self._is_new = not path.exists()

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise RecipeError(
                f"{self.path}: cannot be used as work directory ({error.strerror or error}). "
                "Give another one with --work."
            ) from error
        self._acquire(self._lock)
        # left by a killed run; we hold the lock. No deeper: the directory may be the user's own
        for left in (*self.path.glob(".*tmp*"), *self.path.glob("*/.*tmp*")):
            if output.is_temporary(left.name) or _OF_SAFETENSORS.fullmatch(left.name):
                left.unlink(missing_ok=True)
        return self

    def _acquire(self, lock: TextIO) -> None:
        try:
            if not output.try_lock(lock):  # the rename of each artefact still keeps it whole
                return
            if not os.path.samestat(os.fstat(lock.fileno()), (self.path / "lock").stat()):
                raise OSError("its owner removed it")
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise RecipeError(
                f"{self.path}: in use by {owner}. Wait for it to end or give another directory "
                "with --work."
            ) from error
        with contextlib.suppress(OSError):  # a full device: the lock holds without the name
            lock.truncate(0)
            lock.write(f"process {os.getpid()}")
            lock.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is None:
            return
        if error is not None and self._is_new:  # leave no empty directory behind
            with contextlib.suppress(OSError):
                if os.listdir(self.path) == ["lock"]:
                    (self.path / "lock").unlink()
                    self.path.rmdir()
        if self._is_kept and (self.made or self.reused):
            remember(error, self.path)
        self._lock.close()

    def artefact(self, name: str, inputs: Inputs, make: Callable[[Path], object]) -> Path:
        """Return the file `name`, made by ``make(temporary path)`` unless a fitting one is there.

        Parameters
        ----------
        name : path inside the work directory
        inputs : everything that the content depends on; compared and stored as JSON
        make : writes the content to the path it is given, which is renamed afterwards
        """
        path = self.path / name
        record = path.with_name(path.name + ".made.json")
        if self._fits(path, record, inputs):
            extra = {"event": "artefact", "artefact": name, "state": "reused", "path": str(path)}
            logger.info("reused %s", path, extra=extra)
            self.reused.append(name)
            return path
        record.unlink(missing_ok=True)
        started = time.perf_counter()
        with replacing(path) as temporary:
            make(temporary)
            digest = file_sha256(temporary)
        with replacing(record) as temporary:
            content = {"inputs": dict(inputs), "sha256": digest}
            temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        self.made.append(name)
        extra = {"event": "artefact", "artefact": name, "state": "made", "path": str(path)}
        spent = round(time.perf_counter() - started, 3)
        logger.info("made %s", path, extra={**extra, "seconds": spent})
        return path

    def has(self, name: str, inputs: Inputs) -> bool:
        """Whether ``artefact`` would find a fitting file."""
        path = self.path / name
        return self._fits(path, path.with_name(path.name + ".made.json"), inputs)

    def _fits(self, path: Path, record: Path, inputs: Inputs) -> bool:
        try:
            known = json.loads(record.read_text())
            wanted = json.loads(json.dumps(dict(inputs)))
            return bool(known["inputs"] == wanted and known["sha256"] == file_sha256(path))
        except (OSError, ValueError, KeyError, TypeError):
            return False
