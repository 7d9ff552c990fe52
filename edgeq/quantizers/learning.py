"""Codes and scales learned by gradients of ½ tr(E H Eᵀ), which a product E H gives exactly.

The second moments hold all that the calibration's tokens say about this loss, so no step draws
tokens, and rows of a weight are independent: each keeps the step that was best for it. A step's
scales are those of the file (a super-block's stay, its groups' are snapped in every step), so its
loss is the file's.

Places are counted in codes: 2.5 is halfway between ``levels[2]`` and ``levels[3]``, also where the
levels are uneven.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cpu_kernels.block_formats import BlockFormat, Fields
from edgeq.quantizers.feedback import Codes, Rounding, level_step
from edgeq.runtime.encoders import FloatArray

_FACTORS = (0.5, 1.5)  # of scales, offsets, and of FlexRound's divisors
_EDGE = np.float32(1e-3)  # codes from the end of a code's interval
_LEAST = np.float32(1e-9)  # loss that is told from none, of a row set to zero
_TINY = np.float32(1e-30)
_SCALE_RATE = np.float32(0.1)  # of the weights' step; at 1 the loss rises


class _Search:
    """Rows of a weight whose rounding is being learned, and each row's best step so far.

    Attributes
    ----------
    start : rounding that the rows have
    weight : (n_out, n_in) float32
    hessian : (n_in, n_in) float32
    is_straight : take the gradient straight through the rounding
    shift : (n_out, n_in) float32, what moves each weight onto the code that it starts from, in
        codes; 0 where that is the nearest
    norm : (n_out, 1) float32, the starting loss of a row over n_in, what gradients are relative to
    scale, offset : (n_out, n_in) float32, the starting grid
    """

    def __init__(
        self, start: Rounding, weight: FloatArray, hessian: FloatArray, *, is_straight: bool
    ) -> None:
        self.start, self.weight, self.hessian = start, weight, hessian
        self.is_straight = is_straight
        self.best = start.copy()
        self._losses, _ = self.losses(start.values)
        energies, _ = self.losses(np.zeros_like(weight))
        most = np.maximum(self._losses, _LEAST * energies)[:, None]
        self.norm = np.maximum(most / np.float32(weight.shape[1]), _TINY)
        self.scale, self.offset = (_repeated(start.fmt, v) for v in start.fmt.grid(start.fields))
        code = start.codes.astype(np.float32)
        place = self.places(weight)
        ends = np.clip(place, 0, len(start.fmt.levels) - 1)
        self.shift: FloatArray = np.clip(ends, code - 0.5 + _EDGE, code + 0.5 - _EDGE) - ends

    def places(self, weight: FloatArray) -> FloatArray:
        """Return where weights lie on the starting grid, in codes; beyond its ends it goes on."""
        levels, step = self.start.fmt.levels, level_step(self.start.fmt)
        x: FloatArray = weight - self.offset
        usable = np.abs(self.scale) >= np.finfo(np.float32).tiny  # else 1 / scale may be infinite
        with np.errstate(over="ignore"):
            x = np.divide(x, self.scale, out=np.zeros_like(x), where=usable)
            if step > 0:
                x = (x - levels[0]) / step
            else:
                below = np.searchsorted(levels[1:-1], x, side="right")
                x = (x - levels[below]) / np.diff(levels)[below] + below.astype(np.float32)
        return x

    def losses(self, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return ½ e H eᵀ of every row, (n_out,), and its gradient E H."""
        error = values - self.weight
        gradient: FloatArray = np.matmul(error, self.hessian)
        losses: FloatArray = 0.5 * np.einsum("ij,ij->i", error, gradient)
        return losses, gradient

    def offer(self, fields: Fields, codes: Codes, losses: FloatArray) -> None:
        """Keep the rows that are better than all before."""
        better = losses < self._losses  # NaN is not
        self._losses[better] = losses[better]
        self.best.codes[better] = codes[better]
        for name, values in vars(fields).items():
            getattr(self.best.fields, name)[better] = values[better]

    def found(self) -> Rounding:
        """Return each row's best rounding."""
        best = self.best
        return Rounding(best.fmt, best.fields, best.codes, best.fmt.decode(best.fields, best.codes))


@dataclass(frozen=True, eq=False)
class _Step:
    """Gradients of the loss at one step's parameters.

    Attributes
    ----------
    by_value : (n_out, n_in) of a weight's value between its two codes, see ``_try``
    by_scale, by_offset : (n_out, n_groups) of the factors of a group's scale and offset
    """

    by_value: FloatArray
    by_scale: FloatArray
    by_offset: FloatArray


