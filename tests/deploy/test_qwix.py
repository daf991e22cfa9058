"""Our rounding in qwix's trees, run by qwix's own provider."""

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
import qwix as stock

import brecq_jax
from brecq_jax import solvers
from brecq_jax.deploy import qwix
from brecq_jax.formats import Uniform

DRAW = np.random.default_rng(0)


class Dense(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="second")(jax.nn.relu(nn.Dense(32, name="first")(x)))


class Conv(nn.Module):
    """A convolution, plain and depthwise, and a head."""

    @nn.compact
    def __call__(self, x):
        x = jax.nn.relu(nn.Conv(12, (3, 3), name="plain")(x))
        x = jax.nn.relu(nn.Conv(12, (3, 3), feature_group_count=12, name="depthwise")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def both(model, x, **plan):
    """(ours, qwix's model, the parameters we made for it)"""
    variables = model.init(jax.random.key(0), x)
    quantized = brecq_jax.quantize(variables, model.apply, x, solver=solvers.nearest(), progress=False, **plan)
    graph = brecq_jax.trace(model.apply, variables, x)
    theirs = stock.quantize_model(model, stock.PtqProvider(qwix.rules(graph, brecq_jax.make_plan(graph, **plan))))
    return quantized, theirs, qwix.to_qwix(quantized, jax.eval_shape(theirs.init, jax.random.key(0), x))


@pytest.mark.parametrize(("bits", "groups"), [(8, None), (4, None), (3, None), (2, None), (4, 8)])
def test_the_stock_provider_runs_our_rounding_without_a_difference(bits, groups):
    x = DRAW.normal(size=(16, 24)).astype(np.float32)
    quantized, theirs, params = both(Dense(), x, weights=Uniform(bits, symmetric=True, granularity=groups), activations=None)
    np.testing.assert_array_equal(theirs.apply(params, x), Dense().apply(quantized.dequantized(), x))
    if groups is None:
        chex.assert_trees_all_equal(qwix.from_qwix(params, Dense().apply).params, quantized.params)


def test_convolutions_pass_at_8_bits_with_ranges_of_activations_of_qwix_s_own():
    x = DRAW.normal(size=(16, 8, 8, 3)).astype(np.float32)
    quantized, theirs, params = both(Conv(), x, weights=Uniform(8, symmetric=True), activations=Uniform(8))
    expected, got = quantized(x), theirs.apply(params, x)
    assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)
    kernel = params["params"]["plain"]["kernel"].array
    np.testing.assert_array_equal(stock.dequantize(kernel), quantized.dequantized()["params"]["plain"]["kernel"])


def test_what_qwix_quantized_is_a_quantized_model_here():
    x = DRAW.normal(size=(16, 24)).astype(np.float32)
    variables = Dense().init(jax.random.key(0), x)
    theirs = stock.quantize_model(Dense(), stock.PtqProvider([stock.QuantizationRule(weight_qtype="int4")]))
    abstract = jax.eval_shape(theirs.init, jax.random.key(0), x)
    params = {"params": stock.quantize_params(variables["params"], abstract["params"])}
    ours = qwix.from_qwix(params, Dense().apply)
    np.testing.assert_array_equal(Dense().apply(ours.dequantized(), x), theirs.apply(params, x))
    assert ours.params["params"]["first"]["kernel"].format == Uniform(4, symmetric=True, granularity="per_channel")


@pytest.mark.parametrize(
    ("weights", "activations", "words"),
    [
        (Uniform(4, symmetric=True), Uniform(8), "convolves equal types alone"),
        (Uniform(8, symmetric=True), None, "reads float activations"),
        (Uniform(8), Uniform(8), "symmetric=True"),
        (Uniform(8, symmetric=True, granularity=3), Uniform(8), "for convolutions per channel"),
    ],
)
def test_a_plan_that_qwix_cannot_run_is_refused_with_what_to_write(weights, activations, words):
    x = DRAW.normal(size=(16, 8, 8, 3)).astype(np.float32)
    graph = brecq_jax.trace(Conv().apply, Conv().init(jax.random.key(0), x), x)
    with pytest.raises(ValueError, match=words):
        qwix.rules(graph, brecq_jax.make_plan(graph, weights, activations))


def test_rules_that_do_not_fit_the_model_are_refused_with_the_weight_s_name():
    x = DRAW.normal(size=(16, 24)).astype(np.float32)
    variables = Dense().init(jax.random.key(0), x)
    quantized = brecq_jax.quantize(
        variables, Dense().apply, x, weights={"first.*": Uniform(4, symmetric=True)}, activations=None, solver=solvers.nearest(), progress=False
    )
    for module, words in (("first|second", "second/kernel is float here"), ("nothing", "first/kernel is quantized here")):
        rule = stock.QuantizationRule(module_path=module, weight_qtype="int4")
        theirs = stock.quantize_model(Dense(), stock.PtqProvider([rule]))
        with pytest.raises(ValueError, match=words):
            qwix.to_qwix(quantized, jax.eval_shape(theirs.init, jax.random.key(0), x))
