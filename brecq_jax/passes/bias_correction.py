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

    Zero points become floats, one per channel, and formats `Affine`. Doing it twice is doing it once.

        corrected = passes.correct_means(variables, quantized)

    Args:
      params: the float parameters that were quantized.

    Raises:
      ValueError: params of another structure, or a weight whose format has no zero point.
    """
    leaves, tree = jax.tree.flatten(quantized.params, is_leaf=is_qarray)
    floats = jax.tree.leaves(params)
    if [a.shape for a in leaves] != [a.shape for a in floats]:
        raise ValueError("correct_means: params has other shapes than what was quantized. Pass the float parameters of this model.")
    corrected = [_corrected(*each) if isinstance(each[1], QArray) else each[1] for each in zip(leaf_names(params), leaves, floats, strict=True)]
    return dataclasses.replace(quantized, params=jax.tree.unflatten(tree, corrected))


def _corrected(name: str, array: QArray, weight: jax.Array) -> QArray:
    if not isinstance(array.format, Uniform):
        raise ValueError(f"correct_means: {name} is in {array.format}. Means are corrected by zero points, which Uniform and Affine have.")
    rows = float_rows(weight, array.channel_axes)
    format, grid = mean_corrected(array.format, to_rows(array.codes, array.channel_axes), array.grid, rows)
    return dataclasses.replace(array, format=format, grid=grid)
