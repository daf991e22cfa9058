r"""What quantizing EfficientNet-Lite0 on large images holds: the peak of the process's memory after each of the first blocks.

    taskset -c 0 python benchmarks/memory.py --size=1024 --count=1024 --budget=7 --batch=4 --blocks=6 --judge=128

The images are pixels (uint8), and the model takes pixels. The plan of the caches is printed first. `--budget=0`: no budget. The peak is
`ru_maxrss`: all pages that were resident at once, files that are mapped among them. The first blocks have the largest values.
"""

import argparse
import dataclasses
import resource
import time

import jax

import brecq_jax
from brecq_jax import data, models, solvers
from brecq_jax.__main__ import keep_memory
from brecq_jax.formats import Uniform
from brecq_jax.solvers import _solver


class Enough(Exception):
    """So many blocks were asked for."""


class Watch:
    """A journal that keeps nothing, tells of each block, and ends the run after `blocks`."""

    def __init__(self, blocks: int):
        self.left, self.since = blocks, time.process_time()

    def next(self, block: str, like):
        return None

    def add(self, block: str, found, infos: list[dict]):
        errors = " ".join(f"{i['error_before']:.3g} to {i['error_learned']:.3g}" for i in infos)
        print(f"{block}: error {errors}; {time.process_time() - self.since:.0f} CPU seconds so far; peak {peak_gb():.2f} GB", flush=True)
        self.left -= 1
        if not self.left:
            raise Enough


def peak_gb() -> float:
    """Of this process, so far; Linux counts it in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--count", type=int, default=1024)
    parser.add_argument("--budget", type=float, default=7.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--judge", type=int, default=8, help="one example in so many judges; the library's is 8. Fewer take less time, and no less memory")
    parser.add_argument("--bfloat16", action="store_true", help="caches")
    args = parser.parse_args()
    keep_memory()
    _solver.HELD_OUT = args.judge
    model, variables = models.load_efficientnet_lite0()
    prepare = models.ARCHITECTURES["efficientnet_lite0"].preprocessing
    pixels = data.photographs(args.size, args.count, 0, "calibration")
    print(f"{args.count} images of {args.size} px: {pixels.nbytes / 1e9:.2f} GB; peak {peak_gb():.2f} GB", flush=True)
    learn = solvers.annealed(num_steps=args.steps, batch_size=args.batch)

    def solve(problem, guess, key):
        return learn(dataclasses.replace(problem, journal=Watch(args.blocks), tell=lambda text: print(text, flush=True)), guess, key)

    try:
        brecq_jax.quantize(
            variables, lambda variables, pixels: model.apply(variables, prepare.normalize(pixels)), pixels, weights=Uniform(2), activations=None,
            solver=solve, memory_budget_gb=args.budget or None, bfloat16_caches=args.bfloat16, key=jax.random.key(0), progress=False,
        )  # fmt: skip
    except Enough:
        print(f"peak {peak_gb():.2f} GB")


if __name__ == "__main__":
    main()
