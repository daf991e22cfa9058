"""`trace` reads `apply_fn` into a `Graph`: one walk over its steps."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from brecq_jax import _jaxpr
from brecq_jax._graph import Graph, Op, Weight, leaf_names, permutation, slice_name
from brecq_jax._jaxpr import Flat, Step
from brecq_jax._products import Product, dense_macs, find_products, site_value


def trace(apply_fn: Callable, params: Any, batch: Any) -> Graph:
    """Read `apply_fn(params, batch)` into a Graph. Only shapes and dtypes of `params` and `batch` are used.

    Raises:
      ValueError: no weighted op derives from `params`, the parameters are closed over instead of passed, or
        `apply_fn` returns updated parameters (train mode).
    """
    abstract = jax.eval_shape(lambda *trees: trees, params, batch)
    flat, out_shape = _jaxpr.flatten(apply_fn, *abstract)
    paths, params_tree = jax.tree.flatten_with_path(abstract[0])
    leaves = tuple((name, tuple(leaf.shape)) for name, (_, leaf) in zip(leaf_names(params), paths, strict=True))
    _refuse_train_mode(abstract[0], out_shape)
    whole, flat = flat, _jaxpr.indexed(flat, len(leaves))
    reader = _Reader(flat, leaves)
    if stay := reader.uneven({flat.slices[i][0] for i in flat.slices.keys() - whole.slices.keys()}):
        flat = _jaxpr.indexed(whole, len(leaves), stay)
        reader = _Reader(flat, leaves)
    if not reader.ops:
        raise ValueError(_no_ops_message(reader, leaves))
    ops, products = reader.with_sites()
    return Graph(
        flat, ops, products, reader.weights, leaves, reader.origins,
        frozenset(reader.data), frozenset(reader.heavy), reader.all_skipped(),
        params_tree, jax.tree.structure(out_shape), abstract[1], lambda batch: _jaxpr.flatten(apply_fn, abstract[0], batch)[0],
    )  # fmt: skip


class _Reader:
    """One walk over the steps: which values depend on inputs, which on which parameter, where they meet."""

    def __init__(self, flat: Flat, leaves):
        self.flat, self.leaves = flat, leaves
        self.ops: list[Op] = []
        self.weights: dict[str, Weight] = {}
        self.skipped: dict[str, str] = {}
        self.captured: list[str] = []
        params, inputs = flat.inputs[: len(leaves)], flat.inputs[len(leaves) :]
        self.origins = {ident: (leaf, ()) for leaf, ident in enumerate(params)}
        self.roots: dict[int, frozenset[int]] = {i: frozenset((i,)) for i in params}
        self.data, self.heavy = set(inputs), set()
        self.maker: dict[int, Step] = {}
        self.read()

    def uneven(self, roots: Collection[int]) -> set[int]:
        """Those of these parameters of which some slices are no weights, or have their channels elsewhere: one array holds all codes."""
        slices: dict[int, list[Weight]] = {}
        for weight in self.weights.values():
            slices.setdefault(self.flat.inputs[weight.leaf], []).append(weight)
        left = {root for ident, (root, _) in self.flat.slices.items() if ident in self.origins and self.name_of(ident) in self.skipped}
        found = left.intersection(roots)
        for root in roots:
            weights = slices.get(root, [])
            lead = self.flat.types[root].shape[: len(weights[0].index)] if weights else ()
            if len({w.channel_axes for w in weights}) != 1 or len(weights) != math.prod(lead):
                found.add(root)
        return found

    def read(self):
        leaf_of = {ident: leaf for ident, (leaf, _) in self.origins.items()}
        for position, step in enumerate(self.flat.steps):
            is_op = self.data.intersection(step.inputs) and self.read_op(position, step)
            for out in step.outputs:
                self.maker[out] = step
                root, index = self.flat.slices.get(out, (None, ()))
                if root in leaf_of:
                    self.origins[out] = (leaf_of[root], index)
                    self.roots[out] = frozenset((out,))
                elif self.data.intersection(step.inputs):
                    self.data.add(out)
                    if is_op or self.heavy.intersection(step.inputs):
                        self.heavy.add(out)
                else:
                    self.roots[out] = frozenset().union(*(self.roots.get(i, ()) for i in step.inputs))

    def read_op(self, position: int, step: Step) -> bool:
        """Record the op of this step, if it is one. True if the step joins a parameter with the data."""
        if step.primitive not in _jaxpr.WEIGHTED:
            if _jaxpr.weighted_inside(step):
                self.skip_inside(step)
                return True
            return False
        operands = [step.operand(p) for p in (0, 1)]
        for weight_position in (0, 1) if step.primitive == "dot_general" else ((1,) if "conv" in step.primitive else (0,)):
            weight, data = operands[weight_position], operands[1 - weight_position]
            if weight in self.data or data not in self.data:
                continue
            roots = self.roots.get(weight, frozenset())
            if not roots:
                if self.flat.types[weight].ndim >= 2 and self.from_constant(weight):
                    self.captured.append(f"{step.primitive} with a captured array {self.flat.types[weight].shape}")
                return False
            return self.add_op(position, step, weight_position, weight, data, roots)
        return False

    def add_op(self, position, step, weight_position, weight, data, roots) -> bool:
        root = self.choose_root(roots, weight)
        if root is None:
            names = sorted(self.name_of(r) for r in roots)
            for name in names:
                self.skipped[name] = f"its {step.primitive} reads a combination of several parameters: {', '.join(names)}"
            return True
        leaf, index = self.origins[root]
        shape = self.flat.types[root].shape
        name = slice_name(self.leaves[leaf][0], index)
        if len(shape) < 2:
            self.skipped[name] = f"a {step.primitive} reads it, but it has fewer than two axes"
            return True
        chain = self.chain(root, weight)
        computed = tuple(s.primitive for s in chain if s.primitive not in _jaxpr.STRUCTURAL)
        if name not in self.weights:
            axes = self.channel_axes(step, weight_position, root, weight, chain, computed)
            self.weights[name] = Weight(name, leaf, index, shape, axes, self.flat.types[root].dtype)
        uses = sum(op.weight == name for op in self.ops)
        kind = {"dot_general": "dense", "gather": "embed"}.get(step.primitive, "conv")
        self.ops.append(
            Op(
                name if not uses else f"{name}#{uses + 1}",
                name, kind, position, data, 1 - weight_position, weight, computed, self.macs(step, weight),
            )  # fmt: skip
        )
        return True

    def choose_root(self, roots, weight) -> int | None:
        """The one parameter that is quantized: the only one, or the only one as large as the operand."""
        if len(roots) == 1:
            return next(iter(roots))
        size = self.flat.types[weight].size
        large = [r for r in roots if self.flat.types[r].size >= size]
        return large[0] if len(large) == 1 else None

    def chain(self, root: int, value: int) -> list[Step]:
        """Steps between a parameter and an operand, in program order."""
        found, todo = {}, [value]
        while todo:
            ident = todo.pop()
            if ident == root or ident in self.origins or ident not in self.maker:
                continue
            step = self.maker[ident]
            if id(step) not in found:
                found[id(step)] = step
                todo.extend(step.inputs)
        return [s for s in self.flat.steps if id(s) in found]

    def channel_axes(self, step, weight_position, root, weight, chain, computed) -> tuple[int, ...]:
        ndim = self.flat.types[weight].ndim
        if step.primitive == "gather":
            axes = tuple(step.params["dimension_numbers"].start_index_map)
        elif step.primitive == "dot_general":
            contracting = step.params["dimension_numbers"][0][weight_position]
            axes = tuple(a for a in range(ndim) if a not in contracting)
        else:
            axes = (step.params["dimension_numbers"].rhs_spec[0],)
        if not chain or self.flat.types[root].shape == self.flat.types[weight].shape and computed:
            return axes
        return self.axes_before(root, weight, [s for s in chain if s.primitive in _jaxpr.MOVING], axes)

    def axes_before(self, root, weight, chain, axes) -> tuple[int, ...]:
        """Channel axes of the parameter, given those of the operand that reshapes, transposes and slices made of it.

        Each axis of the parameter is followed by an array that holds its index: it counts channels if, in
        the operand, that index does not change along the other axes.
        """
        order = permutation(self.maker, self.flat.types[weight].ndim, root, weight)
        if order:  # no array as large as a language model's head need be made
            return tuple(sorted(order[a] for a in axes))
        shape = self.flat.types[root].shape
        others = tuple(a for a in range(self.flat.types[weight].ndim) if a not in axes)
        found = []
        for axis in range(len(shape)):
            index = np.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
            env = {root: np.broadcast_to(index, shape).astype(np.int32)}
            for s in chain:
                if s.primitive == "convert_element_type":  # float16 has no numbers beyond 65,504
                    env.update((out, env[i]) for i, out in zip(s.inputs, s.outputs, strict=True) if i in env)
                elif all(i in env for i in s.inputs):
                    with jax.ensure_compile_time_eval():  # a model is traced inside its caller's jit, too
                        env.update(zip(s.outputs, s.run(*(env[i] for i in s.inputs)), strict=True))
            labels = np.asarray(env.get(weight, env[root]))
            if labels.ndim <= max(others, default=-1) or np.all(np.ptp(labels, axis=others) == 0):
                found.append(axis)
        return tuple(found)

    def with_sites(self) -> tuple[tuple[Op, ...], tuple[Product, ...]]:
        """The ops, and the products of two values, with the names of what they read."""
        names: dict[int, str] = {}
        found = []
        for op in self.ops:
            value = site_value(self.maker, op.data)
            found.append(dataclasses.replace(op, site=names.setdefault(value, op.name), site_value=value))
        return tuple(found), find_products(self.flat, self.data, {op.step: op.weight for op in self.ops}, names)

    def macs(self, step, weight) -> int:
        out = self.flat.types[step.outputs[0]]
        size = self.flat.types[weight].size
        if step.primitive == "gather":
            return 0
        if step.primitive == "dot_general":
            return dense_macs(self.flat, step)
        channels = self.flat.types[weight].shape[step.params["dimension_numbers"].rhs_spec[0]]
        return out.size * size // max(channels, 1)

    def skip_inside(self, step):
        for ident in step.inputs:
            for root in self.roots.get(ident, ()):
                if self.flat.types[root].ndim >= 2:
                    self.skipped[self.name_of(root)] = f"it is read inside a `{step.primitive}`, which stays whole"

    def from_constant(self, ident) -> bool:
        return ident in self.flat.constants or any(
            self.from_constant(i) for i in (self.maker[ident].inputs if ident in self.maker else ())
        )

    def name_of(self, root) -> str:
        leaf, index = self.origins[root]
        return slice_name(self.leaves[leaf][0], index)

    def all_skipped(self) -> tuple[tuple[str, str], ...]:
        used = {w.leaf for w in self.weights.values()}
        for leaf, (name, shape) in enumerate(self.leaves):
            if len(shape) >= 2 and leaf not in used and name not in self.skipped:
                self.skipped[name] = "no matrix product, convolution or lookup joins it with the inputs"
        for what in self.captured:
            self.skipped[what] = "it is captured by the function, not one of its parameters"
        return tuple((n, why) for n, why in self.skipped.items() if n not in self.weights)


def _refuse_train_mode(params, out_shape):
    """Outputs that are parameters again (batch statistics) mean that apply_fn trains."""
    known = {
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)
        for path, leaf in jax.tree.flatten_with_path(params)[0]
    }
    for path, leaf in jax.tree.flatten_with_path(out_shape)[0]:
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        for start in range(len(parts) - 1):
            tail = "/".join(parts[start:])
            if (tail, leaf.shape) in known and "/" in tail:
                raise ValueError(
                    f"apply_fn returns an updated parameter, {tail!r}: it runs in train mode. Quantize the model in "
                    "inference mode: pass train=False (or use_running_average=True) and no `mutable=`."
                )


def _no_ops_message(reader: _Reader, leaves: Sequence) -> str:
    if reader.captured:
        return (
            "apply_fn's weights are closed over instead of passed: no matrix product, convolution or lookup reads "
            f"`params`, but there is a {reader.captured[0]}. Write apply_fn so that it takes them, as "
            "`lambda params, x: model.apply(params, x)`; for an NNX module use `brecq_jax.from_nnx(module)`."
        )
    names = ", ".join(name for name, _ in leaves[:8]) or "none"
    return (
        "apply_fn has no op that can be quantized: no matrix product, convolution or lookup joins a parameter with "
        f"the inputs. The parameters are: {names}."
        + "".join(f"\n  {name}: {why}" for name, why in reader.skipped.items())
    )
