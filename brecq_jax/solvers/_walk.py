"""One walk over the units of a problem: the float stream gives targets, the quantized stream inputs."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from brecq_jax._calibrate import Hooks, fisher, learned_outputs
from brecq_jax._graph import Op
from brecq_jax._interpret import Block, param_values, whole
from brecq_jax._memory import STREAM, OnDisk, plan_caches
from brecq_jax._model import Problem, Quantized
from brecq_jax._sharding import everywhere, here, parts, spread
from brecq_jax._stream import Stream
from brecq_jax.formats import ScalarFormat
from brecq_jax.solvers._solver import Info, split


def squared_error(output: Float[Array, "batch *feature"], target: Float[Array, "batch *feature"], importance) -> Float[Array, " batch"]:
    """|output − target|² of each example: summed over the last axis (channels; one number per example is one), averaged over positions."""
    return _per_example(jnp.square(_wide(output) - _wide(target)))


def fisher_error(output: Float[Array, "batch *feature"], target: Float[Array, "batch *feature"], importance) -> Float[Array, " batch"]:
    """The same, each output weighted by its diagonal Fisher (mean 1). Source: BRECQ, eq. 10, https://arxiv.org/abs/2102.05426"""
    return _per_example(importance * jnp.square(_wide(output) - _wide(target)))


def relative_error(output: Float[Array, "batch *feature"], target: Float[Array, "batch *feature"], importance) -> Float[Array, " batch"]:
    """`squared_error` in parts of the targets' energy, its mean over the batch: the same scale for every block."""
    return squared_error(output, target, importance) / (jnp.mean(_per_example(jnp.square(_wide(target)))) + TINY)


def position_error(output: Float[Array, "batch *feature"], target: Float[Array, "batch *feature"], importance) -> Float[Array, " batch"]:
    """`relative_error` of the positions that the prediction depends on: each counts by its Fisher, the mean of its channels.

    So padding counts nothing, of which a masked model's prediction knows nothing.
    """
    weight = jnp.mean(importance, -1, keepdims=True) if importance.ndim > 1 else importance
    error, energy = (_per_example(weight * jnp.square(values)) for values in (_wide(output) - _wide(target), _wide(target)))
    return error / (jnp.mean(energy) + TINY)


