"""Second-order rounding: codes that minimise each op's output error, a quadratic in its weight."""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp

from brecq_jax._interpret import Block, param_values
from brecq_jax._model import Problem, Quantized
from brecq_jax._qarray import QArray, from_rows, to_rows
from brecq_jax.formats import Grid, ScalarFormat
from brecq_jax.solvers import _quadratic
from brecq_jax.solvers._solver import Info, Solver
from brecq_jax.solvers._walk import Walk

COLUMNS = 128  # columns whose effect on the others is applied at once


@dataclasses.dataclass(frozen=True)
class SecondOrder:
    """Settings of second-order rounding."""

    damping: float = 0.01  # pull towards the float weight, in means of the Gram matrix's diagonal: GPTQ's
    rounds: int = 3  # passes over the calibration examples: the later ones know where a ReLU cuts
    sweeps: int = 50  # of coordinate descent at most, at each round
    scales: int = 4  # alternations of codes and step sizes at each round; 0 keeps the grid
    batch_size: int = 32


def second_order(**settings) -> Solver:
    """Error compensation, then coordinate descent on the codes until no single change helps.

    Op by op in program order, with inputs from the already-quantized prefix and targets from the float model.
    Source: GPTQ, https://arxiv.org/abs/2210.17323, eq. 2 and 3, for the start; coordinate descent on the same Gram matrices.
    """
    settings = SecondOrder(**settings)

    def solve(problem: Problem, guess: Quantized, key: jax.Array) -> tuple[Quantized, Info]:
        walk = Walk(problem, settings.batch_size)
        return walk.choose_codes(guess, "second order", 0, functools.partial(_round_block, settings, walk))

    return solve


def _round_block(settings, walk: Walk, n: int, block: Block, names, current: Quantized, params, targets) -> dict[str, QArray]:
    floats = param_values(walk.graph, block, walk.leaves)
    params, learned = list(params), {}
    exact, rough = walk.exact.inputs_of(block), walk.rough.inputs_of(block)
    rows = walk.train[: walk.batch_size]
    types = _quadratic.program_types(block.program, [a[rows] for a in rough], params, block.constants)
    for number, (op, local) in enumerate(zip(block.ops, block.program.ops, strict=True)):
        step = block.program.steps[local.step][0]
        if op.weight not in names or op.weight in learned or not _quadratic.linear_op(local, step):
            continue
        q = current.weight(walk.graph.weights[op.weight])
        to = _quadratic.reach(block.program, number, types)
        weight = to_rows(floats[local.weight].astype(jnp.float32), q.channel_axes)
        found, grid, gram = q.format.decode(to_rows(q.codes, q.channel_axes), q.grid), q.grid, None
        for r in range(settings.rounds):
            total = None
            for start in range(0, len(walk.train) - walk.batch_size + 1, walk.batch_size):
                rows = walk.train[start : start + walk.batch_size]
                arguments = [a[rows] for a in rough], params, [a[rows] for a in exact], floats, list(block.constants)
                part = _quadratic.statistics(block.program, number, to, gram is None, *arguments)
                total = part if total is None else jax.tree.map(jnp.add, total, part)
            if gram is None:
                gram = total[0] / total[2]
            found, grid = _solve(q.format, settings, r == 0, gram, total[1] / total[2], grid, weight, found)
            params[local.weight] = from_rows(found, q.shape, q.channel_axes).astype(q.dtype)
            if math.isinf(to.low):
                break
        codes = q.format.encode(found, grid)
        learned[op.weight] = dataclasses.replace(q, codes=from_rows(codes, q.shape, q.channel_axes), grid=grid)
    return learned


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(format: ScalarFormat, settings: SecondOrder, first: bool, gram, cross, grid: Grid, weight, found):
    """The best rows found, and their grid. Rows and grid are split by the groups of the op, which are independent."""
    groups, elements = gram.shape[0], gram.shape[-1]
    damping = settings.damping * jnp.mean(jnp.diagonal(gram, axis1=1, axis2=2), -1) + 1e-12
    gram = gram + damping[:, None, None] * jnp.eye(elements)
    split = lambda a: a.reshape(groups, -1, *a.shape[1:])  # noqa: E731
    own_scale = grid.scale.shape[0] == weight.shape[0]
    full = jax.tree.map(lambda g: split(jnp.broadcast_to(g, (weight.shape[0], *g.shape[1:]))), grid)
    cross = split(cross) + damping[:, None, None] * split(weight)

    def of_group(gram, cross, grid, found):
        if first:
            found = _better(gram, cross, found, _compensate(format, gram, cross, grid))
        found = _descend(format, gram, cross, grid, found, settings.sweeps)
        for _ in range(settings.scales if own_scale else 0):
            found, grid = _rescale(gram, cross, grid, found)
            found = _descend(format, gram, cross, grid, found, settings.sweeps)
        return found, grid

    found, full = jax.vmap(of_group)(gram, cross, full, split(found))
    if own_scale:
        grid = jax.tree.map(lambda g: g.reshape(-1, *g.shape[2:]), full)
    return found.reshape(weight.shape), grid


