"""Loss-aware ranges: the parabola and its guard, Powell's method, and what the whole search promises."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import brecq_jax
from brecq_jax import solvers
from brecq_jax._model import Problem, Program, Quantized
from brecq_jax._plan import make_plan
from brecq_jax._quantize import NO_PLAN
from brecq_jax.formats import Affine, MinMax, PerToken, Ternary, Uniform

lapq = sys.modules["brecq_jax.solvers.lapq"]  # `solvers.lapq` is the function


def apply(params, x):
    return jax.nn.relu(x @ params["first"]) @ params["second"]


@pytest.fixture(scope="module")
def small():
    """A network of two layers whose labels are what it says itself, and 200 inputs: seven batches and a part."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"first": jax.random.normal(keys[0], (6, 16)), "second": jax.random.normal(keys[1], (16, 4))}
    x = jax.random.normal(keys[2], (200, 6))
    return params, x, np.asarray(apply(params, x).argmax(-1))


def quantize(small, solver, weights=Affine(2, symmetric=True, granularity="per_tensor"), **settings):
    return brecq_jax.quantize(small[0], apply, small[1], weights=weights, activations=Uniform(3), solver=solver, progress=False, **settings)


def test_the_parabolas_vertex_is_found_and_guarded():
    p = lapq.NORMS
    assert lapq.vertex(p, 3 * (p - 2.7) ** 2 + 1) == pytest.approx(2.7)
    assert lapq.vertex(p, -3 * (p - 2.7) ** 2 + 1) == 4.0  # opens downwards: the least that was tried
    assert lapq.vertex(p, (p - 1) ** 2) == 2.0 and lapq.vertex(p, (p - 9) ** 2) == 4.0  # vertex out of reach
    assert lapq.vertex(p, np.ones(10)) in p


def test_powell_reaches_the_end_of_a_narrow_valley_where_coordinates_one_by_one_do_not():
    """SciPy's first iteration is a sweep over the coordinates; of two dimensions the third ends at the minimum."""

    def bowl(x):
        return (x[0] + x[1] - 1) ** 2 + 100 * (x[0] - x[1] + 0.5) ** 2

    start = np.array([2.0, 0.0])
    swept = start.copy()
    for n in (0, 1) * 3:
        swept[n] = scipy.optimize.minimize_scalar(lambda v, n=n: bowl(np.where(np.arange(2) == n, v, swept))).x
    assert bowl(swept) > 1
    assert bowl(lapq.powell(bowl, start, 3)) < 1e-9


def test_powell_gives_back_the_best_it_saw():
    seen = []

    def jagged(x):
        seen.append(float(np.sum(np.sin(37 * x) + 0.1 * x**2)))
        return seen[-1]

    assert float(np.sum(np.sin(37 * (best := lapq.powell(jagged, np.zeros(3), 1))) + 0.1 * best**2)) == min(seen) <= seen[0]


def a_search(params, apply_fn, inputs, labels, weights, activations, **settings):
    """The search over a plan, started from the ranges of its formats."""
    problem = Problem(apply_fn, params, NO_PLAN, inputs, len(inputs))
    plan = make_plan(problem.graph(32), weights, activations)
    problem = dataclasses.replace(problem, plan=plan)
    sites = tuple((name, f) for name, f in plan.activations.items() if f is not None)
    guess, _ = solvers.nearest()(problem, Quantized(params, {}, Program(apply_fn, sites, plan.whole_values)), jax.random.key(0))
    return lapq._Search(lapq.Lapq(**settings), problem, guess, labels)


def test_loss_falls_from_widest_ranges_to_lp_ranges_to_powells(digits):
    """On images that the network was not trained on, as it gets them right all but a few."""
    images, labels = digits.test_images[:128], digits.test_labels[:128]
    formats = [kind(3, granularity="per_tensor", ranges=MinMax()) for kind in (Uniform, Uniform)]
    search = a_search(digits.variables, digits.model.apply, images, labels, *formats, iterations=1)
    losses = [search.loss(search.grids, search.octaves)]
    for step in (search.by_norm, search.by_loss):
        step()
        losses.append(search.loss(search.grids, search.octaves))
    assert losses[0] >= losses[1] >= losses[2] and losses[2] < losses[0]


@pytest.mark.parametrize("labelled", [True, False])
def test_the_search_is_compiled_once_and_its_loss_is_the_models(small, labelled):
    params, x, labels = small
    before = lapq._loss._cache_size()
    search = a_search(params, apply, x, labels if labelled else None, Affine(2, symmetric=True), Uniform(3), batch_size=32, iterations=1)
    for step in (search.by_norm, search.by_loss):
        model = step()
        rows = jnp.asarray(search.train)
        logits, floats = (jax.nn.log_softmax(f(x[rows])) for f in (model, lambda x: apply(params, x)))
        if labelled:
            expected = -jnp.mean(logits[jnp.arange(len(rows)), labels[rows]])
        else:
            expected = jnp.mean(jnp.sum(jnp.exp(floats) * (floats - logits), -1))
        np.testing.assert_allclose(search.loss(search.grids, search.octaves), expected, rtol=1e-4)
    assert lapq._loss._cache_size() == before + 1


