"""Which format where: the plan of least predicted loss within a budget."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from brecq_jax._graph import Graph
from brecq_jax._plan import Plan, Rules
from brecq_jax.mixed_precision._table import Table, choices_of, make_table, to_plan
from brecq_jax.mixed_precision.costs import Budget, Latency
from brecq_jax.mixed_precision.exact import cheapest, exact
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
      ValueError: no bound, a latency without its table, sensitivities of another model, or a budget that no plan meets (the message
        says what the cheapest one costs).
    """
    table = make_table(graph, sensitivities, weights, activations, latency)
    return _point(table, graph, sensitivities, _best(table, budget, latency, solver, key)).plan


def pareto(
    graph: Graph, sensitivities: Sensitivities, budgets: Sequence[Budget], *, weights: Rules = None, activations: Rules = None,
    latency: Latency | None = None, solver: Callable = exact, key: jax.Array | None = None,
) -> list[Point]:  # fmt: skip
    """`search` for each budget: with `solver=exact` the plans that nothing beats in loss and in what the budgets bound."""
    table = make_table(graph, sensitivities, weights, activations, latency)
    return [_point(table, graph, sensitivities, _best(table, budget, latency, solver, key)) for budget in budgets]


def predict(
    graph: Graph, sensitivities: Sensitivities, plan: Plan, *, weights: Rules = None, activations: Rules = None, latency: Latency | None = None
) -> Point:
    """Predicted loss and costs of any plan of the choices."""
    table = make_table(graph, sensitivities, weights, activations, latency)
    return _point(table, graph, sensitivities, choices_of(table, graph, plan)[0])


def _best(table: Table, budget: Budget, latency: Latency | None, solver: Callable, key) -> np.ndarray:
    limits = budget.limits
    if not limits:
        raise ValueError("budget: nothing is bounded. Write Budget(size_bits=…), bops=… or latency_us=….")
    if "latency_us" in limits and latency is None:
        raise ValueError("budget: latency_us needs a table: write latency=SystolicArray().latency(graph), measure_latency(graph) or read_latency(path).")
    for name, limit in limits.items():
        least = table.cost(name, cheapest(table, name)[None])[0]
        if least > limit:
            raise ValueError(f"budget: {name}={limit:.10g} cannot be met: the cheapest plan has {least:.10g}. Write at least that.")
    found = solver(table, limits, key)
    if found is None:
        raise ValueError(f"budget: no plan was found that meets all of {limits}, though each alone can be met. Raise one of them.")
    return found


def _point(table: Table, graph: Graph, sensitivities: Sensitivities, choices: np.ndarray) -> Point:
    plan = to_plan(table, graph, choices, sensitivities.preset)
    costs = {name: float(table.cost(name, choices[None])[0]) for name, terms in table.costs.items() if terms}
    return Point(plan, float(table.loss(choices[None])[0]), costs)
