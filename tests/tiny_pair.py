"""A tiny reference model and a candidate near it, for comparisons."""

from pathlib import Path

import numpy as np

from tests import tiny_gguf

N_CTX, N_CHUNKS, TEXT_SEED = 128, 4, 7
CHANGED = ("output.weight", "blk.0.ffn_down.weight", "blk.1.attn_v.weight")


def write(directory: Path) -> tuple[Path, Path]:
    """Write both; the candidate's CHANGED weights are rounded to steps of an eighth."""
    reference = tiny_gguf.write(directory / "reference.gguf", "llama")
    shapes = {
        "output.weight": (265, tiny_gguf.N_EMBD),
        "blk.0.ffn_down.weight": (tiny_gguf.N_EMBD, 96),
        "blk.1.attn_v.weight": (32, tiny_gguf.N_EMBD),
    }
    rounded = {
        name: (np.round(tiny_gguf.values(name, shapes[name]) * 8) / 8).astype(np.float32)
        for name in CHANGED
    }
    return reference, tiny_gguf.write(directory / "candidate.gguf", "llama", replace=rounded)
