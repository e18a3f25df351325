"""The public estimators, found by introspection, with data that suits each; and
doubles of them that take numeric rows, for scikit-learn's own checks."""

from __future__ import annotations

import inspect

import numpy as np
from sklearn.base import BaseEstimator, is_regressor
from sklearn.utils.validation import validate_data

import sklearn_transfer
from sklearn_transfer import (
    ImageClassifier,
    ImageFeaturizer,
    ImageRegressor,
    TextClassifier,
    TextFeaturizer,
    TextRegressor,
)
from tests.fine_tuning_data import WORDS, remarks, stripes, text_model

PUBLIC = [getattr(sklearn_transfer, name) for name in sklearn_transfer.__all__]
ESTIMATORS = [
    found
    for found in PUBLIC
    if inspect.isclass(found) and issubclass(found, BaseEstimator)
]

# What makes an estimator quick, and its answers the same on every machine.
QUICK = {
    "image_size": 16,
    "max_epochs": 1,
    "batch_size": 8,
    "early_stopping": False,
    "precision": "float32",
    "random_state": 0,
}


def parameters(cls) -> list[str]:
    return list(inspect.signature(cls).parameters)


def reads_images(cls) -> bool:
    return "image_size" in parameters(cls)


def quick(cls, **given):
    """A small estimator of a class."""
    known = parameters(cls)
    settings = {name: value for name, value in QUICK.items() if name in known}
    if not reads_images(cls):
        settings["backbone"] = text_model()
    return cls(**{**settings, **given})


def data(cls, n: int = 12, seed: int = 0):
    """X, a list of images or texts, and a y that X tells."""
    images, y = stripes(n, seed=seed)
    X = list(images) if reads_images(cls) else remarks(n, seed=seed)[0]
    return X, y * 10.0 - 5.0 if is_regressor(cls()) else y


# --- doubles ---------------------------------------------------------------------


class NumericRows:
    """Takes 2-D numeric rows, as scikit-learn's checks give them.

    ``check_estimator`` skips almost everything for an estimator whose input is not a
    2-D table. The doubles say that theirs is one and turn its rows into images or
    texts inside the one hook ``_rows``; all else is the true code.
    """

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


class Drawn(NumericRows):
    """Each row is drawn: its numbers become the colours of four patches."""

    def _as_samples(self, table):
        levels = np.uint8(127.5 + 127.5 * np.sin(table / 2))
        return [np.resize(row, (2, 2, 3)).repeat(8, 0).repeat(8, 1) for row in levels]


class WrittenOut(NumericRows):
    """Each row is written out."""

    def _as_samples(self, table):
        return [" ".join(f"{number:.2g}" for number in row) for row in table]


class InWords(NumericRows):
    """Each column is a word that a small network knows, said up to six times."""

    def _as_samples(self, table):
        times = np.uint8(3.5 + 3 * np.sin(table / 2))
        words = np.resize(WORDS, table.shape[1])
        return [" ".join(words.repeat(row)) for row in times]


class ImagesFromNumbers(Drawn, ImageFeaturizer):
    pass


class TextsFromNumbers(WrittenOut, TextFeaturizer):
    pass


class ImageClassesFromNumbers(Drawn, ImageClassifier):
    pass


class ImageValuesFromNumbers(Drawn, ImageRegressor):
    pass


class TextClassesFromNumbers(InWords, TextClassifier):
    pass


class TextValuesFromNumbers(InWords, TextRegressor):
    pass


# The probe alone; and last stages that are trained, on stored activations.
PROBE = {"freeze_depth": "all", "precision": "float32"}
TUNED = {"max_epochs": 1, "batch_size": 16, "random_state": 0, "precision": "float32"}


def doubles() -> list[BaseEstimator]:
    """Doubles of all public estimators, in the ways that they work."""
    exact = {"precision": "float32", "cache": None}
    return [
        ImagesFromNumbers(image_size=16, **exact),
        TextsFromNumbers(**exact),
        *(ImageClassesFromNumbers(image_size=16, **how) for how in (PROBE, TUNED)),
        *(ImageValuesFromNumbers(image_size=32, **how) for how in (PROBE, TUNED)),
        *(TextClassesFromNumbers(text_model(), **how) for how in (PROBE, TUNED)),
        *(TextValuesFromNumbers(text_model(), **how) for how in (PROBE, TUNED)),
    ]
