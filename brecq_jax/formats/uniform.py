"""Evenly spaced grids, and the rules that choose their range."""

import abc
import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Num, UInt8

from brecq_jax.formats._format import Grid, ScalarFormat

# A dead channel has no range to divide. The floor keeps 1/scale² finite in float32, which the gradient to scale needs.
SCALE_FLOOR = 1e-15

Groups = Float32[Array, "channels groups elements"]
PerGroup = Float32[Array, "channels groups 1"]


class RangeRule(abc.ABC):
    """A frozen callable that chooses the grid of every group. The range it hands on always contains zero."""

    @abc.abstractmethod
    def __call__(self, format: "Uniform", groups: Groups, importance: Groups | None) -> Grid:
        """The grid for each group (the last axis is one group)."""


@dataclasses.dataclass(frozen=True)
class MinMax(RangeRule):
    """The range is [min(w, 0), max(w, 0)]: nothing is clipped, and one outlier sets the scale. Ignores importance.

    Source: Krishnamoorthi 2018, uniform affine quantizer, https://arxiv.org/abs/1806.08342
    """

    def __call__(self, format: "Uniform", groups: Groups, importance: Groups | None) -> Grid:
        return format.grid_between(*_bounds(groups))


@dataclasses.dataclass(frozen=True)
class LpRange(RangeRule):
    """The range is f · [min(w, 0), max(w, 0)], f of 1.00, 0.99, … 0.21 minimising mean(importance · |w − ŵ|^p).

    Source: Nahshan et al. 2019 (LAPQ), L_p layer-wise, https://arxiv.org/abs/1911.07190; p, the factors and one factor
    for both ends are those of BRECQ's released code (https://github.com/yhhhli/BRECQ, quant/quant_layer.py, `mse`).
    Unlike that code zero is always in the range, also for one-sided rows, so every zero point fits in `bits`.
    """

    p: float = 2.4
    steps: int = 80
    shrink: float = 0.01  # the range loses this fraction of the whole at each step

    def __post_init__(self):
        name, fields = type(self).__name__, {f.name: f.default for f in dataclasses.fields(self)}
        if not self.p > 0:
            raise ValueError(f"{name}: p is {self.p}; write a positive exponent, such as p={fields['p']}.")
        if self.steps < 1 or not self.shrink > 0 or not self.factors()[-1] > 0:
            raise ValueError(
                f"{name}: steps={self.steps} of shrink={self.shrink} leave no range at the end;\n"
                f"  write steps ≥ 1 and shrink > 0, such as steps={fields['steps']}, shrink={fields['shrink']}."
            )

    def factors(self) -> Float32[np.ndarray, " steps"]:
        """What the whole range is multiplied by, the greatest first."""
        return np.float32(1 - self.shrink * np.arange(self.steps))

    def __call__(self, format: "Uniform", groups: Groups, importance: Groups | None) -> Grid:
        return self.at(self.p, format, groups, importance)

    def at(self, p: Float[Array, ""] | float, format: "Uniform", groups: Groups, importance: Groups | None) -> Grid:
        """The same for another exponent, which may be traced: many are tried with one compilation."""
        low, high = _bounds(groups)
        ends = functools.partial(_best_factor, p, self.factors(), format, groups, importance)
        factor = ends(lambda f: (f * low, f * high))
        return format.grid_between(factor * low, factor * high)


def _best_factor(p, factors, format, groups, importance, ends) -> PerGroup:
    """The factor of least error, of grids between ends(factor)."""
    # Errors are counted in steps of the widest grid and importance in parts of its maximum: nothing under- or
    # overflows, and doubling the weights changes no comparison.
    unit = format.grid_between(*_bounds(groups)).scale
    if importance is not None:
        peak = jnp.max(importance, axis=-1, keepdims=True)
        importance = importance / jnp.where(peak > 0, peak, 1)

    def narrower(best, factor):
        grid = format.grid_between(*ends(factor))
        error = (jnp.abs(groups - _decode(_encode(groups, grid, format.bits), grid)) / unit) ** p
        score = jnp.mean(error if importance is None else importance * error, axis=-1, keepdims=True)
        best_score, best_factor = best
        better = score < best_score  # strictly: of equals the widest range stays
        return (jnp.where(better, score, best_score), jnp.where(better, factor, best_factor)), None

    # One factor at a time: all at once would hold `steps` copies of the weight.
    (_, factor), _ = jax.lax.scan(narrower, (jnp.full_like(unit, jnp.inf), jnp.ones_like(unit)), factors)
    return factor


