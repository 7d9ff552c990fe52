"""Sees every weight product that a torch module computes, whatever the module looks like.

All products go through ``torch.nn.functional.linear`` (and ``torch.addmm`` in GPT-2), so they are
caught there, and told apart by the memory in which their weight lies. Which tokens an expert saw is
read from the indexing that selected them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

from edgeq.errors import CalibrationError
from edgeq.layerwise.origins import FloatArray, Origin


@dataclass(frozen=True, eq=False)
class Product:
    """One weight matrix, what it was multiplied with, and the loss's gradient at the result.

    The arrays are views on what the pass computed: read-only, and to be copied if they are kept.

    Attributes
    ----------
    name : the weight tensor, as in the GGUF file
    matrix : which matrix of the tensor: the expert; else 0
    inputs : (n_rows, n_in) float32
    positions : (n_rows,) int64, the token of the chunk that each row belongs to
    gradient : (n_rows, n_out) float32, of the loss with respect to the product, in the order of
        the GGUF tensor's rows; None of a pass without gradients
    same_as : the first weight of this pass that saw the very same inputs; its own name if it is
        the first
    """

    name: str
    matrix: int
    inputs: FloatArray
    positions: npt.NDArray[np.int64]
    gradient: FloatArray | None
    same_as: str


OnProduct = Callable[[Product], None]


OnVector = Callable[[str, FloatArray], None]
"""Called with a norm's or bias's name in the file and the loss's gradient in its shape there."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter, and where it comes from."""

    parameter: Any
    origins: tuple[Origin, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(n_out, n_in) of one matrix."""
        rows, columns = self.parameter.shape[-2:]
        return (columns, rows) if self.origins[0].is_transposed else (rows, columns)


@dataclass(frozen=True, eq=False)
class Seen:
    """One product as it was computed, before it is told apart into GGUF tensors."""

    weight: Weight
    expert: int
    inputs: Any
    output: Any
    positions: npt.NDArray[np.int64]
    same_as: str

    def products(self, gradient: Any | None) -> list[Product]:
        """Return the products of the GGUF's tensors; `gradient` is (n_rows, n_out) or None."""
        inputs = _array(self.inputs.reshape(-1, self.weight.shape[1]))
        whole = None if gradient is None else _array(gradient.reshape(len(inputs), -1))
        found = []
        for origin in self.weight.origins:
            mine = whole
            if whole is not None and origin.rows is not None:
                mine = np.ascontiguousarray(whole[:, origin.rows])
            matrix = self.expert if origin.matrix is None else origin.matrix
            found.append(Product(origin.name, matrix, inputs, self.positions, mine, self.same_as))
        return found


def report_vectors(
    vectors: Sequence[Weight], gradients: Sequence[Any], on_vector: OnVector
) -> None:
    """Tell the gradients of vectors; None where a vector took no part."""
    for weight, gradient in zip(vectors, gradients, strict=True):
        for origin in weight.origins if gradient is not None else ():
            if origin.matrix is None:
                whole = _array(gradient)
                on_vector(origin.name, whole if origin.rows is None else whole[origin.rows])


def _array(tensor: Any) -> FloatArray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def fast_dtype() -> Any:
    """Return bfloat16 where this CPU multiplies it in hardware, else float32.

    Without such instructions torch computes bfloat16 products at an eighth of float32's speed.
    """
    tell: Any = getattr(torch.cpu, "get_capabilities", dict)  # an older torch does not tell
    capabilities = tell()
    has_products = any(capabilities.get(key) for key in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.bfloat16 if has_products else torch.float32


class Casts:
    """Weights in a narrower type, made when first needed and kept as long as their layer."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self._cast: dict[tuple[int, int], Any] = {}

    def __call__(self, weight: Any) -> Any:
        """Return a weight in the narrower type."""
        key = (weight.untyped_storage().data_ptr(), weight.storage_offset())
        if key not in self._cast:
            self._cast[key] = weight.to(self.dtype)
        return self._cast[key]


class ProductMode(TorchFunctionMode):  # type: ignore[misc]
    """While it is entered, reports the products with `weights` to `on_seen`.

    Parameters
    ----------
    tokens : positions in the chunk of what is computed
    casts : compute the products in its type, everything else in float32; None: all in float32
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        tokens: range,
        on_seen: Callable[[Seen], None],
        casts: Casts | None = None,
    ) -> None:
        super().__init__()
        self._weights = {w.parameter.untyped_storage().data_ptr(): w for w in weights}
        self._all_positions = np.asarray(tokens, np.int64)
        self._on_seen = on_seen
        self._casts = casts
        self._selected: tuple[Any, Any] = (None, None)
        self._by_expert: dict[int, npt.NDArray[np.int64]] = {}
        self._first_with: dict[int, tuple[Any, str]] = {}  # keeps the inputs, so their ids, alive

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            return self._product(func, *_linear(*args, **kwargs), is_transposed=False)
        if func is torch.addmm and len(args) == 3 and not kwargs:
            bias, inputs, weight = args
            return self._product(func, inputs, weight, bias, is_transposed=True)
        result = func(*args, **kwargs)
        if func is torch.Tensor.__getitem__ and _is_selection(args[1]):
            self._selected = (result, args[1])
        return result

    def _product(
        self, func: Any, inputs: Any, weight: Any, bias: Any, *, is_transposed: bool
    ) -> Any:
        known = self._weights.get(weight.untyped_storage().data_ptr())
        if known is None:
            args = (bias, inputs, weight) if is_transposed else (inputs, weight, bias)
            return func(*args)
        if weight.shape != known.parameter.shape[-2:]:
            raise CalibrationError(
                f"{known.origins[0].name}: a part {tuple(weight.shape)} of the parameter "
                f"{tuple(known.parameter.shape)} is multiplied alone; expected whole matrices. "
                "Report this model to edgeq's developers."
            )
        narrow = self._casts
        if narrow is None:
            args = (bias, inputs, weight) if is_transposed else (inputs, weight, bias)
            output = func(*args)
        else:
            matrix = narrow(weight).t() if is_transposed else narrow(weight)
            output = torch.nn.functional.linear(inputs.to(narrow.dtype), matrix).float()
            output = output if bias is None else output + bias
        self._report(known, weight, inputs, output)
        return output

    def _report(self, known: Weight, weight: Any, inputs: Any, output: Any) -> None:
        expert = weight.storage_offset() // weight.numel()
        is_expert = known.parameter.ndim == 3 or known.origins[0].matrix is not None
        n_rows = inputs.numel() // inputs.shape[-1]
        if is_expert:
            number = known.origins[0].matrix
            positions = self._tokens_of(expert if number is None else number, inputs, n_rows, known)
        else:
            positions = self._all_positions
        _, first = self._first_with.setdefault(id(inputs), (inputs, known.origins[0].name))
        self._on_seen(Seen(known, expert, inputs, output, positions, first))

    def _tokens_of(
        self, expert: int, inputs: Any, n_rows: int, known: Weight
    ) -> npt.NDArray[np.int64]:
        """Return the tokens of an expert's rows: as selected, or as of its product before."""
        selected, index = self._selected
        if inputs is selected:
            self._by_expert[expert] = index.cpu().numpy()
        positions = self._by_expert.get(expert)
        if positions is None or len(positions) != n_rows:
            raise CalibrationError(
                f"{known.origins[0].name}: cannot tell which tokens the {n_rows} rows of expert "
                f"{expert} belong to. Report this model to edgeq's developers."
            )
        return positions


def _linear(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


def _is_selection(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.ndim == 1 and index.dtype == torch.int64
