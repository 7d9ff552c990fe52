"""Choose codes and scales under a full Hessian: error feedback and coordinate descent.

The kernels know neither formats nor models. They see groups of weights that share a grid
``scale · level + offset``, and a loss ½ tr(E H Eᵀ) of the error E = Ŵ − W. Rows are independent.
"""

import numba
import numpy as np
import numpy.typing as npt

from cpu_kernels._numba import kernel

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


_Real = np.float32
# What `descend` may do to a group: levels, step of even levels, bounds, mantissa, lowest.
_Grid = tuple[Floats, np.float32, Floats, int, int]

_LEAST_NORMAL = np.float32(2.0**-126)
_HALF_STEP = 0.04  # between the half-float scales that are tried, relative


@kernel()
def _nearest(x: np.float32, levels: Floats, step: np.float32) -> int:
    """Return the index of the level nearest to x; `step` is that of even levels, else 0.

    What is too great is cut as a float: as an integer, one beyond 2**63 is negative.
    """
    top = levels.size - 1
    if step > np.float32(0):
        place = np.floor((x - levels[0]) / step + np.float32(0.5))
        place = max(np.float32(0), min(np.float32(top), place))
        return min(max(int(place), 0), top)  # NaN
    i = 0
    for half in (8, 4, 2, 1):  # uneven levels are at most 16
        k = i + half
        if k <= top and x + x > levels[k - 1] + levels[k]:
            i = k
    return i


@kernel()
def _inverse(s: np.float32) -> np.float32:
    """Return 1 / s, or 0 where that may be infinite: there every weight takes the level near 0."""
    return np.float32(1) / s if abs(s) >= _LEAST_NORMAL else np.float32(0)


@kernel(parallel=True, reorder=True)
def feed_back(
    weights: Floats,
    upper: Floats,
    group: Ints,
    scale: Floats,
    offset: Floats,
    levels: Floats,
    step: np.float32,
    codes: Bytes,
    values: Floats,
) -> None:
    """Round columns one after another, pushing each error onto the columns not yet rounded.

    Parameters
    ----------
    weights : (n_rows, m) written: the errors divided by the pivots, what the columns behind take
    upper : (m, m) upper Cholesky factor of the inverse Hessian, in processing order
    group : (m,) which group a column's grid is
    scale, offset : (n_rows, n_groups)
    levels : (n_levels,) ascending
    step : distance of even levels; 0: they are not even
    codes, values : (n_rows, m) written

    References
    ----------
    Frantar et al., GPTQ, arXiv:2210.17323, Algorithm 1.
    """
    m = weights.shape[1]
    for row in numba.prange(weights.shape[0]):
        w = weights[row]
        for j in range(m):
            s = scale[row, group[j]]
            o = offset[row, group[j]]
            code = _nearest((w[j] - o) * _inverse(s), levels, step)
            value = s * levels[code] + o
            codes[row, j] = np.uint8(code)
            values[row, j] = value
            error = (w[j] - value) / upper[j, j]
            for k in range(j + 1, m):
                w[k] -= error * upper[j, k]
            w[j] = error


@kernel(reorder=True)
def _descend_group(
    start: int,
    stop: int,
    s: np.float32,
    o: np.float32,
    values: Floats,
    gradient: Floats,
    hessian: Floats,
    inverse_diagonal: Floats,
    levels: Floats,
    step: np.float32,
    trial: Floats,
    trial_gradient: Floats,
    trial_codes: Bytes,
) -> np.float32:
    """Round a group anew on the grid (s, o), column by column; return the change of the loss.

    The loss is that of the row, halved: gradient · δ + ½ δᵀ H δ.
    """
    inverse = _inverse(s)
    n = stop - start
    for i in range(n):
        trial_gradient[i] = gradient[start + i]
    change = np.float32(0)
    for i in range(n):
        j = start + i
        want = values[j] - trial_gradient[i] * inverse_diagonal[j]
        code = _nearest((want - o) * inverse, levels, step)
        value = s * levels[code] + o
        delta = value - values[j]
        trial[i] = value
        trial_codes[i] = np.uint8(code)
        if delta != np.float32(0):
            change += delta * (trial_gradient[i] + np.float32(0.5) * delta * hessian[j, j])
            for k in range(i + 1, n):
                trial_gradient[k] += delta * hessian[j, start + k]
    return change


@kernel()
def _snap(x: np.float32, bits: int, lowest: int) -> np.float32:
    """Return the nearest float of `bits` mantissa bits; below 2**lowest the steps stay even."""
    magnitude = np.float32(abs(x))
    exponent = max((magnitude.view(np.int32) >> np.int32(23)) - np.int32(127), np.int32(lowest))
    one_step = np.float32(2.0) ** np.float32(exponent - np.int32(bits))
    return np.float32(np.rint(x / one_step) * one_step)


@kernel()
def _neighbour(x: np.float32, places: int, bits: int, lowest: int) -> np.float32:
    """Return the float of `bits` mantissa bits so many `places` above x, which is one, not below 0.

    The bits of floats in order are integers in order, but for those below 2**lowest.
    """
    least = np.float32(2.0) ** np.float32(lowest)
    if x < least or (x == least and places < 0):
        return np.float32(x + np.float32(places) * np.float32(2.0) ** np.float32(lowest - bits))
    moved = np.int32(np.float32(x).view(np.int32) + np.int32(places << (23 - bits)))
    return _snap(moved.view(np.float32), bits, lowest)


