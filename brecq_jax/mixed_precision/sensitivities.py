"""What each weight and each activation costs at each bit-width, and what weights of one block cost together."""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from brecq_jax import data
from brecq_jax._calibrate import Memory, Stream, fisher, learned_outputs
from brecq_jax._fast_ops import fast_op
from brecq_jax._graph import Graph
from brecq_jax._interpret import Block, param_values, run
from brecq_jax._interpret import Program as BlockProgram
from brecq_jax._model import Problem, Program, Quantized, site_hooks
from brecq_jax._plan import make_plan
from brecq_jax._progress import bar
from brecq_jax.formats import Format, Grid, Uniform, fake_quantize
from brecq_jax.formats._record import from_record, to_record
from brecq_jax.solvers import Solver, fisher_error, nearest, relative_error
from brecq_jax.solvers.nearest import fit_activations

BATCH = 32  # examples that pass a block at once
ALL_SETS = 4  # weights in a block of which every set is tried (the paper's largest block), pairs alone beyond
READS = "reads "  # a decision about an activation is named so, after the first op that reads it


@dataclasses.dataclass(frozen=True)
class Sensitivities:
    """Predicted loss of a plan = Σ losses[d][choice of d] + Σ interactions[s] over the sets s that are all at the first choice.

    `weights`, `activations`: the choices, fewest bits first. `losses`: decision -> loss of each choice, all else float; a
    decision is a parameter by name (all its slices, if a scan stacks them), or `reads NAME`. `interactions`: what a set of
    weights of one block loses together beyond its parts and the sets within it. `preset`: what it fixes was not measured.

    Source: BRECQ, section 3.4 (https://arxiv.org/abs/2102.05426): all choices of a layer alone, 2-bit choices of a block's layers
    together. There one number a set, here its increments, so that a set that was not tried still counts its pairs.
    """

    weights: tuple[Format, ...]
    activations: tuple[Uniform, ...]
    losses: Mapping[str, tuple[float, ...]]
    interactions: Mapping[tuple[str, ...], float]
    preset: str | None

    def save(self, path: str | pathlib.Path):
        """Write JSON."""
        record = dataclasses.asdict(self) | {
            "weights": list(map(to_record, self.weights)), "activations": list(map(to_record, self.activations)),
            "interactions": [[list(names), value] for names, value in self.interactions.items()],
        }  # fmt: skip
        pathlib.Path(path).write_text(json.dumps(record, indent=1))

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Sensitivities":
        """The inverse of save."""
        record = json.loads(pathlib.Path(path).read_text())
        weights, activations = (tuple(map(from_record, record[kind])) for kind in ("weights", "activations"))
        losses = {name: tuple(values) for name, values in record["losses"].items()}
        return cls(weights, activations, losses, {tuple(names): value for names, value in record["interactions"]}, record["preset"])


def divergence(output: Float[Array, "batch *feature"], target: Float[Array, "batch *feature"], importance) -> Float[Array, " batch"]:
    """½ Σ F · (output − target)²: what the change does to the prediction, KL to second order, if F is the Fisher diagonal.

    Source: BRECQ, eq. 10, https://arxiv.org/abs/2102.05426. Unlike `fisher_error` neither F nor the number of outputs is divided out:
    blocks can be compared.
    """
    return jnp.sum((importance * jnp.square(output - target)).reshape(output.shape[0], -1), -1) / 2


