"""What leaves the house comes back, in both kinds of file, and nothing else does."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import brecq_jax
from brecq_jax._model import Program
from brecq_jax._qarray import quantize_array
from brecq_jax.deploy import restore_safetensors, save_safetensors
from brecq_jax.formats import Affine, ClusterCodebook, Grid, LpRange, MinMax, Multipoint, RowCodebook, RowUniform, Uniform

ROOT = pathlib.Path(__file__).parents[2]
KINDS = {"checkpoint": (brecq_jax.save, brecq_jax.restore), "safetensors": (save_safetensors, restore_safetensors)}
FORMATS = [
    *(Uniform(bits, ranges=MinMax()) for bits in range(2, 9)),
    Uniform(3, symmetric=True, ranges=LpRange(p=2.0, steps=3)),
    Uniform(4, granularity="per_tensor", ranges=MinMax()),
    Uniform(2, granularity=5, ranges=MinMax()),
    Multipoint(2, points=4, tolerance=0.2),  # some channels have fewer points than others
    Multipoint(4, points=1),
    Affine(3, ranges=MinMax()),
    RowUniform(4),
    RowCodebook(2),
    ClusterCodebook(2, clusters=3),
]


def model(params, activations=(), sites=()):
    return brecq_jax.Quantized(params, dict(activations), Program(apply_fn, tuple(sites), False))


def apply_fn(params, x):
    return x


def weight(format, shape=(3, 5, 7), channel_axes=(2,), dtype=jnp.float32):
    return quantize_array(jax.random.normal(jax.random.key(0), shape, dtype), format, channel_axes)


def bytes_of(path):
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_format_comes_back_exactly(kind, format, tmp_path):
    save, restore = kind
    quantized = model({"w": weight(format)}, {"w": Grid(jnp.full((1, 1, 1), 0.1), jnp.full((1, 1, 1), 3.0))}, [("w", Uniform(8))])
    save(tmp_path / "m", quantized)
    assert_same(restore(tmp_path / "m", apply_fn), quantized)


def test_every_kind_of_parameter_comes_back_exactly(kind, tmp_path):
    save, restore = kind
    stacked = weight(FORMATS[2], (4, 6, 5), (0, 2))
    learned = weight(FORMATS[1])
    learned = brecq_jax.QArray(learned.codes, learned.grid._replace(zero_point=learned.grid.zero_point + 0.25), FORMATS[1], (2,), "float32")
    outside = brecq_jax.QArray(learned.codes, learned.grid._replace(zero_point=jnp.arange(7.0).reshape(7, 1, 1) * 3 - 2), FORMATS[1], (2,), "float32")
    params = {
        "list": [stacked, {"bfloat16": weight(FORMATS[0], dtype=jnp.bfloat16)}],
        "floats": {"half": jnp.arange(3, dtype=jnp.float16), "brain": jnp.ones((2, 2), jnp.bfloat16), "scalar": jnp.float32(3)},
        "others": {"flags": jnp.array([True, False]), "empty": jnp.zeros((0, 3)), "numbers": {7: jnp.arange(4), -3: jnp.ones(1)}},
        "grids": {"learned": learned, "outside": outside, "one": weight(FORMATS[3], (1, 1), (1,)), "": weight(FORMATS[3], (9,), ())},
    }
    quantized = model(params)
    save(tmp_path / "m", quantized)
    assert_same(restore(tmp_path / "m", apply_fn), quantized)


def test_trees_that_are_not_of_dicts_and_lists_need_params(kind, tmp_path):
    save, restore = kind
    quantized = model(Grid(weight(FORMATS[0]), jnp.ones(3)))
    save(tmp_path / "m", quantized)
    with pytest.raises(ValueError, match="params="):
        restore(tmp_path / "m", apply_fn)
    assert_same(restore(tmp_path / "m", apply_fn, Grid(jnp.zeros((3, 5, 7)), jnp.zeros(3))), quantized)
    with pytest.raises(ValueError, match=r"zero_point is \(3,\) there and \(4,\)"):
        restore(tmp_path / "m", apply_fn, Grid(jnp.zeros((3, 5, 7)), jnp.zeros(4)))
    with pytest.raises(ValueError, match="it has 2 parameters, `params` has 1"):
        restore(tmp_path / "m", apply_fn, [jnp.zeros(3)])


def test_params_of_other_names_are_refused(kind, tmp_path):
    save, restore = kind
    save(tmp_path / "m", model({"b": jnp.ones(3), "c": jnp.zeros(3)}))
    with pytest.raises(ValueError, match="another model: b stands there where a is in `params`"):
        restore(tmp_path / "m", apply_fn, {"b": jnp.ones(3), "a": jnp.zeros(3)})


@pytest.mark.parametrize("empty", [(), {}, None, [None]], ids=str)
def test_trees_with_empty_parts_need_params(kind, empty, tmp_path):
    save, restore = kind
    tree = [{"kernel": weight(FORMATS[0]), "bias": empty}, empty, (jnp.ones(3), jnp.ones(2))]
    save(tmp_path / "m", model(tree))
    with pytest.raises(ValueError, match="params="):
        restore(tmp_path / "m", apply_fn)
    assert_same(restore(tmp_path / "m", apply_fn, tree), model(tree))


def test_a_model_without_a_float32_number_comes_back(kind, tmp_path):
    save, restore = kind
    quantized = model({"table": weight(RowUniform(4), (6, 8), (0,))})
    save(tmp_path / "m", quantized)
    assert_same(restore(tmp_path / "m", apply_fn), quantized)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_file_of_megabytes_is_three_percent_larger_than_its_bits_at_most(kind, bits, tmp_path):
    save, _ = kind
    keys = jax.random.split(jax.random.key(0), 20)
    params = {
        f"layer{n}": {"kernel": quantize_array(jax.random.normal(k, (300, 700)), Uniform(bits, ranges=MinMax()), (1,)), "bias": jnp.ones(700)}
        for n, k in enumerate(keys)
    }
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, brecq_jax.QArray))
    needed = sum(x.storage_bits if isinstance(x, brecq_jax.QArray) else 32 * x.size for x in leaves) / 8
    save(tmp_path / "m", model(params))
    assert needed < bytes_of(tmp_path / "m") < 1.03 * needed


def test_orbax_reads_the_arrays_without_us(tmp_path):
    brecq_jax.save(tmp_path / "m", model({"w": weight(FORMATS[2]), "b": jnp.arange(3.0)}))
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(tmp_path / "m" / "arrays")
    assert set(arrays) == {"bytes"}
    np.testing.assert_array_equal(np.asarray(arrays["bytes"])[:12].view("<f4"), [0, 1, 2])
    assert (tmp_path / "m" / "arrays" / "bytes" / "0").read_bytes() == bytes(np.asarray(arrays["bytes"]))


def test_two_saves_of_one_model_have_the_same_safetensors_bytes(tmp_path):
    for name in "ab":
        save_safetensors(tmp_path / name, model({"w": weight(FORMATS[2])}))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


READER = r"""
import json, math, struct, sys
import numpy as np
sys.modules["jax"] = sys.modules["brecq_jax"] = None   # importing them fails
whole = open(sys.argv[1], "rb").read()
(length,) = struct.unpack("<Q", whole[:8])
header = json.loads(whole[8 : 8 + length])
record = json.loads(header["__metadata__"]["brecq_jax"])

