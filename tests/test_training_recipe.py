"""The recipe: every part does what its name says, and its neutral value nothing."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from skorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from sklearn_transfer import ImageClassifier, backbone_from_module
from sklearn_transfer.backbones.stages import Tokens
from sklearn_transfer.backbones.tokenize import TokenIds
from sklearn_transfer.training.examples import GATHERED, Examples, Minibatches
from sklearn_transfer.training.head import Head
from sklearn_transfer.training.network import TunedNetwork
from sklearn_transfer.training.recipe import (
    Average,
    FlatAdamW,
    Losses,
    Mix,
    Pull,
    Recipe,
    mixed,
    multiplier,
    own_parameters,
    parameter_groups,
)

SIDE = 16
SEED = int(np.random.RandomState(0).randint(2**31 - 1))  # of random_state=0


def block(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU())


def small_network() -> nn.Sequential:
    """Three stages whose BatchNorms have seen something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(block(3, 8, 2), block(8, 12, 2), block(12, 16))
        net.train()(torch.randn(32, 3, SIDE, SIDE))
    return net.eval()


BACKBONE = backbone_from_module(small_network(), image_size=SIDE, name="small")


def pictures(n: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Noise on which a class lays stripes; (n, 16, 16, 3) uint8 and 0 or 1."""
    rng = np.random.default_rng(0)
    X = rng.integers(0, 160, (n, SIDE, SIDE, 3))
    y = np.arange(n) % 2
    X[y == 1, ::2] += 40
    return X.astype(np.uint8), y


def classifier(**params) -> ImageClassifier:
    """One in which everything is off that can be, whatever the defaults are."""
    given = {
        "head_init": "probe",
        "head": "linear",
        "head_lr": None,
        "layer_decay": 1.0,
        "unfreeze_every": None,
        "optimizer": "adamw",
        "l2_sp": 0.0,
        "dropout": 0.0,
        "label_smoothing": 0.0,
        "mixup": 0.0,
        "augment": "none",
        "batch_norm": "fixed",
        "ema": 0.0,
        "lora_rank": 0,
        "freeze_depth": 0,
        "lr": 1e-3,
        "max_epochs": 2,
        "batch_size": 8,
        "warmup": 0.0,
        "schedule": "constant",
        "clip_norm": None,
        "weight_decay": 0.0,
        "early_stopping": False,
        "random_state": 0,
        "precision": "float32",
        "device": "cpu",
        "cache": None,
    }
    return ImageClassifier(BACKBONE, **{**given, **params})


def weights_of(model) -> dict[str, torch.Tensor]:
    learned = model.net_.module_.learned()
    return {name: tensor.detach().clone() for name, tensor in learned.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict, b: dict, start: str = "") -> float:
    parts = [(a[n] - b[n]).double().square().sum() for n in a if n.startswith(start)]
    return math.sqrt(sum(parts))


class Recorder(Callback):
    """Keeps the weights at the start, after each step and after each epoch."""

    def on_train_begin(self, net, **kwargs):
        self.start, self.steps, self.epochs = self.weights(net), [], []

    def on_batch_end(self, net, training, **kwargs):
        if training:
            self.steps.append(self.weights(net))

    def on_epoch_end(self, net, **kwargs):
        self.epochs.append(self.weights(net))

    @staticmethod
    def weights(net):
        learned = net.module_.learned()
        return {name: tensor.detach().clone() for name, tensor in learned.items()}


# --- rates --------------------------------------------------------------------


@pytest.fixture
def stages():
    return [nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)) for _ in range(3)]


def groups_by_parameter(groups) -> dict[int, dict]:
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    return found


def test_each_stage_learns_at_its_distance_from_the_head(stages):
    recipe = Recipe(lr=0.8, head_lr=3.0, layer_decay=0.5)
    head = Head(3, 2)
    group_of = groups_by_parameter(parameter_groups(stages, head, recipe))
    for stage, rate in zip(stages, (0.2, 0.4, 0.8), strict=True):
        assert {group_of[id(p)]["lr"] for p in stage.parameters()} == {rate}
    assert {group_of[id(p)]["lr"] for p in head.parameters()} == {3.0}


def test_norms_and_biases_are_not_decayed(stages):
    recipe = Recipe(lr=1.0, head_lr=1.0, weight_decay=0.1)
    head = Head(3, 2, kind="mlp")
    group_of = groups_by_parameter(parameter_groups(stages, head, recipe))
    for module in [*stages, head]:
        for name, parameter in module.named_parameters():
            is_matrix = parameter.ndim > 1
            assert is_matrix != (name.endswith("bias") or ".1." in f".{name}")
            assert group_of[id(parameter)]["weight_decay"] == 0.1 * is_matrix


def test_what_two_stages_share_is_the_firsts(stages):
    stages[2][0].weight = stages[1][0].weight
    recipe = Recipe(lr=1.0, head_lr=1.0, layer_decay=0.5)
    group_of = groups_by_parameter(parameter_groups(stages, Head(3, 2), recipe))
    assert group_of[id(stages[2][0].weight)]["lr"] == 0.5
    first, second, third = own_parameters(stages)
    assert [len(own) for own in (first, second, third)] == [4, 4, 3]


def test_estimators_hand_their_rates_on():
    model = classifier(layer_decay=0.5, lr=0.01, head_lr=0.1, weight_decay=0.3)
    model.fit(*pictures())
    groups = groups_by_parameter(model.net_.optimizer_.param_groups)
    network = model.net_.module_
    for stage, rate in zip(network.trained_stages, (0.0025, 0.005, 0.01), strict=True):
        assert {groups[id(p)]["lr"] for p in stage.parameters()} == {rate}
    assert groups[id(network.head.linear.weight)]["lr"] == 0.1
    assert groups[id(network.head.linear.weight)]["weight_decay"] == 0.3


def test_a_random_head_learns_ten_times_faster_unless_told():
    X, y = pictures()
    model = classifier(head_init="random").fit(X, y)
    assert [model.history_[0][name] for name in ("lr", "head_lr")] == [1e-3, 1e-2]
    model = classifier(head_init="random", head_lr=5e-3).fit(X, y)
    assert model.history_[0]["head_lr"] == 5e-3


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3] + [1 - i / 8 for i in range(8)]),
        (
            "cosine",
            [1 / 3, 2 / 3] + [(1 + math.cos(i * math.pi / 8)) / 2 for i in range(8)],
        ),
    ],
)
def test_schedules_and_warmup_at_every_step(schedule, expected):
    recipe = Recipe(lr=1.0, head_lr=1.0, schedule=schedule, warmup=0.2)
    found = [multiplier(step, 10, recipe) for step in range(10)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_no_schedule_and_no_warmup_mean_one_rate():
    recipe = Recipe(lr=1.0, head_lr=1.0)
    assert {multiplier(step, 7, recipe) for step in range(7)} == {1.0}


def test_the_net_follows_the_schedule():
    X, y = pictures(16)  # two steps an epoch
    model = classifier(schedule="linear", max_epochs=3, lr=6e-4, head_lr=6e-3).fit(X, y)
    # The last step of each epoch is the 2nd, 4th and 6th of six.
    rates = [record["lr"] for record in model.history_]
    assert rates == pytest.approx([6e-4 * (1 - step / 6) for step in (1, 3, 5)])
    assert [record["head_lr"] for record in model.history_] == pytest.approx(
        [10 * rate for rate in rates]
    )


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_adamw_is_torchs_in_every_layout(layout):
    """Bit for bit, its state too; and what has no gradient stays as it is."""
    shapes = [(8, 4, 3, 3), (8, 4, 1, 1), (1, 4, 3, 3), (8, 4), (8,), (2, 3)]
    torch.manual_seed(0)
    start, found = [torch.randn(shape) for shape in shapes], []
    gradients = [[torch.randn(shape) for shape in shapes[:-1]] for _ in range(3)]
    for kind in (torch.optim.AdamW, FlatAdamW):
        weights = [nn.Parameter(laid(tensor, layout)) for tensor in start]
        optimizer = kind(weights, lr=0.1, weight_decay=0.3, fused=True)
        for of_step in gradients:
            for weight, gradient in zip(weights, of_step, strict=False):
                weight.grad = laid(gradient, layout)
            optimizer.step()
            moments = copy.deepcopy(optimizer.state_dict())
            optimizer = kind(weights, lr=0.1, weight_decay=0.3, fused=True)
            optimizer.load_state_dict(moments)
        found.append((weights, moments["state"]))
    (expected, their_moments), (weights, moments) = found
    for weight, their in zip(weights, expected, strict=True):
        assert torch.equal(weight, their) and weight.stride() == their.stride()
    assert torch.equal(weights[-1], start[-1])
    assert moments.keys() == their_moments.keys() == set(range(5))
    for number, of_weight in their_moments.items():
        for name, moment in of_weight.items():
            assert torch.equal(moments[number][name], moment)


def test_gradients_that_lie_otherwise_are_still_the_weights():
    """A callback may set them; torch's own kernel for a CPU mixes the numbers up."""
    torch.manual_seed(0)
    start, gradient = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    found = []
    for kind, layout, of_gradient in (
        (torch.optim.AdamW, torch.contiguous_format, torch.contiguous_format),
        (FlatAdamW, torch.channels_last, torch.contiguous_format),
        (FlatAdamW, torch.contiguous_format, torch.channels_last),
    ):
        weight = nn.Parameter(laid(start, layout))
        optimizer = kind([weight], lr=0.1, fused=True)
        for _ in range(2):
            weight.grad = laid(gradient, of_gradient)
            optimizer.step()
        found.append(weight)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def laid(tensor: torch.Tensor, layout) -> torch.Tensor:
    """A copy, channels_last if that is the layout and it has four dimensions."""
    is_map = tensor.dim() == 4
    return tensor.clone(memory_format=layout if is_map else torch.contiguous_format)


# --- neutral values -----------------------------------------------------------


def plain_loop(start: dict, X, y, model) -> dict[str, torch.Tensor]:
    """A fit as one would write it by hand, without any of the extras."""
    backbone = BACKBONE.load(SIDE)
    body = copy.deepcopy(backbone)
    network = nn.Module()
    network.body, network.head = body, Head(16, 2)
    network.load_state_dict(start)
    pixels = backbone.prepare(torch.from_numpy(X), torch.device("cpu"), torch.float32)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=model.lr, weight_decay=0.0, fused=True
    )
    generator = torch.Generator().manual_seed(SEED)
    network.body.requires_grad_(True).eval()  # the norms keep their statistics
    for _ in range(model.max_epochs):
        order = torch.randperm(len(X), generator=generator)
        for rows in order.split(model.batch_size):
            optimizer.zero_grad()
            outputs = network.head(body(pixels[rows]))
            losses = F.cross_entropy(outputs, torch.tensor(y)[rows], reduction="none")
            (losses.sum() / len(rows)).backward()
            optimizer.step()
    return network.state_dict()


