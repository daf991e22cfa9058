"""How codes are chosen. A solver is `(problem, guess, key) -> (better guess, info)`; chain them."""

from brecq_jax.solvers._solver import Info, Solver, chain
from brecq_jax.solvers.nearest import nearest
from brecq_jax.solvers.reconstruct import (
    Reconstruction,
    adaround,
    brecq,
    by_name,
    compiled_programs,
    fisher_error,
    reconstruct,
    squared_error,
)
from brecq_jax.solvers.second_order import second_order

__all__ = [
    "Info", "Reconstruction", "Solver", "adaround", "brecq", "by_name", "chain", "compiled_programs", "fisher_error", "nearest", "reconstruct", "second_order", "squared_error",
]  # fmt: skip