def tensor(name):
    first, last = header[name]["data_offsets"]
    return np.frombuffer(whole[8 + length + first : 8 + length + last], {"F32": "<f4", "U8": "u1"}[header[name]["dtype"]])

def unpacked(name, bits, count):
    string = np.unpackbits(tensor(name), bitorder="little")
    return string[: count * bits].reshape(count, bits) @ (1 << np.arange(bits))

def grid(name, key, stored):
    if "value" in stored:
        return np.full(stored["shape"], stored["value"], np.float32)
    if "kept" in stored:
        shape, kept = stored["shape"], unpacked(f"{name}.{key}.kept", 1, math.prod(stored["shape"][:-1])) == 1
        values = np.zeros((len(kept), shape[-1]))
        values[kept] = integers(name, key, stored).reshape(-1, shape[-1])
        return values.reshape(shape)
    return integers(name, key, stored).reshape(stored["shape"])

def integers(name, key, stored):
    if "bits" not in stored:
        return tensor(f"{name}.{key}")
    count = stored.get("kept", math.prod(stored["shape"][:-1])) * stored["shape"][-1]
    return unpacked(f"{name}.{key}", stored["bits"], count) + stored["low"]

for leaf in record["leaves"]:
    name, shape, axes = leaf["name"], leaf["shape"], leaf["channel_axes"]
    bits = record["formats"][leaf["format"]]["bits"]
    scale, zero_point = (grid(name, key, leaf["grid"][key]) for key in ("scale", "zero_point"))
    codes = unpacked(f"{name}.codes", bits, math.prod(shape)).reshape(shape)
    order = [*axes, *(a for a in range(len(shape)) if a not in axes)]      # the channels first
    rows = codes.transpose(order).reshape(math.prod(shape[a] for a in axes), scale.shape[1], -1)
    floats = (scale * (rows - zero_point)).reshape([shape[a] for a in order]).transpose(np.argsort(order))
    np.save(f"{sys.argv[2]}/{name}.npy", floats.astype(np.float32))
