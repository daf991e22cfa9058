"""Codes and step sizes that minimise wᵀHw − 2wᵀb for every row w: a search for the nearest points of a lattice.

Rows (output channels) share H and are independent of each other. What is found is never above what was given.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from brecq_jax.formats import Grid, ScalarFormat

COLUMNS = 64  # columns whose effect on the others is applied at once
NARROW, WIDE = 4, 16  # rows that are kept at each column: while grids are compared, and for the best one
RESCALES = 3  # alternations of step sizes and codes
SWEEPS = 50  # of coordinate descent at most
SEARCHED_BITS = 4  # above, points lie so close that neither width nor range is worth a search


def search(
    format: ScalarFormat,
    damping: float,
    gram: Float[Array, "groups elements elements"],
    cross: Float[Array, "channels elements"],
    grid: Grid,
    weight: Float[Array, "channels elements"],
    found: Float[Array, "channels elements"],
) -> tuple[Float[Array, "channels elements"], Grid]:
    """The best rows that are found, and their grid, beginning with the rows `found` on `grid`.

    `damping` pulls towards `weight`, in means of the Gram matrix's diagonal. Step sizes move where each channel has its own.
    Its parts are compiled one by one: what the attempts share is compiled once.
    """
    own_scale = grid.scale.shape[0] == weight.shape[0]
    gram, cross, system, full, found = _prepare(damping, gram, cross, grid, weight, found)
    small = format.bits <= SEARCHED_BITS
    best = _descend(format, gram, cross, full, found), full

    def attempt(best, grid, width):
        rows = _descend(format, gram, cross, grid, _widest(format, width, system, grid))
        return _better(gram, cross, best, (rows, grid))

    if not own_scale:
        best = attempt(best, full, WIDE if small else 1)
        return best[0].reshape(weight.shape), grid
    if small:
        others = format.grids_near(full)
        for n in range(jax.tree.leaves(others)[0].shape[0]):
            best = attempt(best, jax.tree.map(lambda g: g[n], others), NARROW)
    for _ in range(RESCALES):
        best = _better(gram, cross, best, _rescale(gram, cross, best[1], best[0]))
        best = attempt(best, best[1], WIDE if small else 1)
    return best[0].reshape(weight.shape), jax.tree.map(lambda g: g.reshape(-1, *g.shape[2:]), best[1])


def _each_group(*static: int):
    """Compiles a function of one group for all groups at once; `static` are positions of arguments that are no arrays."""

    def compile(one):
        def all_groups(*arguments):
            fixed = {n: arguments[n] for n in static}
            arrays = [a for n, a in enumerate(arguments) if n not in fixed]
            return jax.vmap(lambda *a: one(*fixed.values(), *a))(*arrays)

        return functools.wraps(one)(jax.jit(all_groups, static_argnums=static))

    return compile


@functools.partial(jax.jit, static_argnums=0)
def _prepare(damping: float, gram, cross, grid: Grid, weight, found):
    """((Gram, U, order, rows at the continuous minimum), cross, grid, found), all with groups first, damped."""
    groups, elements = gram.shape[0], gram.shape[-1]
    pull = damping * jnp.mean(jnp.diagonal(gram, axis1=1, axis2=2), -1)[:, None, None] + 1e-12
    split = lambda a: a.reshape(groups, -1, *a.shape[1:])  # noqa: E731
    full = jax.tree.map(lambda g: split(jnp.broadcast_to(g, (weight.shape[0], *g.shape[1:]))), grid)
    gram, cross = gram + pull * jnp.eye(elements), split(cross) + pull * split(weight)
    return gram, cross, jax.vmap(_triangle)(gram, cross), full, split(found)


def value(gram, cross, rows):
    """The quadratic of each row."""
    return jnp.sum(rows * (rows @ gram - 2 * cross), -1)


@_each_group()
def _better(gram, cross, one, other):
    """Of two (rows, grid) the better, row by row."""
    wins = value(gram, cross, other[0]) < value(gram, cross, one[0])
    return jax.tree.map(lambda a, b: jnp.where(wins.reshape(-1, *(1,) * (a.ndim - 1)), b, a), one, other)


def _triangle(gram, cross):
    """(rows at the continuous minimum, U, order): H⁻¹ = UᵀU is what a column that is rounded leaves for the later ones.

    The heaviest column comes first, so that the light ones make good its error.
    """
    order = jnp.argsort(-jnp.diagonal(gram))
    gram, cross = gram[order][:, order], cross[:, order]
    factor = jnp.linalg.cholesky(gram)
    rows = jax.scipy.linalg.cho_solve((factor, True), cross.T).T
    inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(len(gram)))
    return rows, jnp.linalg.cholesky((inverse + inverse.T) / 2).T, order


def _own_grid(grid: Grid, column, elements: int):
    """The grid of the group that a column lies in."""
    group = column // (elements // grid.scale.shape[1])
    return jax.tree.map(lambda g: jax.lax.dynamic_index_in_dim(g, group, 1), grid)


@_each_group(0, 1)
def _widest(format: ScalarFormat, width: int, system, grid: Grid):
    """Round column by column; the columns that are left make good the error; the `width` best beginnings of each row live on.

    Rounding column k from v to p adds (v − p)² / U_kk² to the quadratic, whatever follows. With width 1 and the nearest
    point this is GPTQ, https://arxiv.org/abs/2210.17323, eq. 2 and 3 (Babai's nearest plane); with more, the K-best
    lattice decoder, Guo and Nilsson 2006, https://doi.org/10.1109/JSAC.2005.862402, with both neighbours as children.
    """
    rows, upper, order = system
    channels, elements = rows.shape
    size = min(COLUMNS, elements)
    pad = -elements % size
    rows = jnp.pad(rows, ((0, 0), (0, pad)))
    upper = jnp.pad(upper, ((0, pad), (0, pad))) + jnp.diag(jnp.where(jnp.arange(elements + pad) < elements, 0.0, 1.0))
    order_padded = jnp.pad(order, (0, pad))
    alone = format.of_group()
    beginning = jnp.repeat(rows[:, None], width, 1)
    costs = jnp.where(jnp.arange(width) == 0, jnp.zeros((channels, 1)), jnp.inf)

    def chunk(i, state):
        rows, costs = state
        start = i * size
        corner = jax.lax.dynamic_slice(upper, (start, start), (size, size))
        part = jax.lax.dynamic_slice_in_dim(rows, start, size, 2)

        def column(k, state):
            part, errors, parents, costs = state
            values, weight = part[:, :, k], corner[k, k]
            own = _own_grid(grid, order_padded[start + k], elements)
            low, high = (alone.decode(code, own) for code in alone.neighbors(values, own))
            points = jnp.stack([low, high], -1)
            children = costs[..., None] + ((values[..., None] - points) / weight) ** 2
            children = children.at[..., 1].set(jnp.where(high == low, jnp.inf, children[..., 1])).reshape(channels, -1)
            least, chosen = jax.lax.top_k(-children, width)
            parent = chosen // 2
            point = jnp.take_along_axis(points.reshape(channels, -1), chosen, 1)
            error = (jnp.take_along_axis(values, parent, 1) - point) / weight
            part, errors = (jnp.take_along_axis(a, parent[..., None], 1) for a in (part, errors))
            part = (part - error[..., None] * jnp.where(jnp.arange(size) > k, corner[k], 0)).at[:, :, k].set(point)
            return part, errors.at[:, :, k].set(error), jnp.take_along_axis(parents, parent, 1), -least

        first = part, jnp.zeros_like(part), jnp.broadcast_to(jnp.arange(width), costs.shape), costs
        part, errors, parents, costs = jax.lax.fori_loop(0, size, column, first)
        rows = jnp.take_along_axis(rows, parents[..., None], 1)
        rows = rows - errors @ jax.lax.dynamic_slice_in_dim(upper, start, size, 0)
        return jax.lax.dynamic_update_slice_in_dim(rows, part, start, 2), costs

    rows, _ = jax.lax.fori_loop(0, (elements + pad) // size, chunk, (beginning, costs))
    return rows[:, 0, :elements][:, jnp.argsort(order)]


@_each_group(0)
def _descend(format, gram, cross, grid, found):
    """Change one code at a time to the best it can be, until no single change helps."""
    elements, alone = gram.shape[0], format.of_group()
    size = min(elements, COLUMNS)
    pad = -elements % size
    gram = jnp.pad(gram, ((0, pad), (0, pad)))
    cross, found = (jnp.pad(a, ((0, 0), (0, pad))) for a in (cross, found))

    def column(start, k, inner):
        block, slope, corner = inner
        h, value, g = corner[k, k], block[:, k], slope[:, k]
        own = _own_grid(grid, jnp.minimum(start + k, elements - 1), elements)
        point = alone.decode(alone.encode((value - g / jnp.where(h > 0, h, 1))[:, None], own), own)[:, 0]
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

    found, _, _ = jax.lax.while_loop(lambda s: s[1] & (s[2] < SWEEPS), sweep, (found, jnp.array(True), 0))
    return found[:, :elements]


@_each_group()
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
    # exactly the points that codes name, which are whole steps from zero but for `Affine` and for two binary points
    steps = found.reshape(shape) / scale
    steps = jnp.where(jnp.abs(steps - jnp.round(steps)) < 1e-3, jnp.round(steps), steps)
    return (steps * scale).reshape(found.shape), grid._replace(scale=scale)
