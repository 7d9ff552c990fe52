"""A decoder on our kernels: one sequence, one GGUF file, one program a token.

It computes what llama.cpp computes for four families of models, on weights that are rearranged once
at load: the proof that the kernels' speed is that of a whole model. Files, tokens and judgement
stay with llama.cpp.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from converters.gguf_file import GgufFile, open_gguf
from cpu_kernels.attention import LANES, CacheType, attend, rotate_and_store
from cpu_kernels.inputs import (
    AS_IS,
    GELU,
    KINDS,
    NORMALIZED,
    SILU,
    InputLayout,
    add_normalized,
    float_bits,
    quantize_arguments,
    quantize_at,
)
from cpu_kernels.isa import chosen
from cpu_kernels.products import (
    ProductType,
    aligned_bytes,
    groups_of,
    multiply,
    multiply_floats,
    product_arguments,
)
from cpu_kernels.threads import Operation, Program, address_of, available_cpus
from cpu_kernels.tiles import ROWS, Tiles, rearrange, tile_shape
from edgeq.errors import EvaluationError
from edgeq.runtime.encoders import decode

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
CACHES = ("f16", "q8_0")
BATCH = 64  # tokens of a prompt that are computed together
_T = GGMLQuantizationType
_FLOATS = (_T.F32, _T.F16, _T.BF16)
_Inputs = dict[tuple[int, str, int, int], npt.NDArray[np.int8]]  # quantized, by what they are for
_GEMMA3_27B = 62  # layers: its scores have another scale


@dataclass(frozen=True)
class Shape:
    """A model's sizes and numbers, from its metadata.

    Attributes
    ----------
    architecture : one of ARCHITECTURES
    n_layers, n_embd, n_heads, n_kv_heads, head_dim : as in llama.cpp's hyperparameters
    n_rotated : numbers of a head that are rotated
    epsilon : of the root mean squares
    rope_base, rope_scale : of the rotation; `local_base` of layers with a window
    window, pattern : positions seen by all but every `pattern`-th layer; 0: all
    score_scale : of the products of queries and keys
    """

    architecture: str
    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_rotated: int
    epsilon: float
    rope_base: float
    rope_scale: float
    local_base: float
    window: int
    pattern: int
    score_scale: float

    @property
    def is_gemma(self) -> bool:
        """Whether it scales its embedding, normalizes twice and uses GELU."""
        return self.architecture == "gemma3"

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees a window only."""
        return self.window > 0 and layer % self.pattern < self.pattern - 1


