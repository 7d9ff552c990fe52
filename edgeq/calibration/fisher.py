"""How much each token, and each output, matters at each weight: gradients of the model's own loss.

Second moments of inputs weighted by squared gradients are the Fisher information of a layer's
weights, seen from the inputs; second moments of the gradients themselves are the same seen from the
outputs. A rounding error then counts by what it does to the model's output, not to the layer's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeq.calibration.collector import check_fits, free_bytes
from edgeq.calibration.scratch import zeros_in_file
from edgeq.calibration.sums import add_product, without_outliers
from edgeq.runtime.encoders import FloatArray
from edgeq.runtime.model import Tokens

if TYPE_CHECKING:
    from edgeq.layerwise import Layer, LayerwiseModel, Product
    from edgeq.layerwise.concurrent import OnEach

TokenWeights = dict[str, FloatArray]
"""Weight name to (n_groups, n_chunks, n_tokens) float32 mean squared gradients at its outputs."""

_MEMORY_FRACTION = 0.25  # of what is free, for the hidden states between the layers
MOST_ROWS = 1024  # of a weight in one group of outputs


class OutputMoments:
    """Second moments of the gradients at the outputs of every plain matrix.

    Rows are taken in equal groups of at most 1,024, one after the other, and nothing is known of
    two groups together: of 11,008 rows all pairs would be half a gigabyte.

    Parameters
    ----------
    directory : where the sums lie in files that have no name

    Attributes
    ----------
    sums : weight name to (n_groups, n, n) float32 Σ g gᵀ over tokens

    References
    ----------
    Tseng et al., YAQA, arXiv:2505.22988, section 3: the Fisher information of a weight as a
    Kronecker product of one matrix of its inputs and one of its outputs.
    """

    def __init__(self, directory: Path) -> None:
        self.sums: dict[str, FloatArray] = {}
        self._directory = directory

    def add(self, name: str, gradient: FloatArray, on_each: "OnEach") -> None:
        """Add one chunk's gradients, (n_tokens, n_out)."""
        if name not in self.sums:
            shape = groups_of_rows(gradient.shape[1])
            self.sums[name] = zeros_in_file((*shape, shape[1]), self._directory)
        weights = without_outliers(gradient, np.ones(len(gradient), np.float32))
        cut = gradient * np.sqrt(weights)[:, None]
        sums = self.sums[name]
        for total, rows in zip(sums, np.split(cut, len(sums), axis=1), strict=True):
            add_product(total, rows, rows, on_each)


