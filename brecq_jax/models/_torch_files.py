"""Read PyTorch checkpoints without PyTorch, and without running what is in them.

Both layouts: the zip archive (1.6 and later) and the plain pickle stream before it. The unpickler builds tensors,
ordered dicts and plain values, and refuses every other global. The layout is that of torch/serialization.py.
"""

import collections
import io
import math
import pathlib
import pickle
import struct
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


class _Storage(NamedTuple):
    key: str
    dtype: Any
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Tensors of a `.pth`, `.pt`, `.th` or `.pth.tar` file by name.

    A nested `state_dict` is unwrapped and `module.` prefixes are dropped. Nothing in the file is executed.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a checkpoint, truncated, tensors that reach outside their storage, or a file that asks for
        anything but tensors (the refused name is told).
    """
    path = pathlib.Path(path)
    try:
        loaded, storages = _read_zip(path) if zipfile.is_zipfile(path) else _read_stream(path)
    except (pickle.UnpicklingError, EOFError, struct.error, KeyError, IndexError, AttributeError, UnicodeDecodeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a PyTorch checkpoint, or a damaged one: {error}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, not a dict of tensors.")
    tensors = {k.removeprefix("module."): v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, _Tensor)}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors.")
    return {name: _array(path, name, t, storages) for name, t in tensors.items()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: _Tensor(storage, offset, tuple(shape), tuple(stride))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in STORAGES:
            return name
        if (module, name) == ("torch", "Size"):
            return tuple
        raise ValueError(f"the checkpoint asks for {module}.{name}, which is no tensor: refused. Save a state_dict alone.")

    def persistent_load(self, ident):
        kind, storage, key, _, size = ident[:5]
        if kind != "storage" or storage not in STORAGES or not isinstance(size, int) or size < 0:
            raise ValueError(f"the checkpoint refers to {ident!r}, which is no storage: refused.")
        return _Storage(str(key), np.dtype(STORAGES[storage]), size)


def _read_zip(path: pathlib.Path):
    with zipfile.ZipFile(path) as archive:
        root = next((n.rpartition("/")[0] for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"), None)
        if root is None:
            raise ValueError(f"{path}: a zip archive without data.pkl is no PyTorch checkpoint.")
        loaded = _Unpickler(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
        storages = {n.rpartition("/")[2]: archive.read(n) for n in archive.namelist() if n.startswith(f"{root}/data/")}
    return loaded, storages


def _read_stream(path: pathlib.Path):
    with path.open("rb") as file:
        if _Unpickler(file).load() != LEGACY_MAGIC:
            raise ValueError(f"{path}: not a PyTorch checkpoint.")
        _Unpickler(file).load()  # protocol version
        _Unpickler(file).load()  # sizes of the machine that wrote it
        seen: dict[str, int] = {}

        class Recording(_Unpickler):
            def persistent_load(self, ident):
                storage = super().persistent_load(ident)
                seen[storage.key] = storage.dtype.itemsize
                return storage

        loaded = Recording(file).load()
        storages = {}
        for key in _Unpickler(file).load():
            (size,) = struct.unpack("<q", file.read(8))
            wanted = size * seen[str(key)]
            storages[str(key)] = file.read(wanted) if size >= 0 else b""
            if size < 0 or len(storages[str(key)]) != wanted:
                raise ValueError(f"{path}: truncated: storage {key} should hold {wanted} bytes.")
    return loaded, storages


def _array(path, name: str, tensor: _Tensor, storages: dict[str, bytes]) -> np.ndarray:
    storage, offset, shape, stride = tensor
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"{path}: tensor {name} has offset {offset}, shape {shape}, strides {stride}: refused.")
    data = np.frombuffer(storages[storage.key], storage.dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= min(len(data), storage.size):
        raise ValueError(f"{path}: tensor {name} {shape} reaches outside its storage of {len(data)}: truncated or forged.")
    if not math.prod(shape):
        return np.zeros(shape, storage.dtype)
    view = np.lib.stride_tricks.as_strided(data[offset:], shape, [s * storage.dtype.itemsize for s in stride])
    return np.ascontiguousarray(view)
