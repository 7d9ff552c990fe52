"""How fast this machine is now: a few seconds of the same products, encoders and sweeps."""

import hashlib
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from cpu_kernels.block_formats import FORMATS
from cpu_kernels.lattice_formats import LATTICES
from cpu_kernels.threads import available_cpus
from edgeq.errors import RecipeError
from edgeq.quantizers import lattice
from edgeq.quantizers.descent import lower_loss
from edgeq.quantizers.factor import factor, inverse_factor
from edgeq.quantizers.feedback import Rounding as GridRounding
from edgeq.quantizers.feedback import feed_back_errors
from edgeq.quantizers.gptq import Gptq
from edgeq.quantizers.lattice import LatticeRounding
from edgeq.runtime.encoders import FloatArray, Packed, encode, needs_importances
from edgeq.runtime.products import RuntimeProduct

_T = GGMLQuantizationType
_REPEATS = 3
_N = 1024  # rows and columns of what is tried
_TOKENS = 512
_ROUNDED = 512  # rows and columns
_FACTORED = (512, 1536)  # widths
_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Rounding:
    """What error feedback takes on a type, beside its matrix products.

    Attributes
    ----------
    feedback, sweep : seconds a weight, of the feedback and of one sweep of descent
    """

    feedback: float
    sweep: float


@dataclass(frozen=True)
class Machine:
    """Rates of one machine, measured; see ``measure_machine``.

    Attributes
    ----------
    n_cpus : that this process may use
    n_busy : of them, that rounding a tensor keeps busy
    torch_flops, torch_fast_flops : of float32 products, and of those of gradients, in torch
    numpy_flops : of float32 products in numpy
    ggml_flops : type to operations a second of llama.cpp's products with 512 tokens
    encode : type to seconds a weight of ggml's encoder
    rounding : type to what error feedback takes
    factor : of the inverse factor of n columns, seconds for each n³ and each n²
    element : seconds for one element of a pass over an array in memory
    exponential : seconds for the exponential of a float64
    read_rate, write_rate, hash_rate : bytes a second, of files of the work directory
    import_seconds : that torch and transformers take to load
    base_bytes : anonymous memory with all libraries loaded
    free_bytes : memory that can be had
    """

    n_cpus: int
    n_busy: float
    torch_flops: float
    torch_fast_flops: float
    numpy_flops: float
    ggml_flops: Mapping[GGMLQuantizationType, float]
    encode: Mapping[GGMLQuantizationType, float]
    rounding: Mapping[GGMLQuantizationType, Rounding]
    factor: tuple[float, float]
    element: float
    exponential: float
    read_rate: float
    write_rate: float
    hash_rate: float
    import_seconds: float
    base_bytes: int
    free_bytes: int


def measure_machine(
    types: Iterable[GGMLQuantizationType],
    directory: Path,
    *,
    uses_torch: bool = True,
    feeds_back: bool = True,
    n_threads: int | None = None,
) -> Machine:
    """Time what an export spends its time on, each thing for well under a second.

    Parameters
    ----------
    types : that tensors have or get
    directory : where files are written, on the disk of the work directory
    uses_torch : False: the recipe runs no torch model, and it is not loaded
    feeds_back : False: the recipe rounds to nearest, and nothing else is timed

    Raises
    ------
    RecipeError
        No file can be written there.
    """
    from edgeq.calibration.collector import free_bytes

    n_cpus = n_threads or available_cpus()
    kinds = tuple(dict.fromkeys([*types, _T.F32]))
    import_seconds = _import_seconds() if uses_torch else 0.0
    torch_flops, fast_flops = _torch_flops(n_cpus) if uses_torch else (1.0, 1.0)
    random = np.random.default_rng(0)
    left, right = (random.standard_normal((_N, _N), np.float32) for _ in range(2))
    numpy_flops = 2 * _N**3 / _timed(lambda: left @ right)
    encoders = {one: _encoding(left, one, n_threads) for one in kinds}
    cubic, quadratic = _factoring(random)
    rounding, busy = {}, float(n_cpus)
    for one in kinds:
        if feeds_back and (one in FORMATS or one in LATTICES):
            rounding[one], busy = _rounding(left, one, numpy_flops, n_threads)
    read, write, hashing = _files(directory)
    doubles = random.standard_normal(1 << 20)
    return Machine(
        n_cpus=n_cpus,
        n_busy=min(max(busy, 1.0), float(n_cpus)),
        torch_flops=torch_flops,
        torch_fast_flops=fast_flops,
        numpy_flops=numpy_flops,
        ggml_flops={one: _ggml_flops(left, one, n_cpus) for one in kinds},
        encode=encoders,
        rounding=rounding,
        factor=(cubic, quadratic),
        element=_timed(lambda: left + right) / left.size,
        exponential=_timed(lambda: np.exp(doubles)) / doubles.size,
        read_rate=read,
        write_rate=write,
        hash_rate=hashing,
        import_seconds=import_seconds,
        base_bytes=_anonymous_bytes(),
        free_bytes=free_bytes(unknown=1 << 34),
    )


