"""Save and restore a Quantized as a folder: packed codes and grids by orbax, a record of them as JSON. No float copy of a weight.

    brecq_jax.json     the version, and bytes and SHA-256 of each of the other files; written last
    model.json.gz      the record of `brecq_jax.deploy._record`, compressed
    arrays/            an orbax checkpoint of one array of bytes (zarr, uncompressed: arrays/bytes/0 is the bytes): the
                       record's arrays one after the other in its order, little endian

One array, since each has about 150 bytes of metadata, and a network has hundreds of small ones.
"""

import contextlib
import gzip
import hashlib
import json
import logging
import math
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from brecq_jax._model import Quantized
from brecq_jax.deploy._record import describe, layout, rebuild, refusing

VERSION = 3
META, MODEL, ARRAYS = "brecq_jax.json", "model.json.gz", "arrays"
BYTES = "bytes"  # the one array's name
# How much longer than its file a record may be, so that a short file cannot ask for much memory. Ours are about 15 times.
LONGEST_RECORD = 100


def save(path: str | pathlib.Path, quantized: Quantized) -> None:
    """Write a model to a new folder.

        brecq_jax.save("runs/model", quantized)

    In a run of many processes, one of them calls it, or each with a path of its own: all have the whole model.

    Raises:
      FileExistsError: the path exists.
      TypeError: not a Quantized.
    """
    path = pathlib.Path(path).absolute()
    if not isinstance(quantized, Quantized):
        raise TypeError(f"save: {type(quantized).__name__} is not a Quantized. Pass what quantize() returned.")
    if path.exists():
        raise FileExistsError(f"save: {path} exists. Give a new path, or remove it.")
    record, arrays = describe(quantized)
    parts = [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays.values()]
    with _checkpointer() as checkpointer, _unwarned():
        checkpointer.save(path / ARRAYS, {BYTES: np.concatenate(parts)})
    (path / MODEL).write_bytes(gzip.compress(json.dumps(record, separators=(",", ":")).encode(), mtime=0))
    # Written last: a folder without it is not a checkpoint.
    (path / META).write_text(json.dumps({"version": VERSION, "files": {name: _seal(path / name) for name in _files(path)}}, indent=1))


def restore(path: str | pathlib.Path, apply_fn: Callable, params: Any = None) -> Quantized:
    """Read what `save` wrote.

        quantized = brecq_jax.restore("runs/model", model.apply)

    Args:
      apply_fn: the function that was quantized.
      params: a tree of the parameters' structure (values are not read); needed where it is not made of dicts, lists
        and tuples, as an `nnx.State`, or holds None or an empty part. Names and shapes are checked against the checkpoint.

    Raises:
      FileNotFoundError: no checkpoint at the path.
      ValueError: a damaged checkpoint, one of another version of the library, or, where `params` are given, one of another model.
    """
    path = pathlib.Path(path).absolute()
    if not (path / META).is_file():
        raise FileNotFoundError(f"restore: {path} is no checkpoint of this library: it has no {META}.")
    with refusing(path):
        _check_files(path)
        record = _read_record(path)
        return rebuild(record, _read_arrays(path, layout(record)), apply_fn, params)


def _check_files(path: pathlib.Path) -> None:
    """Raise ValueError unless every file is as it was saved: nothing else is read before."""
    meta = json.loads((path / META).read_bytes())
    if meta["version"] != VERSION:
        raise ValueError(f"it has version {meta['version']!r}, and this library reads {VERSION}. Restore it with the release that saved it.")
    there, saved = _files(path), meta["files"]
    if set(there) != set(saved):
        raise ValueError(f"its files are not those that were saved: {', '.join(sorted(set(there) ^ set(saved)))}. Save the model again.")
    for name in there:
        seal = _seal(path / name) if (path / name).stat().st_size == saved[name]["bytes"] else None
        if seal != saved[name]:
            raise ValueError(f"{name} is damaged: its length or its checksum is not what was saved. Save the model again.")


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    packed = (path / MODEL).read_bytes()
    reader = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: of gzip
    try:
        text = reader.decompress(packed, LONGEST_RECORD * len(packed))
    except zlib.error as error:
        raise ValueError(f"{MODEL} is not compressed by gzip: {error}.") from error
    if not reader.eof:
        raise ValueError(f"{MODEL} ends early, or is more than {LONGEST_RECORD} times longer than the file.")
    return json.loads(text)


def _read_arrays(path: pathlib.Path, places: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    sizes = {name: jnp.dtype(dtype).itemsize * math.prod(shape) for name, (dtype, shape) in places.items()}
    held = sum((path / name).stat().st_size for name in _files(path))
    if sum(sizes.values()) > held:
        raise ValueError(f"its record speaks of more than the {held} bytes of its files.")
    try:
        # Not by orbax: where tensorstore cannot read, its thread answers to an event loop that orbax has closed, which now and then
        # ends the process.
        stored = tensorstore.open({"driver": "zarr", "kvstore": {"driver": "file", "path": str(path / ARRAYS / BYTES)}}, read=True).result()
        if stored.dtype.name != "uint8" or stored.shape != (sum(sizes.values()),):
            raise ValueError(f"{ARRAYS} holds {stored.shape} of {stored.dtype.name}, and the record speaks of {sum(sizes.values())} bytes.")
        whole = stored.read().result()
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{ARRAYS} cannot be read: {reason}. Save the model again.") from error
    arrays, taken = {}, 0
    for name, (dtype, shape) in places.items():
        arrays[name] = whole[taken : taken + sizes[name]].copy().view(dtype).reshape(shape)
        taken += sizes[name]
    return arrays


def _checkpointer() -> ocp.Checkpointer:
    # Uncompressed, though codes of normal weights would shrink by up to an eighth: no file asks for more memory than it has bytes.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}")
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without orbax' warning that there is nothing to merge, which it gives whenever `use_ocdbt` is False."""

    def wanted(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT checkpoints" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def _files(path: pathlib.Path) -> list[str]:
    """Names of the files beside META, relative to the folder."""
    return [MODEL, *sorted(f.relative_to(path).as_posix() for f in (path / ARRAYS).rglob("*") if f.is_file())]


def _seal(file: pathlib.Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
