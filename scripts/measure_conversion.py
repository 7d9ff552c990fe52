"""Measure memory and time of converting a made LLaMA checkpoint of several shards.

    python scripts/measure_conversion.py [--gib 4.5] [--type bf16] [--work DIR]

Prints one JSON object. ``peak_mib`` is the conversion process's largest resident set, which counts
the mapped parts of the checkpoint too; ``limit_mib`` is three times the largest tensor plus 500 MB.
"""

import argparse
import json
import multiprocessing
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
N_SHARDS = 4


def make_checkpoint(directory: Path, gib: float) -> int:
    """Write a bfloat16 checkpoint of about `gib` GiB; return its largest tensor's bytes."""
    n_in = 4096 if gib >= 2 else 1024
    n_vocab, n_ff = 32 * n_in, 4 * n_in
    head_bytes, layer_bytes = 2 * n_vocab * n_in, 2 * (4 * n_in * n_in + 3 * n_in * n_ff)
    n_layers = max(1, round((gib * 2**30 - 2 * head_bytes) / layer_bytes))
    shapes = {"model.embed_tokens.weight": (n_vocab, n_in), "lm_head.weight": (n_vocab, n_in)}
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}."
        for part in "qkvo":
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (n_in, n_in)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (
            n_ff,
            n_in,
        )
        shapes[f"{prefix}mlp.down_proj.weight"] = (n_in, n_ff)
        shapes[f"{prefix}input_layernorm.weight"] = (n_in,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (n_in,)
    shapes["model.norm.weight"] = (n_in,)
    random = np.random.RandomState(0).standard_normal(1 << 22).astype(np.float32)
    block = (random.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    names = sorted(shapes)
    weight_map = {}
    for number in range(N_SHARDS):
        members = names[number::N_SHARDS]
        file = f"model-{number + 1:05d}-of-{N_SHARDS:05d}.safetensors"
        write_shard(directory / file, {name: shapes[name] for name in members}, block)
        weight_map.update(dict.fromkeys(members, file))
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": n_in,
            "intermediate_size": n_ff,
            "num_hidden_layers": n_layers,
            "num_attention_heads": n_in // 128,
            "vocab_size": n_vocab,
        },
    )
    write_tokenizer(directory)
    return head_bytes


def write_json(path: Path, value: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value), "utf-8")


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: bytes) -> None:
    """Write a safetensors file whose tensors repeat `block`."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while offset:
            offset -= file.write(block[:offset])


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level tokenizer without merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({character: token for token, character in enumerate(alphabet)}, [])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))


def convert(directory: Path, out: Path, kind: str) -> tuple[float, float]:
    """Convert in this process; return its peak resident MiB and the seconds."""
    sys.path.insert(0, str(ROOT))
    from converters.checkpoint import open_checkpoint
    from converters.convert import convert

    start = time.perf_counter()
    convert(open_checkpoint(directory), out, ftype=kind)
    elapsed_s = time.perf_counter() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, elapsed_s


def main() -> None:
    """Make the checkpoint, convert it in a process of its own, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=4.5)
    parser.add_argument("--type", default="bf16")
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        directory = Path(work) / "checkpoint"
        directory.mkdir()
        largest = make_checkpoint(directory, arguments.gib)
        shards = list(directory.glob("*.safetensors"))
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            peak_mib, elapsed_s = pool.apply(
                convert, (directory, Path(work) / "out.gguf", arguments.type)
            )
        print(
            json.dumps(
                {
                    "checkpoint_gib": round(sum(p.stat().st_size for p in shards) / 2**30, 2),
                    "shards": len(shards),
                    "type": arguments.type,
                    "largest_tensor_mib": round(largest / 2**20),
                    "peak_mib": round(peak_mib),
                    "limit_mib": round((3 * largest + 500e6) / 2**20),
                    "elapsed_s": round(elapsed_s, 1),
                }
            )
        )


if __name__ == "__main__":
    main()
