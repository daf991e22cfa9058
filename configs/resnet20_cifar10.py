r"""CIFAR-10 ResNet-20 (or -32, -44, -56) with published weights, any bits, any of the paper's methods.

    python -m brecq_jax --config=configs/resnet20_cifar10.py --workdir=runs/r20 \
        --config.weights=resnet20-12fca82f.th --config.data=cifar10_jpeg --config.weight_bits=2 --config.act_bits=0

`data` is a folder with train.npz and test.npz (`jpeg`: concatenated files, `offset`, `label`). The paper has no CIFAR table.

Claim: weights in 2 bits cost a point. Ours, on a JPEG copy of the test set where float scores 81.03: W2A32 80.05 ± 0.11
(five seeds), about a minute on one core. Other bits, methods and depths: docs/results.md.
"""

import dataclasses
import io
import pathlib

import numpy as np
from PIL import Image

from brecq_jax import Experiment, data, models, solvers
from brecq_jax.formats import Uniform


@dataclasses.dataclass
class Config:
    depth: int = 20
    weights: str = ""
    data: str = ""
    weight_bits: int = 4
    act_bits: int = 0  # 0: float
    method: str = "annealed"  # a name that `solvers.by_name` knows
    calibration: int = 1024
    mirror: bool = True  # learn from the mirror images, too
    num_steps: int = 0  # 0: the method's own
    act_steps: int = 0  # the same
    learning_rate: float = 0.0  # the same
    preset: str = "brecq"
    blocks: str = "block"
    bfloat16_caches: bool = False
    seed: int = 0

    def build(self) -> Experiment:
        if not self.weights or not self.data:
            raise ValueError("Give --config.weights=CHECKPOINT, as resnet20-12fca82f.th, and --config.data=FOLDER with train.npz and test.npz.")
        model, variables = models.load_resnet_cifar(self.weights, self.depth)
        normalize = models.ARCHITECTURES[f"resnet{self.depth}_cifar"].preprocessing.normalize
        calibration, _ = read_jpegs(pathlib.Path(self.data) / "train.npz", self.calibration)
        images, labels = read_jpegs(pathlib.Path(self.data) / "test.npz", None)
        calibration = data.mirrored(calibration) if self.mirror else calibration
        settings = dict(num_steps=self.num_steps, act_steps=self.act_steps, learning_rate=self.learning_rate)
        solver = solvers.by_name(self.method, **{k: v for k, v in settings.items() if v})

        def evaluate(float_apply, quantized_apply):
            def top1(apply):
                found = [np.asarray(apply(normalize(images[i : i + 500]))).argmax(-1) for i in range(0, len(images), 500)]
                return 100 * float(np.mean(np.concatenate(found) == labels))

            return {"float_top1": top1(float_apply), "quantized_top1": top1(quantized_apply)}

        return Experiment(
            variables,
            model.apply,
            np.asarray(normalize(calibration)),
            evaluate,
            weights=Uniform(self.weight_bits),
            activations=Uniform(self.act_bits) if self.act_bits else None,
            preset=self.preset or None,
            solver=solver,
            blocks=self.blocks,
            bfloat16_caches=self.bfloat16_caches,
            seed=self.seed,
        )


def read_jpegs(path: pathlib.Path, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of an npz of JPEG files; `count` of them, drawn with a fixed seed."""
    stored = np.load(path)
    jpeg, offset, labels = stored["jpeg"].tobytes(), stored["offset"], stored["label"]
    rows = np.arange(len(labels)) if count is None else np.random.default_rng(0).permutation(len(labels))[:count]
    images = [np.asarray(Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]])).convert("RGB")) for i in rows]
    return np.stack(images), labels[rows]
