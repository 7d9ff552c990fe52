"""``edgeq compensate``: make the adapter, and measure the file with and without it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType

from converters.gguf_file import GgufFile, open_gguf
from converters.gguf_header import NATIVE_DTYPES, Field
from converters.imatrix_file import SKETCH_KEY, sketch_of
from edgeq import provenance
from edgeq.calibration import collect
from edgeq.calibration.collector import free_bytes
from edgeq.calibration.moments import groups_of_layers
from edgeq.compensating.adapter import (
    OUTPUT,
    Pair,
    adapter_fields,
    applied,
    header_bytes,
    pair_bytes,
    write_adapter,
)
from edgeq.compensating.low_rank import Correction, choose_ranks, correct
from edgeq.compensating.results import (
    Compensated,
    Spending,
    left_out_note,
    summed,
    verdict,
)
from edgeq.console import Steps
from edgeq.differing import screen
from edgeq.errors import RecipeError
from edgeq.opening import (
    Reference,
    SourceChoice,
    UsedText,
    check_output,
    open_reference,
    prepare_texts,
)
from edgeq.proving import check_not_calibrated_on, measure_files, stored_text
from edgeq.quantizers.factor import damped
from edgeq.recipe import TextChoice
from edgeq.runtime.encoders import decode
from edgeq.runtime.model import Tokens
from edgeq.workdir import WorkDirectory, replacing

DEFAULT_SHARE = 0.02  # of the file's bytes
SHRINKAGE = 0.5  # of second moments towards their diagonal, as where errors are fed back
DAMPENING = 0.01
MOST_RANKS = 256
_LEEWAY = 8  # a tensor may get so many times the ranks that all would get alike
_MEMORY = 0.4  # of what is free, for the second moments of one pass over the text


def compensate(
    model: Path,
    reference: str,
    out: Path,
    texts: TextChoice,
    *,
    size_bytes: int | None,
    rank: int | None,
    prove: bool,
    source: SourceChoice,
    steps: Steps,
) -> Compensated:
    """Write a LoRA adapter that takes away the most of a quantized file's error.

    Parameters
    ----------
    model : the quantized file, with the weights of `reference`: not folded, rotated or tuned
    size_bytes : of the adapter at most; default DEFAULT_SHARE of the file
    rank : of every weight instead
    prove : measure the file with and without it on held-out text

    Raises
    ------
    RecipeError
        Nothing is quantized, the file was folded, or no rank fits into the bytes.
    EvaluationError
        The file is of another model than the reference, or was calibrated on the text to judge on.
    CalibrationError
        The text is too short, or no text.
    ConversionError
        A file cannot be read or written.
    """
    if size_bytes is not None and rank is not None:
        raise RecipeError("--size and --rank: contradict each other. Give one of them.")
    if rank is not None and not 1 <= rank <= MOST_RANKS:
        raise RecipeError(f"--rank: got {rank}, expected 1 to {MOST_RANKS}.")
    check_output(out, (model, reference, *texts.files))
    file = open_gguf(model)
    _check_not_folded(file)
    with WorkDirectory(source.work) as work:
        opened = open_reference(reference, source, work, steps)
        with steps.step("compare") as progress:
            screen(file.paths[0], opened.path, progress)
        candidates = _correctable(file, opened.file)
        shapes = {name: file.tensors[name].shape for name in candidates}
        names = applied(file.paths[0], file.architecture, shapes, work.path, source.n_threads)
        used = prepare_texts(
            texts,
            opened,
            work,
            steps,
            calibrates=True,
            evaluates=prove,
            n_threads=source.n_threads,
        )
        if used.calibration is None:
            raise RecipeError("compensate: no text was prepared. Give --text FILE.")
        notes = (*used.notes, *_judging_notes(file, used.evaluation, texts))
        fields = _fields(file, opened, used.calibration)
        limit = int(DEFAULT_SHARE * file.size_bytes) if size_bytes is None else size_bytes
        making = _Making(file, opened.file, names, source.n_threads)
        found = making.corrections(used.calibration.rows, making.most(limit, rank), steps)
        if rank is None:
            ranks = making.ranks(found, limit - header_bytes(fields), limit)
        else:
            ranks = {name: min(rank, len(one.gains)) for name, one in found.items()}
        pairs = {name: Pair(found[name].b[:, :n], found[name].a[:n]) for name, n in ranks.items()}
        with replacing(out) as temporary:
            write_adapter(temporary, fields, pairs)
            measured = measure_files(
                [(file.paths[0], temporary), (file.paths[0], None)],
                None if used.evaluation is None else opened.path,
                None if used.evaluation is None else used.evaluation.rows,
                n_ctx=texts.n_ctx,
                speed=prove,
                n_threads=source.n_threads,
                steps=steps,
            )
    spent = {name: making.spending(name, found[name], n) for name, n in ranks.items()}
    predicted, as_types = summed(spent, making.losses(found))
    left_out = [name for name in candidates if name not in found]
    n_bytes = out.stat().st_size
    notes += (*left_out_note(left_out), verdict(predicted, as_types, file.size_bytes + n_bytes))
    measured = replace(measured, notes=notes)
    return Compensated(out, n_bytes, spent, len(candidates), predicted, as_types, measured)


def _check_not_folded(file: GgufFile) -> None:
    """Refuse a file that says it has other weights than its source."""
    try:
        method = json.loads(str(file.value("edgeq.method", "{}")))
        changes = [bool(method.get("transforms")), bool(method.get("tune_steps"))]
    except (ValueError, AttributeError):
        changes = []  # the weights themselves are compared as well
    if any(changes):
        raise RecipeError(
            f"{file.path}: was exported with folds or tuning, so its weights are not its source's "
            "rounded; expected a file without them. Export it with --transform none --tune 0."
        )


def _correctable(file: GgufFile, source: GgufFile) -> tuple[str, ...]:
    """Return the matrices that are quantized and that llama.cpp applies an adapter to.

    Not the embedding, which llama.cpp reads with factors of its own and, where it is also the
    output matrix, cannot correct as that; nor experts.
    """
    found = tuple(
        name
        for name, info in file.tensors.items()
        if info.qtype not in NATIVE_DTYPES
        and len(info.shape) == 2
        and name.endswith(".weight")
        and (name.startswith("blk.") or name == OUTPUT)
        and name in source.tensors
    )
    if not found:
        raise RecipeError(
            f"{file.path}: has no quantized matrix that an adapter can correct; expected some "
            "beside embedding and experts. Give a quantized file."
        )
    return found


def _judging_notes(file: GgufFile, text: UsedText | None, texts: TextChoice) -> tuple[str, ...]:
    if text is None:
        return ()
    names = " + ".join(text.names)
    part = stored_text(file.paths[0], text.rows, Path(names))
    return check_not_calibrated_on([file.path], part, names, force=texts.force)


def _fields(file: GgufFile, reference: Reference, text: UsedText) -> dict[str, Field]:
    """Return the adapter's metadata: what it is for, and what it was calibrated on."""
    string = GGUFValueType.STRING
    about = {
        "base": {"name": file.path.name, "sha256": file.sha256()},
        "source": {"name": reference.path.name, "sha256": reference.sha256},
        "versions": provenance.versions(),
    }
    more = {
        f"edgeq.{key}": Field(json.dumps(value, sort_keys=True), string)
        for key, value in about.items()
    }
    sketch = sorted({*text.sketch, *(sketch_of(file) or ())})
    if sketch:
        more[SKETCH_KEY] = Field(sketch, GGUFValueType.ARRAY, GGUFValueType.UINT64)
    return adapter_fields(file.architecture, more)


