"""Where the layers run: the GPU that torch sees, or the CPU; ``EDGEQ_DEVICE`` says otherwise."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from edgeq.errors import CalibrationError, RecipeError

VARIABLE = "EDGEQ_DEVICE"


def chosen_device() -> Any:
    """Return the ``torch.device`` for work whose bytes are promised to nobody, such as tuning.

    It is ``EDGEQ_DEVICE`` where that is set, else ``cuda`` where torch sees a GPU, else the CPU.
    Sums have other orders on a GPU, and some of its products other orders each time, so what has
    to be the same bytes again runs on the CPU, whatever this returns.

    Raises
    ------
    RecipeError
        torch cannot compute on the device that is asked for.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch is a CPU build
        raise RecipeError(
            f"{VARIABLE}: torch {torch.__version__} cannot compute on {wanted!r} "
            f"({' '.join(str(error).split())[:120]}); expected cpu, or cuda or cuda:N of a GPU "
            "that `edgeq doctor` lists. Unset it."
        ) from error
    return device


def free_bytes_on(device: Any) -> int:
    """Return the memory of a device other than the CPU that is free; 4 GiB where it cannot tell."""
    if device.type != "cuda":
        return 1 << 32
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + cached)


@contextlib.contextmanager
def memory_of(device: Any, what: str) -> Iterator[None]:
    """Refuse in one line what the memory of a device does not hold.

    Raises
    ------
    CalibrationError
        It was not enough for `what`.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise CalibrationError(
            f"{what}: does not fit into the memory of {device}. Set {VARIABLE}=cpu."
        ) from error
