"""Save and restore a Quantized: codes and grids by orbax, all else as JSON beside them. No float copy of a weight."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from brecq_jax import formats
from brecq_jax._graph import leaf_names, trace
from brecq_jax._model import Program, Quantized
from brecq_jax._qarray import QArray
from brecq_jax.formats import Grid
from brecq_jax.report import Report

VERSION = 1
META, ARRAYS = "brecq_jax.json", "arrays"


def save(path: str | pathlib.Path, quantized: Quantized) -> None:
    """Write a model to a new folder.

        brecq_jax.save("runs/model", quantized)

    Raises:
      FileExistsError: the path exists.
      TypeError: not a Quantized.
    """
    path = pathlib.Path(path).absolute()
    if not isinstance(quantized, Quantized):
        raise TypeError(f"save: {type(quantized).__name__} is not a Quantized. Pass what quantize() returned.")
    if path.exists():
        raise FileExistsError(f"save: {path} exists. Give a new path, or remove it.")
    leaves = jax.tree.leaves(quantized.params, is_leaf=_is_qarray)
    paths = [p for p, _ in jax.tree.flatten_with_path(quantized.params, is_leaf=_is_qarray)[0]]
    arrays: dict[str, Any] = {}
    records = []
    for n, (leaf, keys) in enumerate(zip(leaves, paths, strict=True)):
        record: dict[str, Any] = {"path": [_key(k) for k in keys], "shape": list(leaf.shape)}
        if isinstance(leaf, QArray):
            arrays |= {f"{n}.codes": leaf.codes} | {f"{n}.{k}": v for k, v in leaf.grid._asdict().items()}
            record |= {"format": _describe(leaf.format), "channel_axes": list(leaf.channel_axes), "dtype": leaf.dtype}
        else:
            arrays[f"{n}.value"] = leaf
        records.append(record)
    for n, (name, grid) in enumerate(quantized.activations.items()):
        arrays |= {f"activation{n}.{k}": v for k, v in grid._asdict().items()}
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    program = quantized.program
    meta = {
        "version": VERSION,
        "leaves": records,
        "activations": list(quantized.activations),
        "sites": [[name, _describe(f)] for name, f in program.sites],
        "whole_values": program.whole_values,
        "arrays": {n: {"shape": list(a.shape), "dtype": a.dtype.name, "sha256": _digest(a)} for n, a in arrays.items()},
        "report": program.report.to_json() if program.report is not None else None,
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / ARRAYS, arrays)
    # Written last: a folder without it is not a checkpoint.
    (path / META).write_text(json.dumps(meta, indent=1))


def restore(path: str | pathlib.Path, apply_fn: Callable, params: Any = None) -> Quantized:
    """Read what `save` wrote.

        quantized = brecq_jax.restore("runs/model", model.apply)

    Args:
      apply_fn: the function that was quantized.
      params: a tree of the parameters' structure (values are not read); needed where it is not made of dicts, lists
        and tuples, as an `nnx.State`. Checked against the checkpoint.

    Raises:
      FileNotFoundError: no checkpoint at the path.
      ValueError: a damaged checkpoint, or one of another model.
    """
    path = pathlib.Path(path).absolute()
    if not (path / META).is_file():
        raise FileNotFoundError(f"restore: {path} is no checkpoint of this library: it has no {META}.")
    try:
        meta = json.loads((path / META).read_text())
        version = meta["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"restore: {path / META} is damaged: {error}. Save the model again.") from error
    if version != VERSION:
        raise ValueError(f"restore: {path} has version {version}, this library reads {VERSION}.")
    arrays = _read_arrays(path, meta["arrays"])
    leaves = []
    for n, record in enumerate(meta["leaves"]):
        if "format" in record:
            format = _format(record["format"])
            grid = format.grid_type(*(jnp.asarray(arrays[f"{n}.{field}"]) for field in format.grid_type._fields))
            codes = jnp.asarray(arrays[f"{n}.codes"])
            leaves.append(QArray(codes, grid, format, tuple(record["channel_axes"]), record["dtype"]))
        else:
            leaves.append(jnp.asarray(arrays[f"{n}.value"]))
    tree = _tree(meta["leaves"], leaves, params)
    activations = {
        name: Grid(*(jnp.asarray(arrays[f"activation{n}.{field}"]) for field in Grid._fields))
        for n, name in enumerate(meta["activations"])
    }
    sites = tuple((name, _format(f)) for name, f in meta["sites"])
    report = Report.from_json(meta["report"]) if meta["report"] else None
    return Quantized(tree, activations, Program(apply_fn, sites, meta["whole_values"], report))


def _read_arrays(path, expected) -> dict[str, np.ndarray]:
    abstract = {n: jax.ShapeDtypeStruct(tuple(a["shape"]), np.dtype(a["dtype"])) for n, a in expected.items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(path / ARRAYS, abstract)
    except (ValueError, KeyError, OSError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"restore: the arrays of {path} cannot be read: {reason}. Save the model again.") from error
    for name, value in arrays.items():
        if _digest(np.asarray(value)) != expected[name]["sha256"]:
            raise ValueError(f"restore: {path}: the array {name} is damaged (its checksum differs). Save the model again.")
    return {n: np.asarray(a) for n, a in arrays.items()}


def _tree(records, leaves, params):
    if params is not None:
        tree = jax.tree.structure(params, is_leaf=_is_qarray)
        shapes = [tuple(x.shape) for x in jax.tree.leaves(params, is_leaf=_is_qarray)]
        saved = [tuple(x.shape) for x in leaves]
        if shapes != saved:
            names = leaf_names(params)
            raise ValueError(
                f"restore: the checkpoint is of another model: it has {len(saved)} parameters, `params` has {len(names)}"
                if len(saved) != len(names)
                else "restore: the checkpoint is of another model: "
                + next(f"{n} is {s} there and {g} in `params`." for n, s, g in zip(names, saved, shapes, strict=True) if s != g)
            )
        return jax.tree.unflatten(tree, leaves)
    root: dict = {}
    for record, leaf in zip(records, leaves, strict=True):
        if not record["path"]:
            return leaf
        node = root
        for kind, key in record["path"][:-1]:
            node = node.setdefault((kind, key), {})
        kind, key = record["path"][-1]
        node[kind, key] = leaf
    return _build(root)


def _build(node):
    if not isinstance(node, dict):
        return node
    kinds = {kind for kind, _ in node}
    if kinds == {"dict"}:
        return {key: _build(child) for (_, key), child in node.items()}
    if kinds == {"index"}:
        return [_build(child) for _, child in sorted(node.items())]
    raise ValueError(
        "restore: the parameters were not a tree of dicts and lists. Pass a tree of their structure: "
        "restore(path, apply_fn, params=…), as brecq_jax.from_nnx gives."
    )


def _key(entry) -> list:
    if isinstance(entry, jax.tree_util.DictKey) and isinstance(entry.key, (str, int)):
        return ["dict", entry.key]
    if isinstance(entry, jax.tree_util.SequenceKey):
        return ["index", entry.idx]
    return ["other", str(entry)]


def _describe(format) -> dict:
    fields = {f.name: getattr(format, f.name) for f in dataclasses.fields(format)}
    return {"type": type(format).__name__} | {k: _describe(v) if dataclasses.is_dataclass(v) else v for k, v in fields.items()}


def _format(record: dict):
    kind = getattr(formats, record["type"], None) if record["type"] in formats.__all__ else None
    if not dataclasses.is_dataclass(kind):
        raise ValueError(f"restore: the format {record['type']!r} is unknown to this version of the library.")
    return kind(**{k: _format(v) if isinstance(v, dict) else v for k, v in record.items() if k != "type"})


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _is_qarray(x) -> bool:
    return isinstance(x, QArray)
