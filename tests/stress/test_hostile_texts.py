"""Every hostile text ends in the vector that the model itself gives for it."""

from __future__ import annotations

import functools
import warnings
from collections import Counter

import numpy as np
import pytest

from sklearn_transfer import TextFeaturizer
from sklearn_transfer.exceptions import TruncatedTextWarning, UnreadableRowsError
from tests.fine_tuning_data import text_model
from tests.stress import hostile
from tests.stress.workers import Child

TOGETHER = 250
IN_A_CHILD = 1000
LONGEST = 64
# What is no text at all, with the word that the error says of it.
NO_TEXTS = (
    (None, "missing"),
    (float("nan"), "missing"),
    (b"bytes", "bytes"),
    (3, "int"),
    (["a"], "list"),
)


def featurizer(folder: str, **given) -> TextFeaturizer:
    plain = {"max_length": LONGEST, "precision": "float32", "batch_size": 32}
    return TextFeaturizer(folder, **{**plain, **given}).fit(["a"])


# --- what the model says of the same text ----------------------------------------


@functools.cache
def model_and_tokenizer(folder: str):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoModel.from_pretrained(folder).eval(), tokenizer


def by_the_model(folder: str, text: str) -> np.ndarray:
    """The mean over tokens, of one text at a time."""
    import torch

    model, tokenizer = model_and_tokenizer(folder)
    # What no encoding holds is U+FFFD; of what the tokens are cut to no more is seen.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    inputs = tokenizer(text, truncation=True, max_length=LONGEST, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    return states[0].mean(0).numpy()


def fuzz(first: int, count: int, folder: str) -> dict:
    """How ``count`` texts ended; runs in a child."""
    kinds, wrong, told = Counter(), [], Counter()
    featurizer(folder).transform(["all is loaded"])
    by_the_model(folder, "all is loaded")
    before = hostile.peak_megabytes()
    for start in range(first, first + count, TOGETHER):
        numbers = range(start, min(start + TOGETHER, first + count))
        texts = [hostile.text(i) for i in numbers]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vectors = featurizer(folder).transform([text.data for text in texts])
        told.update(w.category.__name__ for w in caught)
        for i, text, vector in zip(numbers, texts, vectors, strict=True):
            away = np.abs(vector - by_the_model(folder, text.data)).max()
            kinds[text.kind] += 1
            if not away < 1e-4:  # NaN too
                wrong.append(f"text({i}), {text.kind}: {away} away")
    grown = hostile.peak_megabytes() - before
    return {"kinds": kinds, "wrong": wrong, "told": told, "megabytes": grown}


def test_each_text_ends_in_the_vector_of_the_model(amount, outcome):
    count, kinds, megabytes = amount(10_000, 200), Counter(), []
    for first in range(0, count, IN_A_CHILD):
        n = min(IN_A_CHILD, count - first)
        found, _ = Child(fuzz, first, n, text_model()).result()
        assert not found["wrong"], "\n".join(found["wrong"][:20])
        assert set(found["told"]) <= {TruncatedTextWarning.__name__}
        kinds += found["kinds"]
        megabytes.append(found["megabytes"])
    assert kinds.total() == count
    assert len(kinds) > len(hostile.ALPHABETS)  # all of them, and some of a megabyte
    assert (
        max(megabytes) < 700
    )  # a child sees texts of a megabyte, and so does the model
    outcome(
        "Every hostile text ends in the vector that the model itself gives for it",
        count,
        f"all vectors equal to 1e-4, {max(megabytes):.0f} MB of memory",
    )


# --- rows that are no texts --------------------------------------------------------


def test_rows_that_are_no_texts_are_named(amount, outcome):
    count = amount(1000)
    reader = featurizer(text_model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncatedTextWarning)
        for i in range(count):
            rng = np.random.default_rng([3, i])
            X = [hostile.text(1000 * i + j).data[:100] for j in range(20)]
            at = int(rng.integers(len(X)))
            X[at], word = NO_TEXTS[i % len(NO_TEXTS)]
            with pytest.raises(UnreadableRowsError, match=f"row {at}\\b") as caught:
                reader.transform(X)
            assert list(caught.value.rows) == [at]
            assert word in caught.value.rows[at]
    outcome("A row that is no text is named with what it is", count, "all named")


# --- many megabytes -----------------------------------------------------------------


def read_megabytes(n: int, folder: str) -> dict:
    """The memory that ``n`` texts of a megabyte cost beyond their own."""
    reader = featurizer(folder, cache=None)
    texts = [f"{i} cat" + " dog" * (hostile.MEGABYTE // 4) for i in range(n)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncatedTextWarning)
        reader.transform(texts[:1])
        before = hostile.peak_megabytes()
        vectors = reader.transform(texts)
    return {
        "finite": bool(np.isfinite(vectors).all()),
        "megabytes": hostile.peak_megabytes() - before,
    }


def test_megabytes_of_text_cost_bounded_memory(amount, outcome):
    n = amount(40, 14)
    found, _ = Child(read_megabytes, n, text_model()).result()
    assert found["finite"]
    # The tokenizer holds the tokens that are cut too, 28 MB a text, of a few at once.
    assert found["megabytes"] < 250 + 3 * n
    outcome(
        "Texts of a megabyte cost bounded memory",
        n,
        f"{found['megabytes']:.0f} MB beyond their own",
    )
