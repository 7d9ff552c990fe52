"""llama-cpp-python's shared libraries: loading, logging, and the check of the layout we read.

The only place that imports ``llama_cpp``. Everything that edgeq reads through a raw pointer
(``ggml_tensor`` in evaluation callbacks) is checked here once per process against tensors that
ggml itself made, so that another build gives one clear error instead of wrong numbers.
"""

import contextlib
import ctypes
import functools
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeq.errors import RuntimeLibraryError
from edgeq.stopping import called_from_c

GGML_MAX_DIMS = 4
GGML_MAX_SRC = 10
GGML_MAX_OP_PARAMS = 64
GGML_MAX_NAME = 64
_PROBE = """
import numpy, edgeq.runtime.library as library
library._check_tiles = lambda loaded: None
from gguf.constants import GGMLQuantizationType
from edgeq.runtime.products import RuntimeProduct
with RuntimeProduct(numpy.zeros((32, 144), "u1"), GGMLQuantizationType.Q4_0, 256, 32) as product:
    product(numpy.zeros((32, 256)))
"""


class GgmlTensor(ctypes.Structure):
    """``struct ggml_tensor``.

    References
    ----------
    ggml/include/ggml.h, llama.cpp 0c1e57098.
    """


GgmlTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * GGML_MAX_DIMS),
    ("nb", ctypes.c_size_t * GGML_MAX_DIMS),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * (GGML_MAX_OP_PARAMS // 4)),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GgmlTensor) * GGML_MAX_SRC),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * GGML_MAX_NAME),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class _GgmlInitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Library:
    """The loaded runtime.

    Attributes
    ----------
    llama : the ``llama_cpp`` module, whose functions are ctypes bindings of llama.h
    ggml : libggml-base as a ctypes library, for what llama.h does not export
    """

    def __init__(self, llama: ModuleType, ggml: ctypes.CDLL) -> None:
        self.llama = llama
        self.ggml = ggml
        self._log: deque[str] = deque(maxlen=200)
        self._collectors: list[list[str]] = []

        @called_from_c
        def keep(level: int, text: bytes, _user_data: object) -> None:
            piece = text.decode("utf-8", "replace")
            self._log.append(piece)
            for collector in self._collectors:
                collector.append(piece)

        self._log_callback = llama.llama_log_callback(keep)  # kept alive with the library
        llama.llama_log_set(self._log_callback, ctypes.c_void_p(0))
        llama.llama_backend_init()

    def clear_log(self) -> None:
        """Forget what llama.cpp has logged so far."""
        self._log.clear()

    def log(self) -> str:
        """Return the last lines that llama.cpp logged (it never prints)."""
        return "".join(self._log)

    @contextlib.contextmanager
    def collected_log(self) -> Iterator[list[str]]:
        """Collect everything that llama.cpp logs inside the ``with``, in pieces of lines."""
        pieces: list[str] = []
        self._collectors.append(pieces)
        try:
            yield pieces
        finally:
            self._collectors = [other for other in self._collectors if other is not pieces]

    def last_error(self) -> str:
        """Return the most telling logged line, for an error message; empty if there is none."""
        lines = [line.strip() for line in self.log().splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
        return (telling or lines or [""])[0]


@functools.cache
def load() -> Library:
    """Load llama-cpp-python once per process and check it.

    Raises
    ------
    RuntimeLibraryError
        The package is missing, its ``ggml_tensor`` has another layout than the pinned version, or
        its code for this CPU's matrix tiles ends the process.
    """
    try:
        import llama_cpp
        from llama_cpp import _ctypes_extensions, _ggml
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeLibraryError(
            f"llama-cpp-python: cannot be loaded ({error}). "
            "Install it with: pip install llama-cpp-python==0.3.36"
        ) from error
    ggml = _ctypes_extensions.load_shared_library("ggml-base", _ggml.libggml_base_path)
    library = Library(llama_cpp, ggml)
    _declare(ggml)
    _check_layout(ggml, llama_cpp.__version__)
    _check_tiles(library)
    return library


def _declare(ggml: Any) -> None:
    ggml.ggml_init.argtypes = [_GgmlInitParams]
    ggml.ggml_init.restype = ctypes.c_void_p
    ggml.ggml_free.argtypes = [ctypes.c_void_p]
    ggml.ggml_free.restype = None
    ggml.ggml_new_tensor_2d.argtypes = [ctypes.c_void_p, ctypes.c_int] + [ctypes.c_int64] * 2
    ggml.ggml_new_tensor_2d.restype = ctypes.POINTER(GgmlTensor)
    ggml.ggml_new_tensor.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_int64),
    ]
    ggml.ggml_new_tensor.restype = ctypes.POINTER(GgmlTensor)
    ggml.ggml_mul_mat.argtypes = [ctypes.c_void_p] + [ctypes.POINTER(GgmlTensor)] * 2
    ggml.ggml_mul_mat.restype = ctypes.POINTER(GgmlTensor)
    ggml.ggml_set_name.argtypes = [ctypes.POINTER(GgmlTensor), ctypes.c_char_p]
    ggml.ggml_set_name.restype = ctypes.POINTER(GgmlTensor)
    ggml.ggml_get_data.argtypes = [ctypes.POINTER(GgmlTensor)]
    ggml.ggml_get_data.restype = ctypes.c_void_p
    ggml.ggml_op_name.argtypes = [ctypes.c_int]
    ggml.ggml_op_name.restype = ctypes.c_char_p
    ggml.ggml_backend_buffer_is_host.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_buffer_is_host.restype = ctypes.c_bool
    ggml.ggml_tensor_overhead.argtypes = []
    ggml.ggml_tensor_overhead.restype = ctypes.c_size_t


