"""Operations of a batch: activations made and quantized, products, the rest as it is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.inputs import (
    KINDS,
    InputLayout,
    add_normalized,
    float_bits,
    quantize_arguments,
    quantize_at,
)
from cpu_kernels.isa import chosen
from cpu_kernels.products import groups_of, multiply_floats, operations
from cpu_kernels.threads import Operation, address_of
from cpu_kernels.tiles import aligned_bytes
from edgeq.decoding.shape import Shape
from edgeq.decoding.weights import Floats, Weights

# quantized activations, by columns, kind, tokens of the batch and first of them
Inputs = dict[tuple[int, str, int, int], npt.NDArray[np.int8]]


class Builder:
    """Collects the operations of a batch of n tokens."""

    def __init__(
        self, read: Weights, n: int, scratch: npt.NDArray[np.int8], inputs: Inputs
    ) -> None:
        self.operations: list[Operation] = []
        self._read, self._n, self._scratch = read, n, scratch
        self._isa = chosen()
        self._inputs = inputs

    def add(
        self, operation: Any, arguments: Sequence[int], kind: Any = None, *, meets: bool = True
    ) -> None:
        """Append an operation."""
        code = address_of(operation, kind)
        self.operations.append(Operation(code, np.array(arguments, np.int64), meets))

    def prepare(
        self,
        weights: Sequence[str],
        values: Floats,
        n_in: int,
        how: int,
        first: Floats | None,
        second: Floats | None,
        epsilon: float,
    ) -> None:
        """Make activations and quantize them as the weights want them."""
        found = [self._read.weight(name) for name in weights]
        kinds = sorted({one.layout.inputs for one in found if not isinstance(one, np.ndarray)})
        if any(isinstance(one, np.ndarray) for one in found) or not kinds:
            kinds = kinds or ["Q8_0"]  # makes the values; nothing reads the codes
        for kind in kinds:
            for start, n, n_groups in groups_of(self._n, self._isa):
                where, buffer = self._buffer(n_in, kind, start, n, n_groups)
                arguments = quantize_arguments(
                    values[start:],
                    where,
                    buffer.ctypes.data,
                    self._scratch,
                    n_groups,
                    how,
                    _address(first, start),
                    _address(second, start),
                    epsilon,
                )
                self.operations.append(Operation(address_of(quantize_at), arguments))

    def multiply(
        self, name: str, values: Floats, out: Floats, *, adds: bool = False, meets: bool = True
    ) -> None:
        """Multiply a weight with the activations that were prepared last."""
        weight = self._read.weight(name)
        if isinstance(weight, np.ndarray):
            arguments = [
                weight.ctypes.data, *weight.shape, values.ctypes.data, values.strides[0],
                out.ctypes.data, out.strides[0], self._n, adds,
            ]  # fmt: skip
            self.add(multiply_floats, arguments, meets=meets)
            return
        for start, n, n_groups in groups_of(self._n, self._isa):
            where, buffer = self._buffer(weight.n_in, weight.layout.inputs, start, n, n_groups)
            base, rows = buffer.ctypes.data, out[start:]
            self.operations.extend(
                operations(weight, base, where, rows, n_groups, self._isa, adds=adds, meets=meets)
            )

    def add_normalized(self, rows: Floats, added: Floats, norm: Floats, shape: Shape) -> None:
        """Add normalized rows to the residual."""
        arguments = [
            rows.ctypes.data, added.ctypes.data, rows.shape[1], added.shape[1],
            norm.ctypes.data, shape.n_embd, float_bits(shape.epsilon), self._n,
        ]  # fmt: skip
        self.add(add_normalized, arguments)

    def _buffer(
        self, n_in: int, kind: str, start: int, n: int, n_groups: int
    ) -> tuple[InputLayout, npt.NDArray[np.int8]]:
        where = InputLayout(n_in, n, KINDS.index(kind))
        key = (n_in, kind, self._n, start)
        if key not in self._inputs:
            self._inputs[key] = aligned_bytes(where.n_bytes * n_groups)
        return where, self._inputs[key]


def _address(values: Floats | None, row: int) -> int:
    """Return where a row begins; a vector's only one; 0 of nothing."""
    if values is None:
        return 0
    return int(values.ctypes.data + (row * values.strides[0] if values.ndim > 1 else 0))
