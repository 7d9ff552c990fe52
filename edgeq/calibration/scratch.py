"""Arrays that are too large to stay in memory: second moments of experts, and of gradients."""

import math
import mmap
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from edgeq.errors import RecipeError

_ZEROS = bytes(1 << 20)


def zeros_in_file(shape: tuple[int, ...], directory: Path) -> npt.NDArray[np.float32]:
    """Return float32 zeros, memory-mapped from a file in `directory` that has no name.

    Its pages are the page cache's: the system may write them out and take them back. The file ends
    with the last array that looks at it.

    Raises
    ------
    RecipeError
        There is no room for it, or the directory cannot be written.
    """
    size = 4 * math.prod(shape)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            _reserve(file, size)
            data = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise RecipeError(
            f"{directory}: no temporary file of {size / 2**20:.0f} MiB for second moments "
            f"({error.strerror or error}). Free some space, or give another directory with "
            "--work."
        ) from error
    return np.frombuffer(data, np.float32).reshape(shape)


def _reserve(file: BinaryIO, size: int) -> None:
    """Give a file its blocks: a hole that finds no block later would end the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, len(_ZEROS)):  # macOS, Windows
        file.write(_ZEROS[: size - start])
    file.flush()
