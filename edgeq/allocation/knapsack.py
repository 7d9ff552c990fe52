"""The multiple-choice knapsack: the best types for additive losses, with a certified gap.

One candidate of every tensor is chosen, min Σ loss subject to Σ bytes <= B, or the other way round.
The Lagrangian relaxation solves it up to a few tensors at once and tells which candidates can be in
no optimum; the rest is a small integer program for HiGHS.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import optimize, sparse

from edgeq.allocation.costs import Allocation, Budget, Choice, Costs, Problem, check_feasible
from edgeq.errors import RecipeError

Doubles = npt.NDArray[np.float64]
_BISECTIONS = 200
_TINY = 1e-15  # of the limit: nothing weighs less
_FEASIBILITY = 1e-6  # HiGHS' tolerance, relative to a limit
_SLACK = 1e-9  # relative, of sums of float losses


@dataclass(frozen=True)
class Knapsack:
    """The best choice for the sum of losses.

    Attributes
    ----------
    gap : relative, at which the search ends
    seconds : after which it ends anyway; the gap that was reached is told

    References
    ----------
    Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), chapter 11: the relaxation and the
    removal of candidates by their reduced costs.
    """

    gap: float = 1e-6
    seconds: float = 10.0

    def allocate(self, problem: Problem, budget: Budget) -> Allocation:
        """Return the choice of least loss within the bytes, or of least bytes within the loss.

        Its facts are ``loss``, ``size_bytes`` and ``gap``: how far, relative, it can be from the
        optimum at most, for limits that are exact to a millionth (HiGHS' tolerance).

        Raises
        ------
        RecipeError
            Nothing is within the budget; the message names the nearest that is.
        """
        costs = problem.costs
        check_feasible(costs, budget)
        table = _Table.of(costs, needs_seconds=budget.seconds is not None)
        if budget.size_bytes is not None:
            objective, weight = table.loss, table.size
            limit = float(budget.size_bytes - costs.fixed_bytes)
        else:
            objective, weight = table.size, table.loss
            limit = float(budget.loss or 0.0) * (1 + _SLACK)
            _check_loss(table, limit)
        rows, bound = self._solve(table, objective, weight, limit, budget.seconds)
        choice = table.choice(rows)
        value = float(objective[rows].sum())
        gap = max(0.0, (value - bound) / value) if value > 0 else 0.0
        facts = {"loss": costs.loss(choice), "size_bytes": float(costs.size_bytes(choice))}
        return Allocation(choice, {**facts, "gap": gap})

    def _solve(
        self,
        table: "_Table",
        objective: Doubles,
        weight: Doubles,
        limit: float,
        seconds: float | None,
    ) -> tuple[npt.NDArray[np.intp], float]:
        """Return the chosen row of every tensor, and a lower bound of the objective."""
        left = np.ones(len(objective), bool)
        best: npt.NDArray[np.intp] | None = None
        bound = -np.inf
        if seconds is None:
            best, bound, reduced = _relaxed(table, objective, weight, limit)
            value = float(objective[best].sum())
            if value - bound <= self.gap * abs(value):
                return best, bound
            left = bound + reduced <= value * (1 + _SLACK)
            left[best] = True
        strict = limit * (1 - 2 * _FEASIBILITY) + (0.5 if weight is table.size else 0.0)
        found, dual = self._search(table, objective, weight, limit, seconds, left)
        if seconds is not None or (found is not None and weight[found].sum() > limit):
            found, _ = self._search(
                table, objective, weight, strict, seconds, left
            )  # really within
        if found is not None and seconds is None:
            found = _repaired(table, found, objective, weight, limit)
        if found is None and best is None:
            raise RecipeError(_too_slow(table, seconds))
        choices = [rows for rows in (found, best) if rows is not None]
        return min(choices, key=lambda rows: float(objective[rows].sum())), max(bound, dual)

    def _search(
        self,
        table: "_Table",
        objective: Doubles,
        weight: Doubles,
        limit: float,
        seconds: float | None,
        left: npt.NDArray[np.bool_],
    ) -> tuple[npt.NDArray[np.intp] | None, float]:
        """Solve the integer program on the rows that are left; also return its lower bound."""
        rows = np.flatnonzero(left)
        n = len(rows)
        scale = max(float(objective[rows].sum()) / n, 1e-300)
        one_each = sparse.csr_array(
            (np.ones(n), (table.tensor[rows], np.arange(n))), (table.n_tensors, n)
        )
        limits = [
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(weight[rows][None, :] / max(limit, 1e-300), ub=1),
        ]
        if seconds is not None:
            limits.append(optimize.LinearConstraint(table.seconds[rows][None, :] / seconds, ub=1))
        with _silenced():
            found = optimize.milp(
                objective[rows] / scale,
                constraints=limits,
                integrality=np.ones(n),
                bounds=optimize.Bounds(0, 1),
                options={"mip_rel_gap": self.gap, "time_limit": self.seconds},
            )
        if found.x is None:
            return None, -np.inf
        chosen = np.full(table.n_tensors, -1, np.intp)
        order = np.argsort(found.x)  # the last one wins: the largest of a tensor's
        chosen[table.tensor[rows[order]]] = rows[order]
        return chosen, float(found.mip_dual_bound) * scale


def fitted(costs: Costs, choice: Choice, size_bytes: int) -> Choice:
    """Return the choice, changed as little as it takes to be within the bytes, and to use them.

    Steps are taken where they cost the least loss per byte, then where they gain the most.

    Raises
    ------
    RecipeError
        Even the smallest file is larger.
    """
    check_feasible(costs, Budget(size_bytes=size_bytes))
    table = _Table.of(costs, needs_seconds=False)
    rows = table.starts + np.array(choice, np.intp)
    return table.choice(
        _repaired(table, rows, table.loss, table.size, float(size_bytes - costs.fixed_bytes))
    )


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep what HiGHS prints (of scipy 1.17: lines for its developers) out of our output."""
    sys.stdout.flush()
    with Path(os.devnull).open("w") as nothing:
        kept = os.dup(1)
        os.dup2(nothing.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


@dataclass(frozen=True, eq=False)
class _Table:
    """All candidates of all tensors as columns, one tensor after the other.

    Attributes
    ----------
    tensor : which tensor a row belongs to
    index : which of its candidates it is
    starts : of each tensor's rows
    """

    tensor: npt.NDArray[np.intp]
    index: npt.NDArray[np.intp]
    starts: npt.NDArray[np.intp]
    loss: Doubles
    size: Doubles
    seconds: Doubles

    @classmethod
    def of(cls, costs: Costs, *, needs_seconds: bool) -> "_Table":
        counts = [len(tensor.candidates) for tensor in costs.tensors]
        candidates = [one for tensor in costs.tensors for one in tensor.candidates]
        seconds = [one.seconds for one in candidates]
        if needs_seconds and None in seconds:
            raise RecipeError(
                "budget: a time is given, but the costs hold none for some types. "
                "Measure the types first, or leave the time out."
            )
        return cls(
            np.repeat(np.arange(len(counts)), counts),
            np.concatenate([np.arange(count) for count in counts]),
            np.cumsum([0, *counts[:-1]]),
            np.array([one.loss for one in candidates]),
            np.array([one.size_bytes for one in candidates], np.float64),
            np.array([0.0 if spent is None else spent for spent in seconds]),
        )

    @property
    def n_tensors(self) -> int:
        return len(self.starts)

    def choice(self, rows: npt.NDArray[np.intp]) -> Choice:
        return tuple(int(i) for i in self.index[rows])

    def least(self, values: Doubles) -> npt.NDArray[np.intp]:
        """Return the row of the least value of every tensor, the first of equals."""
        order = np.lexsort((values, self.tensor))
        return order[self.starts]


def _relaxed(
    table: _Table, objective: Doubles, weight: Doubles, limit: float
) -> tuple[npt.NDArray[np.intp], float, Doubles]:
    """Return a choice within the limit, a lower bound, and every row's reduced cost."""
    low, high = 0.0, 1.0
    while weight[table.least(objective + high * weight)].sum() > limit and high < 1e30:
        low, high = high, 4 * high
    rows = table.least(objective + low * weight)
    if weight[rows].sum() > limit:
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            if not low < middle < high:
                break
            if weight[table.least(objective + middle * weight)].sum() > limit:
                low = middle
            else:
                high = middle
        rows = table.least(objective + high * weight)
        price = high
    else:
        price = low
    if weight[rows].sum() > limit:  # the lightest of equally priced rows fit
        rows = table.least(weight)
    priced = objective + price * weight
    least = priced[table.least(priced)]
    bound = float(least.sum() - price * limit)
    rows = _filled(table, rows, objective, weight, limit)
    return rows, bound, priced - least[table.tensor]


def _filled(
    table: _Table,
    rows: npt.NDArray[np.intp],
    objective: Doubles,
    weight: Doubles,
    limit: float,
) -> npt.NDArray[np.intp]:
    """Spend what is left of the limit, the best gain per weight first."""
    rows = rows.copy()
    while True:
        left = limit - weight[rows].sum()
        own = rows[table.tensor]
        gain, more = objective[own] - objective, weight - weight[own]
        fits = (gain > 0) & (more <= left)
        if not fits.any():
            return rows
        rate = np.where(fits, gain / np.maximum(more, _TINY * limit), -np.inf)
        best = int(np.argmax(rate))
        rows[table.tensor[best]] = best


def _repaired(
    table: _Table,
    rows: npt.NDArray[np.intp],
    objective: Doubles,
    weight: Doubles,
    limit: float,
) -> npt.NDArray[np.intp]:
    """Bring what HiGHS' tolerances let pass back under the limit, the cheapest step first."""
    rows = rows.copy()
    while weight[rows].sum() > limit:
        own = rows[table.tensor]
        less, worse = weight[own] - weight, objective - objective[own]
        best = int(np.argmin(np.where(less > 0, worse / np.maximum(less, _TINY * limit), np.inf)))
        if not less[best] > 0:
            break
        rows[table.tensor[best]] = best
    return _filled(table, rows, objective, weight, limit)


def _check_loss(table: _Table, limit: float) -> None:
    least = float(table.loss[table.least(table.loss)].sum())
    if least > limit:
        raise RecipeError(
            f"budget: a loss of {limit:.4g} cannot be reached with these types; the least is "
            f"{least:.4g}. Ask for no less, or allow larger types with --types."
        )


def _too_slow(table: _Table, seconds: float | None) -> str:
    least = float(table.seconds[table.least(table.seconds)].sum())
    return (
        f"budget: no choice takes {seconds} s a token within the other limits; the fastest types "
        f"take {least:.4g} s. Allow more time or bytes."
    )


def pareto_curve(costs: Costs) -> Iterator[tuple[int, float, Choice]]:
    """Yield (bytes of the file, loss, choice) along the whole curve, from the smallest file on.

    These are the optima of the Lagrangian relaxation for all prices at once: each is optimal for
    its own bytes. They lie on the lower convex hull; optima between them are ``Knapsack``'s.
    """
    steps = []
    start = []
    for number, tensor in enumerate(costs.tensors):
        hull = _hull([(one.size_bytes, one.loss) for one in tensor.candidates])
        start.append(hull[0])
        sizes = [tensor.candidates[i].size_bytes for i in hull]
        losses = [tensor.candidates[i].loss for i in hull]
        for at in range(1, len(hull)):
            rate = (losses[at - 1] - losses[at]) / (sizes[at] - sizes[at - 1])
            steps.append((-rate, number, at, hull[at]))
    choice = list(start)
    yield costs.size_bytes(tuple(choice)), costs.loss(tuple(choice)), tuple(choice)
    for _, number, _, index in sorted(steps):
        choice[number] = index
        yield costs.size_bytes(tuple(choice)), costs.loss(tuple(choice)), tuple(choice)


def _hull(points: list[tuple[int, float]]) -> list[int]:
    """Return the indices of the falling lower convex hull, by rising size."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    hull: list[int] = []
    for i in order:
        if hull and points[i][1] >= points[hull[-1]][1]:
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1), (x2, y2) = (points[j] for j in (hull[-2], hull[-1], i))
            if (y1 - y0) * (x2 - x0) < (y2 - y0) * (x1 - x0):
                break
            hull.pop()
        if hull and points[i][0] == points[hull[-1]][0]:
            hull.pop()
        hull.append(i)
    return hull
