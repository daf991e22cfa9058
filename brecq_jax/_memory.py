"""Where the values that cross block boundaries are kept: in memory, in a file, or nowhere, to be computed again when they are asked for."""

import dataclasses
import math
import mmap
import os
import tempfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax._graph import Graph
from brecq_jax._interpret import Block

GB = 1e9
# Where memory allows: examples that pass a block at once, and the whole net with gradients.
STREAM, CHUNK = 32, 16
# Bytes of a step in bytes of what enters the block and its ops make: what the process grew by where EfficientNet-Lite0's largest block was
# learned on a CPU, with what malloc keeps (docs/results.md). Of a pass without gradients: a guess.
STEP, PASS = 5.5, 3.0
PASS_SHARE = 1 / 4  # of the budget, for one pass of a stream
# Values are computed again where that is at most so many times the work of the block that reads them; else they go to a file. A guess.
RECOMPUTED = 16
OWN_PAGES = 2**25  # bytes
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # Windows has no flags
WORDS = {"memory": "on the host", "disk": "in a file", "recomputed": "computed again"}


class OnDisk:
    """An array in a temporary file, read and written by rows: nothing of it stays in the process's memory."""

    def __init__(self, shape: tuple[int, ...], dtype):
        self.shape, self.dtype, self.file = shape, np.dtype(dtype), tempfile.TemporaryFile()  # noqa: SIM115 - it ends with the array
        self.row = math.prod(shape[1:]) * self.dtype.itemsize

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        rows = np.arange(self.shape[0])[rows]
        found = np.empty((len(rows), self.row), np.uint8)
        for at, row in zip(found, rows, strict=True):
            os.preadv(self.file.fileno(), [at], int(row) * self.row)
        return found.view(self.dtype).reshape(len(rows), *self.shape[1:])

    def __setitem__(self, rows: slice, values: np.ndarray):
        values = np.ascontiguousarray(values, self.dtype).reshape(len(values), -1).view(np.uint8)
        for at, row in zip(values, range(*rows.indices(self.shape[0])), strict=True):
            os.pwrite(self.file.fileno(), at, row * self.row)


