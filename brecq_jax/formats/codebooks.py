"""Codebooks: the best points for a row, or for rows that share them, by exact one-dimensional k-means. Points are float16."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Float32, Integer, UInt8

from brecq_jax.formats._format import Format
from brecq_jax.formats.rows import HALF_MAX, codes_bits, to_half

BITS = (2, 4)  # a codebook of 256 points is longer than most rows
LEVELS = 1024  # weighted points that the values of rows with one codebook are gathered into: their squared costs are 4 MB
PENALTY = 1e30  # of a part with no points before its first: more than any cost of values scaled to [−1, 1]


class Codebooks(NamedTuple):
    """Row r takes the points of codebook `book[r]`, in ascending order."""

    points: Float16[Array, "books points"]
    book: Integer[Array, "rows 1"]


class RowPoints(NamedTuple):
    """The points of each row, in ascending order."""

    points: Float16[Array, "rows points"]


class _Codebook(Format):
    """What both kinds share: points of a row are known by `points_of(grid)`, in float32."""

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ValueError for rows that are no longer than a codebook."""
        if shape[1] <= 2**self.bits:
            raise ValueError(
                f"{type(self).__name__}: a row of {shape} has no more elements than the {2**self.bits} points of a codebook;\n"
                f"  write RowUniform({self.bits})."
            )

    def read(self, rows: Float[Array, "rows elements"], importance: Float[Array, "rows elements"] | None):
        """(rows as float16 can hold them, the weight of each element's error), in float32."""
        self.check(rows.shape)
        weights = jnp.ones(rows.shape, jnp.float32) if importance is None else importance.astype(jnp.float32)
        return jnp.clip(rows.astype(jnp.float32), -HALF_MAX, HALF_MAX), weights

    def encode(self, rows: Float[Array, "rows elements"], grid) -> UInt8[Array, "rows elements"]:
        """How many midpoints between points lie below each element."""
        return _nearest(rows, self.points_of(grid))

    def decode(self, codes: Integer[Array, "rows elements"], grid) -> Float32[Array, "rows elements"]:
        """The points that the codes name."""
        return jnp.take_along_axis(self.points_of(grid), codes.astype(jnp.int32), 1)


@dataclasses.dataclass(frozen=True)
class RowCodebook(_Codebook):
    """2^bits float16 points for each row, which minimise Σ importance · (w − ŵ)² but for float16. Packed: d · bits / 8 + 2 · 2^bits bytes.

    Source: row-wise k-means of Guan et al. 2019, https://arxiv.org/abs/1911.02079; solved exactly here, see `kmeans`.

        >>> rows = jnp.array([[0.0, 0.1, 1.0, 1.1, 5.0, 9.0]])
        >>> RowCodebook(2).fit(rows).points
        Array([[0.05, 1.05, 5.  , 9.  ]], dtype=float16)
    """

    bits: int

    grid_type = RowPoints

    def __post_init__(self):
        _check_bits(self)

    def __str__(self) -> str:
        return f"{self.bits} bit, a codebook a row"

    @functools.partial(jax.jit, static_argnums=0)
    def fit(self, rows: Float[Array, "rows elements"], importance: Float[Array, "rows elements"] | None = None) -> RowPoints:
        """The points of each row, by itself."""
        rows, weights = self.read(rows, importance)

        def one(both):
            order = jnp.argsort(both[0])
            return kmeans(both[0][order], both[1][order], 2**self.bits)

        return RowPoints(_sorted_half(jax.lax.map(one, (rows, weights))))

    def points_of(self, grid: RowPoints) -> Float32[Array, "rows points"]:
        return grid.points.astype(jnp.float32)

    def storage_bits(self, codes: Array | jax.ShapeDtypeStruct, grid: RowPoints) -> int:
        """Whole bytes of codes for each row, and 16 bits for each point."""
        return codes_bits(codes.shape, grid.points.shape[0], self.bits) + 16 * grid.points.size


