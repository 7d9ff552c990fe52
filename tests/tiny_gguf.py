"""Tiny GGUF models from a frozen random stream, written directly: no checkpoint, no tokenizer file.

One per kind of weight product that llama.cpp knows: plain, experts with one or several slots,
weights of three dimensions (latent attention), state space. Bytes of the same build are the same on
every machine: ``RandomState``'s streams are frozen by numpy.
"""

import hashlib
from pathlib import Path

import llvmlite.binding
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from converters.gguf_header import Field
from converters.gguf_writer import TensorSource, write_gguf

N_EMBD, N_LAYERS, N_CTX = 64, 2, 256

UINT, FLOAT, TEXT = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING

WORDS = """the a of and to in is that it was for on are with as his they at be this from have or by
one had not but what all were when we there can an your which their said if do will each about how
up out them then she many some so these would other into has more her two like him see time could
no make than first been its who now people my made over did down only way find use may water long
little very after words called just where most know river stone light winter house letter small
green""".split()


def text(seed: int, n_words: int = 400) -> str:
    """Sentences of common words, with digits, lines and some Unicode."""
    rng = np.random.RandomState(seed)
    out = []
    while len(out) < n_words:
        sentence = [WORDS[i] for i in rng.randint(len(WORDS), size=rng.randint(5, 14))]
        sentence[0] = sentence[0].capitalize()
        if rng.randint(4) == 0:
            sentence.insert(2, f"({rng.randint(2000)} km, naïve Straße)")
        out += [*sentence[:-1], sentence[-1] + ".\n" * (1 + rng.randint(2))]
    return " ".join(out)


def attention(layer: str, n_head: int = 4, n_head_kv: int = 2) -> dict[str, tuple[int, ...]]:
    head = N_EMBD // n_head
    return {
        f"{layer}attn_norm.weight": (N_EMBD,),
        f"{layer}attn_q.weight": (n_head * head, N_EMBD),
        f"{layer}attn_k.weight": (n_head_kv * head, N_EMBD),
        f"{layer}attn_v.weight": (n_head_kv * head, N_EMBD),
        f"{layer}attn_output.weight": (N_EMBD, n_head * head),
        f"{layer}ffn_norm.weight": (N_EMBD,),
    }


def feed_forward(layer: str, n_ff: int = 96, suffix: str = "") -> dict[str, tuple[int, ...]]:
    return {
        f"{layer}ffn_gate{suffix}.weight": (n_ff, N_EMBD),
        f"{layer}ffn_up{suffix}.weight": (n_ff, N_EMBD),
        f"{layer}ffn_down{suffix}.weight": (N_EMBD, n_ff),
    }


def experts(layer: str, n_experts: int, n_ff: int) -> dict[str, tuple[int, ...]]:
    plain = feed_forward(layer, n_ff, "_exps")
    stacked = {name: (n_experts, *shape) for name, shape in plain.items()}
    return {f"{layer}ffn_gate_inp.weight": (n_experts, N_EMBD)} | stacked


def llama_layer(layer: str) -> dict[str, tuple[int, ...]]:
    return attention(layer) | feed_forward(layer)


def mixtral_layer(layer: str) -> dict[str, tuple[int, ...]]:
    return attention(layer) | experts(layer, 4, 96)


