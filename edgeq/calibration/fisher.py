"""How much each token matters at each weight: the squared gradients of the model's own loss.

Second moments weighted so are the Fisher information of a layer's weights, seen from the inputs: a
rounding error then counts by what it does to the model's output, not to the layer's.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeq.calibration.collector import free_bytes
from edgeq.runtime.model import Tokens

if TYPE_CHECKING:
    from edgeq.layerwise import Layer, LayerwiseModel, Product

FloatArray = npt.NDArray[np.float32]
TokenWeights = dict[str, FloatArray]
"""Weight name to (n_groups, n_chunks, n_tokens) float32 mean squared gradients at its outputs."""

_MEMORY_FRACTION = 0.25  # of what is free, for the hidden states between the layers


def token_weights(
    model: "LayerwiseModel",
    tokens: Tokens,
    *,
    seed: int = 0,
    n_groups: int = 1,
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
    progress : called with (layers done, layers in all), over all batches and both directions

    References
    ----------
    Kim et al., GuidedQuant, arXiv:2505.07004, section 3: end-loss guidance by squared gradients;
    Tseng et al., YAQA, arXiv:2505.22988, for the Fisher information of the drawn targets.
    """
    n_chunks, n_tokens = tokens.shape
    size = batch_of_chunks(model.n_layers + 1, n_tokens * model.n_embd * 4)
    found: TokenWeights = {}
    done, total = 0, 2 * model.n_layers * -(-n_chunks // size)

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for first in range(0, n_chunks, size):
        chunks = range(first, min(first + size, n_chunks))
        _batch(model, tokens, chunks, seed, n_groups, found, step)
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

            def back(one: tuple[int, Any, Any], layer: "Layer" = layer) -> Any:
                chunk, hidden, gradient = one

                def add(product: "Product") -> None:
                    _add_squares(found, model, product, chunk, tokens.shape, n_groups)

                return layer.backward(hidden, gradient, add, compute_dtype=dtype)

            gradients = list(on_each(back, leaving))
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
    is_plain = len(model.reference.tensors[product.name].shape) == 2
    n = n_groups if is_plain and n_out % n_groups == 0 else 1
    sums = found.setdefault(product.name, np.zeros((n, *shape), np.float32))
    squares = np.square(product.gradient).reshape(n_rows, n, -1).mean(axis=2)
    for group in range(n):
        np.add.at(sums[group, chunk], product.positions, squares[:, group])
