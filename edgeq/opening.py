"""The first two steps of every command: the float reference, and the texts for it."""

import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from safetensors import safe_open

import edgeq
from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.errors import ConversionError
from converters.gguf_file import GgufFile, open_gguf
from converters.gguf_header import FLOATS
from converters.hub import resolve_model
from edgeq.console import Progress, Steps
from edgeq.errors import EvaluationError, RecipeError
from edgeq.recipe import TextChoice
from edgeq.runtime.model import Model, Tokens
from edgeq.texts import Manifest, Part, check_unused, prepare, read_sources, sample_parts
from edgeq.workdir import WorkDirectory, file_sha256, save_arrays

_EXPONENT_BITS = {  # all of them set: NaN or infinite
    GGMLQuantizationType.F32: ("<u4", 0x7F800000),
    GGMLQuantizationType.F16: ("<u2", 0x7C00),
    GGMLQuantizationType.BF16: ("<u2", 0x7F80),
}
_FINITE_STEP = 1 << 22  # weights looked at in one go
AUTO_CHUNKS = 32
SHARES = {"calibration": 0.8, "tuning": 0.1, "evaluation": 0.2}  # of the calibration files
SKETCH_FRACTION = 64


@dataclass(frozen=True)
class SourceChoice:
    """How the model is opened and where intermediate results go."""

    work: Path
    allow_requantize: bool = False
    allow_pickle: bool = False
    n_threads: int | None = None


@dataclass(frozen=True)
class Reference:
    """The float model that everything is judged against: a GGUF file and its hash.

    `checkpoint` is the directory that it was converted from; None: the user gave a GGUF file.
    """

    file: GgufFile
    sha256: str
    checkpoint: Path | None = None

    @property
    def path(self) -> Path:
        """The file, or its first part, as llama.cpp loads it."""
        return self.file.paths[0]


def check_output(out: Path, inputs: Iterable[str | Path | None]) -> None:
    """Refuse, before any work, to write where nothing can be or over a file that is read.

    Parameters
    ----------
    out : the file, or of a file in parts the name without their numbers
    inputs : what the run reads: models, plans, texts as the command line names them

    Raises
    ------
    RecipeError
    """
    if not out.parent.is_dir():
        raise RecipeError(f"{out}: there is no directory {out.parent}. Make it first.")
    parts = out.parent.glob(f"{glob.escape(out.stem)}-?????-of-?????.gguf")
    written = [path for path in (out, *parts) if path.exists()]
    read = [_text_path(str(path)) for path in inputs if path is not None]
    for path in read:
        if path.exists() and any(path.samefile(other) for other in written):
            raise RecipeError(
                f"{out}: the output would overwrite {path}, which is read. Give another name."
            )


def open_reference(
    model: str, source: SourceChoice, work: WorkDirectory, steps: Steps
) -> Reference:
    """Open a float GGUF, or convert a checkpoint into one in the work directory.

    Raises
    ------
    ConversionError
        The model cannot be read or converted.
    RecipeError
        It is quantized already, and that is not allowed.
    """
    with steps.step("open") as progress:
        path = resolved = resolve_model(model)
        if path.is_dir():
            checkpoint = open_checkpoint(path, allow_pickle=source.allow_pickle)
            n_bytes = sum(tensor.n_bytes for tensor in checkpoint.tensors.values())
            # auto makes F16 of a float32 checkpoint, as llama.cpp does; a reference stays exact
            dtypes = {t.dtype for t in checkpoint.tensors.values() if len(t.shape) > 1}
            ftype = min(dtypes).lower() if dtypes in ({"F16"}, {"BF16"}) else "f32"
            report = counting(progress, n_bytes)
            path = work.artefact(
                "reference.gguf",
                {
                    "checkpoint": checkpoint.fingerprint(),
                    "name": path.resolve().name,  # it becomes general.name
                    "type": ftype,
                    "edgeq": edgeq.__version__,
                },
                lambda out: convert(checkpoint, out, ftype=ftype, progress=report),
            )
        file = open_gguf(path)
        quantized = {t.qtype.name for t in file.tensors.values() if t.qtype not in FLOATS}
        if quantized and not source.allow_requantize:
            raise RecipeError(
                f"{path}: is quantized already ({', '.join(sorted(quantized))}), expected F32, F16 "
                "or BF16. Give the float model, or accept a second rounding with "
                "--allow-requantize."
            )
        if path == resolved:  # a conversion has looked at every weight already
            _check_finite(file)
        return Reference(file, file.sha256(), resolved if path != resolved else None)


