"""GGUF writing: a tensor at a time, read back and compared before the file gets its name.

The header is laid out by ``gguf.GGUFWriter``; tensor data is streamed behind it so that memory
holds one tensor. A file appears under its name only when all of it was read back equal.

References
----------
split_strategy in tools/gguf-split/gguf-split.cpp for which tensor goes into which part and for the
``split.*`` keys, llama.cpp 0c1e57098.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType, GGUFValueType
from gguf.gguf_writer import GGUFWriter

from converters.errors import ConversionError, shown
from converters.gguf_fields import ALIGNMENT_KEY, ordered_fields, pack_value
from converters.gguf_header import (
    DEFAULT_ALIGNMENT,
    MAX_DIMENSIONS,
    MAX_NAME_BYTES,
    NATIVE_DTYPES,
    SPLIT_KEYS,
    Field,
    read_part,
    split_paths,
    tensor_bytes,
)
from converters.output import temporary_beside

_CHUNK_BYTES = 1 << 20
_MAX_PARTS = 65535  # split.count is UINT16


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write.

    Attributes
    ----------
    shape : numpy order; a weight is (n_out, n_in)
    load : called once, when the tensor's turn comes; gives an array of `shape` with the type's
        own dtype (float32, float16, uint16 for BF16, ...) or the packed data as uint8, either
        (..., row_bytes) or flat
    """

    name: str
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]
    load: Callable[[], npt.NDArray[Any]]


@dataclass
class _PartPlan:
    """What one file will hold, and where it is written until it is done."""

    target: Path
    fields: Mapping[str, Field]
    tensors: Sequence[TensorSource]
    temporary: Path


