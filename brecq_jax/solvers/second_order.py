"""Second-order rounding: codes that minimise each op's output error, a quadratic in its weight."""

import dataclasses
import functools
import math

import jax

from brecq_jax._calibrate import learned_outputs
from brecq_jax._graph import Op
from brecq_jax._interpret import Block, LocalOp, param_values
from brecq_jax._model import Problem, Quantized
from brecq_jax._qarray import QArray, float_rows, from_rows
from brecq_jax.solvers import _lattice, _quadratic
from brecq_jax.solvers._solver import Info, Solver
from brecq_jax.solvers._walk import Stage, Unit, Walk
from brecq_jax.solvers.nearest import fit_activations


@dataclasses.dataclass(frozen=True)
class SecondOrder:
    """Settings of second-order rounding."""

    damping: float = 0.01  # pull towards the float weight, in means of the Gram matrix's diagonal: GPTQ's
    rounds: int = 3  # passes over the calibration examples: the later ones know where a ReLU cuts
    rows: int = 131_072  # output positions that a Gram matrix is summed over, of all examples


def second_order(**settings) -> Solver:
    """Error compensation, then coordinate descent on the codes until no single change helps.

    Op by op in program order, with inputs from the already-quantized prefix and targets from the float model.
    Source: GPTQ, https://arxiv.org/abs/2210.17323, eq. 2 and 3, for the start; coordinate descent on the same Gram matrices.
    """
    settings = SecondOrder(**settings)

    def solve(problem: Problem, guess: Quantized, key: jax.Array) -> tuple[Quantized, Info]:
        walk = Walk(problem)
        model, info = walk.improve(guess, [stage(settings, walk, guess)])
        return fit_activations(problem, model), info

    return solve


def stage(settings: SecondOrder, walk: Walk, guess: Quantized) -> Stage:
    """Second-order rounding as one stage of a walk from `guess`. The report's notes name the weights that it leaves as they are."""
    for name, why in left_out(walk, guess).items():
        walk.problem.note(f"second_order: {name} keeps its guess: {why}")
    return Stage("second order", 0, functools.partial(_round_unit, settings, walk))


def left_out(walk: Walk, guess: Quantized) -> dict[str, str]:
    """Weight -> why the closed form does not round it, of all that it should: by no op of the first block that reads it."""
    found: dict[str, tuple[int, list[str]]] = {}
    for number, block in enumerate(walk.blocks):
        for op, local in zip(block.ops, block.program.ops, strict=True):
            first, reasons = found.setdefault(op.weight, (number, []))
            if first == number and walk.chooses(guess, op.weight) and learned_outputs(walk.graph, block):
                reasons.append(_unread(walk, guess, op, local, block))
    return {name: reasons[0] for name, (_, reasons) in found.items() if reasons and all(reasons)}


def _unread(walk: Walk, model: Quantized, op: Op, local: LocalOp, block: Block) -> str:
    """Why the closed form cannot round the weight by this op; "" where it can."""
    step, q = block.program.steps[local.step][0], model.weight(walk.graph.weights[op.weight])
    return _quadratic.unread(local, step, q.channel_axes)


def _round_unit(settings, walk: Walk, unit: Unit, current: Quantized) -> Quantized:
    block, floats = unit.block, param_values(walk.graph, unit.block, walk.leaves)
    params, learned = current.values(walk.graph, block), {}
    inputs = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in (walk.graph.flat.types[i] for i in block.ins)]
    types = _quadratic.program_types(block.program, inputs, params, block.constants)
    hooks = walk.hooks(current)
    formats, grids, whole_values = hooks.of(block) if hooks else ((), {}, False)
    for number, (op, local) in enumerate(zip(block.ops, block.program.ops, strict=True)):
        if op.weight not in unit.weights or op.weight in learned or _unread(walk, current, op, local, block):
            continue
        q = current.weight(walk.graph.weights[op.weight])
        to = _quadratic.reach(block.program, number, types, block.constants)
        weight = float_rows(floats[local.weight], q.channel_axes)
        found, grid = _decoded(q), q.grid
        for _ in range(settings.rounds):
            statistics = functools.partial(_quadratic.statistics, block.program, number, to, formats, whole_values)
            streams, shared = [walk.rough, walk.exact], (params, floats, list(block.constants), grids)
            total = walk.summed(op, block, streams, settings.rows, statistics, *shared)
            found, grid = _searched(q.format, settings.damping, *_means(*total), grid, weight, found)
            params[local.weight], learned[op.weight] = _written(q, found, grid)
            if math.isinf(to.low):
                break
    return current.with_weights(learned, walk.graph)


_decoded = jax.jit(QArray.decode_rows)


@jax.jit
def _means(gram, cross, count):
    return gram / count, cross / count


@jax.jit
def _written(q: QArray, found, grid):
    """(the weight with the rows `found`, what stands for it)."""
    weight, codes = (from_rows(rows, q.shape, q.channel_axes) for rows in (found, q.format.encode(found, grid)))
    return weight.astype(q.dtype), dataclasses.replace(q, codes=codes, grid=grid)


def _searched(format, damping: float, *arrays):
    """The search takes a column after the other: thousands of small steps, which a CPU does as fast as an accelerator starts them."""
    if jax.default_backend() == "cpu":
        return _lattice.search(format, damping, *arrays)
    host = jax.device_put(arrays, jax.local_devices(backend="cpu")[0])
    return jax.device_put(_lattice.search(format, damping, *host), arrays[0].sharding)
