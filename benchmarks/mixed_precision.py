r"""Does the additive model predict what a plan loses, and what does the search cost?

    python benchmarks/mixed_precision.py --config=configs/resnet20_cifar10.py --config.weights=… --config.data=…

Prints, for each error and with and without interactions: Spearman's rank correlation of predicted loss with the measured divergence
of the net's prediction, over random plans with every weight at its nearest point. Then the time of the pass against
evaluating each configuration in the whole net, and the genetic search against the optimum. Seconds are of the processor.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import brecq_jax
from brecq_jax import mixed_precision, solvers
from brecq_jax.__main__ import load_config
from brecq_jax.formats import Uniform
from brecq_jax.mixed_precision._table import make_table, to_plan

ERRORS = {
    "relative_error": solvers.relative_error, "squared_error": solvers.squared_error,
    "fisher_error": solvers.fisher_error, "divergence": mixed_precision.divergence,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--bits", default="2,4,8")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--plans", type=int, default=50)
    parser.add_argument("--errors", default=",".join(ERRORS))
    known, overrides = parser.parse_known_args()
    experiment = load_config(known.config, overrides).build()
    images, choices = jnp.asarray(experiment.calib_ds)[: known.examples], [Uniform(int(b)) for b in known.bits.split(",")]
    model = experiment.params, experiment.apply_fn, images
    settings = dict(weights=choices, preset=experiment.preset, progress=False)
    found = {}
    for name in known.errors.split(","):
        start = time.process_time()
        found[name] = mixed_precision.measure(*model, error=ERRORS[name], **settings)
        print(f"pass, {name}: {time.process_time() - start:.1f} s with compilation", flush=True)
    start = time.process_time()
    mixed_precision.measure(*model, error=ERRORS[name], **settings)
    print(f"pass, {name}: {time.process_time() - start:.1f} s again", flush=True)
    graph = brecq_jax.trace(experiment.apply_fn, experiment.params, images[:1])
    correlations(known, experiment, graph, found, choices, images)
    searches(graph, found[known.errors.split(",")[0]])
    naive(experiment, graph, found[known.errors.split(",")[0]], choices, images)


def correlations(known, experiment, graph, found, choices, images):
    """Half of the plans have ever more weights at the fewest bits, half have any choice everywhere."""
    apply = jax.jit(experiment.apply_fn)
    log_p = jax.nn.log_softmax(apply(experiment.params, images))
    table = make_table(graph, next(iter(found.values())), None, None, None)
    rounded = {format: jax.tree.leaves(nearest(experiment, images, format)) for format in [*choices, Uniform(8)]}
    draw = np.random.default_rng(experiment.seed)
    plans, losses = [], []
    for number in range(known.plans):
        lowest = draw.random(len(table.options)) < (number / known.plans if number % 2 else 0)
        row = np.where(lowest, 0, draw.integers([len(o) for o in table.options]))
        plans.append(to_plan(table, graph, row, experiment.preset))
        leaves = jax.tree.leaves(experiment.params)
        for name, format in plans[-1].weights.items():
            leaves[graph.weights[name].leaf] = rounded[Uniform(format.bits)][graph.weights[name].leaf]
        log_q = jax.nn.log_softmax(apply(jax.tree.unflatten(graph.params_tree, leaves), images))
        losses.append(float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))))
    print(f"{known.plans} random plans: measured divergence {min(losses):.4f} to {max(losses):.4f}")
    for name, sensitivities in found.items():
        for words, own in (("with", sensitivities), ("without", dataclasses.replace(sensitivities, interactions={}))):
            predicted = [mixed_precision.predict(graph, own, plan).loss for plan in plans]
            halves = (stats.spearmanr(predicted[n::2], losses[n::2]).statistic for n in (0, 1))
            print(f"  {name} {words} interactions: {stats.spearmanr(predicted, losses).statistic:.3f}, halves", *(f"{h:.3f}" for h in halves), flush=True)


def nearest(experiment, images, format):
    """The parameters with every weight at its nearest point."""
    model = brecq_jax.quantize(
        experiment.params, experiment.apply_fn, images, weights=format, activations=None, solver=solvers.nearest(), progress=False
    )
    return model.dequantized()


def searches(graph, sensitivities):
    table = make_table(graph, sensitivities, None, None, None)
    low, high = (table.cost("size_bits", np.array([[k if len(o) > 1 else 0 for o in table.options]]))[0] for k in (0, 1))
    for part in (0.05, 0.1, 0.25, 0.5, 0.75, 0.9):
        row = [f"size {low + part * (high - low):.0f} bits"]
        limits = {"size_bits": low + part * (high - low)}
        for solver in (mixed_precision.exact, mixed_precision.Genetic()):
            start = time.process_time()
            choices = solver(table, limits)
            row.append(f"{table.loss(choices[None])[0]:.6g} in {time.process_time() - start:.2f} s")
        print("; ".join(row))


def naive(experiment, graph, sensitivities, choices, images):
    """Each configuration by itself: quantize one weight, run the whole net. Forward passes alone are timed."""
    apply = jax.jit(lambda params, x: experiment.apply_fn(params, x))
    configurations = len(sensitivities.losses) * len(choices) + len(sensitivities.interactions)
    batches = [images[i : i + 32] for i in range(0, len(images) - 31, 32)]
    apply(experiment.params, batches[0]).block_until_ready()
    start = time.process_time()
    for batch in batches:
        apply(experiment.params, batch).block_until_ready()
    seconds = time.process_time() - start
    print(f"naive: {configurations} configurations × {seconds:.2f} s a pass of the whole net = {configurations * seconds:.1f} s")


if __name__ == "__main__":
    main()
