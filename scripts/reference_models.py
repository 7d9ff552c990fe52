"""Float references for measurement, made from the quantized models that the package index has.

No float checkpoint of a real model is on the package index. A dequantized one is no reference:
every value lies on the grid of its source, and quantizing it again to that type costs nothing. A
function-preserving change moves the values off the grid; what is left is a model with the source's
function, outliers and redundancy, on which encoders can be compared.
"""

import hashlib
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType

from converters.gguf_file import Field, GgufFile, TensorSource, open_gguf, write_gguf
from scripts.reference_checkpoint import write_hf
from scripts.reference_folds import (
    Geometry,
    ReferenceModelError,
    Tensors,
    fold_channels,
    permute_residual,
    widen,
)
from scripts.reference_proof import divergences, normal_error, reencoding_error

VERSION = 1  # of the recipe below: another one makes other bytes
TEXT = Path(__file__).with_name("reference_text.txt")
KLD_LIMIT, WIDE_KLD_LIMIT = 1e-6, 1e-5
MOVED = 0.5  # a moved matrix loses at least this part of what normal numbers lose
F32 = GGMLQuantizationType.F32
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What a reference is made of; the same settings give the same bytes.

    Attributes
    ----------
    n_chunks, n_ctx : of the text that the proof runs on
    """

    source_sha256: str
    seed: int = 0
    widen: int | None = None
    n_chunks: int = 2
    n_ctx: int = 512
    version: int = VERSION


def build(source: Path, out: Path, settings: Settings, say: Say) -> dict[str, Any]:
    """Make the reference of `source` in the directory `out` and return its ``reference.json``.

    Nothing is left of a reference that fails its proof. A complete one with the same settings is
    kept as it is.

    Raises
    ------
    ReferenceModelError
        `out` holds something else, or the proof failed.
    """
    done = _finished(out, settings)
    if done is not None:
        say(f"{out}: complete, kept")
        return done
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        work = Path(name)
        report = _make(open_gguf(source), work / "reference", work, settings, say)
        if out.exists():
            shutil.rmtree(out)
        (work / "reference").rename(out)
    return report


def _finished(out: Path, settings: Settings) -> dict[str, Any] | None:
    """Return the report of a complete reference in `out`; None if one may be written there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        report: dict[str, Any] = json.loads((out / "reference.json").read_text("utf-8"))
        same = report["settings"] == asdict(settings)
    except (OSError, ValueError, LookupError, TypeError):
        same = False
    if not same:
        raise ReferenceModelError(
            f"{out}: exists and is no reference with these settings. "
            "Remove it or choose another directory with -o."
        )
    whole = all(
        (out / name).is_file() and _sha256(out / name) == digest
        for name, digest in report["files"].items()
    )
    return report if whole else None


def _make(source: GgufFile, out: Path, work: Path, settings: Settings, say: Say) -> dict[str, Any]:
    say(f"{source.path}: dequantizing {len(source.tensors)} tensors")
    tensors: Tensors = {name: source.read_float(name) for name in source.tensors}
    plain = work / "plain.gguf"
    _write(plain, source, tensors, {})
    before = _reencoding(tensors, _source_types(source, tensors))
    geometry = read_geometry(source)
    say("moving the weights off their grid")
    if settings.widen is not None:
        geometry = widen(tensors, geometry, settings.widen, settings.seed)
    folds_norms = settings.widen is None or geometry.has_post_norms
    fold_channels(tensors, geometry, settings.seed, norms=folds_norms)
    permute_residual(tensors, geometry, settings.seed)
    _settle_norms(source.architecture, tensors)
    say(f"writing {sum(t.nbytes for t in tensors.values()) >> 20} MiB, twice")
    write_hf(out / "hf", source, tensors, geometry)
    _write(out / "model-f32.gguf", source, tensors, _changed_fields(source, geometry, tensors))
    types = _source_types(source, tensors)
    after = _reencoding(tensors, types)
    tensors.clear()
    say("comparing with the source through llama.cpp")
    kld = divergences(
        out / "model-f32.gguf",
        {"dequantized": plain, "quantized": source.path},
        TEXT.read_text("utf-8"),
        n_chunks=settings.n_chunks,
        n_ctx=settings.n_ctx,
    )
    report = {
        "settings": asdict(settings),
        "source": source.path.name,
        "kl_divergence_nats": {name: asdict(value) for name, value in kld.items()},
        "reencoding": _by_type(types, before, after),
        "tensors": {
            name: {"type": qtype.name, "error": after[name], "error_in_source": before.get(name)}
            for name, qtype in types.items()
        },
        "files": {
            str(p.relative_to(out)): _sha256(p) for p in sorted(out.rglob("*")) if p.is_file()
        },
    }
    _check(report, KLD_LIMIT if settings.widen is None else WIDE_KLD_LIMIT)
    text = json.dumps(report, indent=2) + "\n"
    (out / "reference.json").write_text(text, encoding="utf-8")
    return report


