"""Problem: all that does not change while codes are chosen. Quantized: what changes, and what the user gets."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from brecq_jax._blocks import partition
from brecq_jax._fast_ops import fast_op
from brecq_jax._graph import Graph, Weight
from brecq_jax._interpret import Block, contraction_axis, param_values, run, token_axes, whole
from brecq_jax._interpret import Program as BlockProgram
from brecq_jax._journal import Journal
from brecq_jax._plan import Activation, Plan
from brecq_jax._qarray import QArray, is_qarray
from brecq_jax._trace import trace
from brecq_jax.formats import Grid, PerToken, Sparq, activation_grid, fake_quantize


@dataclasses.dataclass(frozen=True)
class Problem:
    """Float model, plan and calibration inputs; a solver reads it and never writes to it.

    `inputs`: the calibration inputs as the model takes them, examples on axis 0 of every array. `loss(outputs, key)`:
    the scalar whose gradients weigh the outputs of blocks; None: the model's own prediction (see `_calibrate.fisher`).
    `show(done, total, text)`: progress. `journal`: what an interrupted run of the same problem found, and where to keep more.
    `mesh`: devices along its axis `data` share each batch of a loop, and elsewhere each passes a batch by itself. `tell`: says what
    was planned. `note`: a line of the report, once however often it is given.
    """

    apply_fn: Callable
    params: Any
    plan: Plan
    inputs: Any
    count: int
    blocks: str | Sequence[str] = "block"
    loss: Callable | None = None
    memory_budget_gb: float | None = None
    bfloat16_caches: bool = False
    show: Callable[[int, int, str], None] = lambda done, total, text: None
    tell: Callable[[str], None] = lambda text: None
    note: Callable[[str], None] = lambda text: None
    journal: Journal | None = None
    mesh: Mesh | None = None

    def graph(self, batch_size: int) -> Graph:
        """The program at a batch size."""
        types = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch_size, *a.shape[1:]), a.dtype), self.inputs)
        return _traced(self.apply_fn, _Types.of(self.params), _Types.of(types))

    def units(self, batch_size: int, blocks: str | Sequence[str] | None = None) -> tuple[Block, ...]:
        """The blocks of the program at a batch size."""
        return partition(self.graph(batch_size), self.blocks if blocks is None else blocks)[0]

    @property
    def leaves(self) -> list[jax.Array]:
        """The float parameters, flattened."""
        return jax.tree.leaves(self.params)


@dataclasses.dataclass(frozen=True)
class Program:
    """What a Quantized needs beside its arrays. Compared without the report, which no computation reads."""

    apply_fn: Callable
    sites: tuple[tuple[str, Activation], ...]
    whole_values: bool
    report: Any = dataclasses.field(default=None, compare=False)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("params", "activations"), meta_fields=("program",))
@dataclasses.dataclass(frozen=True, eq=False, repr=False)  # by identity: arrays have no hash, and `jax.jit(quantized)` wants one
class Quantized:
    """A quantized model: a pytree to call, jit, shard and differentiate.

    `params`: the caller's tree, with a `QArray` for every quantized leaf. `activations`: value name -> Grid.

        logits = quantized(images)
        logits = quantized.apply_fn(quantized.params, images)      # the same
    """

    params: Any
    activations: Mapping[str, Grid]
    program: Program

    def __call__(self, inputs: Any) -> Any:
        """Outputs of the quantized model, in the structure that the float model's have."""
        return _call(self, inputs)

    @property
    def apply_fn(self) -> Callable[[Any, Any], Any]:
        """`apply_fn(params, inputs)` for params of this structure, with QArray leaves or without."""
        return functools.partial(_apply, self.program, self.activations)

    @property
    def report(self):
        """What was done: plan, sizes, errors before and after, what stayed float."""
        return self.program.report

    def dequantized(self) -> Any:
        """Params of the caller's structure with float leaves on the grid, for the caller's own apply_fn."""
        return jax.tree.map(lambda x: _decode(x) if isinstance(x, QArray) else x, self.params, is_leaf=is_qarray)

    def values(self, graph: Graph, block: Block) -> list[jax.Array]:
        """What a block reads of the parameters, on the grid where they are quantized. Nothing else is decoded."""
        leaves = jax.tree.leaves(self.params, is_leaf=is_qarray)
        needed = {graph.origins[i][0] for i in block.params}
        decoded = {n: _decode(leaves[n]) if isinstance(leaves[n], QArray) else leaves[n] for n in needed}
        return [decoded[leaf][index] if index else decoded[leaf] for leaf, index in (graph.origins[i] for i in block.params)]

    def weight(self, weight: Weight) -> QArray | None:
        """The codes of one weight, or of one slice of a stacked leaf; None if it is float."""
        leaf = jax.tree.leaves(self.params, is_leaf=is_qarray)[weight.leaf]
        return slice_qarray(leaf, weight) if isinstance(leaf, QArray) else None

    def with_weights(self, weights: Mapping[str, QArray], graph: Graph) -> "Quantized":
        """The same model with other codes for some weights."""
        leaves, tree = jax.tree.flatten(self.params, is_leaf=is_qarray)
        stacks: dict[int, dict[tuple[int, ...], QArray]] = {}
        for name, value in weights.items():
            weight = graph.weights[name]
            if weight.index:
                stacks.setdefault(weight.leaf, {})[weight.index] = value
            else:
                leaves[weight.leaf] = value
        for leaf, parts in stacks.items():
            leaves[leaf] = _restack(leaves[leaf], graph.leaves[leaf][1], parts)
        return dataclasses.replace(self, params=jax.tree.unflatten(tree, leaves))

    def with_activations(self, activations: Mapping[str, Grid]) -> "Quantized":
        """The same model with other grids for some activations."""
        return dataclasses.replace(self, activations={**self.activations, **activations})

    def with_report(self, report) -> "Quantized":
        """The same model with a report."""
        return dataclasses.replace(self, program=dataclasses.replace(self.program, report=report))

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params, is_leaf=is_qarray)
        quantized = sum(isinstance(leaf, QArray) for leaf in leaves)
        return f"Quantized({quantized} of {len(leaves)} params, {len(self.activations)} activations)"


