r"""On how many examples the Fisher weights of a config's blocks rest, and what the official code's weights are.

    python benchmarks/fisher_weights.py --config=configs/resnet20_cifar10.py --config.weights=… --config.data=…

For each block (Σ w)² / Σ w² over examples, w an example's summed weight: as many as the examples if all weigh the same.
The official code (yhhhli/BRECQ at e455d62, data_utils.py) takes (|g| + 1)², g the gradient of a batch's mean KL divergence
from the float model where the net is quantized up to the block: here at 2 bits, nearest rounding, batches of 32.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax import data, solvers
from brecq_jax.__main__ import load_config
from brecq_jax._calibrate import fisher
from brecq_jax._interpret import param_values
from brecq_jax._model import Problem, Program, Quantized
from brecq_jax._plan import make_plan
from brecq_jax._quantize import NO_PLAN
from brecq_jax.formats import Uniform
from brecq_jax.solvers._loop import Tail, divergence
from brecq_jax.solvers._walk import STREAM, Walk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--config", required=True)
known, overrides = parser.parse_known_args()
experiment = load_config(known.config, overrides).build()
examples = data.materialize(experiment.calib_ds)
params = jax.tree.map(jnp.asarray, experiment.params)
problem = Problem(experiment.apply_fn, params, NO_PLAN, examples.arrays, examples.count, experiment.blocks)
problem = dataclasses.replace(problem, plan=make_plan(problem.graph(STREAM), Uniform(2), None, "brecq"))
guess, _ = solvers.nearest()(problem, Quantized(params, {}, Program(experiment.apply_fn, (), False)), jax.random.key(0))
walk = Walk(problem)
weights = fisher(problem, walk.blocks, jax.random.key(experiment.seed))


def official(n: int) -> np.ndarray:
    """(|g| + 1)² of a block's output, for the first batch."""
    block, later = walk.blocks[n], walk.blocks[n + 1 :]
    tail = Tail(block.outs, later, walk.graph.flat.outputs[0])
    floats = [param_values(walk.graph, b, walk.leaves) for b in later]
    loss = lambda outputs: jnp.mean(divergence(tail.run(outputs, floats), walk.predictions[:STREAM]))  # noqa: E731
    gradients = jax.grad(loss)([jnp.asarray(o) for o in walk.rough.outputs(block, guess.values(walk.graph, block), rows=np.arange(STREAM))])
    return np.square(np.abs(np.concatenate([np.ravel(g) for g in gradients])) + 1)


print(f"{examples.count} examples; block: effective examples; share of the weight on the heaviest tenth; official weight, median and 99.9 %")
for n, (block, found) in enumerate(zip(walk.blocks, weights, strict=True)):
    w = np.sort(sum(np.float64(a).reshape(len(a), -1).sum(1) for a in found.values()))[::-1]
    theirs = np.quantile(official(n), [0.5, 0.999])
    print(f"{block.name}: {w.sum() ** 2 / (w**2).sum():.0f}; {w[: len(w) // 10].sum() / w.sum():.0%}; {theirs[0]:.5f}, {theirs[1]:.5f}")
    walk.rough.advance(block, guess.values(walk.graph, block))
