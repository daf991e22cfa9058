"""What an interrupted run keeps: a folder with a record of each finished block, in the order in which they were finished.

    lock               held by the process that works in the folder, and by it alone
    run                JSON, {part: SHA-256}: what the run was made of; see `_quantize`, which says what is compared
    00000, 00001, …    one record per finished block: a line of JSON, the arrays' bytes

`run` and the records begin with a SHA-256 of all that follows. A file gets its name when all of it is on the disk, so that none is
ever half-written; one that was damaged later is known by its SHA-256, and its block is done again. Each record names what came
before it (a SHA-256 over the run and the arrays of all blocks until there), so that a block is never put on top of others than
those that it was learned on.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import pathlib
import socket
import types
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

RUN, PART = "run", ".part"
DIGEST = hashlib.sha256().digest_size


class Journal:
    """The records of one run. `next` and `add` are called for each block in turn, by every process of a run."""

    def __init__(self, folder: pathlib.Path, run: Mapping[str, str]):
        self.folder, self.count = folder, 0
        self.last = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).digest()

    def next(self, block: str, like: Any) -> tuple[Any, list[dict], list[str]] | None:
        """What was found for the next block: (a tree of arrays as `like`, its infos, its notes); None if it is to be done."""
        packed = _everywhere(self._read(block))
        if packed is None:
            return None
        line, _, arrays = packed.partition(b"\n")
        if len(arrays) != sum(a.nbytes for a in jax.tree.leaves(like)):
            return None
        self._follow(arrays)
        kept = json.loads(line)
        return _tree_of(arrays, like), kept["infos"], kept["notes"]

    def add(self, block: str, found: Any, infos: list[dict], notes: list[str]):
        """Keep what was found for the next block.

        Raises:
          OSError: it could not be written, as on a full disk. What was kept before is there still.
        """
        arrays = _bytes_of(found)
        if jax.process_index() == 0:
            line = json.dumps({"block": block, "before": self.last.hex(), "infos": infos, "notes": notes}).encode()
            write_whole(self._path(), _sealed(line + b"\n" + arrays))
        self._follow(arrays)

    @property
    def kept(self) -> int:
        """How many records are in the folder."""
        return sum(path.name.isdigit() for path in self.folder.iterdir())

    def _path(self) -> pathlib.Path:
        return self.folder / f"{self.count:05}"

    def _follow(self, arrays: bytes):
        self.last = hashlib.sha256(self.last + arrays).digest()
        self.count += 1

    def _read(self, block: str) -> bytes | None:
        """The next record, if it is there, whole, and follows what came before."""
        if jax.process_index() or not self._path().is_file():
            return None
        packed = _unsealed(self._path().read_bytes())
        if packed is None:
            warnings.warn(f"resume: {self._path()} is damaged; block {block} is done again.", stacklevel=2)
            return None
        line = json.loads(packed.partition(b"\n")[0])
        return packed if (line.get("block"), line.get("before")) == (block, self.last.hex()) else None


@contextlib.contextmanager
def opened(folder: str | pathlib.Path | None, run: Callable[[], Mapping[str, str]]) -> Iterator[Journal | None]:
    """The journal of a folder, which is made if it is not there. `run()`: SHA-256 of all that the run's result depends on.

    Raises:
      ValueError: the folder has blocks of another run.
      FileExistsError: another process works in it.
    """
    if folder is None:
        yield None
        return
    folder, parts = pathlib.Path(folder), dict(run())
    with locked(folder):
        if jax.process_index() == 0:
            _check(folder, parts)
        yield Journal(folder, parts)


def _check(folder: pathlib.Path, parts: Mapping[str, str]):
    kept = _unsealed((folder / RUN).read_bytes()) if (folder / RUN).exists() else None
    try:
        there = json.loads(kept or b"")
    except ValueError:  # none, or damaged: then each record says whose it is
        write_whole(folder / RUN, _sealed(json.dumps(parts).encode()))
        return
    if there != parts:
        other = sorted(name for name in {*there, *parts} if there.get(name) != parts.get(name))
        raise ValueError(
            f"resume: {folder} has blocks of a run with other {', '.join(other)}. Give the command that was interrupted, another folder, or "
            "remove this one."
        )


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Hold `folder`, which is made if it is not there. The lock ends with the process, however that ends.

    Raises:
      FileExistsError: another process holds it.
    """
    if jax.process_index():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    import fcntl  # Windows has none, and no `resume`

    path = folder / "lock"
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise FileExistsError(f"{folder}: another process works in it ({lock.read()}). Wait for its end, or give another folder.") from None
        if not path.exists() or path.stat().st_ino != os.fstat(lock.fileno()).st_ino:  # its holder finished just now, and removed it
            raise FileExistsError(f"{folder}: another process worked in it until now. Give the command again.")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        try:
            yield
        finally:
            path.unlink()


