"""The values that cross block boundaries, for all calibration examples, from the first block to the last."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from brecq_jax._calibrate import Hooks, runner
from brecq_jax._graph import Graph
from brecq_jax._interpret import Block
from brecq_jax._memory import OnDisk, empty
from brecq_jax._sharding import gathered, parts, spread


class Passed(NamedTuple):
    """A block that the stream has passed, and how it was run."""

    block: Block
    run: Callable[[Sequence[jax.Array]], tuple[jax.Array, ...]]


class Stream:
    """What enters the block that the stream has come to, for any of the examples.

    `values`: id -> array with the examples on axis 0, of the last boundary that is held (`places`, see `_memory.Caches`; None: each of
    them, in memory). `passed`: the blocks since then; what they make is computed when it is asked for. A value is dropped after the
    last block that reads it, so that memory holds one boundary, not the whole net. `half`: float32 values are held in bfloat16.
    `mesh`: each of its devices passes a batch by itself.
    """

    def __init__(
        self, graph: Graph, blocks: Sequence[Block], inputs: Any, batch_size: int, places: Sequence[str] | None = None, half: bool = False,
        mesh: Mesh | None = None,
    ):  # fmt: skip
        self.types, self.batch_size, self.half, self.mesh = graph.flat.types, batch_size, half, mesh
        ids = graph.flat.inputs[graph.num_leaves :]
        self.values: dict[int, np.ndarray | OnDisk] = {i: np.asarray(a) for i, a in zip(ids, jax.tree.leaves(inputs), strict=True)}
        self.count = next(iter(self.values.values())).shape[0]
        self.last_reader = {i: n for n, block in enumerate(blocks) for i in block.ins}
        self.places = places or ["memory"] * (len(blocks) + 1)
        self.passed: list[Passed] = []
        self.position = 0

    def inputs_of(self, block: Block) -> list[np.ndarray]:
        """What enters the block, all of it, as it is held. Only where it is held."""
        return [self.values[i] for i in block.ins]

    def inputs(self, block: Block, rows: np.ndarray) -> list[jax.Array | np.ndarray]:
        """What enters the block, of the examples in `rows`."""
        if all(i in self.values for i in block.ins):
            return [self._read(i, rows) for i in block.ins]
        return list(self._in_batches(block.ins, rows))

    def outputs(
        self, block: Block, params: Sequence[jax.Array], hooks: Hooks | None = None, rows: np.ndarray | None = None, place: str = "memory"
    ) -> list[np.ndarray | OnDisk]:
        """The block's outputs for all examples, or for those in `rows`. Values that are not held per example are broadcast."""
        return self._in_batches(block.outs, np.arange(self.count) if rows is None else rows, self._passed(block, params, hooks), place)

    def advance(self, block: Block, params: Sequence[jax.Array], hooks: Hooks | None = None, outputs: Sequence | None = None):
        """Pass the block, whose `outputs` may be there already; drop what no later block reads."""
        self.position += 1
        self.passed.append(self._passed(block, params, hooks))
        place = self.places[self.position]
        if place == "recomputed":
            return
        needed = [i for i, last in self.last_reader.items() if last >= self.position]
        if outputs is not None and all(i in self.values or i in block.outs for i in needed if self._is_made(i)):
            found = dict(zip(block.outs, outputs, strict=True))
        else:
            missing = [i for i in needed if i not in self.values and self._is_made(i)]
            found = dict(zip(missing, self._in_batches(missing, np.arange(self.count), place=place), strict=True))
        self.values = {i: v for i, v in {**self.values, **found}.items() if i in needed}
        self.passed = []

    def _passed(self, block: Block, params: Sequence[jax.Array], hooks: Hooks | None) -> Passed:
        return Passed(block, runner(block, params, hooks, self.mesh))

    def _is_made(self, ident: int) -> bool:
        return any(ident in p.block.outs for p in self.passed)

    def _read(self, ident: int, rows: np.ndarray) -> np.ndarray:
        value, dtype = self.values[ident][rows], self.types[ident].dtype
        return value.astype(dtype) if value.dtype != dtype else value

    def _in_batches(self, ids: Sequence[int], rows: np.ndarray, last: Passed | None = None, place: str = "memory"):
        """Values for the examples in `rows`; `last`: a block to pass, too."""
        results: list[np.ndarray | OnDisk] = []
        at_once = self.batch_size * parts(self.mesh)
        for start in range(0, len(rows) if ids else 0, at_once):
            stop = min(start + at_once, len(rows))
            values = self._run(ids, rows[start:stop], last)
            if not results:
                results = [empty((len(rows), *v.shape[1:]), self._held_dtype(v.dtype, len(rows)), place == "disk") for v in values]
            for result, value in zip(results, values, strict=True):
                result[start:stop] = value
        return results

    def _held_dtype(self, dtype, rows: int):
        return jnp.bfloat16 if self.half and dtype == jnp.float32 and rows == self.count else dtype

    def _run(self, ids: Sequence[int], rows: np.ndarray, last: Passed | None) -> list[np.ndarray]:
        """Values of up to one batch on each device: what is held, and what the blocks since then make of it."""
        env: dict[int, jax.Array] = {}
        for block, run in [*self.passed, *([last] if last else [])]:
            inputs = [env[i] if i in env else spread(self.mesh, self._read(i, rows), self.batch_size) for i in block.ins]
            env.update(zip(block.outs, run(inputs), strict=True))
        return [gathered(self.mesh, env[i], len(rows)) if i in env else self._read(i, rows) for i in ids]
