"""What the program is: a `Graph` of weighted ops with names.

A weighted op is a matrix product, convolution or lookup that joins a value derived from one parameter with a
value derived from the inputs. Nothing is registered and no class is known; names are parameter paths.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from brecq_jax._jaxpr import Flat, Step
from brecq_jax._products import Factor, Product


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter that weighted ops read: a whole leaf, or one slice of a leaf that a scan or a loop takes apart."""

    name: str
    leaf: int  # position in the flattened params
    index: tuple[int, ...]  # leading indices of the slice; () for the whole leaf
    shape: tuple[int, ...]
    channel_axes: tuple[int, ...]  # axes of `shape` that count output channels (rows, for a lookup)
    dtype: np.dtype  # of the parameter

    @property
    def float_bits(self) -> int:
        """Bits of it as it came."""
        return 8 * math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Op:
    """One use of a weight. `name` is the weight's name; a second use is `name#2`."""

    name: str
    weight: str
    kind: str  # "dense", "conv" or "embed"
    step: int  # position in the program
    data: int  # id of the operand that depends on the inputs
    data_position: int
    weight_value: int  # id of the operand that derives from the weight
    computed: tuple[str, ...]  # arithmetic between the weight and the op, if any: ("sub", "mul", …)
    macs: int  # multiply-accumulates of the traced batch
    site: str = ""  # name of the value that `data` is, up to reshapes and casts: that of the first op that reads it
    site_value: int = -1  # its id


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A traced program. `ops` and `products` (of two values) in program order; `skipped`: (what, why) kept in float."""

    flat: Flat
    ops: tuple[Op, ...]
    products: tuple[Product, ...]
    weights: dict[str, Weight]
    leaves: tuple[tuple[str, tuple[int, ...]], ...]  # (name, shape) of each flattened parameter
    origins: dict[int, tuple[int, tuple[int, ...]]]  # id -> (leaf, slice): values that are parameters
    data: frozenset[int]  # ids that depend on the inputs
    heavy: frozenset[int]  # ids that depend on the inputs through a weighted op
    skipped: tuple[tuple[str, str], ...]
    params_tree: Any
    out_tree: Any
    batch_types: Any
    at_batch: Callable[[Any], Flat]  # the program read with inputs of other shapes

    @functools.cached_property
    def by_example(self) -> frozenset[int]:
        """Ids of data that has examples on axis 0 and on no other: what grows when the batch does shows where they are.

        Where the program cannot be read at another batch size, or is another one there (of one example, say, less is broadcast),
        an axis 0 as long as the batch is taken for examples.
        """
        size, larger = jax.tree.leaves(self.batch_types)[0].shape[:1], self.at_twice
        found = self.data.intersection(i for i, t in enumerate(self.flat.types) if t.shape[:1] == size != ())
        return frozenset(i for i in found if larger is None or larger[i].shape == (2 * size[0], *self.flat.types[i].shape[1:]))

    @functools.cached_property
    def at_twice(self) -> tuple[jax.ShapeDtypeStruct, ...] | None:
        """The values' types at twice the batch, by id; None where the program cannot be read so, or is another one."""
        twice = jax.tree.map(lambda t: jax.ShapeDtypeStruct((*(2 * n for n in t.shape[:1]), *t.shape[1:]), t.dtype), self.batch_types)
        try:
            larger = self.at_batch(twice)
        except Exception:  # apply_fn is the user's, and may raise anything
            return None
        return larger.types if [s.primitive for s in larger.steps] == [s.primitive for s in self.flat.steps] else None

    @property
    def factors(self) -> tuple[Factor, ...]:
        """What the products multiply, in program order."""
        return tuple(factor for product in self.products for factor in product.factors)

    @property
    def num_leaves(self) -> int:
        return len(self.leaves)

    @property
    def float_bits(self) -> tuple[int, ...]:
        """Bits of each flattened parameter as it came."""
        types = (self.flat.types[i] for i in self.flat.inputs[: self.num_leaves])
        return tuple(8 * math.prod(t.shape) * t.dtype.itemsize for t in types)

    @property
    def other_bits(self) -> int:
        """Bits of what no op reads as its weight: biases, statistics."""
        return sum(self.float_bits) - sum(w.float_bits for w in self.weights.values())

    def leaf_name(self, leaf: int, index: tuple[int, ...] = ()) -> str:
        return slice_name(self.leaves[leaf][0], index)

    def __repr__(self) -> str:
        return f"Graph({len(self.ops)} weighted ops of {len(self.weights)} weights, {len(self.flat.steps)} steps)"


def leaf_names(params: Any) -> list[str]:
    """Names of the flattened parameters: paths joined by '/', without Linen's `params/` and NNX's `/value`."""
    names = []
    for path, _ in jax.tree.flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        name = name.removeprefix("params/")
        if name.endswith("/value"):
            name = name[: -len("/value")]
        names.append(name or "param")
    return names


def slice_name(name: str, index: tuple[int, ...]) -> str:
    """`layers/kernel`, (3,) -> `layers[3]/kernel`."""
    if not index:
        return name
    parent, _, last = name.rpartition("/")
    where = "".join(f"[{i}]" for i in index)
    return f"{parent}{where}/{last}" if parent else f"{last}{where}"


def permutation(maker: Mapping[int, Step], ndim: int, root: int, value: int) -> tuple[int, ...]:
    """For each of a value's `ndim` axes that of the parameter `root`, where nothing but transposes and casts lies between; else ().

    `maker`: the step that makes each value.
    """
    order = tuple(range(ndim))
    while value != root:
        step = maker.get(value)
        if step is None or step.primitive not in ("transpose", "convert_element_type"):
            return ()
        if step.primitive == "transpose":
            order = tuple(step.params["permutation"][a] for a in order)
        (value,) = step.inputs
    return order