def shape_of(file: GgufFile) -> Shape:
    """Read a model's sizes.

    Raises
    ------
    EvaluationError
        The architecture, or something in it, is none that this decoder computes.
    """
    name = file.architecture
    if name not in ARCHITECTURES:
        raise EvaluationError(
            f"{file.path}: the kernels' decoder does not run {name}; it runs "
            f"{', '.join(ARCHITECTURES)}. Use llama.cpp."
        )

    def value(key: str, default: Any = None) -> Any:
        found = file.value(f"{name}.{key}", default)
        if found is None:
            raise EvaluationError(f"{file.path}: {name}.{key} is missing. The file is damaged.")
        return found

    scaling = value("rope.scaling.type", "none")
    for key, wanted in (("expert_count", 0), ("attn_logit_softcapping", 0.0)):
        if value(key, wanted) != wanted:
            raise EvaluationError(
                f"{file.path}: the kernels' decoder knows no {name}.{key} = {value(key)}. "
                "Use llama.cpp."
            )
    if scaling not in ("none", "linear"):
        raise EvaluationError(
            f"{file.path}: the kernels' decoder knows no rope.scaling.type = {scaling}. "
            "Use llama.cpp."
        )
    n_embd, n_heads = int(value("embedding_length")), int(value("attention.head_count"))
    n_layers = int(value("block_count"))
    head_dim = int(value("attention.key_length", n_embd // n_heads))
    wide = n_embd // n_heads if name == "gemma3" and n_layers == _GEMMA3_27B else head_dim
    shape = Shape(
        architecture=name,
        n_layers=n_layers,
        n_embd=n_embd,
        n_heads=n_heads,
        n_kv_heads=int(value("attention.head_count_kv", n_heads)),
        head_dim=head_dim,
        n_rotated=int(value("rope.dimension_count", head_dim)),
        epsilon=float(value("attention.layer_norm_rms_epsilon")),
        rope_base=float(value("rope.freq_base", 1e6 if name == "gemma3" else 1e4)),
        rope_scale=1 / float(value("rope.scaling.factor", 1.0)) if scaling == "linear" else 1.0,
        local_base=float(value("rope.freq_base_swa", 1e4)),
        window=int(value("attention.sliding_window", 0)) if name == "gemma3" else 0,
        pattern=int(value("attention.sliding_window_pattern", 6)) if name == "gemma3" else 1,
        score_scale=1 / math.sqrt(wide),
    )
    if shape.head_dim % LANES or value("attention.value_length", head_dim) != head_dim:
        raise EvaluationError(
            f"{file.path}: heads of {head_dim} numbers; the kernels' decoder needs a multiple of "
            f"{LANES}, the same for keys and values. Use llama.cpp."
        )
    return shape


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
        self._read = _Weights(self._file)
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
        self._inputs: _Inputs = {}
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
        builder = _Builder(self._read, n, self._scratch, self._inputs)
        shape = self.shape
        for layer in range(shape.n_layers):
            self._layer(builder, layer)
        layers = Program(builder.operations, self.n_threads)
        head = _Builder(self._read, n, self._scratch, self._inputs)
        output = "output.weight" if "output.weight" in self._file.tensors else "token_embd.weight"
        norm = self._read.vector("output_norm.weight")
        head.prepare([output], self._normed, shape.n_embd, NORMALIZED, self._x, norm, shape.epsilon)
        head.multiply(output, self._normed, self._logits)
        return layers, Program(head.operations, self.n_threads)

    def _layer(self, builder: "_Builder", layer: int) -> None:
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
        builder: "_Builder",
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

    def _attention(self, builder: "_Builder", layer: int) -> None:
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


class _Weights:
    """A file's tensors, each read and rearranged once."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._tiles: dict[str, Tiles] = {}
        self._floats: dict[str, Floats] = {}
        self._used = {"token_embd.weight", "rope_freqs.weight"}
        self._embedding = file.read_bytes("token_embd.weight")
        # one memory, in the order of the program: a stream of reads goes on from weight to weight
        self._memory = aligned_bytes(sum(math.prod(self._shape(name)) for name in self._matrices()))
        self._end = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights that a token reads."""
        matrices = [one.data.nbytes for one in self._tiles.values()]
        return sum(matrices) + sum(one.nbytes for one in self._floats.values())

    def _matrices(self) -> list[str]:
        """Return the names of the weights that are rearranged."""
        unused = "token_embd.weight" if "output.weight" in self._file.tensors else ""
        return [
            name
            for name, tensor in self._file.tensors.items()
            if len(tensor.shape) == 2 and tensor.qtype not in _FLOATS and name != unused
        ]

    def _shape(self, name: str) -> tuple[int, int]:
        tensor = self._file.tensors[name]
        try:
            return tile_shape(tensor.qtype, tensor.shape[0], tensor.shape[1], chosen())
        except ValueError as error:
            raise EvaluationError(f"{self._file.path}: {name}: {error}") from error

    def embedding(self, tokens: Tokens) -> Floats:
        """Return rows of the embedding, (n, n_embd)."""
        qtype = self._file.tensors["token_embd.weight"].qtype
        return decode(np.ascontiguousarray(self._embedding[tokens]), qtype, n_threads=1)

    def weight(self, name: str) -> Tiles | Floats:
        """Return a matrix."""
        self._used.add(name)
        tensor = self._file.tensors.get(name)
        if tensor is None:
            raise EvaluationError(f"{self._file.path}: {name} is missing. The file is damaged.")
        if tensor.qtype in _FLOATS:
            return self.floats(name)
        if name not in self._tiles:
            shape = self._shape(name)
            start, self._end = self._end, self._end + math.prod(shape)
            place = self._memory[start : self._end].view(np.uint8).reshape(shape)
            packed = self._file.read_bytes(name)
            try:
                self._tiles[name] = rearrange(tensor.qtype, packed, chosen(), place)
            except ValueError as error:
                raise EvaluationError(f"{self._file.path}: {name}: {error}") from error
        return self._tiles[name]

    def floats(self, name: str) -> Floats:
        """Return a tensor of floats."""
        self._used.add(name)
        if name not in self._floats:
            if name not in self._file.tensors:
                raise EvaluationError(f"{self._file.path}: {name} is missing. The file is damaged.")
            self._floats[name] = np.ascontiguousarray(self._file.read_float(name), np.float32)
        return self._floats[name]

    def vector(self, name: str) -> Floats:
        """Return a vector, of norms or biases."""
        return self.floats(name)

    def optional(self, name: str) -> int:
        """Return the address of a vector, 0 where the file has none."""
        return self.floats(name).ctypes.data if name in self._file.tensors else 0

    def check_all_used(self) -> None:
        """Refuse a file with tensors that the program does not know."""
        unused = sorted(set(self._file.tensors) - self._used)
        if unused:
            raise EvaluationError(
                f"{self._file.path}: the kernels' decoder does not know {unused[0]} and "
                f"{len(unused) - 1} other tensors of this {self._file.architecture} file. "
                "Use llama.cpp."
            )


class _Builder:
    """Collects the operations of a batch of n tokens."""

    def __init__(
        self, read: _Weights, n: int, scratch: npt.NDArray[np.int8], inputs: _Inputs
    ) -> None:
        self.operations: list[Operation] = []
        self._read, self._n, self._scratch = read, n, scratch
        self._isa = chosen()
        self._inputs = inputs

    def add(
        self, operation: Any, arguments: Sequence[int], kind: Any = None, *, meets: bool = True
    ) -> None:
        """Append an operation."""
        code = address_of(operation, kind)
        self.operations.append(Operation(code, np.array(arguments, np.int64), meets))

    def prepare(
        self,
        weights: Sequence[str],
        values: Floats,
        n_in: int,
        how: int,
        first: Floats | None,
        second: Floats | None,
        epsilon: float,
    ) -> None:
        """Make activations and quantize them as the weights want them."""
        found = [self._read.weight(name) for name in weights]
        kinds = sorted({one.layout.inputs for one in found if isinstance(one, Tiles)})
        if any(not isinstance(one, Tiles) for one in found) or not kinds:
            kinds = kinds or ["Q8_0"]  # makes the values; nothing reads the codes
        for kind in kinds:
            for start, n, n_groups in groups_of(self._n, self._isa):
                where, buffer = self._buffer(n_in, kind, start, n, n_groups)
                arguments = quantize_arguments(
                    values[start:],
                    where,
                    buffer.ctypes.data,
                    self._scratch,
                    n_groups,
                    how,
                    _address(first, start),
                    _address(second, start),
                    epsilon,
                )
                self.operations.append(Operation(address_of(quantize_at), arguments))

    def multiply(
        self, name: str, values: Floats, out: Floats, *, adds: bool = False, meets: bool = True
    ) -> None:
        """Multiply a weight with the activations that were prepared last."""
        weight = self._read.weight(name)
        if not isinstance(weight, Tiles):
            arguments = [
                weight.ctypes.data, *weight.shape, values.ctypes.data, values.strides[0],
                out.ctypes.data, out.strides[0], self._n, adds,
            ]  # fmt: skip
            self.add(multiply_floats, arguments, meets=meets)
            return
        for start, n, n_groups in groups_of(self._n, self._isa):
            where, buffer = self._buffer(weight.n_in, weight.layout.inputs, start, n, n_groups)
            kind = ProductType(weight.layout, self._isa, n, adds=adds)
            base = buffer.ctypes.data
            given = product_arguments(weight, base, where, out[start:], n_groups, self._isa)
            self.operations.append(Operation(address_of(multiply, kind), given, meets))

    def add_normalized(self, rows: Floats, added: Floats, norm: Floats, shape: Shape) -> None:
        """Add normalized rows to the residual."""
        arguments = [
            rows.ctypes.data, added.ctypes.data, rows.shape[1], added.shape[1],
            norm.ctypes.data, shape.n_embd, float_bits(shape.epsilon), self._n,
        ]  # fmt: skip
        self.add(add_normalized, arguments)

    def _buffer(
        self, n_in: int, kind: str, start: int, n: int, n_groups: int
    ) -> tuple[InputLayout, npt.NDArray[np.int8]]:
        where = InputLayout(n_in, n, KINDS.index(kind))
        key = (n_in, kind, self._n, start)
        if key not in self._inputs:
            self._inputs[key] = aligned_bytes(where.n_bytes * n_groups)
        return where, self._inputs[key]


def _address(values: Floats | None, row: int) -> int:
    """Return where a row begins; a vector's only one; 0 of nothing."""
    if values is None:
        return 0
    return int(values.ctypes.data + (row * values.strides[0] if values.ndim > 1 else 0))
