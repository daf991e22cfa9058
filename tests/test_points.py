"""Multipoint weights and SPARQ activations through the front door: points by output error, learned rounding, refusals."""

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import solvers
from brecq_jax._qarray import QArray, quantize_array, to_rows
from brecq_jax.formats import Multipoint, Sparq, Uniform

COUNT, TRAINED = 16, 14  # calibration examples, and those that do not judge
FORMAT = Multipoint(3, points=3, tolerance=0.15, select="linf")


def net(params, x):
    """A convolution, a convolution in two groups, a dense layer; values after ReLUs in between."""
    for name, groups in (("first", 1), ("grouped", 2)):
        x = jax.lax.conv_general_dilated(x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ params["last"]


def parameters():
    draw = np.random.default_rng(0)
    spread = np.linspace(0.2, 2, 8)
    shapes = {"first": (3, 3, 2, 8), "grouped": (3, 3, 4, 8), "last": (8, 8)}
    return {n: jnp.asarray(spread * draw.standard_t(4, s) / math.sqrt(math.prod(s[:-1])), jnp.float32) for n, s in shapes.items()}


def images():
    return np.random.default_rng(1).standard_normal((COUNT, 6, 6, 2)).astype(np.float32)


def quantize(apply=net, params=None, inputs=None, **settings):
    settings = {"weights": FORMAT, "activations": None, "solver": solvers.multipoint(), **settings}
    return brecq_jax.quantize(parameters() if params is None else params, apply, images() if inputs is None else inputs, progress=False, **settings)


@pytest.fixture(scope="module")
def quantized():
    return quantize()


def test_every_channel_meets_the_output_error_or_has_all_points(quantized):
    """What each op reads comes from the already-quantized ones before it."""
    x = jnp.asarray(images()[[n for n in range(COUNT) if n % 8 != 7]])
    found, params, means = quantized.dequantized(), parameters(), []
    for name, groups in (("first", 1), ("grouped", 2), ("last", 0)):

        def out(weight, x=x, groups=groups):
            if not groups:
                return x.mean((1, 2)) @ weight
            return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)

        energy, lost = (np.asarray(jnp.sum(jnp.square(out(w)).reshape(-1, 8), 0)) for w in (params[name], params[name] - found[name]))
        counts = FORMAT.counts(quantized.params[name].grid)
        assert np.all((np.sqrt(lost / energy) <= FORMAT.tolerance * 1.001) | (counts == FORMAT.points))
        means.append(counts.mean())
        x = jax.nn.relu(out(found[name]))
    assert 1 < np.mean(means) < FORMAT.points


def test_every_example_that_is_learned_from_counts():
    """Of 40 examples 35 are learned from, 32 at a time: the last three are the only ones that reach some inputs."""
    draw = np.random.default_rng(2)
    x = draw.standard_normal((40, 3, 12)).astype(np.float32)
    rows = np.array([n for n in range(40) if n % 8 != 7])
    x[:, :, 6:] = 0
    x[rows[32:], :, 6:] = 30 * draw.standard_normal((3, 3, 6))
    weight = jnp.asarray(draw.standard_normal((12, 8)) * np.where(np.arange(12) < 6, 1, 0.1)[:, None], jnp.float32)
    found = quantize(lambda p, x: x @ p["w"], {"w": weight}, x).dequantized()["w"]
    energy, lost = (jnp.sum(jnp.square(x[rows] @ w), (0, 1)) for w in (weight, weight - found))
    counts = FORMAT.counts(quantize(lambda p, x: x @ p["w"], {"w": weight}, x).params["w"].grid)
    assert np.all((np.sqrt(lost / energy) <= FORMAT.tolerance * 1.001) | (counts == FORMAT.points))
    assert np.sum(counts < FORMAT.points) >= 1


