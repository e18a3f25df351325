"""What a fit tells those who listen: scikit-learn's callbacks, and the screen."""

from __future__ import annotations

import math
from typing import Any


class Progress:
    """A fit as a task of scikit-learn's callbacks, each epoch a task inside it.

    Parameters
    ----------
    estimator : BaseFineTuner
    X, y : array-like
        As they came: what a callback that scores asks for.
    sample_weight : array-like or None
        Likewise.
    epochs : int
        How many may come.
    """

    def __init__(self, estimator, X, y, sample_weight, epochs: int):
        self.estimator = estimator
        self.data = {"X": X, "y": y}
        if sample_weight is not None:
            self.data["metadata"] = {"sample_weight": sample_weight}
        self.fit = estimator._init_callback_context(max_subtasks=epochs)
        self.fit.call_on_fit_task_begin(estimator=estimator, **self.data)
        self.epoch: Any = None

    def begin_epoch(self) -> None:
        self.epoch = self.fit.subcontext(task_name="epoch")
        self.epoch.call_on_fit_task_begin(estimator=self.estimator, **self.data)

    def end_epoch(self, record: dict) -> bool:
        """Tell what an epoch gave; gives whether somebody asks to stop."""
        estimator = self.estimator
        if estimator.verbose:
            print(f"[{type(estimator).__name__}] {_shown(record)}")
        return self.epoch.call_on_fit_task_end(
            estimator=estimator,
            reconstruction_attributes=estimator._snapshot,
            **self.data,
        )

    def end(self) -> None:
        self.fit.call_on_fit_task_end(
            estimator=self.estimator, reconstruction_attributes=dict, **self.data
        )


def _shown(record: dict) -> str:
    """One line for an epoch."""
    numbers = (
        f"{name} {record[name]:.4g}"
        for name in ("train_loss", "valid_loss", "valid_score", "seconds")
        if not math.isnan(record[name])
    )
    return f"epoch {record['epoch']}, {', '.join(numbers)}"
