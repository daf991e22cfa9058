r"""Any ImageNet network that `models` knows, at any bits, by any of the paper's methods: tables 1 to 3 of BRECQ.

    python -m brecq_jax --config=configs/imagenet.py --workdir=runs/r18 --config.architecture=resnet18 \
        --config.weights=resnet18_imagenet.pth --config.data=DATA_DIR --config.dataset=imagenet2012 \
        --config.weight_bits=2 --config.method=brecq

Claim: with first and last layer at 8 bits and 1,024 training images, blocks learned one by one keep ResNet-18 usable at 2 bits.

`data` is a folder with train/ and val/, any folder of images (every other one scores), or, with `dataset`, the data_dir of a tfds set
prepared as array_record: to prepare imagenet2012 takes `pip install tensorflow-cpu importlib_resources`, to read it no TensorFlow.
Top-1 needs labels of all the network's classes: a folder for each in val/, or names that begin with their number. `weights` is a PyTorch
checkpoint; the paper's are its authors' own, and others give other figures. Calibrates on random crops, scores central ones; images
stay uint8, and what the quantized model takes is pixels.

Time: not measured here, and no top-1 of ours: no ImageNet on the machine. What others measured, beside which ours belong:

| network | bits | method | theirs | ours |
|---|---|---|---|---|
| resnet18 | W4A32 | adaround | 68.71 (paper, table 2) | not measured |
| resnet18 | W4A32 | brecq | 70.70 (paper, table 2) | not measured |
| resnet18 | W3A32 | brecq | 69.81 (paper, table 2) | not measured |
| resnet18 | W2A32 | brecq | 66.30 (paper, table 2), 66.33 (readme) | not measured |
| mobilenet_v2 | W2A32 | brecq, regularizer 0.1 | 59.49 (readme) | not measured |
| resnet18 | W4A4 | brecq | 69.60 (paper, table 3) | not measured |
| resnet18 | W2A4 | brecq | 64.80 (paper, table 3), 65.21 (readme) | not measured |

Readme: the released code's own (yhhhli/BRECQ at 048c3e6). The paper's figures of the other networks: its tables 2 and 3. A second
implementation's, from its own checkpoints (MQBench, benchmark/ImageClassification/Benchmark of its stable documentation); ours not measured:

| | resnet18 | resnet50 | mobilenet_v2 | regnetx_600mf |
|---|---|---|---|---|
| float | 71.06 | 76.63 | 72.68 | 73.60 |
| W4A4 adaround | 68.67 | 73.79 | 65.74 | 70.24 |
| W4A4 brecq | 68.52 | 74.66 | 67.23 | 70.30 |
| W4A4 qdrop | 68.84 | 74.98 | 68.13 | 70.85 |
| W2A4 adaround | 62.31 | 63.65 | 40.60 | 57.14 |
| W2A4 brecq | 63.56 | 68.39 | 52.29 | 62.36 |
"""

import dataclasses
import functools

import jax
import numpy as np
from jax.experimental import multihost_utils

from brecq_jax import Experiment, data, models, solvers
from brecq_jax.formats import Uniform


def why_no_top1(scored: data.Images, logits: int) -> str:
    """Why labels cannot be compared with logits; "" if they can."""
    if scored.classes == 0:
        return "no labels: agreement with the float model is all that is scored. For top-1 put the images that score in a folder for each class."
    if scored.classes in (None, logits):
        return ""
    return (
        f"no top-1: the labels are of {scored.classes} classes, and the network has {logits} logits. A label is the place of a class among all: "
        "make the folders of the others, too (they may be empty), or begin each name with its class's number (000_a.jpg)."
    )


@dataclasses.dataclass
class Config:
    architecture: str = "resnet18"  # a name of `models.ARCHITECTURES`
    weights: str = ""
    data: str = ""
    dataset: str = ""  # a tfds name, as imagenet2012
    weight_bits: int = 4
    act_bits: int = 0  # 0: float
    method: str = "annealed"  # a name that `solvers.by_name` knows
    calibration: int = 1024
    evaluation: int = 0  # so many images, evenly spread; 0: all
    batch_size: int = 100  # of the evaluation
    mirror: bool = False  # learn from the mirror images, too
    num_steps: int = 0  # 0: the method's own
    act_steps: int = 0  # the same
    step_examples: int = 0  # the same: of each step, shared out over the devices
    learning_rate: float = 0.0  # the same
    regularizer: float = 0.0  # the same: weight of the published methods' penalty, which they tune (0.1 for MobileNetV2, else 0.01)
    preset: str = "brecq"
    blocks: str = "block"
    memory_budget_gb: float = 0.0  # of the calibration set, caches and a step; 0: all in memory
    bfloat16_caches: bool = False
    seed: int = 0

    def build(self) -> Experiment:
        if self.architecture not in models.ARCHITECTURES:
            raise ValueError(f"--config.architecture={self.architecture}: write one of {', '.join(models.ARCHITECTURES)}.")
        if not self.weights or not (self.data or self.dataset):
            raise ValueError("Give --config.weights=CHECKPOINT, and --config.data=FOLDER or --config.dataset=imagenet2012.")
        model, variables = models.load_pretrained(self.architecture, self.weights)
        prepare = models.preprocessing_of(self.architecture, self.weights)

        def apply_fn(variables, pixels):
            return model.apply(variables, prepare.normalize(pixels))

        calibration, scored = data.open_images(self.data, self.dataset)
        scored = scored.spread(-(-self.evaluation // jax.process_count())) if self.evaluation else scored
        pixels = data.calibration_crops(calibration, self.calibration, prepare.size, self.seed, prepare.interpolation)
        crop = functools.partial(data.center_crop, size=prepare.size, fraction=prepare.crop, interpolation=prepare.interpolation)
        unscored = why_no_top1(scored, jax.eval_shape(apply_fn, variables, pixels[:1]).shape[-1])
        if unscored and jax.process_index() == 0:
            print(unscored)
        settings = dict(
            num_steps=self.num_steps, act_steps=self.act_steps, batch_size=self.step_examples, learning_rate=self.learning_rate,
            regularizer=self.regularizer,
        )  # fmt: skip

        def evaluate(float_apply, quantized_apply):
            seen, labelled, agree, right, float_right = 0, 0, 0, 0, 0
            for images, labels in data.stream(scored, crop, self.batch_size):
                ours, theirs = (np.asarray(apply(images)).argmax(-1) for apply in (quantized_apply, float_apply))
                seen, agree = seen + len(images), agree + np.sum(ours == theirs)
                if labels is not None:
                    labelled, right, float_right = labelled + len(labels), right + np.sum(ours == labels), float_right + np.sum(theirs == labels)
            counts = np.array([seen, labelled, agree, right, float_right])
            seen, labelled, agree, right, float_right = multihost_utils.process_allgather(counts).reshape(-1, len(counts)).sum(0)
            figures = {"agreement_with_float": 100 * float(agree / seen)}
            if labelled and not unscored:
                figures |= {"float_top1": 100 * float(float_right / labelled), "quantized_top1": 100 * float(right / labelled)}
            return figures

        return Experiment(
            variables,
            apply_fn,
            data.mirrored(pixels) if self.mirror else pixels,
            evaluate,
            weights=Uniform(self.weight_bits),
            activations=Uniform(self.act_bits) if self.act_bits else None,
            preset=self.preset or None,
            solver=solvers.by_name(self.method, **{k: v for k, v in settings.items() if v}),
            blocks=self.blocks,
            memory_budget_gb=self.memory_budget_gb or None,
            bfloat16_caches=self.bfloat16_caches,
            seed=self.seed,
        )
