"""Networks and data that several of these tests share."""

from __future__ import annotations

from functools import partial

import torch
import torchvision
from torch import Tensor, nn

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 3, 32, 32, generator=DRAW), torch.arange(12) % 10
SGD = partial(torch.optim.SGD, lr=0.05)


def resnet() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10)


def mobile() -> nn.Module:
    return torchvision.models.mobilenet_v3_small(num_classes=10, width_mult=0.25, dropout=0.0)


class Later(nn.Module):
    """Holds the layer last that it runs first."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.deep, self.stem = nn.Conv2d(8, 8, 3), nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(N, num_classes)``."""
        out: Tensor = self.fc(self.deep(self.stem(x).relu()).relu().mean((2, 3)))
        return out


class Grey(nn.Module):
    """Takes images of one channel where its convolution takes three, and cannot go on from there."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(9, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(N, num_classes)``."""
        out: Tensor = self.fc(self.stem(x.expand(-1, 3, -1, -1)).relu().mean((2, 3)))
        return out


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
