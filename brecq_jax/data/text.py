"""Text as token dicts: {"input_ids", "attention_mask", "token_type_ids"}, as tokenizers give them."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids")


def padded(tokens: Iterable[Mapping[str, Any]], length: int | None = None, pad_id: int = 0) -> dict[str, np.ndarray]:
    """Token dicts, each of one example or of a batch, as one dict of int32 arrays (examples, length): a calibration set.

        calibration = padded(tokenizer(sentence) for sentence in sentences)

    Keys that are no tokens (labels, lengths) are left out. Where a dict has no "attention_mask", all of its tokens count.

    Args:
      length: None: that of the longest example.
      pad_id: fills "input_ids" up; the other arrays are filled with zeros.

    Raises:
      ValueError: no dicts, one without "input_ids", dicts of different keys, arrays of different lengths, an example longer than `length`.
    """
    rows: dict[str, list[np.ndarray]] = {}
    for number, given in enumerate(tokens):
        if "input_ids" not in given:
            raise ValueError(f'tokens: dict {number} has {sorted(given)}, no "input_ids". Rename what holds them.')
        found = {k: _examples(given[k]) for k in TOKEN_KEYS if k in given}
        found.setdefault("attention_mask", [np.ones_like(a) for a in found["input_ids"]])
        if rows and rows.keys() != found.keys():
            raise ValueError(f"tokens: dict {number} has {sorted(found)}, those before it {sorted(rows)}. Make them the same.")
        lengths = {k: [len(a) for a in arrays] for k, arrays in found.items()}
        if any(n != lengths["input_ids"] for n in lengths.values()):
            raise ValueError(f"tokens: the arrays of dict {number} have lengths {lengths}. Write one number for each token.")
        for key, arrays in found.items():
            rows.setdefault(key, []).extend(arrays)
    if not rows:
        raise ValueError("tokens: there are none. Pass a few hundred token dicts. (A generator that was read before is empty, too.)")
    longest = max(map(len, rows["input_ids"]))
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"tokens: an example has {longest}, over length={length}. Cut them where they are made, which keeps the last token of all.")
    fill = {"input_ids": pad_id}
    return {k: np.stack([np.pad(a, (0, length - len(a)), constant_values=fill.get(k, 0)) for a in arrays]) for k, arrays in rows.items()}


def _examples(values: Any) -> list[np.ndarray]:
    """One row for each example of a list of numbers, a list of lists, or an array of either shape."""
    is_batch = len(values) > 0 and np.ndim(values[0]) > 0
    return [np.asarray(v, np.int32) for v in (values if is_batch else [values])]


def tokenized(sentences: Sequence[str], tokenizer: str | pathlib.Path, length: int) -> dict[str, np.ndarray]:
    """Sentences as int32 arrays (sentences, length), cut and padded, by the rules of a `tokenizer.json`.

    Raises:
      FileNotFoundError: no such file.
      ModuleNotFoundError: the package `tokenizers` is not installed.
    """
    if not pathlib.Path(tokenizer).is_file():
        raise FileNotFoundError(f"{tokenizer}: no such file. Give the tokenizer.json that lies beside a model's weights.")
    try:
        import tokenizers  # noqa: PLC0415 - an extra, needed here alone
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("tokenizer.json is read by the package tokenizers: pip install tokenizers") from error
    rules = tokenizers.Tokenizer.from_file(str(tokenizer))
    pad_id = (rules.padding or {}).get("pad_id", 0)
    rules.enable_truncation(length)
    rules.no_padding()
    return padded(({"input_ids": e.ids, "attention_mask": e.attention_mask} for e in rules.encode_batch(list(sentences))), length, pad_id)


def rated_sentences(path: str | pathlib.Path) -> tuple[list[str], np.ndarray]:
    """Sentences, and their mean ratings from −4 to 4: lines of number, rating and text, separated by tabs, in UTF-8.

    So are the snippets of the source distribution of vaderSentiment 2.5 (PyPI, MIT), in its additional_resources/hutto_ICWSM_2014.tar.gz:
    movieReviewSnippets_GroundTruth.txt holds 10,605.

    Raises:
      ValueError: a line of another form.
    """
    sentences, ratings = [], []
    with pathlib.Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            parts = line.rstrip("\n").split("\t")
            try:
                ratings.append(float(parts[1]))
                sentences.append(parts[2])
            except (IndexError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not number, rating and text, separated by tabs: {line[:60]!r}") from error
    return sentences, np.array(ratings, np.float32)
