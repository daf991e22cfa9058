"""The safetensors reader, on whole files and on damaged ones."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from brecq_jax.models import read_safetensors

# What safetensors 0.8.0 wrote (safetensors.numpy.save) of {"a": arange(6, dtype=float32).reshape(2, 3), "b": int8 −1,
# "c": zeros((0, 2), float16)}, with metadata {"format": "np"}.
ORIGINAL = bytes.fromhex(
    "c8000000000000007b225f5f6d657461646174615f5f223a7b22666f726d6174223a226e70227d2c2261223a7b226474797065223a22463332222c22"
    "7368617065223a5b322c335d2c22646174615f6f666673657473223a5b302c32345d7d2c2263223a7b226474797065223a22463136222c2273686170"
    "65223a5b302c325d2c22646174615f6f666673657473223a5b32342c32345d7d2c2262223a7b226474797065223a224938222c227368617065223a5b"
    "5d2c22646174615f6f666673657473223a5b32342c32355d7d7d2020000000000000803f0000004000004040000080400000a040ff"
)
ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)


def whole(header, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype, shape, first, last):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def read(tmp_path, content: bytes):
    (tmp_path / "a.safetensors").write_bytes(content)
    return read_safetensors(tmp_path / "a.safetensors")


def test_what_safetensors_wrote_is_read(tmp_path):
    tensors = read(tmp_path, ORIGINAL)
    assert set(tensors) == {"a", "b", "c"}
    np.testing.assert_array_equal(tensors["a"], ROWS)
    assert (tensors["b"].dtype, tensors["b"].shape, int(tensors["b"])) == (np.int8, (), -1)
    assert (tensors["c"].dtype, tensors["c"].shape) == (np.float16, (0, 2))


def test_bfloat16_is_read(tmp_path):
    values = np.array([1.5, -2], ml_dtypes.bfloat16)
    got = read(tmp_path, whole({"w": entry("BF16", [2], 0, 4)}, values.tobytes()))["w"]
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got, values)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    for length in range(len(ORIGINAL)):
        with pytest.raises(ValueError, match="a.safetensors"):
            read(tmp_path, ORIGINAL[:length])
    with pytest.raises(ValueError, match="the file holds"):
        read(tmp_path, ORIGINAL + b"\0")


def test_a_flipped_bit_is_read_or_refused_by_name(tmp_path):
    for position in range(len(ORIGINAL)):
        for mask in (0x01, 0x10, 0x80):
            flipped = bytearray(ORIGINAL)
            flipped[position] ^= mask
            try:
                tensors = read(tmp_path, bytes(flipped))
            except ValueError as error:
                assert "a.safetensors" in str(error)
            else:
                assert all(isinstance(t, np.ndarray) for t in tensors.values())


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"w": entry("F32", [6], 0, 28)}, "cannot take"),
        ({"w": entry("F32", [7], 0, 28)}, "the file holds"),
        ({"w": entry("F32", [-6], 0, 24)}, "refused"),
        ({"w": entry("F32", [6.0], 0, 24)}, "refused"),
        ({"w": entry("F32", [True, 6], 0, 24)}, "refused"),
        ({"w": entry("F32", [6], 0, 24) | {"data_offsets": [0, 12, 24]}}, "refused"),
        ({"w": entry("F32", [6], 24, 0)}, "cannot take"),
        ({"w": entry("F99", [6], 0, 24)}, "F99.*known are F64"),
        ({"w": entry(["F32"], [6], 0, 24)}, "dtype"),
        ({"w": {"dtype": "F32"}}, "described by"),
        ({"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 8, 24)}, "b begins at byte 8, where 16"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 16, 24)}, "b begins at byte 16, where 8"),
        ({"w": entry("F32", [2**62, 4], 0, 24)}, "cannot take"),
        ({}, "the tensors take 0 bytes"),
        (b'{"w": {}, "w": {}}', "twice"),
        (b"[1, 2]", "list"),
        (b"[" * 100_000, "a.safetensors"),
        (b"\xff\xfe{}", "a.safetensors"),
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused(tmp_path, header, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path, whole(header, ROWS.tobytes()))


def test_a_length_beyond_the_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="header of"):
        read(tmp_path, struct.pack("<Q", 2**63) + b"{}")


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.safetensors"):
        read_safetensors(tmp_path / "no.safetensors")
