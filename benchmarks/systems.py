r"""SPARQ, multipoint and LAPQ on a config's network, against what each is to beat; a line of JSON for each run.

    python benchmarks/systems.py sparq --config=configs/resnet20_cifar10.py --config.weights=… --config.data=…
    python benchmarks/systems.py multipoint --bits=3 --tolerances=0.3,0.2 --config=…
    python benchmarks/systems.py lapq --bits=3+3 --draw=0,1,2 --config=…

*sparq*: weights of 8 bits; activations of 8, 4, 3, 2 bits and Sparq in every mode.
*multipoint*: one point for every channel, more by `solvers.multipoint()`, as many on random channels (each weight keeps its numbers of
points), and uniform formats of 2 to 8 bits chosen by `brecq_jax.search` in the size of each. Activations float.
*lapq*: one range for each tensor; least squared error, `lapq()` without labels, BRECQ's rounding from either (its seconds are without
the search). `--draw`: which half of the calibration set is taken.

First and last layer have 8 bits. Figures are the config's, and of all the outputs that it scores: `logit_mse`, and
`divergence`, the mean KL of the quantized prediction from the float model's.
"""

import argparse
import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

import brecq_jax
from brecq_jax import mixed_precision, solvers
from brecq_jax.__main__ import load_config
from brecq_jax._qarray import from_rows, is_qarray, to_rows
from brecq_jax.formats import Affine, LpRange, Multipoint, Sparq, Uniform

MIXED = [Uniform(bits) for bits in range(2, 9)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=["sparq", "multipoint", "lapq"])
    parser.add_argument("--config", required=True)
    parser.add_argument("--bits", default="", help="multipoint: of weights, as 3; lapq: of weights and activations, as 3+3")
    parser.add_argument("--tolerances", default="0.3,0.2")
    parser.add_argument("--draw", default="0")
    parser.add_argument("--iterations", type=int, default=1, help="of Powell's method")
    parser.add_argument("--steps", type=int, default=300, help="of BRECQ's rounding, after LAPQ")
    known, overrides = parser.parse_known_args()
    config = load_config(known.config, overrides)
    runs = {"sparq": sparq, "multipoint": multipoint, "lapq": lapq}[known.system](known, dataclasses.replace(config.build(), preset="uniform"))
    for row in runs:
        print(json.dumps({"system": known.system} | row), flush=True)


def run(experiment, **changes):
    """(the quantized model, its figures)."""
    experiment = dataclasses.replace(experiment, **changes)
    start = time.process_time()
    quantized = brecq_jax.quantize(
        experiment.params, experiment.apply_fn, experiment.calib_ds, weights=experiment.weights, activations=experiment.activations,
        preset=experiment.preset, solver=experiment.solver, key=jax.random.key(experiment.seed), progress=False,
    )  # fmt: skip
    return quantized, scored(experiment, quantized) | {"cpu_seconds": round(time.process_time() - start)}


def scored(experiment, quantized) -> dict[str, float]:
    outputs = {"float": [], "quantized": []}

    def kept(name, apply):
        def recorded(inputs):
            outputs[name].append(np.asarray(apply(inputs)))
            return outputs[name][-1]

        return recorded

    exact = jax.jit(lambda x: experiment.apply_fn(experiment.params, x))
    figures = experiment.evaluate(kept("float", exact), kept("quantized", quantized))
    exact, rough = (np.concatenate(outputs[name]) for name in ("float", "quantized"))
    then, now = jax.nn.log_softmax(exact), jax.nn.log_softmax(rough)
    figures["divergence"] = float(jnp.mean(jnp.sum(jnp.exp(then) * (then - now), -1)))
    return figures | {"logit_mse": float(np.mean(np.square(exact - rough))), "mb": quantized.report.size_bits / 8e6}


def sparq(known, experiment):
    experiment = dataclasses.replace(experiment, weights=Uniform(8), solver=solvers.nearest())
    formats = [Uniform(bits) for bits in (8, 4, 3, 2)]
    formats += [Sparq(window, trim=trim, pairs=pairs) for window in (4, 3, 2) for pairs in (True, False) for trim in (False, True)]
    for format in formats:
        name = f"{type(format).__name__}({format.bits})" if isinstance(format, Uniform) else f"Sparq({format.window}, trim={format.trim}, pairs={format.pairs})"
        yield {"activations": name, **run(experiment, activations=format)[1]}


