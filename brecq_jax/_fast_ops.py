"""Ops in the form that is fast on the backend at hand, with gradients to match.

XLA's CPU backend has good kernels for matrix products, and for convolutions whose output holds many positions for each
kernel entry. The rest is written here by means of what it does well: a depthwise convolution as shifted products, few
images at a time so that they stay in the cache; a 1×1 convolution as one matrix product; the kernel gradient of any other
in a few parts. `benchmarks/steps.py` measures whole iterations with and without; rules and numbers here rest on it.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from brecq_jax._jaxpr import Step

NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))

# One core of Zen 4 (1 MB of L2), jax 0.10.2, `benchmarks/steps.py`.
ELEMENTS = 2**17  # of an array that is read or added to again and again: half of the cache; 2^14 to 2^20 were as good
PARTS, PART_POSITIONS = 4, 6_272  # of a kernel gradient: so many, of no fewer outputs per channel. It pays from 28×28.

Pair = tuple[int, int]


def fast_op(number: int, step: Step, operands: list) -> Sequence[jax.Array] | None:
    """An `on_op` hook: the op by other means, or None where XLA's own is as good."""
    if jax.default_backend() != "cpu" or step.primitive != "conv_general_dilated" or len(operands) != 2:
        return None
    (x, kernel), p = operands, step.params
    if not isinstance(x.shape[0], int):  # a program that is exported, with any batch size, perhaps for another backend
        return None
    dims, groups, padding = p["dimension_numbers"], p["feature_group_count"], tuple(map(tuple, p["padding"]))
    plain = (dims.lhs_spec, dims.rhs_spec, dims.out_spec) == NHWC and set(p["lhs_dilation"]) == {1} and p["batch_group_count"] == 1
    dtype = p["preferred_element_type"] or x.dtype
    if not plain or not all(jnp.issubdtype(t, jnp.floating) for t in (x.dtype, kernel.dtype, dtype)):
        return None
    if groups == x.shape[-1] == kernel.shape[-1] > 1:
        wide = jnp.promote_types(dtype, jnp.float32)  # sums of many terms
        y = _shifted_products(x.astype(wide), kernel.astype(wide), tuple(p["window_strides"]), padding, tuple(p["rhs_dilation"]))
        return [y.astype(dtype)]
    if groups == 1 and kernel.shape[:2] == (1, 1) and padding == ((0, 0), (0, 0)):
        x = x[:, :: p["window_strides"][0], :: p["window_strides"][1]]
        y = jax.lax.dot(x.reshape(-1, x.shape[-1]), kernel[0, 0], precision=p["precision"], preferred_element_type=dtype)
        return [y.reshape(*x.shape[:-1], -1)]
    return [_in_parts(step, x, kernel)] if groups == 1 else None


def bfloat16_op(number: int, step: Step, operands: list) -> Sequence[jax.Array]:
    """An `on_op` hook: what the op multiplies in bfloat16, for matrix units that are fast in it; its result in the dtype it had."""
    types = [o.dtype for o in operands]
    narrow = [o.astype(jnp.bfloat16) if jnp.issubdtype(t, jnp.floating) else o for o, t in zip(operands, types, strict=True)]
    return [y.astype(jnp.result_type(*types)) for y in step.run(*narrow)]


# Depthwise convolutions. x: b h w c; kernel: h w 1 c.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _shifted_products(x, kernel, strides: Pair, padding: tuple[Pair, Pair], dilation: Pair):
    """Σ over window positions of (shifted image · kernel column): the depthwise convolution."""
    return _windows(x, kernel, tuple((low, high, 0) for low, high in padding), strides, dilation)


def _shifted_products_forward(x, kernel, *static):
    return _shifted_products(x, kernel, *static), (x, kernel)


