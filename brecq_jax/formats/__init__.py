"""Number formats: array mathematics on rows of shape (channels, elements). Knows nothing of models."""

from brecq_jax.formats._format import Format, Grid, ScalarFormat
from brecq_jax.formats.affine import Affine, mean_corrected
from brecq_jax.formats.uniform import LpRange, MinMax, Uniform, fake_quantize

__all__ = ["Affine", "Format", "Grid", "LpRange", "MinMax", "ScalarFormat", "Uniform", "fake_quantize", "mean_corrected"]
