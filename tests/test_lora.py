"""Adapters: nothing changes at first, only they train, and they fold away."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from torchvision import models
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformerBlockV2,
)

from sklearn_transfer.backbones import from_timm, from_transformers
from sklearn_transfer.backbones.from_torchvision import RULES
from sklearn_transfer.backbones.stages import StagedBackbone
from sklearn_transfer.inputs.images import ImageRecipe
from sklearn_transfer.training.lora import SCALE, add_lora, lora_state, merge_lora
from tests.backbone_checks import perturb
from tests.test_backbones_transformers import CONFIGS, TEXTS, save_model

try:
    import timm
except ImportError:
    timm = None

RANK = 3
# --- small networks ----------------------------------------------------------

SWIN = {
    "patch_size": [4, 4],
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": [2, 2],
    "stochastic_depth_prob": 0.0,
}
TORCHVISION = {
    "vit": partial(models.VisionTransformer, 32, 16, 2, 2, 16, 24),
    "swin": partial(models.SwinTransformer, **SWIN),
    "swin_v2": partial(
        models.SwinTransformer,
        **SWIN,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    ),
    "maxvit": partial(
        models.MaxVit, (32, 32), 8, 2, [8, 16], [1, 1], 8, stochastic_depth_prob=0.0
    ),
}
# Matrices of attention: of transformers' families by layers and matrices a layer.
N_MATRICES = dict.fromkeys(CONFIGS, 3 * 4) | {
    "albert": 4,  # one layer, run four times
    "albert-groups": 2 * 4,
    "gpt2": 3 * 2,
    "modernbert": 3 * 2,
    "vit": 2 * 2,
    "swin": 3 * 2,
    "swin_v2": 3 * 2,
    "maxvit": 2 * 2 * 2,
    "timm": 6 * 2,
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Gives a network's backbone and what its first stage takes, built once."""
    built = {}

    def build(name: str):
        if name in CONFIGS:
            folder = save_model(name, tmp_path_factory.mktemp(name))
            backbone = from_transformers.load(folder)
            return backbone, backbone.collate(backbone.tokenize(TEXTS)[0])
        x = torch.randn(2, 3, 32, 32)
        if name == "timm":
            backbone = from_timm.load("test_vit", "random", 32)
            return perturb(backbone, x), x
        split = RULES[type(net := TORCHVISION[name]())](net.eval())
        backbone = StagedBackbone(
            split.stages,
            split.readout,
            layouts=split.layouts or ["nchw"] * len(split.stages),
            recipe=ImageRecipe.for_size(32),
            name=name,
        )
        return perturb(backbone, x), x

    def network(name: str):
        if name == "timm" and timm is None:
            pytest.skip("timm is not installed")
        if name not in built:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                built[name] = build(name)
        backbone, x = built[name]
        return copy.deepcopy(backbone), x

    return network


@pytest.fixture(params=N_MATRICES)
def name(request) -> str:
    return request.param


@pytest.fixture
def network(name, networks):
    return networks(name)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adapt(module: nn.Module, rank: int = RANK, seed: int = 0) -> int:
    stages = module.stages if isinstance(module, StagedBackbone) else [module]
    return add_lora(stages, rank, generator(seed))


def disturb(module: nn.Module) -> nn.Module:
    """Adapters as training may leave them."""
    source = generator(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in lora_state(module):
                noise = torch.randn(parameter.shape, generator=source)
                parameter.add_(noise.to(parameter.dtype), alpha=0.05)
    return module


@torch.no_grad()
def vector(backbone: nn.Module, x) -> torch.Tensor:
    return backbone(x).clone()


def close(found, expected, atol: float) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=atol * max(scale, 1))


def train(backbone, x, n_steps=3, autocast=False) -> None:
    trained = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(n_steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = backbone(x)
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# --- every family ------------------------------------------------------------


def test_output_is_unchanged_at_first(name, network):
    backbone, x = network
    before = vector(backbone, x)
    assert adapt(backbone) == N_MATRICES[name]
    close(vector(backbone, x), before, 1e-6)
    with torch.enable_grad():
        close(backbone(x).detach(), before, 1e-5)  # fast paths are off
    assert not backbone.training


def test_only_adapters_train(name, network):
    backbone, x = network
    adapt(backbone)
    state = lora_state(backbone)
    assert len(state) == 2 * N_MATRICES[name]
    assert state <= set(backbone.state_dict())
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained == state
    disturb(backbone)
    backbone(x).square().sum().backward()
    for key, parameter in backbone.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == (key in state), key


@pytest.mark.parametrize("autocast", [False, True])
def test_training_moves_the_output_and_nothing_frozen(network, autocast):
    backbone, x = network
    adapt(backbone)
    before, state = vector(backbone, x), copy.deepcopy(backbone.state_dict())
    train(backbone, x, autocast=autocast)
    after = vector(backbone, x)
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
    assert after.square().mean() < before.square().mean()
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state[key]) == (key not in lora_state(backbone)), key


