"""Chunks side by side, each on one thread: the same numbers with any number of threads.

Some of torch's products split their sums among its threads, so their last bits depend on how many
there are (a product over a vocabulary, everything in bfloat16). A chunk on one thread does not.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

_Item = TypeVar("_Item")
_Done = TypeVar("_Done")


class OnEach(Protocol):
    """Calls a function on every item; the results come in order."""

    def __call__(
        self, function: Callable[[_Item], _Done], items: Sequence[_Item]
    ) -> Iterator[_Done]:
        """Yield the results; at most as many as there are threads wait to be taken."""
        ...


def without_nested_teams() -> None:
    """Keep this thread's OpenMP regions from starting threads inside of others.

    numba's pool allows that (``omp_set_nested``) to the thread that first uses it, and torch shares
    its OpenMP library: every product of torch's attention, already on a thread of its own, then
    starts new ones, thousands a second, and a step of tuning takes twice the time.
    """
    with contextlib.suppress(AttributeError):  # a torch without OpenMP, or linked otherwise
        ctypes.CDLL(torch._C.__file__).omp_set_max_active_levels(1)


@contextlib.contextmanager
def one_thread_each() -> Iterator[OnEach]:
    """Give a function that works on as many items at a time as torch had threads."""
    n_threads = torch.get_num_threads()

    def on_each(function: Callable[[_Item], _Done], items: Sequence[_Item]) -> Iterator[_Done]:
        for first in range(0, len(items), n_threads):
            yield from pool.map(function, items[first : first + n_threads])

    torch.set_num_threads(1)  # before the pool's threads are there: each asks once
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            yield on_each
    finally:
        torch.set_num_threads(n_threads)
