"""The allocator without a budget: llama.cpp's own mix for a file type."""

from converters.gguf_file import GgufFile, tensor_bytes
from edgeq.allocation.plan import Plan, PlanEntry
from edgeq.runtime.presets import MixOptions, choose_types, find_preset


def allocate(
    file: GgufFile, preset: str, *, has_imatrix: bool, options: MixOptions | None = None
) -> Plan:
    """Return the plan that `preset` makes of a GGUF file, tensor by tensor as llama.cpp decides.

    Parameters
    ----------
    preset : llama.cpp file type, such as ``Q4_K_M``
    has_imatrix : some mixes are bolder with an imatrix

    Raises
    ------
    RecipeError
        Unknown preset.
    RuntimeLibraryError
        llama.cpp cannot read the file, or has no type that fits its rows.
    """
    choices = choose_types(file.path, preset, has_imatrix=has_imatrix, options=options)
    entries = tuple(
        PlanEntry(
            name=name,
            qtype=choices[name].qtype,
            shape=info.shape,
            size_bytes=tensor_bytes(choices[name].qtype, info.shape),
            reason=choices[name].reason,
        )
        for name, info in file.tensors.items()
    )
    return Plan(find_preset(preset).name, entries)
