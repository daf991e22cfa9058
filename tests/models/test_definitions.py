"""The networks' size is the published one, and their parts have the right names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brecq_jax.models import ARCHITECTURES, Bert, MNasNet, MobileNetV2, RegNet, ResNet, ResNetCifar, ViT, regnet_stages

IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


def paths(params):
    return {"/".join(k.key for k in path) for path, _ in jax.tree.leaves_with_path(params)}


@pytest.mark.parametrize(
    ("name", "count", "path"),
    [
        ("resnet18", 11_689_512, "layer2_0/downsample_conv/kernel"),
        ("resnet34", 21_797_672, "layer3_5/conv2/kernel"),
        ("resnet50", 25_557_032, "layer1_0/conv3/kernel"),
        ("resnet101", 44_549_160, "layer3_22/conv3/kernel"),
        ("mobilenet_v2", 3_504_872, "features_2/expand/kernel"),
        ("regnetx_600mf", 6_196_040, "stage4_6/b/kernel"),
        ("regnetx_3200mf", 15_296_552, "stage3_0/proj/kernel"),
        ("mnasnet1_0", 4_383_312, "blocks_16/project/kernel"),
        ("mnasnet2_0", 12_469_944, "blocks_0/depthwise/kernel"),
        ("vit_ti16", 5_717_416, "blocks_0/attn/qkv/kernel"),
        ("vit_s16", 22_050_664, "blocks_11/mlp/fc2/kernel"),
        ("vit_b16", 86_567_656, "blocks_11/attn/proj/kernel"),
    ],
)
def test_the_number_of_parameters_is_the_published_one(name, count, path):
    """Counts: torchvision's documentation of the weights; regnetx_600mf, ViT-Ti and -S: timm 1.0.31; mnasnet2_0: the
    official BRECQ release, in torch 2.13.0."""
    params = jax.eval_shape(ARCHITECTURES[name].build().init, jax.random.key(0), IMAGE)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert path in paths(params)


@pytest.mark.parametrize(
    "model",
    [
        ResNet((1, 1), width=8, classes=5), MobileNetV2(width=0.1, classes=5), MNasNet(0.1, 5), RegNet(((8, 1, 4),), 5),
        ViT(16, 16, 1, 2, 32, 5),
    ],  # fmt: skip
    ids=["resnet", "mobilenet_v2", "mnasnet", "regnet", "vit"],
)
def test_width_and_classes_are_the_users(model):
    batch = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    assert jax.eval_shape(model.apply, variables, batch).shape == (2, 5)


@pytest.mark.parametrize("depth", [22, 2, 0, -4])
def test_a_depth_that_no_cifar_resnet_has_is_refused(depth):
    with pytest.raises(ValueError, match=rf"depth {depth} is no 6n \+ 2"):
        ResNetCifar(depth).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_a_regnet_without_blocks_is_refused():
    with pytest.raises(ValueError, match="depth 0, group_width 24: write at least 1"):
        regnet_stages(48, 36.97, 2.24, 0, 24)


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


@pytest.mark.parametrize(
    ("rule", "stages"),
    [
        ((24, 36.44, 2.49, 13, 8), ((24, 1, 8), (56, 1, 8), (152, 4, 8), (368, 7, 8))),
        ((24, 24.48, 2.54, 22, 16), ((32, 1, 16), (64, 2, 16), (160, 7, 16), (384, 12, 16))),
        ((48, 36.97, 2.24, 16, 24), ((48, 1, 24), (96, 3, 24), (240, 5, 24), (528, 7, 24))),
        ((80, 34.01, 2.25, 18, 24), ((72, 2, 24), (168, 4, 24), (408, 10, 24), (912, 2, 24))),
        ((88, 26.31, 2.25, 25, 48), ((96, 2, 48), (192, 6, 48), (432, 15, 48), (1008, 2, 48))),
        ((80, 49.56, 2.88, 23, 120), ((80, 2, 80), (240, 5, 120), (720, 15, 120), (1920, 1, 120))),
        ((320, 69.86, 2.0, 23, 168), ((336, 2, 168), (672, 7, 168), (1344, 13, 168), (2520, 1, 168))),
    ],
)
def test_regnets_stages_follow_from_its_rule(rule, stages):
    """RegNetX-200MF, -400MF, -600MF, -1.6GF, -3.2GF, -8GF and -32GF: rules and stages of timm 1.0.31's networks."""
    assert regnet_stages(*rule) == stages


def test_a_rule_that_does_not_grow_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        regnet_stages(20, 36.0, 2.5, 13, 8)
    with pytest.raises(ValueError, match="factor above 1"):
        regnet_stages(24, 36.0, 1.0, 13, 8)
