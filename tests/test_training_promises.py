"""Promises of fine-tuning: what is stored, what is frozen, what is the same again."""

from __future__ import annotations

import random
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from sklearn_transfer import (
    ImageClassifier,
    ImageFeaturizer,
    ImageRegressor,
    TextClassifier,
    TextFeaturizer,
    TextRegressor,
    cache_info,
)
from sklearn_transfer.backbones.registry import load_image_backbone, load_text_backbone
from sklearn_transfer.inputs.augment import FreshViews
from sklearn_transfer.running.boundary import Boundary
from sklearn_transfer.running.device import Runner
from sklearn_transfer.running.prefixes import Prefixes
from sklearn_transfer.training.examples import Examples
from sklearn_transfer.training.head import fit_probe
from sklearn_transfer.training.network import TunedNetwork
from tests.test_training_recipe import BACKBONE, distance, same, weights_of

try:
    import timm
except ImportError:
    timm = None
needs_timm = pytest.mark.skipif(timm is None, reason="timm is not installed")

N = 12
COMMON = {
    "max_epochs": 2,
    "batch_size": 4,
    "early_stopping": False,
    "random_state": 0,
    "precision": "float32",
    "device": "cpu",
    "lr": 1e-3,
}


def photos(n: int = N, side: int = 40):
    """Noise on which a class lays stripes, (n, side, side, 3) uint8, and a class."""
    rng = np.random.default_rng(0)
    X = rng.integers(0, 150, (n, side, side, 3))
    y = np.arange(n) % 2
    X[y == 1, ::4] += 100
    return X.astype(np.uint8), y