def test_neutral_values_are_a_plain_loop_bit_for_bit():
    X, y = pictures()
    recorder = Recorder()
    model = classifier(callbacks=[recorder]).fit(X, y)
    expected = plain_loop(recorder.start, X, y, model)
    assert distance(weights_of(model), recorder.start) > 0.01
    assert same(weights_of(model), dict(expected))


NEUTRAL = {
    "mixup": (0.0, 0.5),
    "ema": (0.0, 0.5),
    "l2_sp": (0.0, 0.5),
    "dropout": (0.0, 0.5),
    "label_smoothing": (0.0, 0.1),
    "clip_norm": (1e9, 1e-3),
    "layer_decay": (1.0, 0.5),
    "weight_decay": (0.0, 0.5),
    "warmup": (0.0, 0.5),
    "lora_rank": (0, None),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_value_is_off_and_another_is_not(name):
    X, y = pictures()
    neutral, other = NEUTRAL[name]
    plain = weights_of(classifier(max_epochs=1).fit(X, y))
    assert same(
        weights_of(classifier(max_epochs=1, **{name: neutral}).fit(X, y)), plain
    )
    if other is not None:
        changed = classifier(max_epochs=1, **{name: other}).fit(X, y)
        assert not same(weights_of(changed), plain)


# --- clipping, pull, average --------------------------------------------------


def test_gradients_are_clipped_to_their_common_norm():
    X, y = pictures(16)
    recorder = Recorder()
    rate, norm = 0.1, 1e-3
    model = classifier(
        optimizer="sgd",
        lr=rate,
        clip_norm=norm,
        max_epochs=1,
        batch_size=16,
        head_init="random",
        head_lr=rate,
        callbacks=[recorder],
    ).fit(X, y)
    # One step of plain gradient descent: as long as rate x norm.
    assert distance(weights_of(model), recorder.start) == pytest.approx(
        rate * norm, rel=1e-3
    )


def test_the_pull_is_the_gradient_of_half_the_squared_distance():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    pull = Pull([weight], 3.0)
    with torch.no_grad():
        weight += torch.tensor([0.5, 0.25])
    weight.grad = torch.tensor([1.0, 1.0])
    pull.add_to_gradients()
    assert weight.grad.tolist() == [1 + 3 * 0.5, 1 + 3 * 0.25]


def test_a_strong_pull_keeps_the_pretrained_weights_and_frees_the_head():
    X, y = pictures()
    given = {
        "optimizer": "sgd",
        "lr": 1e-3,
        "head_lr": 1e-2,
        "head_init": "random",
        "max_epochs": 10,
        "callbacks": [Recorder()],
    }
    free = classifier(**given).fit(X, y)
    start = given["callbacks"][0].start
    held = classifier(**given, l2_sp=300.0).fit(X, y)
    moved = [distance(weights_of(m), start, "body.") for m in (free, held)]
    assert moved[1] < 0.1 * moved[0]
    moved = [distance(weights_of(m), start, "head.") for m in (free, held)]
    assert moved[1] > 0.5 * moved[0]


@pytest.mark.parametrize("how", ["pickled", "warm start"])
def test_the_pull_is_towards_the_pretrained_weights_later_too(how):
    X, y = pictures()
    model = classifier(l2_sp=0.1, warm_start=True, max_epochs=1).fit(X, y)
    model = pickle.loads(pickle.dumps(model)) if how == "pickled" else model.fit(X, y)
    pretrained = BACKBONE.load(SIDE).parameters()
    for (parameter, start), original in zip(
        model.net_.pull_.pairs, pretrained, strict=True
    ):
        assert torch.equal(start, original)
        assert not torch.equal(start, parameter) or parameter.ndim == 1


def test_the_average_by_hand():
    weight = nn.Parameter(torch.tensor([0.0]))
    average = Average([weight], decay=0.25)
    expected = 0.0
    for step, value in enumerate([4.0, 8.0, -2.0, 1.0, 7.0], 1):
        with torch.no_grad():
            weight.fill_(value)
        average.update()
        decay = min(0.25, step / (step + 9))
        expected = decay * expected + (1 - decay) * value
    with average.in_place():
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 7.0


def averaged(start: dict, steps: list[dict], decay: float) -> dict:
    mean = {name: tensor.double() for name, tensor in start.items()}
    for i, weights in enumerate(steps, 1):
        now = min(decay, i / (i + 9))
        for name in mean:
            mean[name] = now * mean[name] + (1 - now) * weights[name].double()
    return mean


def test_what_is_kept_and_judged_is_the_average():
    X, y = pictures()
    recorder = Recorder()
    model = classifier(ema=0.6, callbacks=[recorder], lr=0.01)
    model.set_params(early_stopping=True, validation_fraction=0.2, n_iter_no_change=99)
    model.fit(X, y)
    assert len(recorder.steps) == 4  # 16 rows in two batches, twice
    half = averaged(recorder.start, recorder.steps[:2], 0.6)
    whole = averaged(recorder.start, recorder.steps, 0.6)
    assert distance(recorder.epochs[0], half) < 1e-5
    assert distance(recorder.epochs[1], whole) < 1e-5
    assert distance(recorder.steps[-1], whole) > 1e-3
    kept = [recorder.start, *recorder.epochs][model.best_epoch_]
    assert same(weights_of(model), kept)


def test_the_average_goes_on_from_one_partial_fit_to_the_next():
    X, y = pictures()
    recorder = Recorder()
    model = classifier(ema=0.6, callbacks=[recorder], lr=0.01).partial_fit(X, y)
    start, steps = recorder.start, recorder.steps
    assert distance(weights_of(model), steps[-1]) > 1e-3
    model.partial_fit(X, y)
    # Training went on from the trained weights, not from their average.
    assert same(recorder.start, steps[-1])
    steps = steps + recorder.steps
    assert distance(weights_of(model), averaged(start, steps, 0.6)) < 1e-5
    plain = (
        classifier(lr=0.01, callbacks=[recorder]).partial_fit(X, y).partial_fit(X, y)
    )
    assert distance(weights_of(plain), steps[-1]) < 1e-6


# --- mixup --------------------------------------------------------------------


def test_the_mix_is_drawn_by_the_generator_alone():
    before = torch.get_rng_state()
    draws = [Mix.draw(6, 0.4, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert draws[0].share == draws[1].share != draws[2].share
    assert torch.equal(draws[0].partner, draws[1].partner)
    assert sorted(draws[0].partner.tolist()) == list(range(6))
    generator = torch.Generator().manual_seed(0)
    shares = np.array([Mix.draw(1, 0.4, generator).share for _ in range(2000)])
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    # The variance of Beta(a, a).
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.1)
    assert Mix.draw(6, 0.0, generator) is None


def test_mixed_maps_and_losses_by_hand():
    h = torch.arange(12.0).view(3, 4)
    mix = Mix(0.75, torch.tensor([2, 0, 1]))
    found = mixed(h, h[mix.partner], mix.share)
    assert torch.equal(found[0], 0.75 * h[0] + 0.25 * h[2])
    assert torch.equal(found[1], 0.75 * h[1] + 0.25 * h[0])
    losses = mix.losses(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0]))
    assert losses.tolist() == [0.75 * 1 + 0.25 * 5, 0.75 * 2 + 0.25 * 6]


