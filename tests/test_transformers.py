"""Encoders and scanned decoders through the front door: masks, token dicts, tied heads, ranges for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import deploy, models, solvers
from brecq_jax._blocks import partition
from brecq_jax._qarray import is_qarray
from brecq_jax.formats import PerToken, Sparq, Uniform

LENGTH = 12


@pytest.fixture(scope="module")
def encoder():
    """(model, variables, tokens): a small BERT of random weights; the examples are of different lengths."""
    model = models.SentenceEncoder(vocabulary=50, positions=16, features=32, depth=2, heads=4, mlp_features=64)
    key_init, key_ids, key_length = jax.random.split(jax.random.key(0), 3)
    ids = jax.random.randint(key_ids, (48, LENGTH), 0, 50)
    mask = (jnp.arange(LENGTH) < jax.random.randint(key_length, (48, 1), 3, LENGTH + 1)).astype(jnp.int32)
    tokens = {"input_ids": np.asarray(ids), "attention_mask": np.asarray(mask)}
    variables = jax.jit(model.init)(key_init, tokens)
    return model, jax.tree.map(lambda x: 2 * x if x.ndim == 2 else x, variables), tokens


@pytest.fixture(scope="module")
def decoder():
    """(model, variables, ids): three scanned layers."""
    model = models.Decoder(vocabulary=40, positions=LENGTH, features=16, depth=3, heads=2, mlp_features=32)
    ids = np.asarray(jax.random.randint(jax.random.key(1), (40, LENGTH), 0, 40))
    return model, jax.jit(model.init)(jax.random.key(2), ids), ids


def quantize(model, variables, inputs, **settings):
    return brecq_jax.quantize(variables, model.apply, inputs, **{"solver": solvers.nearest(), "progress": False, **settings})


def cosine(model, variables, quantized, tokens):
    return float(jnp.mean(jnp.sum(quantized(tokens) * model.apply(variables, tokens), -1)))


def test_attention_and_mlp_halves_are_the_blocks(encoder):
    model, variables, tokens = encoder
    graph = brecq_jax.trace(model.apply, variables, tokens)
    blocks, notes = partition(graph)
    assert [[op.name.split("/")[-2] for op in b.ops] for b in blocks] == [["word"], *[["query", "key", "value", "out"], ["fc1", "fc2"]] * 2]
    assert not notes
    whole, _ = partition(graph, [r"blocks_(\d)/.*"])
    assert [len(b.ops) for b in whole] == [1, 6, 6]
    assert len(graph.products) == 4


@pytest.mark.parametrize("activations", [None, Uniform(8), PerToken(8), PerToken(8, group_size=16)], ids=str)
@pytest.mark.parametrize("granularity", ["per_channel", 16])
def test_an_encoder_is_quantized_with_its_masks(encoder, granularity, activations):
    quantized = quantize(*encoder, weights=Uniform(8, granularity=granularity), activations=activations)
    assert cosine(*encoder[:2], quantized, encoder[2]) > 0.999
    padded = {k: np.pad(a, ((0, 0), (0, 2))) for k, a in encoder[2].items()}
    np.testing.assert_allclose(quantized(padded), quantized(encoder[2]), atol=1e-5)


def test_learned_rounding_beats_nearest(encoder):
    nearest, learned = (
        cosine(*encoder[:2], quantize(*encoder, weights=Uniform(2), activations=PerToken(8), solver=s), encoder[2])
        for s in (solvers.nearest(), solvers.annealed(num_steps=150))
    )
    assert learned > nearest + 0.02


def test_padding_counts_nothing_where_positions_are_weighed(encoder):
    """Twice as much padding, and the same codes but for the last bits of sums."""
    model, variables, tokens = encoder
    padded = {k: np.pad(a, ((0, 0), (0, 4))) for k, a in tokens.items()}
    solver = solvers.annealed(num_steps=20, error=solvers.position_error)
    some, others = (
        quantize(model, variables, inputs, weights={"word.*": None, ".*": Uniform(3)}, activations=None, solver=solver) for inputs in (tokens, padded)
    )
    pairs = [(a.codes, b.codes) for a, b in zip(*(jax.tree.leaves(m.params, is_leaf=is_qarray) for m in (some, others)), strict=True) if is_qarray(a)]
    assert len(pairs) == 12
    assert np.mean([np.mean(a == b) for a, b in pairs]) > 0.995


def test_ranges_of_tokens_need_no_grid_and_are_better_where_tokens_differ(encoder):
    model, variables, tokens = encoder
    fixed, dynamic = (quantize(model, variables, tokens, weights=None, activations=a) for a in (Uniform(4), PerToken(4)))
    assert not dynamic.activations
    assert cosine(model, variables, dynamic, tokens) > cosine(model, variables, fixed, tokens)
    assert "4 bit per token" in dynamic.report.plan


def test_ranges_of_tokens_are_saved(encoder, tmp_path):
    quantized = quantize(*encoder, activations=PerToken(4))
    brecq_jax.save(tmp_path / "m", quantized)
    np.testing.assert_array_equal(brecq_jax.restore(tmp_path / "m", encoder[0].apply)(encoder[2]), quantized(encoder[2]))


def test_ranges_of_tokens_are_not_for_weights_convolutions_or_integers(encoder, digits):
    with pytest.raises(ValueError, match="for what ops read"):
        quantize(*encoder, weights=PerToken(8))
    with pytest.raises(ValueError, match="reads no tokens"):
        quantize(digits.model, digits.variables, digits.train_images[:64], activations=PerToken(8))
    model, variables, tokens = encoder
    with pytest.raises(ValueError, match="the group size 5 does not divide the 32"):
        quantize(*encoder, activations=PerToken(8, group_size=5))
    rules = {".*/fc./.*": Uniform(8), ".*": PerToken(8)}
    integer = deploy.to_integer(quantize(model, variables, tokens, weights=Uniform(8), activations=rules), tokens)
    assert "range for each token" in dict(integer.kept_float)["blocks_0/attn/out/kernel"]
    assert "blocks_0/fc1/kernel" not in dict(integer.kept_float)


def test_a_model_that_captures_numbers_is_called_again_after_another_was_quantized(encoder):
    """A program that was read inside a jit must not hold tracers of it: attention's mask value is such a number."""
    model, variables, tokens = encoder
    some = {k: a[:5] for k, a in tokens.items()}
    for bits in (8, 4):
        quantized = quantize(model, variables, tokens, weights=Uniform(bits))
        np.testing.assert_array_equal(quantized(some), quantized(some))


