"""A small GPT: one block scanned over stacked weights, and a head that is the embedding table again."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

LEARNING_RATE, WARMUP = 3e-3, 50  # guesses that train the default in minutes


class DecoderBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)). Tokens (b, t, features) to the same; each attends to itself and to those before."""

    heads: int
    mlp_features: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm1")(x)
        q, k, v = (nn.Dense(x.shape[-1], name=n)(y).reshape(*x.shape[:2], self.heads, -1) for n in ("query", "key", "value"))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + nn.Dense(x.shape[-1], name="out")(y)
        y = nn.Dense(self.mlp_features, name="fc1")(nn.LayerNorm(name="norm2")(x))
        return x + nn.Dense(x.shape[-1], name="fc2")(jax.nn.gelu(y))


class Decoder(nn.Module):
    """Token ids (batch, t) to logits (batch, t, vocabulary) of the tokens that follow. `layers/…` holds the weights of all layers, stacked.

    Source: Radford et al. 2019 (GPT-2), section 2.3: norms before each half and one at the end, the head tied to the table.
    """

    vocabulary: int = 256
    positions: int = 64
    features: int = 64
    depth: int = 4
    heads: int = 4
    mlp_features: int = 256

    @nn.compact
    def __call__(self, ids):
        if ids.shape[1] > self.positions:
            raise ValueError(f"Decoder: {ids.shape[1]} tokens, and positions for {self.positions}: cut the ids or set `positions`.")
        table = nn.Embed(self.vocabulary, self.features, name="token")
        x = table(ids) + nn.Embed(self.positions, self.features, name="position")(jnp.arange(ids.shape[1])[None])
        scanned = nn.scan(lambda block, x, _: (block(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        x, _ = scanned(DecoderBlock(self.heads, self.mlp_features, name="layers"), x, None)
        return table.attend(nn.LayerNorm(name="norm")(x))


class TrainedDecoder(NamedTuple):
    """`train`, `test`: ids (windows, positions)."""

    model: Decoder
    variables: dict
    train: np.ndarray
    test: np.ndarray


def train_decoder(text: str, model: Decoder = Decoder(), num_steps: int = 1_000, batch_size: int = 16, seed: int = 0) -> TrainedDecoder:
    """A decoder of the bytes of a text, trained on its first nine tenths.

    Raises:
      ValueError: a text of fewer bytes than twenty windows of `model.positions`.
    """
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    windows = ids[: len(ids) // model.positions * model.positions].reshape(-1, model.positions)
    if len(windows) < 20:
        raise ValueError(f"train_decoder: {len(ids)} bytes are {len(windows)} windows of {model.positions}: pass a longer text.")
    stop = len(windows) * 9 // 10
    stream, test = jnp.asarray(windows[:stop].reshape(-1)), windows[stop:]
    key_init, key_draw = jax.random.split(jax.random.key(seed))
    variables = model.init(key_init, windows[:1])
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(WARMUP, num_steps // 2), num_steps))

    @jax.jit
    def step(variables, state, n):
        starts = jax.random.randint(jax.random.fold_in(key_draw, n), (batch_size, 1), 0, len(stream) - model.positions)
        batch = stream[starts + jnp.arange(model.positions)]
        change, state = optimizer.update(jax.grad(lambda v: jnp.mean(surprise(model.apply(v, batch), batch)))(variables), state, variables)
        return optax.apply_updates(variables, change), state

    state = optimizer.init(variables)
    for n in range(num_steps):
        variables, state = step(variables, state, n)
    return TrainedDecoder(model, variables, windows[:stop], test)


def surprise(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """−log p of every id but the first, (batch, t − 1), given those before it. Perplexity is exp of its mean."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
