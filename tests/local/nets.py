"""Networks and data that several of these tests share."""

from __future__ import annotations

from functools import partial

import torch
import torchvision
from torch import nn

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 3, 32, 32, generator=DRAW), torch.arange(12) % 10
SGD = partial(torch.optim.SGD, lr=0.05)


def resnet() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10)


def mobile() -> nn.Module:
    return torchvision.models.mobilenet_v3_small(num_classes=10, width_mult=0.25, dropout=0.0)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
