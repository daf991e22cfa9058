"""Ranges that are found while values are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brecq_jax.formats import MinMax, PerToken, Uniform
from brecq_jax.formats._record import from_record, to_record

X = jax.random.normal(jax.random.key(0), (3, 5, 8)) * jnp.array([1e-3, 1.0, 1e3])[:, None, None]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_token_is_rounded_as_a_row_with_its_own_grid(bits):
    """The oracle: a format per row, whose range is least to greatest."""
    oracle, rows = Uniform(bits, granularity="per_channel", ranges=MinMax()), X.reshape(15, 8)
    want = oracle.decode(oracle.encode(rows, grid := oracle.fit(rows)), grid)
    np.testing.assert_allclose(PerToken(bits).fake_quantize(X, (2,)).reshape(15, 8), want, rtol=1e-5)


def test_the_axes_are_those_that_an_op_sums_over():
    both = PerToken(4).fake_quantize(X, (1, 2))
    np.testing.assert_allclose(both, PerToken(4).fake_quantize(X.reshape(3, 40), (1,)).reshape(X.shape))
    assert not np.allclose(both, PerToken(4).fake_quantize(X, (2,)))


def test_groups_are_tokens_of_their_own():
    grouped = PerToken(4, group_size=4).fake_quantize(X, (2,))
    np.testing.assert_array_equal(grouped, PerToken(4).fake_quantize(X.reshape(3, 5, 2, 4), (3,)).reshape(X.shape))
    columns = PerToken(4, group_size=4).fake_quantize(jnp.swapaxes(X, 1, 2), (1,))
    np.testing.assert_array_equal(columns, jnp.swapaxes(grouped, 1, 2))


def test_a_token_of_zeros_stays_zero_and_gradients_pass():
    assert not jnp.any(PerToken().fake_quantize(jnp.zeros((2, 4)), (1,)))
    gradient = jax.grad(lambda x: PerToken(8).fake_quantize(x, (1,)).sum())(jnp.array([[-1.0, 0.3, 0.5, 1.0]]))
    np.testing.assert_array_equal(gradient[0, 1:3], [1, 1])


def test_it_is_written_and_read():
    for format in (PerToken(4), PerToken(8, 64)):
        assert from_record(to_record(format)) == format


def test_bits_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="from 2 to 8"):
        PerToken(9)
    with pytest.raises(ValueError, match="group size"):
        PerToken(8, group_size=0)
