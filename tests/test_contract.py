"""scikit-learn's own checks, run for real on every estimator.

``check_estimator`` skips almost everything for an estimator whose input is not
a 2-D table. The doubles below say that theirs is one and turn its numeric rows
into images or texts, inside the one hook ``_rows``; all else is the true code.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import validate_data

import sklearn_transfer
from sklearn_transfer import ImageFeaturizer, TextFeaturizer

ESTIMATORS = [ImageFeaturizer, TextFeaturizer]


class NumericRows:
    """Takes 2-D numeric rows, as scikit-learn's checks give them."""

    def _check_columns(self, X, *, reset):
        self._table = validate_data(self, X, reset=reset, dtype=np.float64)

    def _rows(self, X):
        table, self.__dict__["_table"] = self._table, None
        del self.__dict__["_table"]
        return super()._rows(self._as_samples(table))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.one_d_array = tags.input_tags.three_d_array = False
        tags.input_tags.string = False
        return tags


class ImagesFromNumbers(NumericRows, ImageFeaturizer):
    """Each row is drawn: its numbers become the grey levels of a little grid."""

    def _as_samples(self, table):
        levels = np.uint8(127.5 + 127.5 * np.tanh(table / 10))
        return [np.resize(row, (8, 8)) for row in levels]


class TextsFromNumbers(NumericRows, TextFeaturizer):
    """Each row is written out."""

    def _as_samples(self, table):
        return [" ".join(f"{number:.2g}" for number in row) for row in table]


DOUBLES = [
    ImagesFromNumbers(precision="float32", cache=None, image_size=16),
    TextsFromNumbers(precision="float32", cache=None),
]


@parametrize_with_checks(DOUBLES)
def test_sklearn_checks(estimator, check):
    check(estimator)


def test_all_public_estimators_are_tested():
    public = [getattr(sklearn_transfer, name) for name in sklearn_transfer.__all__]
    classes = [found for found in public if inspect.isclass(found)]
    assert set(classes) == set(ESTIMATORS)


@pytest.mark.parametrize("estimator_class", ESTIMATORS)
def test_constraints_cover_the_signature(estimator_class):
    signature = set(inspect.signature(estimator_class).parameters)
    assert set(estimator_class._parameter_constraints) == signature


@pytest.mark.parametrize("estimator_class", ESTIMATORS)
def test_parameters_are_stored_untouched_and_cloned(estimator_class):
    given = {name: object() for name in inspect.signature(estimator_class).parameters}
    estimator = estimator_class(**given)
    assert all(estimator.get_params()[name] is value for name, value in given.items())
    plain = estimator_class(verbose=1, layers="all")
    assert clone(plain).get_params() == plain.get_params()


@pytest.mark.parametrize("estimator_class", ESTIMATORS)
def test_every_parameter_is_documented(estimator_class):
    for name in inspect.signature(estimator_class).parameters:
        assert f"\n    {name} : " in estimator_class.__doc__, name
    assert "Examples\n" in estimator_class.__doc__
