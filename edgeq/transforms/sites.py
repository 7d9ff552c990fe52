"""Where a diagonal scale may move inside one GGUF file: the families' folds, layer by layer.

One convention everywhere: a scale s multiplies the columns of the consumers that read a channel
and divides the rows of the source that make it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from converters.architectures import Architecture, known_architectures
from converters.architectures.description import Fold
from converters.gguf_file import GgufFile

FloatArray = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]

_LAYER = re.compile(r"blk\.(\d+)\.")
_MADE_BY_CONVERTERS = ("rope_freqs", "rope_factors_long", "rope_factors_short")


@dataclass(frozen=True)
class FoldSite:
    """One fold of one layer.

    Attributes
    ----------
    kind : what is folded, see ``converters.architectures.description.Fold``
    layer : None for the head
    source : GGUF name of the tensor whose rows are divided; its bias, if there is one, likewise
    source_bias : None if the file has none
    consumers : GGUF names of the matrices whose columns are multiplied
    n_mat : matrices with scales of their own: the experts of an ``up`` fold, else 1
    n : scales in all, n_mat times those of one matrix
    first_row : row of the source that the first scale divides, in each matrix
    n_rows, n_columns : of one matrix of the source, and of each consumer
    head_dim, group : scale ``head * head_dim + i`` belongs to channel i of `group` heads of
        `head_dim` columns that lie one after the other; 1 group but for ``value``
    refused : why the fold would change the function; None if it is legal

    Notes
    -----
    Scales are always given as (n,) float32, the experts' one after the other.
    """

    kind: Literal["norm", "value", "up"]
    layer: int | None
    source: str
    source_bias: str | None
    consumers: tuple[str, ...]
    n_mat: int
    n: int
    first_row: int
    n_rows: int
    n_columns: int
    head_dim: int
    group: int = 1
    refused: str | None = None

    @property
    def name(self) -> str:
        """A short name for reports, such as ``blk.3.attn_v -> attn_output``."""
        stems = [name.removesuffix(".weight") for name in (self.source, *self.consumers)]
        return f"{stems[0]} -> {', '.join(_LAYER.sub('', stem) for stem in stems[1:])}"

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every tensor that the fold changes."""
        bias = () if self.source_bias is None else (self.source_bias,)
        return (self.source, *bias, *self.consumers)

    @property
    def scale_of_column(self) -> npt.NDArray[np.intp]:
        """Index of each column's scale among those of its matrix, (n_columns,)."""
        column = np.arange(self.n_columns)
        return column // (self.head_dim * self.group) * self.head_dim + column % self.head_dim

    def columns(self, scales: FloatArray) -> FloatArray:
        """Return what multiplies the consumers' columns, (n_mat, n_columns) float32."""
        return scales.reshape(self.n_mat, -1)[:, self.scale_of_column]

    def rows(self, scales: FloatArray) -> FloatArray:
        """Return what multiplies the source's rows, (n_mat, n_rows) float32: 1/s, 1 elsewhere."""
        rows = np.ones((self.n_mat, self.n_rows), np.float32)
        per_matrix = scales.reshape(self.n_mat, -1)
        rows[:, self.first_row : self.first_row + per_matrix.shape[1]] = 1 / per_matrix
        return rows


@dataclass(frozen=True)
class Heads:
    """The heads of one layer: query heads, key/value heads, channels of one value head."""

    n_head: int
    n_head_kv: int
    head_dim: int


def fold_sites(file: GgufFile) -> list[FoldSite]:
    """Return the folds of every layer of a model, in the order of the graph; the head last.

    A fold with a tensor that the file does not have is left out, so with the head of a model whose
    output is tied to its embedding. Refused folds are in the list, with the reason. An
    architecture without a description has none.

    Raises
    ------
    ConversionError
        The file is no model.
    """
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    # Classes may share one GGUF architecture (LLaMA and Mixtral): their tensors tell them apart.
    families = [a for a in known_architectures().values() if a.name == file.architecture]
    folds = list(dict.fromkeys(fold for family in families for fold in family.folds))
    layers = sorted({int(match[1]) for match in map(_LAYER.match, shapes) if match})
    known = {stem for family in families for stem in _stems(family)}
    sites: list[FoldSite | None] = []
    for layer in layers:
        unknown = _unknown(shapes, known, layer)
        heads = _heads(file, layer)
        inside = (fold for fold in folds if "{bid}" in fold.source)
        sites += [site_of(fold, layer, shapes, heads, unknown) for fold in inside]
    outside = (fold for fold in folds if "{bid}" not in fold.source)
    unknown = _unknown(shapes, known, None)
    sites += [site_of(fold, None, shapes, None, unknown) for fold in outside]
    return [site for site in sites if site is not None]