def measure(
    params: Any,
    apply_fn: Callable[[Any, Any], Any],
    calib_ds: Any,
    *,
    weights: Sequence[Format] = (Uniform(2), Uniform(4), Uniform(8)),
    activations: Sequence[Uniform] = (),
    preset: str | None = None,
    solver: Solver | None = None,
    error: Callable = relative_error,
    blocks: str | Sequence[str] = "block",
    inputs: Any = None,
    loss: Callable | None = None,
    key: jax.Array | None = None,
    progress: bool = True,
) -> Sensitivities:
    """Measure every choice for every weight and activation, and sets of weights of a block at their first choice.

        sensitivities = mixed_precision.measure(variables, model.apply, images, preset="brecq")

    One pass over the calibration set with float block inputs; all configurations of a block are one compiled program, which
    blocks of one shape share.

    Args:
      weights, activations: the choices, fewest bits first; no activations: they are not searched.
      preset: what it fixes, as the first and last layer, is not measured, and stays as it says. See `make_plan`.
      solver: rounds the weights, once for each choice with all weights at it; None: to nearest.
      error: `error(output, target, importance)` of each example, as reconstruction's. `divergence` and `solvers.fisher_error` get
        Fisher weights, others None.
      params, apply_fn, calib_ds, blocks, inputs, loss, key, progress: as of `quantize`.

    Raises:
      ValueError: choices that are none, or not in order of their bits; else as `quantize`.
    """
    for kind, choices in (("weights", weights), ("activations", activations)):
        bits = [choice.bits for choice in choices]
        if sorted(bits) != bits or (kind == "weights" and not bits):
            raise ValueError(f"{kind}: the choices have {bits} bits. Write them fewest bits first, as (Uniform(2), Uniform(4)).")
    key_solver, key_fisher = jax.random.split(jax.random.key(0) if key is None else key)
    params = jax.tree.map(jnp.asarray, params)
    examples = data.materialize(calib_ds, inputs)
    with bar(progress) as show:
        problem = Problem(apply_fn, params, None, examples.arrays, examples.count, blocks, loss, show=show)
        graph = problem.graph(min(BATCH, examples.count))
        weights = tuple(next(iter(make_plan(graph, format, None).weights.values())) for format in weights)  # as plans have them
        activations = tuple(next(iter(make_plan(graph, None, format).activations.values())) for format in activations)
        plan = make_plan(graph, weights[0], activations[0] if activations else None, preset)
        problem = dataclasses.replace(problem, plan=plan)
        candidates = round_choices(problem, graph, weights, activations, solver or nearest(), key_solver)
        return _pass(problem, graph, candidates, weights, activations, error, key_fisher)


class Candidates(NamedTuple):
    """For each choice a model with all its weights rounded, and grids for all activations."""

    models: tuple[Quantized, ...]
    grids: tuple[Mapping[str, Grid], ...]


def round_choices(problem: Problem, graph: Graph, weights, activations, solver: Solver, key: jax.Array) -> Candidates:
    """What each choice makes of all weights and activations, presets aside."""
    floats = Quantized(problem.params, {}, Program(problem.apply_fn, (), problem.plan.whole_values))
    models, grids = [], []
    for format in weights:
        own = dataclasses.replace(problem, plan=make_plan(graph, format, None))
        guess, _ = nearest()(own, floats, key)
        models.append(solver(own, guess, key)[0])
    for format in activations:
        own = dataclasses.replace(problem, plan=make_plan(graph, None, format))
        grids.append(fit_activations(own, floats, problem.leaves).activations)
    return Candidates(tuple(models), tuple(grids))


class Static(NamedTuple):
    """What the compiled pass of a block depends on. `weights`: for each decision the params it replaces; `sites`: likewise."""

    program: BlockProgram
    error: Callable
    positions: tuple[int, ...]
    whole_values: bool
    weights: tuple[tuple[int, ...], ...]
    sites: tuple[int, ...]
    bits: tuple[int, ...]


def _pass(problem: Problem, graph: Graph, candidates: Candidates, weights, activations, error, key) -> Sensitivities:
    stream_blocks = problem.units(min(BATCH, problem.count))
    memory = Memory(None)
    stream = Stream(graph, stream_blocks, problem.inputs, min(BATCH, problem.count), memory)
    importance = None
    if error in (divergence, fisher_error):
        importance = fisher(problem, stream_blocks, memory, key, normalised=error is fisher_error)
    free = measured(graph, problem, weights, activations)
    losses: dict[str, np.ndarray] = {}
    interactions: dict[tuple[str, ...], float] = {}
    for number, block in enumerate(stream_blocks):
        floats = param_values(graph, block, problem.leaves)
        targets = stream.outputs(block, floats)
        slots: dict[str, list[int]] = {}
        for op, local in zip(block.ops, block.program.ops, strict=True):
            name = decision(graph, op.weight)
            if name in free and local.weight not in slots.setdefault(name, []):
                slots[name].append(local.weight)
        sites = [s for s, name in enumerate(block.sites) if READS + name in free]
        positions = learned_outputs(graph, block)
        if (slots or sites) and positions:
            static = Static(
                block.program, error, positions, problem.plan.whole_values, tuple(map(tuple, slots.values())),
                tuple(sites), tuple(f.bits for f in activations),
            )  # fmt: skip
            rows, sets = configurations(len(slots), len(sites), len(weights), len(activations))
            values = [model.values(graph, block) for model in candidates.models]
            stacks = {slot: jnp.stack([floats[slot], *(v[slot] for v in values)]) for own in slots.values() for slot in own}
            grids = [[g[block.sites[s]] for g in candidates.grids] for s in sites]
            grids = [jax.tree.map(lambda *a: jnp.stack([jnp.ravel(x)[0] for x in a]), *own) for own in grids]
            weighted = importance and [importance[number][p] for p in positions]
            found = _average(static, stream, block, floats, targets, weighted, stacks, grids, rows)
            names = [*slots, *(READS + block.sites[s] for s in sites)]
            _record(losses, interactions, names, found, sets, len(slots), len(weights), len(activations))
        stream.advance(block, targets)
        problem.show(number + 1, len(stream_blocks), "sensitivities")
    return Sensitivities(
        weights, activations, {n: tuple(map(float, v)) for n, v in losses.items()}, interactions, problem.plan.preset
    )


