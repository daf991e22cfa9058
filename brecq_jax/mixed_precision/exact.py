"""The optimum of a table under budgets, by integer programming."""

from collections.abc import Mapping

import jax
import numpy as np
from scipy import optimize, sparse

from brecq_jax.mixed_precision._table import Table

TIGHTER = (0.0, 1e-7, 1e-5)  # of a budget: the programme's own tolerance may overstep it by less


def exact(table: Table, limits: Mapping[str, float], key: jax.Array | None = None) -> np.ndarray | None:
    """The choices of least loss within the limits, one for each decision; None if there are none.

    An option is a 0/1 variable. A set of decisions that interact is a variable that is 1 if all are at option 0; a pair of decisions
    that cost together has one for each pair of options, whose sums are those of the options. HiGHS solves it; `key` is not used.
    """
    found = _solve_within(table, limits)
    return last_resort(table, limits) if found is None else found


def cheapest(table: Table, name: str, limits: Mapping[str, float] | None = None) -> np.ndarray | None:
    """The choices of least cost within limits on other costs; None if there are none."""
    found = _solve_within(table, limits or {}, name)
    return last_resort(table, limits) if found is None and limits else found


def last_resort(table: Table, limits: Mapping[str, float]) -> np.ndarray | None:
    """Of the plans that are cheapest in one cost within the limits on the others, the one of least loss; None where nothing is within them all.

    It is there where `exact` finds nothing, because a limit leaves no more room than the programme's tolerance, and for `Genetic`.
    """
    found = [cheapest(table, name, {n: v for n, v in limits.items() if n != name}) for name in limits]
    found = [own for own in found if own is not None and within(table, limits, own[None])[0]]
    return min(found, key=lambda own: table.loss(own[None])[0], default=None)


def within(table: Table, limits: Mapping[str, float], choices: np.ndarray) -> np.ndarray:
    """Which rows of choices meet all limits."""
    return np.all([np.ones(len(choices), bool), *(table.cost(name, choices) <= limit for name, limit in limits.items())], axis=0)


def _solve_within(table: Table, limits: Mapping[str, float], objective: str | None = None) -> np.ndarray | None:
    for tighter in TIGHTER:
        found = _solve(table, limits, tighter, objective)
        if found is None or within(table, limits, found[None])[0]:
            return found
    return None


def _solve(table: Table, limits: Mapping[str, float], tighter: float, objective: str | None = None) -> np.ndarray | None:
    """The choices of least loss, or of least `objective`, a cost, within the limits less a part of them."""
    sizes = [len(own) for own in table.options]
    first = np.cumsum([0, *sizes])  # the variable of a decision's option 0
    rows = _Rows(first[-1])
    for d, size in enumerate(sizes):
        rows.add({first[d] + k: 1.0 for k in range(size)}, 1, 1)
    used = [*limits, *([objective] if objective else [])]
    pairs: dict[tuple[int, int], int] = {}
    for d, e in dict.fromkeys(t.decisions for n in used for t in table.costs[n] if len(t.decisions) == 2):
        if sizes[d] > 1 and sizes[e] > 1:
            start = pairs[d, e] = rows.variables(sizes[d] * sizes[e])
            for k in range(sizes[d]):
                rows.add({first[d] + k: -1.0} | {start + k * sizes[e] + j: 1.0 for j in range(sizes[e])}, 0, 0)
            for j in range(sizes[e]):
                rows.add({first[e] + j: -1.0} | {start + k * sizes[e] + j: 1.0 for k in range(sizes[d])}, 0, 0)
    goal: dict[int, float] = {}
    if not objective:
        for d, values in enumerate(table.losses):
            goal |= {first[d] + k: float(v) for k, v in enumerate(values)}
        for members, value in table.interactions:
            both = rows.variables(1)
            goal[both] = value
            for d in members:
                rows.add({both: 1.0, first[d]: -1.0}, -np.inf, 0)
            rows.add({both: -1.0} | {first[d]: 1.0 for d in members}, -np.inf, len(members) - 1)
    for name in used:
        costs: dict[int, float] = {}
        for term in table.costs[name]:
            for variable, value in _spread(term, sizes, first, pairs):
                costs[variable] = costs.get(variable, 0.0) + value
        if name == objective:
            goal = costs
        else:
            limit = limits[name] - table.constants[name]
            if limit < 0:
                return None
            rows.add({v: c / (limit or 1.0) for v, c in costs.items()}, -np.inf, float(limit > 0) * (1 - tighter))
    return rows.minimise(goal, first[:-1], sizes)


def _spread(term, sizes, first, pairs):
    """(variable, value) of a term."""
    if len(term.decisions) == 1:
        return [(first[term.decisions[0]] + k, v) for k, v in enumerate(term.values)]
    d, e = term.decisions
    if (d, e) in pairs:
        return [(pairs[d, e] + n, v) for n, v in enumerate(term.values.ravel())]
    one = d if sizes[e] == 1 else e
    return [(first[one] + k, v) for k, v in enumerate(term.values.ravel())]


class _Rows:
    """Rows of an integer programme, as they are added."""

    def __init__(self, count: int):
        self.count, self.binary = count, count
        self.entries, self.low, self.high = [], [], []

    def variables(self, count: int) -> int:
        """That many more, between 0 and 1; the first one's number."""
        self.count += count
        return self.count - count

    def add(self, row: dict[int, float], low: float, high: float):
        self.entries += [(len(self.low), variable, value) for variable, value in row.items()]
        self.low.append(low)
        self.high.append(high)

    def minimise(self, goal: dict[int, float], first, sizes) -> np.ndarray | None:
        """The option of each decision, or None if no choice meets all rows."""
        c = np.zeros(self.count)
        c[list(goal)] = list(goal.values())
        r, v, values = zip(*self.entries, strict=True)
        matrix = sparse.csr_matrix((values, (r, v)), (len(self.low), self.count))
        # Without presolve HiGHS finds the same optimum as soon, and prints nothing.
        result = optimize.milp(
            c * 1e3 / max(np.abs(c).max(), 1e-300),  # tolerances are absolute
            integrality=np.arange(self.count) < self.binary, bounds=optimize.Bounds(0, 1),
            constraints=optimize.LinearConstraint(matrix, self.low, self.high), options={"mip_rel_gap": 0, "presolve": False},
        )  # fmt: skip
        if result.x is None:
            return None
        return np.array([int(np.argmax(result.x[f : f + size])) for f, size in zip(first, sizes, strict=True)])
