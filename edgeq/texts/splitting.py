"""The split of texts into parts that have no passage in common.

Every file is cut into blocks of some thousand characters at line ends; a conversation is a block.
Blocks that share a window of 13 words stay together. These clusters are dealt to the parts in a
seeded order, so that each part gets its share of each file. Windows that recur in three or more
blocks are stock phrases (system prompts, licences): they bind nothing and are not compared later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeq.errors import CalibrationError
from edgeq.texts.passages import Hashes, stock_phrases, windows
from edgeq.texts.sources import Document, Source

BLOCK_CHARS = 8192
BLOCKS_PER_FILE = 64  # a short file is cut finer, so that every part gets some of it
MIN_BLOCK_CHARS = 256
SHARES = {"calibration": 0.8, "tuning": 0.1, "held-out": 0.1}


@dataclass(frozen=True)
class Split:
    """Sources by part, and the stock phrases that the parts may have in common.

    Attributes
    ----------
    parts : part to its sources, each with the documents that fell to the part
    stock : sorted hashes of the windows that recur all over the texts
    """

    parts: dict[str, list[Source]]
    stock: Hashes


@dataclass(frozen=True)
class _Block:
    source: int
    document: int
    index: int  # within the source
    document_: Document
    windows: Hashes


def split(
    sources: Sequence[Source], *, shares: Mapping[str, float] = SHARES, seed: int = 0
) -> Split:
    """Deal the text to parts that have no passage in common.

    Parameters
    ----------
    sources : what ``read_source`` gave
    shares : part to its share of each source's characters; they need not add up to 1
    seed : of the order in which passages are dealt

    Raises
    ------
    CalibrationError
        There are too few separate passages for the parts.
    """
    blocks = [
        block
        for number, source in enumerate(sources)
        for block in _blocks_of(number, source, _block_size(source))
    ]
    stock = stock_phrases([block.windows for block in blocks])
    clusters = _clusters([np.setdiff1d(block.windows, stock) for block in blocks])
    if len(clusters) < len(shares):
        names = " + ".join(source.name for source in sources)
        own = ", or own text for evaluation" if "evaluation" in shares else ""
        raise CalibrationError(
            f"{names}: the text has {len(clusters)} separate passages, too few for "
            f"{', '.join(shares)}. Give more text{own}."
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(clusters))
    sizes = np.zeros((len(sources), len(shares)))
    dealt: list[list[list[_Block]]] = [[] for _ in shares]
    target = np.array(list(shares.values())) / sum(shares.values())
    for number in order.tolist():
        members = [blocks[i] for i in clusters[number]]
        total = np.zeros(len(sources))
        for block in members:
            total[block.source] += len(block.document_.text)
        most = int(total.argmax())
        lack = target * (sizes[most].sum() + total[most]) - sizes[most]
        part = int(lack.argmax())
        sizes[:, part] += total
        dealt[part].append(members)
    for mine in dealt:  # few passages: no part stays empty
        if not mine:
            mine.append(max(dealt, key=len).pop())
    parts = {
        name: _joined(sources, [block for members in mine for block in members])
        for name, mine in zip(shares, dealt, strict=True)
    }
    return Split(parts, stock)


def _block_size(source: Source) -> int:
    size = sum(len(document.text) for document in source.documents)
    return min(BLOCK_CHARS, max(MIN_BLOCK_CHARS, size // BLOCKS_PER_FILE))


def _blocks_of(number: int, source: Source, size: int) -> list[_Block]:
    blocks: list[_Block] = []
    for at, document in enumerate(source.documents):
        pieces = [document.text] if document.is_conversation else cut_at_lines(document.text, size)
        for piece in pieces:
            block = Document(piece, document.is_conversation)
            blocks.append(_Block(number, at, len(blocks), block, windows(piece)))
    return blocks


def cut_at_lines(text: str, size: int) -> list[str]:
    """Cut a text into pieces of about `size` characters, after a line or else a word if possible.

    The pieces together are the text.
    """
    pieces, start = [], 0
    while len(text) - start > size + size // 2:
        end = start + size
        for mark in ("\n", " "):
            found = text.find(mark, end, end + size // 2)
            if found >= 0:
                end = found + 1
                break
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _clusters(windows_of: Sequence[Hashes]) -> list[list[int]]:
    """Group blocks that share a window, directly or through others, in order of first block."""
    parent = list(range(len(windows_of)))

    def root(block: int) -> int:
        while parent[block] != block:
            parent[block] = parent[parent[block]]
            block = parent[block]
        return block

    owners = np.repeat(np.arange(len(windows_of)), [len(each) for each in windows_of])
    hashes = np.concatenate([*windows_of, np.empty(0, np.uint64)])
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    for first, second in zip(
        owners[order][same].tolist(), owners[order][same + 1].tolist(), strict=True
    ):
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    groups: dict[int, list[int]] = {}
    for block in range(len(windows_of)):
        groups.setdefault(root(block), []).append(block)
    return list(groups.values())


def _joined(sources: Sequence[Source], blocks: Sequence[_Block]) -> list[Source]:
    """Return the blocks as sources, neighbours of one document joined again."""
    joined = []
    for number, source in enumerate(sources):
        documents: list[Document] = []
        last: _Block | None = None
        mine = sorted((b for b in blocks if b.source == number), key=lambda block: block.index)
        for block in mine:
            follows = last is not None and (block.document, block.index - 1) == (
                last.document,
                last.index,
            )
            if follows:
                documents[-1] = Document(
                    documents[-1].text + block.document_.text, block.document_.is_conversation
                )
            else:
                documents.append(block.document_)
            last = block
        if documents:
            joined.append(Source(source.name, source.weight, tuple(documents)))
    return joined
