"""What a file says about how it was made, and what it was calibrated on.

``edgeq.*`` keys of the metadata, beside the ``quantize.imatrix.*`` keys that llama.cpp writes. The
passages of the calibration text are kept as a sketch: one in 64 hashes of its windows of 13 words,
enough to notice later that somebody judges the file on text that it was calibrated on.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType

from converters.gguf_file import Field, GgufFile
from converters.imatrix_file import SKETCH_KEY, Imatrix, sketch_of
from edgeq.allocation import Plan, Planned
from edgeq.errors import EvaluationError
from edgeq.opening import Reference, Texts
from edgeq.quantizers import QUANTIZERS
from edgeq.recipe import Recipe
from edgeq.runtime.encoders import FloatArray
from edgeq.texts import Manifest
from edgeq.workdir import WorkDirectory

_VERSIONED = ("edgeq", "gguf", "llama-cpp-python", "numba", "numpy", "torch", "transformers")
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml/include/ggml.h


@dataclass(frozen=True, eq=False)
class Seen:
    """What calibration saw.

    Attributes
    ----------
    importances : tensor name to (n_mat, n_in) float32 mean squared inputs; None: no calibration
    weighed_by : their hash
    """

    texts: Texts
    imatrix: Imatrix | None
    importances: Mapping[str, FloatArray] | None
    weighed_by: str | None


def versions(*more: str) -> dict[str, str]:
    """Return the versions of everything that shapes the bytes, and of `more` distributions."""
    found = {}
    for name in (*_VERSIONED, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe(
    recipe: Recipe, reference: Reference, texts: Texts, planned: Planned, imatrix_sha256: str | None
) -> dict[str, Any]:
    """Return how a file was made, as JSON values."""
    parts = {
        "calibration": texts.calibration,
        "tuning": texts.tuning,
        "evaluation": texts.evaluation,
    }
    return {
        "source": {"name": reference.path.name, "sha256": reference.sha256},
        "model": _model(recipe, reference.file),
        "recipe": recipe.as_json(),
        "imatrix_sha256": imatrix_sha256,
        "texts": {
            name: {"names": list(part.names), **part.manifest.summary()}
            for name, part in parts.items()
            if part is not None
        },
        "plan": {
            "preset": planned.plan.preset,
            "bpw": round(planned.plan.bpw, 4),
            **planned.facts,
        },
        "method": dataclasses.asdict(recipe.method),
        "versions": versions(QUANTIZERS.origin_of(recipe.method.quantizer)),
    }


def _model(recipe: Recipe, file: GgufFile) -> dict[str, str | None]:
    """Return what the source says about itself, for a model card; None where it does not."""
    told = {
        key: None if field is None else str(field.value)
        for key in ("name", "license", "repo_url")
        for field in (file.fields.get(f"general.{key}"),)
    }
    if not Path(recipe.model).expanduser().exists():  # then it was fetched from the hub
        told["repo_url"] = f"https://huggingface.co/{recipe.model.partition('@')[0]}"
    return {"architecture": file.architecture, **told}


def fields(
    reference: Reference,
    plan: Plan,
    imatrix: Imatrix | None,
    imatrix_name: str,
    texts: Texts,
    provenance: Mapping[str, Any],
) -> dict[str, Field]:
    """Return the metadata of the output: the reference's, the file type, and the provenance."""
    out = {
        key: field
        for key, field in reference.file.fields.items()
        if not key.startswith(("edgeq.", "quantize."))
    }
    uint32, string = GGUFValueType.UINT32, GGUFValueType.STRING
    out["general.quantization_version"] = Field(_QUANTIZATION_VERSION, uint32)
    out["general.file_type"] = Field(plan.ftype, uint32)
    if imatrix is not None:
        int32 = GGUFValueType.INT32
        out["quantize.imatrix.file"] = Field(imatrix_name, string)
        if imatrix.datasets:
            out["quantize.imatrix.dataset"] = Field(", ".join(imatrix.datasets), string)
        out["quantize.imatrix.entries_count"] = Field(len(imatrix.sums), int32)
        out["quantize.imatrix.chunks_count"] = Field(imatrix.chunk_count, int32)
    for key in ("source", "recipe", "method", "texts", "plan", "versions"):
        value = dict(provenance[key])
        if key == "texts":  # the chunks' hashes are in the report; the file keeps the sketch
            value = {
                name: {k: v for k, v in text.items() if k != "chunks"}
                for name, text in value.items()
                if name == "calibration"
            }
        out[f"edgeq.{key}"] = Field(json.dumps(value, sort_keys=True), string)
    sketches = [imatrix.sketch if imatrix is not None else None, sketch_of(reference.file)]
    sketches += [part.sketch for part in (texts.calibration, texts.tuning) if part is not None]
    known = {item for sketch in sketches if sketch is not None for item in sketch}
    if known:
        out[SKETCH_KEY] = Field(sorted(known), GGUFValueType.ARRAY, GGUFValueType.UINT64)
    return out


def calibration_manifest(file: GgufFile) -> Manifest | None:
    """Return what a file says it was calibrated on; None if it says nothing."""
    sketch = sketch_of(file)
    if sketch is None:
        return None
    return Manifest(
        name=f"{file.path.name} calibration",  # completed with "text" in messages
        sha256="",
        n_tokens=0,
        chunks=(),
        windows=np.array(sketch, np.uint64),
    )


def check_judging_text(
    recipe: Recipe, reference: Reference, texts: Texts, imatrix: Imatrix | None
) -> tuple[str, ...]:
    """Refuse evaluation text that a given importance matrix, or the source, was calibrated on.

    Returns
    -------
    sentences for the report

    Raises
    ------
    EvaluationError
        The texts share passages, and that is not forced.
    """
    if texts.evaluation is None:
        return ()
    notes = []
    earlier = {str(reference.path): sketch_of(reference.file)}
    if recipe.imatrix is not None and imatrix is not None:
        earlier[str(recipe.imatrix)] = imatrix.sketch
        if imatrix.sketch is None:
            notes.append(
                f"{recipe.imatrix} does not tell its text: it may hold the text judged on."
            )
    for where, sketch in earlier.items():
        known = np.array(sketch or (), np.uint64)
        n_shared = int(np.isin(texts.evaluation.manifest.windows, known).sum())
        if n_shared == 0:
            continue
        told = (
            f"{where}: was calibrated on the evaluation text; {n_shared} of the "
            f"{len(known)} passages that it remembers are in it"
        )
        if not recipe.texts.force:
            raise EvaluationError(f"{told}. Give other text, or insist with --force.")
        notes.append(f"Judged on calibration text: {told}.")
    return tuple(notes)


def notes(plan: Plan, imatrix: Imatrix | None, texts: Texts, work: WorkDirectory) -> list[str]:
    """Return what the table does not show: fallbacks, unseen experts, forced or reused things."""
    found = list(texts.notes)
    fallbacks = Counter(f"{e.reason} → {e.qtype.name}" for e in plan.entries if e.is_fallback)
    found += [f"Fallback, {n} of the tensors: {what}" for what, n in fallbacks.items()]
    unseen = imatrix.unseen() if imatrix is not None else []
    if unseen:
        shown = ", ".join(unseen[:5]) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
        found.append(f"Calibration never reached: {shown}. Their columns weigh 1 each.")
    if work.reused:
        found.append(
            f"Reused from {work.path}: {len(work.reused)} of "
            f"{len(work.reused) + len(work.made)} intermediate results."
        )
    return found