def test_without_a_tolerance_to_meet_every_channel_is_plain():
    format = dataclasses.replace(FORMAT, tolerance=math.inf)
    found = quantize(weights=format)
    for name, weight in parameters().items():
        q, rows = found.params[name], to_rows(weight, (weight.ndim - 1,))
        assert q.format == format and np.all(format.counts(q.grid) == 1)
        np.testing.assert_array_equal(to_rows(q.codes, q.channel_axes), format.encode(rows, format.fit(rows)))


def test_the_report_counts_what_is_kept(quantized):
    sizes = {t.name: t.size_bits for t in quantized.report.tensors}
    for name, q in quantized.params.items():
        elements = q.size // 8
        assert sizes[name] == int(FORMAT.counts(q.grid).sum()) * (3 * elements + 32) + 8 * 2
    assert "up to 3 points" in quantized.report.plan


@pytest.mark.parametrize("rounding", [solvers.StraightThrough(), solvers.RectifiedSigmoid(scale_learning_rate=1e-3)], ids=["straight", "sigmoid"])
def test_learned_rounding_chooses_in_the_last_point(quantized, rounding):
    q = quantized.params["grouped"]
    rows = to_rows(parameters()["grouped"], q.channel_axes)
    variables, fixed = rounding.start(q, rows)
    now, _ = rounding.rows(q.format, variables, fixed, 0.0)
    assert float(jnp.abs(now - rows).max()) <= float(q.grid.scale.max())
    finished = rounding.finish(q, variables, fixed, rows)
    assert finished.codes.dtype == jnp.uint8
    for part in ("earlier", "ratios"):
        np.testing.assert_array_equal(getattr(finished.grid, part), getattr(q.grid, part))
    low, high = (q.format.decode(c, q.grid) for c in q.format.neighbors(rows, q.grid))
    decoded = to_rows(finished.decode(), q.channel_axes)
    assert np.all(np.isclose(decoded, low, atol=1e-6) | np.isclose(decoded, high, atol=1e-6))


def test_points_then_learned_rounding_then_a_checkpoint(tmp_path, quantized):
    settings = solvers.Reconstruction(
        error=solvers.relative_error, rounding=solvers.StraightThrough(), num_steps=60, batch_size=8, learning_rate=1e-2, checks=4, patience=4
    )
    learned = quantize(solver=solvers.chain(solvers.multipoint(), solvers.reconstruct(settings)))
    changed = 0
    for name, q in learned.params.items():
        np.testing.assert_array_equal(q.grid.earlier, quantized.params[name].grid.earlier)
        changed += int(jnp.sum(q.codes != quantized.params[name].codes))
    assert changed and all(r.kept for r in learned.report.blocks)
    brecq_jax.save(tmp_path / "model", learned)
    restored = brecq_jax.restore(tmp_path / "model", net)
    assert restored.params["first"].format == FORMAT
    np.testing.assert_array_equal(restored(images()), learned(images()))


def same(left, right):
    return all(map(np.array_equal, *map(jax.tree.leaves, (left, right))))


def test_a_block_keeps_what_was_learned_before_where_points_do_not_err_less():
    def all_points(problem, guess, key):
        graph = problem.graph(COUNT)
        most = {n: quantize_array(w, dataclasses.replace(FORMAT, tolerance=0.0), (w.ndim - 1,)) for n, w in parameters().items()}
        return guess.with_weights({n: dataclasses.replace(q, format=FORMAT) for n, q in most.items()}, graph), ()

    settings = dict(activations={"first": None, ".*": Uniform(8)})
    before = quantize(solver=all_points, **settings)
    after = quantize(solver=solvers.chain(all_points, solvers.multipoint()), **settings)
    assert same((after.params, after.activations), (before.params, before.activations))
    assert len(after.report.blocks) and not any(r.kept for r in after.report.blocks)


def test_a_block_keeps_its_guess_where_neither_one_point_nor_more_err_less(monkeypatch):
    module = sys.modules["brecq_jax.solvers.multipoint"]  # `solvers.multipoint` is the function
    fit = module._fit

    def worse(format, rows, gram):
        codes, grid = fit(format, rows, gram)
        return codes, grid._replace(scale=3 * grid.scale)

    monkeypatch.setattr(module, "_fit", worse)
    found, guess = quantize(), quantize(solver=solvers.nearest())
    assert same(found.params, guess.params)
    assert any(np.any(FORMAT.counts(q.grid) > 1) for q in guess.params.values())


