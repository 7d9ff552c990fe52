"""edgeq: export Hugging Face causal language models to GGUF files, calibrated and proven."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("edgeq")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.1.0"

__all__ = ["__version__"]
