"""The search for a fold's scales: one function for the whole family of diagonal foldings.

Every published method proposes scales from the inputs' energy, the weights' sizes, or both; here
they are candidates of one search, and the exported quantizer says which is best, if any:

=========== ================================================== =================================
method      scale of channel j                                 after
=========== ================================================== =================================
``energy``  rms(x_j)^α                                         RAMP's Scale Folding, AWQ with α
``smooth``  rms(x_j)^α / max|W_j|^(1−α)                        SmoothQuant, SmoothQuant+
``awq``     rms(x_j)^α / mean(|W_j| / max in block)^(1−α)      AWQ with both scales
``weight``  max|W_j|^(−α)                                      cross-layer equalization
``balance`` see ``balanced``, to the power of α                the block formats themselves
``dual``    alternating least squares, see ``search_scales``   D²Quant's dual scale
=========== ================================================== =================================

Not folding is the first candidate (AdaDim's choice, made per fold); FPTQuant's value transform and
up/down scaler are, in the diagonal form that GGUF can hold, the ``value`` and ``up`` folds.

References
----------
SmoothQuant arXiv:2211.10438, SmoothQuant+ arXiv:2312.03788, AWQ arXiv:2306.00978, RAMP
arXiv:2603.17891, AdaDim arXiv:2309.15531, FPTQuant arXiv:2506.04985, D²Quant (dual scale).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgeq.errors import CalibrationError
from edgeq.transforms.channels import Channels, balanced
from edgeq.transforms.scales import (
    TensorScales,
    apply,
    check_scales,
    multipliers,
    nearest_powers_of_two,
)
from edgeq.transforms.sites import FloatArray, FoldSite

Loss = Callable[[Mapping[str, FloatArray], Mapping[str, TensorScales]], float]
Rounding = Callable[[str, FloatArray, TensorScales], FloatArray]
Float64 = npt.NDArray[np.float64]

GRIDS: Mapping[str, tuple[float, ...]] = {
    "energy": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
    "smooth": (0.3, 0.5, 0.7, 0.85),
    "awq": (0.3, 0.5, 0.7, 0.85),
    "weight": (0.25, 0.5, 0.75),
    "balance": (0.75, 1.0),  # best at 1 in 108 of 120 folds, at 0.75 in 11: DECISIONS 42
}
METHODS = (*GRIDS, "dual")
_DUAL_STEPS = 6
_MAX_RATIO = 64.0  # of a scale to their geometric mean: beyond, float16 block scales underflow
_EMPTY: Mapping[str, FloatArray] = {}


@dataclass(frozen=True, eq=False)
class SiteChoice:
    """What the search found for one fold.

    Attributes
    ----------
    scales : (n,) float32, geometric mean 1 (of each expert); None: it is better not to fold
    method, strength : of the chosen candidate; ``none`` and 0
    loss_before, loss_after : in the unit of the loss
    tried : (method, strength, loss) of every candidate, in order
    """

    site: FoldSite
    scales: FloatArray | None
    method: str
    strength: float
    loss_before: float
    loss_after: float
    tried: tuple[tuple[str, float, float], ...] = field(repr=False)


def search_scales(
    site: FoldSite,
    weights: Mapping[str, FloatArray],
    *,
    loss: Loss,
    importances: Mapping[str, FloatArray] = _EMPTY,
    hessians: Mapping[str, FloatArray] = _EMPTY,
    rounding: Rounding | None = None,
    methods: Sequence[str] = METHODS,
    block: int = 32,
    min_gain: float = 0.0,
    powers_of_two: bool = False,
) -> SiteChoice:
    """Choose the scales of one fold.

    Parameters
    ----------
    weights : tensors of the fold by GGUF name, float32: all consumers that are quantized, and the
        source if the loss shall count it
    loss : called with folded weights and their multipliers; runs the exported quantizer
    importances : consumer to (n_mat, n_in) mean squared inputs; not needed where there are moments
    hessians : consumer to (n_in, n_in) or (n_mat, n_in, n_in) second moments
    rounding : called with name, folded weight and multipliers; returns the weight as it decodes.
        ``dual`` alternates it with the closed form of the channel scale, s_j = Σ W_j Ŵ_j / Σ Ŵ_j²,
        from the best candidate so far; without it ``dual`` is left out
    methods : which to try, of ``METHODS``
    block : weights that share a scale in the exported type; for ``awq`` and ``balance``
    min_gain : fold only if the loss falls by more than this part of it
    powers_of_two : round every candidate to powers of two: the float model's weights then change
        without any rounding

    Raises
    ------
    RecipeError
        The fold is refused.
    CalibrationError
        There are no statistics or weights of the consumers, or they are not finite.
    """
    check_scales(site, np.ones(site.n, np.float32))
    channels = Channels(site, weights, importances, hessians, block)
    search = _Search(channels, weights, loss, powers_of_two)
    before = search.measure("none", 0.0, np.zeros(site.n))
    if not math.isfinite(before):
        raise CalibrationError(
            f"{site.name}: the loss without folding is {before}, expected a finite number. "
            "Calibrate again."
        )
    if before > 0.0:  # else there is nothing to gain, or no input at all
        for method, strength, logs in _candidates(channels, methods):
            search.measure(method, strength, logs)
        if "dual" in methods and rounding is not None:
            _alternate(search, rounding)
    method, strength, after, logs = search.best
    folds = method != "none" and after < (1.0 - min_gain) * before
    if not folds:
        method, strength, after = "none", 0.0, before
    scales = search.scales_of(logs) if folds else None
    return SiteChoice(site, scales, method, strength, before, after, tuple(search.tried))


def _candidates(channels: Channels, methods: Sequence[str]) -> Iterator[tuple[str, float, Float64]]:
    """Yield method, strength and logarithms of the scales, (n,) float64."""
    energy = channels.log_rms()
    for method in (m for m in GRIDS if m in methods):
        sizes = channels.log_mean_share() if method == "awq" else channels.log_peak()
        balance = balanced(channels) if method == "balance" else None
        for a in GRIDS[method]:
            if balance is not None:
                yield method, a, a * balance
            elif method == "energy":
                yield method, a, a * energy
            elif method == "weight":
                yield method, a, -a * sizes
            else:
                yield method, a, a * energy - (1 - a) * sizes


def _alternate(search: "_Search", rounding: Rounding) -> None:
    """Try D²Quant's dual scale: the step's number is the candidate's strength."""
    channels = search.channels
    logs = search.best[3]
    for step in range(1, _DUAL_STEPS + 1):
        folded, scales = search.fold(search.scales_of(logs))
        rounded = {name: rounding(name, folded[name], scales[name]) for name in channels.energies}
        logs = logs - channels.log_correction(folded, rounded)
        search.measure("dual", float(step), logs)


