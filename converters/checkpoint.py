"""A Hugging Face checkpoint directory, opened lazily: its configuration and one tensor at a time.

Weights come from safetensors; pickles only where the caller allows them. Which files make up the
model follows ``model.safetensors.index.json`` where there is one, and both must agree.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import fail, shown
from converters.hub import resolve_model
from converters.json_file import read_json
from converters.safetensors_file import CheckpointTensor, map_tensor, read_header

__all__ = ["Checkpoint", "CheckpointTensor", "open_checkpoint", "resolve_model"]

_INDEX = "model.safetensors.index.json"
_PICKLE_INDEX = "pytorch_model.bin.index.json"
_OWN_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors\Z")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors\Z")
_PICKLE = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin\Z")
_DESCRIBING = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md")


class Checkpoint:
    """A model's directory, opened by ``open_checkpoint``.

    Attributes
    ----------
    directory : where it lies
    config : config.json
    tensors : by name, in file order
    files : the files that hold the weights
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        tensors: dict[str, CheckpointTensor],
        load: Callable[[CheckpointTensor], npt.NDArray[Any]],
    ) -> None:
        self.directory = directory
        self.config = config
        self.tensors = tensors
        self.files = tuple(dict.fromkeys(tensor.path for tensor in tensors.values()))
        self._load = load

    def raw(self, name: str) -> tuple[npt.NDArray[Any], str]:
        """Return a tensor as it is stored, read-only, and its type (F32, BF16, I64, ...).

        BF16 comes as uint16, the upper half of a float32. From safetensors the array is
        memory-mapped; the mapping ends with the last array that looks at it.
        """
        tensor = self._tensor(name)
        return self._load(tensor), tensor.dtype

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor as float32; of F32 data a read-only view without a copy."""
        array, dtype = self.raw(name)
        if dtype == "BF16":
            wide = array.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        with np.errstate(over="ignore"):  # a huge F64 becomes Inf, which conversion refuses
            return array.astype(np.float32, copy=False)

    def fingerprint(self) -> str:
        """Return the hex SHA-256 over name, size and content of every file that counts.

        Those are the files that hold the weights and all that may describe the model beside them
        (configuration, tokenizer, templates, model card). Reads everything once.
        """
        files = set(self.files)
        for pattern in _DESCRIBING:
            files.update(path for path in self.directory.glob(pattern) if path.is_file())
        files.update(self.directory.glob("additional_chat_templates/*.jinja"))
        digest = hashlib.sha256()
        for path in sorted(files, key=lambda path: path.relative_to(self.directory).as_posix()):
            try:
                size = path.stat().st_size
                content = _sha256(path)
            except OSError as error:
                fail(path, f"cannot be read ({error})", "Give a directory whose files can.")
            name = path.relative_to(self.directory).as_posix()
            digest.update(json.dumps([name, size, content]).encode())
        return digest.hexdigest()

    def _tensor(self, name: str) -> CheckpointTensor:
        if name not in self.tensors:
            fail(
                self.directory,
                f"no tensor {shown(name)} among its {len(self.tensors)}",
                "Fetch the whole checkpoint again, or convert it with llama.cpp's script.",
            )
        return self.tensors[name]


def open_checkpoint(path: Path | str, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a Hugging Face checkpoint directory.

    Parameters
    ----------
    allow_pickle : also take ``pytorch_model*.bin``, where there is no safetensors file. They are
        loaded by torch with ``weights_only=True``, so that no code of theirs runs.

    Raises
    ------
    ConversionError
        A file is missing, damaged, or contradicts another one; or the weights are pickles and
        those are not allowed.
    """
    directory = Path(path)
    if not directory.is_dir():
        fail(
            directory,
            "not a directory",
            "Give the directory that holds config.json and *.safetensors.",
        )
    config = read_json(directory / "config.json")
    if config is None:
        fail(
            directory / "config.json", "no such file", "Give a Hugging Face checkpoint's directory."
        )
    paths, weight_map = _safetensors_paths(directory)
    if paths:
        headers = {file: read_header(_inside(directory, file)) for file in paths}
        tensors = _merged(directory, headers, weight_map)
        return Checkpoint(directory, config, tensors, map_tensor)
    paths, weight_map = _pickle_paths(directory)
    if not allow_pickle:
        fail(
            directory,
            f"its weights are pickles ({paths[0]}), which may hold anything",
            "Give safetensors, or allow them with --allow-pickle.",
        )
    from converters.pickle_file import PickleFiles

    pickles = PickleFiles([_inside(directory, file) for file in paths])
    tensors = _merged(directory, dict(zip(paths, pickles.headers(), strict=True)), weight_map)
    return Checkpoint(directory, config, tensors, pickles.load)


