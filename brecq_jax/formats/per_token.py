"""Activations whose ranges are found while they are computed, one for each token: nothing is calibrated."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from brecq_jax.formats.uniform import Uniform, fake_quantize


@dataclasses.dataclass(frozen=True)
class PerToken:
    """What an op reads, each vector that it sums over on a grid of its own: from the vector's least value (or 0) to its greatest (or 0).

    With `group_size` so many consecutive elements share a grid, so that an outlier spoils its neighbours alone. Ops alone see it,
    under every preset: the value itself has no grid. Fake quantization only, with a gradient that passes unchanged.
    Source: Yao et al. 2022 (ZeroQuant), section 3.1, token-wise, https://arxiv.org/abs/2206.01861; theirs are symmetric and in no groups.

        >>> PerToken(2).fake_quantize(jnp.array([[0.0, 1.0, 3.0], [0.0, 10.0, 30.0]]), (1,))
        Array([[ 0.,  1.,  3.],
               [ 0., 10., 30.]], dtype=float32)
    """

    bits: int = 8
    group_size: int | None = None

    def __post_init__(self):
        Uniform(self.bits, granularity=self.group_size)  # raises where it has no such bits or groups

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ValueError if groups do not divide tokens of this shape (tokens, elements)."""
        Uniform(self.bits, granularity=self.group_size).check(shape)

    def fake_quantize(self, x: Float[Array, "..."], axes: Sequence[int]) -> Float[Array, "..."]:
        """x rounded; `axes` are those that an op sums over. Groups lie along the last of them."""
        shape, axes = x.shape, tuple(axes)
        if self.group_size:
            x = x.reshape(*shape[: axes[-1]], -1, self.group_size, *shape[axes[-1] + 1 :])
            axes = (axes[-1] + 1,)
        ends = [f(x.astype(jnp.float32), axis=axes, keepdims=True) for f in (jnp.min, jnp.max)]
        low, high = (clip(end, 0).reshape(1, -1, 1) for clip, end in zip((jnp.minimum, jnp.maximum), ends, strict=True))
        scale, zero_point = (jax.lax.stop_gradient(g).reshape(ends[0].shape) for g in Uniform(self.bits).grid_between(low, high))
        return fake_quantize(x, scale, zero_point, self.bits).reshape(shape)
