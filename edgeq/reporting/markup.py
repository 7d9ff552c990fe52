"""HTML and SVG elements. All text is escaped: nothing that a file says can become markup.

The output is well-formed XML as well, so that tests can parse it strictly.
"""

import re
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

_VOID = frozenset({"br", "input", "meta"})
_UNPRINTABLE = re.compile(r"[^\t\n\r -\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def printable(text: object) -> str:
    """Return text without what neither XML nor UTF-8 can hold: file names may have anything."""
    return _UNPRINTABLE.sub("�", str(text))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """Return an element.

    Parameters
    ----------
    children : ``Markup`` as it is, anything else as escaped text; None is left out
    attributes : ``class_`` is class, ``aria_label`` is aria-label; None is left out
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(printable(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Markup(f"<{tag}{written}/>")
    inner = "".join(
        child if isinstance(child, Markup) else escape(printable(child))
        for child in children
        if child is not None
    )
    return Markup(f"<{tag}{written}>{inner}</{tag}>")


def joined(parts: Iterable[Markup | None]) -> Markup:
    """Return elements one after the other."""
    return Markup("\n").join(part for part in parts if part is not None)


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[object]], kind: str | None = None
) -> Markup:
    """Return a table whose first column names its rows.

    Where the screen is narrow it scrolls by itself; of the kind ``cards`` its rows become lists.
    """
    head = element("tr", *[element("th", text, scope="col") for text in header])
    body = []
    for name, *cells in rows:
        labels = header[1:] if kind == "cards" else [None] * len(cells)
        pairs = zip(cells, labels, strict=True)
        columns = [element("td", cell, data_label=label) for cell, label in pairs]
        body.append(element("tr", element("th", name, scope="row"), *columns))
    whole = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", *body),
        class_=kind,
    )
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def number(value: float, digits: int = 3) -> str:
    """Return a number for people: 0.0123, 12,345, 1.2·10⁻⁷."""
    if value != 0 and abs(value) < 10.0 ** -(digits + 1):
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        mantissa = f"{float(mantissa):g}"
        return f"10{power}" if mantissa == "1" else f"{mantissa}·10{power}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
