"""Rows of tables: evenly spaced points from a float bias, and the search for their range. Scale and bias are float16."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Float32, Num, UInt8

from brecq_jax.formats._format import Format

HALF_MAX = 65504.0  # the largest float16
ELEMENTS_AT_ONCE = 2**16  # of a table while ranges are searched: they stay in a core's cache
RATIOS = {2: 0.7, 4: 0.16, 8: 0.16}  # by bits: PyTorch's, but at 2 bits, where 0.16 of the range leaves nothing to find

PerRow = Float32[Array, " rows"]


class RowGrid(NamedTuple):
    """The points of a row are bias + scale · code. A negative scale is possible: where float16 rounds the bias above the row."""

    scale: Float16[Array, "rows 1"]
    bias: Float16[Array, "rows 1"]


@dataclasses.dataclass(frozen=True)
class GreedyRange:
    """A range narrowed step by step at the better end; the best strict local minimum of ‖w − ŵ‖₂ that was passed is taken.

    A step is the row's width over `bins`; the search ends when `ratio` of the width is gone. Where the error falls all the way,
    or nowhere, the whole range stays: the result is never worse than it. `ratio` None is `RATIOS` of the bits.
    Source: `choose_qparams_optimized` of PyTorch (ATen/native/quantized), for Guan et al. 2019, https://arxiv.org/abs/1911.02079
    """

    bins: int = 200
    ratio: float | None = None

    def __post_init__(self):
        if self.bins < 1 or not (self.ratio is None or 0 < self.ratio < 1):
            raise ValueError(f"GreedyRange: bins={self.bins}, ratio={self.ratio}; write bins ≥ 1 and 0 < ratio < 1, such as ratio=0.5.")

    def __call__(self, columns: Float32[Array, "elements rows"], bits: int) -> tuple[PerRow, PerRow]:
        """(low, high) of each row; elements come first, so that sums run over whole vectors."""
        first = low, high = jnp.min(columns, 0), jnp.max(columns, 0)
        step = (high - low) / self.bins
        ratio = RATIOS[bits] if self.ratio is None else self.ratio
        least_width = int(self.bins * (1 - ratio)) * step

        def wider(state):
            (low, high), *_, count = state
            return jnp.any(low + least_width < high) & (count < self.bins)  # of a row a few float32 wide, a step may be nothing

        def narrow(state):
            (low, high), error, best, best_error, count = state
            active = low + least_width < high
            without_low, without_high = _error(columns, low + step, high, bits), _error(columns, low, high - step, bits)
            minimum = active & (error < without_low) & (error < without_high) & (error < best_error)
            best = tuple(jnp.where(minimum, now, then) for now, then in zip((low, high), best, strict=True))
            best_error = jnp.where(minimum, error, best_error)
            from_below = without_low < without_high
            error = jnp.where(from_below, without_low, without_high)
            low = jnp.where(active & from_below, low + step, low)
            high = jnp.where(active & ~from_below, high - step, high)
            return (low, high), error, best, best_error, count + 1

        error = _error(columns, low, high, bits)
        return jax.lax.while_loop(wider, narrow, (first, error, first, error, 0))[2]


@dataclasses.dataclass(frozen=True)
class RowUniform(Format):
    """w ≈ bias + scale · code, code in [0, 2^bits); bias = low and scale = (high − bias) / (2^bits − 1), each rounded to float16.

    They are rounded before codes are chosen. What float16 cannot hold becomes its largest number; a scale of 0 becomes 1.
    `ranges` chooses [low, high] of each row; None is [min(w), max(w)]. Zero need not be a point. Packed, a row of d elements
    has d · bits / 8 + 4 bytes.
    Source: PyTorch's row-wise tables (ATen/native/quantized, embedding_bag_4bit_prepack), for
    Guan et al. 2019, https://arxiv.org/abs/1911.02079

        >>> rows = jnp.array([[0.5, 0.75, 1.5, 2.0]])
        >>> format = RowUniform(2)
        >>> format.decode(format.encode(rows, format.fit(rows)), format.fit(rows))
        Array([[0.5, 0.5, 1.5, 2. ]], dtype=float32)
    """

    bits: int
    ranges: GreedyRange | None = GreedyRange()

    grid_type = RowGrid

    def __post_init__(self):
        if self.bits not in RATIOS:
            raise ValueError(f"RowUniform: bits is {self.bits!r}; write 2, 4 or 8, or Uniform({self.bits!r}), which has no packed rows.")
        if not (self.ranges is None or isinstance(self.ranges, GreedyRange)):
            raise TypeError(f"RowUniform: ranges is {self.ranges!r}; write GreedyRange(), with the brackets, or None for the whole row.")

    def __str__(self) -> str:
        return f"{self.bits} bit rows, float16 bias, {'greedy' if self.ranges else 'whole'} range"

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ValueError for rows without elements."""
        if not shape[1]:
            raise ValueError(f"RowUniform: rows {shape} have no elements; keep them float.")

    @functools.partial(jax.jit, static_argnums=0)
    def fit(self, rows: Float[Array, "rows elements"], importance: Float[Array, "rows elements"] | None = None) -> RowGrid:
        """The grid of each row, by itself. Ignores importance."""
        self.check(rows.shape)

        rows = rows.astype(jnp.float32)
        low, high = in_parts(lambda rows: self.ranges(rows.T, self.bits), rows) if self.ranges else _extremes(rows)
        scale, bias = _grid(low, high, self.bits)
        return RowGrid(scale.astype(jnp.float16)[:, None], bias.astype(jnp.float16)[:, None])

    def encode(self, rows: Float[Array, "rows elements"], grid: RowGrid) -> UInt8[Array, "rows elements"]:
        """clip(round((w − bias) · (1 / scale)), 0, 2^bits − 1), halves to even."""
        scale, bias = (g.astype(jnp.float32) for g in grid)
        return _codes(rows.astype(jnp.float32), scale, bias, self.bits).astype(jnp.uint8)

    def decode(self, codes: Num[Array, "rows elements"], grid: RowGrid) -> Float32[Array, "rows elements"]:
        """bias + scale · code."""
        scale, bias = (g.astype(jnp.float32) for g in grid)
        return codes.astype(jnp.float32) * scale + bias

    def storage_bits(self, codes: Array | jax.ShapeDtypeStruct, grid: RowGrid) -> int:
        """Whole bytes of codes for each row, and 16 bits for its scale and for its bias."""
        return codes_bits(codes.shape, grid.scale.shape[0], self.bits) + 16 * (grid.scale.size + grid.bias.size)


