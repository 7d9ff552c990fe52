"""Tasks for workers in other processes, which import them by name."""

import os
import signal
import time
from pathlib import Path

from edgeq.errors import CalibrationError


def squared(number: int) -> tuple[int, int]:
    """Return the square, and who made it; the first tasks take longest."""
    time.sleep(0.02 * (5 - number % 5))
    return number * number, os.getpid()


def refuse(number: int) -> int:
    """Raise what a user can mend."""
    raise CalibrationError(f"tensor {number}: cannot be rounded")


def die_once(marker: Path) -> str:
    """Kill this process, unless it has been done before."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return "done"
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def die(_task: object) -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(marker: Path) -> int:
    """Write who waits, then wait for ``marker`` with the suffix ``.go``."""
    marker.with_suffix(f".{os.getpid()}").touch()
    while not marker.with_suffix(".go").exists():
        time.sleep(0.01)
    return os.getpid()


def limits(_task: object) -> tuple[str, int]:
    """Return what a worker was told about threads, and what numba made of it."""
    import numba

    return os.environ["OMP_NUM_THREADS"], numba.config.NUMBA_NUM_THREADS
