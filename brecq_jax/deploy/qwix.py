"""To and from qwix, Google's quantization library for JAX: our rounding in its parameter trees, our plan as its rules.

qwix is not a dependency: `pip install qwix`, then `from brecq_jax.deploy import qwix`. Its providers take weights that are
symmetric, per channel (matrix products: in groups, too); a convolution's weights and activations must have the same type.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import qwix

from brecq_jax._graph import Graph, leaf_names
from brecq_jax._model import Program, Quantized
from brecq_jax._plan import Plan
from brecq_jax._qarray import QArray, from_rows, is_qarray, to_rows
from brecq_jax.formats import Format, Grid, Uniform


def rules(graph: Graph, plan: Plan) -> list[qwix.QuantizationRule]:
    """The plan as rules for `qwix.PtqProvider`, one for each module that holds a quantized weight.

        rules = qwix.rules(brecq_jax.trace(model.apply, variables, images), plan)

    Activations that qwix quantizes have the bits of ours and ranges of qwix's own, found at each call. What products of two values read
    stays float: its rules here are for modules that hold weights.

    Raises:
      ValueError: a weight whose format qwix has no name for, or a convolution with different bits of weights and activations.
    """
    found = {}
    for op in graph.ops:
        format, reads = plan.weights[op.weight], plan.activations.get(op.site)
        if format is None:
            continue
        _check(op.weight, format, grouped=op.kind == "dense")
        if op.kind == "conv" and (reads is None or reads.bits != format.bits):
            given = "float" if reads is None else f"{reads.bits} bit"
            raise ValueError(
                f"qwix: {op.name} has {format.bits}-bit weights and reads {given} activations, and qwix convolves equal types alone. "
                f"Give it activations of {format.bits} bits, or None as its weights."
            )
        found[op.weight.rpartition("/")[0]] = qwix.QuantizationRule(
            module_path=re.escape(op.weight.rpartition("/")[0]),
            weight_qtype=_qtype(format.bits),
            act_qtype=None if reads is None else _qtype(reads.bits),
            tile_size=format.granularity if isinstance(format.granularity, int) else None,
        )
    return list(found.values())


def to_qwix(quantized: Quantized, abstract: Any) -> Any:
    """The parameters for a model of `qwix.quantize_model`: our codes and scales where it holds its own.

        model = qwix.quantize_model(model, qwix.PtqProvider(rules))
        logits = model.apply(to_qwix(quantized, jax.eval_shape(model.init, key, images)), images)

    Args:
      abstract: the quantized model's variables, as `jax.eval_shape` of its init gives them.

    Raises:
      ValueError: a weight that is quantized here and float there, or the reverse, or has scales of other shapes.
    """
    ours, tree = jax.tree.flatten(quantized.params, is_leaf=is_qarray)
    theirs = tree.flatten_up_to(abstract)
    names = leaf_names(jax.tree.unflatten(tree, range(len(ours))))
    return jax.tree.unflatten(tree, [_into(*one) for one in zip(names, ours, theirs, strict=True)])


def from_qwix(params: Any, apply_fn: Callable[[Any, Any], Any]) -> Quantized:
    """A Quantized from a qwix parameter tree (of `qwix.quantize_params`, say): codes as they are, activations float.

    Raises:
      ValueError: a type other than int2 to int8, or scales that neither a channel nor the whole tensor shares.
    """
    leaves, tree = jax.tree.flatten(params, is_leaf=_is_qwix)
    names = leaf_names(jax.tree.unflatten(tree, range(len(leaves))))
    ours = [_out_of(name, getattr(x, "array", x)) if _is_qwix(x) else x for name, x in zip(names, leaves, strict=True)]
    return Quantized(jax.tree.unflatten(tree, ours), {}, Program(apply_fn, (), False))


def _into(name: str, ours: Any, theirs: Any):
    if not isinstance(ours, QArray):
        if _is_qwix(theirs):
            raise ValueError(f"qwix: {name} is float here and quantized there. Leave it out of the rules.")
        return ours
    if not _is_qwix(theirs):
        raise ValueError(f"qwix: {name} is quantized here and float there. Write a rule for it, as `rules` does.")
    target = theirs.array
    half = 2 ** (ours.format.bits - 1)
    _check(name, ours.format, grouped=True)
    groups = ours.grid.scale.shape[1]
    if groups > 1 and len(ours.shape) - len(ours.channel_axes) != 1 or math.prod(target.scale.shape) not in (1, ours.grid.scale.size):
        raise ValueError(f"qwix: {name} has {ours.grid.scale.size} scales here and an array of {target.scale.shape} there.")
    axes = ours.channel_axes if ours.grid.scale.shape[0] > 1 else ()
    scale = from_rows(ours.grid.scale[..., 0], tuple(n if a in axes else groups for a, n in enumerate(ours.shape)), axes)
    qvalue = (ours.codes.astype(jnp.int16) - half).astype(target.qvalue.dtype)
    array = target.replace(qvalue=qvalue, scale=scale.reshape(target.scale.shape).astype(target.scale.dtype))
    return theirs.replace(array=array)


def _out_of(name: str, array: qwix.QArray) -> QArray:
    kind = array.qtype if isinstance(array.qtype, str) else jnp.dtype(array.qtype or array.qvalue.dtype).name
    match = re.fullmatch("int([2-8])", kind)
    axes = tuple(a for a, n in enumerate(array.scale.shape) if n > 1)
    if match is None or any(array.scale.shape[a] != array.qvalue.shape[a] for a in axes):
        raise ValueError(
            f"qwix: {name} is {kind} with scales of {array.scale.shape}; what can be taken is int2 to int8 "
            "with one scale for each channel, or for all."
        )
    bits = int(match[1])
    half = 2 ** (bits - 1)
    format = Uniform(bits, symmetric=array.zero_point is None, granularity="per_channel" if axes else "per_tensor")
    scale = to_rows(array.scale, axes).reshape(-1, 1, 1).astype(jnp.float32)
    zero = jnp.zeros_like(scale) if array.zero_point is None else to_rows(array.zero_point, axes).reshape(-1, 1, 1).astype(jnp.float32)
    codes = (array.qvalue.astype(jnp.int16) + half).astype(jnp.uint8)
    return QArray(codes, Grid(scale, zero + half), format, axes, jnp.dtype(array.scale.dtype).name)


def _check(name: str, format: Format, grouped: bool):
    shared = type(format) is Uniform and (grouped or not isinstance(format.granularity, int))  # Affine is one, too, and has points of its own
    if not shared or not format.symmetric:
        raise ValueError(f"qwix: {name} is {format}; qwix takes Uniform(bits, symmetric=True), for convolutions per channel.")


def _qtype(bits: int) -> str:
    return f"int{bits}"


def _is_qwix(x) -> bool:
    """A qwix.QArray, or what wraps one in a parameter tree."""
    return isinstance(getattr(x, "array", x), qwix.QArray)
