"""Choose lattice points and scales under a full Hessian, as ``rounding`` does for single codes.

Eight weights are chosen at a time: one point of eight coordinates, or two of four, and their signs.
Points are given by parts; all of a group of weights are of one part. A ``sign_rule`` is one of
``lattice_formats.Signs``.
The nearest point is searched over all points with one weight for each coordinate; what it does to
the loss ½ tr(E H Eᵀ) is then computed with the full Hessian. Rows are independent.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from cpu_kernels._numba import kernel
from cpu_kernels.lattice_formats import Signs

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Indices = npt.NDArray[np.uint16]

_UNIT = 8  # weights that share a byte of signs
_HALF_UNIT = 4
_NONE, _EVEN = int(Signs.NONE), int(Signs.EVEN)  # numba knows no enumerations
_LEVELS = 3
_CODES = _LEVELS**_HALF_UNIT  # of half a point


class Halves(NamedTuple):
    """Points whose coordinates have three levels, taken apart into two codes of four coordinates.

    What a point costs is the sum of what its halves cost, and of these there are only 81. Points of
    other kinds, and those of which a sign may have to be flipped, are in no sets.

    Attributes
    ----------
    levels : (n_parts, n_sets, 3), ascending
    starts : (n_parts, n_sets, 82), where the points with a first code start in what follows
    second : (n_parts, n_sets, n), the other code of each point
    indices : (n_parts, n_sets, n), of the points in their part
    """

    levels: Floats
    starts: npt.NDArray[np.int32]
    second: Bytes
    indices: Indices


def halves_of(points: Floats, sign_rule: int) -> Halves:
    """Return (n_parts, point size, n_points) points by halves."""
    n_parts, size, _ = points.shape
    kinds = (np.float32, np.int32, np.uint8, np.uint16)
    if size != _UNIT or sign_rule == _EVEN:
        return Halves(*(np.zeros((n_parts, 0, 1), kind) for kind in kinds))
    parts = []
    for part in points:
        shift = part[0] - np.rint(part[0])  # of IQ1's points, up or down
        chosen = [np.flatnonzero(shift == one) for one in np.unique(shift)]
        sets = [_by_first_code(part[:, some], some) for some in chosen]
        parts.append([np.stack(arrays) for arrays in zip(*sets, strict=True)])
    arrays = [np.stack(one) for one in zip(*parts, strict=True)]
    return Halves(*(one.astype(kind) for one, kind in zip(arrays, kinds, strict=True)))


def _by_first_code(points: Floats, indices: npt.NDArray[np.intp]) -> tuple[npt.NDArray[Any], ...]:
    levels = np.unique(points)
    codes = np.searchsorted(levels, points).reshape(2, _HALF_UNIT, -1)
    first, second = np.tensordot(codes, _LEVELS ** np.arange(_HALF_UNIT), axes=(1, 0))
    order = np.argsort(first, kind="stable")
    starts = np.searchsorted(first[order], np.arange(_CODES + 1))
    return levels, starts, second[order], indices[order]


@kernel(reorder=True)
def _scan(
    start: int, target: Floats, weight: Floats, s: np.float32, points: Floats, is_signed: bool,
    costs: Floats, flips: Floats, has_flip: bool, prepared: Floats,
) -> None:  # fmt: skip
    """Set each point's squared error; and the least that the flip of one sign adds to it.

    Loops over the coordinates have constant lengths, so that LLVM unrolls them and works on many
    points at a time.

    Parameters
    ----------
    start : of the part of `target` and `weight`
    target, weight : (8,) what is wanted, and how much its squared error counts
    s : scale, above 0
    points : (point size, n_points)
    is_signed : points have signs of their own; else those of the target are free
    costs, flips : (n_points,) written; `flips` only if `has_flip`
    prepared : (24,) or more, written
    """
    n_points = points.shape[1]
    wanted, factor, flip = prepared[:8], prepared[8:16], prepared[16:24]
    for j in range(points.shape[0]):
        wanted[j] = (target[start + j] if is_signed else np.abs(target[start + j])) / s
        factor[j] = weight[start + j] * s * s
        flip[j] = np.float32(4) * factor[j] * wanted[j]
    if points.shape[0] == _UNIT:
        for p in range(n_points):
            cost = np.float32(0)
            for j in range(_UNIT):
                error = points[j, p] - wanted[j]
                cost += factor[j] * error * error
            costs[p] = cost
        if has_flip:
            for p in range(n_points):
                least = flip[0] * points[0, p]
                for j in range(1, _UNIT):
                    extra = flip[j] * points[j, p]
                    least = extra if extra < least else least
                flips[p] = costs[p] + least
    else:
        for p in range(n_points):
            cost = np.float32(0)
            for j in range(_HALF_UNIT):
                error = points[j, p] - wanted[j]
                cost += factor[j] * error * error
            costs[p] = cost
        if has_flip:
            for p in range(n_points):
                least = flip[0] * points[0, p]
                for j in range(1, _HALF_UNIT):
                    extra = flip[j] * points[j, p]
                    least = extra if extra < least else least
                flips[p] = costs[p] + least


@kernel()
def _least(costs: Floats) -> int:
    """Return where the least of numbers not below 0 is: as bits they are integers in order.

    LLVM vectorizes the least integer, but not that of floats, which may be NaN.
    """
    bits = costs.view(np.int32)
    least = bits[0]
    for p in range(bits.size):
        least = min(least, bits[p])
    place = 0
    for p in range(bits.size):
        place = max(place, p if bits[p] == least else 0)
    return place


@kernel(reorder=True)
def _least_by_halves(
    target: Floats, weight: Floats, s: np.float32, part: int, halves: Halves, is_signed: bool,
    tables: Floats,
) -> int:  # fmt: skip
    """Return the index of the point with the least squared error.

    Points with the same first half are passed over if the best second half of all would not do.

    Parameters
    ----------
    target, weight : (8,)
    s : scale, above 0
    part : of the points
    is_signed : as for ``_scan``
    tables : (2, 81) or more, written
    """
    least, found = np.float32(np.inf), 0
    firsts, seconds = tables[0], tables[1]
    for number in range(halves.levels.shape[1]):
        levels, starts = halves.levels[part, number], halves.starts[part, number]
        for half in range(2):
            table = tables[half]
            table[0] = np.float32(0)
            n = 1
            for i in range(_HALF_UNIT):
                j = _HALF_UNIT * half + i
                wanted = (target[j] if is_signed else np.abs(target[j])) / s
                factor = weight[j] * s * s
                for level in range(_LEVELS - 1, -1, -1):
                    error = levels[level] - wanted
                    cost = factor * error * error
                    for code in range(n):
                        table[level * n + code] = table[code] + cost
                n *= _LEVELS
        nearest = 0
        rest = seconds[0]
        for code in range(_CODES):
            rest = min(rest, seconds[code])
            if firsts[code] < firsts[nearest]:
                nearest = code
        for turn in range(-1, _CODES):
            code = nearest if turn < 0 else turn
            base = firsts[code]
            if base + rest < least:
                for i in range(starts[code], starts[code + 1]):
                    cost = base + seconds[halves.second[part, number, i]]
                    if cost < least:
                        least = cost
                        found = int(halves.indices[part, number, i])
    return found


@kernel()
def _nearest_unit(
    target: Floats, weight: Floats, s: np.float32, part: int, points: Floats, halves: Halves,
    sign_rule: int, values: Floats, indices: Indices, scratch: Floats,
) -> np.uint8:  # fmt: skip
    """Choose the points and signs of eight weights; return the signs.

    Parameters
    ----------
    target, weight : (8,)
    s : scale; not above 0: the first point everywhere
    part : of the points
    points : (n_parts, point size, n_points)
    values, indices : (8,) and (8 / point size,) written
    scratch : (3, n_points) written
    """
    size = points.shape[1]
    is_signed = sign_rule == _NONE
    n_minus, signs = 0, 0
    for j in range(_UNIT):
        if target[j] < np.float32(0) and not is_signed:
            n_minus += 1
            signs |= 1 << j
    is_odd = sign_rule == _EVEN and n_minus % 2 == 1
    flipped = -1
    flipped_point = 0
    least_extra = np.float32(np.inf)
    for place in range(_UNIT // size):
        indices[place] = 0
        if not s > np.float32(0):
            continue
        if halves.levels.shape[1] > 0:
            indices[place] = _least_by_halves(target, weight, s, part, halves, is_signed, scratch)
            continue
        costs, flips = scratch[0], scratch[1]
        _scan(
            place * size, target, weight, s, points[part], is_signed, costs, flips, is_odd,
            scratch[2],
        )  # fmt: skip
        best = _least(costs)
        indices[place] = best
        if is_odd:
            least = costs[best]
            other = _least(flips)
            if flips[other] - least < least_extra or flipped < 0:
                least_extra = flips[other] - least
                flipped, flipped_point = place, other
    if is_odd:
        flip_at = 0
        if flipped >= 0:
            indices[flipped] = flipped_point
            flip_at = flipped * size
            for j in range(flipped * size, (flipped + 1) * size):
                here = weight[j] * np.abs(target[j]) * points[part, j % size, flipped_point]
                value = points[part, flip_at % size, flipped_point]
                if here < weight[flip_at] * np.abs(target[flip_at]) * value:
                    flip_at = j
        signs ^= 1 << flip_at
    for j in range(_UNIT):
        value = s * points[part, j % size, indices[j // size]]
        values[j] = -value if (signs >> j) & 1 else value
    return np.uint8(signs)


@kernel(parallel=True, reorder=True)
def feed_back_points(
    weights: Floats, upper: Floats, metric: Floats, group: Ints, scale: Floats, points: Floats,
    halves: Halves, sign_rule: int, indices: Indices, signs: Bytes, values: Floats,
) -> None:  # fmt: skip
    """Round eight columns after another, pushing each error onto the columns not yet rounded.

    Parameters
    ----------
    weights : (n_rows, m) written: the errors in units of the factor, what the columns behind take
    upper : (m, m) upper Cholesky factor of the inverse Hessian, in processing order
    metric : (m,) how much a squared error of a column counts, the columns behind compensating
    group : (m / 8,) which group the scale of eight columns is
    scale : (n_rows, n_groups)
    points : (n_parts, point size, n_points)
    indices, signs, values : (n_rows, m / point size), (n_rows, m / 8), (n_rows, m) written; indices
        keep their parts

    References
    ----------
    Tseng et al., QuIP#, arXiv:2402.04396, section 4.1, BlockLDLQ; Liu et al., VPTQ,
    arXiv:2409.17066, section 3.1, for what a vector's error counts.
    """
    m = weights.shape[1]
    per_unit = _UNIT // points.shape[1]
    n_points = points.shape[2]
    for row in numba.prange(weights.shape[0]):
        w = weights[row]
        scratch = np.empty((3, n_points), np.float32)
        for unit in range(m // _UNIT):
            first = _UNIT * unit
            last = first + _UNIT
            own = indices[row, per_unit * unit : per_unit * (unit + 1)]
            part = own[0] // n_points
            signs[row, unit] = _nearest_unit(
                w[first:last], metric[first:last], scale[row, group[unit]], part, points, halves,
                sign_rule, values[row, first:last], own, scratch,
            )  # fmt: skip
            own += np.uint16(part * n_points)
            for j in range(first, last):
                error = (w[j] - values[row, j]) / upper[j, j]
                for k in range(j + 1, m):
                    w[k] -= error * upper[j, k]
                w[j] = error


@kernel(parallel=True, reorder=True)
def descend_points(
    gradient: Floats, hessian: Floats, inverses: Floats, points: Floats, halves: Halves,
    sign_rule: int, group_size: int, super_scale: Floats, sub_scale: Floats, max_sub_scale: int,
    indices: Indices, signs: Bytes, values: Floats, reach: int, n_passes: int,
) -> None:  # fmt: skip
    """Lower each row's loss over one block of columns: points, signs, and the groups' sub-scales.

    Parameters
    ----------
    gradient : (n_rows, m) (E H) at the block's columns, written
    hessian : (m, m) of the block
    inverses : (m / 8, 8, 8) of the Hessian's blocks of eight columns
    points : (n_parts, point size, n_points)
    super_scale : (n_rows,)
    sub_scale : (n_rows, m / group_size) written, odd numbers from 1 to `max_sub_scale`
    indices, signs, values : (n_rows, m / point size), (n_rows, m / 8), (n_rows, m) written
    reach : sub-scales tried to both sides
    n_passes : times that all columns are visited; sub-scales and parts are tried in the first
    """
    n_rows, m = values.shape
    n_parts, size, n_points = points.shape
    per_unit = _UNIT // size
    n_units = group_size // _UNIT
    for row in numba.prange(n_rows):
        scratch = np.empty((3, n_points), np.float32)
        work = np.empty((5, group_size), np.float32)  # best, trial, its gradient, wanted, one unit
        best_indices = np.empty((2, n_units * per_unit), np.uint16)
        best_signs = np.empty((2, n_units), np.uint8)
        for p in range(n_passes):
            for q in range(m // group_size):
                start = q * group_size
                old = sub_scale[row, q]
                old_part = indices[row, start // size] // n_points
                best_change, best_scale = np.float32(0), np.float32(-1)
                tried = reach if p == 0 else 0
                n_tried = 2 * tried + 1
                for number in range(n_tried * n_parts):
                    step, part = number % n_tried - tried, (old_part + number // n_tried) % n_parts
                    s = old + np.float32(2 * step)
                    if s < np.float32(1) or s > np.float32(max_sub_scale):
                        continue
                    if p > 0 and part != old_part:
                        continue
                    change = _try_group(
                        start, super_scale[row] * s, step == 0 and part == old_part, values[row],
                        gradient[row], hessian, inverses, part, points, halves, sign_rule,
                        indices[row], signs[row], work[1:], best_indices[1], best_signs[1], scratch,
                    )  # fmt: skip
                    if change < best_change:
                        best_change, best_scale = change, s
                        work[0] = work[1]
                        best_indices[0] = best_indices[1]
                        best_signs[0] = best_signs[1]
                if best_scale < np.float32(0):
                    continue
                sub_scale[row, q] = best_scale
                first = start // _UNIT
                signs[row, first : first + n_units] = best_signs[0]
                first *= per_unit
                indices[row, first : first + n_units * per_unit] = best_indices[0]
                for i in range(group_size):
                    delta = work[0, i] - values[row, start + i]
                    if delta != np.float32(0):
                        values[row, start + i] = work[0, i]
                        for k in range(m):
                            gradient[row, k] += delta * hessian[start + i, k]


@kernel(reorder=True)
def _try_group(
    start: int, s: np.float32, is_own: bool, values: Floats, gradient: Floats, hessian: Floats,
    inverses: Floats, part: int, points: Floats, halves: Halves, sign_rule: int, indices: Indices,
    signs: Bytes, work: Floats, trial_indices: Indices, trial_signs: Bytes, scratch: Floats,
) -> np.float32:  # fmt: skip
    """Choose a group's points anew at scale s, eight weights after another.

    Parameters
    ----------
    is_own : s and the part are the group's own, so that a unit may stay as it is
    part : of the points
    points : (n_parts, point size, n_points)
    work : (4, group_size) written: the group's values, its gradient, what is wanted, one unit
    trial_indices, trial_signs : of the group, written

    Returns
    -------
    change : of the row's loss, halved: gradient · δ + ½ δᵀ H δ
    """
    trial, trial_gradient, wanted, weight = work[0], work[1], work[2], work[3]
    n = trial.size
    _, size, n_points = points.shape
    per_unit = _UNIT // size
    total = np.float32(0)
    for i in range(n):
        trial_gradient[i] = gradient[start + i]
    for unit in range(n // _UNIT):
        first = _UNIT * unit
        column = start + first
        for i in range(_UNIT):  # where the loss of these eight weights is least
            step = np.float32(0)
            for k in range(_UNIT):
                step += inverses[column // _UNIT, i, k] * trial_gradient[first + k]
            wanted[first + i] = values[column + i] - step
            weight[first + i] = hessian[column + i, column + i]
        chosen = trial[first : first + _UNIT]
        own = trial_indices[per_unit * unit : per_unit * (unit + 1)]
        trial_signs[unit] = _nearest_unit(
            wanted[first : first + _UNIT], weight[first : first + _UNIT], s, part, points, halves,
            sign_rule, chosen, own, scratch,
        )  # fmt: skip
        own += np.uint16(part * n_points)
        change = np.float32(0)
        for i in range(_UNIT):
            row = np.float32(0)
            for k in range(_UNIT):
                row += (chosen[k] - values[column + k]) * hessian[column + i, column + k]
            delta = chosen[i] - values[column + i]
            change += delta * (trial_gradient[first + i] + np.float32(0.5) * row)
        if is_own and not change < np.float32(0):
            change = np.float32(0)
            trial_signs[unit] = signs[column // _UNIT]
            for i in range(per_unit):
                own[i] = indices[column // _UNIT * per_unit + i]
            for i in range(_UNIT):
                chosen[i] = values[column + i]
        total += change
        for i in range(_UNIT):
            delta = chosen[i] - values[column + i]
            if delta != np.float32(0):
                for k in range(first + _UNIT, n):
                    trial_gradient[k] += delta * hessian[column + i, start + k]
    return total
