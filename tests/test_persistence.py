"""Pickles: what was learned and no more, the same answers anywhere, old ones too."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from sklearn_transfer import (
    ImageClassifier,
    ImageRegressor,
    TextClassifier,
    TextRegressor,
)
from sklearn_transfer.exceptions import BackboneChangedError
from tests.fine_tuning_data import remarks, stripes, text_model
from tests.pickles import make

ROOT = Path(__file__).resolve().parents[1]
COMMON = {
    "max_epochs": 1,
    "batch_size": 8,
    "lr": 1e-3,
    "early_stopping": False,
    "random_state": 0,
    "precision": "float32",
    "device": "cpu",
    "cache": None,
}
N = 16


def image_classifier(**params):
    return ImageClassifier("resnet18@random", **{**COMMON, "image_size": 32, **params})


def text_classifier(**params):
    return TextClassifier(text_model(), **{**COMMON, **params})


def fitted(name: str):
    """An estimator and X."""
    images, label = stripes(N)
    texts, word = remarks(N)
    values = np.stack([label * 50 + 1000.0, np.arange(N)], 1)
    makers = {
        "image classifier, probe": lambda: image_classifier(freeze_depth="all"),
        "image classifier, tail": lambda: image_classifier(freeze_depth="layer3"),
        "image regressor": lambda: ImageRegressor(freeze_depth=-1, **COMMON),
        "text classifier, probe": lambda: text_classifier(freeze_depth="all"),
        "text classifier, lora": lambda: text_classifier(freeze_depth=1, lora_rank=2),
        "text regressor": lambda: TextRegressor(text_model(), head="mlp", **COMMON),
    }
    X = images if name.startswith("image") else texts
    y = {"image": label, "text ": word}[name[:5]] if "class" in name else values
    return makers[name]().fit(X, y), X


NAMES = [
    "image classifier, probe",
    "image classifier, tail",
    "image regressor",
    "text classifier, probe",
    "text classifier, lora",
    "text regressor",
]


@pytest.fixture(scope="module")
def models():
    """Each estimator fitted once, with X and what it says of X."""
    made = {}

    def model(name: str):
        if name not in made:
            estimator, X = fitted(name)
            made[name] = estimator, X, answers(estimator, X)
        return made[name]

    return model


def answers(model, X) -> np.ndarray:
    is_classifier = hasattr(model, "predict_proba")
    return model.predict_proba(X) if is_classifier else model.predict(X)


def through_joblib(model):
    file = io.BytesIO()
    joblib.dump(model, file)
    file.seek(0)
    return joblib.load(file)


def through_skops(model):
    skops = pytest.importorskip("skops.io", reason="skops is not installed")
    data = skops.dumps(model)
    return skops.loads(data, trusted=skops.get_untrusted_types(data=data))


WAYS = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "twice": lambda model: pickle.loads(
        pickle.dumps(pickle.loads(pickle.dumps(model)))
    ),
    "joblib": through_joblib,
    "skops": through_skops,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_answers_the_same(name, way, models):
    model, X, expected = models(name)
    again = WAYS[way](model)
    assert type(again) is type(model)
    assert np.array_equal(answers(again, X), expected)
    assert np.array_equal(again.transform(X), model.transform(X))
    np.testing.assert_equal(again.history_, model.history_)
    np.testing.assert_equal(list(again.net_.history), list(model.net_.history))
    assert again.get_params() == model.get_params()


@pytest.mark.parametrize("name", ["image classifier, tail", "text classifier, lora"])
def test_a_copy_shares_nothing(name, models):
    model, X, expected = models(name)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for tensor in again.net_.module_.state_dict().values():
                tensor.zero_()
        assert not np.array_equal(answers(again, X), expected)
        assert np.array_equal(answers(model, X), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_clone_is_not_fitted(name, models):
    model, X, _ = models(name)
    again = clone(model)
    assert again.get_params() == model.get_params()
    assert not hasattr(again, "net_")
    with pytest.raises(NotFittedError):
        again.predict(X)


class WithoutTorch(pickle.Unpickler):
    """As where there is no torch, or no GPU for its tensors to come back to."""

    def find_class(self, module, name):
        if module.partition(".")[0] in ("torch", "torchvision", "skorch"):
            raise AssertionError(f"{module}.{name} is inside the pickle")
        return super().find_class(module, name)


@pytest.mark.parametrize("name", NAMES)
def test_arrays_are_numpys_and_no_torch_is_inside(name, models):
    model, X, expected = models(name)
    again = WithoutTorch(io.BytesIO(pickle.dumps(model))).load()
    assert all(isinstance(array, np.ndarray) for array in again._learned.values())
    assert np.array_equal(answers(again, X), expected)
    # And once it has predicted.
    WithoutTorch(io.BytesIO(pickle.dumps(again))).load()


def test_frozen_weights_are_not_pickled(models):
    probe, *_ = models("image classifier, probe")
    assert len(pickle.dumps(probe)) < 50_000  # resnet18 has 45 MB
    assert {name.split(".")[0] for name in probe.__getstate__()["_learned"]} == {"head"}
    tail, *_ = models("image classifier, tail")
    learned = tail.__getstate__()["_learned"]
    assert {".".join(name.split(".")[:3]) for name in learned if "body" in name} == {
        "body.stages.4"
    }
    nbytes = sum(array.nbytes for array in learned.values())
    assert nbytes < len(pickle.dumps(tail)) < nbytes + 50_000
    large = ImageClassifier(freeze_depth="all", **COMMON).fit(*stripes(N))
    assert len(pickle.dumps(large)) < 2**20


def test_of_adapted_networks_only_adapters_and_head_are_pickled(models):
    model, *_ = models("text classifier, lora")
    learned = model.__getstate__()["_learned"]
    names = {name.rsplit(".", 1)[-1] for name in learned if not name.startswith("head")}
    assert names == {"down", "up"}
    # Query, key, value and what follows, of two layers.
    assert len(learned) == 2 * 4 * 2 + len(model.net_.module_.head.state_dict())
    n_params = 2 * 4 * 2 * (2 * 32)
    sizes = [array.size for name, array in learned.items() if "head" not in name]
    assert sum(sizes) == n_params


SCRIPT = """
import pickle, sys
import numpy as np
with open(sys.argv[1], "rb") as file:
    jobs = pickle.load(file)
