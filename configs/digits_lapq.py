r"""Digits, one range for each tensor, 3-bit weights and activations: ranges by error, or by the net's loss (LAPQ).

    python -m brecq_jax --config=configs/digits_lapq.py --workdir=runs/digits_lapq

Calibrates on images that the network was not trained on: of the others it gets nearly all right, and its loss says little.
Claim: with one range a tensor, the loss chooses better ranges than errors do. Ours, seeds 0 to 2: 98.0, 96.0 and 97.3 of
99.7, 98.7 and 98.3 in float; two minutes and a half of one core that others shared (71 to 90 s of it quantizing). Beside
other ways to choose ranges: docs/results.md.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from brecq_jax import Experiment, models, solvers
from brecq_jax.formats import Affine, LpRange, Uniform

CALIBRATION = 300  # of 599 images that the network was not trained on; the others score


@dataclasses.dataclass
class Config:
    weight_bits: int = 3
    act_bits: int = 3
    method: str = "lapq"  # "lapq"; "lapq+adaround": learned rounding within its ranges; or another name that `solvers.by_name` knows
    labelled: bool = True
    iterations: int = 2
    correct_means: bool = False
    num_steps: int = 300  # of learned rounding
    calibration: int = CALIBRATION
    seed: int = 0

    def build(self) -> Experiment:
        digits = models.train_digits(self.seed)
        calibration, labels = digits.test_images[: self.calibration], digits.test_labels[: self.calibration]
        images, truth = digits.test_images[CALIBRATION:], digits.test_labels[CALIBRATION:]
        search = solvers.lapq(labels if self.labelled else None, iterations=self.iterations, correct_means=self.correct_means)
        rounding = solvers.adaround(num_steps=self.num_steps, act_steps=self.num_steps, refit=False)
        chains = {"lapq": search, "lapq+adaround": solvers.chain(search, rounding)}
        solver = chains[self.method] if self.method in chains else solvers.by_name(self.method)

        def evaluate(float_apply, quantized_apply):
            figures = {}
            for name, apply in (("float", float_apply), ("quantized", quantized_apply)):
                logits = jax.nn.log_softmax(apply(images))
                figures[f"{name}_loss"] = -float(jnp.mean(logits[jnp.arange(len(truth)), truth]))
                figures[f"{name}_top1"] = 100 * float(np.mean(np.asarray(logits).argmax(-1) == truth))
            return figures

        least_squares = LpRange(p=2.0, steps=99)
        return Experiment(
            digits.variables,
            digits.model.apply,
            calibration,
            evaluate,
            weights=Affine(self.weight_bits, symmetric=True, granularity="per_tensor", ranges=least_squares),
            activations=Uniform(self.act_bits, ranges=least_squares),
            preset="uniform",
            solver=solver,
            seed=self.seed,
        )