def _value(gram, cross, rows):
    """The quadratic of each row."""
    return jnp.sum(rows * (rows @ gram - 2 * cross), -1)


def _better(gram, cross, one, other):
    """Of two candidates the better, row by row."""
    return jnp.where((_value(gram, cross, other) < _value(gram, cross, one))[:, None], other, one)


def _snap(format: ScalarFormat, grid: Grid, elements: int, values, column):
    """The grid points nearest to one column of values."""
    group = column // (elements // grid.scale.shape[1])
    own = jax.tree.map(lambda g: jax.lax.dynamic_index_in_dim(g, group, 1), grid)
    alone = format.of_group()
    return alone.decode(alone.encode(values[:, None], own), own)[:, 0]


def _compensate(format, gram, cross, grid):
    """Round column by column, the heaviest first, and let the columns that are left make good the error."""
    elements = gram.shape[0]
    order = jnp.argsort(-jnp.diagonal(gram))
    back = jnp.argsort(order)
    gram, cross = gram[order][:, order], cross[:, order]
    factor = jnp.linalg.cholesky(gram)
    rows = jax.scipy.linalg.cho_solve((factor, True), cross.T).T  # the continuous minimum
    inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(elements))
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T

    def column(k, rows):
        value = rows[:, k]
        point = _snap(format, grid, elements, value, order[k])
        later = jnp.where(jnp.arange(elements) > k, upper[k], 0) / upper[k, k]
        return (rows - (value - point)[:, None] * later).at[:, k].set(point)

    return jax.lax.fori_loop(0, elements, column, rows)[:, back]


def _descend(format, gram, cross, grid, found, sweeps: int):
    """Change one code at a time to the best it can be, until no single change helps."""
    elements = gram.shape[0]
    size = min(elements, COLUMNS)
    pad = -elements % size
    gram = jnp.pad(gram, ((0, pad), (0, pad)))
    cross, found = (jnp.pad(a, ((0, 0), (0, pad))) for a in (cross, found))

    def column(start, k, inner):
        block, slope, corner = inner
        h, value, g = corner[k, k], block[:, k], slope[:, k]
        point = _snap(format, grid, elements, value - g / jnp.where(h > 0, h, 1), jnp.minimum(start + k, elements - 1))
        change = point - value
        change = jnp.where((h * change**2 + 2 * change * g < 0) & (start + k < elements), change, 0)
        return jnp.where(change != 0, point, value), change

    def sweep(state):
        found, _, count = state
        slope = found @ gram - cross

        def part(i, carry):
            found, slope = carry
            start = i * size
            corner = jax.lax.dynamic_slice(gram, (start, start), (size, size))
            own, own_slope = (jax.lax.dynamic_slice(a, (0, start), (a.shape[0], size)) for a in (found, slope))

            def one(k, inner):
                block, block_slope = inner
                point, change = column(start, k, (block, block_slope, corner))
                return block.at[:, k].set(point), block_slope + change[:, None] * corner[k]

            new, _ = jax.lax.fori_loop(0, size, one, (own, own_slope))
            strip = jax.lax.dynamic_slice(gram, (start, 0), (size, gram.shape[1]))
            return jax.lax.dynamic_update_slice(found, new, (0, start)), slope + (new - own) @ strip

        after, _ = jax.lax.fori_loop(0, found.shape[1] // size, part, (found, slope))
        return after, jnp.any(after != found), count + 1

    found, _, _ = jax.lax.while_loop(lambda s: s[1] & (s[2] < sweeps), sweep, (found, jnp.array(True), 0))
    return found[:, :elements]


def _rescale(gram, cross, grid: Grid, found):
    """The best step size for the codes that are there, one group of elements after the other."""
    channels, parts = grid.scale.shape[:2]
    shape = (channels, parts, -1)

    def one(j, carry):
        found, scale = carry
        here = (jnp.arange(parts) == j)[None, :, None]
        steps = jnp.where(here, found.reshape(shape) / scale, 0).reshape(channels, -1)
        slope, curvature = jnp.sum(steps * (found @ gram - cross), -1), jnp.sum(steps * (steps @ gram), -1)
        old = scale[:, j, 0]
        new = jnp.where(curvature > 0, old - slope / jnp.where(curvature > 0, curvature, 1), old)
        new = jnp.where(new > 0, new, old)
        return found + steps * (new - old)[:, None], scale.at[:, j, 0].set(new)

    found, scale = jax.lax.fori_loop(0, parts, one, (found, grid.scale))
    # exactly the points that codes name
    steps = jnp.round(found.reshape(shape) / scale)
    return (steps * scale).reshape(found.shape), grid._replace(scale=scale)
