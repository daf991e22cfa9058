"""Rounding moves the mean of a channel's weights, and with it every output of the channel: this moves it back."""

import dataclasses
from typing import Any

import jax

from brecq_jax._graph import leaf_names
from brecq_jax._model import Quantized
from brecq_jax._qarray import QArray, float_rows, is_qarray, to_rows
from brecq_jax.formats import Uniform, mean_corrected


def correct_means(params: Any, quantized: Quantized) -> Quantized:
    """The same codes, read so that each output channel of a weight has the mean of the float weight: see `mean_corrected`.

    Zero points become floats, one per channel, and formats `Affine`. Doing it twice is doing it once. Weights whose format has no
    zero point, such as `RowUniform` tables, stay as they are.

        corrected = passes.correct_means(variables, quantized)

    Args:
      params: the float parameters that were quantized.

    Raises:
      ValueError: params of another structure, or no weight whose format has a zero point.
    """
    leaves, tree = jax.tree.flatten(quantized.params, is_leaf=is_qarray)
    floats = jax.tree.leaves(params)
    if [a.shape for a in leaves] != [a.shape for a in floats]:
        raise ValueError("correct_means: params has other shapes than what was quantized. Pass the float parameters of this model.")
    if not any(map(_has_zero_point, leaves)):
        others = (f"{name} is in {a.format}" for name, a in zip(leaf_names(params), leaves, strict=True) if isinstance(a, QArray))
        raise ValueError(
            f"correct_means: no weight has a zero point to move; {next(others, 'all are float')}.\n"
            "  Quantize with weights=Uniform(4) or Affine(4), or leave this pass out."
        )
    corrected = [_corrected(a, weight) if _has_zero_point(a) else a for a, weight in zip(leaves, floats, strict=True)]
    return dataclasses.replace(quantized, params=jax.tree.unflatten(tree, corrected))


def _has_zero_point(leaf: jax.Array | QArray) -> bool:
    return isinstance(leaf, QArray) and isinstance(leaf.format, Uniform)


def _corrected(array: QArray, weight: jax.Array) -> QArray:
    rows = float_rows(weight, array.channel_axes)
    format, grid = mean_corrected(array.format, to_rows(array.codes, array.channel_axes), array.grid, rows)
    return dataclasses.replace(array, format=format, grid=grid)
