"""What a user may name as a model: a directory, a GGUF file, or an id on the Hugging Face hub."""

import re
from pathlib import Path

from converters.errors import ConversionError, fail

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(@[\w./-]+)?\Z", re.ASCII)
_WANTED = [  # never pickles, never code
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "README.md",
]
_UNWANTED = ["*.py", "*.bin", "*.pkl", "*.pt", "*.pth", "original/*", "onnx/*", "consolidated*"]


def resolve_model(model: Path | str) -> Path:
    """Return the local directory or GGUF file that `model` names, fetched if it is a hub id.

    Parameters
    ----------
    model : a checkpoint's directory, a ``.gguf`` file, or a hub id ``NAME/MODEL`` with an optional
        ``@REVISION``. What exists locally is never looked up.

    Raises
    ------
    ConversionError
        Neither exists, or the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        hint = "Give a GGUF file, or the directory of a Hugging Face checkpoint."
        if path.suffix in (".safetensors", ".json", ".bin"):
            hint = f"Give its directory: {path.parent}"
        fail(path, "neither a directory nor a .gguf file", hint)
    if isinstance(model, Path) or path.suffix == ".gguf" or not _HUB_ID.match(model):
        fail(path, "no such file or directory", "Give a checkpoint's directory or a GGUF file.")
    return _fetch(model)


def _fetch(model: str) -> Path:
    name, _, revision = model.partition("@")
    elsewhere = "Fetch the checkpoint by other means and give its directory."
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise ConversionError(
            f"{model}: no such directory, and huggingface_hub is not installed to look it up on "
            f"the hub. Install it with: pip install 'edgeq[hub]'. {elsewhere}"
        ) from None
    # the root of what the hub's HTTP client raises; which client that is depends on its version
    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        fetched = snapshot_download(
            name, revision=revision or None, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except (OSError, ValueError, transport_error) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"{model}: no such directory, and the hub does not give it ({reason}). {elsewhere}"
        ) from error
    return Path(fetched)
