"""The ImageNet ResNets, with torchvision's structure: the stride of a bottleneck is on its 3×3 convolution.

Source: He et al. 2016, table 1, https://arxiv.org/abs/1512.03385; the place of the stride: torchvision's resnet.py.
"""

import flax.linen as nn
import jax

from brecq_jax.models._layers import conv, norm
from brecq_jax.models._preprocessing import Preprocessing

EXPANSION = 4  # of a bottleneck's last convolution
PREPROCESSING = Preprocessing(224, 224 / 256, "bilinear")


def _shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
    """x itself, or projected where the block changes its shape."""
    if stride == 1 and x.shape[-1] == features:
        return x
    return norm("downsample_bn")(conv(features, 1, stride, "downsample_conv")(x))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions. (b, h, w, i) to (b, h / stride, w / stride, features)."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        y = jax.nn.relu(norm("bn1")(conv(self.features, 3, self.stride, "conv1")(x)))
        y = norm("bn2")(conv(self.features, 3, 1, "conv2")(y))
        return jax.nn.relu(y + _shortcut(x, self.features, self.stride))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1. (b, h, w, i) to (b, h / stride, w / stride, EXPANSION · features)."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        out = EXPANSION * self.features
        y = jax.nn.relu(norm("bn1")(conv(self.features, 1, 1, "conv1")(x)))
        y = jax.nn.relu(norm("bn2")(conv(self.features, 3, self.stride, "conv2")(y)))
        y = norm("bn3")(conv(out, 1, 1, "conv3")(y))
        return jax.nn.relu(y + _shortcut(x, out, self.stride))


class ResNet(nn.Module):
    """Images (batch, h, w, 3) to logits (batch, classes). `width` is the channels of the first stage."""

    repeats: tuple[int, ...]
    block: type[nn.Module] = BasicBlock
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        x = jax.nn.relu(norm("bn1")(conv(self.width, 7, 2, "conv1")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, repeats in enumerate(self.repeats):
            for i in range(repeats):
                stride = 2 if stage > 0 and i == 0 else 1
                x = self.block(self.width * 2**stage, stride, name=f"layer{stage + 1}_{i}")(x)
        return nn.Dense(self.classes, name="fc")(x.mean((1, 2)))


def resnet18(**fields) -> ResNet:
    """Basic blocks, 2-2-2-2. `fields`: those of ResNet, to change."""
    return ResNet((2, 2, 2, 2), **fields)


def resnet34(**fields) -> ResNet:
    """Basic blocks, 3-4-6-3."""
    return ResNet((3, 4, 6, 3), **fields)


def resnet50(**fields) -> ResNet:
    """Bottlenecks, 3-4-6-3."""
    return ResNet((3, 4, 6, 3), Bottleneck, **fields)


def resnet101(**fields) -> ResNet:
    """Bottlenecks, 3-4-23-3."""
    return ResNet((3, 4, 23, 3), Bottleneck, **fields)


NAMINGS = {
    "torchvision, timm and BRECQ": (
        (r"^layer(\d)_(\d+)", r"layer\1.\2"), ("downsample_conv", "downsample.0"), ("downsample_bn", "downsample.1"),
    ),
}  # fmt: skip
