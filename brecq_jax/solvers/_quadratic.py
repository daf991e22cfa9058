"""The output error of an op as a quadratic in its weight, summed over the calibration examples.

An op is linear in its weight: output row r of group g and channel c is Σ_k x[g, r, k] · w[c, k], where x are the inputs that
meet one output position (patches, for a convolution). Hence Σ_r |x_r w − t_r|² = wᵀHw − 2 wᵀb + const, with H = xᵀx shared by
the channels of a group, and b = xᵀt.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from brecq_jax._calibrate import local_hooks
from brecq_jax._fast_ops import fast_op
from brecq_jax._interpret import LocalOp, Program, run
from brecq_jax._jaxpr import Step
from brecq_jax._sharding import each_batch, replicated

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


def reach(program: Program, number: int, types: dict[int, jax.ShapeDtypeStruct], constants) -> Reach:
    """Follow the output of op `number` as far as it is affine and keeps its shape, and see whether a ReLU or ReLU6 reads it there."""
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
        if types[outs[0]].shape != types[value].shape:  # one number of the op's output is several of what it is added to
            break
        value = outs[0]
    return Reach(value, *_clip(program, value, types, constants))


def _only_reader(program: Program, value: int):
    readers = [s for s in program.steps if value in s[1]]
    return readers[0] if len(readers) == 1 and value not in program.outputs else None


def _clip(program: Program, value: int, types, constants) -> tuple[float, float]:
    """(low, high) if the steps behind a value clip it, found by trying numbers; else no bounds."""
    known = dict(zip(program.constants, constants, strict=True))  # and the scalars that are made of constants alone
    for step, ids, outs in program.steps:
        if known.keys() >= set(ids) and all(types[o].size == 1 for o in outs):
            known.update(zip(outs, step.run(*(known[i] for i in ids)), strict=True))
    found, results = (-math.inf, math.inf), [jnp.full(types[value].shape, p, types[value].dtype) for p in PROBES]
    while (reader := _only_reader(program, value)) and len(reader[2]) == 1:
        step, ids, outs = reader
        if step.primitive not in ("max", "min", "clamp", "custom_jvp_call", "jit") or types[outs[0]].shape != types[value].shape:
            break
        if ids.count(value) > 1 or not all(i == value or i in known for i in ids):
            break
        results = [step.run(*(r if i == value else known[i] for i in ids))[0] for r in results]
        value = outs[0]
        seen = [float(r.reshape(-1)[0]) for r in results]
        for low, high in CLIPS:
            if seen == [min(max(p, low), high) for p in PROBES]:
                found = (low, high)
    return found


def unread(op: LocalOp, step: Step, channel_axes: tuple[int, ...]) -> str:
    """Why a weight with these channel axes cannot be rounded by what `input_rows` reads of an op; "" where it can."""
    if why := _no_rows(op, step):
        return why
    return "" if row_axes(op, step) == channel_axes else "its channels are those of another op that reads it"


def _no_rows(op: LocalOp, step: Step) -> str:
    """Why `input_rows` cannot read this op, "" where it can: the weight enters a product whose layout it knows, perhaps transposed."""
    if op.kind not in ("dense", "conv"):
        return "a lookup adds nothing up"
    if not op.order:
        return "more than transposes lies between the weight and the op"
    if op.kind == "conv":
        return "" if step.params["batch_group_count"] == 1 else "its convolution has groups of examples"
    shared = [op.order[a] for a in step.params["dimension_numbers"][1][1 - op.data_position]]
    return "" if shared == list(range(len(shared))) else "the axes that inputs and weight share are not the weight's first"


def row_axes(op: LocalOp, step: Step) -> tuple[int, ...]:
    """Axes of the weight that count the rows of an op that `input_rows` can read: its output channels."""
    if op.kind == "conv":
        return (op.order[step.params["dimension_numbers"].rhs_spec[0]],)
    contracting = step.params["dimension_numbers"][0][1 - op.data_position]
    return tuple(sorted(axis for a, axis in enumerate(op.order) if a not in contracting))


def input_rows(op: LocalOp, step: Step, operands: list, every: int = 1) -> Float[Array, "groups rows elements"]:
    """The inputs that meet each output position, in the order of the weight's rows; one position in `every`."""
    x, weight = (operands[step.arguments[p]] for p in (op.data_position, 1 - op.data_position))
    if op.kind == "dense":
        contracting, batch = step.params["dimension_numbers"]
        own, others, groups = contracting[op.data_position], contracting[1 - op.data_position], batch[op.data_position]
        own = [own[i] for i in np.argsort([op.order[a] for a in others])]
        free = [a for a in range(x.ndim) if a not in own and a not in groups]
        count, elements = (math.prod(x.shape[a] for a in axes) for axes in (groups, own))
        return x.transpose(*groups, *free, *own).reshape(count, -1, elements)[:, ::every]
    return _windows(x, weight.shape, op.order, step.params, every)


