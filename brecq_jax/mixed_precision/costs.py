"""What a plan costs: true size, multiplications times bits, latency from a table."""

import csv
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import jax

from brecq_jax._graph import Graph, Op
from brecq_jax._products import Product
from brecq_jax.formats import Format, Multipoint, PerToken, Sparq

FLOAT_BITS = 32
Latency = Mapping[tuple[str, int, int], float]  # (op, weight bits, activation bits) -> µs of one example; 32 bits are float


@dataclasses.dataclass(frozen=True)
class Budget:
    """Upper bounds, each None or a number. `size_bits`: all parameters, grids and float leaves included. `bops`: Σ multiplications of one
    example × weight bits × activation bits, or, of a product of two values, the bits of both. `latency_us`: Σ of the latency table, one
    example; products of two values are not in it. A `Multipoint` counts as all its points, a product each: the most that it can have.

    Raises:
      ValueError: a bound that is negative or not a number.
    """

    size_bits: float | None = None
    bops: float | None = None
    latency_us: float | None = None

    def __post_init__(self):
        for name, value in self.limits.items():
            if not value >= 0:
                raise ValueError(f"Budget: {name}={value}: write a number, as {name}=1e6, or None for no bound.")

    @property
    def limits(self) -> dict[str, float]:
        """The bounds that are given."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class SystolicArray:
    """A precision-scalable systolic array: latency = max(arithmetic, memory) of each op, with nothing in between.

    arithmetic = MACs / (peak · utilisation), where peak grows as 8/weight_bits · 8/act_bits: 256 GMAC/s at 8×8 bits, 512 at 8×4, 4 T at
    2×2. memory = (bits of weights + bits of inputs) / bandwidth.

    Source: the peaks are those of BRECQ's accelerator (https://arxiv.org/abs/2102.05426), whose simulator was never released: this is
    an analytic stand-in. `depthwise_utilisation` and `bandwidth_gbit` are guesses of ours.
    """

    peak_gmacs: float = 256.0  # per second, at 8×8 bits
    depthwise_utilisation: float = 1 / 16  # of the array, by an op with one input channel a group: a guess
    bandwidth_gbit: float = 100.0  # per second, from memory to the array: a guess

    def latency(self, graph: Graph, bits: Sequence[int] = (*range(2, 9), FLOAT_BITS)) -> dict[tuple[str, int, int], float]:
        """The table of all ops that multiply, for all pairs of these bits. µs."""
        return {
            (op.name, w, a): self._op(graph, op, w, a) for op in graph.ops if op.kind != "embed" for w in bits for a in bits
        }

    def _op(self, graph: Graph, op: Op, weight_bits: int, act_bits: int) -> float:
        used = self.depthwise_utilisation if _is_depthwise(graph, op) else 1.0
        arithmetic = macs(graph, op) * weight_bits * act_bits / (8 * 8 * self.peak_gmacs * used)
        values = graph.flat.types[op.data].size // batch_size(graph)
        memory = (math.prod(graph.weights[op.weight].shape) * weight_bits + values * act_bits) / self.bandwidth_gbit
        return max(arithmetic, memory) * 1e-3


def read_latency(path: str | pathlib.Path) -> dict[tuple[str, int, int], float]:
    """A table of your own: CSV with the columns layer, weight_bits, act_bits, us. 32 bits are float; write `#` before remarks.

    Raises:
      ValueError: other columns, a cell that is no number, a time that is negative or not finite, or two rows for the same op and bits.
    """
    with open(path, newline="") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if not line.startswith("#")]
        rows = csv.DictReader(line for _, line in lines)
        wanted = {"layer", "weight_bits", "act_bits", "us"}
        if set(rows.fieldnames or ()) != wanted:
            raise ValueError(f"read_latency: {path} has the columns {rows.fieldnames}. Write {', '.join(sorted(wanted))}.")
        found = {}
        for row in rows:
            line = lines[rows.line_num - 1][0]
            try:
                key, us = (row["layer"], int(row["weight_bits"]), int(row["act_bits"])), float(row["us"])
            except (TypeError, ValueError):
                raise ValueError(f"read_latency: {path}, line {line}: {row} is not understood. Write numbers.") from None
            if not 0 <= us < math.inf:
                raise ValueError(f"read_latency: {path}, line {line}: {us} µs is no time. Write a number that is 0 or more.")
            if key in found:
                raise ValueError(f"read_latency: {path}, line {line}: {key} has a row already, of {found[key]} µs. Leave one of them.")
            found[key] = us
    return found


def write_latency(latency: Latency, path: str | pathlib.Path):
    """The inverse of `read_latency`."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("layer", "weight_bits", "act_bits", "us"))
        writer.writerows((*key, us) for key, us in latency.items())


def _is_depthwise(graph: Graph, op: Op) -> bool:
    """Whether a convolution has groups of one input channel each."""
    params, kernel = graph.flat.steps[op.step].params, graph.flat.types[op.weight_value].shape
    return op.kind == "conv" and params["feature_group_count"] > 1 and kernel[params["dimension_numbers"].rhs_spec[1]] == 1


def points(format: Format | Sparq | PerToken | None) -> int:
    """How many products with what an op reads a weight is: the most points that a channel may have; 1 but for `Multipoint`."""
    return format.points if isinstance(format, Multipoint) else 1


def product_bits(format: Format | Sparq | PerToken | None) -> int:
    """Bits of one number in a multiplication, all points together; 32 in float."""
    return FLOAT_BITS if format is None else format.bits * points(format)


def macs(graph: Graph, op: Op | Product) -> int:
    """Multiplications of one example."""
    return op.macs // batch_size(graph)


def batch_size(graph: Graph) -> int:
    """Examples in the batch that was traced."""
    return jax.tree.leaves(graph.batch_types)[0].shape[0]


def latency_of(latency: Latency, op: str, weight_bits: int, act_bits: int) -> float:
    """The table's entry.

    Raises:
      ValueError: it has none.
    """
    if (op, weight_bits, act_bits) not in latency:
        known = sorted(key[1:] for key in latency if key[0] == op)
        raise ValueError(
            f"latency: the table has no ({op}, {weight_bits}, {act_bits}); of this layer it has {known}. "
            "Add a row for each layer and pair of bits; 32 bits are float."
        )
    return latency[op, weight_bits, act_bits]
