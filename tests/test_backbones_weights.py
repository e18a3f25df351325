"""Weight files, and the embedded network that is loaded from one."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sklearn_transfer.backbones.embedded import load as embedded
from sklearn_transfer.backbones.embedded.network import EmbeddedResNet
from sklearn_transfer.backbones.weights import (
    is_weight_file,
    load_body,
    match_keys,
    offline,
    read_state_dict,
    seeded,
)
from sklearn_transfer.exceptions import BackboneNotFoundError, WeightsError
from tests.backbone_checks import check_stages, perturb


class Net(nn.Module):
    def __init__(self, n_classes: int = 5):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, n_classes)


def filled(net: nn.Module, value: float = 0.5) -> dict[str, torch.Tensor]:
    return {key: torch.full_like(t, value) for key, t in net.state_dict().items()}


def is_head(key: str) -> bool:
    return key.startswith("fc.")


def loads(net: nn.Module, state: dict) -> None:
    load_body(net, state, is_head=is_head, source="file for net")


def body_is(net: Net, value: float) -> bool:
    parts = (*net.features.parameters(), net.features[1].running_var)
    return all((t == value).all() for t in parts)


# --- reading -----------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_every_kind_of_file_is_read(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    state = filled(Net())
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    found = read_state_dict(str(path))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_checkpoint_of_a_training_run_is_unwrapped(tmp_path, key):
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, key: filled(Net()), "lr": 0.1}, path)
    assert read_state_dict(path).keys() == Net().state_dict().keys()


class Payload:
    def __reduce__(self):
        return (open, (f"{Payload.witness}", "w"))


@pytest.mark.parametrize("write", [torch.save, "pickle"])
def test_a_payload_never_runs(tmp_path, write):
    Payload.witness = tmp_path / "ran"
    path = tmp_path / "evil.pth"
    content = {"features.0.weight": torch.zeros(2), "x": Payload()}
    if write == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        write(content, path)
    with pytest.raises(WeightsError, match=r"safetensors\.torch\.save_file") as caught:
        read_state_dict(path)
    assert not Payload.witness.exists()
    assert "weights_only" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BackboneNotFoundError, match=r"nowhere\.pth"):
        read_state_dict(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_cut_short_is_an_error_that_names_it(tmp_path, suffix):
    path = tmp_path / f"short{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(filled(Net()), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(WeightsError, match="short"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [torch.zeros(3), {"epoch": 3}, [1, 2]])
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(WeightsError, match="no named tensors"):
        read_state_dict(path)


# --- copying -----------------------------------------------------------------


def test_the_body_is_copied_in_the_networks_dtype():
    net, state = Net(), {k: t.half() for k, t in filled(Net()).items()}
    loads(net, state)
    assert body_is(net, 0.5)
    assert net.features[0].weight.dtype == torch.float32
    assert (net.fc.weight == 0.5).all()  # a head that fits is copied too


@pytest.mark.parametrize("n_classes", [None, 3])
def test_a_head_may_be_absent_or_of_any_width(n_classes):
    net, before = Net(), Net().fc.weight.clone()
    with torch.no_grad():
        net.fc.weight.copy_(before)
    state = filled(Net(n_classes or 5))
    if n_classes is None:
        state = {key: t for key, t in state.items() if not is_head(key)}
    loads(net, state)
    assert body_is(net, 0.5)
    assert torch.equal(net.fc.weight, before)


@pytest.mark.parametrize("prefix", ["module.", "model.backbone."])
def test_an_extra_prefix_is_cut(prefix):
    net = Net()
    loads(net, {prefix + key: t for key, t in filled(net).items()})
    assert body_is(net, 0.5) and (net.fc.weight == 0.5).all()


@pytest.mark.parametrize("with_head", [False, True])
def test_a_missing_prefix_is_added(with_head):
    net = Net()
    state = {
        key.removeprefix("features."): t
        for key, t in filled(net).items()
        if with_head or not is_head(key)
    }
    loads(net, state)
    assert body_is(net, 0.5)
    assert bool((net.fc.weight == 0.5).all()) is with_head


def test_keys_that_fit_are_left_alone():
    # Cutting "1." from "1.0.weight" would give a key of the network, too.
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    state = filled(net)
    assert match_keys(net, state).keys() == state.keys()


def test_batchnorms_counter_may_be_absent():
    net, state = Net(), filled(Net())
    del state["features.1.num_batches_tracked"]
    loads(net, state)
    assert body_is(net, 0.5)


def test_what_does_not_fit_is_named_with_shapes_and_nothing_else_is_said():
    state = filled(Net())
    state["features.0.weight"] = torch.zeros(8, 3, 3, 3)
    del state["features.1.running_var"]
    with pytest.raises(WeightsError) as caught:
        loads(Net(), state)
    message = str(caught.value)
    assert message.startswith("file for net: ")
    assert "features.0.weight: (8, 3, 3, 3), needed (4, 3, 3, 3)" in message
    assert "features.1.running_var: absent, needed (4,)" in message
    assert "2 of the network's 9 tensors" in message


def test_a_network_that_holds_more_is_another_network():
    more = {f"features.{i}.weight": torch.zeros(2) for i in range(2, 10)}
    with pytest.raises(WeightsError, match=r"8 in the file are unknown(.|\n)*3 more"):
        loads(Net(), filled(Net()) | more)


# --- small things ------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("IMAGENET1K_V1", False),
        ("random", False),
        ("mine.safetensors", True),
        ("mine.PTH", True),
        ("folder/mine", True),
        ("C:\\mine", True),
        ("refs/pr/1", False),  # a revision of the Hugging Face hub
        ("refs/mine.pth", True),
        ("./refs/mine", True),
    ],
)
def test_a_file_is_told_by_its_form(weights, expected):
    assert is_weight_file(weights) is expected


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False)])
def test_offline_follows_the_hubs_variables(monkeypatch, variable, value, expected):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert not offline()
    monkeypatch.setenv(variable, value)
    assert offline() is expected


def test_seeded_numbers_repeat_and_leave_no_trace():
    before = torch.random.get_rng_state()
    with seeded():
        first = torch.rand(4)
    with seeded():
        assert torch.equal(torch.rand(4), first)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- the embedded network ----------------------------------------------------


def perturbed_embedded(x: torch.Tensor) -> EmbeddedResNet:
    with seeded():
        return perturb(EmbeddedResNet(), x)


def test_embedded_stages_give_what_enters_its_linear(tmp_path):
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    net = perturbed_embedded(x)
    path = tmp_path / "mine.safetensors"
    save_file({k: t for k, t in net.state_dict().items() if "fc" not in k}, path)
    backbone = embedded.load(str(path), (64, 96))
    net.fc = nn.Identity()
    with torch.no_grad():
        check_stages(backbone, x, net(x))
    assert backbone.stage_names == ("stem", "layer1", "layer2", "layer3", "layer4")


def test_embedded_recipe_looks_at_64_pixels():
    recipe = embedded.load("random").recipe
    assert (recipe.resize, recipe.crop) == (64, (64, 64))
    assert embedded.load("random", 96).recipe.crop == (96, 96)


@pytest.mark.parametrize(
    ("size", "near"), [(60, "64"), (5, "16"), ((64, 90), r"\(64, 96\)")]
)
def test_embedded_names_the_nearest_size_it_takes(size, near):
    with pytest.raises(ValueError, match=f"image_size={near}"):
        embedded.load("random", size)


def test_embedded_untrained_is_always_the_same():
    first, second = embedded.load("random"), embedded.load("random")
    assert first.fingerprint() == second.fingerprint()


def test_embedded_takes_no_enum_name():
    with pytest.raises(ValueError, match=r"'\./weights\.safetensors'"):
        embedded.load("IMAGENET1K_V1")


def test_embedded_without_its_file_says_to_reinstall(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path / "gone.safetensors")
    with pytest.raises(BackboneNotFoundError, match="reinstall"):
        embedded.load()


def test_embedded_weights_ship_and_are_trained():
    if not embedded.WEIGHTS.is_file():
        pytest.skip("the embedded weights are not built yet")
    net, untrained = embedded.load(), embedded.load("random")
    assert net.fingerprint() != untrained.fingerprint()
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert net.stages[0][0].bn.running_var.std() > 0  # it has seen images
