"""Ternary weight splitting: every ternary weight is the sum of two binary ones, exactly.

Codes alone (`split_ternary`) can always be split. To train on, the latent weights behind the codes are split too
(`split_weights`), so that each half, binarized by its own mean, gives its half of the sum: that has a solution or is refused.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax._graph import leaf_names
from brecq_jax._model import Quantized
from brecq_jax._qarray import QArray, from_rows, is_qarray, to_rows
from brecq_jax.formats import Binary, Ternary
from brecq_jax.formats.binary import BinaryGrid
from brecq_jax.formats.splitting import SplitError, split_rows


def split_ternary(quantized: Quantized) -> Quantized:
    """The same model, each `Ternary` weight written as two binary points of half its scale: outputs do not change by a bit.

        split = passes.split_ternary(quantized)

    Raises:
      ValueError: no weight is ternary.
    """
    leaves, tree = jax.tree.flatten(quantized.params, is_leaf=is_qarray)
    _check_ternary("split_ternary", leaves)
    return dataclasses.replace(quantized, params=jax.tree.unflatten(tree, [_halved(a) if _is_ternary(a) else a for a in leaves]))


def split_weights(params: Any, quantized: Quantized) -> Any:
    """Latent halves to train on: `params` with a leaf (2, …) in place of each whose codes are `Ternary`.

    Binarized each for itself and added up, they are the ternary weights, and added up as they are, `params`.

    Args:
      params: the latent parameters whose ternary codes `quantized` holds.

    Raises:
      SplitError: halves do not exist (see `formats.splitting`), or the codes are those of other parameters.
      ValueError: no weight is ternary, or params of another structure.
    """
    leaves, tree = jax.tree.flatten(quantized.params, is_leaf=is_qarray)
    _check_ternary("split_weights", leaves)
    latents = jax.tree.leaves(params)
    if [a.shape for a in leaves] != [a.shape for a in latents]:
        raise ValueError("split_weights: params has other shapes than what was quantized. Pass the latent parameters of this model.")
    halves = [_latent_halves(*each) if _is_ternary(each[1]) else each[2] for each in zip(leaf_names(params), leaves, latents, strict=True)]
    return jax.tree.unflatten(tree, halves)


def _halved(array: QArray) -> QArray:
    """Codes 0, 1, 2 become −−, +−, ++."""
    half = array.grid.scale / 2
    codes = jnp.array([0, 2, 3], jnp.uint8)[array.codes]
    return dataclasses.replace(array, codes=codes, format=Binary(2, array.format.granularity), grid=BinaryGrid(half, jnp.ones_like(half)))


def _latent_halves(name: str, array: QArray, latent: jax.Array) -> jax.Array:
    rows, codes = (np.asarray(to_rows(a, array.channel_axes)) for a in (latent, array.codes))
    try:
        halves = split_rows(array.format, rows, codes)
    except SplitError as error:
        raise SplitError(f"split_weights: {name} {tuple(array.shape)}: {error}") from None
    return jnp.stack([from_rows(jnp.asarray(half, latent.dtype), array.shape, array.channel_axes) for half in halves])


def _check_ternary(function: str, leaves) -> None:
    if not any(map(_is_ternary, leaves)):
        raise ValueError(f"{function}: no weight is ternary. Quantize with weights=formats.Ternary() first.")


def _is_ternary(x) -> bool:
    return isinstance(x, QArray) and isinstance(x.format, Ternary)
