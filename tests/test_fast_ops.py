"""Fast ops against lax: the op and both its gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import _fast_ops
from brecq_jax._interpret import param_values, run, whole

DIMS = ("NHWC", "HWIO", "NHWC")
# images, side, channels in, channels out, groups, window, strides, padding, dilation
CASES = {
    "depthwise": (4, 9, 6, 6, 6, (3, 3), (1, 1), "SAME", (1, 1)),
    "depthwise, even side, stride": (4, 8, 6, 6, 6, (3, 3), (2, 2), "SAME", (1, 1)),
    "depthwise, rows left over": (3, 10, 5, 5, 5, (3, 3), (3, 2), "VALID", (1, 1)),
    "depthwise, all at once": (2, 11, 4, 4, 4, (3, 2), (1, 2), ((2, 0), (1, 3)), (2, 1)),
    "depthwise, wide window": (2, 7, 8, 8, 8, (5, 5), (1, 1), "SAME", (1, 1)),
    "depthwise, cropped": (2, 9, 4, 4, 4, (3, 3), (1, 1), ((-1, 0), (0, -2)), (1, 1)),
    "depthwise, beyond the window": (2, 6, 4, 4, 4, (3, 3), (2, 2), ((4, 5), (3, 4)), (1, 1)),
    "pointwise": (4, 6, 5, 7, 1, (1, 1), (1, 1), "SAME", (1, 1)),
    "pointwise, stride": (4, 7, 5, 7, 1, (1, 1), (2, 3), "VALID", (1, 1)),
    "plain": (4, 8, 3, 5, 1, (3, 3), (1, 1), "SAME", (1, 1)),
    "plain, all at once": (6, 9, 3, 5, 1, (3, 2), (2, 1), ((2, 0), (1, 3)), (1, 2)),
}
LEFT = {
    "two outputs for each channel": (2, 8, 4, 8, 4, (3, 3), (1, 1), "SAME", (1, 1)),
    "groups": (2, 8, 4, 4, 2, (3, 3), (1, 1), "SAME", (1, 1)),
}
SMALL = {"ELEMENTS": 500, "PART_POSITIONS": 16}  # so that small cases are done in pieces, too


def build(case, dtype=jnp.float32, preferred=None):
    """(convolution by lax, the same through `fast_op`, images, kernel)"""
    images, side, ins, outs, groups, window, strides, padding, dilation = case
    key_x, key_kernel = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (images, side, side, ins), dtype)
    kernel = jax.random.normal(key_kernel, (*window, ins // groups, outs), dtype)

    def exact(kernel, x):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=DIMS, feature_group_count=groups, preferred_element_type=preferred
        )

    graph = brecq_jax.trace(exact, kernel, x)
    block = whole(graph)
    replaced = []

    def on_op(number, step, operands):
        replaced.append(_fast_ops.fast_op(number, step, operands))
        return replaced[-1]

    def fast(kernel, x):
        return run(block.program, [x], param_values(graph, block, [kernel]), block.constants, on_op=on_op)[0]

    return exact, fast, x, kernel, replaced


def value_and_gradients(function, x, kernel):
    y, back = jax.vjp(function, kernel, x)
    slope = jax.random.normal(jax.random.key(1), y.shape).astype(y.dtype)
    return y, *back(slope)


@pytest.mark.parametrize("pieces", ["whole", "pieces"])
@pytest.mark.parametrize("name", CASES)
def test_a_fast_op_and_its_gradients_are_those_of_lax(name, pieces, monkeypatch):
    for constant, value in SMALL.items() if pieces == "pieces" else ():
        monkeypatch.setattr(_fast_ops, constant, value)
    exact, fast, x, kernel, replaced = build(CASES[name])
    got, want = value_and_gradients(fast, x, kernel), value_and_gradients(exact, x, kernel)
    assert replaced[0] is not None
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name, preferred", itertools.product(["depthwise", "pointwise", "plain"], [None, jnp.float32]))
def test_a_fast_op_keeps_dtypes(name, preferred):
    exact, fast, x, kernel, _ = build(CASES[name], jnp.bfloat16, preferred)
    want = exact(kernel, x)
    got = value_and_gradients(fast, x, kernel)
    assert [a.dtype for a in got] == [want.dtype, kernel.dtype, x.dtype]
    np.testing.assert_allclose(got[0].astype(jnp.float32), want.astype(jnp.float32), rtol=0.03, atol=0.05)


@pytest.mark.parametrize("name", ["depthwise", "pointwise, stride", "plain"])
def test_gradients_of_single_examples_can_be_mapped(name):
    """As Fisher weights are: a batch of 1 under vmap."""
    exact, fast, x, kernel, _ = build((1, *CASES[name][1:]))
    many = jnp.stack([x, 2 * x, -x])
    gradient = lambda function: jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(function(kernel, x) ** 2))))  # noqa: E731
    np.testing.assert_allclose(gradient(fast)(many), gradient(exact)(many), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", LEFT)
def test_other_convolutions_are_left_to_lax(name):
    exact, fast, x, kernel, replaced = build(LEFT[name])
    np.testing.assert_array_equal(fast(kernel, x), exact(kernel, x))
    assert replaced == [None]


def test_other_backends_are_left_to_their_own_ops(monkeypatch):
    _, fast, x, kernel, replaced = build(CASES["depthwise"])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.eval_shape(functools.partial(fast, kernel), x)
    assert replaced == [None]
