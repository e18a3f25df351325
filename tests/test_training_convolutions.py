"""Gradients of convolutions another way: other arithmetic, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sklearn_transfer import ImageClassifier
from sklearn_transfer.training import convolutions
from sklearn_transfer.training.convolutions import ConvolutionGradients
from tests.fine_tuning_data import stripes


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the gradients that were taken as products."""
    shapes = []
    by_taps = convolutions._by_taps

    def noted(*args):
        shapes.append(tuple(args[2].shape))
        return by_taps(*args)

    monkeypatch.setattr(convolutions, "_by_taps", noted)
    monkeypatch.setattr(convolutions, "FEWEST", 4)
    return shapes


def gradients(conv: nn.Module, x: torch.Tensor, inside) -> list[torch.Tensor]:
    """Gradients by the input, the weight and the bias if there is one."""
    wanted = [x, *(p for p in conv.parameters() if p.requires_grad)]
    with inside:
        return torch.autograd.grad(conv(x).float().square().sum(), wanted)


def plain():
    return torch.enable_grad()


@pytest.mark.parametrize(
    "given",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1, "bias": False},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (2, 5), "stride": (2, 1), "padding": (0, 2)},
        {"kernel_size": 3, "padding": "same"},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_products_are_the_gradients(given, layout, products):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, **given).bfloat16()
    x = torch.randn(3, 6, 9, 7).bfloat16().to(memory_format=layout).requires_grad_()
    expected = gradients(conv.float(), x.detach().float().requires_grad_(), plain())
    found = gradients(conv.bfloat16(), x, ConvolutionGradients())
    assert products == [tuple(conv.weight.shape)]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.float() - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "padding"), [(5, 4), (6, 3)])
def test_products_of_maps_smaller_than_the_kernel(
    size, stride, kernel, padding, products
):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, kernel, stride, padding, bias=False).bfloat16()
    x = torch.randn(3, 6, *size).bfloat16().requires_grad_()
    expected = gradients(conv.float(), x.detach().float().requires_grad_(), plain())
    found = gradients(conv.bfloat16(), x, ConvolutionGradients())
    assert products == [tuple(conv.weight.shape)]
    assert (found[1].float() - expected[1]).norm() < 0.01 * expected[1].norm()


@pytest.mark.parametrize(
    "given",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 2, "stride": 2, "bias": False},
        {"kernel_size": (3, 5), "stride": (1, 3), "padding": (0, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [9, 20])
@pytest.mark.parametrize("frozen", [True, False])
def test_strided_depthwise_gradients_are_the_gradients(
    given, size, frozen, monkeypatch
):
    ways = []
    without_stride = convolutions._without_stride
    monkeypatch.setattr(
        convolutions, "_without_stride", lambda *a: ways.append(1) or without_stride(*a)
    )
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, groups=6, **given).requires_grad_(not frozen)
    x = torch.randn(3, 6, size, size - 1)
    # float32 and bfloat16 see the same numbers.
    x, conv = x.bfloat16(), conv.bfloat16()
    expected = gradients(conv.float(), x.float().requires_grad_(), plain())
    with ConvolutionGradients():
        found = gradients(conv.bfloat16(), x.requires_grad_(), plain())
    assert ways == [1]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.float() - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize(
    ("conv", "size", "dtype"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), 8, torch.bfloat16),
        (nn.Conv2d(4, 4, 3, padding=1), 5, torch.float32),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), 5, torch.bfloat16),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2), 5, torch.bfloat16),
        (nn.ConvTranspose2d(4, 4, 3, padding=1), 5, torch.bfloat16),
        (nn.Conv2d(4, 4, 3, stride=2, groups=2), 9, torch.bfloat16),
        (nn.Conv2d(4, 4, 3, stride=2, groups=4), 9, torch.float32),
        (nn.Conv2d(3, 8, 3, stride=3), 9, torch.bfloat16),
    ],
    ids=[
        "large map",
        "float32",
        "groups",
        "dilation",
        "transposed",
        "strided groups",
        "strided float32",
        "few channels",
    ],
)
def test_the_rest_is_torchs_own(conv, size, dtype, products):
    conv, x = conv.to(dtype), torch.randn(2, conv.in_channels, size, size, dtype=dtype)
    x.requires_grad_()
    expected = gradients(conv, x, plain())
    found = gradients(conv, x, ConvolutionGradients())
    assert products == []
    assert all(map(torch.equal, found, expected))


def test_a_first_layer_asks_for_no_gradient_of_its_input(products):
    conv = nn.Conv2d(4, 4, 3, padding=1).bfloat16()
    x = torch.randn(2, 4, 5, 5).bfloat16()
    with ConvolutionGradients():
        conv(x).float().sum().backward()
    assert products == [(4, 4, 3, 3)]
    assert x.grad is None
    assert conv.bias.grad is not None


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_training_takes_them_in_bfloat16_alone(precision, products):
    X, y = stripes(12, 3)
    ImageClassifier(image_size=32, max_epochs=1, precision=precision).fit(X, y)
    assert bool(products) == (precision == "bfloat16")
