"""Codes to bytes and back, exactly.

The layout, for codes of 1 to 8 bits: code i is bits [i·bits, (i+1)·bits) of the byte string, where bit k of the string is
bit k mod 8 of byte k // 8, the least significant first. A code may lie across two bytes. The string has ⌈count·bits / 8⌉
bytes, and the bits after the last code are zero.

    bits = 3, codes a b c      byte 0: c1 c0 b2 b1 b0 a2 a1 a0      byte 1: 0 0 0 0 0 0 0 c2      (left: bit 7)
"""

import math
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np


def packed_size(bits: int, count: int) -> int:
    """Bytes of `count` codes: ⌈count·bits / 8⌉."""
    return -(-count * _check(bits) // 8)


@overload
def pack(codes: np.ndarray, bits: int) -> np.ndarray: ...
@overload
def pack(codes: jax.Array, bits: int) -> jax.Array: ...
def pack(codes, bits):
    """The bytes of the codes, read in row-major order.

        >>> pack(np.array([1, 2, 3, 0, 1], np.uint8), bits=2)
        array([57,  1], dtype=uint8)

    Args:
      codes: uint8 of any shape, each below 2^bits: checked in NumPy arrays, the caller's word in jax arrays.
      bits: 1 to 8, static under `jit`.

    Returns:
      uint8 of shape (packed_size(bits, codes.size),), a NumPy array for a NumPy array and a jax array for a jax array.

    Raises:
      ValueError: bits is not 1 to 8, or a code is too large.
      TypeError: codes are not uint8.
    """
    xp = _namespace("pack", "codes", codes)
    num_codes, num_bytes = _period(bits)
    flat = codes.reshape(-1)
    if xp is np and flat.size and flat.max() >> bits:
        most = int(flat.max())
        raise ValueError(f"pack: there is a code {most}, and {bits} bits hold 0 to {2**bits - 1}; write bits={most.bit_length()}.")
    groups = xp.pad(flat, (0, -flat.size % num_codes)).reshape(-1, num_codes)
    columns = [0] * num_bytes
    for n in range(num_codes):
        byte, shift = divmod(n * bits, 8)
        columns[byte] = columns[byte] | (groups[:, n] << np.uint8(shift))
        if shift + bits > 8:
            columns[byte + 1] = columns[byte + 1] | (groups[:, n] >> np.uint8(8 - shift))
    return xp.stack(columns, axis=1).reshape(-1)[: packed_size(bits, flat.size)]


@overload
def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray: ...
@overload
def unpack(packed: jax.Array, bits: int, count: int) -> jax.Array: ...
def unpack(packed, bits, count):
    """The codes of the bytes: unpack(pack(codes, bits), bits, codes.size) is codes.reshape(-1).

        >>> unpack(np.array([57, 1], np.uint8), bits=2, count=5)
        array([1, 2, 3, 0, 1], dtype=uint8)

    Args:
      packed: uint8 of shape (packed_size(bits, count),).
      bits: 1 to 8, static under `jit`.
      count: how many codes; static under `jit`.

    Returns:
      uint8 of shape (count,), a NumPy array for a NumPy array and a jax array for a jax array.

    Raises:
      ValueError: bits is not 1 to 8, the number of bytes is not that of `count` codes, or bits after the last code are
        set (checked in NumPy arrays).
      TypeError: packed is not uint8.
    """
    xp = _namespace("unpack", "packed", packed)
    num_codes, num_bytes = _period(bits)
    size, used = packed_size(bits, count), count * bits % 8
    if count < 0 or packed.shape != (size,):
        raise ValueError(f"unpack: {count} codes of {bits} bits are {size} bytes, and packed has the shape {packed.shape}; write its own count.")
    if xp is np and used and packed[-1] >> used:
        raise ValueError(f"unpack: bits after the last of {count} codes of {bits} bits are set: pack() did not write these bytes.")
    groups = xp.pad(packed, (0, -packed.size % num_bytes)).reshape(-1, num_bytes)
    columns = []
    for n in range(num_codes):
        byte, shift = divmod(n * bits, 8)
        code = groups[:, byte] >> np.uint8(shift)
        if shift + bits > 8:
            code = code | (groups[:, byte + 1] << np.uint8(8 - shift))
        columns.append(code & np.uint8(2**bits - 1))
    return xp.stack(columns, axis=1).reshape(-1)[:count]


def _period(bits: int) -> tuple[int, int]:
    """The least (codes, bytes) that end together."""
    shared = math.gcd(_check(bits), 8)
    return 8 // shared, bits // shared


def _check(bits: int) -> int:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}; write an int from 1 to 8.")
    return bits


def _namespace(function: str, name: str, array):
    if array.dtype != np.uint8:
        raise TypeError(f"{function}: {name} are {array.dtype}; write {name}.astype(np.uint8).")
    return np if isinstance(array, np.ndarray) else jnp
