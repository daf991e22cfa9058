"""Run a program, or a part of it, with hooks: replace inputs of ops, values, or whole ops; record what passes.

A `Program` is a run of steps with ids of its own, hashable by structure: two blocks of the same shape are equal, so
that one compiled function serves both. A `Block` says where a Program stands in its Graph.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from brecq_jax._graph import Graph, Op, permutation
from brecq_jax._jaxpr import Step
from brecq_jax._products import Factor


@dataclasses.dataclass(frozen=True)
class LocalOp:
    """An op as its program sees it. `weight`: position among `params`; `site`: position among `sites`."""

    kind: str
    step: int
    data_position: int
    weight: int
    site: int
    order: tuple[int, ...]  # for each axis of the operand that of the weight, if nothing but transposes and casts lies between; else ()


@dataclasses.dataclass(frozen=True)
class LocalFactor:
    """One operand of a product of two values, as its program sees it. `site`: position among `sites`."""

    step: int
    data_position: int
    token_axis: int
    site: int
    kind: str = "product"


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Steps over local ids. Equality and hash are those of `key`: structure and shapes, not names or values."""

    key: tuple
    steps: tuple[tuple[Step, tuple[int, ...], tuple[int, ...]], ...]
    inputs: tuple[int, ...]
    params: tuple[int, ...]
    constants: tuple[int, ...]
    outputs: tuple[int, ...]
    ops: tuple[LocalOp, ...]
    factors: tuple[LocalFactor, ...]
    sites: tuple[int, ...]

    @property
    def reads(self) -> tuple[LocalOp | LocalFactor, ...]:
        """What reads a value that may be quantized, as `run` numbers it: ops, then factors."""
        return self.ops + self.factors

    def __eq__(self, other) -> bool:
        return isinstance(other, Program) and self.key == other.key

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.key)

    def __hash__(self) -> int:
        return self._hash


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A part of a graph. `ins`, `outs`: ids of the data that enters and leaves; `params`: ids of parameters."""

    name: str
    ops: tuple[Op, ...]
    program: Program
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    params: tuple[int, ...]
    constants: tuple[Any, ...]
    sites: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Block({self.name}: {', '.join(op.name for op in self.ops)})"


def run(
    program: Program,
    inputs: Sequence[jax.Array],
    params: Sequence[jax.Array],
    constants: Sequence[jax.Array],
    *,
    on_value: Callable[[int, jax.Array], jax.Array] | None = None,
    on_input: Callable[[int, jax.Array], jax.Array] | None = None,
    on_op: Callable[[int, Step, list], Sequence[jax.Array] | None] | None = None,
) -> tuple[jax.Array, ...]:
    """Execute a program.

    Hooks:
      on_value(site, value): replaces a value that ops read, for everything that reads it.
      on_input(read, operand): replaces what one of `program.reads` reads.
      on_op(op, step, operands): replaces an op; `operands` are the step's inputs. None: run it as it is.
    """
    env: dict[int, jax.Array] = {}
    site_of = {ident: site for site, ident in enumerate(program.sites)}
    op_of = {op.step: number for number, op in enumerate(program.ops)}
    reads: dict[int, list[int]] = {}
    for number, read in enumerate(program.reads):
        reads.setdefault(read.step, []).append(number)

    def write(ident: int, value: jax.Array):
        env[ident] = on_value(site_of[ident], value) if on_value and ident in site_of else value

    for ids, values in ((program.inputs, inputs), (program.params, params), (program.constants, constants)):
        for ident, value in zip(ids, values, strict=True):
            write(ident, value)
    for position, (step, ids, outs) in enumerate(program.steps):
        operands = [env[i] for i in ids]
        results = None
        for number in reads.get(position, ()) if on_input else ():
            slot = step.arguments[program.reads[number].data_position]
            operands[slot] = on_input(number, operands[slot])
        if on_op and position in op_of:
            results = on_op(op_of[position], step, operands)
        if step.primitive == "sharding_constraint" and jax.sharding.get_abstract_mesh().manual_axes:
            results = operands  # one of several devices, each with a batch of its own: nothing to lay out
        for ident, value in zip(outs, step.run(*operands) if results is None else results, strict=True):
            write(ident, value)
    return tuple(env[i] for i in program.outputs)


def needed_steps(graph: Graph, outputs: Sequence[int]) -> set[int]:
    """Positions of the steps that weighted ops, products or these outputs depend on, ops and products among them."""
    weighted, values, found = {read.step for read in (*graph.ops, *graph.factors)}, set(outputs), set()
    for t in reversed(range(len(graph.flat.steps))):
        step = graph.flat.steps[t]
        if t in weighted or values.intersection(step.outputs):
            found.add(t)
            values.update(step.inputs)
    return found


def make_block(graph: Graph, name: str, start: int, stop: int, outputs: Sequence[int], needed: Collection[int]) -> Block:
    """The part of a graph made of its data-dependent steps in [start, stop), and what they need of the parameters.

    `outputs`: ids that the graph's last block makes, and others for it. `needed`: `needed_steps(graph, outputs)`.
    """
    flat = graph.flat
    chosen = {t for t in range(start, stop) if t in needed and graph.data.intersection(flat.steps[t].outputs)}
    maker = {out: t for t, step in enumerate(flat.steps) for out in step.outputs}
    todo = [i for t in chosen for i in flat.steps[t].inputs]
    made = {out for t in chosen for out in flat.steps[t].outputs}
    ins, params, constants = {}, {}, {}
    last = stop >= len(flat.steps)
    if last:
        todo.extend(i for i in outputs if i not in graph.data)
    seen: set[int] = set()
    while todo:
        ident = todo.pop()
        if ident in seen or ident in made:
            continue
        seen.add(ident)
        if ident in graph.origins:
            params[ident] = None
        elif ident in flat.constants:
            constants[ident] = None
        elif ident in graph.data:
            ins[ident] = None
        else:
            chosen.add(maker[ident])
            todo.extend(flat.steps[maker[ident]].inputs)
    later = {i for t in range(stop, len(flat.steps)) if t in needed for i in flat.steps[t].inputs}
    outs = tuple(i for i in sorted(made & graph.data) if i in later or i in outputs)
    if last:
        outs = tuple(outputs)
        for ident in set(outs) - made - set(params) - set(constants) - seen:
            (ins if ident in graph.data else params if ident in graph.origins else constants)[ident] = None
    ops = tuple(op for op in graph.ops if op.step in chosen and start <= op.step < stop)
    factors = tuple(f for f in graph.factors if start <= f.step < stop)
    steps = sorted(chosen)
    return _block(graph, name, ops, factors, steps, sorted(ins), sorted(params), sorted(constants), outs)


def _block(graph, name, ops, factors, positions, ins, params, constants, outs) -> Block:
    flat, local = graph.flat, {}

    def number(ident: int) -> int:
        return local.setdefault(ident, len(local))

    in_ids, param_ids, const_ids = (tuple(map(number, ids)) for ids in (ins, params, constants))
    steps = tuple((flat.steps[t], tuple(map(number, flat.steps[t].inputs)), tuple(map(number, flat.steps[t].outputs))) for t in positions)
    out_ids = tuple(number(i) for i in outs)
    at = {t: i for i, t in enumerate(positions)}
    reads = *(op for op in ops if op.kind != "embed"), *factors
    site_names = tuple(dict.fromkeys(read.site for read in reads))
    value_of = {read.site: read.site_value for read in reads}
    # A site whose value is made in another block, and enters reshaped, is known here by what enters.
    sites = tuple(number(value_of[s]) if value_of[s] in local else -1 for s in site_names)
    slots = {graph.origins[i]: slot for slot, i in enumerate(params)}
    locals_, makers = [], {i: flat.steps[t] for t in positions for i in flat.steps[t].outputs}
    for op in ops:
        weight = graph.weights[op.weight]
        slot = slots[(weight.leaf, weight.index)]
        site = site_names.index(op.site) if op.site in site_names else -1
        order = permutation(makers, flat.types[op.weight_value].ndim, params[slot], op.weight_value)
        locals_.append(LocalOp(op.kind, at[op.step], op.data_position, slot, site, order))
    local_factors = tuple(LocalFactor(at[f.step], f.data_position, f.token_axis, site_names.index(f.site)) for f in factors)
    key = (
        tuple((step.signature, i, o) for step, i, o in steps),
        tuple(str(flat.types[i]) for i in (*ins, *params, *constants)),
        in_ids, param_ids, const_ids, out_ids, tuple(locals_), local_factors, sites,
    )  # fmt: skip
    program = Program(key, steps, in_ids, param_ids, const_ids, out_ids, tuple(locals_), local_factors, sites)
    values = tuple(flat.constants[i] for i in constants)
    return Block(name, ops, program, tuple(ins), tuple(outs), tuple(params), values, site_names)


def contraction_axis(read: Op | LocalOp | Factor | LocalFactor, step: Step) -> tuple[int, int]:
    """(the data's axis that a matrix product or a convolution sums over, of several the fastest; how many groups share it)."""
    if read.kind == "conv":
        return step.params["dimension_numbers"].lhs_spec[1], step.params["feature_group_count"]
    return step.params["dimension_numbers"][0][read.data_position][-1], 1


def token_axes(read: Op | LocalOp | Factor | LocalFactor, step: Step) -> tuple[int, ...]:
    """The data's axes along which the elements of one token lie: what a dense op sums over, the features of what a product reads.

    A product may sum over tokens, as attention's of what it attends to: a range for what it adds up would look at padding, and ahead.
    """
    return (read.token_axis,) if isinstance(read, (Factor, LocalFactor)) else step.params["dimension_numbers"][0][read.data_position]


def whole(graph: Graph) -> Block:
    """The graph as one block."""
    outputs = graph.flat.outputs
    return make_block(graph, "net", 0, len(graph.flat.steps), outputs, needed_steps(graph, outputs))


def param_values(graph: Graph, block: Block, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """What a block reads of the flattened parameters, in the order of `block.params`."""
    return [leaves[leaf][index] if index else leaves[leaf] for leaf, index in (graph.origins[i] for i in block.params)]
