"""Compare a GGUF file with its reference, token by token, in one pass through llama.cpp."""

import base64
import dataclasses
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from edgeq.errors import EvaluationError
from edgeq.evaluation import chunks as chunking
from edgeq.evaluation.references import Reference
from edgeq.evaluation.statistics import Summary, summarize
from edgeq.evaluation.store import DEFAULT_CTX, Progress, chunks_of, open_model, open_reference
from edgeq.runtime.model import Model, Tokens

_ARRAYS: Mapping[str, str] = {
    "nll": "<f8",
    "nll_reference": "<f8",
    "kld": "<f8",
    "delta_p": "<f4",
    "top": "<i4",
    "top_reference": "<i4",
    "next_tokens": "<i4",
    "kld_bound": "<f8",
}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One file against one reference on one text; every array is (n_chunks, n_scored).

    Attributes
    ----------
    model, reference : paths as given
    reference_kind : "model", "base" (llama-perplexity's file) or "compact"
    n_ctx : tokens of one chunk, of which the second half is scored
    tokens_sha256 : of the chunks' tokens; equal for evaluations on the same text
    elapsed_s : wall time of the pass, without loading
    nll, nll_reference : float64, −ln p of the token that follows, nats
    kld : float64, divergence of the file from the reference, nats
    kld_bound : float64, |true divergence − kld| is at most this; None where the reference is
        complete
    delta_p : float32, change of the following token's probability
    top, top_reference : int32, most likely next token
    next_tokens : int32, the token that follows in the text
    chunks : (n_chunks, n_ctx) int32, the tokens of the text; None where a saved evaluation of an
        earlier release did not keep them
    """

    model: str
    reference: str
    reference_kind: str
    n_ctx: int
    tokens_sha256: str
    elapsed_s: float
    nll: npt.NDArray[np.float64]
    nll_reference: npt.NDArray[np.float64]
    kld: npt.NDArray[np.float64]
    kld_bound: npt.NDArray[np.float64] | None
    delta_p: npt.NDArray[np.float32]
    top: npt.NDArray[np.int32]
    top_reference: npt.NDArray[np.int32]
    next_tokens: npt.NDArray[np.int32]
    chunks: npt.NDArray[np.int32] | None = None

    @property
    def n_chunks(self) -> int:
        """The number of chunks."""
        return len(self.kld)

    @cached_property
    def summary(self) -> Summary:
        """The figures of the table."""
        return summarize(
            nll=self.nll,
            nll_reference=self.nll_reference,
            kld=self.kld,
            delta_p=self.delta_p,
            top=self.top,
            top_reference=self.top_reference,
            next_tokens=self.next_tokens,
            kld_bound=self.kld_bound,
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return one evaluation of several of the same file, on chunks that follow each other."""
        changed: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in (*_ARRAYS, "chunks")
            if all(getattr(part, name) is not None for part in parts)
        }
        changed["elapsed_s"] = sum(part.elapsed_s for part in parts)
        if "chunks" in changed:
            changed["tokens_sha256"] = chunking.digest(changed["chunks"])
        return dataclasses.replace(parts[0], **changed)

    def to_json(self, *, tokens: bool = True) -> dict[str, Any]:
        """Return JSON-ready values: the figures and, with `tokens`, all arrays losslessly.

        An array is base64 of zlib of its little-endian bytes.
        """
        values: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "model",
                "reference",
                "reference_kind",
                "n_ctx",
                "n_chunks",
                "tokens_sha256",
                "elapsed_s",
            )
        }
        values["summary"] = dataclasses.asdict(self.summary)
        if tokens:
            values["tokens"] = {
                name: base64.b64encode(zlib.compress(array.astype(kind).tobytes())).decode("ascii")
                for name, kind in {**_ARRAYS, "chunks": "<i4"}.items()
                if (array := getattr(self, name)) is not None
            }
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` gave with its arrays.

        Raises
        ------
        EvaluationError
            Something is missing or contradicts itself.
        """
        try:
            n_chunks, n_ctx = int(values["n_chunks"]), int(values["n_ctx"])
            shape = (n_chunks, chunking.n_scored(n_ctx))
            saved = values["tokens"]
            arrays: dict[str, Any] = {
                name: _unpacked(saved[name], kind, shape)
                for name, kind in _ARRAYS.items()
                if name != "kld_bound" or name in saved
            }
            if "chunks" in saved:
                arrays["chunks"] = _unpacked(saved["chunks"], "<i4", (n_chunks, n_ctx))
            return cls(
                model=str(values["model"]),
                reference=str(values["reference"]),
                reference_kind=str(values["reference_kind"]),
                n_ctx=n_ctx,
                tokens_sha256=str(values["tokens_sha256"]),
                elapsed_s=float(values["elapsed_s"]),
                kld_bound=arrays.pop("kld_bound", None),
                **arrays,
            )
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise EvaluationError(
                f"evaluation: not a complete saved evaluation ({error!r}). Evaluate again."
            ) from error


def _unpacked(text: str, kind: str, shape: tuple[int, int]) -> npt.NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), kind).reshape(shape)


def _agreed_chunks(
    model: Model, text: str | Tokens | None, reference: Reference, n_ctx: int, limit: int | None
) -> Tokens:
    stored = reference.chunks
    if stored is None:
        if text is None:
            raise EvaluationError("evaluate: no text. Give one, or a stored reference that has it.")
        return chunks_of(model, text, n_ctx, limit)
    stored = stored if limit is None else stored[:limit]
    if text is not None:
        given = chunks_of(model, text, n_ctx, len(stored))
        first = 1 if model.adds_bos else 0  # BOS takes the first token's place when it is run
        if not np.array_equal(given[:, first:], stored[:, first:]):
            raise EvaluationError(
                f"{reference.path}: was made of another text; got {len(stored)} chunks that differ "
                "from the text given. Leave the text out, or store the reference again."
            )
    return stored


def _context(reference: Reference, n_ctx: int | None) -> int:
    stored = reference.n_ctx
    if stored is None:
        return DEFAULT_CTX if n_ctx is None else n_ctx
    if n_ctx is not None and n_ctx != stored:
        raise EvaluationError(
            f"{reference.path}: was made with chunks of {stored} tokens, {n_ctx} asked for. Leave "
            "the context out, or store the reference again."
        )
    return stored


def evaluate(
    model_path: Path | str,
    text: str | Tokens | None,
    reference: Path | str,
    *,
    n_ctx: int | None = None,
    chunks: int | None = None,
    n_threads: int | None = None,
    adapter: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare a GGUF file with its reference on a text.

    Parameters
    ----------
    model_path : the file to judge
    text : text, or its tokens; None takes the stored reference's own
    reference : a GGUF file, which then runs in the same pass and is compared at float32; or
        what ``store_reference`` or ``llama-perplexity --kl-divergence-base`` wrote
    n_ctx : tokens of one chunk; default 512, or that of a stored reference
    chunks : at most so many
    n_threads : default all CPUs
    adapter : a LoRA adapter that the file to judge is run with
    progress : called with (chunks done, chunks in all)

    Raises
    ------
    EvaluationError
        Text too short; another vocabulary, context or text than the reference's; a damaged
        stored reference; logits that are not finite.
    RuntimeLibraryError
        llama.cpp refused a file.

    References
    ----------
    llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp, kl_divergence: the figures on a base
    file equal those that it prints.
    """
    path = Path(model_path)
    with ExitStack() as stack:
        opened = stack.enter_context(open_reference(Path(reference), n_threads))
        n_ctx = _context(opened, n_ctx)
        if n_ctx < chunking.MIN_CTX:
            raise EvaluationError(
                f"evaluate: n_ctx is {n_ctx}; the smallest is {chunking.MIN_CTX}."
            )
        model = stack.enter_context(open_model(path, n_ctx, n_threads, adapter))
        opened.check(model)
        agreed = _agreed_chunks(model, text, opened, n_ctx, chunks)
        opened.begin(n_ctx)
        started = time.perf_counter()
        arrays = run_chunks(model, opened, agreed, progress)
        return Evaluation(
            model=str(path),
            reference=str(reference),
            reference_kind=opened.kind,
            n_ctx=n_ctx,
            tokens_sha256=chunking.digest(agreed),
            elapsed_s=time.perf_counter() - started,
            next_tokens=chunking.next_tokens(agreed),
            chunks=agreed,
            **arrays,
        )


def run_chunks(
    model: Model, reference: Reference, chunks: Tokens, progress: Progress | None
) -> dict[str, Any]:
    """Return the per-token arrays of ``Evaluation`` for a model that is open."""
    shape = (len(chunks), chunking.n_scored(chunks.shape[1]))
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.empty(shape, kind) for name, kind in _ARRAYS.items() if name != "next_tokens"
    }
    following = chunking.next_tokens(chunks)
    done = 0
    for batch in chunking.batches(chunks, model.bos if model.adds_bos else None):
        reference.prepare(batch)
        logits = batch.run(model)
        for segment in batch.segments:
            place = segment.place
            rows, bound = reference.compare(segment, logits[segment.rows], following[place])
            if not np.isfinite(rows.kld).all():
                raise EvaluationError(
                    f"{model.path}: NaN or infinite logits in chunk {segment.chunk}, in this file "
                    f"or in {reference.path}. One of them is broken."
                )
            for field in dataclasses.fields(rows):
                arrays[field.name][place] = getattr(rows, field.name)
            arrays["kld_bound"][place] = bound
            if place[1].stop == shape[1]:
                done += 1
                if progress is not None:
                    progress(done, len(chunks))
    if reference.kind != "compact":
        arrays.pop("kld_bound")
        return {**arrays, "kld_bound": None}
    return arrays
