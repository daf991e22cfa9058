"""Embedding tables as packed rows: quantized chunk by chunk from host memory, and only the rows asked for are decoded."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer, UInt8

from brecq_jax._qarray import QArray, to_rows
from brecq_jax.formats import ClusterCodebook, RowCodebook, RowUniform

RowFormat = RowUniform | RowCodebook | ClusterCodebook
ELEMENTS_AT_ONCE = 2**20  # of a table that is packed: so many floats stay in a core's outer cache
SUMS_AT_ONCE = 2**18  # elements of the bags that grow side by side, for the same reason
ROWS_AT_ONCE = 32  # of a bag; a longer one is summed in pieces
ALIGNMENT = 64  # bytes: XLA:CPU reads what begins at a multiple in place, and copies all else first
SAMPLED_ROWS = 65_536  # evenly spread over the table: what shared codebooks are fitted to


@functools.partial(jax.tree_util.register_dataclass, data_fields=("rows", "points"), meta_fields=("format", "width"))
@dataclasses.dataclass(frozen=True, repr=False)
class PackedTable:
    """A table of which row r is the bytes `rows[r]`: its codes, then what it alone needs of the grid.

    Code i of a row is bits [i·bits, (i+1)·bits) of its bytes, the least significant bit first; the last byte is filled up
    with zeros. Then follow, little endian, scale and bias (`RowUniform`), the points (`RowCodebook`) or the number of
    its codebook (`ClusterCodebook`). With `RowUniform` at 2 and 4 bits this is the layout of PyTorch's
    `quantized::embedding_bag_{2,4}bit_prepack`, and its bytes with `GreedyRange(ratio=0.16)` or the whole range.

    A pytree. `rows` is a NumPy array in host memory as `pack_table` makes it; `jax.device_put(table)` moves it.
    """

    rows: Any  # uint8 (rows, bytes)
    points: Any  # float16 (clusters, points), the codebooks that rows share; None without
    format: RowFormat
    width: int  # elements of a row

    @property
    def storage_bits(self) -> int:
        """Bits of everything that is kept."""
        return 8 * self.rows.size + (0 if self.points is None else 16 * self.points.size)

    def __repr__(self) -> str:
        shape = getattr(self.rows, "shape", None)
        return f"PackedTable({shape} bytes for rows of {self.width}, {self.format})"


def pack_table(table: Any, format: RowFormat, rows_at_once: int | None = None) -> PackedTable:
    """Quantize and pack a table that need not fit on the device, some rows at a time.

        table = np.load("items.npy", mmap_mode="r")
        packed = pack_table(table, formats.RowUniform(4))

    Args:
      table: (rows, elements), anything with a shape that gives NumPy rows for a slice, as `np.memmap`; codebooks that are
        shared (`ClusterCodebook`) need a list of positions, too.
      format: of the rows.
      rows_at_once: how many are held as floats; None: those of about a million elements. The result does not depend on it.

    Raises:
      ValueError: not two axes, no rows, rows that the format cannot write, values that are not finite.
      TypeError: a format without packed rows.
    """
    if not isinstance(format, RowFormat):
        raise TypeError(f"pack_table: {format!r} has no packed rows; write RowUniform({getattr(format, 'bits', 4)}), RowCodebook or ClusterCodebook.")
    if len(table.shape) != 2 or 0 in table.shape:
        raise ValueError(f"pack_table: the table is {tuple(table.shape)}; write one of (rows, elements).")
    count, width = table.shape
    format.check((count, width))
    points = None
    if isinstance(format, ClusterCodebook):
        spread = np.linspace(0, count - 1, min(count, SAMPLED_ROWS)).astype(np.int64)
        sample = np.asarray(table[spread], np.float32)
        _check_finite(sample, "its sample")
        points = format.fit(sample).points
    packed, size = None, min(rows_at_once or -(-ELEMENTS_AT_ONCE // width), count)
    rows = _aligned((size, width), np.float32)
    for start in range(0, count, size):
        end = min(start + size, count)
        rows[: end - start], rows[end - start :] = table[start:end], 0
        _check_finite(rows, f"rows {start} to {end - 1}")
        part = np.asarray(_quantized(format, rows, points))  # is done with `rows` when it is there
        packed = np.empty((count, part.shape[1]), np.uint8) if packed is None else packed
        packed[start:end] = part[: end - start]
    return PackedTable(packed, None if points is None else np.asarray(points), format, width)


def packed(array: QArray) -> PackedTable:
    """The table of a QArray whose first axis counts rows: the weight of an `nn.Embed` in `Quantized.params`.

    Raises:
      TypeError: a format without packed rows.
      ValueError: rows that are not the first axis alone.
    """
    if not isinstance(array.format, RowFormat):
        raise TypeError(f"packed: {array.format} has no packed rows; quantize with RowUniform, RowCodebook or ClusterCodebook.")
    if array.channel_axes != (0,):
        raise ValueError(f"packed: the channels of {array} are its axes {array.channel_axes}; rows are the first axis, (0,).")
    points = array.grid.points if isinstance(array.format, ClusterCodebook) else None
    codes = to_rows(array.codes, (0,))
    return PackedTable(_joined(array.format, codes, array.grid), points, array.format, codes.shape[1])


def lookup(table: PackedTable, ids: Integer[Array, "*batch"] | Integer[np.ndarray, "*batch"]) -> Float32[Array, "*batch width"]:
    """The rows of these numbers, decoded. Rows in host memory are gathered there, and alone go to the device.

        >>> table = pack_table(np.eye(4, dtype=np.float32), RowUniform(4))
        >>> lookup(table, np.array([2]))
        Array([[0., 0., 1., 0.]], dtype=float32)

    Raises:
      ValueError: there is no such row (of numbers known at once; under `jit` the nearest row that there is stands in).
    """
    return _decoded(table.format, table.width, *_picked(table, _whole(ids, "ids")))


def embedding_bag(
    table: PackedTable,
    ids: Integer[Array, " n"] | Integer[np.ndarray, " n"],
    offsets: Integer[Array, " bags"] | Integer[np.ndarray, " bags"],
    weights: Float[Array, " n"] | Float[np.ndarray, " n"] | None = None,
) -> Float32[Array, "bags width"]:
    """Sums of rows: bag k is Σ weight · row over ids[offsets[k] : offsets[k+1]], the last one to the end; an empty one is zero.

    `offsets` ascend from 0. Rows in host memory are summed there, and the sums alone go to the device; under
    `jit` XLA:CPU adds up rows one by one, and is slower. Source: torch.nn.EmbeddingBag, mode "sum".

    Raises:
      ValueError: as `lookup`; shapes that do not fit; offsets that do not ascend from 0 to at most n.
    """
    ids, offsets = _whole(ids, "ids"), _whole(offsets, "offsets")
    if ids.ndim != 1 or offsets.ndim != 1 or not (weights is None or np.shape(weights) == ids.shape):
        raise ValueError(
            f"embedding_bag: ids {ids.shape}, offsets {offsets.shape}, weights {None if weights is None else np.shape(weights)}; "
            "write ids (n,), offsets (bags,) and weights (n,)."
        )
    if isinstance(offsets, np.ndarray) and (offsets[:1].tolist() != [0] or np.any(np.diff(np.append(offsets, len(ids))) < 0)):
        raise ValueError(f"embedding_bag: offsets {offsets} of {len(ids)} ids; write offsets that ascend from 0 for the first bag.")
    if isinstance(table.rows, np.ndarray) and not any(isinstance(a, jax.core.Tracer) for a in (ids, offsets, weights)):
        with jax.ensure_compile_time_eval():
            return jax.device_put(_bags_on_host(table, ids, offsets, weights))
    return _bags(table.format, table.width, *_picked(table, ids), offsets, weights)


def _whole(numbers, what: str):
    """NumPy integers, where the numbers are known at once."""
    if isinstance(numbers, jax.core.Tracer):
        return numbers
    known = np.asarray(numbers)
    if known.size and not np.issubdtype(known.dtype, np.integer):
        raise TypeError(f"{what} are {known.dtype}; write integers.")
    return known.astype(np.int64)


def _check_ids(table: PackedTable, ids: np.ndarray) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= len(table.rows)):
        raise ValueError(f"ids are {ids.min()} to {ids.max()}, and the table has rows 0 to {len(table.rows) - 1}.")


def _picked(table: PackedTable, ids):
    known = isinstance(ids, np.ndarray)
    if known:
        _check_ids(table, ids)
    if isinstance(table.rows, np.ndarray) and known:
        rows = _aligned((*ids.shape, table.rows.shape[1]), np.uint8)
        return np.take(table.rows, ids, axis=0, out=rows, mode="clip"), table.points
    return jnp.take(table.rows, ids, axis=0, mode="clip"), table.points


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decoded(format: RowFormat, width: int, rows: UInt8[Array, "*batch bytes"], points):
    batch, rows = rows.shape[:-1], rows.reshape(-1, rows.shape[-1])
    return _in_turns(_planes(format, width, rows, points), width).reshape(*batch, width)


def _in_turns(planes: list[Float32[Array, "rows codebytes"]], width: int) -> Float32[Array, "rows width"]:
    rows, size = planes[0].shape
    return jnp.stack(planes, -1).reshape(rows, size * len(planes))[:, :width]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _planes(format: RowFormat, width: int, rows: UInt8[Array, "rows bytes"], points) -> list[Float32[Array, "rows codebytes"]]:
    """Of the elements of each byte of codes the first, the second and so on: XLA:CPU decodes them four times faster than in turns."""
    size = _code_bytes(width, format.bits)
    tail = rows[:, size:]
    if isinstance(format, ClusterCodebook):
        grid = format.grid_type(points, _read(tail, np.uint8 if tail.shape[1] == 1 else np.uint16))
    elif isinstance(format, RowCodebook):
        grid = format.grid_type(_read(tail, np.float16))
    else:
        grid = format.grid_type(_read(tail[:, :2], np.float16), _read(tail[:, 2:], np.float16))
    grid, mask = jax.lax.optimization_barrier(grid), np.uint8(2**format.bits - 1)
    return [format.decode((rows[:, :size] >> np.uint8(shift)) & mask, grid) for shift in range(0, 8, format.bits)]


def _bags_on_host(table: PackedTable, ids, offsets, weights) -> Float32[np.ndarray, "bags width"]:
    """Sums of pieces of bags side by side: of all bags the first piece, then the second, the longest first.

    What no piece has is row 0 with weight 0.
    """
    _check_ids(table, ids)
    sums = _aligned((len(offsets), table.width), np.float32)
    sums[:] = 0
    lengths = np.diff(np.append(offsets, len(ids)))
    pieces = -(-lengths // ROWS_AT_ONCE)
    bag = np.repeat(np.arange(len(lengths)), pieces)
    nth = np.arange(len(bag)) - np.repeat(pieces.cumsum() - pieces, pieces)
    starts, left = offsets[bag] + ROWS_AT_ONCE * nth, np.minimum(lengths[bag] - ROWS_AT_ONCE * nth, ROWS_AT_ONCE)
    weights = np.ones(len(ids)) if weights is None else np.asarray(weights)
    ids, weights = np.append(ids, 0), np.append(weights.astype(np.float32), 0)
    size = 1 << min(max(len(bag) - 1, 0).bit_length(), max(1, SUMS_AT_ONCE // table.width).bit_length() - 1)
    rows, factors = _aligned((ROWS_AT_ONCE, size, table.rows.shape[1]), np.uint8), _aligned((ROWS_AT_ONCE, size), np.float32)
    order, step = np.lexsort((-left, nth)), np.arange(ROWS_AT_ONCE)[:, None]
    for some in (order[n : n + size] for n in range(0, len(order), size)):
        longest, which = left[some].max(), np.full(factors.shape, len(ids) - 1)
        which[:, : len(some)] = np.where(step < left[some], starts[some] + step, len(ids) - 1)
        np.take(table.rows, ids[which[:longest]], axis=0, out=rows[:longest], mode="clip")
        factors[:longest] = weights[which[:longest]]
        found = np.asarray(_sums(table.format, table.width, longest, rows, factors, table.points))[: len(some)]
        if nth[some[0]] == nth[some[-1]]:  # no bag comes twice
            sums[bag[some]] += found
        else:
            np.add.at(sums, bag[some], found)
    return sums


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(
    format: RowFormat, width: int, count: Integer[Array, ""], rows: UInt8[Array, "n bags bytes"], weights: Float32[Array, "n bags"], points
) -> Float32[Array, "bags width"]:
    """Σ weight · row of the first `count`, one row of each bag after the other."""

    def add(n, sums):
        planes = _planes(format, width, jax.lax.dynamic_index_in_dim(rows, n, keepdims=False), points)
        weight = jax.lax.dynamic_index_in_dim(weights, n, keepdims=False)[:, None]
        return [sum + weight * plane for sum, plane in zip(sums, planes, strict=True)]

    zeros = jnp.zeros((rows.shape[1], _code_bytes(width, format.bits)), jnp.float32)
    return _in_turns(jax.lax.fori_loop(0, count, add, [zeros] * (8 // format.bits)), width)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _bags(format: RowFormat, width: int, rows, points, offsets, weights):
    values = _decoded(format, width, rows, points)
    values = values if weights is None else values * weights[:, None]
    bag = jnp.searchsorted(offsets, jnp.arange(len(values)), side="right") - 1
    return jax.ops.segment_sum(values, bag, len(offsets), indices_are_sorted=True)


@functools.partial(jax.jit, static_argnums=0)
def _quantized(format: RowFormat, rows: Float32[Array, "rows elements"], points) -> UInt8[Array, "rows bytes"]:
    grid = format.fit(rows) if points is None else format.choose(rows, points, jnp.ones_like(rows))
    return _joined(format, format.encode(rows, grid), grid)


@functools.partial(jax.jit, static_argnums=0)
def _joined(format: RowFormat, codes: UInt8[Array, "rows elements"], grid) -> UInt8[Array, "rows bytes"]:
    own = (grid.book,) if isinstance(format, ClusterCodebook) else grid
    return jnp.concatenate([_packed(codes, format.bits), *map(_bytes, own)], 1)


def _packed(codes: UInt8[Array, "rows elements"], bits: int) -> UInt8[Array, "rows bytes"]:
    per_byte = 8 // bits
    # The barrier: XLA would quantize each element where it is packed, which is slow at every second or fourth element.
    codes = jnp.pad(jax.lax.optimization_barrier(codes), ((0, 0), (0, -codes.shape[1] % per_byte)))
    parts = [codes[:, n::per_byte] << np.uint8(n * bits) for n in range(per_byte)]
    return functools.reduce(jnp.bitwise_or, parts)


def _bytes(values: Array) -> UInt8[Array, "rows bytes"]:
    return jax.lax.bitcast_convert_type(values, jnp.uint8).reshape(len(values), -1)


def _read(rows: UInt8[Array, "rows bytes"], dtype) -> Array:
    size = np.dtype(dtype).itemsize
    return jax.lax.bitcast_convert_type(rows.reshape(len(rows), rows.shape[1] // size, size) if size > 1 else rows, dtype)


def _code_bytes(width: int, bits: int) -> int:
    return -(-width * bits // 8)


def _check_finite(rows: Float32[np.ndarray, "rows elements"], where: str) -> None:
    if not np.isfinite(rows).all():
        raise ValueError(f"pack_table: {where} have values that are not finite. Check the table.")


def _aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An empty array that XLA:CPU reads where it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
