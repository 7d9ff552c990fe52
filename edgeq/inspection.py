"""What is in a GGUF file: types, bytes, provenance, and how two files differ."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.gguf_file import GgufFile, TensorInfo, open_gguf
from edgeq.console import markdown_table

PROVENANCE_PREFIX = "edgeq."
_ARRAY_PREVIEW = 5


@dataclass(frozen=True)
class TypeTotal:
    """All tensors of one type."""

    qtype: str
    n_tensors: int
    n_parameters: int
    n_bytes: int


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that two files do not share.

    `change` says how: a type that differs, data that differs, or a file that lacks it.
    `relative_error` is ‖a − b‖ / ‖b‖ of the decoded weights; None where both are not there.
    """

    name: str
    change: str
    relative_error: float | None


@dataclass(frozen=True)
class Inspection:
    """The result of ``edgeq inspect``."""

    path: Path
    architecture: str
    size_bytes: int
    n_parameters: int
    types: tuple[TypeTotal, ...]
    provenance: dict[str, Any]
    metadata: dict[str, Any]
    differences: tuple[TensorDifference, ...] | None

    @property
    def bpw(self) -> float:
        """Bits of the whole file per weight."""
        return 8 * self.size_bytes / max(1, self.n_parameters)

    def as_json(self) -> dict[str, Any]:
        """Return the inspection as JSON values."""
        return {
            "path": str(self.path),
            "architecture": self.architecture,
            "size_bytes": self.size_bytes,
            "n_parameters": self.n_parameters,
            "bpw": self.bpw,
            "types": [vars(total) for total in self.types],
            "provenance": self.provenance,
            "metadata": self.metadata,
            "differences": None
            if self.differences is None
            else [vars(difference) for difference in self.differences],
        }

    def as_text(self) -> str:
        """Return the inspection for a terminal."""
        rows = [
            [
                total.qtype,
                str(total.n_tensors),
                f"{total.n_parameters:,}",
                f"{total.n_bytes:,}",
                f"{8 * total.n_bytes / total.n_parameters:.3f}",
            ]
            for total in self.types
        ]
        lines = [
            f"{self.path}: {self.architecture}, {self.n_parameters:,} parameters, "
            f"{self.size_bytes:,} bytes, {self.bpw:.3f} bpw",
            "",
            markdown_table(["type", "tensors", "parameters", "bytes", "bpw"], rows),
        ]
        for title, values in (("provenance", self.provenance), ("metadata", self.metadata)):
            if values:
                lines += ["", f"{title}:"]
                lines += [
                    f"  {_printable(key)} = {_printable(_preview(value))}"
                    for key, value in values.items()
                ]
        if self.differences is not None:
            lines += ["", _differences_text(self.differences)]
        return "\n".join(lines)


def _printable(text: str) -> str:
    """Escape what a hostile file could control the terminal with."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _preview(value: Any) -> str:
    if isinstance(value, list) and len(value) > _ARRAY_PREVIEW:
        head = ", ".join(repr(item) for item in value[:_ARRAY_PREVIEW])
        return f"[{head}, … {len(value):,} in all]"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
    return text if len(text) <= 400 else text[:400] + f"… ({len(text):,} characters)"


def _differences_text(differences: Sequence[TensorDifference]) -> str:
    if not differences:
        return "The tensors of both files are equal, byte for byte."
    rows = [
        [
            _printable(d.name),
            d.change,
            "" if d.relative_error is None else f"{d.relative_error:.3e}",
        ]
        for d in differences
    ]
    return markdown_table([f"{len(differences)} tensors differ", "how", "relative error"], rows)


def inspect(path: Path, *, against: Path | None = None, metadata: bool = False) -> Inspection:
    """Read `path`, and compare its tensors with those of `against` if that is given.

    Raises
    ------
    ConversionError
        A file cannot be read.
    """
    file = open_gguf(path)
    plain = {key: _plain(field.value) for key, field in file.fields.items()}
    return Inspection(
        path=path,
        architecture=file.architecture,
        size_bytes=file.size_bytes,
        n_parameters=file.n_parameters,
        types=_type_totals(file),
        provenance={
            key: _decoded(value)
            for key, value in plain.items()
            if key.startswith((PROVENANCE_PREFIX, "quantize."))
        },
        metadata={k: v for k, v in plain.items() if metadata and not k.startswith("edgeq.")},
        differences=None if against is None else _differences(file, open_gguf(against)),
    )


def _plain(value: Any) -> Any:
    """Return a metadata value as JSON knows it; NaN and infinities are spelled out."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decoded(value: Any) -> Any:
    """Read provenance that is stored as a JSON text."""
    if isinstance(value, str) and value[:1] in "{[":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _type_totals(file: GgufFile) -> tuple[TypeTotal, ...]:
    by_type: dict[str, list[TensorInfo]] = {}
    for tensor in file.tensors.values():
        by_type.setdefault(tensor.qtype.name, []).append(tensor)
    totals = [
        TypeTotal(
            qtype,
            len(tensors),
            sum(math.prod(tensor.shape) for tensor in tensors),
            sum(tensor.n_bytes for tensor in tensors),
        )
        for qtype, tensors in by_type.items()
    ]
    return tuple(sorted(totals, key=lambda total: -total.n_bytes))


def _differences(a: GgufFile, b: GgufFile) -> tuple[TensorDifference, ...]:
    found = []
    for name in [*a.tensors, *(n for n in b.tensors if n not in a.tensors)]:
        if name not in b.tensors or name not in a.tensors:
            only = a.path.name if name in a.tensors else b.path.name
            found.append(TensorDifference(name, f"only in {only}", None))
            continue
        one, other = a.tensors[name], b.tensors[name]
        if one.shape != other.shape:
            found.append(TensorDifference(name, f"{one.shape} against {other.shape}", None))
            continue
        same_type = one.qtype == other.qtype
        if same_type and np.array_equal(a.read_bytes(name), b.read_bytes(name)):
            continue
        change = "data" if same_type else f"{one.qtype.name} against {other.qtype.name}"
        difference = float(np.linalg.norm(a.read_float(name) - b.read_float(name)))
        norm = float(np.linalg.norm(b.read_float(name)))
        found.append(TensorDifference(name, change, difference / norm if norm else difference))
    return tuple(found)
