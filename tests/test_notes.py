"""What a run cannot do with a model is told: in the report's notes, or by an error before any work."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import solvers
from brecq_jax.formats import Uniform

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(64, 8)).astype(np.float32)
PARAMS = {name: jnp.asarray(DRAW.normal(size=shape) / 3, jnp.float32) for name, shape in {"a": (8, 16), "b": (16, 16), "c": (16, 3)}.items()}
LEARN = solvers.annealed(num_steps=20)


def quantized(apply_fn, params=PARAMS, calib_ds=X, **settings):
    settings = {"weights": Uniform(3), "activations": None, "solver": LEARN, "progress": False, "blocks": "layer", **settings}
    return brecq_jax.quantize(params, apply_fn, calib_ds, **settings)


def net(between):
    return lambda p, x: jax.nn.relu(between(jax.nn.relu(x @ p["a"]) @ p["b"])) @ p["c"]


def shrunk(h):
    return jax.lax.while_loop(lambda c: jnp.abs(c).max() > 1, lambda c: c * 0.9, h)


def called_back(h):
    return jax.pure_callback(lambda a: np.asarray(a) * 1, jax.ShapeDtypeStruct(h.shape, h.dtype), h, vmap_method="expand_dims")


@pytest.mark.parametrize("between, primitive", [(shrunk, "while"), (called_back, "pure_callback")])
def test_a_block_without_a_gradient_keeps_its_guess_and_is_named(between, primitive):
    found, guess = quantized(net(between)), quantized(net(between), solver=solvers.nearest())
    (note,) = [n for n in found.report.notes if "no gradient" in n]
    assert note.startswith("b is not learned") and primitive in note
    np.testing.assert_array_equal(found.params["b"].codes, guess.params["b"].codes)
    assert not found.report.blocks[1].kept and found.report.blocks[2].kept
    assert not any("gradient" in n for n in quantized(net(lambda h: h)).report.notes)


def test_a_while_loop_that_no_gradient_passes_stops_nothing():
    def apply_fn(p, x):
        return net(lambda h: h)(p, jax.lax.stop_gradient(shrunk(x)))

    for solver in (solvers.annealed(num_steps=30), solvers.brecq(num_steps=5)):  # Fisher weights go through the whole net
        report = quantized(apply_fn, solver=solver).report
        assert not any("gradient" in n for n in report.notes) and len(report.blocks) == 3
    assert any(b.kept for b in quantized(apply_fn).report.blocks)


def test_fisher_weights_that_have_no_gradient_are_refused_with_what_to_write():
    with pytest.raises(ValueError, match="none of its while.*annealed"):
        quantized(net(shrunk), solver=solvers.brecq(num_steps=5))


def masked(value):
    def apply_fn(p, x):
        h = x @ p["a"]
        scores = jnp.where(jnp.arange(16) < (x[:, :1] > 0) * 16, h, value)  # every score of half of the examples
        weights = jax.nn.softmax(scores, -1)
        return jnp.where(x[:, :1] > 0, weights @ p["b"], 0) @ p["c"]

    return apply_fn


def test_gradients_that_are_not_finite_are_told():
    notes = quantized(masked(-jnp.inf), blocks="net").report.notes
    assert any("gradients are not finite" in n and n.startswith("a..c: ") for n in notes)
    assert not any("finite" in n for n in quantized(masked(-1e9), blocks="net").report.notes)


def test_a_prediction_behind_which_there_is_no_gradient_does_not_count():
    report = quantized(net(shrunk), solver=solvers.annealed(num_steps=20, prediction=solvers.Prediction())).report
    assert any("does not count in a" in n and "while" in n for n in report.notes)
    assert any(n.startswith("b is not learned") for n in report.notes) and any(b.kept for b in report.blocks)


def test_large_values_of_half_precision_are_compared():
    params = {name: value.astype(jnp.float16) for name, value in PARAMS.items()}
    report = quantized(lambda p, x: net(lambda h: h)(p, x) * 500, params, X.astype(np.float16)).report
    assert report.notes == () and all(np.isfinite(b.error_after) for b in report.blocks)


def test_an_error_that_is_not_finite_is_told():
    report = quantized(lambda p, x: jnp.log(net(lambda h: h)(p, x) * 0 - 1)).report
    assert any("its error is not a number" in n for n in report.notes)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        return nn.Dense(3)(nn.relu(x))


@pytest.mark.parametrize("train", [True, False])
def test_train_mode_whose_statistics_are_dropped_is_noted(train):
    model = Normalised()
    variables = model.init(jax.random.key(0), X, train=False)

    def apply_fn(variables, x):
        return model.apply(variables, x, train=train, mutable=["batch_stats"])[0]

    notes = quantized(apply_fn, variables, solver=solvers.nearest()).report.notes
    assert any("not independent" in n and "after Dense_0/kernel" in n for n in notes) == train


@pytest.mark.parametrize(
    "mix",
    {
        "a mean that is broadcast": lambda h: h - jnp.broadcast_to(h.mean(0), h.shape),
        "a scalar": lambda h: h / jnp.abs(h).max(),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_all_examples_made_is_seen_where_it_meets_one(mix):
    assert any("not independent" in n for n in quantized(net(mix[1]), solver=solvers.nearest()).report.notes)


def test_independent_examples_are_not_suspected():
    def apply_fn(p, x):
        h = net(lambda h: h / jnp.sqrt(jnp.square(h).mean(-1, keepdims=True) + 1))(p, x)
        h, factor = jax.lax.fori_loop(0, 3, lambda i, c: (jnp.tanh(c[0]), c[1] / 2), (h, 1.0))
        h = jnp.concatenate([h * factor, h[: -len(h) % 8]])
        return {"out": h, "batch_mean": h.mean(0)}  # what all made, and no example meets

    assert not any("not independent" in n for n in quantized(apply_fn).report.notes)


def test_a_list_of_single_images_is_refused():
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, lambda h: h.mean((-3, -2)), nn.Dense(3)])
    images = DRAW.normal(size=(16, 8, 8, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), images)
    with pytest.raises(ValueError, match=r"the shape \(3,\) for every number of examples.*np.stack"):
        quantized(model.apply, variables, list(images))
    quantized(model.apply, variables, np.stack(list(images)), solver=solvers.nearest())


def test_inputs_that_tell_nothing_are_noted():
    calib_ds = {"mask": np.ones(len(X), bool), "x": np.zeros_like(X)}
    notes = quantized(lambda p, e: net(lambda h: h)(p, e["x"]), calib_ds=calib_ds, inputs=lambda e: e, solver=solvers.nearest()).report.notes
    assert notes == ("calib_ds['x']: all values are 0.0. Ranges and codes will be of no use on other inputs",)
    assert quantized(net(lambda h: h), solver=solvers.nearest()).report.notes == ()
