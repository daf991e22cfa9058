"""The output error of an op as a quadratic in its weight, summed over the calibration examples.

An op is linear in its weight: output row r of group g and channel c is Σ_k x[g, r, k] · w[c, k], where x are the inputs that
meet one output position (patches, for a convolution). Hence Σ_r |x_r w − t_r|² = wᵀHw − 2 wᵀb + const, with H = xᵀx shared by
the channels of a group, and b = xᵀt.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from brecq_jax._fast_ops import fast_op
from brecq_jax._interpret import LocalOp, Program, run
from brecq_jax._jaxpr import Step
from brecq_jax._qarray import from_rows

AFFINE = ("add", "sub", "mul", "div", "add_any")
PROBES = (-9.0, -2.0, -0.5, 0.5, 3.0, 5.5, 6.5, 9.0)
CLIPS = ((0.0, math.inf), (0.0, 6.0))  # relu, relu6


class Quadratic(NamedTuple):
    """wᵀHw − 2 wᵀb of every output channel, w a row of the weight. Means over output rows."""

    gram: Float[Array, "groups elements elements"]
    cross: Float[Array, "channels elements"]


@dataclasses.dataclass(frozen=True)
class Reach:
    """How far an op's output is followed: through additions and multiplications by parameters, to the value `end`.

    There the target is compared, so that what a residual branch already lost is made good. Between `low` and `high` the
    activation function behind it passes errors on; beyond them it does not.
    """

    end: int
    low: float = -math.inf
    high: float = math.inf


def reach(program: Program, number: int, types: dict[int, jax.ShapeDtypeStruct]) -> Reach:
    """Follow the output of op `number` as far as it is affine, and see whether a ReLU or ReLU6 reads it there."""
    data = set(program.inputs)
    for _, ids, outs in program.steps:
        if data.intersection(ids):
            data.update(outs)
    value = program.steps[program.ops[number].step][2][0]
    while True:
        reader = _only_reader(program, value)
        if reader is None or reader[0].primitive not in AFFINE:
            break
        step, ids, outs = reader
        others = [i for i in ids if i != value]
        product = step.primitive in ("mul", "div")
        numerator = step.arguments[0] is not None and ids[step.arguments[0]] == value
        if ids.count(value) > 1 or product and data.intersection(others) or step.primitive == "div" and not numerator:
            break
        value = outs[0]
    return Reach(value, *_clip(program, value, types))


def _only_reader(program: Program, value: int):
    readers = [s for s in program.steps if value in s[1]]
    return readers[0] if len(readers) == 1 and value not in program.outputs else None


def _clip(program: Program, value: int, types) -> tuple[float, float]:
    """(low, high) if the steps behind a value clip it, found by trying numbers; else no bounds."""
    found, results = (-math.inf, math.inf), [jnp.full(types[value].shape, p, types[value].dtype) for p in PROBES]
    while (reader := _only_reader(program, value)) and len(reader[1]) == 1 and len(reader[2]) == 1:
        step, _, outs = reader
        if step.primitive not in ("max", "min", "clamp", "custom_jvp_call", "jit") or types[outs[0]].shape != types[value].shape:
            break
        results = [step.run(r)[0] for r in results]
        value = outs[0]
        seen = [float(r.reshape(-1)[0]) for r in results]
        for low, high in CLIPS:
            if seen == [min(max(p, low), high) for p in PROBES]:
                found = (low, high)
    return found


def linear_op(op: LocalOp, step: Step) -> bool:
    """Whether `rows` can read this op: the weight itself enters a product whose layout it knows."""
    if not op.direct or op.kind not in ("dense", "conv"):
        return False
    if op.kind == "conv":
        return step.params["batch_group_count"] == 1
    weight_batch = step.params["dimension_numbers"][1][1 - op.data_position]
    return tuple(weight_batch) == tuple(range(len(weight_batch)))


def input_rows(op: LocalOp, step: Step, operands: list) -> Float[Array, "groups rows elements"]:
    """The inputs that meet each output position, in the order of the weight's rows."""
    x, weight = (operands[step.arguments[p]] for p in (op.data_position, 1 - op.data_position))
    if op.kind == "dense":
        contracting, batch = step.params["dimension_numbers"]
        own, others, groups = contracting[op.data_position], contracting[1 - op.data_position], batch[op.data_position]
        own = [own[i] for i in np.argsort(others)]
        free = [a for a in range(x.ndim) if a not in own and a not in groups]
        count, elements = (math.prod(x.shape[a] for a in axes) for axes in (groups, own))
        return x.transpose(*groups, *free, *own).reshape(count, -1, elements)
    dims, groups = step.params["dimension_numbers"], step.params["feature_group_count"]
    axis = dims.rhs_spec[0]
    elements = weight.size // weight.shape[axis]

    def patches(kernel_rows):  # the op itself, with kernels that pick one element each
        shape = [len(kernel_rows) if a == axis else n for a, n in enumerate(weight.shape)]
        inside = list(operands)
        inside[step.arguments[1]] = from_rows(kernel_rows.astype(weight.dtype), shape, (axis,))
        (out,) = fast_op(0, step, inside) or step.run(*inside)
        return jnp.moveaxis(out, dims.out_spec[1], -1).reshape(-1, len(kernel_rows))

    if groups == 1:
        return patches(jnp.eye(elements))[None]
    each = [patches(jnp.zeros((groups, elements)).at[:, k].set(1)) for k in range(elements)]
    return jnp.stack(each, -1).transpose(1, 0, 2)