"""


def test_numpy_alone_reads_a_safetensors_file(tmp_path):
    params = {f"w{n}": weight(format) for n, format in enumerate(FORMATS) if type(format) is Uniform} | {"stacked": weight(FORMATS[2], (4, 6, 5), (0, 2))}
    quantized = model(params)
    save_safetensors(tmp_path / "m", quantized)
    subprocess.run([sys.executable, "-c", READER, tmp_path / "m", tmp_path], check=True)
    for name, floats in quantized.dequantized().items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), floats)


def test_the_safetensors_package_reads_our_file(tmp_path):
    numpy_reader = pytest.importorskip("safetensors.numpy")
    quantized = model({"w": weight(FORMATS[2]), "b": jnp.arange(3.0), "scalar": jnp.float32(2), "empty": jnp.zeros((0, 2))})
    save_safetensors(tmp_path / "m", quantized)
    tensors = numpy_reader.load_file(tmp_path / "m")
    assert set(tensors) >= {"w.codes", "w.scale", "b", "scalar", "empty"}
    np.testing.assert_array_equal(tensors["b"], [0, 1, 2])
    np.testing.assert_array_equal(tensors["w.scale"], quantized.params["w"].grid.scale)
    assert tensors["w.codes"].shape == (-(-105 * 4 // 8),) and tensors["empty"].shape == (0, 2)


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    brecq_jax.save(tmp_path / "m", model({"w": weight(FORMATS[2])}))
    meta = tmp_path / "m" / "brecq_jax.json"
    meta.write_text(meta.read_text().replace('"version": 3', '"version": 2'))
    with pytest.raises(ValueError, match=f"restore: {tmp_path}/m: it has version 2, and this library reads 3"):
        brecq_jax.restore(tmp_path / "m", apply_fn)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02" + bytes(7) + b"{}", b"\x02" + bytes(7) + b"[]"])
def test_a_foreign_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ValueError, match=f"restore: {re.escape(str(tmp_path / 'm'))}"):
        restore_safetensors(tmp_path / "m", apply_fn)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(kind, tmp_path):
    save, restore = kind
    with pytest.raises(TypeError, match="dict is not a Quantized"):
        save(tmp_path / "m", {})
    with pytest.raises(ValueError, match=r"two arrays are called w\.codes"):
        save(tmp_path / "m", model({"w": weight(FORMATS[2]), "w.codes": jnp.ones(2)}))
    with pytest.raises(FileNotFoundError, match="restore"):
        restore(tmp_path / "m", apply_fn)
    (tmp_path / "m").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        save(tmp_path / "m", model({"w": weight(FORMATS[2])}))


def test_a_dtype_that_safetensors_does_not_know_is_refused(tmp_path):
    with pytest.raises(TypeError, match="w is int4"):
        save_safetensors(tmp_path / "m", model({"w": jnp.ones(3, jnp.int4)}))


@pytest.mark.parametrize("name", ["Checkpoint", "Safetensors", "Program"])
def test_a_damaged_file_is_refused_or_exactly_right(name, tmp_path):
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "fuzz.py")
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    artifact = getattr(fuzz, name)(tmp_path)
    artifact.restore()
    outcomes, _ = fuzz.fuzz(artifact, count=300, seed=1)
    assert outcomes.total() > 250
