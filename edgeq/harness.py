"""The model class ``edgeq`` of lm-evaluation-harness: GGUF files in this process.

The harness (0.4.9 and 0.4.13 were read) has no entry points for models, so its own command does not
find the class. This module is that command with the class registered:

    python -m edgeq.harness --model edgeq --model_args path=m.gguf,n_ctx=2048 --tasks piqa

From Python, import it before ``lm_eval.simple_evaluate(model="edgeq", ...)``.

Context and continuation are parted, cut and scored as in the harness's ``HFLM``. One difference: in
a rolling log-likelihood the vocabulary's own BOS is what the text follows, not also a token of it.
"""

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import numpy as np

from converters.errors import ConversionError
from converters.gguf_file import GgufFile, open_gguf
from cpu_kernels.divergence import log_sum_exp
from edgeq.errors import CalibrationError, EdgeqError, EvaluationError
from edgeq.runtime.model import Model, Tokens
from edgeq.texts.chat_template import ChatTemplate, Message

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    HAS_LM_EVAL = True
except ModuleNotFoundError as _error:
    if (_error.name or "").partition(".")[0] != "lm_eval":
        raise
    HAS_LM_EVAL, TemplateLM, register_model = False, object, lambda _name: lambda cls: cls

N_CTX, N_SEQ = 2048, 4  # tokens of a text; texts of one context that are decoded together
N_BATCH = 512  # tokens decoded at a time: logits of 2048 would take a gigabyte
MAX_GEN_TOKS = 256  # HFLM's
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_HARMLESS = ("top_k", "top_p", "min_p")  # the most likely token is always among these
_logger = logging.getLogger(__name__)

Answer = tuple[float, bool]
Pair = tuple[list[int], list[int]]  # tokens of the context, of the continuation


def _missing() -> EvaluationError:
    return EvaluationError(
        "edgeq.harness: lm-eval is not installed. Install it with: pip install 'edgeq[eval]'"
    )


