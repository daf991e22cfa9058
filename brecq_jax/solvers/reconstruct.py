"""Learned rounding, unit by unit: codes, step sizes of weights and of activations that keep the unit's output."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax._calibrate import NoGradient, learned_outputs
from brecq_jax._interpret import param_values
from brecq_jax._jaxpr import suspects
from brecq_jax._model import Problem, Quantized
from brecq_jax._qarray import float_rows
from brecq_jax._sharding import AXIS, spread
from brecq_jax.solvers._loop import Batch, Static, Tail, loop, own_variables
from brecq_jax.solvers._roundings import RectifiedSigmoid, Rounding
from brecq_jax.solvers._solver import Info, Solver
from brecq_jax.solvers._walk import Stage, Unit, Walk, fisher_error
from brecq_jax.solvers.nearest import fit_activations
from brecq_jax.solvers.second_order import SecondOrder, stage


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A unit's error counts what it does to the net's prediction, too: `weight` · KL(float ‖ with this unit), rest float.

    Source: PD-Quant, https://arxiv.org/abs/2212.07048, eq. 5, without its temperature and its distribution correction.
    """

    weight: float = 1.0
    cost: float = 4.0  # the term is left out where the rest of the net has more than `cost` times the unit's multiplications


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Settings of reconstruction. Defaults: BRECQ's released code, unless noted.

    `unit` None takes the problem's blocks. Weights are learned with float activations; then, where activations are
    planned, their step sizes are learned with the weights fixed. `together`: both in one loop, activations quantized.
    Inputs are those of the already-quantized prefix, targets the float model's.
    """

    unit: Literal["layer"] | None = None
    error: Callable = fisher_error  # the paper's; the released code's default is squared_error
    # Rounds each unit first. What is learned begins at its codes (StraightThrough), or on their side of the float weight, where they are
    # one of its two neighbours (RectifiedSigmoid, which reaches no others).
    start: SecondOrder | None = None
    rounding: Rounding = RectifiedSigmoid()
    num_steps: int = 20_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    together: bool = False
    act_steps: int = 5_000  # of the second phase, where weights and activations are not learned together
    # Ours: Adam steps the logarithm of the step size, which keeps it positive; BRECQ steps the size itself by 4e-4.
    act_learning_rate: float = 1e-3
    refit: bool = True  # fit activation grids anew before they are learned; False begins at the guess's, as `lapq` leaves them
    drop_prob: float = 0.0  # the probability that an element's quantization is dropped, of inputs and inside: QDrop
    prediction: Prediction | None = None
    checks: int = 1  # how often the held-out error is looked at; the best is kept
    bfloat16: bool = False  # ops multiply in bfloat16, forward and backward; variables and errors stay as they are
    patience: int = 1  # checks in a row without a new best before a unit is left


def reconstruct(settings: Reconstruction = Reconstruction()) -> Solver:
    """Learned rounding of weights and learned step sizes of activations, unit by unit in program order."""

    def solve(problem: Problem, guess: Quantized, key: jax.Array) -> tuple[Quantized, Info]:
        keys = jax.random.split(key)
        _note_idle(settings, problem)
        if any(problem.plan.activations.values()) and settings.together:
            # what is learned stays near the float outputs; with weights merely rounded, ranges may be anything
            guess = fit_activations(problem, guess, problem.leaves) if settings.refit else guess
            return _walk(settings, problem, guess, keys[0], True, True)
        guess, info = _walk(settings, problem, guess, keys[0], True, False)
        if not guess.activations:
            return guess, info
        guess = fit_activations(problem, guess) if settings.refit else guess
        guess, more = _walk(settings, problem, guess, keys[1], False, True)
        return guess, info + more

    return solve


def _note_idle(settings: Reconstruction, problem: Problem):
    """Notes of the report on settings that this problem, or this backend, leaves nothing to do."""
    if settings.drop_prob and not any(problem.plan.activations.values()):
        problem.note("drop_prob: no activation is quantized, so that nothing is dropped")
    elif settings.drop_prob and not settings.together:
        problem.note("drop_prob: weights are learned with float activations, and nothing is dropped; write together=True to learn both with it")
    if settings.bfloat16 and jax.default_backend() == "cpu":
        problem.note("bfloat16: in loops the CPU's fast forms of convolutions (depthwise, 1×1) are not used, so that steps may take longer")


def _note_predictions(settings: Reconstruction, walk: Walk):
    """A note of the report for each reason why `prediction` does not count in a block that is learned."""
    if settings.prediction is None:
        return
    names: dict[str, list[str]] = {}
    for number, block in enumerate(walk.blocks):
        if learned_outputs(walk.graph, block) and (why := _no_tail(settings.prediction, walk, number)):
            names.setdefault(why, []).append(block.name)
    for why, blocks in names.items():
        walk.problem.note(f"prediction: does not count in {', '.join(blocks)}: {why}")


def _walk(settings: Reconstruction, problem: Problem, guess: Quantized, key, weights: bool, activations: bool) -> tuple[Quantized, Info]:
    """One walk that learns weights, activations or both."""
    if weights and not activations and not any(problem.plan.weights.values()):
        return guess, ()
    key_fisher, key_steps = jax.random.split(key)
    steps = settings.num_steps if weights else settings.act_steps
    if not steps and not (weights and settings.start):
        return guess, ()
    dropping = bool(settings.drop_prob) and activations
    walk = Walk(problem, settings.batch_size, settings.unit, settings.error, activations, key_fisher, dropping)
    if problem.mesh and walk.batch_size % problem.mesh.shape[AXIS]:
        raise ValueError(f"mesh: {problem.mesh.shape[AXIS]} devices cannot share batches of {walk.batch_size} evenly. Write another batch_size.")
    _note_predictions(settings, walk)
    stages = [stage(settings.start, walk, guess)] if weights and settings.start else []
    if steps:
        phase = "together" if weights and activations else "rounding" if weights else "steps"
        stages.append(Stage(phase, steps, functools.partial(_learn_unit, settings, walk, steps, key_steps, weights)))
    return walk.improve(guess, stages)


def _learn_unit(settings: Reconstruction, walk: Walk, steps: int, key, weights: bool, unit: Unit, current: Quantized) -> Quantized:
    rounding, block = settings.rounding, walk.drawn_blocks[unit.number]
    floats = param_values(walk.drawn_graph, block, walk.leaves)
    slots = {op.weight: local.weight for op, local in zip(block.ops, block.program.ops, strict=True)} if weights else {}
    slots = {name: slot for name, slot in slots.items() if name in unit.weights}
    guesses = {slot: current.weight(walk.graph.weights[name]) for name, slot in slots.items()}
    rows = {slot: float_rows(floats[slot], q.channel_axes) for slot, q in guesses.items()}
    variables, fixed = {}, {}
    for slot, q in guesses.items():
        own, fixed[slot] = rounding.start(q, rows[slot], settings.start is not None)
        for kind, value in own.items():
            variables.setdefault(kind, {})[slot] = value
    hooks = walk.hooks(current)
    formats, grids, whole_values = hooks.of(block) if hooks else ((), {}, False)
    logs = {s: jnp.log(g.scale) for s, g in grids.items() if block.sites[s] in unit.sites}
    if logs:
        variables["steps"] = logs
    if not variables:
        return current

    def model(variables) -> Quantized:
        found = {name: rounding.finish(guesses[s], own_variables(variables, s), fixed[s], rows[s]) for name, s in slots.items()}
        scaled = {block.sites[s]: grids[s]._replace(scale=jnp.exp(v)) for s, v in variables.get("steps", {}).items()}
        return current.with_weights(found, walk.graph).with_activations(scaled)

    tail = _tail(settings, walk, unit)
    arguments = {
        "params": current.values(walk.drawn_graph, block), "constants": list(block.constants),
        "rounding": fixed, "grids": grids,
        "tail": [param_values(walk.drawn_graph, b, walk.leaves) for b in tail.blocks] if tail else [],
    }  # fmt: skip
    written = tuple((slot, q.format, q.shape, q.channel_axes) for slot, q in guesses.items())
    positions = learned_outputs(walk.drawn_graph, block)
    static = Static(
        block.program, settings, steps, walk.batch_size, positions, formats, whole_values, written, tuple(variables), tail,
        len(walk.train), tuple(walk.drawn_graph.flat.types[i].dtype for i in block.ins), walk.problem.mesh,
    )  # fmt: skip
    data = _data(settings, walk, unit, tail)
    show = functools.partial(walk.problem.show, total=steps, text=block.name)
    best, least, waited = current, math.inf, 0
    try:
        for found in loop(static, variables, arguments, data, jax.random.fold_in(key, unit.number), show):
            if not all(jnp.isfinite(v).all() for v in jax.tree.leaves(found)):
                walk.problem.note(
                    f"{block.name}: learning ended where gradients are not finite, and the best before it stays. Where a mask is −inf, write a "
                    "finite one; elsewhere a smaller learning_rate"
                )
                break
            candidate = model(found)
            error = walk.judge(unit, candidate)
            best, least, waited = (candidate, error, 0) if error < least else (best, least, waited + 1)
            if waited >= settings.patience:
                break
    except NoGradient as error:
        walk.problem.note(f"{block.name} is not learned: JAX has no gradient of its {error}. solvers.second_order() needs none")
    return best


def _data(settings: Reconstruction, walk: Walk, unit: Unit, tail: Tail | None) -> Batch | Callable[[np.ndarray], Batch]:
    """What a loop draws batches from, of the examples that are learned from: on the devices, or a function of their positions."""
    positions, block = learned_outputs(walk.graph, unit.block), unit.block
    dropping = settings.drop_prob and walk.activations

    def batch(drawn: np.ndarray) -> Batch:
        rows = walk.train[drawn]
        targets, importance = walk.targets(unit, rows), list(walk.importances(unit, rows).values()) if walk.importance else []
        return Batch(
            walk.rough.inputs(block, rows), walk.exact.inputs(block, rows) if dropping else [],
            [targets[p] for p in positions], importance, [walk.predictions[rows]] if tail else [],
        )  # fmt: skip

    if not walk.caches.on_device[unit.number]:
        return batch
    importance = [walk.importance[unit.number][p] for p in positions] if walk.importance else []
    held = Batch(
        walk.rough.inputs_of(block), walk.exact.inputs_of(block) if dropping else [],
        [unit.targets[p] for p in positions], importance, [walk.predictions] if tail else [],
    )  # fmt: skip
    return jax.tree.map(lambda a: spread(walk.problem.mesh, a[walk.train]), held)


def _tail(settings: Reconstruction, walk: Walk, unit: Unit) -> Tail | None:
    """The rest of the net, where its prediction counts and can be afforded."""
    if settings.prediction is None or _no_tail(settings.prediction, walk, unit.number):
        return None
    return Tail(walk.drawn_blocks[unit.number].outs, walk.drawn_blocks[unit.number + 1 :], walk.drawn_graph.flat.outputs[0])


def _no_tail(prediction: Prediction, walk: Walk, number: int) -> str:
    """Why the net's prediction does not count in a block; "" where it does."""
    later = walk.drawn_blocks[number + 1 :]
    if not later:
        return "nothing is behind it"
    if walk.predictions is None:
        return "the model's output is not one array of logits with examples on axis 0"
    if doubtful := suspects([step for b in later for step, _, _ in b.program.steps]):
        return f"JAX may have no gradient of what is behind it: {doubtful}"
    made = set(walk.drawn_blocks[number].outs).union(*(b.outs for b in later))
    if not all(made.issuperset(b.ins) for b in later):
        return "what is behind it reads values from before it"
    rest, own = (sum(op.macs for b in blocks for op in b.ops) for blocks in (later, walk.drawn_blocks[number : number + 1]))
    return f"the rest of the net has more than cost={prediction.cost:g} times its multiplications" if rest > prediction.cost * own else ""
