"""Networks, data and two steps that the tests of the feedback alignment family share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallearn.algorithms import Algorithm, TaskInfo
from locallearn.batch import Batch
from locallearn.nets import Blocks, cnn, mlp, resnet

CLASSES = 3
DRAW = torch.Generator().manual_seed(0)
IMAGES = Batch(
    torch.randn(6, 4, 8, 8, generator=DRAW, dtype=torch.float64), torch.randint(CLASSES, (6,), generator=DRAW)
)
ROWS = IMAGES._replace(inputs=IMAGES.inputs.flatten(1)[:, :12].contiguous())


class Called(nn.Module):
    """A layer that is run by its weight alone, with names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(weight=self.inner.weight, bias=self.inner.bias, input=x)


def _odd() -> Blocks:
    """Whatever a convolution can do, and activations that overwrite what the layers give."""
    return Blocks(
        {
            "stem": nn.Sequential(nn.Conv2d(4, 8, 3, padding="same"), nn.ReLU(inplace=True)),
            "even": nn.Sequential(nn.Conv2d(8, 8, (2, 4), padding="same", dilation=(1, 2)), nn.ReLU(inplace=True)),
            "mirrored": nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.GroupNorm(2, 8)),
            "grouped": nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4, bias=False), nn.Tanh()),
            "dilated": nn.Sequential(nn.Conv2d(12, 8, 3, padding=(2, 1), dilation=2), nn.BatchNorm2d(8), nn.ReLU()),
            "flat": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Called(), nn.ReLU()),
        },
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES)),
    )


def _grouped() -> Blocks:
    return Blocks(
        {
            "stem": nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU()),
            "grouped": nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4), nn.ReLU()),
        },
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)),
    )


NETS: dict[str, Any] = {
    "mlp": lambda: mlp((12,), CLASSES, (10, 9), readout_bias=True),
    "cnn": lambda: cnn((4, 8, 8), CLASSES, (5, 6), batch_norm=True),
    "resnet": lambda: resnet((4, 8, 8), CLASSES, units=1, widths=(4, 8)),
    "odd": _odd,
    "grouped": _grouped,
}


def batch_of(net: str) -> Batch:
    return ROWS if net == "mlp" else IMAGES


def attached(net: str | Blocks, algorithm: Algorithm, batch: Batch | None = None) -> Any:
    """Attached in double precision, to a network that is the same every time."""
    torch.manual_seed(0)
    blocks = NETS[net]() if isinstance(net, str) else net
    if batch is None:
        batch = batch_of(net) if isinstance(net, str) else ROWS
    few = Batch(batch.inputs[:2], batch.targets[:2])
    algorithm.attach(blocks.double(), TaskInfo(few, CLASSES, F.cross_entropy))
    return algorithm.train()


def gradients_of(algorithm: Algorithm, batch: Batch) -> dict[str, Tensor]:
    """Gradients of the network's own parameters."""
    for update in algorithm.updates(batch):
        update.backward()
    gradients = {name: p.grad.clone() for name, p in algorithm.blocks.named_parameters() if p.grad is not None}
    algorithm.zero_grad()
    return gradients
