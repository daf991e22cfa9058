"""Which format where: sensitivities of layers, costs of plans, and the search between them."""

from brecq_jax.mixed_precision._search import Point, pareto, predict, search
from brecq_jax.mixed_precision._table import plan_costs
from brecq_jax.mixed_precision.costs import FLOAT_BITS, Budget, Latency, SystolicArray, read_latency, write_latency
from brecq_jax.mixed_precision.exact import exact
from brecq_jax.mixed_precision.genetic import Genetic
from brecq_jax.mixed_precision.latency import measure_latency
from brecq_jax.mixed_precision.plots import plot_sensitivities
from brecq_jax.mixed_precision.rules import load_rules, save_rules
from brecq_jax.mixed_precision.sensitivities import Sensitivities, divergence, measure

__all__ = [
    "Budget", "FLOAT_BITS", "Genetic", "Latency", "Point", "Sensitivities", "SystolicArray", "divergence", "exact", "load_rules", "measure",
    "measure_latency", "pareto", "plan_costs", "plot_sensitivities", "predict", "read_latency", "save_rules", "search", "write_latency",
]  # fmt: skip
