"""Ops in the form that is fast on the backend at hand.

XLA's CPU backend runs a depthwise convolution some fifty times slower than the same sum written as shifted products
(18.8 against 0.35 ms, 64 channels at 14×14, batch 32), and its gradient ten times slower.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from brecq_jax._jaxpr import Step

NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def fast_op(number: int, step: Step, operands: list) -> Sequence[jax.Array] | None:
    """An `on_op` hook: the op by other means, or None where XLA's own is as good."""
    if jax.default_backend() != "cpu" or step.primitive != "conv_general_dilated" or len(operands) != 2:
        return None
    x, kernel = operands
    p = step.params
    channels = x.shape[-1]
    dims = p["dimension_numbers"]
    depthwise = p["feature_group_count"] == channels == kernel.shape[-1] > 1 and p["batch_group_count"] == 1
    if not depthwise or (dims.lhs_spec, dims.rhs_spec, dims.out_spec) != NHWC or set(p["lhs_dilation"]) != {1}:
        return None
    dtype = p["preferred_element_type"] or x.dtype
    return [_shifted_products(x.astype(dtype), kernel.astype(dtype), p["window_strides"], p["padding"], p["rhs_dilation"])]


def _shifted_products(x, kernel, strides, padding, dilation):
    """Depthwise convolution: Σ over window positions of (shifted image · kernel column). x: b h w c; kernel: h w 1 c."""
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((lo, hi, 0) for lo, hi in padding), (0, 0, 0)))
    windows = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True)]
    out = [(n - w) // s + 1 for n, w, s in zip(x.shape[1:3], windows, strides, strict=True)]
    total = 0
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            start = (0, i * dilation[0], j * dilation[1], 0)
            stop = (x.shape[0], start[1] + (out[0] - 1) * strides[0] + 1, start[2] + (out[1] - 1) * strides[1] + 1, x.shape[3])
            total = total + jax.lax.slice(x, start, stop, (1, *strides, 1)) * kernel[i, j, 0]
    return total