def slice_qarray(array: QArray, weight: Weight) -> QArray:
    """The QArray of a weight out of the QArray of its leaf (the same, unless the leaf is a stack)."""
    depth = len(weight.index)
    if not depth:
        return array
    lead = array.codes.shape[:depth]
    grid = jax.tree.map(lambda g: _unmerge(g, lead)[weight.index], array.grid)
    axes = tuple(a - depth for a in array.channel_axes if a >= depth)
    return QArray(array.codes[weight.index], grid, array.format, axes, array.dtype)


def _unmerge(grid, lead):
    return grid.reshape(*lead, -1, *grid.shape[1:])


def _restack(leaf, shape, parts: Mapping[tuple[int, ...], QArray]) -> QArray:
    """A stacked leaf from its slices; slices that are not given keep their codes."""
    depth = len(next(iter(parts)))
    lead, example = tuple(shape[:depth]), next(iter(parts.values()))
    axes = (*range(depth), *(a + depth for a in example.channel_axes))
    if isinstance(leaf, QArray):
        codes, grid = leaf.codes, jax.tree.map(lambda g: _unmerge(g, lead), leaf.grid)
    else:
        codes = jnp.zeros(shape, example.codes.dtype)
        grid = jax.tree.map(lambda g: jnp.zeros((*lead, *g.shape), g.dtype), example.grid)
    for index, part in parts.items():
        codes = codes.at[index].set(part.codes)
        grid = jax.tree.map(lambda g, p, at=index: g.at[at].set(p), grid, part.grid)
    grid = jax.tree.map(lambda g: g.reshape(-1, *g.shape[depth + 1 :]), grid)
    return QArray(codes, grid, example.format, axes, example.dtype)


@jax.jit
def _decode(array: QArray):
    return array.decode()


@jax.jit
def _call(quantized: Quantized, inputs):
    return quantized.apply_fn(quantized.params, inputs)


def _apply(program: Program, activations: Mapping[str, Grid], params, inputs):
    params = jax.tree.map(lambda x: x.decode() if isinstance(x, QArray) else x, params, is_leaf=is_qarray)
    if not program.sites:
        return program.apply_fn(params, inputs)
    graph = _traced(program.apply_fn, _Types.of(params), _Types.of(inputs))
    block = whole(graph)
    missing = [name for name, _ in program.sites if name not in block.sites]
    if missing:
        raise ValueError(
            f"The model was quantized with activations named {', '.join(missing)}, which this apply_fn does not have. "
            f"It has {', '.join(block.sites)}: use the apply_fn that was quantized, and if it loops over time, on sequences as long."
        )
    values = dict(zip(graph.flat.inputs[graph.num_leaves :], jax.tree.leaves(inputs), strict=True))
    hooks = quantize_hooks(block, dict(program.sites), activations, program.whole_values)
    leaves = jax.tree.leaves(params)
    operands = [values[i] for i in block.ins], param_values(graph, block, leaves), block.constants
    outputs = run(block.program, *operands, on_op=fast_op, **hooks)
    return jax.tree.unflatten(graph.out_tree, outputs)


