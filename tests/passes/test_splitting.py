"""Ternary weights as sums of two binary ones: what is equal, and what has no halves.

The halves in `REFERENCE` are those of huawei-noah/Pretrained-Language-Model at 0598f02, BinaryBERT/transformer/binary_model_init.py,
tws_split, PyTorch 2.13, for the rows of `WEIGHT`: word embeddings are split by row, dense weights as a whole.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import passes, solvers
from brecq_jax._model import Program
from brecq_jax._qarray import quantize_array
from brecq_jax.formats import Binary, Ternary, Uniform
from brecq_jax.formats.splitting import split_rows
from brecq_jax.models.bert import Bert

WEIGHT = np.array([[0.13, -0.13, 0.64, 0.1, -0.54, 0.36, 1.3, 0.95], [-0.7, -1.27, -0.62, 0.04, -2.33, -0.22, -1.25, -0.73]], np.float32)
WEIGHT = np.concatenate([WEIGHT, np.array([[-0.54, -0.32, 0.41, 1.04, -0.13, 1.37, -0.67, 0.35]], np.float32)])
REFERENCE = {  # w₁ and w₂ of the first row
    "per_channel": [
        [0.46875, 0.33875, 0.277084529, 0.43875, -0.2337901, 0.69875002, 0.562827945, 0.411297381],
        [-0.33875, -0.46875, 0.362915456, -0.33875, -0.306209922, -0.33875, 0.737172008, 0.538702607],
    ],
    "per_tensor": [
        [0.518714249, 0.388714284, 0.306465954, 0.488714278, -0.258580655, 0.748714268, 0.622508943, 0.454910398],
        [-0.388714284, -0.518714249, 0.333534032, -0.388714284, -0.281419367, -0.388714284, 0.677491009, 0.495089591],
    ],
}


def ternary(weight, granularity="per_channel"):
    """A model of one weight, its codes and its latent parameters."""
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    program = Program(lambda p, x: x @ p["kernel"].T, (), False)
    return params, brecq_jax.Quantized({"kernel": quantize_array(params["kernel"], Ternary(granularity), (0,))}, {}, program)


@pytest.mark.parametrize("granularity", REFERENCE)
def test_halves_are_those_of_the_released_code(granularity):
    halves = passes.split_weights(*ternary(WEIGHT, granularity))["kernel"]
    np.testing.assert_allclose(halves[:, 0], REFERENCE[granularity], rtol=2e-6)


@pytest.mark.parametrize("granularity", REFERENCE)
def test_halves_add_up_and_binarized_they_add_up_to_the_ternary_weight(granularity):
    weight = jax.random.normal(jax.random.key(0), (64, 96)) * 0.05
    params, quantized = ternary(weight, granularity)
    halves = passes.split_weights(params, quantized)["kernel"]
    np.testing.assert_allclose(halves.sum(0), weight, atol=1e-8)
    signs = [quantize_array(half, Binary(granularity=granularity), (0,)) for half in halves]
    np.testing.assert_allclose(sum(s.decode() for s in signs), quantized.dequantized()["kernel"], atol=1e-8)
    np.testing.assert_allclose(signs[0].grid.scale, quantized.params["kernel"].grid.scale / 2, rtol=1e-6)
    np.testing.assert_allclose(signs[1].grid.scale, signs[0].grid.scale, rtol=1e-6)


def test_normal_weights_are_split_by_the_constants_that_integrals_give():
    """b = (α − E|w|) / 2 P(|w| < θ) = 0.45604 σ, α = 1.18416 σ, E|w| = √(2/π) σ, P = 0.42351; and a is ½ where signs are balanced."""
    rows = 0.05 * np.random.default_rng(0).standard_normal((1, 400_000))
    format = Ternary()
    codes = np.asarray(format.encode(jnp.asarray(rows, jnp.float32), format.fit(jnp.asarray(rows, jnp.float32))))
    first, _ = split_rows(format, rows, codes)
    below = (codes == 1) & (rows < 0)
    np.testing.assert_allclose(first[below] / 0.05, 0.45604, rtol=5e-3)
    np.testing.assert_allclose((first / rows)[codes != 1], 0.5, atol=5e-3)


@pytest.mark.parametrize("granularity", REFERENCE)
def test_after_any_training_step_the_halves_add_up_to_at_most_four_values(granularity):
    """±α₁ ± α₂, of each row or of the tensor, counted in the weights themselves."""
    params, quantized = ternary(jax.random.normal(jax.random.key(0), (6, 96)) * 0.05, granularity)
    halves = passes.split_weights(params, quantized)["kernel"]
    assert {len(np.unique(row)) for row in np.asarray(quantized.dequantized()["kernel"])} == {3}
    for step in range(3):
        halves += 0.02 * jax.random.normal(jax.random.key(step), halves.shape)
        total = np.asarray(sum(quantize_array(half, Binary(granularity=granularity), (0,)).decode() for half in halves))
        assert len(np.unique(total)) > 3
        for row in total if granularity == "per_channel" else [total]:
            assert len(np.unique(row)) <= 4


def test_in_float64_halves_are_exact():
    rows = np.asarray(jax.random.normal(jax.random.key(1), (16, 200)), np.float64)
    levels = (np.sign(rows) * (np.abs(rows) > 0.7 * np.abs(rows).mean(1, keepdims=True))).astype(int)
    first, second = split_rows(Ternary(), rows, levels + 1)
    alpha = (np.abs(rows) * (levels != 0)).sum(1, keepdims=True) / (levels != 0).sum(1, keepdims=True)
    binary = sum(np.sign(half) * np.abs(half).mean(1, keepdims=True) for half in (first, second))
    np.testing.assert_allclose(binary, alpha * levels, atol=1e-14)
    np.testing.assert_allclose(first + second, rows, atol=1e-15)


def test_weights_and_outputs_of_a_transformer_do_not_change():
    model, ids = Bert(vocabulary=50, depth=2), jax.random.randint(jax.random.key(2), (16, 12), 0, 50)
    params = model.init(jax.random.key(3), ids)
    weights = {"word.*": Ternary("per_channel"), ".*": Ternary("per_tensor")}
    quantized = brecq_jax.quantize(params, model.apply, ids, weights=weights, activations=Uniform(8), solver=solvers.nearest(), progress=False)
    split = passes.split_ternary(quantized)
    for before, after in zip(jax.tree.leaves(quantized.dequantized()), jax.tree.leaves(split.dequantized()), strict=True):
        np.testing.assert_array_equal(after, before)
    np.testing.assert_allclose(split(ids), quantized(ids), atol=1e-6)
    kernel = split.params["params"]["blocks_0"]["fc1"]["kernel"]
    assert kernel.format == Binary(2, "per_tensor") and set(np.unique(kernel.codes)) == {0, 2, 3}
    assert kernel.storage_bits == 2 * kernel.size + 64


def test_a_split_model_is_saved_in_two_bits_a_weight_and_restored(tmp_path):
    _, quantized = ternary(jax.random.normal(jax.random.key(4), (256, 512)), "per_tensor")
    split = passes.split_ternary(quantized)
    brecq_jax.save(tmp_path / "model", split)
    restored = brecq_jax.restore(tmp_path / "model", split.program.apply_fn)
    np.testing.assert_array_equal(restored.dequantized()["kernel"], split.dequantized()["kernel"])
    size = sum(f.stat().st_size for f in (tmp_path / "model" / "arrays").rglob("*") if f.is_file())
    assert 256 * 512 * 2 / 8 <= size < 256 * 512 * 2 / 8 + 8192  # orbax's own records


def test_a_weight_without_zeros_is_halved():
    params, quantized = ternary([[1.0, -1.0, 1.0, 1.0]])
    halves = passes.split_weights(params, quantized)["kernel"]
    np.testing.assert_array_equal(halves, np.tile([[0.5, -0.5, 0.5, 0.5]], (2, 1, 1)))
    np.testing.assert_array_equal(passes.split_ternary(quantized).dequantized()["kernel"], params["kernel"])


def test_small_weights_of_one_sign_have_no_halves_though_codes_have():
    params, quantized = ternary([[2.0] + [0.19] * 20])
    with pytest.raises(passes.SplitError, match=r"kernel \(1, 21\): row 0 of 1: what became zero lies on one side .*a = -0.45"):
        passes.split_weights(params, quantized)
    np.testing.assert_array_equal(passes.split_ternary(quantized).dequantized()["kernel"], quantized.dequantized()["kernel"])


def test_a_row_of_zeros_has_no_halves_though_codes_have():
    weight = np.concatenate([WEIGHT, np.zeros((1, 8), np.float32)])
    params, quantized = ternary(weight)
    with pytest.raises(passes.SplitError, match="row 3 of 4 is all zeros"):
        passes.split_weights(params, quantized)
    np.testing.assert_array_equal(passes.split_ternary(quantized).dequantized()["kernel"], quantized.dequantized()["kernel"])
    passes.split_weights(*ternary(weight, "per_tensor"))


@pytest.mark.parametrize(("change", "words"), [(lambda w: -w, "not the signs"), (lambda w: w.at[0, 2].set(jnp.nan), "not finite")])
def test_other_latent_weights_are_refused(change, words):
    params, quantized = ternary(WEIGHT)
    with pytest.raises(passes.SplitError, match=words):
        passes.split_weights({"kernel": change(params["kernel"])}, quantized)


def test_what_is_not_ternary_is_refused():
    params, quantized = ternary(WEIGHT)
    with pytest.raises(ValueError, match="other shapes"):
        passes.split_weights({"kernel": jnp.zeros((2, 8))}, quantized)
    split = passes.split_ternary(quantized)
    for call in (lambda: passes.split_ternary(split), lambda: passes.split_weights(params, split)):
        with pytest.raises(ValueError, match="no weight is ternary"):
            call()


@pytest.mark.parametrize("granularity", REFERENCE)
def test_whatever_the_skew_halves_are_exact_or_refused(granularity):
    """Random rows with outliers, most other weights about a value that is not zero, with ties, zeros and few elements."""
    pool = None if granularity == "per_tensor" else 1
    exact = refused = 0
    for seed in range(200):
        draws = np.asarray(jax.random.normal(jax.random.key(seed), (2, 3, 30)), np.float64)[..., : 1 + 7 * seed % 30]
        near = (0.0, 0.5, -0.5, 1.0)[seed % 4] + 0.1 * (1 + seed % 5) * draws[0]
        rows = np.where(draws[1] > 1, (1 + seed % 6) * np.sign(near), np.round(near, 1 + seed % 2))
        levels = (np.sign(rows) * (np.abs(rows) > 0.7 * np.abs(rows).mean(pool, keepdims=True))).astype(int)
        try:
            halves = split_rows(Ternary(granularity), rows, levels + 1)
        except passes.SplitError:
            refused += 1
            continue
        exact += 1
        binary = sum(np.sign(half) * np.abs(half).mean(pool, keepdims=True) for half in halves)
        alpha = (np.abs(rows) * (levels != 0)).sum(pool, keepdims=True) / (levels != 0).sum(pool, keepdims=True)
        np.testing.assert_allclose(binary, alpha * levels, atol=1e-12)
        np.testing.assert_allclose(sum(halves), rows, atol=1e-12)
    assert exact > 100 and refused > 0
