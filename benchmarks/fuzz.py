r"""Damage saved models in every way we can think of, restore them, and count what happens.

    python benchmarks/fuzz.py --count=10000 --seed=0

Three kinds of artifact, `count` of each: the folder of `brecq_jax.save`, the file of `deploy.save_safetensors` and that of
`export`, read by `deploy.load_program`. Two kinds of damage. *Plain*: bits flipped, bytes lost, zeroed, moved or added, files lost, swapped or foreign, versions, JSON edited.
Such an artifact must be refused (ValueError or FileNotFoundError that names it), or be the model that was saved, exactly.
*Resealed*: what describes the model is edited, or arrays are damaged, and the checksums are made again, as no accident does.
Such an artifact may be another model; it must not raise anything else, nor ask for memory that its length does not justify.
Programs are not resealed: they are run, so that whom their writer is not to be trusted must not read them.
"""

import argparse
import collections
import functools
import gzip
import hashlib
import json
import logging
import pathlib
import resource
import tempfile
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np

import brecq_jax
from brecq_jax import solvers
from brecq_jax.deploy import load_program, restore_safetensors, save_safetensors
from brecq_jax.deploy.checkpoint import ARRAYS, META, MODEL
from brecq_jax.deploy.export import SEAL
from brecq_jax.deploy.safetensors import LENGTH
from brecq_jax.formats import MinMax, Uniform

