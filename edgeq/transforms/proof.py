"""The proof that folds keep a model's function: KL divergence through llama.cpp."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from converters.gguf_file import GgufFile, TensorSource, write_gguf
from converters.output import replacing
from cpu_kernels.divergence import divergence
from edgeq.errors import EvaluationError, RecipeError
from edgeq.runtime.model import Model, Tokens
from edgeq.transforms.scales import apply, tensor_scales
from edgeq.transforms.sites import FloatArray, FoldSite

_PROVEN_TOKENS = 64
_SAME = 1e-4  # nats; float32 products in another order make 1e-6, ggml's float16 tables 1e-5


def check_preserved(before: Path | str, after: Path | str, tokens: Tokens) -> float:
    """Return the mean KL divergence of `after` from `before`, nats a token.

    Keys and values are kept in float32: llama.cpp's float16 alone makes 1e-6 between two spellings
    of one function. Where ggml looks GELU up in a float16 table, folds of the norm before it still
    leave up to 1e-6, because sums that are rounded otherwise fall to the other side of an entry.

    Parameters
    ----------
    before, after : GGUF files with the same vocabulary
    tokens : (n,) or (n_chunks, n) int32; every row is a sequence of its own, run as it is

    Raises
    ------
    EvaluationError
        The vocabularies differ, there is no token, or the logits are not finite.
    RuntimeLibraryError
        llama.cpp refuses a file.
    """
    rows = np.atleast_2d(tokens)
    if rows.size == 0:
        raise EvaluationError(f"{after}: no token to compare it on. Give at least one.")
    n_ctx = rows.shape[1]
    with (
        Model(before, n_ctx=n_ctx, exact_attention=True) as reference,
        Model(after, n_ctx=n_ctx, exact_attention=True) as candidate,
    ):
        if reference.n_vocab != candidate.n_vocab:
            raise EvaluationError(
                f"{after}: a vocabulary of {candidate.n_vocab} tokens, expected "
                f"{reference.n_vocab} as in {before}. Compare files of one model."
            )
        if rows.min() < 0 or rows.max() >= reference.n_vocab:
            raise EvaluationError(
                f"{before}: tokens from {rows.min()} to {rows.max()}, expected 0 to "
                f"{reference.n_vocab - 1}. Tokenize with this model's vocabulary."
            )
        nobody = np.zeros(n_ctx, np.int32)  # which token follows does not matter here
        means = [
            divergence(reference.logits(row), candidate.logits(row), nobody).kld.mean()
            for row in rows
        ]
    kld = float(np.mean(means))
    if not np.isfinite(kld):
        raise EvaluationError(
            f"{after}: the KL divergence from {before} is {kld}; one of them gives logits that "
            "are not finite. Fold with smaller scales."
        )
    return kld


def write_folded(
    file: GgufFile, path: Path | str, scales: Mapping[FoldSite, FloatArray]
) -> list[Path]:
    """Write a copy of a model with folded weights; the changed tensors are stored as F32.

    Returns
    -------
    The written files.

    Raises
    ------
    RecipeError
        A fold is refused, or its scales do not fit.
    ConversionError
        The file cannot be written.
    """
    folded = tensor_scales(file, scales)

    def changed(name: str) -> Callable[[], FloatArray] | None:
        scales = folded.get(name)
        return None if scales is None else lambda: apply(file.read_float(name), scales)

    sources = [source_of(file, name, changed(name)) for name in file.tensors]
    return write_gguf(path, file.fields, sources)


def write_proven(
    file: GgufFile, path: Path, sources: Sequence[TensorSource], how: str, *, seed: int = 0
) -> None:
    """Write a model in other weights, if llama.cpp computes the same function from them.

    Parameters
    ----------
    how : what was done to it, for the message
    seed : of the tokens that it is tried on

    Raises
    ------
    RecipeError
        The function changed; what was at `path` stays then.
    ConversionError
        The file cannot be written.
    """
    n_vocab = file.tensors["token_embd.weight"].shape[0]
    tokens = np.random.default_rng(seed).integers(0, n_vocab, _PROVEN_TOKENS).astype(np.int32)
    with replacing(path) as unproven:
        write_gguf(unproven, file.fields, sources)
        kld = check_preserved(file.path, unproven, tokens)
        if not kld < _SAME:
            raise RecipeError(
                f"{file.path}: {how}, it is {kld:.2g} nats from itself, expected below {_SAME:g}. "
                "Use it as it is, and report this model to edgeq's developers."
            )


def source_of(file: GgufFile, name: str, changed: Callable[[], FloatArray] | None) -> TensorSource:
    """Return a tensor to write: as F32 what `changed` gives; None: as the file has it."""
    info = file.tensors[name]
    if changed is None:
        return TensorSource(name, info.qtype, info.shape, lambda: file.read_bytes(name))
    return TensorSource(name, GGMLQuantizationType.F32, info.shape, changed)
