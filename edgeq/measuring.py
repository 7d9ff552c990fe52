"""Measured losses: types given to tensors of the model that llama.cpp has loaded, file or no file.

Whatever is measured is kept in the work directory under a hash of the types, so that an
interrupted search goes on where it was.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from safetensors import safe_open

from converters.gguf_file import GgufFile, TensorSource, write_gguf
from edgeq import provenance
from edgeq.calibration import collect
from edgeq.calibration.collector import free_bytes
from edgeq.calibration.moments import groups_of_layers
from edgeq.console import Progress, Steps
from edgeq.errors import RecipeError
from edgeq.evaluation import evaluate, store_reference
from edgeq.evaluation.patched import PatchedModel
from edgeq.execution import Executor, Here
from edgeq.layer_rounding import Importances
from edgeq.opening import Reference, UsedText
from edgeq.quantization import quantize_tensor
from edgeq.quantizers import QUANTIZERS, Inputs, Quantizer, importances_of, make_quantizer
from edgeq.runtime.encoders import FloatArray, Packed, decode
from edgeq.runtime.model import Tokens
from edgeq.runtime.presets import quantizable_tensors
from edgeq.workdir import WorkDirectory, file_name, save_arrays

PATCHABLE = 5e8  # weights of a model that is changed in memory, as float32: 2 GB
_MOMENTS_FRACTION = 0.1  # of free memory, for second moments of one pass over a large model
LOSS_CHUNKS = 4  # of text for second moments that only judge: nothing is fitted to them
Types = Mapping[str, GGMLQuantizationType]


@dataclass(frozen=True, eq=False)
class Ground:
    """What costs and measurements stand on.

    Attributes
    ----------
    importances : tensor name to (n_mat, n_in) float32 mean squared inputs; None: no calibration
    weighed_by : their hash
    quantizer : as in the recipe: rounds what is judged
    calibration, tuning : text; None where there is none
    types : that tensors may get
    """

    reference: Reference
    importances: Importances | None
    weighed_by: str | None
    quantizer: str
    calibration: UsedText | None
    tuning: UsedText | None
    types: tuple[GGMLQuantizationType, ...]
    seed: int = 0
    n_threads: int | None = None

    @property
    def about(self) -> dict[str, object]:
        """What every number made here depends on."""
        return {
            "reference": self.reference.sha256,
            "importances": self.weighed_by,
            "quantizer": self.quantizer,
            "text": None if self.calibration is None else self.calibration.manifest.sha256,
            "tuning": None if self.tuning is None else self.tuning.manifest.sha256,
            "versions": provenance.versions(QUANTIZERS.origin_of(self.quantizer)),
        }


@dataclass(frozen=True)
class Joint:
    """What some types together do to the model.

    Attributes
    ----------
    kld, kld_error : mean KL divergence from the float model on tuning text and its standard error
        over tokens, nats
    ppl_ratio : perplexity over the float model's
    """

    kld: float
    kld_error: float
    ppl_ratio: float


class Measurer(AbstractContextManager["Measurer", None]):
    """Measures types in a loaded model; a context manager that frees it.

    Attributes
    ----------
    notes : sentences for the report
    """

    def __init__(
        self, ground: Ground, work: WorkDirectory, executor: Executor, steps: Steps
    ) -> None:
        self.ground = ground
        self.work = work
        self.executor = executor if executor.has_files else Here()  # models are loaded from files
        self.steps = steps
        self.notes: list[str] = []
        self.file: GgufFile = ground.reference.file
        quantizable = quantizable_tensors(ground.reference.path)
        self.names = tuple(name for name in self.file.tensors if name in quantizable)
        self.quantizer = make_quantizer(ground.quantizer)
        if self.quantizer.uses_hessian and self.is_large:
            self.quantizer = make_quantizer("rtn")
            self.notes.append("Costs are those of rounding to nearest: the model is large.")
        self._hessians: dict[str, FloatArray] | None = None
        self._encoded: dict[tuple[str, GGMLQuantizationType], Path] = {}  # that are there

    def joint(self, types: Types, n_chunks: int | None = None) -> Joint:
        """Return what these types do, every other tensor being float.

        Parameters
        ----------
        n_chunks : of tuning text; None: all of it
        """
        return self.joints([types], n_chunks)[0]

    def joints(
        self,
        choices: Sequence[Types],
        n_chunks: int | None = None,
        progress: Progress | None = None,
    ) -> list[Joint]:
        """Return what each choice of types does, see ``joint``."""
        asked = {self._name_of(types, n_chunks): types for types in choices}
        about = {
            name: {
                **self.ground.about,
                "types": {tensor: qtype.name for tensor, qtype in types.items()},
                "chunks": n_chunks,
            }
            for name, types in asked.items()
        }
        missing = [name for name in asked if not self.work.has(name, about[name])]
        done = len(asked) - len(missing)
        for number, joint in self._measured([asked[name] for name in missing], n_chunks):
            text = json.dumps(vars(joint))
            name = missing[number]
            self.work.artefact(name, about[name], lambda out, text=text: out.write_text(text))  # type: ignore[misc]
            done += 1
            if progress is not None:
                progress(done, len(asked))
        names = [self._name_of(types, n_chunks) for types in choices]
        return [Joint(**json.loads((self.work.path / name).read_text())) for name in names]

    @staticmethod
    def _name_of(types: Types, n_chunks: int | None) -> str:
        named = {name: qtype.name for name, qtype in types.items()}
        key = hashlib.sha256(json.dumps([named, n_chunks]).encode()).hexdigest()[:24]
        return f"measured/{key}.json"

    def inputs(self, name: str, hessian: FloatArray | None) -> Inputs:
        """Return what the quantizer may know about a tensor's inputs."""
        shape = self.file.tensors[name].shape
        importances = importances_of(name, shape, self.ground.importances)
        return Inputs(importances, hessian if self.quantizer.uses_hessian else None)

    @property
    def is_large(self) -> bool:
        """Whether neither a float32 copy nor all second moments are held in memory."""
        return self.file.n_parameters > PATCHABLE

    def moments(self) -> Iterator[tuple[str, FloatArray | None]]:
        """Yield every tensor with its second moments; of a large model some layers at a time."""
        text = self.ground.calibration
        if not self.is_large or text is None:
            known = self.hessians()
            yield from ((name, known.get(name)) for name in self.names)
            return
        shapes = {name: self.file.tensors[name].shape for name in self.names}
        groups = groups_of_layers(shapes, int(_MOMENTS_FRACTION * free_bytes(unknown=1 << 32)))
        for names in groups:
            found = self._collected(text.rows[:LOSS_CHUNKS], names)
            yield from ((name, found.pop(name, None)) for name in names)

    def hessians(self) -> dict[str, FloatArray]:
        """Return the second moments of the float model, (n_mat, n_in, n_in), from llama.cpp."""
        text = self.ground.calibration
        if self._hessians is None and text is not None:
            rows = text.rows if self.quantizer.uses_hessian else text.rows[:LOSS_CHUNKS]
            self._hessians = self._collected(rows, self.names)
        return self._hessians or {}

    def _collected(self, rows: Tokens, names: Sequence[str]) -> dict[str, FloatArray]:
        with self.steps.step("moments") as progress:
            found = collect(
                self.ground.reference.path,
                rows,
                hessians=names,
                output_tensor=True,
                n_threads=self.ground.n_threads,
                progress=progress,
                directory=self.work.path,
            )
        return {
            name: found.hessian(name)
            for name in names
            if found.first_with.get(name) in found.hessians
        }

    def write_nearest(self, types: Types) -> Path:
        """Write a file of these types, rounded to nearest: good for its size and speed."""
        file, ground, nearest = self.file, self.ground, make_quantizer("rtn")

        def load(name: str) -> Packed:
            return quantize_tensor(
                file, name, types[name], ground.importances, nearest, n_threads=ground.n_threads
            )

        return self._write(self.work.path / "nearest.gguf", types, load)

    def _write(self, out: Path, types: Types, load: Callable[[str], npt.NDArray[Any]]) -> Path:
        """Write the reference with other types; `load` gives the data of those tensors."""
        file = self.file

        def source(name: str) -> TensorSource:
            info = file.tensors[name]
            is_other = name in types
            return TensorSource(
                name,
                types.get(name, info.qtype),
                info.shape,
                lambda: load(name) if is_other else file.read_bytes(name),
            )

        return write_gguf(out, file.fields, [source(name) for name in file.tensors])[0]

    def _measured(
        self, choices: Sequence[Types], n_chunks: int | None
    ) -> Iterator[tuple[int, Joint]]:
        """Yield number and result of every choice: in a loaded model, of a large one as a file."""
        if not choices:
            return
        pairs = dict.fromkeys(pair for types in choices for pair in types.items())
        encoded = self._encoded_as(list(pairs))
        if self.is_large:
            for number, types in enumerate(choices):
                yield number, self._joint_of_file(types, encoded, n_chunks)
            return
        tasks = [
            _Judging(
                self._float32,
                self._base,
                self.names,
                {name: (qtype, encoded[name, qtype]) for name, qtype in types.items()},
                n_chunks,
                self.ground.n_threads,
            )
            for types in choices
        ]
        yield from self.executor.each(_judge, tasks)

    def _joint_of_file(
        self,
        types: Types,
        encoded: Mapping[tuple[str, GGMLQuantizationType], Path],
        n_chunks: int | None,
    ) -> Joint:
        """Return what a file of these types does: nothing of the model has to fit into memory."""

        def load(name: str) -> Packed:
            with safe_open(encoded[name, types[name]], framework="numpy") as part:
                packed: Packed = part.get_tensor(name)
            return packed

        out, n_threads = self.work.path / "joint.gguf", self.ground.n_threads
        try:
            path = self._write(out, types, load)
            found = evaluate(path, None, self._base, chunks=n_chunks, n_threads=n_threads)
        finally:
            out.unlink(missing_ok=True)
        kld, ratio = found.summary.kld, found.summary.ppl_ratio
        return Joint(max(0.0, kld.value), kld.error, ratio.value)

    @functools.cached_property
    def _base(self) -> Path:
        """The float model's logits on the tuning text."""
        ground = self.ground
        path = ground.reference.path if self.is_large else self._float32
        if ground.tuning is None:
            raise RecipeError("there is no tuning text to measure on. Give --text.")
        rows = ground.tuning.rows
        with self.steps.step("tuning logits") as progress:
            return self.work.artefact(
                "tuning.base",
                {
                    "reference": ground.reference.sha256,
                    "text": ground.tuning.manifest.sha256,
                    "versions": provenance.versions(),
                },
                lambda out: store_reference(
                    path,
                    rows,
                    out,
                    kind="base",
                    n_ctx=rows.shape[1],
                    n_threads=ground.n_threads,
                    progress=progress,
                ),
            )

    @functools.cached_property
    def _float32(self) -> Path:
        """The reference with its matrices as F32: others cannot be replaced exactly."""
        file, f32 = self.file, GGMLQuantizationType.F32
        if all(file.tensors[name].qtype == f32 for name in self.names):
            return self.ground.reference.path
        types = dict.fromkeys(self.names, f32)
        return self.work.artefact(
            "float32.gguf",
            {"reference": self.ground.reference.sha256},
            lambda out: self._write(out, types, file.read_float),
        )

    def _encoded_as(
        self, pairs: Sequence[tuple[str, GGMLQuantizationType]]
    ) -> dict[tuple[str, GGMLQuantizationType], Path]:
        """Return safetensors files with the packed rows of tensors as types, each made once."""
        names = {
            (name, qtype): f"encoded/{file_name(name)}-{qtype.name}.safetensors"
            for name, qtype in pairs
            if (name, qtype) not in self._encoded
        }
        about = {pair: {**self.ground.about, "type": pair[1].name} for pair in names}
        missing = [pair for pair in names if not self.work.has(names[pair], about[pair])]
        tasks = [self._encoding(name, qtype) for name, qtype in missing]
        for number, packed in self.executor.each(_encode, tasks):
            name, qtype = missing[number]
            arrays = {name: packed}
            self.work.artefact(
                names[name, qtype],
                about[name, qtype],
                lambda out, arrays=arrays: save_arrays(arrays, out),  # type: ignore[misc]
            )
        self._encoded |= {pair: self.work.path / name for pair, name in names.items()}
        return self._encoded

    def _encoding(self, name: str, qtype: GGMLQuantizationType) -> "_Encoding":
        hessian = self.hessians().get(name) if self.quantizer.uses_hessian else None
        return _Encoding(
            self.executor.portable(self.file, [name]),
            name,
            qtype,
            self.quantizer,
            self.inputs(name, hessian),
            self.ground.n_threads,
        )

    def __exit__(self, *_error: object) -> None:
        _close()


