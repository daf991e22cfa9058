"""Convolutions and matrix products of int8 with int32 sums, in the form that is fast on the platform they are compiled for.

Accelerators have units for s8 × s8 → s32: there XLA's own op is taken as it is. XLA:CPU has int8 kernels for matrix products
and for convolutions of more than 16 channels, and runs plain int32 loops for the others: ten times slower than with one
channel more, and a hundred times slower than shifted products for a depthwise one (one core of Zen 4, jax 0.10.2).
`jax.lax.platform_dependent` chooses when the program is lowered, so that an exported program has both forms.
"""

import itertools

import jax
import jax.numpy as jnp

from brecq_jax._jaxpr import Step

NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
FEW = 16  # channels. XLA:CPU has no int8 kernel for a convolution with no more than these, in and out (its ynn_support.cc)
VERY_FEW = 8  # input channels, below which patches and one matrix product were faster than a wider kernel


def dot(step: Step, x, w, data_position: int, weight_zero=None):
    """The dot_general of a step, of int8 codes to int32: Σ x·w, or Σ x·(w − weight_zero)."""
    operands = (x, w) if data_position == 0 else (w, x)
    sums = jax.lax.dot_general(*operands, step.params["dimension_numbers"], preferred_element_type=jnp.int32)
    return less_zero(sums, weight_zero, step, x, data_position, w.shape)


def conv(step: Step, x, w, weight_zero=None):
    """The convolution of a step, of int8 codes that are padded already, to int32: Σ x·w, or Σ x·(w − weight_zero)."""
    p = step.params
    dims, groups, strides, dilation = p["dimension_numbers"], p["feature_group_count"], p["window_strides"], p["rhs_dilation"]

    def native(x, w):
        return jax.lax.conv_general_dilated(
            x, w, strides, [(0, 0)] * len(strides), rhs_dilation=dilation, dimension_numbers=dims,
            feature_group_count=groups, preferred_element_type=jnp.int32,
        )  # fmt: skip

    def wider(x, w):
        return native(x, jnp.pad(w, ((0, 0), (0, 0), (0, 0), (0, FEW + 1 - w.shape[3]))))[..., : w.shape[3]]

    def patches(x, w):
        columns = [column for _, column in _columns(x, w, strides, dilation)]
        rows = jnp.concatenate(columns, -1).reshape(-1, len(columns) * w.shape[2])
        sums = jax.lax.dot(rows, w.reshape(-1, w.shape[3]), preferred_element_type=jnp.int32)
        return sums.reshape(*columns[0].shape[:3], -1)

    def shifted(x, w):
        columns, weights = _columns(x, w, strides, dilation), w.astype(jnp.int32)
        weights = weights if weight_zero is None else weights - weight_zero.reshape(-1)
        return sum(column.astype(jnp.int32) * weights[i, j, 0] for (i, j), column in columns)

    nhwc = (dims.lhs_spec, dims.rhs_spec, dims.out_spec) == NHWC
    if nhwc and groups == x.shape[-1] == w.shape[-1] > 1:
        return jax.lax.platform_dependent(x, w, cpu=shifted, default=lambda x, w: less_zero(native(x, w), weight_zero, step, x, 0, w.shape))
    if nhwc and groups == 1 and max(w.shape[2:]) <= FEW:
        sums = jax.lax.platform_dependent(x, w, cpu=patches if w.shape[2] < VERY_FEW else wider, default=native)
    else:
        sums = native(x, w)
    return less_zero(sums, weight_zero, step, x, 0, w.shape)


def less_zero(sums, weight_zero, step: Step, x, data_position: int, kernel_shape: tuple[int, ...]):
    """Σ x·(w − zero) = Σ x·w − zero · Σ x; `weight_zero` is shaped as an output, or None."""
    return sums if weight_zero is None else sums - weight_zero * window_sums(step, x, data_position, kernel_shape)


def window_sums(step: Step, x, data_position: int, kernel_shape: tuple[int, ...]):
    """Σ of the codes that each output sums over, int32, in the output's shape with a size 1 where only weights count.

    In float32, which holds them exactly (no op has 2^17 terms, `why_float`): XLA:CPU adds int8 along the last axis ten times slower.
    """
    p, x = step.params, x.astype(jnp.float32)
    if step.primitive == "dot_general":
        contracting, batch = (side[data_position] for side in p["dimension_numbers"])
        order = (*batch, *(a for a in range(x.ndim) if a not in (*batch, *contracting)))
        sums = x.sum(contracting).astype(jnp.int32)
        kept = [a for a in range(x.ndim) if a not in contracting]
        sums = sums.transpose([kept.index(a) for a in order])
        free = len(kernel_shape) - len(contracting) - len(batch)
        new = range(len(batch), len(batch) + free) if data_position == 1 else range(sums.ndim, sums.ndim + free)
        return jnp.expand_dims(sums, tuple(new))
    dims, groups = p["dimension_numbers"], p["feature_group_count"]
    features = dims.lhs_spec[1]
    sums = x.reshape(*x.shape[:features], groups, -1, *x.shape[features + 1 :]).sum(features + 1)
    window = [kernel_shape[a] for a in dims.rhs_spec[2:]]
    for axis, size, stride, dilation in zip(dims.lhs_spec[2:], window, p["window_strides"], p["rhs_dilation"], strict=True):
        last = sums.shape[axis] - (size - 1) * dilation
        sums = sum(jax.lax.slice_in_dim(sums, k * dilation, k * dilation + last, stride, axis) for k in range(size))
    if groups > 1:
        sums = jnp.repeat(sums, kernel_shape[dims.rhs_spec[0]] // groups, axis=features)
    return sums.astype(jnp.int32).transpose([dims.lhs_spec[dims.out_spec.index(a)] for a in range(x.ndim)])


def _columns(x, w, strides, dilation):
    """((i, j), what kernel entry (i, j) sees) of each entry: b h w c."""
    height, width = (size - (k - 1) * d for size, k, d in zip(x.shape[1:3], w.shape, dilation, strict=False))
    for i, j in itertools.product(*map(range, w.shape[:2])):
        top, left = i * dilation[0], j * dilation[1]
        yield (i, j), x[:, top : top + height : strides[0], left : left + width : strides[1]]