def test_merging_keeps_the_output_and_leaves_plain_modules(network):
    backbone, x = network
    keys = list(backbone.state_dict())
    types = [type(module) for module in backbone.modules()]
    adapt(backbone)
    at_first = vector(backbone, x)
    adapted = vector(disturb(backbone), x)
    assert (adapted - at_first).abs().max() > 1e-3 * at_first.abs().max()
    merge_lora(backbone)
    close(vector(backbone, x), adapted, 1e-5)
    assert list(backbone.state_dict()) == keys
    assert [type(module) for module in backbone.modules()] == types
    assert lora_state(backbone) == set()
    assert all(isinstance(p, nn.Parameter) for p in backbone.parameters())


def test_copies_are_independent(network):
    backbone, x = network
    adapt(backbone)
    adapted = vector(disturb(backbone), x)
    twin = copy.deepcopy(backbone)
    close(vector(twin, x), adapted, 1e-6)
    train(twin, x)
    assert (vector(twin, x) - adapted).abs().max() > 1e-4
    trained = vector(twin, x)
    close(vector(backbone, x), adapted, 1e-6)
    merge_lora(twin)
    close(vector(backbone, x), adapted, 1e-6)  # still has its adapters
    train(backbone, x)
    merge_lora(backbone)
    # Both took the same steps from the same start.
    close(vector(backbone, x), trained, 1e-3)


def test_stages_resume_each_other(network):
    backbone, x = network
    adapt(backbone)
    whole = vector(disturb(backbone), x)
    with torch.no_grad():
        for k in range(1, backbone.n_stages):
            close(backbone.after(backbone.until(x, k), k), whole, 1e-5)


def test_stages_left_out_stay_as_they_are(network):
    """The last stages alone are adapted, and gradient reaches them."""
    backbone, x = network
    k = backbone.n_stages - 1
    before = {key: t.clone() for key, t in backbone.stages[:k].state_dict().items()}
    assert add_lora(backbone.stages[k:], RANK, generator()) >= 2
    assert list(backbone.stages[:k].state_dict()) == list(before)
    assert all(p.requires_grad for p in backbone.stages[:k].parameters())
    disturb(backbone)
    with torch.no_grad():
        h = backbone.until(x, k)
    backbone.after(h, k).square().sum().backward()
    last = backbone.stages[k:]
    for key, parameter in last.named_parameters():
        assert (parameter.grad is not None) == (key in lora_state(last)), key


def test_adapters_are_all_that_needs_keeping(network):
    """Their part of the state makes a new network the trained one."""
    backbone, x = network
    other = copy.deepcopy(backbone)
    adapt(backbone)
    disturb(backbone)
    kept = {k: t for k, t in backbone.state_dict().items() if k in lora_state(backbone)}
    adapt(other, seed=1)
    assert not torch.equal(vector(other, x), vector(backbone, x))
    missing, unexpected = other.load_state_dict(kept, strict=False)
    assert unexpected == [] and lora_state(other).isdisjoint(missing)
    close(vector(other, x), vector(backbone, x), 1e-6)


def test_pure_bfloat16_works(network):
    backbone, x = network
    backbone.to(torch.bfloat16)
    if isinstance(x, torch.Tensor):
        x = x.to(torch.bfloat16)
    before = vector(backbone, x)
    adapt(backbone)
    assert torch.equal(vector(backbone, x), before)
    disturb(backbone)(x).float().sum().backward()
    merge_lora(backbone)
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}


# --- what is adapted ---------------------------------------------------------


def adapted_names(backbone, stage: int) -> set[str]:
    found = {
        name.partition(".parametrizations.")[0]
        for name in lora_state(backbone.stages[stage])
    }
    return {name.removeprefix("layer.") for name in found}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", "attention.self.query attention.self.key attention.self.value "
         "attention.output.dense"),
        ("mpnet", "attention.attn.q attention.attn.k attention.attn.v "
         "attention.attn.o"),
        ("gpt2", "attn.c_attn attn.c_proj"),
        ("modernbert", "attn.Wqkv attn.Wo"),
        ("vit", "self_attention self_attention.out_proj"),
        ("swin_v2", "0.attn.qkv 0.attn.proj 1.attn.qkv 1.attn.proj"),
        ("timm", "attn.qkv attn.proj"),
    ],
)  # fmt: skip
def test_attention_is_adapted_and_nothing_else(name, expected, networks):
    backbone, _ = networks(name)
    adapt(backbone)
    assert adapted_names(backbone, stage=1) == set(expected.split())


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_weight_is_the_base_plus_the_scaled_product(kind):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            if kind == "Linear":
                self.proj = nn.Linear(6, 4)
            else:
                self.proj = transformers.pytorch_utils.Conv1D(4, 6)

    module = Attention()
    base = module.proj.weight.detach().clone()
    assert adapt(module, rank=2) == 1
    state = disturb(module).state_dict()
    (down,) = state["proj.parametrizations.weight.0.down"]  # (rank, n_in)
    (up,) = state["proj.parametrizations.weight.0.up"]  # (n_out, rank)
    change = SCALE / 2 * up @ down
    expected = base + (change if kind == "Linear" else change.T)
    torch.testing.assert_close(module.proj.weight, expected)


