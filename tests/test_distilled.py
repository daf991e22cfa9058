"""Students that learn from the float model: what they begin and end as, gradients, and runs that were stopped."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import deploy, passes, solvers
from brecq_jax.formats import Binary, Ternary, Uniform
from brecq_jax.solvers import _student

FEATURES, HEADS, TOKENS, CLASSES = 16, 2, 6, 3


class Attention(nn.Module):
    """One layer of attention over embedded ids, and a head; inner values are sown."""

    @nn.compact
    def __call__(self, ids):
        x = nn.LayerNorm(name="norm")(nn.Embed(40, FEATURES, name="word")(ids))
        self.sow("intermediates", "hidden", x)
        q, k, v = (nn.Dense(FEATURES, name=n)(x).reshape(*x.shape[:2], HEADS, -1) for n in ("query", "key", "value"))
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
        self.sow("intermediates", "scores", scores)
        mixed = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores), v).reshape(x.shape)
        x = nn.LayerNorm(name="norm2")(x + nn.Dense(FEATURES, name="out")(mixed))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(CLASSES, name="head")(x.mean(1))


MODEL = Attention()


def features(params, ids):
    logits, sown = MODEL.apply(params, ids, mutable="intermediates")
    return {"hidden": list(sown["intermediates"]["hidden"]), "scores": list(sown["intermediates"]["scores"]), "logits": logits}


def problem():
    ids = jax.random.randint(jax.random.key(0), (64, TOKENS), 0, 40)
    params = MODEL.init(jax.random.key(1), ids)
    return {"params": {name: leaf for name, leaf in params["params"].items()}}, ids


QUICK = solvers.Distillation(num_steps=40, batch_size=16, learning_rate=2e-3, checks=2)


def quantized(solver, weights, activations=Uniform(8), given=None, apply_fn=MODEL.apply, **kw):
    params, ids = given or problem()
    rules = {"head.*": None, "word.*": dataclasses.replace(weights, granularity="per_channel"), ".*": weights}
    return brecq_jax.quantize(params, apply_fn, ids, weights=rules, activations=activations, solver=solver, progress=False, **kw), ids


def distance(model, ids):
    params, _ = problem()
    return float(jnp.mean(jnp.square(model(ids) - MODEL.apply(params, ids))))


@pytest.mark.parametrize("weights", [Ternary("per_tensor"), Binary(granularity="per_tensor"), Binary(2, "per_tensor"), Uniform(2)], ids=str)
def test_a_student_is_nearer_to_the_float_model_than_rounding_and_is_what_its_codes_say(weights):
    activations = {".*product.*": None, ".*": Uniform(8)}  # so few steps make up for less where attention's products are rounded, too
    rounded, ids = quantized(solvers.nearest(), weights, activations)
    learned, _ = quantized(solvers.distilled(features, QUICK), weights, activations)
    assert distance(learned, ids) < 0.7 * distance(rounded, ids)
    assert learned.params["params"]["out"]["kernel"].format.bits == getattr(weights, "bits")
    records = learned.report.blocks
    assert [r.name for r in records] == ["inner", "prediction"] and all(r.error_after <= r.error_before for r in records)


def test_the_split_student_goes_on_from_the_ternary_one():
    longer = dataclasses.replace(QUICK, learning_rate=5e-3, num_steps=100)
    model, ids = quantized(solvers.binarybert(features, QUICK, longer), Binary(2, "per_tensor"), None)
    records = model.report.blocks
    assert [r.solver for r in records] == ["ternary", "ternary", "split binary", "split binary"]
    still = solvers.binarybert(features, QUICK, dataclasses.replace(QUICK, learning_rate=0.0, num_steps=2, checks=1))
    unmoved, _ = quantized(still, Binary(2, "per_tensor"), None)
    ternary, _ = quantized(solvers.distilled(features, QUICK), Ternary("per_tensor"), None)
    np.testing.assert_allclose(unmoved(ids), passes.split_ternary(ternary)(ids), atol=1e-4)
    assert all(r.error_after <= r.error_before for r in records) and records[2].error_after < 0.95 * records[2].error_before
    kernel = model.params["params"]["out"]["kernel"]
    assert set(np.unique(kernel.codes)) <= {0, 1, 2, 3}
    assert len(np.unique(kernel.decode())) <= 4
    assert all(len(np.unique(row)) <= 4 for row in np.asarray(model.params["params"]["word"]["embedding"].decode()))


def test_splitting_changes_nothing_that_the_student_shows():
    params, ids = problem()
    graph = brecq_jax.trace(MODEL.apply, params, ids)
    plan = tuple(_student.Written(w, Ternary("per_tensor")) for w in graph.weights.values())
    student = _student.begin(plan, params, {})
    halves = _student.split(plan, student)
    pairs = tuple(w._replace(format=Binary(2, "per_tensor")) for w in plan)
    for before, after in zip(*(jax.tree.leaves(_student.seen(p, s.latents)) for p, s in ((plan, student), (pairs, halves))), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-6)
    for before, after in zip(jax.tree.leaves(student.latents), jax.tree.leaves(halves.latents), strict=True):
        np.testing.assert_allclose(after.sum(0) if after.ndim > before.ndim else after, before, atol=1e-7)


def test_the_gradient_passes_the_rounding_unchanged():
    params, ids = problem()
    graph = brecq_jax.trace(MODEL.apply, params, ids)
    for format in (Ternary("per_tensor"), Binary(), Uniform(2)):
        plan = tuple(_student.Written(w, format) for w in graph.weights.values())
        weigh = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape), params)
        def weighed(latents, plan=plan, weigh=weigh):
            return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), _student.seen(plan, latents), weigh)))

        gradient = jax.grad(weighed)(params)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6), gradient, weigh)


def doubled(params, ids):
    return 2 * MODEL.apply(params, ids)


def doubled_features(params, ids):
    """The same shapes, other values."""
    return jax.tree.map(lambda a: 2 * a, features(params, ids))


class Stopped(Exception):
    """The process ends here."""


@dataclasses.dataclass
class Dying:
    """A folder whose process dies behind its n-th state."""

    folder: deploy.TrainingFolder
    after: int

    def latest(self):
        return self.folder.latest()

    def keep(self, number, arrays):
        self.folder.keep(number, arrays)
        if number == self.after:
            raise Stopped


@pytest.mark.parametrize("after", [1, 2, 4, 5, 8])
def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_codes(after, tmp_path):
    short = dataclasses.replace(QUICK, num_steps=4)
    whole, ids = quantized(solvers.binarybert(features, short, short), Binary(2, "per_tensor"))
    folder = deploy.TrainingFolder(tmp_path / "state")
    with pytest.raises(Stopped):
        quantized(solvers.binarybert(features, short, short, Dying(folder, after)), Binary(2, "per_tensor"))
    again, _ = quantized(solvers.binarybert(features, short, short, folder), Binary(2, "per_tensor"))
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_state_of_another_training_is_refused(tmp_path):
    folder, short = deploy.TrainingFolder(tmp_path / "state"), dataclasses.replace(QUICK, num_steps=2)
    quantized(solvers.distilled(features, short, folder), Ternary("per_tensor"))
    with pytest.raises(ValueError, match="another training"):
        quantized(solvers.distilled(features, short, folder), Ternary("per_tensor"), key=jax.random.key(5))
    params, ids = problem()
    with pytest.raises(ValueError, match="another training"):
        quantized(solvers.distilled(features, short, folder), Ternary("per_tensor"), given=(params, ids[::-1]))
    with pytest.raises(ValueError, match="another training.*features"):
        quantized(solvers.distilled(doubled_features, short, folder), Ternary("per_tensor"))
    with pytest.raises(ValueError, match="another training.*apply_fn"):
        quantized(solvers.distilled(features, short, folder), Ternary("per_tensor"), apply_fn=doubled)


def test_parameters_that_are_whole_numbers_stay():
    params, ids = problem()
    counted = {"params": params["params"] | {"count": jnp.array(3)}}
    model, _ = quantized(solvers.distilled(features, dataclasses.replace(QUICK, num_steps=2)), Ternary("per_tensor"), given=(counted, ids))
    assert model.params["params"]["count"] == 3 and model.params["params"]["count"].dtype == jnp.int32


def test_four_bit_activations_learn_their_steps():
    learned, _ = quantized(solvers.distilled(features, dataclasses.replace(QUICK, step_learning_rate=1e-2)), Ternary("per_tensor"), Uniform(4))
    fitted, _ = quantized(solvers.distilled(features, dataclasses.replace(QUICK, step_learning_rate=0.0)), Ternary("per_tensor"), Uniform(4))
    assert all(not np.allclose(learned.activations[n].scale, g.scale, rtol=1e-3) for n, g in fitted.activations.items())


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(ValueError, match="two binary points"):
        quantized(solvers.binarybert(features), Ternary())
    with pytest.raises(ValueError, match="Give all three"):
        quantized(solvers.distilled(lambda params, ids: {"logits": MODEL.apply(params, ids)}), Ternary())
