"""Matrix products that unpack their weight a tile at a time: memory holds the packed bytes, and one tile of what they mean.

XLA would unpack all weights of a program before it runs the first product, and hold them all. A loop over tiles is a whole.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from brecq_jax._jaxpr import Step
from brecq_jax._qarray import QArray
from brecq_jax.deploy.packing import unpack
from brecq_jax.formats import Uniform

TILE = 2**18  # elements: a megabyte of float32


def tiled_dot(step: Step, x, weight, data_position: int, operand: Callable[[QArray], jax.Array], dtype) -> jax.Array | None:
    """The product of a step with a PackedArray of two axes; `operand` makes what is multiplied of a tile.

    None: the weight is no larger than a tile, or there are no tiles of whole bytes, or the product is of another kind.
    """
    per_channel = isinstance(weight.format, Uniform) and len(weight.channel_axes) == 1
    if step.primitive != "dot_general" or len(weight.shape) != 2 or not per_channel:
        return None
    (contracting, batch), shape = step.params["dimension_numbers"], weight.shape
    if batch[0] or len(contracting[0]) != 1:
        return None
    summed = contracting[1 - data_position][0]
    if summed == weight.channel_axes[0]:
        return None
    size = _rows(weight, summed)
    if size is None:
        return None
    tiles = shape[0] // size
    packed = weight.packed.reshape(tiles, -1)
    axis = contracting[data_position][0]

    def product(n, packed, x):
        codes = unpack(packed, weight.format.bits, size * shape[1]).reshape(size, shape[1])
        grid = jax.tree.map(lambda g: _part(g, n, tiles, by_channel=summed == 1), weight.grid)
        w = operand(QArray(codes, grid, weight.format, weight.channel_axes, weight.dtype))
        operands = (x, w) if data_position == 0 else (w, x)
        return jax.lax.dot_general(*operands, step.params["dimension_numbers"], step.params["precision"], preferred_element_type=dtype)

    if summed == 1:
        _, parts = jax.lax.scan(lambda _, tile: (None, product(*tile, x)), None, (jnp.arange(tiles), packed))
        where = parts.ndim - 2 if data_position == 0 else 0
        parts = jnp.moveaxis(parts, 0, where)
        return parts.reshape(*parts.shape[:where], -1, *parts.shape[where + 2 :])

    def add(sums, tile):
        n, packed = tile
        return sums + product(n, packed, jax.lax.dynamic_slice_in_dim(x, n * size, size, axis)), None

    rest = [n for a, n in enumerate(x.shape) if a != axis]
    out = (*rest, shape[1]) if data_position == 0 else (shape[1], *rest)
    return jax.lax.scan(add, jnp.zeros(out, dtype), (jnp.arange(tiles), packed))[0]


def _rows(weight, summed: int) -> int | None:
    """Rows of a tile: as many as TILE holds of those numbers that give whole bytes, whole groups and equal tiles."""
    rows, columns = weight.shape
    group = weight.format.granularity if isinstance(weight.format.granularity, int) and summed == 0 else 1
    fitting = (n for n in range(1, rows) if rows % n == 0 and n * columns <= TILE and n * columns * weight.format.bits % 8 == 0 and n % group == 0)
    return max(fitting, default=None) if rows * columns > TILE else None


def _part(per_group, n, tiles: int, by_channel: bool):
    """What a tile needs of a grid of (channels, groups, 1): some channels, or some groups of all."""
    axis = 0 if by_channel else 1
    count = per_group.shape[axis]
    if count == 1:
        return per_group
    return jax.lax.dynamic_slice_in_dim(per_group, n * (count // tiles), count // tiles, axis)
