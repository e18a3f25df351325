"""torchvision's networks as lists of stages."""

from __future__ import annotations

import copy
import io
import pickle
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import regnet

from sklearn_transfer.backbones import from_torchvision
from sklearn_transfer.backbones.from_torchvision import RULES, load
from sklearn_transfer.backbones.torchvision_names import TORCHVISION_WEIGHTS
from sklearn_transfer.exceptions import BackboneNotFoundError, WeightsError
from tests.backbone_checks import check_stages, perturb

# One small member a family, and (height, width); not square where it may be so.
FAMILIES = {
    "alexnet": (64, 96),
    "convnext_tiny": (64, 96),
    "densenet121": (64, 96),
    "efficientnet_b0": (64, 96),
    "efficientnet_v2_s": (48, 72),
    "googlenet": (64, 96),
    "inception_v3": (80, 112),
    "maxvit_t": (224, 224),
    "mnasnet0_5": (64, 96),
    "mobilenet_v2": (64, 96),
    "mobilenet_v3_small": (64, 96),
    "regnet_x_400mf": (64, 96),
    "regnet_y_400mf": (64, 96),
    "resnet18": (64, 96),
    "resnext50_32x4d": (64, 96),
    "shufflenet_v2_x0_5": (64, 96),
    "squeezenet1_0": (64, 96),
    "squeezenet1_1": (64, 96),
    "swin_t": (64, 96),
    "swin_v2_t": (64, 96),
    "vgg11_bn": (64, 96),
    "vit_b_32": (96, 96),
}
STAGES = {
    "alexnet": ["block1", "block2", "block3", "fc6", "fc7"],
    "densenet121": ["stem", *(f"denseblock{i}" for i in range(1, 5))],
    "maxvit_t": ["stem", *(f"blocks.{i}" for i in range(4))],
    "mobilenet_v3_small": [f"features.{i}" for i in range(13)],
    "regnet_x_400mf": ["stem", *(f"trunk_output.block{i}" for i in range(1, 5))],
    "resnet18": ["stem", "layer1", "layer2", "layer3", "layer4"],
    "shufflenet_v2_x0_5": ["conv1", "stage2", "stage3", "stage4", "conv5"],
    "vgg11_bn": [*(f"block{i}" for i in range(1, 6)), "fc6", "fc7"],
    "vit_b_32": ["embeddings", *(f"encoder_layer_{i}" for i in range(12))],
}


def probe(size: tuple[int, int], n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(3))


