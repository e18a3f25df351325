"""Rows with their targets and weights, and the parts they are split into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.utils import check_consistent_length

from sklearn_transfer._sklearn import _check_sample_weight
from sklearn_transfer.fine_tuning.splitting import split_off


@dataclass(frozen=True)
class Samples:
    """Rows of one X, nothing decoded yet, with what y and the weights say of them.

    Rows of weight 0 are not there: ``kept`` are the others, and ``targets`` of the
    rest mean nothing.
    """

    X: object
    rows: Any  # ImageRows or TextRows
    digests: list
    y: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    kept: np.ndarray

    @classmethod
    def of(cls, X, rows, y, weights, featurizer, target) -> Samples:
        """Rows with digests and encoded targets.

        Raises
        ------
        UnreadableRowsError
            If a row of some weight cannot even be found.
        ValueError
            If y holds what the target does not know.
        """
        digests, bad = featurizer._digests(rows)
        bad = {i: reason for i, reason in bad.items() if weights[i] > 0}
        if bad:
            featurizer._raise_bad_rows(rows, bad)
        kept = np.flatnonzero(weights > 0)
        encoded = target.encode(y[kept])
        targets = np.zeros((len(y), *encoded.shape[1:]), encoded.dtype)
        targets[kept] = encoded
        return cls(X, rows, digests, y, targets, weights, kept)

    @classmethod
    def without_targets(cls, X, rows, featurizer) -> Samples:
        """Rows to predict."""
        digests, bad = featurizer._digests(rows)
        if bad:
            featurizer._raise_bad_rows(rows, bad)
        none = np.zeros(len(rows), np.float32)
        return cls(X, rows, digests, none, none, none, np.arange(len(rows)))


@dataclass(frozen=True)
class Part:
    """Some rows of some samples: those trained on, judged by, or predicted."""

    samples: Samples
    index: np.ndarray
    weights: np.ndarray

    @classmethod
    def all_of(cls, samples: Samples) -> Part:
        return cls(samples, samples.kept, samples.weights[samples.kept])

    @property
    def y(self) -> np.ndarray:
        return self.samples.y[self.index]

    @property
    def targets(self) -> np.ndarray:
        return self.samples.targets[self.index]

    @property
    def digests(self) -> list:
        """Those of the samples; None where a row is not of this part."""
        mine = set(self.index.tolist())
        return [d if i in mine else None for i, d in enumerate(self.samples.digests)]

    def reweighted(self, factors) -> Part:
        """The same rows, their weights times ``factors``; those of weight 0 leave."""
        weights = self.weights * factors
        kept = weights > 0
        return Part(self.samples, self.index[kept], weights[kept])

    def by_content(self) -> Part:
        """The same rows, in the same order whatever order they came in."""
        digests, targets = self.samples.digests, self.samples.targets
        keys = [(digests[i] or b"", targets[i].tobytes()) for i in self.index]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        return Part(self.samples, self.index[order], self.weights[order])


def check_weights(sample_weight, n: int) -> np.ndarray:
    """A weight a row, float64, not negative, not all of them zero."""
    weights = _check_sample_weight(
        sample_weight, np.empty(n), dtype=np.float64, ensure_non_negative=True
    )
    if not weights.any():  # which scikit-learn 1.8 lets pass
        raise ValueError("Sample weights must contain at least one non-zero number.")
    return weights


def inner_split(
    samples: Samples, groups, *, early_stopping, fraction, stratify, seed
) -> tuple[Part, Part | None]:
    """Rows to train on, and rows to judge by, or None; as for `split_off`."""
    kept = samples.kept
    if groups is not None:
        check_consistent_length(samples.rows, groups)
        groups = np.asarray(groups)[kept]
    train, valid = split_off(
        samples.y[kept],
        groups,
        early_stopping=early_stopping,
        fraction=fraction,
        stratify=stratify,
        seed=seed,
    )

    def part(rows: np.ndarray) -> Part:
        return Part(samples, kept[rows], samples.weights[kept[rows]])

    return part(train), None if valid is None else part(valid)
