"""Calibration batches from whatever a user has, and images from packages and folders. Knows nothing of models."""

from brecq_jax.data._batches import Examples, materialize
from brecq_jax.data.images import center_crop, folder, mirrored, photographs

__all__ = ["Examples", "center_crop", "folder", "materialize", "mirrored", "photographs"]