def groups_of_rows(n_out: int) -> tuple[int, int]:
    """Return the groups that a weight's rows are taken in, and the rows of each."""
    n_groups = next(n for n in range(-(-n_out // MOST_ROWS), n_out + 1) if n_out % n == 0)
    return n_groups, n_out // n_groups


def token_weights(
    model: "LayerwiseModel",
    tokens: Tokens,
    *,
    seed: int = 0,
    n_groups: int = 1,
    outputs: OutputMoments | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenWeights:
    """Return the mean over a weight's output rows of the squared gradient, token by token.

    Rows may be taken in groups of neighbours (heads, say), each with its own mean: what matters to
    one is not what matters to another. Experts, and what does not divide, are one group.

    The loss is Σ −log p of tokens drawn from the model's own distribution, so that squares are the
    Fisher information in expectation. Layers are loaded twice for each batch of chunks whose hidden
    states fit into memory; the backward products are computed in bfloat16 where this CPU is fast at
    it (0.5 % of the squares).

    Parameters
    ----------
    tokens : (n_chunks, n_tokens) int32
    seed : of the drawn tokens; chunk c draws with seed + c
    n_groups : of each weight's rows
    outputs : adds up the moments at outputs in the same pass
    progress : called with (layers done, layers in all), over all batches and both directions

    Raises
    ------
    CalibrationError
        It would not fit into the memory that is free.

    References
    ----------
    Kim et al., GuidedQuant, arXiv:2505.07004, section 3: end-loss guidance by squared gradients;
    Tseng et al., YAQA, arXiv:2505.22988, for the Fisher information of the drawn targets.
    """
    n_chunks, n_tokens = tokens.shape
    state_bytes = n_tokens * model.n_embd * 4
    check_fits(
        f"gradients: a chunk of {n_tokens} tokens and a layer of {model.reference.path.name}",
        (model.n_layers + 1) * state_bytes + 3 * model.largest_layer_bytes,
        "Give --effort fast (--fisher 0 --no-output-feedback), or a smaller --ctx.",
    )
    size = batch_of_chunks(model.n_layers + 1, state_bytes)
    found: TokenWeights = {}
    done, total = 0, 2 * model.n_layers * -(-n_chunks // size)

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for first in range(0, n_chunks, size):
        chunks = range(first, min(first + size, n_chunks))
        _batch(model, tokens, chunks, seed, n_groups, found, outputs, step)
    return found


def batch_of_chunks(n_states: int, state_bytes: int) -> int:
    """Return how many chunks' hidden states fit into a quarter of the free memory, at least 1."""
    free = free_bytes(unknown=1 << 32)
    return max(1, int(_MEMORY_FRACTION * free) // (n_states * state_bytes))


def _batch(
    model: "LayerwiseModel",
    tokens: Tokens,
    chunks: range,
    seed: int,
    n_groups: int,
    found: TokenWeights,
    outputs: OutputMoments | None,
    step: Callable[[], None],
) -> None:
    from edgeq.layerwise import fast_dtype, one_thread_each

    states: list[list[Any]] = [list(model.embed(tokens[chunks.start : chunks.stop]))]
    dtype = fast_dtype()
    with one_thread_each() as on_each:
        for number in range(model.n_layers):
            layer = model.load(number)
            states.append(list(on_each(layer.run, states[-1])))
            step()
        pairs = list(zip(chunks, states.pop(), strict=True))
        gradients = list(on_each(lambda one: model.head_gradient(one[1], seed + one[0]), pairs))
        for number in reversed(range(model.n_layers)):
            layer = model.load(number)
            entering = states.pop()

            leaving = list(zip(chunks, entering, gradients, strict=True))

            def back(
                one: tuple[int, Any, Any], layer: "Layer" = layer
            ) -> tuple[Any, list[tuple[str, FloatArray]]]:
                chunk, hidden, gradient = one
                at_outputs: list[tuple[str, FloatArray]] = []

                def add(product: "Product") -> None:
                    _add_squares(found, model, product, chunk, tokens.shape, n_groups)
                    if outputs is None or product.gradient is None:
                        return
                    if _is_plain(model, product):
                        at_outputs.append((product.name, product.gradient))

                return layer.backward(hidden, gradient, add, compute_dtype=dtype), at_outputs

            gradients = []
            for gradient, at_outputs in on_each(back, leaving):  # added up in the chunks' order
                gradients.append(gradient)
                if outputs is not None:
                    for name, at_output in at_outputs:
                        outputs.add(name, at_output, on_each)
            step()


def _add_squares(
    found: TokenWeights,
    model: "LayerwiseModel",
    product: "Product",
    chunk: int,
    shape: tuple[int, ...],
    n_groups: int,
) -> None:
    """Add one product's squared gradients to a chunk's, `shape` being (n_chunks, n_tokens)."""
    if product.gradient is None:
        return
    n_rows, n_out = product.gradient.shape
    n = n_groups if _is_plain(model, product) and n_out % n_groups == 0 else 1
    sums = found.setdefault(product.name, np.zeros((n, *shape), np.float32))
    squares = np.square(product.gradient).reshape(n_rows, n, -1).mean(axis=2)
    for group in range(n):
        np.add.at(sums[group, chunk], product.positions, squares[:, group])


def _is_plain(model: "LayerwiseModel", product: "Product") -> bool:
    return len(model.reference.tensors[product.name].shape) == 2
