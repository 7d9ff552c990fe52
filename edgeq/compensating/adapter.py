"""The GGUF file of a LoRA adapter, as llama.cpp reads it.

Each weight has two float16 tensors, ``NAME.lora_a`` (rank, n_in) and ``NAME.lora_b``
(n_out, rank). llama.cpp adds alpha / rank · B A x to the weight's output; the rank is each
tensor's own. Alpha is 1 here, and √rank is in both factors. No rank or width needs a multiple.

References
----------
llama.cpp 0c1e57098: src/llama-adapter.cpp, src/llama-adapter.h (get_scale), convert_lora_to_gguf.py
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType, GGUFValueType

from converters.gguf_fields import pack_value
from converters.gguf_header import DEFAULT_ALIGNMENT, Field
from converters.gguf_writer import TensorSource, write_gguf
from edgeq.errors import RecipeError
from edgeq.runtime.model import Model
from edgeq.runtime.observer import MIN_ROWS, Observer

OUTPUT = "output.weight"
_F16 = GGMLQuantizationType.F16
_HEADER_BYTES = 24  # magic, version, two counts
_FACTORS = ("lora_a", "lora_b")


@dataclass(frozen=True, eq=False)
class Pair:
    """The correction B A of one weight: b (n_out, rank), a (rank, n_in), float32."""

    b: npt.NDArray[np.float32]
    a: npt.NDArray[np.float32]


def adapter_fields(architecture: str, more: Mapping[str, Field]) -> dict[str, Field]:
    """Return the metadata of an adapter for models of an architecture."""
    string = GGUFValueType.STRING
    return {
        "general.architecture": Field(architecture, string),
        "general.type": Field("adapter", string),
        "adapter.type": Field("lora", string),
        "adapter.lora.alpha": Field(1.0, GGUFValueType.FLOAT32),
        **more,
    }


def header_bytes(fields: Mapping[str, Field]) -> int:
    """Return the bytes before the first tensor's entry, and the most that aligns the data."""
    values = sum(12 + len(key.encode()) + len(pack_value(field)) for key, field in fields.items())
    return _HEADER_BYTES + values + DEFAULT_ALIGNMENT


def pair_bytes(name: str) -> int:
    """Return the most that a weight's two tensors take beside their 2 (n_in + n_out) a rank."""
    entry = 8 + 4 + 2 * 8 + 4 + 8  # name's length, dimensions, type, offset
    names = sum(len(f"{name}.{factor}".encode()) for factor in _FACTORS)
    return 2 * (entry + DEFAULT_ALIGNMENT) + names


def write_adapter(path: Path, fields: Mapping[str, Field], pairs: Mapping[str, Pair]) -> None:
    """Write an adapter; it appears when it is complete.

    Parameters
    ----------
    fields : of ``adapter_fields``
    pairs : weight name to its correction

    Raises
    ------
    RecipeError
        A factor is beyond float16.
    ConversionError
        The path cannot be written.
    """
    sources = []
    for name, pair in pairs.items():
        root = np.float32(np.sqrt(len(pair.a)))
        for factor, values in zip(_FACTORS, (pair.a, pair.b), strict=True):
            with np.errstate(over="ignore"):
                half = np.ascontiguousarray((values * root).astype(np.float16))
            if not np.isfinite(half).all():
                raise RecipeError(
                    f"{path}: {name}: its correction has values beyond float16. The file is "
                    "damaged, or is of another model: quantize it again."
                )
            sources.append(
                TensorSource(f"{name}.{factor}", _F16, half.shape, partial(np.array, half))
            )
    write_gguf(path, fields, sources)


def applied(
    path: Path,
    architecture: str,
    shapes: Mapping[str, tuple[int, ...]],
    directory: Path,
    n_threads: int | None,
) -> tuple[str, ...]:
    """Return the weights to whose products llama.cpp adds an adapter, seen with one of zeros.

    Some architectures multiply some weights without looking for adapters. ``output.weight`` is
    taken to be none of them.

    Parameters
    ----------
    shapes : weight name to (n_out, n_in)
    directory : where the adapter is written for the while

    Raises
    ------
    RuntimeLibraryError
        llama.cpp refuses adapters for the model.
    """
    seen: set[str] = set()
    observer = Observer(lambda product: seen.add(product.name))
    pairs = {
        name: Pair(np.zeros((n_out, 1), np.float32), np.zeros((1, n_in), np.float32))
        for name, (n_out, n_in) in shapes.items()
    }
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        probe = Path(scratch) / "probe.gguf"
        write_adapter(probe, adapter_fields(architecture, {}), pairs)
        with Model(
            path, n_ctx=MIN_ROWS, n_threads=n_threads, cb_eval=observer, adapter=probe
        ) as model:
            model.logits(np.arange(MIN_ROWS, dtype=np.int32) % model.n_vocab)
    return tuple(n for n in shapes if n == OUTPUT or f"{n}.{_FACTORS[0]}" in seen)
