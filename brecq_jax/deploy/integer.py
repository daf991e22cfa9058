"""A quantized model that computes with integers, and holds packed bytes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from brecq_jax._fast_ops import fast_op
from brecq_jax._graph import Op, Weight
from brecq_jax._interpret import param_values, run, whole
from brecq_jax._jaxpr import Step
from brecq_jax._model import Program, Quantized, quantize_hooks, slice_qarray
from brecq_jax._qarray import QArray, is_qarray
from brecq_jax._trace import trace
from brecq_jax.deploy import _integer_ops
from brecq_jax.deploy._lowering import (
    Reading, Taken, clip_bounds, encode, integer_terms, left_over, op_constants, rewrite, why_float,
)  # fmt: skip
from brecq_jax.deploy._tiles import tiled_conv, tiled_dot
from brecq_jax.deploy.packing import pack, unpack
from brecq_jax.formats import Format, Grid, Uniform


@functools.partial(jax.tree_util.register_dataclass, data_fields=("packed", "grid"), meta_fields=("shape", "format", "channel_axes", "dtype"))
@dataclasses.dataclass(frozen=True)
class PackedArray:
    """A QArray whose codes are packed bytes: law: `PackedArray.of(q).qarray()` equals q. `packed`: see `packing`."""

    packed: jax.Array
    grid: Grid
    shape: tuple[int, ...]
    format: Format
    channel_axes: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, array: QArray) -> "PackedArray":
        return cls(pack(array.codes, array.format.bits), array.grid, array.shape, array.format, array.channel_axes, array.dtype)

    def qarray(self, after: jax.Array | None = None) -> QArray:
        """The codes, unpacked in a program not before the array `after` is there.

        Without one, XLA:CPU (jax 0.10.2) unpacks all weights of a program before it runs the first op, and holds them all, whatever
        barriers stand between.
        """
        # The barrier keeps the bytes of an exported program bytes: XLA would compute with constants while it compiles.
        packed = jax.lax.optimization_barrier(self.packed)
        zero = jnp.uint8(0) if after is None else _zero_of(after)
        codes = unpack(packed | zero, self.format.bits, math.prod(self.shape)).reshape(self.shape)
        # Of a sum of points the grid holds codes, too.
        grid = jax.tree.map(lambda g: g | zero.astype(g.dtype) if jnp.issubdtype(g.dtype, jnp.integer) else g, self.grid)
        return QArray(codes, grid, self.format, self.channel_axes, self.dtype)

    def slice(self, weight: Weight) -> "PackedArray":
        """law: its qarray() is `slice_qarray(self.qarray(), weight)`. Of a stack, the bytes of that slice, where no byte belongs to two."""
        depth = len(weight.index)
        if not depth:
            return self
        if math.prod(self.shape[depth:]) * self.format.bits % 8:
            return PackedArray.of(slice_qarray(self.qarray(), weight))
        stack = self.packed.reshape(*self.shape[:depth], -1)
        part = slice_qarray(QArray(stack, self.grid, self.format, self.channel_axes, self.dtype), weight)
        return PackedArray(part.codes, part.grid, self.shape[depth:], self.format, part.channel_axes, self.dtype)


def _zero_of(x: jax.Array) -> jax.Array:
    """A uint8 that is 0, which XLA does not know before x is there."""
    if 0 in x.shape:
        return jnp.uint8(0)
    first = jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())
    first = first if jnp.issubdtype(x.dtype, jnp.integer) else jax.lax.bitcast_convert_type(first, f"uint{8 * x.dtype.itemsize}")
    return (first.astype(jnp.uint8).astype(jnp.int32) > 255).astype(jnp.uint8)


def packed_params(quantized: Quantized) -> Any:
    """The params with a PackedArray for every QArray."""
    return jax.tree.map(lambda x: PackedArray.of(x) if isinstance(x, QArray) else x, quantized.params, is_leaf=is_qarray)


def unpacked(params: Any) -> Any:
    """The inverse: a QArray for every PackedArray."""
    return jax.tree.map(lambda x: x.qarray() if isinstance(x, PackedArray) else x, params, is_leaf=lambda x: isinstance(x, PackedArray))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("params", "activations", "ops"), meta_fields=("program", "taken", "kept_float", "shapes")
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Integer:
    """A quantized model on integers: a pytree to call, jit and shard, as a `Quantized` is.

    `params`: the caller's tree, quantized leaves packed. `ops`: the constants of each integer op. `kept_float`: (op, why).
    `shapes`: of the inputs' arrays, without the batch.
    """

    params: Any
    activations: Mapping[str, Grid]
    ops: Mapping[str, Mapping[str, jax.Array]]
    program: Program
    taken: tuple[Taken, ...]
    kept_float: tuple[tuple[str, str], ...]
    shapes: tuple[tuple[int, ...], ...]

    def __call__(self, inputs: Any) -> Any:
        """Outputs in the structure that the float model's have.

        Raises:
          ValueError: inputs of other shapes than those that it was made for; the batch, axis 0, is free.
        """
        return _call(self, inputs)

    def __repr__(self) -> str:
        merged = sum(t.affine for t in self.taken)
        codes = sum(t.codes_for is not None for t in self.taken)
        lines = [
            f"Integer({len(self.taken)} of {len(self.taken) + len(self.kept_float)} ops on integers; {merged} affine steps merged into them; "
            f"{codes} hand codes on)"
        ]
        return "\n".join(lines + [f"  kept float: {name}: {why}" for name, why in self.kept_float])


def to_integer(quantized: Quantized, inputs: Any) -> Integer:
    """The model with int8 × int8 → int32 products and convolutions wherever its plan allows; a sum of points is a sum of products.

        integer = brecq_jax.deploy.to_integer(quantized, images[:1])
        logits = integer(images)
        print(integer)      # what stayed float, and why

    Outputs are the fake-quantized model's but for float rounding, which moves a code by one where a value lies half way
    between two. Weights of fewer bits stay packed in memory and are unpacked to int8 inside the program.

    Args:
      quantized: what `quantize` or `restore` returned.
      inputs: an example of what the model takes, or its `jax.ShapeDtypeStruct`s; one image is enough, and the batch size alone is free.

    Raises:
      TypeError: not a Quantized.
    """
    if not isinstance(quantized, Quantized):
        raise TypeError(f"to_integer: {type(quantized).__name__} is not a Quantized. Pass what quantize() returned.")
    graph = trace(quantized.program.apply_fn, jax.eval_shape(quantized.dequantized), inputs)
    reading, formats = Reading(graph), dict(quantized.program.sites)
    weights = {op.name: quantized.weight(graph.weights[op.weight]) for op in graph.ops}
    kept_float = {op.name: why_float(reading, op, weights[op.name], formats) for op in graph.ops}
    able = [op for op in graph.ops if kept_float[op.name] is None]
    found, clips = jax.jit(lambda quantized: _constants(reading, quantized, able))(quantized)
    for op in able:
        if not found[op.name]["uniform"]:
            kept_float[op.name] = "its weight's scale varies along what a sum of integers adds"
    able = [op for op in able if kept_float[op.name] is None]
    taken, ops = {}, {}
    for op in able:
        taken[op.name], ops[op.name] = _choose(reading, op, found[op.name], clips.get(op.name), {o.name for o in able}, quantized)
    params = packed_params(quantized)
    why = tuple((name, reason) for name, reason in kept_float.items() if reason is not None)
    why += tuple((product.name, "it multiplies two values, on their grids where the plan has some, as floats") for product in graph.products)
    return Integer(params, quantized.activations, ops, quantized.program, tuple(taken.values()), why, _shapes(inputs))


def _constants(reading: Reading, quantized: Quantized, able: list[Op]) -> tuple[dict, dict]:
    """`op_constants` of each op, and the bounds of the clip that follows it, if one does."""
    graph = reading.graph
    leaves = jax.tree.leaves(quantized.dequantized())
    values: dict[int, jax.Array] = {}

    def value_of(ident: int):
        if ident not in values:
            if ident in graph.origins:
                leaf, index = graph.origins[ident]
                values[ident] = leaves[leaf][index] if index else leaves[leaf]
            elif ident in graph.flat.constants:
                values[ident] = graph.flat.constants[ident]
            else:
                step = reading.maker[ident]
                values.update(zip(step.outputs, step.run(*map(value_of, step.inputs)), strict=True))
        return values[ident]

    found, clips, formats = {}, {}, dict(quantized.program.sites)
    for op in able:
        weight, grid = quantized.weight(graph.weights[op.weight]), _scalars(quantized.activations[op.site])
        found[op.name] = op_constants(reading, op, weight, grid, formats[op.site].bits, value_of)
        if steps := reading.steps_after(op)[1]:
            clips[op.name] = clip_bounds(reading, steps, value_of)
    return found, clips


def _choose(reading: Reading, op: Op, found, clip, able: set[str], quantized: Quantized) -> tuple[Taken, dict]:
    """What an op takes over, and its arrays."""
    affine_steps, clipping = reading.steps_after(op)
    affine = max(n for n, (_, _, per_channel) in enumerate(found["affine"]) if per_channel)
    scale, bias, _ = found["affine"][affine]
    ratios = [ratio for ratio in found["ratios"] if ratio.any()]  # points that no channel has are behind those that some have
    arrays = {"scale": scale, "bias": bias, "offsets": found["offsets"][: 1 + len(ratios)], "ratios": ratios, "weight_zero": found["weight_zero"]}
    clips = len(clipping) if clip is not None and clip[0] and affine == len(affine_steps) else 0
    end = [reading.step(op), *affine_steps[:affine], *clipping[:clips]][-1]
    readers = reading.read_as_codes_by(end.outputs[0])
    if readers is None or any(o.name not in able for o in readers):
        return Taken(op.name, affine), arrays
    grid = _scalars(quantized.activations[readers[0].site])
    arrays |= {"scale": scale / grid.scale, "bias": bias / grid.scale}
    if clips:
        arrays |= {"low": jnp.round(clip[1] / grid.scale), "high": jnp.round(clip[2] / grid.scale)}
    return Taken(op.name, affine, clips, readers[0].site), arrays


@jax.jit
def _call(integer: Integer, inputs):
    if (shapes := _shapes(inputs)) != integer.shapes:  # constants of its ops are those of the shapes that were traced
        made, came = (", ".join(f"({', '.join(map(str, ('batch', *shape)))})" for shape in each) for each in (integer.shapes, shapes))
        raise ValueError(f"Integer: it was made for inputs {made} and got {came}. Write to_integer(quantized, inputs) with an example of these.")
    program, formats = integer.program, dict(integer.program.sites)
    params = unpacked(integer.params)
    floats = jax.tree.map(lambda x: x.decode() if isinstance(x, QArray) else x, params, is_leaf=is_qarray)
    graph = trace(program.apply_fn, floats, inputs)
    reading, block = Reading(graph), whole(graph)
    taken = {t.op: t for t in integer.taken}
    held = jax.tree.leaves(integer.params, is_leaf=lambda x: isinstance(x, PackedArray))

    def reads_packed(op: Op, weight: Weight) -> bool:
        """Whether the op reads a packed parameter, or a slice of one, with nothing in between."""
        return isinstance(held[weight.leaf], PackedArray) and graph.origins.get(op.weight_value) == (weight.leaf, weight.index)

    last, codes = None, {}  # what the op before gave: weights are unpacked one after the other; and once, if several ops read one

    def on_op(number: int, step: Step, operands: list):
        nonlocal last
        op = block.ops[number]
        x, weight = operands[step.arguments[op.data_position]], graph.weights[op.weight]
        if op.name not in taken and not reads_packed(op, weight):
            return fast_op(number, step, operands)
        packed = held[weight.leaf].slice(weight)

        def unpack() -> QArray:
            if op.weight not in codes:
                codes[op.weight] = packed.qarray(x if last is None else last)
            return codes[op.weight]

        if op.name in taken:
            last = _integer_op(reading, op, x, unpack(), integer, taken[op.name])
        else:
            last = _float_op(number, op, step, operands, packed, unpack, graph.flat.types[step.outputs[0]].dtype)
        return [last]

    def on_input(number: int, x):
        return x if number < len(block.ops) and block.ops[number].name in taken else hooks["on_input"](number, x)

    def on_value(site: int, x):
        return x if x.dtype == jnp.int8 else hooks["on_value"](site, x)

    hooks = quantize_hooks(block, formats, integer.activations, program.whole_values)
    mine = {"on_input": on_input, "on_value": on_value} if program.whole_values else {"on_input": on_input}
    values = dict(zip(graph.flat.inputs[graph.num_leaves :], jax.tree.leaves(inputs), strict=True))
    operands = [values[i] for i in block.ins], param_values(graph, block, jax.tree.leaves(floats)), block.constants
    outputs = run(rewrite(reading, block, taken), *operands, on_op=on_op, **mine)
    return jax.tree.unflatten(graph.out_tree, outputs)


def _float_op(number: int, op: Op, step: Step, operands: list, packed: PackedArray, unpack: Callable[[], QArray], dtype):
    """One op on floats: a part of a large weight at a time, or what `unpack` gives."""

    def multiply(array: QArray):
        both = list(operands)
        both[step.arguments[1 - op.data_position]] = array.decode()
        return (fast_op(number, step, both) or step.run(*both))[0]

    y = tiled_dot(step, operands[step.arguments[op.data_position]], packed, op.data_position, dtype)
    y = tiled_conv(step, packed, multiply) if y is None else y
    return multiply(unpack()) if y is None else y


def _integer_op(reading: Reading, op: Op, x, weight: QArray, integer: Integer, taken: Taken):
    """One op and what it takes over: from floats or codes to floats or codes."""
    step, arrays, formats = reading.step(op), integer.ops[op.name], dict(integer.program.sites)
    grid, bits = _scalars(integer.activations[op.site]), formats[op.site].bits
    x = x if x.dtype == jnp.int8 else encode(x, grid, bits)
    zero = arrays["weight_zero"] if type(weight.format) is Uniform and weight.format.bits == 8 and not weight.format.symmetric else None
    if op.kind == "conv":
        x = _padded(step, x, left_over(grid.zero_point, bits).astype(jnp.int8))

    def product(w, offset):
        sums = _integer_ops.conv(step, x, w, zero) if op.kind == "conv" else _integer_ops.dot(step, x, w, op.data_position, zero)
        return (sums + offset if bits == 8 else sums).astype(jnp.float32)

    terms = integer_terms(reading, op, weight)[: len(arrays["offsets"])]  # no channel has points behind these
    total, *others = map(product, terms, arrays["offsets"])
    for ratio, sums in zip(arrays["ratios"], others, strict=True):
        total += ratio * sums
    y = total * arrays["scale"] + arrays["bias"]
    if taken.codes_for is None:
        return y.astype(reading.graph.flat.types[step.outputs[0]].dtype)
    given = _scalars(integer.activations[taken.codes_for])
    unit = Grid(jnp.float32(1), given.zero_point)
    return encode(y, unit, formats[taken.codes_for].bits, arrays.get("low"), arrays.get("high"))


def _padded(step: Step, x, zero):
    """The image with the code of zero wherever the convolution pads or dilates it."""
    config = [(0, 0, 0)] * x.ndim
    padding, dilation = step.params["padding"], step.params["lhs_dilation"]
    for axis, (low, high), spread in zip(step.params["dimension_numbers"].lhs_spec[2:], padding, dilation, strict=True):
        config[axis] = (low, high, spread - 1)
    padded = jax.lax.pad(x, zero, config)
    # XLA:CPU (jax 0.10.2) folds a pad between pixels into the convolution and then sums what lies beside it in memory.
    return jax.lax.optimization_barrier(padded) if max(dilation) > 1 else padded


def _shapes(inputs) -> tuple[tuple[int, ...], ...]:
    """Shapes of the arrays of one example."""
    return tuple(x.shape[1:] for x in jax.tree.leaves(inputs))


def _scalars(grid: Grid) -> Grid:
    return jax.tree.map(jnp.squeeze, grid)
