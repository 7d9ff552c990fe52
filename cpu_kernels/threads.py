"""Running compiled operations on a few threads, one after the other, with nothing in between.

An operation is compiled code ``f(layout, arguments, thread, n_threads)``, where `arguments` is an
address of int64 numbers: addresses, sizes. A program is a list of operations. Every thread runs
all of them, each its part, and meets the others between two: a few hundred operations of a token
cost one call from Python and some 0.1 µs each. numba's own parallel loops would cost 2 to 100 µs
each, and give no promise that all parts run at once.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from cpu_kernels._numba import kernel
from cpu_kernels.simd import add_and_fetch, call, fetch, give_way

_ARGUMENTS = numba.types.CPointer(numba.types.int64)
_INT64 = numba.types.int64
_SPINS = 2000  # looks at the meeting place, some 10 µs, before a CPU is given away


@functools.cache
def address_of(operation: Any, layout: Any = None) -> int:
    """Compile an operation, or read it from numba's cache, and return where its code lies.

    Parameters
    ----------
    operation : a kernel ``f(layout, arguments, thread, n_threads)``
    layout : numba type of the first argument; without: an integer that is not used
    """
    return _address(operation, (layout or _INT64, _ARGUMENTS, _INT64, _INT64))


def _address(operation: Any, signature: tuple[Any, ...]) -> int:
    operation.compile(signature)
    result = operation.overloads[signature]
    return int(result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name))


@kernel()
def _run(program, n_operations, meeting, thread, n_threads):
    """Run a program's part of one thread; `program`: code, arguments, whether threads then meet."""
    for i in range(n_operations):
        call(program[3 * i], program[3 * i + 1], thread, n_threads)
        if n_threads > 1 and program[3 * i + 2] != 0:
            place = add_and_fetch(meeting, 1)
            goal = (place // n_threads + 1) * n_threads
            tries = 0
            while fetch(meeting) < goal:
                tries += 1
                if tries > _SPINS:  # the others may be waiting for this very CPU
                    give_way()


@functools.cache
def _runner() -> Callable[..., None]:
    """Return ``_run`` as a C function; calling it releases Python's lock."""
    address = _address(_run, (_ARGUMENTS, _INT64, _INT64, _INT64, _INT64))
    integer = ctypes.c_int64
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, integer, integer, integer, integer)
    found: Callable[..., None] = kind(address)
    return found


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(available_cpus(), thread_name_prefix="edgeq-kernel")


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of a program.

    Attributes
    ----------
    code : address, of ``address_of``
    arguments : int64; may be changed between two runs
    meets : whether the next operation reads what this one writes
    """

    code: int
    arguments: npt.NDArray[np.int64]
    meets: bool = True


class Program:
    """Operations that are run together, again and again.

    Parameters
    ----------
    operations : in order; threads also meet at the end
    n_threads : at most the CPUs there are: threads wait for one another at full speed

    Raises
    ------
    ValueError
        There are not so many CPUs.
    """

    def __init__(self, operations: Sequence[Operation], n_threads: int) -> None:
        if not 1 <= n_threads <= available_cpus():
            raise ValueError(
                f"threads: got {n_threads}, expected 1 to {available_cpus()}, the CPUs of this "
                "process: threads wait for one another at full speed."
            )
        self.n_threads = n_threads
        self._operations = tuple(operations)  # keeps their arguments alive
        rows = [(one.code, one.arguments.ctypes.data, one.meets) for one in operations]
        self._program = np.array(rows, np.int64).reshape(-1)
        self._meeting = np.zeros(16, np.int64)  # a cache line of its own

    def run(self) -> None:
        """Run all operations."""
        run = _runner()
        fixed = self._program.ctypes.data, len(self._operations), self._meeting[8:].ctypes.data
        others = [
            _pool().submit(run, *fixed, thread, self.n_threads)
            for thread in range(1, self.n_threads)
        ]
        run(*fixed, 0, self.n_threads)
        for other in others:
            other.result()
