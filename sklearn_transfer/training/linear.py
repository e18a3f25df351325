"""The linear models of a probe, and how heavy a penalty each of them takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression, RidgeCV

# A strength is the variance that the penalty expects of an output at a row of
# average length, so that one grid serves any number and size of features. From
# heavy penalty to light: each solution is the start of the next. Lighter ones than
# these drive the training loss below 0.003, and leave fine-tuning nothing to do.
STRENGTHS = 10.0 ** np.arange(-0.5, 2.6, 0.5)
RIDGE_STRENGTHS = 10.0 ** np.arange(-3.0, 3.1, 0.5)
USUAL_STRENGTH = 10.0  # where nothing can be held out
FOLDS, FOLDS_OF_MANY, MANY = 5, 3, 300  # of many rows no split decides much
MOST_ROWS_TO_CHOOSE = 4_000
# Held-out log loss prefers nearly saturated probes of few rows; accuracy and what
# fine-tuning can still change prefer heavier penalties. A whole standard error,
# the usual rule, left sst2 at 8 rows a class with next to nothing learned.
STANDARD_ERRORS = 0.5
GOOD_ENOUGH = 0.02  # held-out log loss: easy rows need not be driven to 0
INTERCEPT_AT_ORIGIN = 0.3

Fitted = tuple[np.ndarray, np.ndarray, float]  # coef, intercept, strength


@dataclass(frozen=True)
class Space:
    """Where the rows lie for a linear model, and the way back.

    Attributes
    ----------
    rows : ndarray of shape (n, r)
        Coordinates, r <= n; the average squared distance from the mean is 1.
    basis : ndarray of shape (r, d)
        ``coef @ basis`` are coefficients of ``(vector - center) * scale``.
    shift : ndarray of shape (d,)
        The point around which the rows lie, in scaled units from the mean.
    has_free_intercept : bool
        If not, the last column of ``rows`` is constant, and its coefficient is an
        intercept that is penalised like all others.
    """

    rows: np.ndarray
    basis: np.ndarray
    shift: np.ndarray
    has_free_intercept: bool

    @classmethod
    def around_mean(cls, features, center, scale) -> Space:
        """Distances from the mean count, as in any logistic regression."""
        rows, basis = _compact((features - center.astype(np.float64)) * scale)
        length = _length(rows - rows.mean(0), center * scale)
        return cls(rows / length, basis / length, np.zeros_like(center), True)

    @classmethod
    def around_origin(cls, features, center, scale) -> Space:
        """Activations themselves count; intercepts are small unless rows insist."""
        rows, basis = _compact(features * scale.astype(np.float64))
        length = _length(rows - rows.mean(0), center * scale)
        constant = np.full((len(rows), 1), INTERCEPT_AT_ORIGIN)
        rows = np.concatenate([rows / length, constant], axis=1)
        return cls(rows, basis / length, center * scale, False)

    def outputs_of(self, coef, intercept) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients and intercepts for ``(vector - center) * scale``."""
        if not self.has_free_intercept:
            intercept = intercept + coef[:, -1] * INTERCEPT_AT_ORIGIN
            coef = coef[:, :-1]
        coef = coef @ self.basis
        return coef, intercept + coef @ self.shift


