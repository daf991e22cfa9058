"""Packed tables are PyTorch's bytes, take what storage_bits says, and decode only the rows asked for.

vectors/torch_tables.npz: a random table and what torch 2.13.0 (CPU) makes of it: `quantized::embedding_bag_{4,2}bit_prepack` with
optimized_qparams False (`whole`) and True (`greedy`; `ratio07`: ratio 0.7), `_unpack`, and sums of bags by `_rowwise_offsets`.
"""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brecq_jax
from brecq_jax import deploy, solvers
from brecq_jax._qarray import quantize_array
from brecq_jax.formats import ClusterCodebook, GreedyRange, RowCodebook, RowUniform, Uniform

VECTORS = np.load(pathlib.Path(__file__).parent / "vectors" / "torch_tables.npz")
FORMATS = [RowUniform(2), RowUniform(4), RowUniform(8, None), RowCodebook(2), RowCodebook(4), ClusterCodebook(4, 3)]
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)


def table(rows=50, width=21):
    return np.asarray(jax.random.normal(jax.random.key(0), (rows, width)) * jnp.linspace(0.5, 2, rows)[:, None])


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind, ranges", [("whole", None), ("greedy", GreedyRange(ratio=0.16)), ("ratio07", GreedyRange(ratio=0.7))])
def test_rows_are_the_bytes_that_torch_packs(kind, ranges, bits):
    mine = deploy.pack_table(VECTORS["table"], RowUniform(bits, ranges))
    np.testing.assert_array_equal(mine.rows, VECTORS[f"{kind}_{bits}"])


