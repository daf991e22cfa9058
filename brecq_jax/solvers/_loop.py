"""The loop of reconstruction: one compiled program per block shape, on cached inputs and targets that stay on the device."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from brecq_jax._calibrate import check_gradient, run_local
from brecq_jax._fast_ops import bfloat16_op, fast_op
from brecq_jax._interpret import Block, Program, run
from brecq_jax._model import dropped
from brecq_jax._qarray import from_rows
from brecq_jax._sharding import everywhere, here, over_examples, spread

CHUNK = 100  # steps between looks at the progress bar, where the loop runs on the device
# The same with several devices that are threads of one CPU: more steps in flight leave no thread to the one that the others wait for.
SHARED_CPU_CHUNK = 10


class Batch(NamedTuple):
    """What one step sees of each example; fields that a loop does not use are empty lists."""

    inputs: list  # from the quantized prefix
    exact_inputs: list  # from the float model
    targets: list
    importance: list
    predictions: list


class Tail(NamedTuple):
    """The float rest of the net behind a block. Blocks compare by identity, so that a loop with a tail is compiled for itself."""

    entries: tuple[int, ...]  # ids of what the block makes
    blocks: tuple[Block, ...]
    output: int

    def run(self, outputs, params) -> jax.Array:
        """The net's output, given the block's; `params` for each block of the tail."""
        env = dict(zip(self.entries, outputs, strict=True))
        for block, own in zip(self.blocks, params, strict=True):
            env.update(zip(block.outs, run(block.program, [env[i] for i in block.ins], own, block.constants, on_op=fast_op), strict=True))
        return env[self.output]


class Static(NamedTuple):
    """What a compiled loop depends on beside shapes."""

    program: Program
    settings: Any  # Reconstruction
    steps: int
    batch_size: int
    positions: tuple[int, ...]  # of the outputs that are compared
    formats: tuple  # of activations, by site
    whole_values: bool
    written: tuple  # of weights: (slot, format, shape, channel axes)
    kinds: tuple[str, ...]  # of variables
    tail: Tail | None
    count: int  # of examples to draw from
    dtypes: tuple  # of the block's inputs, which caches may hold in fewer bits
    mesh: Mesh | None  # whose devices share each batch


def loop(
    static: Static, variables, fixed, data: Batch | Callable[[np.ndarray], Batch], key, show: Callable[[int], None]
) -> Iterator[Any]:
    """Yields the variables at each of `settings.checks` evenly spaced steps, the last one included.

    `data`: all examples, on the devices; or a function that makes the batch of some of them. What is yielded is gone when the next is
    asked for: its buffers are used again.

    Raises:
      NoGradient: JAX has none of what the program computes.
    """
    mesh, on_cpu = static.mesh, jax.default_backend() == "cpu"
    chunk = SHARED_CPU_CHUNK if mesh and on_cpu else CHUNK
    key_order, key = jax.random.split(key)
    order = batches(static.steps, static.count, static.batch_size, key_order)
    variables, fixed, key = everywhere(mesh, (variables, fixed, key))
    state = (variables, everywhere(mesh, _started(static, variables)))

    def read():
        batch = data(order[0]) if callable(data) else jax.tree.map(lambda a: a[order[0]], data)
        return jax.eval_shape(functools.partial(_one_update, static), state, fixed, batch, key, 0)

    check_gradient([step for step, _, _ in static.program.steps], read)
    stops = sorted({round(static.steps * (n + 1) / static.settings.checks) for n in range(static.settings.checks)} - {0})
    done = 0
    for stop in stops:
        while done < stop:
            until = min(stop, done + chunk)
            if callable(data):
                for i in range(done, until):
                    state = _update(static, state, fixed, jax.tree.map(lambda a: spread(mesh, a), data(order[i])), key, i)
            elif on_cpu:  # a kernel gradient inside a loop is up to 35 times slower on XLA:CPU
                for i in range(done, until):
                    state = _step(static, state, fixed, data, order[i], key, i)
            else:
                state = _many_steps(static, state, fixed, data, order[done:until], key, done)
            jax.block_until_ready(state)
            done = until
            show(done)
        yield here(mesh, state[0])


def optimizer(static: Static) -> optax.GradientTransformation:
    """Adam for each kind of variables, at its own rate."""
    settings, rounding = static.settings, static.settings.rounding
    schedules = {
        "choices": lambda: rounding.schedule(settings.learning_rate, static.steps),
        "scales": lambda: rounding.schedule(rounding.scale_learning_rate, static.steps),
        "steps": lambda: optax.cosine_decay_schedule(settings.act_learning_rate, static.steps),
    }
    return optax.multi_transform({k: optax.adam(schedules[k]()) for k in static.kinds}, {k: k for k in static.kinds})


@functools.partial(jax.jit, static_argnums=0)
def _started(static, variables):
    return optimizer(static).init(variables)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _many_steps(static, state, fixed, data, order, key, start):
    steps = order, start + jnp.arange(len(order))
    return jax.lax.scan(lambda s, at: (_take_and_update(static, s, fixed, data, at[0], key, at[1]), None), state, steps)[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(static, state, fixed, data, rows, key, i):
    return _take_and_update(static, state, fixed, data, rows, key, i)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _update(static, state, fixed, batch, key, i):
    return _one_update(static, state, fixed, batch, key, i)


def batches(steps: int, count: int, size: int, key: jax.Array) -> np.ndarray:
    """Which of `count` examples each step learns from, (steps, size): no example twice in a batch, each batch drawn for itself.

    Drawn before the loop, and by the largest of random numbers: to order 1,792 examples at each step took a CPU a quarter of ResNet-20's
    default run.
    """
    return np.asarray(_batches(jax.random.split(key, steps), count, min(size, count)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _batches(keys, count: int, size: int):
    return jax.lax.map(lambda key: jax.lax.top_k(jax.random.uniform(key, (count,)), size)[1], keys)


def _take_and_update(static: Static, state, fixed, data, rows, key, i):
    batch = jax.tree.map(lambda a: a[rows], data)
    batch = jax.lax.with_sharding_constraint(batch, over_examples(static.mesh)) if static.mesh else batch
    return _one_update(static, state, fixed, batch, key, i)


def _one_update(static: Static, state, fixed, batch: Batch, key, i):
    settings, (variables, opt_state) = static.settings, state
    key_inputs, key_inside = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, i), 1))
    inputs, drop = [x.astype(d) for x, d in zip(batch.inputs, static.dtypes, strict=True)], None
    if settings.drop_prob and static.formats:
        drop = settings.drop_prob, key_inside
        pairs = enumerate(zip([x.astype(d) for x, d in zip(batch.exact_inputs, static.dtypes, strict=True)], inputs, strict=True))
        inputs = [dropped(settings.drop_prob, jax.random.fold_in(key_inputs, n), exact, rough) for n, (exact, rough) in pairs]

    def loss(variables):
        params, grids, total = list(fixed["params"]), dict(fixed["grids"]), 0.0
        for slot, format, shape, axes in static.written:
            rows, own = settings.rounding.rows(format, own_variables(variables, slot), fixed["rounding"][slot], i / static.steps)
            params[slot], total = from_rows(rows, shape, axes).astype(params[slot].dtype), total + own
        for site, v in variables.get("steps", {}).items():
            grids[site] = grids[site]._replace(scale=jnp.exp(v))
        on_op = bfloat16_op if settings.bfloat16 else fast_op
        outputs = run_local(static.program, static.formats, static.whole_values, inputs, params, fixed["constants"], grids, drop, on_op)
        weights = batch.importance or [None] * len(batch.targets)
        for position, target, weight in zip(static.positions, batch.targets, weights, strict=True):
            total += jnp.mean(settings.error(outputs[position], target.astype(outputs[position].dtype), weight))
        if static.tail:
            predicted = static.tail.run(outputs, fixed["tail"])
            total += settings.prediction.weight * jnp.mean(divergence(predicted, batch.predictions[0]))
        return total

    gradients = jax.grad(loss)(variables)
    updates, opt_state = optimizer(static).update(gradients, opt_state)
    return optax.apply_updates(variables, updates), opt_state


def own_variables(variables, slot: int):
    """The variables of one weight."""
    return {kind: values[slot] for kind, values in variables.items() if kind != "steps"}


def divergence(logits, float_logits) -> jax.Array:
    """KL(float ‖ quantized) of the last axis's softmax."""
    p = jax.nn.softmax(float_logits)
    return jnp.sum(p * (jax.nn.log_softmax(float_logits) - jax.nn.log_softmax(logits)), -1)


def compiled_programs() -> int:
    """Loops compiled in this process so far: one per block shape and settings."""
    return sum(f._cache_size() for f in (_step, _update, _many_steps))