def empty(shape: tuple[int, ...], dtype, on_disk: bool) -> np.ndarray | OnDisk:
    """An array for cached values. A large one has pages of its own, which go when it does: malloc may keep them, or have no hole for the next."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if on_disk:
        return OnDisk(shape, dtype)
    return np.empty(shape, dtype) if size < OWN_PAGES else np.ndarray(shape, dtype, mmap.mmap(-1, size, **PRIVATE))


@dataclasses.dataclass(frozen=True)
class Caches:
    """What is kept of the values between blocks, and where.

    `places`: of what enters each block, and at the end of what the last one makes: "memory", "disk" or "recomputed".
    `on_device`: for each block, whether all that its loop draws from is copied to the device before it begins.
    `importance_on_disk`: whether Fisher weights are. `stream`: how many examples pass a block at once; `chunk`: the net, there and back.
    `text`: the plan for the reader.
    """

    places: tuple[str, ...]
    on_device: tuple[bool, ...]
    importance_on_disk: bool
    stream: int
    chunk: int
    text: str


def plan_caches(
    graph: Graph, blocks: Sequence[Block], count: int, budget_gb: float | None, batch_size: int, learned: Sequence[Sequence[int]] | None,
    dropping: bool, half: bool,
) -> Caches:  # fmt: skip
    """Choose for each block boundary, from the first to the last: memory while the budget lasts, then work or a file.

    What is counted: the calibration set, Fisher weights, values of one step, and at a boundary the values of both streams before and
    after the block. On a CPU the loop's own copy comes out of the same memory; another device has a budget of the same size.

    Args:
      graph, blocks: traced at `batch_size`, what a step of a loop takes.
      learned: for each block the outputs that Fisher weights are kept of; None without them.
      dropping: loops read the float model's inputs, too.
      half: caches of float32 values are bfloat16.
    """
    types, own = graph.flat.types, set(graph.flat.inputs)

    def bytes_of(ids, kept: bool = True) -> float:
        """Of one example; `kept`: as caches hold it."""
        halved = {i for i in ids if half and kept and i not in own and types[i].dtype == jnp.float32}
        return sum(types[i].size * types[i].dtype.itemsize / (2 if i in halved else 1) for i in ids) / batch_size

    last_reader = {i: n for n, block in enumerate(blocks) for i in block.ins}
    made = [{i for b in blocks[:n] for i in b.outs} for n in range(len(blocks) + 1)]
    live = [{i for i in made[n] if last_reader.get(i, -1) >= n} for n in range(len(blocks))] + [set(blocks[-1].outs)]
    values = values_bytes(graph, blocks, batch_size)
    budget = math.inf if budget_gb is None else budget_gb * GB
    given = count * bytes_of(graph.flat.inputs[graph.num_leaves :], kept=False)
    weights = [0.0 if learned is None else count * bytes_of(ids) for ids in learned or [()] * len(blocks)]
    importance_on_disk = sum(weights) > max(budget - given, 0) / 2
    fixed = given + (0 if importance_on_disk else sum(weights))
    work = [sum(op.macs for op in b.ops) for b in blocks]
    places, on_device, before, since = ["memory"], [], 0.0, 0
    for n, block in enumerate(blocks):
        room = budget - fixed - STEP * batch_size * values[n]
        after = (2 if n + 1 < len(blocks) else 1) * count * bytes_of(live[n + 1])
        if before + after <= room:
            place = "memory"
        elif sum(work[since : n + 1]) <= RECOMPUTED * max(work[min(n + 1, len(blocks) - 1)], 1):
            place = "recomputed"
        else:
            place = "disk"
        copies = count * (bytes_of(block.ins) * (1 + dropping) + bytes_of(block.outs)) + weights[n]
        left = room - before - after if jax.default_backend() == "cpu" else budget - STEP * batch_size * values[n]
        on_device.append(places[-1] == place == "memory" and not (learned and importance_on_disk) and copies <= left)
        places.append(place)
        if place != "recomputed":
            before, since = after if place == "memory" else 0.0, n + 1
    stream = at_once(STREAM, PASS * max(values), budget - given)
    stream = min(stream, batch_size) if "recomputed" in places else stream
    chunk = at_once(CHUNK, STEP * sum(values), budget - given)
    text = _described(blocks, places, on_device, budget, given, STEP * batch_size * max(values), stream)
    return Caches(tuple(places), tuple(on_device), importance_on_disk, stream, chunk, text)


def values_bytes(graph: Graph, blocks: Sequence[Block], batch_size: int) -> list[float]:
    """Bytes of one example in each block: what enters, and what its ops make. The graph is traced at `batch_size`."""
    types, steps = graph.flat.types, graph.flat.steps
    found = [{*b.ins, *(o for op in b.ops for o in steps[op.step].outputs)} for b in blocks]
    return [sum(types[i].size * types[i].dtype.itemsize for i in ids) / batch_size for ids in found]


def at_once(most: int, each: float, left: float) -> int:
    """How many examples of `each` bytes a pass takes at once: `most`, or a half, a quarter, … of it, at least 1."""
    while most > 1 and most * each > PASS_SHARE * max(left, 0):
        most //= 2
    return most


def _described(blocks, places, on_device, budget: float, given: float, step: float, stream: int) -> str:
    kinds = ["on the device" if held else WORDS[place] for held, place in zip(on_device, places[:-1], strict=True)]
    runs, first = [], 0
    for n in range(1, len(kinds) + 1):
        if n == len(kinds) or kinds[n] != kinds[first]:
            span = blocks[first].name if n == first + 1 else f"{blocks[first].name} to {blocks[n - 1].name}"
            runs.append(f"  {span}: {kinds[first]}")
            first = n
    bound = "without a budget" if math.isinf(budget) else f"for {budget / GB:.3g} GB, less {given / GB:.3g} GB of calibration inputs"
    lines = [f"caches {bound}; {stream} examples pass a block at once, the largest step takes about {step / GB:.2g} GB", *runs]
    if step > budget - given:
        lines.append("  That is more than the budget: it will not hold. Write a smaller batch_size.")
    return "\n".join(lines)
