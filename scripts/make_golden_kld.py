"""Make tests/data/golden_kld.*: what llama-perplexity says of two tiny models of the tests.

    python scripts/make_golden_kld.py DIRECTORY_OF_LLAMA_CPP_TOOLS

llama-perplexity must be of the llama.cpp that the pinned llama-cpp-python was built from
(0c1e57098). ``golden_kld.base`` is its base file of the reference, ``golden_kld.json`` what it
prints of the candidate against that file: name -> the printed numbers, as printed.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
sys.path.insert(0, str(ROOT))

from tests import tiny_gguf, tiny_pair  # noqa: E402

LINE = re.compile(r"^([^:\n]*(?:PPL|KLD|Δp|Same top p)[^:\n]*?)\s*: +(.*)$", re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d+")


def printed(output: str) -> dict[str, list[str]]:
    """Return the numbers of each line of llama-perplexity's final tables."""
    tables = output[output.index("====== Perplexity statistics") :]
    return {" ".join(name.split()): NUMBER.findall(rest) for name, rest in LINE.findall(tables)}


def run(tools: Path, *arguments: object) -> str:
    """Run llama-perplexity and return all that it printed."""
    command = [str(tools / "llama-perplexity"), "-t", "1", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
    return done.stdout + done.stderr


def main() -> None:
    """Write the golden files."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    tools = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        reference, candidate = tiny_pair.write(scratch)
        text = scratch / "text.txt"
        text.write_text(tiny_gguf.text(tiny_pair.TEXT_SEED), encoding="utf-8")
        base = DATA / "golden_kld.base"
        stored = ("--kl-divergence-base", base)
        shape = ("-c", tiny_pair.N_CTX, "--chunks", tiny_pair.N_CHUNKS)
        run(tools, "-m", reference, "-f", text, *stored, *shape)
        output = run(tools, "-m", candidate, *stored, *shape, "--kl-divergence")
    found = json.dumps(printed(output), indent=1, ensure_ascii=False)
    (DATA / "golden_kld.json").write_text(found + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
