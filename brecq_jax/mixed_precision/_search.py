"""Which format where: the plan of least predicted loss within a budget."""

import decimal
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from brecq_jax._graph import Graph
from brecq_jax._plan import Plan, Rules
from brecq_jax.mixed_precision._table import Table, choices_of, make_table, to_plan
from brecq_jax.mixed_precision.costs import Budget, Latency
from brecq_jax.mixed_precision.exact import cheapest, exact, last_resort
from brecq_jax.mixed_precision.sensitivities import Sensitivities


class Point(NamedTuple):
    """A plan with its predicted loss and its costs: size_bits, bops, and latency_us where there is a table."""

    plan: Plan
    loss: float
    costs: dict[str, float]


def search(
    graph: Graph,
    sensitivities: Sensitivities,
    budget: Budget,
    *,
    weights: Rules = None,
    activations: Rules = None,
    latency: Latency | None = None,
    solver: Callable = exact,
    key: jax.Array | None = None,
) -> Plan:
    """The plan of least predicted loss within the budget.

        plan = brecq_jax.search(graph, sensitivities, mixed_precision.Budget(size_bits=1e6))
        quantized = brecq_jax.quantize(params, apply_fn, calib_ds, **plan.rules)

    Args:
      weights, activations: rules by name win over the search. A single format is for what is neither ruled nor measured; None: the last
        choice, or float for activations that have no choices. The preset is the one that the sensitivities were measured with.
      latency: for `latency_us`: `SystolicArray().latency(graph)`, `measure_latency(graph)`, or `read_latency(path)`.
      solver: `exact`, or `Genetic()`.

    Raises:
      TypeError: a budget that is no `Budget`.
      ValueError: no bound, a latency without its table, sensitivities of another model or that are not finite, or a budget that no plan meets
        (the message says what the cheapest one costs).
    """
    table = make_table(graph, sensitivities, weights, activations, latency)
    return _point(table, graph, sensitivities, _best(table, budget, latency, solver, key)).plan


def pareto(
    graph: Graph, sensitivities: Sensitivities, budgets: Sequence[Budget] | None = None, *, points: int = 0, cost: str = "size_bits",
    weights: Rules = None, activations: Rules = None, latency: Latency | None = None, solver: Callable = exact, key: jax.Array | None = None,
) -> list[Point]:  # fmt: skip
    """`search` for each budget: with `solver=exact` the plans that nothing beats in loss and in what the budgets bound.

        front = mixed_precision.pareto(graph, sensitivities, points=12)

    Args:
      budgets: a point for each.
      points: in place of budgets, so many of them, evenly spaced in `cost` from the cheapest plan to the one of least loss.
      cost: size_bits, bops or latency_us.

    Raises:
      TypeError, ValueError: as `search`; of many budgets all that no plan meets are named. Budgets and points, or neither.
    """
    if isinstance(budgets, Budget):
        raise TypeError(f"pareto: budgets is {budgets}, a single one. Write [{budgets}], or points=12 for a whole front.")
    if (budgets is None) == (not points):
        raise ValueError(f"pareto: budgets={budgets}, points={points}. Give the one or the other.")
    table = make_table(graph, sensitivities, weights, activations, latency)
    if points:
        budgets = _spaced(table, cost, points, latency)
    found, refused = [], []
    for number, budget in enumerate(budgets):
        try:
            found.append(_point(table, graph, sensitivities, _best(table, budget, latency, solver, key)))
        except ValueError as error:
            refused.append(f"budgets[{number}]: {error}")
    if refused:
        raise ValueError("pareto: " + "\n  ".join(refused))
    return found


def predict(
    graph: Graph, sensitivities: Sensitivities, plan: Plan, *, weights: Rules = None, activations: Rules = None, latency: Latency | None = None
) -> Point:
    """Predicted loss and costs of any plan of the choices."""
    table = make_table(graph, sensitivities, weights, activations, latency)
    return _point(table, graph, sensitivities, choices_of(table, graph, plan)[0])


def _best(table: Table, budget: Budget, latency: Latency | None, solver: Callable, key) -> np.ndarray:
    if not isinstance(budget, Budget):
        raise TypeError(f"budget: {budget!r} is a {type(budget).__name__}. Write Budget(size_bits={budget!r}), bops=… or latency_us=….")
    limits = budget.limits
    if not limits:
        raise ValueError("budget: nothing is bounded. Write Budget(size_bits=…), bops=… or latency_us=….")
    _check_latency(limits, latency)
    for name, limit in limits.items():
        least = table.cost(name, cheapest(table, name)[None])[0]
        if least > limit:
            raise ValueError(f"budget: {name}={limit} cannot be met: the cheapest plan has {_upward(least)}. Write at least that.")
    found = solver(table, limits, key)
    if found is None:
        raise ValueError(_why_not(table, limits))
    return found


def _why_not(table: Table, limits: dict[str, float]) -> str:
    """What is wrong with limits each of which alone can be met."""
    all_of = " and ".join(f"{name}={limit}" for name, limit in limits.items())
    if last_resort(table, limits) is not None:
        return f"budget: the solver found no plan with {all_of}, though there is one. Write solver=exact."
    least = []
    for name in limits:
        rest = {n: v for n, v in limits.items() if n != name}
        plan = cheapest(table, name, rest)
        if plan is not None:
            kept = " and ".join(f"{n}={v}" for n, v in rest.items())
            least.append(f"with {kept} the cheapest plan has {name}={_upward(table.cost(name, plan[None])[0])}")
    ends = f"{'; '.join(least)}. Write at least one of these." if least else "nor can any two of them. Raise two or more."
    return f"budget: {all_of} cannot be met together, though each alone can: {ends}"


def _spaced(table: Table, cost: str, points: int, latency: Latency | None) -> list[Budget]:
    if cost not in table.costs or points < 2:
        raise ValueError(f"pareto: cost={cost!r}, points={points}: write one of {', '.join(table.costs)}, and two points or more.")
    _check_latency((cost,), latency)
    low, high = (float(table.cost(cost, choices[None])[0]) for choices in (cheapest(table, cost), exact(table, {})))
    return [Budget(**{cost: float(limit)}) for limit in np.linspace(low, high, points)]


def _check_latency(bounded, latency: Latency | None):
    """Raise ValueError if latency is bounded, and there is no table."""
    if "latency_us" in bounded and latency is None:
        raise ValueError("budget: latency_us needs a table: write latency=SystolicArray().latency(graph), measure_latency(graph) or read_latency(path).")


def _upward(value: float) -> str:
    """A figure to write: in ten digits, and never below the value."""
    value = float(value)
    return f"{value:.0f}" if value == round(value) else str(decimal.Context(10, decimal.ROUND_CEILING).create_decimal(value))


def _point(table: Table, graph: Graph, sensitivities: Sensitivities, choices: np.ndarray) -> Point:
    plan = to_plan(table, graph, choices, sensitivities.preset)
    costs = {name: float(table.cost(name, choices[None])[0]) for name, terms in table.costs.items() if terms}
    return Point(plan, float(table.loss(choices[None])[0]), costs)
