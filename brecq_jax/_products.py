"""Products of two values, as attention's q·kᵀ and p·v: what they read is quantized by rules, as what weighted ops read is."""

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from brecq_jax._jaxpr import STRUCTURAL, Flat, Step

INDEX = r"\[\d+\]"  # of a slice of a stacked leaf


@dataclasses.dataclass(frozen=True)
class Factor:
    """One operand of a product of two values. `name`: its product's, and its side: `attn/product/left`."""

    name: str
    step: int
    data: int  # id of the operand
    data_position: int
    token_axis: int  # of the operand: along it lie the elements of one token, or of one head of it
    site: str  # name of the value that `data` is, up to reshapes and casts: that of the first op, or else factor, that reads it
    site_value: int  # its id
    made_of: tuple[str, ...]  # weights, the nearest before it
    kind: str = "product"


class Product(NamedTuple):
    """A matrix product of two real values that depend on the inputs. `macs`: multiply-accumulates of the traced batch."""

    name: str
    factors: tuple[Factor, ...]  # two, or the one of x·xᵀ
    macs: int


def find_products(flat: Flat, data: set[int], weight_of: Mapping[int, str], sites: dict[int, str]) -> tuple[Product, ...]:
    """The products of a program, in its order.

    A product is named by what the weights have in common from which its operands come, the nearest of them: `blocks_0/attn/product`
    of `blocks_0/attn/query/kernel` and `…/key/kernel`, then `…/product#2`; where they have nothing in common, `product`.

    Args:
      data: ids that depend on the inputs.
      weight_of: step -> the weight that it joins with the data.
      sites: id -> name, of values that weighted ops read; those that products read are added.
    """
    maker = {out: step for step in flat.steps for out in step.outputs}
    nearest: dict[int, frozenset[str]] = {}
    counts: dict[str, int] = {}
    found = []
    for position, step in enumerate(flat.steps):
        above = frozenset().union(*(nearest.get(i, ()) for i in step.inputs))
        nearest.update(dict.fromkeys(step.outputs, frozenset((weight_of[position],)) if position in weight_of else above))
        operands = [step.operand(p) for p in (0, 1)] if step.primitive == "dot_general" else []
        if not operands or not data.issuperset(operands) or not all(jnp.issubdtype(flat.types[i].dtype, jnp.floating) for i in operands):
            continue
        name = _name(above)
        counts[name] = counts.get(name, 0) + 1
        name = f"{name}#{counts[name]}" if counts[name] > 1 else name
        factors = []
        for place, operand in enumerate(dict.fromkeys(operands)):
            side = ("left", "right")[place]
            chain, value = _chain(maker, operand)
            own = f"{name}/{side}"
            weights = tuple(sorted(nearest.get(value, ())))
            factors.append(Factor(own, position, operand, place, _token_axis(flat, chain, value), sites.setdefault(value, own), value, weights))
        found.append(Product(name, tuple(factors), dense_macs(flat, step)))
    return tuple(found)


def site_value(maker: Mapping[int, Step], value: int) -> int:
    """The value that another is, up to reshapes and casts."""
    return _chain(maker, value)[1]


def dense_macs(flat: Flat, step: Step) -> int:
    """Multiply-accumulates of a matrix product."""
    # No int(): a program that is exported has a batch size without a number.
    (lhs, _), _ = step.params["dimension_numbers"]
    shape = flat.types[step.operand(0)].shape
    return flat.types[step.outputs[0]].size * math.prod(shape[a] for a in lhs)


def _name(weights: Collection[str]) -> str:
    """`layers[0]/product` of `layers/query[0]/kernel` and `layers/key[0]/kernel`."""
    indices = {"".join(re.findall(INDEX, weight)) for weight in weights}
    modules = [re.sub(INDEX, "", weight).split("/")[:-1] for weight in weights]
    common = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*modules, strict=False))]
    index = indices.pop() if len(indices) == 1 else ""
    return f"{'/'.join(common)}{index}/product" if common else f"product{index}"


def _chain(maker: Mapping[int, Step], value: int) -> tuple[list[Step], int]:
    """The reshapes, transposes and casts that made a value, in program order, and what they were made of."""
    steps: list[Step] = []
    while value in maker and maker[value].primitive in STRUCTURAL:
        steps.append(maker[value])
        value = steps[-1].inputs[0]
    return steps[::-1], value


def _token_axis(flat: Flat, chain: Sequence[Step], value: int) -> int:
    """The axis of an operand that a step along the last axis of the value it is made of moves along."""
    axis = len(flat.types[value].shape) - 1
    for step in chain:
        old, new = flat.types[step.inputs[0]].shape, flat.types[step.outputs[0]].shape
        if step.primitive == "transpose":
            axis = step.params["permutation"].index(axis)
        elif step.primitive == "broadcast_in_dim":
            axis = step.params["broadcast_dimensions"][axis]
        elif step.primitive == "squeeze":
            axis -= sum(d < axis for d in step.params["dimensions"])
        elif step.primitive == "reshape":
            behind = math.prod(old[axis + 1 :])
            fits = [a for a in range(len(new)) if math.prod(new[a + 1 :]) == behind]
            axis = next((a for a in reversed(fits) if new[a] != 1), len(new) - 1)
    return axis
