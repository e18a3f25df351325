"""A search over the classifier behind frozen features: is a row encoded once?

GridSearchCV, 5 folds x 10 values of C. Peer: plain re-encoding in every fold and
grid point (the same featurizer with cache=None, so nothing else differs).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks._common import DATA, Figure, image_set, mobilenet, run_alone

FOLDS = 5
STRENGTHS = np.logspace(-3, 3, 10)


def main(quick: bool = False, data: Path = DATA) -> list[Figure]:
    from threadpoolctl import threadpool_limits

    # On both sides: two BLAS threads make fits of so few rows up to thirty times
    # slower on a busy machine, which would drown what is compared. torch's threads
    # are left alone.
    with threadpool_limits(1, user_api="blas"):
        return _compare(quick, data)


def _compare(quick: bool, data: Path) -> list[Figure]:
    from sklearn_transfer import ImageFeaturizer, cache_info, clear_cache

    paths, labels = image_set(data, "hymenoptera", 10 if quick else 200)["train"]
    n_unique, n_twice = len(paths), len(paths) // 10
    # Some pictures come twice: what counts is distinct rows.
    X, y = paths + paths[:n_twice], labels + labels[:n_twice]
    featurizer = ImageFeaturizer(mobilenet(data), cache=None)
    one_pass = _seconds(lambda: featurizer.fit_transform(X), warm=True)
    features = featurizer.transform(X)
    classifier_fits = _seconds(lambda: _search(None).fit(features, y), warm=True)

    stored = ImageFeaturizer(mobilenet(data))
    clear_cache()
    with _network_rows() as passed:
        ours = _seconds(lambda: _search(stored).fit(X, y))
    encoded = passed[0]
    plain = _seconds(lambda: _search(featurizer).fit(X, y))
    clear_cache()
    with_two = _seconds(lambda: _search(stored, n_jobs=2).fit(X, y))
    encoded_with_two = cache_info().misses
    task = f"{FOLDS} folds x {len(STRENGTHS)} C, {len(X)} rows, {n_unique} distinct"
    return [
        Figure(
            f"GridSearchCV, {task}",
            f"{ours:.1f} s",
            f"{plain:.1f} s (cache=None)",
            plain / ours,
            "x",
            at_least=25,
        ),
        Figure(
            "wall over one encoding pass + the classifier fits",
            f"{ours:.2f} s",
            f"{one_pass:.2f} s + {classifier_fits:.2f} s",
            ours / (one_pass + classifier_fits),
            "x",
            at_most=1.1,
        ),
        _rows_figure("rows through the network", encoded, n_unique),
        _rows_figure(
            f"rows encoded, n_jobs=2, cold store ({with_two:.1f} s with the start of "
            "the workers)",
            encoded_with_two,
            n_unique,
        ),
    ]


def _rows_figure(what: str, encoded: int, n_unique: int) -> Figure:
    return Figure(
        what,
        f"{encoded}",
        f"{n_unique} distinct",
        encoded / n_unique,
        "a row",
        at_least=1,
        at_most=1,
    )


def _search(featurizer, n_jobs: int = 1):
    """The search over C, with the featurizer in front or on ready features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import Pipeline

    steps = [] if featurizer is None else [("features", featurizer)]
    # No scaler: it would be fitted 51 times on both sides and tell nothing.
    pipeline = Pipeline([*steps, ("classifier", LogisticRegression(max_iter=1000))])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    grid = {"classifier__C": STRENGTHS}
    return GridSearchCV(pipeline, grid, cv=folds, n_jobs=n_jobs, error_score="raise")


def _seconds(function, warm: bool = False) -> float:
    if warm:
        function()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@contextmanager
def _network_rows() -> Iterator[list[int]]:
    """Count the rows that pass any network, without asking the store."""
    from sklearn_transfer.running.device import Runner

    taps, passed = Runner.taps, [0]

    def counted(self, batch, pooling, stages):
        passed[0] += len(batch)
        return taps(self, batch, pooling, stages)

    Runner.taps = counted
    try:
        yield passed
    finally:
        Runner.taps = taps


if __name__ == "__main__":
    run_alone(main, __doc__)
