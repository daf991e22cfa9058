"""What each weight and each activation costs at each bit-width, and what weights of one block cost together."""

import dataclasses
import json
import pathlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from brecq_jax import data
from brecq_jax._calibrate import fisher, learned_outputs
from brecq_jax._graph import Graph
from brecq_jax._interpret import param_values
from brecq_jax._journal import write_whole
from brecq_jax._model import Problem, Program, Quantized
from brecq_jax._plan import Plan, make_plan
from brecq_jax._progress import bar
from brecq_jax._sharding import data_mesh
from brecq_jax._stream import Stream
from brecq_jax.formats import Format, Uniform
from brecq_jax.formats._record import from_record, to_record
from brecq_jax.mixed_precision._configurations import Candidates, block_losses
from brecq_jax.mixed_precision.costs import product_bits
from brecq_jax.solvers import Solver, nearest, relative_error
from brecq_jax.solvers._walk import WEIGHTED
from brecq_jax.solvers.nearest import fit_activations

BATCH = 32  # examples that pass a block at once
READS = "reads "  # a decision about an activation is named so, after the first op that reads it


@dataclasses.dataclass(frozen=True)
class Sensitivities:
    """Predicted loss of a plan = Σ losses[d][choice of d] + Σ interactions[s] over the sets s that are all at the first choice.

    `weights`, `activations`: the choices, fewest bits first. `losses`: decision -> loss of each choice, all else float; a
    decision is a parameter by name (all its slices, if a scan stacks them), or `reads NAME`. `interactions`: what a set of
    weights of one block loses together beyond its parts and the sets within it. `preset`: what it fixes was not measured.
    `measured_with`: for people and for who reads a file; `measure` notes error, solver and examples. No search looks at it.

    Source: BRECQ's mixed precision (https://arxiv.org/abs/2102.05426): all choices of a layer alone, 2-bit choices of a block's layers
    together. There is no code of theirs. Here a set has its increment over the sets within it, so that one that was not tried still
    counts its pairs.
    """

    weights: tuple[Format, ...]
    activations: tuple[Uniform, ...]
    losses: Mapping[str, tuple[float, ...]]
    interactions: Mapping[tuple[str, ...], float]
    preset: str | None
    measured_with: Mapping[str, str | int] = dataclasses.field(default_factory=dict)

    def save(self, path: str | pathlib.Path):
        """Write JSON, all of the file or nothing of it."""
        record = dataclasses.asdict(self) | {
            "weights": list(map(to_record, self.weights)), "activations": list(map(to_record, self.activations)),
            "interactions": [[list(names), value] for names, value in self.interactions.items()],
        }  # fmt: skip
        path = pathlib.Path(path)
        mine = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # another process may be writing the same
        write_whole(mine, json.dumps(record, indent=1).encode())
        mine.rename(path)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Sensitivities":
        """The inverse of save. Older files lack `measured_with`, which is empty then.

        Raises:
          ValueError: a file of something else, or a format that is unknown.
        """
        try:
            record = json.loads(pathlib.Path(path).read_text())
        except ValueError as error:  # no JSON, or no text
            raise ValueError(f"Sensitivities.load: {path} is no JSON ({error}). Give a file that Sensitivities.save wrote.") from None
        wanted = {field.name for field in dataclasses.fields(cls)} - {"measured_with"}
        if not isinstance(record, dict) or not wanted <= set(record):
            raise ValueError(f"Sensitivities.load: {path} holds no sensitivities. Give a file that Sensitivities.save wrote.")
        weights, activations = (tuple(map(from_record, record[kind])) for kind in ("weights", "activations"))
        losses = {name: tuple(values) for name, values in record["losses"].items()}
        interactions = {tuple(names): value for names, value in record["interactions"]}
        return cls(weights, activations, losses, interactions, record["preset"], record.get("measured_with", {}))


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
    solver: Solver | Sequence[Solver | None] | None = None,
    error: Callable = relative_error,
    blocks: str | Sequence[str] = "block",
    inputs: Any = None,
    loss: Callable | None = None,
    mesh: Mesh | None = None,
    key: jax.Array | None = None,
    progress: bool = True,
) -> Sensitivities:
    """Measure every choice for every weight and activation, and sets of weights of a block at their first choice.

        sensitivities = mixed_precision.measure(variables, model.apply, images, preset="brecq")

    One pass over the calibration set with float block inputs; all configurations of a block are one compiled program, which
    blocks of one shape share; on a mesh each device runs it on batches of its own.

    Args:
      weights, activations: the choices, fewest bits first, where all points of a `Multipoint` count; no activations: they are not searched.
      preset: what it fixes, as the first and last layer, is not measured, and stays as it says. See `make_plan`.
      solver: rounds the weights, once for each choice with all weights at it but those that the preset fixes, which have its bits; None: to
        nearest. One that learns fits each weight to the others at that choice, which no mixed plan has; a loss is then that of each weight by
        itself. A sequence is a solver, or None, for each choice: `[None, solvers.multipoint()]` for `[Uniform(4), Multipoint(3)]`.
      error: `error(output, target, importance)` of each example, as reconstruction's. `divergence`, `solvers.fisher_error` and
        `position_error` get Fisher weights, others None.
      params, apply_fn, calib_ds, blocks, inputs, loss, mesh, key, progress: as of `quantize`.

    Raises:
      TypeError: choices that are no formats.
      ValueError: choices that are none, or not in order of their bits; solvers for other choices than there are; else as `quantize`.
    """
    _check_choices(weights, activations)
    made_by = [solver] * len(weights) if solver is None or callable(solver) else list(solver)
    if len(made_by) != len(weights):
        raise ValueError(f"solver: there are {len(made_by)} for {len(weights)} choices of weights. Write one for each, or a single one for all.")
    made_by = [own or nearest() for own in made_by]
    key_solver, key_fisher = jax.random.split(jax.random.key(0) if key is None else key)
    params = jax.tree.map(jnp.asarray, params)
    examples = data.materialize(calib_ds, inputs)
    with bar(progress) as show:
        problem = Problem(apply_fn, params, None, examples.arrays, examples.count, blocks, loss, show=show, mesh=data_mesh(mesh))
        graph = problem.graph(min(BATCH, examples.count))
        weights = tuple(next(iter(make_plan(graph, format, None).weights.values())) for format in weights)  # as plans have them
        activations = tuple(next(iter(make_plan(graph, None, format).activations.values())) for format in activations)
        plan = make_plan(graph, weights[0], activations[0] if activations else None, preset)
        problem = dataclasses.replace(problem, plan=plan)
        candidates = _round_choices(problem, graph, weights, activations, made_by, key_solver)
        losses, interactions = _walk(problem, graph, candidates, _open(graph, plan, weights, activations), error, key_fisher)
    found = {name: tuple(map(float, own)) for name, own in losses.items()}
    noted = {"error": getattr(error, "__name__", type(error).__name__), "solver": ", ".join(dict.fromkeys(map(_maker, made_by))), "examples": problem.count}
    return Sensitivities(weights, activations, found, interactions, preset, noted)


