"""What the benchmarks share: kinds of text, files judged on them, and ratios with their errors."""

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from edgeq.calibration import chunks_of
from edgeq.evaluation import Evaluation, evaluate, store_reference
from edgeq.runtime.model import Model, Tokens

_DRAWS = 1000
Judged = dict[str, Evaluation]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what calibrates and what judges."""
    parser.add_argument("--calibration", action="append", required=True, metavar="FILE")
    parser.add_argument("--judge", action="append", required=True, metavar="KIND=FILE")
    parser.add_argument("--chunks", type=int, default=16, help="of each kind, to judge on")


class Judges:
    """Judges files against one reference on kinds of text; the reference runs once for each.

    Parameters
    ----------
    kinds : name of the kind to its file
    """

    def __init__(
        self, reference: Path, kinds: dict[str, str], n_chunks: int, directory: Path
    ) -> None:
        self._reference = reference
        self._directory = directory
        self.texts = {kind: self._chunks(Path(file), n_chunks) for kind, file in kinds.items()}

    def _chunks(self, file: Path, n_chunks: int) -> Tokens:
        """Return the first chunks of a text, (n_chunks, 512)."""
        with Model(self._reference, vocab_only=True) as model:
            text = file.read_text("utf-8")[: 8 * 512 * (n_chunks + 1)]
            return chunks_of(model, text, 512)[:n_chunks]

    def judge(self, path: Path) -> Judged:
        """Return what a file does on every kind of text."""
        found = {}
        for kind, rows in self.texts.items():
            digest = hashlib.sha256(rows.tobytes()).hexdigest()[:16]
            stored = self._directory / f"{digest}.base"
            if not stored.exists():
                store_reference(self._reference, rows, stored, kind="base", n_ctx=rows.shape[1])
            found[kind] = evaluate(path, rows, stored, n_ctx=rows.shape[1])
        return found


def other_ratio(found: Judged, base: Judged, kinds: Iterable[str]) -> tuple[float, float]:
    """Return the geometric mean over kinds of the ratio of mean KL divergences, and its error.

    The standard error is that of a bootstrap over chunks, paired.
    """
    generator = np.random.default_rng(0)
    logs = np.zeros(_DRAWS + 1)
    names = list(kinds)
    for kind in names:
        pair = [
            np.asarray(e.kld).reshape(e.n_chunks, -1).mean(axis=1)
            for e in (found[kind], base[kind])
        ]
        drawn = generator.integers(0, len(pair[0]), (_DRAWS, len(pair[0])))
        picks = np.vstack([np.arange(len(pair[0])), drawn])
        logs += np.log(pair[0][picks].mean(axis=1) / pair[1][picks].mean(axis=1)) / len(names)
    return float(np.exp(logs[0])), float(np.exp(logs[1:]).std())
