"""Texts that a model writes after prompts, and its logits along a given text.

Several prompts are decoded in one batch, each as a sequence of its own. The batch keeps its shape
to the end, even where a text ended earlier: in a batch of another shape llama.cpp's sums differ in
the last bit, and two equal files would part at a tie.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeq.differing.prompts import Prompt
from edgeq.errors import CalibrationError, EvaluationError
from edgeq.runtime.model import Model, Tokens
from edgeq.texts.chat_template import ChatTemplate

N_SEQ = 8  # prompts in one batch
Doubles = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]


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


@dataclass(frozen=True)
class Reader:
    """How the texts of prompts become tokens.

    Attributes
    ----------
    model : whose vocabulary is used
    template : wraps each prompt as a user's message; None: as it is
    """

    model: Model
    template: ChatTemplate | None = None

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each text."""
        if self.template is None:
            return [self.model.tokenize(text) for text in texts]
        talks = [[{"role": "user", "content": text}] for text in texts]
        rendered = self.template.render(talks, opens_answer=True)
        found = [self.model.tokenize(text, parse_special=True) for text in rendered]
        twice = [self.model.bos] * 2  # once from the template, once from the vocabulary
        return [tokens[1:] if tokens[:2].tolist() == twice else tokens for tokens in found]


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


def write(
    model: Model,
    prompts: Sequence[Tokens],
    n_tokens: int,
    temperature: float = 0.0,
    uniforms: Doubles | None = None,
) -> list[Tokens]:
    """Return what a model writes after each of up to ``N_SEQ`` prompts.

    Parameters
    ----------
    n_tokens : of each text, fewer where the model ends it; the ending token is its last
    temperature : 0 takes the most likely token
    uniforms : (n_prompts, n_tokens), in [0, 1): at each token the sampled one is where the
        cumulative distribution in the vocabulary's order exceeds this number
    """
    model.clear()
    n = len(prompts)
    own = np.arange(n, dtype=np.int32)
    lengths = np.array([len(tokens) for tokens in prompts], np.int32)
    ends = np.cumsum(lengths)
    wanted = np.zeros(int(ends[-1]), np.bool_)
    wanted[ends - 1] = True
    positions = np.concatenate([np.arange(k, dtype=np.int32) for k in lengths])
    logits = model.decode(np.concatenate(prompts), positions, np.repeat(own, lengths), wanted)
    written = np.empty((n, n_tokens), np.int32)
    for step in range(n_tokens):
        if step:
            every = np.ones(n, np.bool_)
            logits = model.decode(written[:, step - 1], lengths + np.int32(step - 1), own, every)
        _check(model, logits)
        if temperature == 0 or uniforms is None:
            written[:, step] = logits.argmax(axis=1)
        else:
            written[:, step] = [
                sample(row, temperature, draw)
                for row, draw in zip(logits, uniforms[:, step], strict=True)
            ]
    return [_ended(model, tokens) for tokens in written]


def _ended(model: Model, tokens: Tokens) -> Tokens:
    for place, token in enumerate(tokens.tolist()):
        if model.ends_text(token):
            return tokens[: place + 1]
    return tokens


def along(model: Model, prompt: Tokens, written: Tokens) -> Logits:
    """Return the logits that foretell each token of a text, (n_written, n_vocab) float32.

    A view on llama.cpp's buffer: valid until the next call.
    """
    model.clear()
    tokens = np.concatenate([prompt, written[:-1]])
    wanted = np.arange(len(tokens)) >= len(prompt) - 1
    places = np.arange(len(tokens), dtype=np.int32)
    logits = model.decode(tokens, places, np.zeros_like(places), wanted)
    _check(model, logits)
    return logits


def _check(model: Model, logits: Logits) -> None:
    if not np.isfinite(logits).all():
        raise EvaluationError(
            f"{model.path}: NaN or infinite logits. The file is broken; convert it again."
        )


def cumulative(logits: Logits, temperature: float) -> Doubles:
    """Return the cumulative distribution of a row of logits, in the vocabulary's order."""
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    sums: Doubles = np.cumsum(np.exp(scaled))
    sums /= sums[-1]
    return sums


def sample(logits: Logits, temperature: float, uniform: float) -> int:
    """Return the token that a uniform number stands for."""
    return int(np.searchsorted(cumulative(logits, temperature), uniform, side="right"))


def same_sample(a: Logits, b: Logits, temperature: float) -> float:
    """Return how likely one uniform number stands for the same token in both rows of logits.

    Token i is drawn where the number lies between the cumulative probabilities before and behind
    it: the shares of [0, 1) where both intervals overlap, summed; no draw is needed.
    """
    one, other = cumulative(a, temperature), cumulative(b, temperature)
    before, behind = np.maximum(one[:-1], other[:-1]), np.minimum(one[1:], other[1:])
    first = min(float(one[0]), float(other[0]))
    return min(1.0, first + float(np.maximum(behind - before, 0).sum()))
