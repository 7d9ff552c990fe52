"""How fast this machine reads memory: the ceiling of every product of one token.

One sequential stream a thread, whole vectors, nothing done with them but an addition: what a
kernel that reads its weights once cannot pass.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from cpu_kernels._numba import kernel
from cpu_kernels.isa import chosen
from cpu_kernels.simd import I8, INTS, Vectors
from cpu_kernels.threads import Operation, Program, address_of
from cpu_kernels.tiles import aligned_bytes

_UNROLLED = 8  # vectors a turn, each added to a sum of its own
_TURN = 64 * _UNROLLED


@intrinsic
def _read(typing_context, start, n_turns, out):
    """Add up vectors of memory; write the sums, so that nothing is left out."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, n_turns, out = arguments
        vectors = Vectors(builder, chosen())
        sums = [cgutils.alloca_once_value(builder, vectors.zero(INTS)) for _ in range(_UNROLLED)]
        with cgutils.for_range(builder, n_turns) as loop:
            moved = builder.mul(loop.index, ir.Constant(start.type, _TURN))
            place = builder.inttoptr(builder.add(start, moved), I8.as_pointer())
            for i, slot in enumerate(sums):
                read = vectors.load(place, 64 * i, INTS, 64)
                builder.store(builder.add(builder.load(slot), read), slot)
        total = builder.load(sums[0])
        for slot in sums[1:]:
            total = builder.add(total, builder.load(slot))
        vectors.store(total, builder.inttoptr(out, I8.as_pointer()), 0)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), generate


@kernel()
def read(unused, arguments, thread, n_threads):
    """Read one thread's part of a memory; `arguments`: its address, turns of 512 bytes, sums."""
    turns = arguments[1]
    first, end = turns * thread // n_threads, turns * (thread + 1) // n_threads
    _read(arguments[0] + 512 * first, end - first, arguments[2] + 64 * thread)


class Reader:
    """A memory that is read from end to end.

    Parameters
    ----------
    n_bytes : of it; more than the caches hold
    n_threads : each reads a part
    """

    def __init__(self, n_bytes: int, n_threads: int) -> None:
        self._memory = aligned_bytes(n_bytes // _TURN * _TURN)
        self._memory[:] = 1
        self._sums = aligned_bytes(64 * n_threads)
        arguments = [
            self._memory.ctypes.data, len(self._memory) // _TURN, self._sums.ctypes.data
        ]  # fmt: skip
        self.n_bytes = len(self._memory)
        operation = Operation(address_of(read), np.array(arguments, np.int64))
        self._program = Program([operation], n_threads)

    def run(self) -> None:
        """Read all of it once."""
        self._program.run()
