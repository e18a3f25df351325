"""What classifiers and regressors say, from what leaves the head."""

from __future__ import annotations

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from sklearn_transfer._sklearn import StrOptions, _fit_context
from sklearn_transfer.fine_tuning.base import BaseFineTuner
from sklearn_transfer.fine_tuning.parameters import PARAMETERS, number
from sklearn_transfer.fine_tuning.targets import (
    Classes,
    Labels,
    Values,
    check_labels,
    check_values,
    class_weights,
)


class FineTunedClassifier(ClassifierMixin, BaseFineTuner):
    """A fine-tuned network that gives classes, or labels."""

    _parameter_constraints: dict = {
        **PARAMETERS,
        "label_smoothing": [number(0, 1)],
        "class_weight": [dict, list, StrOptions({"balanced"}), None],
    }

    @property
    def classes_(self) -> np.ndarray:
        check_is_fitted(self, "_target")
        return self._target.classes_

    def _check_y(self, y) -> np.ndarray:
        return check_labels(y, type(self).__name__)

    def _make_target(self, y: np.ndarray, classes=None):
        if y.ndim == 2:
            return Labels(y.shape[1])
        if classes is not None:
            return Classes(np.unique(classes))
        return Classes.of(y, type(self).__name__)

    def _losses(self):
        from sklearn_transfer.training.recipe import Losses

        return Losses(self._target.task, label_smoothing=self.label_smoothing)

    def _class_weights(self, trained, y) -> np.ndarray:
        return class_weights(self.class_weight, trained, y, self._target.classes_)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Train for one epoch on these rows, at a constant learning rate.

        The first call starts the head from these rows, as ``fit`` does.

        Parameters
        ----------
        X : array-like of shape (n_samples,)
            See the class docstring for what a row may be.
        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            Labels, as in ``fit``.
        classes : array-like, default=None
            All labels that will ever come; needed at the first call if its y lacks
            some.
        sample_weight : array-like of shape (n_samples,), default=None
            Weight of each row, as in ``fit``.

        Returns
        -------
        self : object
            The estimator, trained so much longer.

        Raises
        ------
        ValueError
            If X, y or a parameter cannot be used, or y holds an unknown class.
        UnreadableRowsError
            If rows cannot be read; the message names every bad row and why.
        BackboneNotFoundError
            If the backbone is not on this machine and cannot be downloaded.
        DivergedError
            If the loss stops being a number, or explodes.
        """
        if isinstance(self.class_weight, str):
            raise ValueError(
                "class_weight='balanced' needs all labels, and partial_fit sees "
                "some. Give weights, class_weight={label: weight}, or use fit."
            )
        if classes is not None and self._is_tuned:
            self._target.check_same(classes)
        return self._partial_fit(X, y, sample_weight, classes)

    def predict(self, X):
        """The likeliest class of each row.

        Parameters
        ----------
        X : array-like of shape (n_samples,)
            See the class docstring for what a row may be.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_labels)
            Of ``classes_``; of several labels a row, zeros and ones.

        Raises
        ------
        UnreadableRowsError
            If rows cannot be read; the message names every bad row and why.
        """
        outputs = self._outputs(X)  # first: it says so where fit is missing
        return self._target.predict(outputs)

    def predict_proba(self, X):
        """Probabilities of the classes, which sum to one; of labels, each its own.

        Parameters
        ----------
        X : array-like of shape (n_samples,)
            See the class docstring for what a row may be.

        Returns
        -------
        probabilities : ndarray of shape (n_samples, n_classes)
            From 0 to 1, float64, columns as in ``classes_``.

        Raises
        ------
        UnreadableRowsError
            If rows cannot be read; the message names every bad row and why.
        """
        outputs = self._outputs(X)
        return self._target.probabilities(outputs)

    def predict_log_proba(self, X):
        """Logarithms of ``predict_proba``.

        Parameters
        ----------
        X : array-like of shape (n_samples,)
            See the class docstring for what a row may be.

        Returns
        -------
        log_probabilities : ndarray of shape (n_samples, n_classes)
            At most 0, float64, columns as in ``classes_``.

        Raises
        ------
        UnreadableRowsError
            If rows cannot be read; the message names every bad row and why.
        """
        outputs = self._outputs(X)
        return self._target.log_probabilities(outputs)

    def decision_function(self, X):
        """Logits: of two classes the log odds of the second, else one a class.

        Parameters
        ----------
        X : array-like of shape (n_samples,)
            See the class docstring for what a row may be.

        Returns
        -------
        scores : ndarray of shape (n_samples,) or (n_samples, n_classes)
            Above 0 where a label, or the second of two classes, is predicted.

        Raises
        ------
        UnreadableRowsError
            If rows cannot be read; the message names every bad row and why.
        """
        outputs = self._outputs(X)
        return self._target.decision(outputs)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class FineTunedRegressor(RegressorMixin, BaseFineTuner):
    """A fine-tuned network that gives numbers."""

    _parameter_constraints: dict = {
        **PARAMETERS,
        "loss": [StrOptions({"squared_error", "absolute_error", "huber"})],
    }

    def _check_y(self, y) -> np.ndarray:
        return check_values(y, type(self).__name__)

    def _make_target(self, y: np.ndarray, classes=None) -> Values:
        return Values(1 if y.ndim == 1 else y.shape[1], is_column=y.ndim == 1)

    def _losses(self):
        from sklearn_transfer.training.recipe import Losses

        return Losses("values", values_loss=self.loss)

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X, y, sample_weight=None):
        """Train for one epoch on these rows, at a constant learning rate.

        The first call starts the head, and sets mean and spread of y, from these
        rows, as ``fit`` does.

        Parameters
        ----------
        X : array-like of shape (n_samples,)
            See the class docstring for what a row may be.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Numbers, in units of your own.
        sample_weight : array-like of shape (n_samples,), default=None
            Weight of each row, as in ``fit``.

        Returns
        -------
        self : object
            The estimator, trained so much longer.

        Raises
        ------
        ValueError
            If X, y or a parameter cannot be used.
        UnreadableRowsError
            If rows cannot be read; the message names every bad row and why.
        BackboneNotFoundError
            If the backbone is not on this machine and cannot be downloaded.
        DivergedError
            If the loss stops being a number, or explodes.
        """
        return self._partial_fit(X, y, sample_weight)

    def predict(self, X):
        """The values of each row, in y's units.

        Parameters
        ----------
        X : array-like of shape (n_samples,)
            See the class docstring for what a row may be.

        Returns
        -------
        y : ndarray of shape (n_samples,) or (n_samples, n_outputs)
            In the shape that y had in ``fit``.

        Raises
        ------
        UnreadableRowsError
            If rows cannot be read; the message names every bad row and why.
        """
        outputs = self._outputs(X)
        return self._target.predict(outputs)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