def decision(graph: Graph, weight: str) -> str:
    """The name under which a weight's format is decided: its parameter's."""
    return graph.leaves[graph.weights[weight].leaf][0]


def measured(graph: Graph, problem: Problem, weights, activations) -> set[str]:
    """Decisions that the problem's preset leaves open."""
    plain = make_plan(graph, weights[0], activations[0] if activations else None)
    kept, own = problem.plan, {decision(graph, n) for n in graph.weights}
    fixed = {decision(graph, n) for n in graph.weights if kept.weights[n] != plain.weights[n]}
    return (own - fixed) | {READS + n for n, f in kept.activations.items() if f is not None and f == plain.activations[n]}


def configurations(num_weights: int, num_sites: int, weight_choices: int, site_choices: int) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """Rows of choices (0 is float, 1 the first choice): every choice of each decision alone, then sets of weights at the first."""
    singles = [(d, c) for d in range(num_weights) for c in range(weight_choices)]
    singles += [(num_weights + d, c) for d in range(num_sites) for c in range(site_choices)]
    largest = num_weights if num_weights <= ALL_SETS else 2
    sets = [s for size in range(2, largest + 1) for s in itertools.combinations(range(num_weights), size)]
    rows = np.zeros((len(singles) + len(sets), num_weights + num_sites), np.int32)
    for row, (d, c) in enumerate(singles):
        rows[row, d] = c + 1
    for row, members in enumerate(sets, len(singles)):
        rows[row, list(members)] = 1
    return rows, sets


def _record(losses, interactions, names, found, sets, num_weights, weight_choices, site_choices):
    singles = found[: len(found) - len(sets)]
    at = 0
    own: dict[tuple[int, ...], float] = {}
    for d, name in enumerate(names):
        size = weight_choices if d < num_weights else site_choices
        losses[name] = losses.get(name, 0) + singles[at : at + size]
        own[d,] = float(singles[at])
        at += size
    for members, value in zip(sets, found[len(singles) :], strict=True):
        within = (s for size in range(1, len(members)) for s in itertools.combinations(members, size))
        own[members] = float(value) - sum(own.get(s, 0.0) for s in within)
        key = tuple(names[d] for d in members)
        interactions[key] = interactions.get(key, 0.0) + own[members]


def _average(static: Static, stream: Stream, block: Block, floats, targets, importance, stacks, grids, rows) -> np.ndarray:
    """Mean error of each configuration over all examples."""
    total = np.zeros(len(rows))
    inputs, constants = stream.inputs_of(block), list(block.constants)
    for start in range(0, stream.count, stream.batch_size):
        some = np.arange(start, start + stream.batch_size)
        real, some = some < stream.count, np.minimum(some, stream.count - 1)
        batch = [a[some] for a in inputs], [targets[p][some] for p in static.positions], importance and [a[some] for a in importance]
        total += np.asarray(_errors(static, *batch, real, list(floats), constants, stacks, grids, rows), np.float64)
    return total / stream.count


@functools.partial(jax.jit, static_argnums=0)
def _errors(static: Static, inputs, targets, importance, real, floats, constants, stacks, grids, rows):
    """Errors of all configurations, summed over the real examples of a batch."""
    program, num_weights = static.program, len(static.weights)

    def one(row):
        values = list(floats)
        for d, slots in enumerate(static.weights):
            for slot in slots:
                values[slot] = stacks[slot][row[d]]

        def quantize(site, x):
            if site not in static.sites:
                return x
            d = static.sites.index(site)
            choice = row[num_weights + d]
            at = jnp.maximum(choice - 1, 0)
            rounded = fake_quantize(x, grids[d].scale[at], grids[d].zero_point[at], jnp.asarray(static.bits)[at])
            return jnp.where(choice > 0, rounded, x)

        outputs = run(program, inputs, values, constants, on_op=fast_op, **site_hooks(program, quantize, static.whole_values))
        errors = (
            static.error(outputs[p], target, importance[n] if importance else None)
            for n, (p, target) in enumerate(zip(static.positions, targets, strict=True))
        )
        return jnp.sum(jnp.where(real, sum(errors), 0))

    # Side by side on an accelerator. A CPU has no fast convolution of many kernels at once: one after the other, in one program.
    return jax.lax.map(one, rows, batch_size=1 if jax.default_backend() == "cpu" else len(rows))
