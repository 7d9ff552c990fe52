"""The registry of architectures: class names of config.json to descriptions.

Every module of this package that defines ``ARCHITECTURE`` is one family, so adding a family is
adding one file. Other distributions add theirs through the entry-point group
``edgeq.architectures`` (each entry point loads to an ``Architecture``).
"""

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

from converters.architectures.description import Architecture
from converters.checkpoint import Checkpoint
from converters.errors import ConversionError

__all__ = ["Architecture", "architecture_of", "known_architectures"]


@cache
def known_architectures() -> dict[str, Architecture]:
    """Return every known class name of config.json with its architecture.

    Raises
    ------
    ConversionError
        Two descriptions claim the same class name.
    """
    modules = (import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__))
    found = [module.ARCHITECTURE for module in modules if hasattr(module, "ARCHITECTURE")]
    found += [point.load() for point in entry_points(group="edgeq.architectures")]
    known: dict[str, Architecture] = {}
    for architecture in found:
        for name in architecture.classes:
            if name in known:
                raise ConversionError(
                    f"architectures: {name} is described twice, as {known[name].name} and as "
                    f"{architecture.name}. Remove one of the two packages."
                )
            known[name] = architecture
    return known


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
    if not names or not isinstance(names, list):
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
