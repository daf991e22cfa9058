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
import zlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

NESTED = ("state_dict", "model")  # where training code keeps the tensors, beside its epoch and optimizer
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
BIG_ENDIAN = "written on a big-endian machine: save it again on another."
EXPANSION_LIMIT = 2**16  # elements of a tensor for each of its storage (stride 0 repeats them); a guess
STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


# What a damaged file raises on the way, from pickle, struct, zipfile and the file system.
DAMAGE = (
    pickle.UnpicklingError, EOFError, struct.error, LookupError, AttributeError, TypeError, ValueError, MemoryError, OverflowError,
    NotImplementedError, RuntimeError, OSError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


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

    A nested `state_dict` or `model` is unwrapped and `module.` prefixes are dropped. Nothing in the file is executed.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a checkpoint, truncated, tensors that reach outside their storage, or a file that asks for
        anything but tensors (the refused name is told).
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        loaded, storages = _read_zip(path) if zipfile.is_zipfile(path) else _read_stream(path)
        return {name: _array(name, tensor, storages) for name, tensor in flatten_state_dict(loaded).items()}
    except DAMAGE as error:
        raise ValueError(f"{path}: not a PyTorch checkpoint, or a damaged one: {error!s} ({type(error).__name__})") from error


def flatten_state_dict(loaded: Any) -> dict[str, _Tensor]:
    """The tensors of what was unpickled: out of a nested dict, and without `module.` prefixes."""
    for key in NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, not a dict of tensors.")
    tensors = {k.removeprefix("module."): v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, _Tensor)}
    if not tensors:
        raise ValueError("it holds no tensors.")
    return tensors


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
        if len(ident) > 5 and ident[5] is not None:
            raise ValueError(f"storage {key} is a view of another (torch before 0.4): save the state_dict again with a newer torch.")
        return _Storage(str(key), np.dtype(STORAGES[storage]), size)


def _read_zip(path: pathlib.Path):
    with zipfile.ZipFile(path) as archive:
        root = next((n.rpartition("/")[0] for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"), None)
        if root is None:
            raise ValueError("a zip archive without data.pkl is no PyTorch checkpoint.")
        if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
            raise ValueError(BIG_ENDIAN)
        loaded = _Unpickler(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
        storages = {n.rpartition("/")[2]: archive.read(n) for n in archive.namelist() if n.startswith(f"{root}/data/")}
    return loaded, storages


def _read_stream(path: pathlib.Path):
    with path.open("rb") as file:
        if _Unpickler(file).load() != LEGACY_MAGIC:
            raise ValueError("the magic number is another.")
        _Unpickler(file).load()  # protocol version
        machine = _Unpickler(file).load()
        if not machine.get("little_endian", True):
            raise ValueError(BIG_ENDIAN)
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
            if not 0 <= wanted <= path.stat().st_size - file.tell():
                raise ValueError(f"truncated: storage {key} should hold {wanted} bytes.")
            storages[str(key)] = file.read(wanted)
    return loaded, storages


def _array(name: str, tensor: _Tensor, storages: dict[str, bytes]) -> np.ndarray:
    storage, offset, shape, stride = tensor
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"tensor {name} has offset {offset}, shape {shape}, strides {stride}: refused.")
    if storage.key not in storages:
        raise ValueError(f"tensor {name} lies in storage {storage.key}, which the file lacks: truncated or forged.")
    if not math.prod(shape):
        return np.zeros(shape, storage.dtype)
    size = min(len(storages[storage.key]) // storage.dtype.itemsize, storage.size)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if last >= size:
        raise ValueError(f"tensor {name} {shape} reaches outside its storage of {size}: truncated or forged.")
    if math.prod(shape) > EXPANSION_LIMIT * size:
        raise ValueError(f"tensor {name} {shape} repeats a storage of {size} too often: forged, or expanded: save its clone.")
    data = np.frombuffer(storages[storage.key], storage.dtype, size)
    view = np.lib.stride_tricks.as_strided(data[offset:], shape, [s * storage.dtype.itemsize for s in stride])
    return view.copy(order="C")
