"""MobileNetV2, with torchvision's numbering: features_0 is the stem, features_18 the head.

Source: Sandler et al. 2018, table 2, https://arxiv.org/abs/1801.04381.
"""

import flax.linen as nn
import jax

# Expansion, channels, repeats, stride of each stage.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, HEAD = 32, 1280
DIVISOR = 8  # channels are a multiple of it


def _channels(features: int, width: float) -> int:
    """`features` · `width`, rounded to a multiple of DIVISOR, down by at most a tenth (as torchvision does)."""
    wanted = features * width
    rounded = max(DIVISOR, int(wanted + DIVISOR / 2) // DIVISOR * DIVISOR)
    return rounded + DIVISOR if rounded < 0.9 * wanted else rounded


def _conv(features: int, kernel: int, stride: int, name: str, groups: int = 1) -> nn.Conv:
    return nn.Conv(features, (kernel, kernel), (stride, stride), kernel // 2, feature_group_count=groups, use_bias=False, name=name)


def _norm(name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, epsilon=1e-5, name=name)


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; x + … where the shape stays. (b, h, w, i) to (b, h / stride, w / stride, features)."""

    features: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x):
        y, hidden = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = jax.nn.relu6(_norm("expand_bn")(_conv(hidden, 1, 1, "expand")(y)))
        y = jax.nn.relu6(_norm("depthwise_bn")(_conv(hidden, 3, self.stride, "depthwise", hidden)(y)))
        y = _norm("project_bn")(_conv(self.features, 1, 1, "project")(y))
        return x + y if y.shape == x.shape else y


class _ConvNorm(nn.Module):
    features: int
    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x):
        return jax.nn.relu6(_norm("bn")(_conv(self.features, self.kernel, self.stride, "conv")(x)))


class MobileNetV2(nn.Module):
    """Images (batch, h, w, 3) to logits (batch, classes)."""

    width: float = 1.0
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        x = _ConvNorm(_channels(STEM, self.width), 3, 2, name="features_0")(x)
        number = 1
        for expansion, features, repeats, stride in STAGES:
            for i in range(repeats):
                block = InvertedResidual(_channels(features, self.width), stride if i == 0 else 1, expansion, name=f"features_{number}")
                x = block(x)
                number += 1
        x = _ConvNorm(_channels(HEAD, max(1.0, self.width)), 1, 1, name=f"features_{number}")(x)
        return nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))
