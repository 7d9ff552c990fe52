"""What the command line shows: progress bars on stderr, tables on stdout."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (done, total) as a step goes on."""

_VISIBLE_AFTER_S = 2.0


class Steps:
    """Named steps of a run: their times, and a bar for each that takes over two seconds.

    Parameters
    ----------
    bars : default: where stderr is a terminal

    Attributes
    ----------
    seconds : name → wall time of each finished step
    """

    def __init__(self, *, bars: bool | None = None) -> None:
        self._bars = sys.stderr.isatty() if bars is None else bars
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        """Time the block as `name` and give the function that it reports progress to."""
        started = time.perf_counter()
        state = "failed"
        logger.info("%s", name, extra={"event": "step", "step": name, "state": "begun"})
        try:
            if self._bars:
                with _bar(name, started) as progress:
                    yield progress
            else:
                yield lambda done, total: None
            state = "done"
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            extra = {"event": "step", "step": name, "state": state, "seconds": round(spent, 3)}
            logger.info("%s: %s, %.1f s", name, state, spent, extra=extra)


@contextlib.contextmanager
def _bar(name: str, started: float) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    bar = Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeLeft(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(name, total=None, visible=True)
    running = False

    def progress(done: int, total: int) -> None:
        nonlocal running
        if not running and time.perf_counter() - started > _VISIBLE_AFTER_S:
            bar.start()
            running = True
        bar.update(task, completed=done, total=total)

    try:
        yield progress
    finally:
        bar.stop()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned for reading in a terminal too.

    The first column is text, the others are numbers and stand right.
    """
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = [
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join([first, *rest]) + " |"

    ruler = "|" + "|".join(
        ("-" * (width + 2)) if i == 0 else ("-" * (width + 1) + ":")
        for i, width in enumerate(widths)
    )
    return "\n".join([line(cells[0]), ruler + "|", *[line(row) for row in cells[1:]]])
