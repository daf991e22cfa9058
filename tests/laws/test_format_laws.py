"""What holds for every format. Add a format to FORMATS and it inherits all laws; the oracle lists every point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brecq_jax.deploy import pack, unpack
from brecq_jax.formats import (
    Affine, Binary, ClusterCodebook, GreedyRange, LpRange, MinMax, Multipoint, RowCodebook, RowUniform, ScalarFormat,
    SumOfIntegers, Ternary, Uniform,
)  # fmt: skip

FORMATS = [
    Uniform(2),
    Uniform(3, granularity="per_tensor"),
    Uniform(4, granularity="per_channel"),
    Uniform(4, granularity=8),
    Uniform(8, granularity=1),
    Uniform(8, ranges=MinMax()),
    Uniform(2, symmetric=True),
    Uniform(4, symmetric=True, granularity="per_tensor"),
    Uniform(4, symmetric=True, granularity=16, ranges=MinMax()),
    Uniform(8, symmetric=True),
    Multipoint(2, points=4, tolerance=0.1),
    Multipoint(3, points=3, tolerance=0.0, select="linf"),
    Multipoint(4, points=2, tolerance=0.0, select="l2"),
    Multipoint(4, points=1, granularity="per_tensor"),
    Multipoint(8, tolerance=0.0),
    Affine(3, granularity=8),
    Affine(2, symmetric=True, granularity="per_tensor"),
    Affine(4, symmetric=True),
    Ternary(),
    Ternary("per_tensor"),
    Binary(),
    Binary(granularity="per_tensor"),
    Binary(2),
    Binary(2, "per_tensor"),
    RowUniform(2),
    RowUniform(4),
    RowUniform(4, ranges=None),
    RowUniform(8, ranges=GreedyRange(bins=50, ratio=0.5)),
    RowCodebook(2),
    RowCodebook(4),
    ClusterCodebook(4, clusters=3),
]
CHANNELS, ELEMENTS = 6, 48

every_format = pytest.mark.parametrize("format", FORMATS, ids=str)
scalar_format = pytest.mark.parametrize("format", [f for f in FORMATS if isinstance(f, ScalarFormat)], ids=str)
sum_of_integers = pytest.mark.parametrize("format", [f for f in FORMATS if isinstance(f, SumOfIntegers)], ids=str)
# Affine grids miss zero, rows of tables begin at their least value, Multipoint's points differ by element, and float16 has its own smallest number.
through_zero = pytest.mark.parametrize("format", [f for f in FORMATS if type(f) is Uniform], ids=str)
zero_stays = pytest.mark.parametrize("format", [f for f in FORMATS if type(f) in (Uniform, Multipoint, Ternary)], ids=str)
# Ternary's threshold is the paper's, near the middle between its points and not there.
to_nearest = pytest.mark.parametrize("format", [f for f in FORMATS if not isinstance(f, Ternary)], ids=str)
evenly_spaced = pytest.mark.parametrize("format", [f for f in FORMATS if isinstance(f, ScalarFormat | RowUniform)], ids=str)


def rows():
    """Gaussian channels of different spread: one all positive, one all negative, one with a far outlier, one dead."""
    w = jax.random.normal(jax.random.key(0), (CHANNELS, ELEMENTS)) * jnp.array([[1.0], [0.1], [3.0], [1.0], [0.5], [0]])
    w = w.at[1].set(jnp.abs(w[1]) + 0.3).at[2].set(-jnp.abs(w[2]))
    return w.at[3, 7].set(40.0)


def probes():
    """Values inside and far outside the range of `rows`."""
    return (rows() * jnp.linspace(-1.6, 1.6, ELEMENTS)).at[:, :2].set(jnp.array([-100.0, 100.0]))


def every_code(format):
    """2^bits codes, one less where levels are as many below zero as above."""
    return jnp.arange(2**format.bits - isinstance(format, Multipoint | Ternary), dtype=jnp.uint8)


def points(format, grid):
    """Every point that each element can take, in ascending order: (codes, channels, elements)."""
    codes = every_code(format)[:, None, None]
    codes = jnp.broadcast_to(codes, (len(codes), CHANNELS, ELEMENTS))
    return np.sort(jax.vmap(format.decode, (0, None))(codes, grid), axis=0)


def fuzz(table):
    """What float32 may lose at the largest point of each element."""
    return 1e-6 * np.abs(table).max(0)


@every_format
def test_decoding_then_encoding_a_grid_point_returns_its_value(format):
    grid = format.fit(rows())
    table = points(format, grid)
    again = jax.vmap(lambda rows: format.decode(format.encode(rows, grid), grid))(table)
    np.testing.assert_array_equal(again, table)


@evenly_spaced
def test_encoding_then_decoding_a_code_returns_it(format):
    grid = format.fit(rows())
    for code in every_code(format)[jnp.array([0, 1, 2, -1])]:
        codes = jnp.full((CHANNELS, ELEMENTS), code, jnp.uint8)
        np.testing.assert_array_equal(format.encode(format.decode(codes, grid), grid), codes)


@sum_of_integers
def test_points_are_sums_of_integers(format):
    grid = format.fit(rows())
    codes = format.encode(probes(), grid)
    levels, scales = format.integers(codes, grid)
    assert levels.dtype == jnp.int8 and scales[0].all()
    table = format.decode(codes, grid)
    np.testing.assert_allclose((levels * scales[..., None]).sum(0), table, atol=1e-6 * np.abs(table).max())


@every_format
def test_codes_are_bytes_that_fit_in_bits(format):
    codes = format.encode(1e3 * probes(), format.fit(rows()))
    assert codes.dtype == jnp.uint8 and codes.shape == (CHANNELS, ELEMENTS)
    assert int(codes.max()) < 2**format.bits


@every_format
def test_packed_codes_take_the_bits_that_storage_counts_and_come_back(format):
    grid = format.fit(rows())
    codes = format.encode(probes(), grid)
    packed = pack(codes, format.bits)
    assert 0 <= format.storage_bits(codes, grid) - 8 * packed.size <= sum(8 * a.nbytes for a in grid)
    np.testing.assert_array_equal(unpack(packed, format.bits, codes.size).reshape(codes.shape), codes)


@to_nearest
def test_the_nearest_point_is_encoded(format):
    w, grid = probes(), format.fit(rows())
    table = points(format, grid)
    error = np.abs(format.decode(format.encode(w, grid), grid) - w)
    closest = np.abs(table - w).min(0)
    assert np.all(error <= closest + fuzz(table) + 1e-6 * np.abs(w))


@scalar_format
def test_neighbors_are_the_closest_points_either_side(format):
    w, grid = np.asarray(probes()), format.fit(rows())
    table = points(format, grid)
    low, high = (np.asarray(format.decode(codes, grid)) for codes in format.neighbors(jnp.asarray(w), grid))
    inside = (table[0] <= w) & (w <= table[-1])
    slack = fuzz(table)
    assert np.all((low <= w + slack)[inside]) and np.all((w <= high + slack)[inside])
    between = (low + slack < table) & (table < high - slack)
    assert not between.any()
    closest = np.abs(table - w).min(0)
    np.testing.assert_array_less(np.minimum(abs(low - w), abs(high - w)), closest + slack + 1e-6 * abs(w) + 1e-30)


@scalar_format
def test_outside_the_range_both_neighbors_are_the_end_point(format):
    w, grid = np.asarray(probes()), format.fit(rows())
    table = points(format, grid)
    low, high = (np.asarray(format.decode(codes, grid)) for codes in format.neighbors(jnp.asarray(w), grid))
    for outside, end in ((w < table[0] - fuzz(table), table[0]), (w > table[-1] + fuzz(table), table[-1])):
        assert outside.any()
        np.testing.assert_array_equal(low[outside], end[outside])
        np.testing.assert_array_equal(high[outside], end[outside])


@through_zero
def test_zero_is_a_point_of_every_grid_that_all_elements_share(format):
    zero = jnp.zeros((CHANNELS, ELEMENTS))
    grid = format.fit(rows())
    np.testing.assert_array_equal(format.decode(format.encode(zero, grid), grid), zero)


@zero_stays
def test_a_weight_of_zero_stays_zero(format):
    w = rows().at[:, ::3].set(0)
    grid = format.fit(w)
    np.testing.assert_array_equal(format.decode(format.encode(w, grid), grid)[:, ::3], 0)


@to_nearest
def test_inside_the_range_the_error_is_at_most_half_a_scale(format):
    w, grid = probes(), format.fit(rows())
    table = points(format, grid)
    inside = (table[0] <= w) & (w <= table[-1])
    error = np.abs(format.decode(format.encode(w, grid), grid) - w)
    half = np.diff(table, axis=0).max(0) / 2
    assert np.all((error <= half + fuzz(table))[inside])


@every_format
def test_doubling_the_weights_doubles_every_decoded_value(format):
    once, twice = (format.decode(format.encode(w, g), g) for w in (rows(), 2 * rows()) for g in [format.fit(w)])
    np.testing.assert_allclose(twice, 2 * once, rtol=0, atol=1e-15)  # the floor of a dead channel's scale, where zero is no point


@scalar_format
def test_a_scaling_of_the_weights_scales_every_decoded_value(format):
    once, scaled = (format.decode(format.encode(w, g), g) for w in (rows(), 1e-7 * rows()) for g in [format.fit(w)])
    # Another factor may win a tie, or a half be rounded the other way: few elements, and by one step at most.
    assert np.isclose(scaled * 1e7, once, rtol=1e-4, atol=1e-6).mean() > 0.97


@every_format
@pytest.mark.parametrize(
    "channel",
    [jnp.zeros(48), jnp.full(48, 0.7), jnp.full(48, -0.7), jnp.zeros(48).at[0].set(1e30), jnp.full(48, 1e-30)],
    ids=["dead", "constant", "negative constant", "one outlier", "almost dead"],
)
def test_degenerate_channels_have_finite_grids_and_finite_values(format, channel):
    w = jnp.tile(channel, (CHANNELS, 1))
    grid = format.fit(w)
    assert all(np.all(np.isfinite(part)) for part in grid)
    assert not isinstance(format, Uniform | Ternary | Binary) or np.all(grid.scale > 0)
    decoded = format.decode(format.encode(w, grid), grid)
    assert np.all(np.isfinite(decoded))
    if not isinstance(format, Affine | Binary):
        np.testing.assert_array_equal(decoded[w == 0], 0)


@scalar_format
def test_decode_follows_its_scale_and_its_soft_codes(format):
    """At whole codes soft decoding is decoding; halfway between two codes it is halfway between their points."""
    grid = format.fit(rows())
    soft = jnp.full((CHANNELS, ELEMENTS), 1.5)
    low, high = (format.decode(jnp.full(soft.shape, code, jnp.uint8), grid) for code in (1, 2))
    np.testing.assert_allclose(format.decode(soft, grid), (low + high) / 2, rtol=1e-6)
    by_scale = jax.grad(lambda scale: jnp.sum(format.decode(soft, grid._replace(scale=scale))))(grid.scale)
    assert np.all(np.isfinite(by_scale))
    by_codes = jax.grad(lambda codes: jnp.sum(format.decode(codes, grid)))(soft)
    np.testing.assert_allclose(by_codes, high - low, rtol=1e-4, atol=fuzz(points(format, grid)).max())


@every_format
def test_a_grid_is_of_the_type_that_the_format_names(format):
    assert type(format.fit(rows())) is format.grid_type


@every_format
def test_formats_are_values(format):
    assert format == eval(repr(format)) and hash(format) == hash(eval(repr(format)))


@every_format
def test_compiled_and_eager_agree(format):
    w, grid = probes(), format.fit(rows())
    np.testing.assert_array_equal(jax.jit(format.encode)(w, grid), format.encode(w, grid))
    if isinstance(format, ScalarFormat):
        np.testing.assert_array_equal(jax.jit(format.neighbors)(w, grid), format.neighbors(w, grid))


@pytest.mark.parametrize("p", [1.0, 2.4])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_lp_range_is_never_worse_than_min_max(p, granularity, symmetric):
    w = rows()
    for importance in (None, jax.random.uniform(jax.random.key(1), w.shape)):

        def error(ranges):
            format = Uniform(3, symmetric, granularity, ranges)
            grid = format.fit(w, importance)
            off = jnp.abs(format.decode(format.encode(w, grid), grid) - w) ** p
            off = off if importance is None else importance * off
            groups = {"per_tensor": (1, -1), "per_channel": w.shape}.get(granularity, (-1, 8))
            return np.asarray(off.reshape(groups).sum(-1))

        assert np.all(error(LpRange(p=p)) <= error(MinMax()) * (1 + 1e-5))
