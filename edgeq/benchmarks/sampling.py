"""Taking turns."""

import time
from collections.abc import Callable, Sequence

PAUSE = 0.004  # seconds in which ggml's threads stop waiting for work at full speed


def samples_of(runs: Sequence[Callable[[], None]], repetitions: int) -> list[list[float]]:
    """Return seconds of every run, taken in turn; a first round is not counted."""
    seconds: list[list[float]] = [[] for _ in runs]
    for repetition in range(repetitions + 1):
        for run, spent in zip(runs, seconds, strict=True):
            time.sleep(PAUSE)
            started = time.perf_counter()
            run()
            if repetition:
                spent.append(time.perf_counter() - started)
    return seconds
