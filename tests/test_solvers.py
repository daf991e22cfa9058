"""Roundings start where they should, and every named solver runs and keeps the best."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import solvers
from brecq_jax._interpret import param_values
from brecq_jax._model import Problem, dropped
from brecq_jax._qarray import QArray, to_rows
from brecq_jax._quantize import NO_PLAN
from brecq_jax.formats import Multipoint, Uniform
from brecq_jax.solvers import _loop
from brecq_jax.solvers._walk import Unit, Walk
from brecq_jax.solvers.reconstruct import _tail


def a_guess(format, seed=0):
    weight = jax.random.normal(jax.random.key(seed), (16, 6))
    rows = to_rows(weight, (1,))
    grid = format.fit(rows)
    codes = format.encode(rows + 0.3 * jax.random.normal(jax.random.key(1), rows.shape), grid)  # not nearest
    return QArray(codes.T, grid, format, (1,), str(weight.dtype)), rows


FORMATS = [
    Uniform(2), Uniform(4, symmetric=True), Uniform(3, granularity=8), Uniform(2, granularity="per_tensor"), Multipoint(3, points=2, tolerance=0.0)
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_straight_through_starts_and_may_end_at_its_guess(format):
    q, rows = a_guess(format)
    rounding = solvers.StraightThrough()
    variables, fixed = rounding.start(q, rows)
    now, penalty = rounding.rows(format, variables, fixed, 0.0)
    np.testing.assert_allclose(now, to_rows(q.decode(), (1,)), rtol=1e-5, atol=1e-6)
    assert penalty == 0
    np.testing.assert_array_equal(rounding.finish(q, variables, fixed, rows).codes, q.codes)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_rectified_sigmoid_starts_at_the_float_weight(format):
    q, rows = a_guess(format)
    rounding = solvers.RectifiedSigmoid()
    variables, fixed = rounding.start(q, rows)
    now, _ = rounding.rows(format, variables, fixed, 0.0)
    inside = fixed["span"] > 0
    np.testing.assert_allclose(jnp.where(inside, now, 0), jnp.where(inside, rows, 0), atol=1e-5)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_rectified_sigmoid_leans_towards_a_guess_that_it_can_reach(format):
    q, rows = a_guess(format)
    rounding = solvers.RectifiedSigmoid()
    plain, leant = rounding.start(q, rows)[0]["choices"], rounding.start(q, rows, True)[0]["choices"]
    low, high = jax.jit(format.neighbors)(rows, q.grid)  # a fused product may fall on the other side of a point
    guess = to_rows(q.codes, (1,))
    reached = (guess == low) | (guess == high)
    ends = rounding.finish(q, {"choices": leant}, {}, rows)
    np.testing.assert_array_equal(jnp.where(reached, to_rows(ends.codes, (1,)), 0), jnp.where(reached, guess, 0))
    np.testing.assert_array_equal(jnp.where(reached, 0, leant), jnp.where(reached, 0, plain))
    assert (leant != plain).any() and not reached.all()


@pytest.mark.parametrize("rounding", [solvers.StraightThrough(), solvers.RectifiedSigmoid(scale_learning_rate=1e-3)], ids=["straight", "sigmoid"])
def test_the_gradient_reaches_choices_and_step_sizes(rounding):
    q, rows = a_guess(Uniform(3))
    variables, fixed = rounding.start(q, rows)
    gradients = jax.grad(lambda v: jnp.sum(rounding.rows(q.format, v, fixed, 0.0)[0] ** 2))(variables)
    assert all(float(jnp.abs(g).sum()) > 0 for g in gradients.values()) and set(gradients) == {"choices", "scales"}


def test_a_step_size_learned_is_the_one_that_is_stored():
    q, rows = a_guess(Uniform(3))
    rounding = solvers.StraightThrough()
    variables, fixed = rounding.start(q, rows)
    variables = {"choices": variables["choices"] + 0.4, "scales": variables["scales"] + 0.1}
    hard, _ = rounding.rows(q.format, variables, fixed, 1.0)
    np.testing.assert_allclose(to_rows(rounding.finish(q, variables, fixed, rows).decode(), (1,)), hard, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["annealed", "refined", "genie", "qdrop", "second_order"])
def test_named_solvers_better_nearest_and_say_what_they_kept(digits, name):
    settings = {} if name == "second_order" else {"num_steps": 100}
    outputs = digits.model.apply(digits.variables, digits.test_images)

    def error(solver):
        q = brecq_jax.quantize(digits.variables, digits.model.apply, digits.train_images[:256], weights=Uniform(2), activations=None, preset="brecq", solver=solver, progress=False)  # fmt: skip
        return float(jnp.mean(jnp.square(q(digits.test_images) - outputs))), q.report

    mine, report = error(solvers.by_name(name, **settings))
    assert mine < 0.7 * error(solvers.nearest())[0]
    for block in report.blocks:
        assert block.error_after <= block.error_before


def test_refinement_goes_below_its_start(digits):
    q = brecq_jax.quantize(digits.variables, digits.model.apply, digits.train_images[:256], weights=Uniform(2), activations=None, preset="brecq", solver=solvers.refined(num_steps=200), progress=False)  # fmt: skip
    kept = [b.kept for b in q.report.blocks if b.solver == "rounding"]
    assert any(kept)


@pytest.mark.parametrize("whole_values", [False, True])
def test_weights_and_activations_are_learned_together(digits, whole_values):
    def error(**settings):
        preset = "brecq" if whole_values else "uniform"
        solver = solvers.annealed(num_steps=150, **settings)
        q = brecq_jax.quantize(digits.variables, digits.model.apply, digits.train_images[:256], weights=Uniform(2), activations=Uniform(2), preset=preset, solver=solver, progress=False)  # fmt: skip
        return float(jnp.mean(jnp.square(q(digits.test_images) - digits.model.apply(digits.variables, digits.test_images)))), q

    nearest = brecq_jax.quantize(digits.variables, digits.model.apply, digits.train_images[:256], weights=Uniform(2), activations=Uniform(2), preset="uniform", solver=solvers.nearest(), progress=False)  # fmt: skip
    together, q = error()
    assert {b.solver for b in q.report.blocks} == {"together"}
    assert together < float(jnp.mean(jnp.square(nearest(digits.test_images) - digits.model.apply(digits.variables, digits.test_images))))
    assert all(float(np.asarray(g.scale).min()) > 0 for g in q.activations.values())


def test_a_coin_that_always_falls_one_way():
    x, rounded = jnp.zeros(100), jnp.ones(100)
    assert dropped(1.0, jax.random.key(0), x, rounded).sum() == 0 and dropped(0.0, jax.random.key(0), x, rounded).sum() == 100


@pytest.mark.parametrize("shape", [(), (1_001,), (7, 13, 11)], ids=str)
@pytest.mark.parametrize("probability", [0.5, 0.25, 0.3, 0.9])
def test_a_coin_falls_as_often_as_it_should_and_each_for_itself(probability, shape):
    toss = jax.jit(jax.vmap(lambda key: dropped(probability, key, jnp.ones(shape), jnp.zeros(shape))))
    tossed = np.asarray(toss(jax.random.split(jax.random.key(0), 200_000 // max(1, math.prod(shape)))))
    assert tossed.shape[1:] == shape
    flat = tossed.reshape(-1)
    deviation = math.sqrt(probability * (1 - probability) / flat.size)
    assert abs(flat.mean() - probability) < 5 * deviation
    for lag in (1, 2, 8, 16, 31, 32, math.prod(shape[1:])):
        correlation = np.corrcoef(flat[lag:], flat[:-lag])[0, 1]
        assert abs(correlation) < 5 / math.sqrt(flat.size)


@pytest.mark.parametrize(("count", "size"), [(20, 6), (20, 20), (5, 8)])
def test_batches_hold_no_example_twice_and_all_as_often(count, size):
    steps, size_drawn = 4_000, min(size, count)
    rows = _loop.batches(steps, count, size, jax.random.key(0))
    assert rows.shape == (steps, size_drawn) and all(len(set(batch)) == size_drawn for batch in rows.tolist())
    share = size_drawn / count
    often = np.bincount(rows.ravel(), minlength=count)
    assert np.all(np.abs(often - steps * share) <= 5 * math.sqrt(steps * share * (1 - share)))
    np.testing.assert_array_equal(rows, _loop.batches(steps, count, size, jax.random.key(0)))


def test_a_relative_error_does_not_know_the_scale():
    target, output = jax.random.normal(jax.random.key(0), (8, 5, 3)), jax.random.normal(jax.random.key(1), (8, 5, 3))
    one, large = (solvers.relative_error(s * output, s * target, None) for s in (1.0, 1e3))
    np.testing.assert_allclose(one, large, rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(one), jnp.sum((output - target) ** 2) / jnp.sum(target**2), rtol=1e-5)


def test_the_rest_of_the_net_gives_the_net(digits):
    """What PD-Quant's term runs: the float blocks behind a unit, from its outputs."""
    problem = Problem(digits.model.apply, digits.variables, NO_PLAN, digits.train_images[:64], 64)
    walk = Walk(problem, batch_size=8)
    np.testing.assert_allclose(walk.predictions, digits.model.apply(digits.variables, digits.train_images[:64]), rtol=1e-4, atol=1e-4)
    settings = solvers.Reconstruction(prediction=solvers.Prediction(cost=float("inf")))
    tails = 0
    for n, block in enumerate(walk.blocks):
        targets = walk.exact.outputs(block, param_values(walk.graph, block, walk.leaves))
        tail = _tail(settings, walk, Unit(n, block, (), (), targets))
        if tail:
            params = [param_values(walk.drawn_graph, b, walk.leaves) for b in tail.blocks]
            np.testing.assert_allclose(tail.run([t[:8] for t in targets], params), walk.predictions[:8], rtol=1e-4, atol=1e-4)
            tails += 1
        walk.exact.advance(block, param_values(walk.graph, block, walk.leaves), outputs=targets)
    assert tails == len(walk.blocks) - 1
    free = solvers.Reconstruction(prediction=solvers.Prediction(cost=0.0))
    assert _tail(free, walk, Unit(0, walk.blocks[0], (), (), targets)) is None