def input_of_last_linear(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What enters the network's own last Linear; SqueezeNet has none."""
    if isinstance(net, models.SqueezeNet):
        with torch.no_grad():
            return net.features(x).mean((2, 3))
    caught = []
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    with torch.no_grad():
        net(x)
    hook.remove()
    return caught[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_give_what_enters_the_last_linear(name, monkeypatch):
    size = FAMILIES[name]
    x = probe(size)
    net = perturb(from_torchvision._untrained(name, size), x)
    monkeypatch.setattr(from_torchvision, "read_state_dict", lambda _: net.state_dict())
    backbone = load(name, "weights.pth", size)
    check_stages(backbone, x, input_of_last_linear(net, x))
    if name in STAGES:
        assert list(backbone.stage_names) == STAGES[name]


@pytest.fixture
def on_meta(monkeypatch):
    """Builds networks without memory; RegNet's plan needs real numbers."""
    plan = regnet.BlockParams.from_init_params.__func__

    def on_cpu(cls, *args, **kwargs):
        with torch.device("cpu"):
            return plan(cls, *args, **kwargs)

    monkeypatch.setattr(regnet.BlockParams, "from_init_params", classmethod(on_cpu))

    def build(name):
        with torch.device("meta"):
            return from_torchvision._untrained(name, (224, 224))

    return build


def test_the_names_are_torchvisions():
    assert sorted(TORCHVISION_WEIGHTS) == sorted(models.list_models(module=models))


@pytest.mark.parametrize("name", TORCHVISION_WEIGHTS)
def test_stages_hold_all_parameters_but_the_heads(name, on_meta):
    net = on_meta(name)
    head = from_torchvision._head_name(net)
    body = {
        id(tensor)
        for key, tensor in [*net.named_parameters(), *net.named_buffers()]
        if not key.startswith(f"{head}.")
    }
    held = set()
    for stage in RULES[type(net)](net).stages.values():
        assert list(stage.parameters())
        held |= {id(t) for t in (*stage.parameters(), *stage.buffers())}
    assert held == body


@pytest.mark.parametrize("name", TORCHVISION_WEIGHTS)
def test_every_published_recipe_is_taken_over(name):
    for entry in models.get_model_weights(name):
        recipe, own = from_torchvision._recipe(entry, None), entry.transforms()
        assert [recipe.resize] == own.resize_size
        assert list(recipe.crop) == own.crop_size * 2
        assert recipe.interpolation == own.interpolation.value
        assert (list(recipe.mean), list(recipe.std)) == (own.mean, own.std)
        from_torchvision._check_size(name, entry, recipe.crop)


def test_a_size_keeps_the_recipes_colours():
    entry = models.get_model_weights("vit_b_16")["IMAGENET1K_SWAG_E2E_V1"]
    recipe = from_torchvision._recipe(entry, 64)
    assert (recipe.resize, recipe.crop, recipe.squash) == (64, (64, 64), False)
    assert recipe.interpolation == "bicubic"


def test_untrained_weights_are_always_the_same_and_leave_no_trace():
    before = torch.random.get_rng_state()
    first, second = (load("mobilenet_v3_small", "random") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.fingerprint() == second.fingerprint()
    torch.manual_seed(7)
    assert load("mobilenet_v3_small", "random").fingerprint() == first.fingerprint()
    other = load("mnasnet0_5", "random")
    assert other.fingerprint() != first.fingerprint()
    assert first.recipe.crop == (224, 224)
    assert {p.dtype for p in first.parameters()} == {torch.float32}


def test_a_copy_and_a_pickle_read_through_their_own_tail():
    net = load("mobilenet_v3_small", "random", 64)
    x = probe((64, 64))
    with torch.no_grad():
        vector = net(x)
        stored = io.BytesIO()
        pickle.dump(net, stored)
        for twin in (copy.deepcopy(net), pickle.loads(stored.getvalue())):
            assert torch.equal(twin(x), vector)
            assert twin.fingerprint() == net.fingerprint()
            for parameter in twin.stages[-1].tail.parameters():
                parameter.zero_()
            assert torch.equal(twin(x), torch.zeros_like(vector))
            assert torch.equal(net(x), vector)


def test_the_last_map_can_be_pooled_otherwise():
    net = load("convnext_tiny", "random", 64)
    x = probe((64, 64))
    with torch.no_grad():
        h = net.run(x, 0, net.n_stages)
        (average,) = net.taps(x, "avg", [net.n_stages])
        (auto,) = net.taps(x, "auto", [net.n_stages])
        (flat,) = net.taps(x, "flatten", [net.n_stages])
    torch.testing.assert_close(average, h.mean((2, 3)))
    assert not torch.allclose(average, auto)  # the norm follows the average
    assert torch.equal(flat, h.flatten(1))


def test_the_class_token_is_no_place_in_the_image():
    net = load("vit_b_32", "random", 64)
    x = probe((64, 64))
    with torch.no_grad():
        h = net.run(x, 0, net.n_stages)  # (2, 1 + 4, 768)
        assert torch.equal(net.tap(h, net.n_stages, "avg"), h[:, 1:].mean(1))
        assert torch.equal(net.tap(h, net.n_stages, "cls"), net(x))


def test_position_embeddings_follow_the_image_size(monkeypatch):
    small = from_torchvision._untrained("vit_b_32", (224, 224)).eval()
    state = {f"module.{key}": t.half() for key, t in small.state_dict().items()}
    monkeypatch.setattr(from_torchvision, "read_state_dict", lambda _: state)
    same = load("vit_b_32", "file.pth")
    larger = load("vit_b_32", "file.pth", 288)
    grid = small.encoder.pos_embedding[:, 1:].half().float()
    assert torch.equal(same.stages[0].pos_embedding[:, 1:], grid)
    resized = larger.stages[0].pos_embedding
    assert resized.shape == (1, 1 + 9 * 9, 768)
    # Corners stay where they are when a grid is resized with aligned corners.
    corners = resized[0, [1, 9, 73, 81]]
    torch.testing.assert_close(corners, grid[0, [0, 6, 42, 48]])


def test_maxvit_takes_multiples_of_its_windows(on_meta):
    with torch.device("meta"):
        net = from_torchvision._untrained("maxvit_t", (448, 448))
    usual = on_meta("maxvit_t")
    shapes = {k: t.shape for k, t in usual.state_dict().items()}
    assert {k: t.shape for k, t in net.state_dict().items()} == shapes
    assert net(torch.empty(1, 3, 448, 448, device="meta")).shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "size", "hint"),
    [
        ("vit_b_16", 100, "image_size=96"),
        ("vit_b_16", (224, 192), "multiple of 16"),
        ("maxvit_t", 256, "image_size=224"),
        ("inception_v3", 64, "75 x 75"),
        ("alexnet", (100, 50), "63 x 63"),
        ("densenet121", 16, "29 x 29"),
        ("swin_t", 3, "4 x 4"),
    ],
)
def test_images_a_network_cannot_take_are_refused_with_the_remedy(name, size, hint):
    with pytest.raises(ValueError, match=hint):
        load(name, "random", size)


@pytest.mark.parametrize(
    ("name", "smallest"),
    [("alexnet", 63), ("squeezenet1_1", 17), ("googlenet", 15), ("swin_t", 4)],
)
def test_the_smallest_size_is_the_smallest(name, smallest):
    with torch.no_grad():
        net = load(name, "random", smallest)
        assert net(probe((smallest, smallest), n=1)).isfinite().all()
        with pytest.raises(RuntimeError):
            net(probe((smallest - 1, smallest - 1), n=1))


# --- weights -----------------------------------------------------------------


def test_an_unknown_enum_lists_those_there_are():
    with pytest.raises(ValueError, match="'IMAGENET1K_V1', 'IMAGENET1K_V2', 'random'"):
        load("resnet50", "IMAGENET1K_V9")


def test_offline_says_what_is_missing_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloads")
    )
    with pytest.raises(BackboneNotFoundError) as caught:
        load("resnet18", "IMAGENET1K_V1")
    message = str(caught.value)
    assert "resnet18-f37072fd.pth" in message and str(tmp_path) in message
    assert "torchvision:resnet18@/path/to" in message and "'embedded'" in message