def test_what_is_kept_is_better_where_it_was_not_learned(small):
    clipped_nowhere = Uniform(3, granularity="per_tensor", ranges=MinMax())
    quantized = quantize(small, solvers.lapq(small[2], iterations=1), clipped_nowhere)
    assert [b.solver for b in quantized.report.blocks] == ["norm", "powell"]
    assert all(b.error_after <= b.error_before for b in quantized.report.blocks)
    assert any(b.kept for b in quantized.report.blocks)


def test_a_grid_per_channel_moves_as_a_whole(small):
    search = a_search(*small[:1], apply, *small[1:], Uniform(2), None, iterations=1)
    one, two = search.by_norm(), search.by_loss()
    for name in ("first", "second"):
        ratio = np.asarray(two.params[name].grid.scale / one.params[name].grid.scale)
        np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-5)
        q = two.params[name]
        np.testing.assert_array_equal(q.format.encode(small[0][name].T, q.grid).T, q.codes)


def test_means_are_kept_in_the_search(small):
    search = a_search(*small[:1], apply, *small[1:], Uniform(2), Uniform(3), iterations=1, correct_means=True)
    search.by_norm()
    for name, array in search.by_loss().params.items():
        np.testing.assert_allclose(array.decode().mean(0), small[0][name].mean(0), atol=1e-5)
        assert isinstance(array.format, Affine)


def test_means_are_kept_where_weights_have_zero_points(small):
    formats = {"first": Ternary(), "second": Uniform(2)}
    search = a_search(*small[:1], apply, *small[1:], formats, None, iterations=1, correct_means=True)
    found = search.model()
    assert found.params["first"].format == Ternary()
    np.testing.assert_allclose(found.params["second"].decode().mean(0), small[0]["second"].mean(0), atol=1e-5)
    with pytest.raises(ValueError, match=r"which no weight has; write weights=Uniform\(4\)"):
        a_search(*small[:1], apply, *small[1:], Ternary(), None, correct_means=True)


def test_reconstruction_starts_from_the_ranges(small):
    start = quantize(small, solvers.lapq(iterations=1))
    chained = quantize(small, solvers.chain(solvers.lapq(iterations=1), solvers.brecq(num_steps=0, act_steps=0, refit=False)))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(chained), jax.tree.leaves(start))
    learned = quantize(small, solvers.chain(solvers.lapq(iterations=1), solvers.adaround(num_steps=20, act_steps=5, refit=False)))
    for name in ("first", "second"):
        np.testing.assert_array_equal(learned.params[name].grid.scale, start.params[name].grid.scale)


def test_nothing_to_search_is_the_guess(small):
    quantized = brecq_jax.quantize(small[0], apply, small[1], weights=None, activations=None, solver=solvers.by_name("lapq"), progress=False)
    assert not quantized.report.blocks


def test_labels_of_another_number_are_refused(small):
    with pytest.raises(ValueError, match="3 labels for 200 calibration examples"):
        quantize(small, solvers.lapq(small[2][:3]))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.eye(4)[np.zeros(200, int)], r"float64 \(200, 4\); write class numbers, int \(examples,\)"),
        (np.zeros(200), r"float64 \(200,\); write class numbers, int \(examples,\)"),
        (np.zeros((200, 1), int), r"int64 \(200, 1\); write class numbers, int \(examples,\)"),
        (1 + np.arange(200) % 4, "1 to 4, of 4 classes; write class numbers, 0 to 3"),
        (-np.ones(200, int), "-1 to -1, of 4 classes"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(small, labels, words):
    with pytest.raises(ValueError, match=words):
        a_search(small[0], apply, small[1], labels, Uniform(2), None)


def test_labels_of_positions_have_the_shape_of_their_predictions(small):
    per_position = small[0], lambda params, x: apply(params, x.reshape(len(x), 3, 2).repeat(3, -1)), small[1]
    search = a_search(*per_position, np.zeros((200, 3), int), Uniform(2), None)
    assert np.isfinite(search.loss(search.grids, search.octaves))
    with pytest.raises(ValueError, match=r"write class numbers, int \(examples, 3\)"):
        a_search(*per_position, np.zeros(200, int), Uniform(2), None)


def test_several_outputs_are_means_of_unit_gaussians():
    logits, other = (jax.random.normal(jax.random.key(n), (5, 4)) for n in range(2))
    assert float(jnp.abs(lapq.float_divergence([logits], [logits])).max()) < 1e-6
    boxes = [logits, jnp.arange(5)], [other, jnp.arange(5)]
    np.testing.assert_allclose(lapq.float_divergence(*boxes), jnp.mean(jnp.square(logits - other), -1) / 2, rtol=1e-6)


def test_ranges_of_tokens_are_not_searched(small):
    params, x, _ = small
    settings = dict(weights=Uniform(3), activations=PerToken(8), preset=None, progress=False)
    found = brecq_jax.quantize(params, apply, x, solver=solvers.lapq(iterations=1), **settings)
    assert not found.activations and np.isfinite(found(x)).all()
