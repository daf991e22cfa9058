"""The search's problem as numbers: decisions, their options, losses and costs. Both solvers read it."""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from brecq_jax._graph import Graph
from brecq_jax._plan import Activation, Plan, Rules, describe, make_plan, size_bits
from brecq_jax.formats import Format
from brecq_jax.mixed_precision.costs import FLOAT_BITS, Latency, latency_of, macs, points, product_bits
from brecq_jax.mixed_precision.sensitivities import READS, Sensitivities, decision


class Term(NamedTuple):
    """A part of a cost, by the options that one or two decisions take: `values[k]` or `values[k, j]`."""

    decisions: tuple[int, ...]
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Table:
    """Choose an option for each decision. Loss = Σ losses[d][k_d] + Σ of the interactions whose decisions are all at option 0."""

    decisions: tuple[str, ...]
    options: tuple[tuple[Format | None, ...], ...]
    losses: tuple[np.ndarray, ...]
    interactions: tuple[tuple[tuple[int, ...], float], ...]
    costs: Mapping[str, tuple[Term, ...]]
    constants: Mapping[str, float]  # costs that nothing changes

    def loss(self, choices: np.ndarray) -> np.ndarray:
        """Of each row of choices (rows, decisions)."""
        total = sum((values[choices[:, d]] for d, values in enumerate(self.losses)), np.zeros(len(choices)))
        for members, value in self.interactions:
            total = total + value * np.all(choices[:, list(members)] == 0, axis=1)
        return total

    def cost(self, name: str, choices: np.ndarray) -> np.ndarray:
        """Of each row of choices."""
        total = np.full(len(choices), float(self.constants[name]))
        for term in self.costs[name]:
            total = total + term.values[tuple(choices[:, d] for d in term.decisions)]
        return total


def make_table(
    graph: Graph, sensitivities: Sensitivities, weights: Rules, activations: Rules, latency: Latency | None
) -> Table:
    """The table of all decisions that are open: measured, and not ruled by name. See `search` for the arguments.

    Raises:
      ValueError: nothing is open, the sensitivities are of another model, or one that is open is not finite.
    """
    ruled = make_plan(graph, weights, activations, sensitivities.preset)
    rest = make_plan(graph, _rest(weights, sensitivities.weights), _rest(activations, sensitivities.activations), sensitivities.preset)
    formats: dict[str, tuple[Format | None, ...]] = {}
    for name in graph.weights:
        own = decision(graph, name)
        open = own in sensitivities.losses
        formats[own] = (ruled.weights[name],) if _names(weights, name) else sensitivities.weights if open else (rest.weights[name],)
    for name in rest.activations:
        open = READS + name in sensitivities.losses
        formats[READS + name] = (
            (ruled.activations[name],) if _names(activations, name) else sensitivities.activations if open else (rest.activations[name],)
        )
    unknown = set(sensitivities.losses) - set(formats)
    if unknown:
        raise ValueError(f"search: the sensitivities are of another model: it has no {', '.join(sorted(unknown)[:5])}. Measure this one.")
    if all(len(own) == 1 for own in formats.values()):
        raise ValueError("search: nothing is open: rules and preset fix every format that was measured.")
    names = tuple(formats)
    at = {name: d for d, name in enumerate(names)}
    losses = []
    for name, own in formats.items():
        choices = sensitivities.activations if name.startswith(READS) else sensitivities.weights
        known = dict(zip(choices, sensitivities.losses.get(name, ()), strict=False))
        values = np.array([known.get(format, 0.0) for format in own])
        if len(own) > 1 and not np.isfinite(values).all():
            raise ValueError(f"search: the sensitivities of {name} are {values.tolist()}. Measure with finite inputs, or give it a format by rule.")
        losses.append(np.where(np.isfinite(values), values, 0.0))  # of one option: a constant
    lowest = sensitivities.weights[0]
    together = tuple(
        (tuple(at[n] for n in members), value)
        for members, value in sensitivities.interactions.items()
        if all(formats[n][0] == lowest for n in members)
    )
    for members, value in together:
        if not np.isfinite(value):
            shown = ", ".join(names[d] for d in members)
            raise ValueError(f"search: the interaction of {shown} is {value}. Measure with finite inputs, or give one another format by rule.")
    costs, constants = _costs(graph, at, formats, latency)
    return Table(names, tuple(formats.values()), tuple(losses), together, costs, constants)