def output_rows(op: LocalOp, step: Step, operands: list, out) -> Float[Array, "groups rows channels"]:
    """An op's output (or a value of its shape), in the layout of `input_rows`."""
    if op.kind == "conv":
        dims, groups = step.params["dimension_numbers"], step.params["feature_group_count"]
        rows = jnp.moveaxis(out, dims.out_spec[1], -1)
        return rows.reshape(-1, groups, rows.shape[-1] // groups).transpose(1, 0, 2)
    (contracting, batch), weight = step.params["dimension_numbers"], 1 - op.data_position
    groups = len(batch[0])
    weight_free = operands[step.arguments[weight]].ndim - groups - len(contracting[0])
    free = list(range(groups, out.ndim))
    own = free[len(free) - weight_free :] if weight == 1 else free[:weight_free]
    others = [a for a in free if a not in own]
    sizes = [math.prod(out.shape[a] for a in axes) for axes in (range(groups), others, own)]
    return out.transpose(*range(groups), *others, *own).reshape(sizes)


def program_types(program: Program, inputs, params, constants) -> dict[int, jax.ShapeDtypeStruct]:
    """Shape and dtype of every value of a program."""
    ids = sorted({i for _, ins, outs in program.steps for i in (*ins, *outs)})
    values = jax.eval_shape(lambda *a: run(dataclasses.replace(program, outputs=tuple(ids)), *a), list(inputs), list(params), list(constants))
    return dict(zip(ids, values, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def statistics(program: Program, number: int, to: Reach, gram: bool, inputs, params, exact_inputs, exact_params, constants):
    """Sums over one batch: (H or None, b, rows), with inputs from the quantized prefix and targets from the float model.

    `params` hold the current weight of the op, too: where the float output lies beyond a clip, the target is the
    current output, or the end of the range if that is nearer. The sum then bounds the error behind the clip from above
    and touches it at the current weight, so that lowering it lowers the error (majorisation).
    """
    op, part = program.ops[number], dataclasses.replace(program, outputs=(to.end,))
    (wanted,) = run(part, exact_inputs, exact_params, constants, on_op=fast_op)
    step = program.steps[op.step][0]
    seen = {}

    def until_end(z):
        def on_op(n, s, operands):
            if n != number:
                return fast_op(n, s, operands)
            seen["operands"] = operands
            return [z] if z is not None else fast_op(n, s, operands)

        return run(part, inputs, params, constants, on_op=on_op)[0]

    current = until_end(None)
    (shape,) = jax.eval_shape(lambda *o: step.run(*o), *seen["operands"])
    zeros = jnp.zeros(shape.shape, shape.dtype)
    offset, slope = jax.jvp(until_end, (zeros,), (jnp.ones_like(zeros),))
    goal = jnp.where(wanted <= to.low, jnp.minimum(current, to.low), jnp.where(wanted >= to.high, jnp.maximum(current, to.high), wanted))
    target = jnp.where(slope != 0, (goal - offset) / jnp.where(slope != 0, slope, 1), 0)
    x = input_rows(op, step, seen["operands"]).astype(jnp.float32)
    t = output_rows(op, step, seen["operands"], target).astype(jnp.float32)
    cross = jnp.einsum("gro,grk->gok", t, x)
    return (jnp.einsum("grk,grl->gkl", x, x) if gram else None), cross.reshape(-1, x.shape[-1]), x.shape[1]
