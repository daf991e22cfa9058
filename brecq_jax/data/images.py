"""Images to calibrate and score on: photographs that wheels ship, and folders."""

import concurrent.futures
import importlib.util
import pathlib
import re
from typing import Literal

import numpy as np
from PIL import Image

# Photographs on disk in scikit-image and scikit-learn; others of skimage.data would be downloaded.
CALIBRATION = ("skimage/data/astronaut.png", "skimage/data/chelsea.png", "skimage/data/rocket.jpg", "sklearn/datasets/images/china.jpg")
EVALUATION = ("skimage/data/coffee.png", "skimage/data/hubble_deep_field.jpg", "skimage/data/motorcycle_left.png", "sklearn/datasets/images/flower.jpg")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
AREA, ASPECT = (0.25, 1.0), (3 / 4, 4 / 3)  # of a random crop


def photographs(size: int, count: int, seed: int, split: Literal["calibration", "evaluation"]) -> np.ndarray:
    """Random crops of photographs that scikit-image and scikit-learn ship: uint8 (count, size, size, 3).

    The two splits share no photograph. Same seed, same crops.

    Raises:
      ModuleNotFoundError: neither package is there.
    """
    names = {"calibration": CALIBRATION, "evaluation": EVALUATION}[split]
    sources = [Image.open(p).convert("RGB") for p in map(_in_package, names) if p is not None]
    if not sources:
        raise ModuleNotFoundError("photographs come from scikit-image and scikit-learn: pip install scikit-image scikit-learn")
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


def center_crop(image: Image.Image, size: int, fraction: float) -> np.ndarray:
    """The central square of `fraction` of the short side, resized (bicubic) to size: uint8 (size, size, 3)."""
    side = round(min(image.size) * fraction)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box))


def folder(path: str | pathlib.Path, size: int, fraction: float = 1.0, limit: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Centre crops of a folder of images, and their labels if names give them.

    Labels: the number that every file name begins with (`000_n01440764_tench.jpg`), else the position of the subfolder
    among the sorted subfolders, else None. Decoded in threads.

    Returns: uint8 (n, size, size, 3), and int (n,) or None.

    Raises:
      ValueError: no images, or one that cannot be read.
    """
    root = pathlib.Path(path)
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"data: {root} holds no images ({', '.join(SUFFIXES)}).")
    if limit and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]

    def read(file: pathlib.Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                return center_crop(image, size, fraction)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"data: {file} cannot be read as an image: {error}") from error

    with concurrent.futures.ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(read, files)))
    return pixels, _labels(root, files)


def _labels(root: pathlib.Path, files: list[pathlib.Path]) -> np.ndarray | None:
    numbers = [re.match(r"(\d+)_", f.name) for f in files]
    if all(numbers):
        return np.array([int(m[1]) for m in numbers])
    folders = sorted({f.relative_to(root).parts[0] for f in files if len(f.relative_to(root).parts) > 1})
    if len(folders) > 1:
        return np.array([folders.index(f.relative_to(root).parts[0]) for f in files])
    return None
