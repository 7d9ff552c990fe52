"""Exports killed at random moments, and damaged between them, end in the same file."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--quantizer gptq:sweeps=0 --bpw 7 --costs relative --types Q4_0,Q8_0 "
    "--ctx 64 --chunks 8 --no-prove --threads 1"
)


@pytest.mark.slow
def test_killed_and_damaged_exports_are_resumed_to_the_same_bytes(tiny, texts, tmp_path):
    command = [
        *(sys.executable, ROOT / "scripts" / "crash_test", tiny, "--text", texts[0]),
        *("-o", tmp_path, "--kills", "3", "--damage", "--flags", FLAGS),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Nothing was lost." in found.stdout
    assert "3 kills" in found.stdout
