"""One and two bits a weight: signs with a scale, the sum of two of them, and signs with zero."""

import dataclasses
import functools
import math
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, Num, UInt8

from brecq_jax.formats._format import SumOfIntegers
from brecq_jax.formats.uniform import SCALE_FLOOR

THRESHOLD = 0.7  # of mean|w|: what is smaller becomes zero. TWN

Granularity = Literal["per_tensor", "per_channel"]


class TernaryGrid(NamedTuple):
    """Points −scale, 0, scale (zero_point is 1), and the magnitude above which a weight is not zero: encoding alone reads it."""

    scale: Float32[Array, "#channels 1 1"]
    zero_point: Float32[Array, "#channels 1 1"]
    threshold: Float32[Array, "#channels 1 1"]


class BinaryGrid(NamedTuple):
    """Points ±scale, and ±scale ± ratio · scale where there are two; ratio ≤ 1."""

    scale: Float32[Array, "#channels 1 1"]
    ratio: Float32[Array, "#channels 1 1"]


@dataclasses.dataclass(frozen=True)
class Ternary(SumOfIntegers):
    """w ≈ scale · (code − 1), code in {0, 1, 2}, written in two bits: scale · sign(w) where |w| > 0.7 · mean|w|, else zero.

    scale is the mean of |w| over what is not zero. The threshold is close to scale / 2, where rounding to the nearest point
    would put it, and not the same: this is the one format of ours whose `encode` is not the nearest point.
    Source: Li et al. 2016 (TWN), https://arxiv.org/abs/1605.04711, as in BinaryBERT's released code
    (https://github.com/huawei-noah/Pretrained-Language-Model at 0598f02, transformer/utils_quant.py, TwnQuantizer).

        >>> rows = jnp.array([[-1.0, 0.1, 0.0, 3.0]])
        >>> format = Ternary()
        >>> grid = format.fit(rows)
        >>> format.decode(format.encode(rows, grid), grid)
        Array([[-2.,  0.,  0.,  2.]], dtype=float32)
    """

    granularity: Granularity = "per_channel"

    bits: ClassVar[int] = 2
    grid_type: ClassVar[type] = TernaryGrid

    def __post_init__(self):
        _check_granularity(self)

    def check(self, shape: tuple[int, int]) -> None:
        """Rows of every shape can be written."""

    def fit(
        self, rows: Float[Array, "channels elements"], importance: Float[Array, "channels elements"] | None = None
    ) -> TernaryGrid:
        """Threshold, then scale, of each row or of the tensor; with `importance`, the mean of what is kept is weighted by it."""
        size = jnp.abs(rows.astype(jnp.float32))
        threshold = THRESHOLD * _mean(self, size)
        kept = (size > threshold) * (1.0 if importance is None else importance)
        total = _mean(self, kept)
        scale = jnp.where(total > 0, _mean(self, kept * size) / jnp.where(total > 0, total, 1), threshold / THRESHOLD)
        scale = jnp.maximum(scale, SCALE_FLOOR)[..., None]
        return TernaryGrid(scale, jnp.ones_like(scale), threshold[..., None])

    def encode(self, rows: Float[Array, "channels elements"], grid: TernaryGrid) -> UInt8[Array, "channels elements"]:
        """1 + sign(w) where |w| > threshold, else 1. A point is itself even where a solver moved the scale below the threshold."""
        size = jnp.abs(rows)
        return (1 + jnp.sign(rows) * ((size > grid.threshold[..., 0]) | (size >= grid.scale[..., 0]))).astype(jnp.uint8)

    def decode(self, codes: Num[Array, "channels elements"], grid: TernaryGrid) -> Float32[Array, "channels elements"]:
        """scale · (code − 1). Float codes are points between the points."""
        return grid.scale[..., 0] * (codes.astype(jnp.float32) - grid.zero_point[..., 0])

    def integers(
        self, codes: UInt8[Array, "channels elements"], grid: TernaryGrid
    ) -> tuple[Int8[Array, "1 channels elements"], Float32[Array, "1 #channels"]]:
        """Levels −1, 0 and 1 of the one term, and its scale."""
        return (codes.astype(jnp.int8) - 1)[None], grid.scale[None, :, 0, 0]

    def of_group(self) -> "Ternary":
        """The same with one scale for each row."""
        return Ternary()

    def neighbors(
        self, rows: Float[Array, "channels elements"], grid: TernaryGrid
    ) -> tuple[UInt8[Array, "channels elements"], UInt8[Array, "channels elements"]]:
        """Codes (floor, floor + 1)."""
        floor = jnp.floor(rows / grid.scale[..., 0])
        low, high = (jnp.clip(level, -1, 1) + 1 for level in (floor, floor + 1))
        return low.astype(jnp.uint8), high.astype(jnp.uint8)

    def storage_bits(self, codes: Array | jax.ShapeDtypeStruct, grid: TernaryGrid) -> int:
        """2 per code; 32 per scale and 32 per threshold, which files keep."""
        return 2 * math.prod(codes.shape) + 64 * math.prod(grid.scale.shape)


