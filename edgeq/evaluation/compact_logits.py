"""Our compact reference file: at most 3 % of llama-perplexity's base file, with an error bound.

::

    8 bytes "edgeqref", uint32 version, uint32 length of the JSON, JSON (n_ctx, n_vocab, n_chunks,
    vocabulary digest, model), int32 tokens[n_chunks * n_ctx], then blocks of consecutive rows:
    uint32 chunk, first row, number of rows; float32 cut; uint32 bytes of stream, number of heads,
    CRC-32 of this and what follows; the arrays of ``PackedRows``: ``_PER_ROW``, heads, stream

All little-endian. What a row holds and what follows for the divergence: ``cpu_kernels``'
``reference_rows`` and ``reference_bounds``.
"""

import json
import struct
import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cpu_kernels.divergence import RowStatistics
from cpu_kernels.reference_bounds import divergence_bounds
from cpu_kernels.reference_rows import MAX_VOCAB, N_SAMPLES, PackedRows, pack
from edgeq.errors import EvaluationError
from edgeq.evaluation.chunks import MIN_CTX, Batch, Segment, n_scored
from edgeq.evaluation.references import Bound, refuse_vocabulary
from edgeq.runtime.model import Model, Tokens
from edgeq.runtime.vocabulary import vocabulary_digest

MAGIC = b"edgeqref"
VERSION = 1
MAX_FRACTION = 0.03
_HEADER = struct.Struct("<8sII")
_BLOCK = struct.Struct("<IIIfII")
_CHECKSUM = struct.Struct("<I")
_MAX_JSON = 1 << 16
_PER_ROW = (
    ("n_bytes", "<i4", ()),
    ("n_heads", "<i4", ()),
    ("tail_mass", "<f4", ()),
    ("tail_entropy", "<f4", ()),
    ("nll", "<f4", ()),
    ("top", "<i4", ()),
    ("samples", "<i4", (N_SAMPLES,)),
    ("sample_log_p", "<f4", (N_SAMPLES,)),
)
_ROW_BYTES = 6 * 4 + 2 * 4 * N_SAMPLES


@dataclass(frozen=True)
class _Block:
    rows: int
    cut: float
    stream_bytes: int
    heads: int
    head: bytes
    checksum: int
    offset: int  # of the arrays


class CompactWriter:
    """Writes the file block by block, each within its share of the bytes.

    Parameters
    ----------
    file : where to write
    model : the reference, for its vocabulary
    chunks : (n_chunks, n_ctx) int32
    max_fraction : bytes allowed, as a fraction of llama-perplexity's base file
    """

    def __init__(self, file: BinaryIO, model: Model, chunks: Tokens, max_fraction: float) -> None:
        n_chunks, n_ctx = chunks.shape
        if model.n_vocab >= MAX_VOCAB:
            raise EvaluationError(
                f"{model.path}: {model.n_vocab} tokens in the vocabulary; a compact reference "
                f"takes fewer than {MAX_VOCAB}. Store a base file."
            )
        about = {
            "n_ctx": n_ctx,
            "n_vocab": model.n_vocab,
            "n_chunks": n_chunks,
            "vocabulary": vocabulary_digest(model),
            "model": model.path.name,
        }
        text = json.dumps(about).encode()
        self._file = file
        self._fraction = max_fraction
        self._n_vocab = model.n_vocab
        # what is not rows is charged in full to every block, so that the limit holds for any text
        self._overhead = _HEADER.size + len(text) + 4 * n_ctx + _BLOCK.size + _CHECKSUM.size
        file.write(_HEADER.pack(MAGIC, VERSION, len(text)) + text)
        file.write(chunks.astype("<i4").tobytes())

    def write(
        self, segment: Segment, logits: npt.NDArray[np.float32], following: Tokens
    ) -> npt.NDArray[np.float64]:
        """Write the rows of one segment and return −ln p of the following tokens, nats.

        Raises
        ------
        EvaluationError
            Not even the top tokens fit into the bytes allowed.
        """
        n_rows = len(logits)
        allowed = int(self._fraction * 2 * self._n_vocab * n_rows)
        packed = pack(logits, following, allowed - self._overhead - n_rows * _ROW_BYTES)
        if packed is None:
            raise EvaluationError(
                f"compact reference: {self._fraction:.1%} of the base file are too few bytes for "
                f"chunks of a vocabulary of {self._n_vocab}. Allow more, or store a base file."
            )
        arrays = [getattr(packed, name).astype(kind) for name, kind, _ in _PER_ROW]
        arrays += [packed.heads.astype("<f4"), packed.stream]
        payload = b"".join(array.tobytes() for array in arrays)
        where = (segment.chunk, segment.first_row, n_rows)
        head = _BLOCK.pack(*where, float(packed.cut), len(packed.stream), len(packed.heads))
        checksum = _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(head)))
        self._file.write(head + checksum + payload)
        return packed.nll.astype(np.float64)


