"""Caches that a budget bounds: in memory, on disk or computed again, the codes are those of a run without a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import _memory, solvers
from brecq_jax._memory import OnDisk, plan_caches
from brecq_jax._model import Problem
from brecq_jax._quantize import NO_PLAN
from brecq_jax.formats import Uniform

COUNT = 40
KEYS = jax.random.split(jax.random.key(0), 6)
PARAMS = {"kernels": [jax.random.normal(k, (3, 3, 4, 4)) / 4 for k in KEYS[:4]], "head": jax.random.normal(KEYS[4], (4, 3))}
INPUTS = np.asarray(jax.random.normal(KEYS[5], (COUNT, 5, 5, 4)))
SET = INPUTS.nbytes / 1e9
# Nothing but the set; and the set, a step of 8 (2.2) and one boundary of one value in both streams (2), but not two.
LITTLE, SOME = SET * 1.01, SET * 6.5


def apply_fn(params, x):
    """What the first convolution makes is added behind the third: a boundary of two values."""
    for n, kernel in enumerate(params["kernels"]):
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        first = x if n == 0 else first
        x = x + first if n == 2 else x
    return x.mean((1, 2)) @ params["head"]


def planned(budget_gb, learned=None, half=False):
    problem = Problem(apply_fn, PARAMS, NO_PLAN, INPUTS, COUNT, "layer")
    graph, blocks = problem.graph(8), problem.units(8)
    return plan_caches(graph, blocks, COUNT, budget_gb, 8, learned, False, half)


def codes(solver, **settings):
    q = brecq_jax.quantize(
        PARAMS, apply_fn, INPUTS, weights=Uniform(3), activations=Uniform(8), solver=solver, blocks="layer", progress=False, **settings
    )  # fmt: skip
    return np.concatenate([np.ravel(x.codes) for x in jax.tree.leaves(q.params, is_leaf=lambda x: isinstance(x, brecq_jax.QArray))])


def test_the_plan_takes_memory_while_it_lasts_then_work_and_then_disk(monkeypatch):
    everything = planned(None)
    assert set(everything.places) == {"memory"} and all(everything.on_device) and everything.stream == _memory.STREAM
    some, little = planned(SOME), planned(LITTLE)
    assert {"memory", "recomputed"} == set(some.places[1:])
    # To compute what the head reads anew is a hundred times the head's own work.
    assert little.places == ("memory", *["recomputed"] * 3, "disk", "recomputed") and not any(little.on_device) and little.stream < _memory.STREAM
    assert "computed again" in little.text and "it will not hold" in little.text and "it will not hold" not in planned(1.0).text
    monkeypatch.setattr(_memory, "RECOMPUTED", 0)
    assert set(planned(LITTLE).places[1:-1]) == {"disk"}
    assert (planned(SOME).places[2], planned(SOME, half=True).places[2]) == ("disk", "memory")


@pytest.mark.parametrize("recomputed", [0, 16])
@pytest.mark.parametrize("solver", [solvers.adaround(num_steps=20, act_steps=10, batch_size=8), solvers.second_order(), solvers.brecq(num_steps=20, act_steps=10, batch_size=8)])  # fmt: skip
def test_the_codes_do_not_know_where_caches_are(solver, recomputed, monkeypatch):
    monkeypatch.setattr(_memory, "RECOMPUTED", recomputed)
    monkeypatch.setattr(_memory, "PASS_SHARE", 1e9)  # as many examples at once: sums in the same order
    monkeypatch.setattr(_memory, "STREAM", 8)
    whole = codes(solver)
    for budget in (LITTLE, SOME):
        np.testing.assert_array_equal(codes(solver, memory_budget_gb=budget), whole)


def test_caches_in_bfloat16_learn_nearly_the_same():
    solver = solvers.adaround(num_steps=20, act_steps=10, batch_size=8)
    whole, half = codes(solver), codes(solver, bfloat16_caches=True)
    assert np.abs(whole.astype(int) - half).max() <= 1 and np.mean(whole == half) > 0.9
    np.testing.assert_array_equal(codes(solver, bfloat16_caches=True, memory_budget_gb=LITTLE), whole)  # what is computed again is not rounded


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32])
def test_rows_come_back_from_disk(dtype):
    array, values = OnDisk((5, 2, 3), dtype), np.arange(30).reshape(5, 2, 3).astype(dtype)
    array[0:2], array[2:9] = values[:2], values[2:]
    np.testing.assert_array_equal(array[np.array([4, 0, 4])], values[[4, 0, 4]])
    np.testing.assert_array_equal(array[1:3], values[1:3])
