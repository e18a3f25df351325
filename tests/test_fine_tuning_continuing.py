"""Fits that go on from another, and fits that fail: nothing learned is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

from sklearn_transfer import ImageClassifier, ImageRegressor
from sklearn_transfer.exceptions import DivergedError
from tests.fine_tuning_data import stripes

X, Y = stripes(40)


def images(estimator=ImageClassifier, **given):
    plain = {
        "image_size": 32,
        "freeze_depth": -1,
        "max_epochs": 1,
        "batch_size": 8,
        "precision": "float32",
        "early_stopping": False,
        "random_state": 0,
    }
    return estimator(**{**plain, **given})


def weights(model) -> list[np.ndarray]:
    return [p.detach().numpy().copy() for p in model.net_.module_.parameters()]


def differ(some, others) -> bool:
    # Beyond what a rate of 1e-30 makes of a zero.
    return any(np.abs(a - b).max() > 1e-20 for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("depth", ["all", -1])
def test_a_refused_batch_leaves_the_model_as_it_was(depth):
    model = images(freeze_depth=depth).fit(X, Y)
    before, history = model.predict_proba(X), list(model.history_)
    for bad in (Y[:-1], np.full(len(Y), 7)):
        with pytest.raises(ValueError):
            model.partial_fit(X, bad)
        np.testing.assert_array_equal(model.predict_proba(X), before)
    assert model.history_ == history


def test_a_refused_depth_leaves_the_model_as_it_was():
    model = images(warm_start=True).fit(X, Y)
    before, frozen = model.predict_proba(X), model.n_frozen_stages_
    with pytest.raises(ValueError, match="labels"):
        model.set_params(freeze_depth=1).fit(X, np.where(np.arange(40) == 3, 9, Y))
    assert model.n_frozen_stages_ == frozen
    np.testing.assert_array_equal(model.predict_proba(X), before)


def test_a_failed_first_fit_leaves_an_unfitted_model():
    model = images()
    with pytest.raises(ValueError):
        model.partial_fit(X, np.full(len(Y), 9), classes=[0, 1])
    with pytest.raises(NotFittedError):
        model.predict(X)
    model.partial_fit(X, Y, classes=[0, 1, 2])  # others than at the failed call
    assert model.classes_.tolist() == [0, 1, 2]


def test_after_divergence_a_fit_goes_on_from_what_was_good():
    model = images(warm_start=True, max_epochs=2).fit(X, Y)
    before = model.predict_proba(X)
    with pytest.raises(DivergedError):
        model.set_params(lr=1e30, clip_norm=None, optimizer="sgd").fit(X, Y)
    np.testing.assert_array_equal(model.predict_proba(X), before)
    model.set_params(lr=1e-4).fit(X, Y)
    assert np.isfinite(model.predict_proba(X)).all()


def test_one_seed_gives_each_partial_fit_its_own_dropout(monkeypatch):
    masks = []
    model = images(dropout=0.5, freeze_depth="all", batch_size=40)
    dropout = torch.nn.Dropout.forward

    def noting(self, rows):
        out = dropout(self, rows)
        if self.training:
            masks.append((out == 0).numpy())
        return out

    monkeypatch.setattr(torch.nn.Dropout, "forward", noting)
    for _ in range(2):
        model.partial_fit(X, Y)
    assert (masks[0] == masks[1]).mean() < 0.9


def test_fits_that_go_on_see_other_views(monkeypatch):
    from sklearn_transfer.inputs.augment import FreshViews

    epochs = []
    monkeypatch.setattr(FreshViews, "set_epoch", lambda self, e: epochs.append(e))
    model = images(warm_start=True, augment="flip")
    for _ in range(3):
        model.fit(X, Y)
    assert epochs == [0, 1, 2]
    assert [record["epoch"] for record in model.history_] == [1, 2, 3]
    assert model.best_epoch_ == model.n_iter_ == 3


def test_fits_that_go_on_judge_by_the_same_rows(monkeypatch):
    from sklearn_transfer.fine_tuning import base

    splits = []
    split = base.inner_split

    def noting(*args, **kwargs):
        parts = split(*args, **kwargs)
        splits.append(parts[1].index.tolist())
        return parts

    monkeypatch.setattr(base, "inner_split", noting)
    model = images(warm_start=True, early_stopping=True, random_state=None)
    for _ in range(3):
        model.fit(X, Y)
    assert splits[0] == splits[1] == splits[2]


def test_partial_fit_follows_parameters():
    model = images(lr=1e-30, head_lr=1e-30).partial_fit(X, Y)
    at_first = weights(model)
    model.partial_fit(X, Y)
    assert not differ(weights(model), at_first)
    model.set_params(lr=1e-3).partial_fit(X, Y)
    assert differ(weights(model), at_first)


def test_unfreezing_waits_for_no_patience():
    model = images(
        unfreeze_every=2,
        freeze_depth=-2,
        max_epochs=7,
        n_iter_no_change=1,
        early_stopping=True,
    ).fit(X, Y)
    frozen = [record["frozen_stages"] for record in model.history_]
    assert frozen[:5] == [5, 5, 4, 4, 3]


@pytest.mark.parametrize("depth", ["all", -1])
def test_a_class_of_weight_zero_is_as_if_it_were_not_there(depth):
    images_, y = stripes(48, 3)
    weighted = images(
        freeze_depth=depth, class_weight={0: 0.0, 1: 1.0, 2: 1.0}, batch_size=4
    ).fit(images_, y)
    assert np.isfinite(weighted.predict_proba(images_)).all()
    assert not np.any(weighted.predict(images_) == 0)
    with pytest.raises(ValueError, match="none is left to train"):
        images(class_weight=dict.fromkeys(range(3), 0.0)).fit(images_, y)


def test_class_weights_of_classes_that_a_batch_lacks():
    images_, y = stripes(48, 3)
    model = images(class_weight={2: 5.0})
    model.partial_fit(images_[y < 2], y[y < 2], classes=[0, 1, 2])
    assert model.predict_proba(images_).shape == (48, 3)
    with pytest.raises(ValueError, match=r"names \['7'\]"):
        images(class_weight={7: 5.0}).fit(images_, y)
    with pytest.raises(ValueError, match="balanced"):
        images(class_weight="balanced").partial_fit(images_, y)


def test_precision_may_be_set_after_fit():
    model = images().fit(X, Y)
    exact = model.predict_proba(X)
    near = model.set_params(precision="bfloat16").predict_proba(X)
    np.testing.assert_allclose(near, exact, atol=0.1)
    again = model.set_params(precision="float32").predict_proba(X)
    np.testing.assert_array_equal(again, exact)


@pytest.mark.parametrize(
    "changed", [{"head": "mlp"}, {"pooling": "max"}, {"backbone": "resnet18@random"}]
)
def test_another_network_cannot_go_on(changed):
    model = images(warm_start=True).fit(X, Y)
    with pytest.raises(ValueError, match=f"{next(iter(changed))}.*warm_start=False"):
        model.set_params(**changed).fit(X, Y)


def test_what_fails_inside_the_restored_net_is_not_taken_for_unfitted(monkeypatch):
    import copy

    model = copy.deepcopy(images().fit(X, Y))
    monkeypatch.setattr(
        type(model), "_restored_net", lambda self: self.no_such_attribute
    )
    with pytest.raises(RuntimeError, match="built anew"):
        model.partial_fit(X, Y)
    assert "_learned" in vars(model)


def test_a_copy_keeps_what_it_has_while_the_original_learns_on():
    import copy

    model = images(ImageRegressor).fit(X, Y)
    shallow = copy.copy(model)
    before = shallow.predict(X)
    model.set_params(lr=1e-2).partial_fit(X, 5.0 * Y)
    np.testing.assert_array_equal(copy.copy(shallow).predict(X), before)


def test_fixed_views_of_a_transform_leave_dropout_alone():
    from torchvision.transforms import v2

    def fitted():
        model = images(
            augment=v2.RandomHorizontalFlip(),
            n_views=2,
            freeze_depth=0,
            dropout=0.5,
            max_epochs=2,
        )
        return weights(model.fit(X, Y))

    assert not differ(fitted(), fitted())


def test_a_misspelt_score_is_known_at_once():
    with pytest.raises(ValueError, match="not_a_score"):
        images(scoring="not_a_score").fit(X, Y)
