"""Calibration examples out of whatever a user has.

What an element is, in one rule: an element of a tfds data source (anything with `__getitems__`, `dataset_info` or
`dataset_builder`) is one example; an element of everything else is a batch, with its examples on axis 0.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from brecq_jax.data.text import TOKEN_KEYS

IMAGE_KEYS = ("image", "inputs", "x")  # taken from a dict without being asked
DATA_SOURCE = ("__getitems__", "dataset_info", "dataset_builder")  # what only sources of single examples have
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Examples:
    """Model inputs: a pytree of arrays, all with `count` examples on axis 0. Values and dtypes are as they came."""

    arrays: Any
    count: int

    def batches(self, batch_size: int) -> Iterator[Any]:
        """The examples in their order, `batch_size` at a time; the last batch holds what remains."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: write at least 1.")
        return (jax.tree.map(lambda a: a[i : i + batch_size], self.arrays) for i in range(0, self.count, batch_size))  # noqa: B023


def materialize(
    calib_ds: Any,
    inputs: str | int | Callable | None = None,
    budget_gb: float = 8.0,
    min_examples: int = 1,
) -> Examples:
    """Read a calibration set once, check it, and hold it.

        examples = materialize([(images, labels), (more_images, more_labels)])

    Args:
      calib_ds: an array (examples on axis 0) or a dict of them, a list of batches, a function of no arguments that
        returns any of these or an iterable of batches, an iterator that can be read once, a tf.data.Dataset (through
        `as_numpy_iterator`; TensorFlow is never imported), a tfds data source, a grain dataset or loader. No tuple:
        (x, y) and (batch, batch) look alike.
      inputs: which part of an element the model takes: a key, an index, or a function of the element. Arrays,
        (x, y) and dicts with "image", "inputs" or "x" need nothing; of dicts with "input_ids" all that is tokens is taken.
      budget_gb: refuse a set that holds more; an endless one is refused when it has given that much.
      min_examples: refuse a set that holds fewer.

    Raises:
      ValueError: too few examples, values that are not finite, batches of different shapes, a set over the budget.
      TypeError: something that holds no batches, or whose input is not clear.
    """
    if min_examples < 1:
        raise ValueError(f"min_examples={min_examples}: write at least 1.")
    parts, count, total = [], 0, 0
    source = _source(calib_ds)
    for number, element in enumerate(_elements(source)):
        part = _part(element, inputs, f"{source.noun} {number}", source.noun)
        _check(part, f"{source.noun} {number}")
        if parts:
            _check_same(part, parts[0], f"{source.noun} {number}", f"{source.noun} 0")
        parts.append(part)
        count += len(jax.tree.leaves(part)[0])
        total += sum(a.nbytes for a in jax.tree.leaves(part))
        if total > budget_gb * GB:
            raise ValueError(_over_budget(total, count, budget_gb, number + 1, source.length))
    if not parts:
        raise ValueError("calib_ds is empty. Pass a few hundred inputs. (An iterator that was read before is empty, too.)")
    if count < min_examples:
        wanted = "one" if min_examples == 1 else min_examples
        raise ValueError(f"calib_ds: the inputs hold {count} examples on axis 0. Pass at least {wanted}.")
    return Examples(_joined(parts), count)


def _joined(parts: list[Any]) -> Any:
    """All parts as one, which are given up one by one: a large set is not held twice."""
    if len(parts) == 1:
        return parts[0]
    tree, count = jax.tree.structure(parts[0]), sum(len(jax.tree.leaves(part)[0]) for part in parts)
    found = [np.empty((count, *a.shape[1:]), a.dtype) for a in jax.tree.leaves(parts[0])]
    parts.reverse()
    first = 0
    while parts:
        leaves = jax.tree.leaves(parts.pop())
        last = first + len(leaves[0])
        for whole, a in zip(found, leaves, strict=True):
            whole[first:last] = a
        first = last
    return jax.tree.unflatten(tree, found)


@dataclasses.dataclass(frozen=True)
class _Source:
    """A calibration set whose kind is known. `noun`: what an element is; `length`: how many, if it says so."""

    data: Any
    noun: str
    length: int | None


def _source(calib_ds: Any) -> _Source:
    if hasattr(calib_ds, "as_numpy_iterator"):
        return _Source(calib_ds.as_numpy_iterator(), "batch", None)
    if isinstance(calib_ds, Mapping) and any(map(_is_data_set, calib_ds.values())):
        name = next(k for k, v in calib_ds.items() if _is_data_set(v))
        raise TypeError(f"calib_ds is a dict of data sets, {list(calib_ds)}. Pass one of them, as calib_ds[{name!r}].")
    if hasattr(calib_ds, "shape") or isinstance(calib_ds, Mapping):
        return _Source([calib_ds], "batch", 1)
    if _is_data_source(calib_ds):
        return _Source(calib_ds, "example", len(calib_ds))
    if isinstance(calib_ds, tuple):
        raise TypeError(
            f"calib_ds is a tuple of {len(calib_ds)}: one batch with its labels, or batches? "
            "Write [(x, y)] for one batch, list(batches) for batches."
        )
    if callable(calib_ds) and not hasattr(calib_ds, "__iter__"):
        return _source(calib_ds())
    if isinstance(calib_ds, (str, bytes)) or not hasattr(calib_ds, "__iter__"):
        raise TypeError(
            f"calib_ds is a {type(calib_ds).__name__}, which holds no batches. Pass an array, a list of batches, a function "
            "that returns an iterator of them, a tf.data.Dataset, a tfds data source or a grain loader."
        )
    return _Source(calib_ds, "batch", len(calib_ds) if isinstance(calib_ds, list) else None)


