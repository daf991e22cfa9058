"""Round every weight to the nearest point of a grid fitted to it: the start of everything else."""

import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax._calibrate import Sample, observe
from brecq_jax._memory import STREAM
from brecq_jax._model import Problem, Quantized
from brecq_jax._qarray import quantize_array
from brecq_jax.formats import Format, Grid, PerToken
from brecq_jax.solvers._solver import Info, Solver


def nearest() -> Solver:
    """Nearest rounding of weights; activation grids fitted to what the model with rounded weights shows.

    Source: the grids are those of each format's range rule; nothing is learned.
    """

    def solve(problem: Problem, guess: Quantized, key: jax.Array) -> tuple[Quantized, Info]:
        return fit_activations(problem, round_weights(problem, guess)), ()

    return solve


def round_weights(problem: Problem, guess: Quantized) -> Quantized:
    """Every planned weight at the nearest point."""
    graph, leaves = problem.graph(min(STREAM, problem.count)), problem.leaves
    rounded = {}
    for name, format in problem.plan.weights.items():
        weight = graph.weights[name]
        if format is not None:
            leaf = leaves[weight.leaf]
            rounded[name] = quantize_array(leaf[weight.index] if weight.index else leaf, format, weight.channel_axes)
    return guess.with_weights(rounded, graph)


def fit_activations(problem: Problem, guess: Quantized, leaves: list[jax.Array] | None = None) -> Quantized:
    """Every planned activation's grid, fitted to the values seen with the guess's weights, or with those in `leaves`."""
    formats = {name: f for name, f in problem.plan.activations.items() if f is not None and not isinstance(f, PerToken)}
    if not formats:
        return guess
    leaves = jax.tree.leaves(guess.dequantized()) if leaves is None else leaves
    samples = observe(problem, leaves, tuple(formats))
    for name, sample in samples.items():
        if not np.isfinite(sample.values).all():
            raise ValueError(
                f"activations: {name} is not finite on the calibration inputs. Check params and inputs; where a mask is −inf, write a finite one."
            )
    return guess.with_activations({n: _fitted(n, format, samples[n]) for n, format in formats.items()})


def _fitted(name: str, format: Format, sample: Sample) -> Grid:
    try:
        return format.fit(*(jnp.asarray(a)[None] for a in sample))
    except ValueError as error:
        raise ValueError(f"activations: {name}: {error}") from None
