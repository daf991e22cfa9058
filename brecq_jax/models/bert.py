"""A BERT encoder: layer norm after each half of a block.

Source: Devlin et al. 2019, section 3 and figure 2, https://arxiv.org/abs/1810.04805.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-12  # of the layer norms, BERT's
TINY = 1e-12  # the least length that an embedding is divided by, PyTorch's `normalize`


class SelfAttention(nn.Module):
    """Tokens attend to those that the mask leaves. Tokens (b, t, features) and mask (b, 1, 1, t) to tokens."""

    heads: int

    @nn.compact
    def __call__(self, x, mask):
        q, k, v = (nn.Dense(x.shape[-1], name=n)(x).reshape(*x.shape[:2], self.heads, -1) for n in ("query", "key", "value"))
        return nn.Dense(x.shape[-1], name="out")(jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape))


class BertBlock(nn.Module):
    """norm1(x + attn(x)), then norm2(x + mlp(x)). Tokens (b, t, features) and mask (b, 1, 1, t) to tokens."""

    heads: int
    mlp_features: int

    @nn.compact
    def __call__(self, x, mask):
        x = nn.LayerNorm(epsilon=EPSILON, name="norm1")(x + SelfAttention(self.heads, name="attn")(x, mask))
        y = nn.Dense(self.mlp_features, name="fc1")(x)
        y = nn.Dense(x.shape[-1], name="fc2")(jax.nn.gelu(y, approximate=False))
        return nn.LayerNorm(epsilon=EPSILON, name="norm2")(x + y)


class Bert(nn.Module):
    """Token ids (batch, t), mask (batch, t), 1 where a token is, and types (batch, t) to states (batch, t, features).

    A masked token reaches no other token. `mask` None: every token counts. `types` None: all zero.
    """

    vocabulary: int = 1000
    positions: int = 128
    types: int = 2
    features: int = 64
    depth: int = 2
    heads: int = 4
    mlp_features: int = 256

    @nn.compact
    def __call__(self, ids, mask=None, types=None):
        if ids.shape[1] > self.positions:
            raise ValueError(f"Bert: {ids.shape[1]} tokens, and positions for {self.positions}: cut the ids or set `positions`.")
        mask = jnp.ones_like(ids) if mask is None else mask
        types = jnp.zeros_like(ids) if types is None else types
        x = nn.Embed(self.vocabulary, self.features, name="word")(ids)
        x = x + nn.Embed(self.positions, self.features, name="position")(jnp.arange(ids.shape[1])[None])
        x = x + nn.Embed(self.types, self.features, name="type")(types)
        x = nn.LayerNorm(epsilon=EPSILON, name="norm")(x)
        for i in range(self.depth):
            x = BertBlock(self.heads, self.mlp_features, name=f"blocks_{i}")(x, mask[:, None, None, :] > 0)
        return x


class SentenceEncoder(Bert):
    """Tokens as tokenizers give them to unit vectors (batch, features): the mean of the states of the tokens that count.

    `tokens`: {"input_ids", "attention_mask", and "token_type_ids" if there are two kinds}, each (batch, t).
    Source: Reimers and Gurevych 2019, section 3 (MEAN), https://arxiv.org/abs/1908.10084; normalised as the weights' modules.json says.
    """

    def __call__(self, tokens: Mapping[str, jax.Array]):
        mask = tokens["attention_mask"]
        states = super().__call__(tokens["input_ids"], mask, tokens.get("token_type_ids"))
        # the sum, not the mean: its length is taken off
        total = jnp.sum(states * mask[..., None].astype(states.dtype), 1)
        return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), TINY)


TRANSFORMERS = (
    ("^(word|position|type)/", r"embeddings/\1_embeddings."), ("/type_", "/token_type_"), ("^norm/", "embeddings.LayerNorm."),
    (r"^blocks_(\d+)", r"encoder.layer.\1"), ("/attn/out/", ".attention.output.dense."), ("/attn/", ".attention.self."),
    ("/norm1/", ".attention.output.LayerNorm."), ("/norm2/", ".output.LayerNorm."), ("/fc1/", ".intermediate.dense."), ("/fc2/", ".output.dense."),
)  # fmt: skip
NAMINGS = {"transformers": TRANSFORMERS, "transformers, with a head": (*TRANSFORMERS, ("^", "bert."))}
