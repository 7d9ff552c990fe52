"""Tensors of a file beside those of its source: identical, consistent, or different."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from converters.gguf_file import GgufFile
from edgeq.console import Progress
from edgeq.differing.screen import TensorScreen, judge, measure_tensor
from edgeq.layer_rounding import Importances
from edgeq.quantization import quantize_tensor
from edgeq.quantizers import make_quantizer
from edgeq.runtime.encoders import FloatArray
from edgeq.transforms import FoldSite, TensorScales, apply, fold_sites, tensor_scales
from edgeq.verification.claims import CONSISTENT, DIFFERS, IDENTICAL, UNKNOWN, Claim, Verdict

_MOST_TYPICAL = 4.0  # error over rounding's, median over tensors; as the screen's _ANOTHER_MODEL
_AS_NEAR = 1.1  # times the median: a tensor whose errors in all are those of the others
_AS_NEAR_FED = 1.5  # where rows make up for each other's errors: up to 1.29 seen


@dataclass(frozen=True, eq=False)
class Looker:
    """Looks at tensors of a file and of its source.

    Attributes
    ----------
    known : verdicts that are there already
    """

    file: GgufFile
    source: GgufFile
    claim: Claim
    importances: Importances | None
    n_threads: int | None
    known: Mapping[str, Verdict]

    def sample(self, n: int | None, seed: int) -> list[str]:
        """Return names of tensors to look at, in the order of the file; n None: all."""
        names = list(self.file.tensors)
        if n is None or n >= len(names):
            return names
        chosen = set(np.random.default_rng(seed).choice(names, n, replace=False).tolist())
        if self.claim.folds:  # a fold is only seen in all of its tensors
            chosen |= {
                t for site in self._sites() if chosen & {*site.tensors} for t in site.tensors
            }
        return [name for name in names if name in chosen or name in self.known]

    def _sites(self) -> list[FoldSite]:
        return [site for site in fold_sites(self.source) if site.refused is None]

    def verdicts(self, names: Sequence[str], progress: Progress) -> tuple[Verdict, ...]:
        """Return a verdict on every one."""
        unknown = [name for name in names if name not in self.known]
        scales = self._scales(unknown) if self.claim.folds else {}
        exact: dict[str, Verdict] = {}
        screened: list[TensorScreen] = []
        for done, name in enumerate(names, start=1):
            verdict = self.known.get(name) or self._derived(name, scales)
            if verdict is None:
                screened.append(self._screen(name, scales))
            else:
                exact[name] = verdict
            progress(done, len(names))
        for each in self._judged(screened):
            exact[each.name] = each
        return tuple(exact[name] for name in names)

    def _derived(self, name: str, scales: Mapping[str, TensorScales]) -> Verdict | None:
        """Return the verdict on a tensor whose bytes can be derived again; None: they cannot."""
        tensor, original = self.file.tensors[name], self.source.tensors[name]
        kept = tensor.qtype == original.qtype
        needs = self.claim.uses_imatrix and self.importances is None
        if not kept and (not self.claim.is_exact or (needs and len(tensor.shape) > 1)):
            return None
        if kept and name in scales:
            return self._folded(name, scales[name])
        quantizer = make_quantizer("rtn")
        wanted = quantize_tensor(
            self.source, name, tensor.qtype, self.importances, quantizer, n_threads=self.n_threads
        )
        got = self.file.read_bytes(name)
        wrong = np.flatnonzero(
            (wanted.reshape(len(wanted), -1) != got.reshape(len(got), -1)).any(1)
        )
        if not len(wrong):
            how = "the source's bytes" if kept else "derived again, byte for byte"
            return Verdict(name, tensor.qtype.name, IDENTICAL, how)
        if kept and self.claim.is_tuned:
            return Verdict(name, tensor.qtype.name, UNKNOWN, "the recipe tunes it")
        if kept and name.endswith(".bias") and not self.claim.is_exact:
            return None  # it takes the mean error of its products
        why = f"{len(wrong)} of {len(got)} rows are others, the first {int(wrong[0])}"
        return Verdict(name, tensor.qtype.name, DIFFERS, why)

    def _folded(self, name: str, scales: TensorScales) -> Verdict | None:
        """Return the verdict on a norm; of other folded floats None."""
        tensor = self.file.tensors[name]
        if len(tensor.shape) != 1 or name.endswith(".bias"):
            return None
        is_one = bool((scales.row == 1).all())
        if is_one and np.array_equal(self.file.read_bytes(name), self.source.read_bytes(name)):
            return Verdict(name, tensor.qtype.name, IDENTICAL, "the source's bytes")
        if self.claim.is_tuned:
            return Verdict(name, tensor.qtype.name, UNKNOWN, "the recipe tunes it")
        off = np.abs(self.file.read_float(name) - apply(self.source.read_float(name), scales))
        bad = ~(off <= 1e-2 * np.abs(self.file.read_float(name)))  # where the source is 0, or NaN
        if bad.any():
            why = f"{int(bad.sum())} of its {bad.size} values are no fold of the source's"
            return Verdict(name, tensor.qtype.name, DIFFERS, why)
        return Verdict(name, tensor.qtype.name, CONSISTENT, "folded into what reads it")

    def _screen(self, name: str, scales: Mapping[str, TensorScales]) -> TensorScreen:
        weight: FloatArray = self.source.read_float(name)
        if name in scales:
            weight = apply(weight, scales[name])
        found = measure_tensor(self.file.tensors[name], weight, self.file.read_bytes(name))
        return replace(found, peak=0.0)  # the source's own outliers are none of the file

    def _judged(self, screened: Sequence[TensorScreen]) -> list[Verdict]:
        means = [each.mean for each in screened if each.mean > 0]
        typical = float(np.median(means)) if means else 0.0
        if not typical <= _MOST_TYPICAL:
            why = f"errors of ×{typical:.3g} of rounding's: other weights than the source's"
            return [Verdict(each.name, each.qtype, DIFFERS, why) for each in screened]
        near = typical * (_AS_NEAR_FED if self.claim.feeds_rows else _AS_NEAR)
        found = []
        for each in judge(screened):
            why, verdict = "; ".join(each.reasons), DIFFERS
            if not each.reasons:
                why = f"errors ×{each.mean:.2f} of rounding's, the largest {each.worst:.1f} steps"
                verdict = CONSISTENT
            elif not self.claim.is_exact and 0 < each.mean <= near:
                verdict = UNKNOWN
                why = (
                    f"as near the source as others in all, ×{each.mean:.2f} of rounding's; single "
                    f"weights are not, which error feedback does, or somebody did: {why}"
                )
            found.append(Verdict(each.name, each.qtype, verdict, why))
        return found

    # A fold's scales are not in the file. A norm shows them; at other sites they are fitted, one
    # number a channel, to the rows that make it or the columns that read it, whichever show it
    # better (what a fold makes small may be rounded to zeros): the other side then has to agree.

    def _scales(self, names: Sequence[str]) -> dict[str, TensorScales]:
        wanted = set(names)
        sites = [site for site in self._sites() if wanted & {*site.tensors}]
        found = {site: self._fitted(site, {}) for site in sites if site.kind == "norm"}
        by_norms = tensor_scales(self.source, found)
        found |= {site: self._fitted(site, by_norms) for site in sites if site.kind != "norm"}
        return tensor_scales(self.source, found)

    def _fitted(self, site: FoldSite, by_norms: Mapping[str, TensorScales]) -> FloatArray:
        if site.kind == "norm" and not self.claim.is_tuned:
            with np.errstate(all="ignore"):
                scales = self.source.read_float(site.source) / self.file.read_float(site.source)
            return _positive(scales)
        index = np.arange(site.n).reshape(site.n_mat, -1)[:, site.scale_of_column]
        reading = _Fit(site.n)
        for name in site.consumers:
            shape = (site.n_mat, -1, site.n_columns)
            ours, theirs = (one.read_float(name).reshape(shape) for one in (self.file, self.source))
            reading.add(index, ours, theirs, "mri,mri->mi")
        scales, unexplained = reading.result()
        if site.kind != "norm":
            theirs = self.source.read_float(site.source)
            if site.source in by_norms:
                theirs = apply(theirs, by_norms[site.source])
            ours = self.file.read_float(site.source)
            last = slice(site.first_row, site.first_row + site.n // site.n_mat)
            ours, theirs = (
                one.reshape(site.n_mat, site.n_rows, -1)[:, last] for one in (ours, theirs)
            )
            making = _Fit(site.n)
            making.add(np.arange(site.n).reshape(site.n_mat, -1), ours, theirs, "mri,mri->mr")
            inverse, also = making.result()
            with np.errstate(all="ignore"):
                scales = np.where(also < unexplained, 1 / inverse, scales)
        return _positive(scales)


class _Fit:
    """One factor a channel, by least squares, from weights before to weights after."""

    def __init__(self, n: int) -> None:
        self._both, self._before, self._after = np.zeros((3, n))

    def add(self, index: Any, after: FloatArray, before: FloatArray, sums: str) -> None:
        for total, one, other in (
            (self._both, after, before),
            (self._before, before, before),
            (self._after, after, after),
        ):
            np.add.at(total, index, np.einsum(sums, one, other, dtype=np.float64))

    def result(self) -> tuple[Any, Any]:
        """Return the factors and the share of the energy that each leaves unexplained, (n,)."""
        with np.errstate(all="ignore"):
            left = 1 - np.square(self._both) / (self._before * self._after)
            return self._both / self._before, np.nan_to_num(left, nan=np.inf)


def _positive(scales: Any) -> FloatArray:
    """Return scales that can be applied; where there is none, 1."""
    good = np.isfinite(scales) & (scales > 1e-6) & (scales < 1e6)
    return np.where(good, scales, 1).astype(np.float32)
