"""SPARQ: 8-bit activations re-coded to a few bits where an op reads them, sharing the bits of a zero with its neighbour."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Int32, UInt8

from brecq_jax.formats._format import Grid
from brecq_jax.formats.uniform import RangeRule, TailRange, Uniform

CODE_BITS = 8  # of the codes that are re-coded


@dataclasses.dataclass(frozen=True)
class Sparq:
    """Activations at 8 bits, of which an op reads `window` consecutive ones: code a becomes f(a) = min(q, 2^window − 1) · 2^s.

    s is the least of `shifts` evenly spaced shifts from 0 to 8 − window with a < 2^(window + s); q = round(a / 2^s), halves to
    even, or ⌊a / 2^s⌋ if `trim`. A q that rounds beyond the window stays at its end. `shifts` None: every shift.

    `pairs`: codes 2k and 2k + 1 along the contraction axis share their bits: where one of the two is 0 the other is read with
    twice the window and every shift, which at 4 bits is exact. A last code of an odd number stands beside a 0. Patches of a
    convolution pair channels at one pixel; the authors' code pairs across pixels where the number of channels is odd.

    No codes get smaller in memory, and nothing is to learn but the 8-bit scale: this is what hardware with narrow multipliers
    computes. It lives on zeros and on unsigned codes: values after a ReLU.
    Source: Shomron et al. 2021, https://arxiv.org/abs/2105.11010, as its released code (gilshm/sparq) computes; its range is the
    mean of the images' largest values, ours is that of `ranges`.

        >>> Sparq(4).recode(jnp.array([24, 31, 255, 0], jnp.uint8), axis=0)
        Array([ 24,  30, 255,   0], dtype=uint8)
    """

    window: int = 4
    shifts: int | None = None
    trim: bool = False
    pairs: bool = True
    ranges: RangeRule = TailRange()

    def __post_init__(self):
        if isinstance(self.window, bool) or self.window not in (2, 3, 4):
            raise ValueError(f"Sparq: window is {self.window!r}; write 4, 3 or 2 bits.")
        if self.shifts is not None and self.shifts not in spaced_shifts(self.window):
            options = ", ".join(map(str, spaced_shifts(self.window)))
            raise ValueError(f"Sparq: {self.shifts!r} shifts are not evenly spaced from 0 to {CODE_BITS - self.window}; write one of {options}.")

    @property
    def bits(self) -> int:
        """Of the codes, however many of them are read."""
        return CODE_BITS

    @property
    def base(self) -> Uniform:
        """The 8-bit format of the codes."""
        return Uniform(CODE_BITS, granularity="per_tensor", ranges=self.ranges)

    def fit(
        self, rows: Float[Array, "channels elements"], importance: Float[Array, "channels elements"] | None = None
    ) -> Grid:
        """The 8-bit grid of values seen. Raises ValueError if the least is not 0, as after a ReLU: values must be concrete."""
        least = float(jnp.min(rows))
        if least != 0:  # as the authors' code refuses them
            raise ValueError(
                f"Sparq re-codes unsigned 8-bit codes and shares the bits of zeros: values after a ReLU. Here {least:.3g} was seen as the least,\n"
                "  where a ReLU gives 0: outputs of a softmax, a sigmoid or a mean have no zeros to share.\n"
                "  Write Uniform(8) for this name, or None."
            )
        return self.base.fit(rows, importance)

    def recode(self, codes: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
        """f of every code; `axis` is the contraction axis, along which pairs lie. Element-wise beside that."""
        narrow = self._narrow(codes)
        return jnp.where(_partners(codes, axis) == 0, self._wide(codes), narrow) if self.pairs else narrow

    def fake_recode(self, x: Float[Array, "..."], scale: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
        """What an op reads of x, which lies on the 8-bit grid of zero_point 0; the gradient passes unchanged."""
        codes = jnp.clip(jnp.round(x / scale), 0, 2**CODE_BITS - 1).astype(jnp.uint8)
        read = (scale * self.recode(codes, axis)).astype(x.dtype)
        return x + jax.lax.stop_gradient(read - x)

    def sparse_product(
        self, codes: UInt8[Array, "batch elements"], parts: Int8[Array, "4 elements channels"]
    ) -> Int32[Array, "batch channels"]:
        """Codes times 2:4-sparse weights, `parts` = split_sparse(weights): int32 sums.

        Of each four codes, those two that meet the non-zero weights of a channel are its pair, so that a code is read
        differently by different channels: narrow(a) by all, and wide(a) − narrow(a) more by those whose other code is 0.
        """
        narrow = self._narrow(codes).astype(jnp.int32)
        more = self._wide(codes).astype(jnp.int32) - narrow
        fours = codes.reshape(len(codes), -1, 4)
        total = narrow @ parts.astype(jnp.int32).sum(0)
        for distance in range(4):  # at distance 0 there is no other non-zero weight
            other = jnp.roll(fours, -distance, -1).reshape(codes.shape)
            total += (more if distance == 0 else jnp.where(other == 0, more, 0)) @ parts[distance].astype(jnp.int32)
        return total

    def _narrow(self, codes):
        return windowed(codes, self.window, self.shifts or CODE_BITS - self.window + 1, self.trim)

    def _wide(self, codes):
        return windowed(codes, 2 * self.window, CODE_BITS - 2 * self.window + 1, self.trim)


def spaced_shifts(window: int) -> list[int]:
    """How many evenly spaced shifts from 0 to 8 − window there may be."""
    span = CODE_BITS - window
    return [n for n in range(2, span + 2) if span % (n - 1) == 0]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def windowed(codes: UInt8[Array, "..."], window: int, shifts: int, trim: bool) -> UInt8[Array, "..."]:
    """f of `Sparq` without pairs."""
    a, hop = codes.astype(jnp.int32), (CODE_BITS - window) // max(shifts - 1, 1)
    shift = hop * sum((a >= 2 ** (window + hop * n)).astype(jnp.int32) for n in range(shifts - 1)) if shifts > 1 else jnp.zeros_like(a)
    q = a >> shift if trim else jnp.round(a / (1 << shift)).astype(jnp.int32)
    return (jnp.minimum(q, 2**window - 1) << shift).astype(jnp.uint8)


def split_sparse(weights: Int8[np.ndarray, "elements channels"]) -> Int8[np.ndarray, "4 elements channels"]:
    """2:4-sparse weights by where, in its four, a weight's other non-zero one lies: d places on (cyclically), or nowhere (0).

    The parts sum to the weights. Raises ValueError where four weights have more than two non-zeros.
    """
    elements, channels = weights.shape
    if elements % 4:
        raise ValueError(f"split_sparse: {elements} weights in a channel are not whole fours; fill them up with zeros.")
    fours = weights.reshape(-1, 4, channels)
    used = fours != 0
    if (crowded := used.sum(1) > 2).any():
        four, channel = np.argwhere(crowded)[0]
        raise ValueError(
            f"split_sparse: weights {4 * four} to {4 * four + 3} of channel {channel} have more than two non-zeros;\n"
            "  prune them to the two largest first."
        )
    meets = [used & np.roll(used, -distance, 1) for distance in (1, 2, 3)]
    alone = used & ~np.any(meets, 0)
    return np.stack([np.where(where, fours, 0).reshape(weights.shape) for where in (alone, *meets)])


def activation_grid(format: Uniform | Sparq) -> Uniform:
    """The format whose grid an activation is rounded to, before any re-coding."""
    return format.base if isinstance(format, Sparq) else format


def _partners(codes: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    """The other code of each pair along an axis, 0 beside the last of an odd number."""
    count = codes.shape[axis]
    rows = jnp.moveaxis(codes, axis, -1)
    rows = jnp.pad(rows, [(0, 0)] * (codes.ndim - 1) + [(0, count % 2)])
    swapped = rows.reshape(*rows.shape[:-1], -1, 2)[..., ::-1].reshape(rows.shape)
    return jnp.moveaxis(swapped[..., :count], -1, axis)
