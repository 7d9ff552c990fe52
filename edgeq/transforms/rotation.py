"""Rotations that keep a model's function: of the residual stream, and of each head's values.

A rotated basis spreads what a few channels carry over all of them. The rotation of the residual
stream (R1) goes into every matrix that reads or writes it; the norms' weights go into the readers
first, because only a norm without weights commutes with a rotation. A tied output matrix gets the
output norm's weights, so that it is no longer the embedding: the file grows by it. The rotation of
values (R2) goes into the value matrix and the output matrix of the attention.

Source: Ashkboos et al., QuaRot, arXiv:2404.00456, sections 4.1 and 4.2; Liu et al., SpinQuant,
arXiv:2405.16406, section 3.1, figure 1, for the names R1 and R2.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.linalg
from gguf.constants import GGMLQuantizationType

from converters.gguf_file import GgufFile, TensorSource
from edgeq.errors import RecipeError
from edgeq.registry import unknown_name
from edgeq.transforms.cayley import Rotation, Turned, learn_rotation
from edgeq.transforms.proof import source_of, write_proven
from edgeq.transforms.sites import FloatArray, FoldSite, fold_sites

KINDS = ("residual", "values")
_WRITERS = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp")
_EMBEDDING, _OUTPUT, _OUTPUT_NORM = "token_embd.weight", "output.weight", "output_norm.weight"


def write_rotated(
    file: GgufFile, path: Path, kinds: Sequence[str], *, seed: int = 0, learn_steps: int = 0
) -> float:
    """Write a model in a rotated basis, as F32, if llama.cpp computes the same function from it.

    Parameters
    ----------
    file : a float model
    kinds : of ``KINDS``
    seed : of the rotations
    learn_steps : of the descent from random rotations to better ones, see ``cayley``

    Returns
    -------
    The squared rounding error that learning predicts, relative to that of the random rotations;
    the geometric mean over rotations.

    Raises
    ------
    RecipeError
        The architecture does not allow it, or the function changed; what was at `path` stays then.
    ConversionError
        The file cannot be written.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise RecipeError(f"--kind: {unknown_name('rotation', kind, list(KINDS))}")
    rotated = _Rotated(file, kinds, seed)
    ratio = rotated.learn(learn_steps) if learn_steps else 1.0
    write_proven(file, path, rotated.sources(), "rotated", seed=seed)
    return ratio


