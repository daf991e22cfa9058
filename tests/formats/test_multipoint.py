"""Multipoint: greedy steps against brute force, the contraction bound, how many points, and integer products."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brecq_jax.formats import Binary, Multipoint
from brecq_jax.formats.multipoint import CANDIDATES, greedy_step, nearest_levels


def heavy_tails(channels=64, elements=96, seed=0):
    return jax.random.t(jax.random.key(seed), 4.0, (channels, elements))


def error(format, rows):
    """‖w − ŵ‖/‖w‖ of each channel."""
    grid = format.fit(rows)
    return np.linalg.norm(format.decode(format.encode(rows, grid), grid) - rows, axis=1) / np.linalg.norm(rows, axis=1)


@pytest.mark.parametrize("elements", [1, 3, 6])
def test_a_greedy_step_is_the_best_of_all_two_bit_vectors_on_the_same_scales(elements):
    rows = np.asarray(heavy_tails(8, elements, seed=elements), np.float64)
    step = greedy_step(jnp.asarray(rows, jnp.float32), 1, "l2", False)
    found = np.sum((rows - np.asarray(step * nearest_levels(jnp.asarray(rows, jnp.float32), step, 1))) ** 2, 1)
    vectors = np.array(list(itertools.product((-1, 0, 1), repeat=elements)))
    for row, reached in zip(rows, found, strict=True):
        scales = np.abs(row).max() * np.arange(1, CANDIDATES + 1) / CANDIDATES
        best = min(float(((row - a * vectors) ** 2).sum(1).min()) for a in scales)
        assert reached == pytest.approx(best, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_each_linf_point_shrinks_the_residual_by_half_a_step(bits):
    """‖r_{n+1}‖_∞ ≤ (ε/2) ‖r_n‖_∞, ε = 1 / (2^(bits−1) − 1), and no smaller bound would do."""
    top = 2 ** (bits - 1) - 1
    residual, worst = heavy_tails(), 0.0
    for _ in range(3):
        step = greedy_step(residual, top, "linf", False)
        left = residual - step * nearest_levels(residual, step, top)
        worst = max(worst, float((jnp.abs(left).max(1) / jnp.abs(residual).max(1)).max()))
        residual = left
    assert 0.99 / (2 * top) < worst <= 1 / (2 * top) + 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoded_points_keep_the_contraction_bound(bits):
    rows, half_step = heavy_tails(), 1 / (2 * (2 ** (bits - 1) - 1))
    for points in (1, 2, 3):
        format = Multipoint(bits, points, tolerance=0.0, select="linf")
        grid = format.fit(rows)
        left = jnp.abs(format.decode(format.encode(rows, grid), grid) - rows).max(1) / jnp.abs(rows).max(1)
        assert float(left.max()) <= half_step**points + 1e-6


def test_l2_begins_better_and_ends_worse_and_mixed_is_never_worse_than_linf():
    rows = heavy_tails(16, 300)
    errors = {s: [error(Multipoint(4, n, 0.0, s), rows) for n in (1, 2, 3, 4)] for s in ("linf", "l2", "mixed")}
    assert np.all(errors["l2"][0] <= errors["linf"][0] * (1 + 1e-6))
    assert errors["linf"][2].mean() < errors["l2"][2].mean()
    for n in range(4):
        assert np.all(errors["mixed"][n] <= errors["linf"][n] * (1 + 1e-4) + 1e-6)
        assert n == 0 or np.all(errors["l2"][n] <= errors["l2"][n - 1] * (1 + 1e-6))


@pytest.mark.parametrize(
    ("select", "figures", "spread"), [("linf", [0.1385, 0.0098, 0.0007, 0.00005], 0.05), ("l2", [0.1133, 0.0255, 0.0104, 0.0052], 0.15)]
)
def test_the_error_of_normal_rows_of_576_in_points_of_four_bits(select, figures, spread):
    """Figures measured with another program and draw: where "l2" clips, a row's few largest values say what is left."""
    rows = jax.random.normal(jax.random.key(0), (32, 576))
    residual, found = rows, []
    for _ in figures:
        step = greedy_step(residual, 7, select, False)
        residual = residual - step * nearest_levels(residual, step, 7)
        found.append(float(jnp.mean(jnp.linalg.norm(residual, axis=1) / jnp.linalg.norm(rows, axis=1))))
    np.testing.assert_allclose(found, figures, rtol=spread)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_without_a_tolerance_to_meet_it_is_the_plain_quantizer(granularity):
    rows = heavy_tails()
    format = Multipoint(3, tolerance=math.inf, select="linf", granularity=granularity)
    grid = format.fit(rows)
    assert np.all(format.counts(grid) == 1)
    scale = np.abs(np.asarray(rows)).max(1, keepdims=True) / np.float32(3)
    scale = scale.max() if granularity == "per_tensor" else scale
    levels = np.clip(np.round(np.asarray(rows) / np.asarray(grid.scale[..., 0])), -3, 3)
    np.testing.assert_allclose(np.broadcast_to(grid.scale[..., 0], (64, 1)), np.broadcast_to(scale, (64, 1)), rtol=1e-6)
    np.testing.assert_array_equal(format.encode(rows, grid), levels + 3)
    np.testing.assert_array_equal(format.decode(format.encode(rows, grid), grid), grid.scale[..., 0] * levels)


