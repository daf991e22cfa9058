"""A BERT encoder: layer norm after each half of a block.

Source: Devlin et al. 2019, section 3 and figure 2, https://arxiv.org/abs/1810.04805.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-12  # of the layer norms, BERT's


class BertBlock(nn.Module):
    """norm1(x + attn(x)), then norm2(x + mlp(x)). Tokens (b, t, features) and mask (b, 1, 1, t) to tokens."""

    heads: int
    mlp_features: int

    @nn.compact
    def __call__(self, x, mask):
        y = nn.MultiHeadDotProductAttention(self.heads, name="attn")(x, mask=mask)
        x = nn.LayerNorm(epsilon=EPSILON, name="norm1")(x + y)
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
