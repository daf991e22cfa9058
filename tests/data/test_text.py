"""Token dicts and sentences as calibration sets."""

import sys
import warnings

import numpy as np
import pytest
import tokenizers

from brecq_jax import data

ONE = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 3}
TWO = {"input_ids": [5, 8], "attention_mask": [1, 1], "labels": 0}


def test_token_dicts_of_single_examples_are_padded_to_the_longest():
    found = data.padded(iter([ONE, TWO]))
    assert found.keys() == {"input_ids", "attention_mask"}
    np.testing.assert_array_equal(found["input_ids"], [[5, 6, 7], [5, 8, 0]])
    np.testing.assert_array_equal(found["attention_mask"], [[1, 1, 1], [1, 1, 0]])
    assert found["input_ids"].dtype == np.int32


def test_batches_of_different_lengths_are_joined():
    batches = [{"input_ids": np.ones((2, 3), np.int64), "token_type_ids": np.ones((2, 3))}, {"input_ids": [[4]], "token_type_ids": [[0]]}]
    found = data.padded(batches, length=4, pad_id=9)
    np.testing.assert_array_equal(found["input_ids"], [[1, 1, 1, 9], [1, 1, 1, 9], [4, 9, 9, 9]])
    np.testing.assert_array_equal(found["attention_mask"].sum(1), [3, 3, 1])
    np.testing.assert_array_equal(found["token_type_ids"].sum(1), [3, 3, 0])


@pytest.mark.parametrize(
    ("tokens", "length", "words"),
    [
        ([], None, "there are none"),
        ([{"ids": [1]}], None, 'dict 0 has .*no "input_ids"'),
        ([ONE, {"input_ids": [1], "token_type_ids": [0]}], None, "dict 1 has .*token_type_ids"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], None, "arrays of dict 0 have lengths"),
        ([ONE], 2, "has 3, over length=2"),
    ],
)
def test_bad_tokens_are_refused(tokens, length, words):
    with pytest.raises(ValueError, match=words):
        data.padded(tokens, length)


def test_a_calibration_set_of_tokens_needs_no_inputs():
    examples = data.materialize([data.padded([ONE, TWO]), data.padded([ONE, ONE])])
    assert examples.count == 4
    assert examples.arrays.keys() == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="Pad them: data.padded"):
        data.materialize([data.padded([ONE]), data.padded([TWO])])


@pytest.fixture
def tokenizer(tmp_path):
    """A file whose rules pad to 100, which is not asked for."""
    words = {"[PAD]": 7, "[UNK]": 1, "good": 2, "film": 3}
    rules = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    rules.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rules.enable_padding(length=100, pad_id=7, pad_token="[PAD]")
    rules.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_sentences_are_cut_and_padded(tokenizer):
    found = data.tokenized(["good film", "a good good film"], tokenizer, 3)
    np.testing.assert_array_equal(found["input_ids"], [[2, 3, 7], [1, 2, 2]])
    np.testing.assert_array_equal(found["attention_mask"], [[1, 1, 0], [1, 1, 1]])


def test_what_a_tokenizer_needs_is_told(tokenizer, monkeypatch):
    with pytest.raises(FileNotFoundError, match="beside a model's weights"):
        data.tokenized(["good"], tokenizer.parent / "none.json", 3)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tokenizers"):
        data.tokenized(["good"], tokenizer, 3)


def test_rated_sentences_are_read(tmp_path):
    path = tmp_path / "snippets.txt"
    path.write_bytes("1\t2.25\tGood\u2028film, \u00e9tonnant\r\n2\t-0.6\ttepid\r\n".encode())
    with warnings.catch_warnings(record=True, action="always", category=ResourceWarning) as caught:
        sentences, ratings = data.rated_sentences(path)
    assert not [w for w in caught if str(path) in str(w.message)]
    assert sentences == ["Good\u2028film, \u00e9tonnant", "tepid"]
    np.testing.assert_allclose(ratings, [2.25, -0.6])
    path.write_text("1\t2.25\tgood\n2\tfine\n")
    with pytest.raises(ValueError, match="line 2"):
        data.rated_sentences(path)
