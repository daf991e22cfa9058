"""Flax models, and readers for the PyTorch weights that people have."""

from brecq_jax.models._preprocessing import Preprocessing
from brecq_jax.models._safetensors import read_safetensors
from brecq_jax.models._torch_files import read_torch
from brecq_jax.models.architectures import (
    ARCHITECTURES, ENCODERS, Architecture, load_efficientnet_lite0, load_pretrained, load_resnet_cifar, preprocessing_of,
)  # fmt: skip
from brecq_jax.models.bert import Bert, SentenceEncoder
from brecq_jax.models.decoder import Decoder, TrainedDecoder, surprise, train_decoder
from brecq_jax.models.digits import DigitsNet, train_digits
from brecq_jax.models.efficientnet_lite import EfficientNetLite, efficientnet_lite
from brecq_jax.models.mnasnet import MNasNet
from brecq_jax.models.mobilenet_v2 import MobileNetV2
from brecq_jax.models.regnet import RegNet, regnet_stages, regnetx_600mf, regnetx_3200mf
from brecq_jax.models.resnet import ResNet, resnet18, resnet34, resnet50, resnet101
from brecq_jax.models.resnet_cifar import ResNetCifar
from brecq_jax.models.vit import ViT

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Bert",
    "Decoder",
    "DigitsNet",
    "ENCODERS",
    "EfficientNetLite",
    "MNasNet",
    "MobileNetV2",
    "Preprocessing",
    "RegNet",
    "ResNet",
    "ResNetCifar",
    "SentenceEncoder",
    "TrainedDecoder",
    "ViT",
    "efficientnet_lite",
    "load_efficientnet_lite0",
    "load_pretrained",
    "load_resnet_cifar",
    "preprocessing_of",
    "read_safetensors",
    "read_torch",
    "regnet_stages",
    "regnetx_600mf",
    "regnetx_3200mf",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "surprise",
    "train_decoder",
    "train_digits",
]
