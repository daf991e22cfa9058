"""Range rules, judged by a slow search and by the released code of BRECQ.

vectors/brecq_quantizers.npz holds inputs and outputs (no code) of the official quantizers, yhhhli/BRECQ at e455d62
(MIT), on random tensors; every channel straddles zero.
Keys: `<input>[_<method>]_<bits>_{delta,zero_point,dequantized}`;
activations (`a_…`) are per tensor and `mse`. Where rows do not straddle zero we differ on purpose: `mse` there puts
the zero point outside the codes; we stretch the range to zero.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brecq_jax.formats import LpRange, MinMax, TailRange, Uniform

OFFICIAL = np.load(pathlib.Path(__file__).parent / "vectors" / "brecq_quantizers.npz")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method, ranges", [("mse", LpRange()), ("max", MinMax())])
@pytest.mark.parametrize("name", ["w_conv", "w_dense"])
def test_weight_grids_are_those_of_the_official_code(name, method, ranges, bits):
    delta, zero_point, dequantized = (
        OFFICIAL[f"{name}_{method}_{bits}_{what}"] for what in ("delta", "zero_point", "dequantized")
    )
    rows = jnp.asarray(OFFICIAL[name].reshape(len(delta), -1))
    format = Uniform(bits, ranges=ranges)
    grid = format.fit(rows)
    np.testing.assert_allclose(grid.scale.ravel(), delta, rtol=1e-6)
    np.testing.assert_array_equal(grid.zero_point.ravel(), zero_point)
    decoded = format.decode(format.encode(rows, grid), grid)
    np.testing.assert_allclose(decoded, dequantized.reshape(rows.shape), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["a_relu", "a_signed"])
def test_activation_grids_are_those_of_the_official_code(name, bits):
    x = jnp.asarray(OFFICIAL[name])
    grid = Uniform(bits, granularity="per_tensor").fit(x.reshape(len(x), -1))
    np.testing.assert_allclose(grid.scale.item(), OFFICIAL[f"{name}_{bits}_delta"], rtol=1e-6)
    assert grid.zero_point.item() == OFFICIAL[f"{name}_{bits}_zero_point"]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ranges", [LpRange(p=1.0), LpRange(p=2.0), LpRange()])
def test_the_factor_is_that_of_a_slow_search(ranges, weighted, symmetric):
    key_rows, key_importance = jax.random.split(jax.random.key(0))
    w = np.asarray(jax.random.t(key_rows, 3, (5, 40)))
    importance = np.asarray(jax.random.uniform(key_importance, w.shape)) ** 4 if weighted else np.ones_like(w)
    grid = Uniform(3, symmetric, ranges=ranges).fit(jnp.asarray(w), jnp.asarray(importance) if weighted else None)
    for channel in range(len(w)):
        scores = []
        for factor in 1 - 0.01 * np.arange(80):
            low, high = factor * min(w[channel].min(), 0), factor * max(w[channel].max(), 0)
            scale = max(-low / 4, high / 3) if symmetric else (high - low) / 7
            zero_point = 4 if symmetric else np.round(-low / scale)
            codes = np.clip(np.round(w[channel] / scale) + zero_point, 0, 7)
            error = np.abs(scale * (codes - zero_point) - w[channel]) ** ranges.p
            scores.append((np.mean(importance[channel] * error), scale))
        np.testing.assert_allclose(grid.scale[channel].item(), min(scores)[1], rtol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_tail_range_is_as_good_as_any_pair_of_ends(symmetric):
    x = np.array(jax.random.t(jax.random.key(0), 3, (200,)))
    x[7] = 60.0
    format, errors = Uniform(4, symmetric, ranges=TailRange()), []
    for low in x.min() * 0.96 ** np.arange(0, 100, 2):
        for high in x.max() * 0.96 ** np.arange(0, 100, 2):
            scale = max(-low / 8, high / 7) if symmetric else (high - low) / 15
            zero_point = 8 if symmetric else np.round(-low / scale)
            errors.append(np.mean((scale * (np.clip(np.round(x / scale) + zero_point, 0, 15) - zero_point) - x) ** 2))
    rows = jnp.asarray(x)[None]
    grid = format.fit(rows)
    assert np.mean((format.decode(format.encode(rows, grid), grid) - rows) ** 2) < 1.02 * min(errors)


def test_importance_moves_the_range_to_where_it_matters():
    rows = jnp.append(jnp.linspace(-1, 1, 63), 8.0)[None]
    bulk = jnp.ones_like(rows).at[0, -1].set(1e-6)
    tail = jnp.full_like(rows, 1e-6).at[0, -1].set(1.0)
    narrow, wide = (Uniform(3).fit(rows, importance).scale.item() for importance in (bulk, tail))
    assert narrow < wide / 2


def test_importance_counts_relative_to_its_largest():
    rows = jax.random.t(jax.random.key(0), 3, (4, 32))
    importance = jax.random.uniform(jax.random.key(1), rows.shape)
    for power in (-100, 100):
        grid = Uniform(3).fit(rows, importance * 2.0**power)
        np.testing.assert_array_equal(grid.scale, Uniform(3).fit(rows, importance).scale)


def test_without_any_importance_the_range_is_min_max():
    rows = jax.random.normal(jax.random.key(0), (4, 32))
    blind, widest = Uniform(3).fit(rows, jnp.zeros_like(rows)), Uniform(3, ranges=MinMax()).fit(rows)
    np.testing.assert_array_equal(blind.scale, widest.scale)


@pytest.mark.parametrize("symmetric", [False, True])
def test_min_max_clips_nothing(symmetric):
    rows = jax.random.t(jax.random.key(0), 3, (8, 64))
    format = Uniform(4, symmetric, ranges=MinMax())
    grid = format.fit(rows)
    error = jnp.abs(format.decode(format.encode(rows, grid), grid) - rows)
    # Rounding the zero point moves the ends of an asymmetric grid by up to half a step.
    assert np.all(error <= grid.scale[..., 0] * (0.5 if symmetric else 1.0) * (1 + 1e-5))


@pytest.mark.parametrize("wrong", [dict(p=0.0), dict(steps=0), dict(steps=101), dict(shrink=0.0), dict(shrink=0.5)])
def test_settings_that_leave_no_range_are_refused(wrong):
    with pytest.raises(ValueError, match="write"):
        LpRange(**wrong)


@pytest.mark.parametrize("wrong", [dict(p=0.0), dict(steps=0), dict(shrink=0.0), dict(shrink=1.0)])
def test_a_tail_range_refuses_the_same(wrong):
    with pytest.raises(ValueError, match=r"TailRange[^€]*write"):
        TailRange(**wrong)
