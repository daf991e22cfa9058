r"""Embedding tables: errors of each format on a real table, and rows a second beside PyTorch's operators, in alternate rounds.

    taskset -c 1 python benchmarks/tables.py --table=words.npy --torch=OTHER_VENV/bin/python

PyTorch packs and looks up in a process of its own, one thread, and answers when asked, so that both see the same neighbours.
"""

import argparse
import functools
import statistics
import subprocess
import time

import jax
import jax.numpy as jnp
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
    start = time.perf_counter(); work[line.strip()](); print(time.perf_counter() - start, flush=True)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, help="a float array (rows, elements) as .npy")
    parser.add_argument("--torch", required=True, help="a Python that has PyTorch")
    parser.add_argument("--folder", default="/tmp", help="where both processes leave arrays for each other")
    parser.add_argument("--rows", type=int, default=4000, help="evenly spread")
    parser.add_argument("--rounds", type=int, default=5)
    known = parser.parse_args()
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
    on_device, device_ids, offsets = jax.device_put(packed), jnp.asarray(ids), jnp.arange(0, len(ids), 20)
    work = {
        "pack, whole range": functools.partial(deploy.pack_table, table, whole),
        "pack, greedy range": functools.partial(deploy.pack_table, table, greedy),
        "lookup": functools.partial(deploy.lookup, packed, ids),
        "bags of 20": functools.partial(jax.jit(deploy.embedding_bag), on_device, device_ids, offsets),
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
                start = time.perf_counter()
                jax.block_until_ready(run())
                seconds[0].append(time.perf_counter() - start)
                other.stdin.write(name + "\n")
                other.stdin.flush()
                seconds[1].append(float(other.stdout.readline()))
            mine, theirs = (count / statistics.median(s) for s in seconds)
            print(f"  {name}: {mine:,.0f} rows a second, PyTorch {theirs:,.0f}: {mine / theirs:.2f} times", flush=True)
        other.stdin.close()


if __name__ == "__main__":
    main()
