"""Importance matrix files: llama-imatrix's GGUF format and the older .dat, read and written.

An importance matrix holds, per weight tensor, the sums of squares of the inputs that the weight was
multiplied with, and how many inputs were summed. The GGUF format stores both as they are, one count
per expert. The .dat format stores means times a number of chunks, so counts come back rounded up to
whole chunks, and experts share one count.

    .dat, little-endian:
        int32 n_entries
        n_entries times: int32 n, n bytes of name; int32 n_chunks; int32 n, n float32
        optional: int32 n_chunks; int32 n, n bytes of a text's path

References
----------
llama.cpp 0c1e57098: tools/imatrix/imatrix.cpp, save_imatrix and save_imatrix_legacy;
common/imatrix-loader.cpp, common_imatrix_load; tools/quantize/quantize.cpp, load_imatrix.
"""

import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.errors import ConversionError

FloatArray = npt.NDArray[np.float32]
CountArray = npt.NDArray[np.int64]

SUMS_SUFFIX = ".in_sum2"
COUNTS_SUFFIX = ".counts"
DEFAULT_CHUNK_SIZE = 512
_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, eq=False)
class Imatrix:
    """An importance matrix.

    Attributes
    ----------
    sums : tensor name to (n_counts, n) float32, sums of squares of the inputs. n_counts is 1 or the
        number of experts. A 3-D weight that is no expert tensor (and every tensor of a .dat file)
        has one count and all its matrices' columns in that one row.
    counts : tensor name to (n_counts,) int64, inputs that were summed
    datasets : the texts it was computed on, as told
    chunk_count : chunks of text
    chunk_size : tokens of a chunk
    """

    sums: dict[str, FloatArray]
    counts: dict[str, CountArray]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    def weights(self, name: str, n_in: int | None = None) -> FloatArray:
        """Return the mean squares of `name`, the numbers that llama-quantize uses.

        Parameters
        ----------
        name : a tensor that has an entry
        n_in : columns of the tensor; needed where one row holds several matrices

        Returns
        -------
        (n_mat, n_in) float32. An expert that saw nothing weighs all its columns 1.

        References
        ----------
        llama.cpp 0c1e57098: tools/quantize/quantize.cpp, load_imatrix.
        """
        sums, counts = self.sums[name], self.counts[name].astype(np.float32)[:, None]
        ones = np.ones_like(sums)
        means = np.divide(sums, counts, out=ones, where=counts > 0)
        return means if n_in is None else means.reshape(-1, n_in)

    def unseen(self) -> list[str]:
        """Return what saw no input: "NAME expert 5", or the tensor's name if that is all of it."""
        found = []
        for name, counts in sorted(self.counts.items()):
            empty = np.flatnonzero(counts == 0).tolist()
            if len(counts) == 1:
                found += [name] * len(empty)
            else:
                found += [f"{name} expert {expert}" for expert in empty]
        return found


