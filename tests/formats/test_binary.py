"""Ternary and binary weights, against the released code of BinaryBERT.

The numbers are what huawei-noah/Pretrained-Language-Model at 0598f02 gives, BinaryBERT/transformer/binary_model_init.py, ternarize and
binarize in float64, PyTorch 2.13.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import solvers
from brecq_jax._qarray import quantize_array
from brecq_jax.formats import Binary, Ternary, Uniform

ROWS = np.array(
    [
        [0.13, -0.13, 0.64, 0.1, -0.54, 0.36, 1.3, 0.95],
        [-0.7, -1.27, -0.62, 0.04, -2.33, -0.22, -1.25, -0.73],
        [-0.54, -0.32, 0.41, 1.04, -0.13, 1.37, -0.67, 0.35],
    ],
    np.float32,
)
TERNARY_SCALES = {"per_tensor": [0.9964285620621273], "per_channel": [0.8574999868869781, 1.2559999823570251, 0.9050000011920929]}
BINARY_SCALES = {"per_tensor": [0.6724999938160181], "per_channel": [0.5187499942258, 0.8949999893084168, 0.6037499979138374]}
TERNARY_LEVELS = {
    "per_tensor": [[0, 0, 1, 0, -1, 0, 1, 1], [-1, -1, -1, 0, -1, 0, -1, -1], [-1, 0, 0, 1, 0, 1, -1, 0]],
    "per_channel": [[0, 0, 1, 0, -1, 0, 1, 1], [-1, -1, 0, 0, -1, 0, -1, -1], [-1, 0, 0, 1, 0, 1, -1, 0]],
}

each_granularity = pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])


@each_granularity
def test_ternary_weights_are_those_of_the_released_code(granularity):
    format = Ternary(granularity)
    grid = format.fit(jnp.asarray(ROWS))
    np.testing.assert_allclose(grid.scale.ravel(), TERNARY_SCALES[granularity], rtol=1e-6)
    decoded = format.decode(format.encode(jnp.asarray(ROWS), grid), grid)
    np.testing.assert_allclose(decoded, np.array(TERNARY_SCALES[granularity])[:, None] * TERNARY_LEVELS[granularity], rtol=1e-6)


@each_granularity
def test_binary_weights_are_those_of_the_released_code(granularity):
    format = Binary(granularity=granularity)
    grid = format.fit(jnp.asarray(ROWS))
    decoded = format.decode(format.encode(jnp.asarray(ROWS), grid), grid)
    np.testing.assert_allclose(decoded, np.array(BINARY_SCALES[granularity])[:, None] * np.sign(ROWS), rtol=1e-6)


def test_normal_weights_have_the_constants_that_integrals_give():
    """θ = 0.7 √(2/π), P(|w| < θ) and E[|w| given |w| > θ]."""
    rows = jax.random.normal(jax.random.key(0), (1, 400_000))
    format = Ternary()
    grid = format.fit(rows)
    zeros = np.mean(np.asarray(format.encode(rows, grid)) == 1)
    np.testing.assert_allclose([float(grid.threshold.squeeze()), zeros, float(grid.scale.squeeze())], [0.55852, 0.42351, 1.18416], rtol=5e-3)


@each_granularity
def test_a_second_point_writes_what_the_first_left_over(granularity):
    rows = jax.random.t(jax.random.key(1), 4.0, (5, 64))
    errors = []
    for points in (1, 2):
        format = Binary(points, granularity)
        grid = format.fit(rows)
        errors.append(float(jnp.sum((format.decode(format.encode(rows, grid), grid) - rows) ** 2)))
    axis = None if granularity == "per_tensor" else 1
    first = jnp.mean(jnp.abs(rows), axis, keepdims=True)
    second = jnp.mean(jnp.abs(jnp.abs(rows) - first), axis, keepdims=True)
    np.testing.assert_allclose(grid.scale[..., 0], jnp.maximum(first, second), rtol=1e-5)
    np.testing.assert_allclose((grid.scale * grid.ratio)[..., 0], jnp.minimum(first, second), rtol=1e-5)
    assert errors[1] < errors[0]


def test_importance_weighs_the_means():
    rows, weight = jnp.array([[1.0, -3.0, 0.1]]), jnp.array([[3.0, 1.0, 0.0]])
    np.testing.assert_allclose(Binary().fit(rows, weight).scale.ravel(), [1.5], rtol=1e-6)
    np.testing.assert_allclose(Ternary().fit(rows, 1 + weight).scale.ravel(), [(4 * 1 + 2 * 3) / 6], rtol=1e-6)


def test_storage_is_what_codes_and_scales_take():
    codes = jnp.zeros((6, 40), jnp.uint8)
    for format, bits in (
        (Binary(), 240 + 6 * 32), (Binary(granularity="per_tensor"), 240 + 32), (Binary(2, "per_tensor"), 480 + 64),
        (Ternary("per_tensor"), 480 + 64), (Ternary(), 480 + 6 * 64),
    ):  # fmt: skip
        assert format.storage_bits(codes, jax.eval_shape(format.fit, jax.ShapeDtypeStruct((6, 40), jnp.float32))) == bits


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(Binary, dict(points=3)), (Binary, dict(points=True)), (Binary, dict(granularity=8)), (Ternary, dict(granularity="row"))],
)
def test_what_cannot_be_meant_is_refused(kind, arguments):
    with pytest.raises(Exception, match="write|granularity"):
        kind(**arguments)


@pytest.mark.parametrize(
    ("format", "words"),
    [(Ternary("per_tensor"), "ternary per_tensor"), (Binary(), "binary per_channel"), (Binary(2), "two binary points per_channel")],
)
def test_the_plan_names_it_and_a_preset_keeps_first_and_last_layer_at_eight_bits(format, words):
    params = {f"w{i}": jax.random.normal(jax.random.key(i), (8, 8)) for i in range(3)}

    def apply_fn(params, x):
        return jax.nn.relu(jax.nn.relu(x @ params["w0"]) @ params["w1"]) @ params["w2"]

    x = jax.random.normal(jax.random.key(9), (16, 8))
    quantized = brecq_jax.quantize(params, apply_fn, x, weights=format, activations=None, preset="uniform", solver=solvers.nearest(), progress=False)
    assert quantized.params["w1"].format == format and words in quantized.report.plan
    assert {type(quantized.params[name].format) for name in ("w0", "w2")} == {Uniform}


def test_points_are_themselves_where_a_solver_made_the_scale_smaller_than_the_threshold():
    grid = Ternary().fit(jnp.array([[1.0, -1.0, 0.1, 0.0]]))
    smaller = grid._replace(scale=grid.scale / 2)  # 0.5, and the threshold 0.3675
    assert Ternary().encode(jnp.array([[0.5, -0.5, 0.36, 0.0]]), smaller).tolist() == [[2, 0, 1, 1]]
    smallest = grid._replace(scale=grid.scale / 8)
    codes = jnp.array([[2, 0, 1, 1]], jnp.uint8)
    assert jnp.array_equal(Ternary().encode(Ternary().decode(codes, smallest), smallest), codes)


@pytest.mark.parametrize("format", [Ternary("per_tensor"), Binary(granularity="per_tensor"), Binary(2, "per_tensor")], ids=str)
def test_layers_of_a_stack_have_their_own_scales(format):
    params = {"w": jax.random.normal(jax.random.key(0), (3, 8, 8)) * jnp.array([1.0, 2.0, 4.0])[:, None, None]}

    def apply_fn(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    x = jax.random.normal(jax.random.key(1), (16, 8))
    quantized = brecq_jax.quantize(params, apply_fn, x, weights=format, activations=None, preset=None, solver=solvers.nearest(), progress=False)
    alone = jnp.stack([quantize_array(w, format, (1,)).decode() for w in params["w"]])
    np.testing.assert_allclose(quantized(x), apply_fn({"w": alone}, x), rtol=1e-5, atol=1e-6)