def _shifted_products_backward(strides, padding, dilation, operands, slope):
    """The image's gradient is the same sum with the kernel turned around, over `slope` spread out by the strides."""
    x, kernel = operands
    spread = tuple(
        ((k - 1) * d - low, size + low - ((out - 1) * s + 1), s - 1)
        for k, d, (low, _), size, out, s in zip(kernel.shape, dilation, padding, x.shape[1:3], slope.shape[1:3], strides, strict=False)
    )
    return _windows(slope, kernel[::-1, ::-1], spread, (1, 1), dilation), _kernel_gradient(x, slope, kernel.shape, strides, padding, dilation)


_shifted_products.defvjp(_shifted_products_forward, _shifted_products_backward)


def _windows(x, kernel, padding, strides: Pair, dilation: Pair):
    """Shifted products, a few images at a time. `padding`: (low, high, interior) of height and width."""

    def some(x):
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *padding, (0, 0, 0)))
        ends = [size - (k - 1) * d for size, k, d in zip(x.shape[1:3], kernel.shape, dilation, strict=False)]
        columns = itertools.product(*map(range, kernel.shape[:2]))
        return sum(_shifted(x, (i * dilation[0], j * dilation[1]), ends, strides) * kernel[i, j, 0] for i, j in columns)

    count = _divisor(len(x), ELEMENTS // math.prod(x.shape[1:]))
    if count == len(x):
        return some(x)
    y = jax.lax.map(some, x.reshape(-1, count, *x.shape[1:]))
    return y.reshape(-1, *y.shape[2:])


def _shifted(x, start: Sequence[int], size: Sequence[int], strides: Pair):
    """x[:, i : i + height : stride, j : j + width : stride]"""
    (i, j), (height, width) = start, size
    return jax.lax.slice(x, (0, i, j, 0), (x.shape[0], i + height, j + width, x.shape[3]), (1, *strides, 1))


def _kernel_gradient(x, slope, shape, strides: Pair, padding, dilation: Pair):
    """Σ over images and positions of (shifted image · slope), row by row into sums that keep the columns.

    XLA:CPU reduces over all but the last axis with a stride of that axis, ten times slower than these running sums.
    """
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)))
    (height, width), (images, rows, columns, channels) = shape[:2], slope.shape
    count = _divisor(images, ELEMENTS // (height * columns * channels))

    def add(sums, at):
        image, row = at // rows * count, at % rows
        here = jax.lax.dynamic_slice(slope, (image, row, 0, 0), (count, 1, columns, channels))
        seen = jax.lax.dynamic_slice(x, (image, row * strides[0], 0, 0), (count, (height - 1) * dilation[0] + 1, *x.shape[2:]))
        size = (seen.shape[1], (columns - 1) * strides[1] + 1)
        shifted = (_shifted(seen, (0, j * dilation[1]), size, (dilation[0], strides[1])) for j in range(width))
        return [total + window * here for total, window in zip(sums, shifted, strict=True)], None

    sums = [jnp.zeros((count, height, columns, channels), x.dtype)] * width
    sums, _ = jax.lax.scan(add, sums, jnp.arange(images // count * rows))
    return jnp.stack(sums, 2).sum((0, 3))[:, :, None]


# Other convolutions.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_parts(step: Step, x, kernel):
    """The convolution itself. Its kernel gradient is a sum over parts of the batch."""
    return step.run(x, kernel)[0]


def _in_parts_forward(step, x, kernel):
    return _in_parts(step, x, kernel), (x, kernel)


def _in_parts_backward(step, operands, slope):
    x, kernel = operands
    (dx,) = jax.linear_transpose(lambda x: step.run(x, kernel)[0], x)(slope)
    count = len(x) // _divisor(len(x), min(PARTS, slope.size // slope.shape[-1] // PART_POSITIONS))
    parts: Iterator = ((x[n : n + count], slope[n : n + count]) for n in range(0, len(x), count))
    return dx, sum(jax.linear_transpose(lambda k, a=a: step.run(a, k)[0], kernel)(s)[0] for a, s in parts)


_in_parts.defvjp(_in_parts_forward, _in_parts_backward)


def _divisor(number: int, most: int) -> int:
    """The greatest divisor of a number that is no more than `most`, or 1."""
    return max((d for d in range(1, min(number, most) + 1) if number % d == 0), default=1)
