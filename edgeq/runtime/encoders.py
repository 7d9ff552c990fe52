"""ggml's own encoders and decoders: the one reference for what a quantized tensor's bytes are.

Rows are encoded in chunks by a few threads (ctypes releases the GIL). A row never depends on its
neighbours, so the bytes do not depend on the chunks. ggml ends the whole process where an argument
surprises it; everything that can make it do so is refused here first.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.errors import ConversionError
from cpu_kernels.threads import available_cpus
from edgeq.errors import CalibrationError, RecipeError, RuntimeLibraryError
from edgeq.runtime.library import load

Packed = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

_T = GGMLQuantizationType
# What ggml_quantize_chunk encodes in llama.cpp 0c1e57098 (ggml/src/ggml.c), but for Q2_0 (type 42):
# gguf 0.19 does not know that type, so no file could be written or read back with it.
# fmt: off
_ENCODABLE = (
    _T.F32, _T.F16, _T.BF16,
    _T.Q1_0, _T.Q4_0, _T.Q4_1, _T.Q5_0, _T.Q5_1, _T.Q8_0, _T.MXFP4, _T.NVFP4,
    _T.Q2_K, _T.Q3_K, _T.Q4_K, _T.Q5_K, _T.Q6_K, _T.TQ1_0, _T.TQ2_0,
    _T.IQ1_S, _T.IQ1_M, _T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.IQ3_XXS, _T.IQ3_S,
    _T.IQ4_NL, _T.IQ4_XS,
)
# fmt: on
_NEEDS_IMPORTANCES = frozenset({_T.IQ2_XXS, _T.IQ2_XS, _T.IQ1_S})  # ggml_quantize_requires_imatrix

# The grid searches end in GGML_ABORT once their float32 sums are not finite. Found by trying
# magnitudes in child processes: with weights of 1e10 it takes absurd importances, with 1e18 none;
# importance x weight^2 is squared once more, so it must stay below sqrt(FLT_MAX) / block.
_GRID_TYPES = frozenset(
    {_T.IQ1_S, _T.IQ1_M, _T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.IQ3_XXS, _T.IQ3_S, _T.IQ4_NL}
    | {_T.IQ4_XS}
)
_GRID_MAX_WEIGHT = 1e9
_GRID_MAX_ENERGY = 1e16
_F16_OVERFLOW = 65520.0  # the least float32 that rounds to infinity

_CHUNK_WEIGHTS = 1 << 16  # 256 KiB of float32: stays in L2 from the check to the encoder


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits``, ggml/include/ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@functools.cache
def _ggml() -> Any:
    """Return libggml-base with what this module calls declared, its sizes checked once."""
    ggml = load().ggml
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    ggml.ggml_quantize_init.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_init.restype = None
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *[int64] * 3, pointer]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    ggml.ggml_get_type_traits.argtypes = [ctypes.c_int]
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    ggml.ggml_type_name.argtypes = [ctypes.c_int]
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    for qtype in _ENCODABLE:
        traits = ggml.ggml_get_type_traits(int(qtype)).contents
        agrees = (
            (traits.type_name or b"").decode().upper() == qtype.name
            and ggml.ggml_type_name(int(qtype)) == traits.type_name
            and (traits.blck_size, traits.type_size) == GGML_QUANT_SIZES[qtype]
            and traits.is_quantized == (qtype not in (_T.F32, _T.F16, _T.BF16))
            and ggml.ggml_quantize_requires_imatrix(int(qtype)) == (qtype in _NEEDS_IMPORTANCES)
        )
        if not agrees:
            raise RuntimeLibraryError(
                f"llama-cpp-python: its ggml lays {qtype.name} out otherwise than gguf does. "
                "Install it with: pip install llama-cpp-python==0.3.36"
            )
    return ggml


def encodable_types() -> tuple[GGMLQuantizationType, ...]:
    """Return every type that ggml encodes and gguf can write, floats first."""
    return _ENCODABLE


def needs_importances(qtype: GGMLQuantizationType) -> bool:
    """Whether ggml cannot encode `qtype` without importances at all."""
    return qtype in _NEEDS_IMPORTANCES


@functools.cache
def type_names() -> dict[str, GGMLQuantizationType]:
    """Return ggml's own spelling of every type, as its logs print it, to the type."""
    ggml = _ggml()
    return {ggml.ggml_type_name(int(qtype)).decode(): qtype for qtype in _T}


