"""Weights of a loaded model, replaced in its memory: a candidate is tried without a file.

llama.h has no function that finds a tensor of a model. The scheduler shows every node of a graph
before it is computed, and with it the weights that the node reads.

References
----------
llama.cpp 0c1e57098: ggml/src/ggml-backend.cpp, ggml_backend_sched_compute_splits.
"""

import ctypes
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.errors import RuntimeLibraryError
from edgeq.runtime.library import GGML_MAX_DIMS, GgmlTensor, load
from edgeq.runtime.model import Model
from edgeq.runtime.observer import Observer

FloatArray = npt.NDArray[np.float32]
_TYPE_F32 = 0


class PatchableModel(Model):
    """A model whose float32 weights can be replaced; see ``Model`` for what it can do else.

    Parameters
    ----------
    path : a GGUF file whose matrices are F32
    names : of the weights that will be replaced
    n_ctx, n_seq, n_threads : see ``Model``

    Raises
    ------
    RuntimeLibraryError
        llama.cpp refused the file, never reads one of the weights, or keeps it as another type.
    """

    def __init__(
        self,
        path: Path | str,
        names: Iterable[str],
        *,
        n_ctx: int = 512,
        n_seq: int = 1,
        n_threads: int | None = None,
    ) -> None:
        finder = _Finder()
        super().__init__(
            path,
            n_ctx=n_ctx,
            n_seq=n_seq,
            n_threads=n_threads,
            cb_eval=finder,
            repack=False,
            mmap=False,
        )
        try:
            self.logits(np.zeros(1, np.int32))
            finder.is_done = True
            self._weights = {name: finder.view(self.path, name) for name in names}
        except BaseException:
            self.close()
            raise

    def weight(self, name: str) -> FloatArray:
        """Return a weight as it stands in the model's memory, writable.

        Of shape (n_out, n_in) or (n_mat, n_out, n_in); valid until the model is closed.
        """
        return self._weights[name]

    def close(self) -> None:
        """Free the model and forget the views on it."""
        self._weights = {}
        super().close()


class _Finder(Observer):
    """Remembers where the weights of the graph lie; looks at nothing else."""

    def __init__(self) -> None:
        super().__init__(lambda _product: None)
        self._found: dict[str, GgmlTensor] = {}
        self.is_done = False

    def _on_node(self, address: int, ask: bool, _user_data: int) -> bool:
        if self.is_done or not ask:
            return False
        node = GgmlTensor.from_address(address)
        for source in node.src:
            if source:
                tensor = source.contents
                self._found.setdefault(tensor.name.decode("utf-8", "replace"), tensor)
        return False

    def view(self, path: Path, name: str) -> FloatArray:
        """Return a weight of the graph as an array."""
        tensor = self._found.get(name)
        if tensor is None:
            raise RuntimeLibraryError(
                f"{path}: llama.cpp never reads {name}. Keep it out of what is replaced."
            )
        is_host = not tensor.buffer or load().ggml.ggml_backend_buffer_is_host(tensor.buffer)
        if tensor.type != _TYPE_F32 or not is_host:
            raise RuntimeLibraryError(
                f"{path}: {name} is of ggml type {tensor.type}, in "
                f"{'host' if is_host else 'device'} memory, expected F32 (0) in host memory."
            )
        shape = [int(n) for n in reversed(tensor.ne[:GGML_MAX_DIMS])]
        while len(shape) > 2 and shape[0] == 1:
            del shape[0]
        memory = (ctypes.c_char * (4 * math.prod(shape))).from_address(tensor.data)
        return np.ndarray(tuple(shape), np.float32, memoryview(memory))