def decision(graph: Graph, weight: str) -> str:
    """The name under which a weight's format is decided: its parameter's."""
    return graph.leaves[graph.weights[weight].leaf][0]


def _check_choices(weights: Sequence[Format], activations: Sequence[Uniform]):
    """Raise TypeError or ValueError unless these are choices, in order."""
    for kind, choices in (("weights", weights), ("activations", activations)):
        if not isinstance(choices, Sequence):
            raise TypeError(f"{kind}: {choices!r} is a {type(choices).__name__}. Write a sequence of choices, as (Uniform(2), Uniform(4)).")
        for choice in choices:
            if kind == "activations" and not isinstance(choice, Uniform):
                raise ValueError(f"activations: {choice} has no grid that could be measured. Write Uniform(8).")
            if not isinstance(choice, Format):
                raise TypeError(f"{kind}: {choice!r} is no format of weights. Write (Uniform(2), Uniform(4)); float is for rules of `search`.")
        bits = [product_bits(choice) for choice in choices]
        if sorted(bits) != bits or (kind == "weights" and not bits):
            raise ValueError(f"{kind}: the choices have {bits} bits in all points. Write them fewest bits first, as (Uniform(2), Uniform(4)).")


def _maker(solver: Solver) -> str:
    """The function that made a solver: `reconstruct`, of `solvers.annealed()` and its like."""
    return getattr(solver, "__qualname__", type(solver).__qualname__).split(".")[0]