def _compact(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the rows in an orthonormal basis of theirs, and the basis.

    A penalised solution lies in the span of the rows, so that n coordinates say all
    where n < d: exact, and 16 rows of 1,280 features become 16 x 16.
    """
    n, d = rows.shape
    if n >= d:
        return rows, np.eye(d)
    q, r = np.linalg.qr(rows.T)  # (d, n), (n, n)
    return r.T, q.T


def _length(rows: np.ndarray, middle: np.ndarray) -> float:
    """Average length of rows about ``middle``; 1 where they differ by rounding alone.

    Dividing by the rounding error would blow it up to features.
    """
    length = float(np.sqrt(np.mean(np.sum(rows**2, axis=1))))
    return length if length > 1e-5 * np.linalg.norm(middle) else 1.0


# --- one kind of target each -------------------------------------------------


def fit_classes(space: Space, target, n_out: int, weights, seed: int) -> Fitted:
    """Softmax logits of classes 0 .. n_out - 1, of which some may have no row."""
    present, labels = np.unique(target, return_inverse=True)
    coef, intercept = np.zeros((1, space.basis.shape[1])), np.zeros(1)
    strength = USUAL_STRENGTH
    if len(present) > 1:
        strength = choose_strength(space, [labels], weights, seed)
        model = _logistic(space, strength).fit(space.rows, labels, weights)
        coef, intercept = space.outputs_of(*_softmax_rows(model))
    all_coef = np.zeros((n_out, coef.shape[1]))
    # A class that has no row is as likely as half a row would make it.
    unseen = logsumexp(intercept) + np.log(0.5 / len(labels))
    all_intercept = np.full(n_out, unseen)
    all_coef[present], all_intercept[present] = coef, intercept
    return all_coef, all_intercept, strength


def fit_labels(space: Space, target, weights, seed: int) -> Fitted:
    """Sigmoid logits, one logistic regression a column, one strength for all."""
    varied = [i for i, c in enumerate(target.T) if c.min() < c.max()]
    strength = USUAL_STRENGTH
    if varied:
        columns = [target[:, i] for i in varied]
        strength = choose_strength(space, columns, weights, seed)
    # A column that is always the same is so but for half a row.
    odds = np.log((len(target) + 0.5) / 0.5)
    intercept = np.where(target[0] == 1, odds, -odds)
    coef = np.zeros((target.shape[1], space.basis.shape[1]))
    for i in varied:
        model = _logistic(space, strength).fit(space.rows, target[:, i], weights)
        coef[i : i + 1], intercept[i : i + 1] = space.outputs_of(
            model.coef_, model.intercept_
        )
    return coef, intercept, strength


def fit_values(space: Space, target, weights) -> Fitted:
    """Ridge regression; its strength has the least weighted leave-one-out error."""
    if len(target) == 1:  # nothing to leave out
        return np.zeros((target.shape[1], space.basis.shape[1])), target[0], 1.0
    model = RidgeCV(alphas=1 / RIDGE_STRENGTHS)
    model.fit(space.rows, target, sample_weight=weights)
    coef = model.coef_.reshape(target.shape[1], -1)
    intercept = np.broadcast_to(model.intercept_, target.shape[1])
    return *space.outputs_of(coef, intercept), float(1 / model.alpha_)


def _logistic(space: Space, strength=1.0, warm_start=False) -> LogisticRegression:
    """A logistic regression that is left to converge."""
    return LogisticRegression(
        C=strength,
        # Gradients are small where rows have length 1: at the usual 1e-4 a lighter
        # penalty often made no step from the solution before it.
        tol=1e-5,
        max_iter=10_000,
        fit_intercept=space.has_free_intercept,
        warm_start=warm_start,
    )


def _softmax_rows(model: LogisticRegression) -> tuple[np.ndarray, np.ndarray]:
    """One row of coefficients and one intercept a class, of two classes too."""
    n_classes = len(model.classes_)
    intercept = np.broadcast_to(model.intercept_, len(model.coef_))
    if n_classes > 2:
        return model.coef_, intercept
    half = np.array([-0.5, 0.5])
    return half[:, None] * model.coef_, half * intercept


# --- the choice of a strength ------------------------------------------------


def choose_strength(
    space: Space, columns: Sequence[np.ndarray], weights: np.ndarray, seed: int
) -> float:
    """The heaviest penalty whose held-out log loss is about as good as the best.

    Parameters
    ----------
    space : Space
    columns : sequence of ndarray of shape (n,)
        Labels 0 .. classes - 1 of one or more targets, which share the strength: a
        label that is true of three rows cannot choose its own.
    weights : ndarray of shape (n,)
    seed : int
        Of the folds.
    """
    rng = np.random.default_rng(seed)
    some = np.sort(rng.permutation(len(weights))[:MOST_ROWS_TO_CHOOSE])
    rows, weights = space.rows[some], weights[some]
    folds = [fold for c in columns for fold in _folds(space, c[some], rng)]
    if not folds:
        return USUAL_STRENGTH
    means, errors = [], []
    for strength in STRENGTHS:
        mean, error = _held_out_loss(folds, rows, weights, strength)
        means.append(mean)
        errors.append(error)
        if mean > min(means) + error or mean <= GOOD_ENOUGH:
            break  # lighter penalties take longest, and lose more or win nothing
    best = int(np.argmin(means))
    enough = means[best] + STANDARD_ERRORS * errors[best]
    return float(STRENGTHS[np.flatnonzero(np.array(means) <= enough)[0]])


@dataclass
class _Fold:
    """One split of one target, and the model that follows the path of strengths."""

    labels: np.ndarray
    train: np.ndarray
    held: np.ndarray
    model: LogisticRegression = field(repr=False)


def _folds(space: Space, labels: np.ndarray, rng) -> list[_Fold]:
    """Stratified folds of one target; none if no class has two rows.

    A class of one row trains in every fold and is never held out: nothing could
    be learned about it. StratifiedKFold would warn, and hold it out.
    """
    present, labels = np.unique(labels, return_inverse=True)
    shuffled = rng.permutation(len(labels))
    dealt = shuffled[np.bincount(labels)[labels[shuffled]] > 1]
    if len(present) < 2 or not len(dealt):
        return []
    dealt = dealt[np.argsort(labels[dealt], kind="stable")]
    # Dealt class after class: folds are of one size, and the rows of a class of
    # two go to different folds.
    n_folds = min(FOLDS if len(dealt) <= MANY else FOLDS_OF_MANY, len(dealt))
    fold = np.full(len(labels), -1)
    fold[dealt] = np.arange(len(dealt)) % n_folds
    return [
        _Fold(
            labels,
            np.flatnonzero(fold != k),
            np.flatnonzero(fold == k),
            _logistic(space, warm_start=True),
        )
        for k in range(n_folds)
    ]


def _held_out_loss(
    folds: list[_Fold], rows: np.ndarray, weights: np.ndarray, strength: float
) -> tuple[float, float]:
    """Mean log loss of the held-out rows, and its standard error."""
    losses = np.zeros(len(rows))
    was_held = np.zeros(len(rows), bool)
    for fold in folds:
        train, held = fold.train, fold.held
        fold.model.set_params(C=strength)
        fold.model.fit(rows[train], fold.labels[train], weights[train])
        losses[held] += _log_losses(fold.model, rows[held], fold.labels[held])
        was_held[held] = True
    losses, weights = losses[was_held], weights[was_held] / weights[was_held].sum()
    mean = weights @ losses
    return float(mean), float(np.sqrt(np.sum((weights * (losses - mean)) ** 2)))


def _log_losses(model: LogisticRegression, rows, labels) -> np.ndarray:
    """Log loss of each row."""
    coef, intercept = _softmax_rows(model)
    logits = rows @ coef.T + intercept
    own = logits[np.arange(len(rows)), np.searchsorted(model.classes_, labels)]
    return logsumexp(logits, axis=1) - own
