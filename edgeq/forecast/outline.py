"""What is known of a model before any weight is read: shapes, types, and the plan for them."""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from converters.architectures import known_architectures
from converters.architectures.description import Architecture, Shape
from converters.checkpoint import open_checkpoint
from converters.convert import write_outline
from converters.errors import ConversionError
from converters.gguf_file import GgufFile, layer_of, open_gguf, tensor_bytes
from converters.json_file import read_json
from edgeq import allocation
from edgeq.allocation import Plan
from edgeq.allocation.preset import COMMON
from edgeq.costing import HEADER_RESERVE, padded
from edgeq.errors import RecipeError
from edgeq.forecast.shapes import SHAPES
from edgeq.recipe import Recipe
from edgeq.registry import unknown_name
from edgeq.runtime.presets import find_preset

_T = GGMLQuantizationType
_TOKEN_BYTES = 32  # of the header for each token: its text, score and kind, and a merge
_FLOATS = {"BF16": _T.BF16, "F16": _T.F16, "bfloat16": _T.BF16, "float16": _T.F16}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file to be written.

    Attributes
    ----------
    shape : (n_out, n_in), (n_mat, n_out, n_in) or (n,)
    source, qtype : its types in the reference and in the output
    """

    name: str
    shape: tuple[int, ...]
    source: GGMLQuantizationType
    qtype: GGMLQuantizationType

    @property
    def layer(self) -> int | None:
        """Which layer it belongs to; None: none."""
        return layer_of(self.name)

    @property
    def n_mat(self) -> int:
        """Matrices that it holds: experts, or 1."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def n_in(self) -> int:
        """Columns of each matrix."""
        return self.shape[-1]

    @property
    def n_weights(self) -> int:
        """Weights of all its matrices."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies activations."""
        return len(self.shape) > 1

    @property
    def is_rounded(self) -> bool:
        """Whether the export gives it another type."""
        return bool(self.qtype != self.source)


@dataclass(frozen=True)
class Outline:
    """A model and the types that it is to get.

    Attributes
    ----------
    name : for people
    tensors : of the GGUF, in its order
    n_used : experts that a token goes through; 0: there are none
    header_bytes : of the output, before its tensors
    checkpoint_bytes : of what has to be converted first; 0: it is a GGUF file
    types : which types were counted, for people
    """

    name: str
    tensors: tuple[Tensor, ...]
    n_used: int
    header_bytes: int
    checkpoint_bytes: int = 0
    types: str = ""

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len({one.layer for one in self.tensors} - {None})

    @property
    def embedding(self) -> Tensor:
        """The token embedding, (n_vocab, n_embd)."""
        return next(one for one in self.tensors if one.name == "token_embd.weight")

    @property
    def n_parameters(self) -> int:
        """Weights of all tensors together."""
        return sum(one.n_weights for one in self.tensors)

    @property
    def reference_bytes(self) -> int:
        """Bytes of the float file's tensors."""
        return sum(padded(tensor_bytes(one.source, one.shape)) for one in self.tensors)

    @property
    def output_bytes(self) -> int:
        """Bytes of the file to be written."""
        return self.header_bytes + sum(
            padded(tensor_bytes(one.qtype, one.shape)) for one in self.tensors
        )


def outline_of(recipe: Recipe) -> Outline:
    """Read the headers of a model: a GGUF file, a checkpoint, a directory with config.json alone.

    Raises
    ------
    ConversionError
        It cannot be read, or llama.cpp does not have its architecture.
    RecipeError
        It is no file and no directory, or the recipe's plan or target does not fit it.
    """
    path = Path(recipe.model).expanduser()
    if path.is_file():
        file = open_gguf(path)
        header = min(info.offset for info in file.tensors.values()) + HEADER_RESERVE
        return _outline(path.name, file, recipe, header, 0)
    if not path.is_dir():
        raise RecipeError(
            f"{path}: no such file or directory; a dry run reads headers that are here and fetches "
            "nothing. Give a GGUF file, a directory with config.json, or --shape "
            f"{', '.join(SHAPES)}."
        )
    config = read_json(path / "config.json")
    if config is None:
        raise ConversionError(f"{path}: no config.json. Give a checkpoint's directory or a GGUF.")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        return outline_of_config(path.name, config, recipe)
    checkpoint = open_checkpoint(path, allow_pickle=recipe.allow_pickle)
    tensors = checkpoint.tensors.values()
    dtypes = {tensor.dtype for tensor in tensors if len(tensor.shape) > 1}
    source = _FLOATS[dtypes.pop()] if dtypes in ({"BF16"}, {"F16"}) else _T.F32
    n_bytes = sum(tensor.n_bytes for tensor in tensors)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in tensors}
    return _of_shapes(path.name, shapes, checkpoint.config, source, n_bytes, recipe)