def _safetensors_paths(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Return the names of the safetensors files, and the index's map if there is one."""
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    if (directory / _INDEX).exists():
        weight_map = _weight_map(directory / _INDEX)
        named = sorted(set(weight_map.values()))
        extra = [name for name in present if _OWN_SHARD.match(name) and name not in named]
        if extra:
            fail(
                directory / extra[0],
                f"not named by {_INDEX}, so that it is unclear which weights count",
                "Remove the file, or the index if that is the stale one.",
            )
        return named, weight_map
    own = [name for name in present if _OWN_SHARD.match(name)]
    if "model.safetensors" in own and len(own) > 1:
        fail(
            directory / own[0],
            f"lies beside model.safetensors without {_INDEX}, so that it is unclear which weights "
            "count",
            "Remove the one or the other.",
        )
    chosen = own or [name for name in present if not name.startswith(("adapter_", "consolidated"))]
    if chosen and all(_SHARD.match(name) for name in chosen):
        return _whole_set(directory, chosen), None
    if len(chosen) > 1:
        fail(
            directory,
            f"it has {len(chosen)} safetensors files ({chosen[0]}, {chosen[1]}, ...) and no "
            f"{_INDEX} that says which belong to the model",
            "Keep one, or fetch the index.",
        )
    return chosen, None


def _whole_set(directory: Path, shards: list[str]) -> list[str]:
    """Check that the numbered shards of a model without an index are all there."""
    match = _SHARD.match(shards[0])
    stem, count = (match["stem"], int(match["count"])) if match else ("", 0)
    for number in range(1, count + 1):
        name = f"{stem}-{number:05d}-of-{count:05d}.safetensors"
        if name not in shards:
            fail(directory / name, "no such file; a shard is missing", "Fetch it.")
    if len(shards) != count:
        fail(
            directory,
            f"it has {len(shards)} shards, expected the {count} of {stem}",
            "Remove those of another model.",
        )
    return shards


def _pickle_paths(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    if (directory / _PICKLE_INDEX).exists():
        weight_map = _weight_map(directory / _PICKLE_INDEX)
        return sorted(set(weight_map.values())), weight_map
    names = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    names = [name for name in names if _PICKLE.match(name)]
    if not names:
        hint = "Give a checkpoint with model.safetensors."
        if (directory / "adapter_model.safetensors").exists():
            hint = "It is an adapter: merge it into its base model first."
        elif any(directory.glob("*.gguf")):
            hint = "Give the path of the GGUF file in it."
        fail(directory, "it holds no weights (*.safetensors)", hint)
    return names, None


def _weight_map(path: Path) -> dict[str, str]:
    """Return an index's map from tensor to file, all of them plain names."""
    weight_map = (read_json(path) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        fail(path, f"weight_map is {shown(weight_map)}, expected tensor names and files")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file not in ("", ".", "..")
        if not plain or any(mark in file for mark in ("/", "\\", "\0")):
            fail(
                path,
                f"{shown(name)} lies in {shown(file)}, expected the name of a file beside it",
                "Do not use this checkpoint.",
            )
    return weight_map


def _inside(directory: Path, name: str) -> Path:
    """Return the path of a weight file, which may be a link only inside of its model.

    The hub's cache links ``models--X/snapshots/REVISION/NAME`` to ``models--X/blobs/HASH``.
    """
    path = directory / name
    home = directory.resolve()
    real = path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        fail(
            path,
            f"a link to {real}, which is outside of the checkpoint",
            "Put the file itself there, or give the directory that holds it.",
        )
    return path


def _merged(
    directory: Path,
    headers: dict[str, dict[str, CheckpointTensor]],
    weight_map: dict[str, str] | None,
) -> dict[str, CheckpointTensor]:
    """Join the files' tensors and hold them against the index."""
    tensors: dict[str, CheckpointTensor] = {}
    for file, header in headers.items():
        for name, tensor in header.items():
            if name in tensors:
                fail(directory / file, f"{shown(name)} is also in {tensors[name].path.name}")
            if weight_map is not None and weight_map.get(name) != file:
                _mismatch(directory / file, f"holds {shown(name)}", weight_map.get(name))
            tensors[name] = tensor
    for name, file in (weight_map or {}).items():
        if name not in tensors:
            _mismatch(directory / file, f"does not hold {shown(name)}", file)
    if not tensors:
        fail(directory, "its weight files hold no tensor")
    return tensors


def _mismatch(path: Path, what: str, stated: str | None) -> None:
    where = f"in {stated}" if stated else "nowhere"
    fail(
        path,
        f"{what}, which the index places {where}",
        "The files are of different versions: fetch them all again.",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