@dataclasses.dataclass(frozen=True)
class TailRange(LpRange):
    """For activations, of which a few may be fifty times the rest: p = 2, f of 1.00, 0.96, 0.92, … 0.018, and each end by itself.

    One factor for both ends comes first; then, twice, the factor of the low end and that of the high one.
    Source: ours. MobileNetV2 at W8A4, nearest, went from 0 to 63 % right by this and by fairer samples (docs/results.md).
    """

    p: float = 2.0
    steps: int = 100
    shrink: float = 0.04  # the range loses this fraction of what is left at each step

    def factors(self) -> Float32[np.ndarray, " steps"]:
        """What the whole range is multiplied by, the greatest first."""
        return np.float32(1 - self.shrink) ** np.arange(self.steps, dtype=np.float32)

    def at(self, p: Float[Array, ""] | float, format: "Uniform", groups: Groups, importance: Groups | None) -> Grid:
        """The same for another exponent, which may be traced."""
        low, high = _bounds(groups)
        best = functools.partial(_best_factor, p, self.factors(), format, groups, importance)
        below = above = best(lambda f: (f * low, f * high))
        for _ in range(2):
            below = best(lambda f, above=above: (f * low, above * high))
            above = best(lambda f, below=below: (below * low, f * high))
        return format.grid_between(below * low, above * high)


