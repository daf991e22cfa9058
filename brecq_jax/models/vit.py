"""The vision transformer: layer norm before each half of a block.

Source: Dosovitskiy et al. 2021, eqs. 1 to 4, https://arxiv.org/abs/2010.11929.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Mlp(nn.Module):
    """Two dense layers with GELU between them. (…, features) to the same."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="fc2")(jax.nn.gelu(nn.Dense(self.hidden, name="fc1")(x), approximate=False))


class EncoderBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)). Tokens (b, t, features) to the same."""

    heads: int
    mlp_features: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=1e-6, name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attn")(y)
        return x + Mlp(self.mlp_features, name="mlp")(nn.LayerNorm(epsilon=1e-6, name="norm2")(x))


class ViT(nn.Module):
    """Images (batch, h, w, 3), sides a multiple of `patch`, to logits (batch, classes). Defaults: ViT-Ti/16."""

    patch: int = 16
    features: int = 192
    depth: int = 12
    heads: int = 3
    mlp_features: int = 768
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(f"ViT: images of {x.shape[1]}×{x.shape[2]} do not split into patches of {self.patch}: resize them to a multiple of it.")
        x = nn.Conv(self.features, (self.patch, self.patch), (self.patch, self.patch), padding="VALID", name="patch_embed")(x)
        x = x.reshape(x.shape[0], -1, self.features)
        first = self.param("class_token", nn.initializers.zeros, (1, 1, self.features))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, self.features)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for i in range(self.depth):
            x = EncoderBlock(self.heads, self.mlp_features, name=f"blocks_{i}")(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm(epsilon=1e-6, name="norm")(x)[:, 0])
