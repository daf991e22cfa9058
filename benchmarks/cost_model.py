r"""Seconds and bytes of a block by a formula: fitted to ten points that are measured here, checked on ten others; and a table made of it.

    taskset -c 0 python benchmarks/cost_model.py                # fits and checks, on this machine
    python benchmarks/cost_model.py --table                     # ResNet-50 and a decoder of a billion parameters on 1, 8 and 256 devices

A step of `batch` examples on N devices takes

    overhead + (6 · macs · batch / N) / flops + bytes / bandwidth + (N > 1) · 8 · weights · (N − 1) / N / link

where macs are the block's for one example (forward and backward are three passes of two operations each), bytes are what a step writes and
reads: the values of `batch` / N examples (what enters, what ops make, four bytes each, six times) and the rounding's variables with Adam's
(4 bytes, 10 times). A block takes `steps` of these and the passes without gradients of all `count` examples, in batches that devices share out: targets,
two judgements on an eighth, and the prefix's outputs, 2.25 forward passes on one device. Seconds here are those of the processor, which other work shares.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from steps import Convolution, Shape, Step, basic, inverted, start

import brecq_jax
from brecq_jax import models
from brecq_jax._blocks import partition
from brecq_jax._fast_ops import fast_op
from brecq_jax._memory import STEP, STREAM
from brecq_jax.models.decoder import Decoder
from brecq_jax.solvers._loop import batches

VALUES_TOUCHED, VARIABLES_TOUCHED = 6, 10
PASSES = ((2, 1), (2, 8))  # times, of one example in so many: targets and the prefix's outputs; two judgements
VARIABLES = 6  # of a weight, 4 bytes each, that a loop holds: choices, Adam's two, a gradient, two ends
DENSE = [Shape("basic", (Convolution(width, 4 * width, 1), Convolution(4 * width, width, 1)), 8) for width in (64, 128)]
BLOCKS = [
    basic(16, 32), basic(32, 16), basic(64, 8), basic(64, 28), basic(128, 14), *DENSE, inverted(24, 28), inverted(40, 14), inverted(64, 7),
]  # fmt: skip
BATCHES = (8, 32)
ITERATIONS = 5


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one block: multiply-accumulates and values (what enters, what its ops make) of one example, and weights."""

    macs: float
    values: float
    boundary: float  # values that enter and leave
    weights: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """What one device does in a second; `link`: bytes between devices."""

    overhead: float
    flops: float
    bandwidth: float
    link: float = 1.0


def step_seconds(work: Work, batch: int, machine: Machine, devices: int = 1) -> float:
    """One step of the loop."""
    own = batch / devices
    seconds = machine.overhead + 6 * work.macs * own / machine.flops + step_bytes(work, own) / machine.bandwidth
    return seconds + 8 * work.weights * (devices - 1) / devices / machine.link


def step_bytes(work: Work, own: float) -> float:
    """What a step writes and reads."""
    return 4 * (VALUES_TOUCHED * work.values * own + VARIABLES_TOUCHED * work.weights)


