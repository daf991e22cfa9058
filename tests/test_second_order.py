"""Second-order rounding against the definition, exhaustive search, and what it must never do."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import solvers
from brecq_jax._interpret import param_values, whole
from brecq_jax._qarray import to_rows
from brecq_jax.formats import Affine, Binary, Uniform
from brecq_jax.solvers import _quadratic
from brecq_jax.solvers._lattice import search, value
from brecq_jax.solvers._solver import split

CONV = jax.lax.conv_general_dilated
NHWC = ("NHWC", "HWIO", "NHWC")
# name: (inputs, weight, function)
OPS = {
    "dense": ((6, 5), (5, 3), lambda w, x: x @ w),
    "dense on tokens": ((6, 4, 5), (5, 3), lambda w, x: x @ w),
    "weight first": ((6, 5), (3, 5), lambda w, x: jnp.einsum("oi,bi->bo", w, x)),
    "heads": ((6, 4, 5), (5, 2, 3), lambda w, x: jnp.einsum("bti,ihd->bthd", x, w)),
    "turned": ((6, 5), (3, 5), lambda w, x: x @ w.T),
    "turned heads": ((6, 4, 5), (3, 2, 5), lambda w, x: jnp.einsum("bti,ihd->bthd", x, w.transpose(2, 1, 0))),
    "turned and contracted": ((6, 4, 2, 3), (5, 3, 2), lambda w, x: jnp.einsum("bthd,hdo->bto", x, w.transpose(2, 1, 0))),
    "turned kernel": ((4, 6, 5, 3), (4, 3, 3, 2), lambda w, x: CONV(x, w.transpose(2, 3, 1, 0), (1, 1), "SAME", dimension_numbers=NHWC)),
    "two contracted": ((6, 4, 2, 3), (2, 3, 5), lambda w, x: jnp.einsum("bthd,hdo->bto", x, w)),
    "batched experts": ((2, 6, 5), (2, 5, 3), lambda w, x: jnp.einsum("ebi,eio->ebo", x, w)),
    "conv": ((4, 6, 6, 3), (3, 3, 3, 4), lambda w, x: CONV(x, w, (1, 1), "SAME", dimension_numbers=NHWC)),
    "strided": ((4, 7, 7, 3), (3, 3, 3, 4), lambda w, x: CONV(x, w, (2, 2), "SAME", dimension_numbers=NHWC)),
    "dilated": ((4, 7, 7, 3), (3, 3, 3, 4), lambda w, x: CONV(x, w, (1, 1), "VALID", rhs_dilation=(2, 2), dimension_numbers=NHWC)),
    "transposed": ((4, 5, 5, 3), (3, 3, 3, 4), lambda w, x: jax.lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=NHWC)),
    "grouped": ((4, 6, 6, 4), (3, 3, 2, 6), lambda w, x: CONV(x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=2)),
    "depthwise": ((4, 6, 6, 4), (3, 3, 1, 4), lambda w, x: CONV(x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=4)),
    "channels first": ((4, 3, 6, 6), (4, 3, 3, 3), lambda w, x: CONV(x, w, (1, 1), "SAME")),
    "1-D": ((4, 8, 3), (3, 3, 4), lambda w, x: CONV(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))),
    "3-D": ((2, 4, 4, 4, 2), (2, 2, 2, 2, 3), lambda w, x: CONV(x, w, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))),
}


EVERY_ROW = 10**9


def traced(apply, params, x):
    graph = brecq_jax.trace(apply, params, x)
    block = whole(graph)
    return graph, block, param_values(graph, block, jax.tree.leaves(params))


def quadratic_of(apply, params, x, exact_x):
    """The op's statistics for the first weight, and where its output is followed to."""
    graph, block, values = traced(apply, params, x)
    types = _quadratic.program_types(block.program, [x], values, block.constants)
    to = _quadratic.reach(block.program, 0, types, block.constants)
    step = block.program.steps[block.program.ops[0].step][0]
    assert not _quadratic.unread(block.program.ops[0], step, graph.weights[graph.ops[0].weight].channel_axes)
    sums = _quadratic.statistics(block.program, 0, to, (), False, None, EVERY_ROW, ([x], [exact_x]), None, values, values, list(block.constants), {})
    return graph, to, sums


