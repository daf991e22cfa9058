"""MNasNet-B1, which has no squeeze-and-excitation.

Source: Tan et al. 2019, https://arxiv.org/abs/1807.11626; B1's stages: TensorFlow's mnasnet_models.py, as in torchvision.
"""

import flax.linen as nn
import jax

from brecq_jax.models._layers import channels, conv, norm
from brecq_jax.models._layout import by_stage, timm_names
from brecq_jax.models._preprocessing import Preprocessing
from brecq_jax.models.mobilenet_v2 import InvertedResidual

# Expansion, channels, repeats, stride, kernel of each stage.
STAGES = ((3, 24, 3, 2, 3), (3, 40, 3, 2, 5), (6, 80, 3, 2, 5), (6, 96, 2, 1, 3), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))
STEM, SEPARABLE, HEAD = 32, 16, 1280
PREPROCESSING = Preprocessing(224, 224 / 256, "bilinear")


class Separable(nn.Module):
    """A depthwise convolution, then a pointwise one, with no shortcut. (b, h, w, i) to (b, h, w, features)."""

    features: int

    @nn.compact
    def __call__(self, x):
        x = jax.nn.relu(norm("depthwise_bn")(conv(x.shape[-1], 3, 1, "depthwise", x.shape[-1])(x)))
        return norm("project_bn")(conv(self.features, 1, 1, "project")(x))


class MNasNet(nn.Module):
    """Images (batch, h, w, 3) to logits (batch, classes). The head is as wide for every `width`."""

    width: float = 1.0
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        x = jax.nn.relu(norm("stem_bn")(conv(channels(STEM, self.width), 3, 2, "stem")(x)))
        x = Separable(channels(SEPARABLE, self.width), name="blocks_0")(x)
        number = 1
        for expansion, features, repeats, stride, kernel in STAGES:
            for i in range(repeats):
                block = InvertedResidual(
                    channels(features, self.width), stride if i == 0 else 1, expansion, kernel, jax.nn.relu, name=f"blocks_{number}"
                )
                x = block(x)
                number += 1
        x = jax.nn.relu(norm("head_bn")(conv(HEAD, 1, 1, "head")(x)))
        return nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))


BLOCKS = by_stage("blocks", 0, [1, *(repeats for _, _, repeats, _, _ in STAGES)])


def _torchvision():
    """torchvision counts the layers of the stem, of each stage and of the head in one row."""
    ends = {
        "stem": 0, "stem_bn": 1, "blocks_0/depthwise": 3, "blocks_0/depthwise_bn": 4, "blocks_0/project": 6, "blocks_0/project_bn": 7,
        "head": 14, "head_bn": 15,
    }  # fmt: skip
    inside = {"expand": 0, "expand_bn": 1, "depthwise": 3, "depthwise_bn": 4, "project": 6, "project_bn": 7}
    return (
        *((f"^{here}/", f"layers.{there}.") for here, there in ends.items()),
        *((f"^{block}/", f"layers.{n}.{i}.layers/") for n, stage in enumerate(BLOCKS[1:], 8) for i, block in enumerate(stage)),
        *((f"/{here}/", f".{there}.") for here, there in inside.items()),
        ("^classifier", "classifier.1"),
    )


NAMINGS = {
    "torchvision and BRECQ": _torchvision(),
    "timm": timm_names(BLOCKS),
}
