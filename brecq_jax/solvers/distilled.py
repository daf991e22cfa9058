"""Training a quantized student on what the float model makes: inner values first, then its prediction. BinaryBERT is one setting.

Quantization-aware, over the whole net, all parameters moving: for 1 and 2 bits, where codes near the float weights are no good.
The calibration set is the training set, unlabelled: thousands of inputs, not hundreds.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from brecq_jax._journal import digest
from brecq_jax._model import Problem, Program, Quantized
from brecq_jax.formats import Binary, Ternary
from brecq_jax.solvers._loop import batches
from brecq_jax.solvers._solver import Info, Solver
from brecq_jax.solvers._solver import split as split_examples
from brecq_jax.solvers._student import Student, Written, begin, finish, split, view, written
from brecq_jax.solvers.nearest import fit_activations

Features = Callable[[Any, Any], Mapping[str, Any]]

MASKED = -100.0  # attention scores at or below it are those of tokens that do not count: BinaryBERT's code
STAGES = ("inner", "prediction")
CHUNK = 20  # steps between looks at the progress bar


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Settings of one training of two stages. Defaults: BinaryBERT's for GLUE, where its code has one; steps and rates of activations are guesses."""

    num_steps: int = 1_000  # of each stage
    batch_size: int = 16
    learning_rate: float = 1e-5  # of the second stage, for the ternary student; its binary ones have 5e-5
    inner_ratio: float = 2.5  # how much higher it is in the first
    warmup: float = 0.1  # fraction of a stage's steps; the rate then falls to zero in a line
    weight_decay: float = 0.01  # of matrices
    clip_norm: float = 1.0  # of the gradient
    step_learning_rate: float = 1e-4  # of the logarithms of activations' step sizes
    checks: int = 4  # how often in each stage the held-out loss is looked at: the next stage begins with the best


class Keeper(Protocol):
    """Where the state of a training is kept: `deploy.TrainingFolder`."""

    def latest(self) -> tuple[int, list[np.ndarray]] | None: ...

    def keep(self, number: int, arrays: list) -> None: ...


def distilled(features: Features, settings: Distillation = Distillation(), keep: Keeper | None = None) -> Solver:
    """The planned formats, learned from the float model's inner values and then its prediction, straight through the rounding.

    `features(params, inputs)` gives {"hidden": […], "scores": […], "logits": array}: whatever inner values of a model should be alike,
    attention scores before their softmax, and what the prediction is a softmax of. Both lists may be empty: then there is one stage.
    Stage 1: Σ mean (student − float)² over hidden and scores, where scores ≤ −100 count as 0. Stage 2: −mean(softmax(float) · log softmax(student)).
    Weights in `Binary(points=2)` are two latent weights, each binarized by its own mean.
    Source: Bai et al. 2021 (BinaryBERT), https://arxiv.org/abs/2012.15701, and its released code (kd_learner_glue.py at 0598f02); no
    hard labels. Unlike its code the float model has no dropout here, activation ranges begin where the float model's are, and Adam is bias-corrected.

    Args:
      keep: where the state is kept at each check; the same call goes on from there. None: nowhere.

    Raises:
      ValueError: no weight is planned, `features` gives something else, or `keep` has the state of another training.
    """

    def solve(problem: Problem, guess: Quantized, key: jax.Array) -> tuple[Quantized, Info]:
        training = _Training(problem, guess, features, keep, key, (settings,))
        plan = written(problem, problem.plan.weights)
        student = training.learn(plan, begin(plan, problem.params, training.activations), settings, "distilled")
        return finish(plan, student, problem, training.guess), tuple(training.infos)

    return solve


def binarybert(
    features: Features, ternary: Distillation = Distillation(), binary: Distillation = Distillation(learning_rate=5e-5), keep: Keeper | None = None
) -> Solver:
    """Weights planned as `Binary(points=2)` are learned as `Ternary` ones, split without a change, and learned on as two binary ones.

    Other planned weights keep their format throughout. See `distilled`.
    Source: Bai et al. 2021 (BinaryBERT), https://arxiv.org/abs/2012.15701

    Raises:
      ValueError: no weight is planned as `Binary(points=2)`, and as `distilled`.
      formats.splitting.SplitError: the ternary weights that were learned have no halves.
    """

    def solve(problem: Problem, guess: Quantized, key: jax.Array) -> tuple[Quantized, Info]:
        if Binary not in {type(f) for f in problem.plan.weights.values() if getattr(f, "points", 0) == 2}:
            raise ValueError("solvers.binarybert: no weight is planned as two binary points. Write weights=formats.Binary(points=2), or another solver.")
        training = _Training(problem, guess, features, keep, key, (ternary, binary))
        plan = written(problem, {name: _as_ternary(f) for name, f in problem.plan.weights.items()})
        student = training.learn(plan, begin(plan, problem.params, training.activations), ternary, "ternary")
        if not training.ahead(training.done):
            student = split(plan, student)
        plan = written(problem, problem.plan.weights)
        student = training.learn(plan, student, binary, "split binary")
        return finish(plan, student, problem, training.guess), tuple(training.infos)

    return solve