@pytest.mark.parametrize("kind", OPS)
def test_the_quadratic_is_the_error_of_the_output(kind):
    shape, weight_shape, apply = OPS[kind]
    keys = jax.random.split(jax.random.key(0), 5)
    x, noise = (jax.random.normal(k, shape) for k in keys[:2])
    w, one, other = (jax.random.normal(k, weight_shape) for k in keys[2:])
    rough = x + 0.3 * noise
    graph, _, (gram, cross, rows) = quadratic_of(lambda p, x: apply(p["w"], x), {"w": w}, rough, x)
    target = apply(w, x)
    (axes,) = {weight.channel_axes for weight in graph.weights.values()}

    def value(v):
        v = to_rows(v, axes).reshape(len(gram), -1, gram.shape[-1])
        return float(jnp.einsum("gck,gkl,gcl->", v, gram, v) - 2 * jnp.sum(v * cross.reshape(v.shape)))

    def error(v):
        return float(jnp.sum(jnp.square(apply(v, rough) - target)))

    assert value(one) - value(other) == pytest.approx(error(one) - error(other), rel=2e-4)
    assert rows * len(gram) * (cross.shape[0] // len(gram)) == target.size


@pytest.mark.parametrize(
    ("activation", "bounds"),
    [
        (jax.nn.relu, (0, math.inf)),
        (jax.nn.relu6, (0, 6)),
        (lambda x: jnp.maximum(x, 0), (0, math.inf)),
        (lambda x: jnp.clip(x, 0, 6), (0, 6)),
        (jax.nn.gelu, (-math.inf, math.inf)),
        (lambda x: jnp.maximum(x, -1), (-math.inf, math.inf)),
        (jnp.abs, (-math.inf, math.inf)),
    ],
)
def test_a_relu_behind_a_batch_norm_and_a_shortcut_is_seen(activation, bounds):
    def apply(params, x):
        y = (x @ params["w"]) * params["scale"] + params["bias"]
        return activation(y + x) @ params["head"]

    params = {"w": jnp.eye(4), "scale": jnp.ones(4), "bias": jnp.zeros(4), "head": jnp.eye(4)}
    x = jax.random.normal(jax.random.key(0), (8, 4))
    _, to, _ = quadratic_of(apply, params, x, x)
    assert (to.low, to.high) == bounds


def test_an_output_that_is_broadcast_is_followed_no_further():
    def apply(params, x):
        return jax.nn.relu(x.mean(1, keepdims=True) @ params["w"] + x) @ params["head"]

    keys = jax.random.split(jax.random.key(5), 3)
    params = {name: jax.random.normal(k, (6, 6)) / 3 for name, k in zip(("w", "head"), keys[:2], strict=True)}
    x = jax.random.normal(keys[2], (64, 4, 6)) + jax.random.normal(jax.random.key(9), (64, 1, 1))
    _, to, (_, _, rows) = quadratic_of(apply, params, x, x)
    assert rows == 64 and to.low == -math.inf
    errors = []
    for solver in (solvers.nearest(), solvers.second_order(), solvers.refined(num_steps=40)):
        q = brecq_jax.quantize(params, apply, x, weights=Uniform(2), activations=None, blocks="net", solver=solver, progress=False)
        errors.append(float(jnp.mean(jnp.square(q(x) - apply(params, x)))))
    assert errors[1] < errors[0] and errors[2] < errors[0]


def test_lowering_the_quadratic_lowers_the_error_behind_a_relu():
    def apply(params, x):
        return jax.nn.relu((x @ params["w"]) * 2 + 0.1)

    keys = jax.random.split(jax.random.key(1), 3)
    x, w, v = jax.random.normal(keys[0], (64, 6)), *(jax.random.normal(k, (6, 1)) for k in keys[1:])
    graph, block, _ = traced(apply, {"w": w}, x)
    to = _quadratic.reach(block.program, 0, _quadratic.program_types(block.program, [x], [w], block.constants), block.constants)

    def error(v):
        return float(jnp.sum(jnp.square(apply({"w": v}, x) - apply({"w": w}, x))))

    errors = [error(v)]
    for _ in range(5):
        gram, cross, _ = _quadratic.statistics(block.program, 0, to, (), False, None, EVERY_ROW, ([x], [x]), None, [v], [w], list(block.constants), {})
        v = jnp.linalg.solve(gram[0], cross[0])[:, None]
        errors.append(error(v))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


def problem(seed, channels, elements, rank=None):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (64, rank or elements)) @ jax.random.normal(keys[1], (rank or elements, elements))
    weight = jax.random.normal(keys[2], (channels, elements))
    gram = (x.T @ x)[None] / 64
    return gram, weight @ gram[0], weight