@pytest.mark.parametrize("kdim", [None, 6])
def test_queries_keys_and_values_have_an_adapter_each(kdim):
    """Fused in one matrix or not: the rank of each part's change is the rank."""
    attention = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim)
    names = ["in_proj_weight"]
    if kdim:
        names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    before = {name: getattr(attention, name).detach().clone() for name in names}
    keys = list(attention.state_dict())
    assert adapt(attention, rank=2) == len(names) + 1
    disturb(attention)
    parts = [
        part
        for name in names
        for part in (getattr(attention, name) - before[name]).split(8)
    ]
    ranks = [int(torch.linalg.matrix_rank(part, rtol=1e-4)) for part in parts]
    assert ranks == [2, 2, 2]
    n_trained = sum(p.numel() for p in attention.parameters() if p.requires_grad)
    assert n_trained == 2 * (4 * 8 + 2 * 8 + 2 * (kdim or 8))
    merge_lora(attention)
    assert list(attention.state_dict()) == keys


def test_product_is_not_rounded_under_autocast():
    attention = nn.MultiheadAttention(8, 2)
    adapt(attention)
    exact = disturb(attention).in_proj_weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention.in_proj_weight, exact)


def test_merging_leaves_shared_weights_alone():
    attention = nn.MultiheadAttention(8, 2)
    weight, before = attention.out_proj.weight, attention.out_proj.weight.clone()
    adapt(attention)
    merge_lora(disturb(attention))
    assert torch.equal(weight, before)
    assert not torch.equal(attention.out_proj.weight, before)


def test_seed_decides_and_the_global_state_is_untouched(networks):
    backbones = [networks("bert")[0] for _ in range(3)]
    before = torch.get_rng_state()
    for backbone, seed in zip(backbones, (0, 0, 1), strict=True):
        adapt(backbone, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    drawn = [
        np.concatenate(
            [b.state_dict()[k].numpy().ravel() for k in sorted(lora_state(b))]
        )
        for b in backbones
    ]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


# --- torch's fast paths ------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Names of torch's fused kernels, as they are called."""
    seen = []
    for name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
        kernel = getattr(torch, name)

        def counted(*args, kernel=kernel, name=name, **kwargs):
            seen.append(name)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    return seen


@pytest.mark.parametrize("kind", ["attention", "layer", "encoder"])
def test_fast_paths_see_the_adapters(kind, calls):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2)
        x = torch.randn(2, 5, 8)
    net = {"attention": layer.self_attn, "layer": layer, "encoder": encoder}[kind]
    net.eval()

    def run():
        if kind == "attention":
            return net(x, x, x, need_weights=False)[0]
        return net(x)

    with torch.no_grad():
        before = run()
    adapt(net)
    disturb(net)
    calls.clear()
    with torch.no_grad():
        fast = run()
    assert calls, "the fast path was not taken, so nothing was tested"
    calls.clear()
    slow = run()  # recording gradients
    assert not calls
    close(fast, slow.detach(), 1e-5)
    assert (fast - before).abs().max() > 1e-3


def test_vit_takes_the_fast_path_with_adapters(networks, calls):
    backbone, x = networks("vit")
    adapt(backbone)
    fast = vector(disturb(backbone), x)
    assert calls
    close(fast, backbone(x).detach(), 1e-5)


# --- errors ------------------------------------------------------------------


def test_network_without_attention_says_how_to_train_it():
    net = models.resnet18()
    with pytest.raises(ValueError) as error:
        add_lora([net.layer3, net.layer4], 8, generator())
    for part in ("lora_rank=8", "Write lora_rank=0", "hold none", "Sequential"):
        assert part in str(error.value)
    assert all(p.requires_grad for p in net.parameters())


def test_no_stages_to_train():
    with pytest.raises(ValueError, match=r"lora_rank=0"):
        add_lora([], 8, generator())


@pytest.mark.parametrize("by", ["add_lora", "weight_norm"])
def test_adapted_twice_is_refused(by):
    attention = nn.MultiheadAttention(8, 2)
    if by == "add_lora":
        adapt(attention)
    else:
        nn.utils.parametrizations.weight_norm(attention.out_proj)
    before = set(attention.state_dict())
    with pytest.raises(ValueError, match="merge_lora"):
        adapt(attention)
    assert set(attention.state_dict()) == before


def test_merging_leaves_other_parametrizations_alone():
    net = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    adapt(net[0])
    nn.utils.parametrizations.weight_norm(net[1])
    merge_lora(net)
    assert not parametrize.is_parametrized(net[0])
    assert parametrize.is_parametrized(net[1])