@dataclasses.dataclass(frozen=True)
class ClusterCodebook(_Codebook):
    """`clusters` codebooks of 2^bits float16 points; each row takes the one that errs least. Packed: d · bits / 8 bytes and its number.

    Rows begin in clusters of like spread. Then, `rounds` times, every cluster gets its points and every row the better cluster. The
    values of a cluster are gathered into `LEVELS` steps of its own range first, and k-means is exact on their means.
    Source: cluster-wise k-means of Guan et al. 2019, https://arxiv.org/abs/1911.02079; rows are clustered by the error itself here.
    """

    bits: int
    clusters: int = 16
    rounds: int = 3

    grid_type = Codebooks

    def __post_init__(self):
        _check_bits(self)
        if not 1 <= self.clusters <= 2**16 or self.rounds < 1:
            raise ValueError(f"ClusterCodebook: clusters={self.clusters}, rounds={self.rounds}; write 1 to 65536 clusters and rounds ≥ 1.")

    def __str__(self) -> str:
        return f"{self.bits} bit, {self.clusters} codebooks"

    @functools.partial(jax.jit, static_argnums=0)
    def fit(self, rows: Float[Array, "rows elements"], importance: Float[Array, "rows elements"] | None = None) -> Codebooks:
        """The codebooks, and each row's own."""
        rows, weights = self.read(rows, importance)
        rank = jnp.argsort(jnp.argsort(jnp.std(rows, 1)))
        book = (rank * self.clusters // len(rows))[:, None]
        points = self._points(rows, weights, book)
        for _ in range(self.rounds - 1):
            points = self._points(rows, weights, self.choose(rows, points, weights).book)
        return self.choose(rows, points, weights)

    def choose(
        self, rows: Float32[Array, "rows elements"], points: Float16[Array, "clusters points"], weights: Float32[Array, "rows elements"]
    ) -> Codebooks:
        """These codebooks, and for each row the one that errs least."""

        def error(points):
            points = jnp.broadcast_to(points.astype(jnp.float32), (len(rows), len(points)))
            off = jnp.take_along_axis(points, _nearest(rows, points).astype(jnp.int32), 1) - rows
            return jnp.sum(weights * off**2, 1)

        book = jnp.argmin(jax.lax.map(error, points), 0)[:, None]
        return Codebooks(points, book.astype(jnp.uint8 if self.clusters <= 2**8 else jnp.uint16))

    def points_of(self, grid: Codebooks) -> Float32[Array, "rows points"]:
        # Of a stack of tables each has its own codebooks.
        table = jnp.arange(len(grid.book))[:, None] // (len(grid.book) * self.clusters // len(grid.points))
        return grid.points.astype(jnp.float32)[(grid.book + table * self.clusters)[:, 0]]

    def storage_bits(self, codes: Array | jax.ShapeDtypeStruct, grid: Codebooks) -> int:
        """Whole bytes of codes and of the codebook's number for each row, and 16 bits for each point."""
        own = 8 * np.dtype(grid.book.dtype).itemsize * grid.book.size
        return codes_bits(codes.shape, grid.book.shape[0], self.bits) + own + 16 * grid.points.size

    def _points(self, rows, weights, book: Integer[Array, "rows 1"]) -> Float16[Array, "clusters points"]:
        def of_clusters(reduce, values):
            found = reduce(values, book[:, 0].astype(jnp.int32), num_segments=self.clusters)
            return jnp.where(jnp.isfinite(found), found, 0)[:, None]  # of a cluster without rows: 0

        low, high = of_clusters(jax.ops.segment_min, jnp.min(rows, 1)), of_clusters(jax.ops.segment_max, jnp.max(rows, 1))
        width = (high - low) / LEVELS
        level = jnp.clip((rows - low[book[:, 0]]) / jnp.where(width > 0, width, 1)[book[:, 0]], 0, LEVELS - 1).astype(jnp.int32)
        place = book.astype(jnp.int32) * LEVELS + level

        def total(values):
            return jnp.zeros(self.clusters * LEVELS).at[place].add(values).reshape(self.clusters, LEVELS)

        mass, middle = total(weights), low + (jnp.arange(LEVELS) + 0.5) * width
        means = jnp.where(mass > 0, total(weights * rows) / jnp.where(mass > 0, mass, 1), middle)
        return _sorted_half(jax.lax.map(lambda both: kmeans(*both, 2**self.bits), (means, mass)))



def kmeans(values: Float32[Array, " n"], weights: Float32[Array, " n"], k: int) -> Float32[Array, " k"]:
    """The k points that minimise Σ weight · (value − nearest point)²; values ascend. Exact but for rounding errors.

    The best parts of sorted values are intervals, so D_m(j), the least cost of the first j values in m parts, is
    min_i D_{m−1}(i) + cost(i, j), i < j. All j at once: k − 1 minima over a matrix of costs, n² each. The parts are then read
    backwards, one column for each. Source: Wang and Song 2011, Ckmeans.1d.dp, eq. 1, https://doi.org/10.32614/RJ-2011-015
    """
    total = jnp.sum(weights)
    weights = jnp.where(total > 0, weights, 1) / jnp.where(total > 0, total, len(values))
    middle = jnp.sum(weights * values)
    spread = jnp.max(jnp.abs(values - middle))
    spread = jnp.where(spread > 0, spread, 1)
    centred = (values - middle) / spread  # so that differences of sums lose little

    def before(terms):
        return jnp.concatenate([jnp.zeros(1), jnp.cumsum(terms)])

    mass, sums, squares = before(weights), before(weights * centred), before(weights * centred**2)

    def cost(start, stop):
        inside, part = mass[stop] - mass[start], sums[stop] - sums[start]
        return jnp.maximum(squares[stop] - squares[start] - part**2 / jnp.where(inside > 0, inside, 1), 0)

    places = jnp.arange(len(values) + 1)
    start, stop = places[:, None], places[None]
    costs = jnp.where(start <= stop, cost(start, stop), PENALTY)

    def more(least, _):
        return jnp.min(least[:, None] + costs, 0), least

    _, before_last = jax.lax.scan(more, costs[0], None, length=k)  # row m: the least cost of m + 1 parts

    def cut(stop, least):
        start = jnp.argmin(least + jnp.where(places <= stop, cost(places, stop), PENALTY))
        return start, (start, stop)

    first, (starts, stops) = jax.lax.scan(cut, len(values), before_last[: k - 1], reverse=True)
    starts, stops = jnp.concatenate([jnp.zeros(1, starts.dtype), starts]), jnp.concatenate([first[None], stops])
    own = weights * ((starts[:, None] <= places[:-1]) & (places[:-1] < stops[:, None]))
    inside = jnp.sum(own, 1)
    edge = values[jnp.clip(stops - 1, 0, len(values) - 1)]  # a part without weight keeps the order
    return jnp.where(inside > 0, jnp.sum(own * values, 1) / jnp.where(inside > 0, inside, 1), edge)


def _nearest(rows: Float[Array, "rows elements"], points: Float32[Array, "rows points"]) -> UInt8[Array, "rows elements"]:
    between = (points[:, 1:] + points[:, :-1]) / 2
    return sum((rows > between[:, m : m + 1]).astype(jnp.uint8) for m in range(between.shape[1]))


def _sorted_half(points: Float32[Array, "rows points"]) -> Float16[Array, "rows points"]:
    return jnp.sort(to_half(points), 1).astype(jnp.float16)


def _check_bits(format: _Codebook) -> None:
    if format.bits not in BITS:
        raise ValueError(f"{type(format).__name__}: bits is {format.bits!r}; write 2 or 4; RowUniform(8) is as good as float.")
