"""Matrix products and convolutions that decode a large weight a tile at a time: memory holds packed bytes, and one tile of what they mean."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from brecq_jax._jaxpr import Step
from brecq_jax._qarray import QArray
from brecq_jax.deploy.packing import unpack
from brecq_jax.formats import Uniform

LARGE = 2**18  # elements: a megabyte of float32. XLA:CPU convolves slower in a loop, by a third in EfficientNet-Lite0 if all of its weights are in tiles
TILE = 2**16  # elements


def tiled_dot(step: Step, x, weight, data_position: int, dtype) -> jax.Array | None:
    """The product of a step with a PackedArray of two axes, in `dtype`.

    None: the weight is not large, or there are no tiles of whole bytes, or the product is of another kind.
    """
    if step.primitive != "dot_general" or len(weight.shape) != 2 or not _has_tiles(weight):
        return None
    (contracting, batch), shape = step.params["dimension_numbers"], weight.shape
    if batch[0] or len(contracting[0]) != 1:
        return None
    summed = contracting[1 - data_position][0]
    if summed == weight.channel_axes[0]:
        return None
    group = weight.format.granularity if isinstance(weight.format.granularity, int) and summed == 0 else 1
    size = _size(*shape, lambda n: n * shape[1] * weight.format.bits % 8 == 0 and n % group == 0)
    if size is None:
        return None
    tiles = shape[0] // size
    packed = weight.packed.reshape(tiles, -1)
    axis = contracting[data_position][0]
    # Many tiles are added up: bfloat16 would lose at each what it loses once.
    added = jnp.promote_types(dtype, jnp.float32)

    def product(n, packed, x, dtype):
        codes = unpack(packed, weight.format.bits, size * shape[1]).reshape(size, shape[1])
        grid = jax.tree.map(lambda g: _part(g, n, tiles, by_channel=summed == 1), weight.grid)
        w = QArray(codes, grid, weight.format, weight.channel_axes, weight.dtype).decode()
        operands = (x, w) if data_position == 0 else (w, x)
        return jax.lax.dot_general(*operands, step.params["dimension_numbers"], step.params["precision"], preferred_element_type=dtype)

    if summed == 1:
        _, parts = jax.lax.scan(lambda _, tile: (None, product(*tile, x, dtype)), None, (jnp.arange(tiles), packed))
        where = parts.ndim - 2 if data_position == 0 else 0
        parts = jnp.moveaxis(parts, 0, where)
        return parts.reshape(*parts.shape[:where], -1, *parts.shape[where + 2 :])

    def add(sums, tile):
        n, packed = tile
        return sums + product(n, packed, jax.lax.dynamic_slice_in_dim(x, n * size, size, axis), added), None

    rest = [n for a, n in enumerate(x.shape) if a != axis]
    out = (*rest, shape[1]) if data_position == 0 else (shape[1], *rest)
    return jax.lax.scan(add, jnp.zeros(out, added), (jnp.arange(tiles), packed))[0].astype(dtype)


def tiled_conv(step: Step, weight, convolve: Callable[[QArray], jax.Array]) -> jax.Array | None:
    """The convolution of a step with a PackedArray, some output channels at a time; `convolve` makes theirs of a tile of the weight.

    None: the weight is not large, or there are no tiles of whole bytes, or it convolves in groups.
    """
    if step.primitive != "conv_general_dilated" or step.params["feature_group_count"] * step.params["batch_group_count"] > 1:
        return None
    dims, shape, bits = step.params["dimension_numbers"], weight.shape, weight.format.bits
    axis = dims.rhs_spec[0]
    if not _has_tiles(weight) or weight.channel_axes != (axis,):
        return None
    channels, elements, run = shape[axis], math.prod(shape) // shape[axis], math.prod(shape[axis + 1 :])
    size = _size(channels, elements, lambda n: n * run * bits % 8 == 0)
    if size is None:
        return None
    packed = weight.packed.reshape(math.prod(shape[:axis]), -1)
    width, tile_shape = size * run * bits // 8, (*shape[:axis], size, *shape[axis + 1 :])

    def some(n):
        part = jax.lax.dynamic_slice_in_dim(packed, n * width, width, 1).reshape(-1)
        codes = unpack(part, bits, size * elements).reshape(tile_shape)
        grid = jax.tree.map(lambda g: _part(g, n, channels // size, by_channel=True), weight.grid)
        return convolve(QArray(codes, grid, weight.format, weight.channel_axes, weight.dtype))

    where = dims.out_spec[1]
    parts = jnp.moveaxis(jax.lax.map(some, jnp.arange(channels // size)), 0, where)
    return parts.reshape(*parts.shape[:where], channels, *parts.shape[where + 2 :])


def _has_tiles(weight) -> bool:
    return isinstance(weight.format, Uniform) and len(weight.channel_axes) == 1


def _size(count: int, elements: int, divides: Callable[[int], bool]) -> int | None:
    """Of `count` rows of `elements` each, how many make a tile: as many as TILE holds of those numbers that give equal tiles.

    `divides(n)`: whether tiles of n rows are of whole bytes and groups. None: the weight is not large, or no number does.
    """
    fitting = [n for n in range(1, count) if count % n == 0 and divides(n)]
    if count * elements <= LARGE or not fitting:
        return None
    return max((n for n in fitting if n * elements <= TILE), default=min(fitting))


def _part(per_group, n, tiles: int, by_channel: bool):
    """What a tile needs of a grid of (channels, groups, 1): some channels, or some groups of all."""
    axis = 0 if by_channel else 1
    count = per_group.shape[axis]
    if count == 1:
        return per_group
    return jax.lax.dynamic_slice_in_dim(per_group, n * (count // tiles), count // tiles, axis)