def read_imatrix(path: Path | str, *, legacy_chunk_size: int = DEFAULT_CHUNK_SIZE) -> Imatrix:
    """Read an importance matrix, GGUF or .dat; the content decides, not the suffix.

    Parameters
    ----------
    path : the file
    legacy_chunk_size : tokens of a chunk, which a .dat file does not tell; its counts are multiples

    Raises
    ------
    ConversionError
        The file is missing, truncated, no importance matrix, or holds counts or sums that no input
        can give (negative, not finite).
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        imatrix = _read_gguf(path) if is_gguf else _read_legacy(path, legacy_chunk_size)
    except OSError as error:
        raise ConversionError(
            f"{path}: cannot be read: {error.strerror}. Give the path of an importance matrix."
        ) from error
    for name in imatrix.sums:
        _check_entry(path, name, imatrix.sums[name], imatrix.counts[name])
    return imatrix


def write_imatrix(path: Path | str, imatrix: Imatrix) -> None:
    """Write `imatrix` as llama-imatrix would: .dat by that suffix, else GGUF.

    The file appears under its name when it is complete; a failure leaves what was there before.

    Raises
    ------
    ConversionError
        The path cannot be written, or there is no entry to write.
    """
    path = Path(path)
    if not imatrix.sums:
        raise ConversionError(f"{path}: the importance matrix has no entries. Calibrate first.")
    if path.suffix == ".dat":
        _write_atomically(path, _legacy_bytes(imatrix))
    else:
        _write_gguf(path, imatrix)


def merge_imatrices(imatrices: Sequence[Imatrix]) -> Imatrix:
    """Add up importance matrices of one model, as ``llama-imatrix --in-file`` does.

    Raises
    ------
    ConversionError
        None is given, or two disagree in the size of a tensor.
    """
    if not imatrices:
        raise ConversionError("no importance matrix to merge. Give at least one.")
    sums: dict[str, npt.NDArray[np.float64]] = {}
    counts: dict[str, CountArray] = {}
    for imatrix in imatrices:
        for name, more in imatrix.sums.items():
            if name not in sums:
                sums[name], counts[name] = more.astype(np.float64), imatrix.counts[name].copy()
                continue
            if more.size != sums[name].size:
                raise ConversionError(
                    f"{name}: {more.size} values in one importance matrix, {sums[name].size} in "
                    "another. Merge importance matrices of the same model only."
                )
            sums[name], counts[name] = _add(
                sums[name], counts[name], more, imatrix.counts[name], name
            )
    chunk_size = imatrices[0].chunk_size
    most = max((int(n.max()) for n in counts.values()), default=0)
    return Imatrix(
        sums={name: values.astype(np.float32) for name, values in sums.items()},
        counts=counts,
        datasets=tuple(dataset for imatrix in imatrices for dataset in imatrix.datasets),
        chunk_count=most // max(chunk_size, 1),
        chunk_size=chunk_size,
    )


def check_matches(imatrix: Imatrix, tensors: Mapping[str, tuple[int, int]], where: str) -> None:
    """Refuse an importance matrix of another model.

    Parameters
    ----------
    imatrix : what was read
    tensors : weight name to (n_in, n_mat), every 2-D and 3-D weight of the model
    where : the importance matrix's path, for messages

    Raises
    ------
    ConversionError
        An entry has another size than the model's tensor, or names a weight that the model lacks;
        or layers of the model have no entry though other layers have one for the same weight.
    """
    advice = "It belongs to another model: calibrate this one, or leave the importance matrix out."
    for name, sums in imatrix.sums.items():
        if name in tensors:
            n_in, n_mat = tensors[name]
            if sums.size != n_in * n_mat:
                raise ConversionError(
                    f"{where}: {name} has {sums.size} values, expected {n_in * n_mat} "
                    f"({n_in} columns × {n_mat} matrices). {advice}"
                )
        elif name.endswith(".weight"):
            raise ConversionError(f"{where}: {name} is no tensor of the model. {advice}")
    entries = _layers_by_kind(imatrix.sums)
    for kind, names in _layers_by_kind(tensors).items():
        missing = sorted(names - entries[kind]) if kind in entries else []
        if missing:
            raise ConversionError(
                f"{where}: no entry for {missing[0]}"
                + (f" and {len(missing) - 1} more of its kind" if len(missing) > 1 else "")
                + f", but for {len(entries[kind])} other layers. {advice}"
            )


def _layers_by_kind(names: Iterable[str]) -> dict[str, set[str]]:
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        kinds[_LAYER.sub(".*.", name)].add(name)
    return dict(kinds)


def _add(
    sums: npt.NDArray[np.float64],
    counts: CountArray,
    more: FloatArray,
    more_counts: CountArray,
    name: str,
) -> tuple[npt.NDArray[np.float64], CountArray]:
    """Add one entry to another; a single count of a .dat file stands for every expert."""
    n_counts = max(len(counts), len(more_counts))
    if any(len(each) not in (1, n_counts) for each in (counts, more_counts)):
        raise ConversionError(
            f"{name}: {len(counts)} experts in one importance matrix, {len(more_counts)} in "
            "another. Merge importance matrices of the same model only."
        )
    shape = (n_counts, -1)
    return (
        sums.reshape(shape) + more.reshape(shape).astype(np.float64),
        np.broadcast_to(counts, n_counts) + np.broadcast_to(more_counts, n_counts),
    )


def _check_entry(path: Path, name: str, sums: FloatArray, counts: CountArray) -> None:
    bad = np.flatnonzero(~np.isfinite(sums.ravel()) | (sums.ravel() < 0))
    if bad.size:
        raise ConversionError(
            f"{path}: {name}: value {bad[0]} is {sums.ravel()[bad[0]]}, expected a sum of squares. "
            "The file is damaged or was computed with non-finite activations: compute it again."
        )
    if (counts < 0).any():
        raise ConversionError(
            f"{path}: {name}: a count is {counts.min()}, expected 0 or more. Compute it again."
        )


# --------------------------------------------------------------------------------------- GGUF


def _read_gguf(path: Path) -> Imatrix:
    from gguf import GGMLQuantizationType

    from converters.gguf_file import open_gguf

    file = open_gguf(path)
    pairs: defaultdict[str, dict[str, FloatArray]] = defaultdict(dict)
    for tensor in file.tensors.values():
        for suffix in (SUMS_SUFFIX, COUNTS_SUFFIX):
            if tensor.name.endswith(suffix):
                if tensor.qtype != GGMLQuantizationType.F32:
                    raise ConversionError(
                        f"{path}: {tensor.name} has type {tensor.qtype.name}, expected F32. "
                        "Compute the importance matrix again."
                    )
                pairs[tensor.name.removesuffix(suffix)][suffix] = file.read_float(tensor.name)
    if not pairs:
        raise ConversionError(
            f"{path}: not an importance matrix; {len(file.tensors)} tensors, none named "
            f"NAME{SUMS_SUFFIX}. Give a file of llama-imatrix or edgeq calibrate."
        )
    sums: dict[str, FloatArray] = {}
    counts: dict[str, CountArray] = {}
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise ConversionError(
                f"{path}: {name} has {next(iter(pair))} alone, expected {SUMS_SUFFIX} and "
                f"{COUNTS_SUFFIX}. The file is damaged: compute it again."
            )
        sums[name], counts[name] = _gguf_entry(path, name, pair[SUMS_SUFFIX], pair[COUNTS_SUFFIX])
    values = {key: field.value for key, field in file.fields.items()}
    datasets = values.get("imatrix.datasets", [])
    chunks, size = values.get("imatrix.chunk_count", 0), values.get("imatrix.chunk_size", 0)
    if not isinstance(datasets, list | tuple) or not all(
        isinstance(n, int) for n in (chunks, size)
    ):
        raise ConversionError(
            f"{path}: imatrix.datasets, .chunk_count or .chunk_size has another type than a list "
            "of texts and two integers. Compute the importance matrix again."
        )
    return Imatrix(sums, counts, tuple(str(each) for each in datasets), chunks, size)


def _gguf_entry(
    path: Path, name: str, sums: FloatArray, counts: FloatArray
) -> tuple[FloatArray, CountArray]:
    n_counts = counts.size
    if n_counts == 0 or sums.size == 0 or sums.size % n_counts:
        raise ConversionError(
            f"{path}: {name}: {sums.size} values do not divide into {n_counts} counts. "
            "The file is damaged: compute it again."
        )
    if not np.isfinite(counts).all():
        raise ConversionError(f"{path}: {name}: a count is not finite. Compute it again.")
    return (
        np.array(sums.reshape(n_counts, -1), np.float32),  # a copy: the file may be replaced
        np.rint(counts.ravel()).astype(np.int64),
    )


def _write_gguf(path: Path, imatrix: Imatrix) -> None:
    from gguf import GGMLQuantizationType, GGUFValueType

    from converters.gguf_header import Field
    from converters.gguf_writer import TensorSource, write_gguf

    fields = {
        "general.type": Field("imatrix", GGUFValueType.STRING),
        "imatrix.datasets": Field(
            list(imatrix.datasets) or ["unknown"], GGUFValueType.ARRAY, GGUFValueType.STRING
        ),
        "imatrix.chunk_count": Field(imatrix.chunk_count, GGUFValueType.UINT32),
        "imatrix.chunk_size": Field(imatrix.chunk_size, GGUFValueType.UINT32),
    }
    tensors = []
    for name in sorted(imatrix.sums):
        sums = imatrix.sums[name].astype(np.float32)
        counts = imatrix.counts[name].astype(np.float32)[:, None]
        if len(counts) == 1:  # ggml drops trailing dimensions of 1
            sums, counts = sums.ravel(), counts.ravel()
        for suffix, values in ((SUMS_SUFFIX, sums), (COUNTS_SUFFIX, counts)):
            tensors.append(
                TensorSource(
                    name + suffix,
                    GGMLQuantizationType.F32,
                    values.shape,
                    lambda values=values: values,  # type: ignore[misc]
                )
            )
    write_gguf(path, fields, tensors)


# ---------------------------------------------------------------------------------------- .dat


class _Reader:
    """Bounded reads from a .dat file held in memory; every refusal names the place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = path.read_bytes()
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, n_bytes: int, what: str) -> bytes:
        if not 0 <= n_bytes <= self.left:
            raise ConversionError(
                f"{self.path}: {what} at byte {self._at} takes {n_bytes} bytes, {self.left} are "
                "left. It is truncated or no importance matrix."
            )
        self._at += n_bytes
        return self._data[self._at - n_bytes : self._at]

    def integer(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])


def _read_legacy(path: Path, chunk_size: int) -> Imatrix:
    reader = _Reader(path)
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
        name, n_chunks, values = _legacy_entry(reader)
        if name in sums:
            raise ConversionError(f"{path}: {name} comes twice. Compute the file again.")
        # llama-quantize uses the values as they are where the number of chunks is 0
        scale = chunk_size if n_chunks > 0 else 1
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


def _legacy_entry(reader: _Reader) -> tuple[str, int, FloatArray]:
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


def _legacy_bytes(imatrix: Imatrix) -> bytes:
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


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ConversionError(
            f"{path}: cannot be written: {error.strerror}. Free space or choose another path."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
