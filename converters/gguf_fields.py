"""Metadata as it is written: checked, ordered, packed.

``gguf.GGUFWriter`` packs arrays item by item, refuses empty ones and leaves values of the wrong
type to ``struct``'s messages.
"""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType

from converters.errors import ConversionError, shown
from converters.gguf_header import DEFAULT_ALIGNMENT, SPLIT_KEYS, VALUE_DTYPES, Field

ALIGNMENT_KEY = "general.alignment"
MAX_ALIGNMENT = 1 << 16

_WHOLE: tuple[type, ...] = (int, np.integer)
_ACCEPTED: dict[str, tuple[type, ...]] = {  # by the kind of the field's numpy type
    "i": _WHOLE,
    "u": _WHOLE,
    "f": (*_WHOLE, float, np.floating),
    "b": (bool, np.bool_),
}


def ordered_fields(
    path: Path, fields: Mapping[str, Field], alignment: int | None
) -> dict[str, Field]:
    """Check every value; put the architecture first, drop split keys, settle the alignment.

    Parameters
    ----------
    path : the file to be written, for messages
    alignment : replaces that of `fields`; None leaves it

    Raises
    ------
    ConversionError
        A value that its type cannot hold.
    """
    ordered = {key: fields[key] for key in ("general.architecture",) if key in fields}
    ordered |= {key: field for key, field in fields.items() if key not in SPLIT_KEYS}
    if alignment is not None and (alignment != DEFAULT_ALIGNMENT or ALIGNMENT_KEY in fields):
        ordered[ALIGNMENT_KEY] = Field(alignment, GGUFValueType.UINT32)
    for key, field in ordered.items():
        try:
            if not key.encode():
                raise ValueError("the key is empty")
            pack_value(field)
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            kind = field.type.name + (f" of {field.item_type.name}" if field.item_type else "")
            raise ConversionError(
                f"{path}: metadata {shown(key)} cannot be written; got {shown(field.value)}, "
                f"expected {kind} ({error}). Mend the value or its type."
            ) from error
    chosen = ordered.get(ALIGNMENT_KEY, Field(DEFAULT_ALIGNMENT, GGUFValueType.UINT32))
    if (
        chosen.type != GGUFValueType.UINT32
        or chosen.value > MAX_ALIGNMENT
        or int(chosen.value).bit_count() != 1
    ):
        raise ConversionError(
            f"{path}: {ALIGNMENT_KEY} is {chosen.value} ({chosen.type.name}), expected a power of "
            f"two up to {MAX_ALIGNMENT} (UINT32). Leave it out for {DEFAULT_ALIGNMENT}."
        )
    return ordered


def pack_value(field: Field) -> bytes:
    """Return a value as it lies in the file, without its type.

    Raises
    ------
    TypeError, ValueError, ArithmeticError, AttributeError
        The value is not of the field's type, or out of its range.
    """
    if field.type != GGUFValueType.ARRAY:
        return _pack_items([field.value], field.type)
    if field.item_type is None or field.item_type == GGUFValueType.ARRAY:
        raise TypeError("an array needs an item type other than ARRAY")
    if isinstance(field.value, str | bytes):
        raise TypeError("a text is no array")
    items = _pack_items(field.value, field.item_type)
    return struct.pack("<IQ", field.item_type, len(field.value)) + items


def _pack_items(values: Sequence[Any], kind: GGUFValueType) -> bytes:
    if kind == GGUFValueType.STRING:
        pieces: list[bytes] = []
        for value in values:
            raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
            pieces += (struct.pack("<Q", len(raw)), raw)
        return b"".join(pieces)
    dtype = VALUE_DTYPES[kind]
    for given in {type(value) for value in values}:  # numpy would cut 1.5 to 1, or take "1"
        is_bool = issubclass(given, bool | np.bool_)
        if not issubclass(given, _ACCEPTED[dtype.kind]) or is_bool != (dtype.kind == "b"):
            raise TypeError(f"an item is {given.__name__}")
    with np.errstate(over="raise"):
        return np.array(values, dtype).tobytes()
