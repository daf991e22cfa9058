"""Which ops of a traced program can compute with integers, why the others stay float, and what an integer op takes over.

    y = A · (Σ x·w + K) + B,      code = clip(round(A' · (Σ x·w + K) + B'), low, high)

x and w are int8: codes less their zero point where that fits (7 bits and fewer), else less 128. K is an integer that makes
up for what is left of the zero points. Of a weight that is a sum, w = Σ_p ratio_p · w_p, the bracket is Σ_p ratio_p · (Σ x·w_p + K_p), a
product of integers for each term and a float sum of them. A and B hold both scales, a bias and batch norm: every affine step per channel that
follows the op and alone reads it. The second form is for an op whose result is only ever read as codes: A' = A / scale.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax._graph import Graph, Op
from brecq_jax._interpret import Block, Program
from brecq_jax._jaxpr import STRUCTURAL, Step
from brecq_jax._qarray import QArray, from_rows, to_rows
from brecq_jax.formats import Affine, Grid, PerToken, Sparq, SumOfIntegers, Uniform

AFFINE = ("add", "sub", "mul", "div", "neg")
CLIPPING = ("max", "min", "clamp", "custom_jvp_call")  # what relu, relu6 and clip are made of; each is tried on PROBES
HUGE = 3e38
PROBES = np.float32([-HUGE, HUGE, 0.5, -1e-3, 7, -3, 1e-3, 20, -0.1, 2.5, 0, -100, 5.5, 1, -1, 1e3])


@dataclasses.dataclass(frozen=True)
class Taken:
    """What an integer op takes over of the steps after it. `codes_for`: the value whose codes it gives; None: it gives floats."""

    op: str
    affine: int = 0
    clips: int = 0
    codes_for: str | None = None


class Reading:
    """A graph, with who makes and who reads each value."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.maker = {out: step for step in graph.flat.steps for out in step.outputs}
        self.readers: dict[int, list[Step | None]] = {}
        for step in graph.flat.steps:
            for ident in step.inputs:
                self.readers.setdefault(ident, []).append(step)
        for ident in graph.flat.outputs:
            self.readers.setdefault(ident, []).append(None)
        self.sites = {read.site_value for read in (*graph.ops, *graph.factors)}

    def step(self, op: Op) -> Step:
        return self.graph.flat.steps[op.step]

    def chain(self, op: Op) -> list[Step]:
        """The reshapes and transposes between a weight and its op; casts are no matter for codes."""
        found, ident = [], op.weight_value
        while ident not in self.graph.origins:
            found.append(self.maker[ident])
            ident = found[-1].inputs[0]
        return [s for s in reversed(found) if s.primitive != "convert_element_type"]

    def followers(self, value: int, primitives: Sequence[str]) -> list[Step]:
        """Steps after a value, each the only one to read the result before, float32, that join it with parameters alone."""
        found: list[Step] = []
        types, data = self.graph.flat.types, self.graph.data
        while value not in self.sites and len(self.readers.get(value, ())) == 1:
            (step,) = self.readers[value]
            if step is None or step.primitive not in primitives or len(step.outputs) != 1:
                break
            slots = [step.operand(n) for n in range(len(step.arguments))]
            out = types[step.outputs[0]]
            if slots.count(value) > 1 or any(i in data and i != value for i in step.inputs) or (step.primitive == "div" and slots[0] != value):
                break
            if out.shape != types[value].shape or not types[value].dtype == out.dtype == jnp.float32:
                break
            found.append(step)
            value = step.outputs[0]
        return found

    def steps_after(self, op: Op) -> tuple[list[Step], list[Step]]:
        """The steps an op could take over: affine ones, then clipping ones."""
        value = self.step(op).outputs[0]
        affine = self.followers(value, AFFINE)
        return affine, self.followers(affine[-1].outputs[0] if affine else value, CLIPPING)

    def read_as_codes_by(self, value: int) -> list[Op] | None:
        """The ops that read a value, if nothing else does."""
        ops = [op for op in self.graph.ops if op.data == value]
        steps = [self.step(op) for op in ops]
        return ops if ops and all(any(r is s for s in steps) for r in self.readers[value]) else None


