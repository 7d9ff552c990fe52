"""The older .dat format of importance matrices.

Little-endian, without a magic number:

    int32 n_entries
    n_entries times: int32 n, n bytes of name; int32 n_chunks; int32 n, n float32
    optional: int32 n_chunks; int32 n, n bytes of a text's path

It stores means times a number of chunks: counts come back rounded up to whole chunks, and the
experts of a tensor share one.

References
----------
llama.cpp 0c1e57098: tools/imatrix/imatrix.cpp, save_imatrix_legacy; common/imatrix-loader.cpp,
common_imatrix_load_legacy.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from converters.errors import ConversionError
from converters.imatrix import CountArray, FloatArray, Imatrix


class _Reader:
    """Bounded reads from a .dat file; every refusal names the place."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self.left = os.fstat(file.fileno()).st_size

    def take(self, n_bytes: int, what: str) -> bytes:
        if not 0 <= n_bytes <= self.left:
            raise ConversionError(
                f"{self.path}: {what} at byte {self._file.tell()} takes {n_bytes} bytes, "
                f"{self.left} are left. It is truncated or no importance matrix."
            )
        self.left -= n_bytes
        return self._file.read(n_bytes)

    def integer(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])


def read_dat(path: Path, chunk_size: int) -> Imatrix:
    """Read a .dat file; its counts become multiples of `chunk_size` tokens.

    Raises
    ------
    ConversionError
        The file is truncated or something else.
    OSError
        It cannot be read.
    """
    with path.open("rb") as file:
        return _read(_Reader(path, file), chunk_size)


def _read(reader: _Reader, chunk_size: int) -> Imatrix:
    path = reader.path
    n_entries = reader.integer("the number of entries")
    smallest = 4 + 1 + 4 + 4 + 4  # one letter, one value
    if not 1 <= n_entries <= reader.left // smallest:
        raise ConversionError(
            f"{path}: {n_entries} entries in {reader.left} bytes: it is truncated or no importance "
            "matrix. Give a file of llama-imatrix or edgeq calibrate."
        )
    sums: dict[str, FloatArray] = {}
    counts: dict[str, CountArray] = {}
    for _ in range(n_entries):
        name, n_chunks, values = _entry(reader)
        if name in sums:
            raise ConversionError(f"{path}: {name} comes twice. Compute the file again.")
        # llama-quantize uses the values as they are where the number of chunks is 0
        scale = chunk_size if n_chunks > 0 else 1
        with np.errstate(over="ignore"):  # not finite: refused by the caller, with the name
            sums[name] = values[None, :] * np.float32(scale)
        counts[name] = np.array([n_chunks * chunk_size if n_chunks > 0 else 1], np.int64)
    chunk_count = 0
    datasets: tuple[str, ...] = ()
    if reader.left:
        chunk_count = reader.integer("the number of chunks")
    if reader.left:
        text = reader.take(reader.integer("the length of a path"), "a path")
        datasets = (text.decode("utf-8", "replace"),) if text else ()
    return Imatrix(sums, counts, datasets, max(chunk_count, 0), chunk_size)


def _entry(reader: _Reader) -> tuple[str, int, FloatArray]:
    raw = reader.take(reader.integer("the length of a name"), "a name")
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"{reader.path}: a name is not UTF-8: {raw[:32]!r}. It is no importance matrix."
        ) from error
    n_chunks = reader.integer(f"{name}: the number of chunks")
    n_values = reader.integer(f"{name}: the number of values")
    if not name or n_values < 1:
        raise ConversionError(
            f"{reader.path}: entry {name!r} has {n_values} values, expected a name and at least 1. "
            "It is no importance matrix."
        )
    values = np.frombuffer(reader.take(4 * n_values, f"{name}: values"), "<f4")
    return name, n_chunks, values.astype(np.float32)


def dat_bytes(imatrix: Imatrix) -> bytes:
    """Return the .dat file's content; weights that saw nothing at all are left out."""
    chunk_size = max(imatrix.chunk_size, 1)
    seen = [name for name in sorted(imatrix.sums) if imatrix.counts[name].any()]
    out = bytearray(struct.pack("<i", len(seen)))
    for name in seen:
        n_chunks = -(-int(imatrix.counts[name].max()) // chunk_size)
        means = imatrix.weights(name).astype("<f4") * np.float32(n_chunks)
        raw = name.encode()
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", n_chunks, means.size)
        out += means.tobytes()
    dataset = (imatrix.datasets[-1] if imatrix.datasets else "").encode()
    return bytes(out + struct.pack("<ii", imatrix.chunk_count, len(dataset)) + dataset)