def outline_of_shape(name: str, recipe: Recipe) -> Outline:
    """Return the outline of a model of a known size, see ``SHAPES``.

    Raises
    ------
    RecipeError
        There is none of that name.
    """
    if name not in SHAPES:
        raise RecipeError(f"--shape: {unknown_name('shape', name, list(SHAPES))}")
    return outline_of_config(name, SHAPES[name], recipe)


def outline_of_config(name: str, config: Mapping[str, Any], recipe: Recipe) -> Outline:
    """Return the outline of the model that a configuration describes; transformers builds it.

    Raises
    ------
    ConversionError
        transformers is not here, or does not know the model.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConversionError(
            f"{name}: a configuration without weights is read by transformers, which is not "
            "installed. Install: pip install 'edgeq[torch]'"
        ) from error
    try:
        values = {key: value for key, value in config.items() if key != "model_type"}
        found = AutoConfig.for_model(config["model_type"], **values)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{name}: transformers makes no model of its config.json ({error}). Mend it, or give "
            "a checkpoint with weights."
        ) from error
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    source = _FLOATS.get(dtype, _T.F32)
    n_bytes = sum(tensor_bytes(source, shape) for shape in shapes.values())
    raw = {**model.config.to_dict(), **config}
    return _of_shapes(name, shapes, raw, source, n_bytes, recipe)


def _of_shapes(
    name: str,
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    source: GGMLQuantizationType,
    checkpoint_bytes: int,
    recipe: Recipe,
) -> Outline:
    """Let llama.cpp choose types for a file with holes for weights."""
    architecture = _architecture(name, config)
    with tempfile.TemporaryDirectory(prefix="edgeq-") as directory:
        path = Path(directory) / "model.gguf"
        write_outline(path, shapes, config, architecture, {})
        types = dict.fromkeys(open_gguf(path).tensors, source)
        write_outline(path, shapes, config, architecture, types)
        file = open_gguf(path)
        header = min(info.offset for info in file.tensors.values()) + HEADER_RESERVE
        header += _TOKEN_BYTES * file.tensors["token_embd.weight"].shape[0]
        return _outline(name, file, recipe, header, checkpoint_bytes)


def _architecture(name: str, config: Mapping[str, Any]) -> Architecture:
    classes = config.get("architectures") or []
    for one in known_architectures().values():
        if any(each in one.classes for each in classes):
            return one
    raise ConversionError(
        f"{name}: config.json names {', '.join(map(str, classes)) or 'no class'} as architectures, "
        "which edgeq does not convert. See edgeq plugins for those that it does."
    )


def _outline(
    name: str, file: GgufFile, recipe: Recipe, header: int, checkpoint_bytes: int
) -> Outline:
    plan, told = _plan(file, recipe, header)
    types = plan.types
    tensors = tuple(
        Tensor(each, tuple(info.shape), info.qtype, types[each])
        for each, info in file.tensors.items()
    )
    n_used = int(file.value(f"{file.architecture}.expert_used_count", 0))
    return Outline(name, tensors, n_used, padded(header), checkpoint_bytes, told)


def _plan(file: GgufFile, recipe: Recipe, header: int) -> tuple[Plan, str]:
    """Return the types to count with, and what they are; of a target the mix next below it."""
    if recipe.plan is not None:
        return allocation.read_plan(recipe.plan, file), str(recipe.plan)
    target = recipe.target
    if not target.is_set:
        plan = allocation.allocate(file, recipe.preset, has_imatrix=recipe.use_imatrix)
        return plan, find_preset(recipe.preset).name
    limits = [target.size_bytes] if target.size_bytes is not None else []
    if target.bpw is not None:
        limits.append(int(target.bpw * file.n_parameters / 8))
    if not limits:
        plan = allocation.allocate(file, recipe.preset, has_imatrix=recipe.use_imatrix)
        return plan, f"{find_preset(recipe.preset).name}, as the size is to be found"
    plans = [allocation.allocate(file, one, has_imatrix=recipe.use_imatrix) for one in COMMON]
    fitting = [plan for plan in plans if plan.size_bytes + header <= min(limits)]
    if not fitting:  # an allocator may still find one: it need not follow llama.cpp's rules
        plan = min(plans, key=lambda one: one.size_bytes)
        return plan, f"at most {min(limits):,} bytes, counted as {plan.preset}, which has more"
    plan = max(fitting, key=lambda one: one.size_bytes)
    return plan, f"at most {min(limits):,} bytes, counted as {plan.preset}"
