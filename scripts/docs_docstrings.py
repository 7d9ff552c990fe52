"""Griffe extension of the documentation: docstrings of the house style become numpydoc's.

The house writes ``name : what it is``, for types are in the signatures; numpydoc would take that
for a type. Names that share their words get them each. Returns and references are plain sentences.
"""

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^([A-Z]\w+)\n-{3,}\n", re.MULTILINE)
_ENTRY = re.compile(r"^(?P<names>\w[\w, *]*?) : (?P<text>.+(?:\n(?: .*)?)*)", re.MULTILINE)


class HouseStyle(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one; griffe calls this for every object."""
        if obj.docstring is not None:
            obj.docstring.value = numpydoc(obj.docstring.value)


def numpydoc(text: str) -> str:
    """Return a docstring of the house style as numpydoc understands it."""
    head, *rest = _SECTION.split(text)
    prose, sections = [head.rstrip()], []
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        if title in ("Returns", "References"):
            prose.append(f"**{title}:** {body.strip()}")
        else:
            body = _ENTRY.sub(_entries, body.rstrip() + "\n")
            sections.append(f"{title}\n{'-' * len(title)}\n{body}")
    return "\n\n".join([*prose, *sections])


def _entries(entry: re.Match[str]) -> str:
    text = " ".join(entry["text"].split())
    return "".join(f"{name}\n    {text}\n" for name in entry["names"].split(", "))
