"""Ternary weight splitting: every ternary weight is the sum of two binary ones, exactly.

Codes alone (`split_ternary`) can always be split. To train on, the latent weights behind the codes are split too
(`split_weights`), so that each half, binarized by its own mean, gives its half of the sum: that has a solution or is refused.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int

from brecq_jax._graph import leaf_names
from brecq_jax._model import Quantized
from brecq_jax._qarray import QArray, from_rows, to_rows
from brecq_jax.formats import Binary, Ternary
from brecq_jax.formats.binary import BinaryGrid


class SplitError(ValueError):
    """Latent weights of which no two halves have the magnitudes that splitting needs; says which, and why."""


def split_ternary(quantized: Quantized) -> Quantized:
    """The same model, each `Ternary` weight written as two binary points of half its scale: outputs do not change by a bit.

        split = passes.split_ternary(quantized)

    Raises:
      ValueError: no weight is ternary.
    """
    leaves, tree = jax.tree.flatten(quantized.params, is_leaf=_is_qarray)
    _check_ternary("split_ternary", leaves)
    return dataclasses.replace(quantized, params=jax.tree.unflatten(tree, [_halved(a) if _is_ternary(a) else a for a in leaves]))


def split_weights(params: Any, quantized: Quantized) -> Any:
    """Latent halves to train on: `params` with a leaf (2, …) in place of each whose codes are `Ternary`.

    Binarized each for itself and added up, they are the ternary weights, and added up as they are, `params`.

    Args:
      params: the latent parameters whose ternary codes `quantized` holds.

    Raises:
      SplitError: halves do not exist (see `split_rows`), or the codes are those of other parameters.
      ValueError: no weight is ternary, or params of another structure.
    """
    leaves, tree = jax.tree.flatten(quantized.params, is_leaf=_is_qarray)
    _check_ternary("split_weights", leaves)
    latents = jax.tree.leaves(params)
    if [a.shape for a in leaves] != [a.shape for a in latents]:
        raise ValueError("split_weights: params has other shapes than what was quantized. Pass the latent parameters of this model.")
    halves = [_latent_halves(*each) if _is_ternary(each[1]) else each[2] for each in zip(leaf_names(params), leaves, latents, strict=True)]
    return jax.tree.unflatten(tree, halves)


def split_rows(
    rows: Float64[np.ndarray, "channels elements"], levels: Int[np.ndarray, "channels elements"]
) -> tuple[Float64[np.ndarray, "channels elements"], Float64[np.ndarray, "channels elements"]]:
    """(w₁, w₂) with w₁ + w₂ = w and sign(w₁) mean|w₁| + sign(w₂) mean|w₂| = α · level, α the mean of |w| where level is not 0.

    With I where level ≠ 0, J where it is 0 and w > 0, K where it is 0 and w ≤ 0, n elements, S sums of |w|:

        w₁ = a·w in I, w + b in J, b in K          a = (S_I + S_K − S_J) / 2 S_I
        w₂ = (1 − a)·w in I, −b in J, w − b in K   b = (n·α − S) / 2(|J| + |K|)

    Rows are split each for itself. A row without zeros is halved: a = ½, b is not used.
    Source: Bai et al. 2021 (BinaryBERT), section 3.1, https://arxiv.org/abs/2012.15701, where a must make mean|w₁| = mean|w₂|: a
    is derived from that here, with the signs of the released code.

    Raises:
      SplitError: a row is all zeros (α is 0 / 0); the weights that became zero lie so far to one side that a is not in (0, 1),
        where one half of I has the wrong sign; a level is not the sign of its weight; or a weight is not finite.
    """
    size, kept, positive = np.abs(rows), levels != 0, rows > 0
    if not np.isfinite(rows).all():
        raise SplitError("there are weights that are not finite. Check the training.")
    if np.any(kept & (np.sign(rows) != levels)):
        raise SplitError("its codes are not the signs of these weights. Pass the latent parameters that were quantized last.")
    total, zeros = (np.where(kept, size, 0).sum(1, keepdims=True), (~kept).sum(1, keepdims=True))
    if np.any(total == 0):
        row = int(np.flatnonzero(total[:, 0] == 0)[0])
        raise SplitError(f'row {row} of {len(rows)} is all zeros. Keep this weight float, or write granularity="per_tensor".')
    above, below = (np.where(side & ~kept, size, 0).sum(1, keepdims=True) for side in (positive, ~positive))
    a = (total + below - above) / (2 * total)
    if np.any((a <= 0) | (a >= 1)):
        row = int(np.flatnonzero((a[:, 0] <= 0) | (a[:, 0] >= 1))[0])
        raise SplitError(
            f"row {row} of {len(rows)}: what became zero lies on one side of it, {float(np.maximum(above, below)[row, 0]):.3g} in all, and what did not is "
            f"{float(total[row, 0]):.3g} (a = {float(a[row, 0]):.3g}, and not in (0, 1)).\n"
            '  Train it longer as ternary, keep it ternary, or write granularity="per_tensor".'
        )
    alpha = total / (rows.shape[1] - zeros)
    b = (rows.shape[1] * alpha - size.sum(1, keepdims=True)) / (2 * np.maximum(zeros, 1))
    first = np.where(kept, a * rows, np.where(positive, rows + b, b))
    return first, np.where(kept, (1 - a) * rows, np.where(positive, -b, rows - b))


def _halved(array: QArray) -> QArray:
    """Codes 0, 1, 2 become −−, +−, ++."""
    half = array.grid.scale / 2
    codes = jnp.array([0, 2, 3], jnp.uint8)[array.codes]
    return dataclasses.replace(array, codes=codes, format=Binary(2, array.format.granularity), grid=BinaryGrid(half, jnp.ones_like(half)))


def _latent_halves(name: str, array: QArray, latent: jax.Array) -> jax.Array:
    rows = np.asarray(to_rows(latent, array.channel_axes), np.float64)
    levels = np.asarray(to_rows(array.codes, array.channel_axes), np.int64) - 1
    pooled = (1, -1) if array.format.granularity == "per_tensor" else rows.shape
    try:
        halves = split_rows(rows.reshape(pooled), levels.reshape(pooled))
    except SplitError as error:
        raise SplitError(f"split_weights: {name} {tuple(array.shape)}: {error}") from None
    whole = [from_rows(jnp.asarray(half.reshape(rows.shape), latent.dtype), array.shape, array.channel_axes) for half in halves]
    return jnp.stack(whole)


def _check_ternary(function: str, leaves) -> None:
    if not any(map(_is_ternary, leaves)):
        raise ValueError(f"{function}: no weight is ternary. Quantize with weights=formats.Ternary() first.")


def _is_qarray(x) -> bool:
    return isinstance(x, QArray)


def _is_ternary(x) -> bool:
    return isinstance(x, QArray) and isinstance(x.format, Ternary)
