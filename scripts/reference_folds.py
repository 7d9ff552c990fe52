"""Changes of weights that keep a model's function: what takes a reference off its source's grid.

Everything here is elementwise IEEE arithmetic on draws from ``PCG64`` that are rounded to a coarse
dyadic grid first, so a seed gives the same bytes on every machine (no BLAS, no ``exp`` or ``sin``
whose last bit depends on the CPU).

Tensors are keyed by GGUF names, float32, weights (n_out, n_in).
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from converters.architectures.description import DENSE_FOLDS
from edgeq.transforms.sites import Heads, site_of

Float32 = npt.NDArray[np.float32]
Tensors = dict[str, Float32]
Float64 = npt.NDArray[np.float64]

SCALE_LOW = 0.7  # channel scales are log-uniform in [SCALE_LOW, 2 * SCALE_LOW)
DRAW_STEPS = 4096  # draws are rounded to 1 / DRAW_STEPS
MIX_LOW, MIX_HIGH = 0.25, 0.65  # tan(angle / 2): planes turn by 28 to 66 degrees


class ReferenceModelError(Exception):
    """A reference that cannot be made, or that does not hold what it promises."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a decoder that the changes need.

    Attributes
    ----------
    has_post_norms : the sublayers' outputs are normed before they join the residual stream (Gemma)
    rms_eps : added to the mean square in every RMS norm
    """

    n_layers: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    rms_eps: float
    has_post_norms: bool = False


def draw(seed: int, label: str, n: int) -> Float64:
    """Return `n` numbers in [0, 1) that depend on `seed` and `label` alone, (n,) float64."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(label.encode())])
    return np.random.Generator(np.random.PCG64(sequence)).random(n)


def draw_scales(seed: int, label: str, n: int) -> Float64:
    """Return `n` channel scales, log-uniform in [0.7, 1.4), (n,) float64."""
    return np.rint(SCALE_LOW * np.exp2(draw(seed, label, n)) * DRAW_STEPS) / DRAW_STEPS


