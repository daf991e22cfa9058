"""Learned rounding, unit by unit: each weight picks the neighbour that keeps the unit's output."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from brecq_jax._calibrate import Hooks, learned_outputs, run_local
from brecq_jax._graph import Graph
from brecq_jax._interpret import Block, param_values
from brecq_jax._model import Problem, Quantized
from brecq_jax._qarray import QArray, from_rows, to_rows
from brecq_jax.solvers._solver import Solver, chain
from brecq_jax.solvers._walk import Walk, fisher_error, record, squared_error
from brecq_jax.solvers.nearest import fit_activations, nearest

ZETA, GAMMA = 1.1, -0.1  # stretch of the sigmoid: AdaRound, eq. 23
CHUNK = 100  # steps between looks at the progress bar, where the loop runs on the device


def soft_choice(v: Float[Array, "..."]) -> Float[Array, "..."]:
    """h(v) in [0, 1]: 0 picks the lower neighbour, 1 the upper.

    Source: AdaRound, eq. 23, the rectified sigmoid, https://arxiv.org/abs/2004.10568
    """
    return jnp.clip(jax.nn.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)


def inverse_choice(h: Float[Array, "..."]) -> Float[Array, "..."]:
    """v with soft_choice(v) = h, for h in [0, 1]."""
    return -jnp.log((ZETA - GAMMA) / (h - GAMMA) - 1)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Settings of reconstruction. Defaults: BRECQ's released code, unless noted.

    `unit` None takes the problem's blocks. The weight phase runs with float activations, then the activation phase
    learns step sizes with the weights fixed; both start from the outputs of the already-quantized prefix.
    """

    unit: Literal["layer"] | None = None
    error: Callable = fisher_error
    num_steps: int = 20_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    regularizer: float = 0.01
    warmup: float = 0.2  # fraction of steps before rounding is pressed to choose
    beta: tuple[float, float] = (20.0, 2.0)  # sharpness of the penalty, start and end
    act_steps: int = 5_000
    # Ours: Adam steps the logarithm of the step size, which keeps it positive; BRECQ steps the size itself by 4e-4.
    act_learning_rate: float = 1e-3


def adaround(**settings) -> Solver:
    """Each op on its own, plain squared error. Source: Nagel et al. 2020, https://arxiv.org/abs/2004.10568"""
    return reconstruct(Reconstruction(unit="layer", error=squared_error, **settings))


def brecq(**settings) -> Solver:
    """Residual blocks, Fisher-weighted error. Source: Li et al. 2021, https://arxiv.org/abs/2102.05426"""
    return reconstruct(Reconstruction(**settings))


def by_name(name: str, **settings) -> Solver:
    """What `--config.method` says: nearest, adaround, brecq, or squared (BRECQ's blocks, plain squared error).

    Raises:
      ValueError: another name.
    """
    makers = {
        "nearest": lambda **_: nearest(),
        "adaround": adaround,
        "brecq": brecq,
        "squared": lambda **given: reconstruct(Reconstruction(error=squared_error, **given)),
    }
    if name not in makers:
        raise ValueError(f"There is no solver named {name!r}. Write one of {', '.join(makers)}.")
    return makers[name](**settings)


def reconstruct(settings: Reconstruction = Reconstruction()) -> Solver:
    """Learned rounding of weights, then learned step sizes of activations, unit by unit in program order."""
    return chain(functools.partial(_learn_rounding, settings), functools.partial(_learn_steps, settings))


def _learn_rounding(settings: Reconstruction, problem: Problem, guess: Quantized, key):
    if not any(problem.plan.weights.values()) or not settings.num_steps:
        return guess, ()
    key_fisher, key_steps = jax.random.split(key)
    walk = Walk(problem, settings.batch_size, settings.unit, settings.error, key_fisher)
    return walk.choose_codes(guess, "rounding", settings.num_steps, functools.partial(_round_block, settings, walk, key_steps))


