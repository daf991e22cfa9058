"""Packing: a slow oracle that writes bit after bit, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brecq_jax.deploy.packing import pack, packed_size, unpack

COUNTS = (0, 1, 2, 3, 5, 7, 8, 9, 64, 1001)


def codes_of(bits, count):
    return np.random.default_rng(bits * 7919 + count).integers(0, 2**bits, count).astype(np.uint8)


def bit_by_bit(codes, bits):
    """Bit k of the string, least significant first, is bit k mod bits of code k // bits."""
    string = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    return np.frombuffer(string.to_bytes(-(-len(codes) * bits // 8), "little"), np.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", COUNTS)
def test_packing_is_the_documented_layout_and_round_trips(bits, count):
    codes = codes_of(bits, count)
    packed = pack(codes, bits)
    np.testing.assert_array_equal(packed, bit_by_bit(codes, bits))
    assert packed.size == packed_size(bits, count) and packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_under_jit_the_bytes_are_the_same(bits):
    codes = codes_of(bits, 1001)
    packed = jax.jit(pack, static_argnums=1)(jnp.asarray(codes), bits)
    again = jax.jit(functools.partial(unpack, bits=bits, count=1001))(packed)
    assert isinstance(packed, jax.Array) and packed.dtype == again.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, pack(codes, bits))
    np.testing.assert_array_equal(again, codes)


def test_codes_of_any_shape_are_read_in_row_major_order():
    codes = codes_of(3, 24).reshape(2, 3, 4)
    np.testing.assert_array_equal(pack(codes, 3), pack(codes.reshape(-1), 3))
    np.testing.assert_array_equal(pack(codes.transpose(2, 0, 1), 3), pack(codes.transpose(2, 0, 1).copy(), 3))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pack(np.array([4], np.uint8), 2), ValueError, "bits=3"),
        (lambda: pack(np.array([1], np.int32), 2), TypeError, "astype"),
        (lambda: pack(np.array([1], np.uint8), 9), ValueError, "1 to 8"),
        (lambda: unpack(np.zeros(2, np.uint8), 4, 5), ValueError, "are 3 bytes"),
        (lambda: unpack(np.zeros(0, np.uint8), 4, -1), ValueError, "-1 codes"),
        (lambda: unpack(np.array([0, 128], np.uint8), 3, 5), ValueError, "after the last"),
        (lambda: jax.jit(unpack, static_argnums=(1, 2))(jnp.zeros(2, jnp.uint8), 4, 5), ValueError, "are 3 bytes"),
    ],
)
def test_what_cannot_be_packed_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
