"""Integer inference against the fake-quantized model, and what its programs are made of."""

import dataclasses
import math
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import solvers
from brecq_jax._model import slice_qarray
from brecq_jax._qarray import quantize_array
from brecq_jax.deploy import to_integer
from brecq_jax.deploy.integer import PackedArray
from brecq_jax.formats import Binary, MinMax, Multipoint, RowCodebook, Ternary, Uniform

DRAW = np.random.default_rng(0)
BEGINNING = DRAW.bit_generator.state


@pytest.fixture(autouse=True)
def numbers_that_do_not_depend_on_other_tests():
    """Of 400 draws for one op eight hold a value half-way between two codes, which floats and integers may round apart."""
    DRAW.bit_generator.state = BEGINNING


def quantize(params, apply_fn, x, **plan):
    return brecq_jax.quantize(params, apply_fn, x, solver=solvers.nearest(), progress=False, **plan)


def program_memory(model, x):
    """What the compiled program of a call needs, weights being arguments."""
    return jax.jit(lambda model, x: model(x)).lower(model, x).compile().memory_analysis()


def conv(dims=("NHWC", "HWIO", "NHWC"), **settings):
    return lambda params, x: jax.lax.conv_general_dilated(x, params["w"], dimension_numbers=dims, **settings)


# name: (shape of one input, shape of the weight, apply_fn)
OPS = {
    "dense": ((24,), (24, 10), lambda params, x: x @ params["w"]),
    "dense, the weight first": ((24, 6), (10, 24), lambda params, x: jnp.einsum("oi,bis->obs", params["w"], x)),
    "heads": ((5, 12), (12, 3, 4), lambda params, x: jnp.einsum("bsi,ihd->bhsd", x, params["w"])),
    "a weight for each batch": ((4, 12), (4, 12, 5), lambda params, x: jnp.einsum("bgi,gio->bgo", x, params["w"])),
    "flipped weight": ((12,), (12, 10), lambda params, x: x @ params["w"][::-1]),
    "transposed weight": ((12,), (10, 12), lambda params, x: x @ params["w"].T),
    "conv": ((9, 9, 20), (3, 3, 20, 24), conv(window_strides=(1, 1), padding="SAME")),
    "conv of few channels": ((9, 9, 12), (3, 3, 12, 16), conv(window_strides=(1, 1), padding="SAME")),
    "conv of an image": ((9, 9, 3), (3, 3, 3, 8), conv(window_strides=(2, 2), padding=((2, 1), (0, 3)))),
    "1×1": ((6, 6, 8), (1, 1, 8, 12), conv(window_strides=(2, 2), padding="VALID")),
    "strided": ((9, 8, 20), (3, 2, 20, 6), conv(window_strides=(2, 1), padding="SAME")),
    "grouped": ((8, 8, 24), (3, 3, 6, 12), conv(window_strides=(1, 1), padding="SAME", feature_group_count=4)),
    "depthwise": ((9, 9, 12), (3, 3, 1, 12), conv(window_strides=(2, 2), padding="SAME", feature_group_count=12)),
    "depthwise, two each": ((9, 9, 6), (3, 3, 1, 12), conv(window_strides=(1, 1), padding="SAME", feature_group_count=6)),
    "dilated": ((9, 9, 20), (3, 3, 20, 6), conv(window_strides=(1, 1), padding="SAME", rhs_dilation=(2, 2))),
    "transposed conv": ((5, 5, 20), (3, 3, 20, 6), conv(window_strides=(1, 1), padding=((2, 2), (1, 3)), lhs_dilation=(2, 2))),
    "1-D": ((12, 5), (4, 5, 6), conv(("NWC", "WIO", "NWC"), window_strides=(1,), padding="SAME")),
    "channels first": ((5, 8, 8), (6, 5, 3, 3), conv(("NCHW", "OIHW", "NCHW"), window_strides=(1, 1), padding="SAME")),
}
BITS = {
    "W8A8": (Uniform(8, ranges=MinMax()), Uniform(8)),
    "W8A8 symmetric": (Uniform(8, symmetric=True), Uniform(8)),
    "W8A8 per tensor": (Uniform(8, granularity="per_tensor"), Uniform(8)),
    "W4A8": (Uniform(4), Uniform(8)),
    "W2A4": (Uniform(2, ranges=MinMax()), Uniform(4)),
    "sums of points, A8": (Multipoint(3, points=3, tolerance=0.1), Uniform(8)),
    "sums of signs, A4": (Binary(2), Uniform(4)),
    "ternary, A8": (Ternary("per_tensor"), Uniform(8)),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("op", OPS)
def test_one_op_on_integers_gives_what_it_gives_on_floats_with_the_same_codes(op, bits):
    (shape, kernel, apply_fn), (weights, activations) = OPS[op], BITS[bits]
    # Off centre: every zero point is somewhere inside its codes, and matters wherever a convolution pads.
    x = DRAW.normal(0.7, 1, (8, *shape)).astype(np.float32)
    params = {"w": DRAW.normal(0.3, 1, kernel).astype(np.float32)}
    quantized = quantize(params, apply_fn, x, weights=weights, activations=activations)
    integer = to_integer(quantized, x[:1] if op != "a weight for each batch" else x)
    assert integer.kept_float == ()
    chex.assert_trees_all_close(integer(x), quantized(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("weights", "activations", "preset"),
    [
        (Uniform(8), Uniform(8), None),
        (Uniform(4), Uniform(8), None),
        (Uniform(4, symmetric=True), Uniform(8), "brecq"),
        (Uniform(3), Uniform(8), "uniform"),
    ],
)
def test_a_network_on_integers_agrees_within_a_step_of_256_and_in_what_it_says(digits, weights, activations, preset):
    quantized = quantize(digits.variables, digits.model.apply, digits.train_images[:64], weights=weights, activations=activations, preset=preset)
    integer = to_integer(quantized, digits.test_images[:1])
    expected, got = (np.asarray(model(digits.test_images)) for model in (quantized, integer))
    step = np.ptp(expected) / 255
    assert np.mean(np.abs(got - expected) <= step) >= 0.999
    assert np.mean(got.argmax(1) == expected.argmax(1)) >= 0.999
    floats = {name for name, _ in integer.kept_float}
    assert floats == ({"stem/kernel"} if preset == "brecq" else set())


class Chain(nn.Module):
    """Two convolutions with what usually stands between them, and a head."""

    activation: object = jax.nn.relu

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(20, (3, 3), name="first")(x)
        x = self.activation(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = nn.Conv(18, (3, 3), use_bias=False, name="second")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize(
    ("activation", "clips"),
    [(jax.nn.relu, 1), (jax.nn.relu6, 1), (lambda x: jnp.clip(x, -1, 2), 2), (jax.nn.gelu, None), (jax.nn.leaky_relu, None)],
    ids=["relu", "relu6", "clip", "gelu", "leaky_relu"],
)
def test_bias_norm_and_a_clip_become_one_multiplication(activation, clips):
    model = Chain(activation)
    x = DRAW.normal(0, 1, (16, 8, 8, 6)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda a: a + DRAW.uniform(0.1, 0.5, a.shape).astype(np.float32), variables)
    quantized = quantize(variables, model.apply, x, weights=Uniform(4), activations=Uniform(8))
    integer = to_integer(quantized, x[:1])
    first, second, head = integer.taken
    assert (first.affine, second.affine, head.affine) == (4, 0, 1)  # + bias − mean · scale + bias
    assert (first.clips, first.codes_for) == ((clips, "second/kernel") if clips is not None else (0, None))
    expected, got = np.asarray(quantized(x)), np.asarray(integer(x))
    assert np.max(np.abs(got - expected)) <= np.ptp(expected) / 255


def test_a_clip_with_bounds_for_each_channel_is_not_taken_for_one():
    x, limits = DRAW.normal(size=(64, 16)).astype(np.float32), np.full(16, 6, np.float32)
    limits[[13, 9]] = 1.5, 3
    params = {"w": DRAW.normal(size=(16, 16)).astype(np.float32), "v": DRAW.normal(size=(16, 4)).astype(np.float32), "limits": limits}
    quantized = quantize(params, lambda p, x: jnp.clip(x @ p["w"], 0, p["limits"]) @ p["v"], x, weights=Uniform(8), activations=Uniform(8))
    integer = to_integer(quantized, x[:1])
    assert [taken.clips for taken in integer.taken] == [0, 0]
    assert np.max(np.abs(integer(x) - quantized(x))) <= np.ptp(quantized(x)) / 255


@pytest.mark.parametrize(
    ("weights", "activations", "apply_fn", "why"),
    [
        (Uniform(4), None, lambda p, x: x @ p["w"], "what it reads is float"),
        (None, Uniform(8), lambda p, x: x @ p["w"], "its weight is float"),
        (Uniform(4, granularity=6), Uniform(8), lambda p, x: x @ p["w"], "a scale for every 6 elements"),
        (Uniform(4), Uniform(8), lambda p, x: x @ (2 * p["w"]), "its weight goes through mul first"),
        (Uniform(4), Uniform(8), lambda p, x: (x @ p["w"]) @ p["w"].T, "varies along what a sum"),
    ],
)
def test_what_stays_float_is_said_with_the_reason_and_computed_all_the_same(weights, activations, apply_fn, why):
    x, params = DRAW.normal(size=(16, 12)).astype(np.float32), {"w": DRAW.normal(size=(12, 7)).astype(np.float32)}
    quantized = quantize(params, apply_fn, x, weights=weights, activations=activations)
    integer = to_integer(quantized, x[:1])
    assert why in str(integer)
    chex.assert_trees_all_close(integer(x), quantized(x), rtol=1e-5, atol=1e-5)


def test_a_stacked_weight_is_taken_slice_by_slice():
    x = DRAW.normal(size=(16, 12)).astype(np.float32)
    params = {"w": DRAW.normal(size=(3, 12, 12)).astype(np.float32)}

    def apply_fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    quantized = quantize(params, apply_fn, x, weights=Uniform(4), activations=Uniform(8))
    integer = to_integer(quantized, x[:1])
    assert len(integer.taken) == 3
    assert np.max(np.abs(integer(x) - quantized(x))) < 2 / 255


def test_the_program_multiplies_int8_and_never_makes_a_float_of_a_weight(digits):
    quantized = quantize(digits.variables, digits.model.apply, digits.train_images[:64], weights=Uniform(4), activations=Uniform(8))
    integer = to_integer(quantized, digits.test_images[:1])
    lowered = jax.jit(lambda model, x: model(x)).lower(integer, digits.test_images[:8])
    products = [line for line in lowered.as_text().splitlines() if re.search(r"stablehlo\.(convolution|dot_general)", line)]
    assert len(products) == 9
    assert all(re.search(r"\(tensor<[\dx]+xi8>, tensor<[\dx]+xi8>\) -> tensor<[\dx]+xi32>", line) for line in products)
    shapes = {"x".join(map(str, a.shape)) for a in jax.tree.leaves(quantized.dequantized()) if a.ndim > 1}
    assert not [s for s in shapes if f"tensor<{s}xf32>" in lowered.as_text()]
    compiled = lowered.compile().as_text()
    assert re.search(r"= s32\[[\d,]+\]\S* convolution\(", compiled)
    assert not re.search(r"= (f32|s32)\[[\d,]+\]\S* convert\(\S*kernel", compiled)


TILED = {
    "in × out": lambda w, x: x @ w,
    "out × in": lambda w, x: jnp.einsum("bi,oi->bo", x, w),
    "the weight first": lambda w, x: jnp.einsum("io,bi->ob", w, x).T,
}


@pytest.mark.parametrize("layout", TILED)
@pytest.mark.parametrize("format", [Uniform(2), Uniform(3), Uniform(4, granularity=128), Uniform(8, granularity="per_tensor")], ids=str)
def test_the_memory_of_a_weight_only_model_is_that_of_its_packed_bytes_and_one_tile(format, layout):
    format = dataclasses.replace(format, ranges=MinMax())
    params = {f"layer{n}": DRAW.normal(0, 0.03, (1024, 1024)).astype(np.float32) for n in range(4)}
    x = DRAW.normal(size=(8, 1024)).astype(np.float32)

    def apply_fn(params, x):
        for n in range(4):
            x = jnp.tanh(TILED[layout](params[f"layer{n}"], x))
        return x

    quantized = quantize(params, apply_fn, x, weights=format, activations=None)
    packed = to_integer(quantized, x)
    memory = program_memory(packed, x)
    grids = sum(a.nbytes for q in quantized.params.values() for a in q.grid)
    assert memory.argument_size_in_bytes <= 4 * 1024 * 1024 * format.bits // 8 + grids + x.nbytes + 1024
    assert memory.temp_size_in_bytes <= 1.5 * 2**20  # one of these weights alone is four times a tile
    chex.assert_trees_all_close(packed(x), quantized(x), rtol=1e-4, atol=1e-5)


def test_tiles_of_a_bfloat16_model_are_added_up_in_float32():
    w = jnp.asarray(DRAW.normal(0, 0.03, (4096, 1024)), jnp.bfloat16)
    x = jnp.asarray(DRAW.normal(size=(8, 4096)), jnp.bfloat16)
    quantized = quantize({"w": w}, lambda p, x: x @ p["w"], x, weights=Uniform(4, ranges=MinMax()), activations=None)
    exact = np.asarray(x, np.float32) @ np.asarray(quantized.dequantized()["w"], np.float32)
    errors = [np.linalg.norm(np.asarray(model(x), np.float32) - exact) for model in (quantized, to_integer(quantized, x))]
    assert errors[1] < 1.2 * errors[0]


CONVOLVED = {  # dimension numbers, shape of the kernel
    "HWIO": (("NHWC", "HWIO", "NHWC"), (3, 3, 192, 256)),
    "OIHW": (("NCHW", "OIHW", "NCHW"), (256, 192, 3, 3)),
    "IHWO": (("NHWC", "IHWO", "NCHW"), (192, 3, 3, 256)),
    "HOWI": (("NHWC", "HOWI", "NHWC"), (3, 256, 3, 192)),
}


@pytest.mark.parametrize(
    ("layout", "format", "activations"),
    [("HWIO", Uniform(4, granularity=36), None), ("OIHW", Uniform(3), None), ("IHWO", Uniform(8), Uniform(8)), ("HOWI", Uniform(3), Uniform(8))],
    ids=str,
)
def test_convolutions_in_tiles_hold_packed_bytes_and_are_exact(format, activations, layout):
    dims, shape = CONVOLVED[layout]
    params = {f"layer{n}": DRAW.normal(0, 0.03, shape).astype(np.float32) for n in range(4)}
    x = DRAW.normal(size=(8, 192, 6, 6) if dims[0] == "NCHW" else (8, 6, 6, 192)).astype(np.float32)

    def apply_fn(params, x):
        return sum(jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=dims) for w in params.values())

    quantized = quantize(params, apply_fn, x, weights=dataclasses.replace(format, ranges=MinMax()), activations=activations)
    packed = to_integer(quantized, x)
    chex.assert_trees_all_close(packed(x), quantized(x), rtol=1e-3, atol=1e-3)
    memory = program_memory(packed, x)
    if activations is None:
        assert memory.temp_size_in_bytes <= 1.2 * 2**20  # the four kernels are 7 MB


CHAINED = {
    "dense": (lambda w, x: x @ w, (256, 256), (256,)),
    "depthwise": (lambda w, x: conv(window_strides=(1, 1), padding="SAME", feature_group_count=4096)({"w": w}, x), (5, 5, 1, 4096), (2, 2, 4096)),
}


@pytest.mark.parametrize("format", [Uniform(4, ranges=MinMax()), RowCodebook(4), Multipoint(bits=2, points=2)], ids=["uniform", "codebook", "multipoint"])
@pytest.mark.parametrize("activations", [None, Uniform(8)], ids=str)
@pytest.mark.parametrize("kind", CHAINED)
def test_small_weights_of_any_format_are_unpacked_one_after_the_other(format, activations, kind):
    multiply, shape, data = CHAINED[kind]
    params, x = {f"layer{n}": DRAW.normal(0, 0.1, shape).astype(np.float32) for n in range(16)}, DRAW.normal(size=(8, *data)).astype(np.float32)

    def apply_fn(params, x):
        for w in params.values():
            x = jnp.tanh(multiply(w, x))
        return x

    quantized = quantize(params, apply_fn, x, weights=format, activations=activations)
    packed = to_integer(quantized, x[:1])
    chex.assert_trees_all_close(packed(x[:1]), quantized(x[:1]), rtol=1e-3, atol=2e-2)
    memory = program_memory(packed, x[:1])
    weights = 2 if isinstance(format, Multipoint) and activations else 1  # a product for each of two points, each with its own int8 weight
    assert memory.temp_size_in_bytes <= weights * 16 * math.prod(shape)  # four of the sixteen in float32, all of them in int8


@pytest.mark.parametrize("activations", [None, Uniform(8)], ids=str)
def test_a_weight_that_many_ops_read_is_unpacked_once(activations):
    params, x = {"w": DRAW.normal(0, 0.1, (64, 64)).astype(np.float32)}, DRAW.normal(size=(8, 64)).astype(np.float32)

    def apply_fn(params, x):
        for _ in range(20):
            x = jnp.tanh(x @ params["w"])
        return x

    packed = to_integer(quantize(params, apply_fn, x, weights=Uniform(4), activations=activations), x)
    shifts = re.findall(r"shift_right_logical \S+", str(jax.make_jaxpr(lambda model, x: model(x))(packed, x)))
    assert len(shifts) <= 4  # two for the two codes of a byte, and those of the float copy that nothing reads


@pytest.mark.parametrize(("bits", "elements"), [(4, 64), (3, 64), (3, 9)])
def test_a_slice_of_a_packed_stack_is_the_slice_of_what_it_unpacks_to(bits, elements):
    """Of nine codes of three bits no slice but the first starts with a byte."""

    def apply_fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]

    side = math.isqrt(elements)
    stack = DRAW.normal(size=(4, side, side)).astype(np.float32)
    graph = brecq_jax.trace(apply_fn, stack, jnp.zeros((8, side)))
    quantized = quantize(stack, apply_fn, DRAW.normal(size=(8, side)).astype(np.float32), weights=Uniform(bits), activations=None)
    for weight in graph.weights.values():
        chex.assert_trees_all_equal(PackedArray.of(quantized.params).slice(weight).qarray(), slice_qarray(quantized.params, weight))


@pytest.mark.parametrize("activations", [None, Uniform(8)], ids=str)
def test_layers_of_a_packed_stack_are_unpacked_one_after_the_other(activations):
    def apply_fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0]

    stack, x = DRAW.normal(0, 0.1, (16, 256, 256)).astype(np.float32), DRAW.normal(size=(8, 256)).astype(np.float32)
    quantized = quantize(stack, apply_fn, x, weights=Uniform(4), activations=activations)
    packed = to_integer(quantized, x)
    chex.assert_trees_all_close(packed(x), quantized(x), rtol=1e-3, atol=2e-2)
    memory = program_memory(packed, x)
    assert memory.temp_size_in_bytes <= stack.nbytes // 4  # in int8 it is as large as this


