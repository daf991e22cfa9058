"""Calibration batches from whatever a user has; photographs from packages, folders and tfds. Knows nothing of models."""

from brecq_jax.data._batches import Examples, materialize
from brecq_jax.data.images import center_crop, mirrored, photographs, random_crop
from brecq_jax.data.reading import calibration_crops, folder, stream
from brecq_jax.data.sources import Images, image_folder, open_images, tfds_images

__all__ = [
    "Examples", "Images", "calibration_crops", "center_crop", "folder", "image_folder", "materialize", "mirrored", "open_images",
    "photographs", "random_crop", "stream", "tfds_images",
]  # fmt: skip
