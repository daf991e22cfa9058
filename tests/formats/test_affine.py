"""Grids with a zero point between integers, and the ranges of least L_p error on exact densities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brecq_jax.formats import Affine, Grid, LpRange, MinMax, Uniform, fake_quantize, mean_corrected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mid_rise_points_mirror_zero_and_leave_it_out(bits):
    """ŵ = qΔ − α with Δ = 2α / (2^b − 1), q = round(clip((w + α) / Δ, 0, 2^b − 1)), halves to even: LAPQ's formula."""
    top = 2**bits - 1
    alpha = top / 2  # Δ is 1: ties are exact
    w = np.arange(-2 * top, 2 * top + 1, dtype=np.float32) / 2  # every point, every tie, and beyond
    expected = np.round(np.clip(w + alpha, 0, top)) - alpha
    grid = Grid(*(jnp.full((1, 1, 1), x, jnp.float32) for x in (1.0, alpha)))
    format = Affine(bits, symmetric=True, ranges=MinMax())
    given = format.fit(jnp.array([[-alpha, 0.5]]))
    np.testing.assert_array_equal(np.asarray(given).ravel(), np.asarray(grid).ravel())
    points = np.asarray(format.decode(jnp.arange(top + 1, dtype=jnp.uint8)[None], grid))[0]
    np.testing.assert_array_equal(points, -points[::-1])
    assert len(points) == 2**bits and 0 not in points and points[-1] == alpha
    np.testing.assert_array_equal(format.decode(format.encode(jnp.asarray(w)[None], grid), grid)[0], expected)
    np.testing.assert_array_equal(fake_quantize(jnp.asarray(w), jnp.float32(1), jnp.float32(alpha), bits), expected)


def test_a_free_zero_point_meets_both_ends():
    rows = jnp.array([[-0.37, 0.1, 1.0]])
    format = Affine(2, ranges=MinMax())
    decoded = format.decode(format.encode(rows, format.fit(rows)), format.fit(rows))
    np.testing.assert_allclose(decoded[0, jnp.array([0, 2])], rows[0, jnp.array([0, 2])], rtol=1e-6)
    grid = format.fit(rows)
    assert format.storage_bits(rows, grid) == 3 * 2 + 64
    assert Affine(2, symmetric=True).storage_bits(rows, grid) == 3 * 2 + 32


def test_the_gradient_of_a_grid_between_integers_is_straight_through():
    x = jnp.array([-9.0, -0.3, 0.4, 9.0])
    quantize = functools.partial(fake_quantize, zero_point=jnp.float32(1.5), bits=2)
    by_x = jax.grad(lambda x: quantize(x, jnp.float32(1)).sum())(x)
    np.testing.assert_array_equal(by_x, [0, 1, 1, 0])
    by_scale = jax.jacobian(lambda s: quantize(x, s))(jnp.float32(1))
    np.testing.assert_allclose(by_scale, [-1.5, -0.5 + 0.3, 0.5 - 0.4, 1.5], rtol=1e-5)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", 4])
@pytest.mark.parametrize("kind", [Uniform, Affine])
def test_corrected_means_are_those_of_the_rows_and_codes_stay(kind, granularity):
    rows = jax.random.normal(jax.random.key(0), (5, 8)) + jnp.linspace(-1, 1, 5)[:, None]
    format = kind(2, granularity=granularity)
    grid = format.fit(rows)
    codes = format.encode(rows, grid)
    assert jnp.abs(format.decode(codes, grid) - rows).mean(1).max() > 0.05
    read, moved = mean_corrected(format, codes, grid, rows)
    decoded = read.decode(codes, moved)
    np.testing.assert_allclose(decoded.mean(1), rows.mean(1), atol=1e-6)
    np.testing.assert_array_equal(moved.scale, grid.scale)
    np.testing.assert_array_equal(read.encode(decoded, moved), codes)
    assert read.storage_bits(codes, moved) == 5 * 8 * 2 + 32 * (grid.scale.size + moved.zero_point.size)


# α*/σ of least E|x − x̂|^p, p = 2, 2.5, 3, 4, by quadrature; at p = 2 the errors are those of Max 1960's uniform quantizers.
GAUSSIAN = {2: (1.4935, 1.5977, 1.6942, 1.8698), 3: (2.0511, 2.2003, 2.3386, 2.5902), 4: (2.5140, 2.7069, 2.8857, 3.2110)}
MAX_1960 = {2: 0.118846, 3: 0.03744, 4: 0.011543}
HALF_NORMAL = {2: (1.9523, 2.093, 2.2234, 2.4606), 3: (2.4739, 2.6627, 2.8378, 3.1563), 4: (2.8987, 3.1325, 3.349, 3.7421)}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("kind", "known"), [("signed", GAUSSIAN), ("half", HALF_NORMAL)], ids=["signed", "half"])
def test_lp_ranges_of_a_gaussian_are_the_known_ones(kind, known, bits):
    end = 6.0
    x = (jnp.arange(3001) - 1500) / 1500 * end if kind == "signed" else jnp.arange(3001) / 3000 * end
    density = jnp.exp(-(x**2) / 2)[None, None]
    format = Affine(bits, symmetric=True) if kind == "signed" else Uniform(bits)
    at = jax.jit(lambda p: LpRange(steps=1600, shrink=5e-4).at(p, format, x[None, None], density))
    found = [at(p) for p in (2.0, 2.5, 3.0, 4.0)]
    ends = [float(format.decode(jnp.full((1, 1), 2**bits - 1, jnp.uint8), grid)[0, 0]) for grid in found]
    np.testing.assert_allclose(ends, known[bits], atol=0.01)
    assert ends == sorted(ends) and ends[-1] <= end
    if kind == "signed":
        error = jnp.square(format.decode(format.encode(x[None], found[0]), found[0])[0] - x)
        np.testing.assert_allclose(jnp.sum(error * density) / jnp.sum(density), MAX_1960[bits], rtol=2e-3)