def solve(format, damping, gram, cross, weight):
    grid = format.fit(weight)
    nearest = format.decode(format.encode(weight, grid), grid)
    found, new = search(format, damping, gram, cross, grid, weight, nearest)
    return nearest, grid, found, new


def exhaustive(format, gram, cross, grid):
    """The least value that any codes of one row can have."""
    points = np.asarray(format.decode(jnp.arange(2**format.bits, dtype=jnp.uint8)[None], grid))[0]
    every = jnp.asarray(list(itertools.product(points, repeat=len(gram))))
    return points, float(value(gram, cross, every).min())


def test_small_problems_end_at_the_exhaustive_minimum():
    format, exact = Uniform(2, granularity="per_tensor"), 0  # one grid for both channels, which stays
    for seed in range(20):
        gram, cross, weight = problem(seed, 2, 5)
        nearest, grid, found, _ = solve(format, 0.0, gram, cross, weight)
        for c in range(2):
            points, least = exhaustive(format, gram[0], cross[c], grid)
            mine = float(value(gram[0], cross[c], found[c]))
            assert mine >= least - 1e-3 * abs(least)
            exact += mine <= least + 1e-4 * abs(least)
            changed = np.asarray([found[c].at[k].set(p) for k in range(5) for p in points])
            assert mine <= float(value(gram[0], cross[c], jnp.asarray(changed)).min()) + 1e-3 * abs(mine)  # no single change helps
            assert mine <= float(value(gram[0], cross[c], nearest[c])) + 1e-6
    assert exact == 40


def test_grids_that_move_go_below_the_best_codes_on_the_first_one():
    format, gains = Uniform(2), []
    for seed in range(20):
        gram, cross, weight = problem(seed, 1, 5)
        _, grid, found, _ = solve(format, 0.0, gram, cross, weight)
        best = float(value(gram[0], cross[0], jnp.linalg.solve(gram[0], cross[0])))
        gains.append((float(value(gram[0], cross[0], found[0])) - best) / (exhaustive(format, gram[0], cross[0], grid)[1] - best))
    assert max(gains) <= 1.001 and np.mean(gains) < 0.8


@pytest.mark.parametrize("format", [Uniform(2), Uniform(3, symmetric=True), Uniform(2, granularity=8), Uniform(2, granularity="per_tensor")], ids=str)
@pytest.mark.parametrize("rank", [None, 3], ids=["full", "low rank"])
def test_never_above_nearest(format, rank):
    gram, cross, weight = problem(7, 5, 32, rank)
    gram, cross = gram.at[:, 4].set(0).at[:, :, 4].set(0), cross.at[:, 4].set(0)  # a dead input
    nearest, _, found, grid = solve(format, 0.01, gram, cross, weight)
    damping = 0.01 * jnp.mean(jnp.diagonal(gram[0]))
    values = [value(gram[0] + damping * jnp.eye(32), cross + damping * weight, rows) for rows in (found, nearest)]
    assert (values[0] <= values[1] + 1e-4 * jnp.abs(values[1])).all() and float(values[0].sum()) < float(values[1].sum())
    np.testing.assert_allclose(format.decode(format.encode(found, grid), grid), found, rtol=1e-4, atol=1e-5)  # on the grid


@pytest.mark.parametrize("kind", OPS)
def test_every_kind_of_op_is_rounded_and_gains(kind):
    shape, weight_shape, apply = OPS[kind]
    if kind == "batched experts":
        pytest.skip("its calibration examples are not on axis 0")
    keys = jax.random.split(jax.random.key(2), 2)
    x = jax.random.normal(keys[0], (128, *shape[1:]))
    x = x + jax.random.normal(jax.random.key(9), (128, *(1 for _ in shape[1:])))  # white inputs would leave nothing to gain
    params = {"w": jax.random.normal(keys[1], weight_shape)}
    run = lambda p, x: apply(p["w"], x)  # noqa: E731
    errors = []
    for solver in (solvers.nearest(), solvers.second_order()):
        q = brecq_jax.quantize(params, run, x, weights=Uniform(2), activations=None, solver=solver, progress=False)
        errors.append(float(jnp.mean(jnp.square(q(x) - run(params, x)))))
    assert errors[1] < errors[0]
    assert all(block.kept for block in q.report.blocks)