@dataclasses.dataclass(frozen=True)
class Uniform(ScalarFormat):
    """Evenly spaced grid: w ≈ scale · (code − zero_point), code in [0, 2^bits), and zero is a point of the grid.

    Source: Jacob et al. 2018, eq. 1, https://arxiv.org/abs/1712.05877

    `symmetric` fixes zero_point = 2^(bits−1): the integers are −2^(bits−1) … 2^(bits−1) − 1, one more below than above.
    `granularity` says what shares a scale: "per_tensor", "per_channel", or that many consecutive elements of a channel.
    None leaves the choice to the planner; alone it means per channel. `ranges` None is LpRange() for weights and TailRange()
    for activations.

        >>> rows = jnp.array([[-1.0, 0.0, 0.9, 2.0]])
        >>> format = Uniform(2, ranges=MinMax())
        >>> grid = format.fit(rows)
        >>> format.decode(format.encode(rows, grid), grid)
        Array([[-1.,  0.,  1.,  2.]], dtype=float32)
    """

    bits: int
    symmetric: bool = False
    granularity: Literal["per_tensor", "per_channel"] | int | None = None
    ranges: RangeRule | None = None

    def __post_init__(self):
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise TypeError(f"Uniform: bits is {self.bits!r}; write an int from 2 to 8.")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"Uniform: bits is {self.bits}; write an int from 2 to 8.")
        if not isinstance(self.ranges, RangeRule | None):
            raise TypeError(f"Uniform: ranges is {self.ranges!r}; write MinMax(), LpRange() or TailRange(), with the brackets.")
        is_group_size = type(self.granularity) is int and self.granularity >= 1
        if not is_group_size and self.granularity not in ("per_tensor", "per_channel", None):
            raise ValueError(
                f"Uniform: granularity is {self.granularity!r};\n"
                '  write "per_tensor", "per_channel", or a group size such as 128.'
            )

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ValueError if the group size does not divide the elements of a channel."""
        size, (_, elements) = self.granularity, shape
        if isinstance(size, int) and elements % size:
            divisor = max(d for d in range(1, min(size, elements + 1)) if elements % d == 0)
            raise ValueError(
                f"Uniform: the group size {size} does not divide the {elements} elements of a channel (rows {shape});\n"
                f'  write granularity={divisor}, which does, or "per_channel".'
            )

    @functools.partial(jax.jit, static_argnums=0)
    def fit(
        self, rows: Float[Array, "channels elements"], importance: Float[Array, "channels elements"] | None = None
    ) -> Grid:
        """The grid that `ranges` chooses for each group. Compiled once per format and shape."""
        self.check(rows.shape)
        if importance is not None and importance.shape != rows.shape:
            raise ValueError(
                f"Uniform.fit: importance is {importance.shape} and rows are {rows.shape};\n"
                "  write one importance for each element."
            )
        ranges = self.ranges or LpRange()
        return ranges(self, self.pooled(rows), None if importance is None else self.pooled(importance))

    def pooled(self, rows: Float[Array, "channels elements"]) -> Float32[Array, "pools groups group_elements"]:
        """The groups that share a scale: all of the rows are one group where the format is per tensor."""
        return self._grouped(rows.reshape(1, -1) if self.granularity == "per_tensor" else rows)

    def encode(self, rows: Float[Array, "channels elements"], grid: Grid) -> UInt8[Array, "channels elements"]:
        """clip(round(w / scale + zero_point), 0, 2^bits − 1); halves to even before an integer zero_point is added."""
        codes = _encode(self._grouped(rows), grid, self.bits)
        return codes.astype(jnp.uint8).reshape(rows.shape)

    def decode(self, codes: Num[Array, "channels elements"], grid: Grid) -> Float32[Array, "channels elements"]:
        """scale · (code − zero_point). Float codes are points between the points; gradients flow to them and scale."""
        return _decode(self._grouped(codes), grid).reshape(codes.shape)

    def of_group(self) -> "Uniform":
        """The same with one scale for each row."""
        return dataclasses.replace(self, granularity="per_channel")

    @functools.partial(jax.jit, static_argnums=0)
    def grids_near(self, grid: Grid) -> Grid:
        """Other scales, and each with the zero point one code to either side, unless `symmetric` fixes it."""
        scaled = super().grids_near(grid)
        if self.symmetric:
            return scaled
        shifted = (scaled._replace(zero_point=jnp.clip(scaled.zero_point + s, 0, 2**self.bits - 1)) for s in (0, -1, 1))
        return jax.tree.map(lambda *g: jnp.concatenate(g), *shifted)

    def neighbors(
        self, rows: Float[Array, "channels elements"], grid: Grid
    ) -> tuple[UInt8[Array, "channels elements"], UInt8[Array, "channels elements"]]:
        """Codes (floor, floor + 1): a weight that lies on a point may still choose the next one."""
        whole, part = _parts(grid.zero_point)
        floor = jnp.floor(self._grouped(rows) / grid.scale + part) + whole
        low, high = (jnp.clip(code, 0, 2**self.bits - 1) for code in (floor, floor + 1))
        return low.astype(jnp.uint8).reshape(rows.shape), high.astype(jnp.uint8).reshape(rows.shape)

    def storage_bits(self, codes: Array | jax.ShapeDtypeStruct, grid: Grid) -> int:
        """bits per code, 32 per scale, and bits per zero_point unless `symmetric` fixes it."""
        per_group = 32 if self.symmetric else 32 + self.bits
        return math.prod(codes.shape) * self.bits + math.prod(grid.scale.shape) * per_group

    def grid_between(self, low: PerGroup, high: PerGroup) -> Grid:
        """The grid of least scale whose points span low ≤ 0 ≤ high.

        Symmetric grids reach both ends. Of asymmetric ones rounding zero_point moves both ends by up to half a step.
        """
        if self.symmetric:
            half = 2 ** (self.bits - 1)
            scale = jnp.maximum(jnp.maximum(-low / half, high / (half - 1)), SCALE_FLOOR)
            return Grid(scale, jnp.full_like(scale, half))
        top = 2**self.bits - 1
        scale = jnp.maximum((high - low) / top, SCALE_FLOOR)
        return Grid(scale, jnp.clip(jnp.round(-low / scale), 0, top))

    def _grouped(self, rows: Num[Array, "channels elements"]) -> Num[Array, "channels groups group_elements"]:
        self.check(rows.shape)
        channels, elements = rows.shape
        size = self.granularity if isinstance(self.granularity, int) else elements
        return rows.astype(jnp.float32).reshape(channels, elements // max(size, 1), size)


def fake_quantize(
    x: Float[Array, "..."], scale: Float[Array, "..."], zero_point: Float[Array, "..."], bits: int
) -> Float[Array, "..."]:
    """x rounded to the grid, with a gradient: x̂ = scale · round(clip(x/scale, −zero_point, 2^bits − 1 − zero_point)).

    ∂x̂/∂x is 1 inside the range and 0 outside; ∂x̂/∂scale is round(x/scale) − x/scale inside and the end outside.
    x̂ has the dtype of x.
    A zero point between integers (`Affine`) is added before the rounding and taken off after it.
    Source: Esser et al. 2020 (LSQ), eq. 3 and its straight-through gradient, https://arxiv.org/abs/1902.08153. Their
    ends −Q_N and Q_P are −zero_point and 2^bits − 1 − zero_point here. Their gradient scale 1/√(N·Q_P) belongs to the
    optimizer: not here.
    """
    whole, part = _parts(zero_point)
    low, high = -whole, 2**bits - 1 - whole
    steps = x / scale + part
    # `where`, since at a tie `jnp.clip` would share the gradient between x and the end.
    inside = (low < steps) & (steps < high)
    rounded = scale * (jnp.where(inside, _round_straight_through(steps), jnp.where(steps <= low, low, high)) - part)
    return rounded.astype(x.dtype)


def _round_straight_through(x):
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def _bounds(groups: Groups) -> tuple[PerGroup, PerGroup]:
    low, high = jnp.min(groups, axis=-1, keepdims=True), jnp.max(groups, axis=-1, keepdims=True)
    return jnp.minimum(low, 0), jnp.maximum(high, 0)


def _encode(groups, grid: Grid, bits: int):
    whole, part = _parts(grid.zero_point)
    return jnp.clip(jnp.round(groups / grid.scale + part) + whole, 0, 2**bits - 1)


def _parts(zero_point):
    """(integer, rest in (−1, 0]): what is added after rounding and before it. The rest of an integer is 0, which changes no value."""
    whole = jnp.ceil(zero_point)
    return whole, zero_point - whole


def _decode(codes, grid: Grid):
    return grid.scale * (codes - grid.zero_point)