@dataclasses.dataclass(frozen=True)
class Binary(SumOfIntegers):
    """w ≈ Σ_p a_p s_p: one or two points, each a sign for every weight and a scale for each row or the tensor.

    One point is BWN: a = mean|w|, s = sign(w). A second one does the same for what the first left over. This is `Multipoint` at
    one bit, with all signs in one code, `points` bits long: code 2 · [s_1 > 0] + [s_2 > 0], a_1 ≥ a_2, so that codes ascend with
    their points. `passes.split_ternary` writes ternary weights so, where a_1 = a_2. The sign of zero is +.
    Source: Rastegari et al. 2016 (BWN), https://arxiv.org/abs/1603.05279, as in BinaryBERT's released code (BwnQuantizer, beside
    TwnQuantizer); two points: Bai et al. 2021 (BinaryBERT), https://arxiv.org/abs/2012.15701

        >>> rows = jnp.array([[-1.0, 1.0, -3.0, 3.0]])
        >>> format = Binary(points=2)
        >>> grid = format.fit(rows)
        >>> format.decode(format.encode(rows, grid), grid)
        Array([[-1.,  1., -3.,  3.]], dtype=float32)
    """

    points: int = 1
    granularity: Granularity = "per_channel"

    grid_type: ClassVar[type] = BinaryGrid

    def __post_init__(self):
        if isinstance(self.points, bool) or self.points not in (1, 2):
            raise ValueError(f"Binary: points is {self.points!r}; write 1 or 2. For more there is Multipoint.")
        _check_granularity(self)

    @property
    def bits(self) -> int:
        """Bits of a code: one for each point."""
        return self.points

    def check(self, shape: tuple[int, int]) -> None:
        """Rows of every shape can be written."""

    def fit(
        self, rows: Float[Array, "channels elements"], importance: Float[Array, "channels elements"] | None = None
    ) -> BinaryGrid:
        """Scales that are best for each point in turn: means of |w| and of what is left, weighted by `importance`."""
        weight = jnp.ones_like(rows) if importance is None else importance
        total = _mean(self, weight)
        left, scales = jnp.abs(rows.astype(jnp.float32)), []
        for _ in range(self.points):
            scales.append(_mean(self, weight * left) / jnp.where(total > 0, total, 1))
            left = jnp.abs(left - scales[-1])
        return binary_grid(*scales)

    def encode(self, rows: Float[Array, "channels elements"], grid: BinaryGrid) -> UInt8[Array, "channels elements"]:
        """Signs of w, and of what the first point leaves."""
        first = rows >= 0
        if self.points == 1:
            return first.astype(jnp.uint8)
        scale = grid.scale[..., 0]
        return (2 * first + (rows - jnp.where(first, scale, -scale) >= 0)).astype(jnp.uint8)

    def decode(self, codes: Num[Array, "channels elements"], grid: BinaryGrid) -> Float32[Array, "channels elements"]:
        """The sum of the points. Float codes are points between the points."""
        codes, ratio = codes.astype(jnp.float32), grid.ratio[..., 0]
        if self.points == 1:
            return grid.scale[..., 0] * (2 * codes - 1)
        ends = jnp.clip(codes, 0, 1) + jnp.clip(codes - 2, 0, 1)  # of the steps, the first and the last one
        return grid.scale[..., 0] * (2 * ratio * (ends - 1) + (1 - ratio) * (2 * jnp.clip(codes - 1, 0, 1) - 1))

    def integers(
        self, codes: UInt8[Array, "channels elements"], grid: BinaryGrid
    ) -> tuple[Int8[Array, "points channels elements"], Float32[Array, "points #channels"]]:
        """Levels −1 and 1 of each point, the larger first, and their scales."""
        levels = [2 * ((codes >> bit) & 1).astype(jnp.int8) - 1 for bit in reversed(range(self.points))]
        scale = grid.scale[:, 0, 0]
        return jnp.stack(levels), jnp.stack([scale, scale * grid.ratio[:, 0, 0]][: self.points])

    def of_group(self) -> "Binary":
        """The same with one scale for each row and point."""
        return Binary(self.points)

    def neighbors(
        self, rows: Float[Array, "channels elements"], grid: BinaryGrid
    ) -> tuple[UInt8[Array, "channels elements"], UInt8[Array, "channels elements"]]:
        """The last code whose point is not above, and the first one whose point is not below; where none is, the end."""
        top = 2**self.points - 1
        table = [self.decode(jnp.full((len(rows), 1), code, jnp.uint8), grid) for code in range(top + 1)]
        low = sum((rows >= point).astype(jnp.uint8) for point in table[1:])
        return low, jnp.minimum(low + (rows >= table[0]), top).astype(jnp.uint8)

    def storage_bits(self, codes: Array | jax.ShapeDtypeStruct, grid: BinaryGrid) -> int:
        """For each point, one bit per code and 32 per scale."""
        return self.points * (math.prod(codes.shape) + 32 * math.prod(grid.scale.shape))


