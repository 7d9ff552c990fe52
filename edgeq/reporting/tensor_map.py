"""The map of a model: a cell for every matrix, layer × role, coloured by bits or by loss."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from edgeq.reporting.markup import element, joined, number, table
from edgeq.reporting.reading import SavedTensor

_ROLES = (
    "attn_q attn_k attn_v attn_qkv attn_output ffn_gate_inp ffn_gate ffn_up ffn_down "
    "ffn_gate_exps ffn_up_exps ffn_down_exps"
).split()
RAMP = ("#fff3c4", "#bfe3b4", "#63c0bb", "#2d8fb8", "#2457a0", "#141d5c")  # light to dark
_LEAST_BITS, _MOST_BITS = 1.5, 16.0


def tone(share: float) -> str:
    """Return the colour at 0 (light) to 1 (dark) of the ramp."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    i = min(int(place), len(RAMP) - 2)
    a, b = (_channels(RAMP[k]) for k in (i, i + 1))
    mixed = (round(x + (y - x) * (place - i)) for x, y in zip(a, b, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def ink(colour: str) -> str:
    """Return black or white, whichever reads better on a colour; at least 4.5:1 on any."""
    return "#000000" if luminance(colour) > 0.179 else "#ffffff"


def luminance(colour: str) -> float:
    """Return the relative luminance of ``#rrggbb``, 0 to 1.

    References
    ----------
    WCAG 2.2, relative luminance.
    """
    shares = [value / 255 for value in _channels(colour)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def tensor_map(tensors: Sequence[SavedTensor], key: int = 0) -> Markup:
    """Return the map, the types' legend and the table of every tensor.

    Parameters
    ----------
    key : tells the maps of one page apart
    """
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    losses = [t.loss for t in matrices if t.loss is not None and t.loss > 0]
    cells = {tensor.name: _cell(tensor, losses) for tensor in matrices}
    switch = _switch(losses, key) if losses else []
    outside = [t for t in matrices if t.layer is None]
    parts = [
        _grid([t for t in matrices if t.layer is not None], cells),
        element(
            "ul",
            *[element("li", t.role, " ", cells[t.name]) for t in outside],
            class_="outside",
            aria_label="Outside the layers",
        )
        if outside
        else None,
    ]
    sides = [element("div", joined(parts)), element("div", _types(tensors))]
    shown = element("div", *sides, class_="map-and-types")
    return element("div", *switch, shown, _details(tensors), class_="map")


def _switch(losses: Sequence[float], key: int) -> list[Markup]:
    """Return two radio buttons; the style sheet looks at them, no script is needed."""
    low, high = number(min(losses)), number(max(losses))
    about = f"Dark is many bits, or a large loss: {low} to {high}, on a logarithmic scale."
    buttons = [element("p", about, class_="muted")]
    for what, checked in (("bits", "checked"), ("loss", None)):
        kind, name = f"by-{what}", f"by-{what}-{key}"
        group = f"colour-{key}"
        buttons += [
            element("input", type="radio", name=group, id=name, class_=kind, checked=checked),
            element("label", f"Colour by {what}", for_=name),
        ]
    return buttons


def _bits_tone(bits: float) -> str:
    return tone(math.log(bits / _LEAST_BITS) / math.log(_MOST_BITS / _LEAST_BITS))


def _loss_tone(loss: float | None, losses: Sequence[float]) -> str:
    if loss is None or loss <= 0:
        return RAMP[0]
    low, high = math.log(min(losses)), math.log(max(losses))
    return tone((math.log(loss) - low) / (high - low) if high > low else 0.5)


def _cell(tensor: SavedTensor, losses: Sequence[float]) -> Markup:
    bits, loss = _bits_tone(max(tensor.bits, 0.1)), _loss_tone(tensor.loss, losses)
    style = f"--bits:{bits};--bits-ink:{ink(bits)};--loss:{loss};--loss-ink:{ink(loss)}"
    return element(
        "span",
        tensor.qtype,
        class_="cell",
        tabindex=0,
        role="img",
        aria_label=_told(tensor),
        style=style,
    )


def _told(tensor: SavedTensor) -> str:
    """Return what a cell says when a pointer or the keyboard is on it."""
    shape = " × ".join(map(str, tensor.shape))
    parts = [
        f"{tensor.name}: {tensor.qtype}, {tensor.bits:.2f} bits a weight",
        f"{shape}, {tensor.size_bytes:,} bytes",
    ]
    if tensor.reason:
        parts.append(f"why: {tensor.reason}")
    if tensor.loss is not None:
        parts.append(f"loss {_loss(tensor)}")
    return "; ".join([*parts, *([tensor.note] if tensor.note else [])]) + "."


def _loss(tensor: SavedTensor) -> str:
    if tensor.loss is None:
        return "–"
    text = number(tensor.loss)
    if tensor.loss_rtn:
        text += f" (×{tensor.loss / tensor.loss_rtn:.2f} of round-to-nearest's)"
    return text


def _grid(tensors: Sequence[SavedTensor], cells: dict[str, Markup]) -> Markup | None:
    if not tensors:
        return None
    order = {role: i for i, role in enumerate(_ROLES)}
    roles = sorted({t.role for t in tensors}, key=lambda role: (order.get(role, 99), role))
    layers = sorted({t.layer for t in tensors if t.layer is not None})
    at = {(t.layer, t.role): cells[t.name] for t in tensors}
    head = [element("th", "layer", scope="col")]
    head += [element("th", element("span", role), scope="col") for role in roles]
    rows = [
        element(
            "tr",
            element("th", layer, scope="row"),
            *[element("td", at.get((layer, role), "")) for role in roles],
        )
        for layer in layers
    ]
    caption = element("caption", f"Types of {len(tensors)} matrices, layer × role")
    body = [element("thead", element("tr", *head)), element("tbody", *rows)]
    return element("div", element("table", caption, *body, class_="grid-map"), class_="scroll")


def _types(tensors: Sequence[SavedTensor]) -> Markup:
    by_type: dict[str, list[SavedTensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.qtype, []).append(tensor)
    rows = []
    for name, of_type in sorted(by_type.items(), key=lambda item: item[1][0].bits):
        colour = _bits_tone(max(of_type[0].bits, 0.1))
        swatch = element("span", class_="swatch", style=f"--bits:{colour}", aria_hidden="true")
        size = sum(tensor.size_bytes for tensor in of_type)
        bits = f"{of_type[0].bits:.2f}"
        shown = element("span", swatch, " ", name)
        rows.append([shown, bits, str(len(of_type)), f"{size:,}"])
    return table("Types", ["type", "bits a weight", "tensors", "bytes"], rows)


def _details(tensors: Sequence[SavedTensor]) -> Markup:
    rows = [
        [
            tensor.name,
            tensor.qtype,
            " × ".join(map(str, tensor.shape)),
            f"{tensor.size_bytes:,}",
            _loss(tensor),
            "; ".join(part for part in (tensor.reason, tensor.note) if part),
        ]
        for tensor in tensors
    ]
    header = ["tensor", "type", "shape", "bytes", "loss", "why"]
    summary = element("summary", f"Every tensor and why ({len(tensors)})")
    return element(
        "details", summary, table("Every tensor, its type and why", header, rows), class_="wide"
    )
