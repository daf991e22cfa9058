r"""Our networks against PyTorch code that we did not write: the same made-up weights, the same image, the same logits.

    PYTHONPATH=. python benchmarks/parity.py --brecq=BRECQ --cifar=pytorch_resnet_cifar10 --vectors=tests/models/vectors/parity.npz
    PYTHONPATH=. python benchmarks/parity.py --brecq=BRECQ --cifar=pytorch_resnet_cifar10 --weights resnet20_cifar=resnet20-12fca82f.th

Needs, beside this package: torch, torchvision, timm and efficientnet_lite_pytorch (pip install --no-deps is enough), and
checkouts of yhhhli/BRECQ and akamaster/pytorch_resnet_cifar10. Prints a table in Markdown. `--weights NAME=FILE …`: real
weights, on photographs, in place of made-up ones; with `--images=FOLDER` on those of a folder that score (`data.open_images`), and the
share of right labels beside. tests/models/test_parity.py compares with what `--vectors` stores.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np

from brecq_jax import data, models
from brecq_jax.models._layout import from_torch

SEED = 0
SIDES = {"cifar": 32, "vit": 224, "efficientnet": 60, "": 64}  # 60: odd sides inside, where SAME padding is lopsided
GAINS = {"resnet": 0.7, "regnet": 0.7, "": 1.6}  # so that activations neither fade nor grow: every block of these adds its input
IMAGES = 8  # photographs for real weights
CHUNK = 100  # of a folder's images at a time


def made_up_tensors(name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """float32 tensors for our network `name`, drawn in the order of `shapes` from one numpy generator.

    Of two axes or four: normal · sqrt(gain / inputs). Of three (embeddings): normal / 2. Of one: the scales of norms and
    variances uniform in 0.5 to 1.5, biases and means normal / 10.
    """
    draw, tensors = np.random.default_rng(SEED), {}
    gain = next(gain for word, gain in GAINS.items() if word in name)
    for tensor, shape in shapes.items():
        if len(shape) == 1 and tensor.endswith(("weight", "running_var")):
            tensors[tensor] = draw.random(shape, np.float32) + np.float32(0.5)
            continue
        size = {1: 0.1, 3: 0.5}.get(len(shape)) or np.sqrt(gain / np.prod(shape[1:]))
        tensors[tensor] = draw.standard_normal(shape, np.float32) * np.float32(size)
    return tensors


def made_up_image(name: str) -> np.ndarray:
    """(1, side, side, 3), normal."""
    side = next(side for word, side in SIDES.items() if word in name)
    return np.random.default_rng(SEED + 1).standard_normal((1, side, side, 3), np.float32)


def networks(brecq: str, cifar: str, **lite) -> dict[str, dict[str, Callable]]:
    """By our name and by source: what builds the PyTorch network. `lite`: for efficientnet_lite_pytorch's."""
    _declare_torchvision_ops()
    import efficientnet_lite_pytorch
    import timm
    import torchvision

    sys.path.insert(0, brecq)  # its files import each other as `models`
    theirs = {n: importlib.import_module(f"models.{n}") for n in ("resnet", "mobilenetv2", "regnet", "mnasnet")}
    spec = importlib.util.spec_from_file_location("cifar_resnet", pathlib.Path(cifar) / "resnet.py")
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    tv, make = torchvision.models, lambda n: functools.partial(timm.create_model, n)
    found = {
        n: {"BRECQ": getattr(theirs["resnet"], n), "torchvision": getattr(tv, n), "timm": make(n)}
        for n in ("resnet18", "resnet34", "resnet50", "resnet101")
    }
    found["mobilenet_v2"] = {"torchvision": tv.mobilenet_v2, "BRECQ": theirs["mobilenetv2"].mobilenetv2, "timm": make("mobilenetv2_100")}
    found["regnetx_600mf"] = {"BRECQ": theirs["regnet"].regnetx_600m, "timm": make("regnetx_006")}
    found["regnetx_3200mf"] = {"BRECQ": theirs["regnet"].regnetx_3200m, "timm": make("regnetx_032"), "torchvision": tv.regnet_x_3_2gf}
    mnasnet = theirs["mnasnet"].mnasnet
    found["mnasnet1_0"] = {"torchvision": tv.mnasnet1_0, "BRECQ": functools.partial(mnasnet, scale=1.0), "timm": make("mnasnet_100")}
    found["mnasnet2_0"] = {"BRECQ": functools.partial(mnasnet, scale=2.0)}
    for i in range(5):
        package = functools.partial(efficientnet_lite_pytorch.EfficientNet.from_name, f"efficientnet-lite{i}", **lite)
        found[f"efficientnet_lite{i}"] = {"timm": make(f"tf_efficientnet_lite{i}"), "efficientnet_lite_pytorch": package}
    for depth in (20, 32, 44, 56):
        found[f"resnet{depth}_cifar"] = {"pytorch_resnet_cifar10": getattr(small, f"resnet{depth}")}
    for ours, size in (("ti", "tiny"), ("s", "small"), ("b", "base")):
        found[f"vit_{ours}16"] = {"timm": make(f"vit_{size}_patch16_224")}
    found["vit_b16"]["torchvision"] = tv.vit_b_16
    return found


