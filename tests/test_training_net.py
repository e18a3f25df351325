"""The net: trouble on the way, what skorch offers, and the whole network after."""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import psutil
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNet
from skorch.callbacks import Callback, EarlyStopping
from torch import nn
from torch.nn.utils import parametrize

from sklearn_transfer import (
    ImageClassifier,
    ImageRegressor,
    TextClassifier,
    TextRegressor,
)
from sklearn_transfer.backbones.registry import load_image_backbone, load_text_backbone
from sklearn_transfer.exceptions import DivergedError, MicroBatchWarning
from sklearn_transfer.running.device import Runner
from sklearn_transfer.training.recipe import FlatAdamW
from tests.fine_tuning_data import remarks, text_model
from tests.test_training_recipe import (
    BACKBONE,
    SIDE,
    Recorder,
    classifier,
    distance,
    pictures,
    same,
    weights_of,
)

TEXT = {
    "freeze_depth": 1,
    "lr": 1e-3,
    "max_epochs": 2,
    "batch_size": 8,
    "early_stopping": False,
    "random_state": 0,
    "precision": "float32",
    "device": "cpu",
    "cache": None,
}


def text_classifier(**params) -> TextClassifier:
    return TextClassifier(text_model(), **{**TEXT, **params})


# --- training that leaves all bounds ------------------------------------------


def test_an_exploding_loss_says_when_and_why():
    model = classifier(optimizer="sgd", lr=30.0, max_epochs=9)
    with pytest.raises(DivergedError) as caught:
        model.fit(*pictures())
    assert "in epoch 1, after" in str(caught.value)
    assert "lr=30" in str(caught.value)
    assert "write lr=3, head_lr=3, or clip_norm=1.0" in str(caught.value)
    assert isinstance(caught.value, FloatingPointError)


class Spoil(Callback):
    """Makes the gradients of one step NaN."""

    def __init__(self, step: int):
        self.step, self.done = step, 0

    def on_grad_computed(self, net, named_parameters, **kwargs):
        self.done += 1
        if self.done == self.step:
            for _, parameter in named_parameters:
                parameter.grad.fill_(torch.nan)


@pytest.mark.parametrize("step", [1, 5, 6], ids=["first", "last but one", "last"])
def test_a_loss_or_weights_that_are_no_numbers_are_never_kept(step):
    model = classifier(callbacks=[Spoil(step)])  # 6 steps
    epoch = 1 if step == 1 else 2
    with pytest.raises(DivergedError, match=f"epoch {epoch}, after {step} steps"):
        model.fit(*pictures())


def test_what_is_wrong_before_the_first_step_is_not_the_learning_rates_fault():
    X, y = pictures()
    weights = np.where(y, 1e300, 1.0)  # beyond float32
    model = classifier(head_init="random")
    with pytest.raises(DivergedError, match=r"before the first step.*sample_weight"):
        model.fit(X, y, sample_weight=weights)


# --- out of memory ------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch):
    """Lets a training step fail at its last layer, beyond so many rows."""
    limit = {"rows": None, "failed": []}
    forward = nn.Linear.forward

    def limited(self, x):
        too_many = limit["rows"] is not None and len(x) > limit["rows"]
        if too_many and torch.is_grad_enabled() and self.training:
            limit["failed"].append(len(x))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", limited)
    return limit


class InParts(Callback):
    """Takes so many rows at once from the start."""

    def __init__(self, rows: int):
        self.rows = rows

    def on_train_begin(self, net, **kwargs):
        net.micro_batch_ = self.rows


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_a_step_in_parts_is_the_whole_step(memory, mixup):
    X, y = pictures(24)
    weights = np.random.default_rng(0).uniform(0.2, 3, len(y))
    given = {"mixup": mixup, "batch_size": 12, "optimizer": "sgd", "freeze_depth": 1}
    whole = classifier(**given).fit(X, y, sample_weight=weights)
    memory["rows"] = 4
    parts = classifier(**given).fit(X, y, sample_weight=weights)  # and no warning
    # Halved twice, from 12, and never tried again.
    assert memory["failed"] == [12, 6]
    assert parts.net_.micro_batch_ == 3
    assert distance(weights_of(whole), weights_of(parts)) < 1e-6
    start = classifier(**given, callbacks=[recorder := Recorder()])
    memory["rows"] = None
    start.fit(X, y, sample_weight=weights)
    assert distance(weights_of(whole), recorder.start) > 1e-3
    assert parts.history_[0]["train_loss"] == pytest.approx(
        whole.history_[0]["train_loss"], rel=1e-5
    )


