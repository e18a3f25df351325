"""The linear models of a probe, and how heavy a penalty each of them takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.linear_model import RidgeCV

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
# Largest entry of a gradient where curvatures are about 1. Held-out losses then agree
# with a converged LogisticRegression's to 2e-4.
TOLERANCE = 1e-5
MOST_STEPS = 1_000

Fitted = tuple[np.ndarray, np.ndarray, float]  # coef, intercept, strength


@dataclass(frozen=True)
class Space:
    """Where the rows lie for a linear model, and the way back.

    Attributes
    ----------
    rows : ndarray of shape (n, r)
        Principal coordinates, r <= n; the average squared distance from the mean
        is 1.
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
    """Coordinates of the rows along their principal axes, and the axes.

    A penalised solution lies in the span of the rows, so that n coordinates say all
    where n < d: exact, and 16 rows of 1,280 features become 16 x 16. The axes, about
    the origin, are those that the solver's preconditioning needs.
    """
    n, d = rows.shape
    if n >= d:
        axes = np.linalg.eigh(rows.T @ rows)[1]  # (d, d)
        return rows @ axes, axes.T
    q, r = np.linalg.qr(rows.T)  # (d, n), (n, n)
    # Not svd, which takes ten times as long to tell small axes apart better.
    axes = np.linalg.eigh(r @ r.T)[1]
    return r.T @ axes, axes.T @ q.T


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
        coef, intercept = _Softmax(space, labels, weights).fit(strength).outputs
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
        of_two = _Softmax(space, target[:, i], weights).fit(strength).outputs
        coef[i], intercept[i] = (part[1] - part[0] for part in of_two)
    return coef, intercept, strength


def fit_values(space: Space, target, weights) -> Fitted:
    """Ridge regression; its strength has the least weighted leave-one-out error."""
    if len(target) == 1:  # nothing to leave out
        return np.zeros((target.shape[1], space.basis.shape[1])), target[0], 1.0
    model = RidgeCV(alphas=1 / RIDGE_STRENGTHS)
    # Before scikit-learn 1.9 it divides by 0 where one of two rows is left out.
    with np.errstate(divide="ignore", invalid="ignore"):
        model.fit(space.rows, target, sample_weight=weights)
    coef = model.coef_.reshape(target.shape[1], -1)
    intercept = np.broadcast_to(model.intercept_, target.shape[1])
    return *space.outputs_of(coef, intercept), float(1 / model.alpha_)


class _Softmax:
    """A penalised softmax regression, each fit of which starts from the one before.

    The optimum is that of LogisticRegression(C=strength), whose lbfgs took 200 to
    700 steps of pooled features: their variances span four decades. Along principal
    axes the curvature is known well enough to scale it to about 1 (Jacobi's
    preconditioning), after which the same L-BFGS takes 10 to 50. LogisticRegression
    penalises all coefficients alike and cannot be given scaled ones.
    """

    def __init__(self, space: Space, labels, weights, some=slice(None)):
        self.space, self.some = space, some
        self.labels, weights = labels[some], weights[some]
        self.n_classes = int(self.labels.max()) + 1
        self.total = weights.sum()
        self.shares = weights / self.total
        # p (1 - p), where nothing is known yet.
        certainty = (1 - 1 / self.n_classes) / self.n_classes
        rows = self._rows()
        self.curvature = self.shares @ rows**2 * certainty
        self.coef = np.zeros((rows.shape[1], self.n_classes))

    def _rows(self) -> np.ndarray:
        """Rows (n, r), with a one behind each for a free intercept.

        Not kept: there is a regression for every fold of every label.
        """
        rows = self.space.rows[self.some]
        if not self.space.has_free_intercept:
            return rows
        return np.column_stack([rows, np.ones(len(rows))])

    def fit(self, strength: float) -> _Softmax:
        """Go to the optimum under another penalty."""
        # Of two classes the difference is penalised, as in a sigmoid's regression.
        per_square = (2 if self.n_classes == 2 else 1) / (strength * self.total)
        penalty = np.full((len(self.coef), 1), per_square)
        if self.space.has_free_intercept:
            penalty[-1] = 0
        scale = 1 / np.sqrt(penalty + self.curvature[:, None])
        rows, penalty = self._rows() * scale[:, 0], penalty * scale**2
        own = np.arange(len(rows)), self.labels

        def loss_and_gradient(flat):
            coef = flat.reshape(self.coef.shape)
            losses, probabilities = _softmax_losses(rows @ coef, self.labels)
            probabilities[own] -= 1
            errors = probabilities * self.shares[:, None]
            penalised = penalty * coef
            loss = self.shares @ losses + np.sum(penalised * coef) / 2
            return loss, (rows.T @ errors + penalised).ravel()

        start = (self.coef / scale).ravel()
        options = {"gtol": TOLERANCE, "ftol": 1e-14, "maxiter": MOST_STEPS}
        found = minimize(
            loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options
        )
        self.coef = found.x.reshape(self.coef.shape) * scale
        return self

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """Logits (n, classes) of other rows of the same space."""
        n_axes = self.space.rows.shape[1]
        logits = rows @ self.coef[:n_axes]
        return logits + self.coef[n_axes] if len(self.coef) > n_axes else logits

    @property
    def outputs(self) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients (classes, d) and intercepts (classes,) of scaled vectors."""
        n_axes = self.space.rows.shape[1]
        free = self.coef[n_axes] if len(self.coef) > n_axes else np.zeros(1)
        intercept = np.broadcast_to(free, self.n_classes)
        return self.space.outputs_of(self.coef[:n_axes].T, intercept)


def _softmax_losses(logits, labels) -> tuple[np.ndarray, np.ndarray]:
    """Log loss of each row (n,), and the probabilities (n, classes).

    Both from one exp, which is half the time of a step.
    """
    logits = logits - logits.max(1, keepdims=True)
    probabilities = np.exp(logits)
    total = probabilities.sum(1)
    losses = np.log(total) - logits[np.arange(len(labels)), labels]
    probabilities /= total[:, None]
    return losses, probabilities


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
    space, weights = replace(space, rows=space.rows[some]), weights[some]
    folds = [f for c in columns for f in _folds(space, c[some], weights, rng)]
    if not folds:
        return USUAL_STRENGTH
    means, errors = [], []
    for strength in STRENGTHS:
        mean, error = _held_out_loss(folds, space.rows, weights, strength)
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
    held: np.ndarray
    model: _Softmax = field(repr=False)


def _folds(space: Space, labels: np.ndarray, weights, rng) -> list[_Fold]:
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
            np.flatnonzero(fold == k),
            _Softmax(space, labels, weights, fold != k),
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
        held = fold.held
        logits = fold.model.fit(strength).logits(rows[held])
        losses[held] += _softmax_losses(logits, fold.labels[held])[0]
        was_held[held] = True
    losses, weights = losses[was_held], weights[was_held] / weights[was_held].sum()
    mean = weights @ losses
    return float(mean), float(np.sqrt(np.sum((weights * (losses - mean)) ** 2)))
