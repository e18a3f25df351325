"""What a scikit-learn user expects of the fine-tuning estimators."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import config_context
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import StackingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import get_scorer
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    cross_val_predict,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.class_weight import compute_sample_weight
from skorch.callbacks import Callback, EarlyStopping

from sklearn_transfer import (
    ImageClassifier,
    ImageRegressor,
    TextClassifier,
    TextRegressor,
)
from tests.fine_tuning_data import remarks, stripes, text_model

SMALL = {
    "max_epochs": 2,
    "batch_size": 8,
    "early_stopping": False,
    "precision": "float32",
    "random_state": 0,
}
IMAGES, Y = stripes(24, 3)
NEW_IMAGES, NEW_Y = stripes(12, 3, seed=1)
TEXTS, LABELS = remarks(24)
NEW_TEXTS, NEW_LABELS = remarks(12, seed=1)
VALUES = np.linspace(-30.0, 90.0, len(IMAGES))


def images(estimator=ImageClassifier, **given):
    return estimator(**{"image_size": 16, **SMALL, **given})


def texts(estimator=TextClassifier, **given):
    return estimator(text_model(), **{**SMALL, "batch_size": 16, **given})


both = pytest.mark.parametrize(
    ("make", "X", "y"), [(images, IMAGES, Y), (texts, TEXTS, LABELS)]
)


def assert_same_model(one, other, X=NEW_IMAGES, atol=0.0):
    name = "predict_proba" if hasattr(one, "predict_proba") else "predict"
    found, expected = getattr(one, name)(X), getattr(other, name)(X)
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# --- targets -------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        np.array(["b", "a", "c"]),
        np.array(["b", "a", "c"], object),
        np.array([30, -1, 7]),
        np.array([2.0, 1.0, 0.0]),
        np.array([True, False, True]),
    ],
    ids=["str", "object", "int", "float", "bool"],
)
def test_any_kind_of_label_comes_back(names):
    y = names[Y]
    model = images(freeze_depth="all").fit(IMAGES, y)
    np.testing.assert_array_equal(model.classes_, np.unique(y))
    predicted = model.predict(IMAGES)
    assert predicted.dtype == y.dtype
    assert np.mean(predicted == y) == 1
    assert model.score(IMAGES, y) == 1


def test_several_outputs_are_regressed_each_in_its_units():
    y = np.column_stack([VALUES, 1e4 - 100 * VALUES])
    model = images(ImageRegressor).fit(IMAGES, y)
    assert model.predict(NEW_IMAGES).shape == (12, 2)
    assert model.predict(IMAGES)[:, 1].mean() == pytest.approx(y[:, 1].mean(), rel=0.05)
    one = images(ImageRegressor).fit(IMAGES, y[:, :1])
    assert one.predict(NEW_IMAGES).shape == (12, 1)
    flat = images(ImageRegressor).fit(IMAGES, y[:, 0])
    np.testing.assert_array_equal(flat.predict(IMAGES), one.predict(IMAGES)[:, 0])


def test_rows_may_have_any_number_of_labels():
    y = np.column_stack([Y == 0, Y != 1, Y >= 0]).astype(int)
    model = images().fit(IMAGES, y)
    probabilities = model.predict_proba(IMAGES)
    assert probabilities.shape == y.shape
    assert np.all((probabilities > 0) & (probabilities <= 1))
    np.testing.assert_array_equal(model.predict(IMAGES), probabilities > 0.5)
    assert model.score(IMAGES, y) == 1
    assert model.decision_function(IMAGES).shape == y.shape


@pytest.mark.parametrize("depth", ["all", -1])
def test_probabilities_logarithms_and_decisions_agree(depth):
    model = images(freeze_depth=depth).fit(IMAGES, Y)
    found = model.predict_proba(NEW_IMAGES)
    assert found.shape == (12, 3)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(model.predict_log_proba(NEW_IMAGES), np.log(found))
    decided = model.decision_function(NEW_IMAGES)
    assert decided.shape == (12, 3)
    np.testing.assert_array_equal(decided.argmax(1), found.argmax(1))
    binary = texts(freeze_depth=depth).fit(TEXTS, LABELS)
    assert binary.decision_function(NEW_TEXTS).shape == (12,)
    np.testing.assert_array_equal(
        binary.decision_function(NEW_TEXTS) > 0, binary.predict(NEW_TEXTS) == "good"
    )


@both
def test_a_row_does_not_depend_on_its_batch(make, X, y):
    model = make().fit(X, y)
    whole = model.predict_proba(X)
    alone = np.concatenate([model.predict_proba(X[i : i + 1]) for i in (7, 0, 3)])
    np.testing.assert_allclose(alone, whole[[7, 0, 3]], atol=1e-5)


def test_one_class_or_no_fit_is_said_in_sklearns_words():
    with pytest.raises(ValueError, match="contains only one class"):
        images().fit(IMAGES, np.zeros(24))
    with pytest.raises(ValueError, match="contains only one class"):
        texts().fit(TEXTS[:1], ["good"])
    for ask in ("predict", "predict_proba", "transform"):
        with pytest.raises(NotFittedError, match="not fitted yet"):
            getattr(images(), ask)(IMAGES)
    with pytest.raises(ValueError, match="minimum of 1 is required"):
        images().fit([], [])


# --- weights -------------------------------------------------------------------


@both
@pytest.mark.parametrize("depth", ["all", -1])
def test_weights_of_one_change_nothing_and_of_zero_remove(make, X, y, depth):
    plain = make(freeze_depth=depth).fit(X, y)
    ones = make(freeze_depth=depth).fit(X, y, sample_weight=np.ones(24))
    assert_same_model(plain, ones, X)
    y = np.array(y)
    weights = np.ones(24)
    weights[:6] = 0
    y_wrong = y.copy()
    y_wrong[:6] = y[1]
    dropped = make(freeze_depth=depth).fit(X, y_wrong, sample_weight=weights)
    removed = make(freeze_depth=depth).fit(X[6:], y[6:])
    assert_same_model(dropped, removed, X, atol=1e-6)
    assert np.abs(dropped.predict_proba(X) - plain.predict_proba(X)).max() > 1e-4


@both
def test_a_weight_of_two_is_the_row_twice_for_a_probe(make, X, y):
    weights = np.tile([1.0, 2.0, 3.0], 8)
    rows = np.repeat(np.arange(24), weights.astype(int))
    weighted = make(freeze_depth="all").fit(X, y, sample_weight=weights)
    repeated = make(freeze_depth="all").fit([X[i] for i in rows], np.array(y)[rows])
    assert_same_model(weighted, repeated, X, atol=1e-5)
    plain = make(freeze_depth="all").fit(X, y)
    assert np.abs(weighted.predict_proba(X) - plain.predict_proba(X)).max() > 1e-3


def test_each_of_several_labels_has_class_weights_of_its_own():
    y = np.column_stack([Y == 0, Y != 1]).astype(int)
    given = [{0: 1.0, 1: 3.0}, "balanced"]
    weighted = images(freeze_depth="all", class_weight=given).fit(IMAGES, y)
    by_row = np.where(y[:, 0], 3.0, 1.0) * compute_sample_weight("balanced", y[:, 1])
    plain = images(freeze_depth="all").fit(IMAGES, y, sample_weight=by_row)
    assert_same_model(weighted, plain)
    with pytest.raises(ValueError, match="3 entries, and y has 2 labels"):
        images(class_weight=[None] * 3).fit(IMAGES, y)


@both
@pytest.mark.parametrize("depth", ["all", -1])
def test_class_weight_multiplies_the_weights_of_rows(make, X, y, depth):
    X, y = X[:-3], y[:-3]  # no longer balanced
    label = y[0]
    given = np.linspace(1, 2, len(y))
    by_dict = make(freeze_depth=depth, class_weight={label: 5.0})
    by_hand = make(freeze_depth=depth)
    by_dict.fit(X, y, sample_weight=given)
    by_hand.fit(X, y, sample_weight=given * np.where(y == label, 5.0, 1.0))
    assert_same_model(by_dict, by_hand, X)
    balanced = make(freeze_depth=depth, class_weight="balanced").fit(X, y)
    by_hand.fit(X, y, sample_weight=compute_sample_weight("balanced", y))
    assert_same_model(balanced, by_hand, X)
    plain = make(freeze_depth=depth).fit(X, y)
    assert np.abs(by_dict.predict_proba(X) - plain.predict_proba(X)).max() > 1e-3


@config_context(enable_metadata_routing=True)
def test_weights_are_routed_through_pipeline_and_search():
    weights = np.where(Y == 0, 9.0, 1.0)
    model = images(freeze_depth="all").set_fit_request(sample_weight=True)
    model.set_score_request(sample_weight=True)
    pipeline = make_pipeline(FunctionTransformer(), model)
    search = GridSearchCV(pipeline, {"imageclassifier__freeze_depth": ["all", 4]}, cv=2)
    search.fit(IMAGES, Y, sample_weight=weights)
    by_hand = images(**{"freeze_depth": search.best_params_.popitem()[1]})
    by_hand.fit(IMAGES, Y, sample_weight=weights)
    assert_same_model(search, by_hand)
    unweighted = clone(by_hand).fit(IMAGES, Y)
    assert np.abs(
        unweighted.predict_proba(IMAGES) - by_hand.predict_proba(IMAGES)
    ).max()
    wrong = np.roll(Y, 1)
    score = search.best_estimator_.score(IMAGES, wrong, sample_weight=weights)
    assert score == by_hand.score(IMAGES, wrong, sample_weight=weights)


# --- transform -------------------------------------------------------------------


@both
@pytest.mark.parametrize("depth", ["all", -1])
def test_transform_gives_named_vectors(make, X, y, depth):
    model = make(freeze_depth=depth).fit(X, y)
    found = model.transform(X)
    assert found.dtype == np.float32
    names = model.get_feature_names_out()
    assert found.shape == (24, len(names))
    assert names[1] == type(model).__name__.lower() + "1"
    for library in ("pandas", "polars"):
        frame = model.set_output(transform=library).transform(X)
        assert type(frame).__module__.startswith(library)
        assert list(frame.columns) == list(names)
        np.testing.assert_array_equal(frame.to_numpy(), found)


def test_every_stage_frozen_gives_the_featurizers_features():
    model = images(freeze_depth="all").fit(IMAGES, Y)
    expected = model._make_featurizer().fit_transform(IMAGES)
    np.testing.assert_array_equal(model.transform(IMAGES), expected)
    tuned = images(freeze_depth=-1, lr=1e-2).fit(IMAGES, Y)
    assert np.abs(tuned.transform(IMAGES) - expected).max() > 1e-3


# --- randomness --------------------------------------------------------------


@both
def test_equal_seeds_give_equal_models_and_leave_global_states_alone(make, X, y):
    given = {"dropout": 0.2, "mixup": 0.2, "head": "mlp"}
    if make is images:
        given["augment"] = "flip"
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, other = make(**given).fit(X, y), make(**given).fit(X, y)
    assert_same_model(one, other, X)
    one.predict(X)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    another = make(**given, **{"random_state": 1}).fit(X, y)
    assert np.abs(another.predict_proba(X) - one.predict_proba(X)).max() > 1e-6


def test_a_random_state_instance_is_consumed():
    state = np.random.RandomState(0)
    first = images(random_state=state, dropout=0.5).fit(IMAGES, Y)
    second = images(random_state=state, dropout=0.5).fit(IMAGES, Y)
    assert np.abs(first.predict_proba(IMAGES) - second.predict_proba(IMAGES)).max() > 0


# --- going on ----------------------------------------------------------------


@both
def test_warm_start_goes_on(make, X, y):
    model = make(warm_start=True, max_epochs=2, schedule="constant", warmup=0.0)
    before = model.fit(X, y).predict_proba(X)
    losses = [record["train_loss"] for record in model.history_]
    model.fit(X, y)
    assert [record["epoch"] for record in model.history_] == [1, 2, 3, 4]
    assert model.n_iter_ == 4
    assert model.history_[2]["train_loss"] < losses[0]
    assert np.abs(model.predict_proba(X) - before).max() > 1e-4
    cold = model.set_params(warm_start=False).fit(X, y)
    np.testing.assert_allclose(cold.predict_proba(X), before, atol=1e-6)
    assert cold.n_iter_ == 2


@pytest.mark.parametrize("depth", ["all", -1])
def test_partial_fit_is_an_epoch_at_a_constant_rate(depth):
    model = images(freeze_depth=depth, schedule="cosine", warmup=0.0, lr=1e-3)
    for _ in range(3):
        model.partial_fit(IMAGES, Y, classes=[0, 1, 2, 9])
    assert model.n_iter_ == 3
    np.testing.assert_array_equal(model.classes_, [0, 1, 2, 9])
    assert model.predict_proba(IMAGES).shape == (24, 4)
    assert {record["head_lr"] for record in model.history_} == {1e-3}
    assert model.history_[2]["train_loss"] < model.history_[0]["train_loss"]
    with pytest.raises(ValueError, match=r"labels .*\[5\]"):
        model.partial_fit(IMAGES, np.where(Y == 0, 5, Y))
    with pytest.raises(ValueError, match="classes"):
        model.partial_fit(IMAGES, Y, classes=[0, 1, 2])


def test_partial_fit_after_fit_keeps_the_rate_constant_too():
    model = images(schedule="cosine", warmup=0.9, lr=1e-3).fit(IMAGES, Y)
    model.partial_fit(IMAGES, Y)
    assert model.history_[-1]["head_lr"] == 1e-3


def test_partial_fit_of_regressors_keeps_the_first_scale():
    model = images(ImageRegressor, lr=1e-3)
    model.partial_fit(IMAGES[:12], VALUES[:12])
    first = model.predict(NEW_IMAGES)
    model.partial_fit(IMAGES[12:], VALUES[12:], sample_weight=np.ones(12))
    assert model.n_iter_ == 2
    assert np.abs(model.predict(NEW_IMAGES) - first).max() > 1e-3
    assert np.abs(model.predict(NEW_IMAGES) - first).max() < 200


# --- nothing loads before it is needed -----------------------------------------

HEAVY = {"torch", "torchvision", "skorch", "transformers", "tokenizers"}


def modules_after(code: str) -> set[str]:
    code += "\nimport sys; print('LOADED', *{n.split('.')[0] for n in sys.modules})"
    run = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    return set(done.stdout.partition("LOADED")[2].split())


def test_looking_at_an_estimator_loads_neither_torch_nor_a_network():
    names = "ImageClassifier, ImageRegressor, TextClassifier, TextRegressor"
    loaded = modules_after(
        "import pickle\n"
        "from sklearn.base import clone\n"
        f"from sklearn_transfer import {names}\n"
        f"for model in [each() for each in ({names})]:\n"
        "    repr(clone(model)), model._repr_html_(), dir(model)\n"
        "    hasattr(model, 'classes_'), hasattr(model, 'net_')\n"
        "    pickle.loads(pickle.dumps(model.set_params(backbone='gpt2')))\n"
    )
    assert "sklearn" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("depth", ["all", -1])
def test_unpickling_loads_neither_torch_nor_a_network(tmp_path, depth):
    file = tmp_path / "models.pickle"
    fitted = [
        images(freeze_depth=depth).fit(IMAGES, Y),
        texts(freeze_depth=depth).fit(TEXTS, LABELS),
        images(ImageRegressor, freeze_depth=depth).fit(IMAGES, VALUES),
        texts(TextRegressor, freeze_depth=depth).fit(TEXTS, VALUES),
    ]
    file.write_bytes(pickle.dumps(fitted))
    loaded = modules_after(
        "import pickle\n"
        "from sklearn.base import clone\n"
        f"for model in pickle.load(open({str(file)!r}, 'rb')):\n"
        "    repr(model), model._repr_html_(), dir(model), clone(model)\n"
        "    model.history_, model.n_iter_, getattr(model, 'classes_', None)\n"
        "    assert 'net_' not in vars(model), 'its network was built'"
    )
    assert "sklearn_transfer" in loaded
    assert not loaded & HEAVY


@both
def test_a_pickle_predicts_the_same(make, X, y):
    model = make().fit(X, y)
    again = pickle.loads(pickle.dumps(model))
    assert_same_model(model, again, X)
    np.testing.assert_array_equal(model.transform(X), again.transform(X))
    assert again.net_.history == model.net_.history
    assert_same_model(again, pickle.loads(pickle.dumps(again)), X)


# --- in scikit-learn's hands -----------------------------------------------------


def test_a_column_of_a_table_is_classified():
    table = pd.DataFrame({"number": range(24), "text": TEXTS})
    keep = ColumnTransformer([("text", "passthrough", ["text"])])
    model = make_pipeline(keep, texts()).fit(table, LABELS)
    assert (
        model.predict(table).tolist()
        == texts().fit(TEXTS, LABELS).predict(TEXTS).tolist()
    )


@pytest.mark.parametrize(
    ("make", "X", "y", "depths"),
    [
        (images, IMAGES, Y, ["stem", "layer3", -1, "all"]),
        (texts, TEXTS, LABELS, ["embeddings", "layer.0", 0, "all"]),
    ],
    ids=["images", "texts"],
)
def test_a_search_over_freeze_depth_chooses_the_same_with_two_workers(
    make, X, y, depths
):
    model, grid = make(max_epochs=1, lr=1e-3), {"freeze_depth": depths}
    found = [
        GridSearchCV(model, grid, cv=2, scoring="neg_log_loss", n_jobs=n)
        for n in (1, 2)
    ]
    for search in found:
        search.fit(X, y)
    one, two = found
    assert one.best_params_ == two.best_params_
    scores = [search.cv_results_["mean_test_score"] for search in found]
    np.testing.assert_allclose(*scores, atol=1e-3)
    assert len(np.unique(scores[0].round(6))) > 2  # the depths matter
    assert_same_model(one, two, X, atol=1e-3)


def test_halving_search_gives_epochs_to_the_best():
    search = HalvingGridSearchCV(
        images(),
        {"lr": [1e-3, 1e-4]},
        resource="max_epochs",
        min_resources=1,
        max_resources=2,
        factor=2,
        cv=2,
    ).fit(IMAGES, Y)
    assert search.best_estimator_.n_iter_ == 2
    assert search.n_resources_ == [1, 2]


def test_cross_val_predict_calibration_and_stacking():
    found = cross_val_predict(images(), IMAGES, Y, cv=2, method="predict_proba")
    assert np.mean(found.argmax(1) == Y) > 0.8
    calibrated = CalibratedClassifierCV(texts(freeze_depth="all"), cv=2)
    assert calibrated.fit(TEXTS, LABELS).score(TEXTS, LABELS) > 0.8
    stack = StackingClassifier(
        [("probe", images(freeze_depth="all")), ("tuned", images())],
        LogisticRegression(),
        cv=2,
    ).fit(IMAGES, Y)
    assert stack.score(NEW_IMAGES, NEW_Y) > 0.8


# --- early stopping ----------------------------------------------------------


class Judge:
    """A scorer that says what it was written, and remembers what it was shown."""

    def __init__(self, *scores):
        self.scores, self.seen = list(scores), []

    def __call__(self, estimator, X, y):
        self.seen.append((X, y))
        return self.scores.pop(0) if self.scores else 0.0


def test_the_inner_split_is_stratified():
    judge = Judge()
    X, y = stripes(48, 2)
    y[::3] = 1  # 16 zeros, 32 ones
    images(
        freeze_depth=4, early_stopping="auto", scoring=judge, validation_fraction=0.25
    ).fit(X, y)
    shown, labels = judge.seen[0]
    assert np.bincount(labels).tolist() == [4, 8]
    assert len(shown) == 12


def test_groups_are_not_torn_apart():
    judge, groups = Judge(), np.arange(24) // 4
    texts(early_stopping=True, scoring=judge, validation_fraction=0.3).fit(
        TEXTS, LABELS, groups=groups
    )
    shown = judge.seen[0][0]
    judged_by = np.array([text in shown for text in TEXTS])
    assert len(set(TEXTS)) == 24
    assert 0 < judged_by.sum() < 24
    for group in np.unique(groups):
        assert len(set(judged_by[groups == group])) == 1


def test_rows_given_for_validation_are_used_and_all_others_trained_on():
    judge = Judge()
    model = images(early_stopping="auto", scoring=judge)
    model.fit(IMAGES, Y, X_val=NEW_IMAGES, y_val=NEW_Y)
    shown, labels = judge.seen[-1]
    np.testing.assert_array_equal(shown, NEW_IMAGES)
    np.testing.assert_array_equal(labels, NEW_Y)
    alone = images().fit(IMAGES, Y)
    assert model.history_[0]["train_loss"] == alone.history_[0]["train_loss"]


def test_auto_is_off_for_few_rows_and_true_says_why_not():
    few = images(early_stopping="auto").fit(IMAGES[:9], Y[:9])
    assert np.isnan(few.history_[0]["valid_loss"])
    many = images(early_stopping="auto", validation_fraction=0.25)
    assert not np.isnan(many.fit(IMAGES, Y).history_[0]["valid_loss"])
    with pytest.raises(ValueError, match=r"early_stopping=True .* 3 rows.*Write"):
        images(early_stopping=True).fit(IMAGES[:9], Y[:9])


@both
def test_the_best_weights_come_back(make, X, y):
    given = {
        "early_stopping": True,
        "validation_fraction": 0.25,
        "n_iter_no_change": 2,
        "schedule": "constant",
        "warmup": 0.0,
        "lr": 1e-3,
    }
    model = make(max_epochs=9, scoring=Judge(0.1, 0.5, 0.9, 0.3, 0.8), **given)
    model.fit(X, y)
    assert (model.n_iter_, model.best_epoch_) == (4, 2)
    assert [r["valid_score"] for r in model.history_] == [0.5, 0.9, 0.3, 0.8]
    shorter = make(max_epochs=2, scoring=Judge(0.1, 0.5, 0.9), **given).fit(X, y)
    assert_same_model(model, shorter, X)
    start = make(max_epochs=9, scoring=Judge(0.9), **given).fit(X, y)
    assert (start.n_iter_, start.best_epoch_) == (2, 0)
    assert np.abs(start.predict_proba(X) - model.predict_proba(X)).max() > 1e-4


@pytest.mark.parametrize(
    "scoring", ["accuracy", "neg_log_loss", "roc_auc_ovr", "f1_macro", None]
)
def test_any_scorer_judges_a_classifier(scoring):
    model = images(scoring=scoring).fit(IMAGES, Y, X_val=NEW_IMAGES, y_val=NEW_Y)
    expected = get_scorer(scoring or "accuracy")(model, NEW_IMAGES, NEW_Y)
    assert model.history_[-1]["valid_score"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scoring", ["neg_mean_absolute_error", None])
def test_any_scorer_judges_a_regressor_in_its_units(scoring):
    y_val = np.linspace(-30.0, 90.0, 12)
    model = images(ImageRegressor, scoring=scoring)
    model.fit(IMAGES, VALUES, X_val=NEW_IMAGES, y_val=y_val)
    expected = get_scorer(scoring or "r2")(model, NEW_IMAGES, y_val)
    assert model.history_[-1]["valid_score"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "X"), [(images, IMAGES), (texts, TEXTS)], ids=["images", "texts"]
)
def test_nothing_that_is_fitted_sees_the_rows_to_judge_by(make, X):
    regressor = ImageRegressor if make is images else TextRegressor
    given = {"early_stopping": True, "max_epochs": 1, "validation_fraction": 0.25}
    judge = Judge()
    honest = make(regressor, scoring=judge, **given).fit(X, VALUES)
    judged_by = np.isin(VALUES, judge.seen[0][1])
    assert judged_by.sum() == 6
    absurd = make(regressor, scoring=Judge(), **given)
    absurd.fit(X, np.where(judged_by, 1e9, VALUES))
    # In units of the spread, after the probe: equal if both are.
    assert absurd.history_[0]["train_loss"] == honest.history_[0]["train_loss"]
    assert absurd.history_[0]["valid_loss"] > 1e6 > honest.history_[0]["valid_loss"]
    np.testing.assert_array_equal(absurd.predict(X), honest.predict(X))


def test_history_makes_a_table():
    model = images(early_stopping="auto", max_epochs=3).fit(IMAGES, Y)
    table = pd.DataFrame(model.history_)
    assert list(table.columns) == [
        "epoch",
        "train_loss",
        "valid_loss",
        "valid_score",
        "lr",
        "head_lr",
        "frozen_stages",
        "recomputed_rows",
        "seconds",
    ]
    assert table["epoch"].tolist() == [1, 2, 3]
    assert model.n_iter_ == 3
    probe = images(freeze_depth="all").fit(IMAGES, Y)
    assert (probe.n_iter_, probe.history_, probe.best_epoch_) == (0, [], 0)


# --- messages, and skorch's callbacks -----------------------------------------


def test_silent_unless_verbose(capsys):
    images().fit(IMAGES, Y)
    assert capsys.readouterr() == ("", "")
    images(verbose=1).fit(IMAGES, Y)
    assert "[ImageClassifier] epoch 2, train_loss" in capsys.readouterr().out


def test_skorch_callbacks_are_heard_and_may_end_the_fit():
    epochs = []

    class Note(Callback):
        def on_epoch_end(self, net, **kwargs):
            epochs.append(net.history[-1, "train_loss"])

    stop = EarlyStopping("train_loss", patience=1, threshold=1e9, sink=lambda _: None)
    model = images(max_epochs=6, callbacks=[Note(), stop]).fit(IMAGES, Y)
    assert 1 <= model.n_iter_ < 6
    assert epochs == [record["train_loss"] for record in model.history_]
    assert model.predict(IMAGES).shape == (24,)


def test_an_interrupt_of_the_users_is_not_swallowed():
    def interrupted(*_):
        raise KeyboardInterrupt

    class Busy(Callback):
        def on_epoch_end(self, net, **kwargs):
            interrupted()

    with pytest.raises(KeyboardInterrupt):
        images(scoring=interrupted).fit(IMAGES, Y, X_val=NEW_IMAGES, y_val=NEW_Y)
    with pytest.raises(KeyboardInterrupt):
        images(callbacks=[Busy()]).fit(IMAGES, Y)