def _round_block(settings, walk: Walk, key, n: int, block: Block, names, current: Quantized, params, targets) -> dict[str, QArray]:
    slots = _weight_slots(walk.graph, block)
    learned = {slots[name]: current.weight(walk.graph.weights[name]) for name in names}
    floats = param_values(walk.graph, block, walk.leaves)
    logits, low, span = {}, {}, {}
    for slot, q in learned.items():
        rows = to_rows(floats[slot].astype(jnp.float32), q.channel_axes)
        codes = q.format.neighbors(rows, q.grid)
        ends = [from_rows(q.format.decode(c, q.grid), q.shape, q.channel_axes) for c in codes]
        low[slot], span[slot] = ends[0], ends[1] - ends[0]
        share = jnp.where(span[slot] > 0, (floats[slot] - low[slot]) / jnp.where(span[slot] > 0, span[slot], 1), 0.5)
        logits[slot] = inverse_choice(jnp.clip(share, 0, 1))
    data, rows = walk.batches(n, block, targets)
    fixed = {"params": params, "constants": list(block.constants), "low": low, "span": span}
    logits = _optimise(settings, walk, block, "rounding", logits, fixed, data, rows, settings.num_steps, jax.random.fold_in(key, n))
    result = {}
    for name in names:
        q = learned[slots[name]]
        low_codes, high_codes = q.format.neighbors(to_rows(floats[slots[name]].astype(jnp.float32), q.channel_axes), q.grid)
        codes = jnp.where(to_rows(logits[slots[name]], q.channel_axes) >= 0, high_codes, low_codes)
        result[name] = dataclasses.replace(q, codes=from_rows(codes, q.shape, q.channel_axes))
    return result


def _weight_slots(graph: Graph, block: Block) -> dict[str, int]:
    return {op.weight: local.weight for op, local in zip(block.ops, block.program.ops, strict=True)}


def _learn_steps(settings: Reconstruction, problem: Problem, guess: Quantized, key):
    if not guess.activations:
        return guess, ()
    current, infos = fit_activations(problem, guess), []
    if not settings.act_steps:
        return current, ()
    key_fisher, key_steps = jax.random.split(key)
    walk = Walk(problem, settings.batch_size, settings.unit, settings.error, key_fisher)
    plan, decided = problem.plan, set()
    leaves = jax.tree.leaves(current.dequantized())
    for n, block in enumerate(walk.blocks):
        start = time.perf_counter()
        targets = walk.exact.outputs(block, param_values(walk.graph, block, walk.leaves))
        params = param_values(walk.graph, block, leaves)
        outputs = walk.rough.outputs(block, params, Hooks(plan.activations, current.activations, plan.whole_values))
        names = [s for s in block.sites if s in current.activations and s not in decided]
        if names and learned_outputs(walk.graph, block):
            before = walk.held_out_error(n, block, outputs, targets)
            hooks = Hooks(plan.activations, current.activations, plan.whole_values)
            formats, grids, whole_values = hooks.of(block)
            logs = {s: jnp.log(g.scale) for s, g in grids.items() if block.sites[s] in names}
            fixed = {"params": params, "constants": list(block.constants), "grids": grids}
            data, rows = walk.batches(n, block, targets)
            logs = _optimise(settings, walk, block, "steps", logs, fixed, data, rows, settings.act_steps, jax.random.fold_in(key_steps, n), formats, whole_values)
            learned = {block.sites[s]: grids[s]._replace(scale=jnp.exp(v)) for s, v in logs.items()}
            better = current.with_activations(learned)
            candidate = walk.rough.outputs(block, params, Hooks(plan.activations, better.activations, plan.whole_values))
            after = walk.held_out_error(n, block, candidate, targets)
            kept = after < before
            if kept:
                current, outputs = better, candidate
            infos.append(record(block, "steps", before, after, kept, settings.act_steps, start))
        decided.update(names)
        walk.exact.advance(block, targets)
        walk.rough.advance(block, outputs)
    return current, tuple(infos)


# The loop. One compiled program per block shape: `program` and what follows it are static, all else are arguments.


