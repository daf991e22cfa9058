"""Calibration examples out of whatever a user has.

An element of a tfds data source is one example; an element of everything else is a batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

IMAGE_KEYS = ("image", "inputs", "x")  # taken from a dict without being asked


@dataclasses.dataclass(frozen=True)
class Examples:
    """Model inputs: a pytree of arrays with the examples on axis 0."""

    arrays: Any
    count: int


def materialize(calib_ds: Any, inputs: str | int | Callable | None = None, budget_gb: float | None = None) -> Examples:
    """Read a calibration set once, check it, and hold it.

    Args:
      calib_ds: an array (examples on axis 0) or a dict of them, a list of batches, a function of no arguments that returns an iterable
        of batches, an iterator that can be read once, a tf.data.Dataset (through `as_numpy_iterator`; TensorFlow is
        never imported), a tfds data source, a grain dataset or loader.
      inputs: which part of an element the model takes: a key, an index, or a function of the element. Arrays,
        (x, y) and dicts with "image", "inputs" or "x" need nothing.
      budget_gb: refuse a set that holds more.

    Raises:
      ValueError: no examples, values that are not finite, batches of different shapes, a set over the budget.
      TypeError: something that holds no batches, or whose input is not clear.
    """
    parts, total = [], 0
    for number, batch in enumerate(_batches(calib_ds)):
        part = jax.tree.map(np.asarray, _select(batch, inputs, number))
        _check(part, parts[0] if parts else None, number)
        parts.append(part)
        total += sum(a.nbytes for a in jax.tree.leaves(part))
        if budget_gb is not None and total > budget_gb * 1e9:
            raise ValueError(
                f"calib_ds: {number + 1} batches take {total / 1e9:.3g} GB, over memory_budget_gb={budget_gb}. Pass fewer "
                "examples (a few hundred do), or a larger budget."
            )
    if not parts:
        raise ValueError("calib_ds is empty. Pass a few hundred inputs. (An iterator that was read before is empty, too.)")
    arrays = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    counts = {a.shape[0] for a in jax.tree.leaves(arrays)}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"calib_ds: the inputs hold {sorted(counts)} examples; write the same number, at least one, on axis 0.")
    return Examples(arrays, counts.pop())


def _batches(calib_ds: Any) -> Iterator[Any]:
    if hasattr(calib_ds, "as_numpy_iterator"):
        return calib_ds.as_numpy_iterator()
    if hasattr(calib_ds, "shape") or isinstance(calib_ds, Mapping):
        return iter([calib_ds])
    if hasattr(calib_ds, "__getitems__") and hasattr(calib_ds, "__len__") and not _is_grain(calib_ds):
        return (jax.tree.map(lambda a: np.asarray(a)[None], calib_ds[i]) for i in range(len(calib_ds)))
    if callable(calib_ds) and not hasattr(calib_ds, "__iter__"):
        return iter(calib_ds())
    if isinstance(calib_ds, (str, bytes)) or not hasattr(calib_ds, "__iter__"):
        raise TypeError(
            f"calib_ds is a {type(calib_ds).__name__}, which holds no batches. Pass an array, a list of batches, a function "
            "that returns an iterator of them, a tf.data.Dataset, a tfds data source or a grain loader."
        )
    return iter(calib_ds)


def _is_grain(calib_ds: Any) -> bool:
    return type(calib_ds).__module__.split(".")[0] == "grain"


def _select(batch: Any, inputs, number: int) -> Any:
    if callable(inputs):
        return inputs(batch)
    if inputs is not None:
        try:
            return batch[inputs]
        except (KeyError, IndexError, TypeError) as error:
            has = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise TypeError(f"inputs={inputs!r}: batch {number} has no such part. It is {has}.") from error
    if isinstance(batch, Mapping):
        for key in IMAGE_KEYS:
            if key in batch:
                return batch[key]
        raise TypeError(
            f"calib_ds: batch {number} is a dict with {sorted(map(str, batch))}. Say what the model takes: inputs='KEY', or "
            "inputs=lambda batch: batch for all of it."
        )
    if isinstance(batch, tuple) and len(batch) == 2:
        return batch[0]
    if isinstance(batch, (tuple, list)):
        raise TypeError(
            f"calib_ds: batch {number} is a {type(batch).__name__} of {len(batch)}. Say what the model takes: inputs=0, or a "
            "function. (A list of numbers is no batch: make it an array.)"
        )
    return batch


def _check(part: Any, first: Any, number: int):
    leaves = jax.tree.leaves(part)
    if not leaves:
        raise ValueError(f"calib_ds: batch {number} holds no arrays.")
    for a in leaves:
        if a.dtype.kind not in "fiub" and a.dtype.name != "bfloat16":
            raise TypeError(f"calib_ds: batch {number} holds {a.dtype} values. Pass numbers.")
        if a.ndim == 0:
            raise ValueError(f"calib_ds: batch {number} is a single number. Examples go on axis 0 of an array.")
        if a.dtype.kind == "f" and not np.isfinite(a).all():
            row = int(np.argwhere(~np.isfinite(a).reshape(a.shape[0], -1).all(1))[0, 0])
            raise ValueError(f"calib_ds: example {row} of batch {number} has values that are not finite. Check the inputs.")
    if first is not None:
        here, there = ([(a.shape[1:], a.dtype.name) for a in jax.tree.leaves(p)] for p in (part, first))
        if here != there or jax.tree.structure(part) != jax.tree.structure(first):
            raise ValueError(f"calib_ds: batch {number} has examples of {here}, batch 0 of {there}. Make them the same.")