def ggml_context(library: Library, n_bytes: int, *, no_alloc: bool) -> int:
    """Return a ``ggml_context *`` of `n_bytes`; the caller frees it with ``ggml_free``."""
    context: int | None = library.ggml.ggml_init(_GgmlInitParams(n_bytes, None, no_alloc))
    if not context:
        raise RuntimeLibraryError(f"ggml_init: no context of {n_bytes} bytes. Free some memory.")
    return context


def _check_layout(ggml: Any, version: str) -> None:
    """Build tensors with ggml itself and read them back through ``GgmlTensor``."""
    context = ggml.ggml_init(_GgmlInitParams(1 << 16, None, False))
    try:
        weight = ggml.ggml_new_tensor_2d(context, 0, 32, 3)
        ggml.ggml_set_name(weight, b"edgeq.layout.check")
        product = ggml.ggml_mul_mat(context, weight, ggml.ggml_new_tensor_2d(context, 0, 32, 5))
        seen = weight.contents
        agrees = (
            seen.type == 0
            and list(seen.ne) == [32, 3, 1, 1]
            and list(seen.nb) == [4, 128, 384, 384]
            and seen.name == b"edgeq.layout.check"
            and seen.data == ggml.ggml_get_data(weight)
            and ggml.ggml_op_name(product.contents.op) == b"MUL_MAT"
            and ctypes.addressof(product.contents.src[0].contents) == ctypes.addressof(seen)
            and product.contents.src[1].contents.ne[1] == 5
            and not product.contents.src[2]
        )
    finally:
        ggml.ggml_free(context)
    if not agrees:
        raise RuntimeLibraryError(
            f"llama-cpp-python {version}: struct ggml_tensor has another layout than edgeq reads "
            "(that of 0.3.36). Install it with: pip install llama-cpp-python==0.3.36"
        )


def _check_tiles(library: Library) -> None:
    """Try ggml's code for AMX, where it is compiled in, in a process that may die of it.

    GCC before 13.3 takes the stores of the tiles' configuration for dead ones, and what then loads
    a tile is an illegal instruction.

    References
    ----------
    https://github.com/ggml-org/llama.cpp/pull/26954
    """
    with contextlib.suppress(OSError):
        if "amx_tile" not in Path("/proc/cpuinfo").read_text():
            return
    if b"AMX_INT8 = 1" not in library.llama.llama_print_system_info():
        return
    tried = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, check=False)
    if tried.returncode < 0:
        raise RuntimeLibraryError(
            f"llama-cpp-python: its AMX code ends the process (signal {-tried.returncode}); a "
            "compiler before GCC 13.3 made it. Build it without: CMAKE_ARGS='-DGGML_NATIVE=OFF "
            "-DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON' pip install "
            "--force-reinstall --no-deps --no-cache-dir llama-cpp-python==0.3.36"
        )
