"""The plan: which type every tensor of a model gets, and why.

``plan.json`` holds one tensor a line, so that a person can read it, compare two of them and change
a type in it. Only ``type`` (and ``reason``) are taken from an edited file; sizes are computed anew.
"""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from converters.gguf_file import GgufFile, TensorInfo, tensor_bytes
from edgeq.errors import RecipeError
from edgeq.registry import unknown_name
from edgeq.runtime.encoders import check_row, encodable_types
from edgeq.runtime.presets import check_importances, find_preset, quantizable_tensors
from edgeq.workdir import replacing

SCHEMA = 1


@dataclass(frozen=True)
class PlanEntry:
    """One tensor.

    Attributes
    ----------
    shape : (n_out, n_in), (n_mat, n_out, n_in) or (n,)
    size_bytes : of its packed data
    reason : why it has this type, for people
    """

    name: str
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]
    size_bytes: int
    reason: str

    @property
    def is_fallback(self) -> bool:
        """Whether the row size, not the preset or a person, chose the type."""
        return "do not divide" in self.reason


@dataclass(frozen=True)
class Plan:
    """Every tensor's type.

    Attributes
    ----------
    preset : llama.cpp file type that the plan started from; stated as the file's type
    entries : in the order of the reference file
    """

    preset: str
    entries: tuple[PlanEntry, ...]

    @property
    def ftype(self) -> int:
        """The value of ``general.file_type``."""
        return find_preset(self.preset).ftype

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors' packed data, without header and padding."""
        return sum(entry.size_bytes for entry in self.entries)

    @property
    def n_weights(self) -> int:
        """Weights of all tensors together."""
        return sum(math.prod(entry.shape) for entry in self.entries)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors, embeddings and norms included."""
        return 8 * self.size_bytes / self.n_weights

    @property
    def types(self) -> dict[str, GGMLQuantizationType]:
        """Tensor name to type."""
        return {entry.name: entry.qtype for entry in self.entries}

    def check_importances(self, file: GgufFile, has_importances: Callable[[str], bool]) -> None:
        """Refuse types that need importances, before any work, where a tensor has none.

        Parameters
        ----------
        file : the reference; what it holds in the planned type already is copied
        has_importances : whether there are importances for the tensor of that name

        Raises
        ------
        CalibrationError
        """
        for entry in self.entries:
            if file.tensors[entry.name].qtype != entry.qtype:
                check_importances(
                    entry.name,
                    entry.qtype,
                    self.preset,
                    has_importances=has_importances(entry.name),
                )

    def as_json(self) -> dict[str, Any]:
        """Return the content of ``plan.json``."""
        return {
            "schema": SCHEMA,
            "preset": self.preset,
            "size_bytes": self.size_bytes,
            "bpw": round(self.bpw, 4),
            "tensors": {
                entry.name: {
                    "type": entry.qtype.name,
                    "shape": list(entry.shape),
                    "bytes": entry.size_bytes,
                    "reason": entry.reason,
                }
                for entry in self.entries
            },
        }

    def write(self, path: Path) -> None:
        """Write ``plan.json``, one tensor a line; an existing file is replaced whole.

        Raises
        ------
        RecipeError
            The file cannot be written.
        """
        content = self.as_json()
        write_by_tensor(path, content, content.pop("tensors"))


def write_by_tensor(path: Path, head: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write a JSON object with its tensors last, one a line, so that people can read it.

    Raises
    ------
    RecipeError
        The file cannot be written.
    """
    start = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    lines = [f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in tensors.items()]
    text = "\n".join(["{", *start, '  "tensors": {', ",\n".join(lines), "  }", "}", ""])
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


@dataclass(frozen=True)
class Planned:
    """A plan and what is told about it.

    Attributes
    ----------
    facts : allocator, costs, predicted bytes and loss, and what the allocator certifies
    notes : sentences for the report
    """

    plan: Plan
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_of(
    file: GgufFile,
    preset: str,
    types: Mapping[str, GGMLQuantizationType],
    reasons: Mapping[str, str],
) -> Plan:
    """Return the plan that gives some tensors of a file these types and keeps the others'."""
    entries = []
    for name, info in file.tensors.items():
        qtype = types.get(name, info.qtype)
        size = tensor_bytes(qtype, info.shape)
        entries.append(PlanEntry(name, qtype, info.shape, size, reasons.get(name, "kept")))
    return Plan(find_preset(preset).name, tuple(entries))


