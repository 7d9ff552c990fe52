"""What a quantizer is, which ones there are, and how one is named in a recipe.

A name may carry settings: ``gptq:order=natural,sweeps=0`` is ``Gptq(order="natural", sweeps=0)``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from edgeq.errors import CalibrationError, RegistryError
from edgeq.registry import Registry, unknown_name
from edgeq.runtime.encoders import FloatArray, Packed

__all__ = [
    "QUANTIZERS",
    "Inputs",
    "Matrices",
    "Quantizer",
    "Rounded",
    "importances_of",
    "make_quantizer",
]

QUANTIZERS = Registry(
    "edgeq.quantizers",
    {
        "gptq": "edgeq.quantizers.gptq:Gptq",
        "learned": "edgeq.quantizers.learned:Learned",
        "rtn": "edgeq.quantizers.rtn:RoundToNearest",
    },
)

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


class Matrices(Protocol):
    """Second moments, (n_mat, n_in, n_in) float32: an array, or what makes one matrix at a time.

    All matrices of a layer's experts are gigabytes, so take one after the other; ``np.asarray``
    has them all.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_mat, n_in, n_in)."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __array__(self) -> npt.NDArray[Any]: ...


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is known about the inputs of one weight.

    Attributes
    ----------
    importances : (n_mat, n_in) float32 mean squared inputs; None: there are none
    hessian : (n_mat, n_in, n_in) float32, 2/N Σ w x xᵀ over the N inputs x, w their weights of mean
        1; None: it was not collected. Of (n_mat · g, n_in, n_in) each is for n_out / g rows, one
        after the other
    outputs : (g, n, n) float32 of g groups of n rows of a plain matrix, Σ g gᵀ of the loss's
        gradients at their outputs; None: not known
    """

    importances: FloatArray | None = None
    hessian: Matrices | None = None
    outputs: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class Rounded:
    """A quantized weight.

    Attributes
    ----------
    packed : (n_mat * n_out, row_bytes) uint8
    facts : what the report tells about it: numbers, and reasons as text
    """

    packed: Packed
    facts: Mapping[str, float | str] = field(default_factory=dict)


class Quantizer(Protocol):
    """Chooses the codes of a weight. A registered quantizer is a class.

    Called without arguments it has its default settings; the fields of a dataclass may be set in
    the recipe. ``edgeq.testing.check_quantizer`` says whether one keeps its promises. One that
    looks at ``Inputs.outputs`` has ``uses_outputs = True``.
    """

    uses_hessian: bool

    def quantize(
        self,
        name: str,
        weight: FloatArray,
        qtype: GGMLQuantizationType,
        inputs: Inputs,
        *,
        n_threads: int | None = None,
    ) -> Rounded:
        """Return the packed rows of a weight.

        Parameters
        ----------
        name : GGUF name of the tensor, for errors
        weight : (n_out, n_in) or, for experts, (n_mat, n_out, n_in) float32; not written
        qtype : a type that llama.cpp decodes and whose blocks divide n_in
        inputs : statistics of its inputs; `hessian` is None unless ``uses_hessian``, and may be
            None even then
        n_threads : default: every CPU of this process
        """
        ...


def make_quantizer(spec: str) -> Quantizer:
    """Return the quantizer that ``NAME`` or ``NAME:key=value,...`` names.

    Raises
    ------
    RegistryError
        The name is unknown.
    RecipeError
        It has no such setting, or the value is none of its type or range.
    """
    name = spec.partition(":")[0]
    if name not in QUANTIZERS.plugins:
        raise RegistryError(unknown_name("quantizer", name, ["auto", *QUANTIZERS.names()]))
    made: Quantizer = QUANTIZERS.make("--quantizer", spec)
    return made


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
