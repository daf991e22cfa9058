"""Uniform grids: their settings, their cost, and the straight-through gradient.

Where a type or a shape is wrong, the type checker of the test run may speak before we do: those tests accept both.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brecq_jax.formats import Grid, MinMax, Uniform, fake_quantize


@pytest.mark.parametrize("bits", [4.0, "4", True, None])
def test_bits_of_another_type_are_refused(bits):
    with pytest.raises(TypeError):
        Uniform(bits)


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match="write an int from 2 to 8"):
        Uniform(bits)


@pytest.mark.parametrize("granularity", ["channel", 0, -8, True])
def test_an_unknown_granularity_is_refused(granularity):
    with pytest.raises((TypeError, ValueError), match="per_channel"):
        Uniform(4, granularity=granularity)


def test_a_range_rule_without_brackets_is_refused():
    with pytest.raises(TypeError, match="ranges"):
        Uniform(4, ranges=MinMax)


def test_a_group_size_that_does_not_divide_the_channel_is_refused_with_one_that_does():
    format = Uniform(4, granularity=10)
    for refuse in (lambda: format.check((3, 48)), lambda: format.fit(jnp.ones((3, 48)))):
        with pytest.raises(ValueError, match="10 does not divide the 48.*\n.*granularity=8"):
            refuse()
    format.check((3, 50))
    with pytest.raises(ValueError, match="granularity=48"):  # at once: a damaged file may say so
        Uniform(4, granularity=10**30).check((3, 48))


def test_importance_of_another_shape_is_refused():
    with pytest.raises((TypeError, ValueError), match="importance"):
        Uniform(4).fit(jnp.ones((3, 8)), jnp.ones((3, 1)))


@pytest.mark.parametrize(
    "granularity, shape",
    [("per_tensor", (1, 1, 1)), ("per_channel", (3, 1, 1)), (None, (3, 1, 1)), (4, (3, 2, 1)), (8, (3, 1, 1))],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_shares_a_scale_and_what_it_costs(granularity, shape, symmetric):
    format, rows = Uniform(4, symmetric, granularity), jnp.arange(24.0).reshape(3, 8)
    grid = format.fit(rows)
    codes = format.encode(rows, grid)
    assert grid.scale.shape == grid.zero_point.shape == shape
    assert grid.scale.dtype == grid.zero_point.dtype == jnp.float32
    assert format.storage_bits(codes, grid) == 24 * 4 + np.prod(shape) * (32 + (0 if symmetric else 4))
    assert format.storage_bits(*jax.eval_shape(lambda: (codes, grid))) == format.storage_bits(codes, grid)


def test_each_group_is_fitted_as_if_alone():
    rows = jax.random.normal(jax.random.key(0), (3, 8)) * jnp.arange(1, 9)
    grouped, alone = Uniform(3, granularity=4).fit(rows), Uniform(3).fit(rows.reshape(6, 4))
    np.testing.assert_array_equal(grouped.scale.reshape(6, 1, 1), alone.scale)
    np.testing.assert_array_equal(grouped.zero_point.reshape(6, 1, 1), alone.zero_point)


def test_zero_points_are_whole_numbers_within_the_codes():
    rows = jnp.array([[-3.0, -1.0], [1.0, 3.0], [-1.0, 2.2], [0.0, 0.0]])
    np.testing.assert_array_equal(Uniform(2, ranges=MinMax()).fit(rows).zero_point.ravel(), [3, 0, 1, 0])
    np.testing.assert_array_equal(Uniform(2, symmetric=True).fit(rows).zero_point.ravel(), [2, 2, 2, 2])


def test_halves_round_to_the_even_integer():
    grid = Grid(jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 3.0))
    rows = jnp.array([[-1.5, -0.5, 0.5, 1.5, 2.5]])
    np.testing.assert_array_equal(Uniform(3).encode(rows, grid), [[1, 3, 3, 5, 5]])


def test_an_exact_point_may_still_choose_the_next_one():
    grid = Grid(jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 1.0))
    low, high = Uniform(2).neighbors(jnp.array([[-1.0, 0.0, 2.0, -1.1, 2.1]]), grid)
    np.testing.assert_array_equal(low, [[0, 1, 3, 0, 3]])
    np.testing.assert_array_equal(high, [[1, 2, 3, 0, 3]])


@pytest.mark.parametrize("bits", range(2, 9))
def test_fake_quantize_is_decode_of_encode(bits):
    rows = 2 * jax.random.normal(jax.random.key(bits), (4, 64))
    format = Uniform(bits)
    grid = format.fit(rows)
    fake = fake_quantize(rows, grid.scale[..., 0], grid.zero_point[..., 0], bits)
    np.testing.assert_allclose(fake, format.decode(format.encode(rows, grid), grid), rtol=1e-6)


def test_fake_quantize_has_the_gradient_of_lsq():
    """Esser et al. 2020, eqs. 3 and 5, written out in numpy: Q_N = zero_point = 2, Q_P = 5, scale 0.3."""
    x, scale, q_n, q_p = np.linspace(-2, 3, 101, dtype=np.float32), np.float32(0.3), 2, 5
    v = x / scale
    inside = (-q_n < v) & (v < q_p)
    by_scale = np.where(inside, np.round(v) - v, np.where(v <= -q_n, -q_n, q_p))

    def one(x, scale):
        return fake_quantize(x, scale, jnp.float32(q_n), 3)

    grads = jax.vmap(jax.grad(one, argnums=(0, 1)), (0, None))(jnp.asarray(x), jnp.asarray(scale))
    np.testing.assert_allclose(grads[0], inside, atol=1e-6)
    np.testing.assert_allclose(grads[1], by_scale, atol=1e-5)


def test_fake_quantize_is_finite_on_the_grid_of_a_dead_tensor():
    grid = Uniform(4, granularity="per_tensor").fit(jnp.zeros((1, 8)))
    x = jnp.array([0.0, 1.0, -1e9, 1e9])
    total = lambda x, scale: jnp.sum(fake_quantize(x, scale, grid.zero_point[0, 0], 4))  # noqa: E731
    for grad in jax.grad(total, argnums=(0, 1))(x, grid.scale[0, 0]):
        assert np.all(np.isfinite(grad))


def test_fake_quantize_keeps_shape_and_dtype():
    x = jnp.ones((2, 3, 4, 5), jnp.bfloat16)
    y = fake_quantize(x, jnp.float32(0.5), jnp.float32(0), 4)
    assert y.shape == x.shape and y.dtype == x.dtype