def test_one_point_survives_a_checkpoint(tmp_path):
    found = quantize(weights=Multipoint(4, points=1), solver=solvers.nearest())
    brecq_jax.save(tmp_path / "model", found)
    np.testing.assert_array_equal(brecq_jax.restore(tmp_path / "model", net)(images()), found(images()))


def test_slices_of_a_stacked_leaf_have_their_own_points():
    params = {"layers": jax.random.t(jax.random.key(2), 4.0, (3, 8, 8)) * jnp.array([0.2, 1.0, 3.0])[:, None, None]}
    inputs = np.random.default_rng(3).standard_normal((COUNT, 8)).astype(np.float32)

    def apply(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]

    format = dataclasses.replace(FORMAT, tolerance=0.02)
    q = quantize(apply, params, inputs, weights=format).params["layers"]
    assert isinstance(q, QArray) and q.grid.earlier.shape == (24, 2, 8)
    counts = format.counts(q.grid)
    assert counts.min() < counts.max()
    rows = to_rows(params["layers"], q.channel_axes)
    np.testing.assert_allclose(to_rows(q.decode(), q.channel_axes), q.format.decode(q.format.encode(rows, q.grid), q.grid), rtol=1e-5, atol=1e-6)


def detector(params, x):
    """Like SSD with a feature pyramid: boxes and classes from heads that two levels share, the upper one added to the lower."""

    def conv(x, name, stride=1, groups=1):
        return jax.lax.conv_general_dilated(
            x, params[name], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    low = jax.nn.relu(conv(conv(x, "stem", 2), "depthwise", groups=8))
    high = jax.nn.relu(conv(low, "down", 2))
    top = conv(high, "lateral_high")
    levels = {"low": conv(low, "lateral_low") + jnp.repeat(jnp.repeat(top, 2, 1), 2, 2), "high": top}
    towers = {level: jax.nn.relu(conv(value, "tower")) for level, value in levels.items()}
    return {head: {level: conv(value, head) for level, value in towers.items()} for head in ("boxes", "classes")}


@pytest.fixture(scope="module")
def detected():
    draw, spread = np.random.default_rng(3), np.linspace(0.3, 2, 8)
    shapes = {"stem": (3, 3, 3, 8), "depthwise": (3, 3, 1, 8), "down": (3, 3, 8, 8), "lateral_low": (1, 1, 8, 8), "lateral_high": (1, 1, 8, 8)}
    shapes |= {"tower": (3, 3, 8, 8), "boxes": (3, 3, 8, 4), "classes": (3, 3, 8, 6)}
    params = {n: jnp.asarray(draw.standard_t(4, s) * spread[: s[-1]] / math.sqrt(math.prod(s[:-1])), jnp.float32) for n, s in shapes.items()}
    x = draw.standard_normal((COUNT, 16, 16, 3)).astype(np.float32)

    def found(points, **settings):
        return quantize(detector, params, x, weights=dataclasses.replace(FORMAT, points=points, tolerance=0.1), **settings)

    return params, x, found


def test_a_detection_net_gets_points_in_every_layer_and_errs_less(detected):
    """Heads that several levels read, depthwise convolutions, several outputs of several shapes."""
    params, x, found = detected
    more, one = found(3), found(1)
    counts = {name: q.format.counts(q.grid).mean() for name, q in more.params.items()}
    assert set(counts) == set(params)
    assert all(count > 1 for count in counts.values()), counts
    exact = detector(params, x)

    def lost(quantized):
        return jax.tree.map(lambda a, b: float(jnp.sum(jnp.square(a - b)) / jnp.sum(jnp.square(b))), quantized(x), exact)

    less, much = lost(more), lost(one)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a < b, less, much))), (less, much)


