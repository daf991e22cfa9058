"""Quantized arrays: layout, and life as a pytree."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brecq_jax._qarray import QArray, from_rows, quantize_array, to_rows
from brecq_jax.formats import MinMax, Uniform

LAYOUTS = [(2, 3, 4, 5), (6, 7), (5,), (2, 3, 4)]
CASES = [(s, axes) for s in LAYOUTS for n in range(len(s) + 1) for axes in itertools.permutations(range(len(s)), n)]


def kernel(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), (3, 3, 4, 8), dtype)


@pytest.mark.parametrize("shape, axes", CASES, ids=str)
def test_rows_list_each_channel_and_come_back(shape, axes):
    array = np.arange(np.prod(shape)).reshape(shape)
    rows = to_rows(jnp.asarray(array), axes)
    rest = [axis for axis in range(len(shape)) if axis not in axes]
    for row, channel in enumerate(np.ndindex(*(shape[axis] for axis in axes))):
        slices = [slice(None)] * len(shape)
        for axis, index in zip(axes, channel, strict=True):
            slices[axis] = index
        np.testing.assert_array_equal(rows[row], array[tuple(slices)].ravel())
    assert rows.shape == (np.prod([shape[a] for a in axes], dtype=int), np.prod([shape[a] for a in rest], dtype=int))
    np.testing.assert_array_equal(from_rows(rows, shape, axes), array)


@pytest.mark.parametrize("axes", [(4,), (-1,), (1, 1)])
def test_axes_that_do_not_exist_are_refused(axes):
    with pytest.raises(ValueError, match="from 0 to 3"):
        to_rows(kernel(), axes)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", 12])
def test_quantizing_an_array_is_quantizing_its_rows(granularity):
    format = Uniform(4, granularity=granularity)
    quantized = quantize_array(kernel(), format, (3,))
    rows = kernel().transpose(3, 0, 1, 2).reshape(8, 36)
    grid = format.fit(rows)
    expected = format.decode(format.encode(rows, grid), grid).reshape(8, 3, 3, 4).transpose(1, 2, 3, 0)
    np.testing.assert_array_equal(quantized.decode(), expected)
    assert quantized.codes.dtype == jnp.uint8 and quantized.shape == quantized.codes.shape == (3, 3, 4, 8)
    assert quantized.size == 288
    assert quantized.storage_bits == 288 * 4 + grid.scale.size * 36


def test_importance_follows_its_elements():
    w = kernel().at[0, 0, 0].set(9.0)
    importance = jnp.full(w.shape, 1e-6).at[0, 0, 0].set(1.0)
    by_default, by_importance = (quantize_array(w, Uniform(2), (3,), i) for i in (None, importance))
    off = [jnp.abs(q.decode() - w)[0, 0, 0].max() for q in (by_default, by_importance)]
    assert off[1] <= off[0]
    np.testing.assert_array_equal(
        by_importance.grid.scale, Uniform(2).fit(to_rows(w, (3,)), to_rows(importance, (3,))).scale
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_decoding_restores_the_dtype(dtype):
    quantized = quantize_array(kernel(jnp.dtype(dtype)), Uniform(8), (3,))
    assert quantized.dtype == dtype and quantized.decode().dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(
        quantized.decode().astype("float32"), kernel(jnp.dtype(dtype)).astype("float32"), atol=0.06
    )


def test_its_leaves_are_codes_and_grid_and_nothing_else():
    quantized = quantize_array(kernel(), Uniform(4), (3,))
    leaves, structure = jax.tree.flatten(quantized)
    assert [leaf.shape for leaf in leaves] == [(3, 3, 4, 8), (8, 1, 1), (8, 1, 1)]
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(again.decode(), quantized.decode())
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(quantized)]
    assert paths == [".codes", ".grid.scale", ".grid.zero_point"]


def test_it_passes_through_jit_and_vmap():
    quantized = quantize_array(kernel(), Uniform(4), (3,))
    np.testing.assert_allclose(jax.jit(QArray.decode)(quantized), quantized.decode(), rtol=1e-6)
    stack = jnp.stack([kernel(), 2 * kernel()])
    stacked = jax.vmap(lambda w: quantize_array(w, Uniform(4), (3,)))(stack)
    np.testing.assert_allclose(jax.vmap(QArray.decode)(stacked)[1], 2 * quantized.decode(), rtol=1e-6)


def test_abstract_leaves_have_a_shape_a_cost_and_a_repr():
    quantized = quantize_array(kernel(), Uniform(4), (3,))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), quantized)
    assert (abstract.shape, abstract.size) == (quantized.shape, quantized.size)
    assert abstract.storage_bits == quantized.storage_bits
    assert repr(abstract) == repr(quantized) == "QArray((3, 3, 4, 8), 4-bit Uniform, float32)"
    assert jax.eval_shape(QArray.decode, abstract).shape == quantized.shape


def test_leaves_of_any_kind_are_carried():
    quantized = quantize_array(kernel(), Uniform(4), (3,))
    names = jax.tree.map(lambda leaf: "a leaf", quantized)
    assert names.codes == "a leaf" and "None" in repr(names)


def test_it_survives_a_checkpoint(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    quantized = quantize_array(kernel(), Uniform(4, ranges=MinMax()), (3,))
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "weights", {"kernel": quantized})
        saver.wait_until_finished()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), {"kernel": quantized})
        restored = saver.restore(tmp_path / "weights", abstract)["kernel"]
    assert restored.format == quantized.format
    np.testing.assert_array_equal(restored.decode(), quantized.decode())
