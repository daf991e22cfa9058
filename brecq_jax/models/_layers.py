"""Layers that the convolutional networks share."""

import flax.linen as nn

DIVISOR = 8  # channels are a multiple of it


def channels(features: int, width: float) -> int:
    """`features` · `width`, rounded to a multiple of DIVISOR, down by at most a tenth (as torchvision does)."""
    wanted = features * width
    rounded = max(DIVISOR, int(wanted + DIVISOR / 2) // DIVISOR * DIVISOR)
    return rounded + DIVISOR if rounded < 0.9 * wanted else rounded


def conv(features: int, kernel: int, stride: int, name: str, groups: int = 1) -> nn.Conv:
    """A convolution without bias, padded by half its kernel on every side, as PyTorch's networks are."""
    return nn.Conv(features, (kernel, kernel), (stride, stride), kernel // 2, feature_group_count=groups, use_bias=False, name=name)


def norm(name: str, epsilon: float = 1e-5) -> nn.BatchNorm:
    """Batch norm of stored statistics."""
    return nn.BatchNorm(use_running_average=True, epsilon=epsilon, name=name)