def read_geometry(source: GgufFile) -> Geometry:
    """Return the sizes that the metadata of `source` states."""

    def value(key: str, default: Any = None) -> Any:
        return source.value(f"{source.architecture}.{key}", default)

    n_embd, n_head = value("embedding_length"), value("attention.head_count")
    return Geometry(
        n_layers=value("block_count"),
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=value("attention.head_count_kv", n_head),
        head_dim=value("attention.key_length", n_embd // n_head),
        rms_eps=float(str(np.float32(value("attention.layer_norm_rms_epsilon")))),
        has_post_norms="blk.0.post_attention_norm.weight" in source.tensors,
    )


def _settle_norms(architecture: str, tensors: Tensors) -> None:
    """Round norm weights to what a checkpoint that keeps them less 1 can state (Gemma)."""
    if architecture == "gemma3":
        one = np.float32(1)
        tensors |= {n: (t - one) + one for n, t in tensors.items() if n.endswith("norm.weight")}


def _changed_fields(source: GgufFile, geometry: Geometry, tensors: Tensors) -> dict[str, Any]:
    """Return the metadata that another width changes; the same values where nothing did."""
    if geometry == read_geometry(source):
        return {}
    changed = {
        "embedding_length": geometry.n_embd,
        "attention.head_count": geometry.n_head,
        "attention.head_count_kv": geometry.n_head_kv,
        "attention.layer_norm_rms_epsilon": geometry.rms_eps,
    }
    size_label = f"{sum(t.size for t in tensors.values()) / 1e6:.0f}M"
    return {f"{source.architecture}.{key}": value for key, value in changed.items()} | {
        "general.size_label": size_label
    }


def _write(path: Path, source: GgufFile, tensors: Tensors, changed: dict[str, Any]) -> None:
    """Write `tensors` as F32 with the metadata of `source`, but for `changed`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {k: replace(f, value=changed.get(k, f.value)) for k, f in source.fields.items()}
    fields["general.file_type"] = Field(int(LlamaFileType.ALL_F32), GGUFValueType.UINT32)
    sources = [
        TensorSource(name, F32, tensor.shape, partial(np.asarray, tensor))
        for name, tensor in tensors.items()
    ]
    write_gguf(path, fields, sources)


def _source_types(source: GgufFile, tensors: Tensors) -> dict[str, GGMLQuantizationType]:
    """Return the type that each quantized matrix came in; an untied output has the embedding's."""
    types = {name: tensor.qtype for name, tensor in source.tensors.items() if tensor.qtype != F32}
    if "output.weight" in tensors:
        types.setdefault("output.weight", types["token_embd.weight"])
    return types


def _reencoding(tensors: Tensors, types: dict[str, GGMLQuantizationType]) -> dict[str, float]:
    return {name: reencoding_error(tensors[name], qtype) for name, qtype in types.items()}


def _by_type(
    types: dict[str, GGMLQuantizationType], before: dict[str, float], after: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Return, a type: the errors of its matrices, and that of normal numbers beside them."""
    table = {}
    for qtype in sorted(set(types.values())):
        names = [name for name, t in types.items() if t == qtype]
        errors = [after[name] for name in names]
        table[qtype.name] = {
            "matrices": len(names),
            "source_max": max((before[n] for n in names if n in before), default=0.0),
            "min": min(errors),
            "median": statistics.median(errors),
            "max": max(errors),
            "normal": normal_error(qtype),
        }
    return table


def _check(report: dict[str, Any], kld_limit: float) -> None:
    kld = report["kl_divergence_nats"]["dequantized"]["mean"]
    if not kld < kld_limit:
        raise ReferenceModelError(
            f"{report['source']}: KL divergence of the reference is {kld:.3g}, expected less than "
            f"{kld_limit:g}. The change did not keep the function: report it."
        )
    for name, row in report["tensors"].items():
        limit = MOVED * report["reencoding"][row["type"]]["normal"]
        if not row["error"] >= limit:
            raise ReferenceModelError(
                f"{name}: still on the grid of {row['type']}; encoding it again costs "
                f"{row['error']:.3g}, expected at least {limit:.3g}. Choose another --seed."
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
