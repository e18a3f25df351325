"""Gradients of convolutions over small maps: other arithmetic, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sklearn_transfer import ImageClassifier
from sklearn_transfer.training import convolutions
from sklearn_transfer.training.convolutions import SmallMapGradients
from tests.fine_tuning_data import stripes


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the gradients that were taken as products."""
    shapes = []
    weight_gradient = convolutions._weight_gradient

    def noted(*args):
        shapes.append(tuple(args[2].shape))
        return weight_gradient(*args)

    monkeypatch.setattr(convolutions, "_weight_gradient", noted)
    return shapes


def gradients(conv: nn.Module, x: torch.Tensor, inside) -> list[torch.Tensor]:
    """Gradients by the input, the weight and the bias if there is one."""
    wanted = [x, *conv.parameters()]
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
    found = gradients(conv.bfloat16(), x, SmallMapGradients())
    assert products == [tuple(conv.weight.shape)]
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
    ],
    ids=["large map", "float32", "groups", "dilation", "transposed"],
)
def test_the_rest_is_torchs_own(conv, size, dtype, products):
    conv, x = conv.to(dtype), torch.randn(2, 4, size, size, dtype=dtype)
    x.requires_grad_()
    expected = gradients(conv, x, plain())
    found = gradients(conv, x, SmallMapGradients())
    assert products == []
    assert all(map(torch.equal, found, expected))


def test_a_first_layer_asks_for_no_gradient_of_its_input(products):
    conv = nn.Conv2d(4, 4, 3, padding=1).bfloat16()
    x = torch.randn(2, 4, 5, 5).bfloat16()
    with SmallMapGradients():
        conv(x).float().sum().backward()
    assert products == [(4, 4, 3, 3)]
    assert x.grad is None
    assert conv.bias.grad is not None


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_training_takes_them_in_bfloat16_alone(precision, products):
    X, y = stripes(12, 3)
    ImageClassifier(image_size=32, max_epochs=1, precision=precision).fit(X, y)
    assert bool(products) == (precision == "bfloat16")