def binary_grid(*scales: Float[Array, "#channels 1"]) -> BinaryGrid:
    """The grid of one or two scales, in whatever order they come."""
    scale = jnp.maximum(functools.reduce(jnp.maximum, scales), SCALE_FLOOR)
    # A second point that is nothing keeps a little, so that four codes stay four points.
    ratio = jnp.maximum(jnp.minimum(*scales), SCALE_FLOOR / 2) / scale if len(scales) == 2 else jnp.zeros_like(scale)
    return BinaryGrid(scale[..., None].astype(jnp.float32), ratio[..., None].astype(jnp.float32))


def sum_of_halves(
    format: Binary, first: Float[Array, "channels elements"], second: Float[Array, "channels elements"]
) -> tuple[UInt8[Array, "channels elements"], BinaryGrid]:
    """Codes and grid of two latent weights, each binarized by its own mean: the larger scale is the first point's."""
    scales = [_mean(format, jnp.abs(half)) for half in (first, second)]
    swapped = scales[0] < scales[1]
    signs = [jnp.where(swapped, b >= 0, a >= 0).astype(jnp.uint8) for a, b in ((first, second), (second, first))]
    return 2 * signs[0] + signs[1], binary_grid(*scales)


def _mean(format: Ternary | Binary, rows: Float[Array, "channels elements"]) -> Float[Array, "#channels 1"]:
    return jnp.mean(rows, None if format.granularity == "per_tensor" else 1, keepdims=True)


def _check_granularity(format: Ternary | Binary) -> None:
    if format.granularity not in ("per_tensor", "per_channel"):
        raise ValueError(f'{type(format).__name__}: granularity is {format.granularity!r}; write "per_channel" or "per_tensor".')
