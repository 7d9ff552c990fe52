"""Scales between queries and keys: the same function, and keys that a quantized cache rounds less.

llama.cpp rounds cached keys in blocks of 32, after it has turned every head by Hadamard matrices
as wide as a power of two divides it; heads that 64 does not divide stay as they are. So one piece
of a head, a turned one or a block, has one error in all of its channels, which grows with the
piece's length. What it costs is an error of q · k. If channel i of the keys is divided by s and
that of the queries multiplied by it, then with mean squares K and Q of the channels the mean
squared error of a piece goes with Σ K/s² · Σ Q s². Its minimum over s is (Σ √(K Q))², where
s⁴ = K / Q. Channels that rotate together need one scale; their mean squares become equal, over
positions, and their sum does not depend on the position.

Source: Lin et al., QServe, arXiv:2405.04532, section 4.2 (SmoothAttention), for scales that move
from keys to queries and are shared by the channels that rotate together. Theirs, a power of the
keys' largest values, are for a cache that does not turn them, and leave the queries out. What the
cache does: llama.cpp, src/llama-kv-cache.cpp, build_input_k_rot.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from converters.gguf_file import GgufFile
from converters.gguf_header import FLOATS
from edgeq.errors import CalibrationError, RecipeError
from edgeq.runtime.model import Model, Tokens
from edgeq.runtime.observer import Observer, ProductInput
from edgeq.transforms.proof import source_of, write_proven
from edgeq.transforms.sites import FloatArray

Float64 = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

_BLOCK = 32  # channels that one scale of Q8_0, Q4_0 serves
_TURNED = 64  # heads that this divides are turned
_EMBEDDING = "token_embd.weight"
_TINY = np.float32(1e-30)
_ROUNDS = 50  # of the fixed point; one is enough where a head is one piece with its own scales
_MOST = np.log(16.0)  # a scale from the head's mean, either way: more, and a row that is quantized
# later would have scales below float16's normal numbers


@dataclass(frozen=True)
class Side:
    """The queries or the keys of one layer.

    Attributes
    ----------
    weight : the matrix that makes them
    first_row : of theirs in it
    n_head : their heads
    norm : the weights of the norm that follows, if any
    """

    weight: str
    first_row: int
    n_head: int
    norm: str | None


@dataclass(frozen=True, eq=False)
class KeySite:
    """One layer whose keys may be scaled.

    Attributes
    ----------
    queries, keys : what makes them; every head of the keys serves as many of the queries'
    head_dim : channels of a head
    pair : (head_dim,) channels of one number rotate together, numbers from 0
    is_shared : a norm with one set of weights for all heads follows: they have the same scales
    """

    queries: Side
    keys: Side
    head_dim: int
    pair: Indices
    is_shared: bool

    @property
    def width(self) -> int:
        """Channels of a piece that has one error in the cache."""
        turned = self.head_dim & -self.head_dim
        return turned if turned >= _TURNED else int(np.gcd(self.head_dim, _BLOCK))


@dataclass(frozen=True)
class KeyScales:
    """What was found for one layer.

    Attributes
    ----------
    scales : (n_head of the keys, head_dim) float32, what divides the keys
    error : predicted mean squared error of q · k in a quantized cache, over that without scales
    """

    scales: FloatArray
    error: float


def write_key_folded(
    file: GgufFile, path: Path, rows: Tokens, *, n_threads: int | None = None
) -> list[float]:
    """Write a model whose keys a quantized cache rounds with less harm; what is scaled is F32.

    Parameters
    ----------
    rows : (n_chunks, n_tokens) int32, the text that shows how large queries and keys are

    Returns
    -------
    ``KeyScales.error`` of every layer with keys.

    Raises
    ------
    RecipeError
        The model does not allow it, or the function changed; what was at `path` stays then.
    CalibrationError
        Queries or keys were not seen, or are not finite.
    ConversionError
        The file cannot be written.
    """
    for name, tensor in file.tensors.items():
        if tensor.qtype not in FLOATS:
            # products with quantized weights round their inputs: no two spellings agree to 1e-4
            _refuse(file, f"{name} is quantized as {tensor.qtype.name}; scale the float model")
    with Model(file.paths[0], vocab_only=True) as model:
        rope = model.rope
    sites = key_sites(file, rope)
    means = _mean_squares(file, sites, rows, n_threads)
    found = [search_key_scales(site, *means[number]) for number, site in enumerate(sites)]
    changes: dict[str, list[_Rows]] = {}
    for site, one in zip(sites, found, strict=True):
        for name, change in _changes(file, site, one.scales):
            changes.setdefault(name, []).append(change)

    def changed(name: str) -> Callable[[], FloatArray] | None:
        return partial(_scaled, file, name, changes[name]) if name in changes else None

    sources = [source_of(file, name, changed(name)) for name in file.tensors]
    write_proven(file, path, sources, "with scaled keys")
    return [one.error for one in found]


def key_sites(file: GgufFile, rope: str | None) -> list[KeySite]:
    """Return the layers whose keys may be scaled, in order.

    Parameters
    ----------
    rope : ``Model.rope``, which channels rotate together

    Raises
    ------
    RecipeError
        The function would change.
    """
    if rope is None:
        _refuse(file, "it rotates queries and keys in a way that is not known here")
    if file.value(f"{file.architecture}.attention.clamp_kqv", 0.0) > 0:
        _refuse(file, "it clamps queries and keys, and a scale does not pass through that")
    layers = range(int(file.value(f"{file.architecture}.block_count", 0)))
    sites = [site for layer in layers if (site := _site(file, layer, rope)) is not None]
    if not sites:
        _refuse(file, "no layer has attn_q and attn_k, or attn_qkv")
    return sites


def search_key_scales(site: KeySite, queries: Float64, keys: Float64) -> KeyScales:
    """Return the scales with the least predicted error of q · k.

    Parameters
    ----------
    queries, keys : (n_head, head_dim) mean squares of each channel, each side's own heads

    Notes
    -----
    Pieces that share scales (the blocks of a head that is not turned, the heads behind one norm)
    couple: with A = Σ K/s² and B = Σ Q s² of a piece the minimum of Σ A B has
    s⁴ = Σ B K / Σ A Q, sums over the pieces with the channel. Iterated from s = 1.
    """
    n_head = site.keys.n_head
    k, q = keys, queries.reshape(n_head, -1, site.head_dim).sum(axis=1)
    k, q = (_over_pairs(site, side, mean=True) for side in (k, q))
    logs = np.zeros((n_head, site.head_dim))
    before = _pieces(site, k) * _pieces(site, q)
    for _ in range(_ROUNDS):
        a = np.repeat(_pieces(site, k * np.exp(-2 * logs)), site.width, axis=1)
        b = np.repeat(_pieces(site, q * np.exp(2 * logs)), site.width, axis=1)
        up, down = (_over_pairs(site, side) for side in (b * k, a * q))
        if site.is_shared:
            up, down = (np.broadcast_to(side.sum(axis=0), logs.shape) for side in (up, down))
        seen = (up > 0) & (down > 0)
        fourth = np.log(up, where=seen, out=np.zeros_like(logs))
        fourth -= np.log(down, where=seen, out=np.zeros_like(logs))
        n_seen = np.maximum(seen.sum(axis=1, keepdims=True), 1)
        mean = fourth.sum(axis=1, keepdims=True) / n_seen  # the same in all channels: no matter
        step = np.where(seen, fourth - mean, 0.0) / 4
        logs = (logs + np.clip(step, -_MOST, _MOST)) / 2
    after = _pieces(site, k * np.exp(-2 * logs)) * _pieces(site, q * np.exp(2 * logs))
    error = float(after.sum() / before.sum()) if before.sum() > 0 else 1.0
    return KeyScales(np.exp(logs).astype(np.float32), error)


def _pieces(site: KeySite, values: Float64) -> Float64:
    """Return sums over each piece, (n_head, head_dim) to (n_head, n_pieces)."""
    sums: Float64 = values.reshape(len(values), -1, site.width).sum(axis=2)
    return sums


def _over_pairs(site: KeySite, values: Float64, *, mean: bool = False) -> Float64:
    """Return, for each channel, the sum or the mean over those that rotate with it."""
    sums = np.zeros((site.pair.max() + 1, len(values)))
    np.add.at(sums, site.pair, values.T)
    if mean:
        sums /= np.bincount(site.pair)[:, None]
    return sums[site.pair].T


def _site(file: GgufFile, layer: int, rope: str) -> KeySite | None:
    """Return one layer's site; None if it keeps no keys."""
    prefix = f"blk.{layer}.attn_"
    n_head = _number(file, "attention.head_count", layer, 0)
    n_head_kv = _number(file, "attention.head_count_kv", layer, n_head)
    is_fused = f"{prefix}qkv.weight" in file.tensors
    query, key = (f"{prefix}{name}.weight" for name in (("qkv", "qkv") if is_fused else ("q", "k")))
    if key not in file.tensors:
        if query in file.tensors:
            _refuse(file, f"{query} asks for keys of another layer")
        return None
    n_rows = file.tensors[key].shape[0]
    if query not in file.tensors or min(n_head, n_head_kv) == 0 or n_head % n_head_kv:
        _refuse(file, f"{n_head} heads of queries and {n_head_kv} of keys do not belong together")
    default = file.tensors[_EMBEDDING].shape[-1] // n_head
    head_dim = _number(file, "attention.key_length", layer, default)
    first = n_head * head_dim if is_fused else 0
    fits = n_rows > first + n_head_kv * head_dim if is_fused else n_rows == n_head_kv * head_dim
    if not fits or (not is_fused and file.tensors[query].shape[0] != n_head * head_dim):
        _refuse(file, f"{key} has {n_rows} rows, which are not {n_head_kv} heads of {head_dim}")
    norms = [f"{prefix}{name}_norm.weight" for name in "qk"]
    queries = Side(query, 0, n_head, norms[0] if norms[0] in file.tensors else None)
    keys = Side(key, first, n_head_kv, norms[1] if norms[1] in file.tensors else None)
    sizes = [
        (side.norm, int(np.prod(file.tensors[side.norm].shape)), side.n_head)
        for side in (queries, keys)
        if side.norm is not None
    ]
    for name, size, heads in sizes:
        if size not in (head_dim, heads * head_dim):
            _refuse(file, f"{name} has {size} weights for {heads} heads of {head_dim}")
    return KeySite(
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        pair=pairs(head_dim, _number(file, "rope.dimension_count", layer, head_dim), rope),
        is_shared=any(size == head_dim for _, size, _ in sizes),
    )