def sentences(n: int = 16):
    """Texts of 1 to 20 words, and a class that one of the words tells."""
    from tests.test_backbones_transformers import WORDS

    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    texts = []
    for label, length in zip(y, rng.integers(0, 19, n), strict=True):
        words = rng.choice(WORDS, length).tolist()
        texts.append(" ".join([*words, ("cat", "dog")[label]]))
    return texts, y


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where a tiny model of a family is, made when it is first asked for."""
    from tests.test_backbones_transformers import save_model

    made = {}

    def folder(family: str) -> str:
        if family not in made:
            with torch.random.fork_rng(devices=[]):
                made[family] = str(save_model(family, tmp_path_factory.mktemp(family)))
        return made[family]

    return folder


def image_model(backbone, depth, **params) -> ImageClassifier:
    size = None if backbone is BACKBONE else 32
    given = {**COMMON, "image_size": size, "cache": None, **params}
    return ImageClassifier(backbone, freeze_depth=depth, **given)


# --- stored and recomputed ----------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "depth"),
    [(BACKBONE, 2), ("embedded", -2), ("resnet18@random", "layer3")],
    ids=["own", "embedded", "resnet18"],
)
def test_training_from_stored_activations_is_training_without(
    backbone, depth, tmp_path
):
    X, y = photos()
    ways = {
        "stored": {"cache": tmp_path},
        "stored before": {"cache": tmp_path},
        "held": {"cache": None},
        "recomputed": {"cache": None, "prefix_bytes": 0},
        "recomputed, store": {"cache": tmp_path, "prefix_bytes": 0},
        "in part": {"cache": None, "prefix_bytes": 1},
    }
    # Half of the rows: their size is what the store says of all of them.
    fitted = {"stored": image_model(backbone, depth, **ways["stored"]).fit(X, y)}
    ways["in part"]["prefix_bytes"] = cache_info(tmp_path).prefix_bytes // 2
    for name in list(ways)[1:]:
        fitted[name] = image_model(backbone, depth, **ways[name]).fit(X, y)
    recomputed = {n: m.history_[0]["recomputed_rows"] for n, m in fitted.items()}
    assert recomputed == {
        "stored": 0,
        "stored before": 0,
        "held": 0,
        "recomputed": N,
        "recomputed, store": N,
        "in part": N // 2,
    }
    expected = weights_of(fitted["stored"])
    for name, model in fitted.items():
        assert same(weights_of(model), expected), name
    probabilities = [model.predict_proba(X) for model in fitted.values()]
    assert all(np.array_equal(p, probabilities[0]) for p in probabilities)


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
def test_texts_train_alike_from_stored_activations(family, folders, tmp_path):
    X, y = sentences()
    ways = [{"cache": tmp_path}, {"cache": None}, {"cache": None, "prefix_bytes": 0}]
    models = [
        TextClassifier(folders(family), freeze_depth=2, **COMMON, **way).fit(X, y)
        for way in ways
    ]
    assert [m.history_[0]["recomputed_rows"] for m in models] == [0, 0, len(X)]
    first, *others = models
    for model in others:
        for name, tensor in weights_of(model).items():
            torch.testing.assert_close(
                tensor, weights_of(first)[name], rtol=0, atol=1e-5
            )


@needs_timm
def test_a_vit_trains_alike_from_stored_activations(tmp_path):
    X, y = photos()
    models = [
        image_model("timm:test_vit@random", 3, **way).fit(X, y)
        for way in ({"cache": tmp_path}, {"cache": None, "prefix_bytes": 0})
    ]
    assert [m.history_[0]["recomputed_rows"] for m in models] == [0, N]
    stored, recomputed = map(weights_of, models)
    for name in stored:
        torch.testing.assert_close(stored[name], recomputed[name], rtol=0, atol=1e-5)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The smallest of the rows."""
    dots = (a * b).sum(1)
    return float((dots / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


@pytest.mark.parametrize("modality", ["images", "texts"])
def test_in_bf16_stored_and_recomputed_agree(modality, folders, tmp_path):
    X, y = photos() if modality == "images" else sentences()
    features = []
    for way in ({"cache": tmp_path}, {"cache": None, "prefix_bytes": 0}):
        given = {**COMMON, "precision": "bfloat16", **way}
        if modality == "images":
            model = ImageClassifier(BACKBONE, freeze_depth=1, **given)
        else:
            model = TextClassifier(folders("bert"), freeze_depth=2, **given)
        model.fit(X, y)
        assert model.precision_ == "bfloat16"
        assert all(p.dtype == torch.float32 for p in model.net_.module_.parameters())
        features.append(model.transform(X))
    assert np.all(np.isfinite(features))
    assert cosine(*features) >= 0.9999


# --- frozen -------------------------------------------------------------------

SOURCES = {
    "own": (BACKBONE, 1),
    "embedded": ("embedded", -2),
    "resnet": ("resnet18@random", "layer3"),
    "vit": ("vit_b_16@random", -1),
    "convnext": ("convnext_tiny@random", -1),
    "timm resnet": ("timm:test_resnet@random", -1),
    "timm vit": ("timm:test_vit@random", 4),
}
FAMILIES = ["bert", "mpnet", "distilbert", "modernbert", "roberta", "albert-groups"]


def model_of(source: str, folders, **params):
    """An estimator, its data, and how to load its backbone."""
    given = {**COMMON, "cache": None, "max_epochs": 4, **params}
    if source in FAMILIES:
        folder = folders(source)
        model = TextClassifier(folder, freeze_depth=2, **given)
        return model, sentences(), load_text_backbone(folder, None, None)
    backbone, depth = SOURCES[source]
    size = {"own": None, "vit": 32}.get(source, 32)
    given |= {"max_epochs": 2} if source in ("vit", "convnext") else {}
    model = ImageClassifier(backbone, freeze_depth=depth, image_size=size, **given)
    return model, photos(8), load_image_backbone(backbone, size)


@pytest.mark.parametrize("source", [*SOURCES, *FAMILIES])
def test_every_source_trains_and_its_frozen_stages_do_not_move(source, folders):
    if source.startswith("timm") and timm is None:
        pytest.skip("timm is not installed")
    model, (X, y), backbone = model_of(source, folders, lr=5e-4, head_init="random")
    before = backbone.fingerprint()
    pretrained = {n: t.clone() for n, t in backbone.state_dict().items()}
    model.fit(X, y)
    losses = [record["train_loss"] for record in model.history_]
    assert losses[-1] < losses[0]
    k, n = model.n_frozen_stages_, model.n_stages_
    assert 0 < k < n
    assert backbone.fingerprint() == before
    assert not any(module.training for module in backbone.modules())
    tuned = model.to_module().backbone.state_dict()
    moved = Counter()
    for name, tensor in pretrained.items():
        stage = int(name.split(".")[1])
        moved[stage] += not torch.equal(tuned[name], tensor)
    assert {stage for stage, count in moved.items() if count} == set(range(k, n))
    assert model.predict(X).shape == y.shape


def statistics(module) -> dict:
    found = {n: b.clone() for n, b in module.named_buffers() if "running" in n}
    assert found
    return found


@pytest.mark.parametrize("batch_norm", ["fixed", "train"])
def test_statistics_of_trained_stages_move_if_asked_and_of_frozen_ones_never(
    batch_norm,
):
    X, y = photos()
    backbone = load_image_backbone(BACKBONE, None)
    before = statistics(backbone)
    model = image_model(BACKBONE, 1, batch_norm=batch_norm, unfreeze_every=2)
    model.set_params(max_epochs=3).fit(X, y)  # two stages frozen in the end
    tuned = statistics(model.to_module().backbone)
    moved = {
        int(n.split(".")[1]) for n in before if not torch.equal(before[n], tuned[n])
    }
    assert moved == ({2} if batch_norm == "train" else set())
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), statistics(backbone).values(), strict=True)
    )


