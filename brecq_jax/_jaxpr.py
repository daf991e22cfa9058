"""The cellar: a program read as a flat list of steps. The only file that touches jax.extend.core.

Calls are inlined, scans over weights are unrolled, and every value gets a **fresh id**: JAX shares one inner
jaxpr, with the same `Var` objects, among all calls of one function (two `relu`s, say), so a `Var` is not a value.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

WEIGHTED = ("dot_general", "conv_general_dilated", "gather")
WHOLE = ("ragged_dot_general",)  # products that are not quantized
INLINED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
NO_GRADIENT = ("while", "pure_callback", "io_callback", "pallas_call", "ffi_call")  # where JAX may have none, backwards
# Values keep all their elements, only shape, order or dtype change.
STRUCTURAL = ("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type", "copy", "rev")
MOVING = (*STRUCTURAL, "slice", "split")  # every element is one that was there


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One equation: `outputs = primitive(inputs)`. Ids are positions in a table of values."""

    primitive: str
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: tuple[int | None, ...]  # position in `inputs` of each operand; None: a literal inside the equation
    run: Callable[..., Sequence[jax.Array]]
    signature: str  # equal signatures and equal input types mean equal computations

    def operand(self, position: int) -> int | None:
        """Id of the operand at a position of the primitive, None for a literal."""
        slot = self.arguments[position]
        return None if slot is None else self.inputs[slot]


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A whole program: `steps` in order, values by id."""

    steps: tuple[Step, ...]
    types: tuple[jax.ShapeDtypeStruct, ...]  # by id
    inputs: tuple[int, ...]  # one id per flat argument
    outputs: tuple[int, ...]
    constants: dict[int, Any]  # id -> captured array
    slices: dict[int, tuple[int, tuple[int, ...]]]  # id -> (argument id, indices): slices of scanned arguments


def flatten(function: Callable, params: Any, batch: Any) -> tuple[Flat, Any]:
    """Trace `function(params, batch)` and inline it. Returns the flat program and the output's pytree of types."""
    closed, out_shape = jax.make_jaxpr(function, return_shape=True)(params, batch)
    builder = _Builder()
    inputs = [builder.new(v.aval) for v in closed.jaxpr.invars]
    outputs = builder.inline(closed, inputs)
    flat = Flat(
        tuple(builder.steps),
        tuple(builder.types),
        tuple(inputs),
        tuple(outputs),
        builder.constants,
        builder.slices,
    )
    return _distributed(flat, len(jax.tree.leaves(params))), out_shape


def weighted_inside(step: Step) -> bool:
    """Whether a step that is kept whole (a `while`, a `cond`, …) holds a dot, convolution or lookup."""
    return step.primitive in WHOLE or any(_contains_weighted(body) for body in _bodies(step.params))


def suspects(steps: Sequence[Step]) -> str:
    """Names of the primitives of these steps, and inside them, that JAX may have no gradient of."""
    inside = (eqn.primitive.name for step in steps for body in _bodies(step.params) for eqn in _equations(body))
    return ", ".join(dict.fromkeys(name for name in (*(step.primitive for step in steps), *inside) if name in NO_GRADIENT))