@kernel()
def _nearby(
    number: int, s: np.float32, o: np.float32, n_s: int, n_o: int, mantissa: int, lowest: int
) -> tuple[np.float32, np.float32]:
    """Return candidate `number` of (2 n_s + 1)(2 n_o + 1) scales and offsets around (s, o)."""
    ds = number // (2 * n_o + 1) - n_s
    do = number % (2 * n_o + 1) - n_o
    if ds == 0:
        moved = s
    elif mantissa < 0:
        moved = s + np.float32(ds)
    elif mantissa < 10:  # every float of so few bits matters
        moved = _neighbour(s, ds, mantissa, lowest)
    else:
        moved = _snap(s * (np.float32(1) + np.float32(_HALF_STEP * ds)), mantissa, lowest)
    return moved, o + np.float32(do)


@kernel(reorder=True)
def _least_squares(
    start: int,
    group: Floats,
    codes: Bytes,
    levels: Floats,
    values: Floats,
    gradient: Floats,
    hessian: Floats,
    basis: Floats,
    moved_gradient: Floats,
    has_offset: bool,
) -> tuple[np.float32, np.float32]:
    """Return the changes of a group's scale and offset that lower the row's loss most.

    Parameters
    ----------
    group, codes : (n,) what the group is set to; the rest of the row stays
    values, gradient : (m,) of the row before that
    basis, moved_gradient : (n,) written
    """
    n = group.size
    for i in range(n):
        moved_gradient[i] = gradient[start + i]
        basis[i] = levels[codes[i]]
    for i in range(n):
        delta = group[i] - values[start + i]
        if delta != np.float32(0):
            for k in range(n):
                moved_gradient[k] += delta * hessian[start + i, start + k]
    a = b = p = q = r = np.float32(0)
    for i in range(n):
        hx = hy = np.float32(0)
        for k in range(n):
            hx += hessian[start + i, start + k] * basis[k]
            hy += hessian[start + i, start + k]
        a += moved_gradient[i] * basis[i]
        b += moved_gradient[i]
        p += hx * basis[i]
        q += hx
        r += hy
    return _minimum(a, b, p, q, r, has_offset, np.float32(1e-4))


@kernel()
def _minimum(
    a: _Real, b: _Real, p: _Real, q: _Real, r: _Real, has_offset: bool, least: _Real
) -> tuple[_Real, _Real]:
    """Return where a x + b y + ½ p x² + q x y + ½ r y² is least; y is 0 if it is none or unsure.

    Parameters
    ----------
    least : determinant, as a fraction of p r, from which on both are found
    """
    determinant = p * r - q * q
    if has_offset and determinant > least * p * r:
        return -(r * a - q * b) / determinant, -(p * b - q * a) / determinant
    return (-a / p if p > np.float32(0) else np.float32(0)), np.float32(0)


@kernel(reorder=True)
def _visit_group(
    q: int,
    reach: int,
    unit_scale: Floats,
    unit_offset: Floats,
    scale: Floats,
    offset: Floats,
    values: Floats,
    gradient: Floats,
    codes: Bytes,
    hessian: Floats,
    inverse_diagonal: Floats,
    grid: _Grid,
    scratch: Floats,
    scratch_codes: Bytes,
) -> None:
    """Do group q of one row of ``descend``: try scales, keep what lowers the loss most.

    Parameters
    ----------
    grid : levels, step, bounds, mantissa, lowest
    scratch, scratch_codes : (3, group_size) and (2, group_size), written
    """
    levels, step, bounds, mantissa, lowest = grid
    best, trial, trial_gradient = scratch[0], scratch[1], scratch[2]
    best_codes, trial_codes = scratch_codes[0], scratch_codes[1]
    n = best.size
    start = q * n
    best[:], best_codes[:] = values[start : start + n], codes[start : start + n]
    s0, o0 = scale[q], offset[q]
    s1, o1 = s0, o0
    best_change = np.float32(0)
    has_offset = bounds[2] < bounds[3]
    n_s = reach if bounds[0] < bounds[1] else 0
    n_o = reach if has_offset and mantissa < 0 else 0
    n_nearby = (2 * n_s + 1) * (2 * n_o + 1)
    # of NVFP4 four over six; last, of floats, the least squares for the best codes so far
    last = n_nearby + (1 if mantissa == 3 else 0)
    for number in range(last + 1 if n_s > 0 and mantissa >= 0 else n_nearby):
        if number < n_nearby:
            s, o = _nearby(number, s0, o0, n_s, n_o, mantissa, lowest)
        elif number < last:
            s, o = _snap(np.float32(1.5) * s0, mantissa, lowest), o0
        else:
            x, y = _least_squares(
                start, best, best_codes, levels, values, gradient, hessian, trial, trial_gradient,
                has_offset,
            )  # fmt: skip
            s, o = _snap(s1 + x, mantissa, lowest), o1
            if has_offset:
                o = _snap(o1 + y, mantissa, lowest)
        is_own = number == n_nearby // 2
        fits = bounds[0] <= s <= bounds[1] and bounds[2] <= o <= bounds[3]
        if not is_own and (not fits or (s == s0 and o == o0) or (s == s1 and o == o1)):
            continue
        change = _descend_group(
            start, start + n, unit_scale[q] * s, unit_offset[q] * o, values, gradient, hessian,
            inverse_diagonal, levels, step, trial, trial_gradient, trial_codes,
        )  # fmt: skip
        if change < best_change:
            best_change = change
            s1, o1 = s, o
            best[:], best_codes[:] = trial, trial_codes
    scale[q], offset[q] = s1, o1
    _set_group(start, best, best_codes, values, gradient, codes, hessian)


