"""timm's networks as lists of stages."""

from __future__ import annotations

import pickle
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file

from sklearn_transfer.backbones import from_timm
from sklearn_transfer.backbones.from_timm import load
from sklearn_transfer.exceptions import BackboneNotFoundError, WeightsError
from tests.backbone_checks import check_stages, perturb

try:
    import timm
except ImportError:
    timm = None
needs_timm = pytest.mark.skipif(timm is None, reason="timm is not installed")

# One small member a family, and what it is asked to look at.
FAMILIES = {
    "test_resnet": (64, 96),
    "test_efficientnet": (64, 96),
    "test_vit": (64, 96),
    "test_vit2": (64, 64),  # registers, attention or average after the norm
    "test_convnext": (64, 96),
    "test_nfnet": (64, 96),
    "test_byobnet": (64, 96),
    "test_mambaout": (64, 96),  # channels last
    "resnet18": (64, 96),
    "mobilenetv3_small_050": (64, 96),
    "convnext_atto": (64, 96),
    "densenet121": (64, 96),
    "regnetx_002": (64, 96),
    "vit_tiny_patch16_224": (64, 96),
    "deit_tiny_distilled_patch16_224": (64, 64),  # two tokens, averaged
    "swin_tiny_patch4_window7_224": (64, 64),
}
STAGES = {
    "resnet18": ["stem", "layer1", "layer2", "layer3", "layer4"],
    "mobilenetv3_small_050": ["stem", *(f"blocks.{i}" for i in range(6))],
    "convnext_atto": ["stem", *(f"stages.{i}" for i in range(4))],
    "vit_tiny_patch16_224": ["embeddings", *(f"blocks.{i}" for i in range(12))],
    "regnetx_002": ["stem", "s1", "s2", "s3", "s4"],
}


def reference(name: str, size) -> torch.nn.Module:
    net = timm.create_model(name, pretrained=False, num_classes=0)
    if hasattr(net, "set_input_size"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net.set_input_size(img_size=size)
    return net


@needs_timm
@pytest.mark.parametrize("name", FAMILIES)
def test_stages_give_what_timm_gives_before_its_classifier(name, monkeypatch):
    size = FAMILIES[name]
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    net = perturb(reference(name, size), x)
    monkeypatch.setattr(from_timm, "_load_net", lambda *_: net)
    backbone = load(name, "random", size)
    with torch.no_grad():
        vector = net.forward_head(net.forward_features(x), pre_logits=True)
        assert torch.equal(net(x), vector)
    check_stages(backbone, x, vector)
    if name in STAGES:
        assert list(backbone.stage_names) == STAGES[name]
    assert backbone.n_prefix == getattr(net, "num_prefix_tokens", 0)


@needs_timm
def test_untrained_weights_are_always_the_same_and_leave_no_trace():
    before = torch.random.get_rng_state()
    first = load("test_vit", "random")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.fingerprint() == load("test_vit", "random").fingerprint()
    assert first.name == "timm:test_vit"
    twin = pickle.loads(pickle.dumps(first))
    x = torch.randn(1, 3, *first.recipe.crop)
    with torch.no_grad():
        assert torch.equal(twin(x), first(x))


@needs_timm
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "convnext_atto"])
def test_the_recipe_is_timms(name):
    from timm.data import create_transform, resolve_model_data_config

    net = timm.create_model(name)
    resize, crop, _, normalize = create_transform(
        **resolve_model_data_config(net)
    ).transforms
    recipe = from_timm._recipe(net, name, None)
    assert recipe.resize == resize.size
    assert list(recipe.crop) == list(crop.size)
    assert recipe.interpolation == resize.interpolation.value
    assert torch.allclose(torch.tensor(recipe.mean), normalize.mean)
    assert torch.allclose(torch.tensor(recipe.std), normalize.std)


@needs_timm
def test_loading_leaves_batchnorms_statistics_alone():
    # create_model gives a network in training mode, and loading runs it once.
    net = load("test_resnet", "random", 64)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all((norm.running_mean == 0).all() for norm in norms)


@needs_timm
def test_squashing_and_padding_recipes():
    net = timm.create_model("test_vit")
    net.pretrained_cfg = {**net.pretrained_cfg, "crop_mode": "squash", "crop_pct": 1.0}
    recipe = from_timm._recipe(net, "test_vit", None)
    assert (recipe.resize, recipe.squash) == (recipe.crop, True)
    assert not from_timm._recipe(net, "test_vit", 96).squash
    net.pretrained_cfg = {**net.pretrained_cfg, "crop_mode": "border"}
    with pytest.raises(ValueError, match="image_size="):
        from_timm._recipe(net, "test_vit", None)


@needs_timm
def test_a_file_is_loaded_whatever_its_head(tmp_path):
    net = timm.create_model("test_resnet", num_classes=7)
    path = tmp_path / "mine.safetensors"
    save_file({k: t.contiguous() + 0.25 for k, t in net.state_dict().items()}, path)
    backbone = load("test_resnet", str(path), 64)
    assert torch.equal(backbone.stages[0][0][0].weight, net.conv1[0].weight + 0.25)
    with pytest.raises(WeightsError, match="test_efficientnet"):
        load("test_efficientnet", str(path))


@needs_timm
def test_a_network_that_cannot_be_taken_apart_says_what_can():
    with pytest.raises(ValueError, match=r"resnet, .*backbone_from_module\("):
        load("crossvit_tiny_240", "random")


@needs_timm
def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not take images of 100 x 100"):
        load("test_vit", "random", 100)


@needs_timm
def test_offline_says_what_is_missing_and_what_to_do(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(BackboneNotFoundError, match="timm:test_resnet@/path/to"):
        load("test_resnet")
    with pytest.raises(BackboneNotFoundError, match="'embedded'"):
        load("test_resnet.r160_in1k")


@needs_timm
def test_unknown_names_and_tags_name_the_known():
    with pytest.raises(ValueError, match="Did you mean 'resnet18'"):
        load("resnet18x")
    with pytest.raises(ValueError, match=r"'timm:test_resnet\.r160_in1k'"):
        load("test_resnet", "a1_in1k")


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"sklearn-transfer\[timm\]"):
        load("test_resnet", "random")
