"""The command that makes a file again, from the recipe that its report keeps."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeq.recipe import AUTO_TEXT, Recipe, TextChoice
from edgeq.reporting.reading import SavedReport

_FLAGS = {
    "plan": "--plan",
    "speeds": "--speeds",
    "types": "--types",
    "allocator": "--allocator",
    "costs": "--costs",
    "quantizer": "--quantizer",
    "effort": "--effort",
    "transform": "--transform",
    "fisher": "--fisher",
    "fisher_groups": "--fisher-groups",
    "asymmetric": "--asymmetric",
    "tune_steps": "--tune",
    "imatrix": "--imatrix",
    "split_max_bytes": "--split-max-size",
}
_SWITCHES = {
    "sequential": (False, "--no-sequential"),
    "use_imatrix": (False, "--no-imatrix"),
    "prove": (False, "--no-prove"),
    "allow_requantize": (True, "--allow-requantize"),
}
_TARGETS = {
    "size_bytes": "--size",
    "bpw": "--bpw",
    "max_kld": "--max-kld",
    "max_ppl_ratio": "--max-ppl-ratio",
    "min_tps": "--min-tps",
}
_TEXTS = {
    "n_ctx": "--ctx",
    "chunks": "--chunks",
    "evaluation_chunks": "--eval-chunks",
    "seed": "--seed",
}


def command(report: SavedReport, *, is_public: bool = False) -> str:
    """Return a line for a shell that does again what a report is about.

    Parameters
    ----------
    is_public : name files without their directories, which are nobody else's business
    """
    words = _words(report)
    if is_public:
        words = [Path(word).name if word.startswith("/") else word for word in words]
    return shlex.join(words)


def _words(report: SavedReport) -> list[str]:
    out = report.output.path
    recipe = report.told("recipe")
    if not isinstance(recipe, dict):
        return ["edgeq", "check", out, "--against", str(report.path)]
    words = ["edgeq", "export", str(recipe.get("model")), Path(out).name, *_options(recipe)]
    if any(file.made_by == "llama-quantize" for file in report.files):
        words.append("--baseline")
    return words


def _options(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Yield the flags of what is not as ``edgeq export`` has it by itself."""
    target, texts = (_mapping(recipe.get(key)) for key in ("target", "texts"))
    has_target = any(value is not None for value in target.values())
    if recipe.get("plan") is None and not has_target:
        yield from ("--type", str(recipe.get("preset")))
    yield from _valued(recipe, _FLAGS, vars(Recipe("", Path("out.gguf"))))
    yield from _valued(target, _TARGETS, {})
    for key, (value, flag) in _SWITCHES.items():
        if recipe.get(key) is value:
            yield flag
    for key, flag in (("calibration", "--text"), ("evaluation", "--eval-text")):
        given = texts.get(key)
        for text in given if isinstance(given, list) else ():
            if text != AUTO_TEXT:
                yield from (flag, str(text))
    yield from _valued(texts, _TEXTS, vars(TextChoice()))
    if texts.get("force") is True:
        yield "--force"


def _valued(
    values: Mapping[str, Any], flags: Mapping[str, str], usual: Mapping[str, Any]
) -> Iterator[str]:
    for key, flag in flags.items():
        value = values.get(key)
        if value is not None and value != usual.get(key):
            yield from (flag, str(value))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
