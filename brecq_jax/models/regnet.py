"""RegNetX: bottlenecks of grouped convolutions, with widths that grow by one rule.

Source: Radosavovic et al. 2020, section 3.3 and table 8 (RegNetX), https://arxiv.org/abs/2003.13678.
"""

import flax.linen as nn
import jax
import numpy as np

from brecq_jax.models._layers import DIVISOR, conv, norm
from brecq_jax.models._preprocessing import Preprocessing

STEM = 32
PREPROCESSING = Preprocessing(224, 224 / 256, "bilinear")


def regnet_stages(w0: int, wa: float, wm: float, depth: int, group_width: int) -> tuple[tuple[int, int, int], ...]:
    """Channels, repeats and group width of each stage.

    Block j wants u = w0 + wa · j channels (eq. 2), which is w0 · wm^s (eq. 3), and gets w0 · wm^round(s) (eq. 4), rounded
    to a multiple of 8. Blocks of one width are a stage; its width is rounded to a multiple of the group's.

    Raises:
      ValueError: widths that do not grow, a first one that is no multiple of 8, or no blocks.
    """
    if depth < 1 or group_width < 1:
        raise ValueError(f"regnet: depth {depth}, group_width {group_width}: write at least 1 for each.")
    if wa < 0 or wm <= 1 or w0 <= 0 or w0 % DIVISOR:
        raise ValueError(f"regnet: w0 {w0}, wa {wa}, wm {wm}: write a multiple of {DIVISOR}, a slope of at least 0 and a factor above 1.")
    wanted = w0 + wa * np.arange(depth)
    exponents = np.round(np.log(wanted / w0) / np.log(wm))
    widths = np.round(w0 * wm**exponents / DIVISOR) * DIVISOR
    stages = []
    for width, repeats in zip(*np.unique(widths.astype(int), return_counts=True), strict=True):
        group = min(group_width, int(width))
        stages.append((round(width / group) * group, int(repeats), group))
    return tuple(stages)


class ResBottleneck(nn.Module):
    """1×1, grouped 3×3, 1×1, as wide inside as outside. (b, h, w, i) to (b, h / stride, w / stride, features)."""

    features: int
    stride: int
    group_width: int

    @nn.compact
    def __call__(self, x):
        y = jax.nn.relu(norm("a_bn")(conv(self.features, 1, 1, "a")(x)))
        y = jax.nn.relu(norm("b_bn")(conv(self.features, 3, self.stride, "b", self.features // self.group_width)(y)))
        y = norm("c_bn")(conv(self.features, 1, 1, "c")(y))
        if x.shape != y.shape:
            x = norm("proj_bn")(conv(self.features, 1, self.stride, "proj")(x))
        return jax.nn.relu(x + y)


class RegNet(nn.Module):
    """Images (batch, h, w, 3) to logits (batch, classes). `stages`: channels, repeats and group width of each."""

    stages: tuple[tuple[int, int, int], ...]
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        x = jax.nn.relu(norm("stem_bn")(conv(STEM, 3, 2, "stem")(x)))
        for stage, (features, repeats, group_width) in enumerate(self.stages, 1):
            for i in range(repeats):
                x = ResBottleneck(features, 2 if i == 0 else 1, group_width, name=f"stage{stage}_{i}")(x)
        return nn.Dense(self.classes, name="fc")(x.mean((1, 2)))


def regnetx_600mf(**fields) -> RegNet:
    """16 blocks, groups of 24. `fields`: those of RegNet, to change."""
    return RegNet(regnet_stages(48, 36.97, 2.24, 16, 24), **fields)


def regnetx_3200mf(**fields) -> RegNet:
    """25 blocks, groups of 48."""
    return RegNet(regnet_stages(88, 26.31, 2.25, 25, 48), **fields)


MOST_BLOCKS = 32  # in one stage, for the two namings that count from 1
FROM_ONE = tuple((rf"^stage(\d)_{i}/", rf"s\1.b{i + 1}/") for i in range(MOST_BLOCKS))
NAMINGS = {
    "BRECQ": (
        ("^stem/", "stem.conv."), ("^stem_bn/", "stem.bn."), ("^fc/", "head.fc."), *FROM_ONE, ("/proj_bn/", ".bn."), ("/([abc])(_bn)?/", r".f.\1\2."),
    ),
    "timm": (
        ("^stem/", "stem.conv."), ("^stem_bn/", "stem.bn."), ("^fc/", "head.fc."), *FROM_ONE,
        ("/a(_bn)?/", r"/conv1\1/"), ("/b(_bn)?/", r"/conv2\1/"), ("/c(_bn)?/", r"/conv3\1/"), ("/proj(_bn)?/", r"/downsample\1/"),
        ("/(conv.|downsample)/", r".\1.conv."), ("/(conv.|downsample)_bn/", r".\1.bn."),
    ),
    "torchvision": (
        ("^stem/", "stem.0."), ("^stem_bn/", "stem.1."), (r"^stage(\d)_(\d+)/", r"trunk_output.block\1.block\1-\2/"),
        ("/([abc])/", r".f.\1.0."), ("/([abc])_bn/", r".f.\1.1."), ("/proj/", ".proj.0."), ("/proj_bn/", ".proj.1."),
    ),
}  # fmt: skip