def random_rotation(n: int, rng: np.random.Generator) -> Rotation:
    """Return a random orthogonal matrix, (n, n): Hadamard with random signs as far as 2 divides n.

    The odd part of n is a uniformly distributed orthogonal matrix.
    """
    power = n & -n
    hadamard = scipy.linalg.hadamard(power) / np.sqrt(power)
    odd, upper = np.linalg.qr(rng.standard_normal((n // power, n // power)))
    odd *= np.sign(np.diagonal(upper))
    rotation: Rotation = rng.choice([-1.0, 1.0], n)[:, None] * np.kron(odd, hadamard)
    return rotation


class _Rotated:
    """One model, and what becomes of each of its tensors."""

    def __init__(self, file: GgufFile, kinds: Sequence[str], seed: int) -> None:
        self.file = file
        sites = fold_sites(file)
        self.norm_of: dict[str, str] = {}  # of every matrix that reads the residual stream
        self.norms: set[str] = set()
        self.values: list[FoldSite] = []
        self.rotations: dict[str, Rotation] = {}
        rng = np.random.default_rng(seed)
        self.residual: Rotation | None = None
        if "residual" in kinds:
            self.norm_of = self._readers(sites)
            self.norms = {_OUTPUT_NORM, *self.norm_of.values()}
            self.residual = random_rotation(file.tensors[_EMBEDDING].shape[-1], rng)
        if "values" in kinds:
            self.values = [site for site in sites if site.kind == "value"]
            self._check_values()
            for site in self.values:
                self.rotations[site.name] = random_rotation(site.head_dim, rng)

    def learn(self, n_steps: int) -> float:
        """Make the rotations better; return the geometric mean of the errors' ratios."""
        ratios = []
        if self.residual is not None:
            tied = () if _OUTPUT in self.norm_of else ((_EMBEDDING, _OUTPUT_NORM),)
            turned = [
                Turned(partial(self._matrices, name, norm), by_rows=False)
                for name, norm in ((_EMBEDDING, None), *self.norm_of.items(), *tied)
            ]
            turned += [
                Turned(partial(self._matrices, name), by_rows=True)
                for name in self._writers()
                if len(self.file.tensors[name].shape) > 1
            ]
            self.residual, ratio = learn_rotation(self.residual, turned, n_steps)
            ratios.append(ratio)
        for site in self.values:
            turned = [
                Turned(partial(self._heads, name, site), by_rows=name not in site.consumers)
                for name in (site.source, *site.consumers)
            ]
            found, ratio = learn_rotation(self.rotations[site.name], turned, n_steps)
            self.rotations[site.name] = found
            ratios.append(ratio)
        return float(np.exp(np.mean(np.log(ratios))))

    def _matrices(self, name: str, norm: str | None = None) -> FloatArray:
        """Return a tensor before its rotation, (n_mat, n_rows, n_columns) float32."""
        values = self.file.read_float(name)
        if norm is not None:
            values = values * self.file.read_float(norm)
        return values.reshape(-1, *values.shape[-2:])

    def _heads(self, name: str, site: FoldSite) -> FloatArray:
        """Return what a rotation of values turns, (1, n, head_dim) or (n_heads, head_dim, n)."""
        values = self.file.read_float(name)
        if name in site.consumers:
            return values.reshape(1, -1, site.head_dim)
        rows = values[site.first_row : site.first_row + site.n]
        return rows.reshape(-1, site.head_dim, rows.shape[-1])

    def sources(self) -> list[TensorSource]:
        """Return the tensors to write: what is rotated as F32."""
        changed = {name for site in self.values for name in site.tensors}
        if self.residual is not None:
            changed |= {_EMBEDDING, *self.norm_of, *self.norms, *self._writers()}
        found = [
            source_of(self.file, name, partial(self._rotated, name) if name in changed else None)
            for name in self.file.tensors
        ]
        if self.residual is not None and _OUTPUT not in self.file.tensors:
            shape = self.file.tensors[_EMBEDDING].shape
            tied = partial(self._read_by, self.residual, _EMBEDDING, _OUTPUT_NORM)
            found.append(TensorSource(_OUTPUT, GGMLQuantizationType.F32, shape, tied))
        return found

    def _rotated(self, name: str) -> FloatArray:
        """Return a tensor in the new basis, float32."""
        if name in self.norms:
            return np.ones(self.file.tensors[name].shape, np.float32)
        if self.residual is not None and name in self.norm_of:
            values = self._read_by(self.residual, name, self.norm_of[name]).astype(np.float64)
        else:
            values = self.file.read_float(name).astype(np.float64)
            if self.residual is not None and name == _EMBEDDING:
                values = values @ self.residual
            elif self.residual is not None and name in self._writers():
                turned = values[:, None] if values.ndim == 1 else values  # a bias
                values = (self.residual.T @ turned).reshape(values.shape)
        for site in self.values:
            if name in site.tensors:
                values = _turn_values(values, name, site, self.rotations[site.name])
        return values.astype(np.float32)

    def _read_by(self, residual: Rotation, name: str, norm: str) -> FloatArray:
        """Return a matrix that reads the rotated stream through a norm without weights."""
        weights = self.file.read_float(norm).astype(np.float64)
        read = self.file.read_float(name).astype(np.float64)
        return ((read * weights) @ residual).astype(np.float32)

    def _writers(self) -> Iterator[str]:
        """Yield the matrices that write the residual stream, and their biases."""
        for name in self.file.tensors:
            if name.startswith("blk.") and name.split(".")[2] in _WRITERS:
                yield name

    def _readers(self, sites: Sequence[FoldSite]) -> dict[str, str]:
        """Return the norm that stands before every matrix that reads the residual stream."""
        tensors = self.file.tensors
        norms = {name.rpartition(".")[0].rpartition(".")[2] for name in tensors}
        after = sorted(stem for stem in norms if stem.startswith("post_"))
        if after:
            self._refuse(f"{after[0]} normalizes with weights what goes into the residual stream")
        if any(name.endswith("norm.bias") for name in tensors):
            self._refuse("its norms subtract the mean")
        found = {
            consumer: site.source
            for site in sites
            if site.kind == "norm" and site.refused is None
            for consumer in site.consumers
        }
        if _OUTPUT in tensors:
            found[_OUTPUT] = _OUTPUT_NORM
        writers = set(self._writers())
        for name, info in tensors.items():
            is_inside = name.startswith("blk.") and len(info.shape) > 1
            if is_inside and name not in found and name not in writers:
                self._refuse(f"{name} is not known to read or write the residual stream")
        if _OUTPUT_NORM not in tensors or not found:
            self._refuse("it has no norms with weights before what reads the residual stream")
        return found

    def _check_values(self) -> None:
        if not self.values:
            self._refuse("no values of its heads are known")
        for site in self.values:
            if site.refused is not None:
                self._refuse(site.refused)

    def _refuse(self, reason: str) -> None:
        raise RecipeError(
            f"{self.file.path}: {self.file.architecture} cannot be rotated: {reason}. Choose "
            "another --kind, or use the model as it is."
        )


def _turn_values(
    values: npt.NDArray[np.float64], name: str, site: FoldSite, rotation: Rotation
) -> npt.NDArray[np.float64]:
    """Rotate the channels of every head: rows of what makes them, columns of what reads them."""
    if name in site.consumers:
        heads = values.reshape(*values.shape[:-1], -1, site.head_dim)
        return (heads @ rotation).reshape(values.shape)
    out = values.copy()
    rows = slice(site.first_row, site.first_row + site.n)
    heads = values[rows].reshape(-1, site.head_dim, *values.shape[1:])
    out[rows] = np.einsum("hi...,ij->hj...", heads, rotation).reshape(values[rows].shape)
    return out