@dataclass(frozen=True, eq=False)
class _Encoding:
    """One tensor to be quantized as one type."""

    file: GgufFile
    name: str
    qtype: GGMLQuantizationType
    quantizer: Quantizer
    inputs: Inputs
    n_threads: int | None


def _encode(task: _Encoding) -> Packed:
    weight = task.file.read_float(task.name)
    return task.quantizer.quantize(
        task.name, weight, task.qtype, task.inputs, n_threads=task.n_threads
    ).packed


@dataclass(frozen=True, eq=False)
class _Judging:
    """Types to be measured in the model that a process has loaded.

    Attributes
    ----------
    path, base : the float32 model, and its logits
    names : of the tensors that may change
    encoded : tensor name to its type and the file with its packed rows
    """

    path: Path
    base: Path
    names: tuple[str, ...]
    encoded: Mapping[str, tuple[GGMLQuantizationType, Path]]
    n_chunks: int | None
    n_threads: int | None


_loaded: dict[tuple[Path, Path], PatchedModel] = {}  # of this process: at most one


def _judge(task: _Judging) -> Joint:
    key = (task.path, task.base)
    if key not in _loaded:
        _close()
        _loaded[key] = PatchedModel(*key, task.names, n_threads=task.n_threads)

    def values(name: str) -> FloatArray:
        qtype, path = task.encoded[name]
        with safe_open(path, framework="numpy") as part:
            return decode(part.get_tensor(name), qtype, n_threads=task.n_threads)

    model = _loaded[key]
    model.put(
        {
            name: (qtype, lambda name=name: values(name))  # type: ignore[misc]
            for name, (qtype, _) in task.encoded.items()
        }
    )
    kld, ln_ratio = model.judge(task.n_chunks)
    return Joint(max(0.0, kld.value), kld.error, math.exp(ln_ratio.value))


def _close() -> None:
    """Free the model of this process."""
    while _loaded:
        _loaded.popitem()[1].close()
