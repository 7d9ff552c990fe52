"""GGUF files for the quantizer alone: full depth, few rows. llama.cpp quantizes without loading."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from converters.gguf_file import Field, GgufFile, TensorSource, open_gguf, write_gguf
from edgeq.runtime.encoders import encode

T = GGMLQuantizationType
UINT, FLOAT, TEXT = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
FloatArray = npt.NDArray[np.float32]


def fields(
    n_layers: int,
    n_in: int,
    n_ff: int,
    n_head: int,
    n_head_kv: int,
    n_experts: int = 0,
    architecture: str = "llama",
) -> dict[str, Field]:
    values = {
        "general.architecture": Field(architecture, TEXT),
        f"{architecture}.context_length": Field(256, UINT),
        f"{architecture}.embedding_length": Field(n_in, UINT),
        f"{architecture}.block_count": Field(n_layers, UINT),
        f"{architecture}.feed_forward_length": Field(n_ff, UINT),
        f"{architecture}.attention.head_count": Field(n_head, UINT),
        f"{architecture}.attention.head_count_kv": Field(n_head_kv, UINT),
        f"{architecture}.attention.layer_norm_rms_epsilon": Field(1e-5, FLOAT),
        f"{architecture}.vocab_size": Field(24, UINT),
        f"{architecture}.attention.sliding_window": Field(64, UINT),
    }
    if n_experts:
        values[f"{architecture}.expert_count"] = Field(n_experts, UINT)
        values[f"{architecture}.expert_used_count"] = Field(2, UINT)
    return values


def weights(
    n_layers: int, n_in: int, n_ff: int, *, n_experts: int = 0, tied: bool = False, rows: int = 2
) -> dict[str, FloatArray]:
    """Seeded, with outlying columns; `rows` of every matrix."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (24, n_in)}
    if not tied:
        shapes["output.weight"] = (24, n_in)
    shapes["output_norm.weight"] = (n_in,)
    for i in range(n_layers):
        shapes |= {f"blk.{i}.{x}_norm.weight": (n_in,) for x in ("attn", "ffn")}
        shapes |= {f"blk.{i}.attn_{x}.weight": (rows, n_in) for x in ("q", "k", "v", "output")}
        experts = (n_experts,) if n_experts else ()
        suffix = "_exps" if n_experts else ""
        shapes |= {
            f"blk.{i}.ffn_{x}{suffix}.weight": (*experts, rows, n_in) for x in ("gate", "up")
        }
        shapes[f"blk.{i}.ffn_down{suffix}.weight"] = (*experts, rows, n_ff)
        if n_experts:
            shapes[f"blk.{i}.ffn_gate_inp.weight"] = (n_experts, n_in)
    rng = np.random.RandomState(7)
    found = {}
    for name, shape in shapes.items():
        columns = np.exp(0.5 * rng.standard_normal(shape[-1]))
        found[name] = (0.02 * rng.standard_normal(shape) * columns).astype(np.float32)
    return found


def importances(tensors: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """A seeded imatrix, (n_mat, n_in) of every matrix; as a real one it lacks the embedding."""
    rng = np.random.RandomState(11)
    found = {}
    for name, weight in tensors.items():
        if weight.ndim > 1 and name != "token_embd.weight" and "gate_inp" not in name:
            shape = (1 if weight.ndim == 2 else len(weight), weight.shape[-1])
            values = np.exp(2 * rng.standard_normal(shape)).astype(np.float32)
            values[:, 5] = 0  # a dead channel
            found[name] = values
    return found


def write(
    path: Path,
    metadata: Mapping[str, Field],
    tensors: Mapping[str, FloatArray],
    qtype: GGMLQuantizationType = T.F32,
) -> GgufFile:
    """Write the matrices as `qtype`, the rest as F32."""

    def source(name: str, weight: FloatArray) -> TensorSource:
        kind = qtype if weight.ndim > 1 else T.F32
        rows = weight.reshape(-1, weight.shape[-1])
        return TensorSource(name, kind, weight.shape, lambda: encode(rows, kind).reshape(-1))

    write_gguf(path, metadata, [source(*item) for item in tensors.items()])
    return open_gguf(path)
