"""Means of channels after the pass, through a whole model, saved and restored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import passes, solvers
from brecq_jax.formats import Affine, RowUniform, Ternary, Uniform


def apply(params, x):
    return jax.nn.relu(x @ params["first"] + params["bias"]) @ params["second"]


@pytest.fixture(scope="module")
def model():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"first": jax.random.normal(keys[0], (8, 12)) + 0.4, "bias": jnp.ones(12), "second": jax.random.normal(keys[1], (12, 5))}
    x = 1 + jax.random.normal(keys[2], (64, 8))
    quantized = brecq_jax.quantize(params, apply, x, weights=Uniform(2), activations=None, solver=solvers.nearest(), progress=False)
    return params, x, quantized


def test_every_channel_has_its_float_mean_and_the_codes_stay(model):
    params, x, quantized = model
    corrected = passes.correct_means(params, quantized)
    for name in ("first", "second"):
        q, before = corrected.params[name], quantized.params[name]
        np.testing.assert_allclose(q.decode().mean(0), params[name].mean(0), atol=1e-5)
        np.testing.assert_array_equal(q.codes, before.codes)
        assert isinstance(q.format, Affine) and q.storage_bits > before.storage_bits
    assert corrected.params["bias"] is quantized.params["bias"]
    errors = [float(jnp.mean(jnp.square(q(x) - apply(params, x)))) for q in (quantized, corrected)]
    assert errors[1] < errors[0]


def test_twice_is_once_and_files_keep_it(model, tmp_path):
    params, x, quantized = model
    once = passes.correct_means(params, quantized)
    twice = passes.correct_means(params, once)
    np.testing.assert_allclose(twice(x), once(x), rtol=1e-5, atol=1e-5)
    brecq_jax.save(tmp_path / "model", once)
    np.testing.assert_array_equal(brecq_jax.restore(tmp_path / "model", apply)(x), once(x))


def test_weights_without_a_zero_point_stay_as_they_are(model):
    params, x, _ = model
    params = {**params, "table": jax.random.normal(jax.random.key(3), (7, 8))}
    read = lambda params, ids: apply(params, params["table"][ids])  # noqa: E731
    ids = np.arange(16) % 7
    settings = {"activations": None, "solver": solvers.nearest(), "progress": False}
    mixed = brecq_jax.quantize(params, read, ids, weights={"table": RowUniform(4), "first": Ternary(), ".*": Uniform(2)}, **settings)
    corrected = passes.correct_means(params, mixed)
    np.testing.assert_allclose(corrected.params["second"].decode().mean(0), params["second"].mean(0), atol=1e-5)
    for name in ("table", "first", "bias"):
        assert corrected.params[name] is mixed.params[name]
    nothing = brecq_jax.quantize(params, read, ids, weights={"table": RowUniform(4), ".*": None}, **settings)
    with pytest.raises(ValueError, match="no weight has a zero point to move; table is in 4 bit.*\n  Quantize with weights=Uniform"):
        passes.correct_means(params, nothing)


def test_params_of_another_model_are_refused(model):
    params, _, quantized = model
    with pytest.raises(ValueError, match="Pass the float parameters"):
        passes.correct_means({**params, "first": jnp.ones((8, 3))}, quantized)
