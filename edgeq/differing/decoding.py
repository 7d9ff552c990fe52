"""The two sides of a comparison: their prompts as tokens, and their logits along a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeq.differing.prompts import Prompt
from edgeq.errors import CalibrationError, EvaluationError
from edgeq.runtime.model import Model, Tokens
from edgeq.texts.chat_template import ChatTemplate
from edgeq.texts.writing import N_SEQ, Logits, Reader, check_finite, cumulative


@dataclass(frozen=True)
class Side:
    """What is compared: a file, and the type of its KV cache."""

    path: Path
    cache: str = "f16"

    @property
    def name(self) -> str:
        """File and cache in words."""
        return self.path.name if self.cache == "f16" else f"{self.path.name}, KV cache {self.cache}"

    def open(self, n_ctx: int, n_threads: int | None) -> Model:
        """Load it for ``N_SEQ`` texts of `n_ctx` tokens at a time."""
        return Model(
            self.path,
            n_ctx=n_ctx,
            n_seq=N_SEQ,
            kv_unified=False,
            n_threads=n_threads,
            cache=self.cache,
        )


def read_tokens(path: Path, prompts: Sequence[Prompt], side: Side, *, chat: bool) -> list[Tokens]:
    """Return the tokens of the prompts of `path`, in the vocabulary of `side`.

    Raises
    ------
    EvaluationError
        A prompt has no tokens, or the file has no chat template that `chat` could use.
    """
    with Model(side.path, vocab_only=True) as model:
        try:
            template = ChatTemplate.from_gguf(side.path) if chat else None
            found = Reader(model, template).tokens([prompt.text for prompt in prompts])
        except CalibrationError as error:
            raise EvaluationError(f"--chat: {error}") from error
    for prompt, tokens in zip(prompts, found, strict=True):
        if not len(tokens):
            raise EvaluationError(f"{path}: line {prompt.line}: has no tokens. Mend the line.")
    return found


def along(model: Model, prompt: Tokens, written: Tokens) -> Logits:
    """Return the logits that foretell each token of a text, (n_written, n_vocab) float32.

    A view on llama.cpp's buffer: valid until the next call.
    """
    model.clear()
    tokens = np.concatenate([prompt, written[:-1]])
    wanted = np.arange(len(tokens)) >= len(prompt) - 1
    places = np.arange(len(tokens), dtype=np.int32)
    logits = model.decode(tokens, places, np.zeros_like(places), wanted)
    check_finite(model, logits)
    return logits


def same_sample(a: Logits, b: Logits, temperature: float) -> float:
    """Return how likely one uniform number stands for the same token in both rows of logits.

    Token i is drawn where the number lies between the cumulative probabilities before and behind
    it: the shares of [0, 1) where both intervals overlap, summed; no draw is needed.
    """
    one, other = cumulative(a, temperature), cumulative(b, temperature)
    before, behind = np.maximum(one[:-1], other[:-1]), np.minimum(one[1:], other[1:])
    first = min(float(one[0]), float(other[0]))
    return min(1.0, first + float(np.maximum(behind - before, 0).sum()))
