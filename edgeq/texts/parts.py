"""Parts: chunks of tokens with a manifest, and the check that a text was not used before."""

from dataclasses import dataclass

from edgeq.errors import CalibrationError, EdgeqError
from edgeq.runtime.model import Model, Tokens
from edgeq.texts.passages import Hashes, Manifest, overlap, without_outer_words


@dataclass(frozen=True, eq=False)
class Part:
    """One part of the text.

    Attributes
    ----------
    rows : (n_chunks, chunk) int32 tokens, each row to be run as one fresh sequence
    texts : of each row, without special tokens and its first and last word, which may be cut
    manifest : what it consists of
    """

    rows: Tokens
    texts: tuple[str, ...]
    manifest: Manifest


def make_part(model: Model, name: str, rows: Tokens, stock: Hashes | None = None) -> Part:
    """Return (n_chunks, chunk) tokens as a part; `stock` are windows that do not count."""
    texts = tuple(without_outer_words(model.detokenize(row)) for row in rows)
    return Part(rows, texts, Manifest.of(name, rows, texts, stock))


def check_unused(
    manifest: Manifest,
    part: Part,
    where: str,
    *,
    error: type[EdgeqError] = CalibrationError,
    force: bool = False,
) -> str | None:
    """Return None if `part` shares nothing with what `manifest` describes.

    Returns
    -------
    with `force`, the sentence for the report

    Raises
    ------
    EdgeqError
        Of the given type, without `force`: the text was used before.
    """
    found = overlap(manifest, part.texts, part.rows)
    if not found:
        return None
    if force:
        return f"{where}: {found.describe()}"
    raise error(
        f"{where}: {found.describe()}. A result on it says nothing about other text. "
        "Give other text, or insist with --force."
    )