@pytest.mark.parametrize("layout", TILED)
def test_products_of_every_layout_are_exact_on_integers(layout):
    params, x = {"w": DRAW.normal(size=(1024, 1024)).astype(np.float32)}, DRAW.normal(size=(8, 1024)).astype(np.float32)
    quantized = quantize(params, lambda p, x: TILED[layout](p["w"], x), x, weights=Uniform(4, ranges=MinMax()), activations=Uniform(8))
    integer = to_integer(quantized, x)
    assert integer.kept_float == ()
    chex.assert_trees_all_close(integer(x), quantized(x), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_packed_array_unpacks_to_what_was_packed(bits):
    array = quantize_array(DRAW.normal(size=(5, 7, 3)).astype(np.float32), Uniform(bits, granularity="per_channel"), (1,))
    packed = PackedArray.of(array)
    assert packed.packed.size == -(-105 * bits // 8)
    chex.assert_trees_all_equal(packed.qarray(), array)


def test_other_lengths_than_those_it_was_made_for_are_refused():
    x = DRAW.normal(size=(16, 4, 8)).astype(np.float32)
    params = {name: DRAW.normal(size=shape).astype(np.float32) for name, shape in {"w": (8, 8), "at": (4, 8), "v": (8, 3)}.items()}

    def apply_fn(params, x):
        return jax.nn.relu(x @ params["w"] + params["at"][: x.shape[1]]) @ params["v"]

    quantized = quantize(params, apply_fn, x, weights=Uniform(8), activations=Uniform(8))
    integer = to_integer(quantized, x[:1, :1])
    assert np.max(np.abs(integer(x[:, :1]) - quantized(x[:, :1]))) <= np.ptp(quantized(x)) / 255
    with pytest.raises(ValueError, match=r"made for inputs \(batch, 1, 8\) and got \(batch, 4, 8\)"):
        integer(x)


def test_only_a_quantized_model_is_taken():
    with pytest.raises(TypeError, match="Pass what quantize"):
        to_integer({"w": 1}, np.zeros((1, 2)))