def qwen3moe_layer(layer: str) -> dict[str, tuple[int, ...]]:
    norms = {f"{layer}attn_{x}_norm.weight": (N_EMBD // 4,) for x in "qk"}
    return attention(layer) | norms | experts(layer, 8, 32)


def deepseek2_layer(layer: str) -> dict[str, tuple[int, ...]]:
    shapes = {
        f"{layer}attn_norm.weight": (N_EMBD,),
        f"{layer}attn_q_a.weight": (24, N_EMBD),
        f"{layer}attn_q_a_norm.weight": (24,),
        f"{layer}attn_q_b.weight": (4 * 24, 24),
        f"{layer}attn_kv_a_mqa.weight": (32 + 8, N_EMBD),
        f"{layer}attn_kv_a_norm.weight": (32,),
        f"{layer}attn_k_b.weight": (4, 32, 16),
        f"{layer}attn_v_b.weight": (4, 16, 32),
        f"{layer}attn_output.weight": (N_EMBD, 4 * 16),
        f"{layer}ffn_norm.weight": (N_EMBD,),
    }
    if layer == "blk.0.":
        return shapes | feed_forward(layer)
    return shapes | experts(layer, 4, 32) | feed_forward(layer, 32, "_shexp")


def mamba_layer(layer: str) -> dict[str, tuple[int, ...]]:
    d_inner, d_state, dt_rank = 2 * N_EMBD, 8, 16
    return {
        f"{layer}attn_norm.weight": (N_EMBD,),
        f"{layer}ssm_in.weight": (2 * d_inner, N_EMBD),
        f"{layer}ssm_conv1d.weight": (d_inner, 4),
        f"{layer}ssm_conv1d.bias": (d_inner,),
        f"{layer}ssm_x.weight": (dt_rank + 2 * d_state, d_inner),
        f"{layer}ssm_dt.weight": (d_inner, dt_rank),
        f"{layer}ssm_dt.bias": (d_inner,),
        f"{layer}ssm_a": (d_inner, d_state),
        f"{layer}ssm_d": (d_inner,),
        f"{layer}ssm_out.weight": (N_EMBD, d_inner),
    }


LAYERS = {
    "llama": llama_layer,
    "mixtral": mixtral_layer,
    "qwen3moe": qwen3moe_layer,
    "deepseek2": deepseek2_layer,
    "mamba": mamba_layer,
}
ARCHITECTURE = {"mixtral": "llama"}
NUMBERS = {
    "mixtral": {"expert_count": 4, "expert_used_count": 2},
    "qwen3moe": {
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_feed_forward_length": 32,
        "attention.key_length": 16,
        "attention.value_length": 16,
    },
    "deepseek2": {
        "leading_dense_block_count": 1,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 24,
        "attention.kv_lora_rank": 32,
        "attention.key_length": 40,
        "attention.value_length": 32,
        "attention.key_length_mla": 24,
        "attention.value_length_mla": 16,
        "rope.dimension_count": 8,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 32,
    },
    "mamba": {
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 128,
        "ssm.state_size": 8,
        "ssm.time_step_rank": 16,
        "attention.head_count": 0,
        "feed_forward_length": 0,
    },
}


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def vocabulary(adds_bos: bool) -> dict[str, Field]:
    letters = byte_letters()
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("Ġ", "w"), ("Ġ", "a"), ("i", "n"), ("e", "r")]
    tokens = ["<|end|>", "<|begin|>", *letters, *("".join(pair) for pair in merges)]
    types = [3, 3] + [1] * (len(tokens) - 2)
    return {
        "tokenizer.ggml.model": Field("gpt2", TEXT),
        "tokenizer.ggml.pre": Field("gpt-2", TEXT),
        "tokenizer.ggml.tokens": Field(tokens, GGUFValueType.ARRAY, TEXT),
        "tokenizer.ggml.token_type": Field(types, GGUFValueType.ARRAY, GGUFValueType.INT32),
        "tokenizer.ggml.merges": Field(
            [" ".join(pair) for pair in merges], GGUFValueType.ARRAY, TEXT
        ),
        "tokenizer.ggml.eos_token_id": Field(0, UINT),
        "tokenizer.ggml.bos_token_id": Field(1, UINT),
        "tokenizer.ggml.add_bos_token": Field(adds_bos, GGUFValueType.BOOL),
    }


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    normal = np.random.RandomState(seed).standard_normal(shape)
    if name.endswith("ssm_a"):
        return -np.exp(0.3 * normal).astype(np.float32)
    if len(shape) == 1:
        offset = 0.0 if name.endswith("bias") else 1.0
        return (offset + 0.3 * normal).astype(np.float32)
    return (normal * 1.4 / np.sqrt(shape[-1])).astype(np.float32)


def write(
    path: Path,
    kind: str,
    *,
    adds_bos: bool = True,
    tied: bool = False,
    replace: dict[str, np.ndarray] | None = None,
    extra: dict[str, Field] | None = None,
) -> Path:
    """Write the tiny model `kind`; `replace` puts other arrays for some tensors."""
    architecture = ARCHITECTURE.get(kind, kind)
    numbers = {
        "block_count": N_LAYERS,
        "context_length": N_CTX,
        "embedding_length": N_EMBD,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    } | NUMBERS.get(kind, {})
    fields = {"general.architecture": Field(architecture, TEXT)}
    fields |= {f"{architecture}.{key}": Field(value, UINT) for key, value in numbers.items()}
    fields[f"{architecture}.attention.layer_norm_rms_epsilon"] = Field(1e-5, FLOAT)
    fields |= vocabulary(adds_bos) | (extra or {})
    n_vocab = len(fields["tokenizer.ggml.tokens"].value)
    shapes = {"token_embd.weight": (n_vocab, N_EMBD), "output_norm.weight": (N_EMBD,)}
    shapes |= {} if tied else {"output.weight": (n_vocab, N_EMBD)}
    for layer in range(N_LAYERS):
        shapes |= LAYERS[kind](f"blk.{layer}.")
    arrays = {name: values(name, shape) for name, shape in shapes.items()} | (replace or {})
    f32 = GGMLQuantizationType.F32
    sources = [
        TensorSource(name, f32, array.shape, lambda array=array: array)
        for name, array in arrays.items()
    ]
    write_gguf(path, fields, sources)
    return path


def is_golden_cpu():
    """Whether this CPU has AVX-512, as the one had on which the runtime's figures were recorded.

    With AVX2 alone an imatrix of the Q4_1 SmolLM2 is up to 1.3 % off by norm (10 % an entry), the
    scales of stored logits 6e-5. That the instruction set is the reason is inferred, not proven.
    """
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
