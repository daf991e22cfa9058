"""A small residual network for scikit-learn's 8×8 digits, trained in seconds: for tests, notebooks and first steps."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax


class Digits(NamedTuple):
    """A trained network and its data. Images (n, 8, 8, 1) in [0, 1], labels (n,)."""

    model: "DigitsNet"
    variables: Any
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Residual(nn.Module):
    """Two convolutions with batch norm, and a shortcut."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train: bool):
        y = nn.Conv(self.features, (3, 3), (self.stride, self.stride), use_bias=False, name="conv1")(x)
        y = jax.nn.relu(nn.BatchNorm(not train, momentum=0.9, name="bn1")(y))
        y = nn.BatchNorm(not train, momentum=0.9, name="bn2")(nn.Conv(self.features, (3, 3), use_bias=False, name="conv2")(y))
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), (self.stride, self.stride), use_bias=False, name="shortcut")(x)
        return jax.nn.relu(x + y)


class DigitsNet(nn.Module):
    """Images (batch, 8, 8, 1) to logits (batch, 10)."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = jax.nn.relu(nn.Conv(16, (3, 3), name="stem")(x))
        for i, (features, stride) in enumerate(((16, 1), (32, 2), (32, 1))):
            x = Residual(features, stride, name=f"blocks_{i}")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


def train_digits(seed: int = 0, steps: int = 300, batch_size: int = 128) -> Digits:
    """Train on two thirds of the digits; test on the rest."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra, needed here alone

    source = load_digits()
    order = np.random.default_rng(seed).permutation(len(source.target))
    images = (source.images[order, :, :, None] / 16).astype(np.float32)
    labels = source.target[order]
    cut = len(labels) * 2 // 3
    key_init, key_draw = jax.random.split(jax.random.key(seed))
    model = DigitsNet()
    variables = model.init(key_init, images[:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    data = jnp.asarray(images[:cut]), jnp.asarray(labels[:cut])

    @jax.jit
    def step(variables, state, i):
        rows = jax.random.randint(jax.random.fold_in(key_draw, i), (batch_size,), 0, cut)

        def loss(params):
            logits, updates = model.apply({**variables, "params": params}, data[0][rows], train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, data[1][rows]).mean(), updates

        (_, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        change, state = optimizer.update(grads, state)
        return {"params": optax.apply_updates(variables["params"], change), **updates}, state

    state = optimizer.init(variables["params"])
    for i in range(steps):
        variables, state = step(variables, state, i)
    return Digits(model, variables, images[:cut], labels[:cut], images[cut:], labels[cut:])
