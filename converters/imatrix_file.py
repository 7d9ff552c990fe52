"""Importance matrix files: llama-imatrix's GGUF format and the older .dat, read and written.

The GGUF format stores, per weight, the sums of squares ("NAME.in_sum2") and the counts
("NAME.counts") as they are, one count per expert.

References
----------
llama.cpp 0c1e57098: tools/imatrix/imatrix.cpp, save_imatrix; common/imatrix-loader.cpp,
common_imatrix_load.
"""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from converters.errors import ConversionError, named
from converters.imatrix import CountArray, FloatArray, Imatrix, check_matches, merge_imatrices
from converters.imatrix_dat import dat_bytes, read_dat
from converters.output import replacing

if TYPE_CHECKING:
    from converters.gguf_file import GgufFile

__all__ = [
    "SKETCH_KEY",
    "Imatrix",
    "check_matches",
    "merge_imatrices",
    "read_imatrix",
    "sketch_of",
    "write_imatrix",
]

SKETCH_KEY = "edgeq.calibration.sketch"

SUMS_SUFFIX = ".in_sum2"
COUNTS_SUFFIX = ".counts"
DEFAULT_CHUNK_SIZE = 512
MAX_COUNT = 1e15  # inputs; float32 sums lose meaning long before


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
        imatrix = _read_gguf(path) if is_gguf else read_dat(path, legacy_chunk_size)
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
    if not any(counts.any() for counts in imatrix.counts.values()):
        raise ConversionError(f"{path}: the importance matrix saw no input. Calibrate first.")
    if path.suffix == ".dat":
        with replacing(path) as temporary:
            temporary.write_bytes(dat_bytes(imatrix))
    else:
        _write_gguf(path, imatrix)


def _check_entry(path: Path, name: str, sums: FloatArray, counts: CountArray) -> None:
    bad = np.flatnonzero(~np.isfinite(sums.ravel()) | (sums.ravel() < 0))
    if bad.size:
        raise ConversionError(
            f"{path}: {named(name)}: value {bad[0]} is {sums.ravel()[bad[0]]}, expected a sum of "
            "squares. The file is damaged or was computed with non-finite activations: "
            "compute it again."
        )
    if (counts < 0).any():
        raise ConversionError(
            f"{path}: {named(name)}: a count is {counts.min()}, expected 0 or more. "
            "Compute it again."
        )


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
                        f"{path}: {named(tensor.name)} has type {tensor.qtype.name}, expected F32. "
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
                f"{path}: {named(name)} has {next(iter(pair))} alone, expected {SUMS_SUFFIX} and "
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
    names = tuple(str(each) for each in datasets)
    return Imatrix(sums, counts, names, chunks, size, sketch_of(file))


def sketch_of(file: "GgufFile") -> tuple[int, ...] | None:
    """Return the hashes of its calibration text that a file keeps; None: it keeps none."""
    sketch = file.value(SKETCH_KEY)
    if not isinstance(sketch, list) or not all(isinstance(item, int) for item in sketch):
        return None
    return tuple(item & 0xFFFFFFFFFFFFFFFF for item in sketch)


def _gguf_entry(
    path: Path, name: str, sums: FloatArray, counts: FloatArray
) -> tuple[FloatArray, CountArray]:
    n_counts = counts.size
    if n_counts == 0 or sums.size == 0 or sums.size % n_counts:
        raise ConversionError(
            f"{path}: {named(name)}: {sums.size} values do not divide into {n_counts} counts. "
            "The file is damaged: compute it again."
        )
    if not (np.abs(counts) < MAX_COUNT).all():
        raise ConversionError(
            f"{path}: {named(name)}: a count is {counts.ravel()[np.abs(counts).argmax()]}, "
            f"expected less than {MAX_COUNT:.0e}. Compute it again."
        )
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
    if imatrix.sketch is not None:
        fields[SKETCH_KEY] = Field(list(imatrix.sketch), GGUFValueType.ARRAY, GGUFValueType.UINT64)
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
