"""Rows as sums of few low-bit points: what a channel loses to a coarse grid, a second coarse grid makes good."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int8, Num, UInt8

from brecq_jax.formats._format import SumOfIntegers
from brecq_jax.formats.uniform import SCALE_FLOOR

CANDIDATES = 400  # scales that the l2 search tries, evenly spaced up to the residual's largest value
FINEST = 2.0**-20  # of a row's largest weight: the least step of a point, below which float32 has nothing left to say


class PointGrid(NamedTuple):
    """The last point's grid, and the points before it, whose steps are kept in parts of the last one's.

    Every array has channels first. A channel of fewer points has zeros in `earlier` and `ratios` from its own last on.
    """

    scale: Float32[Array, "channels 1 1"]
    zero_point: Float32[Array, "channels 1 1"]
    earlier: Int8[Array, "channels earlier elements"]
    ratios: Float32[Array, "channels earlier 1"]


@dataclasses.dataclass(frozen=True)
class Multipoint(SumOfIntegers):
    """w ≈ Σ_i a_i w_i: each w_i on the symmetric grid of 2^bits − 1 levels in [−1, 1], each a_i a float of its channel.

    Points are found greedily, each for what the ones before left over. A channel has the fewest points, `points` at most, that
    bring its error in parts of its norm, ‖w − ŵ‖/‖w‖ here and ‖X(w − ŵ)‖/‖Xw‖ in `solvers.multipoint()`, to `tolerance`.

    `select` chooses a_i for a residual r: "linf" takes ‖r‖_∞, so that ‖r‖_∞ shrinks by 2^bits − 2 with each point; "l2" the best
    ‖r − a_i w_i‖₂ of 400 scales, which clips, and leaves a tail that slows the points behind it; "mixed" takes "l2" for a
    channel's last point and "linf" before. With granularity="per_tensor" the first point's a_1 is one for all channels, however
    many points they have: under "mixed" that of "l2", with which fewer channels need another.

    Codes are those of the last point: the earlier ones are part of the grid, so that learned rounding chooses in the last.
    Source: Liu et al. 2020, https://arxiv.org/abs/2002.09049; the paper's candidates for a_i are not used.

        >>> rows = jnp.array([[1.0, 0.4, -0.8]])
        >>> format = Multipoint(2, points=2, tolerance=0.0, select="linf")
        >>> grid = format.fit(rows)
        >>> jnp.round(format.decode(format.encode(rows, grid), grid), 2)
        Array([[ 1. ,  0.4, -1. ]], dtype=float32)
    """

    bits: int
    points: int = 8
    tolerance: float = 0.15  # 1.55 points a channel at 3 bits on digits, one seed; 0.3 there was no better than one point: a guess to begin with
    select: Literal["mixed", "linf", "l2"] = "mixed"
    granularity: Literal["per_tensor", "per_channel"] = "per_channel"

    grid_type: ClassVar[type] = PointGrid

    def __post_init__(self):
        if self.bits == 1 and not isinstance(self.bits, bool):
            raise ValueError(f"Multipoint: bits is 1, of which the only level is 0; write Binary(points={1 if self.points == 1 else 2}), of levels −1 and 1.")
        for name, least, most in (("bits", 2, 8), ("points", 1, 8)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"Multipoint: {name} is {value!r}; write an int from {least} to {most}.")
        if not self.tolerance >= 0:
            raise ValueError(f"Multipoint: tolerance is {self.tolerance}; write a relative error such as 0.3, or 0.0 for all points.")
        if self.select not in ("mixed", "linf", "l2"):
            raise ValueError(f'Multipoint: select is {self.select!r}; write "mixed", "linf" or "l2".')
        if self.granularity not in ("per_tensor", "per_channel"):
            raise ValueError(f'Multipoint: granularity is {self.granularity!r}; write "per_channel", or "per_tensor" for the first point.')

    @property
    def top(self) -> int:
        """The largest level: levels are −top … top."""
        return 2 ** (self.bits - 1) - 1

    def check(self, shape: tuple[int, int]) -> None:
        """Rows of every shape can be written."""

    @functools.partial(jax.jit, static_argnums=0)
    def fit(
        self, rows: Float[Array, "channels elements"], importance: Float[Array, "channels elements"] | None = None
    ) -> PointGrid:
        """Points for each row until its own relative error, each element weighted by importance, is no more than `tolerance`."""
        weight = 1.0 if importance is None else importance
        return self.fit_by(rows, lambda difference: jnp.sum(weight * jnp.square(difference), -1))

    def fit_by(self, rows: Float[Array, "channels elements"], energy: Callable[[Array], Array]) -> PointGrid:
        """Points for each row until energy(rows − ŵ) ≤ tolerance² · energy(rows), for any quadratic form per row."""
        peak = jnp.max(jnp.abs(rows), -1, keepdims=True)
        peak = jnp.max(peak, 0, keepdims=True) * jnp.ones_like(peak) if self.granularity == "per_tensor" else peak
        unit = jnp.where(peak > SCALE_FLOOR / FINEST, peak, 1)
        rows = jnp.where(peak > SCALE_FLOOR / FINEST, rows / unit, 0)
        allowed = self.tolerance**2 * energy(rows) if math.isfinite(self.tolerance) else jnp.full(len(rows), jnp.inf)
        residual, growing = rows, jnp.ones((len(rows), 1), bool)
        scale, steps, levels = jnp.zeros_like(unit), [], []
        for number in range(self.points):
            pooled = number == 0 and self.granularity == "per_tensor"
            last, step = (greedy_step(residual, self.top, select, pooled) for select in self._selects(pooled))
            left = residual - last * nearest_levels(residual, last, self.top)
            level = nearest_levels(residual, step, self.top)
            residual = residual - step * level
            finest = jnp.max(jnp.abs(residual), -1, keepdims=True) < FINEST * self.top
            enough = (energy(left) <= allowed)[:, None] | finest | (number == self.points - 1)
            scale = jnp.where(growing & enough, last, scale)
            growing &= ~enough
            steps.append(jnp.where(growing, step, 0))
            levels.append(jnp.where(growing, level, 0))
        scale = jnp.maximum(scale * unit, SCALE_FLOOR)
        slots = max(self.points - 1, 1)  # never none: orbax saves no empty arrays
        ratios = jnp.stack(steps[:slots], 1) * (unit / scale)[:, None]
        earlier = jnp.stack(levels[:slots], 1).astype(jnp.int8)
        scale = scale[..., None].astype(jnp.float32)
        return PointGrid(scale, jnp.full_like(scale, self.top), earlier, ratios.astype(jnp.float32))

    def encode(self, rows: Float[Array, "channels elements"], grid: PointGrid) -> UInt8[Array, "channels elements"]:
        """The last point's code: the nearest level to what the earlier points leave, plus top. Halves to even."""
        return self._codes(jnp.round(self._rest(rows, grid)))

    def decode(self, codes: Num[Array, "channels elements"], grid: PointGrid) -> Float32[Array, "channels elements"]:
        """scale · (code − zero_point + Σ ratio · earlier). Float codes are points between the points."""
        return grid.scale[..., 0] * (codes.astype(jnp.float32) - grid.zero_point[..., 0] + _offset(grid))

    def of_group(self) -> "Multipoint":
        """Refused: what earlier points left differs from element to element, and a search over columns knows one grid per row."""
        raise ValueError(
            "Multipoint: second-order rounding takes formats whose points are the same for all elements of a row.\n"
            "  Write solver=solvers.chain(solvers.multipoint(), solvers.annealed()), or weights=Uniform(…)."
        )

    def neighbors(
        self, rows: Float[Array, "channels elements"], grid: PointGrid
    ) -> tuple[UInt8[Array, "channels elements"], UInt8[Array, "channels elements"]]:
        """Codes (floor, floor + 1) of the last point."""
        floor = jnp.floor(self._rest(rows, grid))
        return self._codes(floor), self._codes(floor + 1)

    def storage_bits(self, codes: Array | jax.ShapeDtypeStruct, grid: PointGrid) -> int:
        """For each point that a channel has: bits per code and 32 per scale; and how many points it has.

        Counted from `ratios`, not from the padded arrays. Abstract grids cost what `points` in every channel would: the most.
        """
        channels = grid.scale.size
        elements = math.prod(codes.shape) // max(channels, 1)
        kept = self.points * channels if isinstance(grid.ratios, jax.ShapeDtypeStruct) else int(self.counts(grid).sum())
        return kept * (elements * self.bits + 32) + channels * math.ceil(math.log2(self.points))

    def counts(self, grid: PointGrid) -> np.ndarray:
        """How many points each channel has: int (channels,)."""
        return 1 + (np.asarray(grid.ratios)[..., 0] > 0).sum(1)

    def integers(
        self, codes: UInt8[Array, "channels elements"], grid: PointGrid
    ) -> tuple[Int8[Array, "points channels elements"], Float32[Array, "points channels"]]:
        """(levels, scales), the last point first: ŵ[c] = Σ_p scales[p, c] · levels[p, c]. Padding has scale 0."""
        last = (codes.astype(jnp.int16) - self.top).astype(jnp.int8)
        levels = jnp.concatenate([last[None], jnp.moveaxis(grid.earlier, 1, 0)])
        scale = grid.scale[..., 0, 0]
        return levels, jnp.concatenate([scale[None], scale * jnp.moveaxis(grid.ratios[..., 0], 1, 0)])

    def integer_product(
        self, inputs: Int[Array, "batch elements"], codes: UInt8[Array, "channels elements"], grid: PointGrid
    ) -> Float32[Array, "batch channels"]:
        """X ŵᵀ = Σ_p scales[p] · (X levels[p]ᵀ): one integer product for each point, int32 sums, a float sum at the end.

        `inputs` are the integers of an activation grid, zero point taken off; a convolution is the same sum of convolutions.
        """
        levels, scales = self.integers(codes, grid)
        products = jnp.einsum("be,pce->pbc", inputs.astype(jnp.int32), levels.astype(jnp.int32))
        return jnp.einsum("pbc,pc->bc", products.astype(jnp.float32), scales)

    def _selects(self, pooled: bool) -> tuple[str, str]:
        """How a channel's last point is selected, and how one that others follow; one step for both where all channels share it."""
        if self.select == "mixed":
            return ("l2", "l2") if pooled else ("l2", "linf")
        return self.select, self.select

    def _rest(self, rows, grid: PointGrid):
        return rows.astype(jnp.float32) / grid.scale[..., 0] - _offset(grid)

    def _codes(self, levels):
        return (jnp.clip(levels, -self.top, self.top) + self.top).astype(jnp.uint8)


