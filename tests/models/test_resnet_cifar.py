"""The CIFAR ResNet against the original network."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax.models._layout import from_torch
from brecq_jax.models.resnet_cifar import NAMINGS, ResNetCifar

VECTORS = pathlib.Path(__file__).parent / "vectors"
ABSTRACT = jax.eval_shape(ResNetCifar(20).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))


def torch_shapes():
    """Every tensor of the original ResNet-20, in the original's names and layout."""
    shapes = {"linear.weight": (10, 64), "linear.bias": (10,)}

    def add(prefix, number, shape):
        shapes[f"{prefix}conv{number}.weight"] = shape
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{prefix}bn{number}.{leaf}"] = shape[:1]

    add("", 1, (16, 3, 3, 3))
    before = 16
    for stage, features in enumerate((16, 32, 64), 1):
        for i in range(3):
            add(f"layer{stage}.{i}.", 1, (features, before, 3, 3))
            add(f"layer{stage}.{i}.", 2, (features, features, 3, 3))
            before = features
    return shapes


def torch_weights():
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in sorted(torch_shapes().items()):
        if len(shape) > 1:
            value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        elif name.endswith(("running_var", "weight")):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = 0.1 * rng.standard_normal(shape)
        weights[name] = value.astype(np.float32)
    return weights


def test_resnet20_equals_the_pytorch_network():
    """Vectors: logits of ResNet-20 with option-A shortcuts as akamaster/pytorch_resnet_cifar10 at d5489e89 defines
    it, in torch 2.13.0, weights `torch_weights()`, on default_rng(1).standard_normal((4, 3, 32, 32))."""
    variables = from_torch(torch_weights(), ABSTRACT, NAMINGS, "resnet20")
    x = np.random.default_rng(1).standard_normal((4, 3, 32, 32)).astype(np.float32).transpose(0, 2, 3, 1)
    got = np.asarray(jax.jit(ResNetCifar(20).apply)(variables, x))
    want = np.load(VECTORS / "resnet20.npz")["logits"]
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_parameter_paths_name_the_layers():
    assert {"conv1", "bn1", "layer1_0", "layer3_2", "linear"} <= set(ABSTRACT["params"])
    assert set(ABSTRACT["params"]["layer2_0"]) == {"conv1", "bn1", "conv2", "bn2"}
