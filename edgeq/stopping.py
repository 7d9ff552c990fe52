"""How a run is stopped from outside: SIGINT and SIGTERM end it as an exception would.

Then every ``with`` and ``finally`` does its work: temporary files go, workers end, what is complete
stays. Exit codes 130 and 143, as shells have them.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, TypeVar

_AGAIN_S = 0.02
_called_from_c: set[CodeType] = set()
_Function = TypeVar("_Function", bound=Callable[..., Any])

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Stopped(KeyboardInterrupt):
    """A signal asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def called_from_c(function: _Function) -> _Function:
    """Mark a function that C code calls: ctypes would print an exception in it, and go on."""
    _called_from_c.add(function.__code__)
    return function


def _stop(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code in _called_from_c:  # ask once more when it has returned
            again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    # Once is enough: `timeout` signals twice. Another Ctrl-C ends the process at once.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise Stopped(number)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise ``Stopped`` in the block when a signal comes.

    A signal that is ignored (nohup, a shell's background jobs) or has a handler of somebody else
    is left alone, as it is outside of the main thread.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {number: known for number, known in before.items() if known in _DEFAULTS}
    for number in before:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


def ending(error: BaseException) -> tuple[int, str]:
    """Return the exit code of an interruption, and the line that says how to go on.

    Parameters
    ----------
    error : with the work directory, if something is kept there, as a note, see ``remember``
    """
    number = error.number if isinstance(error, Stopped) else signal.SIGINT
    how = "terminated" if number == signal.SIGTERM else "interrupted"
    kept = getattr(error, "__notes__", [])
    hint = f": what is done in {kept[0]} is reused" if kept else ""
    return 128 + number, f"edgeq: {how}. Run the same command again to go on{hint}."


def remember(error: BaseException | None, place: object) -> None:
    """Note where an interrupted run keeps what is done."""
    if isinstance(error, KeyboardInterrupt):
        error.add_note(str(place))
