"""ggml's own matrix products, one at a time: what the kernels are checked and timed against.

A weight lies where llama.cpp would put it: in the CPU's buffer of rearranged weights ("repack")
where ggml has a rearrangement for its type and shape, else in the plain one.
"""

import ctypes
import functools
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from edgeq.errors import RuntimeLibraryError
from edgeq.runtime.encoders import Packed
from edgeq.runtime.library import GgmlTensor, ggml_context, load

_TENSORS = 64  # of a context at most


@functools.cache
def _libraries() -> tuple[Any, Any]:
    """Return libggml-base and libggml-cpu with what this module calls declared."""
    library = load()
    from llama_cpp import _ctypes_extensions, _ggml

    base = library.ggml
    cpu = _ctypes_extensions.load_shared_library("ggml-cpu", _ggml.libggml_base_path)
    pointer, tensor, size = ctypes.c_void_p, ctypes.POINTER(GgmlTensor), ctypes.c_size_t
    declared: tuple[tuple[Any, str, list[Any], Any], ...] = (
        (cpu, "ggml_backend_cpu_init", [], pointer),
        (cpu, "ggml_backend_cpu_reg", [], pointer),
        (cpu, "ggml_backend_cpu_set_n_threads", [pointer, ctypes.c_int], None),
        (base, "ggml_backend_reg_dev_get", [pointer, size], pointer),
        (base, "ggml_backend_reg_get_proc_address", [pointer, ctypes.c_char_p], pointer),
        (base, "ggml_backend_get_default_buffer_type", [pointer], pointer),
        (base, "ggml_backend_alloc_ctx_tensors_from_buft", [pointer, pointer], pointer),
        (base, "ggml_backend_tensor_set", [tensor, pointer, size, size], None),
        (base, "ggml_backend_tensor_get", [tensor, pointer, size, size], None),
        (base, "ggml_new_graph", [pointer], pointer),
        (base, "ggml_graph_overhead", [], size),
        (base, "ggml_build_forward_expand", [pointer, tensor], None),
        (base, "ggml_backend_graph_compute", [pointer, pointer], ctypes.c_int),
        (base, "ggml_backend_free", [pointer], None),
        (base, "ggml_backend_buffer_free", [pointer], None),
    )
    for owner, name, takes, returns in declared:
        function = getattr(owner, name)
        function.argtypes, function.restype = takes, returns
    return base, cpu


def _buffer_types() -> list[int]:
    """Return the CPU's buffer types of rearranged weights, those that llama.cpp tries first."""
    base, cpu = _libraries()
    registry = cpu.ggml_backend_cpu_reg()
    address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    kind = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
    listed = kind(address)(base.ggml_backend_reg_dev_get(registry, 0))
    found = []
    for i in range(_TENSORS):
        if not listed[i]:
            break
        found.append(int(listed[i]))
    return found


class RuntimeProduct:
    """One weight times up to n activations, by ggml; a context manager.

    Parameters
    ----------
    packed : (n_out, row_bytes) uint8
    qtype : ggml's type of it
    n_in : columns
    n : activations of a call
    n_threads : of ggml
    repeats : how often a run multiplies; timing more than one hides the start of the threads

    Attributes
    ----------
    is_rearranged : whether ggml has the weight in an order of its own

    Raises
    ------
    RuntimeLibraryError
        There is no memory for it.
    """

    def __init__(
        self,
        packed: Packed,
        qtype: GGMLQuantizationType,
        n_in: int,
        n: int = 1,
        n_threads: int = 1,
        *,
        repeats: int = 1,
    ) -> None:
        self._contexts: list[int] = []
        self._buffers: list[int] = []
        self._backend = 0
        try:
            self._make(packed, qtype, n_in, n, n_threads, repeats)
        except BaseException:
            self.close()
            raise

    def _make(
        self,
        packed: Packed,
        qtype: GGMLQuantizationType,
        n_in: int,
        n: int,
        n_threads: int,
        repeats: int,
    ) -> None:
        base, cpu = _libraries()
        self._backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(self._backend, n_threads)
        plain = base.ggml_backend_get_default_buffer_type(self._backend)
        self.is_rearranged = False
        weight = None
        for kind in [*_buffer_types(), plain]:
            context = self._context()
            weight = base.ggml_new_tensor_2d(context, qtype, n_in, len(packed))
            self._allocate(context, kind)
            if kind == plain or weight.contents.extra:
                self.is_rearranged = kind != plain
                break
            base.ggml_free(self._contexts.pop())  # no rearrangement: it lies in the plain buffer
            base.ggml_backend_buffer_free(self._buffers.pop())
        context = self._context()
        self._inputs = base.ggml_new_tensor_2d(context, 0, n_in, n)
        outputs = [base.ggml_mul_mat(context, weight, self._inputs) for _ in range(repeats)]
        self._outputs = outputs[0]
        self._allocate(context, plain)
        self._graph = base.ggml_new_graph(context)
        for one in outputs:
            base.ggml_build_forward_expand(self._graph, one)
        rows = np.ascontiguousarray(packed)
        base.ggml_backend_tensor_set(weight, rows.ctypes.data, 0, rows.nbytes)
        self._shape = (n, len(packed))

    def _context(self) -> int:
        base, _ = _libraries()
        n_bytes = _TENSORS * base.ggml_tensor_overhead() + base.ggml_graph_overhead()
        self._contexts.append(ggml_context(load(), n_bytes, no_alloc=True))
        return self._contexts[-1]

    def _allocate(self, context: int, kind: int) -> None:
        base, _ = _libraries()
        buffer = base.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
        if not buffer:
            raise RuntimeLibraryError("ggml: no memory for a product. Free some memory.")
        self._buffers.append(buffer)

    def __call__(self, inputs: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the product with (n, n_in) float32 activations, (n, n_out) float32."""
        base, _ = _libraries()
        given = np.ascontiguousarray(inputs, np.float32)
        base.ggml_backend_tensor_set(self._inputs, given.ctypes.data, 0, given.nbytes)
        self.run()
        found = np.empty(self._shape, np.float32)
        base.ggml_backend_tensor_get(self._outputs, found.ctypes.data, 0, found.nbytes)
        return found

    def run(self) -> None:
        """Multiply what was given last."""
        base, _ = _libraries()
        base.ggml_backend_graph_compute(self._backend, self._graph)

    def close(self) -> None:
        """Free everything."""
        base, _ = _libraries()
        for context in self._contexts:
            base.ggml_free(context)
        for buffer in self._buffers:
            base.ggml_backend_buffer_free(buffer)
        if self._backend:
            base.ggml_backend_free(self._backend)
        self._contexts, self._buffers, self._backend = [], [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