class _Factors:
    """Multipliers of the groups' scales and offsets, within `_FACTORS`."""

    def __init__(self, start: Rounding) -> None:
        self._start = start
        self.scale = np.ones_like(start.fields.sub_scale)
        self.offset = np.ones_like(start.fields.sub_offset)

    def fields(self) -> Fields:
        """Return the starting fields times the factors, as the file can hold them."""
        fmt, fields = self._start.fmt, self._start.fields
        if fmt.group_size < fmt.block_size:
            return Fields(
                fields.super_scale,
                fields.super_offset,
                fmt.snap_sub_scale(fields.sub_scale * self.scale),
                fmt.snap_sub_offset(fields.sub_offset * self.offset),
            )
        return Fields(
            fmt.snap_super_scale(fields.super_scale * self.scale),
            fmt.snap_super_offset(fields.super_offset * self.offset),
            fields.sub_scale,
            fields.sub_offset,
        )


class _Adam:
    """Adam's direction for one array of parameters.

    References
    ----------
    Kingma and Ba, Adam, arXiv:1412.6980, Algorithm 1.
    """

    def __init__(self, like: FloatArray) -> None:
        self._first, self._second = np.zeros_like(like), np.zeros_like(like)
        self._steps = 0

    def direction(self, gradient: FloatArray) -> FloatArray:
        """Return what to subtract, times the rate."""
        self._steps += 1
        self._first += np.float32(0.1) * (gradient - self._first)
        self._second += np.float32(0.001) * (np.square(gradient) - self._second)
        first = self._first / np.float32(1 - 0.9**self._steps)
        second = self._second / np.float32(1 - 0.999**self._steps)
        found: FloatArray = first / (np.sqrt(second) + np.float32(1e-8))
        return found


def _try(search: _Search, places: FloatArray, factors: _Factors) -> _Step:
    """Round places to codes, offer the result, return its gradients.

    Straight through, a weight's own error always pulls it over the edge between its two codes, and
    back once it is there. The slope of the loss from the lower code to the upper one is the same on
    both sides: the gradient with the weight itself in the middle.
    """
    fmt, fields = search.start.fmt, factors.fields()
    levels = fmt.levels
    codes = np.clip(np.rint(places), 0, len(levels) - 1).astype(np.uint8)
    values = fmt.decode(fields, codes)
    losses, gradient = search.losses(values)
    search.offer(fields, codes, losses)
    by_scale = _of_groups(fmt, gradient * search.scale * levels[codes])
    by_offset = _of_groups(fmt, gradient * search.offset)
    if not search.is_straight:
        below = np.clip(np.floor(places), 0, len(levels) - 2).astype(np.uint8)
        scale, offset = (_repeated(fmt, values) for values in fmt.grid(fields))
        middle = scale * ((levels[1:] + levels[:-1]) / 2)[below] + offset
        gradient += np.diagonal(search.hessian) * (middle - values)
    return _Step(gradient, by_scale, by_offset)


def _of_groups(fmt: BlockFormat, values: FloatArray) -> FloatArray:
    sums: FloatArray = values.reshape(len(values), -1, fmt.group_size).sum(axis=2)
    return sums


def _repeated(fmt: BlockFormat, values: FloatArray) -> FloatArray:
    return np.repeat(values, fmt.group_size, axis=1)


def by_signs(search: _Search, steps: int, rate: float) -> None:
    """Move each weight by up to half a code, and the groups' scales, along the gradient's sign.

    References
    ----------
    Cheng et al., Optimize weight rounding via signed gradient descent, arXiv:2309.05516.
    """
    factors = _Factors(search.start)
    centre = search.places(search.weight) + search.shift
    shift, upwards = np.zeros_like(centre), np.sign(search.scale)
    for number in range(steps + 1):
        step = _try(search, centre + shift, factors)
        now = np.float32(rate * (1 - number / steps))
        shift -= now * np.sign(step.by_value) * upwards
        np.clip(shift, -0.5, 0.5, out=shift)
        factors.scale -= _SCALE_RATE * now * np.sign(step.by_scale)
        factors.offset -= _SCALE_RATE * now * np.sign(step.by_offset)
        for values in (factors.scale, factors.offset):
            np.clip(values, *_FACTORS, out=values)


def by_division(search: _Search, steps: int, rate: float) -> None:
    """Divide the weights by factors of their own and of their rows before they are rounded.

    A weight's factor moves it by what is in proportion to its size.

    References
    ----------
    Lee et al., FlexRound, arXiv:2306.00317.
    """
    factors = _Factors(search.start)
    own, of_row = np.ones_like(search.weight), np.ones((len(search.weight), 1), np.float32)
    learned = (own, of_row, factors.scale, factors.offset)
    movers = [_Adam(values) for values in learned]
    for number in range(steps + 1):
        divided = search.weight / (own * of_row)
        step = _try(search, search.places(divided) + search.shift, factors)
        pull = -step.by_value * divided / search.norm
        row_pull = pull.sum(axis=1, keepdims=True) / of_row
        by_groups = (step.by_scale / search.norm, step.by_offset / search.norm)
        now = np.float32(rate * (1 - number / steps))
        for values, mover, gradient in zip(
            learned, movers, (pull / own, row_pull, *by_groups), strict=True
        ):
            values -= now * mover.direction(gradient)
            np.clip(values, *_FACTORS, out=values)


