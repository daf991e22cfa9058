"""Images to calibrate and score on: photographs that wheels ship, and folders."""

import concurrent.futures
import importlib.util
import pathlib
import re
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

# Photographs on disk in scikit-image and scikit-learn; others of skimage.data would be downloaded.
CALIBRATION = ("skimage/data/astronaut.png", "skimage/data/chelsea.png", "skimage/data/rocket.jpg", "sklearn/datasets/images/china.jpg")
EVALUATION = ("skimage/data/coffee.png", "skimage/data/hubble_deep_field.jpg", "skimage/data/motorcycle_left.png", "sklearn/datasets/images/flower.jpg")
SPLITS = {"calibration": CALIBRATION, "evaluation": EVALUATION}
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
AREA, ASPECT = (0.25, 1.0), (3 / 4, 4 / 3)  # of a random crop


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
    return np.stack([_random_crop(sources[i % len(sources)], size, draw) for i in range(count)])


def _in_package(name: str) -> pathlib.Path | None:
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package)
    path = pathlib.Path(spec.submodule_search_locations[0]) / inside if spec else None
    return path if path and path.is_file() else None


def _random_crop(image: Image.Image, size: int, draw: np.random.Generator) -> np.ndarray:
    area = image.width * image.height * draw.uniform(*AREA)
    aspect = np.exp(draw.uniform(*np.log(ASPECT)))
    width = min(image.width, max(1, round(np.sqrt(area * aspect))))
    height = min(image.height, max(1, round(np.sqrt(area / aspect))))
    left, top = draw.integers(image.width - width + 1), draw.integers(image.height - height + 1)
    crop = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + width, top + height)))
    return crop[:, ::-1] if draw.random() < 0.5 else crop

RUN = 8  # images before their mirror images: one in so many judges


def center_crop(image: Image.Image, size: int, fraction: float) -> np.ndarray:
    """The central square of `fraction` of the short side, resized (bicubic) to size: uint8 (size, size, 3).

    EfficientNet-Lite's rule is fraction = size / (size + 32).
    """
    side = round(min(image.size) * fraction)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box))


def mirrored(images: np.ndarray) -> np.ndarray:
    """Images (n, height, width, channels) and their mirror images: twice the calibration set, for nothing.

    Eight images are followed by their eight mirror images: `quantize` judges by one example in eight, and no example that
    judges is learned from in a mirror.
    """
    runs = [images[i : i + RUN] for i in range(0, len(images), RUN)]
    return np.concatenate([part for run in runs for part in (run, run[:, :, ::-1])])


def folder(
    path: str | pathlib.Path,
    size: int,
    fraction: float = 1.0,
    limit: int | None = None,
    transform: Callable[[Image.Image], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Images of a folder and the folders in it, in the order of their paths, and their labels if names give them.

        images, labels = folder("imagenet_sample", 224, fraction=224 / 256)

    Labels: the position of the subfolder among the sorted subfolders if all images lie in two or more; else the number
    that every file name begins with (`000_n01440764_tench.jpg`); else None. `limit` changes no label. Hidden files are
    not read. Decoded in threads.

    Args:
      size: of the crops, in pixels.
      fraction: of the short side, see `center_crop`.
      limit: read this many, evenly spread.
      transform: instead of `center_crop`: from the opened image to an array of size × size × 3.

    Returns: uint8 (n, size, size, 3) and int (n,) or None.

    Raises:
      ValueError: no images, one that cannot be read, or a bad fraction, limit or transform.
    """
    root = pathlib.Path(path)
    if not 0 < fraction <= 1:
        raise ValueError(f"data: fraction={fraction} of the short side: write more than 0 and at most 1.")
    if limit is not None and limit < 1:
        raise ValueError(f"data: limit={limit}: write at least 1, or None for all.")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not _is_hidden(p.relative_to(root)))
    if not files:
        raise ValueError(f"data: {root} {'holds no images' if root.is_dir() else 'is no folder, so it holds no images'} ({', '.join(SUFFIXES)}).")
    labels = _labels(root, files)
    if limit is not None and limit < len(files):
        chosen = [i * len(files) // limit for i in range(limit)]
        files, labels = [files[i] for i in chosen], None if labels is None else labels[chosen]

    def read(file: pathlib.Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                image.load()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"data: {file} cannot be read as an image: {error}. Repair or remove it.") from error
        pixels = center_crop(image, size, fraction) if transform is None else np.asarray(transform(image))
        if pixels.shape != (size, size, 3):
            raise ValueError(f"data: transform made {list(pixels.shape)} of {file}. Return {[size, size, 3]}, as size={size} says.")
        return pixels

    with concurrent.futures.ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(read, files)))
    return pixels, labels


def _is_hidden(inside: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in inside.parts)


def _labels(root: pathlib.Path, files: list[pathlib.Path]) -> np.ndarray | None:
    inside = [f.relative_to(root).parts for f in files]
    if all(len(parts) > 1 for parts in inside) and len({parts[0] for parts in inside}) > 1:
        # A subfolder without images keeps its number: it is a class of which nothing came.
        classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        return np.array([classes.index(parts[0]) for parts in inside])
    numbers = [re.match(r"(\d+)_", f.name) for f in files]
    return np.array([int(m[1]) for m in numbers]) if all(numbers) else None