def unrolled(variables):
    """The decoder of the same variables as a program without a scan: (apply_fn, params)."""
    model = models.Decoder(vocabulary=40, positions=LENGTH, features=16, depth=3, heads=2, mlp_features=32)
    block = models.decoder.DecoderBlock(model.heads, model.mlp_features)
    params = variables["params"]
    layers = {f"layers{i}": jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(model.depth)}

    def apply_fn(params, ids):
        x = params["token"]["embedding"][ids] + params["position"]["embedding"][jnp.arange(ids.shape[1])][None]
        for name in layers:
            x = block.apply({"params": params[name]}, x)
        x = models.decoder.nn.LayerNorm().apply({"params": params["norm"]}, x)
        return x @ params["token"]["embedding"].T

    return apply_fn, {k: v for k, v in params.items() if k != "layers"} | layers


@pytest.mark.parametrize(
    ("granularity", "solver"),
    [("per_channel", solvers.annealed(num_steps=20)), ("per_tensor", solvers.nearest()), (8, solvers.second_order())],
    ids=["learned", "per tensor", "groups"],
)
def test_scanned_and_unrolled_layers_get_the_same_codes(decoder, granularity, solver):
    model, variables, ids = decoder
    apply_fn, params = unrolled(variables)
    np.testing.assert_allclose(apply_fn(params, ids), model.apply(variables, ids), atol=1e-5)
    weights = {"token/.*": Uniform(8), ".*": Uniform(3, granularity=granularity)}
    settings = dict(weights=weights, solver=solver, progress=False)
    stacked = brecq_jax.quantize(variables, model.apply, ids, **settings).params["params"]
    single = brecq_jax.quantize(params, apply_fn, ids, **settings).params
    np.testing.assert_array_equal(stacked["token"]["embedding"].codes, single["token"]["embedding"].codes)
    for i in range(model.depth):
        for name in ("query", "key", "value", "out", "fc1", "fc2"):
            there, here = stacked["layers"][name]["kernel"], single[f"layers{i}"][name]["kernel"]
            np.testing.assert_array_equal(there.codes[i], here.codes)
            np.testing.assert_allclose(there.decode()[i], here.decode(), atol=1e-6)


def test_a_stack_with_one_scale_for_each_slice_is_saved_and_decoded(decoder, tmp_path):
    model, variables, ids = decoder
    quantized = quantize(model, variables, ids, weights=Uniform(8, granularity="per_tensor"), activations=None)
    kernel = quantized.params["params"]["layers"]["fc1"]["kernel"]
    assert kernel.grid.scale.shape == (3, 1, 1)
    np.testing.assert_allclose(kernel.decode(), variables["params"]["layers"]["fc1"]["kernel"], atol=float(kernel.grid.scale.max()))
    brecq_jax.save(tmp_path / "m", quantized)
    np.testing.assert_array_equal(brecq_jax.restore(tmp_path / "m", model.apply)(ids), quantized(ids))


def test_a_decoder_learns_the_text(decoder):
    text = "the quick brown fox jumps over the lazy dog. " * 40
    small = models.Decoder(positions=16, features=16, depth=2, heads=2, mlp_features=32)
    trained = models.train_decoder(text, small, num_steps=60, batch_size=16)
    surprise = models.surprise(trained.model.apply(trained.variables, trained.test), trained.test)
    assert surprise.shape == (len(trained.test), 15)
    assert float(jnp.mean(surprise)) < 4  # of log(256) = 5.5
    with pytest.raises(ValueError, match="longer text"):
        models.train_decoder("too short", small)
    with pytest.raises(ValueError, match="positions for 16"):
        trained.model.apply(trained.variables, np.zeros((1, 17), np.int32))
    with pytest.raises(ValueError, match="Write Uniform"):
        quantize(trained.model, trained.variables, trained.test, activations=Sparq(4))
