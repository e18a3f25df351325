"""A user's own network as a backbone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from sklearn.base import clone
from torch import nn
from torch.nn.functional import relu

from sklearn_transfer.backbones import from_module
from sklearn_transfer.backbones.from_module import backbone_from_module
from tests.backbone_checks import check_stages, perturb


class Net(nn.Module):
    """Children in running order, but forward also calls functions."""

    def __init__(self, slope: float = 0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.fc = nn.Linear(16, 6)
        self.slope = slope

    def forward(self, x):
        h = relu(self.bn1(self.conv1(x)))
        h = relu(self.conv2(h)) + self.slope
        return self.fc(h.mean((2, 3)))


class Mean(nn.Module):
    def forward(self, h):
        return h.mean((2, 3))


def stages_of(net: Net) -> list[tuple[str, nn.Module]]:
    return [
        ("stem", nn.Sequential(net.conv1, net.bn1, nn.ReLU())),
        ("conv2", nn.Sequential(net.conv2, nn.ReLU(), Mean())),
        ("fc", net.fc),
    ]


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(inplace=True),
    )


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 24, 36, generator=torch.Generator().manual_seed(3))


def test_children_are_the_stages_of_a_plain_network(x):
    net = perturb(sequential(), x)
    backbone = backbone_from_module(net, image_size=(24, 36)).load()
    with torch.no_grad():
        check_stages(backbone, x, net(x).mean((2, 3)))
    assert backbone.stage_names == ("0", "1", "3")  # activations join the one before
    assert backbone.recipe.crop == (24, 36)


def test_stages_may_be_built_from_submodules(x):
    net = perturb(Net(), x)
    spec = backbone_from_module(net, stages=stages_of(net), image_size=(24, 36))
    backbone = spec.load()
    with torch.no_grad():
        check_stages(backbone, x, net(x))
    assert backbone.layouts == ("nchw", "vector", "vector")
    assert spec.stage_names == ("stem", "conv2", "fc")


def test_stages_may_be_names_of_submodules(x):
    net = nn.Sequential()
    net.features, net.last = sequential(), nn.Conv2d(16, 4, 1)
    perturb(net, x)
    names = ["features.0", "features.1", "features.2", "features.3", "features.4"]
    spec = backbone_from_module(net, stages=[*names, "last"], image_size=24)
    assert spec.stage_names == ("features.0", "features.1", "features.3", "last")
    with torch.no_grad():
        torch.testing.assert_close(spec.load((24, 36))(x), net(x).mean((2, 3)))


def test_a_torchvision_network_without_its_head_is_one_line(x):
    from torchvision.models import resnet18

    net = resnet18(weights=None)
    net.fc = nn.Identity()
    spec = backbone_from_module(net.eval(), image_size=32)
    with torch.no_grad():
        torch.testing.assert_close(spec.load()(x), net(x))
    assert spec.stage_names[-4:] == ("layer1", "layer2", "layer3", "layer4")


def test_the_users_network_is_never_touched(x):
    net = sequential().train()
    before = copy.deepcopy(net.state_dict())
    net[0].weight.requires_grad_(False)
    spec = backbone_from_module(net, image_size=24)
    backbone = spec.load()
    assert net.training and all(child.training for child in net)
    assert not any(module.training for module in backbone.modules())
    after = net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # Nor does training it further change what was made of it.
    vector = backbone(x)
    with torch.no_grad():
        net[3].weight.zero_()
    assert torch.equal(spec.load()(x), vector)


def test_what_is_loaded_can_be_trained_without_changing_the_backbone(x):
    spec = backbone_from_module(sequential(), image_size=24)
    first = spec.load()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
        assert spec.load()(x).abs().max() > 0
    assert spec.load() is not spec.load()


def test_no_random_numbers_are_drawn():
    net = sequential()
    before = torch.random.get_rng_state()
    backbone_from_module(net, image_size=24).load(32)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- as a parameter ----------------------------------------------------------


def test_clones_copies_and_pickles_are_the_same_backbone(x):
    spec = backbone_from_module(sequential(), image_size=24, name="mine")
    assert clone(spec) is spec
    assert copy.deepcopy(spec) is spec
    twin = pickle.loads(pickle.dumps(spec))
    assert twin == spec and hash(twin) == hash(spec) and twin is not spec
    assert torch.equal(twin.load()(x), spec.load()(x))
    assert twin.load().fingerprint() == spec.load().fingerprint()
    assert repr(spec) == f"ModuleBackbone('mine', 3 stages, {spec.fingerprint[:8]})"
    assert spec != "mine"


def test_it_cannot_be_changed():
    spec = backbone_from_module(sequential(), image_size=24)
    with pytest.raises(AttributeError):
        spec.name = "other"


def test_equal_networks_are_equal_backbones_and_different_ones_are_not():
    net = sequential()
    spec = backbone_from_module(net, image_size=24)
    assert spec == backbone_from_module(copy.deepcopy(net), image_size=24)
    others = {
        "weights": backbone_from_module(sequential(), image_size=24),
        "size": backbone_from_module(net, image_size=32),
        "mean": backbone_from_module(net, image_size=24, mean=(0.5, 0.5, 0.5)),
        "name": backbone_from_module(net, image_size=24, name="other"),
        "stages": backbone_from_module(net, image_size=24, stages={"all": net}),
    }
    for what, other in others.items():
        assert other != spec, what


def test_what_tensors_do_not_tell_is_in_the_fingerprint():
    def network(activation, stride):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return nn.Sequential(nn.Conv2d(3, 4, 3, stride=stride), activation)

    def fingerprint(net):
        return backbone_from_module(net, image_size=24).load().fingerprint()

    usual = fingerprint(network(nn.ReLU(), 1))
    assert fingerprint(network(nn.ReLU(), 1)) == usual
    assert fingerprint(network(nn.GELU(), 1)) != usual
    assert fingerprint(network(nn.ReLU(), 2)) != usual

    plain, sloped = Net(), Net(slope=0.5)
    sloped.load_state_dict(plain.state_dict())
    whole = {slope: {"all": net} for slope, net in ((0, plain), (1, sloped))}
    assert fingerprint_of(plain, whole[0]) != fingerprint_of(sloped, whole[1])


class Scaled(nn.Module):
    """Settings of every kind that neither parameters nor plain values show."""

    def __init__(self, act=torch.relu, buffer=1.0, tensor=1.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        nn.init.constant_(self.conv.weight, 0.1)
        nn.init.constant_(self.conv.bias, 0.2)
        self.act = act
        self.register_buffer("scale", torch.tensor(buffer), persistent=False)
        self.shift = torch.tensor(tensor)

    def forward(self, x):
        return self.act(self.conv(x)) * self.scale + self.shift


def whole(net):
    return backbone_from_module(net, stages={"all": net}, image_size=24)


@pytest.mark.parametrize(
    "change",
    [{"act": torch.tanh}, {"buffer": 1.001}, {"tensor": 1.001}],
    ids=lambda change: next(iter(change)),
)
def test_networks_that_do_different_things_are_different(change):
    usual, other = whole(Scaled()), whole(Scaled(**change))
    assert usual == whole(Scaled())
    assert usual != other
    # What is stored is kept apart by the loaded network's fingerprint.
    assert usual.load().fingerprint() != other.load().fingerprint()
    assert other.load(32).fingerprint() == other.load().fingerprint()


def typed_at_a_prompt(code: str) -> type[nn.Module]:
    names = {"nn": nn, "__name__": "prompt"}  # a module without a file
    exec(
        "class Typed(nn.Sequential):\n"
        "    def forward(self, x):\n"
        f"        return nn.Sequential.forward(self, x) {code}\n",
        names,
    )
    return names["Typed"]


def test_code_typed_at_a_prompt_is_told_apart_by_its_constants():
    conv = nn.Conv2d(3, 4, 3)
    twice, thrice = (typed_at_a_prompt(code)(conv) for code in ("* 2.0", "* 3.0"))
    assert whole(twice) != whole(thrice)
    assert whole(twice) == whole(typed_at_a_prompt("* 2.0")(conv))


class OwnDtype(nn.Module):
    def __init__(self, factor=2.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        nn.init.constant_(self.conv.weight, 0.1)
        nn.init.constant_(self.conv.bias, 0.2)
        self.factor = torch.tensor(factor)

    def forward(self, x):
        assert x.dtype == torch.float32
        return self.conv(x) * self.factor


def test_a_network_that_insists_on_float32_is_told_apart_too():
    assert whole(OwnDtype()) == whole(OwnDtype())
    assert whole(OwnDtype()) != whole(OwnDtype(2.1))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return nn.functional.dropout(self.conv(x))


def test_a_network_that_draws_numbers_is_equal_to_itself():
    net = Noisy()
    first = whole(net)
    torch.rand(5)
    assert whole(net) == first


def test_the_number_of_threads_makes_no_other_network():
    net, threads = sequential(), torch.get_num_threads()
    try:
        found = set()
        for n in (1, 2):
            torch.set_num_threads(n)
            found.add(backbone_from_module(net, image_size=64))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_a_pickle_is_not_measured_anew(monkeypatch):
    # On another machine, whose rounding is another.
    spec = whole(Scaled())
    pickled = pickle.dumps(spec)
    monkeypatch.setattr(from_module, "_behaviour", lambda *_: "changed")
    assert whole(Scaled()) != spec
    twin = pickle.loads(pickled)
    assert twin == spec
    assert twin.load().fingerprint() == spec.load().fingerprint()


def fingerprint_of(net, stages):
    spec = backbone_from_module(net, stages=stages, image_size=24)
    return spec.load().fingerprint()


# --- errors ------------------------------------------------------------------


def test_children_that_are_not_the_forward_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"more than call its children.*stages="):
        backbone_from_module(Net(), image_size=24)


def test_stages_in_another_order_are_refused():
    net = nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 3))
    )
    with pytest.raises(ValueError, match="do not give what Sequential gives"):
        backbone_from_module(net, stages=["1", "0"], image_size=24)


def test_parameters_outside_every_stage_are_named():
    net = Net()
    with pytest.raises(ValueError, match=r"No stage holds fc\.weight, fc\.bias"):
        backbone_from_module(net, stages=stages_of(net)[:2], image_size=24)


@pytest.mark.parametrize("stages", [["0", "layer9"], ["0", "0"]])
def test_stages_that_are_not_there_or_twice_are_named(stages):
    with pytest.raises(ValueError, match=rf"stages: .*{stages[1]}"):
        backbone_from_module(sequential(), stages=stages, image_size=24)


def test_a_stage_that_writes_into_its_input_is_refused():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
    )
    with pytest.raises(ValueError, match="'1' begins by changing its input in place"):
        backbone_from_module(net, image_size=24)


@pytest.mark.parametrize(
    "last", [nn.Flatten(0), nn.Flatten(2)], ids=["one vector", "tokens"]
)
def test_only_vectors_and_maps_are_taken(last):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), last)
    with pytest.raises(ValueError, match=r"vectors \(n, d\) or maps"):
        backbone_from_module(net, image_size=24)


def test_a_size_the_network_cannot_take_is_refused_when_it_is_asked_for():
    net = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten(), nn.Linear(4 * 16 * 16, 3))
    spec = backbone_from_module(net, image_size=20)
    with pytest.raises(ValueError, match=r"does not take images \(n, 3, 24, 24\)"):
        spec.load(24)


@pytest.mark.parametrize("what", ["map", "weight"])
def test_a_forward_that_needs_contiguous_memory_is_refused_with_the_remedy(what):
    class Flat(nn.Conv2d):
        def forward(self, x):
            if what == "weight":
                return x.mean((2, 3)) + self.weight.view(8, -1).sum()
            return super().forward(x).view(len(x), -1)

    net = nn.Sequential(Flat(3, 8, 3), nn.LazyLinear(4) if what == "map" else nn.ReLU())
    net(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"channels_last.*x\.reshape\(\.\.\.\)"):
        backbone_from_module(net, image_size=16)


def test_a_network_without_parameters_has_no_stages():
    with pytest.raises(ValueError, match="no parameters"):
        backbone_from_module(nn.Sequential(nn.AvgPool2d(2)), image_size=24)
