"""Number formats: array mathematics on rows of shape (channels, elements). Knows nothing of models."""

from brecq_jax.formats._format import Format, Grid, ScalarFormat
from brecq_jax.formats.codebooks import ClusterCodebook, RowCodebook
from brecq_jax.formats.rows import GreedyRange, RowUniform
from brecq_jax.formats.uniform import LpRange, MinMax, Uniform, fake_quantize

__all__ = [
    "ClusterCodebook", "Format", "GreedyRange", "Grid", "LpRange", "MinMax", "RowCodebook", "RowUniform", "ScalarFormat", "Uniform", "fake_quantize",
]  # fmt: skip