def test_a_failed_step_leaves_no_trace(memory):
    X, y = pictures(24)
    # Statistics, dropout and the mix have all moved when the last layer fails.
    given = {
        "batch_norm": "train",
        "dropout": 0.4,
        "mixup": 0.4,
        "batch_size": 12,
        "freeze_depth": 1,
    }
    begun = classifier(**given, callbacks=[InParts(6)]).fit(X, y)
    memory["rows"] = 6
    with pytest.warns(MicroBatchWarning, match="batch_size=6") as caught:
        failed = classifier(**given).fit(X, y)
    assert len(caught) == 1
    assert memory["failed"] == [12]
    assert same(weights_of(begun), weights_of(failed))


@pytest.mark.parametrize("params", [{"batch_norm": "train"}, {"dropout": 0.1}])
def test_parts_that_change_the_result_are_warned_of_once(memory, params):
    memory["rows"] = 2
    with pytest.warns(MicroBatchWarning, match="A batch of 8 rows") as caught:
        classifier(**params).fit(*pictures(16))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_dropout_inside_a_text_model_is_warned_of(memory):
    memory["rows"] = 4
    with pytest.warns(MicroBatchWarning):
        text_classifier(max_epochs=1).fit(*remarks(16))


def test_one_row_that_does_not_fit_is_an_error_that_names_its_size(memory):
    memory["rows"] = 0
    with pytest.raises(
        MemoryError, match=r"one row, of shape \(8, 8, 8\) after 1"
    ) as e:
        classifier(freeze_depth=1).fit(*pictures())
    assert "smaller image_size" in str(e.value)
    assert memory["failed"] == [8, 4, 2, 1]


def test_a_batch_that_cannot_be_put_together_names_its_size(monkeypatch):
    def until(self, inputs, k):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Runner, "until", until)
    with pytest.raises(MemoryError, match=r"batch of 8 rows, after 0 .*batch_size=4"):
        classifier(freeze_depth=0, head_init="random").fit(*pictures())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the C library")
def test_a_fit_gives_freed_memory_back():
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("not glibc")
    X = np.random.default_rng(0).integers(0, 256, (32, 96, 96, 3), np.uint8)
    model = ImageClassifier(
        "resnet18@random", freeze_depth=3, image_size=96, max_epochs=1, cache=None
    ).fit(X, np.arange(32) % 2)
    kept = psutil.Process().memory_full_info().uss
    libc.malloc_trim(0)
    assert model.n_iter_ == 1
    # What the step took and freed is 90 MB.
    assert kept - psutil.Process().memory_full_info().uss < 20e6


