"""How many points each channel of a `Multipoint` weight has, chosen by what its op loses on the calibration inputs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax._interpret import Block, LocalOp, Program, param_values
from brecq_jax._model import Problem, Quantized
from brecq_jax._qarray import QArray, float_rows, from_rows, quantize_array
from brecq_jax.formats import Multipoint
from brecq_jax.solvers import _quadratic
from brecq_jax.solvers._solver import Info, Solver
from brecq_jax.solvers._walk import Stage, Unit, Walk
from brecq_jax.solvers.nearest import fit_activations

ROWS = 131_072  # output positions that a Gram matrix is summed over, as in second-order rounding


def multipoint() -> Solver:
    """Every `Multipoint` channel starts with one point, and has more while ‖X(w − ŵ)‖/‖Xw‖ exceeds its format's tolerance.

    X are the op's inputs from the already-quantized prefix, over the calibration set. A block in which some channels want more, and
    whose held-out error they do not lower, keeps its guess, or one point if that errs less. Where the guess is not nearest rounding
    but was learned, in a chain, a block takes other points only if they err less than its guess.
    Ops that read their weight through arithmetic, and lookups, keep their guess.
    Source: Liu et al. 2020, https://arxiv.org/abs/2002.09049, adaptive number of points, with our candidates for scales.
    """

    def solve(problem: Problem, guess: Quantized, key: jax.Array) -> tuple[Quantized, Info]:
        walk, single = Walk(problem), {}
        weights = [_weights(walk, block, guess) for block in walk.blocks]
        if not any(weights):
            raise ValueError("solvers.multipoint: no op's weight is planned as Multipoint. Write weights=formats.Multipoint(3), or another solver.")
        for each in weights:
            if all(_is_nearest(weight, q) for weight, q in each.values()):
                single |= {name: _single_point(weight, q) for name, (weight, q) in each.items()}
        stage = Stage("points", 0, functools.partial(_better, walk, guess, frozenset(single)))
        model, info = walk.improve(guess.with_weights(single, walk.graph), [stage])
        return (guess if _alike(model.params, guess.params) else fit_activations(problem, model)), info

    return solve


def _weights(walk: Walk, block: Block, guess: Quantized) -> dict[str, tuple[jax.Array, QArray]]:
    """(float, guess) of each weight of a block whose points are chosen here."""
    floats, found = param_values(walk.graph, block, walk.leaves), {}
    for op, local in zip(block.ops, block.program.ops, strict=True):
        q = guess.weight(walk.graph.weights[op.weight])
        if _readable(q, block.program, local):
            found[op.weight] = floats[local.weight], q
    return found


def _is_nearest(weight: jax.Array, q: QArray) -> bool:
    """Whether a guess is what every solver starts from, so that nothing learned is lost with it."""
    return _alike(quantize_array(weight, q.format, q.channel_axes), q)


def _alike(left, right) -> bool:
    return all(map(np.array_equal, *map(jax.tree.leaves, (left, right))))


def _single_point(weight: jax.Array, q: QArray) -> QArray:
    single = dataclasses.replace(q.format, tolerance=math.inf)
    return dataclasses.replace(quantize_array(weight, single, q.channel_axes), format=q.format)


def _better(walk: Walk, guess: Quantized, single: frozenset[str], unit: Unit, current: Quantized) -> Quantized:
    """More points; the guess where `current` has one point, some channel wants more, and more do not err less."""
    found, names = _add_points(walk, unit, current), single.intersection(unit.weights)
    more = (found.weight(walk.graph.weights[name]) for name in names)
    if all(np.all(q.format.counts(q.grid) == 1) for q in more) or walk.judge(unit, found) < walk.judge(unit, current):
        return found
    return current.with_weights({name: guess.weight(walk.graph.weights[name]) for name in names}, walk.graph)


def _readable(q: QArray | None, program: Program, local: LocalOp) -> bool:
    planned = q is not None and isinstance(q.format, Multipoint)
    return planned and not _quadratic.unread(local, program.steps[local.step][0], q.channel_axes)


def _add_points(walk: Walk, unit: Unit, current: Quantized) -> Quantized:
    block, floats = unit.block, param_values(walk.graph, unit.block, walk.leaves)
    params, found = current.values(walk.graph, block), {}
    for number, (op, local) in enumerate(zip(block.ops, block.program.ops, strict=True)):
        q = current.weight(walk.graph.weights[op.weight])
        if op.weight not in unit.weights or op.weight in found or not _readable(q, block.program, local):
            continue
        gram = functools.partial(_quadratic.gram, block.program, number)
        total = walk.summed(op, block, [walk.rough], ROWS, gram, params, list(block.constants))
        codes, grid = _fit(q.format, float_rows(floats[local.weight], q.channel_axes), total)
        found[op.weight] = dataclasses.replace(q, codes=from_rows(codes, q.shape, q.channel_axes), grid=grid)
        params[local.weight] = found[op.weight].decode()
    return current.with_weights(found, walk.graph)


@functools.partial(jax.jit, static_argnums=0)
def _fit(format: Multipoint, rows, gram):
    """Points by output error: rows (channels, elements), gram (groups, elements, elements)."""

    def energy(difference):
        grouped = difference.reshape(gram.shape[0], -1, gram.shape[-1])
        return jnp.einsum("gok,gkl,gol->go", grouped, gram, grouped).reshape(-1)

    grid = format.fit_by(rows, energy)
    return format.encode(rows, grid), grid