def pairs(head_dim: int, n_rotated: int, rope: str) -> Indices:
    """Return a number for each channel of a head, the same for those that rotate together.

    Parameters
    ----------
    n_rotated : the first channels, which are rotated; the others are free
    rope : ``adjacent``: channel 2i with 2i + 1; ``halves``: i with i + n_rotated/2; ``none``
    """
    channel = np.arange(head_dim)
    first = channel // 2 * 2 if rope == "adjacent" else channel % max(n_rotated // 2, 1)
    is_rotated = (channel < n_rotated) & (rope != "none")
    numbers: Indices = np.unique(np.where(is_rotated, first, channel), return_inverse=True)[1]
    return numbers


def _number(file: GgufFile, key: str, layer: int, default: int) -> int:
    """Return a setting of the architecture, of one layer where layers differ."""
    found = file.value(f"{file.architecture}.{key}", default)
    return int(found[layer]) if isinstance(found, list) else int(found)


def _refuse(file: GgufFile, reason: str) -> NoReturn:
    raise RecipeError(
        f"{file.path}: the keys of {file.architecture} cannot be scaled: {reason}. Use the model "
        "as it is."
    )


def _mean_squares(
    file: GgufFile, sites: Sequence[KeySite], rows: Tokens, n_threads: int | None
) -> list[tuple[Float64, Float64]]:
    """Return the mean squares of each site's queries and keys, (n_head, head_dim) each."""
    wanted = {
        side.weight: [s for s in sites if side.weight in (s.queries.weight, s.keys.weight)]
        for site in sites
        for side in (site.queries, site.keys)
    }
    sums: dict[Side, Float64] = {}

    def add(product: ProductInput) -> None:
        for site in wanted.get(product.name, ()):
            for side in (site.queries, site.keys):
                if side.weight == product.name:
                    made = _made(
                        file, side, site.head_dim, product.values.reshape(-1, product.n_in)
                    )
                    sums[side] = sums.get(side, 0.0) + np.square(made, dtype=np.float64).sum(axis=0)

    observer = Observer(add)
    n_ctx = rows.shape[1]
    with Model(file.paths[0], n_ctx=n_ctx, n_threads=n_threads, cb_eval=observer) as model:
        for row in rows:
            model.logits(row)
            observer.stop_after = next(reversed(sums)).weight if sums else None
    for site in sites:
        for side in (site.queries, site.keys):
            if side not in sums or not np.isfinite(sums[side]).all():
                raise CalibrationError(
                    f"{side.weight}: what it makes of this text was not seen or is not finite. "
                    "Give chunks of at least 16 tokens, or another text."
                )
    return [(sums[site.queries] / rows.size, sums[site.keys] / rows.size) for site in sites]


