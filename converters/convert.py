"""Hugging Face checkpoint to GGUF: which tensors there are, and the metadata.

References
----------
llama.cpp 0c1e57098, conversion/base.py: ModelBase.__init__ for what ``auto`` means,
ModelBase.prepare_metadata for ``general.*``.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import gguf
from gguf import GGMLQuantizationType as QType
from gguf import GGUFValueType, LlamaFileType

from converters.architectures import architecture_of
from converters.architectures.description import Architecture, Config, Output, Shape
from converters.architectures.settings import settings
from converters.checkpoint import Checkpoint, CheckpointTensor
from converters.errors import ConversionError
from converters.gguf_file import Field, write_gguf, write_holes
from converters.vocab import read_vocabulary
from converters.weights import Piece, Target, output_shape, tensor_source

FILE_TYPES: dict[str, tuple[LlamaFileType, QType]] = {
    "f32": (LlamaFileType.ALL_F32, QType.F32),
    "f16": (LlamaFileType.MOSTLY_F16, QType.F16),
    "bf16": (LlamaFileType.MOSTLY_BF16, QType.BF16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, QType.Q8_0),
}
# never in a GGUF: buffers that old checkpoints saved
_BUFFERS = (r".*\.attention\.(masked_)?bias", r".*\.rotary_emb\.inv_freq")


def convert(
    checkpoint: Checkpoint,
    out: Path,
    *,
    ftype: str = "auto",
    pre: str | None = None,
    split_max_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write a checkpoint as a GGUF file that llama.cpp runs.

    Parameters
    ----------
    checkpoint : as opened by ``open_checkpoint``
    out : file to write; replaced only when everything was written and read back
    ftype : type of the matrices: ``f32``, ``f16``, ``bf16``, ``q8_0``, or ``auto`` for the first
        16-bit type among the checkpoint's matrices and f16 if there is none. Norms, biases and
        routers are float32 in any case. A matrix whose rows do not divide into blocks of 32
        becomes f16 under ``q8_0``, with a warning in the log.
    pre : name of llama.cpp's pre-tokenizer instead of the one that is found
    split_max_bytes : start another part when one would grow beyond this
    progress : called with the bytes written since the last call

    Returns
    -------
    The files written, one unless the output is split.

    Raises
    ------
    ConversionError
        Unknown architecture, a setting llama.cpp has no place for, missing, surplus, misshaped or
        non-finite tensors (by name), no tokenizer, or a vocabulary of another size.
    """
    if ftype != "auto" and ftype not in FILE_TYPES:
        raise ConversionError(
            f"convert: type {ftype!r}; expected auto, {', '.join(FILE_TYPES)}. Quantize from a "
            "float GGUF for other types."
        )
    architecture = architecture_of(checkpoint)
    _refuse_quantized(checkpoint)
    config = settings(checkpoint.config, architecture)
    file_type, qtype = FILE_TYPES[_guess_type(checkpoint) if ftype == "auto" else ftype]
    targets = _targets(checkpoint, architecture, config)
    fields = _fields(checkpoint, architecture, config, targets, file_type, pre)
    sources = [tensor_source(checkpoint, config, target, qtype) for target in targets]
    return write_gguf(out, fields, sources, split_max_bytes=split_max_bytes, progress=progress)


def write_outline(
    out: Path,
    shapes: Mapping[str, Shape],
    raw_config: Config,
    architecture: Architecture,
    types: Mapping[str, QType],
) -> None:
    """Write the GGUF file that a model would become, without vocabulary and with holes for weights.

    It is enough for llama.cpp to choose types from.

    Parameters
    ----------
    out : file to write; an existing one is replaced
    shapes : of the checkpoint's tensors, by their names there
    raw_config : of the model, as config.json has it
    architecture : of the model
    types : by names in the GGUF; where there is none, matrices are float32

    Raises
    ------
    ConversionError
        As for ``convert``.
    """
    nowhere = Path(str(raw_config.get("_name_or_path") or "model"))
    tensors = {name: CheckpointTensor(name, "F32", s, nowhere, -1, 0) for name, s in shapes.items()}
    checkpoint = Checkpoint(nowhere, dict(raw_config), tensors, _no_weights)
    config = settings(raw_config, architecture)
    targets = _targets(checkpoint, architecture, config)
    fields = {
        "general.architecture": Field(architecture.name, GGUFValueType.STRING),
        **_architecture_fields(checkpoint, architecture, config),
    }
    sources = [
        tensor_source(checkpoint, config, target, types.get(target.name, QType.F32))
        for target in targets
    ]
    write_holes(out, fields, sources)


def _no_weights(tensor: CheckpointTensor) -> NoReturn:
    raise ConversionError(f"{tensor.name}: an outline has no weights. Open the checkpoint itself.")


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    quantization = checkpoint.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method == "edgeq" and not quantization.get("gguf"):
            return  # what edgeq.transformers_quantizer saved: the float weights
        raise ConversionError(
            f"{checkpoint.directory}/config.json: the checkpoint is quantized already "
            f"({method or 'quantization_config is set'}), expected float weights. Use the "
            "original model."
        )


