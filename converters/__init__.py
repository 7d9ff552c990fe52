"""Files: checkpoints in, GGUF out. Knows neither ``edgeq`` nor the kernels, and runs no model.

The names below are imported on first use, so that ``import converters`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.checkpoint import open_checkpoint, resolve_model
    from converters.errors import ConversionError
    from converters.gguf_file import open_gguf
    from converters.gguf_writer import write_gguf

_HOMES = {
    "ConversionError": "converters.errors",
    "open_checkpoint": "converters.checkpoint",
    "open_gguf": "converters.gguf_file",
    "resolve_model": "converters.checkpoint",
    "write_gguf": "converters.gguf_writer",
}

__all__ = ["ConversionError", "open_checkpoint", "open_gguf", "resolve_model", "write_gguf"]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'converters' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
