"""The inner split that early stopping judges by."""

from __future__ import annotations

import math

import numpy as np
from sklearn.model_selection import GroupShuffleSplit, train_test_split

# Fewer of a class than this, or fewer rows of a regression, judge nothing.
LEAST = 2


def split_off(
    y: np.ndarray,
    groups: np.ndarray | None,
    *,
    early_stopping: bool | str,
    fraction: float,
    stratify: bool,
    seed: int,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions to train on, and those to judge by, or None.

    Parameters
    ----------
    y : ndarray
        Of the rows to split.
    groups : ndarray or None
        Rows of one group stay together.
    early_stopping : "auto" or bool
        "auto" splits nothing off where either part would have less than two rows
        of a class (or in all, where there are no classes).
    fraction : float
        Share of the rows, or of the groups, to judge by.
    stratify : bool
        Whether y are classes.
    seed : int

    Raises
    ------
    ValueError
        If ``early_stopping=True`` and the rows do not allow it.
    """
    everything = np.arange(len(y))
    if early_stopping is False:
        return everything, None
    n_valid = math.ceil(fraction * len(y))
    reason = _why_not(y, groups, n_valid, stratify)
    if reason is None:
        if groups is not None:
            splitter = GroupShuffleSplit(1, test_size=fraction, random_state=seed)
            train, valid = next(splitter.split(everything, y, groups))
        else:
            train, valid = train_test_split(
                everything,
                test_size=n_valid,
                random_state=seed,
                stratify=y if stratify else None,
            )
        train, valid = np.sort(train), np.sort(valid)
        reason = _too_few(y, train, valid, stratify)
    if reason is None:
        return train, valid
    if early_stopping == "auto":
        return everything, None
    raise ValueError(
        f"early_stopping=True splits off validation_fraction={fraction:g} of "
        f"{len(y)} rows, and {reason}. Write early_stopping='auto', a larger "
        "validation_fraction, or give X_val and y_val to fit."
    )


def _why_not(y, groups, n_valid: int, stratify: bool) -> str | None:
    """Why the rows cannot be split at all, if so."""
    if groups is not None:
        alone = len(np.unique(groups)) < 2
        return "all rows are of one group" if alone else None
    if n_valid >= len(y):
        return "no row would be left to train on"
    if stratify:
        counts = np.unique(y, return_counts=True)[1]
        if counts.min() < 2 * LEAST:
            return f"a class has {counts.min()} rows, and {2 * LEAST} are needed"
        if n_valid < len(counts):
            return f"{n_valid} rows cannot hold one of each of {len(counts)} classes"
    return None


def _too_few(y, train, valid, stratify: bool) -> str | None:
    """Why the parts are too small to train on and to judge by, if so."""
    for name, part in (("train on", train), ("judge by", valid)):
        least = len(part)
        if stratify:
            counts = [np.sum(y[part] == label) for label in np.unique(y)]
            least = min(counts)
        if least < LEAST:
            of = " of some class" if stratify else ""
            return f"{least} rows{of} would be left to {name}"
    return None