def test_rows_and_sums_of_bags_are_those_of_torch():
    names = ("ids", "offsets", "weights")
    mine = deploy.pack_table(VECTORS["table"], RowUniform(4, GreedyRange(ratio=0.16)))
    np.testing.assert_allclose(deploy.lookup(mine, np.arange(48)), VECTORS["unpacked_4"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(deploy.embedding_bag(mine, *(VECTORS[n] for n in names)), VECTORS["bags_4"], rtol=1e-5, atol=1e-5)
    mine = deploy.pack_table(VECTORS["table"], RowUniform(2, GreedyRange(ratio=0.16)))
    np.testing.assert_allclose(deploy.embedding_bag(mine, *(VECTORS[n] for n in names)), VECTORS["bags_2"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [32, 64, 72])
def test_a_row_of_4_bits_has_half_a_byte_for_each_element_and_four(width):
    assert deploy.pack_table(table(width=width), RowUniform(4, None)).rows.shape == (50, width // 2 + 4)


@every_format
def test_a_packed_table_is_the_quantized_array_and_as_long_as_storage_says(format):
    array = quantize_array(jnp.asarray(table()), format, (0,))
    mine = deploy.packed(array)
    assert mine.storage_bits == array.storage_bits
    np.testing.assert_allclose(deploy.lookup(mine, jnp.arange(50)), array.decode(), rtol=1e-6)
    whole = deploy.pack_table(table(), format, rows_at_once=50)
    np.testing.assert_array_equal(whole.rows, mine.rows)
    np.testing.assert_array_equal(deploy.pack_table(table(), format, rows_at_once=16).rows, mine.rows)


@every_format
def test_lookups_agree_on_host_and_device_and_under_jit(format):
    mine, ids = deploy.pack_table(table(), format), np.array([[3, 49], [0, 3]])
    host = deploy.lookup(mine, ids)
    assert host.shape == (2, 2, 21)
    np.testing.assert_allclose(jax.jit(deploy.lookup)(jax.device_put(mine), ids), host, rtol=1e-6)
    bags = deploy.embedding_bag(mine, ids.ravel(), np.array([0, 0, 3]))
    np.testing.assert_allclose(bags, jnp.stack([jnp.zeros(21), host[0, 0] + host[0, 1] + host[1, 0], host[1, 1]]), rtol=1e-5, atol=1e-6)


def test_bags_of_any_length_are_sums_of_their_rows(monkeypatch):
    monkeypatch.setattr(deploy.tables, "SUMS_AT_ONCE", 21 * 8)  # eight of the eleven bags at a time
    lengths = np.array([0, 1, 31, 32, 33, 0, 64, 65, 100, 2, 0])
    offsets, rng = np.append(0, lengths.cumsum()[:-1]), np.random.default_rng(0)
    ids, weights = rng.integers(0, 50, lengths.sum()), rng.standard_normal(lengths.sum())
    for format in FORMATS:
        mine = deploy.pack_table(table(), format)
        rows = np.asarray(deploy.lookup(mine, ids)) * weights[:, None]
        expected = [rows[start : start + length].sum(0) for start, length in zip(offsets, lengths, strict=True)]
        np.testing.assert_allclose(deploy.embedding_bag(mine, ids, offsets, weights), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [lambda t: t, jax.device_put], ids=["host", "device"])
def test_bags_and_lookups_take_what_they_say(place):
    whole = deploy.pack_table(table(), RowUniform(4))
    mine, rows, ids, offsets = place(whole), np.asarray(deploy.lookup(whole, np.arange(50))), [3, 49, 0, 3], [0, 3]
    expected = [rows[3] + rows[49] + rows[0], rows[3]]
    for made in (list, np.uint64, np.uint8, jnp.array):
        np.testing.assert_allclose(deploy.embedding_bag(mine, made(ids), made(offsets)), expected, rtol=1e-5, atol=1e-6)
    halves = deploy.embedding_bag(mine, ids, offsets, jnp.full(4, 0.5, jnp.bfloat16))
    np.testing.assert_allclose(halves, np.multiply(expected, 0.5), rtol=1e-5, atol=1e-6)
    inside = jax.jit(lambda s: deploy.embedding_bag(mine, np.array(ids), np.array(offsets)) * s)(2.0)
    np.testing.assert_allclose(inside, np.multiply(expected, 2), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(deploy.embedding_bag(mine, [], [0, 0]), np.zeros((2, 21)))
    assert deploy.lookup(mine, []).shape == (0, 21)
    for arguments in ((ids, [0, 3, 1]), (ids, [0, 5]), (ids, offsets, np.ones(5)), (ids, offsets, np.ones(3)), ([ids], offsets), (ids, [0, 3, 50])):
        with pytest.raises(ValueError, match="embedding_bag: .* write"):
            deploy.embedding_bag(mine, *arguments)
    with pytest.raises(TypeError, match="write integers"):
        deploy.lookup(mine, [0.5])
    with pytest.raises(ValueError, match="ids are 5 to 99"):
        deploy.lookup(mine, [5, 99])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("ulps", [1, 4, 20])
def test_a_row_that_is_a_few_floats_wide_is_packed_too(bits, ulps):
    row = np.full((1, 16), 0.1, np.float32)
    row[0, 0] += ulps * np.spacing(row[0, 0])
    np.testing.assert_allclose(deploy.lookup(deploy.pack_table(row, RowUniform(bits)), [0]), row, atol=1e-3)


@pytest.mark.parametrize("look", ["embed", "take", "index"])
def test_a_rule_reaches_any_gather_and_learned_rounding_leaves_it(look, tmp_path):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            if look == "embed":
                x = nn.Embed(20, 24, name="words")(ids)
            else:
                words = self.param("words", nn.initializers.normal(1.0), (20, 24))
                x = words[ids] if look == "index" else jnp.take(words, ids, axis=0)
            return nn.Dense(3, name="head")(jnp.mean(x, 1))

    model, ids = Model(), np.random.default_rng(0).integers(0, 20, (16, 5))
    variables = model.init(jax.random.key(0), ids)
    for format in (RowUniform(4), RowCodebook(4), ClusterCodebook(4, 2)):
        q = brecq_jax.quantize(variables, model.apply, ids, weights={"words.*": format, ".*": Uniform(4)}, solver=solvers.annealed(num_steps=3), progress=False)  # fmt: skip
        words = q.params["params"]["words"]
        words = words["embedding"] if look == "embed" else words
        exact = quantize_array(jax.tree.leaves(variables["params"]["words"])[0], format, (0,))
        np.testing.assert_array_equal(words.codes, exact.codes)
        np.testing.assert_allclose(deploy.lookup(deploy.packed(words), ids), words.decode()[ids], rtol=1e-6)
        np.testing.assert_allclose(q(ids), model.apply(variables, ids), atol=0.5)
    brecq_jax.save(tmp_path / "model", q)
    np.testing.assert_array_equal(brecq_jax.restore(tmp_path / "model", model.apply)(ids), q(ids))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: deploy.pack_table(table(), Uniform(4)), TypeError, r"write RowUniform\(4\)"),
        (lambda: deploy.pack_table(table()[0], RowUniform(4)), ValueError, "rows, elements"),
        (lambda: deploy.pack_table(np.full((3, 9), np.nan), RowUniform(4)), ValueError, "rows 0 to 2"),
        (lambda: deploy.pack_table(table(width=9), RowCodebook(4)), ValueError, r"write RowUniform\(4\)"),
        (lambda: deploy.lookup(deploy.pack_table(table(), RowUniform(4)), np.array([50])), ValueError, "rows 0 to 49"),
        (lambda: deploy.embedding_bag(deploy.pack_table(table(), RowUniform(4)), np.array([5]), np.array([1])), ValueError, "ascend from 0"),
        (lambda: deploy.packed(quantize_array(jnp.asarray(table()), RowUniform(4), (1,))), ValueError, "first axis"),
        (lambda: RowUniform(3), ValueError, "2, 4 or 8"),
        (lambda: RowCodebook(8), ValueError, "write 2 or 4"),
        (lambda: GreedyRange(ratio=1.5), ValueError, "ratio=0.5"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_write(call, error, words):
    with pytest.raises(error, match=words):
        call()