def test_an_optimizer_that_does_not_fit_names_its_size(monkeypatch):
    model = classifier(freeze_depth=1)

    def step(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(FlatAdamW, "step", step)
    with pytest.raises(MemoryError, match=r"for [\d,]+ trained weights, [\d,]+ bytes"):
        model.fit(*pictures())
    assert not hasattr(model, "net_")


def test_other_errors_are_not_taken_for_want_of_memory(monkeypatch):
    def broken(self, x):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(nn.Linear, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        classifier().fit(*pictures())


def test_predictions_and_validation_shrink_their_batches_too(monkeypatch):
    X, y = pictures(40)
    model = classifier().fit(X, y)
    expected = model.predict_proba(X), model.transform(X)
    forward = nn.ReLU.forward
    failed = []

    def limited(self, x):
        if len(x) > 5 and not torch.is_grad_enabled():
            failed.append(len(x))
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")
        return forward(self, x)

    monkeypatch.setattr(nn.ReLU, "forward", limited)
    np.testing.assert_allclose(model.predict_proba(X), expected[0], atol=1e-6)
    np.testing.assert_allclose(model.transform(X), expected[1], atol=1e-5)
    assert failed == [40, 20, 10] * 2
    failed.clear()
    judged = classifier(max_epochs=1, freeze_depth=0, head_init="random")
    monkeypatch.setattr(nn.ReLU, "forward", forward)
    plain = judged.set_params(early_stopping=True).fit(X, y, X_val=X, y_val=y)
    plain_loss = plain.history_[0]["valid_loss"]
    features = type(judged)._features

    def unlimited(self, part):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.ReLU, "forward", forward)
            return features(self, part)

    monkeypatch.setattr(type(judged), "_features", unlimited)
    monkeypatch.setattr(nn.ReLU, "forward", limited)
    judged.fit(X, y, X_val=X, y_val=y)
    assert failed
    assert judged.history_[0]["valid_loss"] == pytest.approx(plain_loss, rel=1e-5)


# --- interrupts ---------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C in the middle of the third step."""
    calls = []
    forward = nn.Linear.forward

    def pressed(self, x):
        if torch.is_grad_enabled():
            calls.append(len(x))
            if len(calls) == 3:
                raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", pressed)


def test_an_interrupt_ends_the_fit(interrupted):
    with pytest.raises(KeyboardInterrupt):
        classifier().fit(*pictures())


def test_an_interrupt_ends_the_whole_search(interrupted):
    search = GridSearchCV(classifier(), {"lr": [1e-3, 1e-4]}, cv=2, error_score=0.0)
    with pytest.raises(KeyboardInterrupt):
        search.fit(*pictures())


class Pressed(Callback):
    """Ctrl-C while a callback works, in a function that it calls."""

    def on_epoch_end(self, net, **kwargs):
        press()


def press():
    raise KeyboardInterrupt


def test_an_interrupt_while_callbacks_work_ends_the_fit_too():
    with pytest.raises(KeyboardInterrupt):
        classifier(callbacks=[Pressed()]).fit(*pictures())


def test_skorchs_early_stopping_ends_the_training_and_not_the_fit():
    stop = EarlyStopping("train_loss", patience=2, threshold=99.0, threshold_mode="abs")
    stop.sink = lambda text: None
    model = classifier(callbacks=[stop], max_epochs=9).fit(*pictures())
    assert model.n_iter_ == len(model.history_) == 3  # the first betters infinity
    assert model.predict(pictures()[0]).shape == (20,)


# --- skorch -------------------------------------------------------------------


def test_net_is_a_skorch_net_over_tail_and_head():
    X, y = pictures()
    model = classifier(freeze_depth=2).fit(X, y)
    net = model.net_
    assert isinstance(net, NeuralNet)
    names = {name.rsplit(".", 1)[0] for name in net.module_.learned()}
    assert names == {"head", "head.linear", "body.stages.2.0", "body.stages.2.1"}
    assert sum(p.numel() for p in net.module_.parameters()) == 12 * 16 * 9 + 32 + 34
    assert net.history[:, "train_loss"] == [r["train_loss"] for r in model.history_]
    assert [epoch["train_batch_count"] for epoch in net.history] == [3, 3]
    sizes = net.history[-1, "batches", :, "train_batch_size"]
    assert sizes == [8, 8, 4]


def seen_by(model, X):
    return (
        model.decision_function(X) if hasattr(model, "classes_") else model.predict(X)
    )


@pytest.mark.parametrize("use_safetensors", [True, False])
@pytest.mark.parametrize("kind", ["images", "texts", "lora"])
def test_parameters_are_saved_and_loaded(kind, use_safetensors, tmp_path):
    X, y = pictures() if kind == "images" else remarks(16)
    given = {"lora_rank": 2} if kind == "lora" else {}
    make = classifier if kind == "images" else text_classifier
    tuned = make(**given).fit(X, y)
    other = make(**given, head_init="random", random_state=7).fit(X, y)
    assert not np.allclose(
        tuned.decision_function(X), other.decision_function(X), atol=1e-2
    )
    if kind == "images":
        module, name = tuned.net_.module_, "body.stages.1.0.weight"
        assert not module.get_parameter(name).is_contiguous()
        assert module.state_dict()[name].is_contiguous()  # as safetensors asks for
    file = tmp_path / "weights"
    tuned.net_.save_params(f_params=file, use_safetensors=use_safetensors)
    other.net_.load_params(f_params=file, use_safetensors=use_safetensors)
    assert np.array_equal(tuned.decision_function(X), other.decision_function(X))


# --- the whole network --------------------------------------------------------


def as_images(X) -> torch.Tensor:
    return torch.from_numpy(X).permute(0, 3, 1, 2).float() / 255


def as_tokens(texts) -> tuple[torch.Tensor, torch.Tensor]:
    backbone = load_text_backbone(text_model(), None, None)
    ids, _ = backbone.tokenize(texts)
    return tuple(backbone.collate(ids))


@pytest.fixture(params=["images", "texts", "lora", "all frozen", "normalized texts"])
def tuned(request):
    """A classifier, X, and what its plain module takes of it."""
    kind = request.param
    if kind in ("images", "all frozen"):
        X, y = pictures()
        depth = 1 if kind == "images" else "all"
        model = classifier(freeze_depth=depth, head="mlp" if depth == 1 else "linear")
        return model.fit(X, y), X, (as_images(X),)
    X, y = remarks(16)
    model = text_classifier(
        lora_rank=4 * (kind == "lora"),
        normalize=True if kind.startswith("norm") else "auto",
    )
    return model.fit(X, y), X, as_tokens(X)


def test_the_module_gives_the_logits(tuned):
    model, X, inputs = tuned
    module = model.to_module()
    logits = module(*inputs)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    assert not any(part.training for part in module.modules())
    assert not any(parametrize.is_parametrized(part) for part in module.modules())
    found = softmax(logits.numpy(), axis=1)
    np.testing.assert_allclose(found, model.predict_proba(X), atol=2e-6)
    difference = (logits[:, 1] - logits[:, 0]).numpy()
    np.testing.assert_allclose(difference, model.decision_function(X), atol=2e-5)


def test_the_module_is_its_own(tuned):
    model, X, _ = tuned
    before = model.predict_proba(X)
    module = model.to_module()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.zero_()
    assert np.array_equal(model.predict_proba(X), before)
    if model.n_frozen_stages_ < model.n_stages_:
        assert any(p.requires_grad for p in model.net_.module_.parameters())


def test_the_module_can_be_exported_for_any_batch(tuned):
    model, _, inputs = tuned
    module = model.to_module()
    batch = torch.export.Dim("batch", min=2, max=512)
    shapes = tuple({0: batch} for _ in inputs)
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    some = tuple(tensor[:5] for tensor in inputs)
    torch.testing.assert_close(
        program.module()(*some), module(*some), atol=1e-6, rtol=0
    )


def test_the_class_token_of_a_vision_transformer_fits_any_batch():
    embeddings = load_image_backbone("vit_b_16@random", SIDE).stages[0]
    images = torch.rand(3, 3, SIDE, SIDE)
    shapes = ({0: torch.export.Dim("batch", min=2, max=512)},)
    program = torch.export.export(embeddings, (images,), dynamic_shapes=shapes)
    expected = embeddings(images[:2])
    torch.testing.assert_close(program.module()(images[:2]), expected)


@pytest.mark.parametrize("pooling", ["avg", "max", "cls", "last"])
def test_every_pooling_of_texts_can_be_exported(pooling):
    texts, y = remarks(16)
    model = text_classifier(pooling=pooling, max_epochs=1).fit(texts, y)
    module, inputs = model.to_module(), as_tokens(texts)
    batch = torch.export.Dim("batch", min=2, max=512)
    shapes = tuple({0: batch} for _ in inputs)
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    some = tuple(tensor[:5] for tensor in inputs)
    torch.testing.assert_close(program.module()(*some), module(*some))


def test_modules_of_regressors_speak_in_ys_units():
    X, y = pictures()
    rng = np.random.default_rng(0)
    target = np.stack(
        [1000 + 50 * y + rng.normal(0, 9, len(y)), rng.normal(size=len(y))], 1
    )
    given = {name: TEXT[name] for name in TEXT if name != "freeze_depth"}
    model = ImageRegressor(BACKBONE, freeze_depth=1, **given).fit(X, target)
    found = model.to_module()(as_images(X)).numpy()
    np.testing.assert_allclose(found, model.predict(X), rtol=1e-5, atol=1e-5)
    assert abs(found[:, 0].mean() - target[:, 0].mean()) < 50
    texts, label = remarks(16)
    target = 7.0 + 3 * (label == "good")
    model = TextRegressor(text_model(), **TEXT).fit(texts, target)
    found = model.to_module()(*as_tokens(texts)).numpy()
    np.testing.assert_allclose(found[:, 0], model.predict(texts), rtol=1e-5)


def test_modules_of_labels_give_one_logit_a_label():
    X, _ = pictures()
    y = np.random.default_rng(0).integers(0, 2, (len(X), 3))
    model = classifier().fit(X, y)
    found = expit(model.to_module()(as_images(X)).numpy())
    np.testing.assert_allclose(found, model.predict_proba(X), atol=2e-6)


def test_a_published_network_resizes_nothing_in_its_module():
    rng = np.random.default_rng(0)
    X, y = rng.integers(0, 255, (8, 32, 32, 3)).astype(np.uint8), np.arange(8) % 2
    given = {**TEXT, "freeze_depth": "layer3", "max_epochs": 1}
    model = ImageClassifier("resnet18@random", image_size=32, **given).fit(X, y)
    found = softmax(model.to_module()(as_images(X)).numpy(), axis=1)
    np.testing.assert_allclose(found, model.predict_proba(X), atol=1e-5)


# --- on a GPU -----------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_memory_is_given_back_after_every_fit():
    X, y = pictures()
    model = classifier(device="cuda", ema=0.5, l2_sp=0.1)
    levels = []
    for _ in range(20):
        model.fit(X, y).predict(X)
        torch.cuda.synchronize()
        levels.append(torch.cuda.memory_allocated())
    assert max(levels[2:]) <= levels[1]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("modality", ["images", "texts"])
def test_bf16_trains_under_autocast(modality):
    make = classifier if modality == "images" else text_classifier
    X, y = pictures() if modality == "images" else remarks(16)
    found = []
    for precision in ("float32", "bfloat16"):
        model = make(device="cuda", precision=precision, max_epochs=4).fit(X, y)
        assert all(p.dtype == torch.float32 for p in model.net_.module_.parameters())
        assert model.history_[-1]["train_loss"] < model.history_[0]["train_loss"]
        found.append(model.predict_proba(X))
    np.testing.assert_allclose(*found, atol=0.1)


@pytest.mark.gpu
@needs_gpu
def test_a_real_lack_of_memory_is_survived():
    X, y = pictures(64)
    expected = classifier(device="cuda", batch_size=32, freeze_depth=0).fit(X, y)
    forward, failed = nn.ReLU.forward, []

    def greedy(self, x):
        if len(x) > 8 and torch.is_grad_enabled():
            failed.append(len(x))
            torch.empty(2**50, device="cuda")
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.ReLU, "forward", greedy)
        found = classifier(device="cuda", batch_size=32, freeze_depth=0).fit(X, y)
    assert failed == [32, 16]
    assert distance(weights_of(expected), weights_of(found)) < 1e-3