def _made(file: GgufFile, side: Side, head_dim: int, inputs: FloatArray) -> FloatArray:
    """Return queries or keys before they are rotated, (n_tokens, n_head, head_dim)."""
    rows = slice(side.first_row, side.first_row + side.n_head * head_dim)
    made = inputs @ file.read_float(side.weight)[rows].T
    if (bias := _bias(file, side.weight)) is not None:
        made = made + file.read_float(bias)[rows]
    made = made.reshape(len(inputs), side.n_head, head_dim)
    if side.norm is None:
        return made
    weights = file.read_float(side.norm)
    is_whole = weights.ndim == 1 and weights.size != head_dim  # over all heads together
    axes = (1, 2) if is_whole else (2,)
    if file.value(f"{file.architecture}.attention.layer_norm_rms_epsilon") is None:
        made = made - made.mean(axis=axes, keepdims=True)
    squares = np.square(made).mean(axis=axes, keepdims=True)
    normed: FloatArray = made / np.sqrt(np.maximum(squares, _TINY)) * weights.reshape(-1, head_dim)
    if (bias := _bias(file, side.norm)) is not None:
        normed = normed + file.read_float(bias).reshape(-1, head_dim)
    return normed


def _bias(file: GgufFile, weight: str) -> str | None:
    """Return the name of a weight's bias, if there is one."""
    bias = weight.removesuffix("weight") + "bias"
    return bias if bias in file.tensors else None


