"""Convert the tests' tiny checkpoints with llama.cpp's own script; keep what it wrote as digests.

    python scripts/make_golden_conversions.py path/to/llama.cpp [name ...]

Writes tests/data/golden_conversions.json: for every tiny model the metadata (long lists as
digests), the SHA-256 of every tensor's bytes in every type, and the type that ``auto`` chose.
llama.cpp is imported in this process, with its own gguf-py: the installed ``gguf`` package must not
be imported before.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tests/data/golden_conversions.json"
TYPES = ("f32", "f16", "bf16", "auto")


def main() -> None:
    """Run llama.cpp's converter on every tiny model."""
    llama_cpp = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(llama_cpp))
    sys.path.insert(1, str(llama_cpp / "gguf-py"))
    sys.path += [str(ROOT), str(ROOT / "tests")]
    import conversion
    import gguf
    import tiny_models
    import torch
    from conversion.base import TextModel

    logging.disable(logging.INFO)
    if not str(Path(gguf.__file__)).startswith(str(llama_cpp)):
        raise SystemExit(f"gguf came from {gguf.__file__}, not from llama.cpp")
    golden: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    patch_neox(conversion)
    wanted = [name for name in tiny_models.names() if tiny_models.CASES[name].oracle]
    for name in sys.argv[2:] or wanted:
        # the digest of a tokenizer trained here is not in llama.cpp's list
        pre = tiny_models.CASES[name].pre
        TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=pre: pre
        golden[name] = {"tensors": {}}
        with tempfile.TemporaryDirectory() as parent:
            directory = tiny_models.build(name, Path(parent)).directory
            for kind in TYPES:
                out = Path(parent) / f"{kind}.gguf"
                with torch.inference_mode():
                    convert(conversion, gguf, directory, out, kind)
                fields = tiny_models.describe_fields(out)
                tensors = tiny_models.digest_tensors(out)
                if kind == "auto":
                    golden[name]["auto"] = next(
                        other for other in TYPES if golden[name]["tensors"][other] == tensors
                    )
                else:
                    golden[name]["tensors"][kind] = tensors
                if kind == "f32":
                    golden[name]["fields"] = fields
        OUT.write_text(json.dumps(golden, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        sys.stdout.write(f"{name}\n")


def patch_neox(conversion: Any) -> None:
    """Give GPT-NeoX its old rotary_pct back: transformers 5 moves it, and the script then stops."""
    original = conversion.ModelBase.load_hparams

    def load_hparams(directory: Path, is_mistral_format: bool) -> dict[str, Any]:
        hparams: dict[str, Any] = original(directory, is_mistral_format)
        if hparams.get("model_type") == "gpt_neox":
            hparams["rotary_pct"] = hparams["rope_parameters"]["partial_rotary_factor"]
        return hparams

    conversion.ModelBase.load_hparams = staticmethod(load_hparams)


def convert(conversion: Any, gguf: Any, directory: Path, out: Path, kind: str) -> None:
    """Do what the script's main() does for these arguments."""
    types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        "auto": gguf.LlamaFileType.GUESSED,
    }
    hparams = conversion.ModelBase.load_hparams(directory, False)
    architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    model_class = conversion.get_model_class(architecture)
    model_class(directory, types[kind], out).write()


if __name__ == "__main__":
    main()
