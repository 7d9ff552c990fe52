"""The float model in torch, one decoder layer in memory at a time.

llama.cpp computes forward only. What needs gradients, or a layer whose weights are being changed,
runs here: the layers are transformers' own, and their weights come from the float GGUF file,
through the inverse of the converter's rules, so that every row and every name is the file's.

Import this package inside functions: it imports torch, which is an optional extra.
"""

from edgeq.errors import CalibrationError

try:
    import torch as _torch  # noqa: F401 - only whether it is there
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise CalibrationError(
        f"layerwise: {error.name or 'torch'} is not installed; gradients and changed layers are "
        "computed in torch. Install it with: pip install 'edgeq[torch]'"
    ) from error

from edgeq.layerwise.agreement import check_agrees
from edgeq.layerwise.concurrent import one_thread_each
from edgeq.layerwise.device import chosen_device, free_bytes_on, memory_of
from edgeq.layerwise.model import Layer, LayerwiseModel
from edgeq.layerwise.products import Product, fast_dtype

__all__ = [
    "Layer",
    "LayerwiseModel",
    "Product",
    "check_agrees",
    "chosen_device",
    "fast_dtype",
    "free_bytes_on",
    "memory_of",
    "one_thread_each",
]