def write_gguf(
    path: Path | str,
    fields: Mapping[str, Field],
    tensors: Sequence[TensorSource],
    *,
    split_max_bytes: int | None = None,
    alignment: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write a GGUF file, or several parts of one; on any failure nothing is left behind.

    Every part is written under a temporary name beside its place, flushed to the disk, read back
    and compared with what was to be written, and only then renamed. An existing file stays as it
    is until then.

    Parameters
    ----------
    fields : metadata; ``general.architecture`` is put first, ``split.*`` keys are made anew
    split_max_bytes : tensor bytes of one part, as in llama-gguf-split; if they do not fit into
        one, the parts are named ``NAME-00001-of-00003.gguf`` and so on
    alignment : of tensor data, bytes; default: that of `fields`, else 32
    progress : called with the number of tensor bytes that were just written

    Returns
    -------
    The written files in order.

    Raises
    ------
    ConversionError
        A value or tensor that the format cannot hold, an array that is not what its source
        promises, no space, an output path that cannot be written, or data that reads back wrong.
    """
    path = Path(path)
    if not path.name:
        raise ConversionError(f"{path}: not a file name. Give the path of the file to write.")
    fields = ordered_fields(path, fields, alignment)
    _check_tensors(path, tensors)
    padding = fields[ALIGNMENT_KEY].value if ALIGNMENT_KEY in fields else DEFAULT_ALIGNMENT
    parts = _plan(path, fields, _grouped(path, tensors, split_max_bytes, padding))
    done: list[Path] = []
    try:
        _check_output(path, parts)
        with contextlib.ExitStack() as stack:
            for part in parts:
                part.temporary = stack.enter_context(temporary_beside(part.target))
            _check_space(path, parts)
            for part in parts:
                _verify_part(part, _write_part(part, _Writer(part, padding), progress))
            for part in parts:
                os.replace(part.temporary, part.target)
                done.append(part.target)
    except OSError as error:
        _remove(done)
        raise ConversionError(_os_message(path, error)) from error
    except BaseException:
        _remove(done)
        raise
    _sync_directory(path.parent)
    return [part.target for part in parts]


def write_holes(path: Path, fields: Mapping[str, Field], tensors: Sequence[TensorSource]) -> None:
    """Write a GGUF file whose tensors are holes: zeros that the file system need not store.

    Parameters
    ----------
    path : an existing file is replaced
    fields, tensors : as for ``write_gguf``; no tensor is loaded

    Raises
    ------
    ConversionError
        A value or tensor that the format cannot hold, or a path that cannot be written.
    """
    fields = ordered_fields(path, fields, None)
    _check_tensors(path, tensors)
    writer = _Writer(_PartPlan(path, fields, tensors, path), DEFAULT_ALIGNMENT)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file: BinaryIO = writer.fout[0]
        sizes = [tensor_bytes(tensor.qtype, tensor.shape) for tensor in tensors]
        start = _padded(file.tell(), DEFAULT_ALIGNMENT)
        file.truncate(start + sum(_padded(size, DEFAULT_ALIGNMENT) for size in sizes))
        writer.close()
    except OSError as error:
        raise ConversionError(_os_message(path, error)) from error


class _Writer(GGUFWriter):  # type: ignore[misc]
    """GGUFWriter for one file that adds no key of its own and packs by ``pack_value``."""

    def __init__(self, part: _PartPlan, alignment: int) -> None:
        super().__init__(None, arch="")
        self.data_alignment = alignment
        for key, field in part.fields.items():
            self.add_key_value(key, field.value, field.type, field.item_type)
        for tensor in part.tensors:
            self.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),  # overruled by raw_dtype
                tensor_bytes(tensor.qtype, tensor.shape),
                raw_dtype=tensor.qtype,
            )

    def _pack_val(
        self,
        val: Any,
        vtype: GGUFValueType,
        add_vtype: bool,
        sub_type: GGUFValueType | None = None,
    ) -> bytes:
        head = struct.pack("<I", vtype) if add_vtype else b""
        return head + pack_value(Field(val, vtype, sub_type))


def _check_tensors(path: Path, tensors: Sequence[TensorSource]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        where = f"{path}: {shown(tensor.name)}"
        if tensor.name in seen:
            raise ConversionError(f"{where}: given twice. Give every tensor one name.")
        seen.add(tensor.name)
        name = tensor.name.encode(errors="surrogatepass")
        if len(name) > MAX_NAME_BYTES or name != tensor.name.encode(errors="ignore"):
            raise ConversionError(
                f"{where}: the name cannot be written; got {len(name)} bytes, expected UTF-8 of at "
                f"most {MAX_NAME_BYTES}. Give another name."
            )
        if len(tensor.shape) > MAX_DIMENSIONS or any(size < 1 for size in tensor.shape):
            raise ConversionError(
                f"{where}: got the shape {tensor.shape}, expected at most {MAX_DIMENSIONS} "
                "dimensions of 1 or more. Leave the tensor out or reshape it."
            )
        try:
            tensor_bytes(tensor.qtype, tensor.shape)
        except ConversionError as error:
            raise ConversionError(f"{where}: {error}") from None


def _grouped(
    path: Path, tensors: Sequence[TensorSource], split_max_bytes: int | None, alignment: int
) -> list[list[TensorSource]]:
    """Distribute the tensors over parts, as llama-gguf-split does."""
    groups: list[list[TensorSource]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _padded(tensor_bytes(tensor.qtype, tensor.shape), alignment)
        if split_max_bytes is not None and size > split_max_bytes:
            raise ConversionError(
                f"{path}: {tensor.name}: takes {size} bytes, more than a part of at most "
                f"{split_max_bytes}. Allow parts of that size."
            )
        if split_max_bytes is not None and filled + size > split_max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    if len(groups) > _MAX_PARTS:
        raise ConversionError(
            f"{path}: {len(groups)} parts, expected at most {_MAX_PARTS}. Allow larger parts."
        )
    return groups


def _plan(
    path: Path, fields: dict[str, Field], groups: list[list[TensorSource]]
) -> list[_PartPlan]:
    if len(groups) == 1:
        return [_PartPlan(path, fields, groups[0], path)]
    n_tensors = sum(len(group) for group in groups)
    shared = {ALIGNMENT_KEY: fields[ALIGNMENT_KEY]} if ALIGNMENT_KEY in fields else {}
    plans = []
    for number, target in enumerate(split_paths(path, len(groups))):
        values = (number, n_tensors, len(groups))
        kinds = (GGUFValueType.UINT16, GGUFValueType.INT32, GGUFValueType.UINT16)
        split = map(Field, values, kinds)
        own = (fields if number == 0 else shared) | dict(zip(SPLIT_KEYS, split, strict=True))
        plans.append(_PartPlan(target, own, groups[number], target))
    return plans


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _check_output(path: Path, parts: list[_PartPlan]) -> None:
    """Refuse what can be known to fail before hours of quantization."""
    if not path.parent.is_dir():
        raise ConversionError(
            f"{path}: there is no directory {path.parent}. Create it or give another path."
        )
    for part in parts:
        if part.target.exists() and not part.target.is_file():
            raise ConversionError(
                f"{part.target}: not a file, and will not be replaced. Give another path."
            )


def _check_space(path: Path, parts: list[_PartPlan]) -> None:
    needed = sum(tensor_bytes(t.qtype, t.shape) for part in parts for t in part.tensors)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise ConversionError(
            f"{path}: no space left on the device; {needed} bytes needed, {free} free. "
            "Free some space or give another path."
        )


def _os_message(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{path}: no space left on the device. Free some space or give another path."
    return f"{path}: cannot be written ({error}). Give a path that can be."


def _write_part(
    part: _PartPlan, writer: _Writer, progress: Callable[[int], None] | None
) -> list[bytes]:
    """Write the temporary file; return the SHA-256 of each tensor's data."""
    try:
        writer.write_header_to_file(part.temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file: BinaryIO = writer.fout[0]
        writer.write_padding(file, file.tell())
        digests = []
        for tensor in part.tensors:
            digests.append(_write_tensor(file, tensor, progress))
            writer.write_padding(file, tensor_bytes(tensor.qtype, tensor.shape))
        file.flush()
        os.fsync(file.fileno())
        writer.close()
    except BaseException:
        with contextlib.suppress(OSError):  # what could not be flushed fails once more
            writer.close()
        raise
    return digests


def _write_tensor(
    file: BinaryIO, tensor: TensorSource, progress: Callable[[int], None] | None
) -> bytes:
    try:
        array = tensor.load()
    except OSError as error:
        raise ConversionError(f"{tensor.name}: cannot be read ({error}). Mend its file.") from error
    _check_array(tensor, array)
    digest = hashlib.sha256()
    for chunk in _chunks(array):
        digest.update(chunk)
        file.write(chunk)
        if progress is not None:
            progress(len(chunk))
    return digest.digest()


def _check_array(tensor: TensorSource, array: npt.NDArray[Any]) -> None:
    """Refuse an array that is not what its source promised."""
    n_bytes = tensor_bytes(tensor.qtype, tensor.shape)
    if array.dtype == np.uint8:
        packed = (*tensor.shape[:-1], n_bytes // max(1, int(np.prod(tensor.shape[:-1]))))
        fits = array.shape in (packed, (n_bytes,))
        expected = f"uint8 of shape {packed}"
    else:
        native = NATIVE_DTYPES.get(tensor.qtype)
        fits = array.dtype == native and array.shape == tuple(tensor.shape)
        expected = f"{native or 'uint8'} of shape {tensor.shape}"
    if not fits:
        raise ConversionError(
            f"{tensor.name}: its source gives {array.dtype} of shape {array.shape}, expected "
            f"{expected} for {tensor.qtype.name}. This is a fault of the quantizer or converter."
        )


def _chunks(array: npt.NDArray[Any]) -> Iterator[memoryview]:
    """Yield an array's bytes in order, a few MiB at a time, without copying it whole."""
    if not array.flags.c_contiguous:
        for row in array:
            yield from _chunks(row if row.ndim > 1 else np.ascontiguousarray(row))
        return
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES].data


def _verify_part(part: _PartPlan, digests: list[bytes]) -> None:
    """Read the temporary file back from the disk and compare it with what was to be written."""
    seen = read_part(part.temporary)
    if list(seen.fields) != list(part.fields):
        _refuse(part, "its metadata keys")
    for key, field in part.fields.items():
        back = seen.fields[key]
        if (back.type, back.item_type) != (field.type, field.item_type) or (
            pack_value(back) != pack_value(field)
        ):
            _refuse(part, f"metadata {key}")
    if list(seen.tensors) != [tensor.name for tensor in part.tensors]:
        _refuse(part, "its tensor names")
    with part.temporary.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # so that the disk is asked, not the cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for tensor, digest in zip(part.tensors, digests, strict=True):
            info = seen.tensors[tensor.name]
            if (info.qtype, info.shape) != (tensor.qtype, tuple(tensor.shape)):
                _refuse(part, f"{tensor.name}: its type or shape")
            if _digest(file, info.offset, info.n_bytes) != digest:
                _refuse(part, f"{tensor.name}")


def _digest(file: BinaryIO, offset: int, n_bytes: int) -> bytes:
    digest = hashlib.sha256()
    file.seek(offset)
    left = n_bytes
    while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.digest()


def _refuse(part: _PartPlan, what: str) -> NoReturn:
    raise ConversionError(
        f"{part.target}: {what} reads back different from what was written; the file was not "
        "written. Check the disk, then try again."
    )


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    """Make the new names durable; a file system that cannot do that is none of our business."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
