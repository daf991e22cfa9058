r"""On how many examples the Fisher weights of a config's blocks rest.

    python benchmarks/fisher_weights.py --config=configs/resnet20_cifar10.py --config.weights=… --config.data=…

For each block (Σ w)² / Σ w² over examples, w an example's summed weight: as many as the examples if all weigh the same.
"""

import argparse

import jax
import numpy as np

from brecq_jax import data
from brecq_jax.__main__ import load_config
from brecq_jax._calibrate import Memory, fisher
from brecq_jax._model import Problem
from brecq_jax._quantize import NO_PLAN

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--config", required=True)
known, overrides = parser.parse_known_args()
experiment = load_config(known.config, overrides).build()
examples = data.materialize(experiment.calib_ds)
problem = Problem(experiment.apply_fn, jax.tree.map(np.asarray, experiment.params), NO_PLAN, examples.arrays, examples.count, experiment.blocks)
blocks = problem.units(32)
weights = fisher(problem, blocks, Memory(None), jax.random.key(experiment.seed))
print(f"{examples.count} examples; block: effective examples; share of the weight on the heaviest tenth")
for block, found in zip(blocks, weights, strict=True):
    w = np.sort(sum(np.float64(a).reshape(len(a), -1).sum(1) for a in found.values()))[::-1]
    print(f"{block.name}: {w.sum() ** 2 / (w**2).sum():.0f}; {w[: len(w) // 10].sum() / w.sum():.0%}")