class _Builder:
    def __init__(self):
        self.steps: list[Step] = []
        self.types: list[jax.ShapeDtypeStruct] = []
        self.constants: dict[int, Any] = {}
        self.slices: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.sliced: dict[tuple[int, tuple[int, ...]], int] = {}  # the other way round

    def new(self, aval) -> int:
        self.types.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return len(self.types) - 1

    def constant(self, value) -> int:
        ident = self.new(jax.typeof(value))
        self.constants[ident] = value
        return ident

    def inline(self, closed: jex.ClosedJaxpr, inputs: Sequence[int]) -> list[int]:
        env = dict(zip(closed.jaxpr.constvars, map(self.constant, closed.consts), strict=True))
        env.update(zip(closed.jaxpr.invars, inputs, strict=True))

        def read(atom) -> int:
            # no jnp: while something else is traced it would give a tracer, and a graph outlives the trace
            return self.constant(np.asarray(atom.val, atom.aval.dtype)) if _is_literal(atom) else env[atom]

        for eqn in closed.jaxpr.eqns:
            name, body = eqn.primitive.name, _call_body(eqn)
            if name in INLINED or (name in CUSTOM and _contains_weighted(body)):
                outs = self.inline(body, [read(a) for a in eqn.invars])
            elif name == "scan" and _contains_weighted(body):
                loop = self.unroll if eqn.params["num_carry"] else self.at_once
                outs = loop(eqn.params, body, [read(a) for a in eqn.invars])
            else:
                outs = self.step(eqn, env)
            for var, ident in zip(eqn.outvars, outs, strict=True):
                env[var] = ident
        return [read(v) for v in closed.jaxpr.outvars]

    def step(self, eqn, env) -> list[int]:
        variables = list(dict.fromkeys(a for a in eqn.invars if not _is_literal(a)))
        kept = [v for v in eqn.outvars if type(v).__name__ != "DropVar"]
        one = jex.Jaxpr((), variables, kept, [eqn], eqn.effects)
        outs = [self.new(v.aval) for v in eqn.outvars]
        self.steps.append(
            Step(
                eqn.primitive.name,
                eqn.params,
                tuple(env[v] for v in variables),
                tuple(o for o, v in zip(outs, eqn.outvars, strict=True) if v in kept),
                tuple(None if _is_literal(a) else variables.index(a) for a in eqn.invars),
                jex.jaxpr_as_fun(jex.ClosedJaxpr(one, ())),
                _signature(eqn),
            )
        )
        return outs

    def unroll(self, params, body, operands: Sequence[int]) -> list[int]:
        """A scan as the list of its iterations; slices of a stacked leaf become values of their own."""
        n_const, n_carry, length = params["num_consts"], params["num_carry"], params["length"]
        consts, carry = list(operands[:n_const]), list(operands[n_const : n_const + n_carry])
        stacked = operands[n_const + n_carry :]
        rows: list[list[int]] = [[] for _ in range(length)]
        for i in reversed(range(length)) if params["reverse"] else range(length):
            outs = self.inline(body, consts + carry + [self.index(s, i) for s in stacked])
            carry, rows[i] = outs[:n_carry], outs[n_carry:]
        return carry + [self.traced(lambda *r: jnp.stack(r), column) for column in zip(*rows, strict=True)]

    def at_once(self, params, body, operands: Sequence[int]) -> list[int]:
        """A scan that carries nothing (`lax.map`, over the examples, say): what it does one after the other, all at the same time."""
        axes = [None] * params["num_consts"] + [0] * (len(operands) - params["num_consts"])
        mapped = jax.vmap(jex.jaxpr_as_fun(body), in_axes=axes, axis_size=params["length"])
        return self.inline(jax.make_jaxpr(mapped)(*(self.types[i] for i in operands)), operands)

    def index(self, ident: int, i: int) -> int:
        root, indices = self.slices.get(ident, (ident, ()))
        where = root, (*indices, i)
        if where not in self.sliced:  # by another scan over the same leaf
            out = self.sliced[where] = self.traced(lambda x: jax.lax.index_in_dim(x, i, 0, keepdims=False), (ident,))
            self.slices[out] = where
        return self.sliced[where]

    def traced(self, function: Callable, inputs: Sequence[int]) -> int:
        (out,) = self.inline(jax.make_jaxpr(function)(*(self.types[i] for i in inputs)), list(inputs))
        return out


def indexed(flat: Flat, num_params: int, but: Collection[int] = ()) -> Flat:
    """The program with `W[i]` of a stacked parameter known as its slice, as those of a scan are; equal slices are one value.

    So where everything that reads the parameter takes a slice of it by as many leading indices, each a number, and what is left has two
    axes or more. `but`: ids of parameters that stay whole.
    """
    found = {i: (i, ()) for i in flat.inputs[:num_params] if i not in but}  # id -> (parameter, indices)
    cut: dict[int, tuple[int, ...]] = {}  # id of a slice whose leading axes are still there, of length 1 -> where it begins
    depths: dict[int, set[int]] = {}  # parameter -> how many indices what is read of it has
    for step in flat.steps:
        for i in found.keys() & step.inputs:
            (root, index), outs = found[i], step.outputs
            taken = _leading_indices(step, flat.types[i], cut.get(i))
            if taken is None:
                depths.setdefault(root, set()).add(0 if i in cut else len(index))
            for out, more in zip(outs, taken or (), strict=False):
                found[out] = root, index if step.primitive == "slice" else (*index, *more)
                if step.primitive == "slice":
                    cut[out] = more
    for i in found.keys() & flat.outputs:
        depths.setdefault(found[i][0], set()).add(0 if i in cut else len(found[i][1]))
    slices, first, same = dict(flat.slices), {}, {}
    for out, (root, index) in found.items():
        if index and out not in cut and depths.get(root) == {len(index)} and flat.types[out].ndim >= 2:
            same[out] = first.setdefault((root, index), out)
            slices[same[out]] = root, index
    steps = tuple(dataclasses.replace(s, inputs=tuple(same.get(i, i) for i in s.inputs)) for s in flat.steps)
    return dataclasses.replace(flat, steps=steps, outputs=tuple(same.get(i, i) for i in flat.outputs), slices=slices)