assert "torch" not in sys.modules
for model, X, expected in jobs:
    ask = getattr(model, "predict_proba", model.predict)
    np.testing.assert_allclose(ask(X), expected, rtol=1e-5, atol=1e-6)
print(len(jobs), "models")
"""


def test_another_process_answers_the_same(models, tmp_path):
    file = tmp_path / "jobs.pkl"
    file.write_bytes(pickle.dumps([models(name) for name in NAMES]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(len(NAMES)), "models"]


# --- the backbone that is found again -----------------------------------------


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(text_model(), tmp_path / "model")


def write_anew(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layer.1" in name and "key" in name)
    weights[name] = weights[name] + 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("depth", "what"),
    [
        *itertools.product(["all", 1], ["predict", "transform", "to_module"]),
        (1, "net_"),  # with every stage frozen it holds nothing of the backbone
    ],
)
def test_another_backbone_is_refused_at_first_use(folder, depth, what):
    X, y = remarks(N)
    model = TextClassifier(str(folder), freeze_depth=depth, **COMMON).fit(X, y)
    data = pickle.dumps(model)
    write_anew(folder)
    again = pickle.loads(data)  # says nothing yet
    before = model._featurizer._request.fingerprint[:12]
    with pytest.raises(BackboneChangedError) as caught:
        found = getattr(again, what)
        found() if what == "to_module" else found(X)
    assert before in str(caught.value)
    assert "TextClassifier was fitted with: fingerprint" in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_pickle_goes_on_where_its_device_and_folder_are_not(folder, tmp_path):
    X, y = remarks(N)
    model = TextClassifier(str(folder), freeze_depth=1, **COMMON).fit(X, y)
    expected = model.predict_proba(X)
    data = pickle.dumps(model)
    moved = folder.rename(tmp_path / "elsewhere")
    again = pickle.loads(data)
    for estimator in (again, again._featurizer):  # as a machine with GPUs pickles it
        estimator.device = "cuda:7"
    with pytest.raises(ValueError, match="Write device='auto'"):
        again.predict(X)
    again.set_params(device="cpu", backbone=str(moved))
    np.testing.assert_allclose(again.predict_proba(X), expected, atol=1e-6)


def test_training_goes_on_from_a_pickle():
    X, y = stripes(N)
    # One batch, whose order is of no matter.
    model = image_classifier(freeze_depth="layer3", batch_size=N, lr=1e-4).fit(X, y)
    again = pickle.loads(pickle.dumps(model)).partial_fit(X, y)
    before = model.predict_proba(X)
    model.partial_fit(X, y)
    assert again.n_iter_ == 2
    assert len(again.net_.history) == 2
    found, expected = again.predict_proba(X), model.predict_proba(X)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(before - expected).max() > 1e-3


# --- pickles of earlier versions -------------------------------------------------


@pytest.mark.parametrize("name", make.estimators())
def test_a_pickle_that_was_kept_still_answers(name, monkeypatch):
    monkeypatch.chdir(make.FOLDER)
    model = pickle.loads((make.FOLDER / f"{name}.pkl").read_bytes())
    expected = json.loads((make.FOLDER / "expected.json").read_text())[name]
    X, _ = make.data(name)
    found = make.answers(model, X[: make.SHOWN])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert model.get_params().keys() == make.estimators()[name].get_params().keys()


def test_pickles_that_are_kept_are_small():
    files = [file for file in make.FOLDER.rglob("*") if file.is_file()]
    assert len(files) > 8
    assert sum(file.stat().st_size for file in files) < 2**20


# --- on a GPU --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("depth", ["all", 1])
def test_a_pickle_made_on_a_gpu_loads_without_one(depth):
    X, y = remarks(N)
    given = {**COMMON, "device": "cuda", "freeze_depth": depth}
    model = TextClassifier(text_model(), **given).fit(X, y)
    assert next(model.net_.module_.parameters()).is_cuda
    again = WithoutTorch(io.BytesIO(pickle.dumps(model))).load()
    again.set_params(device="cpu")
    assert not next(again.net_.module_.parameters()).is_cuda
    found, expected = again.predict_proba(X), model.predict_proba(X)
    np.testing.assert_allclose(found, expected, atol=1e-4)