def quantize_hooks(
    block: Block, formats: Mapping[str, Activation], grids: Mapping[str, Grid], whole_values: bool, drop: tuple[float, jax.Array] | None = None
) -> dict:
    """Hooks of `run` that quantize activations: whole values, or what ops read of them. `Sparq` and `PerToken` change what ops alone read.

    `drop` (probability, key): each element stays float with this probability, as QDrop learns.
    """

    def quantize(site: int, x):
        name = block.sites[site]
        if formats.get(name) is None or name not in grids:
            return x
        grid = jax.tree.map(jnp.squeeze, grids[name])
        rounded = fake_quantize(x, grid.scale, grid.zero_point, activation_grid(formats[name]).bits)
        return rounded if drop is None else dropped(drop[0], jax.random.fold_in(drop[1], site), x, rounded)

    hooks = site_hooks(block.program, quantize, whole_values)

    def recoded(number: int, x):
        read, x = block.program.reads[number], hooks["on_input"](number, x)
        name, step = block.sites[read.site] if read.site >= 0 else None, block.program.steps[read.step][0]
        format = formats.get(name)
        if isinstance(format, PerToken):
            rounded = format.fake_quantize(x, token_axes(read, step))
        elif isinstance(format, Sparq) and name in grids:
            rounded = format.fake_recode(x, jnp.squeeze(grids[name].scale), contraction_axis(read, step)[0])
        else:
            return x
        # the same key: what stayed float there stays float here
        return rounded if drop is None else dropped(drop[0], jax.random.fold_in(drop[1], read.site), x, rounded)

    return hooks | {"on_input": recoded}


def site_hooks(program: BlockProgram, quantize: Callable[[int, jax.Array], jax.Array], whole_values: bool) -> dict:
    """Hooks of `run` that call `quantize(site, x)` on whole values, or on what ops read of them.

    A value of whole numbers, as pixels, can hold no grid's points: there ops alone read them.
    """
    whole_numbers: set[int] = set()

    def on_value(site: int, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            whole_numbers.add(site)
            return x
        return quantize(site, x)

    def on_input(number: int, x):
        read = program.reads[number]
        inside = whole_values and read.site >= 0 and program.sites[read.site] >= 0 and read.site not in whole_numbers
        return x if read.site < 0 or inside else quantize(read.site, x)

    return {"on_input": on_input, "on_value": on_value} if whole_values else {"on_input": on_input}


def dropped(probability: float, key: jax.Array, x: jax.Array, rounded: jax.Array) -> jax.Array:
    """Element by element x with this probability, else its rounded value. Source: QDrop, eq. 6, https://arxiv.org/abs/2203.05740"""
    return jnp.where(_coins(probability, key, x.shape), x, rounded)


def _coins(probability: float, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """True with this probability, element by element.

    A coin takes as few random bits as tell the probability exactly (one half: one bit, 32 coins from a word), else 32: on a CPU a word
    takes 19 ns, more than the convolutions of an early block have for an element.
    """
    bits = next(n for n in (1, 2, 4, 8, 16, 32) if n == 32 or float(probability * 2**n).is_integer())
    size = math.prod(shape[1:])  # of one example: words are not shared between examples, which devices may hold apart
    words = jax.random.bits(key, (*shape[:1], -(-size * bits // 32), 1), jnp.uint32)
    parts = words >> np.arange(0, 32, bits, dtype=np.uint32) & np.uint32(2**bits - 1)
    # compared as 0 to 2^bits − 1; at 32 bits a threshold of 2^32 would not fit
    heads = parts < np.uint32(min(round(probability * 2**bits), 2**32 - 1))
    return heads.reshape(*shape[:1], -1)[..., :size].reshape(shape)


@dataclasses.dataclass(frozen=True)
class _Types:
    """Shapes and dtypes of a tree, hashable."""

    leaves: tuple[tuple[tuple[int, ...], Any], ...]
    tree: Any

    @classmethod
    def of(cls, tree) -> "_Types":
        leaves, structure = jax.tree.flatten(jax.eval_shape(lambda t: t, tree))
        return cls(tuple((x.shape, x.dtype) for x in leaves), structure)

    def abstract(self):
        return jax.tree.unflatten(self.tree, [jax.ShapeDtypeStruct(s, d) for s, d in self.leaves])


@functools.lru_cache(maxsize=32)
def _traced(apply_fn: Callable, params: _Types, inputs: _Types) -> Graph:
    return trace(apply_fn, params.abstract(), inputs.abstract())
