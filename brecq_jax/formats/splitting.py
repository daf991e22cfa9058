"""Two binary weights for a ternary one: latent halves whose signs and mean magnitudes add up to it."""

import numpy as np
from jaxtyping import Float64, Num

from brecq_jax.formats.binary import Ternary


class SplitError(ValueError):
    """Latent weights of which no two halves have the magnitudes that splitting needs; says which, and why."""


def split_rows(
    format: Ternary, rows: Num[np.ndarray, "channels elements"], codes: Num[np.ndarray, "channels elements"]
) -> tuple[Float64[np.ndarray, "channels elements"], Float64[np.ndarray, "channels elements"]]:
    """(w₁, w₂) with w₁ + w₂ = w and sign(w₁) mean|w₁| + sign(w₂) mean|w₂| = α · level, level = code − 1.

    α is the mean of |w| where level is not 0. With I where level ≠ 0, J where it is 0 and w > 0, K where it is 0 and w ≤ 0, n elements, S sums of |w|:

        w₁ = a·w in I, w + b in J, b in K          a = (S_I + S_K − S_J) / 2 S_I
        w₂ = (1 − a)·w in I, −b in J, w − b in K   b = (n·α − S) / 2(|J| + |K|)

    Rows are split each for itself, or all of them as one where the format is per tensor. A row without zeros is halved: a = ½, b is not used.
    Source: Bai et al. 2021 (BinaryBERT), https://arxiv.org/abs/2012.15701, as in its released code (transformer/binary_model_init.py,
    tws_split, at 0598f02): a is what makes mean|w₁| = mean|w₂|. That code refuses nothing. Computed in float64.

    Raises:
      SplitError: a row is all zeros (α is 0 / 0); the weights that became zero lie so far to one side that a is not in (0, 1),
        where one half of I has the wrong sign; a level is not the sign of its weight; or a weight is not finite.
    """
    pooled = (1, -1) if format.granularity == "per_tensor" else rows.shape
    halves = _split(rows.astype(np.float64).reshape(pooled), codes.astype(np.int64).reshape(pooled) - 1)
    return tuple(half.reshape(rows.shape) for half in halves)


def _split(rows, levels):
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