def test_mixed_texts_have_a_token_where_either_has():
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    h = Tokens(hidden, mask)
    others = Tokens(hidden.flip(0), mask.flip(0))
    found = mixed(h, others, 0.75)
    assert found.mask.tolist() == [[1, 1, 1], [1, 1, 1]]
    torch.testing.assert_close(
        found.hidden[0, 0], 0.75 * hidden[0, 0] + 0.25 * hidden[1, 0]
    )
    # Behind the shorter one's end there is the longer one alone, and no padding.
    torch.testing.assert_close(found.hidden[0, 1], 0.75 * hidden[0, 1])
    torch.testing.assert_close(found.hidden[1, 2], 0.25 * hidden[0, 2])


def test_a_step_with_mixup_by_hand(monkeypatch):
    X, y = pictures(8)
    recorder = Recorder()
    model = classifier(
        mixup=0.4,
        max_epochs=1,
        freeze_depth=1,
        batch_size=8,
        optimizer="sgd",
        head_init="random",
        head_lr=1e-3,
        callbacks=[recorder],
    )
    seen = []
    vector = TunedNetwork.vector

    def spied(self, h, others=None, share=1.0):
        seen.append((h, others, share))
        return vector(self, h, others, share)

    monkeypatch.setattr(TunedNetwork, "vector", spied)
    model.fit(X, y)
    # What arrives are the stored activations after the frozen stage, not mixed yet.
    (h, others, share) = seen[0]
    assert h.shape == (8, 8, SIDE // 2, SIDE // 2)
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(8, generator=generator)
    mix = Mix.draw(8, 0.4, generator)
    assert share == mix.share
    assert torch.equal(others, h[mix.partner])
    backbone = BACKBONE.load(SIDE)
    pixels = backbone.prepare(torch.from_numpy(X), torch.device("cpu"), torch.float32)
    torch.testing.assert_close(h, backbone.run(pixels, 0, 1)[order])
    # And the gradient is that of the mixed loss on the mixed activations.
    head = Head(16, 2)
    start = {n[5:]: t for n, t in recorder.start.items() if n.startswith("head.")}
    head.load_state_dict(start)
    activations = share * h + (1 - share) * h[mix.partner]
    outputs = head(backbone.after(activations, 1).detach())
    target = torch.tensor(y)[order]
    own, theirs = (F.cross_entropy(outputs, t) for t in (target, target[mix.partner]))
    (share * own + (1 - share) * theirs).backward()
    moved = weights_of(model)["head.linear.weight"] - start["linear.weight"]
    torch.testing.assert_close(
        moved, -1e-3 * head.linear.weight.grad, rtol=1e-3, atol=1e-8
    )


def test_numbers_of_words_are_mixed_after_the_embeddings():
    class Body(nn.Module):
        n_stages = 2

        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList([nn.Embedding(9, 4), nn.Linear(4, 4)])

        def run(self, h, start, stop):
            for stage in self.stages[start:stop]:
                h = Tokens(stage(h[0]), h[1])
            return h

        def tap(self, h, k, pooling):
            return h.hidden[:, 0]

    body = Body()
    network = TunedNetwork(body, 0, Head(4, 2), "cls", False)
    ids = TokenIds(torch.tensor([[1, 2], [3, 4]]), torch.ones(2, 2, dtype=torch.int64))
    others = TokenIds(ids[0].flip(0), ids[1])
    words = body.stages[0].weight
    expected = body.stages[1](0.75 * words[[1, 3]] + 0.25 * words[[3, 1]])
    torch.testing.assert_close(network.vector(ids, others, 0.75), expected)


# --- losses -------------------------------------------------------------------


def test_label_smoothing_is_for_training_alone():
    outputs = torch.tensor([[2.0, -1.0, 0.5]])
    losses = Losses("classes", label_smoothing=0.3)
    log_p = outputs.log_softmax(1)
    soft = torch.tensor([[0.1, 0.8, 0.1]])
    target = torch.tensor([1])
    torch.testing.assert_close(losses.train()(outputs, target), -(soft * log_p).sum(1))
    torch.testing.assert_close(losses.eval()(outputs, target), -log_p[:, 1])


def test_label_smoothing_of_labels_draws_towards_one_half():
    outputs, target = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    losses = Losses("labels", label_smoothing=0.2)
    p = outputs.sigmoid()
    soft = torch.tensor([[0.9, 0.1]])
    expected = -(soft * p.log() + (1 - soft) * (1 - p).log()).mean(1)
    torch.testing.assert_close(losses.train()(outputs, target), expected)
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).mean(1)
    torch.testing.assert_close(losses.eval()(outputs, target), expected)


