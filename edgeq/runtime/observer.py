"""Sees the inputs of every weight product while llama.cpp computes, for any architecture.

The scheduler asks before every node of the graph whether somebody wants it, and reports the ones
that were wanted right after they were computed, while their sources are still in memory. Which
products count, and under which name, follows llama-imatrix, so that statistics made from these
observations are the ones that it would have made.

References
----------
llama.cpp 0c1e57098: ggml/src/ggml-backend.cpp, ggml_backend_sched_compute_splits (how the callback
is called); tools/imatrix/imatrix.cpp, filter_tensor_name and IMatrixCollector::collect_imatrix.
"""

import contextlib
import ctypes
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.errors import RuntimeLibraryError
from edgeq.runtime.library import GGML_MAX_DIMS, GgmlTensor, load

MIN_ROWS = 16  # smaller plain products are not observed, as in llama-imatrix
_OP_OFFSET = GgmlTensor.op.offset
_TYPE_F32 = 0
_TYPE_I32 = 26

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class ProductInput:
    """What one weight tensor was multiplied with in one graph.

    The arrays are views on llama.cpp's memory: valid only inside the callback.

    Attributes
    ----------
    name : the weight tensor, as in the GGUF file
    n_in : columns of the weight
    weight_shape : (a, b), matrices of the weight tensor; (1, 1) for a plain one
    values : (c, b, n_rows, n_in) float32 for plain products, where c and b repeat over the matrices
        of the weight; (1, n_tokens, n_slots, n_in) for expert products, n_slots being 1 where all
        experts of a token see the same input
    expert_ids : (n_tokens, n_used) int32 for expert products; None for plain ones
    same_as : the first weight of this graph that saw the very same input; its own name if it is
        the first
    """

    name: str
    n_in: int
    weight_shape: tuple[int, int]
    values: FloatArray
    expert_ids: npt.NDArray[np.int32] | None
    same_as: str

    @property
    def n_mat(self) -> int:
        """Matrices of the weight tensor: experts, or heads of a 3-D weight; else 1."""
        return self.weight_shape[0] * self.weight_shape[1]

    def by_matrix(self) -> Iterator[tuple[int, FloatArray]]:
        """Yield (matrix or expert, the rows that it saw: (n_rows, n_in) float32), none empty."""
        if self.expert_ids is not None:
            yield from self._by_expert(self.expert_ids)
            return
        outer, inner = self.weight_shape
        values = self.values
        if outer * inner == 1:
            yield 0, values.reshape(-1, self.n_in)
            return
        for matrix in range(outer * inner):
            mine = values[matrix // inner :: outer, matrix % inner :: inner]
            if mine.size:
                yield matrix, mine.reshape(-1, self.n_in)

    def _by_expert(self, ids: npt.NDArray[np.int32]) -> Iterator[tuple[int, FloatArray]]:
        n_tokens, n_used = ids.shape
        n_slots = self.values.shape[2]
        slots = np.broadcast_to(np.arange(n_used) % n_slots, ids.shape).ravel()
        tokens = np.repeat(np.arange(n_tokens), n_used)
        flat = ids.ravel()
        order = np.argsort(flat, kind="stable")
        experts, starts = np.unique(flat[order], return_index=True)
        for expert, chosen in zip(experts.tolist(), np.split(order, starts[1:]), strict=True):
            yield expert, self.values[0, tokens[chosen], slots[chosen]]


class Observer:
    """Calls `on_input` with a `ProductInput` for every weight product of every graph.

    Pass it as ``Model(cb_eval=observer)``. An exception of `on_input` stops the graph, and
    ``Model.decode`` raises it.

    Parameters
    ----------
    on_input : called in the thread that calls ``decode``
    output_tensor : also observe ``output.weight``, or ``token_embd.weight`` where it is used as the
        output (llama-imatrix never collects the latter)

    Attributes
    ----------
    skipped : tensor name to the reason why products with it were not observed
    stop_after : name of the weight after whose product the rest of the graph is not computed; the
        logits of such a graph are meaningless. None computes everything.
    """

    def __init__(
        self, on_input: Callable[[ProductInput], None], *, output_tensor: bool = False
    ) -> None:
        self._library = load()
        self._on_input = on_input
        self._extra = {"output.weight", "token_embd.weight"} if output_tensor else set()
        self._mul_mat, self._mul_mat_id = _product_ops()
        self._error: BaseException | None = None
        self._first_with: dict[tuple[int, int], str] = {}
        self._names: set[str] = set()
        self.skipped: dict[str, str] = {}
        self.stop_after: str | None = None
        self.callback: Any = self._library.llama.ggml_backend_sched_eval_callback(self._on_node)

    @contextlib.contextmanager
    def holding_interrupts(self) -> Iterator[None]:
        """Turn Ctrl-C and SIGTERM in the block into an error of this observer, see ``raise_error``.

        Raised as usual it could hit the callback outside of its ``try``: ctypes would only print
        it, and the input of one product would be missing without a trace.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        known = {int(n): signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def hold(number: int, frame: FrameType | None) -> None:
            handler = known[number]
            try:
                if callable(handler):
                    handler(number, frame)
            except KeyboardInterrupt as error:
                self._error = error

        held = [number for number, handler in known.items() if callable(handler)]
        for number in held:
            signal.signal(number, hold)
        try:
            yield
        finally:
            for number in held:
                if signal.getsignal(number) is hold:  # the handler may have set another
                    signal.signal(number, known[number])

    def raise_error(self) -> None:
        """Raise what `on_input` raised since the last call, if anything.

        Raises
        ------
        BaseException
            The very exception, with its traceback.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _on_node(self, address: int, ask: bool, _user_data: int) -> bool:
        try:
            if self._error is not None:
                return ask  # wanted, and refused when reported: the graph ends here
            op = ctypes.c_int.from_address(address + _OP_OFFSET).value
            if op != self._mul_mat and op != self._mul_mat_id:
                return False
            product = GgmlTensor.from_address(address)
            if ask:
                return self._is_wanted(product)
            return self._report(product)
        except BaseException as error:  # noqa: BLE001 - ctypes would only print it; see raise_error
            self._error = error
            return False

    def _is_wanted(self, product: GgmlTensor) -> bool:
        name = _weight_name(product)
        if product.op == self._mul_mat_id:
            return True
        if not (name.startswith("blk.") or name in self._extra):
            return False
        source = product.src[1].contents
        if source.type != _TYPE_F32:
            self.skipped[name] = f"its input has ggml type {source.type}, not F32"
            return False
        if source.ne[1] < MIN_ROWS:
            self.skipped[name] = f"its input has {source.ne[1]} rows, fewer than {MIN_ROWS}"
            return False
        return True

    def _report(self, product: GgmlTensor) -> bool:
        name = _weight_name(product)
        weight, source = product.src[0].contents, product.src[1].contents
        is_expert = product.op == self._mul_mat_id
        values = self._view(name, source, np.float32, _TYPE_F32)
        expert_ids = None
        if is_expert:
            ids = self._view(name, product.src[2].contents, np.int32, _TYPE_I32)[0, 0]
            expert_ids = np.ascontiguousarray(ids)
            n_experts = weight.ne[2]
            if values.shape[0] != 1 or expert_ids.min() < 0 or expert_ids.max() >= n_experts:
                raise RuntimeLibraryError(
                    f"{name}: expert product of input shape {values.shape} and expert ids "
                    f"{expert_ids.min()}..{expert_ids.max()}, expected 3 dimensions and ids below "
                    f"{n_experts}. Report this model to edgeq's developers."
                )
        self._on_input(
            ProductInput(
                name=name,
                n_in=int(source.ne[0]),
                weight_shape=(int(weight.ne[3]), int(weight.ne[2])),
                values=values,
                expert_ids=expert_ids,
                same_as=self._first(name, product, is_expert),
            )
        )
        return name != self.stop_after

    def _first(self, name: str, product: GgmlTensor, is_expert: bool) -> str:
        """Return the first weight of this graph with the same input as `product`.

        Within a graph every tensor has its own struct, so its address identifies it (addresses of
        data do not: memory is reused). A weight that comes again begins a new graph.
        """
        if name in self._names:
            self._names.clear()
            self._first_with.clear()
        self._names.add(name)
        address = ctypes.addressof(product.src[1].contents)
        ids = ctypes.addressof(product.src[2].contents) if is_expert else 0
        return self._first_with.setdefault((address, ids), name)

    def _view(self, name: str, tensor: GgmlTensor, dtype: Any, ggml_type: int) -> Any:
        """Return the tensor as an array of 4 dimensions in numpy's order, strided as in memory."""
        if tensor.type != ggml_type:
            raise RuntimeLibraryError(
                f"{name}: is multiplied with a tensor of ggml type {tensor.type}, "
                f"expected {ggml_type}. Report this model to edgeq's developers."
            )
        if tensor.buffer and not self._library.ggml.ggml_backend_buffer_is_host(tensor.buffer):
            raise RuntimeLibraryError(
                f"{name}: its input lies in the memory of another device. Calibrate with "
                "llama-cpp-python's CPU build, or hide the device (CUDA_VISIBLE_DEVICES=)."
            )
        shape = tuple(tensor.ne[i] for i in reversed(range(GGML_MAX_DIMS)))
        strides = tuple(tensor.nb[i] for i in reversed(range(GGML_MAX_DIMS)))
        span = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        memory = (ctypes.c_char * (span + np.dtype(dtype).itemsize)).from_address(tensor.data)
        view = np.ndarray(shape, dtype, memory, strides=strides)
        view.flags.writeable = False
        return view


def _weight_name(product: GgmlTensor) -> str:
    """Return the weight's name without a device's prefix and suffix ("CUDA0#name#0")."""
    name = str(product.src[0].contents.name.decode("utf-8", "replace"))
    parts = name.split("#")
    return name if len(parts) == 1 else parts[1]


@functools.cache
def _product_ops() -> tuple[int, int]:
    """Return ggml's numbers of the two product operations, found by their names."""
    ggml = load().ggml
    numbers = {}
    for op in range(64):  # ggml_op_name() of a number that is no operation is not defined
        numbers[ggml.ggml_op_name(op)] = op
        if len(numbers.keys() & {b"MUL_MAT", b"MUL_MAT_ID"}) == 2:
            return numbers[b"MUL_MAT"], numbers[b"MUL_MAT_ID"]
    raise RuntimeLibraryError(
        "llama-cpp-python: ggml names no MUL_MAT and MUL_MAT_ID. "
        "Install it with: pip install llama-cpp-python==0.3.36"
    )
