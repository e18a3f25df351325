"""What y means: numbers to train on, and back."""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
from scipy.sparse import issparse
from scipy.special import expit, log_expit, logsumexp, softmax
from sklearn.utils import (
    assert_all_finite,
    column_or_1d,
    compute_class_weight,
)
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_array

from sklearn_transfer.inputs.containers import is_missing


class Classes:
    """One class a row, of any kind of label."""

    task = "classes"

    def __init__(self, classes):
        self.classes_ = np.asarray(classes)
        self.n_outputs = len(self.classes_)

    @classmethod
    def of(cls, y, name: str) -> Classes:
        classes = np.unique(y)
        if len(classes) < 2:
            raise ValueError(
                f"{name} needs samples of at least 2 classes in the data, but the data "
                f"contains only one class: {classes[:1].tolist()[0]!r}"
            )
        return cls(classes)

    def check_same(self, classes) -> None:
        """Refuse other classes than those of the first ``partial_fit``."""
        if not np.array_equal(self.classes_, np.unique(classes)):
            raise ValueError(
                f"`classes={classes!r}` is not the same as on last call to "
                f"partial_fit, was: {self.classes_!r}"
            )

    def encode(self, y: np.ndarray) -> np.ndarray:
        """Class numbers, int64."""
        if y.ndim != 1:
            raise ValueError(
                f"y has {y.shape[1]} columns of labels, and one class a row was seen "
                "in fit."
            )
        place = np.searchsorted(self.classes_, y).clip(max=self.n_outputs - 1)
        known = self.classes_[place] == y
        if not np.all(known):
            raise ValueError(
                f"y contains labels that training has not seen: "
                f"{np.unique(y[~known])[:10].tolist()}. The classes are "
                f"{self.classes_[:10].tolist()}. Leave those rows out of y and y_val, "
                "write warm_start=False to begin anew, or name all classes in the "
                "first partial_fit(X, y, classes=...)."
            )
        return place.astype(np.int64)

    def fit_scale(self, encoded, weights) -> None:
        """Nothing to scale."""

    def scaled(self, encoded: np.ndarray) -> np.ndarray:
        return encoded

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Softmax, (n, n_classes), float64 so that rows sum to one closely."""
        return softmax(outputs.astype(np.float64), axis=1)

    def log_probabilities(self, outputs: np.ndarray) -> np.ndarray:
        outputs = outputs.astype(np.float64)
        return outputs - logsumexp(outputs, axis=1, keepdims=True)

    def decision(self, outputs: np.ndarray) -> np.ndarray:
        """Scores a class; of two classes the log odds of the second."""
        if self.n_outputs == 2:
            return outputs[:, 1] - outputs[:, 0]
        return outputs

    def predict(self, outputs: np.ndarray) -> np.ndarray:
        return self.classes_[outputs.argmax(1)]


class Labels:
    """Any number of labels a row, as a matrix of zeros and ones."""

    task = "labels"

    def __init__(self, n_outputs: int):
        self.n_outputs = n_outputs
        self.classes_ = np.arange(n_outputs)

    def check_same(self, classes) -> None:
        """Labels are the columns of y, whatever they are called."""

    def encode(self, y: np.ndarray) -> np.ndarray:
        found = y.shape[1] if y.ndim == 2 else "no column of"
        if found != self.n_outputs:
            raise ValueError(
                f"y has {found} labels, and {self.n_outputs} were seen in fit."
            )
        return y.astype(np.float32)

    def fit_scale(self, encoded, weights) -> None:
        """Nothing to scale."""

    def scaled(self, encoded: np.ndarray) -> np.ndarray:
        return encoded

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Of each label by itself, (n, n_labels)."""
        return expit(outputs.astype(np.float64))

    def log_probabilities(self, outputs: np.ndarray) -> np.ndarray:
        return log_expit(outputs.astype(np.float64))

    def decision(self, outputs: np.ndarray) -> np.ndarray:
        return outputs

    def predict(self, outputs: np.ndarray) -> np.ndarray:
        return (outputs > 0).astype(np.int64)


class Values:
    """Numbers; trained on in units of each target's standard deviation."""

    task = "values"

    def __init__(self, n_outputs: int, is_column: bool):
        self.n_outputs, self.is_column = n_outputs, is_column
        self.mean, self.spread = np.zeros(n_outputs), np.ones(n_outputs)

    def encode(self, y: np.ndarray) -> np.ndarray:
        y = y.reshape(len(y), -1).astype(np.float64)
        if y.shape[1] != self.n_outputs:
            raise ValueError(
                f"y has {y.shape[1]} outputs, and {self.n_outputs} were seen in fit."
            )
        return y

    def fit_scale(self, encoded: np.ndarray, weights: np.ndarray) -> None:
        """Mean and spread of the rows that are trained on."""
        self.mean = np.average(encoded, axis=0, weights=weights)
        variance = np.average((encoded - self.mean) ** 2, axis=0, weights=weights)
        spread = np.sqrt(variance)
        # A target that is constant up to rounding is not blown up to noise.
        is_constant = spread <= 1e-12 * np.maximum(1.0, np.abs(self.mean))
        self.spread = np.where(is_constant, 1.0, spread)

    def scaled(self, encoded: np.ndarray) -> np.ndarray:
        return ((encoded - self.mean) / self.spread).astype(np.float32)

    def predict(self, outputs: np.ndarray) -> np.ndarray:
        values = outputs.astype(np.float64) * self.spread + self.mean
        return values[:, 0] if self.is_column else values


