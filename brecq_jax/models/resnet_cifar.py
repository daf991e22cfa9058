"""The CIFAR ResNets, with parameter-free (option A) shortcuts.

Source: He et al. 2016, section 4.2, https://arxiv.org/abs/1512.03385; weights: akamaster/pytorch_resnet_cifar10.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from brecq_jax.models._layers import conv, norm
from brecq_jax.models._preprocessing import Preprocessing

PREPROCESSING = Preprocessing(32, 1.0, "bilinear")
NAMINGS = {"pytorch_resnet_cifar10": ((r"^layer(\d)_(\d+)", r"layer\1.\2"),)}


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut that subsamples and pads channels."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        y = jax.nn.relu(norm("bn1")(conv(self.features, 3, self.stride, "conv1")(x)))
        y = norm("bn2")(conv(self.features, 3, 1, "conv2")(y))
        if self.stride > 1:
            pad = (self.features - x.shape[-1]) // 2
            x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (pad, pad)))
        return jax.nn.relu(x + y)


class ResNetCifar(nn.Module):
    """Images (batch, 32, 32, 3), normalised, to logits. depth = 6n + 2: 20, 32, 44, 56."""

    depth: int = 20
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(f"ResNetCifar: depth {self.depth} is no 6n + 2: write 20, 32, 44, 56 or another.")
        x = jax.nn.relu(norm("bn1")(conv(16, 3, 1, "conv1")(x)))
        for stage, features in enumerate((16, 32, 64), 1):
            for i in range((self.depth - 2) // 6):
                x = BasicBlock(features, 2 if stage > 1 and i == 0 else 1, name=f"layer{stage}_{i}")(x)
        return nn.Dense(self.classes, name="linear")(x.mean((1, 2)))