def test_the_validation_loss_that_is_noted_is_the_plain_one():
    X, y = pictures()
    X_val, y_val = pictures(12)
    model = classifier(label_smoothing=0.5, max_epochs=1, n_iter_no_change=5)
    model.set_params(early_stopping=True).fit(X, y, X_val=X_val[3:], y_val=y_val[3:])
    record = model.history_[0]
    assert model.best_epoch_ in (0, 1)
    if model.best_epoch_ == 0:  # the weights that were judged are not those kept
        model = classifier(label_smoothing=0.5, max_epochs=1).fit(X, y)
    plain = log_loss(y_val[3:], model.predict_proba(X_val[3:]))
    assert record["valid_loss"] == pytest.approx(plain, rel=1e-4)
    assert record["train_loss"] > record["valid_loss"]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("squared_error", lambda d: d**2),
        ("absolute_error", abs),
        ("huber", lambda d: d**2 / 2 if abs(d) <= 1 else abs(d) - 0.5),
    ],
)
def test_losses_of_values(name, function):
    outputs = torch.tensor([[0.5, 3.0], [-2.0, 0.0]])
    target = torch.tensor([[0.0, 0.0], [0.25, 0.0]])
    expected = [
        (function(0.5) + function(3.0)) / 2,
        (function(-2.25) + function(0)) / 2,
    ]
    assert Losses("values", name)(outputs, target).tolist() == expected


