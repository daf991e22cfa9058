"""The vision transformer: layer norm before each half of a block.

Source: Dosovitskiy et al. 2021, eqs. 1 to 4, https://arxiv.org/abs/2010.11929.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from brecq_jax.models._preprocessing import Preprocessing

# timm's weights; torchvision's ViT-B/16 was trained with 0.875 of the short side, bilinear, ImageNet's mean and deviation.
PREPROCESSING = Preprocessing(224, 0.9, "bicubic", (127.5,) * 3, (127.5,) * 3)
TORCHVISION_PREPROCESSING = Preprocessing(224, 224 / 256, "bilinear")


class Mlp(nn.Module):
    """Two dense layers with GELU between them. (…, features) to the same."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1], name="fc2")(jax.nn.gelu(nn.Dense(self.hidden, name="fc1")(x), approximate=False))


class Attention(nn.Module):
    """Tokens attend to each other. (b, t, features) to the same; queries, keys and values are one dense layer."""

    heads: int

    @nn.compact
    def __call__(self, x):
        qkv = nn.Dense(3 * x.shape[-1], name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, self.heads, -1), 2, 0)
        return nn.Dense(x.shape[-1], name="proj")(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class EncoderBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)). Tokens (b, t, features) to the same."""

    heads: int
    mlp_features: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=1e-6, name="norm1")(x)
        x = x + Attention(self.heads, name="attn")(y)
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


TORCHVISION = (
    ("^position$", "encoder.pos_embedding"), ("^patch_embed/", "conv_proj."), ("^norm/", "encoder.ln."), ("^head/", "heads.head."),
    (r"^blocks_(\d+)", r"encoder.layers.encoder_layer_\1"), ("/norm", ".ln_"),
    ("/attn/qkv/", ".self_attention.in_proj_"), ("/attn/proj/", ".self_attention.out_proj."),
)  # fmt: skip
NAMINGS = {
    "timm": (("^class_token$", "cls_token"), ("^position$", "pos_embed"), ("^patch_embed/", "patch_embed.proj."), (r"^blocks_(\d+)", r"blocks.\1")),
    "torchvision": (*TORCHVISION, ("/fc1/", ".0."), ("/fc2/", ".3.")),
    "torchvision's released file": (*TORCHVISION, ("/fc", ".linear_")),  # saved before the layers were counted
}