def _windows(x, weight_shape, axes, p, every: int) -> Float[Array, "groups rows elements"]:
    """What a convolution's kernel meets at each output position: the padded input, shifted once for each kernel place."""
    dims, groups = p["dimension_numbers"], p["feature_group_count"]
    x = x.transpose(dims.lhs_spec[0], *dims.lhs_spec[2:], dims.lhs_spec[1])
    edges = [(low, high, d - 1) for (low, high), d in zip(p["padding"], p["lhs_dilation"], strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    kernel = [weight_shape[a] for a in dims.rhs_spec[2:]]
    sizes = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(x.shape[1:-1], kernel, p["rhs_dilation"], p["window_strides"], strict=True)]
    order = sorted(range(len(kernel) + 1), key=lambda n: (dims.out_spec[0], *dims.out_spec[2:])[n])  # rows, as the output has them
    shifted = []
    for place in itertools.product(*map(range, kernel)):
        start = [i * d for i, d in zip(place, p["rhs_dilation"], strict=True)]
        stop = [i + (n - 1) * s + 1 for i, n, s in zip(start, sizes, p["window_strides"], strict=True)]
        part = jax.lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *p["window_strides"], 1))
        shifted.append(part.transpose(*order, part.ndim - 1).reshape(-1, groups, part.shape[-1] // groups)[::every])
    x = jnp.stack(shifted, 2)  # rows, groups, kernel places, channels
    elements = sorted(range(len(kernel) + 1), key=lambda n: axes[dims.rhs_spec[n + 1]])  # 0: channels, then kernel axes
    x = x.reshape(*x.shape[:2], *kernel, x.shape[-1]).transpose(1, 0, *(e + 1 if e else x.ndim - 2 + len(kernel) for e in elements))
    return x.reshape(*x.shape[:2], -1)


def output_rows(op: LocalOp, step: Step, operands: list, out) -> Float[Array, "groups rows channels"]:
    """An op's output (or a value of its shape), in the layout of `input_rows`."""
    if op.kind == "conv":
        dims, groups = step.params["dimension_numbers"], step.params["feature_group_count"]
        rows = jnp.moveaxis(out, dims.out_spec[1], -1)
        return rows.reshape(-1, groups, rows.shape[-1] // groups).transpose(1, 0, 2)
    (contracting, batch), weight = step.params["dimension_numbers"], 1 - op.data_position
    groups = len(batch[0])
    weight_free = [axis for a, axis in enumerate(op.order) if a not in (*contracting[weight], *batch[weight])]
    free = list(range(groups, out.ndim))
    own = free[len(free) - len(weight_free) :] if weight == 1 else free[: len(weight_free)]
    own = [own[i] for i in np.argsort(weight_free)]
    others = [a for a in free if a not in own]
    sizes = [math.prod(out.shape[a] for a in axes) for axes in (range(groups), others, own)]
    return out.transpose(*range(groups), *others, *own).reshape(sizes)


def program_types(program: Program, inputs, params, constants) -> dict[int, jax.ShapeDtypeStruct]:
    """Shape and dtype of every value of a program."""
    ids = sorted({i for _, ins, outs in program.steps for i in (*ins, *outs)})
    values = jax.eval_shape(lambda *a: run(dataclasses.replace(program, outputs=tuple(ids)), *a), list(inputs), list(params), list(constants))
    return dict(zip(ids, values, strict=True))


def _over_devices(mesh: Mesh | None, sums: Callable, inputs, counted, *shared):
    """Sums over one batch on each device: those of all."""
    if mesh is None:
        return sums(inputs, counted, *shared)
    each = each_batch(mesh, sums, (True, True, *(False for _ in shared)))
    return replicated(mesh, jax.tree.map(lambda s: s.sum(0), each(inputs, counted, *shared)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def statistics(
    program: Program, number: int, to: Reach, formats, whole_values: bool, mesh: Mesh | None, keep: int,
    inputs, counted, params, exact_params, constants, grids,
):  # fmt: skip
    """Sums over one batch on each device: (H, b, rows). `inputs`: from the quantized prefix, and from the float model for targets.

    About `keep` output rows of the batch are taken, evenly strided, if it has more. `counted`: 0 or 1 for each example, which the op's
    output has on axis 0; None: all count.

    `params` hold the current weight of the op, too: where the float output lies beyond a clip, the target is the
    current output, or the end of the range if that is nearer. The sum then bounds the error behind the clip from above
    and touches it at the current weight, so that lowering it lowers the error (majorisation).
    """
    sums = functools.partial(_statistics, program, number, to, formats, whole_values, keep)
    return _over_devices(mesh, sums, inputs, counted, params, exact_params, constants, grids)


def _statistics(program, number, to, formats, whole_values, keep, inputs, counted, params, exact_params, constants, grids):
    inputs, exact_inputs = inputs
    op, last = program.ops[number], next(n for n, (_, _, outs) in enumerate(program.steps) if to.end in outs)
    part = dataclasses.replace(program, steps=program.steps[: last + 1], outputs=(to.end,))
    (wanted,) = run(part, exact_inputs, exact_params, constants, on_op=fast_op)
    step = program.steps[op.step][0]
    seen = {}

    def until_end(change):
        def on_op(n, s, operands):
            results = fast_op(n, s, operands) or s.run(*operands)
            if n != number:
                return results
            seen.update(operands=operands, output=results[0])
            return [results[0] + change]

        return run(part, inputs, params, constants, on_op=on_op, **local_hooks(part, formats, whole_values, grids))[0]

    output = program_types(program, inputs, params, constants)[program.steps[op.step][2][0]]
    zeros = jnp.zeros(output.shape, output.dtype)
    current, slope = jax.jvp(until_end, (zeros,), (jnp.ones_like(zeros),))
    goal = jnp.where(wanted <= to.low, jnp.minimum(current, to.low), jnp.where(wanted >= to.high, jnp.maximum(current, to.high), wanted))
    target = seen["output"] + jnp.where(slope != 0, (goal - current) / jnp.where(slope != 0, slope, 1), 0)
    t = output_rows(op, step, seen["operands"], target)
    every = _stride(t.shape[1], keep)
    x, t = input_rows(op, step, seen["operands"], every).astype(jnp.float32), t[:, ::every].astype(jnp.float32)
    count = x.shape[1]
    if counted is not None:
        kept = _kept_rows(op, step, seen["operands"], output.shape, counted)[:, ::every]
        x, count = x * kept[..., None], kept[0].sum()
    cross = jnp.einsum("gro,grk->gok", t, x)
    return jnp.einsum("grk,grl->gkl", x, x), cross.reshape(-1, x.shape[-1]), count


def _kept_rows(op: LocalOp, step: Step, operands: list, shape: tuple[int, ...], counted: Float[Array, " batch"]) -> Float[Array, "groups rows"]:
    """0 or 1 for each output row: that of the example whose it is, in all channels."""
    examples = jnp.broadcast_to(counted.reshape(-1, *(1 for _ in shape[1:])), shape)
    return output_rows(op, step, operands, examples)[..., 0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def gram(
    program: Program, number: int, mesh: Mesh | None, keep: int, inputs, counted, params, constants
) -> Float[Array, "groups elements elements"]:  # fmt: skip
    """xᵀx of op `number` over about `keep` of a batch's output rows, activations float. `counted`: as for `statistics`."""
    return _over_devices(mesh, functools.partial(_gram, program, number, keep), inputs, counted, params, constants)


def _gram(program, number, keep, inputs, counted, params, constants):
    (inputs,) = inputs
    op = program.ops[number]
    step, ids, outs = program.steps[op.step]
    part = dataclasses.replace(program, steps=program.steps[: op.step + 1], outputs=outs)
    seen = {}

    def on_op(n, s, operands):
        if n == number:
            seen["operands"] = operands
        return fast_op(n, s, operands)

    (output,) = run(part, inputs, params, constants, on_op=on_op)
    every = _stride(output_rows(op, step, seen["operands"], output).shape[1], keep)
    x = input_rows(op, step, seen["operands"], every).astype(jnp.float32)
    if counted is not None:
        x = x * _kept_rows(op, step, seen["operands"], output.shape, counted)[:, ::every, None]
    return jnp.einsum("grk,grl->gkl", x, x)


def _stride(rows: int, keep: int) -> int:
    every = max(1, rows // keep)
    while math.gcd(every, rows) > 1:  # or it would meet the same columns of each image
        every -= 1
    return every