def encode(
    weight: FloatArray,
    qtype: GGMLQuantizationType,
    importances: FloatArray | None = None,
    *,
    n_threads: int | None = None,
    name: str = "weight",
) -> Packed:
    """Round a weight to `qtype` with ggml's encoder, the bytes that llama.cpp itself writes.

    Parameters
    ----------
    weight : (n_out, n_in) or, for experts, (n_mat, n_out, n_in) float32
    qtype : one of ``encodable_types()``
    importances : (n_mat, n_in) float32 mean squared inputs, one row a matrix; None: unweighted
    n_threads : default: every CPU of this process
    name : of the tensor, for errors

    Returns
    -------
    (n_rows, row_bytes) uint8, n_rows = n_mat * n_out

    Raises
    ------
    RecipeError
        ggml has no encoder for the type, or the columns do not divide into its blocks.
    CalibrationError
        The type needs importances and there are none, or they do not fit the weight.
    ConversionError
        A weight is not finite, or too large for the type.

    References
    ----------
    llama.cpp 0c1e57098: ggml/src/ggml.c, ggml_quantize_chunk;
    src/llama-quant.cpp, llama_tensor_quantize_impl.
    """
    if weight.dtype != np.float32 or weight.ndim not in (2, 3) or 0 in weight.shape:
        raise ConversionError(
            f"{name}: got {weight.dtype} of shape {weight.shape}, expected float32 with 2 or 3 "
            "dimensions, none of them 0."
        )
    n_mat = 1 if weight.ndim == 2 else len(weight)
    n_in = weight.shape[-1]
    check_row(name, n_in, qtype)
    rows = np.ascontiguousarray(weight).reshape(-1, n_in)
    limit = _weight_limit(qtype)
    if qtype in (_T.F32, _T.F16, _T.BF16):
        importances = None  # a float takes the nearest value, whatever it weighs
    if importances is not None:
        importances = _checked_importances(importances, (n_mat, n_in), name)
        if qtype in _GRID_TYPES:
            peak = max(float(importances.max()), 1e-30)
            limit = min(limit, math.sqrt(_GRID_MAX_ENERGY / peak))
    elif qtype in _NEEDS_IMPORTANCES:
        raise CalibrationError(
            f"{name}: {qtype.name} cannot be encoded without importances. "
            "Give an imatrix that has this tensor, or choose another type for it."
        )
    job = _EncodeJob(rows, qtype, importances, len(rows) // n_mat, limit, name)
    _in_chunks(job.run, len(rows), n_in, n_threads, boundary=job.rows_per_matrix)
    return job.out


def check_row(name: str, n_in: int, qtype: GGMLQuantizationType) -> None:
    """Refuse a type that ggml cannot encode, or whose blocks do not fill a row of `n_in` columns.

    Raises
    ------
    RecipeError
    """
    if qtype not in _ENCODABLE:
        raise RecipeError(
            f"{name}: ggml has no encoder for {qtype.name}. Choose one of: "
            f"{', '.join(known.name for known in _ENCODABLE)}."
        )
    block_size = GGML_QUANT_SIZES[qtype][0]
    if n_in % block_size:
        fitting = [t.name for t in (_T.Q8_0, _T.Q4_0, _T.F16) if n_in % GGML_QUANT_SIZES[t][0] == 0]
        raise RecipeError(
            f"{name}: {n_in} columns do not divide into {qtype.name} blocks of {block_size}. "
            f"Choose {' or '.join(fitting)} for it."
        )


def _weight_limit(qtype: GGMLQuantizationType) -> float:
    """Return what no weight may reach in absolute value."""
    if qtype == _T.F16:
        return _F16_OVERFLOW
    return _GRID_MAX_WEIGHT if qtype in _GRID_TYPES else np.inf


def _checked_importances(values: FloatArray, shape: tuple[int, int], name: str) -> FloatArray:
    if values.shape != shape:
        raise CalibrationError(
            f"{name}: importances of shape {values.shape}, expected {shape}. "
            "The imatrix was made from another model."
        )
    values = np.ascontiguousarray(values, np.float32)
    if not (np.isfinite(values).all() and values.min() >= 0):
        bad = np.argwhere(~(np.isfinite(values) & (values >= 0)))[0]
        raise CalibrationError(
            f"{name}: the importance of column {bad[1]} is {values[tuple(bad)]}, expected a finite "
            "number that is not negative. Make the imatrix anew."
        )
    return values


class _EncodeJob:
    """One tensor being encoded; ``run`` does some of its rows, all of one matrix."""

    def __init__(
        self,
        rows: FloatArray,
        qtype: GGMLQuantizationType,
        importances: FloatArray | None,
        rows_per_matrix: int,
        limit: float,
        name: str,
    ) -> None:
        block_size, type_size = GGML_QUANT_SIZES[qtype]
        self.rows = rows
        self.qtype = qtype
        self.importances = importances
        self.rows_per_matrix = rows_per_matrix
        self.limit = limit
        self.name = name
        self.out = np.empty((len(rows), rows.shape[1] // block_size * type_size), np.uint8)
        self._ggml = _ggml()
        self._ggml.ggml_quantize_init(int(qtype))

    def run(self, start: int, stop: int) -> None:
        """Encode rows `start` to `stop` into ``out``."""
        rows, out = self.rows[start:stop], self.out[start:stop]
        with np.errstate(invalid="ignore"):
            if not (rows.max() < self.limit and rows.min() > -self.limit):
                self._refuse(start, rows)
        importances = None
        if self.importances is not None:
            importances = self.importances[start // self.rows_per_matrix].ctypes.data
        kind = int(self.qtype)
        self._ggml.ggml_quantize_chunk(
            kind, rows.ctypes.data, out.ctypes.data, 0, len(rows), rows.shape[1], importances
        )
        if not self._ggml.ggml_validate_row_data(kind, out.ctypes.data, out.nbytes):
            raise ConversionError(
                f"{self.name}: {self.qtype.name} cannot hold the weights of rows {start} to "
                f"{stop - 1}, up to {np.abs(rows).max():.3g}. Choose BF16 or F32 for it."
            )

    def _refuse(self, start: int, rows: FloatArray) -> None:
        row, column = np.argwhere(~(np.abs(rows) < self.limit))[0]
        value = rows[row, column]
        where = f"{self.name}: the weight in row {start + row}, column {column} is {value:.6g}"
        if not np.isfinite(value):
            raise ConversionError(f"{where}, expected a finite number. The checkpoint is damaged.")
        beside = ""
        if self.importances is not None and self.limit < _weight_limit(self.qtype):
            beside = f" with importances of up to {self.importances.max():.3g}"
        raise ConversionError(
            f"{where}, too large for {self.qtype.name}{beside}; expected less than "
            f"{self.limit:.3g}. Choose BF16 or F32 for it."
        )


def decode(
    packed: Packed, qtype: GGMLQuantizationType, *, n_threads: int | None = None
) -> FloatArray:
    """Return packed rows as float32, computed by ggml as llama.cpp computes them.

    Parameters
    ----------
    packed : (n_rows, row_bytes) uint8; F32 rows come back as a view

    Returns
    -------
    (n_rows, n_in) float32

    Raises
    ------
    ConversionError
        ggml has no decoder for the type, or the rows are no whole number of blocks.
    """
    block_size, type_size = GGML_QUANT_SIZES[qtype]
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] % type_size:
        raise ConversionError(
            f"got {packed.dtype} of shape {packed.shape} as {qtype.name}, expected rows of uint8 "
            f"in blocks of {type_size} bytes."
        )
    packed = np.ascontiguousarray(packed)
    if qtype == _T.F32:
        return packed.view(np.float32)
    traits = _ggml().ggml_get_type_traits(int(qtype)).contents
    if not traits.to_float or qtype not in _ENCODABLE:
        raise ConversionError(f"ggml has no decoder for {qtype.name}. Give a float GGUF.")
    to_float = _ToFloat(traits.to_float)
    n_in = packed.shape[1] // type_size * block_size
    out = np.empty((len(packed), n_in), np.float32)

    def run(start: int, stop: int) -> None:
        rows = out[start:stop]
        to_float(packed[start:stop].ctypes.data, rows.ctypes.data, rows.size)

    _in_chunks(run, len(packed), n_in, n_threads, boundary=len(packed))
    return out


def validate(packed: Packed, qtype: GGMLQuantizationType) -> bool:
    """Whether ggml accepts the packed data, (..., row_bytes) uint8, as `qtype` (no NaN scales)."""
    packed = np.ascontiguousarray(packed)
    return bool(_ggml().ggml_validate_row_data(int(qtype), packed.ctypes.data, packed.nbytes))


def _in_chunks(
    run: Callable[[int, int], None],
    n_rows: int,
    n_in: int,
    n_threads: int | None,
    *,
    boundary: int,
) -> None:
    """Call ``run(start, stop)`` over all rows from a few threads; no chunk crosses a `boundary`."""
    step = max(1, _CHUNK_WEIGHTS // n_in)
    chunks = [
        (start, min(start + step, first + boundary))
        for first in range(0, n_rows, boundary)
        for start in range(first, first + boundary, step)
    ]
    n_threads = min(n_threads or available_cpus(), len(chunks))
    if n_threads <= 1:
        for start, stop in chunks:
            run(start, stop)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        futures = [pool.submit(run, start, stop) for start, stop in chunks]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
