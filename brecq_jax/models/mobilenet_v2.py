"""MobileNetV2, with torchvision's numbering: features_0 is the stem, features_18 the head.

Source: Sandler et al. 2018, table 2, https://arxiv.org/abs/1801.04381.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from brecq_jax.models._layers import channels, conv, norm
from brecq_jax.models._layout import Naming, by_stage, timm_names
from brecq_jax.models._preprocessing import Preprocessing

# Expansion, channels, repeats, stride of each stage.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, HEAD = 32, 1280
PREPROCESSING = Preprocessing(224, 224 / 256, "bilinear")


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; x + … where the shape stays. (b, h, w, i) to (b, h / stride, w / stride, features)."""

    features: int
    stride: int
    expansion: int
    kernel: int = 3
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu6

    @nn.compact
    def __call__(self, x):
        y, hidden = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = self.activation(norm("expand_bn")(conv(hidden, 1, 1, "expand")(y)))
        y = self.activation(norm("depthwise_bn")(conv(hidden, self.kernel, self.stride, "depthwise", hidden)(y)))
        y = norm("project_bn")(conv(self.features, 1, 1, "project")(y))
        return x + y if y.shape == x.shape else y


class _ConvNorm(nn.Module):
    features: int
    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x):
        return jax.nn.relu6(norm("bn")(conv(self.features, self.kernel, self.stride, "conv")(x)))


class MobileNetV2(nn.Module):
    """Images (batch, h, w, 3) to logits (batch, classes)."""

    width: float = 1.0
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        x = _ConvNorm(channels(STEM, self.width), 3, 2, name="features_0")(x)
        number = 1
        for expansion, features, repeats, stride in STAGES:
            for i in range(repeats):
                block = InvertedResidual(channels(features, self.width), stride if i == 0 else 1, expansion, name=f"features_{number}")
                x = block(x)
                number += 1
        x = _ConvNorm(channels(HEAD, max(1.0, self.width)), 1, 1, name=f"features_{number}")(x)
        return nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))


def _numbered(first: tuple[str, ...], others: tuple[str, ...]) -> Naming:
    """Names by number: of the layers of the first block, which has no expansion, and of the other blocks."""
    layers = ("expand", "expand_bn", "depthwise", "depthwise_bn", "project", "project_bn")
    return (
        *((f"^features_1/{layer}/", f"features.1.conv.{place}.") for layer, place in zip(layers[2:], first, strict=True)),
        *((rf"^features_(\d+)/{layer}/", rf"features.\1.conv.{place}.") for layer, place in zip(layers, others, strict=True)),
        (r"^features_(\d+)/conv/", r"features.\1.0."),
        (r"^features_(\d+)/bn/", r"features.\1.1."),
        ("^classifier", "classifier.1"),
    )


NAMINGS = {
    "torchvision": _numbered(("0.0", "0.1", "1", "2"), ("0.0", "0.1", "1.0", "1.1", "2", "3")),
    "BRECQ": _numbered(("0", "1", "3", "4"), ("0", "1", "3", "4", "6", "7")),
    "timm": (
        ("^features_0/conv/", "stem/"), ("^features_0/bn/", "stem_bn/"), ("^features_18/conv/", "head/"), ("^features_18/bn/", "head_bn/"),
        *timm_names(by_stage("features", 1, [repeats for _, _, repeats, _ in STAGES])),
    ),
}  # fmt: skip
