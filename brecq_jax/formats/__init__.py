"""Number formats: array mathematics on rows of shape (channels, elements). Knows nothing of models."""

from brecq_jax.formats._format import Format, Grid, ScalarFormat, SumOfIntegers
from brecq_jax.formats.affine import Affine, mean_corrected
from brecq_jax.formats.binary import Binary, Ternary
from brecq_jax.formats.codebooks import ClusterCodebook, RowCodebook
from brecq_jax.formats.multipoint import Multipoint
from brecq_jax.formats.per_token import PerToken
from brecq_jax.formats.rows import GreedyRange, RowUniform
from brecq_jax.formats.sparq import Sparq, activation_grid
from brecq_jax.formats.uniform import LpRange, MinMax, TailRange, Uniform, fake_quantize

__all__ = [
    "Affine", "Binary", "ClusterCodebook", "Format", "GreedyRange", "Grid", "LpRange", "MinMax", "Multipoint", "PerToken", "RowCodebook", "RowUniform",
    "ScalarFormat", "Sparq", "SumOfIntegers", "TailRange", "Ternary", "Uniform", "activation_grid", "fake_quantize", "mean_corrected",
]  # fmt: skip