def passes_seconds(work: Work, count: int, machine: Machine, devices: int = 1) -> float:
    """The passes around a block's loop: each device takes whole batches."""
    batches = -(-count // STREAM)
    passed = sum(times * -(-batches // (share * devices)) for times, share in PASSES)
    return passed * STREAM * 2 * work.macs / machine.flops


def device_bytes(work: Work, batch: int, count: int, devices: int = 1) -> float:
    """What each device holds while a block is learned: its share of the cached inputs and targets, the variables, one step's values."""
    return 4 * (count * work.boundary / devices + VARIABLES * work.weights + STEP * work.values * batch / devices)


def work_of(shape: Shape) -> Work:
    """By hand, for a block of `steps.py`."""
    side, macs, values, weights = shape.side, 0.0, float(shape.side**2 * shape.convolutions[0].ins), 0.0
    enters = values
    for conv in shape.convolutions:
        side = -(-side // conv.stride)
        macs, values, weights = macs + side**2 * np.prod(conv.shape), values + side**2 * conv.outs, weights + np.prod(conv.shape)
    return Work(macs, values, enters + side**2 * shape.convolutions[-1].outs, weights)


def measure(shape: Shape, batch: int) -> tuple[float, float]:
    """(processor seconds of one step, bytes of its temporaries)."""
    rng = np.random.default_rng(0)
    params = shape.params(rng)
    images = rng.normal(size=(72, shape.side, shape.side, shape.convolutions[0].ins)).astype(np.float32)
    program, state, fixed = start(shape, params, images, batch)
    order = batches(ITERATIONS, len(fixed["inputs"]), batch, jax.random.key(0))
    step = Step(program, fast_op)
    run = step.one.lower(step, state, fixed, order[0]).compile()
    spans = []
    for rows in order:
        began = time.process_time()
        state = jax.block_until_ready(run(state, fixed, rows))
        spans.append(time.process_time() - began)
    return float(np.median(spans[1:])), float(run.memory_analysis().temp_size_in_bytes)


def fit(points: list[tuple[Work, int, float]]) -> Machine:
    """The machine that explains the measured steps with the least relative error: no rate below zero."""
    rows = np.array([[1, 6 * work.macs * batch, step_bytes(work, batch)] for work, batch, _ in points])
    seconds = np.array([s for _, _, s in points])
    scales = rows.max(0)
    found, _ = scipy.optimize.nnls(rows / scales / seconds[:, None], np.ones(len(points)))
    found = found / scales
    return Machine(found[0], *(1 / max(f, 1e-30) for f in found[1:]))


def check():
    """Fits on every other point, and prints all."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    points = []
    for n, shape in enumerate(BLOCKS):
        for batch in BATCHES:
            seconds, temporaries = measure(shape, batch)
            points.append((shape, batch, seconds, temporaries, (n + batch // BATCHES[-1]) % 2 == 0))
    machine = fit([(work_of(s), b, t) for s, b, t, _, fitted in points if fitted])
    print(f"overhead {1e3 * machine.overhead:.2f} ms, {machine.flops / 1e9:.1f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s\n")
    print("|block|batch|fitted|measured, ms|predicted, ms|ratio|temporaries, MB|÷ values|", "|---|---|---|---|---|---|---|---|", sep="\n")
    ratios = []
    for shape, batch, seconds, temporaries, fitted in points:
        work = work_of(shape)
        predicted = step_seconds(work, batch, machine)
        name = " ".join(f"{c.ins}-{c.outs} {c.kernel}×{c.kernel}" for c in shape.convolutions)
        cells = name, batch, "yes" if fitted else "", f"{1e3 * seconds:.3g}", f"{1e3 * predicted:.3g}", f"{predicted / seconds:.2f}"
        print("", *cells, f"{temporaries / 1e6:.3g}", f"{temporaries / (4 * work.values * batch):.2f}", "", sep="|", flush=True)
        if not fitted:
            ratios.append(predicted / seconds)
    off = np.abs(np.log(ratios))
    print(f"\nnot fitted: off by a factor of {np.exp(np.median(off)):.2f} (median), {np.exp(off.max()):.2f} (largest)")


# One H100, from docs/results.md: TF32 steps of residual blocks reach 82 to 133 TFLOP/s, and none takes less than 0.24 ms. The rest is not
# measured: half of the card's 3.35 TB/s, a ring over 50 GB/s a device (between hosts).
H100 = Machine(overhead=2e-4, flops=1e14, bandwidth=1.7e12, link=5e10)


def works(apply_fn, params, example) -> list[Work]:
    """Of each block of a program, which is traced for one example."""
    graph = brecq_jax.trace(apply_fn, params, example)
    types, steps = graph.flat.types, graph.flat.steps
    found = []
    for block in partition(graph)[0]:
        made = {o for op in block.ops for o in steps[op.step].outputs}
        sizes = [sum(types[i].size for i in ids) for ids in ({*block.ins, *made}, {*block.ins, *block.outs})]
        weights = sum(np.prod(graph.weights[w].shape) for w in {op.weight for op in block.ops})
        found.append(Work(sum(op.macs for op in block.ops), *map(float, sizes), float(weights)))
    return found


def table(count: int, steps: int):
    """Computed, not measured."""
    resnet = models.resnet50()
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    decoder = Decoder(vocabulary=32_000, positions=2048, features=2048, depth=18, heads=16, mlp_features=8192)
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    networks = {
        "ResNet-50, 224 px": works(resnet.apply, jax.eval_shape(resnet.init, jax.random.key(0), image), image),
        "decoder, 2,048 tokens": works(decoder.apply, jax.eval_shape(decoder.init, jax.random.key(0), ids), ids),
    }
    print("|network|weights|devices|batch|seconds|of these, passes without gradients|most on a device, GB|before the last block|most on each host, GB|before the last block|")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, blocks in networks.items():
        for devices in (1, 8, 256):
            batch = max(8, devices)
            loop = sum(steps * step_seconds(w, batch, H100, devices) for w in blocks)
            passes = sum(passes_seconds(w, count, H100, devices) for w in blocks)
            held = [device_bytes(w, batch, count, devices) / 1e9 for w in blocks]
            host = [2 * 4 * count * w.boundary / 1e9 for w in blocks]  # both streams, before and after the block
            cells = name, f"{sum(w.weights for w in blocks) / 1e6:.3g} M", devices, batch, f"{loop + passes:.0f}", f"{passes:.0f}"
            print("", *cells, *(f"{max(some):.3g}" for some in (held, held[:-1], host, host[:-1])), "", sep="|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="computed from the formula and an H100's figures; measures nothing")
    parser.add_argument("--count", type=int, default=1024, help="of the table's calibration examples")
    parser.add_argument("--steps", type=int, default=1000, help="of the table's loops")
    args = parser.parse_args()
    table(args.count, args.steps) if args.table else check()