def _is_data_source(x: Any) -> bool:
    return any(hasattr(x, name) for name in DATA_SOURCE) and hasattr(x, "__getitem__") and hasattr(x, "__len__")


def _is_data_set(x: Any) -> bool:
    return _is_data_source(x) or hasattr(x, "as_numpy_iterator")


def _elements(source: _Source) -> Iterator[Any]:
    if source.noun == "batch":
        return iter(source.data)
    # One at a time: `__getitems__` of tfds.testing.mock_data's sources raises (tfds 4.9.10).
    return (source.data[i] for i in range(source.length))


def _part(element: Any, inputs: str | int | Callable | None, where: str, noun: str) -> Any:
    """The model's input, its arrays with examples on axis 0."""
    part = _select(element, inputs, where)
    if any(jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key) for leaf in jax.tree.leaves(part)):
        raise TypeError(f"calib_ds: {where} holds random keys. Pass numbers alone, and let apply_fn draw with a key of its own.")
    part = jax.tree.map(np.asarray, part)
    if noun == "example":
        return jax.tree.map(lambda a: a[None], part)
    has_single = isinstance(element, (Mapping, tuple)) and inputs is None and any(_is_number(v) for v in _values(element))
    if has_single and all(a.ndim for a in jax.tree.leaves(part)):
        raise ValueError(
            f"calib_ds: {where} has a single number beside the input, as one example has. Batch the set first, as "
            "calib_ds.batch(32); if it is a batch, say what the model takes: inputs='KEY', or an index."
        )
    return part


def _values(element: Any):
    return element.values() if isinstance(element, Mapping) else element


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) or (hasattr(x, "dtype") and np.ndim(x) == 0)


def _select(element: Any, inputs: str | int | Callable | None, where: str) -> Any:
    if callable(inputs):
        return inputs(element)
    if inputs is not None:
        try:
            return element[inputs]
        except (KeyError, IndexError, TypeError) as error:
            has = f"a dict with {sorted(map(str, element))}" if isinstance(element, Mapping) else f"a {type(element).__name__}"
            raise TypeError(f"inputs={inputs!r}: {where} has no such part. It is {has}.") from error
    if isinstance(element, Mapping):
        if "input_ids" in element:
            return {key: element[key] for key in TOKEN_KEYS if key in element}
        for key in IMAGE_KEYS:
            if key in element:
                return element[key]
        raise TypeError(
            f"calib_ds: {where} is a dict with {sorted(map(str, element))}. Say what the model takes: inputs='KEY', or "
            "inputs=lambda e: e for all of it."
        )
    if isinstance(element, tuple) and len(element) == 2:
        return element[0]
    if isinstance(element, (tuple, list)):
        raise TypeError(
            f"calib_ds: {where} is a {type(element).__name__} of {len(element)}. Say what the model takes: inputs=0, or a "
            "function. (A list of numbers is no batch: make it an array.)"
        )
    return element


def _check(part: Any, where: str):
    leaves = jax.tree.leaves(part)
    if not leaves:
        raise ValueError(f"calib_ds: {where} holds no arrays. Check what `inputs` takes.")
    for a in leaves:
        is_float = jax.dtypes.issubdtype(a.dtype, np.floating)  # bfloat16, too
        if a.dtype.kind not in "iub" and not is_float and not jax.dtypes.issubdtype(a.dtype, np.integer):
            raise TypeError(f"calib_ds: {where} holds {a.dtype} values. Pass numbers.")
        if a.ndim == 0:
            raise ValueError(f"calib_ds: {where} is a single number. Examples go on axis 0 of an array.")
        if is_float and not np.isfinite(a).all():
            bad = int(np.argmin(np.isfinite(a).reshape(len(a), -1).all(1)))
            example = where if where.startswith("example") else f"example {bad} of {where}"
            raise ValueError(f"calib_ds: {example} has values that are not finite. Check the inputs.")
    counts = sorted({len(a) for a in leaves})
    if len(counts) > 1:
        raise ValueError(f"calib_ds: the arrays of {where} hold {counts} examples. Write the same number on axis 0 of each.")


def _check_same(part: Any, first: Any, where: str, where_first: str):
    if jax.tree.structure(part) != jax.tree.structure(first):
        raise ValueError(f"calib_ds: {where} is {_outline(part)}, {where_first} is {_outline(first)}. Make them the same.")
    here, there = ([(a.shape[1:], a.dtype.name) for a in jax.tree.leaves(p)] for p in (part, first))
    if here != there:
        is_text = isinstance(part, Mapping) and "input_ids" in part
        images = " Resize or pad them: inputs=lambda e: …" if where.startswith("example") else ""
        way_out = " Pad them: data.padded(batches)." if is_text else images
        raise ValueError(f"calib_ds: {where} has examples of {_shapes(part)}, {where_first} of {_shapes(first)}. Make them the same.{way_out}")


def _outline(part: Any) -> str:
    return str(jax.tree.map(lambda _: "array", part)).replace("'array'", "array")


def _shapes(part: Any) -> str:
    return ", ".join(f"{a.dtype.name}{list(a.shape[1:])}" for a in jax.tree.leaves(part))


def _over_budget(total: int, count: int, budget_gb: float, read: int, length: int | None) -> str:
    examples = f"about {count * length // read}" if length else "more than that many"
    needed = total / read * length if length else total
    fit = math.floor(budget_gb * GB / (total / count))
    bound = "" if length else "at least "
    return (
        f"calib_ds: {count} examples take {total / GB:.3g} GB, over memory_budget_gb={budget_gb}; all of them ({examples}) need "
        f"{bound}{needed / GB:.3g} GB. Pass " + (f"at most {fit} examples" if fit else "smaller examples") + " (a few hundred do), or a larger budget."
    )