def check_labels(y, name: str) -> np.ndarray:
    """y of a classifier as an array: (n,) labels or (n, m) zeros and ones.

    Raises
    ------
    ValueError
        If y is neither.
    """
    if y is None:
        raise ValueError(
            f"This {name} estimator requires y to be passed, but the target y is None."
        )
    _refuse_missing(y)
    assert_all_finite(y.data if issparse(y) else y, input_name="y")
    kind = type_of_target(y, input_name="y", raise_unknown=True)
    if kind == "multilabel-indicator":
        dense = y.toarray() if hasattr(y, "toarray") else np.asarray(y)
        return dense.astype(np.int64)
    check_classification_targets(y)
    if kind == "multiclass-multioutput":
        raise ValueError(
            "y has several columns of classes. Fit one classifier a column, or write "
            "sklearn.multioutput.MultiOutputClassifier(...)."
        )
    return column_or_1d(y, warn=True)


def check_values(y, name: str) -> np.ndarray:
    """y of a regressor as an array of float64, (n,) or (n, m)."""
    if y is None:
        raise ValueError(
            f"This {name} estimator requires y to be passed, but the target y is None."
        )
    try:
        return check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
    except (TypeError, ValueError) as error:
        if not str(error).startswith(_UNCONVERTED):
            raise
        raise ValueError(
            f"y cannot be read as numbers ({error}), and {name} predicts numbers. "
            "Convert y, for example pandas.to_numeric(y); for classes write "
            f"{name.replace('Regressor', 'Classifier')}."
        ) from error


# How numpy begins where values are no numbers.
_UNCONVERTED = ("could not convert", "float() argument", "setting an array element")


def _refuse_missing(y) -> None:
    """Name missing labels, which are no label of a kind of their own."""
    y = y.to_list() if hasattr(y, "to_list") else y  # of pandas and polars
    if not isinstance(y, (list, tuple)) and getattr(y, "dtype", 0) != "object":
        return
    bad = [i for i, label in enumerate(y) if is_missing(label)]
    if bad:
        more = ", ..." if len(bad) > 5 else ""
        raise ValueError(
            f"Input y contains NaN: of {len(bad)} rows the label is missing, "
            f"{', '.join(map(str, bad[:5]))}{more}. Leave those rows out of X and y, "
            "where pandas.isna(y)."
        )


def class_weights(class_weight, trained, y, classes) -> np.ndarray:
    """What a row's weight is multiplied with, learned from the labels trained on.

    Parameters
    ----------
    class_weight : dict, "balanced", list of dict or None
    trained, y : ndarray
        Labels of the rows trained on, and of the rows asked about.
    classes : ndarray
        All classes there are; a dict need not name each, and may name no other.
    """
    if class_weight is None:
        return np.ones(len(y))
    if y.ndim == 2:
        n = y.shape[1]
        each = class_weight if isinstance(class_weight, list) else [class_weight] * n
        if len(each) != n:
            raise ValueError(
                f"class_weight has {len(each)} entries, and y has {n} labels a row. "
                "Write one dict for each label, or one for all of them."
            )
        # Of each row the product over its labels, as in scikit-learn.
        columns = zip(each, trained.T, y.T, strict=True)
        factors = [class_weights(*column, np.arange(2)) for column in columns]
        return np.prod(factors, axis=0)
    if isinstance(class_weight, list):
        raise ValueError(
            "class_weight is a list, which is for several labels a row, and y has one "
            "class a row. Write one dict, class_weight={label: weight}."
        )
    if isinstance(class_weight, dict):
        unknown = set(class_weight) - set(classes.tolist())
        if unknown:
            raise ValueError(
                f"class_weight names {sorted(map(repr, unknown))}, which are no "
                "classes. "
                f"The classes are {classes[:10].tolist()}."
            )
        _check_not_negative(class_weight)
        return np.array([class_weight.get(label, 1.0) for label in y.tolist()], float)
    classes = np.unique(trained)
    weights = compute_class_weight(class_weight, classes=classes, y=trained)
    place = np.searchsorted(classes, y).clip(max=len(classes) - 1)
    return np.where(classes[place] == y, weights[place], 1.0)


def _check_not_negative(class_weight: dict) -> None:
    """Refuse weights that would silently drop a class, or are no numbers."""
    for label, weight in class_weight.items():
        if not (isinstance(weight, Real) and 0 <= float(weight) < math.inf):
            raise ValueError(
                f"class_weight gives {label!r} a weight of {weight!r}, and a number "
                f"from 0 is needed, for example class_weight={{{label!r}: 2.0}}."
            )