def test_a_detection_net_of_points_runs_on_sums_of_integer_products(detected):
    _, x, found = detected
    quantized = found(3, activations=Uniform(8))
    integer = brecq_jax.deploy.to_integer(quantized, x[:2])
    assert integer.kept_float == (), integer
    for level in ("low", "high"):
        for head in ("boxes", "classes"):
            exact, ours = quantized(x)[head][level], integer(x)[head][level]
            assert float(jnp.abs(exact - ours).max()) <= 1e-4 * float(jnp.abs(exact).max())


def test_a_plan_without_points_is_refused():
    with pytest.raises(ValueError, match="Write weights=formats.Multipoint"):
        quantize(weights=Uniform(4))


# SPARQ

SPARQ = {"first": None, "last": Uniform(8), ".*": Sparq(4)}  # means over pixels, which `last` reads, have no zeros


@pytest.mark.parametrize("preset", [None, "brecq"])
def test_ops_read_re_coded_activations(preset):
    """The net by hand: 8-bit codes of what each op reads, re-coded along its channels."""
    found = quantize(weights=None, activations=SPARQ, preset=preset, solver=solvers.nearest())
    params = parameters()

    def read(x, name):
        scale = found.activations[name].scale.squeeze()
        codes = jnp.clip(jnp.round(x / scale), 0, 255).astype(jnp.uint8)
        codes = codes if name == "last" else Sparq(4).recode(codes, -1)
        return scale * codes.astype(jnp.float32)

    x = jnp.asarray(images())
    for name, groups in (("first", 1), ("grouped", 2)):
        x = x if name == "first" else read(x, name)
        x = jax.lax.conv_general_dilated(x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)
        x = jax.nn.relu(x)
    np.testing.assert_allclose(found(images()), read(x.mean((1, 2)), "last") @ params["last"], rtol=1e-3, atol=1e-4)
    assert all(int(g.zero_point.squeeze()) == 0 for g in found.activations.values())
    assert "8 bit, read by 4 in pairs" in found.report.plan


def test_it_is_a_plan_entry_under_learned_rounding_and_survives_a_checkpoint(tmp_path):
    settings = dict(weights=Uniform(4), activations=SPARQ, preset="uniform")
    found = quantize(**settings, solver=solvers.annealed(num_steps=10, drop_prob=0.5))
    brecq_jax.save(tmp_path / "model", found)
    restored = brecq_jax.restore(tmp_path / "model", net)
    assert dict(restored.program.sites)["grouped"] == Sparq(4)
    np.testing.assert_array_equal(restored(images()), found(images()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(activations=Sparq(4)), "activations: first: Sparq re-codes unsigned .* values after a ReLU, and this is the network's own input"),
        (dict(activations=SPARQ | {"last": Sparq(4)}), "activations: last: Sparq re-codes unsigned .* values after a ReLU. Here 0.0363 was seen as the least"),
        (dict(weights=Sparq(4)), r"weights: first is given Sparq.* write activations="),
    ],
)
def test_it_is_refused_where_it_has_no_place(settings, words):
    with pytest.raises(ValueError, match=words):
        quantize(**{"weights": None, **settings}, solver=solvers.nearest())


def test_it_is_refused_where_a_sum_has_no_pairs():
    params = {"pointwise": jnp.eye(4), "depthwise": jnp.ones((3, 3, 1, 4))}

    def apply(params, x):
        x = jax.nn.relu(x @ params["pointwise"])
        x = jax.lax.conv_general_dilated(x, params["depthwise"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4)
        return x.mean((1, 2))

    inputs = images().reshape(COUNT, 6, 3, 4)
    with pytest.raises(ValueError, match="depthwise adds up 1 in each of its\n  4 groups"):
        quantize(apply, params, inputs, weights=None, activations={"pointwise": None, ".*": Sparq(4)}, solver=solvers.nearest())
    quantize(apply, params, inputs, weights=None, activations={"pointwise": None, ".*": Sparq(4, pairs=False)}, solver=solvers.nearest())
