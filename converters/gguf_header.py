"""The header of one GGUF file: metadata and where each tensor lies. Safe against hostile files.

Parsed here rather than by ``gguf.GGUFReader``, which trusts every count that a file states.
Nothing is allocated before the file is known to be long enough to hold it, so memory and time are
bounded by the file's size. This module and ``gguf_writer`` alone turn ggml's ``ne`` (fastest
dimension first) into numpy's shapes and back: a weight is ``(n_out, n_in)``.

References
----------
ggml/include/gguf.h and gguf_init_from_reader in ggml/src/gguf.cpp, llama.cpp 0c1e57098.
"""

import math
import mmap
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from converters.errors import DAMAGED, ConversionError, fail, shown

DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less its final zero
MAX_ARRAY_VALUES = 1 << 26  # all arrays of a file together; the largest vocabulary is near 2**19
SPLIT_KEYS = ("split.no", "split.tensors.count", "split.count")  # as llama-gguf-split orders them

NATIVE_DTYPES: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype("<u2"),  # the upper half of a float32
    GGMLQuantizationType.F64: np.dtype("<f8"),
    GGMLQuantizationType.I8: np.dtype("<i1"),
    GGMLQuantizationType.I16: np.dtype("<i2"),
    GGMLQuantizationType.I32: np.dtype("<i4"),
    GGMLQuantizationType.I64: np.dtype("<i8"),
}
"""The array type of the types that are not packed in blocks."""

FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
"""The types of weights that are not quantized."""

VALUE_DTYPES: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("?"),
}
"""How the plain metadata types lie in the file."""

_REMOVED_TYPES = frozenset({4, 5, 31, 32, 33, 36, 37, 38})
_UNREADABLE_TYPES = {42: "Q2_0"}  # in llama.cpp 0c1e57098, not in gguf 0.19


@dataclass(frozen=True)
class Field:
    """One metadata value with the type that the file states.

    Attributes
    ----------
    value : int, float, bool, str, or a list of one of them (``type`` ARRAY). A string that is not
        UTF-8 holds its other bytes as lone surrogates (``errors="surrogateescape"``), and is
        written back the same.
    type : the value's type
    item_type : of an array, the type of its items; else None
    """

    value: Any
    type: GGUFValueType
    item_type: GGUFValueType | None = None


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes
    ----------
    shape : numpy order; a weight is (n_out, n_in), experts are (n_experts, n_out, n_in)
    n_bytes : size of its data
    path : the file that holds it
    offset : of its data from the start of that file, bytes
    """

    name: str
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]
    n_bytes: int
    path: Path
    offset: int


def row_bytes(qtype: GGMLQuantizationType, n_in: int) -> int:
    """Return the bytes of one row of `n_in` weights.

    Raises
    ------
    ConversionError
        The row does not divide into the type's blocks.
    """
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    if n_in % block_size:
        raise ConversionError(
            f"{qtype.name}: a row of {n_in} weights does not divide into blocks of {block_size}. "
            "Choose a type with smaller blocks for this tensor."
        )
    return int(n_in // block_size * type_size)


def tensor_bytes(qtype: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of `shape` (numpy order)."""
    n_in = shape[-1] if shape else 1
    return math.prod(shape[:-1]) * row_bytes(qtype, n_in)


def split_paths(path: Path, count: int) -> list[Path]:
    """Return the names of the parts of the model `path`, as llama.cpp looks for them."""
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


@dataclass(frozen=True)
class Part:
    """One parsed file."""

    path: Path
    fields: dict[str, Field]
    tensors: dict[str, TensorInfo]