def is_compact_file(path: Path) -> bool:
    """Whether `path` starts like a compact reference."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class CompactReference(AbstractContextManager["CompactReference", None]):
    """A compact reference file, opened.

    Raises
    ------
    EvaluationError
        Truncated, damaged or of another version.
    """

    kind = "compact"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = path.stat().st_size
        self._file = path.open("rb")
        try:
            self._about = self._read_header()
            self._blocks = self._read_blocks()
        except BaseException:
            self._file.close()
            raise

    def _damaged(self, what: str) -> EvaluationError:
        return EvaluationError(f"{self.path}: truncated or damaged: {what}. Write it again.")

    def _read_header(self) -> dict[str, Any]:
        head = self._file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            raise self._damaged(f"got {len(head)} bytes, expected at least {_HEADER.size}")
        _, version, length = _HEADER.unpack(head)
        if version != VERSION:
            raise EvaluationError(
                f"{self.path}: compact reference of version {version}, expected {VERSION}. Write "
                "it again with this version of edgeq."
            )
        if length > _MAX_JSON:
            raise self._damaged(f"a header of {length} bytes, expected at most {_MAX_JSON}")
        try:
            about = json.loads(self._file.read(length))
            numbers = {key: int(about[key]) for key in ("n_ctx", "n_vocab", "n_chunks")}
            about = {**numbers, "vocabulary": str(about["vocabulary"])}
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"its header is not what it should be ({error!r})") from error
        n_chunks, n_ctx, n_vocab = about["n_chunks"], about["n_ctx"], about["n_vocab"]
        left = self._size - self._file.tell()
        if not (n_ctx >= MIN_CTX and 0 < n_vocab < MAX_VOCAB and 0 < n_chunks * n_ctx * 4 <= left):
            raise self._damaged(
                f"{n_chunks} chunks of {n_ctx} tokens, a vocabulary of {n_vocab} and {left} bytes"
            )
        chunks = np.fromfile(self._file, "<i4", n_chunks * n_ctx).astype(np.int32)
        if chunks.min() < 0 or chunks.max() >= n_vocab:
            raise self._damaged(f"tokens of {chunks.min()} to {chunks.max()}")
        self.chunks: Tokens | None = chunks.reshape(n_chunks, n_ctx)
        self.n_ctx: int | None = n_ctx
        return about

    def _read_blocks(self) -> dict[tuple[int, int], _Block]:
        blocks = {}
        scored = n_scored(self._about["n_ctx"])
        chunk = row = 0
        while chunk < self._about["n_chunks"]:
            head = self._file.read(_BLOCK.size)
            checksum = self._file.read(_CHECKSUM.size)
            if len(checksum) < _CHECKSUM.size:
                raise self._damaged(f"it ends at row {row} of chunk {chunk}")
            at_chunk, at_row, n_rows, cut, n_stream, n_heads = _BLOCK.unpack(head)
            offset = self._file.tell()
            end = offset + n_rows * _ROW_BYTES + 4 * n_heads + n_stream
            if (at_chunk, at_row) != (chunk, row) or not 0 < n_rows <= scored - row:
                raise self._damaged(f"a block of row {at_row} of chunk {at_chunk}, expected {row}")
            if end > self._size:
                raise self._damaged(f"{self._size} bytes, expected at least {end}")
            if not -25.0 <= cut <= 0.0:
                raise self._damaged(f"a cut at {cut}")
            (crc,) = _CHECKSUM.unpack(checksum)
            blocks[chunk, row] = _Block(n_rows, cut, n_stream, n_heads, head, crc, offset)
            row += n_rows
            if row == scored:
                chunk, row = chunk + 1, 0
            self._file.seek(end)
        if self._file.tell() != self._size:
            raise self._damaged(f"{self._size} bytes, expected {self._file.tell()}")
        return blocks

    def _load(self, segment: Segment, n_rows: int) -> PackedRows:
        where = (segment.chunk, segment.first_row)
        block = self._blocks.get(where)
        if block is None or block.rows != n_rows:
            raise self._damaged(f"no block of {n_rows} rows at row {where[1]} of chunk {where[0]}")
        self._file.seek(block.offset)
        payload = self._file.read(n_rows * _ROW_BYTES + 4 * block.heads + block.stream_bytes)
        if zlib.crc32(payload, zlib.crc32(block.head)) != block.checksum:
            raise self._damaged(f"the checksum of chunk {segment.chunk} is wrong")
        arrays: dict[str, Any] = {}
        at = 0
        for name, kind, inner in _PER_ROW:
            count = n_rows * (N_SAMPLES if inner else 1)
            arrays[name] = np.frombuffer(payload, kind, count, at).reshape(n_rows, *inner)
            at += 4 * count
        heads = np.frombuffer(payload, "<f4", block.heads, at)
        stream = np.frombuffer(payload, np.uint8, block.stream_bytes, at + 4 * block.heads)
        packed = PackedRows(cut=np.float32(block.cut), stream=stream, heads=heads, **arrays)
        n_vocab = self._about["n_vocab"]
        if (
            packed.n_bytes.min() < 0
            or packed.n_heads.min() < 0
            or int(packed.n_bytes.sum(dtype=np.int64)) != len(stream)
            or int(packed.n_heads.sum(dtype=np.int64)) != len(heads)
            or packed.samples.min() < -1
            or packed.samples.max() >= n_vocab
            or packed.top.min() < 0
            or packed.top.max() >= n_vocab
        ):
            raise self._damaged(f"the rows of chunk {segment.chunk} contradict themselves")
        return packed

    def check(self, model: Model) -> None:
        """Compare the vocabularies."""
        if self._about["vocabulary"] != vocabulary_digest(model):
            raise refuse_vocabulary(self.path, self._about["n_vocab"], model)

    def begin(self, n_ctx: int) -> None:
        """Do nothing."""

    def prepare(self, batch: Batch) -> None:
        """Do nothing."""

    def compare(
        self, segment: Segment, logits: npt.NDArray[np.float32], next_tokens: Tokens
    ) -> tuple[RowStatistics, Bound]:
        """Compare with the stored rows."""
        packed = self._load(segment, len(logits))
        top = logits.argmax(axis=1).astype(np.int32)
        kld, bound, log_sums = divergence_bounds(packed, logits, top)
        if (bound < 0).any():
            raise self._damaged(f"the rows of chunk {segment.chunk} cannot be unpacked")
        nll = log_sums - logits[np.arange(len(logits)), next_tokens]
        nll_reference = packed.nll.astype(np.float64)
        delta_p = (np.exp(-nll) - np.exp(-nll_reference)).astype(np.float32)
        return RowStatistics(nll, nll_reference, kld, delta_p, top, packed.top), bound

    def __exit__(self, *_error: object) -> None:
        self._file.close()
