"""A Quantized as one `.safetensors` file, whose codes NumPy alone can read.

The file is an ordinary one (https://github.com/huggingface/safetensors#format): 8 bytes with the length of a JSON header,
the header, the tensors. Its tensors are the arrays of `brecq_jax.deploy._record`: of every quantized parameter `name.codes`
(uint8, packed as `brecq_jax.deploy.packing` says) and what its grid needs, and every other parameter as it is. Wider dtypes
come first, so that every tensor is aligned. The header's `__metadata__` holds

    "brecq_jax"   the JSON record: shapes, formats, bits, channel axes, activations; no report
    "version"     of this layout
    "sha256"      of the whole file, with 64 zeros in place of these digits
"""

import hashlib
import json
import math
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from brecq_jax._model import Quantized
from brecq_jax.deploy._record import describe, layout, rebuild, refusing

VERSION = "1"
LENGTH = struct.Struct("<Q")
ALIGNMENT = 8  # bytes: of the widest dtype
UNSEALED = "0" * 64
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip


def save_safetensors(path: str | pathlib.Path, quantized: Quantized) -> None:
    """Write a model to a new file.

        brecq_jax.deploy.save_safetensors("model.safetensors", quantized)

    Raises:
      FileExistsError: the path exists.
      TypeError: not a Quantized, or a parameter of a dtype that these files do not know.
    """
    path = pathlib.Path(path)
    if not isinstance(quantized, Quantized):
        raise TypeError(f"save_safetensors: {type(quantized).__name__} is not a Quantized. Pass what quantize() returned.")
    if path.exists():
        raise FileExistsError(f"save_safetensors: {path} exists. Give a new path, or remove it.")
    record, arrays = describe(quantized)
    record["report"] = None
    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise TypeError(f"save_safetensors: {name} is {array.dtype}, which these files do not know. Use brecq_jax.save.")
    places = _places({name: (array.dtype, array.shape) for name, array in arrays.items()})
    text = json.dumps(record, separators=(",", ":"))
    metadata = {"brecq_jax": text, "version": VERSION, "sha256": UNSEALED}
    header = json.dumps({"__metadata__": metadata, **places}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    whole = b"".join([LENGTH.pack(len(header)), header, *(np.ascontiguousarray(arrays[name]).tobytes() for name in places)])
    path.write_bytes(_sealed(whole, UNSEALED, hashlib.sha256(whole).hexdigest()))


def restore_safetensors(path: str | pathlib.Path, apply_fn: Callable, params: Any = None) -> Quantized:
    """Read what `save_safetensors` wrote. The model has no report.

        quantized = brecq_jax.deploy.restore_safetensors("model.safetensors", model.apply)

    Args: those of `brecq_jax.restore`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, one of another model, of another version, or one that this library did not write.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"restore: {path}: no such file.")
    with refusing(path):
        whole = path.read_bytes()
        header, start = _header(whole)
        metadata = header.pop("__metadata__", {})
        if "brecq_jax" not in metadata:
            raise ValueError("a safetensors file that this library did not write: it describes no codes.")
        if metadata["version"] != VERSION:
            raise ValueError(f"it has version {metadata['version']!r}, and this library reads {VERSION!r}. Save the model again.")
        digest = metadata["sha256"]
        if hashlib.sha256(_sealed(whole, digest, UNSEALED)).hexdigest() != digest:
            raise ValueError("it is damaged: its checksum differs. Save the model again.")
        record = json.loads(metadata["brecq_jax"])
        promised = layout(record)
        places = _places(promised)
        if header != places or start + _end(places) != len(whole):
            raise ValueError("its tensors are not those that its description speaks of.")
        arrays = {name: _tensor(whole, start, *promised[name], places[name]) for name in places}
        return rebuild(record, arrays, apply_fn, params)


def _header(whole: bytes) -> tuple[dict[str, Any], int]:
    """The header and where the tensors begin."""
    if len(whole) < LENGTH.size:
        raise ValueError(f"{len(whole)} bytes are no safetensors file.")
    (length,) = LENGTH.unpack_from(whole)
    start = LENGTH.size + length
    if start > len(whole):
        raise ValueError(f"not a safetensors file, or a truncated one: its header has {length} bytes and the file {len(whole)}.")
    return json.loads(whole[LENGTH.size : start]), start


def _places(arrays: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, dict[str, Any]]:
    """The header's entries, in the order of the tensors in the file."""
    places, end = {}, 0
    for name, (dtype, shape) in sorted(arrays.items(), key=lambda item: -item[1][0].itemsize):
        first, end = end, end + dtype.itemsize * math.prod(shape)
        places[name] = {"dtype": DTYPES[dtype.name], "shape": list(shape), "data_offsets": [first, end]}
    return places


def _end(places: dict[str, dict[str, Any]]) -> int:
    return max((place["data_offsets"][1] for place in places.values()), default=0)


def _tensor(whole: bytes, start: int, dtype: np.dtype, shape: tuple[int, ...], place: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(whole, dtype, math.prod(shape), start + place["data_offsets"][0]).reshape(shape)


def _sealed(whole: bytes, old: str, new: str) -> bytes:
    """The file with another checksum. What comes first is the header: of its digits the first are replaced."""
    return whole.replace(f'"sha256":"{old}"'.encode(), f'"sha256":"{new}"'.encode(), 1)