def _wide(values):
    """In 32 bits or more: the error of a block moves in bfloat16's third digit, and squares of float16 end at 65,504."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _per_example(squares):
    if squares.ndim == 1:
        return squares
    return jnp.mean(jnp.sum(squares, -1).reshape(squares.shape[0], -1), -1)


@functools.partial(jax.jit, static_argnums=0)
def _errors(error: Callable, output, target, importance):
    """`error`, compiled: what it makes on its way is not held."""
    return error(output, target, importance)


WEIGHTED = (fisher_error, position_error)  # errors that take the Fisher weights
TINY = 1e-12  # energy of a target that is zero everywhere


class Unit(NamedTuple):
    """One block of a walk: what is still to decide in it, and what it should make."""

    number: int
    block: Block
    weights: tuple[str, ...]  # names of weights that no earlier unit decided
    sites: tuple[str, ...]  # names of activations likewise
    targets: list[np.ndarray | OnDisk] | None  # the float model's outputs, all examples, where they are held


class Stage(NamedTuple):
    """One way to better a unit: `better(unit, model)` gives another model, which is kept if the held-out error fell."""

    phase: str
    steps: int
    better: Callable[[Unit, Quantized], Quantized]


class Walk:
    """The state of one walk: what both streams hold, which examples are learned from and which judge, by which error.

    `activations`: the prefix and the unit itself run with activations quantized.
    """

    def __init__(
        self, problem: Problem, batch_size: int = STREAM, unit: str | None = None, error: Callable = squared_error,
        activations: bool = False, key: jax.Array | None = None, dropping: bool = False,
    ):  # fmt: skip
        self.notes: list[str] = []  # of the unit in work
        self.problem = dataclasses.replace(problem, note=lambda text: self.notes.append(text) or problem.note(text))
        self.error, self.activations = error, activations
        self.train, self.held_out = split(problem.count)
        self.batch_size = min(batch_size, len(self.train))
        graph, blocks = self.drawn_graph, self.drawn_blocks = problem.graph(self.batch_size), problem.units(self.batch_size, unit)  # what a loop runs
        learned = [[b.outs[p] for p in learned_outputs(graph, b)] for b in blocks] if error in WEIGHTED else None
        self.caches = plan_caches(
            graph, blocks, problem.count, problem.memory_budget_gb, self.batch_size, learned, dropping, problem.bfloat16_caches
        )
        problem.tell(self.caches.text)
        stream = min(self.caches.stream, len(self.train))
        self.graph, self.blocks = problem.graph(stream), problem.units(stream, unit)
        held = self.caches.places, problem.bfloat16_caches, problem.mesh
        self.exact, self.rough = (Stream(self.graph, self.blocks, problem.inputs, stream, *held) for _ in range(2))
        self.leaves = problem.leaves
        self.importance = None
        if error in WEIGHTED:
            own = dataclasses.replace(problem, blocks=unit or problem.blocks)
            self.importance = fisher(own, self.blocks, key, self.caches.chunk, on_disk=self.caches.importance_on_disk)

    def hooks(self, model: Quantized) -> Hooks | None:
        """Activation quantization as the walk runs it."""
        plan = self.problem.plan
        return Hooks(plan.activations, model.activations, plan.whole_values) if self.activations else None

    @functools.cached_property
    def predictions(self) -> np.ndarray | None:
        """The float model's outputs, if they are one array of logits."""
        if len(self.graph.flat.outputs) != 1 or not self.graph.by_example.issuperset(self.graph.flat.outputs):
            return None
        net = whole(self.graph)
        stream = Stream(self.graph, [net], self.problem.inputs, self.exact.batch_size, mesh=self.problem.mesh)
        (outputs,) = stream.outputs(net, param_values(self.graph, net, self.leaves))
        return outputs if outputs.ndim >= 2 and outputs.shape[-1] > 1 and np.issubdtype(outputs.dtype, np.floating) else None

    def chooses(self, model: Quantized, name: str) -> bool:
        """Whether a weight has neighbours to choose between: formats of whole rows keep their nearest points."""
        q = model.weight(self.graph.weights[name])
        return q is not None and isinstance(q.format, ScalarFormat)

    def summed(self, op: Op, block: Block, streams: Sequence[Stream], rows: int, statistic: Callable, *shared):
        """Σ of `statistic(mesh, keep, inputs of each stream, counted, *shared)` over the batches of what is learned from.

        `keep`: how many of about `rows` output rows in all are a batch's. The last batch is filled up with the last example: `counted` is 0
        for those. Where an op's examples are not on its output's axis 0 it is None; the first ones fill up, and count twice.
        """
        size, count = self.rough.batch_size, len(self.train)
        tells = self.graph.flat.steps[op.step].outputs[0] in self.graph.by_example
        mesh = self.problem.mesh if tells else None
        at_once, shared, total = size * parts(mesh), everywhere(mesh, shared), None
        for start in range(0, count, at_once):
            at = np.arange(start, start + at_once)
            rows_of = self.train[start : start + at_once] if tells else self.train[at % count]
            inputs = [[spread(mesh, a, size) for a in stream.inputs(block, rows_of)] for stream in streams]
            counted = spread(mesh, (at < count).astype(np.float32)) if tells and count % at_once else None
            part = statistic(mesh, -(-rows // -(-count // size)), inputs, counted, *shared)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return here(mesh, total)

    def judge(self, unit: Unit, model: Quantized) -> float:
        """The unit's error with this model, on the examples that judge."""
        params, hooks = model.values(self.graph, unit.block), self.hooks(model)
        # within a budget by batches: all outputs at once would take more than a step
        at_once = len(self.held_out) if unit.targets and self.problem.memory_budget_gb is None else self.rough.batch_size
        total = 0.0
        for rows in np.array_split(self.held_out, -(-len(self.held_out) // at_once)):
            outputs, targets = self.rough.outputs(unit.block, params, hooks, rows), self.targets(unit, rows)
            for position, importance in self.importances(unit, rows).items():
                errors = _errors(self.error, outputs[position], targets[position], importance)
                total += float(np.sum(np.asarray(errors))) / len(self.held_out)
        return total

    def targets(self, unit: Unit, rows: np.ndarray) -> list:
        """The float model's outputs of the unit, of the examples in `rows`."""
        if unit.targets is None:
            return self.exact.outputs(unit.block, param_values(self.graph, unit.block, self.leaves), rows=rows)
        types = self.graph.flat.types
        return [t[rows].astype(types[i].dtype, copy=False) for i, t in zip(unit.block.outs, unit.targets, strict=True)]

    def importances(self, unit: Unit, rows: np.ndarray) -> dict[int, np.ndarray | float]:
        """Position of each output that is compared -> Fisher weights of the examples in `rows`, or 1."""
        return {
            p: 1.0 if self.importance is None else self.importance[unit.number][p][rows].astype(np.float32)
            for p in learned_outputs(self.graph, unit.block)
        }

    def improve(self, guess: Quantized, stages: Sequence[Stage]) -> tuple[Quantized, Info]:
        """Unit by unit, ask each stage for a better model, and keep it where the held-out error fell."""
        decided: set[str] = set()
        current, infos = guess, []
        self._note_shared(guess)
        for n, block in enumerate(self.blocks):
            floats, place = param_values(self.graph, block, self.leaves), self.caches.places[n + 1]
            targets = None if place == "recomputed" else self.exact.outputs(block, floats, place=place)
            weights = [w for w in dict.fromkeys(op.weight for op in block.ops) if w not in decided and self.chooses(current, w)]
            sites = [s for s in block.sites if s in current.activations and f"reads {s}" not in decided] if self.activations else []
            unit = Unit(n, block, tuple(weights), tuple(sites), targets)
            if (weights or sites) and learned_outputs(self.graph, block):
                current, some = self.improve_unit(unit, current, stages)
                infos += some
            decided.update(weights, (f"reads {s}" for s in sites))
            self.exact.advance(block, floats, outputs=targets)
            self.rough.advance(block, current.values(self.graph, block), self.hooks(current))
        return current, tuple(infos)

    def _note_shared(self, guess: Quantized):
        """A note of the report on each weight that several blocks read: the first one that learns decides."""
        readers: dict[str, list[str]] = {}
        for block in self.blocks:
            for name in dict.fromkeys(op.weight for op in block.ops if op.kind != "embed" and self.chooses(guess, op.weight)):
                readers.setdefault(name, []).append(block.name)
        for name, blocks in readers.items():
            if len(blocks) > 1:
                self.problem.note(
                    f"{name} is read in {len(blocks)} blocks, and rounded for the errors of {blocks[0]} alone. blocks=[…] with one pattern for all of "
                    "them, or blocks='net', learns it for all"
                )

    def improve_unit(self, unit: Unit, current: Quantized, stages: Sequence[Stage]) -> tuple[Quantized, list[dict]]:
        """The model with this unit bettered, or with what an interrupted run found for it."""
        journal, name = self.problem.journal, unit.block.name
        if journal and (kept := journal.next(name, self.decided_in(unit, current))):
            (found, grids), infos, notes = kept
            for text in notes:
                self.problem.note(text)
            return current.with_weights(found, self.graph).with_activations(grids), infos
        self.notes.clear()
        error, infos = self.judge(unit, current), []
        if math.isnan(error):
            self.problem.note(
                f"{name} is not learned: its error is not a number, since values that it compares are not; where a mask is −inf, write a finite one"
            )
        for stage in () if math.isnan(error) else stages:
            start = time.perf_counter()
            better = stage.better(unit, current)
            after = self.judge(unit, better) if better is not current else error
            infos.append(record(unit.block, stage.phase, stage.steps, error, after, start))
            if after < error:
                current, error = better, after
        if journal:
            journal.add(name, self.decided_in(unit, current), infos, self.notes)
        return current, infos

    def decided_in(self, unit: Unit, model: Quantized) -> tuple[dict, dict]:
        """(weights, grids of activations) of a model that this unit decides."""
        return {w: model.weight(self.graph.weights[w]) for w in unit.weights}, {s: model.activations[s] for s in unit.sites}


def record(block: Block, phase: str, steps: int, before: float, after: float, start: float) -> dict:
    """The record of one unit, for the report."""
    kept = after < before
    return {
        "name": block.name, "ops": tuple(op.name for op in block.ops), "phase": phase,
        "error_before": before, "error_learned": after, "error_after": after if kept else before, "kept": kept,
        "steps": steps, "wall_seconds": time.perf_counter() - start,
    }  # fmt: skip
