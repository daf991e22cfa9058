"""Programs that leave the library behind."""

import os
import subprocess
import sys

import jax.export
import numpy as np
import pytest

import brecq_jax
from brecq_jax import deploy, formats, solvers

READER = """
import hashlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("brecq_jax", "flax", "optax", "orbax"):
            raise ImportError(name + " is not at hand here")

sys.meta_path.insert(0, Blocked())
import jax, numpy
import jax.export

file = open(sys.argv[1], "rb").read()
assert hashlib.sha256(file[:-32]).digest() == file[-32:]
program = jax.export.deserialize(file)
images = numpy.load(sys.argv[2])
numpy.save(sys.argv[3], numpy.concatenate([program.call(images[:1]), program.call(images[1:])]))
"""


@pytest.fixture(scope="module")
def quantized(digits):
    return brecq_jax.quantize(
        digits.variables, digits.model.apply, digits.train_images[:64], weights=formats.Uniform(4), solver=solvers.nearest(), progress=False
    )


@pytest.mark.parametrize("form", ["float", "integer"])
def test_a_process_without_this_library_gets_the_same_logits(form, quantized, digits, tmp_path):
    images = digits.test_images[:10]
    model = quantized if form == "float" else deploy.to_integer(quantized, images)
    path = tmp_path / "model.stablehlo"
    brecq_jax.export(model, path, images)
    np.save(tmp_path / "images.npy", images)
    files = [str(path), str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", READER, *files], check=True, cwd=tmp_path, env=environment)
    np.testing.assert_allclose(np.load(files[2]), model(images), rtol=1e-5, atol=1e-5)


def test_a_program_is_loaded_only_as_it_was_written(quantized, digits, tmp_path, monkeypatch):
    path = tmp_path / "model"
    brecq_jax.export(quantized, path, digits.test_images, platforms=["cpu"])
    np.testing.assert_allclose(deploy.load_program(path).call(digits.test_images[:2]), quantized(digits.test_images[:2]), rtol=1e-5, atol=1e-5)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-32], whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:], b"", b"something else"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model is damaged.*Export the model again"):
            deploy.load_program(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        deploy.load_program(tmp_path / "nothing")
    path.write_bytes(whole)
    monkeypatch.setattr(jax.export, "minimum_supported_calling_convention_version", 1000)
    with pytest.raises(ValueError, match=r"calling convention \d+, and jax .* reads 1000 to"):
        deploy.load_program(path)


def test_the_file_holds_packed_codes_and_lowers_for_accelerators_too(quantized, digits, tmp_path):
    integer = deploy.to_integer(quantized, digits.test_images)
    brecq_jax.export(integer, tmp_path / "integer", digits.test_images)
    program = jax.export.deserialize((tmp_path / "integer").read_bytes())
    assert program.platforms == ("cpu", "cuda", "tpu")
    text = program.mlir_module()
    for leaf in (a for a in quantized.params["params"]["blocks_2"].values() if "kernel" in a):
        count = leaf["kernel"].size
        assert f"tensor<{count // 2}xui8>" in text  # 4 bits each
    assert "tensor<3x3x32x32xf32>" not in text


def test_what_cannot_be_exported_is_refused_before_a_file_is_written(quantized, digits, tmp_path):
    path = tmp_path / "model"
    with pytest.raises(TypeError, match="no quantized model"):
        brecq_jax.export(digits.variables, path, digits.test_images)
    with pytest.raises(ValueError, match="platforms has abacus"):
        brecq_jax.export(quantized, path, digits.test_images, platforms=["abacus"])
    assert not path.exists()
    path.write_text("something")
    with pytest.raises(FileExistsError, match="Give a new path"):
        brecq_jax.export(quantized, path, digits.test_images)


def test_a_program_that_needs_to_know_its_batch_size_is_refused_with_the_reason(tmp_path):
    x, params = np.ones((16, 4), np.float32), {"w": np.ones((4, 3), np.float32)}

    def apply_fn(params, x):
        return x @ params["w"] * (1.0 if len(x) > 3 else 2.0)

    quantized = brecq_jax.quantize(params, apply_fn, x, solver=solvers.nearest(), progress=False)
    with pytest.raises(ValueError, match="batch size that is not yet known"):
        brecq_jax.export(quantized, tmp_path / "model", x)
