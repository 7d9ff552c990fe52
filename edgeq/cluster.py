"""Tasks on the workers of a dask.distributed scheduler: several machines, one result.

Workers are started by hand, ``dask worker tcp://HOST:8786 --nthreads 1``, in environments of the
same versions. Tasks read files that every worker can open under the same path (shared storage, the
default), or hold their arrays. A worker that is lost loses nothing but its current task, which
another repeats; one that joins takes its share. While the scheduler is away nothing is lost
either: what is done lies in the work directory.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from converters.gguf_file import GgufFile
from edgeq.execution import ExecutionError, Held, Shared, filed

_Task = TypeVar("_Task")
_Done = TypeVar("_Done")
_T = TypeVar("_T")

DATA = ("files", "arrays")
_CONNECT_S = 10
_PATIENCE_S = 60  # for a scheduler that went away
_MOST_TIMES = 5  # that it went away with nothing done between
_NAMES = ("edgeq", "numpy", "numba", "llama-cpp-python", "scipy")


class Cluster:
    """Runs tasks on the workers of a scheduler.

    Parameters
    ----------
    url : of the scheduler, ``tcp://host:port``
    directory : for what tasks share; on shared storage if `data` is "files"
    data : "files": tasks name files that every worker can open; "arrays": tasks hold their data

    Raises
    ------
    ExecutionError
        distributed is not installed, the scheduler cannot be reached, it has no worker, a worker
        has other versions, or runs several tasks at a time.
    """

    def __init__(self, url: str, directory: Path, data: str = "files") -> None:
        if data not in DATA:
            raise ExecutionError(
                f"--cluster-data: got {data!r}, expected one of {', '.join(DATA)}."
            )
        self.url = url
        self.directory = directory.resolve()
        self.data = data
        self.has_files = data == "files"
        self._client = self._connected()

    @property
    def n_workers(self) -> int:
        """The workers that are there now."""
        return max(1, len(self._client.scheduler_info(n_workers=-1)["workers"]))

    def each(
        self, function: Callable[[_Task], _Done], tasks: Sequence[_Task]
    ) -> Iterator[tuple[int, _Done]]:
        """Yield every task's number and result, in the order of completion."""
        from distributed import KilledWorker, as_completed
        from distributed.comm import CommClosedError

        left = set(range(len(tasks)))
        times = 0
        failure: BaseException | None = None  # of a task itself
        while left:
            before = len(left)
            try:
                asked = sorted(left)
                futures = self._client.map(function, [tasks[n] for n in asked], pure=False)
                numbers = dict(zip((future.key for future in futures), asked, strict=True))
                for future in as_completed(futures, loop=self._client.loop):
                    if future.status in ("cancelled", "lost"):
                        raise CommClosedError("its tasks are lost")
                    if future.status == "error":
                        failure = future.exception()
                        raise failure
                    result = future.result()
                    left.remove(numbers[future.key])
                    yield numbers[future.key], result
            except KilledWorker as error:
                raise ExecutionError(
                    f"--cluster {self.url}: workers died at the same work again and again, "
                    "probably for want of memory. Give workers with more; what is done is reused."
                ) from error
            except (CommClosedError, OSError, TimeoutError) as error:
                if error is failure:
                    raise
                times = times + 1 if len(left) == before else 1
                self._reconnect(error, times)

    def _reconnect(self, error: BaseException, times: int) -> None:
        """Wait for a scheduler with workers; `times` without anything done between."""
        with contextlib.suppress(OSError, TimeoutError):
            self._client.close(timeout=1)
        end = time.monotonic() + (_PATIENCE_S if times <= _MOST_TIMES else 0)
        while True:
            try:
                self._client = self._connected()
                return
            except ExecutionError as again:
                if time.monotonic() > end:
                    raise ExecutionError(
                        f"--cluster {self.url}: the scheduler is gone ({error}). Start it and run "
                        "the same command again: what is done is reused."
                    ) from again
            time.sleep(1)

    def portable(self, file: GgufFile, names: Collection[str]) -> GgufFile:
        """Return the part of a file that a task needs: where it lies, or its data."""
        return file.only(names) if self.data == "files" else file.held(names)

    @contextlib.contextmanager
    def sharing(self, values: Mapping[str, _T]) -> Iterator[Mapping[str, Shared[_T]]]:
        """Give files, or the values themselves."""
        if self.data == "arrays":
            yield {name: Held(value) for name, value in values.items()}
            return
        with filed(values, self.directory) as shared:
            yield shared

    def _connected(self) -> Any:
        try:
            from distributed import Client
        except ImportError as error:
            raise ExecutionError(
                "--cluster: distributed is not installed. Install it with: pip install "
                "'edgeq[cluster]'"
            ) from error
        try:
            client = Client(self.url, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ExecutionError(
                f"--cluster {self.url}: no scheduler answers ({error}). Start one with: dask "
                "scheduler"
            ) from error
        try:
            self._check(client)
        except BaseException:
            client.close(timeout=1)
            raise
        return client

    def _check(self, client: Any) -> None:
        """Refuse workers that would give other bytes, or run two tasks in one process."""
        workers = client.scheduler_info(n_workers=-1)["workers"]
        if not workers:
            raise ExecutionError(
                f"--cluster {self.url}: has no workers. Start some with: dask worker {self.url} "
                "--nthreads 1"
            )
        for address, about in workers.items():
            if about["nthreads"] != 1:
                raise ExecutionError(
                    f"--cluster {self.url}: worker {address} has {about['nthreads']} threads, "
                    "expected 1 (a task uses every CPU itself). Start it with --nthreads 1."
                )
        ours = versions()
        for address, theirs in client.run(versions).items():
            if theirs != ours:
                raise ExecutionError(
                    f"--cluster {self.url}: worker {address} has {theirs}, expected {ours}. "
                    "Install the same versions there."
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._client.close(timeout=1)


def versions() -> dict[str, str]:
    """Return the versions that shape the bytes of a result, by package."""
    from importlib.metadata import version

    return {name: version(name) for name in _NAMES}
