"""What shows that a reference is its source's function on weights that left the source's grid."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quants

from edgeq.runtime.encoders import encode
from edgeq.runtime.model import Model
from scripts.reference_folds import Float32, ReferenceModelError

_ROWS = 64  # of logits, float64 at a time
_WEIGHTS = 1 << 22  # re-encoded at a time
_NORMAL_SHAPE = (256, 768)


@dataclass(frozen=True)
class Divergence:
    """KL divergence of a model from another, in nats, over all positions of all chunks."""

    mean: float
    maximum: float
    same_top: float
    n_positions: int


def divergences(
    candidate: Path, references: Mapping[str, Path], text: str, *, n_chunks: int, n_ctx: int
) -> dict[str, Divergence]:
    """Return KL(reference ‖ candidate) for each of `references`, on the same tokens.

    Attention is computed in float32: llama.cpp's default rounds keys and values to float16, which
    alone makes 5e-7 between two spellings of SmolLM2 and 2e-6 of Gemma 3; in float32 it is 3e-12
    and 7e-7 (ggml looks GELU up in a float16 table).

    Parameters
    ----------
    text : its first ``n_chunks * n_ctx`` tokens are used; every chunk starts a new sequence, with
        BOS as its first token where the vocabulary wants one

    Raises
    ------
    ReferenceModelError
        The text is too short.
    """
    pairs: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in references}
    with ExitStack() as stack:
        model, *rest = (
            stack.enter_context(Model(path, n_ctx=n_ctx, exact_attention=True))
            for path in (candidate, *references.values())
        )
        others = dict(zip(references, rest, strict=True))
        tokens = model.tokenize(text, add_special=False)
        if len(tokens) < n_chunks * n_ctx:
            raise ReferenceModelError(
                f"text: too short; got {len(tokens)} tokens, expected {n_chunks} × {n_ctx}. "
                "Give a longer text."
            )
        for chunk in tokens[: n_chunks * n_ctx].reshape(n_chunks, n_ctx):
            if model.adds_bos:
                chunk[0] = model.bos
            seen = model.logits(chunk)
            for name, other in others.items():
                pairs[name].append(_compare(other.logits(chunk), seen))
    return {name: _summary(np.concatenate(parts)) for name, parts in pairs.items()}


def _compare(reference: Float32, candidate: Float32) -> npt.NDArray[np.float64]:
    """Return KL divergence and whether the top token is the same, (n_positions, 2) float64."""
    out = np.empty((len(reference), 2))
    for start in range(0, len(reference), _ROWS):
        rows = slice(start, start + _ROWS)
        p, q = (_log_softmax(logits[rows]) for logits in (reference, candidate))
        out[rows, 0] = np.sum(np.exp(p) * (p - q), axis=1)
        out[rows, 1] = p.argmax(axis=1) == q.argmax(axis=1)
    return out


def _log_softmax(logits: Float32) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _summary(pairs: npt.NDArray[np.float64]) -> Divergence:
    kld, same = pairs.T
    return Divergence(float(kld.mean()), float(kld.max()), float(same.mean()), len(kld))


def reencoding_error(weight: Float32, qtype: GGMLQuantizationType) -> float:
    """Return ‖W − decode(encode(W))‖ / ‖W‖ with ggml's encoder of `qtype`; 0 is lossless."""
    step = max(1, _WEIGHTS // weight.shape[1])
    error = norm = 0.0
    for start in range(0, len(weight), step):
        rows = np.ascontiguousarray(weight[start : start + step])
        packed = encode(rows, qtype).reshape(len(rows), -1)
        residue = (rows - quants.dequantize(packed, qtype)).astype(np.float64)
        error += float(np.vdot(residue, residue))
        norm += float(np.sum(np.square(rows, dtype=np.float64)))
    return float(np.sqrt(error / norm))


def normal_error(qtype: GGMLQuantizationType) -> float:
    """Return the error of re-encoding weights that never were on a grid: normal numbers."""
    weight = np.random.default_rng(0).standard_normal(_NORMAL_SHAPE).astype(np.float32)
    return reencoding_error(weight, qtype)