def _leading_indices(step: Step, type: jax.ShapeDtypeStruct, cut: tuple[int, ...] | None) -> list[tuple[int, ...]] | None:
    """The leading indices by which a step takes its outputs from its operand of this type; None if it does something else.

    `cut`: where the operand begins on leading axes that a slice left with length 1. Of a slice: where it begins.
    """
    params, shape = step.params, type.shape
    if step.primitive == "squeeze" and cut and params["dimensions"] == tuple(range(len(cut))):
        return [cut]
    if step.primitive == "unstack" and cut is None and params["axis"] == 0:
        return [(i,) for i in range(shape[0])]
    if step.primitive == "slice" and cut is None and set(params["strides"] or (1,)) == {1}:
        sides = [stop - start for start, stop in zip(params["start_indices"], params["limit_indices"], strict=True)]
        depth = next((a for a in range(len(shape)) if sides[a:] == list(shape[a:])), len(shape))
        if depth and sides[:depth] == [1] * depth:
            return [tuple(params["start_indices"][:depth])]
    return None


def _distributed(flat: Flat, num_params: int) -> Flat:
    """The program with x·[a b] written as [x·a x·b]: a product whose weights are concatenated on the way (the gates of an LSTM) as one with each.

    The first `num_params` arguments are parameters. What values there were keep their ids.
    """
    builder = _Builder()
    builder.types, builder.constants, builder.slices = list(flat.types), dict(flat.constants), dict(flat.slices)
    params, data, maker = set(flat.inputs[:num_params]), set(flat.inputs[num_params:]), {}
    for step in flat.steps:
        for kind in (data, params):  # a value may be both, and is data then
            kind.update(step.outputs if kind.intersection(step.inputs) else ())
        maker.update((out, step) for out in step.outputs)
        weights = [i for i in step.inputs if i not in data and i in maker and maker[i].primitive == "concatenate"]
        joined = maker[weights[0]] if step.primitive == "dot_general" and weights and data.intersection(step.inputs) else None
        axis = joined and _free_axis(step, flat.types, step.operand(1) == weights[0], joined.params["dimension"])
        if axis is None or not params.issuperset(joined.inputs):
            builder.steps.append(step)
            continue
        parts = []
        for part in joined.inputs:
            operands = [part if step.operand(p) == weights[0] else step.operand(p) for p in (0, 1)]
            parts.append(builder.traced(functools.partial(jax.lax.dot_general, **step.params), operands))
        builder.traced(lambda *p, axis=axis: jnp.concatenate(p, axis), parts)
        builder.steps.append(dataclasses.replace(builder.steps.pop(), outputs=step.outputs))
    return dataclasses.replace(flat, steps=tuple(builder.steps), types=tuple(builder.types), constants=builder.constants, slices=builder.slices)


def _is_literal(atom) -> bool:
    return isinstance(atom, jex.Literal)


def _call_body(eqn) -> jex.ClosedJaxpr | None:
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            body = eqn.params[key]
            return body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, ())
    return None


def _free_axis(product: Step, types, is_right: bool, axis: int) -> int | None:
    """The output axis of a `dot_general` that an axis of its left or right operand becomes; None if it is summed over or shared."""
    contracting, batch = product.params["dimension_numbers"]
    left, right = ([a for a in range(types[product.operand(p)].ndim) if a not in (*contracting[p], *batch[p])] for p in (0, 1))
    free = right if is_right else left
    return len(batch[0]) + (len(left) if is_right else 0) + free.index(axis) if axis in free else None


def _bodies(params) -> list[jex.ClosedJaxpr]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jex.ClosedJaxpr):
                found.append(item)
            elif isinstance(item, jex.Jaxpr):
                found.append(jex.ClosedJaxpr(item, ()))
    return found


def _equations(closed: jex.ClosedJaxpr) -> Iterator:
    """Equations, and those inside them."""
    for eqn in closed.jaxpr.eqns:
        yield eqn
        for body in _bodies(eqn.params):
            yield from _equations(body)


def _contains_weighted(closed: jex.ClosedJaxpr | None) -> bool:
    return closed is not None and any(eqn.primitive.name in WEIGHTED for eqn in _equations(closed))


def _signature(eqn) -> str:
    literals = [f"{a.val}:{a.aval}" if _is_literal(a) else str(a.aval) for a in eqn.invars]
    params = ", ".join(f"{key}={value}" for key, value in sorted(eqn.params.items()))
    return re.sub(r"0x[0-9a-f]+", "", f"{eqn.primitive.name}({', '.join(literals)}) [{params}]")