def fold_channels(tensors: Tensors, geometry: Geometry, seed: int, *, norms: bool = True) -> None:
    """Move seeded channel scales across every linear seam of each layer; `tensors` is *written*.

    norm → q/k/v and norm → gate/up (unless not `norms`), v → o (one scale a key/value head and
    dimension, shared by the query heads of its group), up → down. Every matrix but the embedding
    changes within its blocks.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    heads = Heads(geometry.n_head, geometry.n_head_kv, geometry.head_dim)
    layers = product(range(geometry.n_layers), DENSE_FOLDS[:-1])  # the last one is the head's
    sites = [site_of(fold, i, shapes, heads) for i, fold in layers if norms or fold.kind != "norm"]
    for site in (site for site in sites if site is not None):
        scale = draw_scales(seed, site.source, site.n)
        if site.kind == "norm":
            tensors[site.source] = (tensors[site.source] / scale).astype(np.float32)
        else:
            tensors[site.source] = (tensors[site.source] * scale[:, None]).astype(np.float32)
            scale = 1 / scale
        _scale_columns(tensors, site.consumers, scale[site.scale_of_column])


def permute_residual(tensors: Tensors, geometry: Geometry, seed: int) -> None:
    """Put the channels of the residual stream into a seeded order; `tensors` is *written*.

    RMS norms, also Gemma's after the sublayers, do not see the order of their channels. This is
    the one change that moves a tied embedding: weights of different source blocks, with different
    scales, come to lie in one block.
    """
    order = np.argsort(draw(seed, "residual", geometry.n_embd), kind="stable")
    columns, rows = _residual_readers(tensors, geometry), _residual_writers(geometry)
    per_head = ("attn_q_norm.weight", "attn_k_norm.weight")
    norms = [n for n in tensors if n.endswith("norm.weight") and not n.endswith(per_head)]
    for name in [*columns, *norms]:
        tensors[name] = np.ascontiguousarray(tensors[name][..., order])
    for name in rows:
        tensors[name] = np.ascontiguousarray(tensors[name][order])


def widen(tensors: Tensors, geometry: Geometry, n_embd: int, seed: int) -> Geometry:
    """Widen the residual stream to `n_embd` channels; `tensors` is *written*.

    Every norm is folded into its consumers, which unties the output. Each new channel, zero so
    far, is mixed with one old channel by a plane rotation, so an outlier stays an outlier. An
    RMS over more channels with the same sum of squares is smaller by √(old/new): every norm weight
    becomes that factor, and epsilon shrinks by its square, which is exact. Silent heads (all
    their weights are zero) fill the projections: whole groups, so old query heads keep their
    key/value head.

    Norms after the sublayers (Gemma) weigh each channel on its way into the residual stream, so
    nothing can be turned there: the new channels stay zero, see ``_pad_residual``.

    Returns
    -------
    The geometry of the widened model.

    Raises
    ------
    ReferenceModelError
        `n_embd` is not in (old, 2 * old], or silent heads would be no whole number of groups.
    """
    old = geometry.n_embd
    n_new, group = n_embd - old, geometry.n_head // geometry.n_head_kv
    step = group * geometry.head_dim
    if not 0 < n_new <= old or (n_embd % step and not geometry.has_post_norms):
        multiple = f"a multiple of {step} (a group of {group} heads)"
        raise ReferenceModelError(
            f"--widen: cannot widen {old} channels to {n_embd}; expected "
            f"{'more' if geometry.has_post_norms else multiple} up to {2 * old}. "
            "Choose another width."
        )
    if geometry.has_post_norms:
        return _pad_residual(tensors, geometry, n_embd)
    heads = n_embd // geometry.head_dim
    wide = replace(
        geometry,
        n_embd=n_embd,
        n_head=heads,
        n_head_kv=heads // group,
        rms_eps=geometry.rms_eps * old / n_embd,
    )
    tensors.setdefault("output.weight", tensors["token_embd.weight"])
    seams = {"output_norm.weight": ["output.weight"]}
    for i in range(geometry.n_layers):
        seams |= _norm_consumers(i)
    for norm, consumers in seams.items():
        _scale_columns(tensors, consumers, tensors[norm].astype(np.float64))
        tensors[norm] = np.full(n_embd, np.sqrt(old / n_embd), np.float32)
    partners = np.argsort(draw(seed, "partners", old), kind="stable")[:n_new]
    t = MIX_LOW + (MIX_HIGH - MIX_LOW) * draw(seed, "planes", n_new)
    t = np.rint(t * DRAW_STEPS) / DRAW_STEPS
    for name in _residual_readers(tensors, geometry):
        tensors[name] = _turn(tensors[name], partners, t)
    for name in _residual_writers(geometry):
        tensors[name] = np.ascontiguousarray(_turn(tensors[name].T, partners, t).T)
    for i in range(geometry.n_layers):
        _add_silent_heads(tensors, f"blk.{i}.", wide)
    return wide


def _pad_residual(tensors: Tensors, geometry: Geometry, n_embd: int) -> Geometry:
    """Give the residual stream channels that are always zero; `tensors` is *written*.

    Norm weights and epsilon shrink as in ``widen``. The embedding, which the model multiplies by
    the root of its width, shrinks too, and the last norm, whose output meets the same embedding,
    makes up for it. Epsilon is that of the heads' norms as well, where it should not change: that
    is the only thing that is not exact.
    """
    old = geometry.n_embd
    shrink = np.sqrt(old / n_embd)
    for name in [n for n in tensors if tensors[n].shape == (old,)]:
        factor = 1 if name == "output_norm.weight" else shrink
        new = np.full(n_embd - old, factor, np.float32)
        tensors[name] = np.concatenate([(tensors[name] * factor).astype(np.float32), new])
    for name in _residual_readers(tensors, geometry):
        tensors[name] = np.pad(tensors[name], ((0, 0), (0, n_embd - old)))
    for name in _residual_writers(geometry):
        tensors[name] = np.pad(tensors[name], ((0, n_embd - old), (0, 0)))
    _scale_columns(tensors, ["token_embd.weight"], np.full(n_embd, shrink))
    return replace(geometry, n_embd=n_embd, rms_eps=geometry.rms_eps * old / n_embd)


def _turn(columns: Float32, partners: npt.NDArray[np.intp], t: Float64) -> Float32:
    """Append zero columns and turn each with its partner by the angle 2 * arctan(t).

    The rational form of sine and cosine needs no library function, see the module's docstring.
    """
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    turned = columns.copy()
    turned[:, partners] = (columns[:, partners] * cos).astype(np.float32)
    return np.hstack([turned, (columns[:, partners] * sin).astype(np.float32)])


def _add_silent_heads(tensors: Tensors, blk: str, wide: Geometry) -> None:
    for name, n_heads in (
        ("attn_q", wide.n_head),
        ("attn_k", wide.n_head_kv),
        ("attn_v", wide.n_head_kv),
    ):
        weight = tensors[f"{blk}{name}.weight"]
        n_rows = n_heads * wide.head_dim - len(weight)
        tensors[f"{blk}{name}.weight"] = np.pad(weight, ((0, n_rows), (0, 0)))
    weight = tensors[blk + "attn_output.weight"]
    n_columns = wide.n_head * wide.head_dim - weight.shape[1]
    tensors[blk + "attn_output.weight"] = np.pad(weight, ((0, 0), (0, n_columns)))


def _scale_columns(tensors: Tensors, names: Iterable[str], scale: Float64) -> None:
    for name in names:
        tensors[name] = (tensors[name] * scale).astype(np.float32)


def _norm_consumers(layer: int) -> dict[str, list[str]]:
    blk = f"blk.{layer}."
    return {
        blk + "attn_norm.weight": [f"{blk}attn_{x}.weight" for x in "qkv"],
        blk + "ffn_norm.weight": [blk + "ffn_gate.weight", blk + "ffn_up.weight"],
    }


def _residual_readers(tensors: Tensors, geometry: Geometry) -> list[str]:
    names = ["token_embd.weight", *(n for n in ("output.weight",) if n in tensors)]
    for i in range(geometry.n_layers):
        for consumers in _norm_consumers(i).values():
            names += consumers
    return names


def _residual_writers(geometry: Geometry) -> list[str]:
    return [
        f"blk.{i}.{n}.weight" for i in range(geometry.n_layers) for n in ("attn_output", "ffn_down")
    ]
