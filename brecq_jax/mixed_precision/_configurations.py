"""All configurations of one block in one compiled program."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from brecq_jax._fast_ops import fast_op
from brecq_jax._interpret import Block, Program, run
from brecq_jax._model import Quantized, site_hooks
from brecq_jax._sharding import each_batch, everywhere, gathered, parts, spread
from brecq_jax._stream import Stream
from brecq_jax.formats import Grid, fake_quantize

ALL_SETS = 4  # weights in a block of which every set is tried (the paper's largest block); pairs alone beyond


class Candidates(NamedTuple):
    """For each choice a model with all its weights rounded; for each choice of activations all grids, and the bits."""

    models: tuple[Quantized, ...]
    grids: tuple[Mapping[str, Grid], ...]
    bits: tuple[int, ...]
    whole_values: bool


class Static(NamedTuple):
    """What the compiled pass of a block depends on. `weights`: for each decision the params it replaces; `sites`: for each, its site."""

    program: Program
    error: Callable
    positions: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...]
    sites: tuple[int, ...]
    bits: tuple[int, ...]
    whole_values: bool


def block_losses(
    stream: Stream, block: Block, candidates: Candidates, error: Callable, outputs: Mapping[int, tuple[np.ndarray, Any]], floats,
    slots: Mapping[str, tuple[int, ...]], stacks: Mapping[int, list[jax.Array]], sites: Mapping[str, int],
) -> dict[tuple[str, ...], Any]:  # fmt: skip
    """(decision,) -> mean error of each of its choices; set of weights -> what it loses at the first choice beyond the sets within it.

    `outputs`: position -> (target, importance or None). `slots`, `sites`: decision -> the params and the site it is about. `stacks`:
    param -> its float value and that of each choice.
    """
    static = Static(
        block.program, error, tuple(outputs), tuple(slots.values()), tuple(sites.values()), candidates.bits, candidates.whole_values
    )
    rows, sets = _configurations([len(candidates.models)] * len(slots) + [len(candidates.grids)] * len(sites), len(slots))
    arguments = {
        "floats": list(floats), "constants": list(block.constants), "stacks": {slot: jnp.stack(own) for slot, own in stacks.items()},
        "grids": [[jax.tree.map(jnp.squeeze, own[block.sites[s]]) for own in candidates.grids] for s in sites.values()],
    }  # fmt: skip
    total, mesh = np.zeros(len(rows)), stream.mesh
    arguments = everywhere(mesh, arguments)
    for start in range(0, stream.count, stream.batch_size * parts(mesh)):
        some = slice(start, start + stream.batch_size * parts(mesh))
        batch = jax.tree.map(lambda a, some=some: spread(mesh, a[some], stream.batch_size), (stream.inputs_of(block), list(outputs.values())))
        real = spread(mesh, np.arange(some.start, some.stop) < stream.count)
        for own in gathered(mesh, _errors(static, mesh, *batch, real, arguments, rows)):  # in the order of one device
            total += own.astype(np.float64)
    errors = total / stream.count
    found: dict[tuple[str, ...], Any] = {}
    names, at = [*slots, *sites], 0
    for d, name in enumerate(names):
        choices = len(candidates.models) if d < len(slots) else len(candidates.grids)
        found[name,] = errors[at : at + choices]
        at += choices
    for members, value in zip(sets, errors[at:], strict=True):
        own = tuple(names[d] for d in members)
        within = (s for size in range(2, len(own)) for s in itertools.combinations(own, size))
        found[own] = value - sum(found[n,][0] for n in own) - sum(found.get(s, 0.0) for s in within)
    return found


def _configurations(choices: list[int], weights: int) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """Rows of choices (0 is float, 1 the first): each choice of each decision alone, then sets of weights at their first."""
    singles = [(d, c) for d, count in enumerate(choices) for c in range(count)]
    largest = weights if weights <= ALL_SETS else 2
    sets = [s for size in range(2, largest + 1) for s in itertools.combinations(range(weights), size)]
    rows = np.zeros((len(singles) + len(sets), len(choices)), np.int32)
    for row, (d, c) in enumerate(singles):
        rows[row, d] = c + 1
    for row, members in enumerate(sets, len(singles)):
        rows[row, list(members)] = 1
    return rows, sets


@functools.partial(jax.jit, static_argnums=(0, 1))
def _errors(static: Static, mesh: Mesh | None, inputs, outputs, real, arguments, rows):
    """Errors of all configurations, summed over the real examples of the batch of each device: (batches, configurations)."""
    sums = functools.partial(_sums, static)
    return each_batch(mesh, sums, (True, True, True, False, False))(inputs, outputs, real, arguments, rows)


def _sums(static: Static, inputs, outputs, real, arguments, rows):
    def one(row):
        values = list(arguments["floats"])
        for d, slots in enumerate(static.weights):
            for slot in slots:
                values[slot] = arguments["stacks"][slot][row[d]]

        def quantize(site, x):
            if site not in static.sites:
                return x
            d = static.sites.index(site)
            rounded = [
                lambda x, own=own, bits=bits: fake_quantize(x, own.scale, own.zero_point, bits)
                for own, bits in zip(arguments["grids"][d], static.bits, strict=True)
            ]
            return jax.lax.switch(row[len(static.weights) + d], [lambda x: x, *rounded], x)

        hooks = site_hooks(static.program, quantize, static.whole_values)
        found = run(static.program, inputs, values, arguments["constants"], on_op=fast_op, **hooks)
        errors = (static.error(found[p], *own) for p, own in zip(static.positions, outputs, strict=True))
        return jnp.sum(jnp.where(real, sum(errors), 0))

    # Side by side on an accelerator. A CPU has no fast convolution by many kernels at once: one after the other, in the same program.
    return jax.lax.map(one, rows, batch_size=None if jax.default_backend() == "cpu" else len(rows))