RESEALED = 0.2  # of the artifacts
TRACED = 10  # memory in Python and NumPy is measured of every so many artifacts, since that takes three times as long
MOST_MEMORY = 16  # MB that restoring may take in Python and NumPy: 0.3 as a rule, but JAX's caches and imports count as well
MOST_GROWTH = 32  # MB by which restoring may raise the resident peak of the process, which counts orbax and XLA too
VALUES = (
    None, True, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**30, 0.5, 1e308, "", "x", "float64", "object", "codes", [], [0], [2**40, 2**40], {}, {"bits": 9},
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    known = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax reports what it cannot read before it raises
    for name, make in (("checkpoint", Checkpoint), ("safetensors", Safetensors), ("program", Program)):
        with tempfile.TemporaryDirectory() as folder:
            artifact = make(pathlib.Path(folder))
            artifact.restore()
            began, before = time.perf_counter(), peak_mb()
            outcomes, most = fuzz(artifact, known.count, known.seed)
            print(f"{name}: {time.perf_counter() - began:.0f} s, resident peak {before:.0f} -> {peak_mb():.0f} MB, at most {most:.2f} MB at once", flush=True)
            for (kind, outcome), number in sorted(outcomes.items()):
                print(f"  {kind:40} {outcome:10} {number}", flush=True)


def fuzz(artifact, count: int, seed: int) -> tuple[collections.Counter, float]:
    """({(damage, outcome): how often}, the most MB that one restoring took). AssertionError on an outcome that must not be."""
    outcomes: collections.Counter = collections.Counter()
    most = 0.0
    for number in range(count):
        draw = np.random.default_rng((seed, number))
        resealed = bool(draw.random() < RESEALED and artifact.resealed)
        damages = artifact.resealed if resealed else artifact.plain
        damage = damages[draw.integers(len(damages))]
        files = damage(dict(artifact.files), draw)
        if files == artifact.files:
            continue
        artifact.write(files)
        before = peak_mb()
        if number % TRACED == 0:
            tracemalloc.start()
        where = f"{type(artifact).__name__}, seed {seed}, number {number}, {damage.__name__}"
        try:
            outcome = "right" if same(artifact.restore(), artifact.saved) else "another"
        except (ValueError, FileNotFoundError) as error:
            assert str(artifact.path) in str(error), f"{where}: the message does not name the artifact: {error}"
            outcome = "refused"
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        assert resealed or outcome != "another", f"{where}: a wrong model"
        used = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        assert used < MOST_MEMORY, f"{where}: {used:.1f} MB were taken"
        assert peak_mb() - before < MOST_GROWTH, f"{where}: the resident peak grew from {before:.0f} to {peak_mb():.0f} MB"
        most = max(most, used)
        outcomes["resealed " * resealed + damage.__name__, outcome] += 1
    return outcomes, most


def flipped(data: bytes, draw) -> bytes:
    damaged = bytearray(data)
    for at in draw.integers(len(data), size=draw.integers(1, 4)):
        damaged[at] ^= 1 << draw.integers(8)
    return bytes(damaged)


def truncated(data: bytes, draw) -> bytes:
    return data[: draw.integers(len(data))]


def without_a_part(data: bytes, draw) -> bytes:
    first, last = span(data, draw)
    return data[:first] + data[last:]


def with_zeros(data: bytes, draw) -> bytes:
    first, last = span(data, draw)
    return data[:first] + bytes(last - first) + data[last:]


def with_a_part_twice(data: bytes, draw) -> bytes:
    first, last = span(data, draw)
    return data[:last] + data[first:]


def with_parts_swapped(data: bytes, draw) -> bytes:
    a, b, c = sorted(draw.integers(len(data) + 1, size=3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def noise(data: bytes, draw) -> bytes:
    return draw.bytes(draw.integers(2 * len(data) + 1))


def span(data: bytes, draw) -> tuple[int, int]:
    first, last = sorted(draw.integers(len(data) + 1, size=2))
    return int(first), int(last)


BYTES = (flipped, flipped, truncated, without_a_part, with_zeros, with_a_part_twice, with_parts_swapped, noise)


def edited(record, draw):
    """JSON with one value replaced, removed, doubled, or swapped with another."""
    places = list(nodes(record))
    parent, key = places[draw.integers(len(places))]
    what = draw.integers(4)
    if what == 0:
        parent[key] = VALUES[draw.integers(len(VALUES))]
    elif what == 1:
        del parent[key]
    elif what == 2 and isinstance(parent, list):
        parent.append(parent[key])
    else:
        other, place = places[draw.integers(len(places))]
        parent[key], other[place] = other[place], parent[key]
    try:
        return json.loads(json.dumps(record))
    except ValueError:  # swapped into itself
        return {}


def nodes(value):
    for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inside, (dict, list)):
            yield from nodes(inside)


class Checkpoint:
    """The folder of `brecq_jax.save`: its files by name, and what can be done to them."""

    def __init__(self, folder: pathlib.Path):
        self.path, self.saved = folder / "model", small_model()
        brecq_jax.save(self.path, self.saved)
        self.files = {f.relative_to(self.path).as_posix(): f.read_bytes() for f in self.path.rglob("*") if f.is_file()}
        self.plain = (damaged_file, damaged_file, damaged_file, lost_file, foreign_file, swapped_files, other_version, edited_meta, edited_record)
        self.resealed = (edited_record_resealed, edited_record_resealed, edited_record_resealed, damaged_arrays_resealed)
        self.there = dict(self.files)

    def write(self, files: dict[str, bytes]) -> None:
        for name in self.there.keys() - files.keys():
            (self.path / name).unlink()
        for name, data in files.items():
            if self.there.get(name) != data:
                (self.path / name).write_bytes(data)
        self.there = files

    def restore(self):
        return brecq_jax.restore(self.path, apply_fn)


def damaged_file(files, draw):
    name = one_of(files, draw)
    return files | {name: BYTES[draw.integers(len(BYTES))](files[name], draw)}


def lost_file(files, draw):
    del files[one_of(files, draw)]
    return files


def foreign_file(files, draw):
    return files | {f"{ARRAYS}/{draw.integers(1000)}": draw.bytes(100)}


def swapped_files(files, draw):
    a, b = one_of(files, draw), one_of(files, draw)
    files[a], files[b] = files[b], files[a]
    return files


def other_version(files, draw):
    meta = json.loads(files[META])
    return files | {META: json.dumps(meta | {"version": (0, 1, 3, 99, "2", None, [2], -2)[draw.integers(8)]}).encode()}


def edited_meta(files, draw):
    return files | {META: json.dumps(edited(json.loads(files[META]), draw)).encode()}


def edited_record(files, draw):
    return files | {MODEL: gzip.compress(json.dumps(edited(json.loads(gzip.decompress(files[MODEL])), draw)).encode())}


def edited_record_resealed(files, draw):
    return resealed(edited_record(files, draw))


def damaged_arrays_resealed(files, draw):
    arrays = {name: data for name, data in files.items() if name.startswith(ARRAYS)}
    return resealed(files | damaged_file(arrays, draw))


def resealed(files):
    seals = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items() if n != META}
    return files | {META: json.dumps(json.loads(files[META]) | {"files": seals}).encode()}


def one_of(files, draw) -> str:
    return sorted(files)[draw.integers(len(files))]


class Safetensors:
    """The file of `deploy.save_safetensors`, and what can be done to it."""

    def __init__(self, folder: pathlib.Path):
        self.path, self.saved = folder / "model.safetensors", small_model()
        save_safetensors(self.path, self.saved)
        self.files = {"": self.path.read_bytes()}
        self.plain = (*(on_the_file(f) for f in BYTES), edited_header, swapped_tensors)
        self.resealed = (edited_header_resealed, edited_description_resealed)

    def write(self, files: dict[str, bytes]) -> None:
        self.path.write_bytes(files[""])

    def restore(self):
        return restore_safetensors(self.path, apply_fn)


def on_the_file(damage):
    @functools.wraps(damage)
    def damaged(files, draw):
        return {"": damage(files[""], draw)}

    return damaged


def edited_header(files, draw):
    header, tensors = split(files[""])
    return {"": joined(edited(header, draw), tensors)}


def swapped_tensors(files, draw):
    header, tensors = split(files[""])
    names = [name for name in header if name != "__metadata__"]
    a, b = names[draw.integers(len(names))], names[draw.integers(len(names))]
    header[a], header[b] = header[b], header[a]
    return {"": joined(header, tensors)}


def edited_header_resealed(files, draw):
    header, tensors = split(edited_header(files, draw)[""])
    return {"": sealed(header, tensors)}


def edited_description_resealed(files, draw):
    header, tensors = split(files[""])
    header["__metadata__"]["brecq_jax"] = json.dumps(edited(json.loads(header["__metadata__"]["brecq_jax"]), draw))
    return {"": sealed(header, tensors)}


class Program:
    """The file of `export`, and what can be done to it: its checksum lost, or another's."""

    resealed = ()

    def __init__(self, folder: pathlib.Path):
        self.path = folder / "model.stablehlo"
        brecq_jax.export(small_model(), self.path, jax.ShapeDtypeStruct((1, 16), jnp.float32))
        self.files = {"": self.path.read_bytes()}
        self.plain = (*(on_the_file(f) for f in BYTES), unsealed, sealed_for_another)
        self.saved = self.restore()

    def write(self, files: dict[str, bytes]) -> None:
        self.path.write_bytes(files[""])

    def restore(self):
        return np.frombuffer(load_program(self.path).mlir_module_serialized, np.uint8)


def unsealed(files, draw):
    return {"": files[""][:-SEAL]}


def sealed_for_another(files, draw):
    return {"": files[""][:-SEAL] + hashlib.sha256(flipped(files[""], draw)).digest()}


def split(whole: bytes):
    end = LENGTH.size + LENGTH.unpack_from(whole)[0]
    return json.loads(whole[LENGTH.size : end]), whole[end:]


def joined(header, tensors: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return LENGTH.pack(len(text)) + text + tensors


def sealed(header, tensors: bytes) -> bytes:
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        return joined(header, tensors)
    header["__metadata__"]["sha256"] = "0" * 64
    header["__metadata__"]["sha256"] = hashlib.sha256(joined(header, tensors)).hexdigest()
    return joined(header, tensors)


def apply_fn(params, x):
    for layer in params["layers"]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params["head"] * params["gain"].astype(x.dtype)


def small_model():
    """Some kilobytes with per-channel and grouped grids, zero points of both kinds, floats and bfloat16."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "layers": [{"kernel": jax.random.normal(keys[n], (16, 24 - 8 * n)) + n, "bias": jnp.ones(24 - 8 * n) / 3} for n in (0, 1)],
        "head": jax.random.normal(keys[2], (16, 5)),
        "gain": jnp.full(5, 1.5, jnp.bfloat16),
    }
    params["layers"][1]["kernel"] = jax.random.normal(keys[3], (24, 16))
    weights = {
        "layers/0/.*": Uniform(3, ranges=MinMax(), granularity=4),
        "layers/1/.*": Uniform(4, ranges=MinMax(), symmetric=True),
        "head": Uniform(2, ranges=MinMax()),
    }
    x = np.asarray(jax.random.normal(keys[0], (8, 16)))
    return brecq_jax.quantize(params, apply_fn, x, weights=weights, solver=solvers.nearest(), progress=False)


def same(a, b) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
