"""A quantized array: codes, the grid they refer to, and how both become the float array again."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from brecq_jax.formats import Format, Grid
from brecq_jax.formats.binary import BinaryGrid, TernaryGrid


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "grid"),
    meta_fields=("format", "channel_axes", "dtype"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class QArray:
    """An array stored as codes: decode() = from_rows(format.decode(to_rows(codes), grid)), in `dtype`.

    A pytree whose leaves are `codes` and the arrays of `grid`. The leaves may be abstract (`jax.ShapeDtypeStruct`), as
    checkpoints and `jax.eval_shape` make them; shape, size, storage_bits and repr ask only for their shapes.
    """

    codes: Any  # uint8, the original shape; Any, since tree_map puts any leaf here
    grid: Any  # of format.grid_type
    format: Format
    channel_axes: tuple[int, ...]  # axes of the original array that index channels, in order; () is a single row
    dtype: str  # the name of the float dtype to decode to

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def storage_bits(self) -> int:
        """Bits of codes and grid as the format would pack them (in memory a code takes a byte)."""
        return self.format.storage_bits(self.codes, self.grid)

    def decode(self) -> Float[Array, "..."]:
        """The float array: original shape and dtype."""
        return from_rows(self.decode_rows(), self.shape, self.channel_axes).astype(self.dtype)

    def decode_rows(self) -> Float[Array, "channels elements"]:
        """The float rows that codes and grid say, before shape and dtype."""
        codes, grid = to_rows(self.codes, self.channel_axes), self.grid
        if isinstance(grid, Grid | TernaryGrid | BinaryGrid) and 1 < grid.scale.shape[0] < codes.shape[0]:  # a stack whose slices have one grid each
            grid = jax.tree.map(lambda g: jnp.repeat(g, codes.shape[0] // g.shape[0], 0), grid)
        return self.format.decode(codes, grid)

    def __repr__(self) -> str:
        shape = getattr(self.codes, "shape", None)
        return f"QArray({shape}, {self.format.bits}-bit {type(self.format).__name__}, {self.dtype})"


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize_array(
    array: Float[Array, "..."],
    format: Format,
    channel_axes: tuple[int, ...],
    importance: Float[Array, "..."] | None = None,
) -> QArray:
    """Fit a grid to the array and round each element to the nearest point."""
    rows = to_rows(array, channel_axes)
    weights = None if importance is None else to_rows(importance, channel_axes)
    grid = format.fit(rows.astype(jnp.float32), weights)
    codes = from_rows(format.encode(rows, grid), array.shape, channel_axes)
    return QArray(codes, grid, format, tuple(channel_axes), jnp.dtype(array.dtype).name)


def to_rows(array: Shaped[Array, "..."], channel_axes: tuple[int, ...]) -> Shaped[Array, "channels elements"]:
    """The array as (channels, elements): channel axes first and merged, then the rest in their order, merged."""
    order = _channels_first(array.ndim, channel_axes)
    channels = math.prod(array.shape[axis] for axis in order[: len(channel_axes)])
    elements = math.prod(array.shape[axis] for axis in order[len(channel_axes) :])
    return array.transpose(order).reshape(channels, elements)


@functools.partial(jax.jit, static_argnums=1)
def float_rows(array: Shaped[Array, "..."], channel_axes: tuple[int, ...]) -> Float[Array, "channels elements"]:
    """`to_rows` in float32: one program for each shape, where an operation after the other would be three."""
    return to_rows(array.astype(jnp.float32), channel_axes)


def from_rows(
    rows: Shaped[Array, "channels elements"], shape: tuple[int, ...], channel_axes: tuple[int, ...]
) -> Shaped[Array, "..."]:
    """The inverse: from_rows(to_rows(x, axes), x.shape, axes) is x."""
    order = _channels_first(len(shape), channel_axes)
    back = sorted(range(len(shape)), key=order.__getitem__)
    return rows.reshape([shape[axis] for axis in order]).transpose(back)


def _channels_first(ndim: int, channel_axes: tuple[int, ...]) -> list[int]:
    """The permutation of axes that brings the channel axes to the front."""
    if len(set(channel_axes)) < len(channel_axes) or not all(0 <= axis < ndim for axis in channel_axes):
        raise ValueError(
            f"channel_axes is {channel_axes} and the array has {ndim} axes;\n"
            f"  write different axes from 0 to {ndim - 1}, or () for a single row."
        )
    return [*channel_axes, *(axis for axis in range(ndim) if axis not in channel_axes)]


def is_qarray(x: Any) -> bool:
    """For `is_leaf`: a tree's QArrays as leaves, not as trees of their own."""
    return isinstance(x, QArray)
