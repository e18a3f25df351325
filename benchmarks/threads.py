"""A search with n_jobs=2: do the workers' threads fit on the processors?

GridSearchCV over fine-tuned classifiers, each worker a process. Peer: the same search
whose workers each take a thread for every processor, which is what torch does where
nobody tells it of the other worker.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks._common import DATA, Figure, image_set, run_alone

N_JOBS = 2
GRID = {"lr": [1e-4, 3e-4, 1e-3], "weight_decay": [0.0, 1e-2]}


def main(quick: bool = False, data: Path = DATA) -> list[Figure]:
    from joblib import Parallel, delayed, parallel_config

    X, y = image_set(data, "hymenoptera", 20 if quick else 160)["train"]
    alone = _seconds(X, y, quick, n_jobs=1)
    with parallel_config("loky", n_jobs=N_JOBS):
        threads = Parallel()(delayed(_threads)() for _ in range(N_JOBS))
        ours = _seconds(X, y, quick, n_jobs=N_JOBS)
    with parallel_config("loky", inner_max_num_threads=os.cpu_count()):
        crowded = _seconds(X, y, quick, n_jobs=N_JOBS)
    together = sum(threads)
    return [
        Figure(
            f"torch threads in {N_JOBS} workers, over the processors",
            f"{together}",
            f"{os.cpu_count()} processors",
            together / os.cpu_count(),
            at_most=max(1, N_JOBS / os.cpu_count()),
        ),
        Figure(
            f"GridSearchCV, {len(X)} JPEGs, 6 candidates, 3 folds, n_jobs={N_JOBS}",
            f"{ours:.1f} s",
            f"{crowded:.1f} s (a thread for every processor in each worker)",
            crowded / ours,
            "x",
            at_least=1,
        ),
        Figure(
            f"the same: n_jobs={N_JOBS} against n_jobs=1",
            f"{ours:.1f} s",
            f"{alone:.1f} s (n_jobs=1)",
            alone / ours,
            "x",
        ),
    ]


def _seconds(X, y, quick: bool, n_jobs: int) -> float:
    """Wall time of the search, from an empty store; workers have started before."""
    from sklearn.model_selection import GridSearchCV

    from sklearn_transfer import ImageClassifier, clear_cache

    classifier = ImageClassifier(
        "resnet18@random",
        image_size=64 if quick else 128,
        freeze_depth=-1,
        max_epochs=1 if quick else 3,
        early_stopping=False,
        random_state=0,
    )
    grid = {"lr": [1e-4, 1e-3]} if quick else GRID
    search = GridSearchCV(
        classifier, grid, cv=3, refit=False, n_jobs=n_jobs, error_score="raise"
    )
    search.fit(X[::2], y[::2])  # workers, imports, kernels
    clear_cache()
    start = time.perf_counter()
    search.fit(X, y)
    return time.perf_counter() - start


def _threads() -> int:
    """Threads that torch takes in this process, once the package is at work."""
    import numpy as np
    import torch

    from sklearn_transfer import ImageFeaturizer

    ImageFeaturizer(image_size=32).fit_transform(np.zeros((2, 32, 32, 3), np.uint8))
    return torch.get_num_threads()


if __name__ == "__main__":
    run_alone(main, __doc__)