def greedy_step(
    residual: Float[Array, "channels elements"], top: int, select: Literal["linf", "l2"], pooled: bool
) -> Float[Array, "channels 1"]:
    """The next point's step a / top for each row, or one for all rows if `pooled`; 0 where the residual is."""
    largest = jnp.max(jnp.abs(residual), -1, keepdims=True)
    largest = jnp.max(largest, 0, keepdims=True) * jnp.ones_like(largest) if pooled else largest
    if select == "linf":
        return largest / top

    def closer(best, share):
        step = share * largest / top
        error = jnp.sum(jnp.square(residual - step * nearest_levels(residual, step, top)), -1, keepdims=True)
        error = jnp.sum(error, 0, keepdims=True) * jnp.ones_like(error) if pooled else error
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, step, best[1])), None

    shares = np.float32(np.arange(CANDIDATES, 0, -1) / CANDIDATES)  # of equals the widest stays
    (_, step), _ = jax.lax.scan(closer, (jnp.full_like(largest, jnp.inf), largest), shares)
    return step


def nearest_levels(residual: Float[Array, "channels elements"], step: Float[Array, "channels 1"], top: int) -> Float[Array, "channels elements"]:
    """clip(round(r / step), −top, top), and 0 where step is."""
    return jnp.clip(jnp.round(jnp.where(step > 0, residual / jnp.where(step > 0, step, 1), 0)), -top, top)


def _offset(grid: PointGrid) -> Float[Array, "channels elements"]:
    return jnp.sum(grid.ratios * grid.earlier, 1)