def why_float(reading: Reading, op: Op, weight: QArray | None, formats: Mapping[str, Uniform | Sparq | PerToken]) -> str | None:
    """Why an op cannot compute with integers, or None if it can."""
    graph = reading.graph
    if op.kind == "embed":
        return "a lookup multiplies nothing"
    if weight is None:
        return "its weight is float"
    if not isinstance(weight.format, Uniform | SumOfIntegers):
        return f"its points are those of {type(weight.format).__name__}, and not evenly spaced"
    if isinstance(weight.format, Affine):
        return "the zero point of its weight is no integer"
    if op.site not in formats:
        return "what it reads is float"
    if isinstance(formats[op.site], Sparq):
        return "what it reads is re-coded by Sparq, for hardware that has its multipliers"
    if isinstance(formats[op.site], PerToken):
        return "what it reads has a range for each token, found when it is run, and no scale that is known before"
    if isinstance(weight.format.granularity, int):
        return f"its weight has a scale for every {weight.format.granularity} elements, and a sum of integers one for all it adds"
    if isinstance(formats[op.site], Affine):
        return "the zero point of what it reads is no integer"
    if op.computed:
        return f"its weight goes through {', '.join(dict.fromkeys(op.computed))} first"
    if reading.step(op).params.get("batch_group_count", 1) > 1:
        return "it convolves groups of the batch"
    terms = math.prod(np.delete(graph.flat.types[op.weight_value].shape, _kept(reading, op)))
    if terms * (2**weight.format.bits - 1) * (2 ** formats[op.site].bits - 1) >= 2**31:
        return f"sums of {terms} products could pass 2^31"
    return None


def integer_terms(reading: Reading, op: Op, weight: QArray) -> list[jax.Array]:
    """The weight as the op reads it, in int8: codes less the zero point, or less 128 for 8 bits. A sum of integers: each of them."""
    return [_through(reading.chain(op), levels) for levels, _ in _terms(weight)]


def _terms(weight: QArray) -> list[tuple[jax.Array, jax.Array]]:
    """(int8 levels in the weight's shape, scale that broadcasts against them) of each term."""
    if isinstance(weight.format, SumOfIntegers):
        levels, scales = weight.format.integers(to_rows(weight.codes, weight.channel_axes), weight.grid)
        return [(from_rows(level, weight.shape, weight.channel_axes), _broadcastable(scale, weight)) for level, scale in zip(levels, scales, strict=True)]
    shift = 128 if weight.format.bits == 8 else _broadcastable(weight.grid.zero_point, weight).astype(jnp.int16)
    return [((weight.codes.astype(jnp.int16) - shift).astype(jnp.int8), _broadcastable(weight.grid.scale, weight))]


def left_over(zero_point, bits: int):
    """The zero point that codes keep after their shift: int32."""
    return zero_point.astype(jnp.int32) - 128 if bits == 8 else jnp.zeros(zero_point.shape, jnp.int32)


def encode(x, grid: Grid, bits: int, low=None, high=None):
    """int8 codes of x, shifted as `integer_terms` says; halves to even. `low`, `high`: further bounds, in steps from zero."""
    steps = jnp.round(x.astype(jnp.float32) / grid.scale)
    bounds = -grid.zero_point, 2**bits - 1 - grid.zero_point
    if low is not None:
        bounds = jnp.maximum(bounds[0], low), jnp.minimum(bounds[1], high)
    return (jnp.clip(steps, *bounds) + left_over(grid.zero_point, bits)).astype(jnp.int8)


def op_constants(reading: Reading, op: Op, weight: QArray, grid: Grid, bits: int, value_of) -> dict:
    """Arrays of an op for `choose`: scale, ratios, offsets, and what the steps after it do. Traced; `value_of(id)`: a parameter-derived value.

    `uniform`: whether one scale and zero point serve each sum. `affine`: (A, B, per channel?) after each follower.
    """
    shape, chain = reading.graph.flat.types[op.weight_value].shape, reading.chain(op)
    summed = tuple(a for a in range(len(shape)) if a not in _kept(reading, op))
    first = tuple(0 if a in summed else slice(None) for a in range(len(shape)))

    def along(per_row):
        """A number per channel as the op reads it: (of each sum, whether it is the same for all that the sum adds)."""
        full = _through(chain, jnp.broadcast_to(per_row, weight.shape))
        return full[first], jnp.all(full == full.max(summed, keepdims=True))

    terms = [(_through(chain, levels), *along(scale)) for levels, scale in _terms(weight)]
    is_sum = isinstance(weight.format, SumOfIntegers)  # its levels are about zero
    zero, same_zero = along(jnp.int32(0) if is_sum else _broadcastable(weight.grid.zero_point, weight))
    weight_zero, input_zero = left_over(zero, 0 if is_sum else weight.format.bits), left_over(grid.zero_point, bits)
    count = math.prod(shape[a] for a in summed)
    offsets = [input_zero * (count * weight_zero - levels.sum(summed, dtype=jnp.int32)) for levels, _, _ in terms]
    base = terms[0][1]
    scale, weight_zero = (_as_output(reading, op, a) for a in (base * grid.scale, weight_zero))
    return {
        "uniform": functools.reduce(jnp.logical_and, (same for _, _, same in terms), same_zero),
        "weight_zero": weight_zero,
        "offsets": [_as_output(reading, op, a) for a in offsets],
        "ratios": [_as_output(reading, op, scale / base) for _, scale, _ in terms[1:]],
        "affine": _affine(reading, op, scale, value_of),
    }