def read_part(path: Path, whole: str = "") -> Part:
    """Parse one file's header and check it against the file's size."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # asked before opening: a pipe would block
            fail(path, "not a file", "Give the path of a GGUF file.")
        if status.st_size < len(b"GGUF"):
            fail(path, f"not a GGUF file; it has {status.st_size} bytes, expected b'GGUF'")
        with path.open("rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).part()
    except FileNotFoundError:
        what = f"no such file; it is {whole}" if whole else "no such file"
        raise ConversionError(f"{path}: {what}. Give the path of a GGUF file.") from None
    except (OSError, ValueError) as error:  # ValueError: emptied meanwhile, or a name with a zero
        raise ConversionError(
            f"{path}: cannot be read: {error}. Give a file that can be."
        ) from error


class _Header:
    """A cursor over the header of one file; every read checks what the file still holds."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0
        self._n_values = 0

    def part(self) -> Part:
        n_tensors, n_fields = self._counts()
        fields: dict[str, Field] = {}
        for i in range(n_fields):
            key = self._name(f"metadata key {i}")
            if not key or key in fields:
                self._fail(f"metadata key {i} is {shown(key)}, empty or given before")
            fields[key] = self._field(key)
        alignment = self._alignment(fields)
        stated = [self._tensor(i) for i in range(n_tensors)]
        return Part(self._path, fields, self._placed(stated, alignment))

    def _counts(self) -> tuple[int, int]:
        magic = bytes(self._data[:4])
        if magic != b"GGUF":
            self._fail(
                f"not a GGUF file; it starts with {magic!r}, expected b'GGUF'",
                "Give a GGUF file, or a directory with a Hugging Face checkpoint.",
            )
        self._at = 4
        version = self._plain("I", "the version")
        if version not in (2, 3):
            kind = "a big-endian GGUF file" if version & 0xFFFF == 0 else "a GGUF file"
            self._fail(
                f"{kind} of an unknown version; got {version}, expected 2 or 3 (little-endian)",
                "Convert the model again with a current llama.cpp.",
            )
        n_tensors, n_fields = self._plain("Q", "the counts"), self._plain("Q", "the counts")
        left = self._size - self._at  # a field takes 13 bytes or more, a tensor 24
        if n_fields > left // 13 or n_tensors > left // 24:
            self._fail(
                f"the header states {n_fields} metadata values and {n_tensors} tensors, more than "
                f"its {self._size} bytes can hold"
            )
        return n_tensors, n_fields

    def _fail(self, what: str, hint: str = DAMAGED) -> NoReturn:
        fail(self._path, what, hint)

    def _take(self, n_bytes: int, what: str) -> int:
        """Step over `n_bytes` and return where they start."""
        start = self._at
        if n_bytes > self._size - start:
            self._fail(
                f"{what} at byte {start} needs {n_bytes} bytes, but the file ends at {self._size}"
            )
        self._at = start + n_bytes
        return start

    def _plain(self, code: str, what: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack_from(self._data, self._take(layout.size, what))[0]

    def _string(self, what: str) -> bytes:
        n_bytes = self._plain("Q", what)
        start = self._take(n_bytes, what)
        return bytes(self._data[start : start + n_bytes])

    def _name(self, what: str) -> str:
        raw = self._string(what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what} is {shown(raw)}, expected UTF-8")

    def _value_type(self, key: str) -> GGUFValueType:
        number = self._plain("I", f"the type of {shown(key)}")
        try:
            return GGUFValueType(number)
        except ValueError:
            self._fail(f"{shown(key)} has the unknown metadata type {number}, expected 0 to 12")

    def _field(self, key: str) -> Field:
        kind = self._value_type(key)
        what = f"the value of {shown(key)}"
        if kind == GGUFValueType.ARRAY:
            item_type = self._value_type(key)
            count = self._plain("Q", what)
            if item_type == GGUFValueType.ARRAY:
                self._fail(f"{shown(key)} is an array of arrays, which llama.cpp refuses too")
            return Field(self._array(item_type, count, what), kind, item_type)
        if kind == GGUFValueType.STRING:
            return Field(self._string(what).decode("utf-8", "surrogateescape"), kind)
        dtype = VALUE_DTYPES[kind]
        start = self._take(dtype.itemsize, what)
        return Field(np.frombuffer(self._data, dtype, 1, start)[0].item(), kind)

    def _array(self, item_type: GGUFValueType, count: int, what: str) -> list[Any]:
        is_string = item_type == GGUFValueType.STRING
        item_size = 8 if is_string else VALUE_DTYPES[item_type].itemsize
        if count > (self._size - self._at) // item_size:
            self._fail(f"{what} has {count} items, more than the file can hold")
        self._n_values += count
        if self._n_values > MAX_ARRAY_VALUES:
            self._fail(
                f"{what} has {count} items; all arrays together may have {MAX_ARRAY_VALUES}",
                "No known model needs more: give another file.",
            )
        if is_string:
            return self._strings(count, what)
        start = self._take(count * item_size, what)
        values: list[Any] = np.frombuffer(
            self._data, VALUE_DTYPES[item_type], count, start
        ).tolist()
        return values

    def _strings(self, count: int, what: str) -> list[str]:
        data, size, at = self._data, self._size, self._at
        length_at = struct.Struct("<Q").unpack_from
        strings = []
        for i in range(count):  # inlined _string: vocabularies have 260,000 of them
            start = at + 8
            if start <= size:
                at = start + length_at(data, at)[0]
            if start > size or at > size:
                self._fail(f"{what}, item {i}, reaches beyond the file's end at {size}")
            strings.append(data[start:at].decode("utf-8", "surrogateescape"))
        self._at = at
        return strings

    def _alignment(self, fields: dict[str, Field]) -> int:
        field = fields.get("general.alignment")
        if field is None:
            return DEFAULT_ALIGNMENT
        alignment = field.value
        if field.type != GGUFValueType.UINT32 or alignment == 0 or alignment & (alignment - 1):
            self._fail(
                f"general.alignment is {shown(alignment)} ({field.type.name}), expected a power "
                "of two (UINT32)"
            )
        return int(alignment)

    def _tensor(self, number: int) -> tuple[TensorInfo, int]:
        """Return a tensor, placed nowhere yet, and the offset that the header states."""
        name = self._name(f"the name of tensor {number}")
        label = shown(name)
        if len(name.encode()) > MAX_NAME_BYTES:
            self._fail(f"tensor name {label} is longer than llama.cpp's {MAX_NAME_BYTES} bytes")
        n_dims = self._plain("I", f"{label}: the number of dimensions")
        if n_dims > MAX_DIMENSIONS:
            self._fail(f"{label} has {n_dims} dimensions, expected at most {MAX_DIMENSIONS}")
        ne = [self._plain("Q", f"{label}: its shape") for _ in range(n_dims)]
        qtype = self._qtype(label, self._plain("I", f"{label}: its type"))
        block_size, _ = GGML_QUANT_SIZES[qtype]
        shape = tuple(reversed(ne))
        if 0 in shape or (ne or [1])[0] % block_size:
            self._fail(
                f"{label} has the shape {shape}, which does not divide into {qtype.name} "
                f"blocks of {block_size}"
            )
        n_bytes = tensor_bytes(qtype, shape)
        if n_bytes > self._size:
            self._fail(
                f"{label} of shape {shape} and type {qtype.name} takes {n_bytes} bytes, but the "
                f"file ends at {self._size}"
            )
        offset = self._plain("Q", f"{label}: its offset")
        return TensorInfo(name, qtype, shape, n_bytes, self._path, 0), offset

    def _qtype(self, label: str, number: int) -> GGMLQuantizationType:
        try:
            return GGMLQuantizationType(number)
        except ValueError:
            pass
        if number in _UNREADABLE_TYPES:
            self._fail(
                f"{label} has the type {_UNREADABLE_TYPES[number]} ({number}), which gguf 0.19 "
                "does not know",
                "Give a file with other types.",
            )
        if number in _REMOVED_TYPES:
            self._fail(
                f"{label} has the type {number}, which llama.cpp has removed",
                "Convert the model again with a current llama.cpp.",
            )
        self._fail(f"{label} has the unknown tensor type {number}")

    def _placed(
        self, stated: list[tuple[TensorInfo, int]], alignment: int
    ) -> dict[str, TensorInfo]:
        """Give every tensor its place; as in llama.cpp they follow each other without gaps."""
        data_start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        expected = 0
        for tensor, offset in stated:
            label = shown(tensor.name)
            if tensor.name in tensors:
                self._fail(f"tensor {label} is given twice")
            if offset != expected:
                self._fail(f"{label} lies at offset {offset} of the data, expected {expected}")
            start = data_start + offset
            if start + tensor.n_bytes > self._size:
                self._fail(
                    f"the file is truncated: {label} ends at byte {start + tensor.n_bytes}, but "
                    f"the file ends at {self._size}"
                )
            expected = -(-(offset + tensor.n_bytes) // alignment) * alignment
            tensors[tensor.name] = TensorInfo(
                tensor.name, tensor.qtype, tensor.shape, tensor.n_bytes, self._path, start
            )
        return tensors
