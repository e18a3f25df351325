"""The head is the probe at first; the probe is what its data say, whoever asks."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression

from sklearn_transfer.training import head as head_module
from sklearn_transfer.training import linear
from sklearn_transfer.training.head import Head, Probe, fit_probe, fit_scaling

KINDS = ["linear", "mlp", 8]


@pytest.fixture(autouse=True)
def forget_probes():
    """Each test fits its own probes."""
    head_module._remembered.probes.clear()


def blobs(n=60, d=12, classes=3, seed=0, spread=1.5):
    """Rows around one point a class, away from the origin; labels in turn."""
    rng = np.random.default_rng(seed)
    points = rng.normal(scale=spread, size=(classes, d)) + 3
    labels = np.arange(n) % classes
    rows = points[labels] + rng.normal(size=(n, d)) * np.linspace(0.5, 2, d)
    return rows.astype(np.float32), labels


def probe_of(features, target, weights=None, *, task="classes", n_out=None, **how):
    if n_out is None:
        n_out = target.max() + 1 if task == "classes" else target.shape[1]
    how = {"common": True, "seed": 0} | how
    return fit_probe(features, target, weights, task=task, n_out=n_out, **how)


def outputs(probe: Probe, features) -> np.ndarray:
    """What the probe says, written out, in float64."""
    rows = (np.float64(features) - probe.center) * probe.scale
    return rows @ np.float64(probe.coef).T + probe.intercept


def head_outputs(probe: Probe, features, kind="linear") -> np.ndarray:
    n_out, n_in = probe.coef.shape
    head = Head(n_in, n_out, kind=kind, dropout=0.5).eval()
    head.load_probe(probe)
    with torch.no_grad():
        return head(torch.tensor(features)).numpy()


def assert_same(one: Probe, other: Probe, atol=0.0):
    for name in ("center", "scale", "coef", "intercept", "strength"):
        np.testing.assert_allclose(
            getattr(one, name), getattr(other, name), rtol=0, atol=atol, err_msg=name
        )


# --- the head ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_head_gives_the_probes_probabilities(classes, common, kind):
    X, y = blobs(classes=classes)
    probe = probe_of(X, y, common=common)
    ours = softmax(head_outputs(probe, X, kind), axis=1)
    np.testing.assert_allclose(ours, softmax(outputs(probe, X), axis=1), atol=1e-5)
    assert (ours.argmax(1) == y).mean() > 0.9


@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("n", [9, 40])  # fewer rows than features, and more
@pytest.mark.parametrize("classes", [2, 3])
def test_probe_is_the_logistic_regression_of_its_strength(classes, n, common):
    X, y = blobs(n=n, classes=classes)
    X = X - 3  # on both sides of zero: the intercept is free
    probe = probe_of(X, y, common=common)
    rows = (X - np.float64(probe.center)) * probe.scale
    rows /= np.sqrt((rows**2).sum(1).mean())
    theirs = LogisticRegression(C=probe.strength, tol=1e-8, max_iter=10_000)
    theirs.fit(rows, y)
    ours = softmax(outputs(probe, X), axis=1)
    np.testing.assert_allclose(ours, theirs.predict_proba(rows), atol=2e-3)


def test_activations_are_penalised_around_their_origin():
    X, y = blobs(classes=3)
    X = np.maximum(X, 0)
    probe = probe_of(X, y, common=False)
    rows = X * np.float64(probe.scale)
    length = np.sqrt(((rows - rows.mean(0)) ** 2).sum(1).mean())
    constant = np.full((len(X), 1), linear.INTERCEPT_AT_ORIGIN)
    rows = np.hstack([rows / length, constant])
    theirs = LogisticRegression(
        C=probe.strength, fit_intercept=False, tol=1e-8, max_iter=10_000
    )
    theirs.fit(rows, y)
    ours = softmax(outputs(probe, X), axis=1)
    np.testing.assert_allclose(ours, theirs.predict_proba(rows), atol=2e-3)


def test_head_gives_the_probes_labels():
    X, y = blobs(classes=3)
    target = np.stack([y == 0, y == 1, y != 2], axis=1).astype(int)
    probe = probe_of(X, target, task="labels")
    ours = expit(head_outputs(probe, X, "mlp"))
    np.testing.assert_allclose(ours, expit(outputs(probe, X)), atol=1e-5)
    assert ((ours > 0.5) == target).mean() > 0.9


def test_head_gives_the_probes_values():
    X, _ = blobs(n=80)
    rng = np.random.default_rng(1)
    target = X[:, :2] @ [[1.0, -1.0], [0.5, 2.0]] + rng.normal(size=(80, 2)) / 10
    target = (target - target.mean(0)) / target.std(0)
    probe = probe_of(X, target, task="values")
    ours = head_outputs(probe, X, 8)
    np.testing.assert_allclose(ours, outputs(probe, X), atol=1e-5)
    assert ((ours - target) ** 2).mean() < 0.02


def test_head_computes_in_float32_under_autocast():
    X, y = blobs()
    head = Head(12, 3, kind="mlp").eval()
    head.load_probe(probe_of(X, y))
    plain = head(torch.tensor(X))
    with torch.autocast("cpu", torch.bfloat16):
        inside = head(torch.tensor(X))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)
    assert head(torch.tensor(X).bfloat16()).dtype == torch.float32


def test_centre_and_scale_are_kept_but_not_trained():
    X, y = blobs()
    head = Head(12, 3)
    head.load_probe(probe_of(X, y))
    assert {n for n, _ in head.named_parameters()} == {"linear.weight", "linear.bias"}
    again = Head(12, 3)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(torch.tensor(X)), head(torch.tensor(X)))


def test_load_scaling_leaves_the_linear_map():
    head = Head(3, 2)
    before = copy.deepcopy(head.linear.state_dict())
    head.load_scaling(np.full(3, 2.0), np.full(3, 10.0))
    expected = head.linear(torch.full((1, 3), 10.0))
    assert torch.equal(head(torch.full((1, 3), 3.0)), expected)
    assert all(torch.equal(v, before[k]) for k, v in head.linear.state_dict().items())


def test_branch_starts_at_zero_and_learns():
    head = Head(4, 2, kind=16)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(x), head.linear(x))
    head(x)[:, 0].sum().backward()
    assert head.branch[-1].weight.grad.abs().sum() > 0


def test_a_trained_branch_starts_again_with_a_new_probe():
    X, y = blobs()
    head = Head(12, 3, kind="mlp").eval()
    torch.nn.init.ones_(head.branch[-1].weight)
    probe = probe_of(X, y)
    head.load_probe(probe)
    np.testing.assert_allclose(
        head(torch.tensor(X)).detach().numpy(), outputs(probe, X), atol=1e-4
    )


def test_dropout_acts_in_training_only():
    head = Head(50, 2, dropout=0.5)
    x = torch.ones(1, 50)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))


@pytest.mark.parametrize("kind", ["hidden", 0, -3, True, 1.5, None])
def test_unknown_kind_says_what_to_write(kind):
    with pytest.raises(ValueError, match="Write head='linear', or head=256"):
        Head(4, 2, kind=kind)


def test_numpy_width_is_a_width():
    assert Head(4, 2, kind=np.int64(8)).branch[0].out_features == 8


# --- scaling -----------------------------------------------------------------


def test_scaling_gives_columns_of_mean_zero_and_variance_about_one():
    X, _ = blobs(n=500)
    for common in (True, False):
        center, scale = fit_scaling(X, None, common)
        rows = (X - center) * scale
        np.testing.assert_allclose(rows.mean(0), 0, atol=1e-4)
        assert center.dtype == scale.dtype == np.float32
        if common:
            assert len(set(scale)) == 1
            np.testing.assert_allclose(rows.var(0).mean(), 1, rtol=1e-4)
        else:
            assert np.ptp(np.log(rows.var(0))) < np.ptp(np.log(X.var(0)))


@pytest.mark.parametrize("common", [True, False])
def test_scaling_weighs_rows_as_repetition_does(common):
    X, _ = blobs(n=20)
    times = np.arange(20) % 3 + 1
    weighted = fit_scaling(X, times, common)
    repeated = fit_scaling(np.repeat(X, times, axis=0), None, common)
    np.testing.assert_allclose(weighted, repeated, rtol=1e-6)


@pytest.mark.parametrize("common", [True, False])
def test_columns_that_do_not_move_are_not_blown_up(common):
    X, y = blobs()
    X[:, 0], X[:, 1] = 0.1, 5 + 1e-6 * (y == 0)
    _, scale = fit_scaling(X, None, common)
    assert scale.max() < 10
    same = np.ones((4, 3), np.float32)
    center, scale = fit_scaling(same, None, common)
    np.testing.assert_array_equal((center, scale), np.ones((2, 3)))


# --- weights, order, memory --------------------------------------------------

TASKS = ["classes", "labels", "values"]


def data_for(task):
    X, y = blobs(n=30, spread=0.5)
    if task == "classes":
        return X, y
    if task == "labels":
        return X, np.stack([y == 0, y != 1], axis=1).astype(int)
    return X, np.stack([X[:, 0] - 3, (y == 1) - 0.5], axis=1)


@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_weights_equal_repetition(task, common):
    X, target = data_for(task)
    times = np.random.default_rng(0).integers(1, 4, len(X))
    weighted = probe_of(X, target, times.astype(float), task=task, common=common)
    repeated = probe_of(
        np.repeat(X, times, axis=0),
        np.repeat(target, times, axis=0),
        task=task,
        common=common,
    )
    assert_same(weighted, repeated, atol=1e-6)
    plain = probe_of(X, target, task=task, common=common)
    assert np.abs(plain.coef - weighted.coef).max() > 1e-3


@pytest.mark.parametrize("task", TASKS)
def test_equal_weights_are_no_weights(task):
    X, target = data_for(task)
    plain = probe_of(X, target, None, task=task)
    assert_same(plain, probe_of(X, target, np.ones(len(X)), task=task))
    assert_same(plain, probe_of(X, target, np.full(len(X), 7.0), task=task), atol=1e-5)


def test_rounding_of_the_features_deals_the_same_folds():
    """Batches and threads change features in the last bits."""
    X, y = blobs(n=30)
    X = X[[0, 1, 0, *range(2, 30)]]  # one row twice
    y = y[[0, 1, 0, *range(2, 30)]]
    noise = np.random.default_rng(0).uniform(-2e-7, 2e-7, 12)
    for rows in (X, (X * (1 + noise)).astype(np.float32)):
        kept, labels, _ = head_module._distinct(rows, y, np.ones(31))
        np.testing.assert_array_equal(kept, np.delete(rows, 2, axis=0))
        np.testing.assert_array_equal(labels, np.delete(y, 2))


def test_a_heavier_class_is_predicted_more():
    X, y = blobs(classes=2, spread=0.1)
    more = probe_of(X, y, np.where(y == 1, 5.0, 1.0))
    less = probe_of(X, y)
    assert (outputs(more, X).argmax(1)).sum() > (outputs(less, X).argmax(1)).sum()


def test_same_seed_same_probe_and_no_global_state():
    X, y = blobs(spread=0.5)
    np.random.seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    one = probe_of(X, y, seed=1)
    head_module._remembered.probes.clear()
    two = probe_of(X, y, seed=1)
    assert one is not two
    assert_same(one, two)
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_probe_is_fitted_once(monkeypatch):
    X, y = blobs()
    fitted = []
    fit = head_module._fit
    monkeypatch.setattr(head_module, "_fit", lambda *a: fitted.append(a[-1]) or fit(*a))
    one = probe_of(X, y)
    assert probe_of(X.copy(), y.copy(), np.ones(len(y))) is one
    assert len(fitted) == 1
    probe_of(X, y, seed=1)
    probe_of(X, y, common=False)
    probe_of(X + 1, y)
    probe_of(X, (y + 1) % 3)
    probe_of(X, y, np.where(y == 0, 2.0, 1.0))
    assert len(fitted) == 6


def test_few_probes_are_kept(monkeypatch):
    monkeypatch.setattr(head_module._remembered, "most", 2)
    X, y = blobs(n=12)
    for seed in range(4):
        probe_of(X, y, seed=seed)
    assert len(head_module._remembered.probes) == 2


def test_a_probe_cannot_be_written_to_and_pickles():
    X, y = blobs()
    probe = probe_of(X, y)
    for array in (probe.center, probe.scale, probe.coef, probe.intercept):
        assert array.dtype == np.float32
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    assert_same(pickle.loads(pickle.dumps(probe)), probe)
    head_outputs(probe, X)  # torch warns about read-only arrays it does not copy


# --- the strength ------------------------------------------------------------


def test_strength_follows_the_noise():
    X, y = blobs(n=120, classes=2)
    clear = probe_of(X, y).strength
    guess = probe_of(X, np.random.default_rng(0).integers(0, 2, 120)).strength
    assert guess == linear.STRENGTHS[0]
    assert clear > 10 * guess


def test_separable_rows_leave_something_to_learn():
    X, y = blobs(classes=4, spread=30)
    logits = outputs(probe_of(X, y), X)
    p = softmax(logits, axis=1)[np.arange(len(y)), y]
    assert (logits.argmax(1) == y).all()
    assert 0.005 < -np.log(p).mean() < 0.1


def test_copies_of_rows_do_not_vouch_for_each_other():
    """With copies in both parts, held-out noise would look learnable."""
    X, _ = blobs(n=40, d=60)
    y = np.random.default_rng(5).integers(0, 2, 40)
    copies = probe_of(np.tile(X, (6, 1)), np.tile(y, 6))
    assert_same(copies, probe_of(X, y), atol=1e-6)


def test_ridge_takes_the_penalty_of_least_leave_one_out_error():
    from sklearn.linear_model import Ridge

    X, _ = blobs(n=24, d=30)
    rng = np.random.default_rng(0)
    target = (X[:, :2] - 3) + rng.normal(size=(24, 2))
    weights = rng.uniform(0.2, 3, 24)
    probe = probe_of(X, target, weights, task="values")
    rows = (X - np.float64(probe.center)) * probe.scale
    rows -= rows.mean(0)
    rows /= np.sqrt((rows**2).sum(1).mean())
    weights *= 24 / weights.sum()

    def error(strength):
        total = 0.0
        for i in range(24):
            rest = np.arange(24) != i
            model = Ridge(1 / strength).fit(rows[rest], target[rest], weights[rest])
            total += weights[i] * ((model.predict(rows[[i]]) - target[i]) ** 2).sum()
        return total

    errors = [error(strength) for strength in linear.RIDGE_STRENGTHS]
    best = np.argmin(errors)
    assert 0 < best < len(errors) - 1
    assert probe.strength == pytest.approx(linear.RIDGE_STRENGTHS[best])
    model = Ridge(1 / probe.strength).fit(rows, target, weights)
    np.testing.assert_allclose(outputs(probe, X), model.predict(rows), atol=1e-4)


def test_of_many_rows_some_choose(monkeypatch):
    monkeypatch.setattr(linear, "MOST_ROWS_TO_CHOOSE", 50)
    monkeypatch.setattr(linear, "MANY", 20)
    seen = []
    logits = linear._Softmax.logits
    monkeypatch.setattr(
        linear._Softmax, "logits", lambda *a: seen.append(len(a[1])) or logits(*a)
    )
    X, y = blobs(n=200)
    assert (outputs(probe_of(X, y), X).argmax(1) == y).mean() > 0.9
    assert seen[:3] == [17, 17, 16]


# --- few rows ----------------------------------------------------------------


@pytest.mark.parametrize("common", [True, False])
def test_a_class_of_one_row(common):
    X, y = blobs(n=30, spread=5)
    X, y = np.vstack([X, np.full((1, 12), -20)]), np.append(y, 3)
    probe = probe_of(X.astype(np.float32), y, common=common)
    assert (outputs(probe, X).argmax(1) == y).all()


@pytest.mark.parametrize("counts", [[1, 1], [1, 1, 1], [2, 1], [2, 2], [1, 9], [3, 2]])
@pytest.mark.parametrize("common", [True, False])
def test_classes_of_very_few_rows(counts, common):
    y = np.repeat(np.arange(len(counts)), counts)
    X, _ = blobs(n=len(y), classes=1)
    X[np.arange(len(y)), y] += 30
    probe = probe_of(X, y, common=common)
    assert (outputs(probe, X).argmax(1) == y).all()
    if max(counts) == 1:  # nothing can be held out
        assert probe.strength == linear.USUAL_STRENGTH


def test_the_only_class_is_nearly_certain():
    X, y = blobs(n=9, classes=1)
    p = softmax(outputs(probe_of(X, y + 1, n_out=3), X), axis=1)
    assert (0.85 < p[:, 1]).all() and (p[:, 1] < 1).all()


@pytest.mark.parametrize("common", [True, False])
def test_classes_without_rows_are_unlikely_but_finite(common):
    X, y = blobs(classes=2)
    probe = probe_of(X, y * 2 + 1, n_out=5, common=common)
    p = softmax(outputs(probe, X), axis=1)
    assert np.isfinite(probe.intercept).all()
    assert (p.argmax(1) == y * 2 + 1).mean() > 0.9
    assert 0 < p[:, [0, 2, 4]].mean() < 0.02
    seen = p[:, [1, 3]] / p[:, [1, 3]].sum(1, keepdims=True)
    alone = softmax(outputs(probe_of(X, y, common=common), X), axis=1)
    np.testing.assert_allclose(seen, alone, atol=1e-5)


def test_constant_labels_say_so():
    X, y = blobs()
    zeros = np.zeros_like(y)
    target = np.stack([zeros, y == 1, zeros + 1], axis=1)
    probe = probe_of(X, target, task="labels")
    p = expit(outputs(probe, X))
    assert (p[:, 0] < 0.02).all() and (p[:, 2] > 0.98).all()
    assert np.isfinite(probe.intercept).all() and not probe.coef[[0, 2]].any()
    alone = probe_of(X, target[:, [1]], task="labels")
    np.testing.assert_allclose(probe.coef[1], alone.coef[0], atol=1e-6)
    constant = probe_of(X, target[:, [0, 2]], task="labels")
    assert constant.strength == linear.USUAL_STRENGTH


@pytest.mark.parametrize("n", [1, 2, 3])
def test_values_of_very_few_rows(n):
    X, _ = blobs(n=n)
    target = np.linspace(-1, 1, n)[:, None]
    probe = probe_of(X, target, task="values")
    assert np.isfinite(outputs(probe, X)).all()


def test_a_single_output_may_be_flat():
    X, _ = blobs()
    target = X[:, 0].astype(float)
    how = {"task": "values", "n_out": 1}
    assert_same(probe_of(X, target, **how), probe_of(X, target[:, None], **how))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("task", ["classes", "values"])
def test_features_that_are_no_numbers_are_refused(bad, task):
    X, y = blobs()
    X[3, 1] = bad
    target = y if task == "classes" else X[:, :1].astype(float)
    with pytest.raises(ValueError, match=f"of 1 of {len(X)} distinct rows .*float32"):
        probe_of(X, target, task=task)


# --- numbers that are hard ---------------------------------------------------


@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_units_of_the_features_do_not_matter(size, common):
    X, y = blobs(spread=0.5)
    one, other = (probe_of(x, y, common=common) for x in (X, X * np.float32(size)))
    assert other.strength == one.strength
    np.testing.assert_allclose(
        softmax(outputs(other, X * np.float32(size)), axis=1),
        softmax(outputs(one, X), axis=1),
        atol=5e-3,
    )


@pytest.mark.parametrize("common", [True, False])
def test_odd_data_converge_without_warnings(common):
    """Warnings are errors here."""
    rng = np.random.default_rng(0)
    X, y = blobs(n=90, d=40)
    for weights in (10.0 ** rng.uniform(-6, 6, 90), np.where(y == 0, 1e-8, 1.0)):
        assert np.isfinite(probe_of(X, y, weights, common=common).coef).all()
    twisted = X.copy()
    twisted[:, :20] = twisted[:, [0]] * 1e4  # one direction far longer than others
    assert np.isfinite(probe_of(twisted, y, common=common).coef).all()
    torn = np.repeat(X[:30], 3, axis=0)  # the same rows, each with three labels
    assert np.isfinite(probe_of(torn, y, common=common).coef).all()
    same = np.ones_like(X)
    assert np.isfinite(probe_of(same, y, common=common).coef).all()
    values = y[:, None] - 1.0
    assert np.isfinite(probe_of(same, values, task="values").coef).all()


def test_equal_rows_up_to_rounding_give_the_shares_of_the_classes():
    rng = np.random.default_rng(0)
    features = np.full((40, 16), 3.7) * (1 + 1e-7 * rng.standard_normal((40, 16)))
    target = np.arange(40) % 4 == 0  # a quarter of ones
    for common in (True, False):
        probe = fit_probe(
            features,
            target.astype(int),
            None,
            task="classes",
            n_out=2,
            common=common,
            seed=0,
        )
        assert np.abs(probe.coef).max() < 1
        odds = probe.intercept[1] - probe.intercept[0]
        np.testing.assert_allclose(odds, np.log(1 / 3), atol=0.3)
