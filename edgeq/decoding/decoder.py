"""One file, loaded, with one sequence."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.gguf_file import open_gguf
from cpu_kernels.attention import LANES, CacheType, attend, rotate_and_store
from cpu_kernels.inputs import AS_IS, GELU, NORMALIZED, SILU, float_bits
from cpu_kernels.isa import chosen
from cpu_kernels.threads import Program, available_cpus
from cpu_kernels.tiles import ROWS, aligned_bytes
from edgeq.decoding.building import Builder, Inputs
from edgeq.decoding.shape import shape_of
from edgeq.decoding.weights import Floats, Tokens, Weights
from edgeq.errors import EvaluationError

CACHES = ("f16", "q8_0")
BATCH = 64  # tokens of a prompt that are computed together


class Decoder:
    """One file, loaded, with one sequence.

    Parameters
    ----------
    path : GGUF file
    n_ctx : tokens that the sequence may have
    n_threads : default: all CPUs of this process
    cache : f16 or q8_0, of keys and values

    Attributes
    ----------
    shape : the model's sizes
    n_vocab : tokens that there are
    position : tokens of the sequence so far
    weight_bytes : of the rearranged weights that a token reads

    Raises
    ------
    EvaluationError
        The model, or a tensor of it, is none that this decoder computes.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        n_ctx: int = 1024,
        n_threads: int | None = None,
        cache: str = "f16",
    ) -> None:
        if cache not in CACHES or n_ctx < 1:
            raise EvaluationError(
                f"decoder: got a cache of {n_ctx} × {cache}, expected at least one token of "
                f"{' or '.join(CACHES)}."
            )
        self._file = open_gguf(path)
        self.shape = shape_of(self._file)
        self.n_ctx = -(-n_ctx // BATCH) * BATCH
        self.n_threads = n_threads or available_cpus()
        self.position = 0
        if cache == "q8_0" and self.shape.head_dim % 32:
            raise EvaluationError(
                f"{self._file.path}: heads of {self.shape.head_dim} numbers are no whole number of "
                "Q8_0's blocks of 32. Use a cache of f16."
            )
        self._isa = chosen()
        self._cache = CacheType(self._isa, is_bytes=cache == "q8_0")
        self._read = Weights(self._file, self.n_threads)
        self.n_vocab = self._file.tensors["token_embd.weight"].shape[0]
        self._state = np.zeros(2, np.int64)
        self._make_memory()
        self._programs: dict[int, tuple[Program, Program]] = {}
        self._programs[1] = self._program(1)
        self._read.check_all_used()
        self.weight_bytes = self._read.n_bytes

    def clear(self) -> None:
        """Forget the sequence."""
        self.position = 0

    def decode(self, tokens: npt.ArrayLike) -> Floats:
        """Append tokens and return the logits after the last, (n_vocab,) float32, a copy.

        Raises
        ------
        EvaluationError
            There is no token, one is none of the vocabulary, or the sequence is full.
        """
        given = self._checked(tokens)
        for start, n in self._parts(len(given)):
            self._forward(given[start : start + n])
        self._head(n, last=True)
        return self._logits[0, : self.n_vocab].copy()

    def logits(self, tokens: npt.ArrayLike) -> Floats:
        """Append tokens and return the logits after each, (n_tokens, n_vocab) float32.

        Raises
        ------
        EvaluationError
            As ``decode``.
        """
        given = self._checked(tokens)
        found = np.empty((len(given), self.n_vocab), np.float32)
        for start, n in self._parts(len(given)):
            self._forward(given[start : start + n])
            self._head(n, last=False)
            found[start : start + n] = self._logits[:n, : self.n_vocab]
        return found

    def generate(self, prompt: npt.ArrayLike, n_tokens: int) -> Tokens:
        """Return the most probable continuation of a prompt, (n_tokens,) int32."""
        found = np.empty(n_tokens, np.int32)
        token: npt.ArrayLike = prompt
        for i in range(n_tokens):
            found[i] = int(np.argmax(self.decode(token)))
            token = found[i : i + 1]
        return found

    def _checked(self, tokens: npt.ArrayLike) -> Tokens:
        given = np.asarray(tokens, np.int32).reshape(-1)
        if not len(given) or given.min() < 0 or given.max() >= self.n_vocab:
            raise EvaluationError(
                f"{self._file.path}: got {len(given)} tokens, expected at least one, each from 0 "
                f"to {self.n_vocab - 1}."
            )
        if self.position + len(given) > self.n_ctx:
            raise EvaluationError(
                f"{self._file.path}: {self.position + len(given)} tokens do not fit n_ctx "
                f"{self.n_ctx}. Raise it."
            )
        return given

    def _parts(self, n_tokens: int) -> list[tuple[int, int]]:
        """Cut tokens into batches that there is a program for: (first, number)."""
        widest = self._isa.max_columns
        sizes = sorted({BATCH, widest, *self._programs, 1}, reverse=True)
        parts, start = [], 0
        while start < n_tokens:
            n = next(size for size in sizes if size <= n_tokens - start)
            parts.append((start, n))
            start += n
        return parts

    def prepare(self, n: int) -> None:
        """Compile for batches of n tokens, at most BATCH (others are made of 64, 8 and 1)."""
        if not 1 <= n <= BATCH:
            raise EvaluationError(f"decoder: got batches of {n}, expected 1 to {BATCH}.")
        if n not in self._programs:
            self._programs[n] = self._program(n)

    def _forward(self, tokens: Tokens) -> None:
        n = len(tokens)
        self.prepare(n)
        rows = self._read.embedding(tokens)
        if self.shape.is_gemma:
            rows = rows * np.float32(math.sqrt(self.shape.n_embd))
        self._x[:n, : self.shape.n_embd] = rows
        self._state[:] = n, self.position
        self._programs[n][0].run()
        self.position += n

    def _head(self, n: int, *, last: bool) -> None:
        """Compute the logits of the last batch of n tokens, or of its last one."""
        if last and n > 1:
            self._x[0] = self._x[n - 1]
            n = 1
        self._programs[n][1].run()
        cap = float(self._file.value(f"{self.shape.architecture}.final_logit_softcapping", 0.0))
        if cap > 0:
            logits = self._logits[:n]
            np.multiply(np.tanh(logits / cap), cap, out=logits)

    def _make_memory(self) -> None:
        shape = self.shape
        n_kv = shape.n_kv_heads * shape.head_dim

        def rows(n: int) -> Floats:
            return np.zeros((BATCH, -(-n // ROWS) * ROWS), np.float32)

        self._x, self._normed, self._out = (rows(shape.n_embd) for _ in range(3))
        self._q, self._attended = (rows(shape.n_heads * shape.head_dim) for _ in range(2))
        self._k, self._v = rows(n_kv), rows(n_kv)
        n_ff = self._file.tensors["blk.0.ffn_up.weight"].shape[0]
        self._gate, self._up, self._hidden = (rows(n_ff) for _ in range(3))
        self._logits = rows(self.n_vocab)
        self._inputs: Inputs = {}
        self._scratch = aligned_bytes(256 * self.n_threads)
        self._scores = np.zeros((self.n_threads, self.n_ctx + 4 * LANES), np.float32)
        n_numbers = shape.n_layers * self.n_ctx * n_kv
        size = self._cache.element_bytes
        self._keys, self._values = (aligned_bytes(n_numbers * size) for _ in range(2))
        n_scales = n_numbers // 32 if self._cache.is_bytes else 0
        self._key_scales, self._value_scales = (aligned_bytes(4 * n_scales) for _ in range(2))
        self._tables = {
            base: self._rotations(base, scale)
            for base, scale in (
                (shape.local_base, 1.0),
                (shape.rope_base, shape.rope_scale),
            )
        }

    def _rotations(self, base: float, scale: float) -> Floats:
        """Return (n_ctx, n_rotated / 2, 2): cosine and sine of every pair at every position."""
        n = self.shape.n_rotated
        frequencies = base ** (-np.arange(0, n, 2) / n) * scale
        if "rope_freqs.weight" in self._file.tensors:
            frequencies /= self._read.floats("rope_freqs.weight")
        angles = np.arange(self.n_ctx)[:, None] * frequencies
        return np.stack([np.cos(angles), np.sin(angles)], axis=2).astype(np.float32)

    def _program(self, n: int) -> tuple[Program, Program]:
        """Return the programs of a batch of n tokens: layers, and logits."""
        builder = Builder(self._read, n, self._scratch, self._inputs)
        shape = self.shape
        for layer in range(shape.n_layers):
            self._layer(builder, layer)
        layers = Program(builder.operations, self.n_threads)
        head = Builder(self._read, n, self._scratch, self._inputs)
        output = "output.weight" if "output.weight" in self._file.tensors else "token_embd.weight"
        norm = self._read.vector("output_norm.weight")
        head.prepare([output], self._normed, shape.n_embd, NORMALIZED, self._x, norm, shape.epsilon)
        head.multiply(output, self._normed, self._logits)
        return layers, Program(head.operations, self.n_threads)

    def _layer(self, builder: Builder, layer: int) -> None:
        shape, read = self.shape, self._read
        prefix = f"blk.{layer}."

        def name(part: str) -> str:
            return f"{prefix}{part}.weight"

        qkv = [name("attn_q"), name("attn_k"), name("attn_v")]
        norm = read.vector(name("attn_norm"))
        eps = shape.epsilon
        builder.prepare(qkv, self._normed, shape.n_embd, NORMALIZED, self._x, norm, eps)
        for weight, out in zip(qkv, (self._q, self._k, self._v), strict=True):
            builder.multiply(weight, self._normed, out, meets=out is self._v)
        self._attention(builder, layer)
        output, post = name("attn_output"), name("post_attention_norm")
        self._back(builder, output, self._attended, post, shape.n_heads * shape.head_dim)
        pair = [name("ffn_gate"), name("ffn_up")]
        norm = read.vector(name("ffn_norm"))
        builder.prepare(pair, self._normed, shape.n_embd, NORMALIZED, self._x, norm, eps)
        builder.multiply(pair[0], self._normed, self._gate, meets=False)
        builder.multiply(pair[1], self._normed, self._up)
        down, post = name("ffn_down"), name("post_ffw_norm")
        how = GELU if shape.is_gemma else SILU
        n_ff = self._file.tensors[down].shape[1]
        self._back(builder, down, self._hidden, post, n_ff, how)

    def _back(
        self,
        builder: Builder,
        weight: str,
        values: Floats,
        post: str,
        n_in: int,
        how: int = AS_IS,
    ) -> None:
        """Add a product to the residual, normalized before where the model does so."""
        first, second = (self._gate, self._up) if how != AS_IS else (None, None)
        builder.prepare([weight], values, n_in, how, first, second, 0.0)
        if not self.shape.is_gemma:
            builder.multiply(weight, values, self._x, adds=True)
            return
        builder.multiply(weight, values, self._out)
        norm = self._read.vector(post)
        builder.add_normalized(self._x, self._out, norm, self.shape)

    def _attention(self, builder: Builder, layer: int) -> None:
        shape, read, prefix = self.shape, self._read, f"blk.{layer}."
        n_kv = shape.n_kv_heads * shape.head_dim
        first = layer * self.n_ctx * n_kv
        size = self._cache.element_bytes
        keys = self._keys.ctypes.data + first * size
        values = self._values.ctypes.data + first * size
        scales_at = 4 * (first // 32) if self._cache.is_bytes else 0
        key_scales = self._key_scales.ctypes.data + scales_at
        value_scales = self._value_scales.ctypes.data + scales_at
        table = self._tables[shape.local_base if shape.is_local(layer) else shape.rope_base]
        biases = [read.optional(f"{prefix}attn_{part}.bias") for part in ("q", "k", "v")]
        norms = [read.optional(f"{prefix}attn_{part}_norm.weight") for part in ("q", "k")]
        q, k, v, out = self._q, self._k, self._v, self._attended
        storing = [
            q.ctypes.data, k.ctypes.data, v.ctypes.data, q.shape[1], k.shape[1], v.shape[1],
            shape.n_heads, shape.n_kv_heads, shape.head_dim,
            shape.n_rotated, shape.architecture == "llama", table.ctypes.data,
            *norms, float_bits(shape.epsilon), keys, key_scales, values, value_scales, self.n_ctx,
            *biases, self._state.ctypes.data,
        ]  # fmt: skip
        builder.add(rotate_and_store, storing, self._cache)
        attending = [
            q.ctypes.data, q.shape[1], out.ctypes.data, out.shape[1],
            shape.n_heads, shape.n_kv_heads, shape.head_dim,
            keys, key_scales, values, value_scales, self.n_ctx,
            float_bits(shape.score_scale), float_bits(0.0),
            shape.window if shape.is_local(layer) else 0,
            self._scores.ctypes.data, self._scores.shape[1], self._state.ctypes.data,
        ]  # fmt: skip
        builder.add(attend, attending, self._cache)