def _as_ternary(format):
    return Ternary(format.granularity) if isinstance(format, Binary) and format.points == 2 else format


class Static(NamedTuple):
    """What a compiled step depends on beside shapes."""

    features: Features
    program: Program
    plan: tuple[Written, ...]
    settings: Distillation
    stage: str


class _Training:
    """One run of a recipe: data, the float model, and a count of checks that says where an interrupted run goes on."""

    def __init__(self, problem: Problem, guess: Quantized, features: Features, keep: Keeper | None, key: jax.Array, settings):
        self.problem, self.features, self.keep, self.key = problem, features, keep, key
        # Ranges of the float model: those of one whose weights were just rounded to a bit say nothing.
        self.guess = fit_activations(problem, guess, problem.leaves)
        self.activations = self.guess.activations
        self.data = jax.tree.map(jnp.asarray, problem.inputs)
        self.train, self.judge = split_examples(problem.count)
        self.infos, self.done = [], 0
        self.made_of = _made_of(problem, features, settings, key) if keep else None
        self.kept = keep.latest() if keep else None
        if self.kept and not np.array_equal(self.kept[1][0], self.made_of):
            raise ValueError(
                "distilled: `keep` has the state of another training (settings, features, apply_fn, plan, parameters, data or key). "
                "Give a new folder, or remove it."
            )
        shapes = jax.eval_shape(features, problem.params, jax.tree.map(lambda a: a[:1], self.data))
        if not isinstance(shapes, Mapping) or set(shapes) != {"hidden", "scores", "logits"}:
            raise ValueError('distilled: features gives something else than {"hidden": [...], "scores": [...], "logits": array}. Give all three.')
        self.stages = STAGES if jax.tree.leaves((shapes["hidden"], shapes["scores"])) else STAGES[1:]

    def learn(self, plan: tuple[Written, ...], student: Student, settings: Distillation, phase: str) -> Student:
        """The student after both stages: the best that was seen in the second, which begins with the best of the first."""
        if not plan:
            raise ValueError("distilled: no weight is planned. Write weights=formats.Ternary(), or another format.")
        for stage in self.stages:
            student = self.learn_stage(Static(self.features, self.guess.program, plan, settings, stage), student, phase)
        return student

    def learn_stage(self, static: Static, student: Student, phase: str) -> Student:
        settings, start, first = static.settings, time.perf_counter(), self.done
        stops = [round(settings.num_steps * n / settings.checks) for n in range(settings.checks + 1)]
        self.done += settings.checks
        if self.ahead(self.done):  # what is kept is of a later stage
            return student
        optimizer = _optimizer(settings, static.stage)
        if self.ahead(first):
            _, losses, *leaves = self.kept[1]
            structure = jax.tree.structure(((student, jax.eval_shape(optimizer.init, student)), student))
            state, best = jax.tree.unflatten(structure, map(jnp.asarray, leaves))
            done = self.kept[0] - first
        else:
            state, best, losses = (jax.tree.map(jnp.copy, student), optimizer.init(student)), student, np.full(2, self.loss(static, student))
            done = 0
        order = batches(settings.num_steps, len(self.train), settings.batch_size, jax.random.fold_in(self.key, first))
        operands = self.problem.params, self.activations, self.data, jnp.asarray(self.train[order])
        for number in range(done, settings.checks):
            for i in range(stops[number], stops[number + 1], CHUNK):
                state = _steps(static, state, operands, i, min(CHUNK, stops[number + 1] - i))
                self.problem.show(i, settings.num_steps, f"{phase}, {static.stage}")
            loss = self.loss(static, state[0])
            if loss < losses[1]:
                # a copy: the state's own buffers are used again
                best, losses = jax.tree.map(jnp.copy, state[0]), np.array([losses[0], loss])
            if self.keep:
                self.keep.keep(first + number + 1, [self.made_of, losses, *jax.tree.leaves((state, best))])
        self.infos.append({
            "name": static.stage, "ops": tuple(w.weight.name for w in static.plan), "phase": phase,
            "error_before": float(losses[0]), "error_after": float(losses[1]), "kept": bool(losses[1] < losses[0]),
            "steps": settings.num_steps, "wall_seconds": time.perf_counter() - start,
        })  # fmt: skip
        return best

    def ahead(self, number: int) -> bool:
        """Whether an interrupted run came further than this many checks."""
        return bool(self.kept) and self.kept[0] > number

    def loss(self, static: Static, student: Student) -> float:
        """Mean loss of the held-out examples."""
        size = min(static.settings.batch_size, len(self.judge))
        starts = range(0, len(self.judge) - size + 1, size)
        batches = (jax.tree.map(lambda a, s=s: a[self.judge[s : s + size]], self.data) for s in starts)
        return float(np.mean([_held_out(static, student, self.problem.params, self.activations, b) for b in batches]))


