"""A Quantized as one JSON record and named arrays: what every file of ours holds, however it lies on disk.

    {"formats": [format, …],              those that are used: {"type": name, …fields}; everything else speaks of their number
     "leaves": [leaf, …],                 one for each parameter, in the order of the flattened tree
     "activations": [[name, {"scale": shape, "zero_point": shape}], …],
     "sites": [[name, format], …],        which value is quantized in which format (its number)
     "whole_values": bool,
     "report": what the report's to_json gives, or null}

A leaf is {"name", "path", "shape", "dtype"}, its array is called `name`. Steps of its path are the keys of dicts and the
numbers in lists; [kind, key] where a key is no text, or paths do not say what the tree is. A quantized leaf has also {"format",
"channel_axes", "grid": {array: stored, …}}, for the arrays of its format's grid, "scale" and "zero_point" mostly; its codes, of
`shape`, are packed at format.bits in `name.codes`, and `dtype` is the float type that they decode to. What is stored of an
array of the grid, in `name.array`, is one of

    {"shape", "dtype"}                  the array itself
    {"shape", "dtype", "bits", "low"}   whole numbers, less `low` in [0, 2^bits), packed
    {"shape", "value"}                  one whole number for all elements of a float32 array, and no array

the shortest that loses nothing. With "kept", only so many vectors along the last axis are stored, and all others are zeros: bit i
of `name.array.kept` (packed at 1 bit) says whether vector i is. Grids of activations lie one after the other in the float32
arrays `activations.scale` and `activations.zero_point`.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax._graph import leaf_names
from brecq_jax._model import Program, Quantized
from brecq_jax._qarray import QArray, is_qarray, to_rows
from brecq_jax.deploy.packing import pack, packed_size, unpack
from brecq_jax.formats import Format, Grid
from brecq_jax.formats._record import from_record, to_record
from brecq_jax.report import Report

MOST_POINTS = 8  # elements of a grid for each code, at most: Multipoint's


def describe(quantized: Quantized) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(record, arrays): JSON and the arrays it speaks of, in the order of `layout`."""
    entries, _ = jax.tree.flatten_with_path(quantized.params, is_leaf=is_qarray)
    names = _names(quantized.params)
    step = _other if _holds_nothing(quantized.params) else _step
    arrays: dict[str, np.ndarray] = {}
    numbers: dict[Format, int] = {}
    leaves = []
    for name, (path, leaf) in zip(names, entries, strict=True):
        entry = {"name": name, "path": [step(k) for k in path], "shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name}
        if isinstance(leaf, QArray):
            arrays[f"{name}.codes"] = pack(np.asarray(leaf.codes), leaf.format.bits)
            grid = {k: _shortest(arrays, f"{name}.{k}", np.asarray(v), leaf.size) for k, v in leaf.grid._asdict().items()}
            number = numbers.setdefault(leaf.format, len(numbers))
            entry |= {"format": number, "channel_axes": list(leaf.channel_axes), "grid": grid}
        else:
            arrays[name] = np.asarray(leaf)
        leaves.append(entry)
    for key in Grid._fields:
        values = [np.ravel(getattr(grid, key)) for grid in quantized.activations.values()]
        arrays[f"activations.{key}"] = np.concatenate([np.zeros(0, np.float32), *values])
    program = quantized.program
    record = {
        "leaves": leaves,
        "activations": [[name, {k: list(v.shape) for k, v in grid._asdict().items()}] for name, grid in quantized.activations.items()],
        "sites": [[name, numbers.setdefault(f, len(numbers))] for name, f in program.sites],
        "formats": [to_record(f) for f in numbers],
        "whole_values": program.whole_values,
        "report": None if program.report is None else program.report.to_json(),
    }
    layout(record)  # raises where two arrays have one name
    return record, arrays


def layout(record: dict[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """dtype and shape of every array that the record speaks of. Allocates nothing. To be called in `refusing`."""
    places = list(_places(record))
    named = {name: (dtype, shape) for name, dtype, shape in places}
    if len(named) < len(places):
        twice = next(name for n, (name, _, _) in enumerate(places) if any(name == other for other, _, _ in places[:n]))
        raise ValueError(f"two arrays are called {twice}: rename one of the parameters.")
    return named


def rebuild(record: dict[str, Any], arrays: dict[str, np.ndarray], apply_fn: Callable, params: Any) -> Quantized:
    """The inverse of `describe`, for arrays of the dtypes and shapes of `layout(record)`. To be called in `refusing`."""
    known = _formats(record)
    leaves = [_leaf(entry, known, arrays) for entry in record["leaves"]]
    activations = _activations(record, arrays)
    sites = tuple((_text(name), known[number]) for name, number in record["sites"])
    report = None if record["report"] is None else Report.from_json(record["report"])
    tree = _tree(record["leaves"], leaves, params)
    return Quantized(tree, activations, Program(apply_fn, sites, bool(record["whole_values"]), report))


@contextlib.contextmanager
def refusing(path: Any) -> Iterator[None]:
    """Whatever reading something else than a record raises becomes a ValueError that names the file."""
    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"restore: {path}: what describes the model is damaged ({what}). Save the model again.") from error
    except ValueError as error:
        raise ValueError(f"restore: {path}: {error}") from error


def _formats(record: dict[str, Any]) -> dict[int, Format]:
    return {number: from_record(f) for number, f in enumerate(record["formats"])}


def _shortest(arrays: dict[str, np.ndarray], name: str, values: np.ndarray, count: int) -> dict[str, Any]:
    """Store an array of the grid of `count` codes, as short as it can be."""
    entry: dict[str, Any] = {"shape": list(values.shape)}
    if values.dtype == np.float32 and 0 < values.size <= count and values.flat[0] % 1 == 0 and np.all(values == values.flat[0]):
        return entry | {"value": int(values.flat[0])}
    entry["dtype"] = values.dtype.name
    if values.ndim and 0 < values.size <= MOST_POINTS * count:
        vectors = values.reshape(-1, values.shape[-1])
        kept = np.any(vectors != 0, -1)
        if len(kept) + _stored_bits(vectors[kept]) < _stored_bits(values):
            arrays[f"{name}.kept"] = pack(kept.astype(np.uint8), 1)
            values = vectors[kept]
            entry["kept"] = len(values)
    if (whole := _whole(values)) is None:
        arrays[name] = values
        return entry
    bits, low = whole
    arrays[name] = pack((values.astype(np.int32) - low).astype(np.uint8), bits)
    return entry | {"bits": bits, "low": low}


def _whole(values: np.ndarray) -> tuple[int, int] | None:
    """(bits, low) of whole numbers that are, less `low`, at most 8 bits long."""
    if not values.size:
        return 1, 0
    values = values.astype(np.float64)  # float16 ends before 2^16
    if not np.all((np.abs(values) < 2**16) & (values == np.round(values))):
        return None
    low = int(values.min())
    bits = max(int(values.max()) - low, 1).bit_length()
    return (bits, low) if bits <= 8 else None


def _stored_bits(values: np.ndarray) -> int:
    whole = _whole(values)
    return 8 * values.nbytes if whole is None else whole[0] * values.size


def _places(record) -> Iterator[tuple[str, np.dtype, tuple[int, ...]]]:
    known = _formats(record)
    for leaf in record["leaves"]:
        name, shape = _text(leaf["name"]), _counts(leaf["shape"])
        if "format" not in leaf:
            yield name, _dtype(leaf["dtype"]), shape
            continue
        format, count = known[leaf["format"]], math.prod(shape)
        yield f"{name}.codes", np.dtype(np.uint8), (packed_size(format.bits, count),)
        for key in format.grid_type._fields:
            yield from _place(f"{name}.{key}", leaf["grid"][key], count)
    for key in Grid._fields:
        count = sum(math.prod(_counts(shapes[key])) for _, shapes in record["activations"])
        yield f"activations.{key}", np.dtype(np.float32), (count,)


def _place(name: str, entry: dict[str, Any], count: int) -> Iterator[tuple[str, np.dtype, tuple[int, ...]]]:
    shape = _counts(entry["shape"])
    if "value" in entry:
        # One value may stand for no more elements than there are codes: a short file must not ask for a large array.
        if math.prod(shape) > count:
            raise ValueError(f"{name} {shape} is larger than what it scales.")
        return
    if "kept" in entry:
        vectors, (kept,) = math.prod(shape[:-1]), _counts([entry["kept"]])
        if not shape or kept > vectors or max(vectors, math.prod(shape)) > MOST_POINTS * count:
            raise ValueError(f"{name} {shape} is larger than what it scales.")
        yield f"{name}.kept", np.dtype(np.uint8), (packed_size(1, vectors),)
        shape = (kept, shape[-1])
    if "bits" in entry:
        yield name, np.dtype(np.uint8), (packed_size(entry["bits"], math.prod(shape)),)
    else:
        yield name, _dtype(entry["dtype"]), shape


def _stored(arrays: dict[str, np.ndarray], name: str, entry: dict[str, Any]) -> np.ndarray:
    """The array of a grid."""
    shape = tuple(entry["shape"])
    if "value" in entry:
        return np.full(shape, entry["value"], np.float32)
    stored = (entry["kept"], shape[-1]) if "kept" in entry else shape
    values = arrays[name]
    if "bits" in entry:
        values = (unpack(values, entry["bits"], math.prod(stored)).astype(np.int32) + entry["low"]).astype(_dtype(entry["dtype"])).reshape(stored)
    if "kept" not in entry:
        return values
    vectors = np.zeros((math.prod(shape[:-1]), shape[-1]), values.dtype)
    kept = unpack(arrays[f"{name}.kept"], 1, len(vectors)).astype(bool)
    if kept.sum() != len(values):
        raise ValueError(f"{name}.kept names {kept.sum()} vectors, and {len(values)} are stored.")
    vectors[kept] = values
    return vectors.reshape(shape)


def _leaf(entry: dict[str, Any], known: dict[int, Format], arrays: dict[str, np.ndarray]):
    name, shape = entry["name"], tuple(entry["shape"])
    if "format" not in entry:
        return jnp.asarray(arrays[name])
    format, axes = known[entry["format"]], tuple(entry["channel_axes"])
    codes = jnp.asarray(unpack(arrays[f"{name}.codes"], format.bits, math.prod(shape)).reshape(shape))
    grid = format.grid_type(**{key: jnp.asarray(_stored(arrays, f"{name}.{key}", stored)) for key, stored in entry["grid"].items()})
    array = QArray(codes, grid, format, axes, _float_dtype(entry["dtype"]))
    format.check(jax.eval_shape(lambda c: to_rows(c, axes), codes).shape)
    if jax.eval_shape(QArray.decode, array).shape != shape:
        raise ValueError(f"{name} {shape} does not decode with grids {[g.shape for g in grid]} along axes {axes}")
    return array


def _activations(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Grid]:
    grids, taken = {}, dict.fromkeys(Grid._fields, 0)
    for name, shapes in record["activations"]:
        parts = {}
        for key, first in taken.items():
            taken[key] = first + math.prod(shapes[key])
            parts[key] = jnp.asarray(arrays[f"activations.{key}"][first : taken[key]].reshape(shapes[key]))
        grids[_text(name)] = Grid(**parts)
    return grids


def _names(params) -> list[str]:
    """One for each parameter, no two alike."""
    names = leaf_names(jax.tree.map(lambda _: 0, params, is_leaf=is_qarray))
    return [name if names.count(name) == 1 else f"{name}#{n}" for n, name in enumerate(names)]


def _tree(entries, leaves, params):
    if params is not None:
        tree = jax.tree.structure(params, is_leaf=is_qarray)
        shapes = [tuple(x.shape) for x in jax.tree.leaves(params, is_leaf=is_qarray)]
        if len(leaves) != len(shapes):
            raise ValueError(f"it is of another model: it has {len(leaves)} parameters, `params` has {len(shapes)}.")
        for entry, leaf, name, given in zip(entries, leaves, _names(params), shapes, strict=True):
            if entry["name"] != name:
                raise ValueError(f"it is of another model: {entry['name']} stands there where {name} is in `params`. Rename it.")
            if leaf.shape != given:
                raise ValueError(f"it is of another model: {name} is {leaf.shape} there and {given} in `params`.")
        return jax.tree.unflatten(tree, leaves)
    root: dict = {}
    for entry, leaf in zip(entries, leaves, strict=True):
        path = entry["path"]
        steps = [_kind_and_key(step) for step in path]
        if not steps:
            return leaf
        node = root
        for step in steps[:-1]:
            node = node.setdefault(step, {})
        if node.setdefault(steps[-1], leaf) is not leaf:
            raise ValueError(f"two parameters are at {path}.")
    return _build(root)


def _build(node):
    if not isinstance(node, dict):
        return node
    kinds = {kind for kind, _ in node}
    if kinds == {"dict"}:
        return {key: _build(child) for (_, key), child in node.items()}
    if kinds == {"index"} and max(number for _, number in node) < len(node):
        return [_build(child) for _, child in sorted(node.items())]
    raise ValueError(
        "the parameters were not a tree of dicts and lists alone, or held None or an empty one. Pass a tree of their structure: "
        "restore(path, apply_fn, params=…), as brecq_jax.from_nnx gives."
    )


def _step(entry) -> Any:
    if isinstance(entry, jax.tree_util.DictKey) and isinstance(entry.key, (str, int)):
        return entry.key if isinstance(entry.key, str) else ["dict", entry.key]
    return entry.idx if isinstance(entry, jax.tree_util.SequenceKey) else _other(entry)


def _other(entry) -> list[str]:
    return ["other", str(entry)]


def _holds_nothing(params) -> bool:
    """Whether a part of the tree has no parameters, as (), {} and None: no path leads there."""

    def is_whole(x):
        return is_qarray(x) or not jax.tree.leaves(x)

    return not all(map(jax.tree.leaves, jax.tree.leaves(params, is_leaf=is_whole)))


def _kind_and_key(step: Any) -> tuple[str, Any]:
    if isinstance(step, list):
        kind, key = step
        return kind, key
    return ("dict" if isinstance(step, str) else "index"), step


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the name {name!r}")
    return name


def _counts(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape {shape!r}")
    return tuple(shape)


def _dtype(name: Any) -> np.dtype:
    dtype = jnp.dtype(_text(name))
    if not (jnp.issubdtype(dtype, jnp.number) or dtype == bool):
        raise ValueError(f"the dtype {name!r} is not one of numbers.")
    return dtype


def _float_dtype(name: Any) -> str:
    if not jnp.issubdtype(_dtype(name), jnp.floating):
        raise ValueError(f"the float type {name!r}")
    return name