@pytest.mark.parametrize(("select", "tolerance"), [("mixed", 0.3), ("linf", 0.2), ("l2", 0.3)])
def test_a_promoted_channel_keeps_the_tensor_s_first_point(select, tolerance):
    rows = heavy_tails() * jnp.linspace(0.2, 1, 64)[:, None]
    format = Multipoint(3, points=3, tolerance=tolerance, select=select, granularity="per_tensor")
    grid = format.fit(rows)
    counts = format.counts(grid)
    assert len(set(counts)) > 1 and (1 in counts or select == "linf")
    first = np.where(counts > 1, np.asarray(grid.scale[:, 0, 0] * grid.ratios[:, 0, 0]), np.asarray(grid.scale[:, 0, 0]))
    plain = dataclasses.replace(format, tolerance=math.inf).fit(rows).scale[0, 0, 0]
    np.testing.assert_allclose(first, plain, rtol=1e-6)
    assert select != "linf" or plain == pytest.approx(np.abs(np.asarray(rows)).max() / 3, rel=1e-6)


@pytest.mark.parametrize("select", ["mixed", "linf", "l2"])
def test_channels_meet_the_tolerance_or_have_all_points_and_no_more_than_they_need(select):
    rows = heavy_tails() * jnp.linspace(0.1, 1, 64)[:, None]
    means = []
    for tolerance in (0.5, 0.2, 0.1, 0.03, 0.0):
        format = Multipoint(3, 4, tolerance, select)
        counts, errors = format.counts(format.fit(rows)), error(format, rows)
        assert np.all((errors <= tolerance * (1 + 1e-4)) | (counts == 4))
        for number in set(counts) - {1}:
            fewer = error(Multipoint(3, int(number) - 1, 0.0, select), rows)
            assert np.all(fewer[counts == number] > tolerance * (1 - 1e-4))
        means.append(counts.mean())
    assert means == sorted(means) and means[-1] == 4


def test_a_channel_without_a_residual_has_no_further_point():
    rows = jnp.concatenate([jnp.tile(jnp.array([[3.0, -2.0, 0.0, 1.0]]), (1, 8)), jnp.zeros((1, 32)), heavy_tails(1, 32)])
    format = Multipoint(3, 4, 0.0, "linf")
    np.testing.assert_array_equal(format.counts(format.fit(rows)), [1, 1, 4])


def test_storage_is_counted_from_the_points_that_are_kept():
    rows = heavy_tails() * jnp.linspace(0.1, 1, 64)[:, None]
    format = Multipoint(3, 5, 0.2)
    grid = format.fit(rows)
    codes, kept = format.encode(rows, grid), int(format.counts(grid).sum())
    assert 64 < kept < 5 * 64
    assert format.storage_bits(codes, grid) == kept * (96 * 3 + 32) + 64 * 3
    abstract = jax.eval_shape(format.fit, rows)
    assert format.storage_bits(codes, abstract) == 5 * 64 * (96 * 3 + 32) + 64 * 3


def test_its_weight_is_a_sum_of_integer_products():
    rows = heavy_tails()
    format = Multipoint(3, 4, 0.1, "linf")
    grid = format.fit(rows)
    codes = format.encode(rows, grid)
    levels, scales = format.integers(codes, grid)
    assert levels.dtype == jnp.int8 and int(jnp.abs(levels).max()) <= 3
    decoded = np.asarray(format.decode(codes, grid), np.float64)
    np.testing.assert_allclose(np.einsum("pc,pce->ce", scales, levels), decoded, atol=1e-6)
    x = jax.random.randint(jax.random.key(3), (10, 96), 0, 256, jnp.int32)
    np.testing.assert_allclose(format.integer_product(x, codes, grid), np.asarray(x) @ decoded.T, rtol=1e-4, atol=1e-2)


def test_a_convolution_is_a_sum_of_integer_convolutions():
    kernel = jax.random.normal(jax.random.key(4), (3, 3, 4, 8))
    rows = kernel.transpose(3, 0, 1, 2).reshape(8, 36)
    format = Multipoint(2, 3, 0.1, "linf")
    grid = format.fit(rows)
    codes = format.encode(rows, grid)
    x = jax.random.randint(jax.random.key(5), (2, 6, 6, 4), 0, 256, jnp.int32)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "OHWI", "NHWC"))

    levels, scales = format.integers(codes, grid)
    total = sum(s * convolve(x, w.reshape(8, 3, 3, 4).astype(jnp.int32)) for w, s in zip(levels, scales, strict=True))
    expected = convolve(x.astype(jnp.float32), format.decode(codes, grid).reshape(8, 3, 3, 4))
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "arguments",
    [dict(bits=1), dict(bits=3, points=0), dict(bits=3, points=True), dict(bits=3, tolerance=-1.0), dict(bits=3, tolerance=math.nan),
     dict(bits=3, granularity=8)],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(arguments):
    with pytest.raises(Exception, match="write|granularity"):
        Multipoint(**arguments)


@pytest.mark.parametrize("points", [1, 2, 8])
def test_one_bit_is_a_format_of_its_own(points):
    written = Binary(points=min(points, 2))
    with pytest.raises(ValueError, match=rf"write Binary\(points={written.points}\)"):
        Multipoint(1, points=points)


def test_second_order_rounding_says_what_to_write_instead():
    with pytest.raises(ValueError, match="annealed"):
        Multipoint(3).of_group()