def test_a_failed_download_is_the_same_error(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    with pytest.raises(BackboneNotFoundError, match="no route"):
        load("resnet18", "IMAGENET1K_V1")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Stands in for a download: a checkpoint whose name holds its digest."""
    import hashlib

    def publish(name: str, state: dict, damaged: bool = False):
        stored = io.BytesIO()
        torch.save(state, stored)
        content = stored.getvalue()
        digest = hashlib.sha256(content).hexdigest()[:8]
        entry = models.get_model_weights(name)["IMAGENET1K_V1"]
        url = f"https://download.pytorch.org/models/{name}-{digest}.pth"
        monkeypatch.setattr(type(entry), "url", url)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        (tmp_path / "checkpoints").mkdir()
        path = tmp_path / "checkpoints" / f"{name}-{digest}.pth"
        path.write_bytes(content[:-1] + b"?" if damaged else content)
        return path

    return publish


def test_a_checkpoint_in_torch_hubs_folder_is_loaded_offline(published):
    net = from_torchvision._untrained("squeezenet1_1", (64, 64))
    published("squeezenet1_1", {k: t + 1 for k, t in net.state_dict().items()})
    backbone = load("squeezenet1_1", "IMAGENET1K_V1")
    expected = net.features[0].weight + 1
    assert torch.equal(backbone.stages[0][0].weight, expected)


def test_a_damaged_checkpoint_is_named(published):
    net = from_torchvision._untrained("squeezenet1_1", (64, 64))
    path = published("squeezenet1_1", net.state_dict(), damaged=True)
    with pytest.raises(WeightsError, match=f"{path.name} is damaged"):
        load("squeezenet1_1", "IMAGENET1K_V1")


def test_old_densenet_keys_and_auxiliary_heads_are_understood(monkeypatch):
    old = from_torchvision._untrained("densenet121", (64, 64)).state_dict()
    keys = {k: k.replace("norm1", "norm.1").replace("conv2", "conv.2") for k in old}
    state = {keys[k] if "denselayer" in k else k: t for k, t in old.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    monkeypatch.setattr(from_torchvision, "read_state_dict", lambda _: state)
    assert load("densenet121", "old.pth").n_stages == 5

    full = models.googlenet(aux_logits=True, init_weights=False).state_dict()
    assert any(key.startswith("aux1.") for key in full)
    monkeypatch.setattr(from_torchvision, "read_state_dict", lambda _: full)
    net = load("googlenet", "full.pth")
    assert torch.equal(net.stages[0][1][0].conv.weight, full["conv1.conv.weight"])


def test_a_file_of_a_larger_sibling_is_refused(monkeypatch):
    larger = models.resnet34(weights=None).state_dict()
    monkeypatch.setattr(from_torchvision, "read_state_dict", lambda _: larger)
    with pytest.raises(WeightsError, match="not in the network"):
        load("resnet18", "resnet34.pth")


def test_real_half_precision_weights_give_the_published_vector(shared):
    path = shared / "weights" / "image" / "mobilenet_v2_imagenet.safetensors"
    if not path.exists():
        pytest.skip("the MobileNetV2 weights are not beside the repository")
    net = load("mobilenet_v2", str(path))
    reference = models.mobilenet_v2(weights=None).eval()
    state = {k: t.float() for k, t in from_torchvision.read_state_dict(path).items()}
    reference.load_state_dict(state)
    x = probe((96, 96))
    vector = input_of_last_linear(reference, x)
    with torch.no_grad():
        torch.testing.assert_close(net(x), vector, rtol=1e-5, atol=1e-6)
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_weights_without_the_constant_prefix_load(shared):
    name = "squeezenet1_1_features_imagenet.safetensors"
    path = shared / "weights" / "image" / name
    if not path.exists():
        pytest.skip("the SqueezeNet weights are not beside the repository")
    state = from_torchvision.read_state_dict(path)
    assert "0.weight" in state
    net = load("squeezenet1_1", str(path), 64)
    assert torch.equal(net.stages[0][0].weight, state["0.weight"])
    assert torch.equal(net.stages[-1].expand3x3.bias, state["12.expand3x3.bias"])
