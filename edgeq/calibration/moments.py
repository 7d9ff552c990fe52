"""Second moments of every weight's inputs, one layer after the other.

``LayerwiseMoments`` runs the float model in torch, layer by layer, and can let each layer see what
the already quantized layers before it really give it. ``StoredMoments`` has what llama.cpp showed
of the float model: for models that torch cannot run.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from converters.gguf_file import layer_of
from edgeq.calibration.fisher import TokenWeights
from edgeq.calibration.scratch import zeros_in_file
from edgeq.calibration.statistics import FloatArray, Statistics
from edgeq.calibration.sums import TINY, add_product, without_outliers
from edgeq.runtime.model import Tokens

if TYPE_CHECKING:
    from edgeq.layerwise import Layer, LayerwiseModel, Product
    from edgeq.layerwise.concurrent import OnEach

Replaced = Mapping[str, FloatArray]
"""Tensor name to the float weights that the quantized tensor stands for."""

# tensor name and matrix to the inputs of one chunk, and the tokens that they belong to
_Inputs = dict[tuple[str, int], tuple[FloatArray, npt.NDArray[np.int64]]]


@dataclass(frozen=True, eq=False)
class Moments:
    """What one weight's inputs are like.

    Attributes
    ----------
    hessian : (n_mat, n_in, n_in) float32, 2/N Σ w x xᵀ, the weights w of mean 1; of a plain matrix
        (n_groups, n_in, n_in), each for as many of its rows, one after the other
    cross : (n_mat, n_in, n_in) float32, 2/N Σ w (x' − x) xᵀ, where x' is the input in the float
        model; None: not asked for
    mean : (n_mat, n_in) float32, Σ w x / Σ w, or of groups of rows; None: not known
    mass : (n_mat,) float32, Σ w / N
    outputs : (n_groups, n, n) float32, of as many groups of n rows, one after the other, the second
        moments of the loss's gradients at their outputs; None: not known
    """

    hessian: FloatArray
    cross: FloatArray | None = None
    mean: FloatArray | None = None
    mass: FloatArray | None = None
    outputs: FloatArray | None = None

    def centred(self) -> "Moments":
        """Return the moments about the mean: what counts where a bias makes the mean error good."""
        if self.mean is None or self.mass is None:
            return self
        root = self.mean * np.sqrt(2 * self.mass)[:, None]
        return replace(self, hessian=self.hessian - root[:, :, None] * root[:, None, :])


class MomentsSource(Protocol):
    """Where second moments come from; layers are asked for in order."""

    @property
    def is_sequential(self) -> bool:
        """Whether a layer's moments depend on what became of the layers before it."""
        ...

    def of_layer(self, number: int) -> dict[str, Moments]:
        """Return the moments of a layer's weights by name; what is missing was never seen."""
        ...

    def advance(self, number: int, replaced: Callable[[], Replaced]) -> None:
        """Say what became of a layer; `replaced` is called when it is needed, if ever."""
        ...


class StoredMoments:
    """The second moments that llama.cpp's own passes over the float model give.

    Parameters
    ----------
    collect : runs the text through the model, and sees the named weights
    groups : names of the weights that are seen in one pass: of whole layers
    """

    is_sequential = False

    def __init__(
        self, collect: Callable[[Collection[str]], Statistics], groups: Sequence[Collection[str]]
    ) -> None:
        self._collect = collect
        self._groups = groups
        self._at = -1
        self._statistics: Statistics | None = None

    def of_layer(self, number: int) -> dict[str, Moments]:
        """Return the moments of a layer's weights by name.

        Raises
        ------
        CalibrationError
            As ``edgeq.calibration.collect``.
        """
        prefix = f"blk.{number}."
        for at, names in enumerate(self._groups):
            if at != self._at and any(name.startswith(prefix) for name in names):
                self._statistics = None  # freed before the next
                self._statistics = self._collect(names)
                self._at = at
        statistics = self._statistics
        if statistics is None:
            return {}
        return {
            name: Moments(statistics.hessian(name))
            for name, first in statistics.first_with.items()
            if name.startswith(prefix) and first in statistics.hessians
        }

    def advance(self, number: int, replaced: Callable[[], Replaced]) -> None:
        """Do nothing: these are the float model's."""


def groups_of_layers(shapes: Mapping[str, tuple[int, ...]], n_bytes: int) -> list[list[str]]:
    """Return the weights of as many layers at a time as have second moments of `n_bytes` together.

    What is in no layer is last.

    Parameters
    ----------
    shapes : of the weights by name; (n_out, n_in) or (n_mat, n_out, n_in)
    n_bytes : at most, but for a layer that alone has more
    """
    groups: list[list[str]] = []
    left = 0
    layers: dict[int, list[str]] = {}
    for name in shapes:
        number = layer_of(name)
        layers.setdefault(len(shapes) if number is None else number, []).append(name)
    for _, names in sorted(layers.items()):
        needed = sum(4 * (math.prod(shapes[n][:-2]) * shapes[n][-1] ** 2) for n in names)
        if not groups or needed > left:
            groups.append([])
            left = n_bytes
        groups[-1] += names
        left -= needed
    return groups


class LayerwiseMoments:
    """The second moments of a torch model, computed when a layer is asked for.

    Parameters
    ----------
    model : the float model
    tokens : (n_chunks, n_tokens) int32
    weights : how much each token matters at each weight; None: all the same
    strength : 0 to 1, of `weights`: w = 1 − strength + strength · s / mean(s)
    sequential : inputs come through the quantized layers before
    asymmetric : also collect ``Moments.cross``; needs `sequential`
    outputs : ``Moments.outputs`` by weight, see ``edgeq.calibration.fisher``
    directory : where the moments of stacked weights (experts) lie in files; None: in memory
    """

    def __init__(
        self,
        model: "LayerwiseModel",
        tokens: Tokens,
        *,
        weights: TokenWeights | None = None,
        strength: float = 1.0,
        sequential: bool = True,
        asymmetric: bool = False,
        outputs: Mapping[str, FloatArray] | None = None,
        directory: Path | None = None,
    ) -> None:
        self._model = model
        self._weights = weights
        self._outputs = {} if outputs is None else outputs
        self._strength = strength
        self._directory = directory
        self.is_sequential = sequential
        self._hidden = model.embed(tokens)
        self._float = list(self._hidden) if sequential and asymmetric else None
        self._at = 0
        self._done: dict[int, Callable[[], Replaced]] = {}

    def of_layer(self, number: int) -> dict[str, Moments]:
        """Return the moments of a layer's weights by name; the layers before must be known."""
        while self._at < number:
            self._pass(self._at)
            self._at += 1
        from edgeq.layerwise import one_thread_each

        layer = self._model.load(number)
        sums: dict[str, _Sums] = {}
        leaving: list[FloatArray] = []

        def run(chunk: int) -> "tuple[FloatArray, list[Product], _Inputs]":
            seen: list[Product] = []
            exact = self._float_inputs(layer, chunk)
            return layer.run(self._hidden[chunk], seen.append), seen, exact

        with one_thread_each() as on_each:  # and added up in the order of the chunks
            for chunk, (out, seen, exact) in enumerate(on_each(run, range(len(self._hidden)))):
                for product in seen:
                    self._add(sums, product, chunk, exact, on_each)
                if not self.is_sequential:  # all stays the float model's: one pass is enough
                    leaving.append(out)
        if leaving:
            self._hidden, self._at = leaving, number + 1
        made = {one: one.moments() for one in dict.fromkeys(sums.values())}
        found = {name: made[one] for name, one in sums.items()}
        for name in found.keys() & self._outputs.keys():
            found[name] = replace(found[name], outputs=self._outputs[name])
        return found

    def advance(self, number: int, replaced: Callable[[], Replaced]) -> None:
        """Remember what became of a layer."""
        self._done[number] = replaced

    def _float_inputs(self, layer: "Layer", chunk: int) -> "_Inputs":
        """Return what the layer's weights see in the float model; empty if nobody asked."""
        found: _Inputs = {}
        if self._float is not None:
            layer.run(
                self._float[chunk],
                lambda p: found.update({_key(p): (p.inputs.copy(), p.positions.copy())}),
            )
        return found

    def _pass(self, number: int) -> None:
        """Let all chunks through a layer that is done."""
        from edgeq.layerwise import one_thread_each

        replaced = self._done.pop(number, dict)
        layer: Layer
        with one_thread_each() as on_each:
            if self._float is not None:
                layer = self._model.load(number)
                self._float = list(on_each(layer.run, self._float))
            layer = self._model.load(number, replaced() if self.is_sequential else None)
            self._hidden = list(on_each(layer.run, self._hidden))

    def _add(
        self,
        sums: dict[str, "_Sums"],
        product: "Product",
        chunk: int,
        exact: "_Inputs",
        on_each: "OnEach",
    ) -> None:
        inputs, positions = product.inputs, product.positions
        weights = self._token_weights(product.name)
        shape = self._model.reference.tensors[product.name].shape
        if product.name not in sums:
            first = sums.get(product.same_as)
            if weights is None and first is not None and first.is_for(shape):
                sums[product.name] = first
            else:
                n_groups = 1 if weights is None else len(weights)
                sums[product.name] = _Sums(product.name, shape, n_groups, self._directory)
        one = sums[product.name]
        if one.name != product.name:
            return  # the very same inputs and weights
        float_inputs = None
        seen, seen_positions = exact.get(_key(product), (inputs, positions[:0]))
        if np.array_equal(seen_positions, positions):  # else the float model sent an expert others
            float_inputs = seen
        for group in range(one.n_groups):
            w = np.ones(len(inputs), np.float32)
            if weights is not None:
                w = weights[group, chunk, positions]
            w = without_outliers(inputs, w)
            one.add(product.matrix + group, inputs, w, float_inputs, on_each)

    def _token_weights(self, name: str) -> FloatArray | None:
        """Return a weight's token weights with mean 1, (n_groups, n_chunks, n_tokens), if any."""
        if self._weights is None or name not in self._weights:
            return None
        squares = self._weights[name]  # the first token's is an outlier
        mean = np.maximum(squares[..., 1:].mean(axis=(1, 2), keepdims=True), TINY)
        out: FloatArray = (1 - self._strength) + self._strength * squares / mean
        return out.astype(np.float32)


def _key(product: "Product") -> tuple[str, int]:
    return product.name, product.matrix


class _Sums:
    """Running sums of one weight's moments, and of all that see the same."""

    def __init__(
        self, name: str, shape: tuple[int, ...], n_groups: int, directory: Path | None
    ) -> None:
        self.name = name
        self.is_plain = len(shape) == 2
        self.n_groups = n_groups
        self._directory = None if self.is_plain else directory
        n_mat, n_in = (n_groups if self.is_plain else shape[0]), shape[-1]
        self.hessian = self._zeros((n_mat, n_in, n_in))
        self.cross: FloatArray | None = None
        self.total = np.zeros((n_mat, n_in), np.float32)
        self.mass = np.zeros(n_mat, np.float32)
        self.counts: npt.NDArray[np.int64] = np.zeros(n_mat, np.int64)

    def _zeros(self, shape: tuple[int, ...]) -> FloatArray:
        if self._directory is None:
            return np.zeros(shape, np.float32)
        return zeros_in_file(shape, self._directory)

    def is_for(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of that shape, with the same inputs, has these moments."""
        return self.is_plain == (len(shape) == 2) and (
            self.is_plain or len(self.counts) == shape[0]
        )

    def add(
        self,
        matrix: int,
        inputs: FloatArray,
        weights: FloatArray,
        exact: FloatArray | None,
        on_each: "OnEach",
    ) -> None:
        self.total[matrix] += weights @ inputs
        self.mass[matrix] += weights.sum()
        root = np.sqrt(weights)[:, None]
        exact = None if exact is None else exact * root
        inputs = inputs * root
        self.counts[matrix] += len(inputs)
        add_product(self.hessian[matrix], inputs, inputs, on_each)
        if exact is not None:
            if self.cross is None:
                self.cross = self._zeros(self.hessian.shape)
            add_product(self.cross[matrix], exact - inputs, inputs, on_each)

    def moments(self) -> Moments:
        """Return the means, in place of the sums; experts with few inputs are shrunk towards all.

        An expert of n inputs counts as n of n + n_in: below about n_in inputs its own second
        moments are singular.
        """
        n_in = self.hessian.shape[-1]
        counts = self.counts.astype(np.float32)[:, None, None]
        twice = (2 / np.maximum(counts, 1)).astype(np.float32)
        cross = None if self.cross is None else np.multiply(self.cross, twice, out=self.cross)
        if self.is_plain:
            mean = (self.total / np.maximum(self.mass, TINY)[:, None]).astype(np.float32)
            mass = (self.mass / np.maximum(self.counts, 1)).astype(np.float32)
            return Moments(np.multiply(self.hessian, twice, out=self.hessian), cross, mean, mass)
        few = np.float32(n_in)
        pooled = self.hessian.sum(axis=0) * np.float32(2 / max(int(self.counts.sum()), 1))
        pooled *= few
        for mine, n in zip(self.hessian, counts + few, strict=True):  # each is read once
            mine *= 2
            mine += pooled
            mine /= n
        return Moments(self.hessian, cross)