def test_a_prediction_that_counts_is_learned_from(digits):
    def learned(solver):
        q = brecq_jax.quantize(digits.variables, digits.model.apply, digits.train_images[:256], weights=Uniform(2), activations=None, solver=solver, progress=False)  # fmt: skip
        images = digits.train_images[:256]
        return float(jnp.mean(_loop.divergence(q(images), digits.model.apply(digits.variables, images))))

    without, counted = (learned(solvers.annealed(num_steps=100, prediction=p)) for p in (None, solvers.Prediction(weight=3.0)))
    assert counted != without and counted < 0.1 * learned(solvers.nearest())


def small_net(params, x):
    return jax.nn.relu(x @ params["one"]) @ params["two"]


def notes_of(solver, activations=None):
    params = {"one": jax.random.normal(jax.random.key(0), (6, 8)), "two": jax.random.normal(jax.random.key(1), (8, 4))}
    x = jax.random.normal(jax.random.key(2), (32, 6))
    q = brecq_jax.quantize(params, small_net, x, weights=Uniform(3), activations=activations, blocks="layer", solver=solver, progress=False)
    return q.report.notes


def test_a_prediction_that_does_not_count_is_noted():
    dear, free = (notes_of(solvers.annealed(num_steps=2, prediction=solvers.Prediction(cost=cost))) for cost in (0.01, 1e9))
    assert any(n.startswith("prediction: does not count in one") and "cost=0.01" in n for n in dear)
    assert [n for n in free if n.startswith("prediction")] == ["prediction: does not count in two: nothing is behind it"]
    assert not any(n.startswith("prediction") for n in notes_of(solvers.annealed(num_steps=2)))