def test_weights_that_the_closed_form_leaves_are_named_in_the_report():
    keys = jax.random.split(jax.random.key(6), 4)
    params = {"table": jax.random.normal(keys[0], (8, 6)), "flat": jax.random.normal(keys[1], (4, 9)), "turned": jax.random.normal(keys[2], (6, 6))}
    run = lambda p, x: p["table"][x].mean(1) @ p["turned"].T @ p["flat"].reshape(6, 6)  # noqa: E731
    x = jax.random.randint(keys[3], (64, 5), 0, 8)
    for solver in (solvers.second_order(), solvers.refined(num_steps=0)):
        notes = brecq_jax.quantize(params, run, x, weights=Uniform(2), activations=None, solver=solver, progress=False).report.notes
        named = [note for note in notes if note.startswith("second_order: ")]
        assert len(named) == 2 and any("table" in n and "lookup" in n for n in named) and any("flat" in n and "between" in n for n in named)


@pytest.mark.parametrize(("count", "train"), [(50, 44), (80, 70), (36, 32)])
def test_every_example_that_is_learned_from_counts_once(monkeypatch, count, train):
    x, parts = jax.random.normal(jax.random.key(7), (count, 3, 6)), []

    def seen(*arguments):
        parts.append(statistics(*arguments))
        return parts[-1]

    statistics = _quadratic.statistics
    monkeypatch.setattr(_quadratic, "statistics", seen)
    solver = solvers.second_order(rounds=1)
    brecq_jax.quantize({"w": jnp.eye(6)}, lambda p, x: x @ p["w"], x, weights=Uniform(2), activations=None, solver=solver, progress=False)
    rows, _ = split(count)
    wanted = jnp.einsum("brk,brl->kl", x[rows], x[rows])
    assert len(rows) == train and sum(float(n) for _, _, n in parts) == 3 * train
    np.testing.assert_allclose(sum(gram[0] for gram, _, _ in parts), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sum(cross for _, cross, _ in parts), wanted, rtol=1e-4, atol=1e-4)


def test_errors_of_the_prefix_are_made_good():
    """The second layer sees what the first one lost, so the end is nearer than with each layer on its own targets."""
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (256, 16))
    params = {"a": jax.random.normal(keys[1], (16, 16)) / 4, "b": jax.random.normal(keys[2], (16, 4)) / 4}
    run = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]  # noqa: E731
    errors = {}
    for name, solver in {"nearest": solvers.nearest(), "second": solvers.second_order()}.items():
        q = brecq_jax.quantize(params, run, x, weights=Uniform(2), activations=None, solver=solver, blocks="layer", progress=False)
        errors[name] = float(jnp.mean(jnp.square(q(x) - run(params, x))))
    assert errors["second"] < 0.6 * errors["nearest"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_models_of_half_precision_are_rounded_too(dtype):
    keys = jax.random.split(jax.random.key(4), 3)
    x = jax.random.normal(keys[0], (64, 16)).astype(dtype)
    params = {n: jax.random.normal(k, (16, 16)).astype(dtype) / 4 for n, k in zip("ab", keys[1:], strict=True)} | {"bias": jnp.full(16, 0.1, dtype)}
    run = lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"] + p["bias"]  # noqa: E731
    quantized = brecq_jax.quantize(params, run, x, weights=Uniform(2), activations=None, preset=None, solver=solvers.second_order(), progress=False)
    assert quantized(x).dtype == dtype and any(b.kept for b in quantized.report.blocks)


@pytest.mark.parametrize("format", [Affine(2), Binary(points=2), Uniform(2)], ids=str)
def test_what_is_found_is_what_its_codes_say(format):
    rows = jax.random.normal(jax.random.key(0), (96, 24))
    inputs = jax.random.normal(jax.random.key(1), (64, 24)) @ (jnp.eye(24) + 0.3)
    gram, grid = inputs.T @ inputs, format.fit(rows)
    found, grid = search(format, 0.01, gram[None], rows @ gram, grid, rows, format.decode(format.encode(rows, grid), grid))
    np.testing.assert_allclose(format.decode(format.encode(found, grid), grid), found, rtol=1e-5, atol=1e-6)
