"""The compact residual network whose weights ship with the package."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

WIDTHS = (32, 64, 128, 256)
DEPTHS = (1, 2, 2, 2)
N_FEATURES = WIDTHS[-1]


def _conv_bn(n_in: int, n_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(n_out)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2015).

    A strided block averages its shortcut over 2 x 2 pixels instead of dropping
    three of four (the "D" variant of He et al., 2018, arXiv:1812.01187).
    """

    def __init__(self, n_in: int, n_out: int, stride: int = 1):
        super().__init__()
        self.conv1 = _conv_bn(n_in, n_out, 3, stride)
        self.conv2 = _conv_bn(n_out, n_out, 3)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        same = n_in == n_out and stride == 1
        self.shortcut = nn.Identity() if same else _conv_bn(n_in, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv1(x))
        return torch.relu(self.conv2(h) + self.shortcut(self.pool(x)))


def _layer(n_in: int, n_out: int, depth: int, stride: int) -> nn.Sequential:
    blocks = [BasicBlock(n_in, n_out, stride)]
    blocks += [BasicBlock(n_out, n_out) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


class EmbeddedResNet(nn.Module):
    """A residual network for small photographs: 2.8 M parameters, 256 features.

    Input ``(n, 3, h, w)``, h and w multiples of 16 (``AvgPool2d(2)`` floors odd
    maps where a stride-2 convolution rounds up, so other sizes do not add up).
    ``fc`` gives the logits of the classes it was pretrained on.
    """

    def __init__(self, n_classes: int = 200):
        super().__init__()
        self.stem = nn.Sequential(_conv_bn(3, WIDTHS[0], 3, stride=2), nn.ReLU())
        n_in = WIDTHS[0]
        for i, (n_out, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), 1):
            layer = _layer(n_in, n_out, depth, stride=1 if i == 1 else 2)
            setattr(self, f"layer{i}", layer)
            n_in = n_out
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(N_FEATURES, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # (n, 32, h/2, w/2)
        x = self.layer1(x)  # (n, 32, h/2, w/2)
        x = self.layer2(x)  # (n, 64, h/4, w/4)
        x = self.layer3(x)  # (n, 128, h/8, w/8)
        x = self.layer4(x)  # (n, 256, h/16, w/16)
        return self.fc(self.avgpool(x).flatten(1))