def to_half(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """x at the nearest float16, in float32. A cast there and back would do, but under `jit` XLA may drop both."""
    _, exponent = jnp.frexp(x)
    unit = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent, -13) - 11)  # 11 digits; below 2^-14 numbers are 2^-24 apart
    return jnp.clip(jnp.round(x / unit) * unit, -HALF_MAX, HALF_MAX)


def codes_bits(shape: tuple[int, ...], rows: int, bits: int) -> int:
    """Bits of the codes where every row ends with a whole byte."""
    return rows * 8 * math.ceil(math.prod(shape) // max(rows, 1) * bits / 8)


def in_parts(function: Callable, rows: Float32[Array, "rows elements"]):
    """function(rows), some rows at a time: `function` sees each row by itself and keeps rows on axis 0."""
    count, elements = rows.shape
    size = max(1, min(count, ELEMENTS_AT_ONCE // elements))
    parts = jnp.pad(rows, ((0, -count % size), (0, 0))).reshape(-1, size, elements)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], jax.lax.map(function, parts))


def _extremes(rows: Float32[Array, "rows elements"]) -> tuple[PerRow, PerRow]:
    """(min, max) of each row, in one pass."""

    def wider(range, other):
        return jnp.minimum(range[0], other[0]), jnp.maximum(range[1], other[1])

    return jax.lax.reduce((rows, rows), (jnp.float32(jnp.inf), jnp.float32(-jnp.inf)), wider, (1,))


def _grid(low: PerRow, high: PerRow, bits: int) -> tuple[PerRow, PerRow]:
    bias = to_half(low)
    steps = 2**bits - 1 + 0 * low  # no constant: XLA would multiply by its inverse, which is not the quotient
    scale = to_half((high - bias) / steps)
    return jnp.where(scale == 0, 1, scale), bias


def _codes(rows, scale, bias, bits: int):
    return jnp.clip(jnp.round((rows - bias) * (1 / scale)), 0, 2**bits - 1)


def _error(columns: Float32[Array, "elements rows"], low: PerRow, high: PerRow, bits: int) -> PerRow:
    """‖w − ŵ‖₂ of each row."""
    scale, bias = _grid(low, high, bits)
    return jnp.sqrt(jnp.sum(jnp.square(_codes(columns, scale, bias, bits) * scale + bias - columns), 0))