def _timed(call: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Return the mean of some times, seconds; the first, cold call does not count.

    The mean, not the median: on a busy machine an export waits as often as these do.
    """
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return max(statistics.fmean(times), 1e-9)


def _import_seconds() -> float:
    """Return how long torch, transformers and one of its models take to load."""
    names = ("edgeq.layerwise", "transformers.models.llama.modeling_llama")
    started = time.perf_counter()
    if names[1] in sys.modules:  # a process of its own has to load them again
        subprocess.run([sys.executable, "-c", f"import {', '.join(names)}"], check=True)
    else:
        for name in names:
            importlib.import_module(name)
    return time.perf_counter() - started


def _torch_flops(n_cpus: int) -> tuple[float, float]:
    """Return the rates of float32 and of gradients' products, a chunk on each CPU."""
    import torch

    from edgeq.layerwise import fast_dtype

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = []
        with ThreadPoolExecutor(n_cpus) as pool:
            for dtype in (torch.float32, fast_dtype()):
                weight = torch.randn(_N, _N).to(dtype)
                inputs = [torch.randn(_TOKENS, _N).to(dtype) for _ in range(n_cpus)]

                def multiply(
                    weight: "torch.Tensor" = weight, inputs: list["torch.Tensor"] = inputs
                ) -> object:
                    return list(pool.map(lambda one: one @ weight, inputs))

                rates.append(n_cpus * 2 * _TOKENS * _N**2 / _timed(multiply))
    finally:
        torch.set_num_threads(before)
    return rates[0], rates[1]


def _ggml_flops(weight: FloatArray, qtype: GGMLQuantizationType, n_cpus: int) -> float:
    packed = _encoded(weight, qtype, None)
    inputs = np.ascontiguousarray(weight[:_TOKENS])
    with RuntimeProduct(packed, qtype, _N, _TOKENS, n_cpus, repeats=4) as product:
        product(inputs)
        return 4 * 2 * _TOKENS * _N**2 / _timed(product.run)


def _encoded(weight: FloatArray, qtype: GGMLQuantizationType, n_threads: int | None) -> Packed:
    importances = np.ones((1, weight.shape[1]), np.float32) if needs_importances(qtype) else None
    return encode(weight, qtype, importances, n_threads=n_threads)


def _encoding(weight: FloatArray, qtype: GGMLQuantizationType, n_threads: int | None) -> float:
    """Return seconds a weight, with importances as an export has them."""
    rows = weight[: _N // 4]
    importances = np.ones((1, _N), np.float32)
    call = lambda: encode(rows, qtype, importances, n_threads=n_threads)  # noqa: E731
    return _timed(call, 1 if qtype in LATTICES else _REPEATS) / rows.size


def _factoring(random: np.random.Generator) -> tuple[float, float]:
    """Return seconds for each n³ and each n² of the inverse factor of n columns."""
    times = []
    for n in _FACTORED:
        rows = random.standard_normal((n + 16, n), np.float32)
        moments = rows.T @ rows + np.eye(n, dtype=np.float32)
        order = np.arange(n)[::-1]
        times.append(_timed(lambda moments=moments, order=order: inverse_factor(moments, order)))  # type: ignore[misc]
    small, large = _FACTORED
    cubic = (times[1] - times[0] * (large / small) ** 2) / (large**3 - small * large**2)
    cubic = min(max(cubic, 0.0), times[1] / large**3)
    return cubic, max(times[1] - cubic * large**3, 0.0) / large**2


def _rounding(
    weight: FloatArray, qtype: GGMLQuantizationType, flops: float, n_threads: int | None
) -> tuple[Rounding, float]:
    """Return what feedback and a sweep take a weight, and how many CPUs they keep busy."""
    rows = np.ascontiguousarray(weight[:_ROUNDED, :_ROUNDED])
    packed = encode(rows, qtype, np.ones((1, _ROUNDED), np.float32), n_threads=n_threads)
    gptq = Gptq()
    factored = factor(
        "trial",
        rows.T @ rows,
        order=gptq.order,
        shrinkage=gptq.shrinkage,
        dampening_frac=gptq.dampening_frac,
        regroup=lattice.by_units if qtype in LATTICES else None,
    )
    if qtype in LATTICES:
        points = LatticeRounding.of(LATTICES[qtype], packed)
        feed: Callable[[], object] = lambda: lattice.feed_back_errors(points, rows, factored)  # noqa: E731

        def descend() -> None:
            one = points.copy()
            lattice.lower_loss(one, rows, factored.hessian, reach=gptq.reach, refits=gptq.refit)

    else:
        start = GridRounding.of(FORMATS[qtype], packed)
        feed = lambda: feed_back_errors(start, rows, factored)  # noqa: E731

        def descend() -> None:
            one = start.copy()
            lower_loss(one, rows, factored.hessian, reach=gptq.reach, refits=gptq.refit)

    feedback = _timed(feed)
    started, cpu = time.perf_counter(), time.process_time()
    sweep = _timed(descend)
    busy = (time.process_time() - cpu) / (time.perf_counter() - started)
    found = (
        max(spent / rows.size - products * _ROUNDED / flops, 0.1 * spent / rows.size)
        for spent, products in ((feedback, 1), (sweep, 2))
    )
    return Rounding(*found), busy


def _files(directory: Path) -> tuple[float, float, float]:
    """Return rates of reading, of writing until it is on the disk, and of hashing."""
    data = np.random.default_rng(0).bytes(_FILE_BYTES)
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            started = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            write = time.perf_counter() - started
            started = time.perf_counter()
            Path(file.name).read_bytes()
            read = time.perf_counter() - started
    except OSError as error:
        raise RecipeError(
            f"{directory}: no file can be written there to time its disk ({error}). Give another "
            "--work."
        ) from error
    hashing = _timed(lambda: hashlib.sha256(data[: _FILE_BYTES // 4]), 1)
    return _FILE_BYTES / read, _FILE_BYTES / write, _FILE_BYTES / 4 / hashing


def _anonymous_bytes() -> int:
    """Return the anonymous memory of this process; where the system does not tell, all of it."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) << 10
    except (OSError, IndexError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used << 10