@dataclass(frozen=True, eq=False)
class _Rows:
    """Factors of consecutive rows of `width` numbers of one tensor, from row `first` on."""

    first: int
    width: int
    factors: FloatArray


def _changes(file: GgufFile, site: KeySite, scales: FloatArray) -> Iterator[tuple[str, _Rows]]:
    """Yield what becomes of each tensor that makes the layer's queries and keys."""
    group = site.queries.n_head // site.keys.n_head
    multiplied, divided = np.repeat(scales, group, axis=0), 1 / scales
    for side, heads in ((site.queries, multiplied), (site.keys, divided)):
        factors = heads.astype(np.float32).ravel()
        if side.norm is None:
            yield side.weight, _Rows(side.first_row, file.tensors[side.weight].shape[-1], factors)
            first, bias = side.first_row, _bias(file, side.weight)
        else:
            factors = factors[: int(np.prod(file.tensors[side.norm].shape))]  # of all, or of each
            yield side.norm, _Rows(0, 1, factors)
            first, bias = 0, _bias(file, side.norm)
        if bias is not None:
            yield bias, _Rows(first, 1, factors)


def _scaled(file: GgufFile, name: str, changes: Sequence[_Rows]) -> FloatArray:
    """Return a tensor with its rows scaled, a new float32 array."""
    scaled = file.read_float(name).copy()
    for change in changes:
        rows = scaled.reshape(-1, change.width)
        rows[change.first : change.first + len(change.factors)] *= change.factors[:, None]
    return scaled