def _guess_type(checkpoint: Checkpoint) -> str:
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) >= 2 and tensor.dtype in ("BF16", "F16"):
            return tensor.dtype.lower()
    return "f16"


# --- names ---------------------------------------------------------------------------------------


def _targets(checkpoint: Checkpoint, architecture: Architecture, config: Config) -> list[Target]:
    """Return every tensor of the GGUF; refuse what is missing or has no place."""
    n_layers = config.get("num_hidden_layers") or config.get("n_layer")
    if not isinstance(n_layers, int) or n_layers < 1:
        raise ConversionError(
            f"{checkpoint.directory}/config.json: num_hidden_layers is {n_layers!r}; expected a "
            "positive integer."
        )
    if n_layers > len(checkpoint.tensors):  # a table of names is made for every layer
        raise ConversionError(
            f"{checkpoint.directory}/config.json: num_hidden_layers is {n_layers}, but the "
            f"checkpoint has {len(checkpoint.tensors)} tensors in all. Mend config.json, or "
            "download the checkpoint again."
        )
    names = gguf.get_tensor_name_map(architecture.model_arch, n_layers)
    pieces: dict[str, list[Piece]] = {}
    for source in checkpoint.tensors:
        plain = _text_name(source)
        skipped = (*_BUFFERS, *architecture.skipped)
        if any(re.fullmatch(pattern, plain) for pattern in skipped):
            continue
        for name, piece in pieces_of(source, plain, architecture):
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise ConversionError(
                    f"{checkpoint.directory}: {source} has no place in a GGUF of architecture "
                    f"{architecture.name} with {n_layers} layers. Remove it from the checkpoint, "
                    "or mend config.json if it describes another model."
                )
            pieces.setdefault(target, []).append(piece)
    if architecture.needs_output and config.get("tie_word_embeddings"):
        pieces.setdefault("output.weight", list(pieces.get("token_embd.weight", [])))
    _check_complete(checkpoint, architecture, config, n_layers, pieces)
    targets = []
    for entry in architecture.generated:
        values = entry.values(config)
        if values is not None:
            targets.append(Target(entry.name, values.shape, values=values))
    return targets + [
        _assemble(checkpoint, config, name, members) for name, members in pieces.items()
    ]


def _text_name(name: str) -> str:
    """Return the name that a tensor of a text-only checkpoint would have."""
    return name.replace("language_model.model.", "model.").replace("language_model.", "")


def pieces_of(source: str, plain: str, architecture: Architecture) -> list[tuple[str, Piece]]:
    """Return what becomes of one checkpoint tensor: (name to look up in gguf's name map, piece).

    Parameters
    ----------
    source : the tensor's name in the checkpoint
    plain : the name that it would have in a text-only checkpoint
    """
    for rule in architecture.rules:
        match = re.fullmatch(rule.pattern, plain)
        if match is None:
            continue
        groups = match.groupdict()
        index = groups.get("index")
        return [
            (
                plain if output.name is None else output.name.format(**groups),
                Piece(source, output, None if index is None else int(index)),
            )
            for output in rule.outputs
        ]
    return [(plain, Piece(source, Output()))]


def _check_complete(
    checkpoint: Checkpoint,
    architecture: Architecture,
    config: Config,
    n_layers: int,
    present: Mapping[str, Any],
) -> None:
    wanted = [f"{name}.weight" for name in architecture.required]
    if architecture.needs_output or not config.get("tie_word_embeddings"):
        wanted.append("output.weight")
    for flag, names in architecture.required_if.items():
        if config.get(flag):
            wanted += names
    for name in wanted:
        layers = range(n_layers) if "{bid}" in name else range(1)
        for layer in layers:
            full = name.format(bid=layer)
            if full not in present:
                raise ConversionError(
                    f"{checkpoint.directory}: the tensor for {full} is missing; config.json says "
                    f"{n_layers} layers of {architecture.name}. Download the checkpoint again, or "
                    "mend config.json."
                )


def _assemble(
    checkpoint: Checkpoint, config: Config, name: str, members: Sequence[Piece]
) -> Target:
    shapes = set()
    for piece in members:
        shapes.add(output_shape(piece, checkpoint.tensors[piece.source].shape, config))
    sources = ", ".join(piece.source for piece in members[:3])
    if len(shapes) != 1:
        raise ConversionError(f"{sources}: shapes differ, {sorted(shapes)}, in one tensor {name}.")
    shape = shapes.pop()
    stack = members[0].output.stack_size
    if stack is None:
        if len(members) != 1:
            raise ConversionError(f"{sources}: {len(members)} tensors for the one {name}.")
        return Target(name, shape, tuple(members))
    members = sorted(members, key=lambda piece: piece.index or 0)
    if [piece.index for piece in members] != list(range(config[stack])):
        missing = set(range(config[stack])) - {piece.index for piece in members}
        raise ConversionError(
            f"{checkpoint.directory}: {name} is a stack of {config[stack]} tensors ({stack}); "
            f"missing number {', '.join(map(str, sorted(missing))) or 'none'}, got "
            f"{len(members)}, the first is {members[0].source}. Download the checkpoint again."
        )
    return Target(name, (len(members), *shape), tuple(members))


