"""The restricted reader on files that torch itself wrote, whole and damaged."""

import pathlib
import zipfile

import ml_dtypes
import numpy as np
import pytest

from brecq_jax.models import read_torch
from brecq_jax.models._torch_files import _Storage, _Tensor, flatten_state_dict

VECTORS = pathlib.Path(__file__).parent / "vectors"
LAYOUTS = ["zip", "stream"]
ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
# What torch 2.13.0 saved under "state_dict", beside "epoch": module.a = rows.t(), module.b = rows.half()[1:],
# p = Parameter(rows), h = ones(1).expand(2, 3), and f = zeros(0); stream: _use_new_zipfile_serialization=False.
EXPECTED = {
    "a": ROWS.T,
    "b": ROWS.astype(np.float16)[1:],
    "c": np.arange(3, dtype=np.int64),
    "d": np.array([True, False]),
    "e": np.ones(2, ml_dtypes.bfloat16),
    "f": np.zeros(0, np.float32),
    "p": ROWS,
    "h": np.ones((2, 3), np.float32),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EXPECTED)
def test_what_torch_wrote_is_read(layout, name):
    got = read_torch(VECTORS / f"torch_{layout}.pt")[name]
    want = EXPECTED[name]
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_cut_anywhere_is_refused(tmp_path, layout):
    whole = (VECTORS / f"torch_{layout}.pt").read_bytes()
    for length in range(0, len(whole), 41):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError):
            read_torch(tmp_path / "cut")


def test_a_file_of_a_big_endian_machine_is_refused(tmp_path):
    path = tmp_path / "big.pt"
    with zipfile.ZipFile(VECTORS / "torch_zip.pt") as whole, zipfile.ZipFile(path, "w") as other:
        for name in whole.namelist():
            other.writestr(name, b"big" if name.endswith("/byteorder") else whole.read(name))
        assert any(name.endswith("/byteorder") for name in whole.namelist())
    with pytest.raises(ValueError, match=r"big.pt: .*written on a big-endian machine"):
        read_torch(path)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_tensors_are_found_where_training_code_keeps_them(key):
    """The official BRECQ release keeps MobileNetV2's under "model"."""
    tensor = _Tensor(_Storage("0", np.float32, 1), 0, (1,), (1,))
    assert flatten_state_dict({key: {"module.w": tensor}, "epoch": 3}) == {"w": tensor}
    assert flatten_state_dict({"w": tensor}) == {"w": tensor}
