"""One walk over the units of a problem: the float stream gives targets, the quantized stream inputs."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from brecq_jax._calibrate import Memory, Stream, fisher, learned_outputs
from brecq_jax._interpret import Block, param_values
from brecq_jax._model import Problem, Quantized
from brecq_jax.solvers._solver import Info, split


def squared_error(output: Float[Array, "batch *feature"], target: Float[Array, "batch *feature"], importance) -> Float[Array, " batch"]:
    """|output − target|² of each example: summed over the last axis (channels), averaged over positions."""
    return _per_example(jnp.square(output - target))


def fisher_error(output: Float[Array, "batch *feature"], target: Float[Array, "batch *feature"], importance) -> Float[Array, " batch"]:
    """The same, each output weighted by its diagonal Fisher (mean 1). Source: BRECQ, eq. 10, https://arxiv.org/abs/2102.05426"""
    return _per_example(importance * jnp.square(output - target))


def _per_example(squares):
    return jnp.mean(jnp.sum(squares, -1).reshape(squares.shape[0], -1), -1)


class Walk:
    """The state of one walk: what both streams hold, which examples are learned from and which judge, by which error."""

    def __init__(self, problem: Problem, batch_size: int, unit: str | None = None, error: Callable = squared_error, key: jax.Array | None = None):
        self.problem, self.error = problem, error
        self.train, self.held_out = split(problem.count)
        self.batch_size = min(batch_size, len(self.train))
        self.graph = problem.graph(self.batch_size)
        self.blocks = problem.units(self.batch_size, unit)
        self.memory = Memory(problem.memory_budget_gb)
        self.exact, self.rough = (Stream(self.graph, self.blocks, problem.inputs, self.batch_size, self.memory) for _ in range(2))
        self.leaves = problem.leaves
        self.importance = None
        if error is fisher_error:
            self.importance = fisher(dataclasses.replace(problem, blocks=unit or problem.blocks), self.blocks, self.memory, key)

    def held_out_error(self, n: int, block: Block, outputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> float:
        """The unit's error on the examples that judge."""
        total = 0.0
        for position in learned_outputs(self.graph, block):
            weights = 1.0 if self.importance is None else self.importance[n][position][self.held_out]
            errors = self.error(outputs[position][self.held_out], targets[position][self.held_out], weights)
            total += float(np.mean(np.asarray(errors)))
        return total

    def batches(self, n: int, block: Block, targets) -> tuple:
        """What a loop draws batches from: inputs, targets and Fisher weights of the examples that are learned from."""
        positions = learned_outputs(self.graph, block)
        weights = [] if self.importance is None else [self.importance[n][p] for p in positions]
        arrays = (self.rough.inputs_of(block), [targets[p] for p in positions], weights)
        if self.memory.spilled:
            return arrays, self.train
        return jax.tree.map(lambda a: jnp.asarray(a[self.train]), arrays), None

    def choose_codes(self, guess: Quantized, phase: str, steps: int, round_unit: Callable) -> tuple[Quantized, Info]:
        """Unit by unit, ask `round_unit(n, block, names, current, params, targets)` for QArrays by name, and keep them
        where the held-out error fell."""
        decided: set[str] = set()
        current, infos = guess, []
        for n, block in enumerate(self.blocks):
            start = time.perf_counter()
            targets = self.exact.outputs(block, param_values(self.graph, block, self.leaves))
            names = [w for w in dict.fromkeys(op.weight for op in block.ops) if w not in decided and current.weight(self.graph.weights[w])]
            params = param_values(self.graph, block, jax.tree.leaves(current.dequantized()))
            outputs = self.rough.outputs(block, params)
            if names and learned_outputs(self.graph, block):
                before = self.held_out_error(n, block, outputs, targets)
                better = current.with_weights(round_unit(n, block, names, current, params, targets), self.graph)
                candidate = self.rough.outputs(block, param_values(self.graph, block, jax.tree.leaves(better.dequantized())))
                after = self.held_out_error(n, block, candidate, targets)
                kept = after < before
                if kept:
                    current, outputs, candidate = better, candidate, outputs
                for array in candidate:
                    self.memory.free(array)
                infos.append(record(block, phase, before, after, kept, steps, start))
            decided.update(names)
            self.exact.advance(block, targets)
            self.rough.advance(block, outputs)
        return current, tuple(infos)


def record(block: Block, phase: str, before: float, after: float, kept: bool, steps: int, start: float) -> dict:
    """The record of one unit, for the report."""
    return {
        "name": block.name, "ops": tuple(op.name for op in block.ops), "phase": phase,
        "error_before": before, "error_learned": after, "error_after": after if kept else before, "kept": kept,
        "steps": steps, "wall_seconds": time.perf_counter() - start,
    }  # fmt: skip
