r"""Any other config, with the bits of each layer searched for instead of stated.

    python -m brecq_jax --config=configs/mixed_precision.py --workdir=runs/mixed --config.average_bits=2.5 \
        --config.base="resnet20_cifar10 --config.weights=resnet20-12fca82f.th --config.data=cifar10_jpeg --config.num_steps=300"

`base` is a config beside this one with its own arguments; its weights' bits are not used, its preset is. The plan is printed before work
starts. Sensitivities and latencies are measured once for each file given. A file of sensitivities that were measured with other choices, preset,
error, examples or learned_steps is refused; seeds of the base may share one.

Claim: at one size, searched bits are at least as good as uniform ones. Ours on ResNet-20 at the size of 2.5 bits: 80.55 ± 0.06, of 3: 80.99 ±
0.05, uniform 80.98 ± 0.14; on EfficientNet-Lite0 at the size of 3: 82.0 ± 0.7, uniform 81.0 ± 1.4 (three seeds; times and
the other sizes: docs/results.md). The paper's mixed plans are of networks for ImageNet: its figures are not repeated here.
"""

import dataclasses
import pathlib
import shlex

import jax

import brecq_jax
from brecq_jax import Experiment, mixed_precision, solvers
from brecq_jax.__main__ import load_config
from brecq_jax.formats import Uniform


