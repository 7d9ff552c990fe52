"""Which passages two texts share: windows of 13 words, hashed; manifests of what was used.

Words are runs of letters and digits after Unicode compatibility folding, without case; a character
of a script that is written without spaces is a word. Every 13 words in a row are one window. Two
texts overlap if they share a window that is no stock phrase, or a chunk of equal tokens.
"""

import base64
import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeq.runtime.model import Tokens

Hashes = npt.NDArray[np.uint64]

WINDOW = 13  # words
STOCK_BLOCKS = 3  # a window in so many blocks of a text is a stock phrase
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")
_FORMAT = "edgeq manifest 1"


def windows(text: str) -> Hashes:
    """Return the sorted hashes of the text's windows, without repetition; empty below 13 words."""
    hashes = _window_hashes(_words(text))
    return np.unique(hashes)


def without_outer_words(text: str) -> str:
    """Return what is between the first and the last word of `text`."""
    spans = [match.span() for match in _WORD.finditer(text)]
    return text[spans[0][1] : spans[-1][0]] if len(spans) > 1 else ""


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _window_hashes(words: Sequence[str]) -> Hashes:
    known: dict[str, int] = {}
    for word in words:
        if word not in known:
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            known[word] = int.from_bytes(digest, "little")
    codes = np.array([known[word] for word in words], np.uint64)
    n = max(len(codes) - WINDOW + 1, 0)
    state = np.zeros(n, np.uint64)
    for k in range(WINDOW):  # modulo 2^64, odd multiplier: order matters
        state = state * np.uint64(0x9E3779B97F4A7C15) + codes[k : k + n]
        state ^= state >> np.uint64(29)
    return state


def stock_phrases(windows_of_blocks: Sequence[Hashes]) -> Hashes:
    """Return the windows that are in 3 or more of the blocks, sorted."""
    together = np.concatenate([*windows_of_blocks, np.empty(0, np.uint64)])
    values, counts = np.unique(together, return_counts=True)
    return np.asarray(values[counts >= STOCK_BLOCKS])


def are_in(hashes: Hashes, known: Hashes) -> npt.NDArray[np.bool_]:
    """Return which of `hashes` are in the sorted `known`, (len(hashes),) bool."""
    if len(known) == 0:
        return np.zeros(len(hashes), np.bool_)
    at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return np.asarray(known[at] == hashes)


@dataclass(frozen=True, eq=False)
class Manifest:
    """What a part of the text consists of.

    Attributes
    ----------
    name : of the part, for messages
    sha256 : of its tokens, row after row
    n_tokens : in all chunks
    chunks : first 16 hexadecimal digits of each chunk's SHA-256 (without its first token, which
        may have been replaced)
    windows : sorted hashes of its windows, without stock phrases
    """

    name: str
    sha256: str
    n_tokens: int
    chunks: tuple[str, ...]
    windows: Hashes

    @classmethod
    def of(
        cls, name: str, rows: Tokens, texts: Sequence[str], stock: Hashes | None = None
    ) -> "Manifest":
        """Describe a part.

        Parameters
        ----------
        name : of the part
        rows : (n_chunks, chunk) int32
        texts : the text that the rows were made from, or more
        stock : windows that do not count
        """
        found = [windows(text) for text in texts]
        together = np.unique(np.concatenate([*found, np.empty(0, np.uint64)]))
        if stock is not None:
            together = np.setdiff1d(together, stock, assume_unique=True)
        return cls(name, rows_sha256(rows), rows.size, _chunk_hashes(rows), together)

    def summary(self) -> dict[str, Any]:
        """Return what a report shows: everything but the windows."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "n_tokens": self.n_tokens,
            "chunks": list(self.chunks),
        }

    def to_json(self) -> str:
        """Return it as JSON; windows as base64 of little-endian 64-bit numbers."""
        packed = base64.b64encode(self.windows.astype("<u8").tobytes()).decode("ascii")
        return json.dumps({"format": _FORMAT, **self.summary(), "windows": packed})

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what ``to_json`` gave.

        Raises
        ------
        ValueError
            The text is something else.
        """
        try:
            value = json.loads(text)
            if value["format"] != _FORMAT:
                raise KeyError("format")
            packed = base64.b64decode(value["windows"], validate=True)
            return cls(
                str(value["name"]),
                str(value["sha256"]),
                int(value["n_tokens"]),
                tuple(str(chunk) for chunk in value["chunks"]),
                np.frombuffer(packed, "<u8").astype(np.uint64),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a manifest of this version: {error}") from error


def rows_sha256(rows: Tokens) -> str:
    """Return the SHA-256 of (n_chunks, chunk) tokens, their shape included."""
    digest = hashlib.sha256(f"{rows.shape}".encode())
    digest.update(np.ascontiguousarray(rows, "<i4").tobytes())
    return digest.hexdigest()


def _chunk_hashes(rows: Tokens) -> tuple[str, ...]:
    plain = np.ascontiguousarray(rows[:, 1:], "<i4")
    return tuple(hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in plain)


@dataclass(frozen=True)
class Overlap:
    """What a text shares with a manifest.

    Attributes
    ----------
    name : of the manifest
    shared_chunks, n_chunks : chunks of the text that are chunks of the manifest, and all
    shared_windows, n_windows : windows of the text that are windows of the manifest, and all
    example : the words of the first shared window; empty if there is none
    """

    name: str
    shared_chunks: int
    n_chunks: int
    shared_windows: int
    n_windows: int
    example: str

    def __bool__(self) -> bool:
        return self.shared_chunks > 0 or self.shared_windows > 0

    def describe(self) -> str:
        """Return one sentence for messages and reports."""
        shared = (
            f"shares {self.shared_windows} of {self.n_windows} windows of {WINDOW} words and "
            f"{self.shared_chunks} of {self.n_chunks} chunks with the {self.name} text"
        )
        return shared + (f", such as {self.example!r}" if self.example else "")


def overlap(manifest: Manifest, texts: Sequence[str], rows: Tokens | None = None) -> Overlap:
    """Compare a text with what a manifest describes.

    Parameters
    ----------
    manifest : of the text that was used before
    texts : documents
    rows : (n_chunks, chunk) int32 tokens of the same text, to compare chunk by chunk as well
    """
    known = set(manifest.chunks)
    chunks = () if rows is None else _chunk_hashes(rows)
    n_shared = n_windows = 0
    example = ""
    for text in texts:
        words = _words(text)
        hashes = _window_hashes(words)
        is_shared = are_in(hashes, manifest.windows)
        n_windows += len(hashes)
        n_shared += int(is_shared.sum())
        if is_shared.any() and not example:
            first = int(is_shared.argmax())
            example = " ".join(words[first : first + WINDOW])
    n_chunks_shared = sum(chunk in known for chunk in chunks)
    return Overlap(manifest.name, n_chunks_shared, len(chunks), n_shared, n_windows, example)
