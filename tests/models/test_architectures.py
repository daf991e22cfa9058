"""Networks by name, from the files that people have."""

import io
import json
import struct

import jax
import numpy as np
import pytest

from brecq_jax import models
from brecq_jax.models import _layout, architectures

OUTPUTS_FIRST = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # of our axes, PyTorch's order


def torch_tensors(depth=20, **others):
    """Random tensors of a CIFAR ResNet by the original's names."""
    rng = np.random.default_rng(0)
    model = models.ARCHITECTURES[f"resnet{depth}_cifar"].build()
    abstract = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    tensors = {}
    for path, leaf in jax.tree.leaves_with_path(abstract):
        *modules, name = (k.key for k in path[1:])
        there = ".".join([*modules, names.get(name, name)]).replace("_0.", ".0.").replace("_1.", ".1.").replace("_2.", ".2.")
        tensors[there] = rng.random(leaf.shape, np.float32).transpose(OUTPUTS_FIRST[leaf.ndim])
        if there.endswith("running_var"):
            tensors[there.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return tensors | others


def write_safetensors(path, tensors):
    header, data = {}, io.BytesIO()
    for name, tensor in tensors.items():
        first = data.tell()
        data.write(np.ascontiguousarray(tensor).tobytes())
        header[name] = {"dtype": {"f": "F32", "i": "I64"}[tensor.dtype.kind], "shape": tensor.shape, "data_offsets": (first, data.tell())}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data.getvalue())
    return path


def test_a_safetensors_file_is_loaded(tmp_path):
    tensors = torch_tensors()
    model, variables = models.load_pretrained("resnet20_cifar", write_safetensors(tmp_path / "a.safetensors", tensors))
    assert model == models.ResNetCifar(20)
    kernel = tensors["layer3.0.conv1.weight"]  # OIHW
    np.testing.assert_array_equal(variables["params"]["layer3_0"]["conv1"]["kernel"][1, 2, 3], kernel[:, 3, 1, 2])
    np.testing.assert_array_equal(variables["params"]["linear"]["kernel"], tensors["linear.weight"].T)
    np.testing.assert_array_equal(variables["params"]["bn1"]["scale"], tensors["bn1.weight"])
    np.testing.assert_array_equal(variables["batch_stats"]["layer1_2"]["bn2"]["var"], tensors["layer1.2.bn2.running_var"])


def test_all_that_is_wrong_with_a_checkpoint_is_told(tmp_path):
    tensors = torch_tensors(extra=np.zeros(3, np.float32))
    del tensors["bn1.bias"]
    tensors["linear.weight"] = tensors["linear.weight"][:5]
    told = (
        r"a.safetensors as resnet20_cifar: .*names of pytorch_resnet_cifar10: missing: bn1.bias; unexpected: extra; "
        r"of another shape: linear.weight \(5, 64\), expected \(10, 64\)$"
    )
    with pytest.raises(ValueError, match=told):
        models.load_pretrained("resnet20_cifar", write_safetensors(tmp_path / "a.safetensors", tensors))


def test_other_classes_are_told_and_may_be_loaded(tmp_path):
    tensors = torch_tensors()
    tensors |= {"linear.weight": np.ones((100, 64), np.float32), "linear.bias": np.ones(100, np.float32)}
    path = write_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"linear.bias \(100,\), expected \(10,\).*It has other classes: write classes=100\.$"):
        models.load_pretrained("resnet20_cifar", path)
    model, variables = models.load_pretrained("resnet20_cifar", path, classes=100)
    assert model.apply(variables, np.zeros((1, 32, 32, 3), np.float32)).shape == (1, 100)
    tensors["bn1.bias"] = np.zeros(17, np.float32)
    with pytest.raises(ValueError, match=r"expected \(16,\)[^.]*linear.*expected \(10, 64\)$"):
        models.load_pretrained("resnet20_cifar", write_safetensors(tmp_path / "b.safetensors", tensors))


def test_other_widths_are_loaded(tmp_path):
    abstract = jax.eval_shape(models.MobileNetV2(0.1).init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    leaves = jax.tree.leaves_with_path(abstract)
    naming = models.ARCHITECTURES["mobilenet_v2"].namings["torchvision"]
    tensors = {_layout._name(path, leaf, naming): np.ones([leaf.shape[i] for i in OUTPUTS_FIRST[leaf.ndim]], np.float32) for path, leaf in leaves}
    path = write_safetensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match="of another shape: .*features.0.0.weight") as wrong:
        models.load_pretrained("mobilenet_v2", path)
    assert "classes=" not in str(wrong.value)
    model, variables = models.load_pretrained("mobilenet_v2", path, width=0.1)
    assert model == models.MobileNetV2(0.1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), variables, abstract)


