"""Where photographs are, before any is read: folders of image files, and tfds data sources."""

import dataclasses
import io
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
CALIBRATION_FOLDER, EVALUATION_FOLDER = "train", "val"


@dataclasses.dataclass(frozen=True)
class Images:
    """Photographs that are not read yet: a slice of them is the same.

    `open(row)` gives a Pillow image, its pixels perhaps not decoded, and its label or None; threads call it. `name(row)` is for
    messages. `rows`: which of them, and in which order. `classes`: how many the labels are of, 0 where there are no labels, None if
    nothing says it.
    """

    rows: Sequence[int]
    open: Callable[[int], tuple[Image.Image, int | None]]
    name: Callable[[int], str]
    classes: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: slice) -> "Images":
        return dataclasses.replace(self, rows=self.rows[chosen])

    def spread(self, limit: int) -> "Images":
        """At most `limit` of them, evenly spread."""
        if limit < 1:
            raise ValueError(f"data: limit={limit}: write at least 1.")
        count = min(limit, len(self))
        return dataclasses.replace(self, rows=[self.rows[i * len(self) // count] for i in range(count)])

    def pixels(self, row: int, crop: Callable[[Image.Image], np.ndarray]) -> tuple[np.ndarray, int | None]:
        """What `crop` makes of one image, and the label.

        Raises:
          ValueError: the image cannot be read; it is named.
        """
        try:
            image, label = self.open(row)
            return np.asarray(crop(image)), label
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"data: {self.name(row)} cannot be read as an image: {error}. Repair or remove it.") from error


def image_folder(path: str | pathlib.Path) -> Images:
    """The images of a folder and the folders in it, in the order of their paths, and their labels if names give them.

    Labels: the position of the subfolder among the sorted subfolders if all images lie in two or more; else the number
    that every file name begins with (`000_n01440764_tench.jpg`); else None. Hidden files are passed over.

    Raises:
      ValueError: no images.
    """
    root = pathlib.Path(path)
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not _is_hidden(p.relative_to(root)))
    if not files:
        raise ValueError(f"data: {root} {'holds no images' if root.is_dir() else 'is no folder, so it holds no images'} ({', '.join(SUFFIXES)}).")
    labels, classes = _labels(root, files)
    return Images(
        rows=range(len(files)),
        open=lambda row: (Image.open(files[row]), None if labels is None else labels[row]),
        name=lambda row: str(files[row]),
        classes=classes,
    )


def _is_hidden(inside: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in inside.parts)


def _labels(root: pathlib.Path, files: list[pathlib.Path]) -> tuple[list[int] | None, int | None]:
    """Labels or None, and `Images.classes`."""
    inside = [f.relative_to(root).parts for f in files]
    if all(len(parts) > 1 for parts in inside) and len({parts[0] for parts in inside}) > 1:
        # A subfolder without images keeps its number: it is a class of which nothing came.
        classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        numbers = {name: number for number, name in enumerate(classes)}
        return [numbers[parts[0]] for parts in inside], len(classes)
    begins = [re.match(r"(\d+)_", f.name) for f in files]
    return ([int(m[1]) for m in begins], None) if all(begins) else (None, 0)


def tfds_images(source: Any) -> Images:
    """The images of a tfds data source: "image", decoded or encoded, and "label" where there is one. No TensorFlow.

        source = tfds.data_source("imagenet2012", split="train", decoders={"image": tfds.decode.SkipDecoding()})
        images = data.tfds_images(source)

    With SkipDecoding a JPEG need not be decoded at full size (see `center_crop`).
    """

    def open_example(row: int) -> tuple[Image.Image, int | None]:
        example = source[row]
        if "image" not in example:
            raise ValueError(f'data: example {row} has {sorted(example)}, no "image". Pass a source of images.')
        image, label = example["image"], example.get("label")
        if isinstance(image, bytes):
            opened = Image.open(io.BytesIO(image))
        else:
            opened = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        return opened, None if label is None else int(label)

    return Images(range(len(source)), open_example, lambda row: f"example {row}")


def open_images(path: str | pathlib.Path, dataset: str = "") -> tuple[Images, Images]:
    """Images to calibrate on, and others to score.

        train, validation = data.open_images("", dataset="imagenet2012")

    Args:
      path: a folder with folders `train` and `val`; or any other folder of images, of which every other one scores; or
        tfds's data_dir ("" or Path(""): its own default) if there is a
      dataset: name of a tfds data set that was prepared as array_record: its train and its validation (or test) split.

    Of several JAX processes each scores its share of the latter, and all see the same former.

    Raises:
      ValueError: no images, or a data set that is not prepared, in another file format, or without such splits.
      ModuleNotFoundError: tensorflow_datasets is needed, and not installed.
    """
    if dataset:
        return _tfds_splits(dataset, None if path in ("", pathlib.Path()) else str(path))
    root = pathlib.Path(path)
    if (root / CALIBRATION_FOLDER).is_dir() and (root / EVALUATION_FOLDER).is_dir():
        return image_folder(root / CALIBRATION_FOLDER), own_share(image_folder(root / EVALUATION_FOLDER))
    images = image_folder(root)
    if len(images) < 2:
        raise ValueError(f"data: {root} holds one image. Pass some to calibrate on, and some to score.")
    return images[::2], own_share(images[1::2])


def own_share(images: Images) -> Images:
    """Of several JAX processes, the images of this one: every n-th of n processes, so that none is left out and none comes twice."""
    return images[jax.process_index() :: jax.process_count()]


def _tfds_splits(dataset: str, data_dir: str | None) -> tuple[Images, Images]:
    try:
        import tensorflow_datasets as tfds  # noqa: PLC0415 - an extra, needed here alone
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"data: {dataset} is read by {error.name}: pip install tensorflow-datasets array_record") from error

    builder = tfds.builder(dataset, data_dir=data_dir)
    scored = "validation" if "validation" in builder.info.splits else "test"
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        sources = [builder.as_data_source(split, decoders=decoders) for split in ("train", tfds.split_for_jax_process(scored))]
    except (NotImplementedError, KeyError) as error:  # the latter: no splits yet
        raise ValueError(_unreadable(builder)) from error
    features = builder.info.features
    classes = getattr(features["label"], "num_classes", None) if "label" in features else 0
    return tfds_images(sources[0]), dataclasses.replace(tfds_images(sources[1]), classes=classes)


def _unreadable(builder: Any) -> str:
    """Why a tfds set cannot be read, and what to do."""
    where = f"data: {builder.name} in {builder.data_dir}"
    prepare = (
        f"tfds.builder({builder.name!r}, data_dir=…, file_format='array_record').download_and_prepare(). To prepare some sets, imagenet2012 "
        "among them, takes TensorFlow (pip install tensorflow-cpu importlib_resources); to read them does not."
    )
    if not builder.is_prepared():
        return f"{where} is not prepared. Prepare it, or give the data_dir where it is: {prepare}"
    return f"{where} is in a file format that cannot be read at random. Prepare it in another data_dir: {prepare}"
