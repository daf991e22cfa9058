"""Flax models, and readers for the PyTorch weights that people have."""

from brecq_jax.models._torch_files import read_torch
from brecq_jax.models.bert import Bert
from brecq_jax.models.digits import DigitsNet, train_digits
from brecq_jax.models.efficientnet_lite import EfficientNetLite, efficientnet_lite, load_efficientnet_lite0
from brecq_jax.models.mobilenet_v2 import MobileNetV2
from brecq_jax.models.resnet import ResNet, resnet18, resnet34, resnet50
from brecq_jax.models.resnet_cifar import ResNetCifar, load_resnet_cifar
from brecq_jax.models.vit import ViT

__all__ = [
    "Bert",
    "DigitsNet",
    "EfficientNetLite",
    "MobileNetV2",
    "ResNet",
    "ResNetCifar",
    "ViT",
    "efficientnet_lite",
    "load_efficientnet_lite0",
    "load_resnet_cifar",
    "read_torch",
    "resnet18",
    "resnet34",
    "resnet50",
    "train_digits",
]
