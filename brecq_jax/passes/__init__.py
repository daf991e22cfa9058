"""Passes: a model in, the same model a little better out, with nothing learned."""

from brecq_jax.passes.bias_correction import correct_means
from brecq_jax.passes.splitting import SplitError, split_ternary, split_weights

__all__ = ["SplitError", "correct_means", "split_ternary", "split_weights"]