@kernel(reorder=True)
def _set_group(
    start: int,
    group: Floats,
    group_codes: Bytes,
    values: Floats,
    gradient: Floats,
    codes: Bytes,
    hessian: Floats,
) -> None:
    """Set a group of one row, and the row's gradient to what that makes of it."""
    for i in range(group.size):
        j = start + i
        delta = group[i] - values[j]
        codes[j] = group_codes[i]
        values[j] = group[i]
        if delta != np.float32(0):
            for k in range(gradient.size):
                gradient[k] += delta * hessian[j, k]


@kernel(parallel=True, reorder=True)
def descend(
    gradient: Floats,
    hessian: Floats,
    inverse_diagonal: Floats,
    levels: Floats,
    step: np.float32,
    group_size: int,
    unit_scale: Floats,
    unit_offset: Floats,
    scale: Floats,
    offset: Floats,
    bounds: Floats,
    mantissa: int,
    lowest: int,
    codes: Bytes,
    values: Floats,
    reach: int,
    n_passes: int,
) -> None:
    """Lower each row's loss over one block of columns: codes, and the groups' scales and offsets.

    Parameters
    ----------
    gradient : (n_rows, m) (E H) at the block's columns, written
    hessian : (m, m) of the block; inverse_diagonal (m,)
    unit_scale, unit_offset : (n_rows, m / group_size) what `scale` and `offset` are multiples of
    scale, offset : (n_rows, m / group_size) written: whole numbers or floats of the file
    bounds : (4,) least and greatest scale, least and greatest offset; equal: it is fixed
    mantissa : bits of the file's scales; -1: whole numbers
    lowest : exponent below which these floats lose bits
    codes, values : (n_rows, m) written
    reach : how many scales are tried to both sides; 0: scales stay
    n_passes : times that all columns are visited; scales are tried in the first
    """
    n_rows, m = values.shape
    for row in numba.prange(n_rows):
        scratch = np.empty((3, group_size), np.float32)
        scratch_codes = np.empty((2, group_size), np.uint8)
        grid = (levels, step, bounds, mantissa, lowest)
        for p in range(n_passes):
            for q in range(m // group_size):
                _visit_group(
                    q, reach if p == 0 else 0, unit_scale[row], unit_offset[row], scale[row],
                    offset[row], values[row], gradient[row], codes[row], hessian,
                    inverse_diagonal, grid, scratch, scratch_codes,
                )  # fmt: skip


@kernel(parallel=True, reorder=True)
def refit(
    gradient: Floats,
    hessian: Floats,
    levels: Floats,
    group_size: int,
    sub_scale: Floats,
    sub_offset: Floats,
    codes: Bytes,
    steps: Floats,
) -> None:
    """Find the least-squares change of each row's super-block scale and offset, codes as they are.

    Parameters
    ----------
    gradient : (n_rows, m) (E H) at the block's columns
    hessian : (m, m)
    steps : (n_rows, 7) written: the two changes, and a, b of the linear and p, q, r of the
        quadratic part of the loss change a x + b y + ½ p x² + q x y + ½ r y²

    References
    ----------
    Guo et al., decoupleQ, arXiv:2404.12759, section 3.3.
    """
    n_rows, m = codes.shape
    for row in numba.prange(n_rows):
        basis = np.empty(m, np.float32)
        other = np.empty(m, np.float32)
        has_offset = False
        for j in range(m):
            basis[j] = sub_scale[row, j // group_size] * levels[codes[row, j]]
            other[j] = sub_offset[row, j // group_size]
            has_offset = has_offset or other[j] != np.float32(0)
        a = b = pp = qq = rr = np.float32(0)
        for j in range(m):
            a += gradient[row, j] * basis[j]
            b += gradient[row, j] * other[j]
            x = y = np.float32(0)
            for k in range(m):
                x += hessian[j, k] * basis[k]
            pp += x * basis[j]
            qq += x * other[j]
            if has_offset:
                for k in range(m):
                    y += hessian[j, k] * other[k]
                rr += y * other[j]
        steps[row, 2] = a
        steps[row, 3] = b
        steps[row, 4] = pp
        steps[row, 5] = qq
        steps[row, 6] = rr
        steps[row, 0], steps[row, 1] = _minimum(a, b, pp, qq, rr, has_offset, np.float32(1e-6))
