"""Scores of validation rows from the network's outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, get_scorer, r2_score


class _Known(BaseEstimator):
    """An estimator whose answer is known: what a scorer asks is read off.

    A scorer then costs no second pass through the network.
    """

    def __init__(self, target=None, outputs=None):
        self.target = target
        self.outputs = outputs

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict(self, X):
        return self.target.predict(self.outputs)


class _KnownClassifier(ClassifierMixin, _Known):
    @property
    def classes_(self):
        return self.target.classes_

    def predict_proba(self, X):
        return self.target.probabilities(self.outputs)

    def predict_log_proba(self, X):
        return np.log(self.predict_proba(X))

    def decision_function(self, X):
        return self.target.decision(self.outputs)


class _KnownRegressor(RegressorMixin, _Known):
    pass


def score_of(scoring, target, X, y, weights) -> Callable[[np.ndarray], float]:
    """A function from outputs to a score, higher is better.

    Parameters
    ----------
    scoring : str, callable or None
        Any of scikit-learn's scorers, or ``f(estimator, X, y)``. None is accuracy,
        or R² of values.
    target : Classes, Labels or Values
    X, y : array-like
        The validation rows.
    weights : ndarray or None
        Of the rows, where the user gave any.
    """
    is_classifier = target.task != "values"
    known = _KnownClassifier if is_classifier else _KnownRegressor
    if scoring is None:
        metric = accuracy_score if is_classifier else r2_score
        return lambda outputs: float(
            metric(y, target.predict(outputs), sample_weight=weights)
        )
    scorer = get_scorer(scoring) if isinstance(scoring, str) else scoring
    # A callable of the user's need not take weights.
    given = {} if weights is None or callable(scoring) else {"sample_weight": weights}
    return lambda outputs: float(scorer(known(target, outputs), X, y, **given))
