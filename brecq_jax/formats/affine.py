"""Evenly spaced grids whose zero point is any number, so that zero need not be a point."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from brecq_jax.formats._format import Grid
from brecq_jax.formats.uniform import SCALE_FLOOR, PerGroup, Uniform


@dataclasses.dataclass(frozen=True)
class Affine(Uniform):
    """Evenly spaced grid: w ≈ scale · (code − zero_point), code in [0, 2^bits), zero_point a float: a bias −scale · zero_point.

    The range is met exactly at both ends, since zero_point is not rounded. `symmetric` fixes it at (2^bits − 1) / 2: 2^bits
    points mirrored about zero, which is not one of them (mid-rise), at odd multiples of scale / 2.
    Source: LAPQ's released code (https://github.com/ynahshan/nn-quantization-pytorch at 12cd3bf, quantization/methods/uniform.py),
    the grid of weights, for `symmetric`: Δ = 2α / (2^b − 1), ŵ = Δ · round(clip((w + α) / Δ, 0, 2^b − 1)) − α.

        >>> rows = jnp.array([[-1.5, -0.2, 0.2, 1.5]])
        >>> format = Affine(2, symmetric=True, ranges=MinMax())
        >>> grid = format.fit(rows)
        >>> format.decode(format.encode(rows, grid), grid)
        Array([[-1.5, -0.5,  0.5,  1.5]], dtype=float32)
    """

    def grid_between(self, low: PerGroup, high: PerGroup) -> Grid:
        """The grid whose outermost points are low and high; for `symmetric`, the farther of them and its mirror image."""
        top = 2**self.bits - 1
        if self.symmetric:
            scale = jnp.maximum(2 * jnp.maximum(-low, high) / top, SCALE_FLOOR)
            return Grid(scale, jnp.full_like(scale, top / 2))
        scale = jnp.maximum((high - low) / top, SCALE_FLOOR)
        return Grid(scale, jnp.clip(-low / scale, 0, top))

    def storage_bits(self, codes: Array | jax.ShapeDtypeStruct, grid: Grid) -> int:
        """bits per code, 32 per scale, and 32 per zero_point unless `symmetric` fixes it."""
        zero_points = 0 if self.symmetric else math.prod(grid.zero_point.shape)
        return math.prod(codes.shape) * self.bits + 32 * (math.prod(grid.scale.shape) + zero_points)


def mean_corrected(
    format: Uniform, codes: Num[Array, "channels elements"], grid: Grid, rows: Float[Array, "channels elements"]
) -> tuple[Affine, Grid]:
    """Format and grid that read the same codes with each channel's mean as in `rows`: zero points move, one per channel.

    ŵ_c ← ŵ_c − (mean(ŵ_c) − mean(w_c)).
    Source: LAPQ's released code (`-bcw`), the mean of Banner et al. 2018, section 3.4, https://arxiv.org/abs/1810.05723, without
    its ratio of spreads.
    """
    excess = jnp.mean(format.decode(codes, grid) - rows, axis=1)[:, None, None]
    moved = Affine(format.bits, granularity=format.granularity, ranges=format.ranges)
    return moved, grid._replace(zero_point=grid.zero_point + excess / grid.scale)
