"""SPARQ's codes against tables and loops written from the definition.

The statistics are those of the authors' released code, github.com/gilshm/sparq at fb149e0, over the 256 codes.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brecq_jax.formats import MinMax, Sparq
from brecq_jax.formats.sparq import split_sparse, windowed

ALL = np.arange(256, dtype=np.uint8)
# (window, shifts): trim MSE, round MSE, largest error, distinct values of trim
STATISTICS = {
    (4, 2): (72.656, 23.656, 15, 31), (4, 3): (58.781, 19.938, 15, 40), (4, 5): (43.594, 16.250, 15, 48),
    (3, 6): (184.547, 82.828, 31, 28), (2, 7): (759.023, 477.117, 63, 16), (6, 3): (1.875, 0.906, 3, 128),
}  # fmt: skip
FORMATS = [Sparq(w, s, trim) for (w, s), trim in itertools.product(((4, 5), (4, 3), (4, 2), (3, 6), (2, 7)), (False, True))]
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)


def by_hand(a: int, window: int, shifts: int, trim: bool) -> tuple[int, int]:
    """(f(a), s), one code at a time."""
    allowed = [n * (8 - window) // (shifts - 1) if shifts > 1 else 0 for n in range(shifts)]
    s = next(s for s in allowed if a < 2 ** (window + s))
    q = a // 2**s if trim else round(a / 2**s)  # Python's round takes halves to even, too
    return min(q, 2**window - 1) * 2**s, s


def pair_by_hand(a: int, b: int, format) -> int:
    """What a becomes beside b."""
    if format.pairs and b == 0:
        wide = 2 * format.window
        return by_hand(a, wide, 9 - wide, format.trim)[0]
    return by_hand(a, format.window, format.shifts, format.trim)[0]


def codes(*shape, seed=0):
    """Random codes, half of them 0."""
    draw = np.random.default_rng(seed)
    return (draw.integers(0, 256, shape) * draw.integers(0, 2, shape)).astype(np.uint8)


@pytest.mark.parametrize("trim", [True, False], ids=["trim", "round"])
@pytest.mark.parametrize("table", STATISTICS, ids=str)
def test_every_code_is_re_coded_as_defined(table, trim):
    found = np.asarray(windowed(ALL, *table, trim))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, [by_hand(int(a), *table, trim)[0] for a in ALL])
    off = found.astype(float) - ALL
    trim_mse, round_mse, largest, distinct = STATISTICS[table]
    assert round(np.mean(off**2), 3) == (trim_mse if trim else round_mse)
    assert len(np.unique(found)) == distinct if trim else np.abs(off).max() <= largest
    assert np.abs(off).max() == largest if trim else len(np.unique(found)) <= distinct


@pytest.mark.parametrize(("trim", "a", "becomes"), [(False, 24, 24), (False, 31, 30), (False, 255, 240), (True, 255, 240), (True, 17, 16)])
def test_codes_that_show_the_rounding(trim, a, becomes):
    assert int(windowed(ALL, 4, 5, trim)[a]) == becomes


@every_format
def test_windows_are_idempotent_monotone_and_exact_where_they_can_be(format):
    once = np.asarray(windowed(ALL, format.window, format.shifts, format.trim))
    np.testing.assert_array_equal(windowed(once, format.window, format.shifts, format.trim), once)
    np.testing.assert_array_equal(once[: 2**format.window], ALL[: 2**format.window])
    assert np.all(np.diff(once.astype(int)) >= 0)
    shift = np.array([by_hand(int(a), format.window, format.shifts, format.trim)[1] for a in ALL])
    assert np.all(np.abs(once.astype(int) - ALL) < 2**shift)
    assert not format.trim or np.all(once <= ALL)


@every_format
@pytest.mark.parametrize("channels", [2, 6, 5, 1])
def test_pairs_lie_along_the_contraction_axis(format, channels):
    x = codes(3, channels, 4)
    padded = np.pad(x, ((0, 0), (0, channels % 2), (0, 0)))
    expected = np.empty_like(x)
    for b, c, k in np.ndindex(x.shape):
        expected[b, c, k] = pair_by_hand(int(x[b, c, k]), int(padded[b, c ^ 1, k]), format)
    found = format.recode(jnp.asarray(x), 1)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(jax.jit(format.recode, static_argnums=1)(x, 1), expected)
    np.testing.assert_array_equal(jax.vmap(lambda x: format.recode(x, 0))(jnp.asarray(x)), expected)


@every_format
def test_in_a_pair_order_does_not_matter_and_zeros_lend_their_bits(format):
    x = codes(200, 2)
    np.testing.assert_array_equal(format.recode(jnp.asarray(x[:, ::-1]), 1), np.asarray(format.recode(jnp.asarray(x), 1))[:, ::-1])
    alone = np.stack([np.zeros_like(ALL), ALL], 1)
    beside_zero = np.asarray(format.recode(jnp.asarray(alone), 1))[:, 1]
    if format.window == 4:
        np.testing.assert_array_equal(beside_zero, ALL)
    both = np.maximum(x, 1)
    independent = windowed(both, format.window, format.shifts, format.trim)
    np.testing.assert_array_equal(format.recode(jnp.asarray(both), 1), independent)
    assert not np.any(format.recode(jnp.zeros((3, 4), jnp.uint8), 1))


@pytest.mark.parametrize("format", [Sparq(4, 5), Sparq(3, trim=True), Sparq(2)], ids=str)
def test_a_convolution_of_re_coded_codes_is_the_integer_product_of_re_coded_patches(format):
    """Patches with the channel fastest, pair by pair as a matrix product meets them."""
    x, kernel = codes(2, 5, 5, 4), np.random.default_rng(1).integers(-128, 128, (3, 3, 4, 3))
    total = np.zeros((2, 3, 3, 3), np.int64)
    for b, i, j in np.ndindex(2, 3, 3):
        patch = x[b, i : i + 3, j : j + 3].reshape(-1)
        read = [pair_by_hand(int(patch[k]), int(patch[k ^ 1]), Sparq(format.window, format.shifts or 9 - format.window, format.trim)) for k in range(len(patch))]
        total[b, i, j] = np.array(read) @ kernel.reshape(-1, 3)
    read = format.recode(jnp.asarray(x), -1).astype(jnp.int32)
    found = jax.lax.conv_general_dilated(read, jnp.asarray(kernel, jnp.int32), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_array_equal(found, total)


@every_format
def test_the_form_inside_jit_is_the_integer_one(format):
    x, scale = codes(3, 7), jnp.float32(0.037)
    found = jax.jit(lambda x: format.fake_recode(x, scale, 1))(scale * x)
    np.testing.assert_allclose(found, scale * format.recode(jnp.asarray(x), 1), rtol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(format.fake_recode(x, scale, 1)))(scale * x)
    np.testing.assert_array_equal(slope, 1)


def test_more_windows_rounding_and_pairs_lose_less():
    x = codes(4000, 8)

    def lost(**settings):
        return np.mean((np.asarray(Sparq(4, **settings).recode(jnp.asarray(x), 1)).astype(float) - x) ** 2)

    for pairs, trim in itertools.product((False, True), repeat=2):
        assert lost(shifts=5, pairs=pairs, trim=trim) < lost(shifts=3, pairs=pairs, trim=trim) < lost(shifts=2, pairs=pairs, trim=trim)
    for shifts in (2, 3, 5):
        assert lost(shifts=shifts, pairs=False) < lost(shifts=shifts, pairs=False, trim=True)
        for trim in (False, True):
            assert lost(shifts=shifts, trim=trim) < lost(shifts=shifts, trim=trim, pairs=False)


@pytest.mark.parametrize("format", [f for f in FORMATS if f.trim], ids=str)
def test_trimmed_codes_in_pairs_lose_no_more_than_alone_whatever_they_are(format):
    alone = np.abs(ALL - windowed(ALL, format.window, format.shifts, True).astype(int))
    for beside in (0, 1):
        pairs = jnp.asarray(np.stack([ALL, np.full_like(ALL, beside)], 1))
        assert np.all(np.abs(ALL - np.asarray(format.recode(pairs, 1))[:, 0].astype(int)) <= alone)


def sparse_weights(elements=16, channels=5):
    """Two, one or no non-zeros in each four."""
    draw = np.random.default_rng(2)
    weights = np.zeros((elements, channels), np.int8)
    for four, channel in np.ndindex(elements // 4, channels):
        where = 4 * four + draw.permutation(4)[: draw.integers(0, 3)]
        weights[where, channel] = draw.integers(1, 128, len(where)) * draw.choice([-1, 1], len(where))
    return weights


@every_format
def test_sparse_weights_choose_the_pairs(format):
    x, weights = codes(6, 16), sparse_weights()
    expected = np.zeros((6, 5), np.int64)
    for b, four, channel in np.ndindex(6, 4, 5):
        met = [k for k in range(4 * four, 4 * four + 4) if weights[k, channel]]
        pair = [int(x[b, k]) for k in met] + [0] * (2 - len(met))
        for n, k in enumerate(met):
            expected[b, channel] += pair_by_hand(pair[n], pair[1 - n], format) * int(weights[k, channel])
    parts = split_sparse(weights)
    np.testing.assert_array_equal(parts.sum(0), weights)
    np.testing.assert_array_equal(format.sparse_product(jnp.asarray(x), jnp.asarray(parts)), expected)
    np.testing.assert_array_equal(jax.jit(format.sparse_product)(x, parts), expected)


def test_weights_that_are_not_2_4_sparse_are_refused():
    with pytest.raises(ValueError, match="weights 4 to 7 of channel 1 have more than two non-zeros"):
        split_sparse(np.int8([[0, 0]] * 4 + [[0, 1]] * 3 + [[1, 0]]))
    with pytest.raises(ValueError, match="whole fours"):
        split_sparse(np.ones((6, 1), np.int8))


@pytest.mark.parametrize("arguments", [dict(window=8), dict(window=True), dict(shifts=4), dict(window=3, shifts=4), dict(shifts=1)])
def test_what_cannot_be_meant_is_refused(arguments):
    with pytest.raises(ValueError, match="write"):
        Sparq(**arguments)


def test_values_whose_least_is_not_zero_are_refused():
    with pytest.raises(ValueError, match="values after a ReLU. Here -0.17 was seen"):
        Sparq(4).fit(jnp.array([[1.0, -0.17]]))
    with pytest.raises(ValueError, match=r"Here 0.269 was seen as the least,\n.*\n  Write Uniform\(8\) for this name"):
        Sparq(4).fit(jax.nn.sigmoid(jnp.array([[1.0, -1.0]])))
    assert float(Sparq(4, ranges=MinMax()).fit(jnp.array([[2.55, 0.0]])).scale.squeeze()) == pytest.approx(0.01)
