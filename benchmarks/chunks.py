r"""What it costs that the loop is looked at every 100 steps: for progress, interrupts and records.

    taskset -c 1 python benchmarks/chunks.py

ResNet-20 of random weights, 2 bits, the default solver; whole runs of `quantize` in one process, in turns, with `_loop.CHUNK` steps between
looks and with none until each block's end. Compiled before the first that counts. Prints seconds by the clock and their ratios.
"""

import argparse
import statistics
import time

import jax
import numpy as np

import brecq_jax
from brecq_jax import models, solvers
from brecq_jax.__main__ import keep_memory
from brecq_jax.formats import Uniform
from brecq_jax.solvers import _loop


def seconds(chunk: int, model, variables, images, steps: int) -> float:
    _loop.CHUNK = chunk
    begun = time.perf_counter()
    brecq_jax.quantize(
        variables, model.apply, images, weights=Uniform(2), activations=None, solver=solvers.annealed(num_steps=steps), progress=False
    )
    return time.perf_counter() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=200, help="of each block")
    args = parser.parse_args()
    keep_memory()
    model = models.ARCHITECTURES["resnet20_cifar"].build()
    images = np.random.default_rng(0).normal(size=(64, 32, 32, 3)).astype(np.float32)
    given = model, model.init(jax.random.key(0), images[:1]), images, args.steps
    chunks = {_loop.CHUNK: [], args.steps: []}
    seconds(_loop.CHUNK, *given)  # compiles
    for _ in range(args.rounds):
        for chunk, spans in chunks.items():
            spans.append(seconds(chunk, *given))
    ratios = sorted(every / never for every, never in zip(*chunks.values(), strict=True))
    for chunk, spans in chunks.items():
        print(f"a look every {chunk} steps: {', '.join(f'{s:.2f}' for s in spans)} s")
    print(f"ratios of neighbours: {ratios[0]:.3f} to {ratios[-1]:.3f}, median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