# --- the same again -----------------------------------------------------------


def everything_random(seed, **params) -> ImageClassifier:
    given = {
        "augment": "standard",
        "dropout": 0.3,
        "mixup": 0.4,
        "ema": 0.5,
        "label_smoothing": 0.1,
        "head": "mlp",
        "head_init": "random",
        "batch_norm": "train",
        "random_state": seed,
    }
    return image_model(BACKBONE, 1, **{**given, **params})


def test_the_same_seed_gives_the_same_network_and_another_another():
    X, y = photos()
    first, again, other = (everything_random(seed).fit(X, y) for seed in (3, 3, 4))
    assert same(weights_of(first), weights_of(again))
    assert not same(weights_of(first), weights_of(other))
    assert np.array_equal(first.predict_proba(X), again.predict_proba(X))


def global_states() -> list:
    numpy = np.random.get_state()
    return [
        random.getstate(),
        [str(part) for part in numpy],
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("seed", [0, None], ids=["seed", "no seed"])
def test_the_global_random_states_are_left_alone(seed, folders):
    from torchvision.transforms import v2

    X, y = photos()
    before = global_states()
    augment = v2.RandomErasing(p=1.0)
    everything_random(seed, augment=augment).fit(X, y).predict(X)
    everything_random(seed).partial_fit(X, y)
    texts, labels = sentences()
    model = TextClassifier(folders("bert"), freeze_depth=1, cache=None, **COMMON)
    model.set_params(lora_rank=2, mixup=0.2, random_state=seed).fit(texts, labels)
    assert global_states() == before


# --- the probe ----------------------------------------------------------------


def test_all_frozen_is_the_featurizers_features_and_the_probe(tmp_path):
    X, y = photos()
    features = ImageFeaturizer(
        BACKBONE, precision="float32", cache=tmp_path
    ).fit_transform(X)
    before = cache_info(tmp_path)
    model = image_model(BACKBONE, "all", cache=tmp_path).fit(X, y)
    assert np.array_equal(model.transform(X), features)
    model.predict_proba(X)
    after = cache_info(tmp_path)
    assert (after.misses, after.rows) == (before.misses, before.rows)
    assert after.hits > before.hits
    assert after.prefix_rows == 0
    assert (model.n_iter_, model.history_) == (0, [])
    assert model.score(X, y) == 1.0


def test_all_frozen_texts_share_the_featurizers_rows(folders, tmp_path):
    X, y = sentences()
    given = {"precision": "float32", "cache": tmp_path, "device": "cpu"}
    features = TextFeaturizer(folders("bert"), **given).fit_transform(X)
    before = cache_info(tmp_path)
    given = {**COMMON, **given}
    model = TextClassifier(folders("bert"), freeze_depth="all", **given).fit(X, y)
    assert np.array_equal(model.transform(X), features)
    assert cache_info(tmp_path).misses == before.misses
    assert model.n_iter_ == 0


def outputs_before_training(model, X, y) -> np.ndarray:
    """Of the network on its way into the first step."""
    found = {}
    train = type(model)._train

    def spied(self, part, *args, **kwargs):
        found["outputs"] = self._outputs(X)
        return train(self, part, *args, **kwargs)

    kind = type(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_train", spied)
        model.fit(X, y)
    return found["outputs"]


def by_hand(model, X, y) -> np.ndarray:
    """Outputs of the probe on the frozen features of X."""
    features, target = model.transform(X), model._target
    probe = fit_probe(
        features,
        target.scaled(target.encode(y)),
        np.ones(len(y)),
        task=target.task,
        n_out=target.n_outputs,
        common=isinstance(X, list),
        seed=0,
    )
    return (features - probe.center) * probe.scale @ probe.coef.T + probe.intercept


def values(n: int) -> np.ndarray:
    """Two outputs of very different units, which the class tells in part."""
    noise = np.random.default_rng(0).normal(50, 3, (n, 2))
    return (noise + 20 * (np.arange(n) % 2)[:, None]) * [1, 100]


TARGETS = {
    "two classes": lambda n: np.arange(n) % 2,
    "four classes": lambda n: np.array(list("abcd"))[np.arange(n) % 4],
    "labels": lambda n: np.random.default_rng(0).integers(0, 2, (n, 3)),
    "values": values,
}


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("modality", ["images", "texts"])
def test_before_the_first_step_the_network_is_the_probe(
    modality, target, head, folders
):
    kind = {
        ("images", False): ImageClassifier,
        ("images", True): ImageRegressor,
        ("texts", False): TextClassifier,
        ("texts", True): TextRegressor,
    }[modality, target == "values"]
    X, _ = photos(16) if modality == "images" else sentences(16)
    y = TARGETS[target](16)
    backbone = BACKBONE if modality == "images" else folders("bert")
    given = {**COMMON, "cache": None, "max_epochs": 1}
    probe = kind(backbone, freeze_depth="all", **given).fit(X, y)
    model = kind(backbone, freeze_depth=1, head=head, dropout=0.5, **given)
    found, expected = outputs_before_training(model, X, y), by_hand(probe, X, y)
    assert np.ptp(expected, axis=0).min() > 0.01
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


# --- how much is computed -----------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """Passes from a boundary to a boundary, and how many rows came out to be kept."""
    passes, rows = [], Counter()
    until, between, rows_of = Runner.until, Runner.between, Boundary.rows_of
    begin = Boundary.__init__

    def spied_init(self, net, k, *args):
        begin(self, net, k, *args)
        self.k = k

    def spied_until(self, batch, k):
        passes.append((0, k))
        return until(self, batch, k)

    def spied_between(self, h, start, stop):
        if sys._getframe(1).f_code.co_name != "row_shape":  # of one made-up sample
            passes.append((start, stop))
        return between(self, h, start, stop)

    def spied_rows_of(self, h):
        found = rows_of(self, h)
        rows[self.k] += len({row.tobytes() for row in found})  # without filled ones
        return found

    monkeypatch.setattr(Runner, "until", spied_until)
    monkeypatch.setattr(Runner, "between", spied_between)
    monkeypatch.setattr(Boundary, "__init__", spied_init)
    monkeypatch.setattr(Boundary, "rows_of", spied_rows_of)
    return passes, rows


def test_deeper_boundaries_start_from_stored_shallower_ones(computed, tmp_path):
    X, y = photos()
    passes, _ = computed
    image_model("resnet18@random", "layer1", cache=tmp_path).fit(X, y)
    assert set(passes) == {(0, 2)}
    passes.clear()
    image_model("resnet18@random", "layer3", cache=tmp_path).fit(X, y)
    assert set(passes) == {(2, 4)}
    passes.clear()
    image_model("resnet18@random", "layer3", cache=tmp_path).fit(X, y)
    assert passes == []


def test_a_search_over_depths_computes_each_prefix_once(computed, tmp_path):
    X, y = photos(N)
    X = np.concatenate([X, X[:3]])  # equal rows share what is stored
    y = np.concatenate([y, y[:3]])
    _, rows = computed
    search = GridSearchCV(
        image_model(BACKBONE, 0, cache=tmp_path, max_epochs=1),
        {"freeze_depth": [1, 2, "all"], "lr": [1e-3, 1e-4]},
        cv=StratifiedKFold(3, shuffle=True, random_state=0),
    ).fit(X, y)
    info = cache_info(tmp_path)
    assert info.prefix_rows == 2 * N
    assert rows == {1: N, 2: N}
    assert info.rows == N
    assert len(search.cv_results_["params"]) == 6


def test_views_are_stored_and_take_turns(tmp_path, monkeypatch):
    X, y = photos()
    asked = []
    batches = Examples.batches

    def spied(self, parts):
        if self.n_views:
            chosen = self.rows + (np.arange(len(self.rows)) + self.epoch) % 3 * N
            asked.append(sorted(chosen.tolist()))
        return batches(self, parts)

    served = []
    prefix_batches = Prefixes.batches

    def spied_prefixes(self, parts):
        parts = list(parts)
        if self.n_rows == 3 * N:
            served.append(sorted(row for part in parts for row in part))
        return prefix_batches(self, parts)

    monkeypatch.setattr(Examples, "batches", spied)
    monkeypatch.setattr(Prefixes, "batches", spied_prefixes)
    given = {"augment": "standard", "n_views": 3, "max_epochs": 4}
    model = image_model(BACKBONE, 1, cache=tmp_path, **given).fit(X, y)
    assert cache_info(tmp_path).prefix_rows == 3 * N
    assert served == asked
    assert len({tuple(rows) for rows in served[:3]}) == 3
    assert served[3] == served[0]
    assert sorted(row for rows in served[:3] for row in rows) == list(range(3 * N))
    recomputed = image_model(BACKBONE, 1, prefix_bytes=0, **given).fit(X, y)
    assert same(weights_of(model), weights_of(recomputed))
    assert recomputed.history_[0]["recomputed_rows"] == N
    # Predictions are of the images themselves.
    plain = image_model(BACKBONE, 1).fit(X, y)
    plain.net_.module_.load_learned(model.net_.module_.learned())
    assert np.array_equal(model.predict_proba(X), plain.predict_proba(X))


@pytest.mark.parametrize("depth", [0, 1])
def test_fresh_views_differ_between_epochs_and_repeat_by_seed(
    depth, monkeypatch, tmp_path
):
    X, y = photos()
    seen: list[list[bytes]] = []
    set_epoch = FreshViews.set_epoch
    vector = TunedNetwork.vector

    def spied_epoch(self, epoch):
        seen.append([])
        return set_epoch(self, epoch)

    def spied_vector(self, h, *args):
        if seen and self.training:
            seen[-1].extend(row.numpy().tobytes() for row in h)
        return vector(self, h, *args)

    monkeypatch.setattr(FreshViews, "set_epoch", spied_epoch)
    monkeypatch.setattr(TunedNetwork, "vector", spied_vector)

    def views(seed: int) -> list[set[bytes]]:
        seen.clear()
        model = image_model(BACKBONE, depth, augment="standard", cache=tmp_path)
        model.set_params(max_epochs=3, random_state=seed).fit(X, y)
        # With nothing frozen there is nothing that could have been kept.
        assert model.history_[0]["recomputed_rows"] == (N if depth else 0)
        return [set(epoch) for epoch in seen]

    first = views(0)
    assert [len(epoch) for epoch in first] == [N, N, N]
    assert len(set.union(*first)) == 3 * N
    assert cache_info(tmp_path).prefix_rows == 0
    assert views(0) == first
    # Of small images some cuts are alike whatever the seed.
    assert len(set.union(*views(1)) & set.union(*first)) < N


def test_augmented_training_differs_from_plain_and_head_sees_plain_images():
    X, y = photos()
    plain = image_model(BACKBONE, 1, lr=1e-30).fit(X, y)
    augmented = image_model(BACKBONE, 1, lr=1e-30, augment="flip").fit(X, y)
    # Scaling and probe; nothing has been trained yet.
    assert distance(weights_of(plain), weights_of(augmented)) < 1e-12
    trained = image_model(BACKBONE, 1, augment="flip").fit(X, y)
    assert distance(weights_of(trained), weights_of(plain)) > 1e-3
