"""Errors of the fine-tuning estimators say what came and what is needed."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
from torch import nn

from sklearn_transfer import (
    ImageClassifier,
    ImageRegressor,
    TextClassifier,
    TextRegressor,
    backbone_from_module,
)
from sklearn_transfer.exceptions import BackboneChangedError, UnreadableRowsError
from tests.fine_tuning_data import remarks, save_text_model, stripes, text_model

SMALL = {
    "max_epochs": 1,
    "batch_size": 8,
    "early_stopping": False,
    "precision": "float32",
    "random_state": 0,
}
IMAGES, Y = stripes(12)
TEXTS, LABELS = remarks(12)


def images(estimator=ImageClassifier, **given):
    return estimator(**{"image_size": 16, **SMALL, **given})


def texts(estimator=TextClassifier, **given):
    return estimator(**{"backbone": text_model(), **SMALL, **given})


# --- freeze_depth ----------------------------------------------------------------


@pytest.mark.parametrize("depth", ["layer9", 6, -6, True])
def test_a_depth_that_is_none_is_answered_with_the_stages(depth):
    with pytest.raises(ValueError, match=f"freeze_depth={depth!r}") as caught:
        images(freeze_depth=depth).fit(IMAGES, Y)
    assert "'stem', 'layer1'" in str(caught.value)
    assert "freeze_depth='all'" in str(caught.value)


def test_depths_that_mean_the_same_freeze_the_same():
    depths = ["layer3", 4, -1, np.int64(4)]
    assert {images(freeze_depth=d).fit(IMAGES, Y).n_frozen_stages_ for d in depths} == {
        4
    }
    assert images(freeze_depth="all").fit(IMAGES, Y).n_frozen_stages_ == 5
    assert images(freeze_depth=0).fit(IMAGES, Y).n_frozen_stages_ == 0
    assert texts(freeze_depth="layer.0").fit(TEXTS, LABELS).n_frozen_stages_ == 2


def test_parameters_are_checked_by_name():
    for name, value in (("lr", 0.0), ("head", "deep"), ("mixup", -1.0), ("ema", 1.0)):
        with pytest.raises(ValueError, match=f"'{name}' parameter of ImageClassifier"):
            images(**{name: value}).fit(IMAGES, Y)


# --- rows ------------------------------------------------------------------------


@pytest.mark.parametrize("depth", ["all", -1])
def test_an_unreadable_image_is_named(image_files, tmp_path, depth):
    bad = tmp_path / "broken.jpg"
    bad.write_bytes(b"not an image at all")
    paths = [*image_files[:5], str(bad), *image_files[6:], str(tmp_path / "none.png")]
    y = np.arange(len(paths)) % 2
    with pytest.raises(UnreadableRowsError) as caught:
        images(freeze_depth=depth).fit(paths[:-1], y[:-1])
    assert set(caught.value.rows) == {5}
    assert "row 5" in str(caught.value) and "broken.jpg" in str(caught.value)
    assert "Featurizer" not in str(caught.value)
    model = images(freeze_depth=depth).fit(image_files, np.arange(12) % 2)
    with pytest.raises(UnreadableRowsError, match=r"none\.png"):
        model.predict(paths[-1:])


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("depth", ["all", -1])
def test_a_row_of_weight_zero_need_not_be_readable(
    image_files, tmp_path, depth, is_there
):
    bad = tmp_path / "broken.jpg"
    if is_there:
        bad.write_bytes(b"not an image at all")
    y = np.arange(13) % 2
    weights = np.r_[np.ones(12), 0.0]
    model = images(freeze_depth=depth)
    model.fit([*image_files, str(bad)], y, sample_weight=weights)
    assert model.predict(image_files).shape == (12,)


def test_x_and_y_have_equally_many_rows():
    for model, X in ((images(), IMAGES), (texts(), TEXTS)):
        with pytest.raises(
            ValueError, match=r"inconsistent numbers of samples.*12.*11"
        ):
            model.fit(X, np.arange(11) % 2)
        with pytest.raises(ValueError, match="requires y to be passed"):
            model.fit(X, None)
    with pytest.raises(ValueError, match=r"sample_weight.*shape"):
        images().fit(IMAGES, Y, sample_weight=np.ones(3))
    with pytest.raises(ValueError, match="at least one non-zero"):
        images().fit(IMAGES, Y, sample_weight=np.zeros(12))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        images(early_stopping=True).fit(IMAGES, Y, groups=np.zeros(3))


def test_of_two_columns_one_has_to_be_chosen():
    table = pd.DataFrame({"text": TEXTS, "number": range(12)})
    with pytest.raises(ValueError, match=r'2 columns.*ColumnTransformer.*"text"'):
        texts().fit(table.rename(columns={"number": "more"}).astype(str), LABELS)
    model = texts().fit(table[["text"]], LABELS)
    assert model.n_features_in_ == 1
    with pytest.raises(ValueError, match="feature names"):
        model.predict(table[["text"]].rename(columns={"text": "remark"}))


def test_missing_texts_are_an_error_or_empty():
    missing = [*TEXTS[:4], None, *TEXTS[5:7], float("nan"), *TEXTS[8:]]
    with pytest.raises(UnreadableRowsError) as caught:
        texts().fit(missing, LABELS)
    assert "2 of 12 texts are missing: rows 4, 7. Write missing=" in str(caught.value)
    assert set(caught.value.rows) == {4, 7}
    empty = ["" if i in (4, 7) else text for i, text in enumerate(TEXTS)]
    as_empty = texts(missing="empty").fit(missing, LABELS)
    np.testing.assert_array_equal(
        as_empty.predict_proba(missing), texts().fit(empty, LABELS).predict_proba(empty)
    )
    with pytest.raises(ValueError, match="'missing' parameter of TextClassifier"):
        texts(missing="nan").fit(TEXTS, LABELS)


def test_equal_rows_need_not_have_equal_labels():
    same = [TEXTS[0]] * 12
    found = texts(freeze_depth="all").fit(same, LABELS).predict_proba(same)
    np.testing.assert_allclose(found, 0.5, atol=1e-3)


# --- y ---------------------------------------------------------------------------


def test_targets_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="continuous"):
        images().fit(IMAGES, np.linspace(0, 1, 12))
    with pytest.raises(ValueError, match="MultiOutputClassifier"):
        images().fit(IMAGES, np.column_stack([Y, 2 * Y + 1]))
    with pytest.raises(ValueError, match="NaN"):
        images(ImageRegressor).fit(IMAGES, np.r_[np.nan, np.ones(11)])
    with pytest.raises(ValueError, match="infinity"):
        texts().fit(TEXTS, np.r_[np.inf, np.ones(11)])
    with pytest.raises(ValueError, match="dim 3"):
        texts(TextRegressor).fit(TEXTS, np.ones((12, 1, 1)))


def test_validation_rows_come_with_their_labels():
    for given in ({"X_val": IMAGES}, {"y_val": Y}):
        with pytest.raises(ValueError, match="X_val and y_val go together"):
            images().fit(IMAGES, Y, **given)
    with pytest.raises(ValueError, match=r"not seen: \[7\].*classes are \[0, 1\]"):
        images().fit(IMAGES, Y, X_val=IMAGES, y_val=np.full(12, 7))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        images().fit(IMAGES, Y, X_val=IMAGES, y_val=Y[:5])


# --- recipes that do not go together ---------------------------------------------


def test_a_network_without_attention_takes_no_adapters():
    with pytest.raises(ValueError, match=r"attention.*lora_rank=0"):
        images(lora_rank=4).fit(IMAGES, Y)
    assert texts(lora_rank=2).fit(TEXTS, LABELS).n_iter_ == 1


def test_stored_features_cannot_be_augmented_anew():
    trained = {"freeze_depth": "all", "head_init": "random"}
    with pytest.raises(ValueError, match="n_views=4"):
        images(augment="flip", **trained).fit(IMAGES, Y)
    assert images(augment="flip", n_views=2, **trained).fit(IMAGES, Y).n_iter_ == 1
    # The probe alone is not trained by steps, so there is nothing to vary.
    assert images(augment="flip", freeze_depth="all").fit(IMAGES, Y).n_iter_ == 0


@pytest.mark.parametrize("make", [images, texts])
def test_a_random_head_is_trained_by_steps(make):
    X, y = (IMAGES, Y) if make is images else (TEXTS, LABELS)
    given = {"freeze_depth": "all", "head_init": "random", "batch_size": 4}
    model = make(max_epochs=60, lr=1e-2, **given).fit(X, y)
    assert model.n_iter_ == 60
    assert model.history_[-1]["train_loss"] < 0.5 * model.history_[0]["train_loss"]
    assert model.score(X, y) == 1


def test_warm_start_cannot_freeze_what_has_changed():
    model = images(warm_start=True, freeze_depth="layer2").fit(IMAGES, Y)
    model.set_params(freeze_depth="layer3")
    with pytest.raises(ValueError, match=r"fitted with 3.*would freeze 4.*warm_start"):
        model.fit(IMAGES, Y)
    model.set_params(freeze_depth="layer1").fit(IMAGES, Y)
    assert (model.n_frozen_stages_, model.n_iter_) == (2, 2)
    assert model.predict(IMAGES).shape == (12,)


def test_warm_start_knows_the_classes_it_has():
    model = images(warm_start=True).fit(IMAGES, Y)
    with pytest.raises(ValueError, match=r"not seen: \[5\]"):
        model.fit(IMAGES, np.where(Y == 0, 5, Y))


def test_partial_fit_may_unfreeze_more_stages():
    model = images(freeze_depth="all", lr=1e-3).partial_fit(IMAGES, Y)
    model.set_params(freeze_depth=-1).partial_fit(IMAGES, Y)
    assert (model.n_frozen_stages_, model.n_iter_) == (4, 2)
    assert model.predict(IMAGES).shape == (12,)


# --- the backbone ----------------------------------------------------------------


def test_backbones_of_the_other_kind_or_none_are_refused():
    with pytest.raises(ValueError, match="names a text network"):
        images(backbone="gpt2").fit(IMAGES, Y)
    with pytest.raises(ValueError, match="names an image network"):
        texts(backbone="resnet18").fit(TEXTS, LABELS)
    with pytest.raises(ValueError, match=r"ImageClassifier\(backbone_from_module"):
        images(backbone=nn.Linear(2, 2)).fit(IMAGES, Y)


def test_a_network_of_ones_own_is_tuned_and_left_as_it_was():
    body = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    before = {name: value.clone() for name, value in body.state_dict().items()}
    backbone = backbone_from_module(body, image_size=16)
    model = ImageClassifier(backbone, freeze_depth=1, lr=1e-2, **SMALL).fit(IMAGES, Y)
    assert model.n_stages_ == 2
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(
        again.predict_proba(IMAGES), model.predict_proba(IMAGES)
    )
    for name, value in body.state_dict().items():
        assert value.equal(before[name])


@pytest.mark.parametrize("depth", ["all", -1])
def test_an_unpickled_estimator_notices_another_backbone(tmp_path, depth):
    folder = save_text_model(tmp_path / "model", seed=1)
    model = texts(backbone=str(folder), freeze_depth=depth, cache=None)
    pickled = pickle.dumps(model.fit(TEXTS, LABELS))
    again = pickle.loads(pickled)
    np.testing.assert_array_equal(again.predict(TEXTS), model.predict(TEXTS))
    save_text_model(folder, seed=2)
    with pytest.raises(BackboneChangedError, match="another network"):
        pickle.loads(pickled).predict(TEXTS)
