"""edgeq: export Hugging Face causal language models to GGUF files, calibrated and proven."""

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

# numpy's OpenBLAS reads it once, when it is loaded. Its threads otherwise spin for some 30 ms after
# every product and keep the kernels that follow from their CPUs: rounding took 1.5 times as long.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

if TYPE_CHECKING:
    from edgeq.api import check, evaluate, export, plan

try:
    __version__ = version("edgeq")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.1.0"

__all__ = ["__version__", "check", "evaluate", "export", "plan"]


def __getattr__(name: str) -> Any:
    """Import the functions of ``edgeq.api`` when one of them is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("edgeq.api"), name)


def __dir__() -> list[str]:
    """Return what there is, the functions of ``edgeq.api`` included."""
    return sorted({*globals(), *__all__})
