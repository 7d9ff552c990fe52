"""GGUF models: one file or several parts, opened lazily and read a tensor at a time.

References
----------
llama_model_loader in src/llama-model-loader.cpp for split files, llama.cpp 0c1e57098.
"""

import hashlib
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from converters.errors import ConversionError, fail, shown
from converters.gguf_header import (
    NATIVE_DTYPES,
    SPLIT_KEYS,
    Field,
    Part,
    TensorInfo,
    read_part,
    row_bytes,
    split_paths,
    tensor_bytes,
)
from converters.gguf_writer import TensorSource, write_gguf, write_holes

__all__ = [
    "Field",
    "GgufFile",
    "TensorInfo",
    "TensorSource",
    "open_gguf",
    "row_bytes",
    "tensor_bytes",
    "write_gguf",
    "write_holes",
]

_DECODE_BYTES = 8 << 20  # float32 bytes decoded at a time
_SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf\Z", re.S)


class GgufFile:
    """A GGUF model, of one file or of several parts, opened by ``open_gguf``.

    Attributes
    ----------
    path : the file that was asked for
    paths : every part, in order; ``(path,)`` if the model is not split
    fields : metadata of the first part in file order, without the ``split.*`` keys
    tensors : of all parts, in file order
    """

    def __init__(
        self,
        path: Path,
        paths: tuple[Path, ...],
        fields: dict[str, Field],
        tensors: dict[str, TensorInfo],
    ) -> None:
        self.path = path
        self.paths = paths
        self.fields = fields
        self.tensors = tensors

    def value(self, key: str, default: Any = None) -> Any:
        """Return the metadata value of `key`, or `default`."""
        return self.fields[key].value if key in self.fields else default

    @property
    def architecture(self) -> str:
        """``general.architecture``.

        Raises
        ------
        ConversionError
            The file does not state it as a string: it is no model.
        """
        name = self.value("general.architecture")
        if not isinstance(name, str) or not name:
            raise ConversionError(
                f"{self.path}: no model; general.architecture is {shown(name)}, expected a name "
                "such as 'llama'. Give the GGUF file of a language model."
            )
        return name

    @property
    def n_parameters(self) -> int:
        """Weights of all tensors together."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts together, headers included."""
        return sum(part.stat().st_size for part in self.paths)

    def read_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's packed data, (..., row_bytes) uint8, memory-mapped and read-only.

        The mapping ends with the last array that looks at it.
        """
        tensor = self._tensor(name)
        shape = (*tensor.shape[:-1], row_bytes(tensor.qtype, (tensor.shape or (1,))[-1]))
        try:
            data = np.memmap(tensor.path, np.uint8, mode="r", offset=tensor.offset, shape=shape)
        except (OSError, ValueError) as error:  # ValueError: shorter than when it was opened
            raise ConversionError(
                f"{tensor.path}: {name}: cannot be read ({error}). "
                "Do not change the file while it is in use."
            ) from error
        return np.asarray(data)

    def read_float(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor decoded to float32 in its shape; of F32 data a read-only view.

        Raises
        ------
        ConversionError
            gguf cannot decode the tensor's type.
        """
        tensor = self._tensor(name)
        packed = self.read_bytes(name)
        native = NATIVE_DTYPES.get(tensor.qtype)
        if native == np.float32:
            return packed.view(native).reshape(tensor.shape)
        rows = packed.reshape(-1, packed.shape[-1])
        n_in = (tensor.shape or (1,))[-1]
        out = np.empty((len(rows), n_in), np.float32)
        step = max(1, _DECODE_BYTES // (4 * n_in))
        for start in range(0, len(rows), step):
            out[start : start + step] = _decode(rows[start : start + step], tensor)
        return out.reshape(tensor.shape)

    def sha256(self) -> str:
        """Return the hex digest of the parts' bytes one after the other."""
        digest = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()

    def only(self, names: Collection[str]) -> "GgufFile":
        """Return the same file with some of its tensors and no metadata: small when pickled."""
        return GgufFile(self.path, self.paths, {}, {name: self.tensors[name] for name in names})

    def held(self, names: Collection[str]) -> "GgufFile":
        """Return these tensors with their data in memory: it needs no file, wherever it goes."""
        data = {name: np.array(self.read_bytes(name)) for name in names}
        return _HeldFile(self.only(names), data)

    def _tensor(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise ConversionError(
                f"{self.path}: no tensor {shown(name)} among its {len(self.tensors)}. "
                "Give the file that the name was taken from."
            )
        return self.tensors[name]


class _HeldFile(GgufFile):
    """Some tensors of a model, in memory."""

    def __init__(self, file: GgufFile, data: dict[str, npt.NDArray[np.uint8]]) -> None:
        super().__init__(file.path, file.paths, file.fields, file.tensors)
        self._data = data

    def read_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's packed data."""
        return self._data[self._tensor(name).name]


def _decode(rows: npt.NDArray[np.uint8], tensor: TensorInfo) -> npt.NDArray[np.float32]:
    """Decode packed rows, (n, row_bytes) uint8 to (n, n_in) float32."""
    from gguf import quants

    if tensor.qtype == GGMLQuantizationType.BF16:
        wide = rows.view("<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    with np.errstate(all="ignore"):  # broken scales decode to NaN or Inf; whoever uses them checks
        if tensor.qtype in NATIVE_DTYPES:
            return rows.view(NATIVE_DTYPES[tensor.qtype]).astype(np.float32)
        try:
            decoded: npt.NDArray[np.float32] = quants.dequantize(rows, tensor.qtype)
        except NotImplementedError as error:
            raise ConversionError(
                f"{tensor.path}: {tensor.name}: gguf cannot decode {tensor.qtype.name}. "
                "Give a file with F32, F16 or BF16 weights."
            ) from error
    return decoded


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to; None: to none."""
    number = name.removeprefix("blk.").partition(".")[0]
    return int(number) if name.startswith("blk.") and number.isdigit() else None


def open_gguf(path: Path | str) -> GgufFile:
    """Open a GGUF file; of a split model, any part opens all of them.

    Raises
    ------
    ConversionError
        The file, or a part of it, is missing, damaged, or of a kind that this version cannot read.
    """
    path = Path(path)
    part = read_part(path)
    count = _split_value(part, "split.count", 0)
    if count <= 1:
        return GgufFile(path, (path,), _without_split_keys(part.fields), part.tensors)
    paths = _part_paths(part, count)
    tensors: dict[str, TensorInfo] = {}
    fields: dict[str, Field] = {}
    for number, part_path in enumerate(paths):
        part = read_part(part_path, whole=f"part {number + 1} of {count} of the model {path.name}")
        if number == 0:
            fields = part.fields
            n_tensors = _split_value(part, "split.tensors.count")
        stated = (_split_value(part, "split.no"), _split_value(part, "split.count"))
        if stated != (number, count):
            raise ConversionError(
                f"{part_path}: not the part that its name says; split.no and split.count are "
                f"{stated}, expected {(number, count)}. Give the parts their own names again."
            )
        for name, tensor in part.tensors.items():
            if name in tensors:
                fail(part_path, f"tensor {shown(name)} is also in {tensors[name].path.name}")
            tensors[name] = tensor
    if len(tensors) != n_tensors:
        fail(path, f"its {count} parts hold {len(tensors)} tensors, expected {n_tensors}")
    return GgufFile(path, paths, _without_split_keys(fields), tensors)


def _without_split_keys(fields: dict[str, Field]) -> dict[str, Field]:
    return {key: field for key, field in fields.items() if key not in SPLIT_KEYS}


def _split_value(part: Part, key: str, default: int | None = None) -> int:
    field = part.fields.get(key)
    if field is None and default is not None:
        return default
    if field is None or isinstance(field.value, bool) or not isinstance(field.value, int):
        fail(part.path, f"{key} is {shown(field and field.value)}, expected an integer")
    return field.value


def _part_paths(part: Part, count: int) -> tuple[Path, ...]:
    number = _split_value(part, "split.no")
    match = _SPLIT_NAME.match(part.path.name)
    expected = f"-{number + 1:05d}-of-{count:05d}.gguf"
    if match is None or not part.path.name.endswith(expected):
        raise ConversionError(
            f"{part.path}: part {number + 1} of {count} of a split model under another name; "
            f"expected one that ends in {expected}. Give the parts their own names again."
        )
    return tuple(split_paths(part.path.with_name(match["prefix"] + ".gguf"), count))
