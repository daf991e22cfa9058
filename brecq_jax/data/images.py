"""Crops of photographs, mirror images, and photographs that wheels ship."""

import importlib.util
import math
import pathlib
from typing import Literal

import numpy as np
from PIL import Image

# Photographs on disk in scikit-image and scikit-learn; others of skimage.data would be downloaded.
CALIBRATION = ("skimage/data/astronaut.png", "skimage/data/chelsea.png", "skimage/data/rocket.jpg", "sklearn/datasets/images/china.jpg")
EVALUATION = ("skimage/data/coffee.png", "skimage/data/hubble_deep_field.jpg", "skimage/data/motorcycle_left.png", "sklearn/datasets/images/flower.jpg")
SPLITS = {"calibration": CALIBRATION, "evaluation": EVALUATION}
RUN = 8  # images before their mirror images: one in so many judges
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop
AREA_OF_FEW = (0.25, 1.0)  # of the few photographs that wheels ship, smaller parts show too little
TRIES = 10  # boxes drawn before the middle of the image is taken
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# A JPEG is decoded at a half, a quarter or an eighth where that leaves so many pixels for one of the crop, a side. It changes a
# pixel by 0.3 to 0.4 of 255 on average (with 1 by 0.9 to 1.3) and saves a third to a half of the time: `benchmarks/decode.py`.
SPARE = 2


def photographs(size: int, count: int, seed: int, split: Literal["calibration", "evaluation"]) -> np.ndarray:
    """Random crops of photographs that scikit-image and scikit-learn ship: uint8 (count, size, size, 3).

        calibration = photographs(224, 128, seed=0, split="calibration")

    The two splits share no photograph. Same seed, same crops.

    Raises:
      ValueError: an unknown split, or nothing asked for.
      ModuleNotFoundError: a photograph is not there. (With fewer of them the same seed would give other crops.)
    """
    if split not in SPLITS:
        raise ValueError(f"photographs: split={split!r}: write one of {list(SPLITS)}.")
    if size < 1 or count < 1:
        raise ValueError(f"photographs: size={size}, count={count}: write at least 1 for each.")
    paths = {name: _in_package(name) for name in SPLITS[split]}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise ModuleNotFoundError(f"photographs: no {', '.join(missing)} here. pip install scikit-image scikit-learn")
    sources = [Image.open(path).convert("RGB") for path in paths.values()]
    draw = np.random.default_rng(seed)
    crops = np.empty((count, size, size, 3), np.uint8)  # a list of them and their stack would take twice that
    for i in range(count):
        crops[i] = _random_crop(sources[i % len(sources)], size, draw)
    return crops


def _in_package(name: str) -> pathlib.Path | None:
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package)
    path = pathlib.Path(spec.submodule_search_locations[0]) / inside if spec else None
    return path if path and path.is_file() else None


def _random_crop(image: Image.Image, size: int, draw: np.random.Generator) -> np.ndarray:
    width, height = (min(side, drawn) for side, drawn in zip(image.size, _draw_sides(image, draw, AREA_OF_FEW), strict=True))
    return _draw_place(image, width, height, size, draw, "bicubic")


def random_crop(image: Image.Image, size: int, draw: np.random.Generator, interpolation: str = "bilinear") -> np.ndarray:
    """A box of 8 to 100 % of the area, sides 3 : 4 to 4 : 3, anywhere, resized, every other one mirrored: uint8 (size, size, 3).

    Source: Szegedy et al. 2015, section 6, https://arxiv.org/abs/1409.4842, as torchvision's RandomResizedCrop has it: a box that
    does not fit is drawn again, up to ten times; then the largest central box of such sides is taken.
    """
    _check_interpolation(interpolation)
    for _ in range(TRIES):
        width, height = _draw_sides(image, draw, AREA)
        if width <= image.width and height <= image.height:
            return _draw_place(image, width, height, size, draw, interpolation)
    width = min(image.width, round(image.height * ASPECT[1]))
    height = min(image.height, round(image.width / ASPECT[0]))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return _resized(image, (left, top, left + width, top + height), size, interpolation)


def _draw_sides(image: Image.Image, draw: np.random.Generator, of: tuple[float, float]) -> tuple[int, int]:
    area = image.width * image.height * draw.uniform(*of)
    aspect = np.exp(draw.uniform(*np.log(ASPECT)))
    return max(1, round(np.sqrt(area * aspect))), max(1, round(np.sqrt(area / aspect)))


def _draw_place(image: Image.Image, width: int, height: int, size: int, draw: np.random.Generator, interpolation: str) -> np.ndarray:
    left, top = draw.integers(image.width - width + 1), draw.integers(image.height - height + 1)
    crop = _resized(image, (left, top, left + width, top + height), size, interpolation)
    return crop[:, ::-1] if draw.random() < 0.5 else crop


def center_crop(image: Image.Image, size: int, fraction: float, interpolation: str = "bicubic") -> np.ndarray:
    """The middle of an image whose short side is resized to size / fraction: uint8 (size, size, 3).

    The paper's rule is short side 256 and the central 224, bilinear: fraction = 224 / 256. EfficientNet-Lite's is
    fraction = size / (size + 32), bicubic. Sides and corner are rounded as torchvision's Resize and CenterCrop do.
    """
    _check_interpolation(interpolation)
    short = round(size / fraction)
    width, height = (short * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    x, y = image.width / width, image.height / height
    return _resized(image, (left * x, top * y, (left + size) * x, (top + size) * y), size, interpolation)


def _check_interpolation(interpolation: str):
    if interpolation not in FILTERS:
        raise ValueError(f"data: interpolation={interpolation!r}: write one of {list(FILTERS)}.")


def _resized(image: Image.Image, box: tuple[float, float, float, float], size: int, interpolation: str) -> np.ndarray:
    """The box (left, top, right, bottom) of an image, whose pixels may not be decoded yet, at size × size."""
    left, top, right, bottom = box
    full = image.size
    enough = SPARE * size / min(right - left, bottom - top)
    image.draft(None, tuple(math.ceil(side * enough) for side in full))
    x, y = image.width / full[0], image.height / full[1]
    box = (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return np.asarray(rgb.resize((size, size), FILTERS[interpolation], box))


def mirrored(images: np.ndarray) -> np.ndarray:
    """Images (n, height, width, channels) and their mirror images: twice the calibration set, for nothing.

    Eight images are followed by their eight mirror images: `quantize` judges by one example in eight, and no example that
    judges is learned from in a mirror, but for one where 4 to 7 images remain after the last eight.
    """
    both = np.empty((2 * len(images), *images.shape[1:]), images.dtype)  # runs in a list would hold half of it once more
    for start in range(0, len(images), RUN):
        run = images[start : start + RUN]
        place = both[2 * start : 2 * (start + RUN)]
        place[: len(run)], place[len(run) :] = run, run[:, :, ::-1]
    return both
