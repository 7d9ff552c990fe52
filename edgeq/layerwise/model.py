"""The float model of a GGUF file in torch, one decoder layer at a time."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from converters.gguf_file import GgufFile
from edgeq.errors import CalibrationError
from edgeq.layerwise.concurrent import without_nested_teams
from edgeq.layerwise.origins import FloatArray, fill
from edgeq.layerwise.products import (
    Casts,
    OnProduct,
    OnVector,
    ProductMode,
    Seen,
    Weight,
    report_vectors,
)
from edgeq.layerwise.shell import Shell, open_shell

_LOGITS_AT_ONCE = 1 << 25  # of the head, 128 MiB of float32


class LayerwiseModel:
    """The float model of a GGUF file; made by ``open``.

    Memory holds the embedding, the output matrix, and whatever layers are loaded.

    Attributes
    ----------
    reference : the GGUF file
    n_layers, n_embd, n_vocab : sizes
    device : ``torch.device`` that holds the weights and computes; arrays go there and come back
    """

    def __init__(self, shell: Shell) -> None:
        self.reference = shell.reference
        self.device = shell.device
        self.n_layers: int = shell.config.num_hidden_layers
        self.n_embd: int = shell.config.hidden_size
        self.n_vocab: int = shell.config.vocab_size
        self._shell = shell
        self._casts: dict[Any, Casts] = {}

    @classmethod
    def open(
        cls,
        reference: GgufFile,
        checkpoint: Path | None,
        *,
        n_threads: int | None = None,
        device: Any = "cpu",
    ) -> "LayerwiseModel":
        """Return the model of a float GGUF file, with no layer in memory.

        Parameters
        ----------
        reference : with all weights in a type that ``GgufFile.read_float`` decodes
        checkpoint : directory of the Hugging Face checkpoint, whose config.json says what the
            model is; None: the file's metadata say it
        n_threads : of torch, for the whole process; default: as it is
        device : where torch computes, see ``chosen_device``; the same bytes again only on the CPU

        Raises
        ------
        CalibrationError
            transformers or the converters do not know the model, or file and configuration do not
            fit each other.
        ConversionError
            The configuration asks for something that the GGUF cannot say.
        """
        if n_threads is not None:
            torch.set_num_threads(n_threads)
        return cls(open_shell(reference, checkpoint, torch.device(device)))

    def tensors(self, layer: int) -> list[str]:
        """Return the names in the file of everything that one layer holds, norms and biases too."""
        return self._names(layer, 1)

    def matrices(self, layer: int) -> list[str]:
        """Return the names in the file of one layer's weight products, routers among them."""
        return self._names(layer, 2)

    @property
    def largest_layer_bytes(self) -> int:
        """Bytes of the largest layer in float32."""
        tensors = self.reference.tensors
        layers = (self.tensors(number) for number in range(self.n_layers))
        return max(sum(4 * math.prod(tensors[name].shape) for name in names) for names in layers)

    def _names(self, layer: int, least_dimensions: int) -> list[str]:
        held = self._shell.parameters_of(layer).values()
        names = (
            origin.name
            for parameter, origins in held
            if parameter.ndim >= least_dimensions
            for origin in origins
        )
        return list(dict.fromkeys(names))

    def embed(self, tokens: npt.NDArray[np.int32]) -> list[FloatArray]:
        """Return what enters layer 0: for every chunk (n_tokens, n_embd) float32.

        Parameters
        ----------
        tokens : (n_chunks, n_tokens) int32; every chunk starts at position 0
        """
        chunks = torch.tensor(np.asarray(tokens, np.int64))
        return [_to_numpy(self._shell.entering(chunk)) for chunk in chunks]

    def load(self, layer: int, replaced: Mapping[str, FloatArray] | None = None) -> "Layer":
        """Return one decoder layer with its weights; they are freed with the returned object.

        Parameters
        ----------
        replaced : tensors to use instead of the file's: GGUF name to float32 in the tensor's shape
            in the file, rows in its order

        Raises
        ------
        CalibrationError
            A replacement is of another layer or has another shape.
        """
        without_nested_teams()
        replaced = {} if replaced is None else replaced
        held = self.tensors(layer)
        for name, values in replaced.items():
            shape = tuple(self.reference.tensors[name].shape) if name in held else None
            if shape != values.shape:
                raise CalibrationError(
                    f"{name}: a replacement of shape {values.shape} for layer {layer}; expected "
                    f"{shape or 'a tensor of that layer'}. Pass what was read under that name."
                )
        return Layer(self._shell, layer, *self._shell.filled_layer(layer, replaced))

    def logits(self, hidden: FloatArray, on_product: OnProduct | None = None) -> FloatArray:
        """Return (n_tokens, n_vocab) float32 of a chunk's (n_tokens, n_embd) after the last layer.

        `on_product` sees the output matrix, under the name that it has in the file.
        """
        out = np.empty((len(hidden), self.n_vocab), np.float32)
        for rows in self._slices(len(hidden)):
            seen: list[Seen] = []
            with torch.no_grad(), ProductMode([self._shell.head], rows, seen.append):
                out[rows.start : rows.stop] = _to_numpy(
                    self._shell.behind(self._to_torch(hidden[rows.start : rows.stop]))
                )
            _report(seen, None, on_product)
        return out

    def head_gradient(
        self,
        hidden: FloatArray,
        seed: int,
        on_product: OnProduct | None = None,
        *,
        compute_dtype: Any = torch.float32,
    ) -> FloatArray:
        """Return the gradient at the last layer's output of a loss of the model's own making.

        The loss is Σ_t −log p(y_t), each y_t drawn from the model's distribution p after token t,
        so that the squares of its gradients have the Fisher information as their expectation.

        Parameters
        ----------
        hidden : (n_tokens, n_embd) float32, one chunk after the last layer
        seed : of the draws
        on_product : sees the output matrix, its inputs and the gradient at the logits before any
            cap
        compute_dtype : of the products, such as ``torch.bfloat16``; draws may then differ

        Returns
        -------
        (n_tokens, n_embd) float32

        References
        ----------
        Kunstner et al., Limitations of the empirical Fisher approximation, arXiv:1905.12558, for
        why the targets are drawn and not taken from the text.
        """
        generator = torch.Generator().manual_seed(seed)
        casts = _casts_to(compute_dtype, self._casts)
        gradient = np.empty(hidden.shape, np.float32)
        for rows in self._slices(len(hidden)):
            entering = self._to_torch(hidden[rows.start : rows.stop]).requires_grad_(True)
            seen: list[Seen] = []
            with torch.enable_grad(), ProductMode([self._shell.head], rows, seen.append, casts):
                logits = self._shell.behind(entering)
            outputs = [] if on_product is None else [one.output for one in seen]
            at_hidden, *at_outputs = torch.autograd.grad(
                logits, [entering, *outputs], _drawn_gradient(logits.detach(), generator)
            )
            gradient[rows.start : rows.stop] = _to_numpy(at_hidden)
            _report(seen, at_outputs, on_product)
        return gradient

    def divergence(
        self,
        hidden: FloatArray,
        wanted: FloatArray,
        teacher: "LayerwiseModel",
        on_vector: OnVector | None = None,
    ) -> tuple[float, FloatArray]:
        """Return the mean KL divergence from another model, and its gradient at `hidden`.

        Parameters
        ----------
        hidden : (n_tokens, n_embd) float32, one chunk after the last layer
        wanted : the same of `teacher`, in its own width
        on_vector : told the gradient of every norm and bias behind the layers; a chunk is computed
            in parts, and their gradients add up

        Returns
        -------
        divergence : KL(teacher, self), nats, the mean over the tokens
        gradient : (n_tokens, n_embd) float32
        """
        vectors = [] if on_vector is None else self._shell.vectors
        gradient = np.empty(hidden.shape, np.float32)
        total = 0.0
        for rows in self._slices(len(hidden)):
            part = slice(rows.start, rows.stop)
            with torch.no_grad():
                of_teacher = teacher._shell.behind(teacher._to_torch(wanted[part]))
                theirs = torch.log_softmax(of_teacher.to(self.device), dim=-1)
            entering = self._to_torch(hidden[part]).requires_grad_(True)
            with torch.enable_grad(), _with_gradients(vectors):
                logits = self._shell.behind(entering)
                ours = torch.log_softmax(logits.detach(), dim=-1)
                p = theirs.exp()
                total += float((p * (theirs - ours)).sum())
                at_hidden, *at_vectors = torch.autograd.grad(
                    logits,
                    [entering, *(one.parameter for one in vectors)],
                    (ours.exp_() - p) / len(hidden),
                    allow_unused=True,
                )
            gradient[part] = _to_numpy(at_hidden)
            if on_vector is not None:
                report_vectors(vectors, at_vectors, on_vector)
        return total / len(hidden), gradient

    def vectors(self, layer: int | None) -> list[str]:
        """Return the names of a layer's norms and biases; None: of those behind the layers."""
        held = self._shell.vectors
        if layer is not None:
            held = [Weight(*one) for one in self._shell.parameters_of(layer).values()]
        names = (
            origin.name
            for weight in held
            if weight.parameter.ndim == 1
            for origin in weight.origins
            if origin.matrix is None
        )
        return list(dict.fromkeys(names))

    def set_vector(self, name: str, values: FloatArray) -> None:
        """Change a norm or bias behind the layers, in its shape in the file."""
        for weight in self._shell.vectors:
            for origin in weight.origins:
                if origin.name == name:
                    changed = weight.parameter.detach().cpu()
                    fill(changed.numpy(), origin, values)
                    weight.parameter.copy_(changed)

    def _to_torch(self, array: FloatArray) -> Any:
        return _to_torch(array, self.device)

    def _slices(self, n_tokens: int) -> Iterator[range]:
        """Yield the tokens whose logits are computed at a time."""
        step = max(1, _LOGITS_AT_ONCE // self.n_vocab)
        for start in range(0, n_tokens, step):
            yield range(start, min(start + step, n_tokens))


class Layer:
    """One decoder layer with its weights, made by ``LayerwiseModel.load``.

    Attributes
    ----------
    number : which layer
    """

    def __init__(self, shell: Shell, number: int, module: Any, weights: Sequence[Weight]) -> None:
        self.number = number
        self._shell = shell
        self._module = module
        self._weights = [weight for weight in weights if weight.parameter.ndim >= 2]
        self._vectors = [weight for weight in weights if weight.parameter.ndim == 1]
        self._casts: dict[Any, Casts] = {}

    def run(self, hidden: FloatArray, on_product: OnProduct | None = None) -> FloatArray:
        """Return a chunk's hidden state after this layer.

        Parameters
        ----------
        hidden : (n_tokens, n_embd) float32, what enters the layer
        on_product : sees the input of every weight product, in the order of computation

        Raises
        ------
        CalibrationError
            A product of the layer was not seen; expert products without a token aside.
        """
        with torch.no_grad():
            if on_product is None:
                return _to_numpy(self._forward(self._to_torch(hidden)))
            report = on_product
            names: set[str] = set()

            def on_seen(seen: Seen) -> None:
                for product in seen.products(None):
                    names.add(product.name)
                    report(product)

            with ProductMode(self._weights, range(len(hidden)), on_seen):
                out = _to_numpy(self._forward(self._to_torch(hidden)))
        self._check_seen(names)
        return out

    def backward(
        self,
        hidden: FloatArray,
        gradient: FloatArray,
        on_product: OnProduct | None = None,
        on_vector: OnVector | None = None,
        *,
        compute_dtype: Any = torch.float32,
    ) -> FloatArray:
        """Return the gradient at what enters this layer, from that at what leaves it.

        Parameters
        ----------
        hidden : (n_tokens, n_embd) float32, what enters the layer; it is computed anew
        gradient : (n_tokens, n_embd) float32, at what leaves it
        on_product : sees the input of, and the gradient at, every weight product
        on_vector : told the gradient of every norm and bias
        compute_dtype : of the products, such as ``torch.bfloat16``; all else is float32

        Returns
        -------
        (n_tokens, n_embd) float32
        """
        entering = self._to_torch(hidden).requires_grad_(True)
        seen: list[Seen] = []
        vectors = [] if on_vector is None else self._vectors
        casts = _casts_to(compute_dtype, self._casts)
        products = ProductMode(self._weights, range(len(hidden)), seen.append, casts)
        with torch.enable_grad(), _with_gradients(vectors):
            with products:
                leaving = self._forward(entering)
            outputs = [] if on_product is None else [one.output for one in seen]
            at_hidden, *others = torch.autograd.grad(
                leaving,
                [entering, *outputs, *(one.parameter for one in vectors)],
                self._to_torch(gradient),
                allow_unused=True,
            )
        if on_vector is not None:
            report_vectors(vectors, others[len(outputs) :], on_vector)
        if on_product is not None:
            _report(seen, others[: len(outputs)], on_product)
            self._check_seen({origin.name for one in seen for origin in one.weight.origins})
        return _to_numpy(at_hidden)

    def _to_torch(self, array: FloatArray) -> Any:
        return _to_torch(array, self._shell.device)

    def _forward(self, hidden: Any) -> Any:
        args, kwargs = self._shell.calls(len(hidden))[self.number]
        out = self._module(hidden[None], *args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out)[0]

    def _check_seen(self, names: set[str]) -> None:
        for weight in self._weights:
            if weight.parameter.ndim == 3 or weight.origins[0].matrix is not None:
                continue  # an expert that no token went to
            for origin in weight.origins:
                if origin.name not in names:
                    raise CalibrationError(
                        f"{origin.name}: the torch model computes no product with it that edgeq "
                        "sees. Report this model to edgeq's developers."
                    )


def _drawn_gradient(logits: Any, generator: Any) -> Any:
    """Return p − e_y of every row, y drawn from p: the gradient of −log p(y) at the logits.

    Drawn by inverting the cumulative sum, and without autograd: with ``torch.multinomial`` and
    ``log_softmax`` this took longer than the product with a 49k vocabulary.
    """
    p = torch.softmax(logits, dim=-1)
    total = p.cumsum(dim=-1)
    u = torch.rand((len(p), 1), generator=generator).to(p.device) * total[:, -1:]
    drawn = torch.searchsorted(total, u, right=True).clamp_(max=p.shape[-1] - 1)
    return p.scatter_add_(1, drawn, torch.full_like(u, -1.0))


@contextlib.contextmanager
def _with_gradients(vectors: Sequence[Weight]) -> Iterator[None]:
    """While it is entered, autograd follows these parameters."""
    for one in vectors:
        one.parameter.requires_grad_(True)
    try:
        yield
    finally:
        for one in vectors:
            one.parameter.requires_grad_(False)


def _casts_to(dtype: Any, made: dict[Any, Casts]) -> Casts | None:
    return None if dtype == torch.float32 else made.setdefault(dtype, Casts(dtype))


def _report(
    seen: Sequence[Seen], gradients: Sequence[Any] | None, on_product: OnProduct | None
) -> None:
    if on_product is None:
        return
    for number, one in enumerate(seen):
        for product in one.products(None if gradients is None else gradients[number]):
            on_product(product)


def _to_torch(array: FloatArray, device: Any) -> Any:
    return torch.tensor(np.ascontiguousarray(array, np.float32), device=device)


def _to_numpy(tensor: Any) -> FloatArray:
    out: FloatArray = tensor.detach().cpu().contiguous().numpy()
    return out
