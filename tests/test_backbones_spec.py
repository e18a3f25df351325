"""What a backbone string means, and what a layer is."""

from __future__ import annotations

import numpy as np
import pytest

from sklearn_transfer import list_backbones
from sklearn_transfer.backbones.spec import (
    BackboneSpec,
    parse_backbone,
    resolve_freeze_depth,
    resolve_layers,
)
from sklearn_transfer.backbones.torchvision_names import TORCHVISION_WEIGHTS


@pytest.mark.parametrize(
    "text, meaning",
    [
        ("embedded", ("embedded", "embedded", None)),
        ("embedded@random", ("embedded", "embedded", "random")),
        ("resnet18", ("torchvision", "resnet18", "IMAGENET1K_V1")),
        ("resnet50@IMAGENET1K_V2", ("torchvision", "resnet50", "IMAGENET1K_V2")),
        ("torchvision:vgg16@random", ("torchvision", "vgg16", "random")),
        ("resnet18@/a/b.pth", ("torchvision", "resnet18", "/a/b.pth")),
        ("timm:resnet18", ("timm", "resnet18", None)),
        ("convnext_atto", ("timm", "convnext_atto", None)),
        ("gpt2", ("hf", "gpt2", None)),
        ("bert-base-uncased@random", ("hf", "bert-base-uncased", "random")),
        ("org/name@v1.0", ("hf", "org/name", "v1.0")),
        ("./folder", ("hf", "./folder", None)),
        ("hf:folder", ("hf", "folder", None)),
    ],
)
def test_meaning_of_a_string(text, meaning):
    assert parse_backbone(text) == BackboneSpec(*meaning)


@pytest.mark.parametrize("text", ["embedded@random", "torchvision:vgg16@random"])
def test_a_spec_prints_as_what_it_was_read_from(text):
    assert str(parse_backbone(text)) == text


@pytest.mark.parametrize("text", ["", "resnet18@", "@random", "torchvision:"])
def test_a_malformed_string_shows_the_form(text):
    with pytest.raises(ValueError, match=r"\[source:\]name\[@weights\]"):
        parse_backbone(text)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [("embedded:resnet50", "'resnet50'"), ("embedded:vgg16@random", "'vgg16@random'")],
)
def test_the_embedded_network_answers_to_no_other_name(text, remedy):
    with pytest.raises(ValueError, match=f"Write 'embedded', or {remedy}"):
        parse_backbone(text)
    spec = parse_backbone("embedded:embedded@random")
    assert spec == parse_backbone("embedded@random")


def test_an_unknown_torchvision_name_suggests_near_ones():
    with pytest.raises(ValueError, match=r"Did you mean 'resnet50'"):
        parse_backbone("torchvision:resnet-50")


def test_the_table_is_torchvision_s():
    """Every name, an enum that exists, and the size of its file."""
    from torchvision import models

    names = models.list_models(module=models)
    assert sorted(TORCHVISION_WEIGHTS) == sorted(names)
    for name, (enum, megabytes) in TORCHVISION_WEIGHTS.items():
        weights = models.get_model_weights(name)[enum]
        assert abs(weights.meta["_file_size"] - megabytes) <= 1, name


STAGES = ("stem", "layer1", "layer2")


@pytest.mark.parametrize(
    "layers, stages",
    [
        ("last", (3,)),
        ("all", (1, 2, 3)),
        ("layer1", (2,)),
        (1, (1,)),
        (-1, (3,)),
        (np.int64(-3), (1,)),
        (["layer2", 1], (3, 1)),
        ((1, "last", -2), (1, 3, 2)),
    ],
)
def test_layers(layers, stages):
    assert resolve_layers(layers, STAGES) == stages


@pytest.mark.parametrize("layers", ["layer3", 0, 4, -4, True, 1.5, ["stem", None]])
def test_a_wrong_layer_lists_the_stages(layers):
    with pytest.raises(ValueError, match=r"'stem', 'layer1', 'layer2'"):
        resolve_layers(layers, STAGES)


@pytest.mark.parametrize(
    ("layers", "stage", "remedy"),
    [
        ([1, 1], "stem", "['stem']"),
        (["layer2", 1, "last"], "layer2", "['layer2', 'stem']"),
        ((2, -2, "stem"), "layer1", "['layer1', 'stem']"),
    ],
)
def test_a_stage_asked_for_twice_is_named(layers, stage, remedy):
    with pytest.raises(ValueError, match="2 times") as caught:
        resolve_layers(layers, STAGES)
    assert repr(stage) in str(caught.value)
    assert f"layers={remedy}" in str(caught.value)


@pytest.mark.parametrize(
    ("freeze_depth", "k"),
    [
        (0, 0),
        (2, 2),
        (3, 3),
        ("all", 3),
        (-1, 2),
        (-3, 0),
        ("stem", 1),
        ("layer2", 3),
        (np.int64(-2), 1),
        (np.uint8(1), 1),
    ],
)
def test_a_freezing_depth_counts_stages_from_the_front(freeze_depth, k):
    found = resolve_freeze_depth(freeze_depth, STAGES)
    assert found == k and type(found) is int


@pytest.mark.parametrize(
    "freeze_depth",
    [4, -4, True, False, np.True_, 1.0, None, "layer3", "last", "", ["stem"]],
)
def test_a_wrong_freezing_depth_lists_the_stages_and_the_ways_to_write_it(freeze_depth):
    with pytest.raises(ValueError, match=r"'stem', 'layer1', 'layer2'") as caught:
        resolve_freeze_depth(freeze_depth, STAGES)
    assert repr(freeze_depth) in str(caught.value)
    assert "0 to 3" in str(caught.value) and "freeze_depth='all'" in str(caught.value)


def test_list_backbones():
    assert list_backbones("embedded") == ["embedded"]
    assert len(list_backbones("torchvision")) == 80
    assert set(list_backbones("text")) == set(list_backbones("hf"))
    assert {"embedded", "resnet50", "gpt2"} <= set(list_backbones())
    with pytest.raises(ValueError, match="'image', 'text' or None"):
        list_backbones("audio")
