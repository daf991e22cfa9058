"""One walk over the units of a problem: the float stream gives targets, the quantized stream inputs."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from brecq_jax._calibrate import Hooks, Memory, Stream, fisher, learned_outputs
from brecq_jax._interpret import Block, param_values, whole
from brecq_jax._model import Problem, Quantized
from brecq_jax.formats import ScalarFormat
from brecq_jax.solvers._solver import Info, split


def squared_error(output: Float[Array, "batch *feature"], target: Float[Array, "batch *feature"], importance) -> Float[Array, " batch"]:
    """|output − target|² of each example: summed over the last axis (channels), averaged over positions."""
    return _per_example(jnp.square(output - target))


def fisher_error(output: Float[Array, "batch *feature"], target: Float[Array, "batch *feature"], importance) -> Float[Array, " batch"]:
    """The same, each output weighted by its diagonal Fisher (mean 1). Source: BRECQ, eq. 10, https://arxiv.org/abs/2102.05426"""
    return _per_example(importance * jnp.square(output - target))


def relative_error(output: Float[Array, "batch *feature"], target: Float[Array, "batch *feature"], importance) -> Float[Array, " batch"]:
    """`squared_error` in parts of the targets' energy, its mean over the batch: the same scale for every block."""
    return squared_error(output, target, importance) / (jnp.mean(_per_example(jnp.square(target))) + TINY)


def position_error(output: Float[Array, "batch *feature"], target: Float[Array, "batch *feature"], importance) -> Float[Array, " batch"]:
    """`relative_error` of the positions that the prediction depends on: each counts by its Fisher, the mean of its channels.

    So padding counts nothing, of which a masked model's prediction knows nothing.
    """
    weight = jnp.mean(importance, -1, keepdims=True)
    return _per_example(weight * jnp.square(output - target)) / (jnp.mean(_per_example(weight * jnp.square(target))) + TINY)


def _per_example(squares):
    return jnp.mean(jnp.sum(squares, -1).reshape(squares.shape[0], -1), -1)


WEIGHTED = (fisher_error, position_error)  # errors that take the Fisher weights
TINY = 1e-12  # energy of a target that is zero everywhere
STREAM = 32  # examples that pass a block at once, where nothing is drawn


class Unit(NamedTuple):
    """One block of a walk: what is still to decide in it, and what it should make."""

    number: int
    block: Block
    weights: tuple[str, ...]  # names of weights that no earlier unit decided
    sites: tuple[str, ...]  # names of activations likewise
    targets: list[np.ndarray]  # the float model's outputs, all examples


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
        activations: bool = False, key: jax.Array | None = None,
    ):  # fmt: skip
        self.problem, self.error, self.activations = problem, error, activations
        self.train, self.held_out = split(problem.count)
        self.batch_size = min(batch_size, len(self.train))
        stream = min(STREAM, len(self.train))
        self.graph, self.blocks = problem.graph(stream), problem.units(stream, unit)
        self.drawn_graph, self.drawn_blocks = problem.graph(self.batch_size), problem.units(self.batch_size, unit)  # what a loop runs
        self.memory = Memory(problem.memory_budget_gb)
        self.exact, self.rough = (Stream(self.graph, self.blocks, problem.inputs, stream, self.memory) for _ in range(2))
        self.leaves = problem.leaves
        self.importance = None
        if error in WEIGHTED:
            self.importance = fisher(dataclasses.replace(problem, blocks=unit or problem.blocks), self.blocks, self.memory, key)

    def hooks(self, model: Quantized) -> Hooks | None:
        """Activation quantization as the walk runs it."""
        plan = self.problem.plan
        return Hooks(plan.activations, model.activations, plan.whole_values) if self.activations else None

    @functools.cached_property
    def predictions(self) -> np.ndarray | None:
        """The float model's outputs, if they are one array of logits."""
        if len(self.graph.flat.outputs) != 1:
            return None
        net = whole(self.graph)
        stream = Stream(self.graph, [net], self.problem.inputs, self.exact.batch_size, self.memory)
        (outputs,) = stream.outputs(net, param_values(self.graph, net, self.leaves))
        return outputs if outputs.ndim >= 2 and outputs.shape[-1] > 1 and np.issubdtype(outputs.dtype, np.floating) else None

    def chooses(self, model: Quantized, name: str) -> bool:
        """Whether a weight has neighbours to choose between: formats of whole rows keep their nearest points."""
        q = model.weight(self.graph.weights[name])
        return q is not None and isinstance(q.format, ScalarFormat)

    def judge(self, unit: Unit, model: Quantized) -> float:
        """The unit's error with this model, on the examples that judge."""
        outputs = self.rough.outputs(unit.block, model.values(self.graph, unit.block), self.hooks(model), self.held_out)
        total = 0.0
        for position in learned_outputs(self.graph, unit.block):
            weights = 1.0 if self.importance is None else self.importance[unit.number][position][self.held_out]
            errors = self.error(outputs[position], unit.targets[position][self.held_out], weights)
            total += float(np.mean(np.asarray(errors)))
        for array in outputs:
            self.memory.free(array)
        return total

    def improve(self, guess: Quantized, stages: Sequence[Stage]) -> tuple[Quantized, Info]:
        """Unit by unit, ask each stage for a better model, and keep it where the held-out error fell."""
        decided: set[str] = set()
        current, infos = guess, []
        for n, block in enumerate(self.blocks):
            targets = self.exact.outputs(block, param_values(self.graph, block, self.leaves))
            weights = [w for w in dict.fromkeys(op.weight for op in block.ops) if w not in decided and self.chooses(current, w)]
            sites = [s for s in block.sites if s in current.activations and f"reads {s}" not in decided] if self.activations else []
            unit = Unit(n, block, tuple(weights), tuple(sites), targets)
            if (weights or sites) and learned_outputs(self.graph, block):
                current, some = self.improve_unit(unit, current, stages)
                infos += some
            decided.update(weights, (f"reads {s}" for s in sites))
            self.exact.advance(block, targets)
            self.rough.advance(block, self.rough.outputs(block, current.values(self.graph, block), self.hooks(current)))
        return current, tuple(infos)

    def improve_unit(self, unit: Unit, current: Quantized, stages: Sequence[Stage]) -> tuple[Quantized, list[dict]]:
        """The model with this unit bettered, or with what an interrupted run found for it."""
        journal, name = self.problem.journal, unit.block.name
        if journal and (kept := journal.next(name, self.decided_in(unit, current))):
            (found, grids), infos = kept
            return current.with_weights(found, self.graph).with_activations(grids), infos
        error, infos = self.judge(unit, current), []
        for stage in stages:
            start = time.perf_counter()
            better = stage.better(unit, current)
            after = self.judge(unit, better) if better is not current else error
            infos.append(record(unit.block, stage.phase, stage.steps, error, after, start))
            if after < error:
                current, error = better, after
        if journal:
            journal.add(name, self.decided_in(unit, current), infos)
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
