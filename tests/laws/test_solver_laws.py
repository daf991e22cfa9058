"""What holds for every solver. Add a solver to SOLVERS and it inherits all laws."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import solvers
from brecq_jax._model import Problem
from brecq_jax._qarray import is_qarray
from brecq_jax.formats import Affine, Binary, Multipoint, Ternary, Uniform

COUNT = 24


def net(params, x):
    """A convolution, a residual convolution, a dense layer with a bias; one leaf that no plan names."""

    def conv(x, name):
        return jax.lax.conv_general_dilated(x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = jax.nn.relu(conv(x, "stem"))
    x = jax.nn.relu(x + conv(x, "inner"))
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


def features(params, x):
    return {"hidden": [], "scores": [], "logits": net(params, x)}


def parameters():
    draw = np.random.default_rng(0)
    shapes = {"stem": (3, 3, 2, 8), "inner": (3, 3, 8, 8), "head": (8, 5)}
    stem, inner, head = (jnp.asarray(draw.standard_normal(s) / math.sqrt(math.prod(s[:-1])), jnp.float32) for s in shapes.values())
    return {"stem": stem, "inner": inner, "head": {"kernel": head, "bias": jnp.asarray(draw.standard_normal(5), jnp.float32)}}


def images():
    return np.random.default_rng(1).standard_normal((COUNT, 5, 5, 2)).astype(np.float32)


class Case(NamedTuple):
    """A solver, and the format of the weights that it is for. `learned`: it has records to show. `trains`: float leaves move, too."""

    solver: Any
    weights: Any = Uniform(2, granularity="per_channel")
    learned: bool = True
    trains: bool = False


FEW = dict(num_steps=4, act_steps=4, batch_size=4)
TRAINING = solvers.Distillation(num_steps=6, batch_size=8, learning_rate=1e-3, checks=2)
SOLVERS = {
    "nearest": Case(solvers.nearest(), learned=False),
    **{name: Case(solvers.by_name(name, **FEW)) for name in ("adaround", "brecq", "squared", "genie", "qdrop", "annealed", "refined")},
    "annealed, Affine": Case(solvers.annealed(num_steps=4, batch_size=4), Affine(3, granularity="per_channel")),
    "second_order": Case(solvers.second_order()),
    "second_order, groups": Case(solvers.second_order(), Uniform(3, granularity=2)),
    "lapq": Case(solvers.lapq(iterations=1), Affine(3, symmetric=True, granularity="per_tensor")),
    "multipoint": Case(solvers.multipoint(), Multipoint(3, points=3, tolerance=0.1)),
    "distilled": Case(solvers.distilled(features, TRAINING), Ternary(), trains=True),
    "binarybert": Case(solvers.binarybert(features, TRAINING, TRAINING), Binary(2), trains=True),
    "chain": Case(solvers.chain(solvers.second_order(), solvers.annealed(num_steps=4, batch_size=4))),
    "a caller's own": Case(lambda problem, guess, key: (guess, ()), learned=False),
}
every = pytest.mark.parametrize("name", SOLVERS)


def quantize(name: str, key: int = 0, **settings):
    rules = {"inner": None, ".*": SOLVERS[name].weights} if settings.pop("partly", False) else SOLVERS[name].weights
    settings = {"activations": Uniform(4), "preset": None, **settings}
    return brecq_jax.quantize(
        parameters(), net, images(), weights=rules, solver=SOLVERS[name].solver, key=jax.random.key(key), progress=False, **settings
    )


found = functools.cache(quantize)  # once for all laws


@every
def test_the_same_key_gives_the_same_bits(name):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(quantize(name)), jax.tree.leaves(found(name)))


@every
def test_what_is_planned_is_quantized_so_and_nothing_else(name):
    quantized, params = jax.tree.map(jnp.array, found(name)), parameters()
    assert jax.tree.structure(jax.tree.map(lambda _: 0, quantized.params, is_leaf=is_qarray)) == jax.tree.structure(params)
    bias = quantized.params["head"].pop("bias")
    assert np.array_equal(bias, params["head"].pop("bias")) != SOLVERS[name].trains
    for q, weight in zip(jax.tree.leaves(quantized.params, is_leaf=is_qarray), jax.tree.leaves(params), strict=True):
        assert q.format == SOLVERS[name].weights and q.shape == weight.shape and q.dtype == weight.dtype
        assert len(np.unique(q.codes)) <= 2 ** (q.format.bits * getattr(q.format, "points", 1))
        assert bool(jnp.all(jnp.isfinite(q.decode())))
    assert {t.name for t in quantized.report.tensors if t.format} >= {"stem", "inner", "head/kernel"}


@every
def test_params_and_guess_are_not_written_to(name):
    params, problem, seen = jax.tree.map(np.array, parameters()), [], []  # NumPy's can be written to

    def first(given: Problem, guess, key):
        problem.append(given)
        seen.append((guess, jax.tree.map(np.array, guess)))
        return SOLVERS[name].solver(given, guess, key)

    quantized = brecq_jax.quantize(params, net, images(), weights=SOLVERS[name].weights, activations=Uniform(4), preset=None, solver=first, progress=False)
    jax.tree.map(np.testing.assert_array_equal, params, parameters())
    jax.tree.map(np.testing.assert_array_equal, problem[0].params, parameters())
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(seen[0][0]), jax.tree.leaves(seen[0][1]))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(quantized), jax.tree.leaves(found(name)))


@every
def test_a_solver_that_learns_has_records(name):
    records = found(name).report.blocks
    assert bool(records) == SOLVERS[name].learned
    assert all(math.isfinite(r.error_before) and math.isfinite(r.error_after) for r in records)


@pytest.mark.parametrize("name", [name for name, case in SOLVERS.items() if not case.trains])
def test_what_rounding_loses_nothing_of_stays(name):
    """Weights on the grid: nothing is better than the nearest codes, and by nothing that is judged are they worse."""
    on_grid = jax.tree.map(lambda a: a, found("nearest" if SOLVERS[name].weights == SOLVERS["nearest"].weights else name).dequantized())
    nearest, own = (
        brecq_jax.quantize(on_grid, net, images(), weights=SOLVERS[name].weights, activations=None, preset=None, solver=solver, progress=False)
        for solver in (solvers.nearest(), SOLVERS[name].solver)
    )

    def lost(quantized):
        exact = net(on_grid, images())
        return float(jnp.sum(jnp.square(quantized(images()) - exact)) / jnp.sum(jnp.square(exact)))

    assert lost(own) <= lost(nearest) + 1e-9, (lost(own), lost(nearest))


@every
def test_a_weight_that_stays_float_is_the_callers(name):
    quantized = quantize(name, partly=True)
    assert np.array_equal(quantized.params["inner"], parameters()["inner"]) != SOLVERS[name].trains
    assert is_qarray(quantized.params["stem"]) and is_qarray(quantized.params["head"]["kernel"])


@every
def test_what_it_gives_survives_a_checkpoint(tmp_path, name):
    brecq_jax.save(tmp_path / "model", found(name))
    back = brecq_jax.restore(tmp_path / "model", net)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(back), jax.tree.leaves(found(name)))
    np.testing.assert_array_equal(back(images()), found(name)(images()))
