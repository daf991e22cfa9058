"""What a number format is: a grid fitted to rows, codes that name its points, and the bits both cost.

Every format sees a weight as **rows**: float32 of shape (channels, elements). Bringing an array to this layout is the
caller's work (`brecq_jax._qarray.to_rows`), so nothing here knows of kernels, layers or models.
"""

import abc
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, Num, UInt8

SCALES_NEAR = (0.8, 0.9, 1.0, 1.1, 1.2, 1.35)  # a range fitted to weights alone is often too narrow for what they make: measured


class Grid(NamedTuple):
    """All parameters that fix the representable points; arrays only, so a pytree to learn and to map over.

    Both are (channels or 1, groups or 1, 1) and broadcast against rows reshaped to (channels, groups, group_elements).
    """

    scale: Float32[Array, "#channels #groups 1"]
    zero_point: Float32[Array, "#channels #groups 1"]


class Format(abc.ABC):
    """A way to write rows as codes. decode(encode(rows, grid), grid) is the point of the grid nearest to rows (but for `Ternary`).

    Formats are frozen, hashable dataclasses without arrays: static under `jit`, equal when their settings are.
    """

    bits: int
    grid_type: ClassVar[type] = Grid  # the NamedTuple of arrays that `fit` returns; those of one row each have rows on axis 0

    @abc.abstractmethod
    def check(self, shape: tuple[int, int]) -> None:
        """Raise ValueError if rows of this shape (channels, elements) cannot be written in this format."""

    @abc.abstractmethod
    def fit(
        self, rows: Float[Array, "channels elements"], importance: Float[Array, "channels elements"] | None = None
    ) -> tuple:
        """The grid for these rows, a `grid_type`; `importance` weighs the error of each element."""

    @abc.abstractmethod
    def encode(self, rows: Float[Array, "channels elements"], grid: tuple) -> UInt8[Array, "channels elements"]:
        """The code of the point nearest to each element."""

    @abc.abstractmethod
    def decode(self, codes: Num[Array, "channels elements"], grid: tuple) -> Float32[Array, "channels elements"]:
        """The points that the codes name."""

    @abc.abstractmethod
    def storage_bits(self, codes: Array | jax.ShapeDtypeStruct, grid: tuple) -> int:
        """Bits to store the codes and the grid. Reads shapes only, so abstract arrays will do."""


class ScalarFormat(Format):
    """A format whose points lie on a line, each element coded by itself: what rounding can choose between."""

    @abc.abstractmethod
    def of_group(self) -> "ScalarFormat":
        """The format of one group of elements as a row of its own: the same points, and nothing shared."""

    @functools.partial(jax.jit, static_argnums=0)
    def grids_near(self, grid: tuple) -> tuple:
        """Other grids (`grid_type`) for the same rows, stacked on a new first axis: what a search may try. Here other scales."""
        return jax.tree.map(lambda *g: jnp.stack(g), *(grid._replace(scale=grid.scale * f) for f in SCALES_NEAR))

    @abc.abstractmethod
    def neighbors(
        self, rows: Float[Array, "channels elements"], grid: Grid
    ) -> tuple[UInt8[Array, "channels elements"], UInt8[Array, "channels elements"]]:
        """Codes (low, high) of the closest points either side: decode(low) ≤ rows ≤ decode(high).

        Outside the range both are the end point, and rounding has nothing to choose.
        """


class SumOfIntegers(ScalarFormat):
    """A scalar format whose rows are Σ_p scale_p · level_p: what multiplies them is a sum of integer products."""

    @abc.abstractmethod
    def integers(
        self, codes: UInt8[Array, "channels elements"], grid: tuple
    ) -> tuple[Int8[Array, "terms channels elements"], Float32[Array, "terms #channels"]]:
        """(levels, scales): decode(codes, grid)[c] = Σ_p scales[p, c] · levels[p, c]. The first term's scale is never 0."""
