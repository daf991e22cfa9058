"""How many points each channel of a `Multipoint` weight has, chosen by what its op loses on the calibration inputs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from brecq_jax._interpret import param_values
from brecq_jax._model import Problem, Quantized
from brecq_jax._qarray import float_rows, from_rows, quantize_array
from brecq_jax.formats import Multipoint
from brecq_jax.solvers import _quadratic
from brecq_jax.solvers._solver import Info, Solver
from brecq_jax.solvers._walk import Stage, Unit, Walk
from brecq_jax.solvers.nearest import fit_activations

ROWS = 131_072  # output positions that a Gram matrix is summed over, as in second-order rounding


def multipoint() -> Solver:
    """Every `Multipoint` channel starts with one point, and has more while ‖X(w − ŵ)‖/‖Xw‖ exceeds its format's tolerance.

    X are the op's inputs from the already-quantized prefix, over the calibration set. A block keeps one point where more did
    not lower its held-out error. Ops that read their weight through arithmetic, and lookups, keep their guess.
    Source: Liu et al. 2020, https://arxiv.org/abs/2002.09049, adaptive number of points, with our candidates for scales.
    """

    def solve(problem: Problem, guess: Quantized, key: jax.Array) -> tuple[Quantized, Info]:
        walk, plain = Walk(problem), {}
        for block in walk.blocks:
            floats = param_values(walk.graph, block, walk.leaves)
            for op, local in zip(block.ops, block.program.ops, strict=True):
                q = guess.weight(walk.graph.weights[op.weight])
                if _readable(q, block.program, local):
                    single = dataclasses.replace(q.format, tolerance=math.inf)
                    plain[op.weight] = dataclasses.replace(quantize_array(floats[local.weight], single, q.channel_axes), format=q.format)
        if not plain:
            raise ValueError("solvers.multipoint: no op's weight is planned as Multipoint. Write weights=formats.Multipoint(3), or another solver.")
        model, info = walk.improve(guess.with_weights(plain, walk.graph), [Stage("points", 0, functools.partial(_add_points, walk))])
        return fit_activations(problem, model), info

    return solve


def _readable(q, program, local) -> bool:
    return q is not None and isinstance(q.format, Multipoint) and _quadratic.linear_op(local, program.steps[local.step][0])


def _add_points(walk: Walk, unit: Unit, current: Quantized) -> Quantized:
    block, floats = unit.block, param_values(walk.graph, unit.block, walk.leaves)
    params, found = current.values(walk.graph, block), {}
    size = walk.rough.batch_size
    starts = range(0, len(walk.train) - size + 1, size)
    for number, (op, local) in enumerate(zip(block.ops, block.program.ops, strict=True)):
        q = current.weight(walk.graph.weights[op.weight])
        if op.weight not in unit.weights or op.weight in found or not _readable(q, block.program, local):
            continue
        batches = (walk.rough.inputs(block, walk.train[start : start + size]) for start in starts)
        keep = -(-ROWS // len(starts))
        grams = [_quadratic.gram(block.program, number, keep, batch, params, list(block.constants)) for batch in batches]
        rows = float_rows(floats[local.weight], q.channel_axes)
        codes, grid = _fit(q.format, rows, sum(grams) / len(grams))
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
