"""Calibration batches from whatever a user has; photographs from packages, folders and tfds; text as tokens. Knows nothing of models."""

from brecq_jax.data._batches import Examples, materialize
from brecq_jax.data.images import center_crop, mirrored, photographs, random_crop
from brecq_jax.data.reading import calibration_crops, folder, stream
from brecq_jax.data.sources import Images, image_folder, open_images, tfds_images
from brecq_jax.data.text import padded, rated_sentences, tokenized

__all__ = [
    "Examples", "Images", "calibration_crops", "center_crop", "folder", "image_folder", "materialize", "mirrored", "open_images",
    "padded", "photographs", "random_crop", "rated_sentences", "stream", "tfds_images", "tokenized",
]  # fmt: skip