def read_plan(path: Path, file: GgufFile) -> Plan:
    """Read a ``plan.json``, edited or not, and check it against the model that it is for.

    Raises
    ------
    RecipeError
        No plan, another schema, unknown or missing tensors or types, a type whose blocks do not
        divide the rows, or another type for a tensor that llama.cpp does not quantize.
    """
    content = _read_json(path)
    if content.get("schema") != SCHEMA:
        raise RecipeError(
            f"{path}: plan of schema {content.get('schema')!r}, expected {SCHEMA}. "
            "Make it anew with: edgeq plan"
        )
    preset, tensors = content.get("preset"), content.get("tensors")
    if not isinstance(tensors, dict) or not isinstance(preset, str):
        raise RecipeError(
            f"{path}: no plan; it lacks 'preset' or 'tensors'. Make one with: edgeq plan"
        )
    missing = [name for name in file.tensors if name not in tensors]
    if missing:
        raise RecipeError(
            f"{path}: {len(missing)} of the {len(file.tensors)} tensors of {file.path.name} are "
            f"missing, the first is {missing[0]}. Make the plan from this model."
        )
    unknown = next((name for name in tensors if name not in file.tensors), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, file.tensors, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"{path}: {file.path.name} has no tensor {unknown!r}.{hint}")
    quantizable = quantizable_tensors(file.path)
    entries = tuple(
        _read_entry(f"{path}: {name}", tensors[name], info, is_fixed=name not in quantizable)
        for name, info in file.tensors.items()
    )
    return Plan(find_preset(preset).name, entries)


def write_tensor_type_file(plan: Plan, path: Path) -> None:
    """Write the types in the form of ``llama-quantize --tensor-type-file``.

    With any quantized file type as its last argument llama-quantize then gives every tensor the
    planned type. It reads regular expressions, searches them in the name, and makes them lower
    case first.

    Raises
    ------
    RecipeError
        The file cannot be written.

    References
    ----------
    llama.cpp 0c1e57098: tools/quantize/quantize.cpp, parse_tensor_type_file.
    """
    lines = [f"{_pattern(entry.name)}={entry.qtype.name.lower()}\n" for entry in _matrices(plan)]
    with replacing(path) as temporary:
        temporary.write_text("".join(lines), "utf-8")


def overrides(plan: Plan) -> tuple[tuple[str, GGMLQuantizationType], ...]:
    """Return the plan as tensor-type overrides of ``edgeq.runtime.presets.MixOptions``."""
    return tuple((_pattern(entry.name), entry.qtype) for entry in _matrices(plan))


def _matrices(plan: Plan) -> list[PlanEntry]:
    return [entry for entry in plan.entries if len(entry.shape) > 1]


def _pattern(name: str) -> str:
    """Return a regular expression for one name, in what Python, C++ and ``tolower`` all keep."""
    return f"^{re.sub(r'[^a-z0-9_-]', lambda match: _escaped(match[0]), name)}$"


def _escaped(character: str) -> str:
    return "\\." if character == "." else "."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=_without_repeats)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path}: no readable plan ({error}). Mend it or make it anew."
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: no plan; got a {type(content).__name__}, expected an object.")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice, as after a copied line: one of the two would be lost."""
    keys = [key for key, _ in pairs]
    repeated = next((key for key, count in Counter(keys).items() if count > 1), None)
    if repeated is not None:
        raise ValueError(f"{repeated!r} stands there twice")
    return dict(pairs)


def _read_entry(where: str, value: Any, info: TensorInfo, *, is_fixed: bool) -> PlanEntry:
    """Check one line of ``plan.json`` against the tensor that it is for."""
    name = value.get("type") if isinstance(value, dict) else None
    if not isinstance(name, str):
        raise RecipeError(f'{where}: got {value!r:.60}, expected {{"type": "Q4_K"}} or the like.')
    known = {qtype.name: qtype for qtype in (*encodable_types(), info.qtype)}
    qtype = known.get(name.upper())
    if qtype is None:
        raise RecipeError(f"{where}: {unknown_name('type', name.upper(), list(known))}")
    shape = value.get("shape")
    if shape is not None and shape != list(info.shape):
        raise RecipeError(
            f"{where}: shape {shape}, but {info.path.name} has {list(info.shape)}. "
            "Make the plan from this model."
        )
    if qtype != info.qtype:
        if is_fixed:
            raise RecipeError(
                f"{where}: got {qtype.name}, expected {info.qtype.name}; llama.cpp runs this "
                "tensor only as it is."
            )
        check_row(where, info.shape[-1], qtype)
    reason = value.get("reason", "")
    return PlanEntry(info.name, qtype, info.shape, tensor_bytes(qtype, info.shape), str(reason))