def test_fields_that_a_network_has_not_are_refused():
    with pytest.raises(TypeError, match=r"resnet18 cannot be built with \{'widht': 2\}: .*Write fields of its module"):
        models.load_pretrained("resnet18", "none.pth", widht=2)


def test_a_wrapped_safetensors_file_in_capitals_is_loaded(tmp_path):
    tensors = torch_tensors()
    path = write_safetensors(tmp_path / "A.SAFETENSORS", {f"module.{n}": t for n, t in tensors.items()})
    _, variables = models.load_pretrained("resnet20_cifar", path)
    np.testing.assert_array_equal(variables["params"]["bn1"]["scale"], tensors["bn1.weight"])


def test_errors_are_told_by_the_names_that_match_best(tmp_path):
    tensors = {"stem.conv.weight": np.zeros((32, 3, 3, 3), np.float32), "s1.b1.conv1.conv.weight": np.zeros((48, 32, 1, 1), np.float32)}
    with pytest.raises(ValueError, match=r"names of timm: missing: .*head.fc.bias"):
        models.load_pretrained("regnetx_600mf", write_safetensors(tmp_path / "a.safetensors", tensors))


def test_an_unknown_network_is_refused_with_the_names_of_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"no network 'resnet19'.*resnet18.*vit_b16"):
        models.load_pretrained("resnet19", tmp_path / "a.pth")


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    for name in ("no.pth", "no.safetensors"):
        with pytest.raises(FileNotFoundError, match=name):
            models.load_pretrained("resnet20_cifar", tmp_path / name)


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr(architectures, "LITE0_WHEEL", "no_such_wheel")
    with pytest.raises(ModuleNotFoundError, match="pip install no_such_wheel"):
        models.load_efficientnet_lite0()


@pytest.mark.parametrize(
    ("name", "size", "short_side", "interpolation", "white"),
    [
        ("resnet50", 224, 256, "bilinear", (1 - 0.485) / 0.229),
        ("regnetx_3200mf", 224, 256, "bilinear", (1 - 0.485) / 0.229),
        ("mnasnet2_0", 224, 256, "bilinear", (1 - 0.485) / 0.229),
        ("efficientnet_lite4", 300, 332, "bicubic", 1),
        ("resnet56_cifar", 32, 32, "bilinear", (1 - 0.485) / 0.229),
        ("vit_s16", 224, 249, "bicubic", 1),
    ],
)
def test_preprocessing_is_the_sources(name, size, short_side, interpolation, white):
    preprocessing = models.ARCHITECTURES[name].preprocessing
    assert (preprocessing.size, round(size / preprocessing.crop), preprocessing.interpolation) == (size, short_side, interpolation)
    pixels = preprocessing.normalize(np.full((1, 2, 2, 3), 255, np.uint8))
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0, 0, 0, 0], white, rtol=1e-5)


@pytest.mark.parametrize(("names", "short_side", "interpolation", "white"), [
    ("timm", 249, "bicubic", 1), ("torchvision", 256, "bilinear", (1 - 0.485) / 0.229),
    ("torchvision's released file", 256, "bilinear", (1 - 0.485) / 0.229),
])  # fmt: skip
def test_a_vits_preprocessing_is_that_of_the_source_whose_names_it_has(names, short_side, interpolation, white, tmp_path):
    naming = models.ARCHITECTURES["vit_b16"].namings[names]
    leaves = jax.tree.leaves_with_path(jax.eval_shape(models.ViT().init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32)))
    tensors = {_layout._name(path, leaf, naming): np.zeros(1, np.float32) for path, leaf in leaves}  # shapes are not asked for
    found = models.preprocessing_of("vit_b16", write_safetensors(tmp_path / "a.safetensors", tensors))
    assert (found.size, round(found.size / found.crop), found.interpolation) == (224, short_side, interpolation)
    np.testing.assert_allclose(found.normalize(np.full((1, 1, 1, 3), 255, np.uint8))[0, 0, 0, 0], white, rtol=1e-5)


def test_an_encoder_has_no_preprocessing():
    with pytest.raises(ValueError, match="minilm_l6 takes no pixels: write one of resnet18"):
        models.preprocessing_of("minilm_l6", "a.safetensors")


def test_pixels_that_were_scaled_before_are_refused():
    with pytest.raises(TypeError, match="float32.*uint8"):
        models.ARCHITECTURES["resnet18"].preprocessing.normalize(np.ones((1, 2, 2, 3), np.float32))
