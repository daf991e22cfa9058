"""What solvers learn from: outputs, ranges and Fisher weights of blocks over the calibration examples."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from brecq_jax._fast_ops import fast_op
from brecq_jax._graph import Graph
from brecq_jax._interpret import Block, param_values, run, whole
from brecq_jax._interpret import Program as BlockProgram
from brecq_jax._jaxpr import Step, suspects
from brecq_jax._memory import CHUNK, GB, PASS, STREAM, OnDisk, at_once, empty, values_bytes
from brecq_jax._model import Problem, quantize_hooks
from brecq_jax._plan import Activation
from brecq_jax._sharding import everywhere, gathered, parts, side_by_side, spread
from brecq_jax.formats import Grid, PerToken

SAMPLES_PER_BATCH = 16_384  # of each activation: what ranges are fitted to
OBSERVED_EXAMPLES = 256  # of the calibration set


class Hooks:
    """Activation quantization of a block as arguments of a compiled function: formats static, grids arrays."""

    def __init__(self, formats: Mapping[str, Activation | None], grids: Mapping[str, Grid], whole_values: bool):
        self.formats, self.grids, self.whole_values = formats, grids, whole_values

    def of(self, block: Block) -> tuple[tuple, dict[int, Grid], bool]:
        grids = {s: self.grids[n] for s, n in enumerate(block.sites) if n in self.grids and self.formats.get(n)}
        run = {s: self.formats.get(n) for s, n in enumerate(block.sites) if s in grids or isinstance(self.formats.get(n), PerToken)}
        return tuple(run.items()), grids, self.whole_values


def forward(block: Block, inputs, params, hooks: Hooks | None = None) -> tuple[jax.Array, ...]:
    """Run a block on one batch; compiled once per block shape."""
    return runner(block, params, hooks)(inputs)


def runner(block: Block, params, hooks: Hooks | None = None, mesh: Mesh | None = None) -> Callable[[Sequence[jax.Array]], tuple[jax.Array, ...]]:
    """Inputs -> outputs of a block, of one batch or of one for each device of the mesh, where the parameters are now."""
    formats, grids, whole_values = hooks.of(block) if hooks else ((), {}, False)
    shared = everywhere(mesh, (list(params), list(block.constants), grids))
    return lambda inputs: _forward(block.program, formats, whole_values, mesh, list(inputs), *shared)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _forward(program, formats, whole_values, mesh, inputs, params, constants, grids):
    run = functools.partial(run_local, program, formats, whole_values)
    return side_by_side(mesh, run, (True, False, False, False))(inputs, params, constants, grids)


def run_local(
    program: BlockProgram, formats, whole_values: bool, inputs, params, constants, grids, drop=None, on_op=fast_op
) -> tuple[jax.Array, ...]:
    """`run` with activations quantized, sites by position: what the loops of solvers trace."""
    return run(program, inputs, params, constants, on_op=on_op, **local_hooks(program, formats, whole_values, grids, drop))


def local_hooks(program: BlockProgram, formats, whole_values: bool, grids, drop=None) -> dict:
    """Hooks of `run` that quantize activations, sites by position. `drop`: (probability, key), see `quantize_hooks`."""
    if not formats:
        return {}
    local = Block("", (), program, (), (), (), (), tuple(map(str, range(len(program.sites)))))
    return quantize_hooks(local, {str(s): f for s, f in formats}, {str(s): g for s, g in grids.items()}, whole_values, drop)


def learned_outputs(graph: Graph, block: Block) -> tuple[int, ...]:
    """Positions of the outputs that reconstruction compares: real numbers that weighted ops made."""
    types = graph.flat.types
    return tuple(
        n for n, i in enumerate(block.outs) if i in graph.heavy and jnp.issubdtype(types[i].dtype, jnp.floating)
    )


class Sample(NamedTuple):
    """Values of one activation: drawn ones, and the least and the greatest of each batch, which stand for themselves alone."""

    values: np.ndarray
    importance: np.ndarray  # of a value's error; each example's errors count in parts of its own energy


def observe(problem: Problem, leaves: Sequence[jax.Array], names: Sequence[str]) -> dict[str, Sample]:
    """What activations are over the calibration set, by name.

    Examples are spread evenly over the set. As many pass at once as the budget of memory has room for, on each device of the mesh.
    """
    count = min(problem.count, OBSERVED_EXAMPLES)
    batch_size = min(STREAM, count)
    if problem.memory_budget_gb is not None:
        values = values_bytes(problem.graph(batch_size), problem.units(batch_size), batch_size)
        left = problem.memory_budget_gb * GB - sum(a.nbytes for a in jax.tree.leaves(problem.inputs))
        batch_size = at_once(batch_size, PASS * max(values), left)
    graph = problem.graph(batch_size)
    block = whole(graph)
    ids = graph.flat.inputs[graph.num_leaves :]
    flat_inputs = dict(zip(ids, jax.tree.leaves(problem.inputs), strict=True))
    found: dict[str, list[Sample]] = {}
    drawn = np.linspace(0, problem.count - 1, count - count % batch_size).astype(np.int64).reshape(-1, batch_size)
    shared = everywhere(problem.mesh, (param_values(graph, block, leaves), list(block.constants)))
    for start in range(0, len(drawn), parts(problem.mesh)):
        rows = drawn[start : start + parts(problem.mesh)]
        batch = [spread(problem.mesh, flat_inputs[i][rows.reshape(-1)], batch_size) for i in block.ins]
        values = _observe(block.program, batch_size, problem.mesh, batch, *shared)
        for site, sample in values.items():
            own = [gathered(problem.mesh, a, len(rows) * (SAMPLES_PER_BATCH + 2)) for a in sample]
            found.setdefault(block.sites[site], []).append(Sample(*own))
    return {name: Sample(*map(np.concatenate, zip(*found[name], strict=True))) for name in names}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _observe(program, batch_size, mesh, inputs, params, constants):
    return side_by_side(mesh, functools.partial(_seen, program, batch_size), (True, False, False))(inputs, params, constants)


def _seen(program, batch_size, inputs, params, constants):
    seen = {}

    def on_input(number, x):
        site = program.reads[number].site
        if site >= 0 and site not in seen:
            flat = x.reshape(-1).astype(jnp.float32)
            # As many of every activation: one compilation of `fit`.
            at = jnp.concatenate([_drawn(flat.size), jnp.stack([flat.argmin(), flat.argmax()])])
            stands_for = np.append(np.ones(SAMPLES_PER_BATCH), np.full(2, min(SAMPLES_PER_BATCH / flat.size, 1))).astype(np.float32)
            examples = batch_size if x.shape and x.shape[0] % batch_size == 0 else 1
            energy = jnp.mean(jnp.square(flat.reshape(examples, -1)), 1)
            own = energy[at // (flat.size // examples)]
            seen[site] = Sample(flat[at], stands_for / jnp.where(own > 0, own, jnp.inf))
        return x

    run(program, inputs, params, constants, on_input=on_input, on_op=fast_op)
    return seen


def _drawn(size: int) -> np.ndarray:
    """Positions of a sample: one at random in each of as many equal parts. An even stride would meet few channels, or one."""
    part = np.arange(SAMPLES_PER_BATCH) + np.random.default_rng(0).random(SAMPLES_PER_BATCH)
    return (part * size / SAMPLES_PER_BATCH).astype(np.int64)


class NoGradient(ValueError):
    """Names of primitives, one of which at least JAX has no gradient of."""


def check_gradient(steps: Sequence[Step], read: Callable[[], Any]):
    """Raise NoGradient if JAX cannot `read` gradients of these steps. Steps of which it has them all are not read for it."""
    if doubtful := suspects(steps):
        try:
            read()
        except (ValueError, NotImplementedError, TypeError) as error:
            raise NoGradient(doubtful) from error


def fisher(
    problem: Problem, blocks: Sequence[Block], key: jax.Array, chunk: int = CHUNK, normalised: bool = True, on_disk: bool = False
) -> list[dict[int, np.ndarray | OnDisk]]:
    """The diagonal Fisher of every block's outputs, one per example: squared gradients, `normalised` to mean 1.

    Labels are drawn from the float model's own prediction, so that the expectation of the squared gradient is the
    Fisher information (not its empirical stand-in). A zero probe is added to every block output and differentiated:
    one backward pass serves all blocks. Gradients are taken per example, vmapped.

    Source: BRECQ, eq. 10 (https://arxiv.org/abs/2102.05426); for why labels are drawn: Kunstner et al. 2019
    (https://arxiv.org/abs/1905.12558), eq. 3 against eq. 5.

    On a mesh each device takes a chunk of examples by itself.

    Returns: for each block, {position of the output: array of shape (examples, *output)}.

    Raises:
      ValueError: the program has other blocks at batch size 1, or a part that JAX has no gradient of.
    """
    graph = problem.graph(1)
    single = problem.units(1)
    if [b.name for b in single] != [b.name for b in blocks]:
        raise ValueError("The program has other blocks at batch size 1; pass blocks= as name patterns.")
    gradients = _gradients(graph, single, problem.loss, jax.random.key_impl(key), problem.mesh)
    leaves = everywhere(problem.mesh, jax.tree.leaves(problem.params))
    inputs = [np.asarray(a) for a in jax.tree.leaves(problem.inputs)]
    keys = np.asarray(jax.random.key_data(jax.random.split(key, problem.count)))
    found: list[dict[int, np.ndarray | OnDisk]] = [{} for _ in blocks]
    totals: dict[tuple[int, int], float] = {}
    dtype = jnp.bfloat16 if problem.bfloat16_caches else np.float32
    chunk = min(chunk, problem.count)
    at_once = chunk * parts(problem.mesh)

    def read(some: slice):
        return gradients(leaves, [spread(problem.mesh, a[some][:, None], chunk) for a in inputs], spread(problem.mesh, keys[some], chunk))

    def types(array, *shape):
        return jax.ShapeDtypeStruct((at_once, *shape), jax.dtypes.canonicalize_dtype(array.dtype))

    try:
        own = [types(a, 1, *a.shape[1:]) for a in inputs], types(keys, *keys.shape[1:])
        check_gradient(graph.flat.steps, lambda: jax.eval_shape(gradients, leaves, *own))
    except NoGradient as error:
        raise ValueError(
            f"Fisher weights are gradients through the whole net, and JAX has none of its {error}. Write an error that takes none: "
            "solvers.annealed(), or error=solvers.squared_error."
        ) from error
    for start in range(0, problem.count, at_once):
        stop = min(start + at_once, problem.count)
        for (n, position), grad in read(slice(start, stop)).items():
            shape = (problem.count, *grad.shape[2:])
            target = found[n].setdefault(position, None)
            if target is None:
                target = found[n][position] = empty(shape, dtype, on_disk)
            squares = np.square(gathered(problem.mesh, grad, stop - start)[:, 0].astype(np.float32))
            target[start:stop] = squares
            for first in range(0, len(squares), chunk):  # in the order of one device
                totals[n, position] = totals.get((n, position), 0.0) + float(squares[first : first + chunk].sum(dtype=np.float64))
        problem.show(stop, problem.count, "Fisher weights")
    for (n, position), total in totals.items() if normalised else ():
        _normalise(found[n][position], total, chunk)
    return found


def _normalise(weights: np.ndarray | OnDisk, total: float, chunk: int):
    """Divide by the mean, so many examples at a time; all are 1 where it is no number to divide by."""
    mean = total / math.prod(weights.shape)
    usable = mean > 0 and math.isfinite(mean)
    for start in range(0, weights.shape[0], chunk):
        some = slice(start, start + chunk)
        weights[some] = weights[some] / np.float32(mean) if usable else np.ones_like(weights[some])


def _gradients(graph: Graph, blocks: Sequence[Block], loss, impl, mesh: Mesh | None):
    probed = [(n, p) for n, block in enumerate(blocks) for p in learned_outputs(graph, block)]
    types = {(n, p): graph.flat.types[blocks[n].outs[p]] for n, p in probed}
    ids = graph.flat.inputs[graph.num_leaves :]

    def scalar(probes, leaves, inputs, key):
        env = dict(zip(ids, inputs, strict=True))
        for n, block in enumerate(blocks):
            outs = run(
                block.program, [env[i] for i in block.ins], param_values(graph, block, leaves), block.constants, on_op=fast_op
            )
            env.update((i, o + probes[n, p] if (n, p) in probes else o) for p, (i, o) in enumerate(zip(block.outs, outs, strict=True)))
        outputs = jax.tree.unflatten(graph.out_tree, [env.get(i) for i in graph.flat.outputs])
        return (loss or own_prediction)(outputs, key)

    def one(leaves, inputs, key_data):
        probes = {at: jnp.zeros(t.shape, t.dtype) for at, t in types.items()}
        return jax.grad(scalar)(probes, leaves, inputs, jax.random.wrap_key_data(key_data, impl=impl))

    return jax.jit(side_by_side(mesh, jax.vmap(one, in_axes=(None, 0, 0)), (False, True, True)))


def own_prediction(outputs: Any, key: jax.Array) -> jax.Array:
    """−log p(y), y drawn from the model's own prediction: the default loss.

    A single output of two or more axes is read as logits on its last axis; anything else (several outputs, one number
    per example) as the mean of a Gaussian of unit variance, whose gradient is the noise itself.
    """
    floats = [o for o in jax.tree.leaves(outputs) if jnp.issubdtype(o.dtype, jnp.floating)]
    if len(floats) == 1 and floats[0].ndim >= 2 and floats[0].shape[-1] > 1:
        logits = floats[0].astype(jnp.float32)
        labels = jax.lax.stop_gradient(jax.random.categorical(key, logits))
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1))
    keys = jax.random.split(key, max(len(floats), 1))
    return sum((jnp.sum(o * jax.random.normal(k, o.shape, o.dtype)) for k, o in zip(keys, floats, strict=False)), jnp.zeros(()))
