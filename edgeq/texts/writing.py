"""Texts that a model writes after prompts.

Several prompts are decoded in one batch, each as a sequence of its own. The batch keeps its shape
to the end, even where a text ended earlier: in a batch of another shape llama.cpp's sums differ in
the last bit, and two equal files would part at a tie.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeq.errors import EvaluationError
from edgeq.runtime.model import Model, Tokens
from edgeq.texts.chat_template import ChatTemplate

N_SEQ = 8  # prompts in one batch
Doubles = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]


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


def write(
    model: Model,
    prompts: Sequence[Tokens],
    n_tokens: int,
    temperature: float = 0.0,
    uniforms: Doubles | None = None,
    *,
    has_ended: Callable[[int, Tokens], bool] | None = None,
) -> list[Tokens]:
    """Return what a model writes after each of up to ``N_SEQ`` prompts.

    Parameters
    ----------
    n_tokens : of each text, fewer where the model ends it; the ending token is its last
    temperature : 0 takes the most likely token
    uniforms : (n_prompts, n_tokens), in [0, 1): at each token the sampled one is where the
        cumulative distribution in the vocabulary's order exceeds this number
    has_ended : called with the index of a prompt and its text so far; nothing more is written once
        it said of every prompt that the text is long enough. None: only the model ends texts.

    Raises
    ------
    EvaluationError
        Logits are not finite.
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
    going = set(range(n))
    for step in range(n_tokens):
        if step:
            every = np.ones(n, np.bool_)
            logits = model.decode(written[:, step - 1], lengths + np.int32(step - 1), own, every)
        check_finite(model, logits)
        if temperature == 0 or uniforms is None:
            written[:, step] = logits.argmax(axis=1)
        else:
            written[:, step] = [
                sample(row, temperature, draw)
                for row, draw in zip(logits, uniforms[:, step], strict=True)
            ]
        texts = written[:, : step + 1]
        going -= {
            i
            for i in going
            if model.ends_text(int(texts[i, -1]))
            or (has_ended is not None and has_ended(i, texts[i]))
        }
        if not going:
            break
    return [_ended(model, tokens) for tokens in texts]


def _ended(model: Model, tokens: Tokens) -> Tokens:
    for place, token in enumerate(tokens.tolist()):
        if model.ends_text(token):
            return tokens[: place + 1]
    return tokens


def check_finite(model: Model, logits: Logits) -> None:
    """Refuse the logits of a broken file.

    Raises
    ------
    EvaluationError
        Some are NaN or infinite.
    """
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
