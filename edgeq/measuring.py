"""Measured losses: types given to tensors of the model that llama.cpp has loaded, file or no file.

Whatever is measured is kept in the work directory under a hash of the types, so that an
interrupted search goes on where it was.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGMLQuantizationType
from safetensors import safe_open

from converters.gguf_file import GgufFile, TensorSource, write_gguf
from edgeq import provenance
from edgeq.calibration import collect
from edgeq.console import Steps
from edgeq.errors import RecipeError
from edgeq.evaluation import store_reference
from edgeq.evaluation.patched import PatchedModel
from edgeq.opening import Reference, UsedText
from edgeq.quantization import Importances, quantize_tensor
from edgeq.quantizers import QUANTIZERS, Inputs, importances_of, make_quantizer
from edgeq.runtime.encoders import FloatArray, Packed, decode
from edgeq.runtime.presets import quantizable_tensors
from edgeq.workdir import WorkDirectory, file_name, save_arrays

_LOSS_CHUNKS = 4  # of text for second moments that only judge: nothing is fitted to them
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

    def __init__(self, ground: Ground, work: WorkDirectory, steps: Steps) -> None:
        self.ground = ground
        self.work = work
        self.steps = steps
        self.notes: list[str] = []
        self.file: GgufFile = ground.reference.file
        quantizable = quantizable_tensors(ground.reference.path)
        self.names = tuple(name for name in self.file.tensors if name in quantizable)
        self.quantizer = make_quantizer(ground.quantizer)
        self._model: PatchedModel | None = None
        self._hessians: dict[str, FloatArray] | None = None
        self._encoded: dict[tuple[str, GGMLQuantizationType], Path] = {}

    def joint(self, types: Types, n_chunks: int | None = None) -> Joint:
        """Return what these types do, every other tensor being float.

        Parameters
        ----------
        n_chunks : of tuning text; None: all of it
        """
        named = {name: qtype.name for name, qtype in types.items()}
        key = hashlib.sha256(json.dumps([named, n_chunks]).encode()).hexdigest()[:24]
        path = self.work.artefact(
            f"measured/{key}.json",
            {**self.ground.about, "types": named, "chunks": n_chunks},
            lambda out: out.write_text(json.dumps(vars(self._run(types, n_chunks)))),
        )
        return Joint(**json.loads(path.read_text()))

    def inputs(self, name: str, hessian: FloatArray | None) -> Inputs:
        """Return what the quantizer may know about a tensor's inputs."""
        shape = self.file.tensors[name].shape
        importances = importances_of(name, shape, self.ground.importances)
        return Inputs(importances, hessian if self.quantizer.uses_hessian else None)

    def hessians(self) -> dict[str, FloatArray]:
        """Return the second moments of the float model, (n_mat, n_in, n_in), from llama.cpp."""
        text = self.ground.calibration
        if self._hessians is None and text is not None:
            rows = text.rows if self.quantizer.uses_hessian else text.rows[:_LOSS_CHUNKS]
            with self.steps.step("moments") as progress:
                found = collect(
                    self.ground.reference.path,
                    rows,
                    hessians=self.names,
                    output_tensor=True,
                    n_threads=self.ground.n_threads,
                    progress=progress,
                )
            self._hessians = {
                name: found.hessian(name)
                for name, first in found.first_with.items()
                if first in found.hessians
            }
        return self._hessians or {}

    def write_nearest(self, types: Types) -> Path:
        """Write a file of these types, rounded to nearest: good for its size and speed."""
        file, ground, nearest = self.file, self.ground, make_quantizer("rtn")

        def source(name: str) -> TensorSource:
            info = file.tensors[name]
            qtype = types.get(name, info.qtype)
            return TensorSource(
                name,
                qtype,
                info.shape,
                lambda: quantize_tensor(
                    file, name, qtype, ground.importances, nearest, n_threads=ground.n_threads
                ),
            )

        out = self.work.path / "nearest.gguf"
        return write_gguf(out, file.fields, [source(name) for name in file.tensors])[0]

    def _run(self, types: Types, n_chunks: int | None) -> Joint:
        model = self._opened()
        model.put(
            {
                name: (qtype, lambda name=name, qtype=qtype: self._values(name, qtype))  # type: ignore[misc]
                for name, qtype in types.items()
            }
        )
        kld, ln_ratio = model.judge(n_chunks)
        return Joint(max(0.0, kld.value), kld.error, math.exp(ln_ratio.value))

    def _opened(self) -> PatchedModel:
        if self._model is None:
            ground = self.ground
            if ground.tuning is None:
                raise RecipeError("there is no tuning text to measure on. Give --text.")
            rows = ground.tuning.rows
            path = self._float32()
            with self.steps.step("tuning logits") as progress:
                base = self.work.artefact(
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
            self._model = PatchedModel(path, base, self.names, n_threads=ground.n_threads)
        return self._model

    def _float32(self) -> Path:
        """Return the reference with its matrices as F32: others cannot be replaced exactly."""
        file, f32 = self.file, GGMLQuantizationType.F32
        if all(file.tensors[name].qtype == f32 for name in self.names):
            return self.ground.reference.path

        def source(name: str) -> TensorSource:
            info = file.tensors[name]
            if name in self.names:
                return TensorSource(name, f32, info.shape, lambda: file.read_float(name))
            return TensorSource(name, info.qtype, info.shape, lambda: file.read_bytes(name))

        return self.work.artefact(
            "float32.gguf",
            {"reference": self.ground.reference.sha256},
            lambda out: write_gguf(out, file.fields, [source(name) for name in file.tensors]),
        )

    def _values(self, name: str, qtype: GGMLQuantizationType) -> FloatArray:
        """Return what a tensor stands for as `qtype`, in its shape or flat; encoded once."""
        if (name, qtype) not in self._encoded:
            self._encoded[name, qtype] = self.work.artefact(
                f"encoded/{file_name(name)}-{qtype.name}.safetensors",
                {**self.ground.about, "type": qtype.name},
                lambda out: save_arrays({name: self._packed(name, qtype)}, out),
            )
        with safe_open(self._encoded[name, qtype], framework="numpy") as part:
            return decode(part.get_tensor(name), qtype, n_threads=self.ground.n_threads)

    def _packed(self, name: str, qtype: GGMLQuantizationType) -> Packed:
        hessian = self.hessians().get(name) if self.quantizer.uses_hessian else None
        weight = self.file.read_float(name)
        inputs = self.inputs(name, hessian)
        n_threads = self.ground.n_threads
        return self.quantizer.quantize(name, weight, qtype, inputs, n_threads=n_threads).packed

    def __exit__(self, *_error: object) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None
