"""Where independent pieces of work run: in this process, or in several of this machine.

A task is a function of a module with one argument that can be pickled; results come back in the
order of the tasks, so the bytes of an export do not depend on where it ran. ``edgeq.cluster`` runs
the same tasks on other machines.

Nothing here imports numpy at the top: a worker limits its threads before numpy is loaded.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from edgeq.errors import EdgeqError

if TYPE_CHECKING:
    from converters.gguf_file import GgufFile

_Task = TypeVar("_Task")
_Done = TypeVar("_Done")
_T = TypeVar("_T")
_Read = TypeVar("_Read", covariant=True)

_MOST_DEATHS = 3  # of workers, one after the other, with no task done between
_THREADS_OF = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


class ExecutionError(EdgeqError):
    """Workers that cannot be started, do not fit, or die again and again."""


class Shared(Protocol[_Read]):
    """A dataclass of arrays that several tasks read."""

    def get(self) -> _Read:
        """Return it, in whichever process this is."""
        ...


@dataclass(frozen=True, eq=False)
class Held(Generic[_T]):
    """Shared data that travels inside the task."""

    value: _T

    def get(self) -> _T:
        """Return it."""
        return self.value


@dataclass(frozen=True, eq=False)
class Filed(Generic[_T]):
    """Shared data that lies in files which every worker can read.

    Attributes
    ----------
    paths : of its arrays, .npy, by field
    """

    kind: type[_T]
    paths: Mapping[str, Path]

    def get(self) -> _T:
        """Map the files: workers of one machine share their pages, and none has to hold them."""
        import numpy as np

        arrays = {field: np.load(path, mmap_mode="r") for field, path in self.paths.items()}
        return self.kind(**{field: np.asarray(array) for field, array in arrays.items()})


class Executor(Protocol):
    """Runs tasks. A context manager."""

    @property
    def n_workers(self) -> int:
        """Tasks that can run at the same time."""
        ...

    @property
    def has_files(self) -> bool:
        """Whether tasks may open the files of this machine."""
        ...

    def each(
        self, function: Callable[[_Task], _Done], tasks: Sequence[_Task]
    ) -> Iterator[tuple[int, _Done]]:
        """Yield the number of a task and ``function(task)``, each as soon as it is there.

        Raises
        ------
        ExecutionError
            Workers died, or cannot be reached.
        """
        ...

    def portable(self, file: "GgufFile", names: Collection[str]) -> "GgufFile":
        """Return the part of a file that a task needs, fit for wherever it runs."""
        ...

    def sharing(
        self, values: Mapping[str, _T]
    ) -> contextlib.AbstractContextManager[Mapping[str, Shared[_T]]]:
        """Give dataclasses of arrays to tasks, for as long as the block runs."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def in_order(
    executor: Executor, function: Callable[[_Task], _Done], tasks: Sequence[_Task]
) -> list[_Done]:
    """Return ``function(task)`` of every task, in their order."""
    done = dict(executor.each(function, tasks))
    return [done[number] for number in range(len(tasks))]


class Here:
    """Runs tasks in this process, one after the other."""

    n_workers = 1
    has_files = True

    def each(
        self, function: Callable[[_Task], _Done], tasks: Sequence[_Task]
    ) -> Iterator[tuple[int, _Done]]:
        """Yield every task's number and result."""
        return ((number, function(task)) for number, task in enumerate(tasks))

    def portable(self, file: "GgufFile", names: Collection[str]) -> "GgufFile":
        """Return the file."""
        return file

    @contextlib.contextmanager
    def sharing(self, values: Mapping[str, _T]) -> Iterator[Mapping[str, Shared[_T]]]:
        """Give the values themselves."""
        yield {name: Held(value) for name, value in values.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Nothing is left to end."""


class Processes:
    """Runs tasks in processes of this machine; one that dies is replaced, and its task repeated.

    Parameters
    ----------
    n_workers : processes
    directory : for what tasks share; made when it is needed, and removed
    n_threads : of all workers together; default: every CPU of this process
    """

    def __init__(self, n_workers: int, directory: Path, n_threads: int | None = None) -> None:
        self.n_workers = n_workers
        self.has_files = True
        self.directory = directory
        from cpu_kernels.threads import available_cpus

        self._n_threads = max(1, (n_threads or available_cpus()) // n_workers)
        self._pool: Any = None

    def each(
        self, function: Callable[[_Task], _Done], tasks: Sequence[_Task]
    ) -> Iterator[tuple[int, _Done]]:
        """Yield every task's number and result, in the order of completion."""
        from concurrent.futures import as_completed
        from concurrent.futures.process import BrokenProcessPool

        left = set(range(len(tasks)))
        deaths = 0
        while left:
            before = len(left)
            try:
                futures = {self._started().submit(function, tasks[n]): n for n in sorted(left)}
                for future in as_completed(futures):
                    result = future.result()
                    left.remove(futures[future])
                    yield futures[future], result
            except BrokenProcessPool as error:
                self._stop()
                deaths = deaths + 1 if len(left) == before else 1
                if deaths >= _MOST_DEATHS:
                    raise ExecutionError(
                        f"--jobs {self.n_workers}: worker processes died {deaths} times at the "
                        "same work, probably for want of memory. Give fewer jobs; what is done is "
                        "reused."
                    ) from error

    def portable(self, file: "GgufFile", names: Collection[str]) -> "GgufFile":
        """Return the file's index of these tensors: workers read it themselves."""
        return file.only(names)

    @contextlib.contextmanager
    def sharing(self, values: Mapping[str, _T]) -> Iterator[Mapping[str, Shared[_T]]]:
        """Give files."""
        with filed(values, self.directory) as shared:
            yield shared

    def _started(self) -> Any:
        if self._pool is None:
            from concurrent.futures import ProcessPoolExecutor
            from multiprocessing import get_context

            self._pool = ProcessPoolExecutor(
                self.n_workers, get_context("spawn"), _begin, (self._n_threads,)
            )
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop()


@contextlib.contextmanager
def filed(values: Mapping[str, _T], directory: Path) -> Iterator[Mapping[str, Shared[_T]]]:
    """Write dataclasses of arrays as files, equal objects once; remove them afterwards."""
    import numpy as np

    files: dict[int, Filed[_T]] = {}
    try:
        for value in values.values():
            if id(value) in files:
                continue
            directory.mkdir(parents=True, exist_ok=True)
            paths = {}
            for field in dataclasses.fields(value):  # type: ignore[arg-type]
                array = getattr(value, field.name)
                if array is not None:
                    paths[field.name] = directory / f"{len(files)}.{field.name}.npy"
                    np.save(paths[field.name], array)
            files[id(value)] = Filed(type(value), paths)
        yield {name: files[id(value)] for name, value in values.items()}
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _begin(n_threads: int) -> None:
    """Prepare a worker: its threads, and its end when the process that started it ends."""
    from multiprocessing import connection, parent_process

    os.environ.update(dict.fromkeys(_THREADS_OF, str(n_threads)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    parent = parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