def site_of(
    fold: Fold, layer: int | None, shapes: Shapes, heads: Heads | None, unknown: str | None = None
) -> FoldSite | None:
    """Return one fold of one layer; None if a tensor of it is missing.

    Parameters
    ----------
    shapes : GGUF tensor name to shape in numpy order
    heads : needed for ``value`` folds
    unknown : a tensor of the layer that the description does not know: it might read the scaled
        channels, so the fold is refused
    """
    source, *consumers = (
        name.format(bid=layer) + ".weight" for name in (fold.source, *fold.consumers)
    )
    if any(name not in shapes for name in (source, *consumers)):
        return None
    bias = source.removesuffix("weight") + "bias"
    n_rows = shapes[source][-1] if fold.kind == "norm" else shapes[source][-2]
    n_mat = shapes[source][0] if len(shapes[source]) == 3 else 1
    n_columns = shapes[consumers[0]][-1]
    refused, group = fold.refused, 1
    n = head_dim = n_rows // 2 if fold.rows == "second half" else n_rows
    if fold.kind == "value":
        if heads is None or heads.n_head_kv == 0:
            return None
        n, head_dim = heads.n_head_kv * heads.head_dim, heads.head_dim
        group = heads.n_head // heads.n_head_kv
    if refused is None and unknown is not None:
        refused = f"{unknown} is not known to this architecture and may read these channels"
    # A described file is as converted; one that is not must not be folded wrongly.
    if refused is None and (n * group != n_columns or n > n_rows):
        refused = f"{n} scales in groups of {group} do not fit {n_rows} rows, {n_columns} columns"
    return FoldSite(
        kind=fold.kind,
        layer=layer,
        source=source,
        source_bias=bias if bias in shapes else None,
        consumers=tuple(consumers),
        n_mat=n_mat,
        n=n_mat * n,
        first_row=n_rows - n if fold.rows != "all" else 0,
        n_rows=n_rows,
        n_columns=n_columns,
        head_dim=head_dim,
        group=group,
        refused=refused,
    )


def _heads(file: GgufFile, layer: int) -> Heads:
    """Return a layer's heads as llama.cpp reads them (llama-model.cpp, load_hparams)."""

    def value(key: str, default: int) -> int:
        found = file.value(f"{file.architecture}.{key}", default)
        if isinstance(found, list):
            found = found[layer] if layer < len(found) else default
        return int(found)

    n_head = value("attention.head_count", 0)
    n_head_kv = value("attention.head_count_kv", n_head)
    per_head = value("embedding_length", 0) // max(n_head, 1)
    return Heads(n_head, n_head_kv, value("attention.value_length", per_head))


def _stems(family: Architecture) -> set[str]:
    """Return the GGUF names that a description mentions, without ``.weight`` and ``.bias``."""
    conditional = (name for names in family.required_if.values() for name in names)
    generated = (generated.name for generated in family.generated)
    stems = {re.sub(r"\.(weight|bias)\Z", "", name) for name in (*conditional, *generated)}
    for group in family.input_groups:
        stems |= {*group.consumers, *([] if group.source is None else [group.source])}
    for fold in family.folds:
        stems |= {fold.source, *fold.consumers}
    return stems | set(family.required) | set(_MADE_BY_CONVERTERS)


def _unknown(shapes: Shapes, known: set[str], layer: int | None) -> str | None:
    """Return the first tensor of a layer, or outside of layers, that no description mentions."""
    for name in shapes:
        match = _LAYER.match(name)
        if (int(match[1]) if match else None) != layer:
            continue
        stem = name.rsplit(".", 1)[0]
        if (stem if layer is None else _LAYER.sub("blk.{bid}.", stem)) not in known:
            return name
    return None
