"""Read `.safetensors` files: an 8-byte length, a JSON header of that length, then the tensors' bytes.

Source of the format and of what makes a file invalid: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
LENGTH = struct.Struct("<Q")
LONGEST_HEADER = 100_000_000  # bytes: the original reader's limit


def read_safetensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors of a file by name. They share its bytes, and are read-only.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not of this format, truncated, an unknown dtype, or tensors that overlap, leave gaps or reach outside.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        return _tensors(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one: {error!s}") from error


def _tensors(whole: bytes) -> dict[str, np.ndarray]:
    if len(whole) < LENGTH.size:
        raise ValueError(f"{len(whole)} bytes are no header.")
    (length,) = LENGTH.unpack_from(whole)
    start = LENGTH.size + length
    if length > LONGEST_HEADER or start > len(whole):
        raise ValueError(f"a header of {length} bytes in a file of {len(whole)}.")
    header = json.loads(whole[LENGTH.size : start], object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError(f"the header is a {type(header).__name__}, not an object.")
    header.pop("__metadata__", None)
    places = {name: _place(name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, first, last) in sorted(places.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise ValueError(f"tensor {name} begins at byte {first}, where {end} bytes are taken.")
        end = last
    if start + end != len(whole):
        raise ValueError(f"the tensors take {end} bytes, the file holds {len(whole) - start}.")
    return {
        name: np.frombuffer(whole, dtype, math.prod(shape), start + first).reshape(shape)
        for name, (dtype, shape, first, _) in places.items()
    }


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in the header.")
    return found


def _place(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """dtype, shape, first byte and the byte after the last, counted from the end of the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} is described by {entry!r}, not by dtype, shape and data_offsets.")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has shape {shape!r} and offsets {offsets!r}: refused.")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name} is of dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}.")
    dtype = np.dtype(DTYPES[entry["dtype"]])
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} {tuple(shape)} of {dtype} cannot take bytes {offsets[0]} to {offsets[1]}.")
    return dtype, tuple(shape), *offsets


def _counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
