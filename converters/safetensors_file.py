"""One safetensors file: its header, checked against the file's size before anything is believed.

    8 bytes   n, little-endian
    n bytes   JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {...}}
    the rest  data; the tensors follow each other without gaps and fill it

References
----------
safetensors, README.md "Format" and ``Metadata::validate`` in safetensors/src/tensor.rs.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import ConversionError, fail, shown

MAX_DIMENSIONS = 16
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # the upper half of a float32
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
"""How the types lie in the file; all that can be read."""


@dataclass(frozen=True)
class CheckpointTensor:
    """Where one tensor of a checkpoint lies.

    Attributes
    ----------
    dtype : as safetensors names it: F32, BF16, I64, ...
    path : the file that holds it
    offset : of its data from the start of the file, bytes; -1 inside a pickle
    n_bytes : size of its data
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int


def read_header(path: Path) -> dict[str, CheckpointTensor]:
    """Return the tensors of one safetensors file in file order.

    Raises
    ------
    ConversionError
        The header contradicts itself or the file's size, or names a type that cannot be read.
    """
    text, size = _header_text(path)
    data_bytes = size - 8 - len(text)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        fail(path, f"its header is no JSON object ({error or 'nested too deep'})")
    if not isinstance(header, dict):
        fail(path, f"its header is a JSON {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    entries = [_entry(path, name, entry, data_bytes) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[1:])
    tensors: dict[str, CheckpointTensor] = {}
    expected = 0
    for tensor, begin, end in entries:
        if begin != expected:
            fail(
                path,
                f"{shown(tensor.name)} begins at byte {begin} of the data, expected {expected}; "
                "tensors overlap or leave a gap",
            )
        expected = end
        tensors[tensor.name] = CheckpointTensor(
            tensor.name, tensor.dtype, tensor.shape, path, 8 + len(text) + begin, end - begin
        )
    if expected != data_bytes:
        fail(path, f"its tensors take {expected} bytes, but the file holds {data_bytes}")
    return tensors


def map_tensor(tensor: CheckpointTensor) -> npt.NDArray[Any]:
    """Return a tensor's data memory-mapped and read-only; BF16 as uint16.

    The mapping ends with the last array that looks at it.
    """
    dtype = DTYPES[tensor.dtype]
    if tensor.n_bytes == 0:
        return np.empty(tensor.shape, dtype)
    try:
        data = np.memmap(
            tensor.path, np.uint8, mode="r", offset=tensor.offset, shape=(tensor.n_bytes,)
        )
    except (OSError, ValueError) as error:  # ValueError: shorter than when it was opened
        raise ConversionError(
            f"{tensor.path}: {tensor.name}: cannot be read ({error}). "
            "Do not change the file while it is in use."
        ) from error
    # old files may place data at odd bytes, which C code cannot take
    return np.require(np.asarray(data).view(dtype), requirements="A").reshape(tensor.shape)


def _header_text(path: Path) -> tuple[bytes, int]:
    """Return the header's JSON and the file's size."""
    try:
        if not path.is_file():  # asked before opening: a pipe would block
            fail(path, "no such file", "Fetch the file that is missing.")
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or length > size - 8:
                fail(
                    path,
                    f"the file is truncated or no safetensors file; it has {size} bytes, its "
                    f"header states that it takes {length}",
                )
            if length > MAX_HEADER_BYTES:
                fail(path, f"its header takes {length} bytes, expected at most {MAX_HEADER_BYTES}")
            text = file.read(length)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read ({error}). Give a file that can.") from error
    if len(text) != length or not text.startswith(b"{"):
        fail(path, f"no safetensors header; it starts with {text[:8]!r}, expected b'{{'")
    return text, size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"{shown(name)} is given twice")
        members[name] = value
    return members


def _entry(path: Path, name: str, entry: Any, data_bytes: int) -> tuple[CheckpointTensor, int, int]:
    """Check one header entry; return the tensor and its stated place in the data."""
    label = shown(name)
    if not isinstance(entry, Mapping):
        fail(path, f"{label} is {shown(entry)}, expected an object")
    dtype: Any
    shape: Any
    offsets: Any
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _is_shape(shape) or not _are_naturals(offsets) or len(offsets) != 2:
        fail(
            path,
            f"{label} has the shape {shown(shape)} and data_offsets {shown(offsets)}, expected "
            "lists of whole numbers",
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        hint = "Give a checkpoint with F32, F16 or BF16 weights."
        if isinstance(dtype, str) and dtype.startswith(("F8", "F6", "F4")):
            hint = "Dequantize it to BF16 first, or give the checkpoint it was made from."
        fail(path, f"{label} has the type {shown(dtype)}, expected F32, F16 or BF16", hint)
    begin, end = offsets
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if begin > end or end - begin != n_bytes:
        fail(
            path,
            f"{label} of shape {shown(tuple(shape))} and type {dtype} takes {n_bytes} bytes, but "
            f"its data_offsets are {shown(offsets)}",
        )
    if end > data_bytes:
        fail(
            path,
            f"the file is truncated: {label} ends at byte {end} of the data, but it has "
            f"{data_bytes}",
        )
    return CheckpointTensor(name, dtype, tuple(shape), path, -1, n_bytes), begin, end


def _is_shape(values: Any) -> bool:
    """Whether this is a list of numbers that numpy can take for a shape."""
    return (
        _are_naturals(values)
        and len(values) <= MAX_DIMENSIONS
        and math.prod(max(1, value) for value in values) < 1 << 60
    )


def _are_naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