class _Search:
    """The candidates of one fold, measured; scales are logarithms until they are used."""

    def __init__(
        self,
        channels: Channels,
        weights: Mapping[str, FloatArray],
        loss: Loss,
        powers_of_two: bool,
    ) -> None:
        self.site = channels.site
        self.channels = channels
        self.weights = {name: weights[name] for name in self.site.tensors if name in weights}
        self.shapes = {name: weight.shape for name, weight in self.weights.items()}
        self.loss = loss
        self.powers_of_two = powers_of_two
        self.tried: list[tuple[str, float, float]] = []
        self.best = ("none", 0.0, math.inf, np.zeros(self.site.n))

    def scales_of(self, logs: Float64) -> FloatArray:
        """Return scales with geometric mean 1 in each matrix, (n,) float32.

        A channel that never saw an input keeps the scale 1: nothing is known about it.
        """
        seen = self.channels.seen.reshape(self.site.n_mat, -1)
        per_matrix = np.where(seen, logs.reshape(seen.shape), 0.0)
        n_seen = np.maximum(seen.sum(axis=1, keepdims=True), 1)
        centred = np.where(seen, per_matrix - per_matrix.sum(axis=1, keepdims=True) / n_seen, 0.0)
        limit = math.log(_MAX_RATIO)
        scales = np.exp(np.clip(centred, -limit, limit)).astype(np.float32).ravel()
        return nearest_powers_of_two(scales) if self.powers_of_two else scales

    def fold(self, s: FloatArray) -> tuple[dict[str, FloatArray], dict[str, TensorScales]]:
        scales = multipliers(self.shapes, {self.site: s})
        return {name: apply(w, scales[name]) for name, w in self.weights.items()}, scales

    def measure(self, method: str, strength: float, logs: Float64) -> float:
        """Measure a candidate and keep it if it is the best one; NaN is never the best."""
        loss = self.loss(*self.fold(self.scales_of(logs)))
        self.tried.append((method, strength, loss))
        if loss < self.best[2]:
            self.best = (method, strength, loss, logs)
        return loss