@dataclasses.dataclass
class Config:
    base: str = "digits_w4a8"
    choices: str = "2,3,4,8"  # bits of weights
    act_choices: str = ""  # bits of activations; none: as the base has them
    average_bits: float = 3.0  # the budget: no larger than the base with so many bits everywhere, 2.5 being half-way between 2 and 3; 0: any size
    bops: float = 0.0  # and no more multiplications × weight bits × activation bits; 0: no bound
    latency: str = ""  # a CSV (layer, weight_bits, act_bits, us): read if it is there, else measured here and written; none: a systolic array
    latency_us: float = 0.0  # and no slower; 0: no bound
    latency_bits: float = 0.0  # and no slower than the base with so many bits everywhere, as in average_bits; 0: no bound
    latency_batch: int = 8  # examples of a batch whose latency is measured
    examples: int = 256  # of the calibration set, for the sensitivities
    error: str = "relative_error"  # or divergence, which weighs with the Fisher diagonal
    learned_steps: int = 0  # learned rounding (`annealed`) of each choice before its sensitivity is measured; 0: nearest
    interactions: bool = True
    genetic: bool = False  # the paper's search; else the optimum
    sensitivities: str = ""  # a file: read if it is there, else written

    def build(self) -> Experiment:
        if self.latency_us and self.latency_bits:
            raise ValueError("Give --config.latency_us or --config.latency_bits: each bounds the latency.")
        name, *overrides = shlex.split(self.base)
        experiment = load_config(str(pathlib.Path(__file__).parent / f"{name}.py"), overrides).build()
        sensitivities = self.measured(experiment)
        if not self.interactions:
            sensitivities = dataclasses.replace(sensitivities, interactions={})
        graph = brecq_jax.trace(experiment.apply_fn, experiment.params, first(experiment, 2))
        table = self.latencies(experiment, graph, range(int(self.latency_bits), int(self.latency_bits) + 2) if self.latency_bits else ())

        def uniform(bits: float, cost: str) -> float:
            """The cost of so many bits everywhere."""
            plans = (brecq_jax.make_plan(graph, Uniform(min(b, 8)), experiment.activations, experiment.preset) for b in (int(bits), int(bits) + 1))
            low, high = (mixed_precision.plan_costs(graph, plan, table)[cost] for plan in plans)
            return low + (bits - int(bits)) * (high - low)

        budget = mixed_precision.Budget(
            uniform(self.average_bits, "size_bits") if self.average_bits else None, self.bops or None,
            uniform(self.latency_bits, "latency_us") if self.latency_bits else self.latency_us or None,
        )  # fmt: skip
        plan = brecq_jax.search(
            graph, sensitivities, budget, activations=experiment.activations, latency=table,
            solver=mixed_precision.Genetic() if self.genetic else mixed_precision.exact, key=jax.random.key(experiment.seed),
        )  # fmt: skip
        return dataclasses.replace(experiment, **plan.rules)

    def measured(self, experiment: Experiment) -> mixed_precision.Sensitivities:
        """Sensitivities: the file's, if it is there.

        Raises:
          ValueError: an error that is unknown, or a file that was measured with something else.
        """
        inputs = first(experiment, self.examples)
        examples = len(jax.tree.leaves(inputs)[0])
        if self.sensitivities and pathlib.Path(self.sensitivities).exists():
            found = mixed_precision.Sensitivities.load(self.sensitivities)
            self.check(found, experiment, examples)
            return found
        weights, activations = ([Uniform(b) for b in numbers(own)] for own in (self.choices, self.act_choices))
        errors = {"relative_error": solvers.relative_error, "divergence": mixed_precision.divergence}
        if self.error not in errors:
            raise ValueError(f"--config.error={self.error}: write one of {', '.join(errors)}.")
        found = mixed_precision.measure(
            experiment.params, experiment.apply_fn, inputs, weights=weights, activations=activations, preset=experiment.preset,
            solver=solvers.annealed(num_steps=self.learned_steps) if self.learned_steps else None,
            error=errors[self.error], blocks=experiment.blocks, key=jax.random.key(experiment.seed), progress=jax.process_index() == 0,
        )  # fmt: skip
        found = dataclasses.replace(found, measured_with={**found.measured_with, "learned_steps": self.learned_steps, "seed": experiment.seed})
        if self.sensitivities:
            found.save(self.sensitivities)
        return found

    def check(self, found: mixed_precision.Sensitivities, experiment: Experiment, examples: int):
        """Raise ValueError if what the file notes is not what is asked for. An older one notes choices and preset alone."""
        asked = {"error": self.error, "examples": examples, "learned_steps": self.learned_steps}
        asked = {"choices": numbers(self.choices), "act_choices": numbers(self.act_choices), "preset": experiment.preset, **asked}
        noted = {"choices": [f.bits for f in found.weights], "act_choices": [f.bits for f in found.activations], "preset": found.preset}
        noted |= found.measured_with
        if "learned_steps" not in noted and "solver" in noted:  # written by `Sensitivities.save` alone
            noted["learned_steps"] = 0 if noted["solver"] == "nearest" else f"unknown, of solver {noted['solver']},"
        other = [f"{key} is {noted[key]} there and {value} here" for key, value in asked.items() if key in noted and noted[key] != value]
        if other:
            raise ValueError(
                f"--config.sensitivities={self.sensitivities} was measured with something else: {'; '.join(other)}.\n"
                "  Give another file, which is measured and written, or remove this one."
            )

    def latencies(self, experiment: Experiment, graph: brecq_jax.Graph, uniform_bits) -> mixed_precision.Latency:
        """Of all bits that a plan or a budget may have."""
        if not self.latency:
            return mixed_precision.SystolicArray().latency(graph)
        if pathlib.Path(self.latency).exists():
            return mixed_precision.read_latency(self.latency)
        plan = brecq_jax.make_plan(graph, Uniform(8), experiment.activations, experiment.preset)
        weight_bits, act_bits = (set(numbers(own)) for own in (self.choices, self.act_choices))
        act_bits |= {format.bits if format else mixed_precision.FLOAT_BITS for format in plan.activations.values()}
        weight_bits |= {8, *(min(b, 8) for b in uniform_bits)}
        graph = brecq_jax.trace(experiment.apply_fn, experiment.params, first(experiment, self.latency_batch))
        found = mixed_precision.measure_latency(graph, sorted(weight_bits), sorted(act_bits), progress=False)
        mixed_precision.write_latency(found, self.latency)
        return found


def first(experiment: Experiment, count: int):
    """So many calibration inputs."""
    return jax.tree.map(lambda a: a[:count], experiment.calib_ds)


def numbers(text: str) -> list[int]:
    """`2,3,8` as numbers."""
    return [int(b) for b in text.split(",") if b]
