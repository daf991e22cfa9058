"""What a solver is: (problem, guess, key) -> (better guess, info)."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from brecq_jax._model import Problem, Quantized

Info = tuple[dict[str, Any], ...]  # plain records, one per block that was worked on; for the report, no code reads them
Solver = Callable[[Problem, Quantized, jax.Array], tuple[Quantized, Info]]

HELD_OUT = 8  # one calibration example in so many judges, and is not learned from


def chain(*solvers: Solver) -> Solver:
    """Each solver starts from what the one before it found."""

    def solve(problem: Problem, guess: Quantized, key: jax.Array) -> tuple[Quantized, Info]:
        infos: Info = ()
        for solver, own_key in zip(solvers, jax.random.split(key, max(len(solvers), 1)), strict=False):
            guess, info = solver(problem, guess, own_key)
            infos += info
        return guess, infos

    return solve


def split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the examples that are learned from, and of those that judge: evenly spread, the same always.

    With fewer than 8 examples all of them do both.
    """
    everything = np.arange(count)
    judge = everything % HELD_OUT == HELD_OUT - 1
    return (everything[~judge], everything[judge]) if judge.any() else (everything, everything)
