"""Latencies are those of the device's own programs, and what a plan costs follows from them."""

import itertools

import jax
import jax.numpy as jnp
import pytest

import brecq_jax
from brecq_jax import mixed_precision
from brecq_jax.formats import Uniform
from brecq_jax.mixed_precision import FLOAT_BITS, Budget, SystolicArray, latency
from brecq_jax.models import DigitsNet


def stack(params, x):
    """A small layer, two equal large ones, a depthwise convolution behind a transposed weight."""
    x = jnp.tile(jax.nn.relu(x @ params["small"]), 64)
    x = jax.nn.relu(jax.nn.relu(x @ params["wide0"]) @ params["wide1"])
    image = x.reshape(-1, 8, 8, 16)
    return x, jax.lax.conv_general_dilated(
        image, params["depthwise"].transpose(1, 2, 3, 0), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=16
    )


@pytest.fixture(scope="module")
def graph():
    params = {"small": jnp.zeros((16, 16)), "wide0": jnp.zeros((1024, 1024)), "wide1": jnp.zeros((1024, 1024)), "depthwise": jnp.zeros((16, 3, 3, 1))}
    return brecq_jax.trace(stack, params, jnp.zeros((64, 16)))


def test_a_table_has_every_op_at_every_pair_and_equal_ops_are_measured_once(graph):
    table = mixed_precision.measure_latency(graph, (3, 8, FLOAT_BITS), (8, FLOAT_BITS), rounds=3, progress=False)
    assert set(table) == {(name, w, a) for name in ("small", "wide0", "wide1", "depthwise") for w in (3, 8, 32) for a in (8, 32)}
    for w, a in ((3, 8), (8, 32), (32, 32)):
        assert table["wide0", w, a] == table["wide1", w, a]  # which op is slower depends on what else the machine does
    assert min(table.values()) >= 0  # an op that takes less than the noise of two measurements


@pytest.mark.parametrize(("of_the_op", "of_nothing", "us"), [(5e-6, 2e-6, 3.0), (2e-6, 5e-6, 0.0)])
def test_a_latency_is_the_time_of_the_op_less_that_of_nothing_shared_out_over_the_batch(graph, monkeypatch, of_the_op, of_nothing, us):
    clock = itertools.cycle([of_the_op, of_nothing])
    monkeypatch.setattr(latency, "_seconds", lambda call: next(clock))
    table = mixed_precision.measure_latency(graph, (8,), (8,), rounds=3, progress=False)
    assert table == {(name, 8, 8): pytest.approx(us / 64) for name in ("small", "wide0", "wide1", "depthwise")}


def test_slices_of_a_scanned_stack_are_one_measurement():
    def apply_fn(params, x):
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, params)[0]

    graph = brecq_jax.trace(apply_fn, jnp.zeros((3, 64, 64)), jnp.zeros((2, 64)))
    table = mixed_precision.measure_latency(graph, (4,), (8,), rounds=1, progress=False)
    assert len(table) == 3 and len(set(table.values())) == 1


@pytest.mark.parametrize(("bits", "words"), [({"weight_bits": (1, 8)}, r"weight_bits=\[1\]"), ({"act_bits": (16,)}, r"act_bits=\[16\]")])
def test_bits_that_no_integer_op_has_are_refused(graph, bits, words):
    with pytest.raises(ValueError, match=words):
        mixed_precision.measure_latency(graph, **bits)


@pytest.mark.parametrize("activations", [None, Uniform(4)])
def test_the_costs_of_a_plan_need_no_sensitivities(activations):
    model = DigitsNet()
    graph = brecq_jax.trace(model.apply, model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))), jnp.zeros((2, 8, 8, 1)))
    plan = brecq_jax.make_plan(graph, Uniform(5), activations, "brecq")
    table = SystolicArray().latency(graph)
    costs = mixed_precision.plan_costs(graph, plan, table)
    assert costs["size_bits"] == plan.size_bits
    bits = {name: format.bits if format else FLOAT_BITS for name, format in plan.activations.items()}
    assert costs["latency_us"] == pytest.approx(sum(table[op.name, plan.weights[op.weight].bits, bits[op.site]] for op in graph.ops))
    assert set(costs) == {"size_bits", "bops", "latency_us"} > set(mixed_precision.plan_costs(graph, plan))


def test_a_search_spends_the_budget_of_a_table(graph):
    """Entries as `measure_latency` names them, with times that no load of this machine moves: more bits cost more."""
    table = {(op.name, bits, 8): 10.0 * bits for op in graph.ops for bits in (2, 8)}
    assert set(table) == set(mixed_precision.measure_latency(graph, (2, 8), (8,), rounds=1, progress=False))
    key = jax.random.key(0)
    params = {name: jax.random.normal(jax.random.fold_in(key, n), shape) for n, (name, shape) in enumerate(graph.leaves)}
    found = mixed_precision.measure(params, stack, jax.random.normal(key, (8, 16)), weights=(Uniform(2), Uniform(8)), progress=False)
    costs = {b: mixed_precision.plan_costs(graph, brecq_jax.make_plan(graph, Uniform(b), Uniform(8)), table)["latency_us"] for b in (2, 8)}
    limit = (costs[2] + costs[8]) / 2
    plan = brecq_jax.search(graph, found, Budget(latency_us=limit), activations=Uniform(8), latency=table)
    assert costs[2] < mixed_precision.plan_costs(graph, plan, table)["latency_us"] <= limit