def write_whole(path: pathlib.Path, data: bytes):
    """All of the file or nothing of it: it has its name once its bytes are on the disk."""
    part = path.with_name(path.name + PART)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remembered(path: pathlib.Path, types: Any, compute: Callable[[], Any]) -> Any:
    """What `compute()` gives, a tree of arrays of these types: read, if the file is there and whole; else computed, and written.

    Where it cannot be written, as on a full disk, a warning says so: nobody needs the file.
    """
    packed = _unsealed(path.read_bytes()) if path.is_file() else None
    if packed is not None:
        return _tree_of(packed, types)
    found = compute()
    mine = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # another process, of another host too, may be writing the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(mine, _sealed(_bytes_of(found)))
        mine.rename(path)
    except OSError as error:
        warnings.warn(f"{path} could not be written, so it is computed again when it is needed: {error}", stacklevel=2)
        with contextlib.suppress(OSError):
            mine.with_name(mine.name + PART).unlink()
    return found


def _bytes_of(tree: Any) -> bytes:
    return b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(tree))


def _tree_of(data: bytes, like: Any) -> Any:
    """The inverse, for a tree of arrays, or of their types, as `like`."""
    leaves, tree = jax.tree.flatten(like)
    found, first = [], 0
    for a in leaves:
        found.append(jnp.asarray(np.frombuffer(data, a.dtype, a.size, first).reshape(a.shape)))
        first += a.size * a.dtype.itemsize
    return jax.tree.unflatten(tree, found)


def _sealed(data: bytes) -> bytes:
    return hashlib.sha256(data).digest() + data


def _unsealed(whole: bytes) -> bytes | None:
    """What was sealed, or None if it is damaged."""
    return whole[DIGEST:] if hashlib.sha256(whole[DIGEST:]).digest() == whole[:DIGEST] else None


def _everywhere(packed: bytes | None) -> bytes | None:
    """What process 0 has, in every process of the run."""
    if jax.process_count() == 1:
        return packed
    length = int(multihost_utils.broadcast_one_to_all(np.int64(-1 if packed is None else len(packed))))
    if length < 0:
        return None
    mine = np.zeros(length, np.uint8) if packed is None else np.frombuffer(packed, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes()


def check_same_everywhere(parts: Mapping[str, str]):
    """Every process of the run has the same parts ({part: SHA-256}).

    Raises:
      ValueError: one has others, in every process.
    """
    mine = np.frombuffer(bytes.fromhex("".join(parts.values())), np.uint8).reshape(len(parts), DIGEST)
    there = multihost_utils.process_allgather(mine)
    other = [name for name, differ in zip(parts, (there != there[0]).any((0, 2)), strict=True) if differ]
    if other:
        raise ValueError(
            f"quantize: the {len(there)} processes of this run were given other {', '.join(other)}. Give each the same arguments, and the whole "
            "calibration set, not a share of it: devices share it out themselves."
        )


def digest(*values: Any) -> str:
    """SHA-256 of values that are made of numbers, text, arrays, containers, dataclasses and functions.

    A function is its code, its defaults and what it closes over; a name that it takes from its module is not followed.
    """
    total = hashlib.sha256()
    _feed(total, values, ())
    return total.hexdigest()


@functools.cache
def library() -> str:
    """SHA-256 of jax's version and of every source file of this library, as they are when a process first asks."""
    here = pathlib.Path(__file__).parent
    return digest(jax.__version__, [path.read_bytes() for path in sorted(here.rglob("*.py"))])


def _feed(total, x: Any, outside: tuple[int, ...]):
    if id(x) in outside:  # a function that closes over itself
        return total.update(b"again")
    feed = functools.partial(_feed, total, outside=(*outside, id(x)))
    total.update(f"{type(x).__name__}:".encode())
    if x is None or x is Ellipsis or isinstance(x, (bool, int, float, complex, str, bytes, np.dtype)):
        total.update(repr(x).encode())
    elif isinstance(x, type | types.ModuleType | types.BuiltinFunctionType):
        total.update(f"{getattr(x, '__module__', '')}.{x.__name__}".encode())
    elif isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        feed(jax.random.key_data(x))
    elif hasattr(x, "dtype") and hasattr(x, "shape"):
        total.update(f"{jnp.dtype(x.dtype).name}{x.shape}".encode())
        total.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8))  # no copy of a calibration set
    elif isinstance(x, Mapping):
        feed(list(x.items()))
    elif isinstance(x, (list, tuple)):
        total.update(f"{len(x)}".encode())
        for one in x:
            feed(one)
    elif isinstance(x, (set, frozenset)):
        feed(sorted(map(repr, x)))
    elif isinstance(x, types.CodeType):
        feed([x.co_code, x.co_consts, x.co_names])
    elif inspect.isfunction(x):
        feed([x.__module__, x.__qualname__, x.__code__, x.__defaults__, x.__kwdefaults__, [c.cell_contents for c in x.__closure__ or ()]])
    elif isinstance(x, functools.partial):
        feed([x.func, x.args, x.keywords])
    elif inspect.ismethod(x):
        feed([x.__func__, x.__self__])
    elif hasattr(x, "__wrapped__"):  # by jit, or another decorator
        feed(x.__wrapped__)
    elif dataclasses.is_dataclass(x):
        feed([(f.name, getattr(x, f.name)) for f in dataclasses.fields(x)])
    elif hasattr(x, "__dict__"):
        feed(vars(x))
    else:
        raise TypeError(f"resume: a {type(x).__name__} cannot be compared with that of an interrupted run. Leave it out of the solver and the loss.")
