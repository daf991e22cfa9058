"""What products of two values read: attention by hand is the judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import deploy, mixed_precision, models, solvers
from brecq_jax.formats import PerToken, Sparq, Uniform, fake_quantize

TOKENS, FEATURES, HEADS = 6, 16, 2
FACTORS = ("attn/product/left", "attn/product/right", "attn/product#2/left", "attn/product#2/right")
PRODUCTS = {".*product.*": Uniform(8), ".*": None}


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).normal(size=(24, TOKENS, FEATURES)).astype(np.float32)


@pytest.fixture(scope="module")
def params(tokens):
    names, draw = ("query", "key", "value", "out"), np.random.default_rng(0)
    draw.normal(size=tokens.shape)  # numbers that are not the tokens'
    return {"attn": {n: {"kernel": draw.normal(0, 0.4, (FEATURES, FEATURES)).astype(np.float32)} for n in names}}


def attention(params, x, rounded=lambda name, value, axis: value):
    """Attention whose keys are transposed by hand; `rounded(name, value, axis of a token)` takes what the products read."""
    split = lambda n: (x @ params["attn"][n]["kernel"]).reshape(*x.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)  # noqa: E731
    q, k, v = (split(n) for n in ("query", "key", "value"))
    scores = rounded(FACTORS[0], q, 3) @ rounded(FACTORS[1], k.swapaxes(2, 3), 2)
    weights = jax.nn.softmax(scores / q.shape[-1] ** 0.5)
    mixed = rounded(FACTORS[2], weights, 3) @ rounded(FACTORS[3], v, 3)
    return mixed.transpose(0, 2, 1, 3).reshape(x.shape) @ params["attn"]["out"]["kernel"]


def attention_with_zeros(params, x):
    """Attention that leaves out what has less than its share, by a ReLU."""
    return attention(params, x, lambda name, value, axis: jax.nn.relu(value - 1 / TOKENS) if name == FACTORS[2] else value)


def quantize(params, inputs, apply_fn=attention, **settings):
    defaults = {"weights": None, "activations": PRODUCTS, "solver": solvers.nearest(), "progress": False}
    return brecq_jax.quantize(params, apply_fn, inputs, **defaults | settings)


def test_products_are_named_by_what_their_weights_have_in_common(params, tokens):
    graph = brecq_jax.trace(attention, params, tokens)
    assert [f.name for p in graph.products for f in p.factors] == list(FACTORS)
    assert [f.made_of for f in graph.products[0].factors] == [("attn/query/kernel",), ("attn/key/kernel",)]
    assert graph.products[0].macs == 24 * HEADS * TOKENS * TOKENS * FEATURES // HEADS
    plain = brecq_jax.trace(lambda p, x: jnp.tanh(x @ p["a"]) @ jnp.tanh(x @ p["b"]).T, {"a": np.eye(4), "b": np.eye(4)}, np.ones((3, 4)))
    assert [f.name for f in plain.products[0].factors] == ["product/left", "product/right"]


@pytest.mark.parametrize("preset", [None, "brecq"])
def test_calibrated_grids_round_what_products_read(params, tokens, preset):
    quantized = quantize(params, tokens, activations={".*product.*": Uniform(4), ".*": None}, preset=preset)
    assert set(quantized.activations) == set(FACTORS)

    def rounded(name, value, axis):
        grid = jax.tree.map(jnp.squeeze, quantized.activations[name])
        return fake_quantize(jnp.asarray(value), grid.scale, grid.zero_point, 4)

    np.testing.assert_allclose(quantized(tokens), attention(params, tokens, rounded), atol=1e-5)
    softmax = next(a for a in quantized.report.activations if a.name == FACTORS[2])
    assert not softmax.signed
    assert softmax.high <= 1.01


def test_tokens_are_rows_of_one_head_whatever_is_transposed(params, tokens):
    quantized = quantize(params, tokens, activations=PerToken(4, group_size=8))
    ops_alone = {".*product.*": None, ".*": PerToken(4, group_size=8)}
    assert not quantized.activations

    def rounded(name, value, axis):
        return PerToken(4).fake_quantize(jnp.asarray(value), (axis,))

    alike = quantize(params, tokens, lambda p, x: attention(p, x, rounded), activations=ops_alone)
    np.testing.assert_allclose(quantized(tokens), alike(tokens), atol=1e-5)
    assert np.abs(quantized(tokens) - quantize(params, tokens, activations=ops_alone)(tokens)).max() > 1e-3


def test_one_format_is_for_products_too_and_the_report_says_what_stays_float(params, tokens):
    floats = quantize(params, tokens, activations=None)
    assert "attn/product, attn/product#2" in dict(floats.report.skipped)["2 matrix products of two values"]
    np.testing.assert_allclose(floats(tokens), attention(params, tokens), atol=1e-4)
    everything = quantize(params, tokens, activations=Uniform(8))
    assert set(FACTORS) < set(everything.activations)
    assert not everything.report.skipped
    assert "attn/product#2/left" in everything.report.plan
    some = quantize(params, tokens, activations={".*product/.*": None, ".*": Uniform(8)})
    assert "1 matrix products of two values" in dict(some.report.skipped)
    plan = brecq_jax.make_plan(brecq_jax.trace(attention, params, tokens), None, Uniform(8))
    again = quantize(params, tokens, activations=plan.rules["activations"])
    np.testing.assert_array_equal(again(tokens), everything(tokens))


def test_a_product_of_a_value_with_itself_reads_it_once(tokens):
    def similar(params, x):
        y = x @ params["kernel"]
        return jnp.einsum("bid,bjd->bij", y, y)

    quantized = quantize({"kernel": np.eye(FEATURES, dtype=np.float32)}, tokens, similar, activations={"product.*": Uniform(4), ".*": None})
    assert list(quantized.activations) == ["product/left"]
    grid = jax.tree.map(jnp.squeeze, quantized.activations["product/left"])
    y = fake_quantize(jnp.asarray(tokens), grid.scale, grid.zero_point, 4)
    np.testing.assert_allclose(quantized(tokens), y @ y.swapaxes(1, 2), atol=1e-4)


def test_ops_and_products_that_read_one_value_share_its_grid(tokens):
    def apply_fn(params, x):
        return jax.nn.softmax(x @ x.swapaxes(1, 2)) @ (x @ params["kernel"])

    kernel = {"kernel": np.eye(FEATURES, dtype=np.float32)}
    assert set(quantize(kernel, tokens, apply_fn, activations=Uniform(8)).activations) == {"kernel", "product#2/left", "product#2/right"}
    with pytest.raises(ValueError, match="group size 5"):
        quantize(kernel, tokens, apply_fn, activations=PerToken(8, group_size=5))


SOLVERS = {"annealed": solvers.annealed(num_steps=20), "brecq": solvers.brecq(num_steps=10, act_steps=20), "lapq": solvers.lapq(iterations=1)}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_steps_of_products_are_learned(params, tokens, solver):
    settings = {"weights": Uniform(4), "activations": Uniform(4), "blocks": "net"}
    guess, learned = (quantize(params, tokens, solver=s, **settings) for s in (solvers.nearest(), solver))
    moved = [name for name in FACTORS if learned.activations[name].scale != guess.activations[name].scale]
    assert moved
    assert all(block.error_after <= block.error_before for block in learned.report.blocks)


@pytest.mark.parametrize("activations", [Uniform(8), PerToken(8), {".*#2/left": Sparq(4), ".*": Uniform(8)}], ids=str)
def test_products_leave_the_house_as_they_are(params, tokens, activations, tmp_path):
    apply_fn = attention if isinstance(activations, (Uniform, PerToken)) else attention_with_zeros
    quantized = quantize(params, tokens, apply_fn, weights=Uniform(8), activations=activations)
    brecq_jax.save(tmp_path / "model", quantized)
    np.testing.assert_array_equal(brecq_jax.restore(tmp_path / "model", apply_fn)(tokens), quantized(tokens))
    brecq_jax.export(quantized, tmp_path / "program", tokens)
    np.testing.assert_allclose(deploy.load_program(tmp_path / "program").call(tokens[:5]), quantized(tokens[:5]), atol=1e-5)
    integer = deploy.to_integer(quantized, tokens[:1])
    assert "multiplies two values" in dict(integer.kept_float)["attn/product#2"]
    np.testing.assert_allclose(integer(tokens), quantized(tokens), atol=0.05 * float(np.abs(quantized(tokens)).max()))
    if activations == Uniform(8):
        assert len(integer.taken) == 4


def test_a_softmax_has_no_zeros_for_sparq(params, tokens):
    with pytest.raises(ValueError, match="activations: attn/product#2/left: Sparq .* Here .* was seen as the least"):
        quantize(params, tokens, activations={".*#2/left": Sparq(4), ".*": None})


def test_bits_of_products_are_searched_and_cost_both_sides(params, tokens):
    graph = brecq_jax.trace(attention, params, tokens)
    choices = [Uniform(4), Uniform(8)]
    measured = mixed_precision.measure(params, attention, tokens, weights=[Uniform(8)], activations=choices, progress=False)
    assert all(measured.losses[f"reads {name}"][0] > measured.losses[f"reads {name}"][1] for name in FACTORS)
    dense, products = 4 * TOKENS * FEATURES**2, 2 * TOKENS * TOKENS * FEATURES
    least = dense * 8 * 4 + products * 4 * 4
    plan = brecq_jax.search(graph, measured, budget=mixed_precision.Budget(bops=least))
    assert all(plan.activations[name].bits == 4 for name in FACTORS)
    richer = brecq_jax.search(graph, measured, budget=mixed_precision.Budget(bops=least + products * 48))
    assert any(richer.activations[name].bits == 8 for name in richer.activations)
    with pytest.raises(ValueError):
        brecq_jax.search(graph, measured, budget=mixed_precision.Budget(bops=least - 1))


def test_no_range_of_a_token_looks_ahead():
    model = models.Decoder(vocabulary=40, positions=TOKENS, features=16, depth=2, heads=2, mlp_features=32)
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 40, (16, TOKENS), np.int32)
    variables = model.init(jax.random.key(0), ids)
    quantized = quantize(variables, ids, model.apply, activations=PerToken(4))
    assert [p.name for p in brecq_jax.trace(model.apply, variables, ids).products] == [f"layers[{i}]/product{n}" for i in (0, 1) for n in ("", "#2")]
    other = ids.copy()
    other[:, 3:] = draw.integers(0, 40, (16, TOKENS - 3))
    np.testing.assert_allclose(quantized(other)[:, :3], quantized(ids)[:, :3], atol=1e-5)


@pytest.mark.parametrize("apply_fn", [lambda p, h: (h @ h.T, h @ p["v"])[1], lambda p, h: (h @ p["v"], h.T @ h)], ids=["unused", "over the batch"])
def test_a_product_that_no_output_of_examples_needs_is_carried_along(apply_fn):
    draw = np.random.default_rng(0)
    params = {"w": draw.normal(size=(8, 8)).astype(np.float32), "v": draw.normal(size=(8, 4)).astype(np.float32)}
    inputs = draw.normal(size=(16, 8)).astype(np.float32)
    run = lambda p, x: apply_fn(p, x @ p["w"])  # noqa: E731
    quantized = quantize(params, inputs, run, weights=Uniform(8), activations=Uniform(8), solver=solvers.annealed(num_steps=4))
    for ours, exact in zip(jax.tree.leaves(quantized(inputs)), jax.tree.leaves(run(params, inputs)), strict=True):
        np.testing.assert_allclose(ours, exact, atol=0.05 * np.abs(exact).max())
