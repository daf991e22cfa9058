"""How a weight is written while its codes are learned: variables become rows, and at the end codes.

A rounding has three methods. `start(q, rows, lean)` gives (variables, fixed) for a weight whose guess is the QArray q and whose
float rows are given (`lean`: on the side of the guess's codes); `rows(...)` the weight at some progress in [0, 1], and what is
added to the loss; `finish(...)` the QArray that was learned. Variables are {"choices": array} and, where step sizes are learned, {"scales": array}: logarithms
of factors on the guess's step sizes, so that these stay positive. Points of a format move in proportion to its scale.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from brecq_jax._qarray import QArray, from_rows, to_rows
from brecq_jax.formats import Grid

ZETA, GAMMA = 1.1, -0.1  # stretch of the sigmoid: AdaRound, eq. 23
NEAR = 0.45  # how far from its guess a weight may start, in steps (or between two neighbours): less than half, so that it rounds to the guess


def soft_choice(v: Float[Array, "..."]) -> Float[Array, "..."]:
    """h(v) in [0, 1]: 0 picks the lower neighbour, 1 the upper.

    Source: AdaRound, eq. 23, the rectified sigmoid, https://arxiv.org/abs/2004.10568
    """
    return jnp.clip(jax.nn.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)


def inverse_choice(h: Float[Array, "..."]) -> Float[Array, "..."]:
    """v with soft_choice(v) = h, for h in [0, 1]."""
    return -jnp.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def by_group(rows, factor):
    """Rows times one factor for each group; `factor` is shaped like a grid's scale."""
    return (rows.reshape(rows.shape[0], factor.shape[1], -1) * factor).reshape(rows.shape)


@dataclasses.dataclass(frozen=True)
class RectifiedSigmoid:
    """Each weight chooses between the two points around its float value; a penalty presses it to decide.

    It starts at its float value, which `lean` moves to where it rounds to the guess, if that is one of the two points; a guess
    beyond them cannot be reached.
    Source: AdaRound, eq. 21 to 24, https://arxiv.org/abs/2004.10568
    """

    regularizer: float = 0.01
    warmup: float = 0.2  # fraction of steps before rounding is pressed to choose
    beta: tuple[float, float] = (20.0, 2.0)  # sharpness of the penalty, start and end
    scale_learning_rate: float = 0.0  # 0: step sizes stay; above: learned with the choices (Genie-M)
    average: bool = False  # the penalty's mean over a weight, not its sum: with a relative error, one regularizer serves all sizes

    def schedule(self, learning_rate: float, steps: int) -> optax.Schedule:
        """The published loops keep the rate."""
        return optax.constant_schedule(learning_rate)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def start(self, q: QArray, rows, lean: bool = False):
        codes = q.format.neighbors(rows, q.grid)
        low, high = (q.format.decode(c, q.grid) for c in codes)
        span = jnp.where(codes[0] == codes[1], 0, high - low)  # exactly, also where the compiler fuses the products
        share = jnp.where(span > 0, (rows - low) / jnp.where(span > 0, span, 1), 0.5)
        share = jnp.clip(share, 0, 1)
        if lean:
            guess = to_rows(q.codes, q.channel_axes)
            leant = jnp.where(guess == codes[1], jnp.maximum(share, 1 - NEAR), jnp.where(guess == codes[0], jnp.minimum(share, NEAR), share))
            share = jnp.where(codes[0] == codes[1], share, leant)
        variables = {"choices": inverse_choice(share)}
        return variables | _scales(self, q.grid), {"low": low, "span": span}

    def rows(self, format, variables, fixed, progress):
        h = soft_choice(variables["choices"])
        high, low = self.beta
        rest = jnp.clip((progress - self.warmup) / (1 - self.warmup), 0, 1)
        # λ Σ (1 − |2h − 1|^β): zero during the warm-up, then pressing towards 0 or 1. Source: AdaRound, eq. 24.
        penalty = (jnp.mean if self.average else jnp.sum)(1 - jnp.abs(2 * h - 1) ** (high + (low - high) * rest))
        penalty = jnp.where(progress < self.warmup, 0.0, self.regularizer) * penalty
        return _scaled(fixed["low"] + h * fixed["span"], variables), penalty

    @functools.partial(jax.jit, static_argnums=0)
    def finish(self, q: QArray, variables, fixed, rows) -> QArray:
        low, high = q.format.neighbors(rows, q.grid)
        return _finish(q, jnp.where(variables["choices"] >= 0, high, low), variables)


@dataclasses.dataclass(frozen=True)
class StraightThrough:
    """Each weight starts at its guess, leaning towards its float value, and may move to any point of the grid.

    What is run is always rounded, so that the loss is the hard one and nothing is left to decide at the end; the gradient
    passes the rounding unchanged (Bengio et al. 2013, https://arxiv.org/abs/1308.3432). Weights are counted in step sizes,
    so one learning rate serves all of them, and step sizes are learned along (LSQ, https://arxiv.org/abs/1902.08153).
    """

    scale_learning_rate: float = 2e-3

    def schedule(self, learning_rate: float, steps: int) -> optax.Schedule:
        """Down to zero, so that codes come to rest."""
        return optax.cosine_decay_schedule(learning_rate, steps)

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def start(self, q: QArray, rows, lean: bool = True):
        codes = to_rows(q.codes, q.channel_axes)
        unit = 1 / q.grid.scale
        point, target = (by_group(a, unit) for a in (q.format.decode(codes, q.grid), rows))
        choices = point + jnp.clip(target - point, -NEAR, NEAR)
        # at an uneven grid half a step may be too far
        stays = q.format.encode(by_group(choices, q.grid.scale), q.grid) == codes
        huge = jnp.full(rows.shape, jnp.finfo(jnp.float32).max / 4)
        ends = [by_group(q.format.decode(q.format.encode(end, q.grid), q.grid), unit) for end in (-huge, huge)]
        choices = jnp.clip(jnp.where(stays, choices, point), *ends)
        return {"choices": choices} | _scales(self, q.grid), {"ends": ends, "grid": q.grid}

    def rows(self, format, variables, fixed, progress):
        grid = fixed["grid"]
        inside = by_group(jnp.clip(variables["choices"], *fixed["ends"]), grid.scale)
        hard = format.decode(format.encode(jax.lax.stop_gradient(inside), grid), grid)
        return _scaled(inside + jax.lax.stop_gradient(hard - inside), variables), 0.0

    @functools.partial(jax.jit, static_argnums=0)
    def finish(self, q: QArray, variables, fixed, rows) -> QArray:
        values = by_group(jnp.clip(variables["choices"], *fixed["ends"]), q.grid.scale)
        return _finish(q, q.format.encode(values, q.grid), variables)


Rounding = RectifiedSigmoid | StraightThrough


def _scales(rounding: Rounding, grid: Grid):
    return {"scales": jnp.zeros_like(grid.scale)} if rounding.scale_learning_rate else {}


def _scaled(rows, variables):
    return by_group(rows, jnp.exp(variables["scales"])) if "scales" in variables else rows


def _finish(q: QArray, codes, variables) -> QArray:
    grid = q.grid._replace(scale=q.grid.scale * jnp.exp(variables["scales"])) if "scales" in variables else q.grid
    return dataclasses.replace(q, codes=from_rows(codes, q.shape, q.channel_axes), grid=grid)