_STRETCH = (np.float32(-0.1), np.float32(1.1))  # γ and ζ
_WARMUP = 0.2  # of the steps: without the regularizer
_BETA = (20.0, 2.0)
_STRENGTH = np.float32(100)  # measured: 0.3 leaves 0.91 of the loss, 100 leaves 0.71


def by_sigmoids(search: _Search, steps: int, rate: float) -> None:
    """Learn how far each weight is between the codes below and above it, driven to the ends.

    Scales stay. The soft values' gradients lead; only the codes that they end at are offered.

    References
    ----------
    Nagel et al., Up or down? Adaptive rounding for post-training quantization, arXiv:2004.10568,
    equations 21 to 25.
    """
    fmt, fields = search.start.fmt, search.start.fields
    place = search.places(search.weight) + search.shift
    below = np.clip(np.floor(place), 0, len(fmt.levels) - 2).astype(np.uint8)
    width = search.scale * np.diff(fmt.levels)[below]
    base = search.scale * fmt.levels[below] + search.offset
    low, high = _STRETCH
    part = np.clip(place - below, 0.01, 0.99)
    logits = -np.log((high - low) / (part - low) - 1)
    mover = _Adam(logits)
    for number in range(steps):
        sigmoid = 1 / (1 + np.exp(-logits))
        stretched = sigmoid * (high - low) + low
        part = np.clip(stretched, 0, 1)
        gradient = search.losses(base + width * part)[1] * width / search.norm
        done = (number / steps - _WARMUP) / (1 - _WARMUP)
        if done >= 0:
            beta = np.float32(_BETA[0] + done * (_BETA[1] - _BETA[0]))
            far = 2 * part - 1
            gradient -= _STRENGTH * 2 * beta * np.sign(far) * np.abs(far) ** (beta - 1)
        gradient *= (high - low) * sigmoid * (1 - sigmoid) * (part == stretched)
        logits -= np.float32(rate) * mover.direction(gradient)
    codes = (below + (logits >= 0)).astype(np.uint8)
    search.offer(fields, codes, search.losses(fmt.decode(fields, codes))[0])


@dataclass(frozen=True)
class Method:
    """One way to learn a rounding.

    Attributes
    ----------
    run : from a search, a number of steps and a step size
    rate : default step size, from the number of steps
    """

    run: Callable[[_Search, int, float], None]
    rate: Callable[[int], float]


METHODS = {
    "adaround": Method(by_sigmoids, lambda steps: 0.1),
    "flexround": Method(by_division, lambda steps: 0.02),
    "sign": Method(by_signs, lambda steps: 1 / steps),
}

_ROWS = 1024  # at a time: it bounds the memory


def learn(
    start: Rounding,
    weight: FloatArray,
    hessian: FloatArray,
    *,
    method: str,
    is_straight: bool,
    steps: int,
    rate: float | None = None,
) -> Rounding:
    """Return a rounding each of whose rows has at most the loss that it starts with.

    Parameters
    ----------
    start : on a grid of two levels or more
    weight : (n_out, n_in) float32
    hessian : (n_in, n_in) float32, positive semidefinite
    method : a name of ``METHODS``
    is_straight : take gradients straight through the rounding; ``adaround`` has no such gradient
    steps : products with the hessian, 1 or more
    rate : step size; None: the method's own
    """
    chosen = METHODS[method]
    rate = chosen.rate(steps) if rate is None else rate
    parts = []
    for first in range(0, len(weight), _ROWS):
        rows = slice(first, first + _ROWS)
        fields = Fields(*(values[rows] for values in vars(start.fields).values()))
        part = Rounding(start.fmt, fields, start.codes[rows], start.values[rows])
        search = _Search(part, np.ascontiguousarray(weight[rows]), hessian, is_straight=is_straight)
        chosen.run(search, steps, rate)
        parts.append(search.found())
    joined = {
        name: np.concatenate([getattr(part.fields, name) for part in parts])
        for name in vars(start.fields)
    }
    codes = np.concatenate([part.codes for part in parts])
    values = np.concatenate([part.values for part in parts])
    return Rounding(start.fmt, Fields(**joined), codes, values)
