"""What ``edgeq doctor`` tries in a process of its own, since a broken library may end it.

``python -m edgeq.doctor_probes NAME [ARGUMENT...]`` prints one JSON object as the last line of
stdout. What fails ends in a traceback, or in a signal; ``edgeq.doctor`` tells which.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def import_modules(*names: str) -> dict[str, Any]:
    """Import modules; name to "" or to what was raised."""
    told = {}
    for name in names:
        try:
            importlib.import_module(name)
            told[name] = ""
        except Exception as error:  # noqa: BLE001 - a broken package raises anything
            told[name] = _one_line(error)
    return told


def instructions() -> dict[str, Any]:
    """Return the kernels' instruction set, those that this CPU has, and numba's cache."""
    from cpu_kernels import isa, rounding
    from cpu_kernels._numba import cache_folder

    kernel = next(value for value in vars(rounding).values() if hasattr(value, "py_func"))
    folder = cache_folder(kernel)
    while not folder.exists() and folder.parent != folder:
        folder = folder.parent
    return {
        "available": [one.name for one in isa.supported()],
        "in_use": isa.chosen().name,
        "cache": str(cache_folder(kernel)),
        "cache_is_writable": os.access(folder, os.W_OK | os.X_OK),
    }


def runtime() -> dict[str, Any]:
    """Load llama.cpp, with the check of its layout, and return what its build can do."""
    from edgeq.runtime.library import load

    library = load()
    text = library.llama.llama_print_system_info().decode("utf-8", "replace")
    parts = (part.partition("=") for part in text.replace(" : ", " | ").split(" | "))
    return {
        "features": [name.split(":")[-1].strip() for name, _, on in parts if on.strip() == "1"],
        "system_info": text,
        "offloads_to_gpu": bool(library.llama.llama_supports_gpu_offload()),
    }


def devices() -> dict[str, Any]:
    """Return the devices that torch sees."""
    import torch

    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return {"gpus": names, "threads": torch.get_num_threads()}


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "modules": import_modules,
    "instructions": instructions,
    "runtime": runtime,
    "devices": devices,
}

if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(PROBES[sys.argv[1]](*sys.argv[2:])) + "\n")
