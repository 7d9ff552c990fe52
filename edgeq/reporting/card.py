"""A model card: Markdown with the metadata that the Hugging Face hub reads."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from converters.output import replacing
from edgeq.console import markdown_table
from edgeq.errors import EvaluationError
from edgeq.opening import check_output
from edgeq.reporting.markup import printable
from edgeq.reporting.page import distinct_files, headline_rows
from edgeq.reporting.reading import SavedReport, read_reports
from edgeq.reporting.reproducing import command
from edgeq.results import FILES_HEADER, Written

_HUB = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")
_LICENSE = re.compile(r"[a-z0-9.+-]+")
_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")  # that YAML folds, or takes for a mark


def write_card(path: Path, out: Path | None) -> tuple[str, Written | None]:
    """Return the model card of a report, and write it to a file if one is given.

    Raises
    ------
    EvaluationError
        The report cannot be read, or the card not be written.
    """
    if out is not None:
        check_output(out, (path,))
    reports, _ = read_reports((path,))
    text = card(reports[0])
    if out is None:
        return text, None
    with replacing(out, EvaluationError) as temporary:
        temporary.write_text(text, "utf-8")
    notes = []
    if _base_model(reports[0]) is None:
        notes.append("The report does not say which hub model it came from: add base_model.")
    if _license(reports[0]) is None:
        notes.append("The report does not say the license: add it.")
    return text, Written((out,), {"bytes": len(text.encode())}, tuple(notes))


def card(report: SavedReport) -> str:
    """Return the model card of a report."""
    file = shlex.quote(_line(Path(report.output.path).name))
    modelfile = f"FROM ./{_line(Path(report.output.path).name)}"
    rows = [[_cell(text) for text in row] for row in headline_rows(distinct_files([report]))]
    kind = report.told("plan", "preset")
    parts = [
        f"---\n{_front_matter(report)}---",
        f"# {_prose(report.model)}, GGUF",
        f"A quantized GGUF file for llama.cpp{f', {_prose(str(kind))}' if kind else ''}, made and "
        "measured with edgeq.",
        "## Measured",
        markdown_table(FILES_HEADER, rows),
        "KL divergence from the float model in nats a token ± standard error, perplexity, and how "
        "often the most likely next token is the float model's: measured through llama.cpp"
        f"{_judged(report)}. Speeds are of the machine that measured.",
        *[_prose(line) for line in report.comparisons],
        "## Use",
        _fenced(f"llama-cli -m {file} -p Hello\nllama-server -m {file}", "sh"),
        "With Ollama, a `Modelfile` of one line:",
        _fenced(modelfile, ""),
        _fenced("ollama create mine -f Modelfile\nollama run mine", "sh"),
        "## Provenance",
        "\n".join(f"* {key}: {_code(value)}" for key, value in _facts(report)),
        "Made again by:" if report.provenance else "Measured again by:",
        _fenced(_line(command(report, is_public=True)), "sh"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(report: SavedReport) -> str:
    """Return YAML; its strings are JSON's, which YAML reads too."""
    architecture = report.told("model", "architecture")
    values = {
        "base_model": _base_model(report),
        "base_model_relation": "quantized" if _base_model(report) else None,
        "license": _license(report),
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": [
            "gguf",
            "quantized",
            "edgeq",
            "llama-cpp",
            *([printable(architecture)] if architecture else []),
        ],
    }
    lines = []
    for key, value in values.items():
        if isinstance(value, list):
            lines += [f"{key}:", *[f"- {_yaml(each)}" for each in value]]
        elif value is not None:
            lines.append(f"{key}: {_yaml(value)}")
    return "".join(f"{line}\n" for line in lines)


def _yaml(text: str) -> str:
    quoted = json.dumps(printable(text), ensure_ascii=False)
    return _BREAKS.sub(lambda match: f"\\u{ord(match[0]):04x}", quoted)


def _base_model(report: SavedReport) -> str | None:
    match = _HUB.fullmatch(str(report.told("model", "repo_url")))
    return match[1] if match else None


def _license(report: SavedReport) -> str | None:
    told = str(report.told("model", "license") or "").lower()
    return told if _LICENSE.fullmatch(told) else None


def _judged(report: SavedReport) -> str:
    found = report.output.evaluation
    return "" if found is None else f" on {found.n_chunks} chunks of {found.n_ctx} tokens"


def _facts(report: SavedReport) -> Iterator[tuple[str, str]]:
    for key, keys in (
        ("model", ("source", "name")),
        ("sha256 of the model", ("source", "sha256")),
        ("rounding", ("method", "quantizer")),
    ):
        value = report.told(*keys)
        if value is not None:
            yield key, str(value)
    texts = report.told("texts")
    for part, about in (texts if isinstance(texts, dict) else {}).items():
        if isinstance(about, dict):
            yield f"{part} text", f"{about.get('n_tokens')} tokens, sha256 {about.get('sha256')}"
    found = report.output.evaluation
    if found is not None:
        yield "sha256 of the tokens judged on", found.tokens_sha256
    versions = report.told("versions")
    if isinstance(versions, dict):
        yield "versions", ", ".join(f"{name} {value}" for name, value in versions.items())


def _line(text: str) -> str:
    return re.sub(r"\s", " ", printable(text))


def _prose(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return re.sub(
        r"([\\`*_\[\]|#])", r"\\\1", _line(text).replace("&", "&amp;").replace("<", "&lt;")
    )


def _cell(text: str) -> str:
    return _line(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_line(text).replace('`', chr(39))}`"


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