@functools.cache  # which keeps the library, and with it the ops
def _declare_torchvision_ops():
    """torchvision wants the ops of its compiled half, which is for one version of torch. No network here calls them."""
    import torch

    root = pathlib.Path(importlib.util.find_spec("torchvision").submodule_search_locations[0])
    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in sorted(set(re.findall(r'torchvision::(\w+)"', (root / "_meta_registrations.py").read_text()))):
        library.define(f"{op}(Tensor x) -> Tensor")
    return library


def torch_logits(network, tensors: dict[str, np.ndarray], batches: Sequence[np.ndarray]) -> np.ndarray:
    import torch

    state = {n: t for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    if set(state) != set(tensors):
        raise ValueError(f"not the tensors of {type(network).__name__}: {sorted(set(state) ^ set(tensors))}")
    for name, tensor in state.items():
        tensor.copy_(torch.from_numpy(np.array(tensors[name])))
    with torch.no_grad():
        return np.concatenate([network.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy() for images in batches])


def our_logits(name: str, tensors: dict[str, np.ndarray], images: np.ndarray) -> tuple[np.ndarray, int]:
    """Logits, and the number of parameters."""
    architecture = models.ARCHITECTURES[name]
    model = architecture.build()
    abstract = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *images.shape[1:]), np.float32))
    variables = from_torch(tensors, abstract, architecture.namings, name)
    return np.asarray(jax.jit(model.apply)(variables, images)), sum(x.size for x in jax.tree.leaves(variables["params"]))


def row(name: str, source: str, count: int, ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray | None = None) -> str:
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    right = "" if labels is None else " " + ", ".join(f"{100 * np.mean(z.argmax(-1) == labels):.2f}" for z in (ours, theirs)) + " |"
    return f"| {name} | {count:,} | {source} | {worst:.1e} | {same} of {len(ours)} | {np.abs(theirs).max():.3g} |{right}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--brecq", required=True)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--vectors", help="where to store logits, names and shapes for the tests")
    parser.add_argument("--weights", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--images", help="a folder, for --weights: DIR/train and DIR/val, or one folder a class")
    parser.add_argument("--only", default="", help="a regular expression for our names")
    settings = parser.parse_args()
    # efficientnet_lite_pytorch fixes its padding for one side of the image: the published one, or ours.
    lite = {} if settings.weights else {"image_size": SIDES["efficientnet"]}
    found = networks(settings.brecq, settings.cifar, **lite)
    top1 = " top-1 ours, theirs |" if settings.images else ""
    print(f"| network | parameters | against | largest difference / largest logit | same first class | largest logit |{top1}\n|---|---|---|---|---|---|{'---|' * bool(top1)}")
    for name, file in (pair.split("=", 1) for pair in settings.weights):
        for source, line in real_rows(name, file, found[name], settings.images):
            print(line, flush=True)
    if settings.weights:
        return
    stored, shapes = {}, {}
    for name in filter(functools.partial(re.search, settings.only), found):
        seen = []
        for source, build in found[name].items():
            network = build()
            theirs = {n: tuple(t.shape) for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
            tensors, image = made_up_tensors(name, theirs), made_up_image(name)
            want = torch_logits(network, tensors, [image])
            got, count = our_logits(name, tensors, image)
            print(row(name, source, count, got, want), flush=True)
            if theirs not in seen:
                seen.append(theirs)
                shapes[f"{name} {source}"], stored[f"{name} {source}"] = theirs, want[0]
    if settings.vectors:
        names = np.frombuffer(json.dumps(shapes, separators=(",", ":")).encode(), np.uint8)
        np.savez_compressed(settings.vectors, shapes=names, **stored)


def real_rows(name: str, file: str, sources: dict, folder: str | None):
    """Lines of the table for the sources whose names are the file's."""
    preprocessing = models.preprocessing_of(name, file)
    if folder:
        crop = functools.partial(data.center_crop, size=preprocessing.size, fraction=preprocessing.crop, interpolation=preprocessing.interpolation)
        parts, labels = zip(*data.stream(data.open_images(folder)[1], crop, CHUNK), strict=True)
        labels = None if labels[0] is None else np.concatenate(labels)
    else:
        parts, labels = [data.photographs(preprocessing.size, IMAGES, SEED, "evaluation")], None
    parts = [np.asarray(preprocessing.normalize(part)) for part in parts]
    model, variables = models.load_pretrained(name, file)
    run = jax.jit(model.apply)
    got = np.concatenate([run(variables, part) for part in parts])
    tensors = {n: t for n, t in models.read_torch(file).items() if not n.endswith("num_batches_tracked")}
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    for source, build in sources.items():
        network = build()
        if set(tensors) == {n for n in network.state_dict() if not n.endswith("num_batches_tracked")}:
            yield source, row(f"{name}, {pathlib.Path(file).name}", source, count, got, torch_logits(network, tensors, parts), labels)


if __name__ == "__main__":
    main()
