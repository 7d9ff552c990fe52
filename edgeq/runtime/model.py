"""One GGUF file loaded in llama.cpp: vocabulary, tokenization and logits."""

import ctypes
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.threads import available_cpus
from edgeq.errors import RuntimeLibraryError
from edgeq.runtime.library import load
from edgeq.runtime.observer import Observer

Tokens = npt.NDArray[np.int32]
CACHES = ("f16", "q8_0", "q4_0")  # types of keys and values that ``Model`` offers


class Model(AbstractContextManager["Model", None]):
    """A loaded GGUF file and, unless ``vocab_only``, one context on it. A context manager.

    Parameters
    ----------
    path : GGUF file; of a split model the first part
    n_ctx : tokens of one sequence
    n_seq : sequences that one batch may hold; the batch is ``n_ctx * n_seq`` tokens
    kv_unified : with several sequences, keep their keys and values in one buffer, as
        llama-perplexity does. Apart they are faster where each sequence adds one token a batch: a
        token then attends to its own sequence, not to a masked buffer of all.
    n_ubatch : tokens that one graph computes (llama.cpp's default, 512)
    n_threads : default: every CPU of this process
    cb_eval : sees the inputs of every weight product; ``decode`` raises what it raised
    repack : let ggml rearrange quantized weights for this CPU, in memory of its own; observers see
        the same products either way
    mmap : map the file; False reads it into writable memory
    vocab_only : load the vocabulary alone
    exact_attention : keep keys and values in float32 and attend without the fused kernel, which
        casts both to float16; slower. Otherwise two spellings of the same function differ by
        KL divergences around 1e-6.
    cache : one of CACHES, the type of keys and values; a quantized one needs the fused kernel, and
        heads whose width its blocks of 32 divide
    adapter : a LoRA adapter for the file, applied in full

    Raises
    ------
    RuntimeLibraryError
        llama.cpp refused the file, the adapter or the context; its own message is passed on.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        n_ctx: int = 512,
        n_seq: int = 1,
        kv_unified: bool = True,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        cb_eval: Observer | None = None,
        repack: bool = True,
        mmap: bool = True,
        vocab_only: bool = False,
        exact_attention: bool = False,
        cache: str = "f16",
        adapter: Path | None = None,
    ) -> None:
        self.path = Path(path)
        self._library = load()
        self._llama: Any = self._library.llama
        self._model: Any = None
        self._context: Any = None
        if not self.path.is_file():
            raise RuntimeLibraryError(f"{self.path}: no such file. Give the path of a GGUF file.")
        llama = self._llama
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = llama.LLAMA_LOAD_MODE_MMAP if mmap else llama.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = repack
        params.vocab_only = vocab_only
        self._library.clear_log()
        self._model = llama.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise RuntimeLibraryError(
                f"{self.path}: llama.cpp cannot load it: {self._library.last_error()}"
            )
        self._vocab = llama.llama_model_get_vocab(self._model)
        self.n_vocab: int = llama.llama_vocab_n_tokens(self._vocab)
        self.n_ctx = n_ctx
        self.n_seq = n_seq
        self._kv_unified = kv_unified and n_seq > 1
        self._exact_attention = exact_attention
        self._cache = cache
        self._adapter = None if adapter is None else self._read_adapter(adapter)
        if not vocab_only:
            self._open_context(n_ubatch, n_threads or available_cpus(), cb_eval)

    def _read_adapter(self, path: Path) -> Any:
        """Return an adapter; the model owns it, and contexts opened later have room for it."""
        found = self._llama.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not found:
            reason = self._library.last_error()
            self.close()
            raise RuntimeLibraryError(
                f"{path}: llama.cpp cannot apply it to {self.path}: {reason}. Give an adapter "
                "that was made for this file."
            )
        return found

    def _open_context(self, n_ubatch: int, n_threads: int, observer: Observer | None) -> None:
        llama = self._llama
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = self.n_ctx * self.n_seq
        params.n_ubatch = min(n_ubatch, self.n_ctx * self.n_seq)
        params.n_seq_max = self.n_seq
        params.kv_unified = self._kv_unified
        params.n_threads = params.n_threads_batch = n_threads
        params.no_perf = True
        if self._exact_attention:
            params.type_k = params.type_v = llama.GGML_TYPE_F32
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        elif self._cache != "f16":
            kind = {"q8_0": llama.GGML_TYPE_Q8_0, "q4_0": llama.GGML_TYPE_Q4_0}[self._cache]
            params.type_k = params.type_v = kind
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._observer = observer  # ctypes callbacks must outlive the context
        if observer is not None:
            params.cb_eval = observer.callback
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            reason = self._library.last_error()
            self.close()
            raise RuntimeLibraryError(
                f"{self.path}: no context of {self.n_ctx} × {self.n_seq} tokens: {reason}"
            )
        self._batch = llama.llama_batch_init(self.n_ctx * self.n_seq, 0, self.n_seq)
        if self._adapter is not None:
            one = (llama.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            llama.llama_set_adapters_lora(self._context, one, 1, (ctypes.c_float * 1)(1.0))

    @property
    def handle(self) -> Any:
        """The ``llama_model *``."""
        return self._model

    @property
    def adds_bos(self) -> bool:
        """Whether the vocabulary wants a beginning-of-sequence token."""
        return bool(self._llama.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> int:
        """The beginning-of-sequence token; -1 if there is none."""
        return int(self._llama.llama_vocab_bos(self._vocab))

    @property
    def rope(self) -> str | None:
        """Which channels of a head the positions rotate together.

        ``adjacent``: 2i and 2i + 1; ``halves``: i and i + half of the rotated ones; ``none``: no
        channel is rotated. None: otherwise.
        """
        llama = self._llama
        halves = (llama.LLAMA_ROPE_TYPE_NEOX, llama.LLAMA_ROPE_TYPE_MROPE)
        known = {
            llama.LLAMA_ROPE_TYPE_NONE: "none",
            llama.LLAMA_ROPE_TYPE_NORM: "adjacent",
            **dict.fromkeys((*halves, llama.LLAMA_ROPE_TYPE_IMROPE), "halves"),
        }
        return known.get(llama.llama_model_rope_type(self._model))

    def ends_text(self, token: int) -> bool:
        """Whether `token` ends what a model writes."""
        return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

    @property
    def shares_tokens(self) -> bool:
        """Whether a token may belong to several sequences; not where layers keep a state."""
        is_stateful = self._llama.llama_model_is_recurrent, self._llama.llama_model_is_hybrid
        return not any(ask(self._model) for ask in is_stateful)

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained with."""
        return int(self._llama.llama_model_n_ctx_train(self._model))

    def plain_tokens(self) -> Tokens:
        """Return the tokens that stand for text: no control, unused, user-made or byte tokens."""
        llama = self._llama
        attributes = np.array(
            [llama.llama_vocab_get_attr(self._vocab, token) for token in range(self.n_vocab)]
        )
        return np.flatnonzero(attributes & llama.LLAMA_TOKEN_ATTR_NORMAL).astype(np.int32)

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> Tokens:
        """Return the tokens of `text`, int32.

        `add_special` adds what the vocabulary wants around a text (BOS, EOS); `parse_special`
        reads special tokens spelled in the text, as chat templates need.
        """
        data = text.encode("utf-8")
        tokens = np.empty(len(data) + 8, np.int32)
        n = self._llama.llama_tokenize(
            self._vocab,
            data,
            len(data),
            tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            len(tokens),
            add_special,
            parse_special,
        )
        if n < 0:
            raise RuntimeLibraryError(f"{self.path}: cannot tokenize {len(data)} bytes of text")
        return tokens[:n].copy()

    def detokenize(self, tokens: Tokens, *, special: bool = False) -> str:
        """Return the text of `tokens`; `special` spells out special tokens."""
        tokens = np.ascontiguousarray(tokens, np.int32)
        size = 16 * len(tokens) + 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._llama.llama_detokenize(
                self._vocab,
                tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
                len(tokens),
                buffer,
                size,
                False,
                special,
            )
            if n >= 0:
                return buffer.raw[:n].decode("utf-8", "replace")
            size = -n

    def clear(self) -> None:
        """Forget every sequence."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def decode(
        self,
        tokens: Tokens,
        positions: Tokens,
        sequences: Tokens,
        wants_logits: npt.NDArray[np.bool_],
        n_sequences: Tokens | None = None,
    ) -> npt.NDArray[np.float32]:
        """Run one batch; the arguments are arrays of one entry a token.

        Parameters
        ----------
        sequences : to which a token belongs
        n_sequences : to how many, from that one on; default 1. More needs ``kv_unified`` and a
            model that ``shares_tokens``.

        Returns
        -------
        (n_wanted, n_vocab) float32 logits in batch order. A view on llama.cpp's buffer: valid
        until the next call.
        """
        n = len(tokens)
        batch = self._batch
        batch.n_tokens = n
        np.ctypeslib.as_array(batch.token, (n,))[:] = tokens
        np.ctypeslib.as_array(batch.pos, (n,))[:] = positions
        np.ctypeslib.as_array(batch.n_seq_id, (n,))[:] = 1 if n_sequences is None else n_sequences
        for i, sequence in enumerate(sequences.tolist()):
            batch.seq_id[i][0] = sequence
        if n_sequences is not None:
            for i in np.flatnonzero(n_sequences > 1).tolist():
                for more in range(1, int(n_sequences[i])):
                    batch.seq_id[i][more] = int(sequences[i]) + more
        np.ctypeslib.as_array(batch.logits, (n,))[:] = wants_logits
        if self._observer is None:
            status = self._llama.llama_decode(self._context, batch)
        else:
            with self._observer.holding_interrupts():
                status = self._llama.llama_decode(self._context, batch)
            self._observer.raise_error()
        if status != 0:
            raise RuntimeLibraryError(
                f"{self.path}: llama_decode of {n} tokens failed with status {status}: "
                f"{self._library.last_error()}"
            )
        n_wanted = int(np.count_nonzero(wants_logits))
        if n_wanted == 0:
            return np.empty((0, self.n_vocab), np.float32)
        logits = self._llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (n_wanted, self.n_vocab))

    def logits(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        """Return the logits after every token of one fresh sequence, (n_tokens, n_vocab)."""
        n = len(tokens)
        self.clear()
        return self.decode(
            tokens, np.arange(n, dtype=np.int32), np.zeros(n, np.int32), np.ones(n, np.bool_)
        )

    def close(self) -> None:
        """Free the context and the model; calling it again does nothing."""
        if self._context:
            self._llama.llama_batch_free(self._batch)
            self._llama.llama_free(self._context)
            self._context = None
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None

    def __exit__(self, *_error: object) -> None:
        self.close()
