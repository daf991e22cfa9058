r"""Embedding tables: errors of each format on a real table, and rows a second beside PyTorch's operators, in alternate rounds.

    taskset -c 1 python benchmarks/tables.py --table=words.npy --torch=OTHER_VENV/bin/python
    taskset -c 1 python benchmarks/tables.py --stream=10000000 --folder=FOLDER_WITH_ROOM

The second packs a file of so many rows of 64 random floats, mapped into memory, looks up some, and says how much memory it took.
PyTorch packs and looks up in a process of its own, one thread, and answers when asked, so that both see the same neighbours. Times are
of CPU, which waiting for a shared core does not count.
"""

import argparse
import functools
import statistics
import subprocess
import threading
import time

import jax
import numpy as np

from brecq_jax import deploy
from brecq_jax.formats import ClusterCodebook, GreedyRange, RowCodebook, RowUniform

TORCH = r"""
import sys, time, numpy as np, torch
torch.set_num_threads(1)
folder = sys.argv[1]
table, ids = (torch.tensor(np.load(f"{folder}/{n}.npy")) for n in ("table", "ids"))
ops, alone, bags = torch.ops.quantized, torch.arange(len(ids)), torch.arange(0, len(ids), 20)
packed = ops.embedding_bag_4bit_prepack(table)
work = {
    "pack, whole range": lambda: ops.embedding_bag_4bit_prepack(table),
    "pack, greedy range": lambda: ops.embedding_bag_4bit_prepack(table, True),
    "lookup": lambda: ops.embedding_bag_4bit_rowwise_offsets(packed, ids, alone),
    "bags of 20": lambda: ops.embedding_bag_4bit_rowwise_offsets(packed, ids, bags),
}
np.save(f"{folder}/greedy.npy", work["pack, greedy range"]().numpy())
for f in work.values(): f()
print("ready", flush=True)
for line in sys.stdin:
    start = time.process_time(); work[line.strip()](); print(time.process_time() - start, flush=True)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", help="a float array (rows, elements) as .npy")
    parser.add_argument("--torch", help="a Python that has PyTorch")
    parser.add_argument("--stream", type=int, help="rows of a made-up table")
    parser.add_argument("--folder", default="/tmp", help="where both processes leave arrays for each other")
    parser.add_argument("--rows", type=int, default=4000, help="evenly spread")
    parser.add_argument("--rounds", type=int, default=5)
    known = parser.parse_args()
    if known.stream:
        stream(known.stream, f"{known.folder}/stream.npy")
        return
    table = np.load(known.table, mmap_mode="r")
    table = np.asarray(table[np.linspace(0, len(table) - 1, min(known.rows, len(table))).astype(int)], np.float32)
    print(f"{table.shape[0]} rows of {table.shape[1]}; mean of |w − ŵ| / |w|")
    for bits in (4, 2):
        for format in (RowUniform(bits, None), RowUniform(bits), RowCodebook(bits), ClusterCodebook(bits)):
            print(f"  {format}: {error(table, format):.4f}", flush=True)
    rates(table, known)


def error(table: np.ndarray, format) -> float:
    packed = deploy.pack_table(table, format)
    off = np.asarray(deploy.lookup(packed, np.arange(len(table)))) - table
    return float(np.mean(np.linalg.norm(off, axis=1) / np.maximum(np.linalg.norm(table, axis=1), 1e-12)))


def rates(table: np.ndarray, known) -> None:
    ids = np.random.default_rng(0).integers(0, len(table), 100_000)
    np.save(f"{known.folder}/table.npy", table)
    np.save(f"{known.folder}/ids.npy", ids)
    whole, greedy = RowUniform(4, None), RowUniform(4, GreedyRange(ratio=0.16))
    packed = deploy.pack_table(table, whole)
    offsets = np.arange(0, len(ids), 20)
    work = {
        "pack, whole range": functools.partial(deploy.pack_table, table, whole),
        "pack, greedy range": functools.partial(deploy.pack_table, table, greedy),
        "lookup": functools.partial(deploy.lookup, packed, ids),
        "bags of 20": functools.partial(deploy.embedding_bag, packed, ids, offsets),
    }
    with subprocess.Popen([known.torch, "-c", TORCH, known.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline().strip() == "ready"
        same = (deploy.pack_table(table, greedy).rows == np.load(f"{known.folder}/greedy.npy")).all(1)
        print(f"rows whose bytes are PyTorch's, greedy range: {same.sum()} of {len(same)}")
        for name, run in work.items():
            count = len(table) if name.startswith("pack") else len(ids)
            jax.block_until_ready(run())
            seconds = [], []
            for _ in range(known.rounds):
                start = time.process_time()
                jax.block_until_ready(run())
                seconds[0].append(time.process_time() - start)
                other.stdin.write(name + "\n")
                other.stdin.flush()
                seconds[1].append(float(other.stdout.readline()))
            mine, theirs = (count / statistics.median(s) for s in seconds)
            print(f"  {name}: {mine:,.0f} rows a second of CPU, PyTorch {theirs:,.0f}: {mine / theirs:.2f} times", flush=True)
        other.stdin.close()


def stream(count: int, path: str, width: int = 64, written_at_once: int = 100_000) -> None:
    draw = np.random.default_rng(0)
    table = np.lib.format.open_memmap(path, "w+", np.float32, (count, width))
    for start in range(0, count, written_at_once):
        table[start : start + written_at_once] = draw.standard_normal(table[start : start + written_at_once].shape, np.float32)
    table.flush()
    ids = draw.integers(0, count, 1_000_000)
    deploy.pack_table(table[:100_000], RowUniform(4, None))  # compiles
    table, before = np.load(path, mmap_mode="r"), anonymous_mb()
    most, done = [before], threading.Event()
    watch = threading.Thread(target=lambda: [most.append(anonymous_mb()) for _ in iter(lambda: done.wait(0.01), True)])
    watch.start()
    start, cpu = time.perf_counter(), time.process_time()
    packed = deploy.pack_table(table, RowUniform(4, None))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    watch.join()
    print(f"{count:,} rows of {width} in {seconds:.1f} s ({cpu:.1f} s of CPU): {count / seconds:,.0f} rows a second, {count / cpu:,.0f} a second of CPU")
    print(f"  packed {packed.rows.nbytes / 1e6:.0f} MB of {table.nbytes / 1e6:.0f}; {max(most) - before:.0f} MB of anonymous memory, with the packed table")
    bags = functools.partial(deploy.embedding_bag, packed, ids, np.arange(0, len(ids), 20))
    for name, run in (("lookup", functools.partial(deploy.lookup, packed, ids)), ("bags of 20", bags)):
        jax.block_until_ready(run())
        start, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(f"  {name}: {len(ids) / seconds:,.0f} rows a second, {len(ids) / cpu:,.0f} a second of CPU", flush=True)


def anonymous_mb() -> float:
    (line,) = (line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
