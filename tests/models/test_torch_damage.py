"""Whatever is wrong with a checkpoint, the error is a ValueError that names the file."""

import pathlib

import numpy as np
import pytest

from brecq_jax.models import read_torch

VECTORS = pathlib.Path(__file__).parent / "vectors"
LAYOUTS = ["zip", "stream"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scalar_stays_a_scalar(layout):
    assert read_torch(VECTORS / f"torch_{layout}.pt")["g"].shape == ()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flipped_byte_is_read_or_refused_by_name(tmp_path, layout):
    whole = (VECTORS / f"torch_{layout}.pt").read_bytes()
    damaged = tmp_path / "damaged.pt"
    for position in range(0, len(whole), 3):
        for mask in (0x01, 0x80):
            flipped = bytearray(whole)
            flipped[position] ^= mask
            damaged.write_bytes(bytes(flipped))
            try:
                tensors = read_torch(damaged)
            except ValueError as error:
                assert "damaged.pt" in str(error)
            else:
                assert all(isinstance(t, np.ndarray) for t in tensors.values())


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.pt"):
        read_torch(tmp_path / "no.pt")