def _open(graph: Graph, plan: Plan, weights, activations) -> set[str]:
    """Decisions that the plan's preset leaves open."""
    plain = make_plan(graph, weights[0], activations[0] if activations else None)
    fixed = {decision(graph, n) for n in graph.weights if plan.weights[n] != plain.weights[n]}
    reads = {READS + n for n, f in plan.activations.items() if f is not None and f == plain.activations[n]}
    return {decision(graph, n) for n in graph.weights} - fixed | reads


def _round_choices(problem: Problem, graph: Graph, weights, activations, made_by: Sequence[Solver], key: jax.Array) -> Candidates:
    """What each choice makes of all weights, but for those that the preset fixes, and of all activations while weights are float."""
    floats = Quantized(problem.params, {}, Program(problem.apply_fn, (), problem.plan.whole_values))
    models, grids = [], []
    for format, solver in zip(weights, made_by, strict=True):
        own = dataclasses.replace(problem, plan=make_plan(graph, format, None, problem.plan.preset))
        guess, _ = nearest()(own, floats, key)
        models.append(solver(own, guess, key)[0])
    for format in activations:
        own = dataclasses.replace(problem, plan=make_plan(graph, None, format))
        grids.append(fit_activations(own, floats, problem.leaves).activations)
    return Candidates(tuple(models), tuple(grids), tuple(f.bits for f in activations), problem.plan.whole_values)


def _walk(problem: Problem, graph: Graph, candidates: Candidates, open: set[str], error: Callable, key: jax.Array):
    """Losses and interactions of all open decisions, block by block."""
    size = min(BATCH, problem.count)
    blocks = problem.units(size)
    stream = Stream(graph, blocks, problem.inputs, size, mesh=problem.mesh)
    importance = None
    if error is divergence or error in WEIGHTED:
        importance = fisher(problem, blocks, key, normalised=error is not divergence)
    losses: dict[str, np.ndarray] = {}
    interactions: dict[tuple[str, ...], float] = {}
    for number, block in enumerate(blocks):
        floats = param_values(graph, block, problem.leaves)
        targets = stream.outputs(block, floats)
        weighted = {p: (targets[p], importance and importance[number][p]) for p in learned_outputs(graph, block)}
        slots: dict[str, tuple[int, ...]] = {}
        for op, local in zip(block.ops, block.program.ops, strict=True):
            name = decision(graph, op.weight)
            if name in open:
                slots[name] = tuple(dict.fromkeys((*slots.get(name, ()), local.weight)))
        sites = {READS + name: s for s, name in enumerate(block.sites) if READS + name in open}
        if weighted and (slots or sites):
            stacks = {slot: [floats[slot]] for own in slots.values() for slot in own}
            for model in candidates.models:
                values = model.values(graph, block)
                for slot, stack in stacks.items():
                    stack.append(values[slot])
            # A weight or a value that several blocks read is felt in each of them.
            for name, own in block_losses(stream, block, candidates, error, weighted, floats, slots, stacks, sites).items():
                if len(name) == 1:
                    losses[name[0]] = losses.get(name[0], 0.0) + own
                else:
                    interactions[name] = interactions.get(name, 0.0) + float(own)
        stream.advance(block, floats, outputs=targets)
        problem.show(number + 1, len(blocks), "sensitivities")
    return losses, interactions