def _optimise(settings, walk: Walk, block: Block, phase, variables, fixed, data, rows, steps, key, formats=(), whole_values=False):
    static = (block.program, phase, settings, steps, walk.batch_size, learned_outputs(walk.graph, block), formats, whole_values)
    state = (variables, _optimizer(settings, phase, steps).init(variables))
    title = f"{block.name}: {phase}"
    if rows is not None:  # the cache lies on disk: batches are gathered on the host
        for i in range(steps):
            draw = rows[np.asarray(jax.random.permutation(jax.random.fold_in(key, i), len(rows))[: walk.batch_size])]
            state = _update(static, state, fixed, jax.tree.map(lambda a, d=draw: jnp.asarray(a[d]), data), i)
            walk.problem.show(i + 1, steps, title)
    elif jax.default_backend() == "cpu":  # a kernel gradient inside a loop is up to 35 times slower on XLA:CPU
        for i in range(steps):
            state = _step(static, state, fixed, data, key, i)
            if i % CHUNK == CHUNK - 1 or i == steps - 1:
                jax.block_until_ready(state)
                walk.problem.show(i + 1, steps, title)
    else:
        for i in range(0, steps, CHUNK):
            state = _many_steps(static, min(CHUNK, steps - i), state, fixed, data, key, i)
            jax.block_until_ready(state)
            walk.problem.show(min(i + CHUNK, steps), steps, title)
    return state[0]


def _optimizer(settings: Reconstruction, phase: str, steps: int) -> optax.GradientTransformation:
    if phase == "rounding":
        return optax.adam(settings.learning_rate)
    return optax.adam(optax.cosine_decay_schedule(settings.act_learning_rate, steps))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _many_steps(static, count, state, fixed, data, key, start):
    return jax.lax.scan(lambda s, i: (_draw_and_update(static, s, fixed, data, key, i), None), state, start + jnp.arange(count))[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(static, state, fixed, data, key, i):
    return _draw_and_update(static, state, fixed, data, key, i)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _update(static, state, fixed, batch, i):
    return _one_update(static, state, fixed, batch, i)


def _draw_and_update(static, state, fixed, data, key, i):
    count, batch_size = jax.tree.leaves(data)[0].shape[0], static[4]
    rows = jax.random.permutation(jax.random.fold_in(key, i), count)[:batch_size]
    return _one_update(static, state, fixed, jax.tree.map(lambda a: a[rows], data), i)


def _one_update(static, state, fixed, batch, i):
    program, phase, settings, steps, _, positions, formats, whole_values = static
    variables, opt_state = state
    inputs, targets, importance = batch

    def loss(variables):
        params, grids, penalty = list(fixed["params"]), dict(fixed.get("grids", {})), 0.0
        if phase == "rounding":
            h = {slot: soft_choice(v) for slot, v in variables.items()}
            for slot, choice in h.items():
                params[slot] = (fixed["low"][slot] + choice * fixed["span"][slot]).astype(params[slot].dtype)
            penalty = _penalty(settings, h, i / steps)
        else:
            for site, v in variables.items():
                grids[site] = grids[site]._replace(scale=jnp.exp(v))
        outputs = run_local(program, formats, whole_values, inputs, params, fixed["constants"], grids)
        weights = importance or [None] * len(targets)
        errors = [settings.error(outputs[p], t, w) for p, t, w in zip(positions, targets, weights, strict=True)]
        return sum(jnp.mean(e) for e in errors) + penalty

    gradients = jax.grad(loss)(variables)
    updates, opt_state = _optimizer(settings, phase, steps).update(gradients, opt_state)
    return optax.apply_updates(variables, updates), opt_state


def _penalty(settings: Reconstruction, choices, progress):
    """λ Σ (1 − |2h − 1|^β): zero during the warm-up, then pressing towards 0 or 1. Source: AdaRound, eq. 24."""
    high, low = settings.beta
    rest = jnp.clip((progress - settings.warmup) / (1 - settings.warmup), 0, 1)
    beta = high + (low - high) * rest
    total = sum(jnp.sum(1 - jnp.abs(2 * h - 1) ** beta) for h in choices.values())
    return jnp.where(progress < settings.warmup, 0.0, settings.regularizer) * total


def compiled_programs() -> int:
    """Loops compiled in this process so far: one per block shape and settings."""
    return sum(f._cache_size() for f in (_step, _update, _many_steps))