@register_model("edgeq")
class EdgeqLM(TemplateLM):  # type: ignore[misc]
    """A GGUF file that the harness asks.

    Parameters
    ----------
    path : GGUF file; of a split model the first part
    n_ctx : tokens that the model sees at most, longer texts lose their beginning; default what it
        was trained with, at most 2048
    n_threads : default all CPUs
    max_gen_toks : tokens to generate where a task does not say
    batch_size, max_batch_size, device : without effect; the harness gives them to every model, its
        command ``cuda:0`` unasked. A batch holds what shares a context, the device is the CPU.

    Raises
    ------
    EvaluationError
        A setting is wrong, or lm-eval is not installed.
    RuntimeLibraryError
        llama.cpp refused the file.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: object,
    ) -> None:
        if not HAS_LM_EVAL:
            raise _missing()
        super().__init__()
        for name in unknown:
            raise EvaluationError(
                f"model_args: unknown {name!r}; known: path, n_ctx, n_threads, max_gen_toks."
            )
        if not path:
            raise EvaluationError("model_args: no file. Give --model_args path=FILE.gguf.")
        _check_count("model_args: n_ctx", n_ctx, 2)
        _check_count("model_args: n_threads", n_threads, 1)
        _check_count("model_args: max_gen_toks", max_gen_toks, 1)
        with Model(str(path), vocab_only=True) as model:  # says what is wrong with a file
            shares = model.shares_tokens
        file = open_gguf(str(path))
        self.max_length = _context(file, n_ctx)
        self.max_gen_toks = max_gen_toks
        self._shares = shares
        self._template: ChatTemplate | None = None
        self._refuses_system = False
        n_seq = N_SEQ if shares else 1
        self._model = Model(str(path), n_ctx=self.max_length, n_seq=n_seq, n_threads=n_threads)
        bos, eos = (file.value(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
        if bos is None and self._model.adds_bos:
            bos = self._model.bos
        if bos is None and eos is None:  # llama.cpp's own default may be any token of the file
            self.close()
            raise EvaluationError(
                f"{path}: the vocabulary has neither a BOS nor an EOS token, expected one to begin "
                "texts with. Convert the file again."
            )
        self._prefix = int(eos if bos is None else bos)
        self._eot = int(bos if eos is None else eos)

    def close(self) -> None:
        """Free the model; calling it again does nothing."""
        self._model.close()

    # ---- what the harness asks of a vocabulary ---------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._eot

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without context follows: BOS, else EOS."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its cache of requests by: becomes part of a file's name."""
        return re.sub(r"[^\w.-]", "_", str(self._model.path))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Return tokens, special ones that the text spells included, as transformers does.

        The vocabulary's BOS comes first where it wants one and the text does not begin with it.
        """
        tokens = self._model.tokenize(string, add_special=False, parse_special=True).tolist()
        bos = self._model.bos
        if add_special_tokens is not False and self._model.adds_bos and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return [int(token) for token in tokens]

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        before, after = super()._encode_pair(context, continuation)
        return before or [self._prefix], after  # a context of spaces alone has no token

    # ---- chats -----------------------------------------------------------------------------------

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Choose the template that chats are rendered with, and return it for the results.

        Parameters
        ----------
        chat_template : False: none; True: the file's default one; else the name of one of its
            others, ``tokenizer.chat_template.NAME``

        Raises
        ------
        EvaluationError
            The file has no such template.
        """
        if chat_template is False or chat_template is None:
            return None
        name = chat_template if isinstance(chat_template, str) else None
        self._template, self._refuses_system = self._read_template(name), False
        return self._template.source

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as the text that the model was trained on, rendered in a sandbox.

        A template that refuses a system message gets the chat without it, as in ``HFLM``; the log
        says so once.

        Parameters
        ----------
        add_generation_prompt : end with what the answer follows; False: with the last message,
            which the model continues

        Raises
        ------
        EvaluationError
            The file has no template, or the template refuses the chat.
        """
        if self._template is None:
            self._template = self._read_template(None)
        chat = [dict(message) for message in chat_history]
        without = [message for message in chat if message["role"] != "system"]
        if not self._refuses_system:
            try:
                return self._render(self._template, chat, add_generation_prompt)
            except CalibrationError as error:
                if len(without) == len(chat):
                    raise EvaluationError(str(error)) from error
        try:
            text = self._render(self._template, without, add_generation_prompt)
        except CalibrationError as error:
            raise EvaluationError(str(error)) from error
        if not self._refuses_system:
            _logger.warning("the chat template refuses system messages; they are left out")
            self._refuses_system = True
        return text

    def _render(self, template: ChatTemplate, chat: list[Message], opens_answer: bool) -> str:
        (text,) = template.render([chat], opens_answer=opens_answer)
        if opens_answer:
            return text
        last = chat[-1]["content"].strip()
        found = text.rfind(last)
        if found < 0:
            raise CalibrationError(
                f"{self._model.path}: its chat template does not show the last message, "
                f"{last[:60]!r}, which the model is to continue. Leave out --apply_chat_template."
            )
        end = found + len(last)
        blanks = chat[-1]["content"][len(chat[-1]["content"].rstrip()) :]
        return text[: end + len(blanks)] if text.startswith(blanks, end) else text[:end]

    def _read_template(self, name: str | None) -> ChatTemplate:
        try:
            return ChatTemplate.from_gguf(self._model.path, name)
        except CalibrationError as error:
            raise EvaluationError(
                f"{self._model.path}: got no usable chat template{f' {name!r}' if name else ''}, "
                "expected one in the file. Leave out --apply_chat_template, or convert the model "
                "again with its tokenizer_config.json."
            ) from error

    # ---- log-likelihoods -------------------------------------------------------------------------

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return Σ ln p of each continuation, and whether greedy decoding would write it.

        Raises
        ------
        EvaluationError
            A continuation has no token, or more than the context holds.
        """
        for request in requests:
            if request.args == ("", ""):
                raise _nothing_to_score(("", ""))
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[Answer]:
        pairs = [self._cut(text, before, after) for text, before, after in requests]
        n_cut = sum(
            len(kept) < len(before)
            for (kept, _), (_, before, _) in zip(pairs, requests, strict=True)
        )
        if n_cut:
            _logger.warning(
                "%d of %d texts lost their beginning to n_ctx=%d",
                n_cut,
                len(requests),
                self.max_length,
            )
        answers: list[Answer] = [(0.0, False)] * len(requests)
        for group in _groups(pairs, N_SEQ if self._shares else 1):
            scores = self._score(pairs[group[0]][0], [pairs[i][1] for i in group])
            for i, answer in zip(group, scores, strict=True):
                answers[i] = answer
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return answers

    def _cut(self, text: tuple[str, str] | None, before: list[int], after: list[int]) -> Pair:
        if not after:
            raise _nothing_to_score(text)
        if len(after) > self.max_length:
            raise EvaluationError(
                f"{self._model.path}: a continuation of {len(after)} tokens; n_ctx is "
                f"{self.max_length}. Give a larger n_ctx."
            )
        return before[-(self.max_length + 1 - len(after)) :], after

    def _score(self, context: list[int], continuations: Sequence[list[int]]) -> list[Answer]:
        """Decode a context once and what follows it, each in its own sequence."""
        n, k = len(context), len(continuations)
        pieces = [context, *(after[:-1] for after in continuations)]
        lengths = [len(piece) for piece in pieces]
        tokens = np.concatenate([_tokens(piece) for piece in pieces])
        places = [np.arange(length) + (n if i else 0) for i, length in enumerate(lengths)]
        positions = np.concatenate(places).astype(np.int32)
        sequences = np.repeat([0, *range(k)], lengths).astype(np.int32)
        n_sequences = np.repeat([k] + [1] * k, lengths).astype(np.int32) if k > 1 else None
        wanted = np.arange(len(tokens)) >= n - 1
        # Of each token to foretell, where its logits are: the first of each after the context.
        firsts = n - 1 + np.cumsum([1, *lengths[1:-1]])
        where = np.concatenate(
            [[n - 1, *range(f, f + m)] for f, m in zip(firsts, lengths[1:], strict=True)]
        )
        foretold = np.concatenate([_tokens(after) for after in continuations])
        log_p, is_top = np.empty(len(where)), np.empty(len(where), np.bool_)
        self._model.clear()
        for start in range(0, len(tokens), N_BATCH):
            part = slice(start, start + N_BATCH)
            own = None if n_sequences is None else n_sequences[part]
            logits = self._model.decode(  # a view, which holds until the next call
                tokens[part], positions[part], sequences[part], wanted[part], own
            )
            if not len(logits):
                continue
            top = logits.argmax(axis=1).astype(np.int32)
            log_sums = log_sum_exp(logits, top)
            here = (where >= start) & (where < start + N_BATCH)
            rows = where[here] - max(start, n - 1)
            log_p[here] = logits[rows, foretold[here]] - log_sums[rows]
            is_top[here] = top[rows] == foretold[here]
        if not np.isfinite(log_p).all():
            raise self._broken()
        ends = np.cumsum([len(after) for after in continuations])[:-1]
        split = zip(np.split(log_p, ends), np.split(is_top, ends), strict=True)
        return [(float(values.sum()), bool(same.all())) for values, same in split]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return Σ ln p of all tokens of each text, each foretold once, from up to n_ctx before."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            found = get_rolling_token_windows(tokens, self._prefix, self.max_length, 1)
            windows += [(None, *make_disjoint_window(pair)) for pair in found]
            owners += [i] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (score, _) in zip(owners, scores, strict=True):
            totals[i] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ---- texts -----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what greedy decoding writes after each context, up to the first `until` string.

        Raises
        ------
        EvaluationError
            A task asks for sampling or another search, or for more tokens than n_ctx leaves.
        """
        asked = []
        for request in requests:
            context, settings = request.args
            until, n_tokens = _greedy(settings, self.max_gen_toks)
            n_room = self.max_length - n_tokens
            if n_room < 1:
                raise EvaluationError(
                    f"{self._model.path}: {n_tokens} tokens to generate; n_ctx is "
                    f"{self.max_length}. Give a larger n_ctx or fewer max_gen_toks."
                )
            tokens = (self.tok_encode(context) or [self._prefix])[-n_room:]
            asked.append((tokens, until, n_tokens))
        texts = [""] * len(requests)
        for i in sorted(range(len(asked)), key=lambda i: -len(asked[i][0])):
            texts[i] = self._write(*asked[i])
            self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def _write(self, context: list[int], until: Sequence[str], n_tokens: int) -> str:
        model, written, text = self._model, list[int](), ""
        model.clear()
        tokens, first = _tokens(context), 0
        while len(written) < n_tokens:
            n = len(tokens)
            wanted = np.arange(n) == n - 1
            positions = np.arange(first, first + n, dtype=np.int32)
            row = model.decode(tokens, positions, np.zeros(n, np.int32), wanted)[0]
            best = int(row.argmax())
            if not np.isfinite(row[best]):
                raise self._broken()
            if model.ends_text(best):
                break
            written.append(best)
            text = model.detokenize(_tokens(written))
            if any(ending in text for ending in until):
                break
            tokens, first = _tokens([best]), first + n
        for ending in until:
            text = text.split(ending)[0]
        return text

    def _broken(self) -> EvaluationError:
        return EvaluationError(
            f"{self._model.path}: NaN or infinite logits. The file is broken; convert it again."
        )


def _tokens(values: Sequence[int]) -> Tokens:
    return np.array(values, np.int32)


def _nothing_to_score(text: tuple[str, str] | None) -> EvaluationError:
    context, continuation = text or ("", "")
    return EvaluationError(
        f"task: the continuation {continuation[:60]!r} of {context[-60:]!r} adds no token, "
        "expected at least one. Mend the task."
    )


def _check_count(where: str, value: object, least: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise EvaluationError(
            f"{where}: got {value!r}, expected a whole number, {least} or more. Change it."
        )


def _context(file: GgufFile, n_ctx: int | None) -> int:
    trained = int(file.value(f"{file.architecture}.context_length", N_CTX))
    if n_ctx is None:
        return min(N_CTX, trained)
    if n_ctx > trained and "position_embd.weight" in file.tensors:  # llama.cpp ends the process
        raise EvaluationError(
            f"model_args: n_ctx: got {n_ctx}; {file.path} has {trained} positions. Give less."
        )
    return n_ctx


def _groups(pairs: Sequence[Pair], n_most: int) -> Iterator[list[int]]:
    """Yield indices of pairs that share their context, longest contexts first."""
    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), *pairs[i]))
    for _, same in groupby(order, key=lambda i: pairs[i][0]):
        found = list(same)
        for start in range(0, len(found), n_most):
            yield found[start : start + n_most]


def _greedy(settings: Mapping[str, Any], n_default: int) -> tuple[list[str], int]:
    """Return the strings that end a text and the most tokens; refuse what is not greedy."""
    left = dict(settings)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(ending, str) for ending in until):
        raise _refused("until", until, "a text or a list of texts")
    counts = {name: left.pop(name, None) for name in _MAX_TOKENS}
    given = [(name, n) for name, n in counts.items() if n is not None]
    name, n_tokens = given[0] if given else ("max_gen_toks", n_default)
    _check_count(f"generation_kwargs: {name}", n_tokens, 1)
    samples, temperature = left.pop("do_sample", None), left.pop("temperature", None)
    if samples:
        raise _refused("do_sample", samples, "false")
    if samples is None and temperature:  # with do_sample: false it has no effect
        raise _refused("temperature", temperature, "0")
    for name in left.keys() - set(_HARMLESS):
        raise _refused(name, left[name], "nothing: texts are written greedily")
    return [ending for ending in until if ending], n_tokens


def _refused(name: str, value: object, expected: str) -> EvaluationError:
    return EvaluationError(
        f"generation_kwargs: {name}: got {value!r}, expected {expected}. Change it in the task or "
        "with --gen_kwargs."
    )


def main() -> None:
    """Run lm-evaluation-harness's own command with the model ``edgeq`` registered."""
    try:
        if not HAS_LM_EVAL:
            raise _missing()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except (EdgeqError, ConversionError) as error:
        click.echo(f"edgeq: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