# --- batches ------------------------------------------------------------------


class Rows:
    """Prefixes that are their own row numbers."""

    k, is_kept = 1, None

    def __init__(self, lengths=None):
        self.lengths = lengths

    def batches(self, parts):
        for part in parts:
            yield torch.tensor(part)


def examples(n: int, lengths=None) -> Examples:
    return Examples(Rows(lengths), np.arange(n), torch.arange(n), torch.ones(n))


@pytest.mark.parametrize(
    ("n", "sizes"), [(16, [8, 8]), (17, [8, 9]), (18, [8, 8, 2]), (1, [1]), (9, [9])]
)
def test_a_last_batch_of_one_joins_the_one_before(n, sizes):
    batches = Minibatches(examples(n), 8, torch.Generator().manual_seed(0))
    parts = batches.parts()
    assert [len(part) for part in parts] == sizes
    assert len(batches) == len(sizes)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))


def test_batches_to_predict_keep_their_order_and_their_size():
    parts = Minibatches(examples(17), 8).parts()
    assert [part.tolist() for part in parts] == [[*range(8)], [*range(8, 16)], [16]]


@pytest.mark.parametrize("n", [300, 4 * GATHERED + 1])
def test_text_batches_gather_like_lengths_and_cover_every_row_once(n):
    lengths = np.random.default_rng(0).integers(1, 100, n)
    batches = Minibatches(examples(n, lengths), 4, torch.Generator().manual_seed(0))
    first, second = batches.parts(), batches.parts()
    for parts in (first, second):
        assert sorted(np.concatenate(parts).tolist()) == list(range(n))
        assert min(map(len, parts)) > 1
        assert len(parts) == len(batches)
    spans = [np.ptp(lengths[part]) for part in first]
    assert np.mean(spans) < 15  # of 4 drawn at random the mean span is 60
    # Other texts meet in the next epoch, and long ones do not always come first.
    assert {tuple(sorted(p)) for p in first} != {tuple(sorted(p)) for p in second}
    means = [lengths[part].mean() for part in first]
    assert means != sorted(means, reverse=True)