# --- metadata ------------------------------------------------------------------------------------


def _fields(
    checkpoint: Checkpoint,
    architecture: Architecture,
    config: Config,
    targets: Sequence[Target],
    file_type: LlamaFileType,
    pre: str | None,
) -> dict[str, Field]:
    string, unsigned = GGUFValueType.STRING, GGUFValueType.UINT32
    fields = {
        "general.architecture": Field(architecture.name, string),
        "general.type": Field("model", string),
        **_general_fields(checkpoint, architecture, targets),
        "general.file_type": Field(int(file_type), unsigned),
        "general.quantization_version": Field(int(gguf.GGML_QUANT_VERSION), unsigned),
        **_architecture_fields(checkpoint, architecture, config),
    }
    vocabulary = read_vocabulary(
        checkpoint.directory,
        checkpoint.config,
        architecture,
        n_vocab=config.get("vocab_size"),
        pre=pre,
    )
    rows = next(target.shape[0] for target in targets if target.name == "token_embd.weight")
    if rows != len(vocabulary.tokens):
        raise ConversionError(
            f"{checkpoint.directory}: the embedding has {rows} rows, but the vocabulary "
            f"{len(vocabulary.tokens)} tokens (vocab_size {config.get('vocab_size')}). The "
            "tokenizer or config.json belongs to another model."
        )
    return fields | vocabulary.fields()


def _architecture_fields(
    checkpoint: Checkpoint, architecture: Architecture, config: Config
) -> dict[str, Field]:
    fields = {}
    for key in architecture.keys:
        if callable(key.source):
            value = key.source(config)
        else:
            value = next((config[k] for k in key.source if config.get(k) is not None), None)
        if value is None and key.required:
            raise ConversionError(
                f"{checkpoint.directory}/config.json: "
                f"{' or '.join(key.source) if not callable(key.source) else key.name} is missing; "
                f"{architecture.name} needs it."
            )
        if value is not None:
            name = key.name.format(arch=architecture.name)
            fields[name] = Field(_checked(checkpoint, name, value, key.type), key.type)
    return fields


def _checked(checkpoint: Checkpoint, name: str, value: Any, kind: GGUFValueType) -> Any:
    """Return a value of the configuration; refuse it if it is not of the key's type."""
    accepted: dict[GGUFValueType, tuple[tuple[type, ...], str]] = {
        GGUFValueType.UINT32: ((int,), "an integer from 0 to 4294967295"),
        GGUFValueType.FLOAT32: ((int, float), "a finite number"),
        GGUFValueType.BOOL: ((bool,), "true or false"),
        GGUFValueType.STRING: ((str,), "a string"),
    }
    types, wanted = accepted[kind]
    fits = type(value) in types
    if fits and kind == GGUFValueType.UINT32:
        fits = 0 <= value < 2**32
    if fits and kind == GGUFValueType.FLOAT32:
        fits = math.isfinite(value)
    if not fits:
        raise ConversionError(
            f"{checkpoint.directory}/config.json: {name} would be {value!r}; expected {wanted}."
        )
    return value


def _general_fields(
    checkpoint: Checkpoint, architecture: Architecture, targets: Sequence[Target]
) -> dict[str, Field]:
    """Return ``general.*`` from the model card, the configuration and the directory's name."""
    total = sum(math.prod(target.shape) for target in targets)
    stacked = [target.shape for target in targets if "_exps." in target.name]
    expert_parameters = sum(math.prod(shape) // shape[0] for shape in stacked)
    shared = total - sum(math.prod(shape) for shape in stacked)
    n_experts = sum(shape[0] for shape in stacked) // len(stacked) if stacked else 0
    metadata = gguf.Metadata.load(None, checkpoint.directory, None, total)
    generation = gguf.Metadata.load_generation_config(checkpoint.directory)
    # the gguf package 0.19 does not know transformers' name of it yet
    penalty = generation.get("penalty_repeat", generation.get("repetition_penalty"))
    metadata.sampling_penalty_repeat = penalty
    metadata.name = metadata.name or checkpoint.directory.name
    if metadata.size_label is None and total:
        metadata.size_label = gguf.size_label(total, shared, expert_parameters, n_experts)
    collector = gguf.GGUFWriter(None, architecture.name)
    metadata.set_gguf_meta_model(collector)
    fields = {}
    for key, value in collector.kv_data[0].items():
        items = value.sub_type  # the collector leaves it open until it would write
        if value.type == GGUFValueType.ARRAY and items is None:
            items = GGUFValueType.get_type(value.value[0])
        fields[key] = Field(value.value, value.type, items)
    return fields