def multipoint(known, experiment):
    bits, draw = int(known.bits), np.random.default_rng(experiment.seed)
    experiment = dataclasses.replace(experiment, activations=None, solver=solvers.multipoint())
    images = jnp.asarray(experiment.calib_ds)[:256]
    graph = brecq_jax.trace(experiment.apply_fn, experiment.params, images[:2])
    sensitivities = mixed_precision.measure(experiment.params, experiment.apply_fn, images, weights=MIXED, preset="uniform", progress=False)
    for tolerance in (np.inf, *map(float, known.tolerances.split(","))):
        quantized, figures = run(experiment, weights=Multipoint(bits, tolerance=tolerance))
        row = {"bits": bits, "tolerance": tolerance, "mean_points": mean_points(quantized)}
        yield row | {"points": "by error", **figures}
        if tolerance == np.inf:
            continue
        for n in range(3):
            yield row | {"points": f"random channels, draw {n}", **scored(experiment, on_random_channels(quantized, experiment.params, draw))}
        try:
            plan = brecq_jax.search(graph, sensitivities, mixed_precision.Budget(int(quantized.report.size_bits)))
        except ValueError as error:
            yield row | {"mixed precision": str(error)}
            continue
        _, figures = run(experiment, **plan.rules, solver=solvers.nearest())
        yield row | {"points": "mixed precision in the same size", **figures}


def multipoint_leaves(tree):
    return [q for q in jax.tree.leaves(tree, is_leaf=is_qarray) if is_qarray(q) and isinstance(q.format, Multipoint)]


def mean_points(quantized) -> float:
    return float(np.concatenate([q.format.counts(q.grid) for q in multipoint_leaves(quantized.params) if q.format.points > 1]).mean())


def on_random_channels(quantized, params, draw):
    """The model with each weight's numbers of points dealt out to its channels anew."""

    def dealt(q, weight):
        if not (is_qarray(q) and isinstance(q.format, Multipoint)):
            return q
        counts = jnp.asarray(draw.permutation(np.asarray(q.format.counts(q.grid))))
        codes, grid = _with_counts(q.format, to_rows(jnp.asarray(weight, jnp.float32), q.channel_axes), counts)
        return dataclasses.replace(q, codes=from_rows(codes, q.shape, q.channel_axes), grid=grid)

    return dataclasses.replace(quantized, params=jax.tree.map(dealt, quantized.params, params, is_leaf=is_qarray))


@functools.partial(jax.jit, static_argnums=0)
def _with_counts(format, rows, counts):
    """(codes, grid) of rows with so many points each."""
    calls = iter(range(-1, format.points))

    def energy(difference):  # first of the rows, then of what each further point leaves: enough with as many as were dealt
        number = next(calls)
        return jnp.ones(len(counts)) if number < 0 else jnp.where(counts <= number + 1, 0.0, jnp.inf)

    grid = format.fit_by(rows, energy)
    return format.encode(rows, grid), grid


def lapq(known, experiment):
    examples, least_squares = np.asarray(experiment.calib_ds), LpRange(p=2.0, steps=99)
    brecq = solvers.brecq(num_steps=known.steps, act_steps=known.steps // 3, refit=False)
    for bits in known.bits.split(","):
        weight_bits, act_bits = map(int, bits.split("+"))
        for draw in map(int, known.draw.split(",")):
            half = np.sort(np.random.default_rng(draw).permutation(len(examples))[: len(examples) // 2])
            some = dataclasses.replace(
                experiment, calib_ds=examples[half], activations=Uniform(act_bits, ranges=least_squares), seed=draw,
                weights=Affine(weight_bits, symmetric=True, granularity="per_tensor", ranges=least_squares),
            )  # fmt: skip
            search = _once(solvers.lapq(iterations=known.iterations))
            ways = {"squared error": solvers.nearest(), "lapq": search, "squared error, brecq": brecq, "lapq, brecq": solvers.chain(search, brecq)}
            for name, solver in ways.items():
                yield {"bits": bits, "draw": draw, "way": name, **run(some, solver=solver)[1]}


def _once(solver):
    """The solver, which answers the second time what it found the first time."""
    found = []

    def solve(problem, guess, key):
        if not found:
            found.append(solver(problem, guess, key))
        return found[0]

    return solve


if __name__ == "__main__":
    main()