def _affine(reading: Reading, op: Op, scale, value_of) -> list:
    found = [(scale, jnp.zeros_like(scale), jnp.array(True))]
    value = reading.step(op).outputs[0]
    for step in reading.steps_after(op)[0]:
        a, b, per_channel = found[-1]
        shape = reading.graph.flat.types[value].shape
        first = tuple(slice(None) if n > 1 else slice(0, 1) for n in scale.shape)

        def at(fill, step=step, value=value, shape=shape):
            (out,) = step.run(*(jnp.full(shape, fill, jnp.float32) if i == value else value_of(i) for i in step.inputs))
            return out

        if step.primitive in ("add", "sub"):
            full, sign = at(0), -1 if step.primitive == "sub" and step.operand(1) == value else 1
            part = full[first]
            a, b = sign * a, sign * b + part
        else:
            full = at(1)
            part = full[first]
            a, b = a * part, b * part
        found.append((a, b, per_channel & jnp.all(full == part)))
        value = step.outputs[0]
    return found


def clip_bounds(reading: Reading, steps: Sequence[Step], value_of) -> tuple:
    """(is clip(x, low, high) on all PROBES, low, high) of a run of steps. Traced.

    Every element sees every probe, since bounds may differ from channel to channel, and beside others: sorting is no clip.
    """
    shape = reading.graph.flat.types[steps[0].outputs[0]].shape
    if math.prod(shape) < len(PROBES):
        return jnp.array(False), jnp.float32(-HUGE), jnp.float32(HUGE)
    bounds = {i: value_of(i) for step in steps for i in step.inputs if i not in reading.graph.data}

    def clipped(x):
        for step in steps:
            (x,) = step.run(*(bounds.get(i, x) for i in step.inputs))
        return x

    low, high = (clipped(jnp.full(shape, p)).reshape(-1)[0] for p in PROBES[:2])
    first = jnp.arange(math.prod(shape)).reshape(shape) % (len(PROBES) + 1)  # 17: strides of 16 and more see others

    def agrees(turn):
        probes = jnp.asarray(PROBES)[(first + turn) % len(PROBES)]
        return jnp.all(clipped(probes) == jnp.clip(probes, low, high))

    return jnp.all(jax.lax.map(agrees, jnp.arange(len(PROBES)))), low, high


def rewrite(reading: Reading, block: Block, taken: Mapping[str, Taken]) -> Program:
    """The program without the steps that integer ops take over: each gives the last of their results instead."""
    program, gone, result = block.program, set(), {}
    for op in block.ops:
        if op.name in taken:
            affine, clips = reading.steps_after(op)
            steps = affine[: taken[op.name].affine] + clips[: taken[op.name].clips]
            gone |= {id(s) for s in steps}
            if steps:
                result[id(reading.step(op))] = steps[-1]
    outs = {id(step): outs for step, _, outs in program.steps}
    kept = [n for n, (step, _, _) in enumerate(program.steps) if id(step) not in gone]
    at = {old: new for new, old in enumerate(kept)}
    steps = []
    for n in kept:
        step, ids, own = program.steps[n]
        steps.append((step, ids, outs[id(result[id(step)])] if id(step) in result else own))
    ops, factors = (tuple(dataclasses.replace(read, step=at[read.step]) for read in reads) for reads in (program.ops, program.factors))
    return dataclasses.replace(program, key=(program.key, tuple(taken.items())), steps=tuple(steps), ops=ops, factors=factors)


def _through(chain: Sequence[Step], array):
    for step in chain:
        assert step.primitive in STRUCTURAL
        (array,) = step.run(array)
    return array


def _broadcastable(per_row, weight: QArray):
    """A number per channel or per tensor against the weight, without a transpose of what is large: XLA:CPU would fold it
    into the convolution's dimension numbers, and then finds no int8 kernel."""
    axes = weight.channel_axes if per_row.size > 1 else ()
    return from_rows(per_row.reshape(-1, 1), tuple(n if a in axes else 1 for a, n in enumerate(weight.shape)), axes)


def _kept(reading: Reading, op: Op) -> list[int]:
    """Axes of the weight operand that outputs keep, in their order there."""
    params = reading.step(op).params
    if op.kind == "conv":
        return [params["dimension_numbers"].rhs_spec[0]]
    contracting, batch = (side[1 - op.data_position] for side in params["dimension_numbers"])
    free = (a for a in range(reading.graph.flat.types[op.weight_value].ndim) if a not in (*contracting, *batch))
    return [*batch, *free]


def _as_output(reading: Reading, op: Op, array):
    """An array over the kept axes, in the weight's order, with the rank of the op's output: size 1 where the data counts."""
    step, kept = reading.step(op), _kept(reading, op)
    array = array.transpose([sorted(kept).index(a) for a in kept])
    ndim = reading.graph.flat.types[step.outputs[0]].ndim
    if op.kind == "conv":
        return jnp.expand_dims(array, [a for a in range(ndim) if a != step.params["dimension_numbers"].out_spec[1]])
    batch = len(step.params["dimension_numbers"][1][0])
    start = batch if op.data_position == 0 else len(kept)
    return jnp.expand_dims(array, range(start, start + ndim - len(kept)))
