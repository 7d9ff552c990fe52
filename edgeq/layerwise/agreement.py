"""Whether the torch model computes what llama.cpp computes."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.layerwise.model import LayerwiseModel
from edgeq.runtime.model import Model


def check_agrees(model: LayerwiseModel, reference: Path, tokens: npt.NDArray[np.int32]) -> float:
    """Return the mean KL divergence of torch's predictions from llama.cpp's, in nats a token.

    Parameters
    ----------
    reference : the GGUF file that `model` was opened from
    tokens : (n_tokens,) int32, one chunk

    Notes
    -----
    Two ways to compute one float32 model are within 1e-6 of each other, and within 1e-4 where
    ggml looks GELU up in a float16 table. Another model is beyond 1e-2.
    """
    tokens = np.asarray(tokens, np.int32)
    (hidden,) = model.embed(tokens[None])
    for layer in range(model.n_layers):
        hidden = model.load(layer).run(hidden)
    ours = model.logits(hidden)
    with Model(reference, n_ctx=len(tokens), exact_attention=True) as llama:
        theirs = llama.logits(tokens).copy()
    return float(np.mean([_divergence(p, q) for p, q in zip(theirs, ours, strict=True)]))


def _divergence(reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    log_p, log_q = _log_softmax(reference), _log_softmax(other)
    return float(np.sum(np.exp(log_p) * (log_p - log_q)))


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    result: npt.NDArray[np.float64] = shifted - np.log(np.sum(np.exp(shifted)))
    return result