def test_dropping_that_never_happens_is_noted():
    few = dict(num_steps=2, act_steps=2)
    for solver, activations, words in (
        (solvers.qdrop(**few), None, "no activation is quantized"),
        (solvers.qdrop(together=False, **few), Uniform(8), "together=True"),
        (solvers.qdrop(**few), Uniform(8), ""),
    ):
        noted = [n for n in notes_of(solver, activations) if n.startswith("drop_prob")]
        assert len(noted) == bool(words) and all(words in n for n in noted)


def test_settings_of_published_solvers_may_be_others():
    settings = dict(error=solvers.relative_error, unit=None, num_steps=2)
    for solver in (solvers.adaround(**settings), solvers.by_name("squared", **settings)):
        assert not any(n.startswith("drop_prob") for n in notes_of(solver))


def test_bfloat16_products_learn_nearly_as_well(digits):
    def error(**settings):
        solver = solvers.annealed(num_steps=150, **settings)
        q = brecq_jax.quantize(digits.variables, digits.model.apply, digits.train_images[:256], weights=Uniform(2), activations=None, solver=solver, progress=False)  # fmt: skip
        return float(jnp.mean(jnp.square(q(digits.test_images) - digits.model.apply(digits.variables, digits.test_images))))

    full, half = error(), error(bfloat16=True)
    assert half != full and half < 1.5 * full


