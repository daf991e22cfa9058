"""How codes are chosen. A solver is `(problem, guess, key) -> (better guess, info)`; chain them."""

from brecq_jax.solvers._loop import compiled_programs
from brecq_jax.solvers._roundings import RectifiedSigmoid, StraightThrough
from brecq_jax.solvers._solver import Info, Solver, chain
from brecq_jax.solvers._walk import fisher_error, position_error, relative_error, squared_error
from brecq_jax.solvers.distilled import Distillation, binarybert, distilled
from brecq_jax.solvers.lapq import Lapq, lapq
from brecq_jax.solvers.multipoint import multipoint
from brecq_jax.solvers.named import adaround, annealed, brecq, by_name, genie, qdrop, refined
from brecq_jax.solvers.nearest import nearest
from brecq_jax.solvers.reconstruct import Prediction, Reconstruction, reconstruct
from brecq_jax.solvers.second_order import SecondOrder, second_order

__all__ = [
    "Distillation", "Info", "Lapq", "Prediction", "Reconstruction", "RectifiedSigmoid", "SecondOrder", "Solver", "StraightThrough", "adaround", "annealed", "binarybert", "brecq", "by_name", "chain",
    "compiled_programs", "distilled", "fisher_error", "genie", "lapq", "multipoint", "nearest", "position_error", "qdrop", "reconstruct", "refined", "relative_error", "second_order", "squared_error",
]  # fmt: skip
