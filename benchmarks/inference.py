r"""How fast a model runs in each form, as ratios to float32 in one interleaved run. Above 1: slower than float32.

    taskset -c 0 python benchmarks/inference.py --bits=4 --rounds=15

Random weights, since time does not depend on them: ResNet-20 (32×32 images), EfficientNet-Lite0 (224×224) and a stack of six dense layers of
1,024. "integer" has so many bits per channel and activations of 8; "packed" float activations, its weights unpacked inside the program.
"MB beside" is what each of these two needs beside arguments and results, by the compiled program's `memory_analysis()`. Figures: docs/deploy.md.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import brecq_jax
from brecq_jax import deploy, models, solvers
from brecq_jax._plan import render
from brecq_jax.formats import MinMax, Uniform

WIDTH, DEPTH = 1024, 6
ROUND_MS = 20  # of float32 calls in a round


def network(model, side: int, count: int):
    """(params, apply_fn, inputs)."""
    images = np.random.default_rng(0).normal(size=(count, side, side, 3)).astype(np.float32)
    return model.init(jax.random.key(0), images[:1]), model.apply, images


def dense_stack(count: int):
    """(params, apply_fn, inputs): relu(x w) six times."""
    draw = np.random.default_rng(0)
    params = {f"layer{n}": draw.normal(0, (2 / WIDTH) ** 0.5, (WIDTH, WIDTH)).astype(np.float32) for n in range(DEPTH)}

    def apply_fn(params, x):
        for n in range(DEPTH):
            x = jax.nn.relu(x @ params[f"layer{n}"])
        return x

    return params, apply_fn, draw.normal(size=(count, WIDTH)).astype(np.float32)


MODELS = {  # name: (batches, params and apply_fn and inputs of so many examples)
    "ResNet-20": ((1, 8, 64), lambda count: network(models.ResNetCifar(), 32, count)),
    "EfficientNet-Lite0": ((1, 8), lambda count: network(models.efficientnet_lite(0), 224, count)),
    "dense stack": ((1, 8, 64), dense_stack),
}


def forms(params, apply_fn, inputs, bits: int):
    """(name -> function of a batch, compiled with its weights as arguments; what the last two need beside them at a batch, MB)."""
    settings = {"weights": Uniform(bits, ranges=MinMax()), "solver": solvers.nearest(), "progress": False}
    quantized = brecq_jax.quantize(params, apply_fn, inputs[:16], activations=Uniform(8, ranges=MinMax()), **settings)
    weight_only = brecq_jax.quantize(params, apply_fn, inputs[:16], activations=None, **settings)
    narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    run, call = jax.jit(apply_fn), jax.jit(lambda model, x: model(x))
    integer, packed = (deploy.to_integer(model, inputs[:1]) for model in (quantized, weight_only))
    return {
        "float32": lambda x: run(params, x),
        "bfloat16": lambda x: run(narrow, x.astype(jnp.bfloat16)),
        "fake-quantized": lambda x: call(quantized, x),
        "integer": lambda x: call(integer, x),
        "packed": lambda x: call(packed, x),
    }, lambda x: [call.lower(model, x).compile().memory_analysis().temp_size_in_bytes / 1e6 for model in (integer, packed)]


def milliseconds(function, x, repeats: int) -> float:
    """The mean of a few calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        out = function(x)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats * 1e3


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bits", type=int, default=4, help="of weights")
    args = parser.parse_args()
    rounds = args.rounds
    table = Table("model", "batch", "float32, ms", "bfloat16", "fake-quantized", "integer", "packed", "MB beside: integer", "packed")
    for name, (batches, make) in MODELS.items():
        params, apply_fn, inputs = make(max(batches))
        variants, beside = forms(params, apply_fn, inputs, args.bits)
        for batch in batches:
            x = jnp.asarray(inputs[:batch])
            jax.block_until_ready([f(x) for f in variants.values()])  # compiled
            repeats = max(1, int(ROUND_MS / milliseconds(variants["float32"], x, 1)))
            times = np.array([[milliseconds(f, x, repeats) for f in variants.values()] for _ in range(rounds)])
            ratios = np.median(times[:, 1:] / times[:, :1], 0)
            table.add_row(name, str(batch), f"{np.median(times[:, 0]):.2f}", *(f"{r:.2f}" for r in ratios), *(f"{mb:.1f}" for mb in beside(x)))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {rounds} rounds, medians, W{args.bits}", render(table), sep="\n")


if __name__ == "__main__":
    main()
