"""Photographs decoded and cropped in threads: a calibration set in one array, an evaluation set in a stream of batches."""

import concurrent.futures
import functools
import itertools
import pathlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

from brecq_jax.data.images import center_crop, random_crop
from brecq_jax.data.sources import Images, image_folder

AHEAD = 2  # batches that are decoded, or being decoded, while one is in use
PIECE = 32  # images that are on their way into an array that holds them all


def stream(images: Images, crop: Callable[[Image.Image], np.ndarray], batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Batches of pixels and labels, in order, decoded ahead in threads; the last batch holds what remains.

        crop = functools.partial(data.center_crop, size=224, fraction=224 / 256, interpolation="bilinear")
        for pixels, labels in data.stream(images, crop, batch_size=100):

    At most three batches are held: the one in use, and two that are decoded while it is.

    Raises:
      ValueError: a bad batch size; while it is read, an image that cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"data: batch_size={batch_size}: write at least 1.")
    return _batches(_in_threads(functools.partial(images.pixels, crop=crop), images.rows, AHEAD * batch_size), batch_size, len(images))


def _batches(read: Iterator, batch_size: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        yield _collect(itertools.islice(read, size), size)


def calibration_crops(images: Images, count: int, size: int, seed: int, interpolation: str = "bilinear") -> np.ndarray:
    """A random crop (see `random_crop`) of each of `count` images drawn without repetition: uint8 (count, size, size, 3).

    Same seed, same crops, whatever the number of threads or `count`: more images begin with the same ones.

    Raises:
      ValueError: fewer images than that, or one that cannot be read.
    """
    if not 1 <= count <= len(images):
        raise ValueError(f"data: {count} calibration images of {len(images)}: write 1 to {len(images)}.")
    rows = [images.rows[i] for i in np.random.default_rng(seed).permutation(len(images))[:count]]

    def crop(row: int) -> tuple[np.ndarray, int | None]:
        draw = np.random.default_rng((seed, row))
        return images.pixels(row, lambda image: random_crop(image, size, draw, interpolation))

    return _collect(_in_threads(crop, rows, PIECE), count)[0]


def folder(
    path: str | pathlib.Path,
    size: int,
    fraction: float = 1.0,
    limit: int | None = None,
    transform: Callable[[Image.Image], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """All images of a folder, in one array, and their labels: see `image_folder`.

        images, labels = folder("imagenet_sample", 224, fraction=224 / 256)

    Args:
      size: of the crops, in pixels.
      fraction: of the short side, see `center_crop`.
      limit: read this many, evenly spread; it changes no label.
      transform: instead of `center_crop`: from the opened image to an array of size × size × 3.

    Returns: uint8 (n, size, size, 3) and int (n,) or None.

    Raises:
      ValueError: no images, one that cannot be read, or a bad fraction, limit or transform.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"data: fraction={fraction} of the short side: write more than 0 and at most 1.")
    images = image_folder(path)
    images = images if limit is None else images.spread(limit)
    crop = functools.partial(center_crop, size=size, fraction=fraction) if transform is None else transform

    def read(row: int) -> tuple[np.ndarray, int | None]:
        pixels, label = images.pixels(row, crop)
        if pixels.shape != (size, size, 3):
            raise ValueError(f"data: transform made {list(pixels.shape)} of {images.name(row)}. Return {[size, size, 3]}, as size={size} says.")
        return pixels, label

    return _collect(_in_threads(read, images.rows, PIECE), len(images))


def _in_threads(work: Callable, items: Iterable, ahead: int) -> Iterator:
    """work(item) for each item, in order; at most `ahead` results wait or are being made."""
    pool = concurrent.futures.ThreadPoolExecutor()
    try:
        waiting = deque()
        for item in items:
            if len(waiting) == ahead:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(read: Iterator[tuple[np.ndarray, int | None]], count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """`count` images in one array, each written where it stays: a list of them and their stack would take twice that."""
    first, label = next(read)
    pixels, labels = np.empty((count, *first.shape), first.dtype), [label]
    pixels[0] = first
    for i, (image, label) in enumerate(read, 1):
        pixels[i] = image
        labels.append(label)
    return pixels, None if None in labels else np.array(labels)
