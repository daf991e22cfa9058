"""The networks that have no weights here: their size is the published one, and their parts have the right names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brecq_jax.models.bert import Bert
from brecq_jax.models.mobilenet_v2 import MobileNetV2
from brecq_jax.models.resnet import ResNet, resnet18, resnet34, resnet50
from brecq_jax.models.vit import ViT

IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


def paths(params):
    return {"/".join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(params)}


@pytest.mark.parametrize(
    ("model", "count", "path"),
    [
        (resnet18(), 11_689_512, "layer2_0/downsample_conv/kernel"),
        (resnet34(), 21_797_672, "layer3_5/conv2/kernel"),
        (resnet50(), 25_557_032, "layer1_0/conv3/kernel"),
        (MobileNetV2(), 3_504_872, "features_2/expand/kernel"),
        (ViT(), 5_717_416, "blocks_0/attn/query/kernel"),
    ],
    ids=["resnet18", "resnet34", "resnet50", "mobilenet_v2", "vit_ti16"],
)
def test_the_number_of_parameters_is_the_published_one(model, count, path):
    """Counts: torchvision's documentation of the weights; ViT-Ti/16: timm's vit_tiny_patch16_224."""
    params = jax.eval_shape(model.init, jax.random.key(0), IMAGE)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert path in paths(params)


@pytest.mark.parametrize(
    "model",
    [ResNet((1, 1), width=8, classes=5), MobileNetV2(width=0.1, classes=5), ViT(16, 16, 1, 2, 32, 5)],
    ids=["resnet", "mobilenet_v2", "vit"],
)
def test_images_become_finite_logits(model):
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    logits = jax.jit(model.apply)(variables, jax.random.normal(jax.random.key(1), (2, 32, 32, 3)))
    assert logits.shape == (2, 5)
    assert np.all(np.isfinite(logits))


def test_a_masked_token_reaches_no_other():
    model = Bert()
    ids, other = jnp.array([[1, 2, 3, 4]]), jnp.array([[1, 2, 3, 9]])
    mask = jnp.array([[1, 1, 1, 0]])
    variables = jax.jit(model.init)(jax.random.key(0), ids)
    np.testing.assert_allclose(model.apply(variables, ids, mask)[:, :3], model.apply(variables, other, mask)[:, :3], atol=1e-6)
    assert not np.allclose(model.apply(variables, ids)[:, :3], model.apply(variables, other)[:, :3], atol=1e-3)
    assert {"word/embedding", "blocks_1/attn/value/kernel", "blocks_0/fc1/kernel"} <= paths(variables["params"])


def test_errors_say_what_to_change():
    with pytest.raises(ValueError, match="resize"):
        ViT().init(jax.random.key(0), jnp.zeros((1, 30, 32, 3)))
    with pytest.raises(ValueError, match="positions"):
        Bert(positions=4).init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
