"""Flax models, and readers for the PyTorch weights that people have."""

from brecq_jax.models._torch_files import read_torch
from brecq_jax.models.digits import DigitsNet, train_digits
from brecq_jax.models.efficientnet_lite import EfficientNetLite, load_efficientnet_lite0
from brecq_jax.models.resnet_cifar import ResNetCifar, load_resnet_cifar

__all__ = ["DigitsNet", "EfficientNetLite", "ResNetCifar", "load_efficientnet_lite0", "load_resnet_cifar", "read_torch", "train_digits"]
