"""The one decorator of every kernel: which numba options are used, and why.

* ``error_model="numpy"``: numba's own raises ZeroDivisionError inside a kernel; numpy gives inf.
* ``nogil``: a kernel never touches Python objects.
* ``cache``: the first call costs seconds of compilation, once per machine. Numba does not see an
  edited function of *another* file, so a kernel calls compiled helpers of its own file only.
* No ``fastmath`` as a whole: it lets LLVM assume that there is no NaN. ``reorder=True`` permits
  only that sums are reordered and fused (LLVM's ``reassoc`` and ``contract``), without which no
  sum is vectorized: 0.31 instead of 3.3 ns an element for a sum of exponentials, and NaN and
  infinity still arrive in the result. A helper called by such a kernel keeps its own flags.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

_Function = TypeVar("_Function", bound=Callable[..., Any])


def kernel(*, parallel: bool = False, reorder: bool = False) -> Callable[[_Function], _Function]:
    """Compile a function on its first call; ``.py_func`` stays its plain Python body.

    Parameters
    ----------
    parallel : run ``numba.prange`` loops on all CPUs
    reorder : allow sums to be reordered, for vector units
    """

    def compile_lazily(function: _Function) -> _Function:
        compiled: _Function = numba.njit(
            cache=True,
            nogil=True,
            error_model="numpy",
            parallel=parallel,
            fastmath={"reassoc", "contract"} if reorder else False,
        )(function)
        return compiled

    return compile_lazily


def cache_folder(compiled: Any) -> Path:
    """Return where numba keeps the code of a kernel, by its own rules (``NUMBA_CACHE_DIR``)."""
    return Path(compiled.stats.cache_path)