def _made_of(problem: Problem, features: Features, settings, key: jax.Array) -> np.ndarray:
    """SHA-256 of all that the student depends on, 32 bytes: functions by their programs, as `quantize` compares a resumed run's apply_fn."""
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), problem.inputs)
    programs = [jax.jit(f).lower(problem.params, one).as_text() for f in (features, problem.apply_fn)]
    plan, arrays = problem.plan, jax.tree.leaves((problem.params, problem.inputs))
    whole = digest(settings, programs, plan.weights, plan.activations, plan.whole_values, arrays, key)
    return np.frombuffer(bytes.fromhex(whole), np.uint8)


def _optimizer(settings: Distillation, stage: str) -> optax.GradientTransformation:
    peak = settings.learning_rate * (settings.inner_ratio if stage == "inner" else 1)
    warm = max(round(settings.warmup * settings.num_steps), 1)
    ramps = optax.linear_schedule(0, peak, warm), optax.linear_schedule(peak, 0, max(settings.num_steps - warm, 1))
    rate = optax.join_schedules(ramps, [warm])
    latents = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(rate, weight_decay=settings.weight_decay, mask=lambda tree: jax.tree.map(lambda a: a.ndim > 1, tree)),
    )
    transforms = {"latents": latents, "whole": optax.set_to_zero(), "steps": optax.adam(settings.step_learning_rate)}

    def kinds(student):
        return Student(jax.tree.map(lambda a: "latents" if _is_float(a) else "whole", student.latents), dict.fromkeys(student.steps, "steps"))

    return optax.multi_transform(transforms, kinds)


def _is_float(array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _steps(static: Static, state, operands, start: int, count: int):
    """One after the other on a CPU, where loops inside a program are slow (see `_loop`); else in one program."""
    if jax.default_backend() != "cpu":
        return _many_steps(static, count, state, operands, start)
    for i in range(start, start + count):
        state = _step(static, state, operands, i)
    return jax.block_until_ready(state)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _many_steps(static: Static, count: int, state, operands, start):
    return jax.lax.scan(lambda s, i: (_update(static, s, operands, i), None), state, start + jnp.arange(count))[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(static: Static, state, operands, i):
    return _update(static, state, operands, i)


def _update(static: Static, state, operands, i):
    (student, opt_state), (params, activations, data, rows) = state, operands
    batch = jax.tree.map(lambda a: a[rows[i]], data)
    gradients = jax.grad(lambda student: _loss(static, student, params, activations, batch), allow_int=True)(student)
    gradients = jax.tree.map(lambda g, a: g if _is_float(a) else jnp.zeros_like(a), gradients, student)
    updates, opt_state = _optimizer(static.settings, static.stage).update(gradients, opt_state, student)
    return optax.apply_updates(student, updates), opt_state


@functools.partial(jax.jit, static_argnums=0)
def _held_out(static: Static, student: Student, params, activations, batch):
    return _loss(static, student, params, activations, batch)


def _loss(static: Static, student: Student, params, activations, batch) -> jax.Array:
    target = static.features(params, batch)
    found = view(static.features, static.program, static.plan, student, activations, batch)
    if static.stage == "prediction":
        return -jnp.mean(jax.nn.softmax(target["logits"]) * jax.nn.log_softmax(found["logits"]))
    unmasked = [[jnp.where(s <= MASKED, 0, s) for s in side["scores"]] for side in (found, target)]
    pairs = zip([*found["hidden"], *unmasked[0]], [*target["hidden"], *unmasked[1]], strict=True)
    return sum(jnp.mean(jnp.square(a - b)) for a, b in pairs)
