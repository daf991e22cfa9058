"""How long each layer takes at each pair of bits, measured on the device at hand."""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax._graph import Graph, Op
from brecq_jax._interpret import Block, make_block, needed_steps, run
from brecq_jax._model import Problem, Program, Quantized
from brecq_jax._plan import make_plan
from brecq_jax._progress import bar
from brecq_jax._trace import trace
from brecq_jax.deploy import to_integer
from brecq_jax.formats import MinMax, Uniform
from brecq_jax.mixed_precision.costs import FLOAT_BITS, batch_size
from brecq_jax.solvers.nearest import round_weights

ROUND_S = 0.005  # of calls in a row, at least, in each round


def measure_latency(
    graph: Graph, weight_bits: Sequence[int] = (2, 3, 4, 8), act_bits: Sequence[int] = (8, FLOAT_BITS), *, rounds: int = 9, progress: bool = True
) -> dict[tuple[str, int, int], float]:
    """The latency table of this device: (op, weight bits, activation bits) -> µs of one example. 32 bits are float.

        graph = brecq_jax.trace(model.apply, variables, images[:8])     # measured in batches of 8
        table = mixed_precision.measure_latency(graph)
        mixed_precision.write_latency(table, "mine.csv")

    Each op that multiplies is run by itself as `deploy.to_integer` makes it: on integers where both its weight and what it reads have 8
    bits or fewer, else on floats from packed weights. It takes floats and gives floats, so that making codes of its input is part of it.
    Time does not depend on values, which are random. Of `rounds` rounds, in which the bits take turns, the median, less that of a
    program that does nothing with as many arguments. An op that another one equals in shapes is measured once.

    Args:
      graph: `trace(apply_fn, params, inputs)`; times are of its batch, shared out over the examples.
      weight_bits, act_bits: all pairs of these are measured; 2 to 8, and 32.

    Raises:
      ValueError: bits that no integer op has.
    """
    for name, bits in (("weight_bits", weight_bits), ("act_bits", act_bits)):
        if wrong := sorted(set(bits) - {*range(2, 9), FLOAT_BITS}):
            raise ValueError(f"measure_latency: {name}={wrong}. Write 2 to 8, or {FLOAT_BITS} for float.")
    ops = [op for op in graph.ops if op.kind != "embed"]
    pairs = [(w, a) for w in dict.fromkeys(weight_bits) for a in dict.fromkeys(act_bits)]
    needed, measured, found = needed_steps(graph, graph.flat.outputs), {}, {}
    with bar(progress) as show:
        for number, op in enumerate(ops):
            block = make_block(graph, op.name, op.step, op.step + 1, graph.flat.steps[op.step].outputs, needed)
            if block.program not in measured:
                measured[block.program] = _measure(graph, op, block, pairs, rounds)
            found |= {(op.name, *pair): us / batch_size(graph) for pair, us in measured[block.program].items()}
            show(number + 1, len(ops), f"latency of {op.name}")
    return found


def _measure(graph: Graph, op: Op, block: Block, pairs: Sequence[tuple[int, int]], rounds: int) -> dict[tuple[int, int], float]:
    """µs of the traced batch for each pair."""
    draw = np.random.default_rng(0)
    types = [graph.flat.types[i] for i in (op.data, *block.params)]
    x, *params = (jnp.asarray(draw.normal(size=t.shape), t.dtype) for t in types)

    def apply_fn(params, x):
        return run(block.program, [x], params, block.constants)

    alone = trace(apply_fn, params, x)
    calls = [_compiled(alone, apply_fn, params, x, *pair) for pair in pairs]
    seconds = np.median([[_seconds(ours) - _seconds(nothing) for ours, nothing in calls] for _ in range(rounds)], 0)
    return {pair: 1e6 * max(float(s), 0.0) for pair, s in zip(pairs, seconds, strict=True)}


def _compiled(graph: Graph, apply_fn: Callable, params: list, x: jax.Array, weight_bits: int, act_bits: int) -> tuple[Callable, Callable]:
    """The op at these bits, and a program with the same arguments that does nothing."""
    formats = [None if bits == FLOAT_BITS else Uniform(bits, ranges=MinMax()) for bits in (weight_bits, act_bits)]
    plan = make_plan(graph, *formats)
    sites = {name: format for name, format in plan.activations.items() if format is not None}
    grids = {name: format.fit(x.reshape(1, -1).astype(jnp.float32)) for name, format in sites.items()}
    model = Quantized(params, grids, Program(apply_fn, tuple(sites.items()), plan.whole_values))
    integer = to_integer(round_weights(Problem(apply_fn, params, plan, x, len(x)), model), x)
    ours = jax.jit(lambda model, x: model(x)).lower(integer, x).compile()
    nothing = jax.jit(lambda model, x: x.ravel()[:1], keep_unused=True).lower(integer, x).compile()
    return lambda: ours(integer, x), lambda: nothing(integer, x)


def _seconds(call: Callable) -> float:
    """The mean of calls in a row, waited for at the end."""
    calls, start, now = 0, time.perf_counter(), 0.0
    while now - start < ROUND_S:
        for _ in range(calls or 1):
            out = call()
        jax.block_until_ready(out)
        calls, now = 2 * calls or 1, time.perf_counter()
    return (now - start) / calls
