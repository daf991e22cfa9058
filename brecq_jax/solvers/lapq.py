"""Loss-aware ranges: one clip for each tensor, all of them chosen together by what the whole net's loss says."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from brecq_jax._calibrate import Hooks, forward, observe, run_local
from brecq_jax._interpret import Program as BlockProgram
from brecq_jax._interpret import param_values, whole
from brecq_jax._model import Problem, Quantized
from brecq_jax._qarray import QArray, float_rows, from_rows
from brecq_jax._sharding import each_batch, everywhere, gathered, parts, spread
from brecq_jax.formats import Grid, LpRange, ScalarFormat, Uniform, mean_corrected
from brecq_jax.solvers._solver import Info, Solver, split
from brecq_jax.solvers._walk import record

NORMS = np.linspace(2, 4, 10)  # exponents that are tried: LAPQ's released code
RANGE = LpRange(steps=99)  # down to a fiftieth of the widest: one scale for a whole tensor clips far
REACH = 4.0  # octaves that a range may move from its start; beyond them the loss is flat


@dataclasses.dataclass(frozen=True)
class Lapq:
    """Settings of the search for ranges."""

    iterations: int = 2  # of Powell: line searches along as many directions as there are tensors, about twenty losses each
    batch_size: int = 128
    correct_means: bool = False  # each output channel of a rounded weight with a zero point keeps its mean, in the search and after it


def lapq(labels: Int[np.ndarray, " examples"] | None = None, **settings) -> Solver:
    """Ranges that minimise the loss of the whole quantized net, by Powell's method from the best of the L_p ranges.

    1. For p of 2 … 4, each tensor takes the range of least mean |x − x̂|^p.
    2. A parabola through loss(p) gives p; where it opens downwards or its vertex lies outside, the best p tried.
    3. Powell's method moves all ranges, one number for each weight and each activation: a grid per channel or per group
       moves as a whole. The best that was seen is kept, and of 2 and 3 what is better on the examples that judge.

    `labels`: of the calibration examples, in their order, for the cross-entropy. Without them the loss is the divergence from
    the float model's prediction: ours, as are Powell's steps in octaves (the paper's are in ranges, which may turn negative), the
    judging examples, and ranges of activations from the float model's values. Weights whose format is no ScalarFormat stay as they are.

    Source: Nahshan et al. 2019, https://arxiv.org/abs/1911.07190; exponents, variables and order of its released code
    (https://github.com/ynahshan/nn-quantization-pytorch at 12cd3bf), which has no guard on the parabola.

    Raises:
      ValueError: labels of another number than the examples, or that are no class numbers; a loss that is not finite.
    """
    settings = Lapq(**settings)

    def solve(problem: Problem, guess: Quantized, key: jax.Array) -> tuple[Quantized, Info]:
        search = _Search(settings, problem, guess, labels)
        if not search.net.tensors:
            return guess, ()
        current, error, infos = guess, search.judge(guess), []
        for phase, steps, better_one in (("norm", len(NORMS), search.by_norm), ("powell", settings.iterations, search.by_loss)):
            start = time.perf_counter()
            better = better_one()
            after = search.judge(better)
            infos.append(record(search.block, phase, steps, error, after, start))
            if after < error:
                current, error = better, after
        return current, tuple(infos)

    return solve


def vertex(norms: Float[np.ndarray, " n"], losses: Float[np.ndarray, " n"]) -> float:
    """Where the parabola through (norm, loss) is least; the norm of least loss where it has no minimum within the norms."""
    second, first, _ = np.polyfit(norms, losses, 2)
    least = -first / (2 * second) if second > 0 else np.inf
    return float(least if norms[0] <= least <= norms[-1] else norms[np.argmin(losses)])


def powell(loss: Callable[[np.ndarray], float], start: Float[np.ndarray, " n"], iterations: int) -> np.ndarray:
    """The best point that Powell's method asks for. Source: Powell 1964, https://doi.org/10.1093/comjnl/7.2.155, by SciPy."""
    best, least = start, loss(start)

    def seen(point):
        nonlocal best, least
        value = loss(point)
        if value < least:
            best, least = point.copy(), value
        return value

    scipy.optimize.minimize(seen, start, method="Powell", options={"maxiter": iterations})
    return best


def cross_entropy(outputs: Sequence[jax.Array], targets: Sequence[jax.Array]) -> Float[Array, " batch"]:
    """−log p(label), the last output axis read as logits; averaged over positions, if there are any."""
    (logits,), (labels,) = outputs, targets
    return -_per_example(jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[..., None], -1))


def float_divergence(outputs: Sequence[jax.Array], targets: Sequence[jax.Array]) -> Float[Array, " batch"]:
    """KL(float ‖ quantized) of predictions, read as `_calibrate.own_prediction` does: one array of logits, or means of unit Gaussians."""
    if len(outputs) == 1 and outputs[0].ndim >= 2 and outputs[0].shape[-1] > 1:
        now, then = (jax.nn.log_softmax(x[0].astype(jnp.float32)) for x in (outputs, targets))
        return _per_example(jnp.sum(jnp.exp(then) * (then - now), -1))
    pairs = [(o, t) for o, t in zip(outputs, targets, strict=True) if jnp.issubdtype(o.dtype, jnp.floating)]
    return sum(_per_example(jnp.square(o - t)) / 2 for o, t in pairs)


def _per_example(values):
    return jnp.mean(values.reshape(values.shape[0], -1), -1)


class _Net(NamedTuple):
    """What the compiled loss depends on beside shapes."""

    program: BlockProgram
    error: Callable
    formats: tuple  # of activations, by site
    whole_values: bool
    written: tuple  # of weights: (slot, format, channel axes)
    tensors: tuple[tuple[str, int], ...]  # what each number of the search moves: ("weight", slot) or ("reads", site)
    correct_means: bool


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss(net: _Net, mesh: Mesh | None, batch, octaves, grids: Mapping[tuple[str, int], Grid], params, constants) -> Float[Array, " batches"]:
    """Sums of the net's loss over the batch of each device, with every grid so many octaves wider. Compiled once: what is searched is an argument."""
    sums = functools.partial(_summed_loss, net)
    return each_batch(mesh, sums, (True, False, False, False, False))(batch, octaves, grids, params, constants)


def _summed_loss(net: _Net, batch, octaves, grids, params, constants) -> Float[Array, ""]:
    inputs, targets, counted = batch
    grids = _wider(net, octaves, grids)
    params = list(params)
    for slot, format, axes in net.written:
        params[slot] = _nearest(params[slot], format, axes, grids["weight", slot], net.correct_means).decode()
    by_site = {site: grids["reads", site] for site, _ in net.formats if ("reads", site) in grids}  # `PerToken` has none
    outputs = run_local(net.program, net.formats, net.whole_values, inputs, params, constants, by_site)
    return jnp.sum(counted * net.error(outputs, targets))


def _wider(net: _Net, octaves, grids):
    factors = jnp.exp2(jnp.clip(octaves, -REACH, REACH))
    return {t: grids[t]._replace(scale=grids[t].scale * factors[n]) for n, t in enumerate(net.tensors)}


@functools.partial(jax.jit, static_argnums=(1, 2, 4))
def _nearest(weight, format: ScalarFormat, channel_axes: tuple[int, ...], grid: Grid, correct_means: bool) -> QArray:
    rows = float_rows(weight, channel_axes)
    codes = format.encode(rows, grid)
    if correct_means and isinstance(format, Uniform):
        format, grid = mean_corrected(format, codes, grid, rows)
    return QArray(from_rows(codes, weight.shape, channel_axes), grid, format, channel_axes, weight.dtype.name)


@functools.partial(jax.jit, static_argnums=0)
def _lp_grid(format: Uniform, rows, importance, p) -> Grid:
    return RANGE.at(p, format, format.pooled(rows), None if importance is None else format.pooled(importance))


class _Search:
    """The whole net as one block, its batches, and the ranges found so far."""

    def __init__(self, settings: Lapq, problem: Problem, guess: Quantized, labels):
        self.settings, self.problem, self.guess = settings, problem, guess
        self.train, self.held_out = split(problem.count)
        self.size = min(settings.batch_size, len(self.train))
        self.graph = problem.graph(self.size)
        self.block = whole(self.graph)
        self.inputs = dict(zip(self.graph.flat.inputs[self.graph.num_leaves :], jax.tree.leaves(problem.inputs), strict=True))
        self.error, self.targets = cross_entropy, []
        if labels is None:
            self.error, self.targets = float_divergence, self.float_outputs()
        else:
            self.targets = [self.class_numbers(labels)]
        self.read_tensors(problem, guess)
        self.train_batches = self.batches(self.train, problem.mesh)
        self.octaves = np.zeros(len(self.net.tensors))
        self.shared = everywhere(problem.mesh, (self.params, list(self.block.constants)))

    def class_numbers(self, labels) -> Int[np.ndarray, " examples"]:
        """The labels, checked against the examples and the logits."""
        labels, count = np.asarray(labels), self.problem.count
        found = len(labels) if labels.shape else 1
        if found != count or len(self.block.outs) != 1 or len(self.graph.flat.types[self.block.outs[0]].shape) < 2:
            raise ValueError(
                f"lapq: {found} labels for {count} calibration examples and {len(self.block.outs)} output arrays. Give one "
                "label for each example, in their order, of a model with one array of logits; or none, for the divergence from the float model."
            )
        _, *positions, classes = self.graph.flat.types[self.block.outs[0]].shape
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (count, *positions):
            shape = ", ".join(map(str, ("examples", *positions))) if positions else "examples,"
            raise ValueError(f"lapq: labels are {labels.dtype} {labels.shape}; write class numbers, int ({shape}).")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"lapq: labels are {labels.min()} to {labels.max()}, of {classes} classes; write class numbers, 0 to {classes - 1}.")
        return labels

    def read_tensors(self, problem: Problem, guess: Quantized):
        """What is searched, in program order, and what it is searched from: float rows of weights, samples of activations."""
        graph, block, plan = self.graph, self.block, problem.plan
        hooks = Hooks(plan.activations, guess.activations, plan.whole_values)
        formats, self.grids, whole_values = hooks.of(block)
        self.grids = {("reads", site): grid for site, grid in self.grids.items()}
        slots = {graph.origins[i]: slot for slot, i in enumerate(block.params)}
        floats = param_values(graph, block, problem.leaves)
        self.params, self.names, self.rows, written, tensors = guess.values(graph, block), {}, {}, [], []
        for op in block.ops:
            weight = graph.weights[op.weight]
            q, slot = guess.weight(weight), slots[(weight.leaf, weight.index)]
            if slot not in self.names and q is not None and isinstance(q.format, ScalarFormat):
                self.names[slot], self.params[slot], self.grids["weight", slot] = op.weight, floats[slot], q.grid
                self.rows["weight", slot] = q.format, float_rows(floats[slot], q.channel_axes), None
                written.append((slot, q.format, q.channel_axes))
                tensors.append(("weight", slot))
            site = ("reads", block.sites.index(op.site)) if op.site in block.sites else None
            if site in self.grids and site not in tensors:
                tensors.append(site)
        if self.settings.correct_means and not any(isinstance(format, Uniform) for _, format, _ in written):
            raise ValueError("lapq: correct_means moves zero points, which no weight has; write weights=Uniform(4) or Affine(4), or leave it out.")
        tensors.extend(site for site in self.grids if site not in tensors)  # what products of two values read
        if formats:
            fitted = {site: f for site, f in formats if ("reads", site) in self.grids}
            samples = observe(problem, problem.leaves, [block.sites[site] for site in fitted])
            for site, format in fitted.items():
                values, importance = (jnp.asarray(a)[None] for a in samples[block.sites[site]])
                self.rows["reads", site] = format, values, importance
        self.net = _Net(
            block.program, self.error, formats, whole_values, tuple(written), tuple(tensors), self.settings.correct_means
        )  # fmt: skip

    def batches(self, rows: np.ndarray, mesh: Mesh | None = None) -> list:
        """(inputs, targets, 1 for each example that counts), a batch for each device, all of one size: the last one is filled up."""
        found, size = [], self.size * parts(mesh)
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            values = ([self.inputs[i][some] for i in self.block.ins], [t[some] for t in self.targets])
            counted = (np.arange(start, start + size) < len(rows)).astype(np.float32)
            found.append((*jax.tree.map(lambda a: spread(mesh, a, self.size), values), spread(mesh, counted)))
        return found

    def float_outputs(self) -> list[np.ndarray]:
        """The float model's outputs, all examples."""
        params, everything = param_values(self.graph, self.block, self.problem.leaves), np.arange(self.problem.count)
        parts = [[np.asarray(o) for o in forward(self.block, inputs, params)] for inputs, _, _ in self.batches(everything)]
        return [np.concatenate(p)[: self.problem.count] for p in zip(*parts, strict=True)]

    def loss(self, grids, octaves: np.ndarray) -> float:
        """The mean loss of the examples that are learned from."""
        mesh = self.problem.mesh
        searched = everywhere(mesh, (jnp.asarray(octaves, jnp.float32), grids))
        sums = [_loss(self.net, mesh, batch, *searched, *self.shared) for batch in self.train_batches]
        value = float(sum(itertools.chain.from_iterable(gathered(mesh, s) for s in sums), np.float32(0)))
        if not np.isfinite(value):
            raise ValueError("lapq: the loss is not finite on the calibration inputs. Check params, inputs and labels.")
        return value / len(self.train)

    def judge(self, model: Quantized) -> float:
        """A model's mean loss on the examples that judge."""
        params, plan, total = model.values(self.graph, self.block), self.problem.plan, 0.0
        hooks = Hooks(plan.activations, model.activations, plan.whole_values)
        for inputs, targets, counted in self.batches(self.held_out):
            total += float(jnp.sum(counted * self.error(forward(self.block, inputs, params, hooks), targets)))
        return total / len(self.held_out)

    def by_norm(self) -> Quantized:
        """The model with the L_p ranges of least loss; the search goes on from them."""
        found: dict[float, tuple[float, Any]] = {}

        def tried(p: float) -> float:
            new = {t: _lp_grid(format, rows, importance, p) for t, (format, rows, importance) in self.rows.items() if isinstance(format, Uniform)}
            grids = {**self.grids, **new}
            found[p] = self.loss(grids, self.octaves), grids
            self.problem.show(len(found), len(NORMS) + 1, f"L_p ranges, p = {p:.2f}")
            return found[p][0]

        tried(vertex(NORMS, np.array([tried(float(p)) for p in NORMS])))
        _, self.grids = min(found.values(), key=lambda pair: pair[0])
        return self.model()

    def by_loss(self) -> Quantized:
        """The model with the ranges that Powell's method found."""
        count = 0

        def loss(octaves) -> float:
            nonlocal count
            count += 1
            self.problem.show(count, 20 * self.settings.iterations * len(octaves), "Powell")
            return self.loss(self.grids, octaves)

        self.octaves = powell(loss, self.octaves, self.settings.iterations)
        return self.model()

    def model(self) -> Quantized:
        """The guess with the grids as they stand, and the nearest codes."""
        grids = _wider(self.net, jnp.asarray(self.octaves, jnp.float32), self.grids)
        weights = {
            self.names[slot]: _nearest(self.params[slot], format, axes, grids["weight", slot], self.settings.correct_means)
            for slot, format, axes in self.net.written
        }
        sites = {self.block.sites[site]: grid for (kind, site), grid in grids.items() if kind == "reads"}
        return self.guess.with_weights(weights, self.graph).with_activations(sites)
