r"""One iteration of block reconstruction on blocks of random weights: ours, ours with XLA's own ops, and BRECQ's official code.

    taskset -c 1 python benchmarks/steps.py --reference=BRECQ --reference-python=python --blocks=basic64,inverted80k5

An iteration: batch 32 gathered from images that stay on the device, soft weights (AdaRound's, with its penalty), the
block, the squared error, gradients of every rounding variable, Adam. Milliseconds are medians over all iterations of all
rounds, in which the three take turns and never run beside each other. The official loop is timed by
`reference_blocks.py --time-only`, in a process of its own. GFLOP/s count multiplications and additions of convolutions,
forward and backward, without the gradient of the block's input, which nobody needs.

Ours is a step of this file's own, so that it depends on little: `_interpret.run` on the traced block with or without
`fast_op`, `soft_choice`, optax.adam. As in the library, it is one jitted call per iteration on a CPU, and a `lax.scan`
elsewhere, of which the mean is taken in each round. Rules in `brecq_jax/_fast_ops.py` rest on this table.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import brecq_jax
from brecq_jax.__main__ import keep_memory
from brecq_jax._fast_ops import fast_op
from brecq_jax._interpret import Program, param_values, run, whole
from brecq_jax._qarray import from_rows, to_rows
from brecq_jax.solvers._loop import batches
from brecq_jax.solvers._roundings import inverse_choice, soft_choice

REFERENCE = pathlib.Path(__file__).with_name("reference_blocks.py")
IMAGES, HELD_OUT = 64, 8  # random ones: a step costs the same with any
LEARNING_RATE, REGULARIZER, SHARPNESS = 1e-3, 0.01, 20.0
STEP_SIZE = 0.5  # of the grid, in parts of a weight's standard deviation: near a 2-bit one
OUT = (3,)  # channel axes of an HWIO kernel
OIHW = (3, 2, 0, 1)
COLUMNS = ("block", "ours, ms", "XLA's ops, ms", "official, ms", "official ÷ ours", "XLA's ÷ ours", "GFLOP/s, ours", "GFLOP/s, official")


@dataclasses.dataclass(frozen=True)
class Convolution:
    """`SAME` padding. `groups`: 1, or as many as channels."""

    ins: int
    outs: int
    kernel: int
    groups: int = 1
    stride: int = 1

    def __call__(self, x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (self.stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=self.groups
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel, self.kernel, self.ins // self.groups, self.outs


@dataclasses.dataclass(frozen=True)
class Shape:
    """A block: `kind` as `reference_blocks.py` knows it, its convolutions, the side of its square input."""

    kind: str
    convolutions: tuple[Convolution, ...]
    side: int

    @property
    def shortcut(self) -> bool:
        first, last = self.convolutions[0], self.convolutions[-1]
        return first.ins == last.outs and all(c.stride == 1 for c in self.convolutions)

    def __call__(self, params, x):
        y = x
        for n, conv in enumerate(self.convolutions):
            y = conv(y, params[f"weight{n}"]) + params[f"bias{n}"]
            if n < len(self.convolutions) - 1:
                y = jax.nn.relu(y) if self.kind == "basic" else jnp.clip(y, 0, 6)
        y = x + y if self.shortcut else y
        return jax.nn.relu(y) if self.kind == "basic" else y

    def params(self, rng: np.random.Generator) -> dict[str, jax.Array]:
        """Random, of a size that keeps activations near 1."""
        made = {}
        for n, conv in enumerate(self.convolutions):
            made[f"weight{n}"] = rng.normal(size=conv.shape) / np.sqrt(np.prod(conv.shape[:3]))
            made[f"bias{n}"] = 0.1 * rng.normal(size=conv.outs)
        return {name: jnp.asarray(value, jnp.float32) for name, value in made.items()}

    def gflop(self, batch: int) -> float:
        """Of one iteration's convolutions."""
        total, side = 0, self.side
        for n, conv in enumerate(self.convolutions):
            side = -(-side // conv.stride)
            passes = 2 if n == 0 else 3  # forward, kernel gradient; input gradient
            total += passes * 2 * side**2 * int(np.prod(conv.shape)) * batch
        return total / 1e9

    def problem(self, params, images: np.ndarray) -> dict[str, np.ndarray]:
        """What `reference_blocks.py` reads."""
        arrays = {"kind": self.kind, "layout": "NHWC", "shortcut": self.shortcut, "train": images[HELD_OUT:], "held_out": images[:HELD_OUT]}
        side = self.side
        for n, conv in enumerate(self.convolutions):
            out = -(-side // conv.stride)
            pad = max((out - 1) * conv.stride + conv.kernel - side, 0)
            arrays |= {f"weight{n}": np.ascontiguousarray(np.asarray(params[f"weight{n}"]).transpose(OIHW)), f"bias{n}": np.asarray(params[f"bias{n}"])}
            arrays |= {f"groups{n}": conv.groups, f"stride{n}": np.array([conv.stride] * 2), f"padding{n}": np.array([[pad // 2, pad - pad // 2]] * 2)}
            side = out
        return arrays


def basic(width: int, side: int) -> Shape:
    return Shape("basic", (Convolution(width, width, 3),) * 2, side)


def inverted(width: int, side: int, kernel: int = 3, outs: int = 0, stride: int = 1) -> Shape:
    hidden = 6 * width
    middle = Convolution(hidden, hidden, kernel, hidden, stride)
    return Shape("inverted", (Convolution(width, hidden, 1), middle, Convolution(hidden, outs or width, 1)), side)


SHAPES = {
    "basic64": basic(64, 56), "basic128": basic(128, 28), "basic256": basic(256, 14), "basic512": basic(512, 7),
    "inverted24": inverted(24, 56), "inverted40k5": inverted(40, 28, 5), "inverted64": inverted(64, 14),
    "inverted80k5": inverted(80, 14, 5), "inverted160": inverted(160, 7), "inverted192k5": inverted(192, 7, 5),
    "inverted24s2": inverted(24, 56, 3, 32, 2), "inverted24k5s2": inverted(24, 56, 5, 40, 2),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """One iteration on a traced block, jitted. `on_op`: by which means ops are run."""

    program: Program
    on_op: Callable | None

    def update(self, state, fixed, rows):
        variables, optimizer_state = state
        inputs, targets = fixed["inputs"][rows], fixed["targets"][rows]

        def loss(variables):
            params, penalty = list(fixed["params"]), 0.0
            for slot, v in variables.items():
                h = soft_choice(v)
                params[slot] = from_rows(fixed["low"][slot] + h * fixed["span"][slot], params[slot].shape, OUT)
                penalty += REGULARIZER * jnp.sum(1 - jnp.abs(2 * h - 1) ** fixed["sharpness"])
            (outputs,) = run(self.program, [inputs], params, fixed["constants"], on_op=self.on_op)
            return jnp.mean(jnp.sum((outputs - targets) ** 2, -1)) + penalty

        updates, optimizer_state = optax.adam(LEARNING_RATE).update(jax.grad(loss)(variables), optimizer_state)
        return optax.apply_updates(variables, updates), optimizer_state

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def one(self, state, fixed, rows):
        return self.update(state, fixed, rows)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def many(self, state, fixed, order):
        return jax.lax.scan(lambda s, rows: (self.update(s, fixed, rows), None), state, order)[0]


def start(shape: Shape, params, images: np.ndarray, batch: int):
    """(program, state, fixed) of a block whose weights all choose between two neighbours."""
    graph = brecq_jax.trace(shape, params, images[:batch])
    block = whole(graph)
    values = param_values(graph, block, jax.tree.leaves(params))
    rows = {op.weight: to_rows(values[op.weight], OUT) for op in block.program.ops}
    spans = {slot: jnp.full_like(r, STEP_SIZE * jnp.std(r)) for slot, r in rows.items()}
    lows = {slot: spans[slot] * jnp.floor(r / spans[slot]) for slot, r in rows.items()}
    variables = {slot: inverse_choice(jnp.clip((r - lows[slot]) / spans[slot], 0, 1)) for slot, r in rows.items()}
    train = images[HELD_OUT:]
    fixed = {
        "params": values, "constants": list(block.constants), "low": lows, "span": spans, "sharpness": SHARPNESS,
        "inputs": jnp.asarray(train), "targets": jax.jit(shape)(params, train),
    }  # fmt: skip
    return block.program, (variables, optax.adam(LEARNING_RATE).init(variables)), fixed


def ours(step: Step, batch: int, state, fixed, iterations: int) -> Iterator[list[float]]:
    """Milliseconds of `iterations` iterations, again and again. The first round compiles, and is not given."""
    order, on_cpu = batches(iterations, len(fixed["inputs"]), batch, jax.random.key(0)), jax.default_backend() == "cpu"
    state = jax.tree.map(jnp.copy, state)  # the state is donated
    state = jax.block_until_ready(step.one(state, fixed, order[0]) if on_cpu else step.many(state, fixed, order))
    while True:
        spans = []
        for rows in order if on_cpu else [order]:
            began = time.perf_counter()
            state = jax.block_until_ready((step.one if on_cpu else step.many)(state, fixed, rows))
            spans.append(1e3 * (time.perf_counter() - began) / (1 if on_cpu else iterations))
        yield spans


def official(args, path: pathlib.Path) -> Iterator[list[float]]:
    """The median of `iterations` iterations of the official loop, again and again."""
    command = [
        args.reference_python, str(REFERENCE), f"--reference={args.reference}", f"--problem={path}", f"--time-only={args.iterations}",
        f"--device={args.reference_device}", f"--threads={len(os.sched_getaffinity(0))}",
    ]  # fmt: skip
    while True:
        # torch's threads must not spin while they wait, or they take the cores from what comes after
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
        yield [json.loads(found.stdout.splitlines()[-1])["ms_per_iteration"]]


def measure(args, shape: Shape, folder: pathlib.Path) -> dict[str, float]:
    """Median milliseconds by contestant."""
    rng = np.random.default_rng(0)
    params = shape.params(rng)
    images = rng.normal(size=(IMAGES + HELD_OUT, shape.side, shape.side, shape.convolutions[0].ins)).astype(np.float32)
    program, state, fixed = start(shape, params, images, args.batch)
    means = {"ours": fast_op, "xla": None}
    rounds = {name: ours(Step(program, means[name]), args.batch, state, fixed, args.iterations) for name in means if name not in args.skip}
    if args.reference:
        np.savez(folder / "problem.npz", **shape.problem(params, images))
        rounds["official"] = official(args, folder / "problem.npz")
    found = {name: [] for name in rounds}
    for _ in range(args.rounds):
        for name, turn in rounds.items():
            found[name] += next(turn)
    return {name: statistics.median(ms) for name, ms in found.items()}


def main():
    args = arguments()
    if not args.default_malloc:
        keep_memory()
    print(f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} cores, jax {jax.__version__}, batch {args.batch}\n")
    print("|".join(["", *COLUMNS, ""]), "|".join(["", *("---" for _ in COLUMNS), ""]), sep="\n", flush=True)
    for name in args.blocks:
        with tempfile.TemporaryDirectory() as folder:
            ms = measure(args, SHAPES[name], pathlib.Path(folder))
        gflop, one, xla, other = SHAPES[name].gflop(args.batch), ms["ours"], ms.get("xla"), ms.get("official")
        cells = [one, xla, other, other and other / one, xla and xla / one, 1e3 * gflop / one, other and 1e3 * gflop / other]
        print("|".join(["", name, *("" if c is None else f"{c:.3g}" for c in cells), ""]), flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=lambda text: text.split(","), default=list(SHAPES), help=", ".join(SHAPES))
    parser.add_argument("--batch", type=int, default=32, help="the official code's is 32, always")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=10, help="of each round")
    parser.add_argument("--skip", choices=["xla"], nargs="*", default=[], help="XLA's own depthwise convolutions are slow on a CPU")
    parser.add_argument("--default-malloc", action="store_true", help="memory given back after every step, as without the command line")
    parser.add_argument("--reference", help="a checkout of the official code; without it only ours is run")
    parser.add_argument("--reference-python", default="python", help="an interpreter that has torch")
    parser.add_argument("--reference-device", default="cpu")
    args = parser.parse_args()
    unknown = sorted(set(args.blocks) - set(SHAPES))
    if unknown:
        parser.error(f"--blocks: there is no {', '.join(unknown)}. There are {', '.join(SHAPES)}.")
    if args.batch > IMAGES:
        parser.error(f"--batch: at most {IMAGES}, the number of images.")
    return args


if __name__ == "__main__":
    main()