def choices_of(table: Table, graph: Graph, plan: Plan) -> np.ndarray:
    """The row of choices that a plan makes; (1, decisions).

    Raises:
      ValueError: the plan has a format that is no option.
    """
    formats = {decision(graph, n): f for n, f in plan.weights.items()} | {READS + n: f for n, f in plan.activations.items()}
    row = []
    for name, options in zip(table.decisions, table.options, strict=True):
        if formats[name] not in options:
            raise ValueError(f"plan: {name} is {describe(formats[name])}, and may be {', '.join(map(describe, options))}.")
        row.append(options.index(formats[name]))
    return np.array([row])


def to_plan(table: Table, graph: Graph, choices: np.ndarray, preset: str | None) -> Plan:
    """The plan of one row of choices."""
    chosen = {name: options[k] for name, options, k in zip(table.decisions, table.options, choices, strict=True)}
    weights = {re.escape(n): chosen[decision(graph, n)] for n in graph.weights}
    activations = {re.escape(n.removeprefix(READS)): format for n, format in chosen.items() if n.startswith(READS)}
    return make_plan(graph, weights, activations, preset)


def plan_costs(graph: Graph, plan: Plan, latency: Latency | None = None) -> dict[str, float]:
    """What any plan costs, in the terms of a `Budget`: size_bits, bops, and latency_us where there is a table.

    Raises:
      ValueError: the table has no entry for bits of the plan.
    """
    formats = {decision(graph, n): (f,) for n, f in plan.weights.items()} | {READS + n: (f,) for n, f in plan.activations.items()}
    terms, constants = _costs(graph, {name: d for d, name in enumerate(formats)}, formats, latency)
    return {name: constants[name] + float(sum(term.values.item() for term in own)) for name, own in terms.items() if own}


def _rest(rules: Rules, choices) -> Format | Activation | None:
    """What is neither named by a rule nor measured gets."""
    return rules if rules is not None and not isinstance(rules, Mapping) else choices[-1] if choices else None


def _names(rules: Rules, name: str) -> bool:
    return isinstance(rules, Mapping) and any(re.fullmatch(pattern, name) for pattern in rules)


def _products(left, right) -> np.ndarray:
    """Bits × bits of each pair of options."""
    return np.outer(*([product_bits(format) for format in own] for own in (left, right))).astype(float)


def _us(latency: Latency, op: str, weight: Format | None, read: Activation | None) -> float:
    """The table's entry for each of the weight's points."""
    of_one, of_read = (f.bits if f else FLOAT_BITS for f in (weight, read))
    return points(weight) * latency_of(latency, op, of_one, of_read)


def _costs(graph: Graph, at, formats, latency: Latency | None) -> tuple[dict[str, tuple[Term, ...]], dict[str, float]]:
    terms: dict[str, list[Term]] = {"size_bits": [], "bops": [], "latency_us": []}
    for name, weight in graph.weights.items():
        own = decision(graph, name)
        terms["size_bits"].append(Term((at[own],), np.array([size_bits(weight, f) for f in formats[own]], float)))
    for op in graph.ops:
        if op.kind == "embed":
            continue
        own, read = decision(graph, op.weight), READS + op.site
        pair = (at[own], at[read])
        terms["bops"].append(Term(pair, macs(graph, op) * _products(formats[own], formats[read])))
        if latency is not None:
            terms["latency_us"].append(Term(pair, np.array([[_us(latency, op.name, w, a) for a in formats[read]] for w in formats[own]])))
    for product in graph.products:
        pair = [READS + factor.site for factor in (product.factors[0], product.factors[-1])]
        values = macs(graph, product) * _products(*(formats[n] for n in pair))
        same = pair[0] == pair[1]
        terms["bops"].append(Term((at[pair[0]],), np.diag(values)) if same else Term((at[pair[0]], at[pair[1]]), values))
    return {name: tuple(own) for name, own in terms.items()}, {"size_bits": float(graph.other_bits), "bops": 0.0, "latency_us": 0.0}