def test_examples_keep_rows_targets_and_weights_together():
    found = Examples(
        Rows(), [4, 2, 9], torch.tensor([40, 20, 90]), torch.tensor([4.0, 2, 9])
    )
    for h, (target, weight) in found.batches([[2, 0], [1]]):
        assert (10 * h).tolist() == target.tolist()
        assert h.tolist() == weight.tolist()
    h, (target, _) = found[1]
    assert (h.tolist(), target.tolist()) == ([2], [20])


def test_views_take_turns_from_epoch_to_epoch():
    found = Examples(
        Rows(), [1, 5, 6], torch.zeros(3), torch.ones(3), n_views=2, n_rows=10
    )
    seen = []
    for epoch in range(3):
        found.set_epoch(epoch)
        seen.append(next(found.batches([[0, 1, 2]]))[0].tolist())
    assert seen == [[1, 15, 6], [11, 5, 16], [1, 15, 6]]


# --- gradual unfreezing -------------------------------------------------------


@pytest.mark.parametrize("batch_norm", ["fixed", "train"])
def test_a_stage_is_bit_identical_until_it_thaws(batch_norm):
    X, y = pictures()
    recorder = Recorder()
    model = classifier(
        unfreeze_every=2,
        max_epochs=8,
        batch_norm=batch_norm,
        weight_decay=0.1,
        ema=0.5,
        l2_sp=0.1,
        callbacks=[recorder],
    ).fit(X, y)
    frozen = [record["frozen_stages"] for record in model.history_]
    assert frozen == [3, 3, 2, 2, 1, 1, 0, 0]
    for n_frozen, weights in zip(frozen, recorder.epochs, strict=True):
        for stage in range(3):
            own = {
                n: t
                for n, t in weights.items()
                if n.startswith(f"body.stages.{stage}.")
            }
            start = {name: recorder.start[name] for name in own}
            assert own and same(own, start) == (stage < n_frozen)
        assert distance(weights, recorder.start, "head.") > 0


def test_thawing_ends_at_the_freezing_depth():
    model = classifier(unfreeze_every=1, max_epochs=4, freeze_depth=1)
    model.fit(*pictures())
    assert [record["frozen_stages"] for record in model.history_] == [3, 2, 1, 1]
