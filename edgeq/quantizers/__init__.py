"""What a quantizer is, which ones there are, and how one is applied to a tensor of a GGUF file."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from converters.errors import ConversionError
from converters.gguf_file import GgufFile
from edgeq.errors import CalibrationError
from edgeq.registry import Registry
from edgeq.runtime.encoders import FloatArray, Packed, decode

__all__ = ["QUANTIZERS", "Quantizer", "importances_of", "quantize_tensor"]

QUANTIZERS = Registry("edgeq.quantizers", {"rtn": "edgeq.quantizers.rtn:RoundToNearest"})

_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


class Quantizer(Protocol):
    """Chooses the codes of a weight. A registered quantizer is a class without arguments."""

    def quantize(
        self,
        name: str,
        weight: FloatArray,
        qtype: GGMLQuantizationType,
        importances: FloatArray | None,
        *,
        n_threads: int | None = None,
    ) -> Packed:
        """Return the packed rows of a weight, (n_mat * n_out, row_bytes) uint8.

        Parameters
        ----------
        name : GGUF name of the tensor, for errors
        weight : (n_out, n_in) or, for experts, (n_mat, n_out, n_in) float32; not written
        qtype : a type that llama.cpp decodes and whose blocks divide n_in
        importances : (n_mat, n_in) float32 mean squared inputs; None: there are none
        n_threads : default: every CPU of this process
        """
        ...


def importances_of(
    name: str, shape: tuple[int, ...], imatrix: Mapping[str, FloatArray] | None
) -> FloatArray | None:
    """Return what an imatrix says about a tensor, (n_mat, n_in) float32; None: nothing.

    Parameters
    ----------
    shape : (n_out, n_in) or (n_mat, n_out, n_in)
    imatrix : tensor name to mean squared inputs, (n_mat, n_in)

    Raises
    ------
    CalibrationError
        The entry is of another size. Only a token embedding's is passed over, as llama.cpp does:
        its entry counts tokens where it is also the output matrix.

    References
    ----------
    llama.cpp 0c1e57098: src/llama-quant.cpp, llama_model_quantize_impl.
    """
    if imatrix is None or name not in imatrix:
        return None
    values = imatrix[name]
    n_mat = 1 if len(shape) == 2 else shape[0]
    if values.size == n_mat * shape[-1]:
        return np.asarray(values, np.float32).reshape(n_mat, shape[-1])
    if name in _EMBEDDINGS:
        return None
    raise CalibrationError(
        f"{name}: the imatrix has {values.size} values for it, expected {n_mat} × {shape[-1]}. "
        "It was made from another model; make one with: edgeq calibrate"
    )


def quantize_tensor(
    file: GgufFile,
    name: str,
    qtype: GGMLQuantizationType,
    imatrix: Mapping[str, FloatArray] | None,
    quantizer: Quantizer,
    *,
    allow_requantize: bool = False,
    n_threads: int | None = None,
) -> npt.NDArray[np.uint8]:
    """Return a tensor of `file` as `qtype`: copied if it is of that type, else quantized.

    Parameters
    ----------
    imatrix : tensor name to mean squared inputs, (n_mat, n_in) float32
    allow_requantize : accept a tensor that is quantized already

    Returns
    -------
    (..., row_bytes) uint8 in the tensor's shape

    Raises
    ------
    ConversionError
        The tensor is quantized already, or holds weights that the type cannot.
    CalibrationError
        The importances do not fit, or are missing where the type needs them.
    """
    info = file.tensors[name]
    packed = file.read_bytes(name)
    if info.qtype == qtype:
        return packed
    if info.qtype not in _FLOATS and not allow_requantize:
        raise ConversionError(
            f"{file.path}: {name} is {info.qtype.name} already, expected F32, F16 or BF16. "
            "Give the float model, or allow a second rounding with --allow-requantize."
        )
    rows = decode(packed.reshape(-1, packed.shape[-1]), info.qtype, n_threads=n_threads)
    importances = importances_of(name, info.shape, imatrix)
    weight = rows.reshape(info.shape)
    out = quantizer.quantize(name, weight, qtype, importances, n_threads=n_threads)
    return out.reshape(*info.shape[:-1], -1)
