"""Statistics of the inputs of every weight: importance matrix, means and second moments.

The user's own llama.cpp is the calibrator: it computes the model on the text, and
``edgeq.runtime.observer`` shows the inputs of every weight product. So every architecture that
llama.cpp runs can be calibrated, without torch.

The text is cut into chunks as llama-imatrix does it: tokenized once with what the vocabulary wants
at its start, cut into chunks of equal length (the remainder is dropped), and where the vocabulary
wants a beginning-of-sequence token it replaces the first token of every chunk.

References
----------
llama.cpp 0c1e57098: tools/imatrix/imatrix.cpp, compute_imatrix and collect_imatrix.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.imatrix_file import Imatrix
from edgeq.errors import CalibrationError
from edgeq.runtime.model import Model, Tokens
from edgeq.runtime.observer import MIN_ROWS, Observer, ProductInput

FloatArray = npt.NDArray[np.float32]

_FORMAT = "edgeq statistics 1"
N_UBATCH = 512  # tokens of one graph, as llama-imatrix; Model's default
_MEMORY_FRACTION = 0.8  # of what is free when calibration starts; the runtime needs the rest


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was seen of the inputs of a model's weights.

    Attributes
    ----------
    imatrix : sums of squares and counts per weight
    means : weight name to (n_mat, n_in) float32, mean inputs; zeros for an expert that saw nothing
    hessians : name of the first weight of a group to (n_mat, n_in, n_in) float32,
        2/N Σ x xᵀ over the N inputs x of that matrix; read from disk on access if loaded
    first_with : weight name to the first weight that always sees the same input (itself included)
    skipped : weight name to the reason why its input was never seen
    n_tokens : tokens that were run
    """

    imatrix: Imatrix
    means: dict[str, FloatArray]
    hessians: Mapping[str, FloatArray]
    first_with: dict[str, str]
    skipped: dict[str, str]
    n_tokens: int

    def hessian(self, name: str) -> FloatArray:
        """Return the second moments of the inputs of weight `name`, (n_mat, n_in, n_in) float32.

        Raises
        ------
        CalibrationError
            They were not collected.
        """
        first = self.first_with.get(name, name)
        if first not in self.hessians:
            raise CalibrationError(
                f"{name}: no second moments among the statistics; {len(self.hessians)} groups have "
                "them. Calibrate again with second moments for this tensor."
            )
        return self.hessians[first]

    def groups(self) -> list[tuple[str, ...]]:
        """Return the weights that share their input, group by group, in the order of the graph."""
        members: dict[str, list[str]] = {}
        for name, first in self.first_with.items():
            members.setdefault(first, []).append(name)
        return [tuple(names) for names in members.values()]

    def unseen(self) -> list[str]:
        """Return what saw no input, by name: "blk.3.ffn_down_exps.weight expert 5"."""
        return self.imatrix.unseen()

    def save(self, path: Path | str) -> None:
        """Write everything to one safetensors file; it appears when it is complete.

        Raises
        ------
        CalibrationError
            The path cannot be written.
        """
        from safetensors.numpy import save_file

        path = Path(path)
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name in self.imatrix.sums:
            arrays[f"sums/{name}"] = self.imatrix.sums[name]
            arrays[f"counts/{name}"] = self.imatrix.counts[name]
            arrays[f"means/{name}"] = self.means[name]
        arrays |= {f"hessians/{name}": self.hessians[name] for name in self.hessians}
        about = {
            "format": _FORMAT,
            "datasets": self.imatrix.datasets,
            "chunk_count": self.imatrix.chunk_count,
            "chunk_size": self.imatrix.chunk_size,
            "first_with": self.first_with,
            "skipped": self.skipped,
            "n_tokens": self.n_tokens,
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file(arrays, partial, metadata={"about": json.dumps(about)})
            partial.replace(path)
        except OSError as error:
            raise CalibrationError(
                f"{path}: cannot be written: {error.strerror or error}. "
                "Free space or choose another path."
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path | str) -> "Statistics":
        """Read what ``save`` wrote; second moments stay on disk until they are used.

        Raises
        ------
        CalibrationError
            The file is missing, damaged, or of another kind.
        """
        from safetensors import SafetensorError, safe_open

        try:
            file: Any = safe_open(path, framework="numpy")
            about = json.loads((file.metadata() or {})["about"])
            if about["format"] != _FORMAT:
                raise KeyError("format")
            arrays: dict[str, dict[str, Any]] = {"sums": {}, "counts": {}, "means": {}}
            hessians = []
            for key in file.keys():
                kind, _, name = key.partition("/")
                if kind == "hessians":
                    hessians.append(name)
                else:
                    arrays[kind][name] = file.get_tensor(key)
            return cls(
                imatrix=Imatrix(
                    arrays["sums"],
                    arrays["counts"],
                    tuple(about["datasets"]),
                    about["chunk_count"],
                    about["chunk_size"],
                ),
                means=arrays["means"],
                hessians=_StoredHessians(file, hessians),
                first_with=about["first_with"],
                skipped=about["skipped"],
                n_tokens=about["n_tokens"],
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{path}: no statistics of this version of edgeq ({error}). "
                "Delete it; it is computed again."
            ) from error


class _StoredHessians(Mapping[str, FloatArray]):
    """Second moments in an open safetensors file, read on access."""

    def __init__(self, file: Any, names: list[str]) -> None:
        self._file = file
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> FloatArray:
        if name not in self._names:
            raise KeyError(name)
        values: FloatArray = self._file.get_tensor(f"hessians/{name}")
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(eq=False)
class _Sums:
    """Running sums of one weight's inputs."""

    squares: npt.NDArray[np.float64]  # (n_mat, n_in)
    values: npt.NDArray[np.float64]  # (n_mat, n_in)
    counts: npt.NDArray[np.int64]  # (n_mat,)
    is_expert: bool

    @classmethod
    def zeros(cls, product: ProductInput) -> "_Sums":
        shape = (product.n_mat, product.n_in)
        counts = np.zeros(product.n_mat, np.int64)
        return cls(np.zeros(shape), np.zeros(shape), counts, product.expert_ids is not None)

    def imatrix_sums(self) -> FloatArray:
        """Return the sums of squares as llama-imatrix lays them out; see ``Imatrix.sums``."""
        rows = self.squares if self.is_expert else self.squares.reshape(1, -1)
        return rows.astype(np.float32)

    def imatrix_counts(self) -> npt.NDArray[np.int64]:
        return self.counts if self.is_expert else self.counts[:1]

    def means(self) -> FloatArray:
        return (self.values / np.maximum(self.counts, 1)[:, None]).astype(np.float32)


class Collector:
    """Sums up what an ``Observer`` shows; ``statistics`` gives the result.

    Parameters
    ----------
    hessians : collect second moments: of all weights, or of the named ones
    hessian_bytes : most bytes that the second moments may take; default: 80 % of the memory that is
        free now

    Notes
    -----
    Sums of squares are kept in float64 (llama-imatrix adds in float32, token by token). Second
    moments are products of one batch in float32, added up in float32: the relative error of a sum
    of n batches is about √n × 6e-8. Weights that share an input share one matrix.
    """

    def __init__(
        self, *, hessians: bool | Collection[str] = False, hessian_bytes: int | None = None
    ) -> None:
        self._wanted = hessians
        self._bytes_left = _available_bytes() if hessian_bytes is None else hessian_bytes
        self._sums: dict[str, _Sums] = {}
        self._hessians: dict[str, FloatArray] = {}
        self._seen_with: dict[str, set[str]] = {}
        self._now: dict[str, tuple[npt.NDArray[np.float64], ...]] = {}  # by first weight
        self._has_moments: set[str] = set()  # first weights whose input of this graph is in them
        self.times: dict[str, int] = {}

    def add(self, product: ProductInput) -> None:
        """Add one product's inputs.

        Raises
        ------
        CalibrationError
            An input is not finite, or the second moments do not fit into memory.
        """
        name, first = product.name, product.same_as
        if name == first:
            self._now[first] = _sums_of(product)
            self._has_moments.discard(first)
        if name not in self._sums:
            self._sums[name] = _Sums.zeros(product)
            self.times[name] = 0
            self._seen_with[name] = set()
        sums = self._sums[name]
        squares, values, counts = self._now[first]
        sums.squares += squares
        sums.values += values
        sums.counts += counts.astype(np.int64)
        self.times[name] += 1
        self._seen_with[name].add(first)
        wanted = self._wanted if isinstance(self._wanted, bool) else name in self._wanted
        if wanted and first not in self._has_moments:
            self._has_moments.add(first)
            self._add_moments(first, product)

    def statistics(
        self, *, datasets: Sequence[str], n_chunks: int, chunk: int, skipped: Mapping[str, str]
    ) -> Statistics:
        """Return the result; the collector cannot be used afterwards.

        Raises
        ------
        CalibrationError
            Nothing was seen, or weights share their input only sometimes, so that they have no
            common second moments.
        """
        if not self._sums:
            raise CalibrationError(
                f"no weight product with {MIN_ROWS} or more tokens was seen in {n_chunks} chunks "
                f"of {chunk} tokens. Give chunks of at least {MIN_ROWS} tokens."
            )
        first_with = {name: self._first_of(name) for name in self._sums}
        for first, hessian in self._hessians.items():
            counts = np.maximum(self._sums[first].counts, 1)
            hessian *= (2.0 / counts).astype(np.float32)[:, None, None]
        most = max(int(sums.counts.max()) for sums in self._sums.values())
        return Statistics(
            imatrix=Imatrix(
                sums={name: sums.imatrix_sums() for name, sums in self._sums.items()},
                counts={name: sums.imatrix_counts() for name, sums in self._sums.items()},
                datasets=tuple(datasets),
                chunk_count=most // chunk,  # llama-imatrix: of the most used expert
                chunk_size=chunk,
            ),
            means={name: sums.means() for name, sums in self._sums.items()},
            hessians=self._hessians,
            first_with=first_with,
            skipped={name: why for name, why in skipped.items() if name not in self._sums},
            n_tokens=n_chunks * chunk,
        )

    def _first_of(self, name: str) -> str:
        (first, *more) = self._seen_with[name]
        if not more and self.times[name] == self.times[first]:
            return first
        if first in self._hessians or name in self._hessians:
            raise CalibrationError(
                f"{name}: shares its input with {first} only in some of its products, so they have "
                "no common second moments. Calibrate without second moments for these two."
            )
        return name

    def _add_moments(self, first: str, product: ProductInput) -> None:
        if first not in self._hessians:
            shape = (product.n_mat, product.n_in, product.n_in)
            size = 4 * product.n_mat * product.n_in**2
            self._bytes_left -= size
            if self._bytes_left < 0:
                raise CalibrationError(
                    f"{product.name}: its second moments {shape} take {size / 2**20:.0f} MiB; "
                    f"{-self._bytes_left / 2**20:.0f} MiB more than may be used. Collect them for "
                    "fewer tensors at a time, or free memory."
                )
            self._hessians[first] = np.zeros(shape, np.float32)
        for matrix, rows in product.by_matrix():
            self._hessians[first][matrix] += rows.T @ rows  # numpy calls syrk: half of a product


def collect(
    model_path: Path | str,
    text: str | Tokens,
    *,
    chunk: int = 512,
    n_chunks: int | None = None,
    hessians: bool | Collection[str] = False,
    output_tensor: bool = False,
    parse_special: bool = False,
    datasets: Sequence[str] = (),
    n_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Run the model on a text and sum up the inputs of its weights.

    Parameters
    ----------
    model_path : GGUF file
    text : a text; or (n,) int32 tokens, cut into chunks like a text's; or (n_chunks, chunk) int32
        tokens, each row run as it is
    chunk : tokens of a chunk; for tokens of two dimensions their own length
    n_chunks : at most so many chunks; default all
    hessians : also collect second moments, of all weights or of the named ones
    output_tensor : also observe the output layer (llama-imatrix: ``--process-output``)
    parse_special : read special tokens spelled in `text`, as rendered conversations need
    datasets : names of the texts, to be stored
    n_threads : default: every CPU of this process
    progress : called with (chunks done, chunks in all)

    Raises
    ------
    CalibrationError
        The text is too short, the chunk is longer than the model's context, or the model's
        activations are not finite on it.
    RuntimeLibraryError
        llama.cpp refuses the model.
    """
    collector = Collector(hessians=hessians)
    observer = Observer(collector.add, output_tensor=output_tensor)
    if not isinstance(text, str) and text.ndim == 2:
        chunk = text.shape[1]
    with Model(model_path, n_ctx=chunk, n_threads=n_threads, cb_eval=observer) as model:
        rows = chunks_of(model, text, chunk, parse_special=parse_special)[:n_chunks]
        for done, row in enumerate(rows, start=1):
            model.logits(row)
            if done == 1 and set(collector.times.values()) == {-(-chunk // N_UBATCH)}:
                # no weight is used twice: nothing after the last one is needed
                observer.stop_after = next(reversed(collector.times))
            if progress is not None:
                progress(done, len(rows))
    return collector.statistics(
        datasets=datasets, n_chunks=len(rows), chunk=chunk, skipped=observer.skipped
    )


def chunks_of(
    model: Model, text: str | Tokens, chunk: int, *, parse_special: bool = False
) -> Tokens:
    """Cut a text into chunks as llama.cpp's tools do.

    Parameters
    ----------
    model : its vocabulary tokenizes
    text : a text; (n,) tokens of one; or (n_chunks, chunk) tokens, returned as they are
    chunk : tokens of a chunk
    parse_special : read special tokens spelled in the text

    Returns
    -------
    (n_chunks, chunk) int32, each row beginning with the beginning-of-sequence token if the
    vocabulary wants one; it replaces the token that was there

    Raises
    ------
    CalibrationError
        There is less than one chunk, or the chunk is longer than the model's context.
    """
    if 0 < model.n_ctx_train < chunk:  # 0: only the vocabulary is loaded
        raise CalibrationError(
            f"{model.path}: chunks of {chunk} tokens; the model was trained on at most "
            f"{model.n_ctx_train}. Choose shorter chunks."
        )
    tokens = model.tokenize(text, parse_special=parse_special) if isinstance(text, str) else text
    if tokens.size < chunk or tokens.size == 0:
        raise CalibrationError(
            f"the text has {tokens.size} tokens, expected at least {chunk}, one chunk. "
            "Give more text or choose shorter chunks."
        )
    if tokens.ndim == 2:
        return tokens
    rows = tokens[: len(tokens) // chunk * chunk].reshape(-1, chunk).astype(np.int32)
    if model.adds_bos:
        rows[:, 0] = model.bos
    return rows


def _sums_of(product: ProductInput) -> tuple[npt.NDArray[np.float64], ...]:
    """Return sums of squares and sums, (n_mat, n_in), and counts, (n_mat,), of one input."""
    shape = (product.n_mat, product.n_in)
    squares, values, counts = np.zeros(shape), np.zeros(shape), np.zeros(product.n_mat)
    with np.errstate(all="ignore"):  # checked below, with the tensor's name
        for matrix, rows in product.by_matrix():
            squares[matrix] = np.einsum("ij,ij->j", rows, rows)
            values[matrix] = rows.sum(axis=0)
            counts[matrix] = len(rows)
    if not np.isfinite(squares).all():
        matrix, channel = np.argwhere(~np.isfinite(squares))[0].tolist()
        raise CalibrationError(
            f"{product.name}: input channel {channel} of matrix {matrix} is not finite on this "
            "text. The model overflows: give its F32 or BF16 weights, or another text."
        )
    return squares, values, counts


def _available_bytes() -> int:
    """Return most of the memory that is free now; unlimited where the system does not tell."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 62
    return int(_MEMORY_FRACTION * free)