class _Making:
    """The corrections of one file's weights."""

    def __init__(
        self, file: GgufFile, source: GgufFile, names: Sequence[str], n_threads: int | None
    ) -> None:
        self.file = file
        self.source = source
        self.names = names
        self.n_threads = n_threads
        layers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
        self.n_branches = 2 * len(layers)

    def share(self, name: str) -> float:
        """Return how much a relative error of the outputs counts: the output matrix is alone."""
        return float(self.n_branches) if name == OUTPUT else 1.0

    def rank_bytes(self, name: str) -> int:
        """Return the bytes of one rank of a weight."""
        return 2 * sum(self.file.tensors[name].shape)

    def most(self, size_bytes: int, rank: int | None) -> int:
        """Return how many ranks of a weight are looked at."""
        if rank is not None:
            return rank
        alike = size_bytes / sum(self.rank_bytes(name) for name in self.names)
        return max(1, min(MOST_RANKS, math.ceil(_LEEWAY * (1 + alike))))

    def corrections(self, rows: Tokens, most: int, steps: Steps) -> dict[str, Correction]:
        """Return the leading ranks of every weight that saw an input and has an error."""
        found = {}
        for names in self._groups():
            with steps.step("calibrate") as progress:
                seen = collect(
                    self.file.paths[0],
                    rows,
                    hessians=names,
                    output_tensor=OUTPUT in names,
                    n_threads=self.n_threads,
                    progress=progress,
                )
            with steps.step("correct") as progress:
                for done, name in enumerate(names, start=1):
                    if seen.first_with.get(name, name) in seen.hessians:
                        one = self._correction(name, seen.hessian(name)[0], most)
                        if len(one.gains):
                            found[name] = one
                    progress(done, len(names))
        if not found:
            raise RecipeError(
                f"{self.file.path}: nothing to correct in its {len(self.names)} weights that an "
                "adapter reaches; expected errors of rounding. Use the file as it is."
            )
        return found

    def _groups(self) -> list[list[str]]:
        """Return the weights by passes over the text: some layers at a time."""
        shapes = {name: self.file.tensors[name].shape for name in self.names}
        return groups_of_layers(shapes, int(_MEMORY * free_bytes(unknown=1 << 32)))

    def _correction(self, name: str, hessian: npt.NDArray[np.float32], most: int) -> Correction:
        info = self.file.tensors[name]
        weight = self.source.read_float(name)
        packed = np.ascontiguousarray(self.file.read_bytes(name))
        values = decode(packed, info.qtype, n_threads=self.n_threads)
        return correct(weight, weight - values, damped(hessian, SHRINKAGE, DAMPENING), most)

    def losses(self, found: Mapping[str, Correction]) -> float:
        """Return the sum of the weights' relative losses."""
        return sum(self.share(name) * one.loss / one.energy for name, one in found.items())

    def ranks(self, found: Mapping[str, Correction], left: int, size_bytes: int) -> dict[str, int]:
        """Return the rank of every weight that gets one."""
        ranks = choose_ranks(
            {name: self.share(name) * one.gains / one.energy for name, one in found.items()},
            {name: pair_bytes(name) for name in found},
            {name: self.rank_bytes(name) for name in found},
            left,
        )
        if not ranks:
            least = min(self.rank_bytes(name) + pair_bytes(name) for name in self.names)
            raise RecipeError(
                f"--size: no rank of any weight fits into {size_bytes} bytes; expected at least "
                f"{size_bytes - left + least}. Allow more."
            )
        return {name: ranks[name] for name in found if name in ranks}

    def spending(self, name: str, one: Correction, rank: int) -> Spending:
        """Return what a weight got for its bytes."""
        size = rank * self.rank_bytes(name)
        before = self.share(name) * one.loss / one.energy
        after = before - self.share(name) * float(one.gains[:rank].sum()) / one.energy
        bits = 8 * size / math.prod(self.file.tensors[name].shape)
        return Spending(rank, size, before, after, before / 4**bits)
