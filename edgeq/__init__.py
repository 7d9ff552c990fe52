"""edgeq: export Hugging Face causal language models to GGUF files, calibrated and proven."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

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
