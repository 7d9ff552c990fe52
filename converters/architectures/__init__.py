"""The registry of architectures: class names of config.json to descriptions.

Every module of this package that defines ``ARCHITECTURE`` is one family, so adding a family is
adding one file. Other distributions add theirs through the entry-point group
``edgeq.architectures`` (each entry point loads to an ``Architecture``).
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules

from converters.architectures.description import Architecture
from converters.checkpoint import Checkpoint
from converters.errors import ConversionError

__all__ = [
    "Architecture",
    "Described",
    "architecture_of",
    "described_architectures",
    "known_architectures",
]

GROUP = "edgeq.architectures"


@dataclass(frozen=True)
class Described:
    """An architecture and the distribution that brings its description."""

    architecture: Architecture
    origin: str


@cache
def described_architectures() -> dict[str, Described]:
    """Return every known class name of config.json with its architecture and whose it is.

    Raises
    ------
    ConversionError
        Two descriptions claim the same class name, or an entry point gives none.
    """
    modules = (import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__))
    found = [Described(m.ARCHITECTURE, "edgeq") for m in modules if hasattr(m, "ARCHITECTURE")]
    found += [_load(point) for point in entry_points(group=GROUP)]
    known: dict[str, Described] = {}
    for one in found:
        for name in one.architecture.classes:
            if name in known:
                raise ConversionError(
                    f"{GROUP}: {name!r} is brought by both {known[name].origin} and {one.origin}. "
                    "Uninstall one of them."
                )
            known[name] = one
    return known


def _load(point: EntryPoint) -> Described:
    origin = point.dist.name if point.dist is not None else "unknown"
    where = f"{GROUP}: {point.name!r} of {origin}: {point.value}"
    try:
        architecture = point.load()
    except (ImportError, AttributeError) as error:
        raise ConversionError(
            f"{where} cannot be imported ({error}). Reinstall {origin}."
        ) from error
    if not isinstance(architecture, Architecture):
        raise ConversionError(
            f"{where} is of type {type(architecture).__name__}, expected an Architecture. Ask "
            f"those who made {origin}, or uninstall it."
        )
    return Described(architecture, origin)


def known_architectures() -> dict[str, Architecture]:
    """Return every known class name of config.json with its architecture.

    Raises
    ------
    ConversionError
        Two descriptions claim the same class name, or an entry point gives none.
    """
    return {name: one.architecture for name, one in described_architectures().items()}


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """Return the description of a checkpoint's architecture.

    Raises
    ------
    ConversionError
        config.json names no class, or one without a description.
    """
    config = checkpoint.config
    text = config.get("text_config")
    names = (text.get("architectures") if isinstance(text, dict) else None) or config.get(
        "architectures"
    )
    if not names or not isinstance(names, list) or not isinstance(names[0], str):
        raise ConversionError(
            f"{checkpoint.directory}/config.json: 'architectures' is {names!r}; expected a list "
            "with the model's class name, such as ['LlamaForCausalLM']."
        )
    known = known_architectures()
    if names[0] not in known:
        raise ConversionError(
            f"{checkpoint.directory}/config.json: no conversion for {names[0]}; known: "
            f"{', '.join(sorted(known))}. Convert it with llama.cpp's convert_hf_to_gguf.py "
            "(--outtype f32, bf16 or f16) and pass the GGUF instead."
        )
    return known[names[0]]
