"""Grids of activations, judged by what the best grid of all values does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import solvers
from brecq_jax.formats import LpRange, MinMax, TailRange, Uniform


def read(x, weight):
    """A net whose one activation is its input."""
    return jnp.einsum("...c,cd->...d", x, weight)


def grid_of(x, format, **given):
    channels = x.shape[-1]
    quantized = brecq_jax.quantize(
        jnp.eye(channels), lambda weight, x: read(x, weight), x, weights=None, activations=format, preset=None,
        solver=solvers.nearest(), progress=False, **given,
    )  # fmt: skip
    (grid,) = quantized.activations.values()
    return float(grid.scale.squeeze()), float(grid.zero_point.squeeze())


def slow_grid(x, format, importance):
    """The best of many ranges, every value looked at."""
    top, least = 2**format.bits - 1, (np.inf, 0.0)
    for factor in 0.99 ** np.arange(500):
        low, high = factor * min(x.min(), 0), factor * max(x.max(), 0)
        scale = (high - low) / top
        zero_point = np.round(-low / scale)
        error = np.mean(importance * (scale * (np.clip(np.round(x / scale) + zero_point, 0, top) - zero_point) - x) ** 2)
        least = min(least, (error, scale))
    return least


@pytest.mark.parametrize("channels", [16, 24, 64])
def test_every_channel_counts(channels):
    # 64 · 32 · 32 · 16 values are 64 times as many as are looked at: an even stride would only ever meet the first channel
    x = np.abs(jax.random.normal(jax.random.key(0), (64, 32, 32, channels))) * np.linspace(0.1, 3, channels, dtype=np.float32)
    scale, _ = grid_of(x, Uniform(3))
    energy = np.mean(x**2, axis=(1, 2, 3), keepdims=True)
    _, best = slow_grid(x, Uniform(3), 1 / energy)
    np.testing.assert_allclose(scale, best, rtol=0.06)  # the rule's factors are 4 % apart


def test_a_sorted_set_is_seen_from_end_to_end():
    x = np.abs(np.array(jax.random.normal(jax.random.key(0), (1024, 8, 8))))
    mixed, _ = grid_of(x * np.where(np.arange(1024) % 4 == 0, 5, 1)[:, None, None].astype(np.float32), Uniform(4))
    ordered, _ = grid_of(x * np.where(np.arange(1024) < 768, 1, 5)[:, None, None].astype(np.float32), Uniform(4))
    np.testing.assert_allclose(ordered, mixed, rtol=0.1)


def test_one_value_in_a_million_does_not_set_the_range():
    x = np.array(jax.random.normal(jax.random.key(0), (32, 64, 64, 8)))
    plain, _ = grid_of(x, Uniform(4))
    x[3, 5, 7, 2] = 20.0
    scale, _ = grid_of(x, Uniform(4))
    np.testing.assert_allclose(scale, plain, rtol=0.3)
    widest, zero_point = grid_of(x, Uniform(4, ranges=MinMax()))
    assert widest * (15 - zero_point) > 18


def test_a_few_loud_examples_do_not_set_the_range():
    x = np.array(jax.random.normal(jax.random.key(0), (32, 16, 16, 8)))
    plain, _ = grid_of(x, Uniform(4))
    x[:2] *= 40
    scale, _ = grid_of(x, Uniform(4))
    assert scale < 2 * plain
    assert grid_of(x, Uniform(4, ranges=LpRange()))[0] > 2 * scale


def test_examples_of_nothing_but_zeros_are_allowed():
    x = np.array(jax.random.normal(jax.random.key(0), (32, 8)))
    x[5:] = 0
    scale, _ = grid_of(x, Uniform(4))
    assert 0.1 < scale < 1
    assert np.isfinite(grid_of(np.zeros((32, 8), np.float32), Uniform(4))[0])


def test_weights_and_activations_have_their_own_rules():
    graph = brecq_jax.trace(lambda weight, x: read(x, weight), jnp.eye(4), jnp.ones((2, 4)))
    plan = brecq_jax.make_plan(graph, Uniform(4), Uniform(4))
    (weight,), (activation,) = plan.weights.values(), plan.activations.values()
    assert (weight.ranges, activation.ranges) == (None, TailRange())
    rows = jax.random.t(jax.random.key(0), 3, (4, 256))
    np.testing.assert_array_equal(Uniform(4).fit(rows).scale, Uniform(4, ranges=LpRange()).fit(rows).scale)
