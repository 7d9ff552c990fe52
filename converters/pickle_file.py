"""``pytorch_model*.bin``: opened by torch, tensors only, and only where the caller asked for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from converters.errors import ConversionError, fail, shown
from converters.safetensors_file import DTYPES, CheckpointTensor


class PickleFiles:
    """The pickled weight files of one checkpoint; one of them is held open at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._open: tuple[Path, dict[str, Any]] | None = None

    def headers(self) -> list[dict[str, CheckpointTensor]]:
        """Return each file's tensors.

        Raises
        ------
        ConversionError
            torch is missing, or a file holds anything but a flat map of tensors.
        """
        return [self._header(path) for path in self._paths]

    def _header(self, path: Path) -> dict[str, CheckpointTensor]:
        tensors = {}
        for name, value in self._state(path).items():
            dtype = _dtype_name(value)
            if not isinstance(name, str) or dtype is None:
                kind = getattr(value, "dtype", type(value).__name__)
                fail(
                    path,
                    f"{shown(name)} is {kind}, expected a tensor of F32, F16 or BF16",
                    "Convert the checkpoint to safetensors with the tool that made it.",
                )
            shape = tuple(int(size) for size in value.shape)
            n_bytes = int(value.numel()) * DTYPES[dtype].itemsize
            tensors[name] = CheckpointTensor(name, dtype, shape, path, -1, n_bytes)
        return tensors

    def load(self, tensor: CheckpointTensor) -> npt.NDArray[Any]:
        """Return a tensor as it is stored, BF16 as uint16."""
        import torch

        value = self._state(tensor.path)[tensor.name].detach().contiguous()
        if tensor.dtype == "BF16":
            value = value.view(torch.uint16)
        array: npt.NDArray[Any] = value.numpy()
        array.flags.writeable = False
        return array

    def _state(self, path: Path) -> dict[str, Any]:
        if self._open is None or self._open[0] != path:
            self._open = None  # the one before is let go first
            self._open = (path, _load(path))
        return self._open[1]


def _load(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise ConversionError(
            f"{path}: pickled weights need torch. Install it with: pip install 'edgeq[torch]'"
        ) from None
    from pickle import UnpicklingError

    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"  # torch maps the format since 1.6 only
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError:
        fail(path, "no such file; a shard is missing", "Fetch it.")
    except UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        fail(
            path,
            f"refused, it holds more than tensors ({reason})",
            "Do not use this file; look for safetensors of the model.",
        )
    except Exception as error:  # noqa: BLE001 - on garbage torch's unpickler raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(path, f"torch cannot load it ({reason})")
    if not isinstance(state, dict):
        fail(path, f"holds {type(state).__name__}, expected a map of tensors")
    return state


def _dtype_name(value: Any) -> str | None:
    """Return the safetensors name of a torch tensor's type; None if it is none that we read."""
    import torch

    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    return names.get(value.dtype) if isinstance(value, torch.Tensor) else None
