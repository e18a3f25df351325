"""scikit-learn's callbacks hear of every fit and of every epoch."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import get_scorer
from sklearn.model_selection import GridSearchCV

from tests.test_fine_tuning_contract import (
    IMAGES,
    LABELS,
    TEXTS,
    Y,
    assert_same_model,
    images,
    texts,
)

pytest.importorskip("sklearn.callback", reason="scikit-learn 1.9 brought callbacks")

from sklearn.callback import ProgressBar, ScoringMonitor
from sklearn.callback._transport import open_listener, send


class Listener:
    """Notes, across processes, which task of which tree began or ended."""

    max_propagation_depth = None

    def __init__(self):
        self.heard = []
        self._handle = open_listener(self.heard.append, owner=self)

    def __getstate__(self):
        return {**self.__dict__, "heard": []}

    def setup(self, estimator, context):
        pass

    teardown = setup

    def on_fit_task_begin(self, estimator, context):
        send(self._handle, ("begin", *self._place(context)))

    def on_fit_task_end(self, estimator, context):
        send(self._handle, ("end", *self._place(context)))

    def _place(self, context):
        path, here = [], context
        while here is not None:
            path.append(here.task_id)
            here = here.parent
        return context.estimator_name, context.task_name, tuple(reversed(path))

    def epochs(self, hook):
        return [path for seen, _, task, path in self.heard if (seen, task) == hook]


def test_each_epoch_is_a_task_inside_the_fit():
    listener = Listener()
    images(max_epochs=3).set_callbacks(listener).fit(IMAGES, Y)
    name = "ImageClassifier"
    epochs = [(hook, name, "epoch", (0, i)) for i in range(3) for hook in EDGES]
    fit = [(hook, name, "fit", (0,)) for hook in EDGES]
    assert listener.heard == [fit[0], *epochs, fit[1]]


EDGES = ("begin", "end")


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_search_passes_on_the_epochs_of_every_fold(n_jobs):
    listener = Listener()
    search = GridSearchCV(texts(), {"lr": [1e-4]}, cv=2, refit=False, n_jobs=n_jobs)
    search.set_callbacks(listener).fit(TEXTS, LABELS)
    for edge in EDGES:
        paths = listener.epochs((edge, "epoch"))
        assert len(paths) == 4
        assert len({path[:-1] for path in paths}) == 2  # folds
        assert {path[-1] for path in paths} == {0, 1}


def test_a_probe_and_a_partial_fit_are_tasks_too():
    listener = Listener()
    model = images(freeze_depth="all").set_callbacks(listener).fit(IMAGES, Y)
    assert listener.epochs(("end", "epoch")) == []
    model.partial_fit(IMAGES, Y)
    assert listener.epochs(("end", "epoch")) == [(0, 0)]


def test_a_callback_may_stop_the_fit():
    class Stop(Listener):
        def on_fit_task_end(self, estimator, context):
            return context.task_name == "epoch" and context.task_id == 1

    model = images(max_epochs=5).set_callbacks(Stop()).fit(IMAGES, Y)
    assert model.n_iter_ == len(model.history_) == 2
    assert model.predict(IMAGES).shape == (24,)


def test_scoring_monitor_scores_every_epoch():
    monitor = ScoringMonitor(scoring="neg_log_loss")
    model = images(max_epochs=3, lr=1e-3).set_callbacks(monitor).fit(IMAGES, Y)
    rows = [r for r in monitor.get_logs().data if r["task_name"] == "epoch"]
    scores = [row["neg_log_loss"] for row in rows]
    assert len(scores) == 3
    expected = get_scorer("neg_log_loss")(model, IMAGES, Y)
    assert scores[-1] == pytest.approx(expected, rel=1e-5)
    assert len(set(scores)) == 3
    unwatched = images(max_epochs=3, lr=1e-3).fit(IMAGES, Y)
    assert_same_model(model, unwatched)


def test_what_a_callback_is_shown_stays_as_it_was():
    kept = []

    class Keep(Listener):
        def on_fit_task_end(self, estimator, context, *, fitted_estimator=None):
            if context.task_name == "epoch":
                kept.append((fitted_estimator, fitted_estimator.n_iter_))

    images(max_epochs=2, lr=1e-2).set_callbacks(Keep()).fit(IMAGES, Y)
    (first, _), (second, _) = kept
    assert [n for _, n in kept] == [1, 2]
    assert len(first.history_) == 1
    assert np.abs(first.predict_proba(IMAGES) - second.predict_proba(IMAGES)).max() > 0


def test_progress_bar_shows_the_epochs(capsys):
    images().set_callbacks(ProgressBar()).fit(IMAGES, Y)
    assert "ImageClassifier" in capsys.readouterr().out
