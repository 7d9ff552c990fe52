"""Checkpoint tensors to GGUF tensors: rearranged, checked and encoded a slice at a time.

Memory holds one output tensor and a slice of its source: a checkpoint larger than memory converts.

References
----------
llama.cpp 0c1e57098, conversion/base.py, ModelBase.prepare_tensors, for which tensors keep float32.
"""

import logging
import math
import re
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as QType

from converters.architectures.description import Array, Config, Output, Shape
from converters.checkpoint import Checkpoint
from converters.errors import ConversionError
from converters.gguf_file import TensorSource

_LOG = logging.getLogger(__name__)

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_SLICE_ELEMENTS = 1 << 22  # 16 MiB of float32 at a time
# always float32, as llama.cpp's operators take them
_ALWAYS_F32 = re.compile(r".*_norm\.weight|.*\.ffn_gate_inp\.weight|position_embd\.weight|.*\.bias")


@dataclass(frozen=True)
class Piece:
    """One checkpoint tensor's part in a GGUF tensor."""

    source: str
    output: Output
    index: int | None = None


@dataclass(frozen=True)
class Target:
    """One GGUF tensor and where it comes from."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...] = ()
    values: Array | None = None


def output_shape(piece: Piece, shape: Shape, config: Config) -> Shape:
    """Return the shape in the GGUF of a checkpoint tensor of `shape`.

    Raises
    ------
    ConversionError
        The tensor is empty, or has another number of dimensions than its rearrangement expects.
    """
    arrange = piece.output.arrange
    try:
        result = shape if arrange is None else arrange.shape(shape, config)
    except (IndexError, ValueError) as error:
        raise _misshaped(piece, shape) from error
    if not result or 0 in result:
        raise _misshaped(piece, shape)
    return result


def _misshaped(piece: Piece, shape: Shape) -> ConversionError:
    return ConversionError(
        f"{piece.source}: shape {tuple(shape)} does not fit what config.json describes. The "
        "checkpoint and config.json belong to different models."
    )


def tensor_source(
    checkpoint: Checkpoint, config: Config, target: Target, qtype: QType
) -> TensorSource:
    """Return a GGUF tensor to write; its data is read when its turn comes.

    Parameters
    ----------
    qtype : type of matrices. Vectors, norms, biases, routers and position embeddings become F32,
        and F16 whatever does not divide into blocks, with a warning in the log.
    """
    if len(target.shape) <= 1 or _ALWAYS_F32.fullmatch(target.name):
        qtype = QType.F32
    elif qtype == QType.Q8_0 and target.shape[-1] % 32:
        _LOG.warning(
            "%s: rows of %d do not divide into Q8_0 blocks of 32; stored as F16",
            target.name,
            target.shape[-1],
        )
        qtype = QType.F16

    def load() -> npt.NDArray[Any]:
        return _load(checkpoint, config, target, qtype)

    return TensorSource(target.name, qtype, target.shape, load)


def _load(checkpoint: Checkpoint, config: Config, target: Target, qtype: QType) -> npt.NDArray[Any]:
    if target.values is not None:
        return target.values
    n_in = target.shape[-1]
    n_rows = math.prod(target.shape[:-1])
    out: npt.NDArray[Any]
    if qtype in (QType.F32, QType.F16):
        out = np.empty((n_rows, n_in), np.float32 if qtype == QType.F32 else np.float16)
    else:
        block_size, type_size = gguf.GGML_QUANT_SIZES[qtype]
        out = np.empty((n_rows, n_in // block_size * type_size), np.uint8)
    rows_each = n_rows // len(target.pieces)
    for number, piece in enumerate(target.pieces):
        raw, dtype = checkpoint.raw(piece.source)
        if dtype not in _FLOATS:
            raise ConversionError(
                f"{piece.source}: stored as {dtype}, expected {', '.join(sorted(_FLOATS))}. Use "
                "the unquantized checkpoint."
            )
        arrange = piece.output.arrange
        try:
            rows = (raw if arrange is None else arrange.apply(raw, config)).reshape(-1, n_in)
        except ValueError as error:
            raise _misshaped(piece, raw.shape) from error
        part = out[number * rows_each : (number + 1) * rows_each]
        _encode_rows(rows, dtype, piece, qtype, part)
    return out.reshape(*target.shape[:-1], out.shape[-1])


def _encode_rows(
    rows: Array, dtype: str, piece: Piece, qtype: QType, out: npt.NDArray[Any]
) -> None:
    """Write `rows` into `out` in its type, a slice at a time."""
    step = max(1, _SLICE_ELEMENTS // max(1, rows.shape[-1]))
    is_stored_so = dtype == qtype.name and not piece.output.offset
    for start in range(0, len(rows), step):
        source, part = rows[start : start + step], out[start : start + step]
        if is_stored_so and _all_finite(source):
            part.view(source.dtype)[...] = source
            continue
        values = _float32(source, dtype)
        if not _all_finite(values):
            bad = values[~np.isfinite(values)]
            raise ConversionError(
                f"{piece.source}: {bad.size} weights are not finite (the first is {bad[0]}). The "
                "checkpoint is damaged, or its training diverged."
            )
        if piece.output.offset:
            values = values + np.float32(piece.output.offset)
        part[...] = _encoded(values, qtype, piece)


def _encoded(values: npt.NDArray[np.float32], qtype: QType, piece: Piece) -> npt.NDArray[Any]:
    """Return finite values in a type: float arrays of F32 and F16, packed bytes of others."""
    if qtype == QType.F32:
        return values
    if qtype == QType.F16:
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not _all_finite(halves):
            raise ConversionError(
                f"{piece.source}: {np.abs(values).max():g} does not fit into F16 (at most 65504). "
                "Convert to bf16 or f32."
            )
        return halves
    packed: npt.NDArray[np.uint8] = gguf.quants.quantize(values, qtype)
    return packed


def _all_finite(rows: Array) -> bool:
    """Whether native float data is finite; bfloat16 comes as uint16."""
    if rows.dtype == np.uint16:
        return not np.any((rows & np.uint16(0x7F80)) == 0x7F80)
    return bool(np.isfinite(rows).all())


def _float32(rows: Array, dtype: str) -> npt.NDArray[np.float32]:
    """Return a slice of native data as C-ordered float32; bfloat16 comes as uint16."""
    if dtype == "BF16":
        return (np.ascontiguousarray(rows).astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(rows, np.float32)
