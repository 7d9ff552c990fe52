"""Which vector instructions this process uses: found once, or forced lower by ``EDGEQ_ISA``.

LLVM ends the process where it is asked for an instruction that the CPU lacks. So the choice is made
here, in Python, before anything is compiled; a forced choice also hides the higher instructions
from LLVM, so that nothing else in the process uses them and numba caches its code apart.
"""

import functools
import os
import platform
from dataclasses import dataclass

import llvmlite.binding as llvm
import numba

VARIABLE = "EDGEQ_ISA"


@dataclass(frozen=True)
class Isa:
    """One set of instructions.

    Attributes
    ----------
    name : avx512, avx_vnni, avx2, neon or portable
    dot : how four products of bytes are summed: "vnni" (unsigned times signed, no saturation),
        "maddubs" (pairs saturate at 16 bits), "sdot" (signed times signed) or "plain"
    vector_bytes : of a register; the kernels' vectors have 64 bytes everywhere
    has_shuffle : whether bytes are looked up in a table of 16
    looks_up_256 : whether they are in a table of 256, and in one of 64
    has_half : whether half floats are converted in vectors
    max_columns : of a register tile of the matrix products
    needs : features of LLVM that the CPU must have
    cpu : LLVM's name of a CPU with this set and no better one
    """

    name: str
    dot: str
    vector_bytes: int
    has_shuffle: bool
    has_half: bool
    max_columns: int
    needs: tuple[str, ...] = ()
    cpu: str = ""
    looks_up_256: bool = False


_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512vnni", *_AVX2)
# best first; the CPU names are those of LLVM that have these instructions and no better ones
_X86 = (
    Isa("avx512", "vnni", 64, True, True, 8, _AVX512, "icelake-client", looks_up_256=True),
    Isa("avx_vnni", "vnni", 32, True, True, 4, ("avxvnni", *_AVX2), "sierraforest"),
    Isa("avx2", "maddubs", 32, True, True, 2, _AVX2, "haswell"),
)
_ARM = (Isa("neon", "sdot", 16, True, True, 4, ("dotprod",), "neoverse-n1"),)
_PORTABLE = Isa("portable", "plain", 16, False, False, 2)


def _known() -> tuple[Isa, ...]:
    """Return what this machine's architecture may have, best first."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return (*_X86, _PORTABLE)
    return (*_ARM, _PORTABLE) if machine in ("aarch64", "arm64") else (_PORTABLE,)


@functools.cache
def supported() -> tuple[Isa, ...]:
    """Return the sets that this CPU can run, best first."""
    features = llvm.get_host_cpu_features()
    return tuple(isa for isa in _known() if all(features.get(name) for name in isa.needs))


@functools.cache
def chosen() -> Isa:
    """Return the set that this process uses.

    Raises
    ------
    ValueError
        ``EDGEQ_ISA`` names no set, or one that this CPU lacks.
    """
    best = supported()[0]
    wanted = os.environ.get(VARIABLE, "")
    if wanted in ("", best.name):
        return best
    found = {isa.name: isa for isa in supported()}
    if wanted not in found:
        raise ValueError(
            f"{VARIABLE}: this CPU cannot run {wanted!r}; it can: {', '.join(found)}. Unset it."
        )
    isa = found[wanted]
    numba.config.CPU_NAME = isa.cpu or "generic"
    if isa.cpu:
        has = llvm.get_host_cpu_features()
        numba.config.CPU_FEATURES = ",".join(f"+{name}" for name in isa.needs if has.get(name))
    else:
        numba.config.CPU_FEATURES = ""
    return isa
