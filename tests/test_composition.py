"""The estimators inside everything that scikit-learn builds from estimators."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import (
    ColumnTransformer,
    TransformedTargetRegressor,
    make_column_transformer,
)
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    BaggingClassifier,
    BaggingRegressor,
    StackingClassifier,
    StackingRegressor,
)
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    TunedThresholdClassifierCV,
    cross_val_predict,
)
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_transfer import cache_info
from tests.contract_doubles import ESTIMATORS, data, quick, reads_images
from tests.fine_tuning_data import remarks, stripes

FEATURIZERS = [c for c in ESTIMATORS if not hasattr(c, "predict")]
CLASSIFIERS = [c for c in ESTIMATORS if is_classifier(c())]
REGRESSORS = [c for c in ESTIMATORS if is_regressor(c())]
every_estimator = pytest.mark.parametrize("cls", ESTIMATORS)
every_featurizer = pytest.mark.parametrize("cls", FEATURIZERS)
every_fine_tuner = pytest.mark.parametrize("cls", CLASSIFIERS + REGRESSORS)
# Featurizers classify with a linear model after them.
every_classifier = pytest.mark.parametrize("cls", FEATURIZERS + CLASSIFIERS)
every_regressor = pytest.mark.parametrize("cls", REGRESSORS)


def classifier(cls, **given):
    """A classifier of rows: the estimator, or a linear one on its features."""
    model = quick(cls, **given)
    if is_classifier(model):
        return model
    return make_pipeline(model, LogisticRegression(C=100, max_iter=1000))


def regressor(cls, **given):
    model = quick(cls, **given)
    if is_regressor(model):
        return model
    return make_pipeline(model, StandardScaler(), Ridge())


def classes(cls, n=24, seed=0):
    X, y = data(cls, n, seed)
    return X, np.array(["no", "yes"])[(y > 0).astype(int)]


def as_column(X) -> np.ndarray:
    """(n, 1) of objects: for what insists on two dimensions."""
    column = np.empty((len(X), 1), object)
    column[:, 0] = X
    return column


@pytest.fixture
def table(tmp_path) -> pd.DataFrame:
    """An image, a text and a number a row, which tell three different things."""
    pixels, of_image = stripes(24)
    texts, of_text = remarks(24)
    # 00, 01, 10, 11: what the image tells is independent of what the text tells.
    order = np.lexsort((np.arange(24) % 12, of_image))
    pixels, of_image = pixels[order], of_image[order]
    paths = [str(tmp_path / f"{i:02}.png") for i in range(24)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    number = np.random.default_rng(0).permutation(np.arange(24) % 2)
    return pd.DataFrame(
        {"picture": paths, "number": number * 1.0, "remark": texts},
        index=[f"row {i}" for i in range(24)],
    ).assign(of_picture=of_image, of_remark=of_text == "good", of_number=number == 1)


COLUMNS = ["picture", "number", "remark"]


# --- columns, steps and unions ---------------------------------------------------


@pytest.mark.parametrize("as_list", [False, True], ids=["string", "list"])
@every_estimator
def test_one_column_of_a_table_is_selected_by_name(cls, as_list, table):
    name = "picture" if reads_images(cls) else "remark"
    y = table[f"of_{name}"].to_numpy().astype(float)
    y = y if is_regressor(cls()) else y.astype(int)
    columns = ColumnTransformer(
        [
            ("deep", quick(cls), [name] if as_list else name),
            ("plain", "passthrough", ["number"]),
        ]
    )
    found = columns.fit_transform(table[COLUMNS], y)
    by_hand = quick(cls).fit(list(table[name]), y).transform(list(table[name]))
    np.testing.assert_array_equal(found[:, :-1], by_hand)
    np.testing.assert_array_equal(found[:, -1], table["number"])
    assert columns.get_feature_names_out()[0] == f"deep__{cls.__name__.lower()}0"
    inner = columns.named_transformers_["deep"]
    assert hasattr(inner, "feature_names_in_") == as_list
    columns.set_output(transform="pandas")
    frame = columns.transform(table[COLUMNS].iloc[::-1])
    assert list(frame.index) == list(table.index[::-1])
    np.testing.assert_array_equal(frame.to_numpy()[::-1], found)


@every_featurizer
def test_a_pipeline_is_its_steps_by_hand(cls):
    X, y = classes(cls)
    new, _ = classes(cls, 8, seed=1)
    pipeline = classifier(cls).fit(X, y)
    featurizer = quick(cls).fit(X)
    head = clone(pipeline[-1]).fit(featurizer.transform(X), y)
    expected = head.predict_proba(featurizer.transform(new))
    np.testing.assert_array_equal(pipeline.predict_proba(new), expected)
    assert pipeline.score(X, y) == 1
    np.testing.assert_array_equal(
        pipeline[:-1].get_feature_names_out(), featurizer.get_feature_names_out()
    )


@every_fine_tuner
def test_a_tuned_network_is_a_step_before_another_estimator(cls):
    X, y = data(cls, 24)
    last = LogisticRegression() if is_classifier(cls()) else Ridge()
    pipeline = make_pipeline(quick(cls, max_epochs=2), last).fit(X, y)
    tuned = quick(cls, max_epochs=2).fit(X, y)
    by_hand = clone(last).fit(tuned.transform(X), y)
    np.testing.assert_array_equal(
        pipeline.predict(X), by_hand.predict(tuned.transform(X))
    )
    assert pipeline.score(X, y) > 0.8


@every_estimator
def test_a_union_sets_features_side_by_side(cls):
    X, y = data(cls)
    other = {"image_size": 32} if reads_images(cls) else {"pooling": "max"}
    first, second = quick(cls), quick(cls, **other)
    union = FeatureUnion([("one", first), ("other", second)])
    found = union.fit_transform(X, y)
    parts = [clone(model).fit(X, y).transform(X) for model in (first, second)]
    np.testing.assert_array_equal(found, np.hstack(parts))
    assert np.abs(parts[0] - parts[1]).max() > 1e-3
    names = list(union.get_feature_names_out())
    assert len(set(names)) == len(names) == found.shape[1]
    assert names[0].startswith("one__") and names[-1].startswith("other__")


# --- searches --------------------------------------------------------------------


# Classifiers: test_fine_tuning_contract.py.
@pytest.mark.parametrize("cls", FEATURIZERS + REGRESSORS)
def test_a_search_chooses_the_same_with_two_workers(cls):
    X, y = data(cls, 24)
    if cls in FEATURIZERS:
        model = classifier(cls)
        grid = {f"{model.steps[0][0]}__layers": [1, -1, [1, -1]]}
    else:
        model, grid = quick(cls), {"lr": [1e-3, 1e-5], "freeze_depth": [-1, "all"]}
    found = [
        GridSearchCV(model, grid, cv=2, n_jobs=n, error_score="raise").fit(X, y)
        for n in (1, 2)
    ]
    scores = [search.cv_results_["mean_test_score"] for search in found]
    np.testing.assert_allclose(*scores, atol=1e-3)
    assert found[0].best_params_ == found[1].best_params_
    one, two = (search.predict(X) for search in found)
    np.testing.assert_allclose(one, two, atol=1e-3)
    assert found[1].best_score_ > (0.2 if is_regressor(model) else 0.75)


@every_fine_tuner
def test_halving_gives_more_epochs_to_fewer_candidates(cls):
    X, y = data(cls, 24)
    search = HalvingGridSearchCV(
        quick(cls),
        {"lr": [1e-3, 1e-5]},
        resource="max_epochs",
        min_resources=1,
        max_resources=2,
        factor=2,
        cv=2,
    ).fit(X, y)
    assert search.n_resources_ == [1, 2]
    assert search.n_candidates_ == [2, 1]
    assert search.best_estimator_.n_iter_ == 2
    assert search.score(X, y) > 0.8


# --- meta-estimators -------------------------------------------------------------


@every_estimator
def test_rows_held_out_are_predicted(cls):
    if cls in REGRESSORS:
        X, y = data(cls, 24)
        found = cross_val_predict(quick(cls), X, y, cv=3)
        assert np.mean((found - y) ** 2) < 0.6 * np.var(y)
        return
    X, y = classes(cls)
    model = classifier(cls)
    found = cross_val_predict(model, X, y, cv=3, method="predict_proba")
    assert found.shape == (24, 2)
    assert np.mean((found[:, 1] > 0.5) == (y == "yes")) > 0.75
    thirds = cross_val_predict(model, X, y, cv=3, method="predict_proba", n_jobs=2)
    np.testing.assert_allclose(thirds, found, atol=1e-3)


@every_classifier
def test_probabilities_are_calibrated(cls):
    X, y = classes(cls)
    model = CalibratedClassifierCV(classifier(cls), cv=2, method="sigmoid")
    model.fit(X, y)
    assert len(model.calibrated_classifiers_) == 2
    found = model.predict_proba(X)
    np.testing.assert_allclose(found.sum(1), 1)
    assert model.score(X, y) > 0.8
    # Not merely passed on: what is held out is less sure than what was fitted.
    plain = classifier(cls).fit(X, y).predict_proba(X)
    assert found.max(1).mean() < plain.max(1).mean()


@every_estimator
def test_models_are_stacked(cls):
    X, y = data(cls, 24)
    if cls in REGRESSORS:
        parts = [("tuned", quick(cls)), ("probe", quick(cls, freeze_depth="all"))]
        stack = StackingRegressor(parts, Ridge(), cv=2).fit(X, y)
    else:
        deep = {"freeze_depth": "all"} if cls in CLASSIFIERS else {"layers": "all"}
        parts = [("one", classifier(cls)), ("other", classifier(cls, **deep))]
        stack = StackingClassifier(parts, LogisticRegression(), cv=2).fit(X, y)
    assert stack.score(X, y) > 0.8
    assert stack.transform(X).shape == (24, 2)
    assert np.abs(stack.final_estimator_.coef_).min() > 0


@every_estimator
def test_models_are_bagged(cls):
    X, y = data(cls, 24)
    X = as_column(X)
    kind, model = BaggingClassifier, None
    if cls in REGRESSORS:
        kind, model = BaggingRegressor, quick(cls, freeze_depth="all")
    bag = kind(model or classifier(cls), n_estimators=3, random_state=0).fit(X, y)
    assert bag.score(X, y) > 0.6
    drawn = [sorted(rows) for rows in bag.estimators_samples_]
    assert drawn[0] != drawn[1]
    answers = [each.predict(X) for each in bag.estimators_]
    if cls in REGRESSORS:
        np.testing.assert_allclose(bag.predict(X), np.mean(answers, axis=0))
        assert np.abs(answers[0] - answers[1]).max() > 1e-3
    # The members of a bag are what they would be alone.
    rows = bag.estimators_samples_[0]
    alone = clone(bag.estimators_[0]).fit(X[rows], y[rows])
    np.testing.assert_allclose(alone.predict(X), answers[0], atol=1e-5)


@every_classifier
def test_a_threshold_is_tuned(cls):
    X, y = classes(cls, 32)
    rare = np.flatnonzero(y == "yes")[4:]  # 16 to 4
    X, y = [row for i, row in enumerate(X) if i not in rare], np.delete(y, rare)
    tuned = TunedThresholdClassifierCV(
        classifier(cls), scoring="balanced_accuracy", cv=2, store_cv_results=True
    ).fit(X, y)
    assert 0 < tuned.best_threshold_ < 1
    found = tuned.predict_proba(X)[:, 1] >= tuned.best_threshold_
    np.testing.assert_array_equal(tuned.predict(X) == "yes", found)
    assert balanced_accuracy_score(y, tuned.predict(X)) > 0.75
    assert len(np.unique(tuned.cv_results_["scores"].round(6))) > 1


@every_estimator
def test_a_frozen_estimator_is_not_fitted_again(cls):
    X, y = data(cls, 24)
    model = quick(cls).fit(X, y)
    before = model.transform(X)
    frozen = clone(FrozenEstimator(model)).fit(X, y[::-1])
    np.testing.assert_array_equal(frozen.transform(X), before)
    assert frozen.estimator is model
    if cls in CLASSIFIERS:
        calibrated = CalibratedClassifierCV(FrozenEstimator(model)).fit(X, y)
        assert calibrated.score(X, y) > 0.8
    else:
        pipeline = make_pipeline(FrozenEstimator(model), StandardScaler(), Ridge())
        assert pipeline.fit(X, y).score(X, y) > 0.8
    np.testing.assert_array_equal(model.transform(X), before)


@every_regressor
def test_targets_are_transformed(cls):
    X, y = data(cls, 24)
    y = np.exp(y / 5)
    model = TransformedTargetRegressor(quick(cls), func=np.log, inverse_func=np.exp)
    model.fit(X, y)
    expected = np.exp(quick(cls).fit(X, np.log(y)).predict(X))
    np.testing.assert_allclose(model.predict(X), expected, rtol=1e-6)


# --- a mixed table ---------------------------------------------------------------


@pytest.mark.parametrize("telling", COLUMNS)
def test_the_column_that_tells_is_found_in_a_mixed_table(telling, table, tmp_path):
    image, text = sorted(FEATURIZERS, key=reads_images, reverse=True)
    store = str(tmp_path / "store")
    model = make_pipeline(
        make_column_transformer(
            (make_pipeline(quick(image, cache=store), PCA(3)), "picture"),
            (make_pipeline(quick(text, cache=store), PCA(3)), ["remark"]),
            ("passthrough", ["number"]),
        ),
        StandardScaler(),
        LogisticRegression(),
    )
    X, y = table[COLUMNS], table[f"of_{telling}"]
    model.fit(X, y)
    encoded = cache_info(store).rows
    result = permutation_importance(model, X, y, n_repeats=3, random_state=0)
    found = dict(zip(COLUMNS, result.importances_mean, strict=True))
    assert max(found, key=found.get) == telling, found
    assert found[telling] > 0.2
    # Shuffled rows are known rows.
    assert cache_info(store).rows == encoded
    assert encoded >= len(table)
