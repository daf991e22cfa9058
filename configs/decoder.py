r"""A small GPT of scanned layers, trained on Python's own documentation: perplexity of unseen text at any bits.

    python -m brecq_jax --config=configs/decoder.py --workdir=runs/decoder

The text is the 79 topics of `help()`, which Python ships (pydoc_data), byte by byte: the first nine tenths train and calibrate, the last
tenth scores. Perplexity is per byte.

Claim: a stack of layers in one leaf is quantized layer by layer. Ours, seeds 0 to 2: 5.11, 5.14 and 5.21 of 5.07, 5.10 and
5.19 in float, in 0.157 MB of 0.882; three minutes of one core that others shared, most of it training (23 to 35 s of it
quantizing). By bits: docs/results.md.
"""

import dataclasses
from pydoc_data import topics

import numpy as np

from brecq_jax import Experiment, models, solvers
from brecq_jax.formats import PerToken, Uniform


@dataclasses.dataclass
class Config:
    weight_bits: int = 4
    group_size: int = 0  # of weights, and of activations per token; 0: a scale for each output channel, and for each token
    table_bits: int = 8  # of the embeddings, which are the head, too
    act_bits: int = 8  # 0: float
    per_token: bool = True
    method: str = "annealed"  # a name that `solvers.by_name` knows
    num_steps: int = 100
    train_steps: int = 1000
    calibration: int = 128
    blocks: str = "block"
    seed: int = 0

    def build(self) -> Experiment:
        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
        trained = models.train_decoder(text, num_steps=self.train_steps, seed=self.seed)
        rows = np.random.default_rng(self.seed).permutation(len(trained.train))[: self.calibration]

        def evaluate(float_apply, quantized_apply):
            def perplexity(apply):
                parts = [models.surprise(apply(batch), batch) for batch in np.array_split(trained.test, 8)]
                return float(np.exp(np.mean(np.concatenate(parts))))

            return {"float_perplexity": perplexity(float_apply), "quantized_perplexity": perplexity(quantized_apply)}

        activations = None
        if self.act_bits:
            activations = PerToken(self.act_bits, self.group_size or None) if self.per_token else Uniform(self.act_bits)
        return Experiment(
            trained.variables,
            trained.model.apply,
            trained.train[rows],
            evaluate,
            weights={"token/.*": Uniform(self.table_bits), ".*": Uniform(self.weight_bits, granularity=self.group_size or None)},
            activations=activations,
            solver=solvers.by_name(self.method, num_steps=self.num_steps),
            blocks=self.blocks,
            seed=self.seed,
        )