def test_the_best_that_was_seen_is_kept(digits):
    """At a rate that spoils everything, the guess stays, and the loop ends early."""
    solver = solvers.refined(num_steps=80, learning_rate=30.0, checks=8, patience=2)
    q = brecq_jax.quantize(digits.variables, digits.model.apply, digits.train_images[:256], weights=Uniform(2), activations=None, solver=solver, progress=False)  # fmt: skip
    for block in q.report.blocks:
        assert block.error_after <= block.error_before


def test_a_name_that_is_not_there():
    with pytest.raises(ValueError, match="refined"):
        solvers.by_name("gptq")


@pytest.mark.parametrize("name", ["adaround", "brecq", "genie", "qdrop", "squared", "annealed", "nearest"])
def test_the_penalty_of_published_methods_has_a_weight_to_tune(name):
    x, weight = jax.random.normal(jax.random.key(1), (64, 4)) @ jax.random.normal(jax.random.key(3), (4, 16)), jax.random.normal(jax.random.key(2), (16, 4))

    def codes(**given):
        solver = solvers.by_name(name, **given, num_steps=100, learning_rate=0.2)
        return brecq_jax.quantize({"w": weight}, lambda p, x: x @ p["w"], x, weights=Uniform(2), activations=None, solver=solver, progress=False).params["w"].codes

    def same(left, right):
        return bool((left == right).all())

    taken = name in ("adaround", "brecq", "genie", "qdrop", "squared")
    assert same(codes(), codes(regularizer=0.01) if taken else codes(regularizer=1e4))
    assert same(codes(regularizer=1e4), codes()) != taken


ERRORS = [solvers.squared_error, solvers.fisher_error, solvers.relative_error, solvers.position_error]


@pytest.mark.parametrize("error", ERRORS)
def test_one_number_per_example_is_one_feature(error):
    output, target, importance = (jax.random.uniform(jax.random.key(i), (5,)) for i in range(3))
    np.testing.assert_allclose(error(output, target, importance), error(output[:, None], target[:, None], importance[:, None]), rtol=1e-6)


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_bfloat16_values_are_told_apart(error):
    target = jnp.ones((1, 1000), jnp.bfloat16)
    one, more = (error(target.at[0, :n].set(2), target, jnp.ones_like(target)) for n in (500, 501))
    assert more.dtype == jnp.float32 and more > one


def test_a_regression_of_one_number_per_example_is_learned():
    def apply_fn(params, x):
        return (jnp.tanh(x @ params["one"]) @ params["two"])[:, 0]

    params = {"one": jax.random.normal(jax.random.key(0), (6, 8)), "two": jax.random.normal(jax.random.key(1), (8, 1))}
    x = jax.random.normal(jax.random.key(2), (480, 6))
    nearest, learned = (
        brecq_jax.quantize(params, apply_fn, x, weights=Uniform(3), activations=None, blocks="net", solver=solver, progress=False)
        for solver in (solvers.nearest(), solvers.annealed(num_steps=60))
    )
    want = apply_fn(params, x)
    assert jnp.linalg.norm(learned(x) - want) < 0.95 * jnp.linalg.norm(nearest(x) - want)
