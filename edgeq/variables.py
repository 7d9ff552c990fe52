"""Every environment variable of edgeq's own. ``docs/service.md`` explains them to users.

Imports nothing heavy: ``edgeq doctor`` reads it where numba and llama.cpp are missing or broken.
"""

import os
from collections.abc import Mapping

from edgeq.registry import unknown_name

PREFIX = "EDGEQ_"
VARIABLES = {
    "EDGEQ_DEVICE": "device of torch that --tune computes on: cpu, cuda, cuda:N",
    "EDGEQ_ISA": "highest instruction set of the kernels: avx512, avx_vnni, avx2, neon, portable",
    "EDGEQ_KERNELS": "family of the kernels: dot, lookup (where there is one) or auto",
}
"""Name to what it says."""


def set_variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return edgeq's variables, known or not, that are set: name to value, sorted.

    Parameters
    ----------
    environment : default: this process's
    """
    found = os.environ if environment is None else environment
    return {name: found[name] for name in sorted(found) if name.startswith(PREFIX)}


def unknown_variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what is set and means nothing: name to a message with the nearest known name."""
    return {
        name: unknown_name("environment variable", name, list(VARIABLES))
        for name in set_variables(environment)
        if name not in VARIABLES
    }
