r"""EfficientNet-Lite0 with ImageNet weights, 4-bit weights, 8-bit activations: the main job on the embedded default.

    python -m brecq_jax --config=configs/efficientnet_lite0.py --workdir=runs/lite0

Calibrates on random crops of photographs that scikit-image and scikit-learn ship, and reports how often the quantized
model's first class is the float model's, on crops of photographs it was not calibrated on. `--config.data=FOLDER`
takes a folder of your own images: half calibrates (every other file), half scores, with labels where folder or file
names give them.

Claim: minutes and 64 crops give a 4-bit model that mostly agrees with float. Ours: the same first class for 84, 88, 76, 86 and 77 of 100 crops
(seeds 0 to 4; the draw is most of it), two minutes on two cores. With more steps and photographs: docs/results.md. The paper
has no such network.
"""

import dataclasses

import numpy as np

from brecq_jax import Experiment, data, models, solvers
from brecq_jax.formats import Uniform


@dataclasses.dataclass
class Config:
    weight_bits: int = 4
    act_bits: int = 8  # 0: float
    data: str = ""  # a folder of images, every other one of which calibrates; none: the photographs of scikit-image
    calibration: int = 64
    evaluation: int = 500  # at most; 100 of scikit-image's crops
    mirror: bool = False  # learn from the mirror images, too
    method: str = "annealed"  # a name that `solvers.by_name` knows
    num_steps: int = 60
    act_steps: int = 0  # 0: the method's own, where it has a phase for activations
    learning_rate: float = 0.0  # 0: the method's own
    preset: str = "brecq"
    seed: int = 0

    def build(self) -> Experiment:
        model, variables = models.load_efficientnet_lite0()
        prepare = models.ARCHITECTURES["efficientnet_lite0"].preprocessing
        if self.data:
            pixels, labels = data.folder(self.data, prepare.size, prepare.crop)
            calibration, evaluation = pixels[::2][: self.calibration], pixels[1::2][: self.evaluation]
            labels = None if labels is None else labels[1::2][: self.evaluation]
        else:
            calibration = data.photographs(prepare.size, self.calibration, self.seed, "calibration")
            evaluation, labels = data.photographs(prepare.size, min(self.evaluation, 100), self.seed, "evaluation"), None
        calibration = data.mirrored(calibration) if self.mirror else calibration
        settings = dict(num_steps=self.num_steps, act_steps=self.act_steps, learning_rate=self.learning_rate)
        solver = solvers.by_name(self.method, **{k: v for k, v in settings.items() if v})

        def evaluate(float_apply, quantized_apply):
            batches = [prepare.normalize(evaluation[i : i + 50]) for i in range(0, len(evaluation), 50)]
            ours, theirs = (np.concatenate([np.asarray(f(b)).argmax(-1) for b in batches]) for f in (quantized_apply, float_apply))
            figures = {"agreement_with_float": 100 * float(np.mean(ours == theirs))}
            if labels is not None:
                figures |= {"float_top1": 100 * float(np.mean(theirs == labels)), "quantized_top1": 100 * float(np.mean(ours == labels))}
            return figures

        return Experiment(
            variables,
            model.apply,
            np.asarray(prepare.normalize(calibration)),
            evaluate,
            weights=Uniform(self.weight_bits),
            activations=Uniform(self.act_bits) if self.act_bits else None,
            preset=self.preset or None,
            solver=solver,
            seed=self.seed,
        )