def _check_finite(file: GgufFile) -> None:
    """Refuse NaN and infinite weights by name; quantized tensors are left to the quantizer."""
    for name, tensor in file.tensors.items():
        if tensor.qtype not in _EXPONENT_BITS:
            continue
        dtype, mask = _EXPONENT_BITS[tensor.qtype]
        weights = file.read_bytes(name).reshape(-1).view(dtype)
        for start in range(0, len(weights), _FINITE_STEP):
            bad = np.flatnonzero((weights[start : start + _FINITE_STEP] & mask) == mask)
            if len(bad):
                place = np.unravel_index(start + int(bad[0]), tensor.shape)
                raise ConversionError(
                    f"{tensor.path}: {name}: the weight at {[int(i) for i in place]} is NaN or "
                    "infinite, expected a finite number. The file is damaged: fetch or convert it "
                    "again."
                )


def counting(progress: Progress, total: int) -> Callable[[int], None]:
    """Return a function that takes the bytes done since its last call and reports MiB."""
    done = 0

    def add(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(done >> 20, max(done, total) >> 20)

    return add


@dataclass(frozen=True, eq=False)
class UsedText:
    """Tokens of one part of the text, and what they are.

    Attributes
    ----------
    rows : (n_chunks, n_ctx) int32
    manifest : hashes of the part's tokens, chunks and passages
    names : the files it comes from, or ``auto``
    """

    rows: Tokens
    manifest: Manifest
    names: tuple[str, ...]

    @property
    def sketch(self) -> tuple[int, ...]:
        """One in 64 hashes of its passages: what a file remembers of its calibration text."""
        windows = self.manifest.windows
        return tuple(windows[windows % np.uint64(SKETCH_FRACTION) == 0].tolist())


@dataclass(frozen=True, eq=False)
class Texts:
    """What calibrates and what judges; a part that nobody needs is None.

    Attributes
    ----------
    tuning : separate text on which the rounding is verified
    notes : what a report must say about them
    """

    calibration: UsedText | None
    evaluation: UsedText | None
    notes: tuple[str, ...]
    tuning: UsedText | None = None


def prepare_texts(
    choice: TextChoice,
    reference: Reference,
    work: WorkDirectory,
    steps: Steps,
    *,
    calibrates: bool,
    evaluates: bool,
    tuning_chunks: int = 0,
    n_threads: int | None = None,
) -> Texts:
    """Read, sample or split the texts that are needed, once for each choice and model.

    Parameters
    ----------
    tuning_chunks : also hold out so many chunks of the calibration text

    Raises
    ------
    CalibrationError
        A text is empty, too short, or no text.
    EvaluationError
        The evaluation text was calibrated on, and that is not forced.
    """
    if not (calibrates or evaluates):
        return Texts(None, None, ())
    maker = _Maker(choice, reference, calibrates, evaluates, tuning_chunks, n_threads)
    with steps.step("text") as progress:
        path = work.artefact(
            "text.safetensors",
            {
                "reference": reference.sha256,
                "parts": maker.wanted,
                "tuning_chunks": tuning_chunks,
                "choice": {**vars(choice)},
                "files": {name: _text_sha256(name) for name in choice.files},
                "edgeq": edgeq.__version__,
            },
            lambda out: maker.make(out, progress),
        )
        return _load(path)


def _text_path(argument: str) -> Path:
    """Return the file of ``FILE`` or ``FILE@WEIGHT``."""
    path = Path(argument)
    if not path.exists() and "@" in argument:
        path = Path(argument.rpartition("@")[0])
    return path


def _text_sha256(argument: str) -> str:
    path = _text_path(argument)
    return file_sha256(path) if path.is_file() else ""


class _Maker:
    """Makes the parts that are wanted and stores them in one file."""

    def __init__(
        self,
        choice: TextChoice,
        reference: Reference,
        calibrates: bool,
        evaluates: bool,
        tuning_chunks: int,
        n_threads: int | None,
    ) -> None:
        self.choice = choice
        self.path = reference.path
        self.wanted = [
            name
            for name, is_wanted in (
                ("calibration", calibrates),
                ("tuning", calibrates and tuning_chunks > 0),
                ("evaluation", evaluates),
            )
            if is_wanted
        ]
        self.limits = {
            "calibration": choice.chunks,
            "tuning": tuning_chunks,
            "evaluation": choice.evaluation_chunks,
        }
        self.n_threads = n_threads

    def make(self, out: Path, progress: Progress) -> None:
        """Write the parts to `out`."""
        choice = self.choice
        with Model(self.path, vocab_only=True) as model:
            if choice.is_auto:
                parts = self._sampled(progress)
            else:
                parts = self._read(model)
            if "evaluation" in self.wanted and choice.evaluation:
                parts["evaluation"] = self._from_files(model, choice.evaluation, "evaluation")
        notes = []
        for used in ("calibration", "tuning"):
            if used not in parts or "evaluation" not in parts:
                continue
            note = check_unused(
                parts[used].manifest,
                parts["evaluation"],
                " + ".join(choice.evaluation) or "evaluation text",
                error=EvaluationError,
                force=choice.force,
            )
            notes += [] if note is None else [f"Judged on {used} text: {note}."]
        about = {
            "notes": notes,
            "manifests": {name: parts[name].manifest.to_json() for name in self.wanted},
            "names": {name: list(self._names(name)) for name in self.wanted},
        }
        rows = {name: parts[name].rows for name in self.wanted}
        save_arrays(rows, out, {"about": json.dumps(about)})

    def _names(self, part: str) -> tuple[str, ...]:
        choice = self.choice
        own = part == "evaluation" and choice.evaluation
        return choice.evaluation if own else choice.calibration

    def _from_files(self, model: Model, files: tuple[str, ...], part: str) -> Part:
        sources = read_sources(self.path, files)
        found = prepare(
            model,
            sources,
            chunk=self.choice.n_ctx,
            n_chunks={part: self.limits[part]},
            shares={part: 1.0},
        )
        return found[part]

    def _read(self, model: Model) -> dict[str, Part]:
        """Calibration text from files; without own evaluation text a part of it is held out."""
        choice = self.choice
        own = {"calibration", "tuning"} if choice.evaluation else set(SHARES)
        shares = {name: share for name, share in SHARES.items() if name in {*self.wanted} & own}
        if not shares:
            return {}
        if list(shares) == ["calibration"]:
            return {"calibration": self._from_files(model, choice.calibration, "calibration")}
        return prepare(
            model,
            read_sources(self.path, choice.calibration),
            chunk=choice.n_ctx,
            n_chunks=self.limits,
            shares={"calibration": SHARES["calibration"], **shares},
            seed=choice.seed,
        )

    def _sampled(self, progress: Progress) -> dict[str, Part]:
        """Text of the model's own, separate sequences for each part."""
        choice = self.choice
        judged_on_files = bool(choice.evaluation) or "evaluation" not in self.wanted
        n_chunks = {  # in this order: a part's number decides what it says
            "calibration": choice.chunks or AUTO_CHUNKS if "calibration" in self.wanted else 0,
            "evaluation": 0 if judged_on_files else choice.evaluation_chunks,
            "tuning": self.limits["tuning"] or 0 if "tuning" in self.wanted else 0,
        }
        if not any(n_chunks.values()):  # no calibration, and own files to judge on
            return {}
        parts = sample_parts(
            self.path,
            n_chunks,
            chunk=choice.n_ctx,
            seed=choice.seed,
            n_threads=self.n_threads,
            progress=progress,
        )
        return {name: part for name, part in parts.items() if len(part.rows)}


def _load(path: Path) -> Texts:
    with safe_open(path, framework="numpy") as file:
        about: dict[str, Any] = json.loads(file.metadata()["about"])
        parts = {
            name: UsedText(
                file.get_tensor(name).astype(np.int32),
                Manifest.from_json(about["manifests"][name]),
                tuple(about["names"][name]),
            )
            for name in file.keys()
        }
    return Texts(
        parts.get("calibration"),
        parts.get("evaluation"),
        tuple(about["notes"]),
        parts.get("tuning"),
    )


def values_sha256(values: Mapping[str, Any]) -> str:
    """Return a hash of named arrays."""
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values[name]).tobytes())
    return digest.hexdigest()
